"""Samples from a trained model, verified where its task can.

  python -m ancestral.launch.sample --workdir=runs/arithmetic --prompt=12+345= --num_samples=4
  python -m ancestral.launch.sample --workdir=runs/arithmetic --num_problems=5
  python -m ancestral.launch.sample --workdir=runs/text --prompts=prompts.txt --output=out.jsonl
  generate_prompts | python -m ancestral.launch.sample --workdir=runs/text --prompts=-
  python -m ancestral.launch.sample --pretrained=DIR --chat --prompt="Who are you?"

What may be asked for, and what is written, depends on the kind of experiment:
"""

import functools
from collections.abc import Callable, Sequence

import jax
from absl import flags as absl_flags

from . import draws, fillings, flags, pictures, pretrained, texts, workdirs
from . import experiment as experiment_lib

READS = flags.CHECKPOINT
# Each has FLAGS, those that it reads, and run(wanted), what is wanted as `flags.checkpoint` has it.
KINDS = {
  "language": texts,
  "images": pictures,
  "image_learning": pictures,
  "learning": texts,
  "masked": fillings,
  "preferences": texts,
}

_docs = dict.fromkeys(kind.__doc__ for kind in KINDS.values())
__doc__ = "\n".join([__doc__, *_docs])  # for --help
for _module in (draws, pretrained, *KINDS.values()):
  absl_flags.adopt_module_key_flags(_module)


def main(_: Sequence[str]) -> None:
  """Samples from the checkpoint of --workdir, as its kind does, or from --pretrained."""
  with flags.one_line_errors():
    mesh, run = _of_pretrained() if pretrained.DIRECTORY.value else _of_run()
  with jax.set_mesh(mesh):
    run()


def _of_pretrained() -> tuple[jax.sharding.Mesh, Callable[[], None]]:
  flags.refuse_others(READS, (flags.MESH,))
  _refuse_others((*texts.FLAGS, *pretrained.FLAGS))
  pretrained.check_flags()
  mesh = flags.mesh()
  return mesh, functools.partial(texts.run_pretrained, mesh)


def _of_run() -> tuple[jax.sharding.Mesh, Callable[[], None]]:
  wanted = flags.checkpoint()
  kind = experiment_lib.kind_of(workdirs.saved_config(wanted["workdir"]), KINDS)
  _refuse_others(kind.FLAGS)
  return wanted["mesh"], functools.partial(kind.run, wanted)


def _refuse_others(reads: Sequence[absl_flags.FlagHolder]) -> None:
  every = [flag for module in (pretrained, *KINDS.values()) for flag in module.FLAGS]
  flags.refuse_others(every, reads)


if __name__ == "__main__":
  flags.run(main, READS)
