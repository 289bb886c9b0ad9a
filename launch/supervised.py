"""The step of experiments that learn from given examples."""

import contextlib
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

from ..training import cost, sharding, step
from ..training import state as state_lib
from . import fields


def share(config: fields.Config, mesh: jax.sharding.Mesh) -> tuple[int, int]:
  """(index, count) of the part of each batch that this process reads.

  Raises:
    ValueError: the batch or its microbatches do not divide over the mesh.
  """
  c = config.train
  sharding.share(mesh, c.batch_size // c.num_microbatches)
  return sharding.share(mesh, c.batch_size)


def everything(config: fields.Config, mesh: jax.sharding.Mesh) -> tuple[int, int]:
  """The same where each process reads the whole."""
  del config, mesh
  return 0, 1


def flops(experiment: Any, abstract: state_lib.TrainState, shares: int, batch: Any) -> int:
  """Of a step on all devices, from batches of which this is one of `shares` parts."""
  whole = lambda x: jax.ShapeDtypeStruct(
    (x.shape[0] * shares, *x.shape[1:]), jax.dtypes.canonicalize_dtype(x.dtype)
  )
  return cost.flops(step_of(experiment), jax.random.key(0), abstract, jax.tree.map(whole, batch))


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
  del workdir, done, start
  update, mesh = jitted_step(experiment, abstract), sharding.mesh_of(abstract)
  yield lambda key, state, batch: update(key, state, sharding.rows(batch, mesh))


def step_of(experiment: Any) -> Callable[..., Any]:
  """`step.train_step` of the experiment: (key, state, batch) -> (state, metrics)."""
  return functools.partial(
    step.train_step,
    loss_fn=experiment.loss_fn,
    optimizer=experiment.optimizer,
    averaging=experiment.averaging,
    num_microbatches=experiment.config.train.num_microbatches,
  )


def jitted_step(experiment: Any, abstract: state_lib.TrainState) -> Callable[..., Any]:
  """`step_of` the experiment, jitted; the state is donated, and stays where it is."""
  return jax.jit(
    step_of(experiment),
    donate_argnums=1,
    out_shardings=(sharding.shardings(abstract), None),
  )
