"""Speculative decoding: several tokens of the target's law for each of its calls.

A drafter proposes K tokens, one call of the target scores all of them, and a coupling says how many
stand and what comes next. The law of the text is the target's exactly, whatever the drafter.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..models import base as models
from . import base, coupling, decode, drafting
from . import logits as logits_lib


class SpeculativeState(NamedTuple):
  """Where decoding stands. The cache holds every token of a row but the last."""

  step: jax.Array  # [B] int32, calls of the target
  tokens: jax.Array  # [B, S] int32: the prompt, the tokens drawn, then zeros
  length: jax.Array  # [B] int32, prompt and drawn tokens
  prompt_length: jax.Array  # [B] int32
  done: jax.Array  # [B] bool; such a row is frozen
  cache: models.Cache
  draft: Any  # the drafter's


class SpeculativeInfo(NamedTuple):
  """What a step did: K drafts judged, up to K + 1 tokens written. A frozen row's entries are 0."""

  token: jax.Array  # [B, K + 1] int32, then zeros
  count: jax.Array  # [B] int32, tokens written
  log_prob: jax.Array  # [B, K + 1], of the law they are drawn from; 0 under greedy
  model_log_prob: jax.Array  # [B, K + 1], of the target's own law
  num_accepted: jax.Array  # [B] int32, drafts that stood, those after a stop token included
  accept_prob: jax.Array  # [B, K], of each draft, if those before it stand


class Samples(NamedTuple):
  """As `decode.Samples`, and what they cost."""

  tokens: jax.Array  # [B, P + N] int32: the prompt, the tokens drawn, then zeros
  length: jax.Array  # [B] int32, a stop token that was drawn included
  prompt_length: jax.Array  # [B] int32
  log_prob: jax.Array  # [B, N] of the n-th drawn token, under the law it was drawn from
  model_log_prob: jax.Array  # [B, N], under the target's own law
  num_calls: jax.Array  # [B] int32, of the target
  num_accepted: jax.Array  # [B] int32, drafts that stood, those after a stop token included


def speculative(
  model: models.LanguageModel,
  params: models.Params,
  drafter: drafting.Drafter,
  *,
  max_length: int,
  max_new_tokens: int | jax.Array,
  transform: logits_lib.LogitsTransform | None = None,
  stop: Sequence[int] = (),
  verify: coupling.Verify | None = None,
) -> base.SamplingAlgorithm:
  """Draws from the law of `decode.autoregressive`, one call of the target for up to K + 1 tokens.

  Rows accept different numbers of drafts; both caches are rewound to what stands. A stop token
  among the accepted ends the row there.

  Args:
    model: the target.
    params: its parameters, unstacked.
    drafter: from `drafting`; for the most acceptance its law has the same transform.
    max_length: S, static.
    max_new_tokens: scalar or [B].
    transform: of the target's logits, without feedback.
    stop: tokens that end a row, kept as its last.
    verify: of a chain; block verification if None, which no chain of couplings beats.

  Raises:
    ValueError: the transform feeds back.

  Reference: Leviathan et al. 2022, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318; Sun et
  al. 2024, arXiv 2403.10444.
  """
  transform = drafting.without_feedback(transform)
  verify = coupling.block if verify is None else verify
  stop = jnp.array(stop, jnp.int32)

  def room(state_length, prompt_length):
    return jnp.minimum(max_length - state_length, prompt_length + max_new_tokens - state_length)

  def init(keys, prompts):
    del keys
    cache = decode.prefill(model, params, prompts, max_length)
    return SpeculativeState(
      step=jnp.zeros_like(prompts.length),
      tokens=decode.buffer(prompts, max_length),
      length=prompts.length,
      prompt_length=prompts.length,
      done=room(prompts.length, prompts.length) <= 0,
      cache=cache,
      draft=drafter.init(prompts, max_length),
    )

  def step(keys, state):
    draft_keys, verify_keys = jax.vmap(lambda key: tuple(jax.random.split(key)))(keys)
    context = logits_lib.Context(state.tokens, state.length, state.prompt_length)
    drafts, draft_state = drafter.draft(draft_keys, context, state.draft)
    model_logits, laws, cache = _score(model, params, transform, drafts, context, state.cache)
    verdict = verify(verify_keys, drafts.tokens, drafts.logits, laws)
    token, count = _written(drafts, verdict, stop, room(state.length, state.prompt_length))
    count = jnp.where(state.done, 0, count)
    places = jnp.arange(token.shape[1])[None, :]
    written = places < count[:, None]
    slots = jnp.where(written, state.length[:, None] + places, max_length)  # out: dropped
    length = state.length + count
    last = jnp.take_along_axis(token, jnp.maximum(count - 1, 0)[:, None], axis=1)
    stopped = (count > 0) & jnp.any(last == stop[None, :], axis=1)
    info = SpeculativeInfo(
      token,
      count,
      _log_prob(laws, token),
      _log_prob(model_logits, token),
      verdict.num_accepted,
      verdict.accept_prob,
    )
    active = ~state.done
    state = SpeculativeState(
      step=state.step + active,
      tokens=state.tokens.at[jnp.arange(count.size)[:, None], slots].set(token, mode="drop"),
      length=length,
      prompt_length=state.prompt_length,
      done=state.done | stopped | (room(length, state.prompt_length) <= 0),
      cache=cache._replace(length=length - 1),
      draft=draft_state,
    )
    return state, _blank(info, active, written)

  return base.SamplingAlgorithm(init, step)


def _score(model, params, transform, drafts, context, cache):
  """The target's logits after the text and after each draft [B, K + 1, V], and their laws."""
  num_drafts = drafts.tokens.shape[1]
  last = jnp.take_along_axis(context.tokens, context.length[:, None] - 1, axis=1)
  read = jnp.concatenate([last, drafts.tokens], axis=1)
  hidden, cache = models.apply(model, params, read, cache)
  model_logits = model.readout(params, hidden)
  rows = jnp.arange(read.shape[0])[:, None]
  slots = context.length[:, None] + jnp.arange(num_drafts)[None, :]
  tokens = context.tokens.at[rows, slots].set(drafts.tokens, mode="drop")

  def law(logits, i):
    return transform.apply(logits, context._replace(tokens=tokens, length=context.length + i), ())

  laws = jax.vmap(law, in_axes=(1, 0), out_axes=1)(model_logits, jnp.arange(num_drafts + 1))
  return model_logits, laws, cache


def _written(drafts, verdict, stop, room):
  """The tokens that a step writes, [B, K + 1], then zeros, and how many: up to a stop token."""
  num_drafts = drafts.tokens.shape[1]
  places = jnp.arange(num_drafts + 1)[None, :]
  accepted = verdict.num_accepted[:, None]
  token = jnp.pad(drafts.tokens, ((0, 0), (0, 1)))
  token = jnp.where(places == accepted, verdict.token[:, None], token)
  count = jnp.minimum(accepted[:, 0] + 1, room)
  is_stop = jnp.any(token[:, :, None] == stop[None, None, :], axis=2)
  first = jnp.min(jnp.where(is_stop, places, num_drafts + 1), axis=1)
  count = jnp.minimum(count, first + 1)
  return jnp.where(places < count[:, None], token, 0), count


def _log_prob(logits, token):
  chosen = jnp.take_along_axis(logits, token[:, :, None], axis=2)[:, :, 0]
  return chosen - jax.nn.logsumexp(logits, axis=2)


def _blank(info, active, written):
  """Info with zeros where nothing was written, and in frozen rows."""
  zero = lambda leaf, where: jnp.where(where, leaf, 0)
  return SpeculativeInfo(
    token=zero(info.token, written),
    count=info.count,
    log_prob=zero(info.log_prob, written),
    model_log_prob=zero(info.model_log_prob, written),
    num_accepted=zero(info.num_accepted, active),
    accept_prob=zero(info.accept_prob, active[:, None]),
  )


def generate(
  model: models.LanguageModel,
  params: models.Params,
  drafter: drafting.Drafter,
  keys: base.Keys,
  prompts: decode.Prompts,
  *,
  max_new_tokens: int,
  **settings,
) -> Samples:
  """Continues each prompt as `decode.generate` does, of the same law; see `speculative`."""
  algorithm = base.recorded(
    speculative(
      model,
      params,
      drafter,
      max_length=prompts.tokens.shape[1] + max_new_tokens,
      max_new_tokens=max_new_tokens,
      **settings,
    ),
    observe=lambda state, info: info,
    capacity=max_new_tokens,
  )
  recorded = base.start(keys, algorithm, prompts)
  state, record = base.run_until(
    keys, algorithm, recorded, lambda recorded: recorded.state.done, max_new_tokens
  )
  before = jnp.cumsum(record.count, axis=1) - record.count  # [B, N] tokens before each step
  places = jnp.arange(record.token.shape[2])[None, None, :]
  slots = jnp.where(places < record.count[:, :, None], before[:, :, None] + places, max_new_tokens)
  rows = jnp.arange(slots.shape[0])[:, None, None]

  def in_order(leaf):
    empty = jnp.zeros((slots.shape[0], max_new_tokens), leaf.dtype)
    return empty.at[rows, slots].set(leaf, mode="drop")

  return Samples(
    state.tokens,
    state.length,
    state.prompt_length,
    in_order(record.log_prob),
    in_order(record.model_log_prob),
    state.step,
    jnp.sum(record.num_accepted, axis=1),
  )
