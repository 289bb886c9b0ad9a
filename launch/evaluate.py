"""How good a trained model is: verified answers by level, or held-out loss of text.

  python -m ancestral.launch.evaluate --workdir=runs/arithmetic
  python -m ancestral.launch.evaluate --workdir=runs/arithmetic --config=configs/arithmetic.py \\
      --config.evaluation.num_samples=64

Prints a table, and writes it with every answer and its verdict to WORKDIR/evaluation.json.
"""

import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import rich.console
import rich.table

from ..evaluation import attempts as attempts_lib
from . import experiment as experiment_lib
from . import flags, report

READS = (flags.CONFIG, flags.WORKDIR, flags.LAST, flags.STEP, flags.BEST)


def table(attempts: Sequence[attempts_lib.Attempt]) -> rich.table.Table:
  """pass@1, majority and pass@n by level, each with its 95% interval."""
  columns = attempts_lib.summarise(attempts)
  made = rich.table.Table("level", "n", *columns, title="Verified answers to n new problems")
  for rows in zip(*columns.values(), strict=True):
    made.add_row(str(rows[0].level), str(rows[0].count), *map(report.interval, rows))
  return made


def record(attempts: Sequence[attempts_lib.Attempt]) -> dict[str, Any]:
  """The same as JSON, and every answer with its verdict."""
  return {
    "table": {
      name: [row._asdict() for row in rows]
      for name, rows in attempts_lib.summarise(attempts).items()
    },
    "attempts": [
      {
        "prompt": a.problem.prompt,
        "answer": a.problem.answer,
        "level": a.problem.metadata["level"],
        "responses": [
          {"text": text, "correct": verdict.correct, "reason": verdict.reason}
          for text, verdict in zip(a.responses, a.verdicts, strict=True)
        ],
      }
      for a in attempts
    ],
  }


def write(workdir: str, result: dict[str, Any]) -> pathlib.Path:
  """Writes WORKDIR/evaluation.json."""
  path = pathlib.Path(workdir) / "evaluation.json"
  path.write_text(json.dumps(result, indent=1))
  return path


def main(_: Sequence[str]) -> None:
  """Evaluates the checkpoint of --workdir."""
  with flags.one_line_errors():
    wanted = flags.checkpoint()
    experiment, params, step = experiment_lib.restore_params(**wanted)
    config = experiment.config
    measure = (
      experiment_lib.held_out_loss(experiment)
      if experiment.task is None
      else experiment_lib.verified(experiment, num_samples=config.evaluation.num_samples)
    )
  console = rich.console.Console(highlight=False)
  if experiment.task is None:
    loss = measure(params)
    result = {"loss": loss}
    console.print(f"Held-out loss {loss:.4f} nats per token ({loss / math.log(2):.4f} bits).")
  else:
    attempts = measure(params, jax.random.key(config.seed))
    result = record(attempts)
    console.print(table(attempts))
  path = write(wanted["workdir"], {"step": step, **result})
  console.print(f"Step {step}; written to {path}", markup=False, soft_wrap=True)


if __name__ == "__main__":
  flags.run(main, READS)
