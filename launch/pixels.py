"""Images and points as examples: the `data` section of configurations that are about them.

An example is {"x": [H, W, C] or [D] float32, about [-1, 1], "label": int32}, and where data are
noisy "noise", the standard deviation of what was added to x.
"""

from typing import NamedTuple

import numpy as np

from ..tasks import images, points
from ..training import data
from . import fields


class Examples(NamedTuple):
  """Both sides of a data set."""

  train: np.ndarray  # [N, ...] float32
  train_labels: np.ndarray  # [N] int32
  test: np.ndarray  # [M, ...]
  test_labels: np.ndarray  # [M]
  levels: int | None  # values that a pixel has; None of points
  class_names: tuple[str, ...] | None  # None where there are no classes

  @property
  def num_classes(self) -> int | None:
    """How many classes there are; None where there are none."""
    return None if self.class_names is None else len(self.class_names)


def _of_images(train: images.Images, test: images.Images) -> Examples:
  return Examples(
    images.to_unit(train.images, train.levels),
    train.labels,
    images.to_unit(test.images, test.levels),
    test.labels,
    train.levels,
    train.class_names,
  )


def _sides(whole: images.Images, config: fields.Config) -> Examples:
  side = lambda split: images.side(whole, split, test_percent=config.test_percent)
  return _of_images(side("train"), side("test"))


def _fashion_mnist(config: fields.Config) -> Examples:
  folder = fields.existing_path("data.folder", config.folder)
  return _of_images(*(images.fashion_mnist(folder, split) for split in ("train", "test")))


def _tfds(config: fields.Config) -> Examples:
  records = data.tfds_source(config.name, config.split, config.data_dir or None)
  return _sides(images.from_records(records), config)


def _points(config: fields.Config) -> Examples:
  draw = fields.choose("data.name", config.name, points.POINTS)
  train, test = (draw(np.random.default_rng(seed), config.num_points) for seed in (0, 1))
  none = np.zeros(config.num_points, np.int32)
  return Examples(train, none, test, none, None, None)


SOURCES = {
  "digits": lambda config: _sides(images.digits(), config),
  "fashion_mnist": _fashion_mnist,
  "tfds": _tfds,
  "points": _points,
}


def examples(config: fields.Config) -> Examples:
  """The data set that `config.data` names.

  Raises:
    ValueError, FileNotFoundError: there is none, or its files are not sound.
  """
  return fields.choose("data.source", config.data.source, SOURCES)(config.data)


def source(
  values: np.ndarray, labels: np.ndarray | None, *, clean_share: float = 1.0, noise: float = 0.0
) -> data.Source:
  """Examples of arrays [N, ...] and labels [N].

  Args:
    values: x.
    labels: the classes, if there are.
    clean_share: of examples that are as they are; the others have noise added, once and for all.
    noise: its standard deviation.
  """
  noisy = np.random.default_rng(0).permutation(len(values)) >= round(clean_share * len(values))

  def item(index):
    x, label = values[index], {} if labels is None else {"label": np.int32(labels[index])}
    if clean_share == 1:
      return {"x": x, **label}
    level = np.float32(noise * noisy[index])
    drawn = np.random.default_rng((1, index)).normal(size=x.shape)
    return {"x": x + level * drawn.astype(np.float32), "noise": level, **label}

  return data.Source(len(values), item)
