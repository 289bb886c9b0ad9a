"""From fields of a configuration, of whatever kind, to the objects that they name."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import optax
from ml_collections import config_dict

from ..models import partition
from ..training import averaging, optimizer
from ..training import state as state_lib

Config = ml_collections.ConfigDict

DTYPES = {name: name for name in ("float32", "bfloat16", "float16")}

SCHEDULES = {
  "warmup_cosine": optimizer.warmup_cosine,
  "warmup_stable_decay": optimizer.warmup_stable_decay,
}

OPTIMIZERS = {"adamw": optimizer.adamw, "muon": optimizer.muon}


def choose(field: str, name: str, choices: Mapping[str, Any]) -> Any:
  """The choice of that name.

  Raises:
    ValueError: there is none; says what there is.
  """
  if name not in choices:
    raise ValueError(f"config.{field} is {name!r}; it is one of {', '.join(sorted(choices))}.")
  return choices[name]


def require(holds: bool, rule: str) -> None:
  """Raises ValueError with the rule, which begins with the field's path, unless it holds."""
  if not holds:
    raise ValueError(f"config.{rule}.")


def existing_path(field: str, path: str) -> str:
  """The path, that of the field; FileNotFoundError unless something is there."""
  if not path or not pathlib.Path(path).exists():
    raise FileNotFoundError(f"config.{field} is {path!r}, which does not exist: give one.")
  return path


def to_json(config: Config) -> dict[str, Any]:
  """The configuration as plain JSON, as a checkpoint keeps it."""
  return json.loads(config.to_json())


def check(config: Config, sections: Sequence[str]) -> None:
  """Raises at the first number that its field cannot mean, in whatever kind of experiment.

  Args:
    config: of an experiment; its `seed`, `optimizer` and `train` are looked at.
    sections: those whose whole numbers are at least 1, `train` among them.

  Raises:
    ValueError: in one line, the field and what it may be.
  """
  c = to_json(config)
  for section in sections:
    for name, value in c[section].items():
      require(
        type(value) is not int or value >= 1, f"{section}.{name} is {value}; it is at least 1"
      )
  batch_size, num_microbatches = c["train"]["batch_size"], c["train"]["num_microbatches"]
  divides = batch_size % num_microbatches == 0
  rule = f"is not a multiple of config.train.num_microbatches={num_microbatches}"
  require(divides, f"train.batch_size={batch_size} {rule}")
  decay, peak = c["train"].get("average_decay", 0.0), c["optimizer"]["peak"]
  warmup = c["optimizer"]["warmup_fraction"]
  spike = c["train"].get("spike_factor")
  temperature = c.get("evaluation", {}).get("temperature", 1.0)
  require(temperature >= 0, f"evaluation.temperature is {temperature}; it is at least 0")
  require(spike is None or spike > 0, f"train.spike_factor is {spike}; it is above 0")
  require(c["seed"] >= 0, f"seed is {c['seed']}; it is at least 0")
  require(0 <= decay < 1, f"train.average_decay is {decay}; it is in [0, 1)")
  require(peak > 0, f"optimizer.peak is {peak}; it is above 0")
  require(0 <= warmup < 1, f"optimizer.warmup_fraction is {warmup}; it is in [0, 1)")


def optimizer_of(config: Config) -> tuple[optax.Schedule, optax.GradientTransformation]:
  """The schedule of learning rates over the steps of training, and the optimizer that follows it.

  Raises:
    ValueError: there is none of that name.
  """
  c = config.optimizer
  schedule = choose("optimizer.schedule", c.schedule, SCHEDULES)(
    c.peak,
    num_steps=config.train.num_steps,
    warmup_steps=round(c.warmup_fraction * config.train.num_steps),
  )
  make = choose("optimizer.name", c.name, OPTIMIZERS)
  return schedule, make(schedule, weight_decay=c.weight_decay, clip_norm=c.clip_norm)


def mesh() -> dict[str, Any]:
  """The section `mesh` of a configuration: devices along each axis of `models.partition`.

  As many rows, parameters and positions are apart; see docs/scale.md. A run may be resumed on
  another mesh.
  """
  return {
    "data": config_dict.placeholder(int),  # all devices that the others leave
    "fsdp": 1,
    "sequence": 1,
    "tensor": 1,
    "optimizer_over_data": False,  # where parameters are copied, what the optimiser keeps is not
  }


def mesh_sizes(config: Config) -> dict[str, int | None]:
  """Devices along each axis, as `config.mesh` has them; without it, all along "data".

  Raises:
    ValueError: there is no such number of devices.
  """
  c = config.get("mesh") or Config(mesh())
  sizes = {axis: c[axis] for axis in partition.AXES}
  for axis, size in sizes.items():
    require(size is None or size >= 1, f"mesh.{axis} is {size}; it is at least 1")
  return sizes


def mesh_of(config: Config) -> jax.sharding.Mesh:
  """The mesh of `config.mesh`, over all devices; ValueError where it does not fill them."""
  return partition.make_mesh(**mesh_sizes(config))


def averaging_of(config: Config) -> state_lib.Averaging:
  """The average of the parameters that training keeps."""
  if config.train.get("average_stds"):
    return averaging.power_average(config.train.average_stds)
  decay = config.train.get("average_decay", 0.0)
  return state_lib.exponential_average(decay) if decay else state_lib.no_average()
