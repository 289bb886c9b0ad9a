"""Samples from a trained model, verified where its task can.

  python -m ancestral.launch.sample --workdir=runs/arithmetic --prompt=12+345= --num_samples=4
  python -m ancestral.launch.sample --workdir=runs/arithmetic --num_problems=5
  python -m ancestral.launch.sample --workdir=runs/text --prompts=prompts.txt --output=out.jsonl
  generate_prompts | python -m ancestral.launch.sample --workdir=runs/text --prompts=-

What may be asked for, and what is written, depends on the kind of experiment:
"""

from collections.abc import Sequence

import jax
from absl import flags as absl_flags

from . import draws, flags, pictures, texts, workdirs
from . import experiment as experiment_lib

READS = flags.CHECKPOINT
# Each has FLAGS, those that it reads, and run(wanted), what is wanted as `flags.checkpoint` has it.
KINDS = {
  "language": texts,
  "images": pictures,
  "image_learning": pictures,
  "learning": texts,
  "preferences": texts,
}

_docs = dict.fromkeys(kind.__doc__ for kind in KINDS.values())
__doc__ = "\n".join([__doc__, *_docs])  # for --help
for _module in (draws, *KINDS.values()):
  absl_flags.adopt_module_key_flags(_module)


def main(_: Sequence[str]) -> None:
  """Samples from the checkpoint of --workdir, as its kind of experiment does."""
  with flags.one_line_errors():
    wanted = flags.checkpoint()
    kind = experiment_lib.kind_of(workdirs.saved_config(wanted["workdir"]), KINDS)
    flags.refuse_others([flag for kind in KINDS.values() for flag in kind.FLAGS], kind.FLAGS)
  with jax.set_mesh(wanted["mesh"]):
    kind.run(wanted)


if __name__ == "__main__":
  flags.run(main, READS)
