"""The step of experiments that learn from given examples."""

import contextlib
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

from ..models import partition
from ..training import cost, lora, sharding, step
from ..training import state as state_lib
from . import adapters, fields


def share(config: fields.Config, mesh: jax.sharding.Mesh) -> tuple[int, int]:
  """(index, count) of the part of each batch that this process reads.

  Raises:
    ValueError: the batch or its microbatches do not divide over the mesh.
  """
  check_batch(config, mesh)
  return sharding.share(mesh, config.train.batch_size)


def check_batch(config: fields.Config, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> None:
  """Raises ValueError where a microbatch's rows do not divide over the mesh."""
  c, parts = config.train, partition.row_parts(mesh)
  rows = c.batch_size // c.num_microbatches
  fields.require(
    rows % parts == 0,
    f"train.batch_size={c.batch_size} in {c.num_microbatches} microbatches does not divide over "
    f"the {parts} devices of data and fsdp",
  )


def everything(config: fields.Config, mesh: jax.sharding.Mesh) -> tuple[int, int]:
  """The same where each process reads the whole."""
  del config, mesh
  return 0, 1


def flops(
  experiment: Any, abstract: state_lib.TrainState, shares: int, batch: Any, frozen: Any = None
) -> int:
  """Of a step on all devices, from batches of which this is one of `shares` parts.

  Args:
    experiment: whose step.
    abstract: shapes of its state.
    shares: in how many parts a batch is read.
    batch: one of them.
    frozen: shapes of the parameters that adapters change.
  """
  run = lambda frozen, *args: step_of(experiment, frozen)(*args)
  return cost.flops(run, frozen, jax.random.key(0), abstract, whole_batch(batch, shares))


def loss_flops(
  loss_fn: step.LossFn, init: Callable[[jax.Array], Any], shares: int, batch: Any
) -> int:
  """Three times the loss's FLOPs, since the gradients of a product cost two of it.

  What is made again backward does not count.
  """
  params = jax.eval_shape(init, jax.random.key(0))
  return 3 * cost.flops(loss_fn, jax.random.key(0), params, whole_batch(batch, shares))


def whole_batch(batch: Any, shares: int) -> Any:
  """Shapes of the batch of which this is one of `shares` parts."""
  whole = lambda x: jax.ShapeDtypeStruct(
    (x.shape[0] * shares, *x.shape[1:]), jax.dtypes.canonicalize_dtype(x.dtype)
  )
  return jax.tree.map(whole, batch)


@contextlib.contextmanager
def stepping(
  experiment: Any,
  abstract: state_lib.TrainState,
  workdir: pathlib.Path,
  done: int,
  start: Callable[[], Any],
) -> Iterator[Callable[..., Any]]:
  """Within it, the jitted (key, state, batch) -> (state, metrics) of the experiment's loss.

  A batch is this process's part.
  """
  del workdir, done
  frozen = start() if adapters.used(experiment.config) else None
  update, mesh = jitted_step(experiment, abstract, frozen), sharding.mesh_of(abstract)
  yield lambda key, state, batch: update(key, state, sharding.rows(batch, mesh))


def step_of(experiment: Any, frozen: Any = None) -> Callable[..., Any]:
  """`step.train_step` of the experiment: (key, state, batch) -> (state, metrics)."""
  loss_fn = experiment.loss_fn
  if adapters.used(experiment.config):
    loss_fn = lora.adapted(loss_fn, frozen, adapters.scale(experiment.config))
  return functools.partial(
    step.train_step,
    loss_fn=loss_fn,
    optimizer=experiment.optimizer,
    averaging=experiment.averaging,
    num_microbatches=experiment.config.train.num_microbatches,
  )


def jitted_step(
  experiment: Any, abstract: state_lib.TrainState, frozen: Any = None
) -> Callable[..., Any]:
  """`step_of` the experiment, jitted; the state is donated, and stays where it is.

  Args:
    experiment: whose step.
    abstract: shapes of its state, and where they are.
    frozen: parameters that adapters change; None where all are trained.
  """

  @functools.partial(jax.jit, donate_argnums=1, out_shardings=(sharding.shardings(abstract), None))
  def update(key, state, batch, frozen):
    return step_of(experiment, frozen)(key, state, batch)

  return lambda key, state, batch: update(key, state, batch, frozen)
