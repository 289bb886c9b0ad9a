"""DualFast, Time-Shift and the analytic first step: on exact denoisers, and on trained networks.

    python -m ancestral.benchmarks.corrections                        # exact denoisers, a minute
    python -m ancestral.launch.train --config=configs/image_diffusion.py --workdir=runs/dit \\
        --seeds=0,1,2
    python -m ancestral.benchmarks.corrections --run=runs/dit         # trained ones, minutes a seed

DualFast and Time-Shift correct errors of the network, so on an exact denoiser they have nothing to
correct: there the distance is to the solution of the equation (RMS), and should not fall. Of the
trained ones it is Frechet's, of the features of a classifier, to real images of the same classes.
Numbers of evaluations are of the network, those of the analytic first step too: it takes one step
more.
"""  # fmt: skip

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from absl import app, flags

from ancestral.benchmarks import exact_targets, image_runs
from ancestral.models import schedules, toy
from ancestral.sampling import ancestral, expansions, forms, grids, multistep, time_shift

_NFE = flags.DEFINE_list("nfe", "5,8,10", "Numbers of evaluations.")
_ROWS = flags.DEFINE_integer("rows", 256, "Samples of the exact denoisers.")

VE = schedules.variance_exploding()
SOLVERS = {
  "ddim": ancestral.ddim,
  "dpmpp_2m": multistep.dpmpp_2m,
  "deis_3": functools.partial(multistep.deis, order=3, variable=forms.log_snr),
}
STRENGTHS = (-0.1, 0.1, 0.2, 0.5, 1.0)
WINDOW = 0.2  # of lambda
CUTOFF = 2.0  # of sigma, for the rule without the data's variance


class Data(NamedTuple):
  """What the corrections are told of the data."""

  mean: np.ndarray  # [...]
  std: float  # about the mean
  variance: float  # of a sample's elements about their own mean


def of_data(points: np.ndarray, noise: float = 0.0) -> Data:
  """Of points [N, ...] with noise of this variance added."""
  mean, flat = points.mean(0), points.reshape(len(points), -1)
  std = np.sqrt(np.mean((points - mean) ** 2) + noise)
  return Data(mean, float(std), float(flat.var(1).mean() + noise))


class Correction(NamedTuple):
  """A solver's table changed, or the denoiser it is run on."""

  name: str
  change: Callable = lambda table, schedule, data: table
  extra: int = 0  # rows that the table may have besides
  shift: Callable | None = None  # (denoise, schedule, times, data variance) -> denoise
  centred: bool = False


def shifts(kind: Callable, data: bool = True) -> Callable:
  """Time-Shift of one kind, around the data's variance or, above the cut-off, without it."""
  cutoff = 0.0 if data else CUTOFF

  def shift(denoise, schedule, times, variance):
    where = (schedule,) if kind is time_shift.shifted_label else (schedule, times)
    return kind(denoise, *where, WINDOW, cutoff, data_variance=variance * data)

  return shift


def _dualfast(strength):
  return lambda table, schedule, data: expansions.dualfast(table, schedule, strength)


def _first(known):
  return lambda table, schedule, data: expansions.analytic_first_step(
    table, schedule, data.std if known else 0.0
  )


CORRECTIONS = [
  Correction("none"),
  *(Correction(f"DualFast, c = {c:g}", _dualfast(c)) for c in STRENGTHS),
  Correction("first step analytic, e = x / sigma", _first(False), extra=1),
  Correction("first step analytic, mean and deviation", _first(True), extra=1, centred=True),
  Correction(
    "Time-Shift, paper's rule, no data variance", shift=shifts(time_shift.shifted_source, False)
  ),
  Correction("Time-Shift, paper's rule", shift=shifts(time_shift.shifted_source)),
  Correction("Time-Shift, code's rule", shift=shifts(time_shift.shifted_target)),
  Correction("Time-Shift, label alone", shift=shifts(time_shift.shifted_label)),
]


# Exact denoisers.


def exact(target: exact_targets.Target, evaluations: list[int], num_rows: int) -> None:
  """Prints RMS distances to the equation's solution: a row a correction, by solver and number."""
  dim = target.means.shape[1]
  x = 80 * np.random.default_rng(0).normal(size=(num_rows, dim))
  truth = exact_targets.solution(target, VE, x)
  spread = float(target.weights @ target.variances)
  data = (
    of_data(np.repeat(target.means, np.round(100 * target.weights).astype(int), 0), spread)
    if dim == 2
    else of_data(target.means, spread)
  )
  print(f"\n{target.name}, exact: RMS distance to the solution")
  heads = [f"{name} {n}" for name in SOLVERS for n in evaluations]
  print("| correction | " + " | ".join(heads) + " |\n" + "|---" * (len(heads) + 1) + "|")
  for correction in CORRECTIONS:
    if correction.shift and dim < 10:
      continue  # two elements say nothing of a variance
    cells = [
      f"{exact_targets.rms(_exact_samples(target, make, n, correction, data, x) - truth):.4f}"
      for make in SOLVERS.values()
      for n in evaluations
    ]
    print(f"| {correction.name} | " + " | ".join(cells) + " |", flush=True)


def _exact_samples(target, make, evaluations, correction, data, x):
  times = grids.to_zero(grids.karras(VE, evaluations + correction.extra - 1, start=80.0, end=0.01))
  table = correction.change(make(VE, times), VE, data)
  assert table.num_rows == evaluations
  mean = data.mean if correction.centred else 0.0
  denoise = lambda x, t: exact_targets.denoised(target, x + mean, 1.0, t) - mean
  if correction.shift:
    mixture = toy.GaussianMixture(*(jnp.asarray(a, jnp.float32) for a in target[1:]))
    inner = correction.shift(toy.mixture_denoiser(mixture, VE), VE, times, data.variance)
    denoise = lambda x, t: np.asarray(inner(jnp.asarray(x, jnp.float32), jnp.float32(t)))
  scale = table.start[1] / times[0]  # the first point, once the first step is left out
  return exact_targets.applied(table, denoise, scale * (x - mean)) + mean


# Trained denoisers.


def trained(run: image_runs.Run, evaluations: list[int]) -> np.ndarray:
  """Frechet distances of a run, [corrections, solvers, numbers]."""
  schedule, draw = run.experiment.noising, image_runs.sampler(run, max(evaluations))
  data = of_data(np.asarray(run.experiment.examples.train, np.float64))
  kinds = {(correction.shift, correction.centred): correction for correction in CORRECTIONS}
  models = {kind: _model(run, correction) for kind, correction in kinds.items()}  # a program each
  found = np.zeros((len(CORRECTIONS), len(SOLVERS), len(evaluations)))
  for place in np.ndindex(found.shape):
    correction, n = CORRECTIONS[place[0]], evaluations[place[2]]
    plain = image_runs.table(run, [*SOLVERS][place[1]], n + correction.extra)
    table = correction.change(plain, schedule, data)
    assert table.num_rows == n
    times = np.zeros(max(evaluations) + 2, np.float32)
    times[: len(plain.times)] = plain.times
    mean = data.mean if correction.centred else np.zeros_like(data.mean)
    setting = (times, np.float32(data.variance), np.float32(mean))
    samples = draw(table, setting, models[correction.shift, correction.centred]) + mean.astype(
      np.float32
    )
    found[place] = image_runs.frechet(run, samples)
  return found


def _model(run: image_runs.Run, correction: Correction) -> Callable[[Any], Callable]:
  """(times, data variance, mean) -> the model as the correction has it."""
  own, schedule = run.experiment.model, run.experiment.noising

  def make(setting):
    times, variance, mean = setting

    def model(params, x, t, condition=None):
      denoise = lambda x, t: own(params, x, t, condition)
      if correction.shift:
        denoise = correction.shift(denoise, schedule, times, variance)
      if correction.centred:
        denoise = expansions.centred(denoise, schedule, mean)
      return denoise(x, t)

    return model

  return make


def show(found: np.ndarray, evaluations: list[int], floor: float) -> None:
  """Prints distances [runs, corrections, solvers, numbers]: means, and half the range over runs."""
  for s, name in enumerate(SOLVERS):
    print(f"\n| {name} | " + " | ".join(map(str, evaluations)) + " |")
    print("|---" * (len(evaluations) + 1) + "|")
    for correction, by_run in zip(CORRECTIONS, found[:, :, s].swapaxes(0, 1), strict=True):
      cells = [f"{v.mean():.3f} ± {np.ptp(v) / 2:.3f}" for v in by_run.T]
      print(f"| {correction.name} | " + " | ".join(cells) + " |")
  print(f"\nfloor {floor:.4f}; {len(found)} runs; mean ± half the range")


def main(_) -> None:
  """Prints the tables."""
  evaluations = [int(n) for n in _NFE.value]
  if flags.FLAGS.run is None:
    exact(exact_targets.four_modes(), evaluations, _ROWS.value)
    exact(exact_targets.digits(), evaluations, _ROWS.value)
    return
  runs = image_runs.load()
  show(
    np.array([trained(run, evaluations) for run in runs]), evaluations, image_runs.floor(runs[0])
  )


if __name__ == "__main__":
  app.run(main)
