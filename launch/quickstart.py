"""The loop in a few minutes on a CPU: train, sample, verify, report.

  python -m ancestral.launch.quickstart --workdir=runs/quickstart

Trains a 0.8M-parameter transformer from scratch on sums written with their digits reversed, asks it
held-out sums, verifies 16 answers to each, and writes WORKDIR/report.html. No data are downloaded.
Called again, it goes on where it stopped, or reports once more.
"""

import importlib.util
import pathlib
from collections.abc import Sequence

import jax
import rich.console
from absl import flags as absl_flags

from ..configs import arithmetic
from ..evaluation import attempts as attempts_lib
from ..training import averaging, loop
from . import answers, evaluate, fields, flags, language, report, train

READS = (flags.WORKDIR,)
_STEPS = absl_flags.DEFINE_integer("num_steps", None, "Steps of training; the config's if unset.")


def config() -> fields.Config:
  """The experiment: configs/arithmetic.py, variant tiny."""
  made = arithmetic.get_config("tiny")
  if _STEPS.value is not None:
    with made.unlocked():
      made.train.num_steps = _STEPS.value
  return made


def run(config: fields.Config, workdir: str, console: rich.console.Console) -> pathlib.Path:
  """Trains, evaluates and reports; returns where the report is."""
  with flags.one_line_errors():
    opened = train.open_run(config, workdir)
  console.print(
    f"Training on {config.task.name}, {config.task.style} digits, from step "
    f"{int(opened.state.step)} to {config.train.num_steps}: checkpoints in {workdir}"
  )
  state = train.train(opened)
  params = language.finished(averaging.used(state))
  console.print(f"Sampling {config.evaluation.num_samples} answers to each held-out problem")
  attempts = language.verified(opened.experiment, num_samples=config.evaluation.num_samples)(
    params, jax.random.key(config.seed)
  )
  console.print(answers.table(attempts))
  result = {"step": int(state.step), **answers.record(attempts)}
  evaluate.write(workdir, result)
  return report.write(
    pathlib.Path(workdir) / "report.html",
    "A transformer learns to add",
    {
      "Held-out sums, by number of digits": report.scores(attempts_lib.summarise(attempts)),
      "Training": report.figure(report.curves(workdir)),
      "Sampled answers, last digit first, and their verdicts": report.answers(result["attempts"]),
    },
  )


def main(_: Sequence[str]) -> None:
  """Runs it in --workdir."""
  with flags.one_line_errors():
    workdir = flags.required(flags.WORKDIR)
    if importlib.util.find_spec("matplotlib") is None:
      raise ValueError("The report needs matplotlib: pip install 'ancestral[report]'.")
  console = rich.console.Console(highlight=False)
  try:
    path = run(config(), workdir, console)
  except (loop.Interrupted, KeyboardInterrupt) as stop:
    train.interrupted(workdir, stop)
  console.print(f"Report: {path.resolve()}", soft_wrap=True)


if __name__ == "__main__":
  flags.run(main, READS)
