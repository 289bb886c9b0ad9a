"""How good a trained model is: verified answers by level, or held-out loss of text.

  python -m ancestral.launch.evaluate --workdir=runs/arithmetic
  python -m ancestral.launch.evaluate --workdir=runs/arithmetic --config=configs/arithmetic.py \\
      --config.evaluation.num_samples=64

Prints a table, and writes it with every answer and its verdict to WORKDIR/evaluation.json.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import rich.console

from . import answers, distances, filled_answers, flags, preferences, processes
from . import experiment as experiment_lib

READS = (*flags.CHECKPOINT, *processes.FLAGS)
# Each has FLAGS, those that it reads, and evaluate(experiment, params, workdir, console), which
# prints, and returns JSON.
KINDS = {
  "language": answers,
  "images": distances,
  "image_learning": distances,
  "learning": answers,
  "masked": filled_answers,
  "preferences": preferences,
}


def write(workdir: str, result: dict[str, Any]) -> pathlib.Path:
  """Writes WORKDIR/evaluation.json."""
  path = pathlib.Path(workdir) / "evaluation.json"
  path.write_text(json.dumps(result, indent=1))
  return path


def main(_: Sequence[str]) -> None:
  """Evaluates the checkpoint of --workdir."""
  with flags.one_line_errors():
    processes.start()
    wanted = flags.checkpoint()
    experiment, params, step = experiment_lib.restore_params(**wanted)
    kind = experiment_lib.kind_of(experiment.config, KINDS)
    flags.refuse_others([flag for kind in KINDS.values() for flag in kind.FLAGS], kind.FLAGS)
  first = jax.process_index() == 0  # the others only compute
  console = rich.console.Console(highlight=False, quiet=not first)
  with jax.set_mesh(wanted["mesh"]):
    result = kind.evaluate(experiment, params, wanted["workdir"], console)
  if first:
    path = write(wanted["workdir"], {"step": step, **result})
    console.print(f"Step {step}; written to {path}", markup=False, soft_wrap=True)


if __name__ == "__main__":
  flags.run(main, READS)
