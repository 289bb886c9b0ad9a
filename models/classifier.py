"""A small convolutional classifier of images, whose features compare sets of them."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from . import base


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
  """Shape of a classifier."""

  image_shape: tuple[int, int, int]  # H, W, C
  num_classes: int
  channels: int = 32  # doubled at each halving of the sides
  num_halvings: int = 2
  num_features: int = 64
  dropout: float = 0.0


class Classifier(NamedTuple):
  """p(class | image), and the features that it is linear in.

  Attributes:
    init: (key, x [B, H, W, C]) -> params.
    apply: (params, x, *, key=None) -> (features [B, F], logits [B, classes]), float32; a key turns
      dropout on.
  """

  init: Callable[..., base.Params]
  apply: Callable[..., tuple[jax.Array, jax.Array]]


def classifier(config: ClassifierConfig) -> Classifier:
  """Convolutions with group norms, sides halved between them, and two layers on the last map.

  The features are the hidden one of the two, after its rectifier.
  """
  module = _Classifier(config)

  def apply(params, x, *, key=None):
    rngs = {} if key is None else {"dropout": key}
    return module.apply({"params": params}, x, key is None, rngs=rngs)

  return Classifier(lambda key, x: module.init(key, x, True)["params"], apply)


class _Classifier(nn.Module):
  """See `classifier`."""

  config: ClassifierConfig

  @nn.compact
  def __call__(self, x, deterministic):
    c = self.config
    if x.shape[1:] != tuple(c.image_shape):
      raise ValueError(f"Images are {x.shape[1:]}; the classifier is of {tuple(c.image_shape)}.")
    for i in range(c.num_halvings + 1):
      stride = (1, 1) if i == 0 else (2, 2)
      x = nn.Conv(c.channels * 2**i, (3, 3), strides=stride, name=f"conv_{i}")(x)
      x = nn.relu(nn.GroupNorm(8, name=f"norm_{i}")(x))
    x = x.reshape(x.shape[0], -1)
    x = nn.Dropout(c.dropout, deterministic=deterministic)(x)
    features = nn.relu(nn.Dense(c.num_features, name="features")(x))
    return features, nn.Dense(c.num_classes, name="logits")(features).astype(jnp.float32)
