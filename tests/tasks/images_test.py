import gzip
import os
import pathlib
import struct

import numpy as np
import pytest

from ancestral.tasks import base, images

DATA = os.environ.get("ANCESTRAL_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="ANCESTRAL_DATA names no folder of data sets")


def idx(array):
  """An IDX file written by hand, value by value."""
  lengths = b"".join(struct.pack(">i", n) for n in array.shape)
  return bytes([0, 0, 8, array.ndim]) + lengths + bytes(array.flatten().tolist())


def written(folder, num=7, num_labels=None, split="train", compress=True):
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (num, 5, 4), dtype=np.uint8)
  labels = (np.arange(num if num_labels is None else num_labels) * 3 % 10).astype(np.uint8)
  for name, array in (("images-idx3", pixels), ("labels-idx1", labels)):
    content = gzip.compress(idx(array)) if compress else idx(array)
    (folder / f"{split}-{name}-ubyte{'.gz' * compress}").write_bytes(content)
  return pixels, labels


def some(num=6, levels=17, num_classes=4):
  rng = np.random.default_rng(1)
  pixels = rng.integers(0, levels, (num, 3, 2, 1), dtype=np.uint8)
  labels = (np.arange(num) % num_classes).astype(np.int32)
  return images.Images(pixels, labels, levels, tuple("abcdefgh"[:num_classes]))


def test_digits():
  loaded = images.digits()
  assert loaded.images.shape == (1797, 8, 8, 1) and loaded.images.dtype == np.uint8
  assert (loaded.levels, loaded.images.min(), loaded.images.max()) == (17, 0, 16)
  assert loaded.class_names == tuple("0123456789") and loaded.num_classes == 10
  # The counts that scikit-learn's data set is published with.
  counts = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
  np.testing.assert_array_equal(np.bincount(loaded.labels), counts)
  # A nought has a hole: its middle is darker than the middle of a one.
  middle = [loaded.images[loaded.labels == digit, 3:5, 3:5].mean() for digit in (0, 1)]
  assert middle[0] < 4 < 8 < middle[1]


@needs_data
@pytest.mark.parametrize("split, per_class", [("train", 6000), ("test", 1000)])
def test_fashion_mnist(split, per_class):
  loaded = images.fashion_mnist(pathlib.Path(DATA, "fashion_mnist"), split)
  assert loaded.images.shape == (10 * per_class, 28, 28, 1)
  np.testing.assert_array_equal(np.bincount(loaded.labels), np.full(10, per_class))
  assert (loaded.levels, loaded.images.max(), loaded.num_classes) == (256, 255, 10)
  # An ankle boot comes first in both files, and trousers have two legs with a gap between them.
  assert loaded.class_names[loaded.labels[0]] == "Ankle boot"
  legs = loaded.images[loaded.labels == 1, 20:26, :, 0].mean(axis=(0, 1))
  assert legs[14] < min(legs[10], legs[17]) and legs[:5].max() < 15


@pytest.mark.parametrize("compress", [True, False])
def test_files_are_read_compressed_or_not(tmp_path, compress):
  for split, stem in (("train", "train"), ("test", "t10k")):
    pixels, labels = written(tmp_path, num=7 + len(split), split=stem, compress=compress)
    loaded = images.fashion_mnist(tmp_path, split)
    np.testing.assert_array_equal(loaded.images[..., 0], pixels)
    np.testing.assert_array_equal(loaded.labels, labels)
    assert loaded.labels.dtype == np.int32 and loaded.class_names[5] == "Sandal"


def test_concatenated_gzip_is_one_file(tmp_path):
  array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
  content = idx(array)
  (tmp_path / "a").write_bytes(gzip.compress(content[:20]) + gzip.compress(content[20:]))
  np.testing.assert_array_equal(images.read_idx(tmp_path / "a"), array)


def test_missing_folders_and_files_are_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="nowhere is not a folder; give the folder of the"):
    images.fashion_mnist(tmp_path / "nowhere", "train")
  with pytest.raises(
    FileNotFoundError, match=r"has no train-images-idx3-ubyte\.gz, nor train-images"
  ):
    images.fashion_mnist(tmp_path, "train")
  written(tmp_path)
  (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
  with pytest.raises(FileNotFoundError, match=r"has no train-labels-idx1-ubyte\.gz"):
    images.fashion_mnist(tmp_path, "train")
  with pytest.raises(FileNotFoundError, match="a is not a file; give an IDX file"):
    images.read_idx(tmp_path / "a")
  with pytest.raises(ValueError, match="split is 'valid'; it is 'train' or 'test'"):
    images.fashion_mnist(tmp_path, "valid")


def test_a_truncated_gzip_names_its_bytes(tmp_path):
  array = np.random.default_rng(0).integers(0, 256, (50, 9, 9), dtype=np.uint8)
  packed, path = gzip.compress(idx(array)), tmp_path / "train-images-idx3-ubyte.gz"
  size = 16 + 50 * 81
  path.write_bytes(packed[: len(packed) // 2])
  with pytest.raises(ValueError, match=rf"train-images.* is cut: \d+ bytes, {size} expected") as e:
    images.read_idx(path)
  actual = int(str(e.value).split("is cut: ")[1].split()[0])
  assert 0.4 * size < actual < 0.6 * size
  path.write_bytes(packed[:-3])  # all values, but not the checksum that says so
  with pytest.raises(ValueError, match=rf"is cut: {size} bytes, {size} expected.*does not end"):
    images.read_idx(path)
  path.write_bytes(packed[:12])  # of which nothing can be unpacked
  with pytest.raises(ValueError, match="is cut: 0 bytes, 4 expected of its header"):
    images.read_idx(path)
  path.write_bytes(packed[:100] + bytes([packed[100] ^ 255]) + packed[101:])
  with pytest.raises(ValueError, match=r"ubyte\.gz is not sound gzip"):
    images.read_idx(path)


@pytest.mark.parametrize(
  "edit, message",
  [
    (lambda c: c[:-5], "is cut: 47 bytes, 52 expected of a header of 16 and an array of .3, 4, 3"),
    (lambda c: c + b"ab", "is too long: 54 bytes, 52 expected"),
    (lambda c: c[:10], "is cut: 10 bytes, 16 expected of its header"),
    (lambda c: b"", "is cut: 0 bytes, 4 expected"),
    (lambda c: b"\x08" + c[1:], "begins with 08 00 08 03; an IDX file of bytes begins with 00 00"),
    (lambda c: c[:2] + b"\x0d" + c[3:], "begins with 00 00 0d 03"),  # floats
    (lambda c: c[:3] + b"\x00" + c[4:], "begins with 00 00 08 00"),
    (lambda c: b"<html> not found", "begins with 3c 68 74 6d"),
  ],
)
def test_a_bad_idx_file_is_named(tmp_path, edit, message):
  path = tmp_path / "some-idx3-ubyte"
  path.write_bytes(edit(idx(np.arange(36, dtype=np.uint8).reshape(3, 4, 3))))
  with pytest.raises(ValueError, match=f"some-idx3-ubyte {message}") as e:
    images.read_idx(path)
  assert "\n" not in str(e.value)


def test_files_that_do_not_belong_together(tmp_path):
  written(tmp_path, num=7, num_labels=6)
  with pytest.raises(ValueError, match=r"has 7 images and train-labels-idx1-ubyte\.gz 6 labels"):
    images.fashion_mnist(tmp_path, "train")
  pixels, labels = tmp_path / "train-images-idx3-ubyte.gz", tmp_path / "train-labels-idx1-ubyte.gz"
  pixels.write_bytes(labels.read_bytes())
  with pytest.raises(ValueError, match="has the magic number 2049; 2051 is expected"):
    images.fashion_mnist(tmp_path, "train")
  written(tmp_path)
  labels.write_bytes(gzip.compress(idx(np.array([1, 2, 3, 4, 5, 6, 10], np.uint8))))
  with pytest.raises(ValueError, match="image 6 has the label 10 of 10 classes; labels are 0 to 9"):
    images.fashion_mnist(tmp_path, "train")


class Records:
  """Random access and nothing else, like a data source of tensorflow-datasets."""

  def __init__(self, rows):
    self.rows = rows

  def __len__(self):
    return len(self.rows)

  def __getitem__(self, index):
    if not 0 <= index < len(self.rows):
      raise RuntimeError("records are asked for by their index")
    return self.rows[index]


def test_records_of_bytes_and_of_floats():
  expected = some(levels=256)
  rows = [
    {"image": image, "label": np.int64(label), "id": b"x"}
    for image, label in zip(expected.images, expected.labels, strict=True)
  ]
  names = expected.class_names
  loaded = images.from_records(Records(rows), class_names=names)
  grey = images.from_records([{**row, "image": row["image"][..., 0]} for row in rows])
  floats = images.from_records(
    [{"image": np.float32(2) * row["image"] / 255 - 1, "label": int(row["label"])} for row in rows]
  )
  for found in (loaded, grey, floats):
    np.testing.assert_array_equal(found.images, expected.images)
    np.testing.assert_array_equal(found.labels, expected.labels)
    assert (found.images.dtype, found.labels.dtype, found.levels) == (np.uint8, np.int32, 256)
  assert loaded.class_names == names and floats.class_names == ("0", "1", "2", "3")
  # Three levels are at -1, 0 and 1, and a float goes to the nearest.
  image = np.array([[-1, -0.51, -0.49, 0.49, 0.51, 1]])
  three = images.from_records([{"image": image, "label": 0}], levels=3)
  np.testing.assert_array_equal(three.images[0, 0, :, 0], [0, 0, 1, 1, 2, 2])


GOOD = np.zeros((3, 2, 1), np.float32)


@pytest.mark.parametrize(
  "record, message",
  [
    ({"image": GOOD}, "record 1 has fields .'image'.; it needs image and label"),
    (
      {"image": GOOD[:2], "label": 0},
      r"image 1 is \(2, 2, 1\) and image 0 is \(3, 2, 1\); crop or",
    ),
    ({"image": GOOD[0, :, 0], "label": 0}, r"image 1 has shape \(2,\); it is \[H, W, C\]"),
    ({"image": GOOD.astype(int), "label": 0}, "image 1 is int64; give uint8 levels, or floats"),
    ({"image": GOOD > 0, "label": 0}, "image 1 is bool; give uint8"),
    ({"image": GOOD + 255, "label": 0}, "image 1 has floats from 255 to 255; floats are in"),
    ({"image": GOOD, "label": 0.5}, "image 1 has the label 0.5; give a class, 0, 1"),
    ({"image": GOOD, "label": -1}, "image 1 has the label -1; give a class, 0, 1"),
    ({"image": GOOD, "label": [0, 1]}, "image 1 has the label .0, 1.; give a class"),
    ({"image": GOOD, "label": 2}, "image 1 has the label 2 of 2 classes; labels are 0 to 1"),
  ],
)
def test_a_bad_record_is_named(record, message):
  with pytest.raises(ValueError, match=message):
    images.from_records([{"image": GOOD, "label": 1}, record], class_names=("a", "b"))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_float_that_is_not_finite_is_named(value):
  image = GOOD.copy()
  image[2, 1, 0] = value
  with pytest.raises(ValueError, match=rf"image 1 has {value} at \(2, 1, 0\); every value has to"):
    images.from_records([{"image": GOOD, "label": 0}, {"image": image, "label": 0}])
  raw = images.Images(np.stack([GOOD, GOOD, image]), np.zeros(3, np.int32), 256, ("a",))
  with pytest.raises(ValueError, match=rf"image 2 has {value} at \(2, 1, 0\)"):
    images.check(raw)


def test_no_records():
  with pytest.raises(ValueError, match="there are no records"):
    images.from_records([])


def edited(**kwargs):
  return some()._replace(**kwargs)


@pytest.mark.parametrize(
  "bad, message",
  [
    (edited(images=some().images[..., 0]), r"images have shape \(6, 3, 2\); give \[N, H, W, C\]"),
    (edited(images=some().images[:0]), "images have shape .*with nothing empty"),
    (edited(labels=some().labels[:5]), r"6 images and labels of \(5,\); give one to each"),
    (edited(images=some().images.astype(np.int32)), "images are int32; give uint8 levels"),
    (edited(images=np.zeros((6, 3, 2, 1))), "images are float64; give uint8 levels"),
    (edited(labels=some().labels.astype(np.int64)), "labels are int64; give int32"),
    (edited(levels=1), "levels is 1; a pixel has from 2 to 256"),
    (edited(levels=257), "levels is 257"),
    (edited(labels=np.int32([0, 1, 4, 0, -1, 0])), "image 2 has the label 4 of 4 classes"),
    (edited(labels=np.int32([0, 1, 3, 0, -1, 0])), "image 4 has the label -1 of 4 classes"),
  ],
)
def test_check_names_the_first_bad_image(bad, message):
  with pytest.raises(ValueError, match=message):
    images.check(bad)


def test_check_passes_the_good_and_finds_a_level_too_high():
  good = some()
  assert images.check(good) is good
  good.images[3, 1, 0, 0] = good.images[5, 0, 0, 0] = 17
  with pytest.raises(ValueError, match="image 3 has the value 17 at 17 levels; values are 0 to 16"):
    images.check(good)


def test_sides_are_disjoint_and_complete():
  whole = images.digits()
  train, test = (images.side(whole, split, test_percent=20) for split in ("train", "test"))
  # Each image is where the hash of its index says; 20% +- 4 sd of 1,797 go to the test side.
  where = [base.split_of(str(i), test_percent=20) == "test" for i in range(1797)]
  np.testing.assert_array_equal(test.images, whole.images[where])
  np.testing.assert_array_equal(train.labels, whole.labels[np.logical_not(where)])
  assert len(train.images) + len(test.images) == 1797
  assert abs(len(test.images) - 359.4) < 4 * (1797 * 0.2 * 0.8) ** 0.5
  assert test.class_names == whole.class_names and images.check(train) is train
  assert len(images.side(whole, "train", test_percent=0).images) == 1797
  with pytest.raises(ValueError, match="none of 1797 images is on the test side"):
    images.side(whole, "test", test_percent=0)
  with pytest.raises(ValueError, match="split is 'valid'"):
    images.side(whole, "valid")


@pytest.mark.parametrize("levels", [2, 3, 17, 255, 256])
def test_units_and_levels_invert_each_other(levels):
  values = np.arange(levels, dtype=np.uint8)
  units = images.to_unit(values, levels)
  assert units.dtype == np.float32
  np.testing.assert_allclose(units, np.linspace(-1, 1, levels), atol=1e-7)
  np.testing.assert_array_equal(images.from_unit(units, levels), values)
  # Anything nearer to a level than to its neighbours is that level, in float32 as in float64.
  near = units + np.float32(0.98 / (levels - 1)) * np.linspace(-1, 1, levels, dtype=np.float32)
  np.testing.assert_array_equal(images.from_unit(near, levels), values)


def test_units_clip_and_refuse_what_is_not_one():
  outside = np.array([[-np.inf, -1.7, 1.01, 300, np.inf]])
  np.testing.assert_array_equal(images.from_unit(outside, 17), [[0, 0, 16, 16, 16]])
  with pytest.raises(ValueError, match=r"values have NaN at \(1, 0\); units are numbers"):
    images.from_unit([[0.0, 0.5], [np.nan, 1.0]], 17)
  with pytest.raises(ValueError, match="values are float64; levels are integers, 0 to 16"):
    images.to_unit([0.5], 17)
  with pytest.raises(ValueError, match="values are int64; units are floats"):
    images.from_unit(np.array([1]), 17)
  for convert in (images.to_unit, images.from_unit):
    with pytest.raises(ValueError, match="levels is 1"):
      convert([0], 1)


def test_bytes_for_pictures():
  np.testing.assert_array_equal(images.to_bytes([-2.0, -1, 0.002, 1]), [0, 0, 128, 255])
  levels = np.array([0, 4, 8, 12, 16], np.uint8)  # quarters of the way from 0 to 255
  pictures = images.to_bytes(images.to_unit(levels, 17))
  np.testing.assert_allclose(pictures, np.linspace(0, 255, 5), atol=0.51)
