"""Contrastive search: the likely token that least repeats what the model has in mind already."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..models import base as models
from . import base, decode
from . import logits as logits_lib


class ContrastiveState(NamedTuple):
  """Where the search stands. The cache holds every token of a row but the last."""

  step: jax.Array  # [B] int32, tokens chosen
  tokens: jax.Array  # [B, S] int32: the prompt, the tokens chosen, then zeros
  length: jax.Array  # [B] int32, prompt and chosen tokens
  done: jax.Array  # [B] bool; such a row is frozen
  cache: models.Cache  # of S + k - 1 slots: the last candidates need room beside each other
  directions: jax.Array  # [B, S, D] float32, h / |h| of the tokens, then anything
  logits: jax.Array  # [B, V] float32, the model's, of the next token
  transform: logits_lib.State

  @property
  def prompt_length(self) -> jax.Array:
    """[B] int32."""
    return self.length - self.step


def contrastive(
  model: models.LanguageModel,
  params: models.Params,
  *,
  max_length: int,
  max_new_tokens: int | jax.Array,
  alpha: float | jax.Array = 0.6,
  k: int = 5,
  transform: logits_lib.LogitsTransform | None = None,
  stop: Sequence[int] = (),
) -> base.SamplingAlgorithm:
  """Chooses, of the k likeliest tokens, the one that is likely and unlike the tokens before it.

    x_t = argmax_{v in top k of p} (1 - alpha) p(v | x_<t) - alpha max_{j<t} cos(h_v, h_j),

  where h are the hidden states that the model reads its logits from, and h_v is that of v put at
  position t. Deterministic: Info's `log_prob` is 0. One call of the model is one step: it reads
  the last token and its k candidates side by side, each of them at position t and blind to the
  others, and the next call writes over them; the chosen one's hidden state gives the next logits.
  Rows are not repeated and no cache is copied (transformers and Tunix repeat the cache k times).

  Models that refuse `positions` and `mask` (guided ones, those with a sliding window) cannot be
  searched so.

  Args:
    model: the model.
    params: its parameters; a transformer's decode fastest unstacked (`transformer.unstack`).
    max_length: S, static.
    max_new_tokens: scalar or [B].
    alpha: in [0, 1], scalar or [B]; 0 is greedy decoding.
    k: from 1 to V, static; 1 is greedy decoding.
    transform: of the logits that candidates and p are of; None leaves the model's law. A filtered
      token is never chosen.
    stop: tokens that end a row, kept as its last.

  Reference: Su et al. 2022, arXiv 2202.06417; alpha = 0.6 and k = 5 are the authors' examples'.
  """
  logits_lib.require("alpha", alpha, lambda a: 0 <= a <= 1, "in [0, 1]")
  logits_lib.require("k", k, lambda k: k >= 1, "at least 1")
  transform = logits_lib.chain() if transform is None else transform
  stop = jnp.array(stop, jnp.int32)

  def is_full(length, step):
    return (length >= max_length) | (step >= max_new_tokens)

  def init(keys, prompts):
    del keys
    state = _start(model, params, prompts, transform, max_length, k)
    return state._replace(done=is_full(state.length, state.step))

  def step(keys, state):
    del keys
    context = logits_lib.Context(state.tokens, state.length, state.prompt_length)
    law = jax.nn.log_softmax(transform.apply(state.logits, context, state.transform), axis=-1)
    log_probs, candidates = jax.lax.top_k(law, k)
    hidden, cache = _look_ahead(model, params, state, candidates)
    best = jnp.argmax(_score(state, alpha, log_probs, hidden), axis=1)[:, None]
    token = jnp.take_along_axis(candidates, best, axis=1)[:, 0]
    chosen = jnp.take_along_axis(hidden, best[:, :, None], axis=1)[:, 0]

    active = ~state.done
    count = active.astype(jnp.int32)
    length, steps = state.length + count, state.step + count
    rows = jnp.arange(token.size)
    slot = jnp.where(active, state.length, max_length)  # max_length is out of bounds: dropped
    stopped = jnp.any(token[:, None] == stop[None, :], axis=1)
    fed_back = transform.update(state.logits, token, state.transform)
    info = decode.DecodeInfo(
      token,
      count,
      jnp.zeros(token.shape),
      logits_lib.log_prob(state.logits, token),
      jnp.arange(law.shape[-1])[None, :] == token[:, None],
    )
    state = ContrastiveState(
      step=steps,
      tokens=state.tokens.at[rows, slot].set(token, mode="drop"),
      length=length,
      done=state.done | stopped | is_full(length, steps),
      cache=cache._replace(length=length - 1),
      directions=state.directions.at[rows, slot].set(_direction(chosen), mode="drop"),
      logits=base.select_rows(active, model.readout(params, chosen), state.logits),
      transform=base.select_rows(active, fed_back, state.transform),
    )
    return state, base.select_rows(active, info, jax.tree.map(jnp.zeros_like, info))

  return base.SamplingAlgorithm(init, step)


def _start(model, params, prompts, transform, max_length, k):
  """The state that has read the prompts whole."""
  _check_width(prompts, max_length)
  hidden, cache = _read(model, params, prompts, max_length + k - 1)
  last = jnp.take_along_axis(hidden, prompts.length[:, None, None] - 1, axis=1)[:, 0]
  logits = model.readout(params, last)
  if k > logits.shape[-1]:
    raise ValueError(f"k({k}): it has to be at most {logits.shape[-1]}, the vocabulary.")
  batch_size = prompts.length.size
  return ContrastiveState(
    step=jnp.zeros(batch_size, jnp.int32),
    tokens=decode.buffer(prompts, max_length),
    length=prompts.length,
    done=jnp.zeros(batch_size, bool),
    cache=cache._replace(length=prompts.length - 1),
    directions=_widen(_direction(hidden), max_length),
    logits=logits,
    transform=transform.init(batch_size),
  )


def _check_width(prompts, max_length):
  width = prompts.tokens.shape[1]
  if width > max_length:
    raise ValueError(
      f"The prompts are {width} tokens wide, max_length is {max_length}: raise it or shorten the "
      "prompts."
    )


def _widen(rows, length):
  """[B, P, ...] with zeros up to [B, S, ...]."""
  return jnp.pad(rows, [(0, 0), (0, length - rows.shape[1])] + [(0, 0)] * (rows.ndim - 2))


def _held(length, rows):
  """[B, S] bool, of rows [B, S, ...]: which are before `length` [B]."""
  return jnp.arange(rows.shape[1])[None, :] < length[:, None]


def _read(model, params, prompts, capacity):
  """Hidden states [B, P, D] of the whole prompts, and the cache that holds them.

  Positions are told, not left to the model: the cache has more slots than there are positions.
  """
  batch_size, width = prompts.tokens.shape
  positions = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None, :], (batch_size, width))
  cache = model.init_cache(params, batch_size, capacity)
  return models.apply(model, params, prompts.tokens, cache, positions=positions)


def _look_ahead(model, params, state, candidates):
  """Hidden states [B, k, D] of the candidates [B, k] in the next place, and the cache."""
  k = candidates.shape[1]
  last = jnp.take_along_axis(state.tokens, state.length[:, None] - 1, axis=1)
  offset = jnp.minimum(jnp.arange(k + 1, dtype=jnp.int32), 1)[None, :]
  positions = state.length[:, None] - 1 + offset
  slots = jnp.arange(state.tokens.shape[1] + k - 1)[None, None, :]
  own = state.length[:, None] - 1 + jnp.arange(k + 1)[None, :]  # where each is written
  mask = (slots < state.length[:, None, None]) | (slots == own[:, :, None])
  hidden, cache = models.apply(
    model,
    params,
    jnp.concatenate([last, candidates], axis=1),
    state.cache,
    positions=positions,
    mask=mask,
  )
  return hidden[:, 1:], cache


def _direction(hidden):
  """h / |h| in float32; 0 stays 0."""
  hidden = hidden.astype(jnp.float32)
  square = jnp.sum(jnp.square(hidden), axis=-1, keepdims=True)
  return hidden * jax.lax.rsqrt(jnp.where(square > 0, square, 1))


def _score(state, alpha, log_probs, hidden):
  """(1 - alpha) p - alpha max_j cos(h, h_j), [B, k]; -inf where p is 0."""
  cosines = jnp.einsum("bkd,bsd->bks", _direction(hidden), state.directions)
  held = _held(state.length, state.directions)[:, None, :]
  closest = jnp.max(jnp.where(held, cosines, -jnp.inf), axis=-1)
  alpha = logits_lib.per_row(alpha).astype(jnp.float32)
  score = (1 - alpha) * jnp.exp(log_probs) - alpha * closest
  return jnp.where(log_probs > -jnp.inf, score, -jnp.inf)
