"""A residual network for points in a few dimensions."""

import dataclasses
import functools

import jax.numpy as jnp
from flax import linen as nn

from . import base, embeddings


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPConfig:
  """Shape of a residual network."""

  dim: int  # D
  width: int
  num_layers: int
  num_classes: int | None = None  # no classes
  dropout: float = 0.0


def mlp(config: MLPConfig) -> base.Network:
  """x + down(silu(up(norm(x) (1 + s) + b))) repeated, (s, b) linear in the noise level and class.

  Of points x [B, D]. The last layer begins at 0, and so does the output.
  """
  module = _MLP(config)

  def init(key, x):
    label = None if config.num_classes is None else jnp.zeros(x.shape[0], jnp.int32)
    return module.init(key, x, jnp.zeros(x.shape[:1]), base.Condition(label), True)["params"]

  def apply(params, x, level, condition=None, *, key=None):
    rngs = {} if key is None else {"dropout": key}
    condition = condition or base.Condition()
    return module.apply({"params": params}, x, level, condition, key is None, rngs=rngs)

  return base.Network(init, apply)


class _MLP(nn.Module):
  """See `mlp`."""

  config: MLPConfig

  @nn.compact
  def __call__(self, x, level, condition, deterministic):
    c = self.config
    norm = functools.partial(nn.LayerNorm, use_bias=False, use_scale=False)
    vector = nn.silu(
      embeddings.Conditioning(
        c.width, 64, 0.0, c.num_classes, jnp.dtype("float32"), name="conditioning"
      )(level, condition)
    )
    hidden = nn.Dense(c.width, name="in")(x)
    for i in range(c.num_layers):
      scale, shift = jnp.split(nn.Dense(2 * c.width, name=f"modulation_{i}")(vector), 2, axis=-1)
      normed = nn.Dropout(c.dropout, deterministic=deterministic)(norm()(hidden))
      inner = nn.silu(nn.Dense(2 * c.width, name=f"up_{i}")(normed * (1 + scale) + shift))
      hidden = hidden + nn.Dense(c.width, name=f"down_{i}")(inner)
    return nn.Dense(c.dim, kernel_init=nn.initializers.zeros, name="out")(norm()(hidden))
