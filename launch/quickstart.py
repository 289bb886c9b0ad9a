"""The loop in a few minutes on a CPU: train, sample, verify, select, learn; then images.

  python -m ancestral.launch.quickstart --workdir=runs/quickstart

Trains a 0.8M-parameter transformer on sums written with their digits reversed, and stops early.
Then it learns twice from its own samples: asked 4,096 sums, it answers each 8 times, a verifier
says which answers are right, and it imitates a right one to each (RAFT); no answer but its own is
read. Held-out sums before and after say what that was worth. Then trains a 0.3M-parameter diffusion
model of handwritten digits, and sets 10 evaluations by a fast solver beside 100 by DDIM. All is
written to WORKDIR/report.html. No data are downloaded. Called again, it goes on where it stopped,
or reports once more.
"""

import importlib.util
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
import rich.console
from absl import flags as absl_flags

from ..configs import arithmetic, image_diffusion, policy
from ..evaluation import attempts as attempts_lib
from ..tasks import images as image_tasks
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
  report,
  rollouts,
  solving,
  train,
)
from . import experiment as experiment_lib

READS = (flags.WORKDIR,)
_STEPS = absl_flags.DEFINE_integer(
  "num_steps", None, "Steps of training; those of the configs if unset."
)

# A solver, and the number of its evaluations.
SAMPLERS = (("dpmpp_2m", 10), ("ddim", 100))


class Configs(NamedTuple):
  """The experiments."""

  sums: fields.Config  # configs/arithmetic.py, tiny, stopped early
  learning: fields.Config  # configs/policy.py, raft: two rounds
  digits: fields.Config  # configs/image_diffusion.py, digits


def configs(workdir: str) -> Configs:
  """The experiments, in minutes; `learning` begins with the sums of `workdir`."""
  made = Configs(
    arithmetic.get_config("tiny"), policy.get_config("raft"), image_diffusion.get_config("digits")
  )
  for config in made:
    config.unlock()
  made.sums.train.update(num_steps=120, evaluate_every=40)
  made.learning.start.workdir = workdir
  made.learning.rollouts.update(group_size=8, batch_size=2048)
  made.learning.optimizer.update(name="muon", peak=1e-3)
  made.learning.train.update(
    num_steps=2, batch_size=4096, num_minibatches=32, num_epochs=4, evaluate_every=1, save_every=1
  )
  made.digits.train.num_steps = 800  # a minute
  if _STEPS.value is not None:
    made.sums.train.num_steps = made.digits.train.num_steps = _STEPS.value
  for config in made:
    config.lock()
  return made


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


def answered(
  experiment: language.Experiment, state: state_lib.TrainState, console: rich.console.Console
) -> list[attempts_lib.Attempt]:
  """Verified answers to held-out sums, and their table."""
  num_samples = experiment.config.evaluation.num_samples
  console.print(f"Sampling {num_samples} answers to each held-out problem")
  attempt = language.verified(experiment, num_samples=num_samples)
  params = language.finished(averaging.used(state))
  attempts = attempt(params, jax.random.key(experiment.config.seed))
  console.print(answers.table(attempts))
  return attempts


def sums(
  of_sums: fields.Config, of_learning: fields.Config, workdir: str, console: rich.console.Console
) -> dict[str, str]:
  """Trains a weak model, lets it learn from its own answers, evaluates both; sections."""
  what = f"{of_sums.task.name}, {of_sums.task.style} digits"
  experiment, state = _trained(of_sums, workdir, console, what)
  weak = answered(experiment, state, console)
  evaluate.write(workdir, {"step": int(state.step), **answers.record(weak)})
  learned_workdir = f"{workdir}/learned"
  what = "its own verified answers"
  experiment, state = _trained(of_learning, learned_workdir, console, what)
  learned = answered(experiment, state, console)
  result = {"step": int(state.step), **answers.record(learned)}
  evaluate.write(learned_workdir, result)
  page = rollouts.write(pathlib.Path(learned_workdir), 2)
  before, after = (np.mean([a.num_correct / len(a.verdicts) for a in x]) for x in (weak, learned))
  console.print(f"pass@1 on held-out sums: {before:.3f} weak, {after:.3f} after learning")
  console.print(f"What it learned from: {page}", soft_wrap=True)
  return {
    "Sums: held-out problems, by number of digits, before": report.scores(
      attempts_lib.summarise(weak)
    ),
    "Sums: the same after two rounds of its own verified answers": report.scores(
      attempts_lib.summarise(learned)
    ),
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
      f"Digits: {name}": report.picture(image_tasks.grid(x[first], columns=6), "digits")
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
  made = configs(workdir)
  try:
    sections = sums(made.sums, made.learning, workdir, console)
    sections |= digits(made.digits, f"{workdir}/digits", console)
  except (loop.Interrupted, KeyboardInterrupt) as stop:
    train.interrupted(workdir, stop)
  title = "A transformer learns to add from its own answers, a diffusion model to draw digits"
  path = report.write(pathlib.Path(workdir) / "report.html", title, sections)
  console.print(f"Report: {path.resolve()}", soft_wrap=True)


if __name__ == "__main__":
  flags.run(main, READS)
