"""Uniform-state diffusion's bounds of the likelihood, in discrete and in continuous time.

Each token is kept to time t with probability alpha(t), else it is any of the V tokens:
q(x_t = y | x_0) = alpha 1[y = x_0] + b with b = (1 - alpha) / V. Backward, positions move apart
from one another given a network's law of x_0. That law is either of two things (`Head`):

    posterior       p(x_0 at i | x_t), what samplers take
    leave_one_out   p(x_0 at i | the other positions of x_t), in which x_t at i is not used yet

Each follows from the other by Bayes, as p(x_0 | x_t) ~ p(x_0 | others) q(x_t at i | x_0). In terms
of the second, pi, ratios and the reverse law are those of one position with the prior pi:

    p_t(y) / p_t(x) = (alpha pi_y + b) / (alpha pi_x + b)
    p(x_s = y | x_t = x) ~ q(x_t = x | x_s = y) (alpha_s pi_y + b_s).

That is D3PM's eq. 4, and UDLM's: their networks, which they call p(x_0 | x_t), are `leave_one_out`.
So is the default here: a posterior has to become certain of x_t as t goes to 0, as fast as 1 -
alpha does; of one that does not, jumps have no bounded rate and the continuous bound is infinite.

Reference: Austin et al. 2021 (D3PM), arXiv 2107.03006; Lou et al. 2023 (SEDD), arXiv 2310.16834;
  Schiff et al. 2024 (UDLM), arXiv 2412.10193; Uniform Diffusion Models Revisited 2026, arXiv
  2605.22765 (the two laws).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..models import base as models
from ..models import mask_schedules
from . import masked, step, weightings

# (params, tokens [B, L], t [B], key) -> logits [B, L, V]; a key turns dropout on
Model = Callable[[models.Params, jax.Array, jax.Array, jax.Array | None], jax.Array]
# (logits [B, L, V], x_t [B, L], alpha [B]) -> logits [B, L, V] of p(x_0 at i | the others)
Head = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

_LEAST = 2.0**-24  # alpha and 1 - alpha are held above it where they divide


def leave_one_out(logits: jax.Array, tokens: jax.Array, alpha: jax.Array) -> jax.Array:
  """The logits themselves."""
  del tokens, alpha
  return logits


def posterior(logits: jax.Array, tokens: jax.Array, alpha: jax.Array) -> jax.Array:
  """Logits of p(x_0 | x_t) without what x_t at a position itself says of x_0 there."""
  return logits - _evidence(logits, tokens, alpha)


def with_own(logits: jax.Array, tokens: jax.Array, alpha: jax.Array) -> jax.Array:
  """Logits of p(x_0 | x_t) of those of p(x_0 | the others): what a sampler takes."""
  return logits + _evidence(logits, tokens, alpha)


def _evidence(logits, tokens, alpha):
  """log q(x_t | x_0) as a function of x_0, up to a constant: log(1 + alpha / b) at x_0 = x_t."""
  own = jax.nn.one_hot(tokens, logits.shape[-1])
  return jnp.log1p(_odds(alpha, logits)) * own


def _odds(alpha, logits):
  """alpha / b, [B, 1, 1]."""
  alpha = models.per_row(jnp.clip(alpha, _LEAST, 1 - _LEAST), logits)
  return logits.shape[-1] * alpha / (1 - alpha)


def log_scores(log_prior: jax.Array, tokens: jax.Array, alpha: jax.Array) -> jax.Array:
  """log of (alpha pi_y + b) / (alpha pi_x + b) for every y, [B, L, V]; 0 at y = x.

  Args:
    log_prior: log pi [B, L, V]; of a known x_0, 0 there and -inf elsewhere.
    tokens: x, [B, L].
    alpha: [B].
  """
  log_mass = jnp.log1p(_odds(alpha, log_prior) * jnp.exp(log_prior))
  return log_mass - jnp.take_along_axis(log_mass, tokens[..., None], axis=-1)


def score_entropy(log_score: jax.Array, log_ratio: jax.Array) -> jax.Array:
  """sum_y s_y - r_y log s_y + r_y (log r_y - 1), [...], least (0) at s = r.

  As r (exp(d) - 1 - d), d = log s - log r, which does not cancel where ratios are near 1. Terms
  with s = r, that of y = x among them, are 0.

  Args:
    log_score: log s [..., V].
    log_ratio: log r [..., V], finite.

  Reference: Lou et al. 2023 (SEDD), arXiv 2310.16834, definition 3.1.
  """
  off = log_score - log_ratio
  return jnp.sum(jnp.exp(log_ratio) * (jnp.expm1(off) - off), axis=-1)


def log_reverse(
  log_prior: jax.Array, tokens: jax.Array, alpha_t: jax.Array, alpha_s: jax.Array
) -> jax.Array:
  """log p(x_s = y | x_t) for every y, [B, L, V], of s < t; see `log_scores`."""
  vocab_size = log_prior.shape[-1]
  here, there = (models.per_row(alpha, log_prior) for alpha in (alpha_t, alpha_s))
  kept = jnp.where(there > 0, here / jnp.where(there > 0, there, 1), 0)
  own = jax.nn.one_hot(tokens, vocab_size, dtype=bool)
  forward = jnp.log((1 - kept) / vocab_size + jnp.where(own, kept, 0))
  mass = jnp.logaddexp(jnp.log(there) + log_prior, jnp.log((1 - there) / vocab_size))
  return jax.nn.log_softmax(forward + mass, axis=-1)


class Objective(NamedTuple):
  """A bound, as a mean over times.

  Attributes:
    times: quantiles [B] -> (t [B], s [B]).
    loss: (log pi [B, L, V], x_0 [B, L], x_t [B, L], t, s) -> [B, L], each position's share.
  """

  times: Callable[[jax.Array], tuple[jax.Array, jax.Array]]
  loss: Callable[..., jax.Array]


def continuous(schedule: mask_schedules.MaskSchedule) -> Objective:
  """int beta(t) / V E[score_entropy] dt, at the rate beta = -alpha' / alpha tokens are redrawn.

  It is the KL of the two processes' paths. With the ratios of `leave_one_out` it is UDLM's
  objective term by term.

  Reference: Lou et al. 2023 (SEDD), arXiv 2310.16834, section 3; Schiff et al. 2024 (UDLM), arXiv
    2412.10193, section 4.
  """

  def loss(log_prior, clean, noisy, t, s):
    del s
    alpha = schedule.alpha(t)
    entropy = score_entropy(
      log_scores(log_prior, noisy, alpha),
      log_scores(_certain(clean, log_prior), noisy, alpha),
    )
    beta = jnp.maximum(schedule.rate(t), 0) * (1 - alpha) / jnp.maximum(alpha, _LEAST)
    return beta[:, None] / log_prior.shape[-1] * entropy

  return Objective(lambda quantiles: (quantiles, quantiles), loss)


def discrete(schedule: mask_schedules.MaskSchedule, times: jax.Array) -> Objective:
  """sum over T steps of E KL(q(x_s | x_t, x_0) || p(x_s | x_t)); the last is -log p(x_0 | x_t).

  Args:
    schedule: alpha.
    times: [T + 1], falling, the first 1 and the last 0.

  Reference: Austin et al. 2021 (D3PM), arXiv 2107.03006, eq. 1, 3 and 4.
  """
  times = jnp.asarray(times, jnp.float32)
  num_steps = times.shape[0] - 1

  def at(quantiles):
    index = jnp.minimum(jnp.floor(quantiles * num_steps).astype(jnp.int32), num_steps - 1)
    return times[index], times[index + 1]

  def loss(log_prior, clean, noisy, t, s):
    alphas = schedule.alpha(t), schedule.alpha(s)
    log_q = log_reverse(_certain(clean, log_prior), noisy, *alphas)
    log_p = log_reverse(log_prior, noisy, *alphas)
    some = log_q > -jnp.inf
    gap = jnp.where(some, log_q, 0) - jnp.where(some, log_p, 0)
    return num_steps * jnp.sum(jnp.exp(log_q) * gap, axis=-1)

  return Objective(at, loss)


def _certain(clean, log_prior):
  """log of the law that has x_0 only."""
  return jnp.where(jax.nn.one_hot(clean, log_prior.shape[-1], dtype=bool), 0.0, -jnp.inf)


def uniform_diffusion(
  model: Model,
  schedule: mask_schedules.MaskSchedule,
  objective: Objective,
  *,
  vocab_size: int,
  head: Head = leave_one_out,
  quantiles: weightings.Quantiles = weightings.low_discrepancy,
) -> step.LossFn:
  """The bound, in nats; a row's weight is its number of learned tokens.

  The batch has `tokens` [B, L] and `mask` [B, L], not 0 where a token is noised and learned, and no
  segments.

  Args:
    model: its logits are of V tokens.
    schedule: alpha.
    objective: `continuous` or `discrete`.
    vocab_size: V.
    head: what the model puts out.
    quantiles: how times are drawn.

  Raises (when called):
    ValueError: the batch has segments.

  Metrics: `accuracy`, of greedy tokens of p(x_0 | x_t) at random times.
  """

  def loss(key, params, batch):
    if "segments" in batch:
      raise ValueError("The model reads whole rows, without documents: pad rows, or cut them full.")
    noise_key, model_key = masked.keys_of(key, batch["tokens"])
    time_key, noise_key, token_key = jax.random.split(noise_key, 3)
    clean, learned = batch["tokens"], batch["mask"] != 0
    t, s = objective.times(quantiles(time_key, clean.shape[0]))
    alpha = schedule.alpha(t)
    redrawn = jax.random.bernoulli(noise_key, (1 - alpha)[:, None], clean.shape, mode="high")
    any_token = jax.random.randint(token_key, clean.shape, 0, vocab_size, clean.dtype)
    noisy = jnp.where(redrawn & learned, any_token, clean)
    others = head(model(params, noisy, t, model_key).astype(jnp.float32), noisy, alpha)
    losses = objective.loss(jax.nn.log_softmax(others, axis=-1), clean, noisy, t, s)
    right = jnp.argmax(with_own(others, noisy, alpha), axis=-1) == clean
    weight = jnp.sum(learned, axis=1).astype(jnp.float32)
    row = lambda values: jnp.sum(jnp.where(learned, values, 0), axis=1)
    return (row(losses), weight), {"accuracy": row(right)}

  return loss
