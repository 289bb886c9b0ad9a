"""What a step of training takes of each device: bytes, FLOPs, traffic, and the least time for them.

All of it is read off shapes and jaxprs. Where a number is an estimate, its function says of what.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from . import chips, memory, sharding
from . import state as state_lib


class Held(NamedTuple):
  """Bytes on one device, of what lives as long as the run."""

  params: int  # that are trained
  optimizer: int
  average: int
  frozen: int  # parameters that adapters change


class Traffic(NamedTuple):
  """Bytes that one device moves in a step: of its memory, and over each axis of the mesh."""

  memory: float
  data: float
  fsdp: float
  sequence: float
  tensor: float


class Layers(NamedTuple):
  """What is summed or gathered in a transformer beside parameters, per row of the batch."""

  num_layers: int
  activations: int  # bytes of what goes from layer to layer, [L, D]
  key_values: int  # bytes of keys and values of one layer, [2, L, K C]


def held(abstract: state_lib.TrainState, frozen: Any = None) -> Held:
  """Exactly what each device holds of a state (see `sharding.of_state`) and of what is frozen."""
  local = lambda x: memory.nbytes(x.sharding.shard_shape(x.shape), x.dtype)
  total = lambda tree: sum(map(local, jax.tree.leaves(tree)))
  parts = (abstract.params, abstract.optimizer, abstract.average, frozen)
  return Held(*map(total, parts))


def peak(
  step: Callable[..., Any], abstract: state_lib.TrainState, batch: Any, frozen: Any = None
) -> int:
  """Bytes that one device holds at most in a step; see `memory.peak`.

  What is split over "data" and "fsdp" is told by its shape, that of an array of the state. Over
  "fsdp" the largest parameters that are gathered at once, a layer's or a table, and their gradient,
  come on top.

  Args:
    step: (frozen, key, state, batch) -> (state, metrics), of the share of the model that "tensor"
      leaves.
    abstract: the state of that, and where it is.
    batch: shapes of the rows that the device has.
    frozen: parameters that adapters change, and where they are.
  """
  split = {
    x.shape: memory.nbytes(x.sharding.shard_shape(x.shape), x.dtype)
    for x in jax.tree.leaves((abstract, frozen))
    if len(x.shape) > 1
  }
  size = lambda shape, dtype: split.get(tuple(shape)) or memory.nbytes(shape, dtype)
  plain = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
  most = memory.peak(step, plain(frozen), jax.random.key(0), plain(abstract), batch, size=size)
  mesh = sharding.mesh_of(abstract)
  whole = abstract.params if frozen is None else frozen
  return most + (2 * _gathered(whole) if mesh.shape["fsdp"] > 1 else 0)


def _gathered(params: Any) -> int:
  """Bytes of the most that is gathered at once: a layer, where they are stacked, or an array."""
  sizes = lambda tree: [memory.nbytes(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
  layers = params.get("layers", ()) if isinstance(params, dict) else ()
  rest = {k: v for k, v in params.items() if k != "layers"} if isinstance(params, dict) else params
  stacked = isinstance(layers, dict)
  num_layers = jax.tree.leaves(layers)[0].shape[0] if stacked else max(len(layers), 1)
  return max(sum(sizes(layers)) // num_layers, *sizes(rest))


def traffic(
  own: Held,
  peak_bytes: int,
  num_params: int,
  sizes: dict[str, int],
  *,
  rows: float,
  num_microbatches: int,
  remade: bool,
  layers: Layers | None,
) -> Traffic:
  """Estimates, each array moved as rarely as it can be; float32 parameters and gradients.

  Memory: parameters are read forward and backward by each microbatch; the optimiser reads and
  writes what it keeps, parameters too, and reads gradients; activations are written and read once.
  A sum of n bytes over p devices moves 2 (p - 1) / p n of each, a gather or a scatter half of that.
  "data": the gradients' sum. "fsdp": per microbatch, two gathers of the parameters (three, if
  layers are made again) and a scatter of their gradients. "tensor": two sums of activations forward
  and two backward for each layer (two more if made again). "sequence": a gather of keys and values,
  and a scatter of their gradients.

  Args:
    own: what the device holds.
    peak_bytes: the most it holds in a step.
    num_params: of the whole model.
    sizes: devices along each axis.
    rows: of a batch that the device has.
    num_microbatches: of the step.
    remade: whether layers are made again backward.
    layers: None where the model is no transformer of ours.
  """
  ring = lambda axis: (sizes[axis] - 1) / sizes[axis]
  gathered = 4 * num_params / sizes["tensor"]
  activations = max(peak_bytes - sum(own) - own.params, 0) * num_microbatches
  per_layer = rows * layers.num_layers if layers else 0
  return Traffic(
    2 * gathered * num_microbatches + 3 * own.params + 2 * own.optimizer + 2 * activations,
    2 * ring("data") * own.params,
    (3 + remade) * num_microbatches * ring("fsdp") * gathered,
    3 * ring("sequence") * per_layer * layers.key_values if layers else 0.0,
    (8 + 4 * remade) * ring("tensor") * per_layer * layers.activations if layers else 0.0,
  )


class Seconds(NamedTuple):
  """The least time of a step by each limit."""

  compute: float
  memory: float
  network: float

  @property
  def overlapped(self) -> float:
    """If all three go on at once."""
    return max(self)

  @property
  def apart(self) -> float:
    """If the network waits for the rest, and the rest for it."""
    return max(self.compute, self.memory) + self.network


def roofline(flops: float, moved: Traffic, chip: chips.Chip, num_devices: int) -> Seconds:
  """Seconds of a step at the chip's peaks (Williams et al. 2009, doi 10.1145/1498765.1498785)."""
  return Seconds(
    flops / num_devices / chip.flops,
    moved.memory / chip.bandwidth,
    math.fsum(moved[1:]) / chip.interconnect,
  )
