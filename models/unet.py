"""A small U-Net of residual blocks with attention, whose skip connections can be scaled."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from . import base, embeddings, layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig:
  """Shape of a U-Net.

  Raises:
    ValueError: fields that do not fit together, at construction.
  """

  image_shape: tuple[int, int, int]  # H, W, C
  channels: int
  multipliers: tuple[int, ...] = (1, 2)  # of the channels at each level; sides halve between levels
  num_blocks: int = 2  # residual blocks at each level, on the way down
  attention: tuple[int, ...] = (1,)  # levels with attention after each block; the middle has it
  head_dim: int = 32
  num_groups: int = 8  # of the group norms
  num_classes: int | None = None  # no classes
  dropout: float = 0.0
  dtype: str = "float32"  # of the computation; params, softmax and the output are float32

  def __post_init__(self):
    height, width, _ = self.image_shape
    for name in ("channels", "num_blocks", "head_dim", "num_groups"):
      _require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} is not at least 1")
    _require(len(self.multipliers) >= 1, "multipliers are empty")
    factor = 2 ** (len(self.multipliers) - 1)
    fits = height % factor == 0 and width % factor == 0
    _require(fits, f"an image of {height}x{width} cannot be halved {len(self.multipliers) - 1}x")
    levels = range(len(self.multipliers))
    known = all(level in levels for level in self.attention)
    _require(known, f"attention={self.attention} names a level that is not one of {[*levels]}")
    for channels in self.level_channels:
      _require(
        channels % self.num_groups == 0,
        f"{channels} channels are not a multiple of num_groups={self.num_groups}",
      )
    attending = {*self.attention, len(self.multipliers) - 1}
    for channels in (self.level_channels[level] for level in attending):
      divides = channels % self.head_dim == 0
      _require(divides, f"{channels} channels are not a multiple of head_dim={self.head_dim}")
    _require(0 <= self.dropout < 1, f"dropout={self.dropout} is not in [0, 1)")

  @property
  def level_channels(self) -> tuple[int, ...]:
    """Channels at each level."""
    return tuple(self.channels * multiplier for multiplier in self.multipliers)

  @property
  def num_skips(self) -> int:
    """Connections from the way down to the way up: of the input, each block, each halving."""
    return len(self.multipliers) * (self.num_blocks + 1)


def _require(holds: bool, rule: str) -> None:
  if not holds:
    raise ValueError(f"UNetConfig: {rule}.")


def linear_skips(config: UNetConfig, deepest: float, shallowest: float = 1.0) -> np.ndarray:
  """Scales [num_skips] of the skip connections, linear from the shallowest to the deepest.

  Reference: Ma et al. 2024 (Skip-Tuning), arXiv 2402.15170, which has 1 for the shallowest.
  """
  return np.linspace(shallowest, deepest, config.num_skips)


def unet(config: UNetConfig, *, skip_scale: jax.Array | np.ndarray | None = None) -> base.Network:
  """The network of `config`: down through residual blocks, and up with what was kept on the way.

  A residual block is x + conv(silu(norm(h) (1 + s) + b)), h = conv(silu(norm(x))), with (s, b) a
  linear function of the vector of noise level and class; its last convolution, as that of the whole
  network, begins at 0. On the way up a block reads its input and the output of the block across.
  It is diffusers' UNet2DModel with `resnet_time_scale_shift="scale_shift"`.

  Args:
    config: the shape.
    skip_scale: [num_skips], by which each skip connection is multiplied, in the order in which they
      are made: the shallowest first. None is 1 for all. It may be traced.

  Raises:
    ValueError: the scales are not one for each skip connection.

  Reference: Dhariwal and Nichol 2021 (ADM), arXiv 2105.05233, section 3; Karras et al. 2022 (EDM),
    arXiv 2206.00364, appendix F.
  """
  if skip_scale is not None and jnp.shape(skip_scale) != (config.num_skips,):
    raise ValueError(
      f"skip_scale {jnp.shape(skip_scale)}: the network has {config.num_skips} skip connections."
    )
  module = _UNet(config)

  def init(key, x):
    label = None if config.num_classes is None else jnp.zeros(x.shape[0], jnp.int32)
    condition = base.Condition(label)
    return module.init(key, x, jnp.zeros(x.shape[:1]), condition, None, True)["params"]

  def apply(params, x, level, condition=None, *, key=None):
    rngs = {} if key is None else {"dropout": key}
    condition = condition or base.Condition()
    return module.apply({"params": params}, x, level, condition, skip_scale, key is None, rngs=rngs)

  return base.Network(init, apply)


class _Block(nn.Module):
  """A residual block to `channels`, with attention after it or not; see `unet`."""

  config: UNetConfig
  channels: int
  attends: bool

  @nn.compact
  def __call__(self, x, vector, deterministic):
    c, dtype = self.config, jnp.dtype(self.config.dtype)
    norm = functools.partial(_norm, c)
    conv = functools.partial(nn.Conv, self.channels, (3, 3), dtype=dtype)
    hidden = conv(name="conv_in")(nn.silu(norm("norm_in")(x)))
    modulation = nn.Dense(2 * self.channels, dtype=dtype, name="modulation")(nn.silu(vector))
    scale, shift = jnp.split(modulation[:, None, None], 2, axis=-1)
    hidden = nn.silu(norm("norm_out")(hidden) * (1 + scale) + shift)
    hidden = nn.Dropout(c.dropout, deterministic=deterministic)(hidden)
    hidden = conv(kernel_init=nn.initializers.zeros, name="conv_out")(hidden)
    if x.shape[-1] != self.channels:
      x = nn.Dense(self.channels, dtype=dtype, name="shortcut")(x)
    x = x + hidden
    return _Attention(c, name="attention")(x) if self.attends else x


class _Attention(nn.Module):
  """x + attention(norm(x)) over the pixels of x [B, H, W, D]."""

  config: UNetConfig

  @nn.compact
  def __call__(self, x):
    c, channels = self.config, x.shape[-1]
    attention = layers.Attention(
      num_heads=channels // c.head_dim,
      num_kv_heads=channels // c.head_dim,
      head_dim=c.head_dim,
      use_bias=True,
      qk_norm=False,
      norm_epsilon=1e-6,
      output_init=nn.initializers.zeros,
      dtype=jnp.dtype(c.dtype),
      name="attention",
    )
    pixels = _norm(c, "norm")(x).reshape(x.shape[0], -1, channels)
    mixed, _ = attention(pixels, angles=None, slots=None, mask=None, cache=None)
    return x + mixed.reshape(x.shape)


def _norm(c, name):
  return nn.GroupNorm(c.num_groups, epsilon=1e-5, dtype=jnp.dtype(c.dtype), name=name)


class _UNet(nn.Module):
  """See `unet`."""

  config: UNetConfig

  @nn.compact
  def __call__(self, x, level, condition, skip_scale, deterministic):
    c, dtype = self.config, jnp.dtype(self.config.dtype)
    if x.shape[1:] != tuple(c.image_shape):
      raise ValueError(f"Images are {x.shape[1:]}; the network is of {tuple(c.image_shape)}.")
    if condition.text is not None:
      raise ValueError("The U-Net takes no text: condition on it with a DiT of text_width.")
    scale_of = lambda i: 1.0 if skip_scale is None else jnp.asarray(skip_scale, dtype)[i]
    conv = functools.partial(nn.Conv, kernel_size=(3, 3), dtype=dtype)
    vector = embeddings.Conditioning(
      4 * c.channels, c.channels, 0.0, c.num_classes, dtype, name="conditioning"
    )(level, condition)
    x = conv(c.channels, name="conv_in")(x)
    skips, last = [x], len(c.multipliers) - 1
    for i, channels in enumerate(c.level_channels):
      for j in range(c.num_blocks):
        x = _Block(c, channels, i in c.attention, name=f"down_{i}_{j}")(x, vector, deterministic)
        skips.append(x)
      if i < last:
        x = conv(channels, strides=(2, 2), padding=((1, 1), (1, 1)), name=f"halve_{i}")(x)
        skips.append(x)
    x = _Block(c, channels, True, name="middle_0")(x, vector, deterministic)
    x = _Block(c, channels, False, name="middle_1")(x, vector, deterministic)
    for i, channels in reversed([*enumerate(c.level_channels)]):
      for j in range(c.num_blocks + 1):
        across = skips.pop()
        x = jnp.concatenate([x, across * scale_of(len(skips))], axis=-1)
        x = _Block(c, channels, i in c.attention, name=f"up_{i}_{j}")(x, vector, deterministic)
      if i > 0:
        x = conv(channels, name=f"double_{i}")(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))
    x = nn.silu(_norm(c, "norm_out")(x))
    out = conv(c.image_shape[2], kernel_init=nn.initializers.zeros, name="conv_out")
    return out(x).astype(jnp.float32)
