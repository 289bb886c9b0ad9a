"""The same samplers over many devices, on the mesh and by the rules of `models.partition`.

A sampler is any function (params, settings, keys [B], inputs) -> samples, the one that `jax.jit`
would take. A sample depends on its request's key alone, so how many devices there are, and which of
them draws a row, changes no token; splitting weights rounds sums in another order.

    mesh = partition.make_mesh(tensor=2)
    params = sharded.shard(params, mesh, head_dim=64)  # once
    sample = sharded.mapped(sample, mesh)
    samples = sample(params, {"temperature": 0.8}, keys, prompts)

- `mapped`: each group of devices loops over its own rows and stops when they are done. Nothing
  travels between groups; within one, the compiler splits the work as the weights are split.
- `jitted`: one program over all rows, that the compiler splits, the cache by rows and heads. It
  makes no assumption on the sampler, which may look across rows; its loops go on until the last row
  of all is done.
- `pmapped`: `jax.pmap` over the rows, for those who have pmapped code. Weights are whole on each
  device.

What they take: every leaf of `inputs` leads with [B], B requests; keys and samples lead with [n B],
n rows of each request next to each other; `settings` are numbers or lead with either. Anything else
that rows share (a bias [V], an automaton's table) goes into `params`, which may be any tree. If the
devices do not divide B, it is filled up with copies of the last request, which are cut off again.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ..models import base as models
from ..models import partition
from . import base

Sample = Callable[[models.Params, Any, base.Keys, Any], Any]


def shard(params: models.Params, mesh: Mesh, *, head_dim: int = 1) -> models.Params:
  """Params on the mesh, split by `partition.rules`."""
  return jax.device_put(params, partition.shardings(params, mesh, partition.rules(head_dim)))


def rows(tree: Any, mesh: Mesh) -> Any:
  """Arrays [B, ...] on the mesh, split by rows over "data" and "fsdp"; numbers are copied.

  Raises:
    ValueError: B does not divide into their devices.
  """
  num_data = partition.row_parts(mesh)

  def place(leaf):
    if jnp.ndim(leaf) and leaf.shape[0] % num_data:
      raise ValueError(f"{leaf.shape[0]} rows do not divide into {num_data} devices: pad them.")
    return jax.device_put(leaf, NamedSharding(mesh, _row_spec(leaf, _row_axes(mesh))))

  return jax.tree.map(place, tree)


def jitted(sample: Sample, mesh: Mesh) -> Sample:
  """The sampler compiled once for the whole mesh; see the module.

  Params that are not on the mesh are copied to every device at each call: `shard` them before.
  """

  def on_mesh(*arguments):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return sample(*arguments)

  split = NamedSharding(mesh, PartitionSpec(_row_axes(mesh)))
  return _over_mesh(jax.jit(on_mesh, out_shardings=split), mesh)


def mapped(sample: Sample, mesh: Mesh) -> Sample:
  """The sampler by `jax.shard_map` over "data", other axes left to the compiler; see the module.

  Params that are not on the mesh are copied to every device at each call: `shard` them before.
  """

  def over_data(params, *of_rows):
    per_device = jax.shard_map(
      sample,
      mesh=mesh,
      in_specs=(PartitionSpec(), *jax.tree.map(lambda leaf: _row_spec(leaf, "data"), of_rows)),
      out_specs=PartitionSpec("data"),
      axis_names={"data"},
      check_vma=False,  # a loop's carry may begin alike on all devices and then differ
    )
    return per_device(params, *of_rows)

  return _over_mesh(jax.jit(over_data), mesh)


def pmapped(sample: Sample) -> Sample:
  """The sampler by `jax.pmap` over all local devices, params copied to each; see the module."""
  devices = jax.local_devices()
  num_devices = len(devices)
  mesh = jax.make_mesh((num_devices,), ("data",), axis_types=(AxisType.Auto,), devices=devices)
  on_devices = jax.pmap(sample, in_axes=(None, 0, 0, 0))

  def split(leaf):
    if jnp.ndim(leaf) == 0:
      return jnp.full(num_devices, leaf)
    return leaf.reshape(num_devices, -1, *leaf.shape[1:])

  def run(params, *of_rows):
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))  # nothing if there
    samples = on_devices(params, *jax.tree.map(split, of_rows))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), samples)

  return _filled_up(run, num_devices)


def _row_axes(mesh):
  return tuple(axis for axis in partition.ROWS if axis in mesh.shape)


def _row_spec(leaf, axes):
  return PartitionSpec(axes) if jnp.ndim(leaf) else PartitionSpec()


def _over_mesh(compiled, mesh):
  """Places what `compiled` takes, and gives it a number of rows that the mesh divides."""

  def place(leaf):
    if isinstance(leaf, jax.core.Tracer):  # inside another jit, the compiler's to place
      return leaf
    at = getattr(leaf, "sharding", None)
    held = isinstance(at, NamedSharding) and at.mesh == mesh
    return leaf if held else jax.device_put(leaf, NamedSharding(mesh, PartitionSpec()))

  def run(params, *of_rows):
    return compiled(jax.tree.map(place, params), *rows(of_rows, mesh))

  return _filled_up(run, partition.row_parts(mesh))


def _filled_up(run, num_parts):
  """`run` on a multiple of `num_parts` requests: copies of the last are added, then cut off."""

  def call(params, settings, keys, inputs):
    first = jax.tree.leaves((inputs, keys))[0]
    num_requests = _check_rows(jnp.shape(first)[0], settings, keys, inputs)
    missing = -num_requests % num_parts
    if missing == 0:
      return run(params, settings, keys, inputs)
    source = jnp.minimum(jnp.arange(num_requests + missing), num_requests - 1)

    def fill(leaf):  # [n B, ...]: the n rows of a request stay next to each other
      if jnp.ndim(leaf) == 0:
        return leaf
      rest = leaf.shape[1:]
      return leaf.reshape(num_requests, -1, *rest)[source].reshape(-1, *rest)

    samples = run(params, *jax.tree.map(fill, (settings, keys, inputs)))
    return jax.tree.map(lambda leaf: leaf[: leaf.shape[0] // source.size * num_requests], samples)

  return call


def _check_rows(num_requests, settings, keys, inputs):
  """Returns B, the number of requests, if everything has rows for them."""
  num_rows = keys.shape[0]
  allowed = {
    "settings": {(), (num_requests,), (num_rows,)},
    "keys": {(num_requests * max(num_rows // num_requests, 1),)},
    "inputs": {(num_requests,)},
  }
  for name, tree in (("inputs", inputs), ("keys", keys), ("settings", settings)):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      if jnp.shape(leaf)[:1] not in allowed[name]:
        raise ValueError(
          f"{name}{jax.tree_util.keystr(path)} of shape {jnp.shape(leaf)} has no entry for each of "
          f"{num_requests} requests; what they share belongs in params."
        )
  return num_requests


def to_host(tree: Any) -> Any:
  """Arrays as numpy, whole on every process, whichever of them holds which part.

  Every process has to call it, for the same tree.
  """

  def whole(leaf):
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
      return leaf
    return multihost_utils.process_allgather(leaf, tiled=True)

  return jax.device_get(jax.tree.map(whole, tree))
