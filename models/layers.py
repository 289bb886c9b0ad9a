"""Layers of a transformer: normalisation, positions, attention with a cache, MLP.

Shapes: B rows, L queries, S keys, H query heads, K key/value heads (H a multiple of K), C channels
of a head, D model width. Heads come before positions, the order in which decoding reads a cache.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from . import partition, rotary


class KeyValues(NamedTuple):
  """One layer's keys and values."""

  keys: jax.Array  # [B, K, S, C]
  values: jax.Array  # [B, K, S, C]


def attention_mask(slots: jax.Array, num_slots: int, *, causal: bool, window: int | None):
  """Which keys each query may attend to, by where they are stored.

  Args:
    slots: [B, L] index of each query among the keys; rows increase.
    num_slots: S.
    causal: no key after the query; otherwise any key up to the last query's.
    window: the last `window` keys only, the query's own included (sliding window attention).

  Returns:
    [B, L, S] bool.
  """
  keys = jnp.arange(num_slots)[None, None, :]
  last = slots if causal else slots[:, -1:]
  mask = keys <= last[:, :, None]
  mask = jnp.broadcast_to(mask, (*slots.shape, num_slots))
  if window is not None:
    mask &= keys > slots[:, :, None] - window
    if not causal:
      mask &= keys < slots[:, :, None] + window
  return mask


def attend(
  query: jax.Array,
  key_values: KeyValues,
  mask: jax.Array | None,
  *,
  scale: float | None = None,
  softcap: float | None = None,
) -> jax.Array:
  """Grouped-query attention, softmax(scale q k^T) v, with the softmax in float32.

  Head h reads keys h // (H / K). A query that may attend to nothing gets 0, not NaN.

  Args:
    query: [B, H, L, C].
    key_values: keys and values [B, K, S, C].
    mask: [B, L, S] bool, or None where every query may attend to every key.
    scale: of the scores s; 1 / sqrt(C) if None.
    softcap: scores are bounded, softcap tanh(s / softcap); not if None.

  Returns:
    [B, H, L, C].

  Reference: Ainslie et al. 2023, arXiv 2305.13245.
  """
  keys, values = key_values
  batch, num_heads, length, channels = query.shape
  grouped = query.reshape(batch, keys.shape[1], -1, length, channels)
  scores = jnp.einsum("bkglc,bksc->bkgls", grouped, keys, preferred_element_type=jnp.float32)
  scores = scores * (channels**-0.5 if scale is None else scale)
  if softcap is not None:
    scores = softcap * jnp.tanh(scores / softcap)
  if mask is not None:
    scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
  # A finite maximum leaves exp(-inf) = 0 where everything is masked.
  largest = jnp.max(scores, axis=-1, keepdims=True, initial=jnp.finfo(jnp.float32).min)
  weights = jnp.exp(scores - jax.lax.stop_gradient(largest))
  total = jnp.sum(weights, axis=-1, keepdims=True)
  mixed = jnp.einsum(
    "bkgls,bksc->bkglc", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
  )
  mixed = mixed / jnp.where(total > 0, total, 1)
  return mixed.astype(query.dtype).reshape(batch, num_heads, length, channels)


def library_attention(
  query: jax.Array,
  key_values: KeyValues,
  mask: jax.Array | None,
  *,
  scale: float | None = None,
  softcap: float | None = None,
  implementation: str,
  causal: bool,
  window: int | None,
) -> jax.Array:
  """`attend` by `jax.nn.dot_product_attention`: "cudnn" holds no scores, [L, S], in memory.

  Its weights are rounded to the computation's dtype, and a query that may attend to nothing has no
  defined result.

  Args:
    query: [B, H, L, C].
    key_values: keys and values [B, K, L, C], of the same tokens.
    mask: [B, L, L] bool, or None where `causal` and `window` say all.
    scale: of the scores.
    softcap: None, as it has none.
    implementation: "xla" or "cudnn"; the latter is for GPUs, in bfloat16 or float16.
    causal: no key after the query; read where there is no mask.
    window: the last so many keys only; read where there is no mask.

  Returns:
    [B, H, L, C].
  """
  if softcap is not None:
    raise ValueError("The library's attention has no softcap.")
  tokens_first = lambda x: jnp.swapaxes(x, 1, 2)
  own = {"mask": mask[:, None]} if mask is not None else {"is_causal": causal}
  if mask is None and window is not None:
    own["local_window_size"] = (window - 1, 0 if causal else window - 1)
  mixed = jax.nn.dot_product_attention(
    *map(tokens_first, (query, *key_values)), scale=scale, implementation=implementation, **own
  )
  return tokens_first(mixed)


def write(cache: KeyValues, new: KeyValues, slots: jax.Array) -> KeyValues:
  """Stores row b's new entries [B, K, L, C] at slots[b, :]; a slot beyond the cache is dropped."""
  rows = jnp.arange(slots.shape[0])[:, None]

  def put(old, entries):
    entries = jnp.swapaxes(entries, 1, 2).astype(old.dtype)
    return old.at[rows, :, slots].set(entries, mode="drop", unique_indices=True)

  return jax.tree.map(put, cache, new)


def read(cache: KeyValues, slots: jax.Array) -> KeyValues:
  """The entries [B, K, L, C] at slots[b, :], what `write` would store there again."""
  return jax.tree.map(
    lambda held: jnp.take_along_axis(held, slots[:, None, :, None], axis=2, mode="clip"), cache
  )


def rotary_angles(
  positions: jax.Array,
  channels: int,
  base: float,
  scaling: rotary.Scaling | None = None,
) -> jax.Array:
  """Angles [B, L, C / 2] in radians: position * base^(-2 i / C) where not scaled, float32."""
  if scaling is None:
    frequencies = base ** (-jnp.arange(0, channels, 2, dtype=jnp.float32) / channels)
  else:
    frequencies = jnp.asarray(scaling.frequencies(channels, base), jnp.float32)
  return positions[:, :, None].astype(jnp.float32) * frequencies[None, None, :]


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
  """Rotary embedding of x [B, H, L, C]: channels i and i + C/2 are one plane, turned by its angle.

  The inner product of a rotated query and key depends on positions by their difference only. The
  paper pairs neighbouring channels; pairing halves is the same up to a permutation of channels, and
  is what Llama-shaped checkpoints hold.

  Reference: Su et al. 2021, arXiv 2104.09864, equation 34.
  """
  cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def randomised_positions(key: jax.Array, batch_size: int, length: int, span: int) -> jax.Array:
  """[B, L] increasing positions, a uniform subset of range(span) for each row.

  Training on them shows the model every position it will meet in longer sequences.

  Reference: Ruoss et al. 2023, arXiv 2305.16843, section 3.
  """
  scores = jax.random.uniform(key, (batch_size, span))
  _, chosen = jax.lax.top_k(scores, length)
  return jnp.sort(chosen, axis=-1)


class RMSNorm(nn.Module):
  """x / sqrt(mean(x^2) + epsilon) * scale, in float32 (Zhang and Sennrich 2019, 1910.07467)."""

  epsilon: float = 1e-6
  zero_centred: bool = False  # the parameter is scale - 1

  @nn.compact
  def __call__(self, x):
    init = nn.initializers.zeros if self.zero_centred else nn.initializers.ones
    scale = self.param("scale", init, (x.shape[-1],))
    if self.zero_centred:
      scale = 1 + scale.astype(jnp.float32)
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    normed = wide * jax.lax.rsqrt(mean_square + self.epsilon)
    return (normed * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


class LayerNorm(nn.Module):
  """(x - mean(x)) / sqrt(var(x) + epsilon) * scale + bias, in float32 (Ba et al. 2016, 1607.06450).

  The mean is taken off before squares are summed: flax's takes the difference of two large sums.
  """

  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x):
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
    bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(variance + self.epsilon)
    of_channel = lambda leaf: leaf.reshape((1,) * (x.ndim - 1) + (-1,))
    return (normed * of_channel(scale) + of_channel(bias)).astype(x.dtype)


class Dense(nn.Dense):
  """x [..., D] times a matrix, as one product of rows.

  The same numbers as of the shape it has; on CPU the gradient of three-dimensional products takes
  1.4 times as long. Positions that are split over devices cannot be one dimension with the rows.
  """

  def __call__(self, x):
    if "sequence" in partition.ambient():
      return super().__call__(x)
    rows = super().__call__(x.reshape(-1, x.shape[-1]))
    return rows.reshape(*x.shape[:-1], self.features)


class Attention(nn.Module):
  """Self-attention of x [B, L, D], over a cache if there is one.

  Without a cache the keys are x's own; with one, x's keys and values are written to `slots` and
  the whole cache is attended to. Returns the output [B, L, D] and the cache as it is now.
  `scale` and `softcap` are of the scores, see `attend`; `output_bias` is `use_bias` if None; over a
  cache it is always `attend`.
  """

  num_heads: int
  num_kv_heads: int
  head_dim: int
  use_bias: bool
  qk_norm: bool
  norm_epsilon: float
  output_init: nn.initializers.Initializer
  dtype: jnp.dtype
  output_bias: bool | None = None
  scale: float | None = None
  softcap: float | None = None
  zero_centred_norms: bool = False
  attend: Callable[..., jax.Array] = attend

  @nn.compact
  def __call__(self, x, *, angles, slots, mask, cache: KeyValues | None):
    dense = functools.partial(Dense, use_bias=self.use_bias, dtype=self.dtype)

    def heads(name, num_heads, norm=None):
      projected = dense(num_heads * self.head_dim, name=name)(x)
      split = projected.reshape(*x.shape[:-1], num_heads, self.head_dim)
      return jnp.swapaxes(split if norm is None else norm(split), 1, 2)

    def norm(name):
      made = functools.partial(RMSNorm, self.norm_epsilon, self.zero_centred_norms, name=name)
      return made() if self.qk_norm else None

    query = heads("query", self.num_heads, norm("query_norm"))
    keys = heads("key", self.num_kv_heads, norm("key_norm"))
    values = heads("value", self.num_kv_heads)
    if angles is not None:
      query, keys = rotate(query, angles), rotate(keys, angles)
    query = partition.constrain(query, partition.ROWS, "tensor", "sequence", None)
    keys, values = (
      partition.constrain(x, partition.ROWS, "tensor", None, None) for x in (keys, values)
    )
    own = KeyValues(keys, values)
    cache = None if cache is None else write(cache, own, slots)
    mix, held = (self.attend, own) if cache is None else (attend, cache)
    mixed = mix(query, held, mask, scale=self.scale, softcap=self.softcap)
    merged = jnp.swapaxes(mixed, 1, 2).reshape(*x.shape[:-1], -1)
    output_bias = self.use_bias if self.output_bias is None else self.output_bias
    output = dense(x.shape[-1], use_bias=output_bias, kernel_init=self.output_init, name="output")
    return output(merged), cache


ACTIVATIONS = {
  "silu": nn.silu,
  "gelu": functools.partial(nn.gelu, approximate=False),
  "gelu_tanh": functools.partial(nn.gelu, approximate=True),
}


class MLP(nn.Module):
  """down(f(gate(x)) * up(x)), or down(f(up(x))) where it is not gated.

  With f = silu it is the SwiGLU of Shazeer 2020, arXiv 2002.05202, equation 6.
  """

  width: int
  activation: str  # of ACTIVATIONS
  gated: bool
  use_bias: bool
  output_init: nn.initializers.Initializer
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x):
    dense = functools.partial(Dense, use_bias=self.use_bias, dtype=self.dtype)
    act = ACTIVATIONS[self.activation]
    if self.gated:
      hidden = act(dense(self.width, name="gate")(x)) * dense(self.width, name="up")(x)
    else:
      hidden = act(dense(self.width, name="up")(x))
    return dense(x.shape[-1], kernel_init=self.output_init, name="down")(hidden)
