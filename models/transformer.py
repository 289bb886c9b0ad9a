"""A decoder-only (or bidirectional) transformer as a LanguageModel."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from . import base, layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
  """Shape of a transformer; a field of None takes the value its comment says.

  Raises:
    ValueError: fields that do not fit together, at construction.
  """

  vocab_size: int
  max_length: int  # the longest sequence; learned positions and randomised spacing depend on it
  num_layers: int
  width: int
  num_heads: int
  num_kv_heads: int | None = None  # num_heads
  head_dim: int | None = None  # width / num_heads
  mlp_width: int | None = None  # 8/3 of the width, rounded up to a multiple of 32
  causal: bool = True
  window: int | None = None  # no sliding window
  positions: str = "rotary"  # or "learned", "none"
  rotary_base: float = 10_000.0
  position_range: int | None = None  # not randomised; otherwise of the positions drawn in training
  use_bias: bool = False
  qk_norm: bool = False
  tied_embeddings: bool = True
  logit_softcap: float | None = None  # no cap
  norm_epsilon: float = 1e-6
  dropout: float = 0.0
  dtype: str = "float32"  # of the computation; params, softmax and logits are float32
  scan_layers: bool = True  # init stacks the layers' params: compile time constant in depth

  def __post_init__(self):
    width, heads = self.width, self.num_heads
    divides = self.head_dim is not None or width % max(heads, 1) == 0
    _require(divides, f"width={width} is not a multiple of num_heads={heads}: give head_dim")
    c = self.resolved()
    kv_heads, span = c.num_kv_heads, c.position_range
    for name in ("vocab_size", "max_length", "num_layers", "width", "num_heads", *_DERIVED):
      _require(getattr(c, name) >= 1, f"{name}={getattr(c, name)} is not at least 1")
    _require(
      heads % kv_heads == 0, f"num_heads={heads} is not a multiple of num_kv_heads={kv_heads}"
    )
    kinds = ("rotary", "learned", "none")
    _require(c.positions in kinds, f"positions={c.positions!r} is not one of {kinds}")
    even = c.positions != "rotary" or c.head_dim % 2 == 0
    _require(even, f"head_dim={c.head_dim} is odd: rotary positions turn pairs of channels")
    wide = span is None or span >= c.max_length
    _require(wide, f"position_range={span} is less than max_length={c.max_length}")
    randomised = span is not None and c.positions == "none"
    _require(not randomised, "positions='none' leaves position_range nothing to randomise")
    _require(c.window is None or c.window >= 1, f"window={c.window} is not at least 1")
    _require(0 <= c.dropout < 1, f"dropout={c.dropout} is not in [0, 1)")
    capped = c.logit_softcap is not None
    _require(not capped or c.logit_softcap > 0, f"logit_softcap={c.logit_softcap} is not above 0")

  def resolved(self) -> "TransformerConfig":
    """The same with sizes of None filled in."""
    filled = {name: size(self) for name, size in _DERIVED.items() if getattr(self, name) is None}
    return dataclasses.replace(self, **filled) if filled else self


_DERIVED = {
  "num_kv_heads": lambda config: config.num_heads,
  "head_dim": lambda config: config.width // max(config.num_heads, 1),
  "mlp_width": lambda config: -(-8 * config.width // 96) * 32,
}


def _require(holds: bool, rule: str) -> None:
  if not holds:
    raise ValueError(f"TransformerConfig: {rule}.")


class Cache(NamedTuple):
  """Keys and values of every layer, apart: one array of all layers decodes far slower on CPU."""

  length: jax.Array  # [B] int32
  layers: tuple[layers.KeyValues, ...]  # num_layers of [B, K, S, C]

  @property
  def capacity(self) -> int:
    """S, the number of tokens a row can hold."""
    return self.layers[0].keys.shape[2]

  def moved(self, source: jax.Array, target: jax.Array) -> "Cache":
    """See `base.Cache`."""
    move = lambda held: layers.write(held, layers.read(held, source), target)
    return self._replace(layers=tuple(move(held) for held in self.layers))


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)), with dropout on both branches."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, x, *, angles, slots, mask, cache, deterministic):
    c = self.config
    dtype = jnp.dtype(c.dtype)
    output_init = nn.initializers.variance_scaling(1 / (2 * c.num_layers), "fan_in", "normal")
    dropout = nn.Dropout(c.dropout, deterministic=deterministic)
    attention = layers.Attention(
      num_heads=c.num_heads,
      num_kv_heads=c.num_kv_heads,
      head_dim=c.head_dim,
      use_bias=c.use_bias,
      qk_norm=c.qk_norm,
      norm_epsilon=c.norm_epsilon,
      output_init=output_init,
      dtype=dtype,
      name="attention",
    )
    mixed, cache = attention(
      layers.RMSNorm(c.norm_epsilon, name="attention_norm")(x),
      angles=angles,
      slots=slots,
      mask=mask,
      cache=cache,
    )
    x = x + dropout(mixed)
    mlp = layers.GatedMLP(c.mlp_width, c.use_bias, output_init, dtype, name="mlp")
    return x + dropout(mlp(layers.RMSNorm(c.norm_epsilon, name="mlp_norm")(x))), cache


def stack(params: base.Params) -> base.Params:
  """The layout for training: the layers' params in one tree of arrays [N, ...], run by a scan."""
  if isinstance(params["layers"], dict):
    return params
  return {**params, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *params["layers"])}


def unstack(params: base.Params) -> base.Params:
  """The layout for decoding: a tuple of the layers' params.

  A decoding step that slices its layers out of one array copies every weight, every step (on CPU
  half the speed at batch 1), so unstack once, before the loop.
  """
  stacked = params["layers"]
  if not isinstance(stacked, dict):
    return params
  num_layers = jax.tree.leaves(stacked)[0].shape[0]
  return {
    **params,
    "layers": tuple(jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(num_layers)),
  }


def transformer(config: TransformerConfig) -> base.LanguageModel:
  """The language model of `config`; its params may be stacked or unstacked.

  Pre-norm blocks of grouped-query attention and a gated MLP, after Llama (Touvron et al. 2023,
  arXiv 2302.13971).
  """
  c = config.resolved()
  dtype = jnp.dtype(c.dtype)

  def init_cache(params, batch_size, max_length):
    del params
    shape = (batch_size, c.num_kv_heads, max_length, c.head_dim)
    empty = lambda: layers.KeyValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
    return Cache(jnp.zeros(batch_size, jnp.int32), tuple(empty() for _ in range(c.num_layers)))

  def embed(params, tokens):
    # A token outside the vocabulary gives NaN, not a neighbour's embedding.
    rows = params["embedding"].at[tokens].get(mode="fill", fill_value=jnp.nan)
    return rows.astype(dtype)

  def readout(params, hidden):
    kernel = params["embedding"].T if c.tied_embeddings else params["readout"]
    logits = jnp.matmul(hidden, kernel.astype(dtype), preferred_element_type=jnp.float32)
    cap = c.logit_softcap
    return logits if cap is None else cap * jnp.tanh(logits / cap)

  return base.LanguageModel(
    functools.partial(_init, c), init_cache, embed, functools.partial(_trunk, c), readout
  )


def _init(c, key, tokens):
  embed_key, layers_key, positions_key, readout_key = jax.random.split(key, 4)
  normal = nn.initializers.normal(c.width**-0.5)
  params = {
    "embedding": normal(embed_key, (c.vocab_size, c.width)),
    "final_norm": {"scale": jnp.ones(c.width)},
  }
  if c.positions == "learned":
    params["positions"] = normal(positions_key, (c.position_range or c.max_length, c.width))
  if not c.tied_embeddings:
    params["readout"] = normal(readout_key, (c.width, c.vocab_size))
  x = jnp.zeros((*tokens.shape, c.width), jnp.dtype(c.dtype))
  slots = _slots(None, x)
  places = _places(c, slots, slots, num_slots=tokens.shape[1], mask=None)

  def init_layer(key):
    return Block(c).init(key, x, cache=None, deterministic=True, **places)["params"]

  params["layers"] = jax.vmap(init_layer)(jax.random.split(layers_key, c.num_layers))
  return params if c.scan_layers else unstack(params)


def _trunk(c, params, x, cache=None, *, positions=None, mask=None, key=None):
  training = key is not None
  embed_key, position_key, layers_key = jax.random.split(key, 3) if training else (None,) * 3
  slots = _slots(cache, x)
  num_slots = x.shape[1] if cache is None else cache.capacity
  bounded = c.positions == "learned" or c.position_range is not None
  if positions is None and bounded and num_slots > c.max_length:
    raise ValueError(
      f"A sequence of {num_slots} has no positions beyond max_length={c.max_length}: shorten it, "
      "or train with a larger max_length."
    )
  if cache is not None and not c.causal and mask is None:
    raise ValueError(
      "A bidirectional model needs a mask with a cache: what is not written yet "
      "would be attended to."
    )
  if cache is not None and c.window is not None and mask is not None:
    raise ValueError(
      "A sliding window counts slots of the cache, which are not positions where a mask lets "
      "several tokens share one: leave out the mask, or the window."
    )
  positions = _spread(c, slots if positions is None else positions, position_key)
  if c.positions == "learned":
    x = x + params["positions"][positions].astype(x.dtype)
  x = nn.Dropout(c.dropout, deterministic=not training).apply({}, x, rngs=_rngs(embed_key))
  places = _places(c, slots, positions, num_slots, mask)

  def run_layer(x, layer, layer_cache, layer_key):
    return Block(c).apply(
      {"params": layer},
      x,
      cache=layer_cache,
      deterministic=not training,
      rngs=_rngs(layer_key),
      **places,
    )

  x, cache = _run_layers(run_layer, c.num_layers, params, x, cache, layers_key)
  return layers.RMSNorm(c.norm_epsilon).apply({"params": params["final_norm"]}, x), cache


def _rngs(key):
  return {} if key is None else {"dropout": key}


def _slots(cache, x):
  """[B, L]: where the entries of x [B, L, D] go, after what the cache holds."""
  batch_size, length = x.shape[:2]
  held = jnp.zeros(batch_size, jnp.int32) if cache is None else cache.length
  return held[:, None] + jnp.arange(length, dtype=jnp.int32)[None, :]


def _spread(c, positions, key):
  """Positions over `position_range`: randomised while training, and evenly spaced otherwise.

  The paper randomises at test time too; even spacing is the mean of that, does not change a
  prefix as it grows, and needs no key to decode.
  """
  if c.position_range is None:
    return positions
  if key is None:
    return positions * c.position_range // c.max_length
  drawn = layers.randomised_positions(key, positions.shape[0], c.max_length, c.position_range)
  return jnp.take_along_axis(drawn, positions, axis=1)


def _places(c, slots, positions, num_slots, mask):
  """What every layer is told of positions: the rotary angles, the slots, and the whole mask."""
  rotary = c.positions == "rotary"
  own = layers.attention_mask(slots, num_slots, causal=c.causal, window=c.window)
  return {
    "angles": layers.rotary_angles(positions, c.head_dim, c.rotary_base) if rotary else None,
    "slots": slots,
    "mask": own if mask is None else own & mask,
  }


def _run_layers(run_layer, num_layers, params, x, cache, key):
  """Applies the layers in order: a scan where their params are stacked and there is no cache."""
  keys = None if key is None else jax.random.split(key, num_layers)
  if cache is None and isinstance(params["layers"], dict):

    def body(x, layer):
      layer_params, layer_key = layer
      return run_layer(x, layer_params, None, layer_key)[0], None

    return jax.lax.scan(body, x, (params["layers"], keys))[0], None
  written = []
  for i, layer in enumerate(unstack(params)["layers"]):
    held = None if cache is None else cache.layers[i]
    x, held = run_layer(x, layer, held, None if keys is None else keys[i])
    written.append(held)
  return x, None if cache is None else Cache(cache.length + x.shape[1], tuple(written))
