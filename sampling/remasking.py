"""Masked samplers that take back what they have written: ReMDM, and correctors.

What was masked when sampling began is the sampler's own to mask again; what was given stays.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..models import base as models
from ..models import mask_schedules
from . import base, masked
from . import logits as logits_lib


class State(NamedTuple):
  """Sequences, partly written, and which of their tokens were not given."""

  step: jax.Array  # [B] int32
  tokens: jax.Array  # [B, L] int32
  calls: jax.Array  # [B] int32, of the network
  free: jax.Array  # [B, L] bool, masked at the start
  confidence: jax.Array  # [B, L], the predictor's own probability of each token when written


class Moment(NamedTuple):
  """A step from t to s <= t, as a rule of remasking sees it."""

  alpha_t: jax.Array  # [B, 1]
  alpha_s: jax.Array  # [B, 1]
  confidence: jax.Array  # [B, L]
  kept: jax.Array  # [B, L] bool, tokens that may be masked again


# moment -> sigma from 0 to `most`(moment): [B, 1], or [B, L] with what is not `kept` at 0
Remask = Callable[[Moment], jax.Array]


def most(moment: Moment) -> jax.Array:
  """min(1, (1 - alpha_s) / alpha_t), [B, 1]: beyond it, more would be masked than time s allows."""
  some = moment.alpha_t > 0
  bound = (1 - moment.alpha_s) / jnp.where(some, moment.alpha_t, 1)
  return jnp.where(some, jnp.minimum(bound, 1), 1)


def cap(eta: float | jax.Array) -> Remask:
  """sigma = min(eta, `most`). Reference: Wang et al. 2025, arXiv 2503.00307, section 4.1."""
  logits_lib.require("cap", eta, lambda eta: 0 <= eta <= 1, "in [0, 1]")
  return lambda moment: jnp.minimum(_column(eta), most(moment))


def rescale(eta: float | jax.Array) -> Remask:
  """sigma = eta `most`; eta = 0 is ancestral. Reference: arXiv 2503.00307, section 4.1."""
  logits_lib.require("rescale", eta, lambda eta: 0 <= eta <= 1, "in [0, 1]")
  return lambda moment: _column(eta) * most(moment)


def _column(eta):
  """A parameter of rows, scalar or [B], as [B or 1, 1]."""
  return jnp.asarray(eta, jnp.float32).reshape(-1, 1)


def confident(remask: Remask) -> Remask:
  """sigma_i = sigma exp(-p_i) / sum_j exp(-p_j) over kept tokens, p_i their confidence.

  Tokens that were unlikely when they were written are taken back first. Masked tokens are unmasked
  as without remasking, as in the authors' code, so more are masked at s than the schedule says:
  unlike the others, it does not keep the marginal. The confidence is the predictor's own, whatever
  temperature or filter the tokens are drawn with; the authors' code has that of the filtered law.

  Reference: Wang et al. 2025, arXiv 2503.00307, section 4.1 (ReMDM-conf).
  """

  def sigma(moment):
    weights = jnp.where(moment.kept, jnp.exp(-moment.confidence), 0)
    total = jnp.sum(weights, axis=1, keepdims=True)
    return remask(moment) * weights / jnp.where(total > 0, total, 1)

  return sigma


def in_loop(remask: Remask) -> Remask:
  """The rule where time stands still, alpha_s = alpha_t, and 0 elsewhere; see `loop_times`."""
  return lambda moment: jnp.where(moment.alpha_s == moment.alpha_t, remask(moment), 0)


def loop_times(
  schedule: mask_schedules.MaskSchedule,
  before: int,
  within: int,
  after: int,
  *,
  alpha: float = 0.9,
) -> jax.Array:
  """Times [T + 1] down to where alpha is kept, `within` steps there, and on to 0.

  Reference: Wang et al. 2025, arXiv 2503.00307, section 4.2 (ReMDM-loop; alpha = .9).
  """
  held = schedule.time(jnp.float32(alpha))
  down, rest = jnp.linspace(1, held, before + 1), jnp.linspace(held, 0, after + 1)
  return jnp.concatenate([down, jnp.full(within, held), rest[1:]])


def remasking(
  predict: models.Predictor,
  schedule: mask_schedules.MaskSchedule,
  times: jax.Array,
  remask: Remask,
  *,
  mask: int,
  transform: logits_lib.LogitsTransform = masked.NO_TRANSFORM,
) -> base.SamplingAlgorithm:
  """Ancestral sampling in which a written token is masked again with probability sigma.

  A masked token is unmasked with probability (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t). With
  one sigma for all positions the share of masks at s is the schedule's, 1 - alpha_s, whatever sigma
  is, and so are the training marginals: errors of early steps can be mended later. A sigma of each
  position (`confident`) is 0 where it is masked.

  Args:
    predict: (tokens, t [B]) -> logits.
    schedule: alpha.
    times: [T + 1], from 1 to 0, not rising; `loop_times`.
    remask: sigma, of a moment.
    mask: V.
    transform: of the law of each token; without feedback.

  Reference: Wang et al. 2025 (ReMDM), arXiv 2503.00307, eq. 5 and 6.
  """
  times = masked.grid(times)

  def step(keys, state):
    choose_keys, token_keys = base.split(keys)
    active, t, s = masked.interval(times, state.step)
    is_masked = state.tokens == mask
    alpha_t, alpha_s = schedule.alpha(t)[:, None], schedule.alpha(s)[:, None]
    kept = state.free & ~is_masked
    sigma = remask(Moment(alpha_t, alpha_s, state.confidence, kept))
    noise = 1 - alpha_t
    leave = (alpha_s - (1 - sigma) * alpha_t) / jnp.where(noise > 0, noise, 1)
    prob = jnp.where(is_masked, jnp.clip(leave, 0, 1), sigma)
    changes = masked.coins(choose_keys, prob, (is_masked | kept) & active[:, None])
    tokens = jnp.where(changes & ~is_masked, mask, state.tokens)
    # The predictor reads what was there before anything was taken back, as q(x_s | x_t) has it.
    logits = lambda: predict(state.tokens, t)
    now = masked.State(state.step, tokens, state.calls)
    wanted = changes & is_masked
    now, info = masked.written_if_any(token_keys, now, wanted, logits, transform, active)
    confidence = jnp.where(info.written, jnp.exp(info.model_log_prob), state.confidence)
    return State(*now, state.free, confidence), info

  return base.SamplingAlgorithm(lambda keys, tokens: start(tokens, mask), step)


def start(tokens: jax.Array, mask: int) -> State:
  """Before the first step."""
  free = tokens == mask
  return State(*masked.start(tokens), free, jnp.zeros(tokens.shape))


# (keys [B], state) -> state: moves tokens and leaves their law at the state's time as it is
Correct = Callable[[base.Keys, State], State]


def corrected(
  algorithm: base.SamplingAlgorithm, correct: Correct, *, mask: int, num: int = 1
) -> base.SamplingAlgorithm:
  """The algorithm, each of whose steps is followed by `num` of a corrector's.

  Args:
    algorithm: whose state is a `masked.State`, such as `masked.ancestral`.
    correct: `gibbs` or `forward_backward`.
    mask: V.
    num: how often.

  Raises:
    ValueError: the algorithm has another state.
  """

  def init(keys, tokens):
    state = algorithm.init(keys, tokens)
    if not isinstance(state, masked.State):
      raise ValueError("corrected: the algorithm's state has to be a masked.State.")
    return start(state.tokens, mask)

  def step(keys, state):
    first, *others = base.split(keys, num + 1)
    inner = masked.State(*state[:3])
    now, info = algorithm.step(first, inner)
    moved = now.step > state.step
    for more in others:
      fixed = State(*now, state.free, state.confidence)
      now = masked.State(*base.select_rows(moved, correct(more, fixed), fixed)[:3])
    return State(*now, state.free, state.confidence), info

  return base.SamplingAlgorithm(init, step)


def gibbs(
  predict: models.Predictor,
  *,
  mask: int,
  transform: logits_lib.LogitsTransform = masked.NO_TRANSFORM,
) -> Correct:
  """Masks one written token, any of them alike, and draws it anew from p(x_i | the others).

  With exact conditionals it leaves the law of the tokens as it is, whichever are masked. A row of
  which nothing is written stays. The predictor is told the share of masks as the time.
  """

  def correct(keys, state):
    place_keys, token_keys = base.split(keys)
    kept = state.free & (state.tokens != mask)
    some = jnp.any(kept, axis=1)
    scores = jnp.where(kept | ~some[:, None], 0.0, -jnp.inf)
    place = logits_lib.draw(place_keys, scores)
    here = (jnp.arange(kept.shape[1])[None] == place[:, None]) & kept
    tokens = jnp.where(here, mask, state.tokens)
    t = jnp.mean(tokens == mask, axis=1)
    logits = masked.logits_at(predict, tokens, t, place)
    token = logits_lib.draw(token_keys, masked.transformed(logits, tokens, transform)[:, 0])
    return state._replace(
      tokens=jnp.where(here, token[:, None], state.tokens), calls=state.calls + some
    )

  return correct


def forward_backward(
  predict: models.Predictor,
  schedule: mask_schedules.MaskSchedule,
  times: jax.Array,
  back: float | jax.Array,
  *,
  mask: int,
  transform: logits_lib.LogitsTransform = masked.NO_TRANSFORM,
) -> Correct:
  """Noise from s to s' = min(s + back, 1), and one ancestral step from there to s again.

  Forward a kept token is masked with probability 1 - alpha(s') / alpha(s); backward the predictor
  sees what that leaves. It keeps the law at s up to the dependence between the tokens that one step
  writes, as `masked.ancestral` does.

  Args:
    predict: (tokens, t [B]) -> logits.
    schedule: alpha.
    times: [T + 1], of the sampler that is corrected; s is times[step].
    back: how far, in time, above 0.
    mask: V.
    transform: of the law of each token; without feedback.

  Raises:
    ValueError: `back` is not above 0, or times rise.

  Reference: Campbell et al. 2022, arXiv 2205.14987, section 4.4; Lezama et al. 2023.
  """
  logits_lib.require("back", back, lambda back: back > 0, "above 0")
  times = masked.grid(times)

  def correct(keys, state):
    mask_keys, choose_keys, token_keys = base.split(keys, 3)
    s = times[jnp.minimum(state.step, times.shape[0] - 1)]
    noisier = jnp.minimum(s + back, 1)
    alpha = schedule.alpha(s)
    lost = 1 - schedule.alpha(noisier) / jnp.where(alpha > 0, alpha, 1)
    kept = state.free & (state.tokens != mask)
    tokens = jnp.where(masked.coins(mask_keys, lost, kept), mask, state.tokens)
    leaves = masked.coins(
      choose_keys, mask_schedules.unmask_prob(schedule, noisier, s), tokens == mask
    )
    log_p = masked.transformed(predict(tokens, noisier), tokens, transform)
    tokens = jnp.where(leaves, masked.draw_each(token_keys, log_p), tokens)
    return state._replace(tokens=tokens, calls=state.calls + jnp.any(leaves, axis=1))

  return correct
