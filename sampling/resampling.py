"""Resampling of weighted particles: ancestors of N, on average as many of each as its weight says.

Every rule is unbiased, E[copies of n] = N w_n; they differ in how much the copies vary. Weights are
logarithms [B, N] up to a constant for each row, -inf for a particle that must not be copied. A row
without a particle that may be is the caller's to leave out.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from . import base

# (keys [B], log weights [B, N]) -> ancestors [B, N] int32, which particle each is a copy of
Resample = Callable[[base.Keys, jax.Array], jax.Array]


def effective_size(log_weights: jax.Array) -> jax.Array:
  """(sum_n w_n)^2 / sum_n w_n^2 of each row, in [1, N]; 0 where every weight is 0. [B].

  Reference: Kong et al. 1994, Sequential imputations and Bayesian missing data problems.
  """
  alive = jnp.any(log_weights > -jnp.inf, axis=1)
  some = jnp.where(alive[:, None], log_weights, 0)
  size = 2 * jax.nn.logsumexp(some, axis=1) - jax.nn.logsumexp(2 * some, axis=1)
  return jnp.where(alive, jnp.exp(size), 0)


def multinomial(keys: base.Keys, log_weights: jax.Array) -> jax.Array:
  """N independent draws."""
  num = log_weights.shape[1]
  draw = lambda key, row: jax.random.categorical(key, row, shape=(num,), mode="high")
  return jax.vmap(draw)(keys, log_weights).astype(jnp.int32)


def residual(keys: base.Keys, log_weights: jax.Array) -> jax.Array:
  """floor(N w_n) copies of each, and independent draws, by what is left of N w, for the others.

  Reference: Liu and Chen 1998, Sequential Monte Carlo methods for dynamic systems.
  """
  num = log_weights.shape[1]
  share = num * jax.nn.softmax(log_weights, axis=1)
  copies = jnp.floor(share).astype(jnp.int32)
  drawn = multinomial(keys, jnp.log(share - copies))
  repeat = lambda copies: jnp.repeat(jnp.arange(num), copies, total_repeat_length=num)
  sure = jnp.arange(num)[None, :] < jnp.sum(copies, axis=1, keepdims=True)
  return jnp.where(sure, jax.vmap(repeat)(copies), drawn).astype(jnp.int32)


def systematic(keys: base.Keys, log_weights: jax.Array) -> jax.Array:
  """The particles at (u + n) / N of the cumulated weights, one u ~ U(0, 1) for all n.

  Of each there are floor(N w_n) or one more.

  Reference: Kitagawa 1996, Monte Carlo filter and smoother for non-Gaussian nonlinear state space
    models; Carpenter et al. 1999, Improved particle filter for nonlinear problems.
  """
  num = log_weights.shape[1]

  def of_row(key, row):
    weights = jax.nn.softmax(row)
    ends = jnp.cumsum(weights)
    at = (jax.random.uniform(key) + jnp.arange(num)) / num * ends[-1]
    found = jnp.searchsorted(ends, at, side="right")
    # Rounding can put the last point beyond the end, where the next particle may weigh nothing.
    last = num - 1 - jnp.argmax(weights[::-1] > 0)
    return jnp.minimum(found, last).astype(jnp.int32)

  return jax.vmap(of_row)(keys, log_weights)
