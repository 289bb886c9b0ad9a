"""Weights that correct for a sampler which is not quite the policy that is trained.

The sampler may run in other kernels, other precision or with older parameters. From its own
log-probabilities, log_ratio = log pi_trainer - log pi_sampler, each [..., T], come weights that
multiply a surrogate's loss; they are constants for the gradient, and 0 at masked tokens.

Both have to be log-probabilities of the same law. The sampler draws from what top-k, top-p and
other filters leave, so a rollout carries the set that was kept, and the trainer renormalises over
that and never filters again: then the ratio is 1 on policy. Where the trainer scores the whole
softmax, the mean ratio is the mass that was kept.

`truncated` bounds a weight, which keeps every sample at some bias; `masked` drops what is beyond,
which trusts no sample that far off. Of a token, or of a whole sequence: only the product over a
sequence is unbiased, and its variance grows with length.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from . import policy


def truncated_tokens(log_ratio: jax.Array, mask: jax.Array, *, cap: float = 2.0) -> jax.Array:
  """min(r_t, cap), [..., T].

  Reference: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
    training" (truncated importance sampling).
  """
  return _weight(jnp.minimum(log_ratio, math.log(cap)), mask)


def masked_tokens(
  log_ratio: jax.Array, mask: jax.Array, *, low: float = 0.5, high: float = 5.0
) -> jax.Array:
  """r_t where low <= r_t <= high and else 0, [..., T].

  Reference: Ling team 2025 (IcePop, of Ring-1T), arXiv 2510.18855.
  """
  return _within(log_ratio, mask, low, high)


def truncated_sequence(log_ratio: jax.Array, mask: jax.Array, *, cap: float = 3.0) -> jax.Array:
  """min(prod_t r_t, cap) at every token of the row, [..., T].

  With cap = inf the correction is exact: E_sampler[weight f] = E_trainer[f].
  """
  return _weight(jnp.minimum(_of_sequence(log_ratio, mask), math.log(cap)), mask)


def masked_sequence(
  log_ratio: jax.Array, mask: jax.Array, *, low: float = 0.0, high: float = 3.0
) -> jax.Array:
  """prod_t r_t at every token of the row where it is within [low, high], and else 0, [..., T].

  The default is TRL's.
  """
  return _within(_of_sequence(log_ratio, mask), mask, low, high)


class Diagnostics(NamedTuple):
  """Of the ratios r_t of all tokens together; 0 where there is no token."""

  mean_ratio: jax.Array  # [], 1 where trainer and sampler are one law, kept sets included
  effective_sample_size: jax.Array  # [], (sum r)^2 / sum r^2, as a share of the tokens
  max_ratio: jax.Array  # []


def diagnostics(log_ratio: jax.Array, mask: jax.Array) -> Diagnostics:
  """How far apart trainer and sampler are. A batch statistic: all leading dimensions together.

  The effective sample size is (Kong 1992) how many equally weighted tokens would be as noisy.
  """
  kept = mask != 0
  count = jnp.maximum(jnp.sum(kept), 1)
  log_ratio = jnp.where(kept, log_ratio.astype(jnp.float32), -jnp.inf)
  largest = jnp.max(log_ratio)
  largest = jnp.where(largest > -jnp.inf, largest, 0)
  scaled = jnp.exp(log_ratio - largest)
  total, squares = jnp.sum(scaled), jnp.sum(jnp.square(scaled))
  bound = jnp.exp(jnp.minimum(largest, policy.MAX_LOG_RATIO))
  some = jnp.any(kept)
  return Diagnostics(
    mean_ratio=jnp.where(some, bound * total / count, 0),
    effective_sample_size=jnp.square(total) / (jnp.where(squares > 0, squares, 1) * count),
    max_ratio=jnp.where(some, bound, 0),
  )


def _of_sequence(log_ratio, mask):
  log_ratio = jnp.where(mask != 0, log_ratio.astype(jnp.float32), 0)
  return jnp.broadcast_to(jnp.sum(log_ratio, axis=-1, keepdims=True), log_ratio.shape)


def _within(log_ratio, mask, low, high):
  weight = _weight(log_ratio, mask)
  return jnp.where((weight >= low) & (weight <= high), weight, 0)


def _weight(log_ratio, mask):
  log_ratio = jnp.where(mask != 0, log_ratio.astype(jnp.float32), -jnp.inf)
  return jax.lax.stop_gradient(jnp.exp(jnp.minimum(log_ratio, policy.MAX_LOG_RATIO)))
