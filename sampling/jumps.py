"""Samplers of discrete diffusion that move every position apart from the others, a step at a time.

    noise = noises.uniform(mask_schedules.linear(), vocab_size)
    sampler = jumps.euler(predict, noise, jnp.linspace(1, 0, 65))
    state = base.start(keys, sampler, jnp.full((batch, length), vocab_size))
    tokens = base.run(keys, sampler, state, 64)[0].tokens

From t to s, position i goes to y with a probability that follows from the predictor at (x_t, t):
that of the reverse chain if it could be frozen there (`euler`, `tau_leaping`), or the exact one of
this position alone (`ancestral`). All become exact as steps shrink: what one step costs is that the
positions do not see one another move. `Law` is such a rule, for both kinds of `noises`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..models import base as models
from . import base, masked, noises

# (p [B, L, V], tokens [B, L], t [B], s [B], scale [B]) -> law of x_s at each position, [B, L, M]
Law = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


class Steps(NamedTuple):
  """A table of K steps: where they are, and by how much each scales the scores."""

  times: jax.Array  # [K + 1], falling, from 1
  coefficients: jax.Array  # [K]


class State(NamedTuple):
  """Before step number `step`."""

  step: jax.Array  # [B] int32
  tokens: jax.Array  # [B, L] int32
  calls: jax.Array  # [B] int32, evaluations of the predictor that the row needed
  free: jax.Array  # [B, L] bool; what is given stays


class Info(NamedTuple):
  """What the predictor was asked, and the ratios that followed."""

  time: jax.Array  # [B]
  scores: jax.Array  # [B, L, M], see `noises.Noise`


# (keys [B], state, t [B]) -> state: moves that leave the law of x_t as it is
Corrector = Callable[[base.Keys, State, jax.Array], State]


def euler_law(noise: noises.Noise) -> Law:
  """To y with probability scale rate(y) (t - s), else nowhere: the rates of time t, one jump.

  Where these probabilities add up to more than 1 they are divided by their sum, so that the
  position surely jumps; SEDD's code does the same.
  """

  def law(p, tokens, t, s, scale):
    moves = models.per_row(scale * (t - s), p) * noise.rates(p, tokens, t)
    return _at_most_one(moves, tokens)

  return law


def tau_leaping_law(noise: noises.Noise) -> Law:
  """Poisson numbers of jumps to every y, of mean scale rate(y) (t - s); several are refused.

  A sum of jumps means nothing for categories, so as in tauLDR's code a position to which more than
  one jump comes stays. With l the sum of the means l(y), it goes to y with probability
  l(y) exp(-l), which is drawn from directly; no Poisson number has to be.

  Reference: Campbell et al. 2022, arXiv 2205.14987, section 4.3; Gillespie 2001.
  """

  def law(p, tokens, t, s, scale):
    means = models.per_row(scale * (t - s), p) * noise.rates(p, tokens, t)
    total = jnp.sum(means, axis=-1, keepdims=True)
    return or_stay(means * jnp.exp(-total), tokens)

  return law


def posterior_law(noise: noises.Noise) -> Law:
  """The position's own p(x_s | x_t), exact where the predictor is; moves are scaled by `scale`.

  SEDD's analytic (Tweedie) step is the same number: it takes ratios of time t to ratios of time s
  by the inverse of the forward step, and so computes sum_v p(v) q(x_s | x_t, v).

  Reference: Austin et al. 2021 (D3PM), arXiv 2107.03006, eq. 3 and 4; Lou et al. 2023 (SEDD), arXiv
    2310.16834, theorem 4.2.
  """

  def law(p, tokens, t, s, scale):
    moves = noise.posterior(p, tokens, t, s) * (1 - noises.own(tokens, noise.num_states))
    return _at_most_one(models.per_row(scale, p) * moves, tokens)

  return law


def euler(
  predict: models.Predictor,
  noise: noises.Noise,
  times: jax.Array,
  *,
  coefficients: jax.Array | None = None,
) -> base.SamplingAlgorithm:
  """`factorised` by the `euler_law`."""
  return factorised(predict, noise, euler_law(noise), times, coefficients=coefficients)


def tau_leaping(
  predict: models.Predictor,
  noise: noises.Noise,
  times: jax.Array,
  *,
  coefficients: jax.Array | None = None,
) -> base.SamplingAlgorithm:
  """`factorised` by the `tau_leaping_law`."""
  return factorised(predict, noise, tau_leaping_law(noise), times, coefficients=coefficients)


def ancestral(
  predict: models.Predictor, noise: noises.Noise, times: jax.Array
) -> base.SamplingAlgorithm:
  """`factorised` by the `posterior_law`."""
  return factorised(predict, noise, posterior_law(noise), times)


def factorised(
  predict: models.Predictor,
  noise: noises.Noise,
  law: Law,
  times: jax.Array,
  *,
  coefficients: jax.Array | None = None,
) -> base.SamplingAlgorithm:
  """One evaluation of the predictor a step, after which every position moves by `law`.

  Inputs are tokens [B, L] with V where they are to be filled in; the others stay. In uniform-state
  diffusion the predictor has to know which: one of data that was noised everywhere takes what is
  given for noisy, and then the samples are not those of the conditional law. The last step leaves
  no mask: a position that did not move by itself takes a token from p.

  Args:
    predict: (tokens [B, L], t [B]) -> logits [B, L, V] of x_0.
    noise: what the predictor was trained on.
    law: how a position moves.
    times: [K + 1], falling, from 1 to 0 or near it; may be traced.
    coefficients: [K], what each step scales the scores by; 1 if None.

  Raises:
    ValueError: times rise.
  """
  times = masked.falling(times)
  num_steps = times.shape[0] - 1
  scales = jnp.ones(num_steps) if coefficients is None else jnp.asarray(coefficients, jnp.float32)

  def step(keys, state):
    at = jnp.minimum(state.step, num_steps - 1)
    t, unfinished = times[at], state.step < num_steps
    p = jax.nn.softmax(predict(state.tokens, t).astype(jnp.float32), axis=-1)
    made = moved(noise, law, p, state.tokens, (t, times[at + 1], scales[at]), at == num_steps - 1)
    drawn = masked.draw_each(keys, jnp.log(made))
    scores = noise.scores(p, state.tokens, t)
    needed = jnp.any(state.free & (jnp.sum(scores, axis=-1) > 0), axis=1) & unfinished
    tokens = jnp.where(state.free & unfinished[:, None], drawn, state.tokens)
    state = State(jnp.minimum(state.step + 1, num_steps), tokens, state.calls + needed, state.free)
    return state, Info(t, scores)

  return base.SamplingAlgorithm(lambda keys, tokens: start(keys, noise, tokens), step)


def start(keys: base.Keys, noise: noises.Noise, tokens: jax.Array) -> State:
  """Noise in place of every V of tokens [B, L]; what else there is, is given."""
  tokens = jnp.asarray(tokens, jnp.int32)
  none = jnp.zeros(tokens.shape[:1], jnp.int32)
  return State(none, noise.prior(keys, tokens), none, tokens == noise.vocab_size)


def moved(
  noise: noises.Noise,
  law: Law,
  p: jax.Array,
  tokens: jax.Array,
  step: tuple[jax.Array, jax.Array, jax.Array],
  is_last: jax.Array,
) -> jax.Array:
  """The law of every position after one step, [B, L, M].

  Args:
    noise: the kind of noise.
    law: the rule.
    p: the predictor's probabilities [B, L, V].
    tokens: [B, L].
    step: from, to and scale, each [B].
    is_last: [B] bool.
  """
  made = law(p, tokens, *step)
  return jnp.where(is_last[:, None, None], noise.clean(made, p), made)


def corrected(
  algorithm: base.SamplingAlgorithm, corrector: Corrector, times: jax.Array
) -> base.SamplingAlgorithm:
  """The corrector after every step, at the time that the step came to; not after the last.

  Args:
    algorithm: a sampler with this file's `State`, over `times`.
    corrector: such as `uniform_state.gibbs`.
    times: [K + 1].
  """
  times = jnp.asarray(times, jnp.float32)

  def step(keys, state):
    step_keys, corrector_keys = base.split(keys)
    new, info = algorithm.step(step_keys, state)
    between = (new.step > state.step) & (new.step < times.shape[0] - 1)
    better = corrector(corrector_keys, new, times[jnp.minimum(new.step, times.shape[0] - 2)])
    return base.select_rows(between, better, new), info

  return base.SamplingAlgorithm(algorithm.init, step)


def _at_most_one(moves, tokens):
  return or_stay(moves / jnp.maximum(jnp.sum(moves, axis=-1, keepdims=True), 1), tokens)


def or_stay(moves: jax.Array, tokens: jax.Array) -> jax.Array:
  """Moves [B, L, M] with the rest of the probability at each position's own state."""
  stay = jnp.maximum(1 - jnp.sum(moves, axis=-1, keepdims=True), 0)
  return moves + stay * noises.own(tokens, moves.shape[-1])
