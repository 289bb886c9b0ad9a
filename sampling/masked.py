"""Masked diffusion: sequences filled in by a predictor of what is masked.

    predict = masked_models.predictor(model, params)
    algorithm = masked.first_hitting(predict, mask_schedules.linear(), mask=vocab_size)
    keys = base.row_keys(run_key, requests)
    tokens = masked.sample(keys, algorithm, tokens, mask=vocab_size)

Inputs are tokens [B, L] that are the mask (the number V, one past the vocabulary) where something
is to be written. All of them masked is sampling from nothing, a prompt is what comes first and is
not, and any other pattern is infilling: what is given stays.

With exact conditionals, what is written one position at a time has the law of the data, whatever
chooses the positions, as long as it does not look at the token that it is about to write:
p(x_i | x_S) is what the predictor gives, and the chain rule holds in any order. Two positions
written from one call of the network are drawn as if independent, which is all that a sampler with
fewer calls than tokens gets wrong.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..models import base as models
from ..models import mask_schedules
from . import base
from . import logits as logits_lib

NO_TRANSFORM = logits_lib.chain()


class State(NamedTuple):
  """Sequences, partly written."""

  step: jax.Array  # [B] int32
  tokens: jax.Array  # [B, L] int32
  calls: jax.Array  # [B] int32, of the network, that the row has needed


class Info(NamedTuple):
  """What a step wrote; log-probabilities are 0 where nothing was written."""

  written: jax.Array  # [B, L] bool
  log_prob: jax.Array  # [B, L], under the law that the token was drawn from
  model_log_prob: jax.Array  # [B, L], under the predictor's own law


class View(NamedTuple):
  """One row, as a rule sees it that chooses positions to write."""

  log_p: jax.Array  # [L, V], the predictor's own law of each position's token, not transformed
  token: jax.Array  # [L], a draw of the transformed law
  masked: jax.Array  # [L] bool, the positions that there are to choose from
  step: jax.Array  # []


# (key, view) -> [L] bool: the positions to be written, at least one of those that are masked
Rule = Callable[[jax.Array, View], jax.Array]


def start(tokens: jax.Array) -> State:
  """Before the first step."""
  zeros = jnp.zeros(tokens.shape[:1], jnp.int32)
  return State(zeros, tokens.astype(jnp.int32), zeros)


def logits_at(
  predict: models.Predictor, tokens: jax.Array, t: jax.Array, place: jax.Array
) -> jax.Array:
  """Logits [B, 1, V] of the token at position place [B] of each row."""
  return jnp.take_along_axis(predict(tokens, t), place[:, None, None], axis=1)


def transformed(
  logits: jax.Array, tokens: jax.Array, transform: logits_lib.LogitsTransform
) -> jax.Array:
  """log p [B, L, V] of logits [B, L, V], transformed position by position: `check_transform`."""
  check_transform(transform, logits.shape[-1], logits.shape[0])
  apply = lambda logits: transform.apply(logits, _context(tokens), ())
  logits = jax.vmap(apply, in_axes=1, out_axes=1)(logits.astype(jnp.float32))
  return jax.nn.log_softmax(logits, axis=-1)


def _context(tokens):
  length = jnp.full(tokens.shape[:1], tokens.shape[1], jnp.int32)
  return logits_lib.Context(tokens, length, jnp.zeros_like(length))


def check_transform(
  transform: logits_lib.LogitsTransform, vocab_size: int, batch_size: int = 1
) -> None:
  """Refuses a transform that looks at more than the logits: tokens are written in no order here.

  Args:
    transform: its parameters scalar or [B].
    vocab_size: V.
    batch_size: B.

  Raises:
    ValueError: it feeds back from token to token, or reads what has been written.
  """
  if jax.tree.leaves(transform.init(1)):
    raise ValueError("Masked sampling has no order of tokens for a transform to feed back along.")
  apply = lambda context, logits: transform.apply(logits, context, ())
  context = _context(jnp.zeros((batch_size, 1), jnp.int32))
  traced = jax.make_jaxpr(apply)(context, jnp.zeros((batch_size, vocab_size))).jaxpr
  read = {id(var) for equation in traced.eqns for var in equation.invars}
  if any(id(var) in read for var in traced.invars[: len(context)]):
    raise ValueError(
      "Masked sampling has no order of tokens: a transform may not look at those written before."
    )


def coins(keys: base.Keys, prob: jax.Array, where: jax.Array) -> jax.Array:
  """Which of the positions `where` [B, L] come up, each with probability prob [B] or [B, L]."""
  flip = lambda key, p, row: jax.random.bernoulli(key, p, row.shape, mode="high")
  return jax.vmap(flip)(keys, prob, where) & where


def draw_each(keys: base.Keys, log_p: jax.Array) -> jax.Array:
  """A token [B, L] at every position, from laws [B, L, V]; see `logits.draw` for the tails."""
  each = jax.vmap(lambda key: jax.random.split(key, log_p.shape[1]))(keys)
  flat = logits_lib.draw(each.reshape(-1), log_p.reshape(-1, log_p.shape[-1]))
  return flat.reshape(log_p.shape[:2])


def info_of(chosen: jax.Array, token: jax.Array, log_p: jax.Array, logits: jax.Array) -> Info:
  """Of tokens [B, L] at the positions chosen [B, L], drawn from log_p [B, L, V], made of logits."""

  def own(laws):
    return jnp.where(chosen, jnp.take_along_axis(laws, token[..., None], axis=-1)[..., 0], 0)

  return Info(chosen, own(log_p), own(jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)))


def written(
  state: State,
  chosen: jax.Array,
  token: jax.Array,
  log_p: jax.Array,
  logits: jax.Array,
  active: jax.Array,
) -> tuple[State, Info]:
  """The state and info after writing token [B, L] at the positions chosen [B, L]; see `info_of`.

  Rows that are not active [B] make no step; whoever has chosen something has called the network.
  """
  chosen &= active[:, None]
  state = State(
    step=state.step + active,
    tokens=jnp.where(chosen, token, state.tokens),
    calls=state.calls + jnp.any(chosen, axis=1),
  )
  return state, info_of(chosen, token, log_p, logits)


def ancestral(
  predict: models.Predictor,
  schedule: mask_schedules.MaskSchedule,
  times: jax.Array,
  *,
  mask: int,
  transform: logits_lib.LogitsTransform = NO_TRANSFORM,
) -> base.SamplingAlgorithm:
  """Each masked token is unmasked from t to s with probability (alpha_s - alpha_t) / (1 - alpha_t).

  The tokens unmasked in one step are drawn independently, so the law is exact as the steps get
  short. Which positions are unmasked does not depend on the network: it is called in those steps
  alone that unmask something in some row, on average T (1 - (1 - 1/T)^L) of T equal ones for a row
  of L. That is what caching its output until a token changes comes to.

  Args:
    predict: (tokens, t [B]) -> logits.
    schedule: alpha.
    times: [T + 1], falling, the first 1 and the last 0; may be traced.
    mask: V.
    transform: of each position's law; without feedback.

  Raises:
    ValueError: times rise, or do not end at 0.

  Reference: Sahoo et al. 2024 (MDLM), arXiv 2406.07524, eq. 6 and section 4.1 (caching); Shi et al.
    2024 (MD4), arXiv 2406.04329, section 3.3.
  """
  times = grid(times)

  def step(keys, state):
    choose_keys, token_keys = base.split(keys)
    active, t, s = interval(times, state.step)
    prob = mask_schedules.unmask_prob(schedule, t, s)
    leaves = coins(choose_keys, prob, (state.tokens == mask) & active[:, None])
    logits = lambda: predict(state.tokens, t)
    return written_if_any(token_keys, state, leaves, logits, transform, active)

  return base.SamplingAlgorithm(lambda keys, tokens: start(tokens), step)


def grid(times: jax.Array) -> jax.Array:
  """Times [T + 1] of a sampler; ValueError where they are known, and rise or do not end at 0."""
  made = falling(times)
  if not isinstance(times, jax.core.Tracer) and np.asarray(times)[-1] != 0:
    raise ValueError("times: they have to end at 0.")
  return made


def falling(times: jax.Array) -> jax.Array:
  """Times [T + 1] of a sampler; ValueError where they are known, and rise."""
  if not isinstance(times, jax.core.Tracer):
    known = np.asarray(times)
    if known.ndim != 1 or known.size < 2 or np.any(np.diff(known) > 0):
      raise ValueError("times: they have to be two or more, and not to rise.")
  return jnp.asarray(times, jnp.float32)


def interval(times: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Whether times [T + 1] have a step of number `step` [B], and the times t >= s it lies between.

  Returns:
    [B] bool, and t and s [B], both the last time where there is no step.
  """
  last = times.shape[0] - 1
  return step < last, times[jnp.minimum(step, last)], times[jnp.minimum(step + 1, last)]


def written_if_any(
  keys: base.Keys,
  state: State,
  chosen: jax.Array,
  logits: Callable[[], jax.Array],
  transform: logits_lib.LogitsTransform,
  active: jax.Array,
) -> tuple[State, Info]:
  """As `written`, of tokens drawn from logits() [B, L, V], transformed: called if any is chosen."""

  def write(keys):
    made = logits()
    log_p = transformed(made, state.tokens, transform)
    return written(state, chosen, draw_each(keys, log_p), log_p, made, active)

  def skip():
    zeros = jnp.zeros(chosen.shape)
    nothing = Info(jnp.zeros(chosen.shape, bool), zeros, zeros)
    return state._replace(step=state.step + active), nothing

  return base.cond(keys, jnp.any(chosen & active[:, None]), write, skip)


class HittingState(NamedTuple):
  """Sequences, partly written, each at its own time."""

  step: jax.Array  # [B] int32
  tokens: jax.Array  # [B, L] int32
  calls: jax.Array  # [B] int32
  noise: jax.Array  # [B], 1 - alpha at the time of the last token


def first_hitting(
  predict: models.Predictor,
  schedule: mask_schedules.MaskSchedule,
  *,
  mask: int,
  transform: logits_lib.LogitsTransform = NO_TRANSFORM,
) -> base.SamplingAlgorithm:
  """Simulates the reverse process exactly: from one unmasking to the next, a token each.

  With n tokens masked at t, each is unmasked by the time s < t with a probability that only
  1 - alpha knows of, so the next comes when

    1 - alpha(s) = u^(1/n) (1 - alpha(t)),    u ~ U(0, 1),

  at any of the n places alike. It is `ancestral` in the limit of short steps, in as many calls as
  there are masks; one token is drawn a call, and not one at every position. A predictor that does
  not look at the time makes it unmasking in random order.

  Args:
    predict: (tokens, t [B]) -> logits.
    schedule: of the times; the law does not depend on it unless the predictor does.
    mask: V.
    transform: of the law of each token; without feedback.

  Reference: Zheng et al. 2024, arXiv 2409.02908, proposition 4.1 and algorithm 1.
  """

  def init(keys, tokens):
    return HittingState(*start(tokens), jnp.ones(tokens.shape[:1]))

  def step(keys, state):
    masked = state.tokens == mask
    count = jnp.sum(masked, axis=1)
    active = count > 0
    place_keys, time_keys, token_keys = base.split(keys, 3)
    u = jax.vmap(lambda key: jax.random.uniform(key))(time_keys)
    noise = jnp.where(active, state.noise * u ** (1 / jnp.maximum(count, 1)), state.noise)
    place = logits_lib.draw(place_keys, jnp.where(masked, 0.0, -jnp.inf))
    logits = logits_at(predict, state.tokens, schedule.time(1 - noise), place)
    law = transformed(logits, state.tokens, transform)
    token = logits_lib.draw(token_keys, law[:, 0])[:, None]
    chosen = (jnp.arange(masked.shape[1])[None] == place[:, None]) & active[:, None]
    now = State(state.step + active, jnp.where(chosen, token, state.tokens), state.calls + active)
    of_token = info_of(active[:, None], token, law, logits)
    info = jax.tree.map(lambda leaf: jnp.where(chosen, leaf, jnp.zeros_like(leaf)), of_token)
    return HittingState(*now, noise), info

  return base.SamplingAlgorithm(init, step)


def unmask(
  predict: models.Predictor,
  rule: Rule,
  *,
  mask: int,
  transform: logits_lib.LogitsTransform = NO_TRANSFORM,
) -> base.SamplingAlgorithm:
  """Each step writes the positions that a rule chooses; see `unmasking` for rules.

  Exact, with exact conditionals, for rules that choose one position without looking at its token.

  Args:
    predict: (tokens, t [B]) -> logits; t is the share of positions that are masked.
    rule: chooses.
    mask: V.
    transform: of the law that each token is drawn from; the rule sees the predictor's own.
  """

  def step(keys, state):
    rule_keys, token_keys = base.split(keys)
    masked = state.tokens == mask
    logits = predict(state.tokens, jnp.mean(masked, axis=1))
    log_p = transformed(logits, state.tokens, transform)
    token = draw_each(token_keys, log_p)
    view = View(jax.nn.log_softmax(logits.astype(jnp.float32)), token, masked, state.step)
    chosen = jax.vmap(rule)(rule_keys, view) & masked
    return written(state, chosen, token, log_p, logits, jnp.any(masked, axis=1))

  return base.SamplingAlgorithm(lambda keys, tokens: start(tokens), step)


def finished(
  keys: base.Keys, algorithm: base.SamplingAlgorithm, tokens: jax.Array, *, mask: int
) -> Any:
  """The sampler's state when nothing is masked any more; call it inside jit.

  For samplers that write a token in every other step at least, such as `first_hitting`, `unmask`
  and `blocks.unmask`; one with a grid of T steps is run by `base.run` for T.
  """
  state = base.start(keys, algorithm, tokens)
  done = lambda state: ~jnp.any(state.tokens == mask, axis=1)
  return base.run_until(keys, algorithm, state, done, 2 * tokens.shape[1])


def sample(
  keys: base.Keys, algorithm: base.SamplingAlgorithm, tokens: jax.Array, *, mask: int
) -> jax.Array:
  """The sequences [B, L] when nothing is masked any more; see `finished`."""
  return finished(keys, algorithm, tokens, mask=mask).tokens
