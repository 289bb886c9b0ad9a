"""Superposed decoding: K drafts for one call of the model a step, on the mean of their embeddings.

An approximation: the model's law of a superposition stands for the laws of all the drafts in it.
How good that is depends on the model; benchmarks/superposed.md has figures.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..models import base as models
from . import base, decode, ngram
from . import logits as logits_lib

# (tokens [B, K, S], length [B, K], candidates [B, M], their log p [B, M]) -> what each candidate
# adds to the score of each draft, [B, K, M]; -inf refuses it.
Scoring = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


class SuperposedState(NamedTuple):
  """K drafts of each row, the best first. The cache holds every position of a row but the last."""

  step: jax.Array  # [B] int32, positions written
  tokens: jax.Array  # [B, K, S] int32: the prompt, a draft's tokens, then zeros
  length: jax.Array  # [B, K] int32; that of a stopped draft no longer grows
  score: jax.Array  # [B, K] float32, sum of what `scoring` gave; -inf is an empty draft
  stopped: jax.Array  # [B, K] bool
  prompt_length: jax.Array  # [B] int32
  done: jax.Array  # [B] bool; such a row is frozen
  cache: models.Cache  # of one row a prompt, its drawn positions superposed


class SuperposedInfo(NamedTuple):
  """What a step did to each draft. A frozen row's entries are 0."""

  parent: jax.Array  # [B, K] int32, the draft that it continues
  token: jax.Array  # [B, K] int32, what it continues it with; 0 where it had stopped
  score: jax.Array  # [B, K], now


def likelihood() -> Scoring:
  """log p of the superposed law: all drafts gain the same from a token."""
  return lambda tokens, length, candidates, log_prob: jnp.broadcast_to(
    log_prob[:, None, :], (*length.shape, log_prob.shape[-1])
  )


def interpolated(
  table: ngram.NgramTable,
  *,
  alpha: float | jax.Array = 0.54,
  weights: Sequence[float] = (0.01, 0.04, 0.15, 0.18, 0.12),
  penalty: float | jax.Array = 200.0,
) -> Scoring:
  """log p(v)^(1 - alpha) p_ngram(v | draft)^alpha: what follows each draft is told by counts.

  The superposed law is one for all drafts; this is what tells them apart. A candidate that never
  followed is refused; where that refuses every candidate of a draft, they get
  (1 - alpha) log p - penalty instead, so a draft without counts is continued only for want of
  others.

  Args:
    table: of an order of at least len(weights) + 1.
    alpha: in [0, 1], scalar or [B]; 0 is `likelihood`, exactly.
    weights: of n-grams of n = 2, 3, ...; see `ngram.interpolated`.
    penalty: at least 0, in nats of score, scalar or [B].

  Reference: Shen et al. 2024, arXiv 2405.18400; the values, and the penalty, are those of the
  authors' code (params/p15_d3_mixed.json).
  """
  logits_lib.require("alpha", alpha, lambda a: 0 <= a <= 1, "in [0, 1]")
  logits_lib.require("penalty", penalty, lambda x: x >= 0, "at least 0")

  def scoring(tokens, length, candidates, log_prob):
    each = jnp.broadcast_to(candidates[:, None, :], (*length.shape, candidates.shape[-1]))
    counted = ngram.interpolated(table, weights, tokens, length, each)
    a = logits_lib.per_row(alpha).astype(jnp.float32)[:, :, None]
    model_part = _times(1 - a, log_prob[:, None, :])
    mixed = model_part + _times(a, jnp.log(counted))
    supported = jnp.any(mixed > -jnp.inf, axis=-1, keepdims=True)
    return jnp.where(supported, mixed, model_part - logits_lib.per_row(penalty)[:, :, None])

  return scoring


def superposed(
  model: models.LanguageModel,
  params: models.Params,
  *,
  max_length: int,
  max_new_tokens: int | jax.Array,
  num_drafts: int = 3,
  num_candidates: int = 9,
  temperature: float | jax.Array = 1.0,
  scoring: Scoring | None = None,
  stop: Sequence[int] = (),
) -> base.SamplingAlgorithm:
  """The K best of the drafts continued by the M likeliest tokens of a superposed pass.

    x_t = sum_i w_i embed(last token of draft i),   w = softmax(score)
    p = softmax(readout(trunk(x_t)) / T),   C = its M likeliest tokens
    drafts = the K best of score_i + scoring(draft i, v),   v in C

  Deterministic. Where drafts stop, they keep their score and compete with it, and weigh nothing in
  the superposition. The first step knows one draft, so its K best are K first tokens. With one
  draft this is greedy decoding by `scoring`. The state's drafts are sorted, the best first.

  The paper combines K drafts with the top K tokens. The authors' code takes M = 9 of them for K = 3
  (M is `num_candidates` here), and sharpens the model's law by T = 0.06 before it interpolates,
  which with alpha = 0.54 is an exponent of 0.46 / 0.06 on p (T = 1 here). It renormalises p over
  the candidates; not here: it is a constant for the drafts that go on, and would count against
  those that stopped. It moves drafts that stop to a list of their own, and ranks by perplexity.

  Args:
    model: the model; it has to take embeddings that are of no token.
    params: its parameters; a transformer's decode fastest unstacked (`transformer.unstack`).
    max_length: S, static.
    max_new_tokens: scalar or [B].
    num_drafts: K, static.
    num_candidates: M, from 1 to V, static. Fewer than K leave drafts empty after the first step.
    temperature: T > 0, scalar or [B].
    scoring: None is `likelihood`; the paper's is `interpolated`.
    stop: tokens that end a draft, kept as its last.

  Reference: Shen et al. 2024, arXiv 2405.18400.
  """
  for name, value in (("num_drafts", num_drafts), ("num_candidates", num_candidates)):
    logits_lib.require(name, value, lambda n: n >= 1, "at least 1")
  logits_lib.require("temperature", temperature, lambda t: t > 0, "above 0")
  scoring = likelihood() if scoring is None else scoring
  stop = jnp.array(stop, jnp.int32)

  def is_full(state):
    return (state.prompt_length + state.step >= max_length) | (state.step >= max_new_tokens)

  def init(keys, prompts):
    del keys
    return _start(model, params, prompts, max_length, num_drafts, is_full)

  def step(keys, state):
    del keys
    hidden, cache = model.trunk(params, superposition(model, params, state), state.cache)
    logits = model.readout(params, hidden[:, 0])
    log_prob, candidates = _candidates(logits, temperature, num_candidates)
    gained = scoring(state.tokens, state.length, candidates, log_prob)
    parent, chosen, score = _best(state, gained)
    token = jnp.take_along_axis(candidates, chosen, axis=1)
    new = _continue(state, parent, token, score, stop)
    new = new._replace(done=_over(new) | is_full(new))
    active = ~state.done
    kept = base.select_rows(active, new._replace(cache=()), state._replace(cache=()))
    length = kept.prompt_length + kept.step - 1
    written = jnp.where(jnp.take_along_axis(state.stopped, parent, axis=1), 0, token)
    info = SuperposedInfo(parent, written, score)
    info = jax.tree.map(lambda leaf: jnp.where(active[:, None], leaf, 0), info)
    return kept._replace(cache=cache._replace(length=length)), info

  return base.SamplingAlgorithm(init, step)


def weights(state: SuperposedState) -> jax.Array:
  """[B, K]: softmax of the scores of the drafts that go on; 0 for the others."""
  score = jnp.where(state.stopped, -jnp.inf, state.score)
  largest = jnp.max(score, axis=1, keepdims=True)
  shares = jnp.where(
    score > -jnp.inf, jnp.exp(score - jnp.where(largest > -jnp.inf, largest, 0)), 0
  )
  total = jnp.sum(shares, axis=1, keepdims=True)
  return shares / jnp.where(total > 0, total, 1)


def superposition(
  model: models.LanguageModel, params: models.Params, state: SuperposedState
) -> jax.Array:
  """sum_i w_i embed(last token of draft i), [B, 1, D]: what the next step feeds the model."""
  last = jnp.take_along_axis(state.tokens, state.length[:, :, None] - 1, axis=2)[:, :, 0]
  embedded = model.embed(params, last)
  mixed = jnp.sum(weights(state)[:, :, None] * embedded.astype(jnp.float32), axis=1)
  return mixed.astype(embedded.dtype)[:, None]


def _times(factor, log_prob):
  """factor * log_prob, and 0 where the factor is 0 and the probability too."""
  return jnp.where(factor == 0, 0, factor * log_prob)


def _start(model, params, prompts, max_length, num_drafts, is_full):
  batch_size = prompts.length.size
  cache = decode.prefill(model, params, prompts, max_length)
  tokens = decode.buffer(prompts, max_length)
  score = jnp.where(jnp.arange(num_drafts) == 0, 0, -jnp.inf).astype(jnp.float32)
  state = SuperposedState(
    step=jnp.zeros(batch_size, jnp.int32),
    tokens=jnp.repeat(tokens[:, None], num_drafts, axis=1),
    length=jnp.repeat(prompts.length[:, None], num_drafts, axis=1),
    score=jnp.repeat(score[None], batch_size, axis=0),
    stopped=jnp.zeros((batch_size, num_drafts), bool),
    prompt_length=prompts.length,
    done=jnp.zeros(batch_size, bool),
    cache=cache,
  )
  return state._replace(done=is_full(state))


def _candidates(logits, temperature, num_candidates):
  """log softmax(logits / T) of the likeliest tokens and these, [B, M] each, the likeliest first."""
  if num_candidates > logits.shape[-1]:
    raise ValueError(
      f"num_candidates({num_candidates}): it has to be at most {logits.shape[-1]}, the vocabulary."
    )
  tempered = logits / logits_lib.per_row(temperature).astype(jnp.float32)
  return jax.lax.top_k(jax.nn.log_softmax(tempered, axis=-1), num_candidates)


def _best(state, gained):
  """The K best continuations: drafts, indices of candidates, and scores, [B, K] each."""
  num_drafts, num_candidates = gained.shape[1:]
  only = jnp.where(jnp.arange(num_candidates) == 0, 0, -jnp.inf)  # a stopped draft stays as it is
  gained = jnp.where(state.stopped[:, :, None], only[None, None, :], gained)
  total = state.score[:, :, None] + gained
  score, index = jax.lax.top_k(total.reshape(total.shape[0], -1), num_drafts)
  return index // num_candidates, index % num_candidates, score


def _continue(state, parent, token, score, stop):
  """The drafts `parent` with `token` written at their ends, but where they had stopped."""
  pick = lambda leaf: jnp.take_along_axis(leaf, parent, axis=1)
  length, stopped = pick(state.length), pick(state.stopped)
  tokens = jnp.take_along_axis(state.tokens, parent[:, :, None], axis=1)
  rows, drafts = jnp.indices(parent.shape)
  slot = jnp.where(stopped, tokens.shape[2], length)  # beyond the end: dropped
  ends = jnp.any(token[:, :, None] == stop[None, None, :], axis=-1)
  return state._replace(
    step=state.step + 1,
    tokens=tokens.at[rows, drafts, slot].set(token, mode="drop"),
    length=length + ~stopped,
    score=score,
    stopped=stopped | ends,
  )


def _over(state):
  """Whether no draft of a row goes on."""
  return jnp.all(state.stopped | (state.score == -jnp.inf), axis=1)
