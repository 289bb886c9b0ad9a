"""What a run would take, before anything is allocated: memory, FLOPs, and the least time of a step.

  python -m ancestral.launch.plan --config=configs/text.py --chip=v5e --devices=16 \\
      --config.mesh.fsdp=16 --config.model.remat=full

Parameters and what the optimiser keeps are exact. The peak of a step is read off its program (see
`training.memory`), traffic and times are the least that the chip's peaks allow (see
`training.budget`): what one asks before paying for a pod.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import rich.console
import rich.table
from absl import flags as absl_flags
from jax.sharding import AbstractMesh

from ..models import partition
from ..training import budget, chips, data, memory, sharding
from . import adapters, fields, flags, language, supervised
from . import experiment as experiment_lib

_CHIP = absl_flags.DEFINE_enum("chip", "h100", sorted(chips.BY_NAME), "The devices there would be.")
_DEVICES = absl_flags.DEFINE_integer("devices", 1, "How many of them.", lower_bound=1)
_JSON = absl_flags.DEFINE_bool("json", False, "Print JSON and no table.")
READS = (flags.CONFIG, _CHIP, _DEVICES, _JSON)


class Plan(NamedTuple):
  """What a run takes; bytes are on one device."""

  num_params: int
  mesh: dict[str, int]
  held: budget.Held
  peak: int
  cache: int  # of `evaluation.batch_size` sequences of full length, 0 where there is none
  flops: int  # of a step, on all devices, recomputation included
  model_flops: int  # without it
  tokens: int  # of a batch, or examples where there are none
  traffic: budget.Traffic
  seconds: budget.Seconds


def plan(config: fields.Config, chip: chips.Chip, num_devices: int) -> Plan:
  """The plan of a run.

  Raises:
    ValueError, FileNotFoundError: the configuration is wrong, its mesh does not fill the devices,
      its batch does not divide over them, or it is of a kind that makes its own examples.
  """
  experiment = experiment_lib.build(config)
  kind = experiment_lib.kind_of(config)
  if kind.flops is None:
    raise ValueError(
      "A plan is of steps that are one program, on given examples: plan the run that this starts "
      "from."
    )
  sizes = partition.shape(num_devices, **fields.mesh_sizes(config))
  mesh = AbstractMesh(sizes, partition.AXES)
  abstract = experiment_lib.abstract_state(experiment, mesh)
  batch = batch_of(experiment, config.train.batch_size)
  parts = partition.row_parts(mesh)
  supervised.check_batch(config, mesh)
  rows = config.train.batch_size / parts / mesh.shape["sequence"]
  share = _share(kind, experiment, mesh.shape["tensor"])
  frozen = _frozen(experiment, mesh)
  own = budget.held(abstract, frozen)
  peak = budget.peak(
    lambda frozen, *args: supervised.step_of(share, frozen)(*args),
    experiment_lib.abstract_state(share, _without_tensor(mesh)),
    _rows(batch, math.ceil(rows / config.train.num_microbatches) * config.train.num_microbatches),
    _frozen(share, _without_tensor(mesh)),
  )
  whole = abstract.params if frozen is None else frozen
  num_params = sum(math.prod(x.shape) for x in jax.tree.leaves(whole))
  moved = budget.traffic(
    own,
    peak,
    num_params,
    dict(mesh.shape),
    rows=rows,
    num_microbatches=config.train.num_microbatches,
    remade=config.model.get("remat", "none") != "none",
    layers=_layers(experiment, batch),
  )
  flops = supervised.flops(_readable(kind, experiment), abstract, 1, batch, frozen)
  return Plan(
    num_params,
    dict(mesh.shape),
    own,
    peak,
    _cache(share, parts),
    flops,
    kind.flops(experiment, abstract, 1, batch),
    math.prod(batch["tokens"].shape) if "tokens" in batch else config.train.batch_size,
    moved,
    budget.roofline(flops, moved, chip, num_devices),
  )


def _frozen(experiment: Any, mesh: AbstractMesh) -> Any:
  """Shapes of what adapters change, and where it is; None where all is trained."""
  if not adapters.used(experiment.config):
    return None
  shapes, rules = language.frozen_shapes(experiment), language.rules(experiment)
  return sharding.located(shapes, partition.shardings(shapes, mesh, rules))


def batch_of(experiment: Any, batch_size: int) -> Any:
  """Shapes of a global batch; one is made."""
  stream = data.batches(
    experiment.source, experiment.rows, batch_size=batch_size, process_index=0, process_count=1
  )
  return supervised.whole_batch(next(stream), 1)


def _rows(batch: Any, num: int) -> Any:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct((num, *x.shape[1:]), x.dtype), batch)


def _without_tensor(mesh: AbstractMesh) -> AbstractMesh:
  return AbstractMesh((*mesh.axis_sizes[:-1], 1), partition.AXES)


def _readable(kind: experiment_lib.Kind, experiment: Any) -> Any:
  """The experiment with attention whose FLOPs can be read: as many as of a kernel."""
  if not hasattr(experiment, "model_config"):
    return experiment
  return kind.with_model(
    experiment, dataclasses.replace(experiment.model_config, attention="exact")
  )


def _share(kind: experiment_lib.Kind, experiment: Any, tensor: int) -> Any:
  """The experiment with the part of a transformer that one device along "tensor" has."""
  config = getattr(experiment, "model_config", None)
  if config is None or tensor == 1:
    return experiment
  c = config.resolved()
  part = lambda n: n // tensor if n % tensor == 0 else n
  share = dataclasses.replace(
    c,
    num_heads=part(c.num_heads),
    num_kv_heads=part(c.num_kv_heads) if c.num_heads % tensor == 0 else c.num_kv_heads,
    mlp_width=part(c.mlp_width),
    vocab_size=part(c.vocab_size),
  )
  return kind.with_model(experiment, share)


def _layers(experiment: Any, batch: Any) -> budget.Layers | None:
  if not hasattr(experiment, "model_config"):
    return None
  c, length = experiment.model_config.resolved(), batch["tokens"].shape[1]
  itemsize = jnp.dtype(c.dtype).itemsize
  return budget.Layers(
    c.num_layers,
    length * c.width * itemsize,
    2 * length * c.num_kv_heads * c.head_dim * itemsize,
  )


def _cache(share: Any, parts: int) -> int:
  if not hasattr(share, "model_config"):
    return 0
  if not share.model_config.causal and share.config.loss.get("block_length") is None:
    return 0
  rows = -(-share.config.evaluation.batch_size // parts)
  max_length = share.model_config.max_length
  cache = jax.eval_shape(lambda: share.model.init_cache(None, rows, max_length))
  return sum(memory.nbytes(x.shape, x.dtype) for x in jax.tree.leaves(cache))


def table(found: Plan, chip: chips.Chip, num_devices: int) -> rich.table.Table:
  """The plan for people."""
  mesh = " x ".join(f"{axis}={size}" for axis, size in found.mesh.items() if size > 1) or "one"
  made = rich.table.Table("", "", title=f"{num_devices} x {chip.name}, mesh: {mesh}")
  share = found.peak / chip.memory
  seconds = found.seconds
  limit = max(seconds._fields, key=lambda name: getattr(seconds, name))
  for name, value in {
    "parameters": f"{found.num_params:,}",
    "on each device": "",
    "  parameters": _bytes(found.held.params + found.held.frozen),
    "  optimiser": _bytes(found.held.optimizer),
    "  average": _bytes(found.held.average),
    "  gradients, activations": _bytes(found.peak - sum(found.held)),
    "  peak of a step": f"{_bytes(found.peak)}, {share:.1%} of {_bytes(chip.memory)}"
    + (" [red](does not fit)[/red]" if share > 1 else ""),
    "  cache of evaluation": _bytes(found.cache),
    "FLOPs of a step": f"{found.flops:.4g} ({found.model_flops:.4g} without recomputation)",
    "a step takes at least": f"{seconds.overlapped:.3g} s, by {limit}",
    "  waiting for the network": f"{seconds.apart:.3g} s",
    **{f"  by {name}": f"{getattr(seconds, name):.3g} s" for name in seconds._fields},
    "tokens (or examples) a second at most": f"{found.tokens / seconds.overlapped:,.0f}",
    "utilisation at most": f"{_utilisation(found, chip, num_devices):.0%}",
  }.items():
    made.add_row(name, value)
  return made


def _utilisation(found: Plan, chip: chips.Chip, num_devices: int) -> float:
  return found.model_flops / (found.seconds.overlapped * chip.flops * num_devices)


def _bytes(number: float) -> str:
  for unit in ("B", "kB", "MB", "GB"):
    if number < 1000:
      return f"{number:.4g} {unit}"
    number /= 1000
  return f"{number:.4g} TB"


def as_json(found: Plan) -> dict[str, Any]:
  """The plan with its parts by name."""
  nested = lambda value: value._asdict() if hasattr(value, "_asdict") else value
  return {name: nested(value) for name, value in found._asdict().items()}


def main(_: Sequence[str]) -> None:
  """Prints the plan of --config."""
  chip, num_devices = chips.BY_NAME[_CHIP.value], _DEVICES.value
  with flags.one_line_errors():
    flags.required(flags.CONFIG)
    found = plan(flags.CONFIG.value, chip, num_devices)
  if _JSON.value:
    print(json.dumps(as_json(found), indent=1))
  else:
    rich.console.Console(highlight=False).print(table(found, chip, num_devices))


if __name__ == "__main__":
  flags.run(main, READS)
