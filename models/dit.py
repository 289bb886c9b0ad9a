"""A diffusion transformer: patches of an image in, its network output out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from . import base, embeddings, layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTConfig:
  """Shape of a diffusion transformer.

  Raises:
    ValueError: fields that do not fit together, at construction.
  """

  image_shape: tuple[int, int, int]  # H, W, C
  patch_size: int
  num_layers: int
  width: int
  num_heads: int
  mlp_ratio: float = 4.0  # of the MLP's width to the model's
  positions: str = "sincos"  # added to patches; or "rotary", in attention
  num_registers: int = 0  # learned tokens beside the patches
  num_classes: int | None = None  # no classes
  text_width: int | None = None  # E of text embeddings; no text
  qk_norm: bool = False
  dropout: float = 0.0
  dtype: str = "float32"  # of the computation; params, softmax and the output are float32

  def __post_init__(self):
    height, width, _ = self.image_shape
    for name in ("patch_size", "num_layers", "width", "num_heads"):
      _require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} is not at least 1")
    fits = height % self.patch_size == 0 and width % self.patch_size == 0
    _require(fits, f"an image of {height}x{width} does not divide into {self.patch_size=}")
    divides = self.width % self.num_heads == 0
    _require(divides, f"width={self.width} is not a multiple of num_heads={self.num_heads}")
    kinds = ("sincos", "rotary")
    _require(self.positions in kinds, f"positions={self.positions!r} is not one of {kinds}")
    per_axis = self.width if self.positions == "sincos" else self.width // self.num_heads
    what = "width" if self.positions == "sincos" else "width / num_heads"
    _require(per_axis % 4 == 0, f"{what} is {per_axis}, not a multiple of 4, which two axes need")
    _require(0 <= self.dropout < 1, f"dropout={self.dropout} is not in [0, 1)")

  @property
  def grid(self) -> tuple[int, int]:
    """Patches along the height and the width."""
    height, width, _ = self.image_shape
    return height // self.patch_size, width // self.patch_size


def _require(holds: bool, rule: str) -> None:
  if not holds:
    raise ValueError(f"DiTConfig: {rule}.")


def dit(config: DiTConfig) -> base.Network:
  """The network of `config`: a transformer whose norms are scaled and shifted by the condition.

  adaLN-zero: with c the vector of noise level and class, a block is

    (s1, b1, g1, s2, b2, g2) = Linear(silu(c)),    initially 0,
    x <- x + g1 attention(norm(x) (1 + s1) + b1),  x <- x + g2 mlp(norm(x) (1 + s2) + b2),

  so every block begins as the identity and the output as 0. Text tokens and registers join the
  patches as tokens of their own, before them; they are left out of the output. Where a row has no
  text, its patches attend to none. The layout is that of the paper's code and of diffusers'
  DiTTransformer2DModel, which compute the same where both can.

  Reference: Peebles and Xie 2022, arXiv 2212.09748, section 3.2; registers: Darcet et al. 2023,
    arXiv 2309.16588.
  """
  module = _DiT(config)

  def init(key, x):
    level = jnp.zeros(x.shape[:1])
    return module.init(key, x, level, _some(config, x.shape[0]), True)["params"]

  def apply(params, x, level, condition=None, *, key=None):
    rngs = {} if key is None else {"dropout": key}
    condition = condition or base.Condition()
    return module.apply({"params": params}, x, level, condition, key is None, rngs=rngs)

  return base.Network(init, apply)


def _some(c, batch_size):
  """A condition of every kind that the network takes."""
  label = None if c.num_classes is None else jnp.zeros(batch_size, jnp.int32)
  text = None if c.text_width is None else jnp.zeros((batch_size, 1, c.text_width))
  return base.Condition(label, text)


def patches(x: jax.Array, size: int) -> jax.Array:
  """[B, H, W, C] -> [B, H W / size^2, size^2 C], row by row; in a patch too, channels last."""
  batch_size, height, width, channels = x.shape
  cut = x.reshape(batch_size, height // size, size, width // size, size, channels)
  return jnp.swapaxes(cut, 2, 3).reshape(batch_size, -1, size * size * channels)


def unpatched(tokens: jax.Array, grid: tuple[int, int], size: int) -> jax.Array:
  """The inverse of `patches`, of an image of `grid` patches."""
  height, width = grid
  cut = tokens.reshape(tokens.shape[0], height, width, size, size, -1)
  return jnp.swapaxes(cut, 2, 3).reshape(tokens.shape[0], height * size, width * size, -1)


def _modulated(x, scale, shift):
  return x * (1 + scale[:, None]) + shift[:, None]


def _layer_norm():
  return nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False)


class _Block(nn.Module):
  """See `dit`."""

  config: DiTConfig

  @nn.compact
  def __call__(self, x, vector, *, angles, mask, deterministic):
    c, dtype = self.config, jnp.dtype(self.config.dtype)
    dense = functools.partial(nn.Dense, dtype=dtype)
    dropout = nn.Dropout(c.dropout, deterministic=deterministic)
    zero = nn.initializers.zeros
    modulation = dense(6 * c.width, kernel_init=zero, name="modulation")(nn.silu(vector))
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(modulation, 6, axis=-1)
    attention = layers.Attention(
      num_heads=c.num_heads,
      num_kv_heads=c.num_heads,
      head_dim=c.width // c.num_heads,
      use_bias=True,
      qk_norm=c.qk_norm,
      norm_epsilon=1e-6,
      output_init=nn.linear.default_kernel_init,
      dtype=dtype,
      name="attention",
    )
    normed = _modulated(_layer_norm()(x).astype(dtype), scale_a, shift_a)
    mixed, _ = attention(normed, angles=angles, slots=None, mask=mask, cache=None)
    x = x + gate_a[:, None] * dropout(mixed)
    normed = _modulated(_layer_norm()(x).astype(dtype), scale_m, shift_m)
    hidden = nn.gelu(dense(round(c.mlp_ratio * c.width), name="up")(normed), approximate=True)
    return x + gate_m[:, None] * dropout(dense(c.width, name="down")(hidden))


class _DiT(nn.Module):
  """See `dit`."""

  config: DiTConfig

  @nn.compact
  def __call__(self, x, level, condition, deterministic):
    c, dtype = self.config, jnp.dtype(self.config.dtype)
    if x.shape[1:] != tuple(c.image_shape):
      raise ValueError(f"Images are {x.shape[1:]}; the network is of {tuple(c.image_shape)}.")
    vector = embeddings.Conditioning(c.width, 256, 1.0, c.num_classes, dtype, name="conditioning")(
      level, condition
    )
    tokens = nn.Dense(c.width, dtype=dtype, name="patch_in")(patches(x, c.patch_size))
    if c.positions == "sincos":
      tokens = tokens + embeddings.grid_sincos(*c.grid, c.width).astype(dtype)[None]
    before, mask = self._before(condition, x.shape[0], tokens.shape[1])
    tokens = jnp.concatenate([*before, tokens], axis=1)
    num_before = sum(extra.shape[1] for extra in before)
    for i in range(c.num_layers):
      tokens = _Block(c, name=f"block_{i}")(
        tokens,
        vector,
        angles=_angles(c, num_before),
        mask=mask,
        deterministic=deterministic,
      )
    zero = nn.initializers.zeros
    modulation = nn.Dense(2 * c.width, dtype=dtype, kernel_init=zero, name="modulation")(
      nn.silu(vector)
    )
    shift, scale = jnp.split(modulation, 2, axis=-1)
    tokens = _modulated(_layer_norm()(tokens[:, num_before:]).astype(dtype), scale, shift)
    width = c.patch_size**2 * c.image_shape[2]
    output = nn.Dense(width, dtype=dtype, kernel_init=zero, name="patch_out")(tokens)
    return unpatched(output.astype(jnp.float32), c.grid, c.patch_size)

  def _before(self, condition, batch_size, num_patches):
    """Tokens beside the patches, [B, n, D] each, and who may attend to whom, if not all to all."""
    c, dtype = self.config, jnp.dtype(self.config.dtype)
    if (condition.text is None) != (c.text_width is None):
      given = None if condition.text is None else condition.text.shape
      raise ValueError(f"A network of text_width={c.text_width} was given text {given}.")
    before, mask = [], None
    if c.num_registers:
      init = nn.initializers.normal(0.02)
      registers = self.param("registers", init, (c.num_registers, c.width)).astype(dtype)
      before.append(jnp.broadcast_to(registers[None], (batch_size, *registers.shape)))
    if condition.text is not None:
      before.append(nn.Dense(c.width, dtype=dtype, name="text_in")(condition.text))
      if condition.text_mask is not None:
        others = ((0, 0), (c.num_registers, num_patches))
        mask = jnp.pad(condition.text_mask, others, constant_values=True)[:, None, :]
    return before, mask


def _angles(c, num_before):
  """Rotary angles [1, L, C / 2] of all tokens: those before the patches are not turned."""
  if c.positions != "rotary":
    return None
  angles = embeddings.grid_rotary_angles(*c.grid, c.width // c.num_heads)
  return jnp.pad(angles, ((num_before, 0), (0, 0)))[None]
