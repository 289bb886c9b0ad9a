"""Minority scores and guidance: in the plane with every part exact, and of a trained digits model.

  python -m ancestral.benchmarks.minority                      # the plane: half a minute
  python -m ancestral.launch.train --config=configs/image_diffusion.py --workdir=runs/dit \\
      --seeds=0,1,2
  python -m ancestral.benchmarks.minority --run=runs/dit --figure=docs/figures/minority.png

In the plane data are points of an unbalanced mixture, and their law a kernel density: the denoiser
that scores them and the classifier of noisy data into classes of the score are both exact, and at
scale 1 guidance gives a class's own law. For digits the model scores, and a small classifier that
is told the noise level is trained on the classes. Density is a kernel's, of the training images,
its deviation that of the greatest likelihood, each image left out of its own. Intervals are of
95%, by resampling points; for digits, plus-minus is half of the range over seeds.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.special
import scipy.stats
from absl import app, flags

from ancestral.benchmarks import image_runs
from ancestral.evaluation import coverage, distances
from ancestral.models import base as models
from ancestral.models import classifier, schedules, toy
from ancestral.sampling import base, grids, guidance, minority, multistep, solvers

_FIGURE = flags.DEFINE_string("figure", None, "File for the figure.")
_SAMPLES = flags.DEFINE_integer("samples", 500, "Digits to draw at each scale.")

CLASSES = 10
SCORED_AT = 1.0  # noise level of the digits' scores that make classes
LEVELS = 0.5, 1.0, 2.0
NOISES = 20  # of a mean; with the paper's five, five others rank the digits otherwise
SCALES = 0.0, 0.5, 1.0, 2.0
SCHEDULE = schedules.variance_exploding(20.0)
TABLE = multistep.dpmpp_2m(SCHEDULE, grids.to_zero(grids.log_snr(SCHEDULE, 9, end=0.05)))
MODES = toy.GaussianMixture(
  jnp.array([0.9, 0.1]), jnp.array([[1.0, 0.5], [-1.5, -1.0]]), jnp.array([0.1, 0.1])
)


def keys_of(num: int, seed: int) -> base.Keys:
  """One key a row."""
  return base.row_keys(jax.random.key(seed), jnp.arange(num))


def rank_correlation(pairs: np.ndarray) -> float:
  """Spearman's, of pairs [N, 2]."""
  return float(scipy.stats.spearmanr(pairs[:, 0], pairs[:, 1]).statistic)


def with_interval(values: np.ndarray, statistic=np.mean) -> str:
  """The statistic of values [N, ...], and its interval by resampling."""
  rng = np.random.default_rng(0)
  low, high = coverage.bootstrap_interval(rng, values, statistic, num_resamples=1000)
  return f"{statistic(values):.3f} ({low:.3f} to {high:.3f})"


def plane(num: int = 1000) -> None:
  """Prints rank correlations, and what guidance towards the last class gives by scale."""
  x = toy.mixture_sample(jax.random.key(0), MODES, num)
  law = toy.kernel_density(x, 0.1)
  denoise = toy.mixture_denoiser(law, SCHEDULE)
  unlikely = lambda x: -np.asarray(toy.mixture_log_prob(MODES, x))
  rare = lambda x: np.asarray(x[:, 0] < -0.25, float)
  print("| noise | rank correlation with -log density | the rare mode's share of the last class |")
  print("|---|---|---|")
  for level in (0.3, 0.5, 1.0, 1.5, 2.0, 4.0):
    keys = keys_of(num, 1)
    scores = minority.score(keys, denoise, SCHEDULE, x, level, num_noises=20)
    last = np.asarray(minority.classes(scores, CLASSES)) == CLASSES - 1
    pairs = np.stack([scores, unlikely(x)], axis=1)
    found = with_interval(pairs, rank_correlation), with_interval(rare(x)[last])
    print(f"| {level} | {found[0]} | {found[1]} |", flush=True)
  keys = keys_of(num, 1)
  scores = minority.score(keys, denoise, SCHEDULE, x, 1.5, num_noises=20)
  classes = minority.classes(scores, CLASSES)
  log_prob = toy.class_log_prob(law, classes, CLASSES, SCHEDULE)
  print("\n| scale | rare mode | -log density |\n|---|---|---|")
  for scale in SCALES:
    guided = guidance.classifier(denoise, lambda x, t: log_prob(x, t)[:, -1], SCHEDULE, scale)
    made = solvers.sample(keys_of(num, 2), guided, TABLE, jnp.zeros((num, 2)))
    print(
      f"| {scale} | {with_interval(rare(made))} | {with_interval(unlikely(made))} |", flush=True
    )
  exact = toy.mixture_sample(jax.random.key(3), toy.of_class(law, classes, CLASSES - 1), num)
  print(f"| the class's law | {with_interval(rare(exact))} | {with_interval(unlikely(exact))} |")


def log_kernels(x: np.ndarray, points: np.ndarray, std: float) -> np.ndarray:
  """log N(x; point, std^2 I), [N, K], of x [N, D] and points [K, D]."""
  square = np.sum(x**2, 1)[:, None] + np.sum(points**2, 1)[None] - 2 * x @ points.T
  return -0.5 * square / std**2 - 0.5 * x.shape[1] * np.log(2 * np.pi * std**2)


def density_of(points: np.ndarray) -> tuple[np.ndarray, float]:
  """-log density of each of points [N, D] by the others' kernels, and the kernel's deviation."""
  best = None
  for std in np.geomspace(0.15, 0.8, 15):
    logs = log_kernels(points, points, std)
    np.fill_diagonal(logs, -np.inf)
    found = np.log(len(points) - 1) - scipy.special.logsumexp(logs, axis=1)
    if best is None or found.mean() < best[0].mean():
      best = found, std
  return best


class Digits(NamedTuple):
  """A trained model, and the density of its training images."""

  run: image_runs.Run
  points: np.ndarray  # [N, 64]
  unlikely: np.ndarray  # [N], -log density of each by the others
  std: float  # the kernel's

  def denoiser(self, labels: jax.Array) -> models.Denoiser:
    """Of the model, told the digits' classes [B]."""
    experiment, params = self.run.experiment, self.run.params
    return lambda x, t: experiment.model(params, x, t, models.Condition(labels))

  def scores(self, x, labels, level: float, num_noises: int = NOISES, seed: int = 1) -> np.ndarray:
    """Minority scores of images [M, 8, 8, 1]."""
    noising = self.run.experiment.noising

    @jax.jit
    def score(keys, x, labels):
      denoise = self.denoiser(labels)
      return minority.score(keys, denoise, noising, x, level, num_noises=num_noises)

    return np.asarray(score(keys_of(len(x), seed), jnp.asarray(x), jnp.asarray(labels)))

  def log_losses(self, x: np.ndarray) -> np.ndarray:
    """-log density of images that are not the training images."""
    logs = log_kernels(np.asarray(x, np.float64).reshape(len(x), -1), self.points, self.std)
    return np.log(len(self.points)) - scipy.special.logsumexp(logs, axis=1)


def digits_of(run: image_runs.Run) -> Digits:
  """Of one run."""
  points = run.experiment.examples.train.reshape(-1, 64).astype(np.float64)
  return Digits(run, points, *density_of(points))


def noisy_classifier(digits: Digits, classes: np.ndarray, steps: int = 800):
  """(x_t, t) -> log p(class | x_t) [B, classes], trained; the noise level is a channel of x."""
  network = classifier.classifier(
    classifier.ClassifierConfig(
      image_shape=(8, 8, 2), num_classes=CLASSES, channels=16, dropout=0.3
    )
  )
  images = jnp.asarray(digits.run.experiment.examples.train)
  noise = digits.run.experiment.noising.sigma  # the path is variance exploding

  def log_prob(params, x, t, key=None):
    sigma = models.per_row(noise(t), x)
    level = jnp.broadcast_to(jnp.log(sigma) / 4, x.shape)
    seen = jnp.concatenate([x / jnp.sqrt(1 + jnp.square(sigma)), level], axis=-1)
    return jax.nn.log_softmax(network.apply(params, seen, key=key)[1])

  def loss(params, key):
    pick, level, white, drop = jax.random.split(key, 4)
    row = jax.random.randint(pick, (256,), 0, len(images))
    t = jnp.exp(jax.random.uniform(level, (256,), minval=np.log(0.01), maxval=np.log(20.0)))
    x = images[row] + models.per_row(t, images[row]) * jax.random.normal(white, images[row].shape)
    found = log_prob(params, x, t, drop)
    return -jnp.mean(jnp.take_along_axis(found, jnp.asarray(classes)[row][:, None], axis=1))

  optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

  def step(carry, key):
    params, state = carry
    value, gradient = jax.value_and_grad(loss)(params, key)
    updates, state = optimizer.update(gradient, state)
    return (optax.apply_updates(params, updates), state), value

  params = network.init(jax.random.key(5), jnp.zeros((1, 8, 8, 2)))
  keys = jax.random.split(jax.random.key(6), steps)
  scan = jax.jit(lambda params, keys: jax.lax.scan(step, (params, optimizer.init(params)), keys))
  (params, _), _ = scan(params, keys)
  return lambda x, t: log_prob(params, x, jnp.broadcast_to(t, x.shape[:1]))


def guided_digits(digits: Digits, log_prob, labels: np.ndarray, scale: float) -> np.ndarray:
  """Samples [M, 8, 8, 1] of digits' classes, guided towards the last class of the score."""
  noising, num = digits.run.experiment.noising, len(labels)
  last = lambda x, t: log_prob(x, t)[:, -1]
  guided = guidance.classifier(digits.denoiser(jnp.asarray(labels)), last, noising, scale)
  table = image_runs.table(digits.run, "dpmpp_2m", 20)
  keys = keys_of(num, 7)
  draw = lambda keys: solvers.sample(keys, guided, table, jnp.zeros((num, 8, 8, 1)))
  return np.asarray(jax.jit(draw)(keys))


def correlated(digits: Digits) -> dict[str, float]:
  """Rank correlations of scores and -log density of the training images."""
  examples = digits.run.experiment.examples
  x, labels = examples.train, examples.train_labels
  with_density = lambda values: rank_correlation(np.stack([values, digits.unlikely], axis=1))
  told = {level: digits.scores(x, labels, level) for level in LEVELS}
  none = np.full_like(labels, examples.num_classes)
  rows = {f"noise {level}": with_density(scores) for level, scores in told.items()}
  rows |= {f"noise {level}, class not told": with_density(digits.scores(x, none, level))
           for level in LEVELS}  # fmt: skip
  few = [digits.scores(x, labels, SCORED_AT, 5, seed) for seed in (2, 3)]
  rows[f"noise {SCORED_AT}, five z"] = with_density(few[0])
  rows[f"noise {SCORED_AT}, five z with five others"] = rank_correlation(np.stack(few, axis=1))
  rows["brightness in place of the score"] = with_density(np.mean(x, axis=(1, 2, 3)))
  return rows


def measured(digits: Digits) -> tuple[dict[str, list[float]], dict[str, np.ndarray]]:
  """Score, share above the last class's edge, -log density and precision of images; the images."""
  examples = digits.run.experiment.examples
  train, labels = examples.train, examples.train_labels
  scores = digits.scores(train, labels, SCORED_AT)
  classes, edge = (
    np.asarray(minority.classes(scores, CLASSES)),
    np.quantile(scores, 1 - 1 / CLASSES),
  )
  log_prob = noisy_classifier(digits, classes)
  last = classes == CLASSES - 1
  of = labels[: _SAMPLES.value]
  images = {f"scale {w:g}": (guided_digits(digits, log_prob, of, w), of) for w in (*SCALES, 4.0)}
  images["last class of training"] = train[last], labels[last]
  images["held-out digits"] = examples.test, examples.test_labels
  real, rows = digits.run.features(train)[0], {}
  for name, (x, of) in images.items():
    own = digits.unlikely[last] if name.startswith("last") else digits.log_losses(x)
    found = digits.scores(x, of, SCORED_AT, seed=4)
    precision = distances.precision_recall(real, digits.run.features(x)[0]).precision
    rows[name] = [found.mean(), np.mean(found > edge), own.mean(), precision]
  sure = np.asarray(jax.jit(log_prob)(jnp.asarray(examples.test), jnp.float32(0.1)))[:, -1]
  print(f"classifier on held-out digits, area under the curve: {area(sure, found > edge):.3f}")
  return rows, {name: x for name, (x, _) in images.items()}


def area(values: np.ndarray, positive: np.ndarray) -> float:
  """The probability that a positive has a higher value than a negative."""
  ranks = scipy.stats.rankdata(values)
  n, m = positive.sum(), (~positive).sum()
  return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * m))


def over_seeds(values) -> str:
  """Mean, and half of the range."""
  values = np.asarray(values)
  return f"{values.mean():.3f} ± {np.ptp(values) / 2:.3f}"


def draw_figure(images: dict, path: str) -> None:
  """Rows of samples by scale, and of real digits of the last class."""
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(len(images), 1, figsize=(7, 0.62 * len(images)))
  for axis, (name, x) in zip(axes, images.items(), strict=True):
    axis.imshow(np.concatenate(list(x[:16, :, :, 0]), axis=1), cmap="gray_r", vmin=-1, vmax=1)
    axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    axis.set_xticks([])
    axis.set_yticks([])
  figure.tight_layout(pad=0.3)
  figure.savefig(path, dpi=130)


def main(_) -> None:
  """Prints the tables."""
  if not flags.FLAGS.run:
    plane()
    return
  every = [digits_of(run) for run in image_runs.load()]
  correlations = [correlated(digits) for digits in every]
  print("| with -log density of digits | rank correlation |\n|---|---|")
  for name in correlations[0]:
    print(f"| {name} | {over_seeds([found[name] for found in correlations])} |", flush=True)
  rows, images = zip(*[measured(digits) for digits in every], strict=True)
  print(
    "\n| images | score | in the last class | -log density | precision |\n|---|---|---|---|---|"
  )
  for name in rows[0]:
    cells = map(over_seeds, np.array([found[name] for found in rows]).T)
    print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
  if _FIGURE.value:
    draw_figure(images[0], _FIGURE.value)


if __name__ == "__main__":
  app.run(main)
