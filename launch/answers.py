"""How good a trained language model is: a table and a record of verified answers, or a loss."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import rich.console
import rich.table

from ..evaluation import attempts as attempts_lib
from ..models import base as models
from . import held_out, language, report

FLAGS = ()


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


def evaluate(
  experiment: language.Experiment,
  params: models.Params,
  workdir: str,
  console: rich.console.Console,
) -> dict[str, Any]:
  """Verified answers by level, or held-out loss of text: printed, and as JSON.

  Args:
    experiment: whose held-out examples.
    params: finished.
    workdir: of the run, where nothing is written here.
    console: where the table goes.
  """
  c = experiment.config
  if experiment.task is None:
    loss = held_out.mean_loss(experiment)(params)
    console.print(f"Held-out loss {loss:.4f} nats per token ({loss / math.log(2):.4f} bits).")
    return {"loss": loss}
  attempt = language.verified(experiment, num_samples=c.evaluation.num_samples)
  attempts = attempt(params, jax.random.key(c.seed))
  console.print(table(attempts))
  return record(attempts)
