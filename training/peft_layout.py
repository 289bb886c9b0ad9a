"""Adapters as PEFT's directories: `adapter_config.json` and `adapter_model.safetensors`.

What `peft.PeftModel.from_pretrained(base, directory)` loads over a checkpoint that
`models.pretrained.write` wrote, and the way back. Modules are called as `models.families` says.
"""

import json
import os
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..models import families, pretrained, safetensors_files, transformer
from . import lora

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Fields that would change what the tensors mean; they are off.
_OFF = (
  *("use_dora", "use_qalora", "alora_invocation_tokens"),
  *("rank_pattern", "alpha_pattern", "layer_replication"),
)


class Adapted(NamedTuple):
  """What a directory holds."""

  adapters: dict[str, lora.Adapter]
  scale: float  # see `lora.merge`


def write(
  directory: str | os.PathLike,
  config: transformer.TransformerConfig,
  adapters: lora.Adapters,
  *,
  alpha: float,
  rank_stabilised: bool = False,
  family: str | None = None,
  base: str | None = None,
) -> None:
  """Writes adapters of a transformer; the directory appears when it is complete.

  Args:
    directory: a new one, or an empty one.
    config: of the model.
    adapters: of its kernels, stacked or not, or of its readout; all of one rank.
    alpha: of their scale, `lora.usual_scale(alpha, rank)`.
    rank_stabilised: the scale is `lora.rank_stabilised_scale` instead.
    family: as it was written by `pretrained.write`; None is the first that has what the model has.
    base: where the model itself is, for who reads it.

  Raises:
    FileExistsError: the directory has something in it.
    ValueError: no adapters, or of several ranks; an adapter of what PEFT has no module for.
  """
  directory = pathlib.Path(directory).absolute()
  if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
    raise FileExistsError(f"{directory}: there is something in it; write to a new directory.")
  ranks = sorted({adapter.a.shape[-1] for adapter in adapters.values()})
  if len(ranks) != 1:
    raise ValueError(f"The adapters are of ranks {ranks}; PEFT's directory has one rank.")
  name, _ = families.to_json(config, family)
  modules = _modules(families.FAMILIES[name], config)
  by_path = {path: module for module, path in modules.items()}
  apart = _unstacked(adapters)
  for path in apart:
    if path not in by_path:
      raise ValueError(f"{path}: {name} has no module of its own for it; adapt other matrices.")
  adapted = {by_path[path]: adapter for path, adapter in apart.items()}
  fields = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base,
    "bias": "none",
    "fan_in_fan_out": not families.FAMILIES[name].transposed,
    "inference_mode": True,
    "lora_alpha": alpha,
    "lora_dropout": 0.0,
    "r": ranks[0],
    "target_modules": _targets(adapted, modules),
    "use_rslora": rank_stabilised,
  }
  _write(directory, fields, adapted)


def _write(directory, fields, adapted) -> None:
  planned = {}
  for module, (a, b) in adapted.items():
    for letter, x in (("A", a), ("B", b)):
      value = np.asarray(x, np.float32).T
      planned[f"{_PREFIX}{module}.lora_{letter}.weight"] = safetensors_files.Planned(
        value.shape, value.dtype, lambda value=value: value
      )
  beside = directory.parent / f".{directory.name}.partial-{os.getpid()}"
  beside.mkdir(parents=True)
  try:
    total = sum(tensor.num_bytes for tensor in planned.values())
    safetensors_files.write(beside, planned, max_shard_bytes=total)
    (beside / "model.safetensors").rename(beside / _TENSORS)
    (beside / _CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    beside.rename(directory)
  except BaseException:
    shutil.rmtree(beside, ignore_errors=True)
    raise


def read(
  directory: str | os.PathLike,
  config: transformer.TransformerConfig,
  *,
  family: str | None = None,
  stacked: bool = False,
) -> Adapted:
  """The adapters in a directory of PEFT's, float32, and their scale.

  Args:
    directory: of `adapter_config.json` and `adapter_model.safetensors`.
    config: of the model that they are for.
    family: that of the model; None is the first that has what it has.
    stacked: for params whose layers are stacked.

  Raises:
    FileNotFoundError: a file that is not there.
    ValueError: a kind of adapter other than plain LoRA; tensors that do not fit the model; layers
      that have none, if they are to be stacked.
  """
  directory = pathlib.Path(directory)
  fields = safetensors_files.read_json(directory / _CONFIG)
  on = [name for name in _OFF if fields.get(name)]
  if fields.get("peft_type") != "LORA" or on:
    what = ", ".join(on) or f"peft_type={fields.get('peft_type')!r}"
    raise ValueError(f"{directory / _CONFIG}: {what} is not supported, only LORA of one rank.")
  try:
    rank, alpha = int(fields["r"]), float(fields["lora_alpha"])
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{directory / _CONFIG}: r or lora_alpha is no number ({error!r}).") from error
  scale = (lora.rank_stabilised_scale if fields.get("use_rslora") else lora.usual_scale)(
    alpha, rank
  )
  name, _ = families.to_json(config, family)
  modules = _modules(families.FAMILIES[name], config)
  adapters = _read(directory / _TENSORS, modules, pretrained.shapes(config), rank)
  return Adapted(_stacked(adapters, config.num_layers) if stacked else adapters, scale)


def _read(path, modules, shapes, rank) -> dict[str, lora.Adapter]:
  sizes = {lora.path_name(at): leaf.shape for at, leaf in jax.tree.leaves_with_path(shapes)}
  held = safetensors_files.header(path)
  adapters = {}
  for name in held:
    module, _, ending = name.removeprefix(_PREFIX).rpartition(".lora_")
    if module not in modules or ending not in ("A.weight", "B.weight"):
      raise ValueError(f"{path}: {name} is no adapter of a kernel of this model.")
    num_in, num_out = sizes[modules[module]]
    halves = []
    for letter, shape in (("A", (rank, num_in)), ("B", (num_out, rank))):
      other = f"{_PREFIX}{module}.lora_{letter}.weight"
      found = held[other].shape if other in held else None
      if found != shape:
        raise ValueError(f"{path}: {other} is {found}, and {shape} by the configurations.")
      halves.append(jnp.asarray(held[other].mapped().T.astype(np.float32)))
    adapters[modules[module]] = lora.Adapter(*halves)
  return adapters


def _modules(family: families.Family, config: transformer.TransformerConfig) -> dict[str, str]:
  """Paths of unstacked matrices by the modules that hold them, each by itself."""
  found = {}
  for at, _ in jax.tree.leaves_with_path(pretrained.shapes(config)):
    path = lora.path_name(at)
    first, *rest = path.split("/")
    if path.rpartition("/")[2] not in ("kernel", "readout"):
      continue
    layered = first == "layers"
    source = families.source(
      family, "/".join(rest[1:]) if layered else path, int(rest[0]) if layered else None
    )
    if source.parts == 1:
      found[source.name.removesuffix(".weight")] = path
  return found


def _targets(adapted: dict[str, Any], modules: dict[str, str]) -> list[str]:
  """Last names of the modules where these say which, or whole names."""
  last = {module.rpartition(".")[2] for module in adapted}
  same = {module for module in modules if module.rpartition(".")[2] in last}
  return sorted(last if same == set(adapted) else adapted)


def _unstacked(adapters: lora.Adapters) -> dict[str, lora.Adapter]:
  """By the paths of layers that are apart."""
  apart = {}
  for path, (a, b) in adapters.items():
    if jnp.ndim(a) == 2:
      apart[path] = lora.Adapter(a, b)
      continue
    for i in range(a.shape[0]):
      apart[path.replace("layers/", f"layers/{i}/", 1)] = lora.Adapter(a[i], b[i])
  return apart


def _stacked(adapters: dict[str, lora.Adapter], num_layers: int) -> dict[str, lora.Adapter]:
  """The way back."""
  made = {}
  for path in adapters:
    first, _, rest = path.partition("/")
    if first != "layers":
      made[path] = adapters[path]
      continue
    inside = rest.partition("/")[2]
    layers = [adapters.get(f"layers/{i}/{inside}") for i in range(num_layers)]
    if None in layers:
      raise ValueError(f"{inside}: layer {layers.index(None)} has no adapter, so do not stack.")
    made[f"layers/{inside}"] = jax.tree.map(lambda *halves: jnp.stack(halves), *layers)
  return made
