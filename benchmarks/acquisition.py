"""Active diffusion subsampling: what chosen measurements are worth, beside exact greedy choices.

  python -m ancestral.benchmarks.acquisition                   # exact posteriors: two minutes
  python -m ancestral.launch.train --config=configs/image_diffusion.py --workdir=runs/dit \\
      --seeds=0,1,2
  python -m ancestral.benchmarks.acquisition --run=runs/dit --kinds=pixels --budgets=6,16 \\
      --objects=40                                             # a trained model: five minutes

First a Gaussian with the digits' covariance, where posteriors, and so the greedy choices, are
exact: what the choice by particles costs. Then digits that were held out, measured in the course of
one reverse diffusion: by the exact denoiser of a kernel density of the others, and by a trained
model with PiGDM. Errors are of the particles' mean, "at once" those of the diffusion that measured,
"again" those of a second one, given all measurements from its start. Intervals are of 95%, by
resampling images (or seeds).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from ancestral.benchmarks import exact_targets, image_runs
from ancestral.evaluation import coverage
from ancestral.models import base as models
from ancestral.models import precondition, schedules
from ancestral.sampling import acquisition, ancestral, base, grids, guidance, solvers, tables

_IMAGES = flags.DEFINE_integer("objects", 60, "Held-out images to measure.")
_PARTICLES = flags.DEFINE_integer("particles", 16, "Of each image.")
_STEPS = flags.DEFINE_integer("steps", 30, "Evaluations of one diffusion.")
_KINDS = flags.DEFINE_list("kinds", "pixels,lines", "What is measured at a time.")
_BUDGETS = flags.DEFINE_list("budgets", "3,6,10,16", "Pixels to measure.")

STD = 0.05  # of the measurements
BUDGETS = (3, 6, 10, 16)  # pixels of 64
LINES = (1, 2, 4)  # of 8
ENTROPY_STD = 0.3
RULES = "entropy, s = .3", "variance", "fixed: most prior variance", "random"
NOISIEST = 20.0
MEASURED_AT = 10.0, 0.3  # noise levels between which one diffusion measures
VE = schedules.variance_exploding(NOISIEST)


def shown(values: np.ndarray) -> str:
  """The mean, and its interval by resampling."""
  low, high = coverage.bootstrap_interval(np.random.default_rng(0), values)
  return f"{np.mean(values):.3f} ({low:.3f} to {high:.3f})"


def reduced(covariance: np.ndarray, c: int) -> np.ndarray:
  """The covariance after measuring entry c."""
  column = covariance[:, c]
  return covariance - np.outer(column, column) / (column[c] + STD**2)


def left(covariance: np.ndarray, pick: Callable[[np.ndarray, np.ndarray], int]) -> list[float]:
  """Root mean square errors after each of BUDGETS measurements, closed form."""
  done, found = np.zeros(len(covariance), bool), []
  for count in range(1, BUDGETS[-1] + 1):
    c = pick(covariance, done)
    done[c] = True
    covariance = reduced(covariance, c)
    if count in BUDGETS:
      found.append(float(np.sqrt(np.trace(covariance) / len(covariance))))
  return found


def of_error(covariance: np.ndarray, done: np.ndarray) -> int:
  """The entry that leaves the least total variance."""
  gain = np.sum(covariance**2, axis=0) / (np.diag(covariance) + STD**2)
  return int(np.argmax(np.where(done, -np.inf, gain)))


def of_particles(rng, rule, num: int):
  """What a rule chooses, seeing samples of the Gaussian posterior."""

  def pick(covariance, done):
    x = rng.multivariate_normal(np.zeros(len(done)), covariance, num, method="eigh")
    return int(acquisition.choose(rule(jnp.asarray(x, jnp.float32)), jnp.asarray(done)))

  return pick


def gaussian(points: np.ndarray, seeds: int = 10) -> None:
  """Prints the errors that each rule leaves, of a Gaussian with the covariance of the points."""
  covariance = np.cov(points.T) + exact_targets.KERNEL**2 * np.eye(points.shape[1])
  print("\n### Gaussian of the digits' covariance: root mean square error, closed form\n")
  print("| rule | " + " | ".join(f"{b} pixels" for b in BUDGETS) + " |\n" + "|---" * 5 + "|")
  variances = np.diag(covariance)
  exact = {
    "least error left": of_error,
    "greedy entropy": lambda cov, done: int(np.argmax(np.where(done, -1, np.diag(cov)))),
    "fixed: most prior variance": lambda cov, done: int(np.argmax(np.where(done, -1, variances))),
  }
  for name, pick in exact.items():
    cells = left(covariance, pick)
    print(f"| {name}, exact | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
  entropies = {
    f"entropy, s = {s}": jax.jit(functools.partial(acquisition.entropy, std=s))
    for s in (STD, 0.3, 1.0)
  }
  for num in (16, 64, 256):
    for name, rule in {**entropies, "variance": jax.jit(acquisition.variance)}.items():
      runs = [
        left(covariance, of_particles(np.random.default_rng(seed), rule, num))
        for seed in range(seeds)
      ]
      cells = map(shown, np.array(runs).T)
      print(f"| {name}, {num} particles | " + " | ".join(cells) + " |", flush=True)
  runs = []
  for seed in range(seeds):
    order = np.random.default_rng(seed).random(len(covariance))
    runs.append(left(covariance, lambda c, done, order=order: np.argmax(np.where(done, -1, order))))
  print("| random | " + " | ".join(map(shown, np.array(runs).T)) + " |", flush=True)


def exact_guide(points: jax.Array, candidates: acquisition.Candidates) -> acquisition.Guide:
  """E[x_0 | x_t, y] of the kernel density of points [K, D], where x_t = x_0 + sigma z.

  Of a pixel, x_t and y are one observation whose precision is the sum of theirs.
  """
  v = exact_targets.KERNEL**2

  def guide(measured, y):
    seen = jnp.broadcast_to(measured[:, None], y.shape).astype(y.dtype)

    def denoise(x, t):
      flat = x.reshape(x.shape[0], -1)
      mask, known = (
        acquisition.placed(candidates, a, x).reshape(1, -1) / STD**2 for a in (seen, y)
      )
      noise = 1 / jnp.square(precondition.coefficients(VE, flat, t)[1])
      precision = noise + mask
      observed = (noise * flat + known) / precision
      weight = 1 / (v + 1 / precision)
      product = functools.partial(jnp.matmul, precision="highest")
      log_share = product(weight * observed, points.T) - product(weight, jnp.square(points.T)) / 2
      mean = product(jax.nn.softmax(log_share, axis=-1), points)
      return (mean + v * weight * (observed - mean)).reshape(x.shape)

    return denoise

  return guide


def trained_guide(experiment, candidates: acquisition.Candidates) -> Callable:
  """Params -> PiGDM of what is measured, by the model, which is not told a class."""
  num_classes = experiment.examples.num_classes
  data_std = experiment.config.diffusion.sigma_data

  def guide_of(params):
    told = lambda x: models.Condition(jnp.full(x.shape[0], num_classes))
    denoise = lambda x, t: experiment.model(params, x, t, told(x))

    def guide(measured, y):
      x = jax.ShapeDtypeStruct((1, 8, 8, 1), y.dtype)
      seen = jnp.broadcast_to(measured[:, None], y.shape).astype(y.dtype)
      mask, known = (acquisition.placed(candidates, a, x).reshape(-1) for a in (seen, y))
      return guidance.pigdm(denoise, jnp.diag(mask), known[None], STD, VE, data_std=data_std)

    return guide

  return guide_of


def table_of() -> tables.SolverTable:
  """Of the ancestral sampler, which forgets what a particle was before a measurement."""
  times = grids.karras(VE, _STEPS.value - 1, start=NOISIEST, end=0.02)
  return ancestral.ddpm(VE, grids.to_zero(times))


def rows_of(table: tables.SolverTable, num: int) -> np.ndarray:
  """Rows to measure after, evenly between the noise levels of MEASURED_AT."""
  inside = np.flatnonzero((table.times <= MEASURED_AT[0]) & (table.times >= MEASURED_AT[1]))
  return np.round(np.linspace(inside[0], inside[-1], num)).astype(int)


def rule_of(which: jax.Array, values: jax.Array) -> acquisition.Rule:
  """The rule of number `which` of RULES; values [2, C] are of the fixed and the random mask."""

  def rule(particles):
    adaptive = acquisition.entropy(particles, ENTROPY_STD), acquisition.variance(particles)
    return jnp.stack([*adaptive, *values])[which]

  return rule


@functools.partial(jax.jit, static_argnames=("guide_of", "candidates", "num"))
def measured(params, images, keys, which, values, *, guide_of, candidates, num):
  """Errors of each image [I, 8, 8, 1]: of the diffusion that measured, and of another after it.

  Args:
    params: of the guide.
    images: the objects.
    keys: [I, 2], of the measurements' noise and of the particles.
    which: of RULES.
    values: [I, 2, C], see `rule_of`.
    guide_of: params -> Guide.
    candidates: pixels or lines.
    num: of measurements.
  """
  table, guide = table_of(), guide_of(params)

  def one(image, keys, values):
    noisy = image[None] + STD * jax.random.normal(keys[0], (1, *image.shape))
    y = candidates(noisy)[0]
    first, second = jnp.split(base.row_keys(keys[1], jnp.arange(2 * _PARTICLES.value)), 2)
    x = jnp.zeros((_PARTICLES.value, *image.shape))
    at, rule = rows_of(table, num), rule_of(which, values)
    found = acquisition.subsample(first, guide, table, lambda c: y[c], candidates, rule, x, at=at)
    again = solvers.sample(second, guide(found.measured, found.y), table, x)
    seen = jnp.broadcast_to(found.measured[:, None], y.shape).astype(x.dtype)
    hidden = 1 - acquisition.placed(candidates, seen, x)[0]
    error = lambda x: jnp.sum(jnp.abs(jnp.mean(x, axis=0) - image) * hidden) / jnp.sum(hidden)
    return error(found.x), error(again)

  return jax.lax.map(lambda args: one(*args), (images, keys, values), batch_size=10)


def objects(name, runs, guide_of, candidates, budgets, images, spread) -> None:
  """Prints the errors of each rule.

  Args:
    name: of the guide.
    runs: parameters, of one or several, over which an image's error is averaged.
    guide_of: params -> Guide.
    candidates: what is measured.
    budgets: how many of them.
    images: [I, 8, 8, 1].
    spread: prior variances, [8, 8, 1].
  """
  keys = jax.random.split(jax.random.key(1), (len(images), 2))
  fixed = np.asarray(candidates(jnp.asarray(spread)[None])).sum(axis=(0, 2))
  random = np.random.default_rng(2).random((len(images), fixed.size))
  values = jnp.asarray(np.stack([np.broadcast_to(fixed, random.shape), random], axis=1))
  print(f"\n### {name}, {candidates.__name__}: mean absolute error of what is not measured\n")
  print("| rule | " + " | ".join(f"{b}, at once | again" for b in budgets) + " |")
  print("|---" * (1 + 2 * len(budgets)) + "|")
  errors = np.zeros((len(RULES), 2 * len(budgets), len(images)))
  for which, label in enumerate(RULES):
    for i, num in enumerate(budgets):
      call = functools.partial(measured, guide_of=guide_of, candidates=candidates, num=num)
      found = [call(params, images, keys, jnp.int32(which), values) for params in runs]
      errors[which, 2 * i : 2 * i + 2] = np.mean(found, axis=0)
    print(f"| {label} | " + " | ".join(map(shown, errors[which])) + " |", flush=True)
  for which in (1, 2):
    gain = map(shown, errors[0] - errors[which])
    print(f"| entropy less {RULES[which]}, same image | " + " | ".join(gain) + " |", flush=True)


def main(_) -> None:
  """Prints the tables."""
  points, images = exact_targets.split_digits()
  if flags.FLAGS.run:
    runs = image_runs.load()
    experiment = runs[0].experiment
    points, images = experiment.examples.train.reshape(-1, 64), experiment.examples.test
  else:
    gaussian(points)
  images = jnp.asarray(np.reshape(images[: _IMAGES.value], (-1, 8, 8, 1)), jnp.float32)
  spread = np.var(points, axis=0).reshape(8, 8, 1)
  for kind in _KINDS.value:
    candidates = getattr(acquisition, kind)
    budgets = [int(b) for b in _BUDGETS.value] if kind == "pixels" else LINES
    if flags.FLAGS.run:
      params = [run.params for run in runs]
      guide_of = trained_guide(experiment, candidates)
      objects("Trained model", params, guide_of, candidates, budgets, images, spread)
    guide_of = functools.partial(exact_guide, candidates=candidates)
    law = [jnp.asarray(points, jnp.float32)]
    objects("Exact denoiser", law, guide_of, candidates, budgets, images, spread)


if __name__ == "__main__":
  app.run(main)
