"""How arrays are split over a mesh of devices: rules for parameters, constraints on activations.

A mesh has up to four axes, and the same names mean the same in training and in sampling:

- "data": rows of the batch; parameters are copied.
- "fsdp": rows too, and parameters with all that the optimiser keeps of them are split; a layer's
  are gathered when it runs (Rajbhandari et al. 2019, arXiv 1910.02054, stage 3).
- "sequence": positions. Queries stay where they are, keys and values are gathered.
- "tensor": heads, the width of the MLP, the vocabulary (Shoeybi et al. 2019, arXiv 1909.08053,
  section 3).

Rules are a list: the first whose pattern is found in a parameter's path says how it is split. They
hold for a state as well, since an optimiser keeps its arrays under the parameters' own paths. An
axis is left out where its devices do not divide the dimension, so a mesh is never an error but at
worst a waste, which `launch.plan` shows.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "sequence", "tensor")
ROWS = ("data", "fsdp")  # of a batch


class Rule(NamedTuple):
  """How the parameters whose path has the pattern are split."""

  pattern: str  # a regular expression, searched for in "layers/attention/query/kernel"
  spec: PartitionSpec  # of the last dimensions; stacked layers have one more before them
  unit: int = 1  # channels that "tensor" leaves together, such as those of a head


def rules(head_dim: int = 1) -> tuple[Rule, ...]:
  """Rules for the parameters of the networks here.

  What multiplies x is split by columns and what takes the result back by rows, so that a layer's
  attention and its MLP each end in one sum over "tensor".

  Args:
    head_dim: channels of a head, so that heads stay whole; with 1 the compiler may have to move
      parts of them around at every step.
  """
  columns, back = PartitionSpec("fsdp", "tensor"), PartitionSpec("tensor", "fsdp")
  return (
    Rule(r"\b(query|key|value)/kernel$", columns, head_dim),
    Rule(r"\b(query|key|value)/bias$", PartitionSpec("tensor"), head_dim),
    Rule(r"\boutput/kernel$", back, head_dim),
    Rule(r"\b(gate|up)/kernel$", columns),
    Rule(r"\b(gate|up)/bias$", PartitionSpec("tensor")),
    Rule(r"\bdown/kernel$", back),
    Rule(r"\bembedding$", back),
    Rule(r"\breadout$", columns),
    Rule(r"\bkernel$", PartitionSpec("fsdp", None)),  # of other layers, convolutions too
    Rule(r"\b(positions|classes)$", PartitionSpec(None, "fsdp")),
  )


def over_data(rules_: Sequence[Rule]) -> tuple[Rule, ...]:
  """The rules with "data" beside "fsdp": for an optimiser whose arrays nobody needs to have twice.

  Reference: Rajbhandari et al. 2019, arXiv 1910.02054, stage 1.
  """
  wider = lambda axis: ("fsdp", "data") if axis == "fsdp" else axis
  return tuple(rule._replace(spec=PartitionSpec(*map(wider, rule.spec))) for rule in rules_)


def shape(
  num_devices: int, data: int | None = None, fsdp: int = 1, sequence: int = 1, tensor: int = 1
) -> tuple[int, ...]:
  """Devices along each of `AXES`; `data` is what the others leave.

  Raises:
    ValueError: the product is not the number of devices.
  """
  others = (fsdp, sequence, tensor)
  sizes = (num_devices // max(math.prod(others), 1) if data is None else data, *others)
  if min(sizes) < 1 or math.prod(sizes) != num_devices:
    given = zip(AXES, (data, *others), strict=True)
    text = ", ".join(f"{axis}={size}" for axis, size in given if size is not None)
    raise ValueError(
      f"A mesh of {text} does not fill the {num_devices} devices: its product has to be that."
    )
  return sizes


def make_mesh(
  data: int | None = None,
  fsdp: int = 1,
  sequence: int = 1,
  tensor: int = 1,
  *,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """All devices as a mesh of `AXES`; see `shape`.

  Neighbouring devices differ in "tensor" first, whose traffic is the most.

  Raises:
    ValueError: the product is not the number of devices.
  """
  num_devices = jax.device_count() if devices is None else len(devices)
  sizes = shape(num_devices, data, fsdp, sequence, tensor)
  return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def row_parts(mesh: Mesh | AbstractMesh) -> int:
  """Into how many parts a mesh, of some of `AXES`, splits rows."""
  return math.prod(mesh.shape.get(axis, 1) for axis in ROWS)


def fitted(
  spec: PartitionSpec, shape: Sequence[int], sizes: Mapping[str, int], *, unit: int = 1
) -> PartitionSpec:
  """The spec, of the last dimensions, for an array of this shape on axes of these sizes.

  An axis that the mesh lacks, that has one device, or that does not divide its dimension (in
  units, for "tensor") is left out.
  """
  lead = len(shape) - len(spec)
  if lead < 0:
    return PartitionSpec()
  found: list[Any] = [None] * lead
  for size, entry in zip(shape[lead:], spec, strict=True):
    kept: tuple[str, ...] = ()
    for axis in (entry,) if isinstance(entry, str) else entry or ():
      parts = math.prod(sizes.get(a, 1) for a in (*kept, axis))
      whole = parts * (unit if axis == "tensor" else 1)
      if sizes.get(axis, 1) > 1 and size % whole == 0:
        kept += (axis,)
    found.append(kept[0] if len(kept) == 1 else kept or None)
  return PartitionSpec(*found) if any(found) else PartitionSpec()


def specs(tree: Any, sizes: Mapping[str, int], rules_: Sequence[Rule]) -> Any:
  """A tree of PartitionSpecs like `tree` of arrays or shapes; what no rule knows stays whole.

  Args:
    tree: parameters, or anything with their paths in it.
    sizes: of the mesh's axes, `mesh.shape`.
    rules_: the first that matches counts.
  """

  return jax.tree_util.tree_map_with_path(lambda path, leaf: _spec(path, leaf, sizes, rules_), tree)


def _spec(path, leaf, sizes, rules_) -> PartitionSpec:
  name = jax.tree_util.keystr(path, simple=True, separator="/")
  for rule in rules_:
    if re.search(rule.pattern, name):
      return fitted(rule.spec, leaf.shape, sizes, unit=rule.unit)
  return PartitionSpec()


def shardings(tree: Any, mesh: Mesh, rules_: Sequence[Rule]) -> Any:
  """`specs` as NamedShardings."""
  return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(tree, mesh.shape, rules_))


def placing(mesh: Mesh, rules_: Sequence[Rule]) -> Any:
  """(path, leaf) -> its NamedSharding by the rules; see `pretrained.read`."""
  return lambda path, leaf: NamedSharding(mesh, _spec(path, leaf, mesh.shape, rules_))


def ambient() -> dict[str, int]:
  """Sizes above 1 of the axes, of the mesh set by `jax.set_mesh`, that the compiler splits over.

  Inside `jax.shard_map` those that it maps over are not among them.
  """
  mesh = jax.sharding.get_abstract_mesh()
  kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True)) if not mesh.empty else {}
  return {
    a: mesh.shape[a] for a, kind in kinds.items() if kind == AxisType.Auto and mesh.shape[a] > 1
  }


def constrain(x: jax.Array, *axes: Any) -> jax.Array:
  """x, which the compiler has to split over these axes of the ambient mesh, one per dimension.

  Without a mesh, or with one device, it is x.
  """
  sizes = ambient()
  if not sizes:
    return x
  return jax.lax.with_sharding_constraint(x, fitted(PartitionSpec(*axes), x.shape, sizes))
