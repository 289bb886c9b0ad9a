"""The same samplers over many devices: rows apart ("data"), weights apart ("model").

A sampler is any function (params, settings, keys [B], inputs) -> samples, the one that `jax.jit`
would take. A sample depends on its request's key alone, so how many devices there are, and which of
them draws a row, changes no token; splitting weights rounds sums in another order.

    mesh = sharded.make_mesh(num_model=2)
    params = sharded.shard(params, mesh, head_dim=64)  # once
    sample = sharded.mapped(sample, mesh)
    samples = sample(params, {"temperature": 0.8}, keys, prompts)

- `mapped`: each group of devices loops over its own rows and stops when they are done. Nothing
  travels between groups; within one, the compiler splits the work as the weights are split.
- `jitted`: one program over all rows, that the compiler splits. It makes no assumption on the
  sampler, which may look across rows; its loops go on until the last row of all is done.
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
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ..models import base as models
from . import base

Sample = Callable[[models.Params, Any, base.Keys, Any], Any]

# How the last dimensions of a parameter are split, by its name or the name of its layer. What
# multiplies x is split by columns and what takes the result back by rows, so that a layer's
# attention and its MLP each end in one sum over devices.
_COLUMNS, _ROWS = (None, "model"), ("model", None)
_KERNELS = {
  **dict.fromkeys(("query", "key", "value", "gate", "up"), _COLUMNS),
  **dict.fromkeys(("output", "down"), _ROWS),
}
_ARRAYS = {"embedding": _ROWS, "readout": _COLUMNS}  # over the vocabulary
_HEADS = {"query", "key", "value", "output"}


def make_mesh(num_model: int = 1) -> Mesh:
  """All devices as a mesh of axes "data" and "model", the latter of `num_model` devices.

  Raises:
    ValueError: `num_model` does not divide the number of devices.
  """
  num_devices = jax.device_count()
  if num_model < 1 or num_devices % num_model:
    raise ValueError(f"make_mesh({num_model}): it has to divide the {num_devices} devices.")
  shape = (num_devices // num_model, num_model)
  return jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def specs(params: models.Params, mesh: Mesh, *, head_dim: int = 1) -> Any:
  """How a transformer's params are split over "model": a tree of PartitionSpecs like `params`.

  Heads, the width of the MLP and the vocabulary are split, by the names of the parameters; stacked
  and unstacked layers alike. A dimension that the devices do not divide stays whole on each of them
  (four devices have two key/value heads each), and so does every parameter of another name.

  Args:
    params: arrays or their shapes.
    mesh: of the axes "data" and "model", or one of them.
    head_dim: channels of a head, so that heads stay whole; with 1 the compiler may have to move
      parts of them around at every step.

  Reference: Shoeybi et al. 2019, arXiv 1909.08053, section 3.
  """
  parts = mesh.shape.get("model", 1)

  def spec(path, leaf):
    layer, name = [None, None, *(getattr(entry, "key", None) for entry in path)][-2:]
    rule = _ARRAYS.get(name, ())
    if layer in _KERNELS:
      rule = {"kernel": _KERNELS[layer], "bias": _KERNELS[layer][1:]}.get(name, ())
    if "model" not in rule:
      return PartitionSpec()
    size = leaf.shape[rule.index("model") - len(rule)]
    whole = parts * (head_dim if layer in _HEADS else 1)
    if parts == 1 or size % whole:
      return PartitionSpec()
    return PartitionSpec(*(None,) * (len(leaf.shape) - len(rule)), *rule)

  return jax.tree_util.tree_map_with_path(spec, params)


def shard(params: models.Params, mesh: Mesh, *, head_dim: int = 1) -> models.Params:
  """Params on the mesh, split as `specs` says and copied along "data"."""
  place = lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec))
  return jax.tree.map(place, params, specs(params, mesh, head_dim=head_dim))


def rows(tree: Any, mesh: Mesh) -> Any:
  """Arrays [B, ...] on the mesh, split by rows over "data"; numbers are copied.

  Raises:
    ValueError: B does not divide into the devices of "data".
  """
  num_data = mesh.shape["data"]

  def place(leaf):
    if jnp.ndim(leaf) and leaf.shape[0] % num_data:
      raise ValueError(f"{leaf.shape[0]} rows do not divide into {num_data} devices: pad them.")
    return jax.device_put(leaf, NamedSharding(mesh, _row_spec(leaf)))

  return jax.tree.map(place, tree)


def jitted(sample: Sample, mesh: Mesh) -> Sample:
  """The sampler compiled once for the whole mesh; see the module.

  Params that are not on the mesh are copied to every device at each call: `shard` them before.
  """
  compiled = jax.jit(sample, out_shardings=NamedSharding(mesh, PartitionSpec("data")))
  return _over_mesh(compiled, mesh)


def mapped(sample: Sample, mesh: Mesh) -> Sample:
  """The sampler by `jax.shard_map` over "data", with "model" left to the compiler; see the module.

  Params that are not on the mesh are copied to every device at each call: `shard` them before.
  """

  def over_data(params, *of_rows):
    per_device = jax.shard_map(
      sample,
      mesh=mesh,
      in_specs=(PartitionSpec(), *jax.tree.map(_row_spec, of_rows)),
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


def _row_spec(leaf):
  return PartitionSpec("data") if jnp.ndim(leaf) else PartitionSpec()


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

  return _filled_up(run, mesh.shape["data"])


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
