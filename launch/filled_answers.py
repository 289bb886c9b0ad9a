"""How good a trained masked model is: verified answers of what it fills in, or a bound of its loss.

python -m ancestral.launch.evaluate --workdir=runs/sudoku --sampler=ordered --order=margin
"""

import functools
import math
from typing import Any

import jax
import rich.console

from ..models import base as models
from ..sampling import logits
from . import answers, flags, held_out, masked, unmasking

FLAGS = unmasking.FLAGS


def evaluate(
  experiment: masked.Experiment,
  params: models.Params,
  workdir: str,
  console: rich.console.Console,
) -> dict[str, Any]:
  """Verified answers by level, of each pattern of blanks apart, or the bound of held-out texts.

  Args:
    experiment: whose held-out examples.
    params: finished.
    workdir: of the run, where nothing is written here.
    console: where tables go.
  """
  del workdir
  c = experiment.config
  with flags.one_line_errors():
    if experiment.task is None:
      flags.refuse_others(FLAGS, ())  # a bound needs no sampler
    chosen = unmasking.chosen(c)
  if experiment.task is None:
    loss = held_out.mean_loss(experiment)(params)
    console.print(f"Held-out loss <= {loss:.4f} nats per token ({loss / math.log(2):.4f} bits).")
    return {"loss": loss}
  fill = masked.filler(experiment, logits.temperature, chosen)
  verify = functools.partial(_verified, params, fill, c.evaluation.num_samples)
  if not c.task.get("blanks"):
    return _told(verify(experiment), console, None, chosen)
  found = {}
  for pattern in c.task.blanks:
    config = c.copy_and_resolve_references()
    config.task.blanks = (pattern,)
    one = experiment._replace(config=config, task=masked.task_of(config))
    found[pattern] = _told(verify(one), console, pattern, chosen)
  return {"blanks": found}


def _verified(params, fill, num_samples, experiment):
  attempt = masked.verified(experiment, fill, num_samples=num_samples)
  return attempt(params, jax.random.key(experiment.config.seed))


def _told(attempts, console, pattern, chosen):
  table = answers.table(attempts)
  if pattern is not None:
    table.title = f"{table.title}, blanks: {pattern}"
  console.print(table)
  return {**answers.record(attempts), "unmasking": chosen.to_dict()}
