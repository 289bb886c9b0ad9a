"""Small labelled images: digits, Fashion-MNIST, and whatever yields records of image and label.

A pixel is one of 0 .. levels - 1, so that likelihoods are exact; a network sees units, [-1, 1].
"""

import math
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from . import base

FASHION_CLASSES = (
  "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
  "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_FASHION_STEMS = {"train": "train", "test": "t10k"}


class Images(NamedTuple):
  """Labelled images of one size; `check` says what holds of them."""

  images: np.ndarray  # [N, H, W, C] uint8, 0 .. levels - 1
  labels: np.ndarray  # [N] int32, 0 .. num_classes - 1
  levels: int
  class_names: tuple[str, ...]

  @property
  def num_classes(self) -> int:
    """How many classes there are, found among the labels or not."""
    return len(self.class_names)


def digits() -> Images:
  """The 1,797 handwritten digits that come with scikit-learn: 8 x 8, 17 levels.

  Reference: Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits, UCI.
  """
  from sklearn import datasets  # slow to import

  loaded = datasets.load_digits()
  names = tuple(str(name) for name in loaded.target_names)
  pixels = loaded.images.astype(np.uint8)[..., None]
  return check(Images(pixels, loaded.target.astype(np.int32), 17, names))


def fashion_mnist(folder: str | pathlib.Path, split: base.Split) -> Images:
  """Fashion-MNIST as it is published: 28 x 28, 256 levels, 60,000 to train on and 10,000 to test.

  Args:
    folder: holds train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz and the two of t10k, each
      with or without its .gz.
    split: "train" or "test".

  Raises:
    FileNotFoundError: the folder or one of the two files is not there.
    ValueError: an unknown split; a file that `read_idx` refuses; or not one label to each image.

  Reference: Xiao, Rasul and Vollgraf 2017, arXiv 1708.07747.
  """
  stem = _FASHION_STEMS[_known(split)]
  pixels = _named(folder, f"{stem}-images-idx3-ubyte")
  labels = _named(folder, f"{stem}-labels-idx1-ubyte")
  values, classes = _with_axes(pixels, 3), _with_axes(labels, 1)
  if len(values) != len(classes):
    raise ValueError(
      f"{pixels} has {len(values)} images and {labels.name} {len(classes)} labels; "
      "give one label to each image"
    )
  return check(Images(values[..., None], classes.astype(np.int32), 256, FASHION_CLASSES))


def _with_axes(path: pathlib.Path, num_axes: int) -> np.ndarray:
  array = read_idx(path)
  if array.ndim != num_axes:
    raise ValueError(
      f"{path} has the magic number {2048 + array.ndim}; {2048 + num_axes} is expected "
      "(2051 for images, 2049 for labels): are the files swapped?"
    )
  return array


def _known(split: str) -> str:
  if split not in _FASHION_STEMS:
    raise ValueError(f"split is {split!r}; it is 'train' or 'test'")
  return split


def _named(folder: str | pathlib.Path, name: str) -> pathlib.Path:
  """The file of this name in the folder, compressed or not."""
  folder = pathlib.Path(folder)
  for path in (folder / f"{name}.gz", folder / name):
    if path.is_file():
      return path
  lack = f"has no {name}.gz, nor {name}" if folder.is_dir() else "is not a folder"
  raise FileNotFoundError(
    f"{folder} {lack}; give the folder of the four files of Fashion-MNIST "
    "(github.com/zalandoresearch/fashion-mnist, data/fashion)"
  )


def read_idx(path: str | pathlib.Path) -> np.ndarray:
  """An array of bytes from an IDX file, compressed with gzip or not (its content says which).

  The file is two zeros, the type 0x08 (unsigned bytes, the only one read here), the number of axes,
  the length of each axis in four bytes, the highest first, and the values, the last axis fastest.

  Raises:
    FileNotFoundError: no such file.
    ValueError: another magic number; fewer or more bytes than the lengths ask for; bad gzip.

  Reference: LeCun, Cortes and Burges, "The MNIST database", THE IDX FILE FORMAT.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"{path} is not a file; give an IDX file, such as those of MNIST")
  data, whole = _content(path)
  if len(data) >= 4 and not (data[:3] == b"\0\0\x08" and data[3]):
    raise ValueError(
      f"{path} begins with {data[:4].hex(' ')}; an IDX file of bytes begins with 00 00 08 and its "
      "number of axes, as 00 00 08 03 (2051) for images and 00 00 08 01 (2049) for labels"
    )
  header = 4 + 4 * data[3] if len(data) >= 4 else 4
  if len(data) < header:
    raise ValueError(
      f"{path} is cut: {len(data)} bytes, {header} expected of its header; get it again"
    )
  shape = tuple(np.frombuffer(data, ">u4", count=data[3], offset=4).tolist())
  size = header + math.prod(shape)
  if len(data) != size or not whole:
    kind = "is cut" if len(data) < size or not whole else "is too long"
    unread = "" if whole else ", and its gzip does not end"
    raise ValueError(
      f"{path} {kind}: {len(data)} bytes, {size} expected of a header of {header} and an array of "
      f"{shape}{unread}; get it again"
    )
  return np.frombuffer(data, np.uint8, offset=header).reshape(shape).copy()


def _content(path: pathlib.Path) -> tuple[bytes, bool]:
  """All that can be read of a file, unpacked if it is gzip, and whether its gzip came to an end."""
  rest, parts, whole = path.read_bytes(), [], True
  if not rest.startswith(b"\x1f\x8b"):
    return rest, True
  while whole and rest.startswith(b"\x1f\x8b"):  # gzip files may be concatenated
    member = zlib.decompressobj(wbits=31)
    try:
      parts.append(member.decompress(rest))
    except zlib.error as e:
      raise ValueError(f"{path} is not sound gzip ({e}); get it again") from e
    rest, whole = member.unused_data, member.eof
  return b"".join(parts), whole


def from_records(
  records: Sequence[Mapping[str, Any]],
  *,
  levels: int = 256,
  class_names: Sequence[str] | None = None,
) -> Images:
  """Images from any random-access sequence of {"image", "label"}.

  `tensorflow_datasets.data_source("cifar10", split="train")` is one, and so is a list.

  Args:
    records: "image" [H, W, C] or [H, W], uint8 levels, or floats in [-1, 1] (as `to_unit` makes
      them; not [0, 1]) that are rounded to the nearest level; "label" an integer. Other fields are
      not read.
    levels: how many values a pixel can have.
    class_names: of the labels; by default "0", "1", ... up to the largest label that is found.

  Raises:
    ValueError: no records; or names the first record without these fields, with an image of another
      size or type than it should be, or with values or a label out of range, NaN or infinite.
  """
  _check_levels(levels)
  if not len(records):
    raise ValueError("there are no records; check the path, split or filter they come from")
  stacked, labels = None, np.empty(len(records), np.int32)
  for index in range(len(records)):
    record = records[index]
    if not {"image", "label"} <= set(record):
      raise ValueError(f"record {index} has fields {sorted(record)}; it needs image and label")
    image = _as_levels(np.asarray(record["image"]), index, levels)
    if stacked is None:
      stacked = np.empty((len(records), *image.shape), np.uint8)
    if image.shape != stacked.shape[1:]:
      raise ValueError(
        f"image {index} is {image.shape} and image 0 is {stacked.shape[1:]}; "
        "crop or resize them to one size"
      )
    label = np.asarray(record["label"])
    if label.shape or not np.issubdtype(label.dtype, np.integer) or not 0 <= label < 2**31:
      raise ValueError(f"image {index} has the label {record['label']!r}; give a class, 0, 1, ...")
    stacked[index], labels[index] = image, label
  names = [str(i) for i in range(labels.max() + 1)] if class_names is None else class_names
  return check(Images(stacked, labels, levels, tuple(names)))


def _as_levels(image: np.ndarray, index: int, levels: int) -> np.ndarray:
  """One image of a record as uint8 [H, W, C]."""
  if image.ndim not in (2, 3):
    raise ValueError(f"image {index} has shape {image.shape}; it is [H, W, C] or [H, W]")
  if np.issubdtype(image.dtype, np.floating):
    _check_finite(image, index)
    if np.abs(image).max(initial=0) > 1:
      raise ValueError(
        f"image {index} has floats from {image.min():g} to {image.max():g}; floats are in [-1, 1]: "
        "scale them, or give levels as uint8"
      )
    image = from_unit(image, levels)
  elif image.dtype != np.uint8:
    raise ValueError(f"image {index} is {image.dtype}; give uint8 levels, or floats in [-1, 1]")
  return image if image.ndim == 3 else image[..., None]


def _check_finite(image: np.ndarray, index: int) -> None:
  bad = np.argwhere(~np.isfinite(image))
  if len(bad):
    where = tuple(bad[0].tolist())
    raise ValueError(f"image {index} has {image[where]} at {where}; every value has to be finite")


def _check_levels(levels: int) -> None:
  if not 2 <= levels <= 256:
    raise ValueError(f"levels is {levels}; a pixel has from 2 to 256 of them")


def check(images: Images) -> Images:
  """The same images, if they are what `Images` says.

  Raises:
    ValueError: names the first bad image, what is wrong with it, and what would be right.
  """
  pixels, labels, levels, _ = images
  _check_levels(levels)
  if pixels.ndim != 4 or not pixels.size:
    raise ValueError(f"images have shape {pixels.shape}; give [N, H, W, C], with nothing empty")
  if labels.shape != pixels.shape[:1]:
    raise ValueError(f"{len(pixels)} images and labels of {labels.shape}; give one to each image")
  if np.issubdtype(pixels.dtype, np.floating):
    for index, image in enumerate(pixels):
      _check_finite(image, index)
  if pixels.dtype != np.uint8:
    raise ValueError(f"images are {pixels.dtype}; give uint8 levels, as from_unit makes of floats")
  if labels.dtype != np.int32:
    raise ValueError(f"labels are {labels.dtype}; give int32")
  highest = pixels.max(axis=(1, 2, 3))
  for index in np.flatnonzero(highest >= levels)[:1]:
    raise ValueError(
      f"image {index} has the value {highest[index]} at {levels} levels; "
      f"values are 0 to {levels - 1}, or there are more levels"
    )
  for index in np.flatnonzero((labels < 0) | (labels >= images.num_classes))[:1]:
    raise ValueError(
      f"image {index} has the label {labels[index]} of {images.num_classes} classes; "
      f"labels are 0 to {images.num_classes - 1}"
    )
  return images


def side(images: Images, split: base.Split, *, test_percent: int = 10) -> Images:
  """The images of one side of a split by a hash of their index, as problems' is by their key.

  For data that come without a split. The sides are disjoint, and their union is all the images.

  Raises:
    ValueError: an unknown split; or no image is on this side.
  """
  _known(split)
  count = len(images.images)
  mine = [i for i in range(count) if base.split_of(str(i), test_percent=test_percent) == split]
  if not mine:
    raise ValueError(
      f"none of {count} images is on the {split} side at test_percent={test_percent}: "
      "change it, or give more images"
    )
  return images._replace(images=images.images[mine], labels=images.labels[mine])


def to_unit(values: ArrayLike, levels: int) -> np.ndarray:
  """Levels as units: 2 v / (levels - 1) - 1, float32, from -1 at level 0 to 1 at the highest.

  Raises:
    ValueError: values are not integers, so that nothing is scaled twice; or bad levels.
  """
  _check_levels(levels)
  values = np.asarray(values)
  if not np.issubdtype(values.dtype, np.integer):
    raise ValueError(f"values are {values.dtype}; levels are integers, 0 to {levels - 1}")
  return (values * (2.0 / (levels - 1)) - 1).astype(np.float32)


def from_unit(values: ArrayLike, levels: int) -> np.ndarray:
  """The uint8 levels nearest to units; what is outside [-1, 1] is clipped. Inverts `to_unit`.

  Raises:
    ValueError: a value is NaN, which a model that has diverged draws; or they are integers.
  """
  _check_levels(levels)
  values = np.asarray(values)
  if np.issubdtype(values.dtype, np.integer):
    raise ValueError(f"values are {values.dtype}; units are floats in [-1, 1]")
  values = values.astype(np.float64)
  bad = np.argwhere(np.isnan(values))
  if len(bad):
    raise ValueError(f"values have NaN at {tuple(bad[0].tolist())}; units are numbers in [-1, 1]")
  return np.rint((np.clip(values, -1, 1) + 1) * ((levels - 1) / 2)).astype(np.uint8)


def to_bytes(values: ArrayLike) -> np.ndarray:
  """Units as bytes, 0 (black) to 255, for pictures; levels go through `to_unit` first."""
  return from_unit(values, 256)


_SIDE = 64  # pixels that an image has in a picture, at least


def grid(x: np.ndarray, columns: int | None = None) -> Image.Image:
  """Images x [N, H, W, C] in [-1, 1], row by row, as one picture; enlarged where they are tiny."""
  columns = columns or int(np.ceil(np.sqrt(len(x))))
  height, width, channels = x.shape[1:]
  rows = -(-len(x) // columns)
  cells = np.zeros((rows * columns, height + 1, width + 1, channels), np.uint8)
  cells[: len(x), :height, :width] = to_bytes(x)
  whole = cells.reshape(rows, columns, height + 1, width + 1, channels).swapaxes(1, 2)
  whole = whole.reshape(rows * (height + 1), columns * (width + 1), channels)[:-1, :-1]
  picture = Image.fromarray(whole[..., 0] if channels == 1 else whole[..., :3])
  times = -(-_SIDE // min(height, width))
  return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
