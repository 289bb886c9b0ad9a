"""A decoder-only (or bidirectional) transformer as a LanguageModel."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from . import base, layers, partition
from .transformer_config import REMAT, TransformerConfig


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


_NORMS = {
  "rms": lambda c, **kwargs: layers.RMSNorm(c.norm_epsilon, c.zero_centred_norms, **kwargs),
  "layer": lambda c, **kwargs: layers.LayerNorm(c.norm_epsilon, **kwargs),
}


def _norm(c: TransformerConfig, **kwargs) -> nn.Module:
  return _NORMS[c.norm](c, **kwargs)


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
      use_bias=c.qkv_bias,
      qk_norm=c.qk_norm,
      norm_epsilon=c.norm_epsilon,
      output_init=output_init,
      dtype=dtype,
      output_bias=c.output_bias,
      scale=_score_scale(c),
      softcap=c.attention_softcap,
      zero_centred_norms=c.zero_centred_norms,
      attend=_attend(c),
      name="attention",
    )
    after = lambda name: _norm(c, name=name) if c.post_norms else lambda branch: branch
    normed = _norm(c, name="attention_norm")(x)
    mixed, cache = attention(normed, angles=angles, slots=slots, mask=mask, cache=cache)
    x = x + dropout(after("attention_post_norm")(mixed))
    sizes = (c.mlp_width, c.activation, c.gated_mlp, c.mlp_bias)
    mlp = layers.MLP(*sizes, output_init, dtype, name="mlp")
    x = x + dropout(after("mlp_post_norm")(mlp(_norm(c, name="mlp_norm")(x))))
    return partition.constrain(x, partition.ROWS, "sequence", None), cache


def _score_scale(c: TransformerConfig) -> float:
  scaling = c.rotary_scaling
  return c.attention_scale * (1.0 if scaling is None else scaling.score_factor)


def _attend(c: TransformerConfig):
  """Attention without a cache."""
  if c.attention == "exact":
    return layers.attend
  return functools.partial(
    layers.library_attention,
    implementation=c.attention,
    causal=c.causal,
    window=c.window if all(c.local_layers) else None,
  )


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

  By default pre-norm blocks of grouped-query attention and a gated MLP, after Llama (Touvron et al.
  2023, arXiv 2302.13971); `models.families` says what GPT-2, Qwen and Gemma 2 have instead.
  """
  c = config.resolved()
  dtype = jnp.dtype(c.dtype)

  def init_cache(params, batch_size, max_length):
    del params
    shape = (batch_size, c.num_kv_heads, max_length, c.head_dim)
    zeros = partition.constrain(jnp.zeros(shape, dtype), partition.ROWS, "tensor", None, None)
    empty = lambda: layers.KeyValues(zeros, zeros)
    return Cache(jnp.zeros(batch_size, jnp.int32), tuple(empty() for _ in range(c.num_layers)))

  def embed(params, tokens):
    # A token outside the vocabulary gives NaN, not a neighbour's embedding.
    table = partition.constrain(params["embedding"], "tensor", None)
    rows = table.at[tokens].get(mode="fill", fill_value=jnp.nan)
    rows = rows.astype(dtype)
    return rows if c.embedding_scale == 1 else rows * c.embedding_scale

  def readout(params, hidden):
    kernel = params["embedding"].T if c.tied_embeddings else params["readout"]
    kernel = partition.constrain(kernel, None, "tensor")
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
    "final_norm": _norm(c).init(jax.random.key(0), jnp.zeros((1, c.width)))["params"],  # constant
  }
  if c.positions == "learned":
    params["positions"] = normal(positions_key, (c.position_range or c.max_length, c.width))
  if not c.tied_embeddings:
    params["readout"] = normal(readout_key, (c.width, c.vocab_size))
  x = jnp.zeros((*tokens.shape, c.width), jnp.dtype(c.dtype))
  slots = _slots(None, x)
  places = _places(c, slots, slots)

  def init_layer(key):
    return Block(c).init(key, x, mask=None, cache=None, deterministic=True, **places)["params"]

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
  x = partition.constrain(x, partition.ROWS, "sequence", None)
  positions = _spread(c, slots if positions is None else positions, position_key)
  if c.positions == "learned":
    x = x + params["positions"][positions].astype(x.dtype)
  x = nn.Dropout(c.dropout, deterministic=not training).apply({}, x, rngs=_rngs(embed_key))
  places = _places(c, slots, positions)
  told = c.attention != "exact" and cache is None and mask is None  # by its own arguments
  alike = len(set(c.local_layers)) == 1
  masks = {c.local_layers[0]: None} if told and alike else _masks(c, slots, num_slots, mask)

  def run_layer(x, layer, layer_mask, layer_cache, layer_key):
    return Block(c).apply(
      {"params": layer},
      x,
      mask=layer_mask,
      cache=layer_cache,
      deterministic=not training,
      rngs=_rngs(layer_key),
      **places,
    )

  if cache is None:
    run_layer = REMAT[c.remat](run_layer)
  x, cache = _run_layers(run_layer, c.local_layers, masks, params, x, cache, layers_key)
  return _norm(c).apply({"params": params["final_norm"]}, x), cache


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


def _places(c, slots, positions):
  """What every layer is told of positions: the rotary angles and the slots."""
  rotary = c.positions == "rotary"
  turn = lambda: layers.rotary_angles(positions, c.head_dim, c.rotary_base, c.rotary_scaling)
  return {"angles": turn() if rotary else None, "slots": slots}


def _masks(c, slots, num_slots, mask):
  """The whole mask of the layers with the window (True) and of those without, if there are."""

  def of(local):
    window = c.window if local else None
    own = layers.attention_mask(slots, num_slots, causal=c.causal, window=window)
    return own if mask is None else own & mask

  return {local: of(local) for local in sorted(set(c.local_layers))}


def _run_layers(run_layer, local_layers, masks, params, x, cache, key):
  """Applies the layers in order: a scan where their params are stacked and there is no cache.

  Where some layers have a window and some have none, which is data of the scan.
  """
  keys = None if key is None else jax.random.split(key, len(local_layers))
  if cache is None and isinstance(params["layers"], dict):
    alike = len(masks) == 1
    local = None if alike else jnp.asarray(local_layers)

    def body(x, layer):
      layer_params, layer_local, layer_key = layer
      mask = masks[local_layers[0]] if alike else jnp.where(layer_local, masks[True], masks[False])
      return run_layer(x, layer_params, mask, None, layer_key)[0], None

    return jax.lax.scan(body, x, (params["layers"], local, keys))[0], None
  written = []
  for i, layer in enumerate(unstack(params)["layers"]):
    held = None if cache is None else cache.layers[i]
    mask, layer_key = masks[local_layers[i]], None if keys is None else keys[i]
    x, held = run_layer(x, layer, mask, held, layer_key)
    written.append(held)
  return x, None if cache is None else Cache(cache.length + x.shape[1], tuple(written))
