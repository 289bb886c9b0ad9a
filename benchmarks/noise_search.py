"""Search over noises and paths at equal evaluations: what it finds, and what it costs the law.

  python -m ancestral.launch.train --config=configs/image_diffusion.py --workdir=runs/dit \\
      --seeds=0,1,2
  python -m ancestral.benchmarks.noise_search --run=runs/dit --figure=docs/figures/noise_search.png

First a mixture in the plane, whose score x[0] has a known law: the mean of the largest of n in
closed form, and, since the score does not look at x[1], the law of x[1] given x[0], which an honest
search leaves alone. Then digits: verifier A, a classifier, steers by its log-probability of the
wanted class; B, another of other size and seed, judges; a third gives the features of Frechet's
distance. All three have seen the same training images. The model is not told the class, so that
the search alone has to find it, and is told it in a second table.

Reference: Ma et al. 2025, arXiv 2501.09732.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from scipy import integrate, stats

from ancestral.benchmarks import image_runs
from ancestral.configs import image_classifier
from ancestral.evaluation import distances
from ancestral.launch import classifiers, images, train
from ancestral.launch import distances as launch_distances
from ancestral.launch import experiment as experiment_lib
from ancestral.models import schedules, toy
from ancestral.sampling import base, multistep, noise_search, solvers, tables

_IMAGES = flags.DEFINE_integer("per_run", 50, "Images of each seed of training.")
_DISTANCES = flags.DEFINE_list("distances", "0.4,0.7", "Of neighbours, in zero-order search.")
_NFE = flags.DEFINE_list("nfe", "40,80,160,320", "Evaluations for an image, multiples of 40.")
_TOLD = flags.DEFINE_list(
  "told", "no,yes", "Whether the model is told the class: no, yes, or both."
)
_FIGURE = flags.DEFINE_string("figure", None, "File for the figure.")

STEPS = 10  # evaluations of a sample that is searched for
TITLES = {"no": "class not told", "yes": "class told"}
NEIGHBOURS, FORKS, PER_PATH = 3, 4, 40  # evaluations of a path and its forks

MIXTURE = toy.GaussianMixture(
  jnp.array([0.3, 0.3, 0.2, 0.2]),
  jnp.array([[-1.0, -1.0], [-0.6, 1.0], [0.6, -0.8], [0.8, 0.7]]),
  jnp.array([0.04, 0.09, 0.06, 0.06]),
)


class Sampled(NamedTuple):
  """What a method makes of a budget."""

  method: str
  evaluations: int  # spent for an image
  x: np.ndarray  # [B, ...]


def budgets() -> list[int]:
  """Evaluations for an image."""
  return [int(n) for n in _NFE.value]


def plan(schedule: schedules.Schedule, finer: int = 1) -> noise_search.Plan:
  """Four evaluations down to noise 3, then three rounds of three, each from 1.5 times its level."""

  def at(*ratios):
    position = np.linspace(0, len(ratios) - 1, finer * (len(ratios) - 1) + 1)
    logs = np.interp(position, np.arange(len(ratios)), np.log(np.maximum(ratios, 0.01)))
    times = [float(schedule.time(-log)) for log in logs]
    return times if ratios[-1] else [*times[:-1], 0.0]

  rounds = [at(4.5, 2.7, 1.6, 1.0), at(1.5, 0.87, 0.5, 0.3), at(0.45, 0.15, 0.04, 0.0)]
  return noise_search.plan(schedule, multistep.dpmpp_2m, at(80.0, 30.0, 13.0, 6.0, 3.0), rounds)


def methods(denoise, of, paths: noise_search.Plan, verifier) -> dict:
  """Of each method, (keys, x) -> (samples, evaluations) at every budget, [budgets, B, ...].

  Args:
    denoise: of the model.
    of: noise to sample.
    paths: see `plan`.
    verifier: that steers.
  """
  observe = lambda state, info: (state.x, state.evaluations)

  def rounds(algorithm, width, keys, x):
    made = np.array([(budget // STEPS - 1) // width for budget in budgets()])
    state = base.start(keys, algorithm, x)
    seen = base.run(keys, algorithm, state, int(made[-1]), observe)[1]
    return jax.tree.map(lambda leaf: leaf[made - 1], seen)

  def over_paths(keys, x):
    found = [
      noise_search.over_paths(
        keys, denoise, paths, verifier, x, num_paths=budget // PER_PATH, num_forks=FORKS
      )
      for budget in budgets()
    ]
    return tuple(
      jnp.stack(parts) for parts in zip(*((f.x, f.evaluations) for f in found), strict=True)
    )

  random = functools.partial(rounds, noise_search.random_search(of, verifier), 1)
  near = {
    f"zero order, {l}": functools.partial(
      rounds,
      noise_search.zero_order(of, verifier, width=NEIGHBOURS, distance=float(l)),
      NEIGHBOURS,
    )
    for l in _DISTANCES.value
  }
  return {"best of n": random, **near, "over paths": over_paths}


def read(name: str, found) -> list[Sampled]:
  """A method's samples, budget by budget."""
  return [Sampled(name, int(spent[0]), x) for x, spent in zip(*map(np.asarray, found), strict=True)]


def mixture_cdf(x: np.ndarray) -> np.ndarray:
  """Of x[0]."""
  weights, means, variances = map(np.asarray, MIXTURE)
  return np.sum(weights * stats.norm.cdf(x[..., None], means[:, 0], np.sqrt(variances)), -1)


def largest(n: int) -> float:
  """The mean of the largest x[0] of n draws."""
  positive = integrate.quad(lambda x: 1 - mixture_cdf(np.array(x)) ** n, 0, 4, limit=200)[0]
  return positive - integrate.quad(lambda x: mixture_cdf(np.array(x)) ** n, -4, 0, limit=200)[0]


def conditional_error(x: np.ndarray) -> float:
  """Kolmogorov and Smirnov's distance of F(x[1] | x[0]) from uniform; 0 if the law is kept."""
  weights, means, variances = map(np.asarray, MIXTURE)
  std = np.sqrt(variances)
  share = weights * stats.norm.pdf(x[:, :1], means[:, 0], std)
  share /= share.sum(axis=1, keepdims=True)
  u = np.sum(share * stats.norm.cdf(x[:, 1:], means[:, 1], std), axis=1)
  return float(stats.kstest(u, "uniform").statistic)


def show_mixture(num: int = 4000, finer: int = 6) -> None:
  """The table of the mixture."""
  schedule = schedules.variance_exploding()
  denoise = toy.mixture_denoiser(MIXTURE, schedule)
  times = np.append(np.geomspace(80, 0.02, finer * STEPS), 0.0)
  sample = noise_search.of_table(denoise, multistep.dpmpp_2m(schedule, times))
  keys, x = base.row_keys(jax.random.key(0), jnp.arange(num)), jnp.zeros((num, 2))
  print("| method | evaluations | score | best of n, exact | error of the law of x[1] |")
  print("|---|---|---|---|---|")
  found = [Sampled("one sample", finer * STEPS, np.asarray(sample(base_noise(keys, x))[0]))]
  for name, method in methods(denoise, sample, plan(schedule, finer), lambda x: x[:, 0]).items():
    found += read(name, jax.jit(method)(keys, x))
  for method, spent, drawn in found:
    exact = largest(spent // (finer * STEPS))
    error = conditional_error(drawn)
    print(f"| {method} | {spent} | {interval(drawn[:, 0])} | {exact:.3f} | {error:.3f} |")
  print(f"\n{num} rows; an error below {1.36 / np.sqrt(num):.3f} is noise, at 95%\n", flush=True)


def base_noise(keys, x):
  """Independent N(0, 1) of x's shape."""
  return noise_search.independent(keys, x, 1)[0]


def interval(values: np.ndarray) -> str:
  """Mean and 1.96 standard errors."""
  half = 1.96 * np.std(values, ddof=1) / np.sqrt(len(values))
  return (
    f"{np.mean(values):.3f} ± {half:.3f}" if half > 5e-4 else f"{np.mean(values):.1g} ± {half:.1g}"
  )


def judge(run: image_runs.Run, workdir: str, seed: int, **model: int) -> launch_distances.Features:
  """A classifier of another seed and size, trained in `workdir` if it is not yet."""
  config = image_classifier.get_config()
  with config.unlocked():
    config.seed, config.data = seed, run.experiment.config.data.copy_and_resolve_references()
    config.model.update(model)
  train.train(train.open_run(config, workdir))
  experiment, params, _ = experiment_lib.restore_params(None, workdir)
  raw = launch_distances.Features(experiment.classifier, params, classifiers.name(params))
  vectors, _ = raw(run.experiment.examples.train)
  return raw._replace(scale=float(np.sqrt(np.mean(np.square(vectors)))))


def frechet(real: np.ndarray, vectors: np.ndarray, num_groups: int = 10) -> tuple[float, float]:
  """Frechet's distance of features, and 1.96 standard errors by a jackknife over the samples."""
  groups = np.arange(len(vectors)) % num_groups
  without = [distances.frechet(real, vectors[groups != g]) for g in range(num_groups)]
  error = np.sqrt((num_groups - 1) * np.var(without))
  return distances.frechet(real, vectors), 1.96 * float(error)


def log_probs(judge: launch_distances.Features, x: jax.Array, labels: jax.Array) -> jax.Array:
  """log p(label | image) [B] of x [B, H, W, C]."""
  logits = judge.classifier.apply(judge.params, x)[1]
  return jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]


def programs(run: image_runs.Run) -> dict:
  """Of each method, a jitted (params, keys, labels, condition) -> samples, for all models."""
  experiment, verifier = run.experiment, run.features
  table = image_runs.table(run, "dpmpp_2m", STEPS)
  shape = experiment.examples.train.shape[1:]

  def program(name):
    def call(params, keys, labels, condition):
      classes = experiment.examples.num_classes
      denoise = images.denoiser(experiment.model, params, condition, classes, 1.0)
      of = noise_search.of_table(denoise, table)
      made = methods(
        denoise, of, plan(experiment.noising), lambda x: log_probs(verifier, x, labels)
      )
      return made[name](keys, jnp.zeros((len(labels), *shape)))

    return jax.jit(call)

  names = methods(None, None, None, None)
  return {name: program(name) for name in names}


def more_steps(run: image_runs.Run) -> Callable:
  """A jitted (params, keys, condition, table, rows) -> samples, a program for all tables."""
  experiment = run.experiment

  @jax.jit
  def call(params, keys, condition, table, num_rows):
    classes = experiment.examples.num_classes
    denoise = images.denoiser(experiment.model, params, condition, classes, 1.0)
    x = jnp.zeros((len(condition), *experiment.examples.train.shape[1:]))
    return solvers.sample(keys, denoise, table, x, num_rows=num_rows)

  return call


def of_run(run: image_runs.Run, steps, made, told: bool, labels: np.ndarray) -> list[Sampled]:
  """All that is made of a model, for these labels."""
  labels = jnp.asarray(labels)
  condition = labels if told else jnp.full_like(labels, run.experiment.examples.num_classes)
  keys = base.row_keys(jax.random.key(run.experiment.config.seed), jnp.arange(len(labels)))
  found = []
  for n in (STEPS, *budgets()):
    table = tables.padded(image_runs.table(run, "dpmpp_2m", n), budgets()[-1])
    x = steps(run.params, keys, condition, table, n)
    found.append(Sampled("more steps", n, np.asarray(x)))
  for name, program in made.items():
    found += read(name, program(run.params, keys, labels, condition))
  return found


def measured(runs, steps, made, b, c, told: bool) -> list[tuple]:
  """(method, evaluations, log p by A, by B, found by B, distance) of all runs together."""
  rng = np.random.default_rng(0)
  labels = [rng.permutation(np.arange(_IMAGES.value) % 10) for _ in runs]
  wanted = jnp.asarray(np.concatenate(labels))
  real = c(runs[0].real.first)[0]
  rows = []
  every = (of_run(run, steps, made, told, own) for run, own in zip(runs, labels, strict=True))
  for parts in zip(*every, strict=True):
    x = np.concatenate([part.x for part in parts])
    by_a, by_b = (np.asarray(log_probs(j, x, wanted)) for j in (runs[0].features, b))
    vectors, right = c(x)[0], b(x)[1] == np.asarray(wanted)
    rows.append((*parts[0][:2], by_a, by_b, right, frechet(real, vectors)))
  return rows


def show(rows, title: str) -> None:
  """A table, a row a method and a budget."""
  print(f"{title}\n\n| method | evaluations | log p by A | by B | A - B | found by B | Frechet |")
  print("|---" * 7 + "|")
  for method, spent, by_a, by_b, right, distance in rows:
    cells = map(interval, (by_a, by_b, by_a - by_b, right))
    print(f"| {method} | {spent} | " + " | ".join(cells) + " | {:.3f} ± {:.3f} |".format(*distance))
  print(flush=True)


def show_real(runs, b, c) -> None:
  """The same figures of real images, held out and not."""
  examples, num = runs[0].experiment.examples, _IMAGES.value * len(runs)
  for name, x, labels in (
    ("held-out images", examples.test, examples.test_labels),
    ("training images", runs[0].real.second[:num], runs[0].real.labels[:num]),
  ):
    wanted = jnp.asarray(labels)
    by_a, by_b = (np.asarray(log_probs(j, x, wanted)) for j in (runs[0].features, b))
    distance = frechet(c(runs[0].real.first)[0], c(x)[0])
    cells = " | ".join(map(interval, (by_a, by_b, by_a - by_b, b(x)[1] == labels)))
    print(f"| {name} ({len(x)}) | | {cells} | {distance[0]:.3f} ± {distance[1]:.3f} |")
  print(flush=True)


def plot(path: str, found: dict[str, list[tuple]]) -> None:
  """Log-probabilities by both verifiers, and the distance, against evaluations."""
  from matplotlib import figure

  ticks = (STEPS, *budgets())
  made = figure.Figure(figsize=(11, 3 * len(found)))
  for axes, (title, rows) in zip(
    made.subplots(len(found), 3, squeeze=False), found.items(), strict=True
  ):
    names = dict.fromkeys(row[0] for row in rows)
    panels = ((lambda r: -r[2].mean(), "-log p by A"), (lambda r: -r[3].mean(), "-log p by B"))
    panels += ((lambda r: r[5][0], "Frechet distance"),)
    for axis, (value, label) in zip(axes, panels, strict=True):
      for name in names:
        shown = [row for row in rows if row[0] == name]
        axis.plot([r[1] for r in shown], [value(r) for r in shown], marker=".", label=name)
      scale = "linear" if label.startswith("Frechet") else "log"
      axis.set(xscale="log", yscale=scale, xlabel="evaluations", ylabel=label, title=title)
      axis.set_xticks(ticks, [str(n) for n in ticks])
      axis.set_xticks([], minor=True)
      axis.grid(alpha=0.3)
  axes[0].legend(fontsize=7)
  made.tight_layout()
  made.savefig(path, dpi=120)


def main(_) -> None:
  """Prints the tables."""
  logging.set_verbosity(logging.WARNING)
  show_mixture()
  if flags.FLAGS.run is None:
    return
  runs = image_runs.load()
  folder = f"{flags.FLAGS.run}/judges"
  b = judge(runs[0], f"{folder}/b", 1, channels=24, num_features=48)
  c = judge(runs[0], f"{folder}/c", 2, channels=8, num_features=32)
  print(f"{len(runs)} runs, {_IMAGES.value} images each; mean ± 1.96 standard errors over images\n")
  found, steps, made = {}, more_steps(runs[0]), programs(runs[0])
  for told in _TOLD.value:
    found[TITLES[told]] = measured(runs, steps, made, b, c, told == "yes")
    show(found[TITLES[told]], TITLES[told])
  show_real(runs, b, c)
  if _FIGURE.value:
    plot(_FIGURE.value, found)


if __name__ == "__main__":
  app.run(main)
