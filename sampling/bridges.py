"""Paths of a bridge's stochastic equation.

drift = bridges.drift(bridge, eps)                      # models.bridges
algorithm = euler_maruyama(drift, np.linspace(0, 1, 101), eps)
state = base.start(keys, algorithm, x0)
state, paths = base.run(keys, algorithm, state, 100, lambda state, info: state.x)
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import base


class State(NamedTuple):
  """At times[step]."""

  step: jax.Array  # [B] int32
  x: jax.Array  # [B, D]


class Info(NamedTuple):
  """Where a step began and the drift there."""

  time: jax.Array  # [B]
  drift: jax.Array  # [B, D]


def euler_maruyama(
  drift: Callable[[jax.Array, jax.Array], jax.Array], times: np.ndarray, eps: float | jax.Array
) -> base.SamplingAlgorithm:
  """dx = g(x, t) dt + sqrt(eps) dW, from x [B, D] at times[0].

    x <- x + h g(x, t_i) + sqrt(eps h) z,    h = t_(i+1) - t_i,    z ~ N(0, I)

  Of weak order 1: laws are off by O(h). The drift is never evaluated at the last time. A row that
  has gone through all times stays as it is.

  Args:
    drift: (x [B, D], t [B]) -> g [B, D].
    times: [n + 1], rising.
    eps: variance of the noise by unit of time.

  Raises:
    ValueError: the times do not rise.
  """
  times = np.asarray(times, np.float64)
  if times.ndim != 1 or len(times) < 2 or not np.all(np.diff(times) > 0):
    raise ValueError("times has to be [n + 1] rising numbers, for n >= 1 steps.")
  n = len(times) - 1

  def init(keys, x):
    del keys
    return State(jnp.zeros(x.shape[:1], jnp.int32), x)

  def step(keys, state):
    i, x = jnp.minimum(state.step, n - 1), state.x
    t, h = jnp.asarray(times[:-1], x.dtype)[i], jnp.asarray(np.diff(times), x.dtype)[i][:, None]
    z = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(keys)
    g = drift(x, t)
    moved = State(state.step + 1, x + h * g + jnp.sqrt(eps * h) * z)
    return base.select_rows(state.step < n, moved, state), Info(t, g)

  return base.SamplingAlgorithm(init, step)
