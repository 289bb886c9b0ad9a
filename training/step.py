"""One step of training, for any loss."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from . import state as state_lib

Batch = Any  # a tree of arrays [B, ...]
Metrics = dict[str, jax.Array]

# (key, params, batch) -> ((loss [B], weight [B]), metrics {name: [B]}). Nothing is reduced over
# examples: the step divides summed loss and metrics by summed weight.
LossFn = Callable[[jax.Array, Any, Batch], tuple[tuple[jax.Array, jax.Array], Metrics]]


def train_step(
  key: jax.Array,
  state: state_lib.TrainState,
  batch: Batch,
  *,
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  averaging: state_lib.Averaging,
  num_microbatches: int = 1,
) -> tuple[state_lib.TrainState, Metrics]:
  """A gradient step on sum(loss) / sum(weight) over the whole batch.

  The division comes after the sums over microbatches and devices, so the number of either does not
  change the gradient, however unevenly the weight is spread. Each microbatch takes every
  `num_microbatches`-th example, which leaves examples on the devices that hold them.

  Args:
    key: of the run; the step's own is fold_in(key, state.step).
    state: before the step.
    batch: leaves [B, ...], B a multiple of `num_microbatches`.
    loss_fn: the loss.
    optimizer: of the parameters.
    averaging: of the parameters after the step.
    num_microbatches: gradients are summed over so many slices of the batch, one at a time.

  Raises:
    ValueError: the batch does not divide into the microbatches.

  Returns:
    The state after the step, and `loss`, `gradient_norm`, `weight` and the loss's own metrics, [].
  """

  batch_size = jax.tree.leaves(batch)[0].shape[0]
  if batch_size % num_microbatches:
    raise ValueError(f"A batch of {batch_size} does not divide into {num_microbatches=}.")

  def summed(params, key, batch):
    (loss, weight), metrics = loss_fn(key, params, batch)
    return jnp.sum(loss), {"weight": jnp.sum(weight), **jax.tree.map(jnp.sum, metrics)}

  gradient = jax.value_and_grad(summed, has_aux=True)
  keys = jax.random.split(jax.random.fold_in(key, state.step), num_microbatches)
  if num_microbatches == 1:  # no loop: on CPU gradients of convolutions are 20 times slower in one
    (loss, metrics), gradients = gradient(state.params, keys[0], batch)
  else:
    (loss, metrics), gradients = _accumulated(gradient, state.params, keys, batch)

  weight = metrics.pop("weight")
  mean = lambda x: x / jnp.maximum(weight, jnp.finfo(jnp.float32).tiny)
  gradients = jax.tree.map(mean, gradients)
  updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
  params = optax.apply_updates(state.params, updates)
  average = averaging.update(state.average, params, state.step)
  metrics = {
    "loss": mean(loss),
    "gradient_norm": optax.tree.norm(gradients),
    "weight": weight,
    **jax.tree.map(mean, metrics),
  }
  return state_lib.TrainState(state.step + 1, params, optimizer_state, average), metrics


def _accumulated(gradient, params, keys, batch):
  """The sum over microbatches, of every len(keys)-th example each, one at a time."""
  num = len(keys)
  cut = lambda x: jnp.swapaxes(x.reshape(-1, num, *x.shape[1:]), 0, 1)
  slices = (keys, jax.tree.map(cut, batch))
  first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), slices)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, params, *first)
  )
  add = lambda total, slice_: (jax.tree.map(jnp.add, total, gradient(params, *slice_)), None)
  return jax.lax.scan(add, zeros, slices)[0]
