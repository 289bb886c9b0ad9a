"""What training carries from step to step, and averages of the parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Params = Any


class TrainState(NamedTuple):
  """All that a checkpoint must hold besides the data's place."""

  step: jax.Array  # [] int32, steps made
  params: Params
  optimizer: optax.OptState
  average: Params  # () where nothing is averaged


class Averaging(NamedTuple):
  """A running average of the parameters.

  Attributes:
    init: (params) -> average.
    update: (average, params, step []) -> average; `step` counts from 0.
  """

  init: Callable[[Params], Any]
  update: Callable[[Any, Params, jax.Array], Any]


def no_average() -> Averaging:
  """Keeps nothing."""
  return Averaging(init=lambda params: (), update=lambda average, params, step: average)


def exponential_average(decay: float) -> Averaging:
  """average <- d average + (1 - d) params, with d = min(decay, (1 + t) / (10 + t)) at step t.

  The smaller d at first forgets the initialisation.

  Args:
    decay: in [0, 1).
  """

  def update(average, params, step):
    d = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(
      lambda old, new: old + (1 - d).astype(old.dtype) * (new - old), average, params
    )

  return Averaging(init=lambda params: jax.tree.map(jnp.copy, params), update=update)


def init(
  key: jax.Array,
  init_params: Callable[[jax.Array], Params],
  optimizer: optax.GradientTransformation,
  averaging: Averaging,
) -> TrainState:
  """The state before the first step."""
  params = init_params(key)
  return TrainState(jnp.int32(0), params, optimizer.init(params), averaging.init(params))
