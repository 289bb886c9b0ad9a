"""Uniform-state diffusion: exact simulation of its reverse chain, and moves that keep its law.

For its samplers of so many steps see `jumps`; for its formulas, `noises.uniform`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..models import base as models
from . import base, jumps, masked, noises


class EventState(NamedTuple):
  """Between two events of the chain."""

  step: jax.Array  # [B] int32
  tokens: jax.Array  # [B, L] int32
  calls: jax.Array  # [B] int32
  free: jax.Array  # [B, L] bool
  level: jax.Array  # [B], log(alpha / (1 - alpha)); inf when done


class EventInfo(NamedTuple):
  """A candidate, or, last, the step to time 0."""

  time: jax.Array  # [B]
  changed: jax.Array  # [B] bool, whether any token did


def gillespie(
  predict: models.Predictor, noise: noises.Noise, *, first: float = 1e-3, last: float = 1 - 1e-3
) -> base.SamplingAlgorithm:
  """The reverse chain of uniform-state diffusion, event by event, without a grid of times.

  Backward, a position's jumps have the rates (-alpha' / (alpha (1 - alpha))) c(y), where c are
  `noises.chances` and add up to 1 at most. In l = log(alpha / (1 - alpha)) they are c(y) alone. So
  candidates come at rate 1 for every free position, and each moves its position to y with
  probability c(y), by the predictor at that very time: no bound has to be guessed and nothing is
  discretised (uniformization, or thinning). A step is one candidate. Run until `is_done`; of n free
  positions that takes Poisson(n (l(last) - l(first))) + 1 steps.

  From alpha = 0 to alpha = 1 there would be infinitely many. One step of `posterior_law` leads to
  alpha = first and one from alpha = last to 0. The first is off by n (n - 1) / 2 first^2 in total
  variation at most (it is right if at most one token is kept), the last by n (1 - last) (it is
  right if none has to change). For masking the same is first hitting, which ends by itself.

  Args:
    predict: (tokens [B, L], t [B]) -> logits [B, L, V] of x_0.
    noise: a `noises.uniform`.
    first: alpha where events begin.
    last: alpha where they end.

  Raises:
    ValueError: not 0 < first < last < 1 in float32, or the noise masks.

  Reference: Chen and Ying 2024, arXiv 2402.08095, algorithm 1; Lewis and Shedler 1979.
  """
  if not 0 < np.float32(first) < np.float32(last) < 1:
    raise ValueError(f"first={first}, last={last}: above 0, below 1, and the first the lower.")
  _require_uniform(noise)
  begin, end = (jnp.log(alpha) - jnp.log1p(-alpha) for alpha in jnp.float32([first, last]))
  time_of, posterior = noise.schedule.time, jumps.posterior_law(noise)

  def init(keys, tokens):
    prior_keys, token_keys = base.split(keys)
    begun = jumps.start(prior_keys, noise, tokens)
    ones = jnp.ones(tokens.shape[:1])
    p = _probs(predict, begun.tokens, ones)
    law = posterior(p, begun.tokens, ones, time_of(jnp.float32(first)) * ones, ones)
    drawn = masked.draw_each(token_keys, jnp.log(law))
    tokens = jnp.where(begun.free, drawn, begun.tokens)
    return EventState(begun.step, tokens, begun.calls + 1, begun.free, begin * ones)

  def step(keys, state):
    wait_keys, where_keys, token_keys = base.split(keys, 3)
    wait = jax.vmap(jax.random.exponential)(wait_keys)
    num_free = jnp.sum(state.free, axis=1)
    level = jnp.where(num_free > 0, state.level + wait / jnp.maximum(num_free, 1), jnp.inf)
    done, ends = state.level == jnp.inf, level >= end
    alpha = jnp.where(ends, last, jax.nn.sigmoid(level))
    t = time_of(alpha)
    p = _probs(predict, state.tokens, t)
    jump = jumps.or_stay(noises.chances(p, state.tokens, alpha[:, None, None]), state.tokens)
    leap = posterior(p, state.tokens, t, jnp.zeros_like(t), jnp.ones_like(t))
    drawn = masked.draw_each(token_keys, jnp.log(jnp.where(ends[:, None, None], leap, jump)))
    moves = state.free & (one_of(where_keys, state.free) | ends[:, None]) & ~done[:, None]
    tokens = jnp.where(moves, drawn, state.tokens)
    level = jnp.where(ends, jnp.inf, level)
    new = EventState(state.step + ~done, tokens, state.calls + ~done, state.free, level)
    return new, EventInfo(t, jnp.any(tokens != state.tokens, axis=1))

  return base.SamplingAlgorithm(init, step)


def is_done(state: EventState) -> jax.Array:
  """[B] bool, for `run_until`."""
  return state.level == jnp.inf


def gibbs(predict: models.Predictor, noise: noises.Noise) -> jumps.Corrector:
  """One free position, drawn uniformly, is drawn anew from p_t(x_i | the others).

  This leaves the law of x_t exactly as it is. p_t(y | the others) ~ p_t(x with y at i), so it is
  the ratios, with 1 for x_i itself. Equally: p(x_0 at i | the others) is the predictor with
  log(1 + V alpha / (1 - alpha)) off the logit of x_i, and is noised to t.

  The choice must not look at the tokens. Picking positions of least margin, or several at once,
  does not leave the law as it is, though every one of the draws is a conditional.

  Reference: Campbell et al. 2022, arXiv 2205.14987, section 4.4, for correctors; Zhao et al. 2024
    (Informed correctors), arXiv 2407.21243, for Gibbs sampling among them.
  """
  _require_uniform(noise)

  def correct(keys, state, t):
    where_keys, token_keys = base.split(keys)
    law = gibbs_law(noise, _probs(predict, state.tokens, t), state.tokens, t)
    drawn = masked.draw_each(token_keys, jnp.log(law))
    tokens = jnp.where(one_of(where_keys, state.free), drawn, state.tokens)
    return state._replace(tokens=tokens, calls=state.calls + 1)

  return correct


def gibbs_law(noise: noises.Noise, p: jax.Array, tokens: jax.Array, t: jax.Array) -> jax.Array:
  """p_t(x_i = y | the others), [B, L, V], from p(x_0 at i | x_t) [B, L, V] at times t [B]."""
  alpha = models.per_row(jnp.minimum(noise.schedule.alpha(t), 1 - noises.LEAST_NOISE), p)
  b = (1 - alpha) / noise.vocab_size
  weights = noises.chances(p, tokens, alpha) + b * noises.own(tokens, noise.vocab_size)
  return weights / jnp.sum(weights, axis=-1, keepdims=True)


def forward_backward(
  predict: models.Predictor, noise: noises.Noise, law: jumps.Law, ahead: float
) -> jumps.Corrector:
  """Noise from t forward to t + ahead (at most 1), then back by the sampler's own step.

  Noising and the true way back leave the law of x_t as it is. The sampler's step moves positions
  apart from one another, so that this does so for `posterior_law` up to O(ahead^2), and for the
  others up to what they are off by in one such step. Works for both kinds of noise.

  Args:
    predict: (tokens [B, L], t [B]) -> logits [B, L, V] of x_0.
    noise: the kind of noise.
    law: the way back.
    ahead: above 0.

  Raises:
    ValueError: ahead is not above 0.

  Reference: Campbell et al. 2022, arXiv 2205.14987, section 4.4; Wang et al. 2025 (ReMDM), arXiv
    2503.00307, section 4.3, for masks.
  """
  if not ahead > 0:
    raise ValueError(f"ahead={ahead}: it has to be above 0, a time that noise goes forward.")

  def correct(keys, state, t):
    forward_keys, token_keys = base.split(keys)
    later = jnp.minimum(t + ahead, 1)
    noised = jnp.where(
      state.free, noise.forward(forward_keys, state.tokens, t, later), state.tokens
    )
    made = law(_probs(predict, noised, later), noised, later, t, jnp.ones_like(t))
    drawn = masked.draw_each(token_keys, jnp.log(made))
    tokens = jnp.where(state.free, drawn, noised)
    return state._replace(tokens=tokens, calls=state.calls + 1)

  return correct


def one_of(keys: base.Keys, free: jax.Array) -> jax.Array:
  """True at one of each row's free positions, drawn uniformly, [B, L]; nowhere if none is."""
  order = jax.vmap(lambda key: jax.random.permutation(key, free.shape[1]))(keys)
  first = jnp.argmin(jnp.where(free, order, free.shape[1]), axis=1)
  return free & (jnp.arange(free.shape[1])[None] == first[:, None])


def _probs(predict, tokens, t):
  return jax.nn.softmax(predict(tokens, t).astype(jnp.float32), axis=-1)


def _require_uniform(noise):
  if noise.num_states != noise.vocab_size:
    raise ValueError("The noise masks: noises.uniform would be right; see also first hitting.")
