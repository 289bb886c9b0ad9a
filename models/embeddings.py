"""What every diffusion network is told of noise, class and place, as vectors."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from . import base


def sinusoidal(
  positions: jax.Array, channels: int, *, max_period: float = 10_000.0, shift: float = 0.0
) -> jax.Array:
  """Cosines, then sines, of positions [...] at geometric frequencies, [..., channels].

  Frequency i of h = channels / 2 is max_period^(-i / (h - shift)).

  Args:
    positions: [...].
    channels: even.
    max_period: 2 pi times which is the longest wavelength, or with shift = 0 almost.
    shift: 1 ends the frequencies at 1 / max_period exactly; 0 ends them one step before.

  Reference: Vaswani et al. 2017, arXiv 1706.03762, section 3.5; Ho et al. 2020, arXiv 2006.11239.
  """
  half = channels // 2
  frequencies = np.exp(-math.log(max_period) * np.arange(half) / (half - shift))
  angles = positions[..., None] * frequencies.astype(np.float32).reshape(
    (1,) * positions.ndim + (-1,)
  )
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def grid_sincos(height: int, width: int, channels: int) -> np.ndarray:
  """Fixed positions of a grid's cells, row by row, [height * width, channels] float32.

  The first half of the channels is of the column, the second of the row; in each, sines come before
  cosines.

  Raises:
    ValueError: channels are not a multiple of 4.

  Reference: Peebles and Xie 2022 (DiT), arXiv 2212.09748, section 3.2, in the layout of its code.
  """
  if channels % 4:
    raise ValueError(f"{channels} channels do not divide into sines and cosines of two axes.")
  frequencies = 10_000.0 ** (-np.arange(channels // 4) / (channels // 4))
  rows, columns = np.divmod(np.arange(height * width), width)
  parts = []
  for places in (columns, rows):
    angles = places[:, None] * frequencies[None]
    parts += [np.sin(angles), np.cos(angles)]
  return np.concatenate(parts, axis=1).astype(np.float32)


def grid_rotary_angles(height: int, width: int, channels: int, period: float = 100.0) -> np.ndarray:
  """Angles of rotary embeddings of a grid's cells, [height * width, channels / 2] in radians.

  Half of the planes turn with the row and half with the column, at frequencies period^(-2 i / C'),
  C' = channels / 2, so that inner products depend on both differences.

  Raises:
    ValueError: channels are not a multiple of 4.

  Reference: Su et al. 2021, arXiv 2104.09864; Heo et al. 2024 (axial frequencies), 2403.13298.
  """
  if channels % 4:
    raise ValueError(f"{channels} channels do not divide into planes of two axes.")
  frequencies = period ** (-np.arange(channels // 4) / (channels // 4))
  rows, columns = np.divmod(np.arange(height * width), width)
  angles = [places[:, None] * frequencies[None] for places in (rows, columns)]
  return np.concatenate(angles, axis=1).astype(np.float32)


class Conditioning(nn.Module):
  """One vector [B, width] of the noise level and the class: MLP(sinusoidal(level)) + table[class].

  The table has a row more than there are classes, for none. Without classes a label is refused, and
  with them none is not a default: what a sample is conditioned on is said.
  """

  width: int
  frequencies: int  # channels of the sinusoidal embedding
  shift: float  # of its frequencies
  num_classes: int | None
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, level: jax.Array, condition: base.Condition) -> jax.Array:
    if (condition.label is None) != (self.num_classes is None):
      has = "no classes" if self.num_classes is None else f"{self.num_classes} classes"
      raise ValueError(f"A network of {has} was given label={condition.label}.")
    embedded = sinusoidal(level.astype(jnp.float32), self.frequencies, shift=self.shift)
    hidden = nn.Dense(self.width, dtype=self.dtype, name="level_in")(embedded)
    vector = nn.Dense(self.width, dtype=self.dtype, name="level_out")(nn.silu(hidden))
    if self.num_classes is not None:
      shape = (self.num_classes + 1, self.width)
      table = self.param("classes", nn.initializers.normal(0.5), shape)
      vector = vector + table[condition.label].astype(vector.dtype)
    return vector


def level_function(num_channels: int = 64) -> base.Network:
  """A learned function of the noise level alone, level [B] -> [B], linear in `sinusoidal` features.

  What a learned weighting of noise levels is made of; it begins at 0. Of a Network it has the form,
  with None for x.

  Reference: Karras et al. 2023 (EDM2), arXiv 2312.02696, section 2.2 and eq. 14.
  """

  def init(key, x):
    del key, x
    return jnp.zeros(num_channels)

  def apply(params, x, level, condition=None, *, key=None):
    del x, condition, key
    return jnp.matmul(sinusoidal(level, num_channels), params)

  return base.Network(init, apply)
