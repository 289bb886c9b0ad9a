"""Block diffusion: blocks from left to right, each filled in by masked diffusion, with a cache.

    p(x) = prod_b p(x_b | x_1 .. x_(b-1)),    each factor a masked diffusion model of n tokens.

What a block's call of the network reads is the block; keys and values of the finished blocks before
it are cached, as in autoregressive decoding. Blocks of one token are autoregressive decoding, and a
block of the whole length is `masked.unmask`. The model is one trained so (`block_diffusion`): a
finished block attends to itself and those before it. `unmasking.semi_autoregressive` is the order
alone, for models that attend to all positions.

Reference: Arriola et al. 2025 (BD3-LM), arXiv 2503.09573.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..models import base as models
from . import base, masked
from . import logits as logits_lib


class State(NamedTuple):
  """Sequences, written up to some block. The cache holds what is before it."""

  step: jax.Array  # [B] int32
  tokens: jax.Array  # [B, L] int32
  calls: jax.Array  # [B] int32, of the network on a block
  length: jax.Array  # [B] int32, where the current block begins
  cache: models.Cache


def block_mask(length: int, block_length: int) -> jax.Array:
  """[L, L] bool: a position attends to those of its own block and of blocks before."""
  block = jnp.arange(length) // block_length
  return block[:, None] >= block[None, :]


def unmask(
  model: models.LanguageModel,
  params: models.Params,
  rule: masked.Rule,
  block_length: int,
  *,
  mask: int,
  transform: logits_lib.LogitsTransform = masked.NO_TRANSFORM,
) -> base.SamplingAlgorithm:
  """Each step is one call on each row's current block; see `masked.unmask`.

  It writes the positions that the rule chooses. A block without masks is read once more, to be
  cached, and the next one begins. The first blocks that are given are read when sampling begins.

  Args:
    model: bidirectional, of V + 1 tokens, the last of them the mask.
    params: its parameters, a transformer's unstacked.
    rule: chooses positions of a block; `unmasking`. Its step counts all calls of the row.
    block_length: n, of which the length of the sequences is a multiple.
    mask: V.
    transform: of the law of each token, whose context is the block; without feedback.

  Raises:
    ValueError: the length is no multiple of `block_length`.
  """

  def init(keys, tokens):
    batch_size, length = tokens.shape
    if block_length < 1 or length % block_length:
      raise ValueError(f"Sequences of {length} are no whole number of blocks of {block_length}.")
    cache = model.init_cache(params, batch_size, length)
    seen = jnp.broadcast_to(block_mask(length, block_length), (batch_size, length, length))
    _, cache = models.apply(model, params, tokens, cache, mask=seen)
    blocks = (tokens == mask).reshape(batch_size, -1, block_length)
    given = jnp.cumprod(~jnp.any(blocks, axis=2), axis=1)
    first = block_length * jnp.sum(given, axis=1, dtype=jnp.int32)
    first = jnp.minimum(first, length - block_length)
    return State(*masked.start(tokens), first, cache)

  def step(keys, state):
    rule_keys, token_keys = base.split(keys)
    active = jnp.any(state.tokens == mask, axis=1)
    block = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, block_length))(
      state.tokens, state.length
    )
    is_masked = block == mask
    finished = ~jnp.any(is_masked, axis=1) & active
    logits, cache = _read(model, params, state, block)
    log_p = masked.transformed(logits, block, transform)
    token = masked.draw_each(token_keys, log_p)
    view = masked.View(jax.nn.log_softmax(logits.astype(jnp.float32)), token, is_masked, state.step)
    chosen = jax.vmap(rule)(rule_keys, view) & is_masked
    block = jnp.where(chosen, token, block)
    place = jax.vmap(lambda row, block, at: jax.lax.dynamic_update_slice_in_dim(row, block, at, 0))
    info = jax.tree.map(
      lambda leaf: place(jnp.zeros(state.tokens.shape, leaf.dtype), leaf, state.length),
      masked.info_of(chosen, token, log_p, logits),
    )
    length = state.length + block_length * finished
    state = State(
      step=state.step + active,
      tokens=place(state.tokens, block, state.length),
      calls=state.calls + active,
      length=length,
      cache=cache._replace(length=length),
    )
    return state, info

  return base.SamplingAlgorithm(init, step)


def _read(model, params, state, block):
  """Logits [B, n, V] of the current block's tokens, and the cache with the block as it is."""
  end = state.length[:, None, None] + block.shape[1]
  seen = jnp.arange(state.tokens.shape[1])[None, None, :] < end
  seen = jnp.broadcast_to(seen, (*block.shape, state.tokens.shape[1]))
  cache = state.cache._replace(length=state.length)
  hidden, cache = models.apply(model, params, block, cache, mask=seen)
  return model.readout(params, hidden)[..., :-1], cache
