"""A trained model as a directory that other libraries load.

  python -m ancestral.launch.export --workdir=runs/text --output=exported
  python -m ancestral.launch.export --workdir=runs/digits --output=exported --best --dtype=bfloat16

A language model goes to the layout of transformers, with its tokenizer, for AutoModelForCausalLM,
AutoTokenizer and `launch.sample --pretrained`; a DiT or a U-Net to that of diffusers' models.
--layout=flat writes any network as safetensors by the names of its params: see docs/exchange.md.
Beside the weights, ancestral.json has the step and the configuration of the run.
"""

import contextlib
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags

from ..models import base as models
from ..models import diffusers_layout, dit, flat_safetensors, safetensors_files, unet
from ..models import pretrained as directories
from ..sampling import sharded
from ..training import peft_layout
from . import adapters, draws, fields, flags, pretrained, workdirs
from . import experiment as experiment_lib

READS = flags.CHECKPOINT

# (folder, experiment, params, dtype or None): fills the folder, which is there and empty.
Layout = Callable[[pathlib.Path, Any, models.Params, str | None], None]


def _transformers(folder, experiment, params, dtype) -> None:
  tokenizer = experiment.tokenizer
  ends = list(tokenizer.stops) if tokenizer.other_stops else tokenizer.eos
  ids = {"bos_token_id": tokenizer.bos, "eos_token_id": ends, "pad_token_id": tokenizer.pad}
  directories.write(folder, experiment.model_config, params, dtype=dtype, token_ids=ids)
  _write_tokenizer(folder, experiment)
  path = folder / "generation_config.json"  # which has the ids
  most = {"max_new_tokens": experiment.config.evaluation.max_new_tokens}
  _write_json(path, {**safetensors_files.read_json(path), **most})


def _write_tokenizer(folder, experiment) -> None:
  for name, data in experiment.tokenizer.files().items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)


def _diffusers(folder, experiment, params, dtype) -> None:
  config = experiment.network_config
  if not isinstance(config, dit.DiTConfig | unet.UNetConfig):
    raise ValueError("diffusers has no network of points, only of images.")
  diffusers_layout.save(folder, _on_host(params["network"], dtype), config)


def _peft(folder, experiment, trained, dtype) -> None:
  config = experiment.config
  if not adapters.used(config):
    raise ValueError(
      "--layout=peft is for runs that train adapters, and config.lora.rank is unset."
    )
  if dtype is not None:
    raise ValueError("--dtype: adapters are float32.")
  how = {"alpha": config.lora.alpha, "rank_stabilised": config.lora.rank_stabilised}
  base = config.start.get("pretrained")
  peft_layout.write(folder, experiment.model_config, trained, base=base, **how)


def _flat(folder, experiment, params, dtype) -> None:
  record = {"config": fields.to_json(experiment.config)}
  flat_safetensors.write(folder / "model.safetensors", _named(_on_host(params, dtype)), record)
  if hasattr(experiment, "tokenizer"):
    _write_tokenizer(folder, experiment)


def _on_host(params: models.Params, dtype: str | None) -> models.Params:
  cast = lambda x: np.asarray(x, None if dtype is None else jnp.dtype(dtype))
  return jax.tree.map(cast, sharded.to_host(params))


def _named(node: Any) -> Any:
  """With layers by their numbers: a file has only names."""
  if isinstance(node, tuple):
    node = {str(i): inner for i, inner in enumerate(node)}
  return {name: _named(x) for name, x in node.items()} if isinstance(node, Mapping) else node


LAYOUTS: Mapping[str, Layout] = {
  "transformers": _transformers,
  "diffusers": _diffusers,
  "peft": _peft,
  "flat": _flat,
}
# The layouts that a kind of experiment may have, and first, if there is one, that of its stack.
_OF_TEXTS, _OF_IMAGES = ("transformers", "peft", "flat"), ("diffusers", "flat")
KINDS: Mapping[str, Sequence[str]] = {
  "language": _OF_TEXTS,
  "learning": _OF_TEXTS,
  "preferences": _OF_TEXTS,
  "images": _OF_IMAGES,
  "image_learning": _OF_IMAGES,
  "classifier": ("flat",),
  "masked": ("flat",),
}
_LAYOUT = absl_flags.DEFINE_enum(
  "layout", None, list(LAYOUTS), "Whose names and shapes; unset, the stack's that has such models."
)
for _flag in (draws.OUTPUT, pretrained.DTYPE):
  absl_flags.declare_key_flag(_flag.name)


def layout_of(config: fields.Config, wanted: str | None) -> str:
  """The layout of a run's export: that wanted, or its stack's.

  Raises:
    ValueError: its kind has no such layout, or none of another stack.
  """
  kind = config.get("kind", "language")
  known = experiment_lib.kind_of(config, KINDS)
  if wanted is None and known[0] == "flat":
    raise ValueError(f"A {kind} has no counterpart in another library: give --layout=flat.")
  if wanted is not None and wanted not in known:
    raise ValueError(f"--layout={wanted} is not for a {kind} run: there is {', '.join(known)}.")
  return wanted or known[0]


def export(
  folder: pathlib.Path, layout: str, experiment, params: models.Params, step: int, dtype: str | None
) -> None:
  """Writes a directory, which appears when it is complete.

  Args:
    folder: a new one, or an empty one.
    layout: a name of `LAYOUTS`.
    experiment: whose model and tokenizer.
    params: finished; of --layout=peft, adapters.
    step: that they are from.
    dtype: of the tensors; None keeps the params'.

  Raises:
    FileExistsError: the folder has something in it.
    ValueError: the layout has no counterpart of the model.
  """
  check_new(folder)
  with _beside(folder) as made:
    try:
      LAYOUTS[layout](made, experiment, params, dtype)
    except ValueError as error:
      if layout not in ("transformers", "diffusers"):
        raise
      raise ValueError(f"{error} --layout=flat writes it by its own names.") from None
    _write_json(
      made / "ancestral.json", {"step": step, "config": fields.to_json(experiment.config)}
    )


def check_new(folder: pathlib.Path) -> None:
  """Raises FileExistsError where there is something."""
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise FileExistsError(f"--output={folder}: there is something in it; name a new directory.")


@contextlib.contextmanager
def _beside(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """An empty folder, that takes the place of `folder` when all is well."""
  made = folder.parent / f".{folder.name}.exporting-{os.getpid()}"
  made.mkdir()
  try:
    yield made
    made.rename(folder)
  except BaseException:
    shutil.rmtree(made, ignore_errors=True)
    raise


def _write_json(path: pathlib.Path, content: Any) -> None:
  path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def main(_: Sequence[str]) -> None:
  """Exports the checkpoint of --workdir."""
  with flags.one_line_errors():
    wanted = flags.checkpoint()
    flags.required(draws.OUTPUT)
    flags.refuse_others((*pretrained.FLAGS, draws.SEED), (pretrained.DTYPE,))
    folder = draws.output().absolute()
    check_new(folder)
    if jax.process_count() > 1:
      raise ValueError(f"One process exports, and there are {jax.process_count()}.")
    layout = layout_of(workdirs.saved_config(wanted["workdir"]), _LAYOUT.value)
    peft = layout == "peft"  # what is trained, and not merged with its start
    restore = experiment_lib.restore_trained if peft else experiment_lib.restore_params
    experiment, params, step = restore(**wanted)
    export(folder, layout, experiment, params, step, pretrained.DTYPE.value)
  print(f"Step {step}, as {layout}: {draws.OUTPUT.value}", file=sys.stderr)


if __name__ == "__main__":
  flags.run(main, READS)
