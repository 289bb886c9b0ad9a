"""Training over a mesh: a state that is never whole in one place, and batches by rows.

    mesh = partition.make_mesh(fsdp=8)
    abstract = sharding.of_state(jax.eval_shape(init, key), mesh, partition.rules(head_dim))
    placed = sharding.shardings(abstract)                               # nothing is allocated yet
    with jax.set_mesh(mesh):
      state = jax.jit(init, out_shardings=placed)(key)                  # each device makes its part
      step = jax.jit(train_step, donate_argnums=1, out_shardings=(placed, None))
      state, metrics = step(key, state, sharding.rows(batch, mesh))

The loss is a sum over the whole batch (see `step`), so a mesh changes its rounding and no more.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..models import partition
from . import state as state_lib


def of_state(
  shapes: state_lib.TrainState,
  mesh: Mesh,
  rules: Sequence[partition.Rule],
  *,
  over_data: bool = False,
) -> state_lib.TrainState:
  """The shapes of a state that say where its arrays are: what `checkpoint.restore` fills.

  Args:
    shapes: of the state, by `jax.eval_shape`.
    mesh: to split over.
    rules: of the parameters; what the optimiser and the average keep of each is split like it.
    over_data: whether these are split over "data" too, where parameters are copied. They are then
      updated in parts, and the parts of the parameters gathered: less memory for the same traffic
      as a sum of gradients (see `partition.over_data`).
  """
  placed = partition.shardings(shapes, mesh, rules)
  if over_data:
    apart = partition.shardings(shapes, mesh, partition.over_data(rules))
    placed = placed._replace(optimizer=apart.optimizer, average=apart.average)
  return located(shapes, placed)


def located(shapes: Any, placed: Any) -> Any:
  """The shapes that say by `placed`, NamedShardings like them, where their arrays are."""
  return jax.tree.map(
    lambda shape, at: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=at), shapes, placed
  )


def shardings(abstract_state: Any) -> Any:
  """Where its arrays are: `out_shardings` of what makes it, and of each step."""
  return jax.tree.map(lambda shape: shape.sharding, abstract_state)


def mesh_of(abstract_state: Any) -> Mesh:
  """The mesh that its shapes are on."""
  return jax.tree.leaves(abstract_state)[0].sharding.mesh


def share(mesh: Mesh, batch_size: int) -> tuple[int, int]:
  """(index, count): this process reads the index-th of `count` equal parts of a batch.

  Processes whose devices differ in "sequence" or "tensor" only read the same part.

  Raises:
    ValueError: the batch does not divide over "data" and "fsdp".
  """
  parts = partition.row_parts(mesh)
  if batch_size % parts:
    raise ValueError(
      f"A batch of {batch_size} does not divide over the {parts} devices of data and fsdp: use a "
      "multiple, or fewer."
    )
  owned = _by_rows(mesh).addressable_devices_indices_map((batch_size,)).values()
  spans = {own.indices(batch_size)[:2] for (own,) in owned}
  first, last = min(start for start, _ in spans), max(stop for _, stop in spans)
  size = sum(stop - start for start, stop in spans)
  if size != last - first or first % size:
    raise ValueError(
      f"This process has rows {sorted(spans)} of a batch, which are no one part of it: give each "
      "process neighbouring devices."
    )
  return first // size, batch_size // size


def rows(batch: Any, mesh: Mesh) -> Any:
  """The global batch, split by rows, of each process's own part of it (see `share`).

  Raises:
    ValueError: the rows do not divide over "data" and "fsdp".
  """
  size = len(jax.tree.leaves(batch)[0]) * share(mesh, partition.row_parts(mesh))[1]
  share(mesh, size)
  whole = lambda leaf: (size, *np.shape(leaf)[1:])
  return jax.tree.map(
    lambda leaf: jax.make_array_from_process_local_data(
      _by_rows(mesh), np.asarray(leaf), whole(leaf)
    ),
    batch,
  )


def _by_rows(mesh):
  return NamedSharding(mesh, PartitionSpec(partition.ROWS))
