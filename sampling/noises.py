"""What discrete diffusion adds to tokens and takes away again: masks, or tokens at random.

Forward, each token is, apart from the others, kept to time t with probability alpha(t) of a
`MaskSchedule`, else it is noise. Backward, a Markov chain in continuous time changes one position
at a time; to y, at position i of x, at the rate

    (forward rate from y to x_i) s(x)_{i, y},    s(x)_{i, y} = p_t(x with y at i) / p_t(x)

where the ratio s, the concrete score, follows from a predictor p(x_0 at i | x). `Noise` is all that
samplers need to know of a kind of noise. Of V tokens, what is to be filled in is number V.

Reference: Campbell et al. 2022 (tauLDR), arXiv 2205.14987; Lou et al. 2023 (SEDD), 2310.16834.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..models import base as models
from ..models import mask_schedules
from . import base, masked

# Where alpha is less, what is divided by it is held at this.
LEAST_ALPHA = 1e-6
# The same of 1 - alpha: the least that float32 tells from none.
LEAST_NOISE = 2.0**-24


class Noise(NamedTuple):
  """A kind of noise. Of V tokens, M states: M = V + 1 where the mask is one, else V.

  p [B, L, V] are a predictor's probabilities of x_0 and t, s are [B]. Nothing moves to its own
  state: `scores` and `rates` are 0 there.

  Attributes:
    schedule: its alpha(t).
    vocab_size: V.
    num_states: M.
    prior: (keys [B], tokens [B, L]) -> tokens at t = 1: noise in place of every V.
    scores: (p, tokens, t) -> p_t(x with y at i) / p_t(x), [B, L, M].
    rates: (p, tokens, t) -> backward rates of jumps, [B, L, M].
    posterior: (p, tokens, t, s < t) -> p(x_s at i = y | x_t), [B, L, M].
    clean: (law [B, L, M], p) -> the law without states that no sample has.
    forward: (keys, tokens, s, t > s) -> x_t [B, L] of x_s.
  """

  schedule: mask_schedules.MaskSchedule
  vocab_size: int
  num_states: int
  prior: Callable[[base.Keys, jax.Array], jax.Array]
  scores: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
  rates: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
  posterior: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
  clean: Callable[[jax.Array, jax.Array], jax.Array]
  forward: Callable[[base.Keys, jax.Array, jax.Array, jax.Array], jax.Array]


def masking(schedule: mask_schedules.MaskSchedule, vocab_size: int) -> Noise:
  """Noise that masks: a masked token becomes v at the rate -alpha' / (1 - alpha) p(v).

  Its scores are p(v) alpha / (1 - alpha) at masked positions (Ou et al. 2024, arXiv 2406.03736),
  and 0 elsewhere, where nothing moves. At t = 1, where they would be 0, alpha is held at
  LEAST_ALPHA, so that whatever is still to move has a score above 0.
  """

  def moves(p, tokens, scale):
    hidden = tokens == vocab_size
    return _with_mask(jnp.where(hidden[:, :, None], models.per_row(scale, p) * p, 0), 0)

  def scores(p, tokens, t):
    alpha = jnp.maximum(schedule.alpha(t), LEAST_ALPHA)
    return moves(p, tokens, alpha / jnp.maximum(1 - alpha, LEAST_NOISE))

  def rates(p, tokens, t):
    return moves(p, tokens, jnp.maximum(schedule.rate(t), 0))

  def posterior(p, tokens, t, s):
    unmask = mask_schedules.unmask_prob(schedule, t, s)
    moved = moves(p, tokens, unmask)
    return moved + own(tokens, vocab_size + 1) * (1 - jnp.sum(moved, axis=-1, keepdims=True))

  def clean(law, p):
    return _with_mask(law[..., :-1] + law[..., -1:] * p, 0)

  def forward(keys, tokens, s, t):
    return jnp.where(_kept(schedule, keys, tokens, s, t), tokens, vocab_size)

  return Noise(
    schedule,
    vocab_size,
    vocab_size + 1,
    lambda keys, tokens: tokens,
    scores,
    rates,
    posterior,
    clean,
    forward,
  )


def uniform(schedule: mask_schedules.MaskSchedule, vocab_size: int) -> Noise:
  """Noise that redraws: a token that is not kept is any of the V, with equal probability.

  With b = (1 - alpha) / V and x the token at i, the ratio and the posterior are

    s(x)_{i, y} = 1 + alpha / b p(y) - alpha / (alpha + b) p(x),
    p(x_s = y | x_t) = sum_v p(v) q(x_s = y | v) q(x | x_s = y) / q(x | v).

  They are exact where p is, since the noise of the positions is independent given x_0.

  Reference: Austin et al. 2021 (D3PM), arXiv 2107.03006, appendix A.2; Lou et al. 2023.
  """
  v = vocab_size

  def scores(p, tokens, t):
    alpha = models.per_row(schedule.alpha(t), p)
    return chances(p, tokens, alpha) / jnp.maximum((1 - alpha) / v, 1e-30)

  def rates(p, tokens, t):
    alpha = models.per_row(schedule.alpha(t), p)
    rate = jnp.maximum(models.per_row(schedule.rate(t), p), 0)
    return rate / jnp.maximum(alpha, LEAST_ALPHA) * chances(p, tokens, alpha)

  def posterior(p, tokens, t, s):
    here, there = (models.per_row(schedule.alpha(time), p) for time in (t, s))
    at = own(tokens, v)
    likelihood = here * at + (1 - here) / v  # q(x | v)
    weight = p / jnp.maximum(likelihood, 1e-30)
    made = there * weight + (1 - there) / v * jnp.sum(weight, axis=-1, keepdims=True)
    kept = here / jnp.maximum(there, LEAST_ALPHA)
    law = made * (kept * at + (1 - kept) / v)
    return law / jnp.sum(law, axis=-1, keepdims=True)

  def prior(keys, tokens):
    return jnp.where(tokens == v, _any(keys, tokens, v), tokens)

  def forward(keys, tokens, s, t):
    keep_keys, token_keys = base.split(keys)
    return jnp.where(_kept(schedule, keep_keys, tokens, s, t), tokens, _any(token_keys, tokens, v))

  return Noise(schedule, v, v, prior, scores, rates, posterior, lambda law, p: law, forward)


def chances(p: jax.Array, tokens: jax.Array, alpha: jax.Array) -> jax.Array:
  """b + alpha p(y) - p(x) alpha b / (alpha + b), b = (1 - alpha) / V, and 0 for y = x; [B, L, V].

  Uniform-state diffusion has nothing else: b times the ratios, hence what a position is redrawn
  with, given the others, where it is b itself for x; and what a jump has to be thinned with if
  positions jump at the rate -(log(alpha / (1 - alpha)))', as they sum to 1 at most.

  Args:
    p: [B, L, V].
    tokens: x, [B, L].
    alpha: [B, 1, 1].
  """
  at = own(tokens, p.shape[-1])
  b = (1 - alpha) / p.shape[-1]
  held = jnp.sum(p * at, axis=-1, keepdims=True) * alpha * b / (alpha + b)
  return jnp.where(at > 0, 0, jnp.maximum(b + alpha * p - held, 0))


def own(tokens: jax.Array, num_states: int) -> jax.Array:
  """1 at each position's own state, [B, L, M]."""
  return jax.nn.one_hot(tokens, num_states)


def _with_mask(probs, mask):
  return jnp.pad(probs, ((0, 0), (0, 0), (0, 1)), constant_values=mask)


def _any(keys, tokens, vocab_size):
  shape = tokens.shape[1:]
  return jax.vmap(lambda key: jax.random.randint(key, shape, 0, vocab_size, jnp.int32))(keys)


def _kept(schedule, keys, tokens, s, t):
  prob = schedule.alpha(t) / jnp.maximum(schedule.alpha(s), LEAST_ALPHA)
  return masked.coins(keys, jnp.minimum(prob, 1), jnp.ones(tokens.shape, bool))
