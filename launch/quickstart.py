"""The loop in a few minutes on a CPU: train, sample, verify, report; first sums, then images.

  python -m ancestral.launch.quickstart --workdir=runs/quickstart

Trains a 0.8M-parameter transformer from scratch on sums written with their digits reversed, asks it
held-out sums and verifies 16 answers to each. Then trains a 0.3M-parameter diffusion model of
handwritten digits, and sets 10 evaluations by a fast solver beside 100 by DDIM. All is written to
WORKDIR/report.html. No data are downloaded. Called again, it goes on where it stopped, or reports
once more.
"""

import importlib.util
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
import rich.console
from absl import flags as absl_flags

from ..configs import arithmetic, image_diffusion
from ..evaluation import attempts as attempts_lib
from ..training import averaging, loop
from ..training import state as state_lib
from . import (
  answers,
  distances,
  evaluate,
  fields,
  flags,
  images,
  language,
  pictures,
  report,
  solving,
  train,
)
from . import experiment as experiment_lib

READS = (flags.WORKDIR,)
_STEPS = absl_flags.DEFINE_integer("num_steps", None, "Steps of training; the configs' if unset.")

# A solver, and the number of its evaluations.
SAMPLERS = (("dpmpp_2m", 10), ("ddim", 100))


def configs() -> tuple[fields.Config, fields.Config]:
  """The experiments: configs/arithmetic.py, tiny, and configs/image_diffusion.py, digits."""
  sums, digits = arithmetic.get_config("tiny"), image_diffusion.get_config("digits")
  with digits.unlocked():
    digits.train.num_steps = 800  # a minute
  for made in (sums, digits):
    if _STEPS.value is not None:
      with made.unlocked():
        made.train.num_steps = _STEPS.value
  return sums, digits


def _trained(
  config: fields.Config, workdir: str, console: rich.console.Console, what: str
) -> tuple[experiment_lib.Experiment, state_lib.TrainState]:
  with flags.one_line_errors():
    opened = train.open_run(config, workdir)
  console.print(
    f"Training on {what}, from step {int(opened.state.step)} to {config.train.num_steps}: "
    f"checkpoints in {workdir}"
  )
  return opened.experiment, train.train(opened)


def sums(config: fields.Config, workdir: str, console: rich.console.Console) -> dict[str, str]:
  """Trains, evaluates; sections of the report."""
  what = f"{config.task.name}, {config.task.style} digits"
  experiment, state = _trained(config, workdir, console, what)
  params = language.finished(averaging.used(state))
  console.print(f"Sampling {config.evaluation.num_samples} answers to each held-out problem")
  attempts = language.verified(experiment, num_samples=config.evaluation.num_samples)(
    params, jax.random.key(config.seed)
  )
  console.print(answers.table(attempts))
  result = {"step": int(state.step), **answers.record(attempts)}
  evaluate.write(workdir, result)
  return {
    "Sums: held-out problems, by number of digits": report.scores(attempts_lib.summarise(attempts)),
    "Sums: training": report.figure(report.curves(workdir)),
    "Sums: sampled answers, last digit first, and their verdicts": report.answers(
      result["attempts"]
    ),
  }


def digits(config: fields.Config, workdir: str, console: rich.console.Console) -> dict[str, str]:
  """Trains, samples in two ways, measures both; sections of the report."""
  experiment, state = _trained(config, workdir, console, "images of handwritten digits")
  params = averaging.used(state)
  features = distances.features_of(config, experiment.examples, f"{workdir}/classifier")
  real = distances.halves(experiment.examples, config.evaluation.num_images)
  (vectors, _), (others, _) = features(real.first), features(real.second)
  found, shown = {}, {"real": real.first}
  for solver, evaluations in SAMPLERS:
    made = solving.table(
      experiment.noising, config.evaluation, solver=solver, evaluations=evaluations
    )
    name = f"{solver}, {evaluations} evaluations"
    console.print(f"Sampling {len(real.labels)} images by {name}")
    shown[name] = images.draw(
      images.sampler(experiment),
      params,
      made,
      jax.random.key(config.seed),
      real.labels,
      chunk=config.evaluation.batch_size,
    )
    found[name] = distances.measured(vectors, features(shown[name])[0])
  found["floor: another real half"] = distances.measured(vectors, others)
  console.print(distances.table(found, f"Distances to real images; features of {features.name}"))
  first = np.concatenate([np.flatnonzero(real.labels == c)[:6] for c in np.unique(real.labels)])
  return {
    "Digits: distances between samples and real images": report.columns(found),
    **{
      f"Digits: {name}": report.picture(pictures.grid(x[first], columns=6), "digits")
      for name, x in shown.items()
    },
    "Digits: training": report.figure(report.curves(workdir)),
  }


def main(_: Sequence[str]) -> None:
  """Runs both in --workdir, and reports."""
  with flags.one_line_errors():
    workdir = flags.required(flags.WORKDIR)
    if importlib.util.find_spec("matplotlib") is None:
      raise ValueError("The report needs matplotlib: pip install 'ancestral[report]'.")
  console = rich.console.Console(highlight=False)
  of_sums, of_digits = configs()
  try:
    sections = sums(of_sums, workdir, console)
    sections |= digits(of_digits, f"{workdir}/digits", console)
  except (loop.Interrupted, KeyboardInterrupt) as stop:
    train.interrupted(workdir, stop)
  title = "A transformer learns to add, a diffusion model to draw digits"
  path = report.write(pathlib.Path(workdir) / "report.html", title, sections)
  console.print(f"Report: {path.resolve()}", soft_wrap=True)


if __name__ == "__main__":
  flags.run(main, READS)
