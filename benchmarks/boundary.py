"""Chosen boundary noise for super-resolution: what it gains, and beside what costs nothing.

  python -m ancestral.benchmarks.boundary                      # half a minute; with a run, five
  python -m ancestral.launch.train --config=configs/image_diffusion.py --workdir=runs/dit \\
      --seeds=0,1,2
  python -m ancestral.benchmarks.boundary --run=runs/dit --figure=docs/figures/boundary.png

Digits of 4 x 4 pixels, means of four, to 8 x 8 by PiGDM and 2M, on the exact denoiser of a kernel
density of the training digits or on a trained model that is not told the class. Every candidate
noise is run on reference pairs and on held-out images once; a choice is the best of some candidates
on some pairs, both drawn again and again, so that its interval counts candidates, pairs and images.
Beside it: random noises; no noise, x_T = 0; the mean of the samples of many noises.
"""  # fmt: skip

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from absl import app, flags

from ancestral.benchmarks import exact_targets, image_runs
from ancestral.models import base as models
from ancestral.models import schedules, toy
from ancestral.sampling import boundary, grids, guidance, multistep, noise_search

_CANDIDATES = flags.DEFINE_integer("candidates", 100, "Noises in all; a choice is among half.")
_PAIRS = flags.DEFINE_integer("pairs", 60, "Reference pairs in all, of training digits.")
_HELD_OUT = flags.DEFINE_integer("held_out", 100, "Images that noises are measured on.")
_NFE = flags.DEFINE_list("nfe", "5,10", "Evaluations of the solver.")
_FIGURE = flags.DEFINE_string("figure", None, "File for the figure.")

VE = schedules.variance_exploding(20.0)
SEEN_STD = 0.05  # that PiGDM takes the measurement to have
ROWS = np.kron(np.eye(4), np.full(2, 0.5))  # [4, 8]
OPERATOR = jnp.asarray(np.kron(ROWS, ROWS), jnp.float32)  # [16, 64]


class Measured(NamedTuple):
  """Mean squared errors of every candidate, and of what needs none."""

  pairs: np.ndarray  # [N, R]
  others: np.ndarray  # [N, I]
  zero: np.ndarray  # [I], of x_T = 0
  mean: np.ndarray  # [I], of the mean of the samples of 20 candidates
  samples: dict[str, np.ndarray]  # [I, 8, 8]
  nearest: dict[str, float]  # root mean square distance of samples to the nearest training digit


def psnr(squares: np.ndarray) -> np.ndarray:
  """In dB, of data in [-1, 1]."""
  return -10 * np.log10(np.asarray(squares) / 4)


def solver(denoise, nfe: int, data_std: float) -> boundary.Solve:
  """(x_T, y [B, 16]) -> images [B, 64] by the guided ODE."""
  table = multistep.dpmpp_2m(VE, grids.to_zero(grids.log_snr(VE, nfe - 1, end=0.05)))

  def solve(noise, y):
    guided = guidance.pigdm(denoise, OPERATOR, y, SEEN_STD, VE, data_std=data_std)
    return noise_search.of_table(guided, table)(noise)[0]

  return solve


def noises_of() -> jax.Array:
  """The candidates [N, 64]."""
  return jax.random.normal(jax.random.key(1), (_CANDIDATES.value, 64))


def measured(
  solve: boundary.Solve, points: np.ndarray, pairs: np.ndarray, others: np.ndarray
) -> Measured:
  """All that is said of one model at one number of evaluations."""
  candidates, digits = noises_of(), points
  pairs, others = jnp.asarray(pairs, jnp.float32), jnp.asarray(others, jnp.float32)
  search = jax.jit(
    lambda targets: boundary.search(solve, candidates, targets @ OPERATOR.T, targets)
  )
  found = search(pairs)
  made = jax.jit(lambda noise: solve(boundary.repeated(noise, len(others)), others @ OPERATOR.T))
  zero, chosen = made(jnp.zeros(64)), made(found.noise)
  several = jnp.stack([made(noise) for noise in candidates[:20]])
  squares = lambda x: np.asarray(boundary.mean_squared(x, others))
  samples = {"digit": others, "x_T chosen": chosen, "x_T = 0": zero,
             "mean of 20": jnp.mean(several, axis=0),
             **{f"x_T at random, {i}": several[i] for i in (0, 1)}}  # fmt: skip
  samples = {name: np.asarray(x) for name, x in samples.items()}
  nearest = {
    name: float(np.mean(np.sqrt(exact_targets.distances(x, digits).min(axis=1) / 64)))
    for name, x in samples.items()
  }
  return Measured(
    np.asarray(found.errors),
    np.asarray(search(others).errors),
    squares(zero),
    squares(samples["mean of 20"]),
    {name: x.reshape(-1, 8, 8) for name, x in samples.items()},
    nearest,
  )


def choices(found: Measured, num_pairs: int, rng: np.random.Generator, repeats: int = 400):
  """PSNR of a chosen noise [repeats], and over the mean of random ones on the same images.

  Each repeat draws half of the candidates, `num_pairs` pairs, and the images with repetition.
  """
  n, r = found.pairs.shape
  scores, chosen, gains = psnr(found.others), [], []
  for _ in range(repeats):
    among = rng.choice(n, n // 2, replace=False)
    on = rng.choice(r, num_pairs, replace=False)
    images = rng.integers(scores.shape[1], size=scores.shape[1])
    best = among[np.argmin(found.pairs[np.ix_(among, on)].mean(axis=1))]
    chosen.append(scores[best, images].mean())
    gains.append(chosen[-1] - scores[:, images].mean())
  return np.array(chosen), np.array(gains)


def interval(values: np.ndarray) -> str:
  """The mean of resamples, and where 95% of them are."""
  low, high = np.quantile(values, [0.025, 0.975])
  return f"{values.mean():.2f} ({low:.2f} to {high:.2f})"


def over_images(found: list[Measured], of) -> str:
  """Mean over models of `of(found)` [I] in dB, images resampled."""
  values = np.mean([of(f) for f in found], axis=0)
  rng = np.random.default_rng(0)
  return interval(np.array([rng.choice(values, len(values)).mean() for _ in range(1000)]))


def report(name: str, nfe: int, found: list[Measured]) -> None:
  """Prints one table, over models."""
  random = lambda f: psnr(f.others).mean(axis=0)
  noises = np.mean([psnr(f.others).mean(axis=1) for f in found], axis=0)
  spread = np.mean([psnr(f.others).std(axis=0).mean() for f in found])
  print(f"\n### {name}, {nfe} evaluations: PSNR on held-out images, dB\n")
  print("| x_T | PSNR | over random, same images |\n|---|---|---|")
  print(f"| at random | {over_images(found, random)} | |")
  for num_pairs in (1, 5, 20):
    rng = np.random.default_rng(1)
    made = [choices(f, num_pairs, rng) for f in found]
    chosen, gain = (np.concatenate([m[i] for m in made]) for i in (0, 1))
    print(f"| the best of {len(noises) // 2} on {num_pairs} | {interval(chosen)} | "
          f"{interval(gain)} |")  # fmt: skip
  for label, of in (
    ("0", lambda f: psnr(f.zero)),
    ("mean of 20 samples", lambda f: psnr(f.mean)),
  ):
    gain = over_images(found, lambda f, of=of: of(f) - random(f))
    print(f"| {label} | {over_images(found, of)} | {gain} |")
  agree = [scipy.stats.spearmanr(f.pairs.mean(axis=1), f.others.mean(axis=1)) for f in found]
  agree = np.array([a.statistic for a in agree])
  lengths = np.linalg.norm(noises_of(), axis=1)
  short = [scipy.stats.spearmanr(lengths, f.others.mean(axis=1)).statistic for f in found]
  print(
    f"\nRandom noises: {noises.min():.2f} to {noises.max():.2f} dB, deviation {noises.std():.2f}; "
    f"of one image {spread:.2f}. Rank correlation of a noise's error on pairs and on held-out "
    f"images: {np.mean(agree):.2f}; of its length and error: {np.mean(short):.2f}."
  )
  nearest = {name: np.mean([f.nearest[name] for f in found]) for name in found[0].nearest}
  words = ", ".join(f"{name} {value:.3f}" for name, value in nearest.items())
  print(f"Distance to the nearest training digit: {words}.", flush=True)


def draw_figure(samples: dict[str, np.ndarray], path: str) -> None:
  """A row of images for each x_T."""
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(len(samples), 1, figsize=(6, 0.62 * len(samples)))
  for axis, (name, x) in zip(axes, samples.items(), strict=True):
    axis.imshow(np.concatenate(list(x[:12]), axis=1), cmap="gray_r", vmin=-1, vmax=1)
    axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    axis.set_xticks([])
    axis.set_yticks([])
  figure.tight_layout(pad=0.3)
  figure.savefig(path, dpi=130)


def trained(run: image_runs.Run):
  """The model's denoiser of rows [B, 64], not told a class, and the spread of its data."""
  experiment = run.experiment

  def denoise(x, t):
    label = models.Condition(jnp.full(x.shape[0], experiment.examples.num_classes))
    return experiment.model(run.params, x.reshape(-1, 8, 8, 1), t, label).reshape(x.shape)

  return denoise, experiment.config.diffusion.sigma_data


def regression(points: np.ndarray, images: np.ndarray) -> str:
  """PSNR of ridge regression from 4 x 4 to 8 x 8, no diffusion."""
  operator, mean = np.asarray(OPERATOR, np.float64), points.mean(axis=0)
  covariance = np.cov(points.T)
  gain = covariance @ operator.T
  gain = gain @ np.linalg.inv(operator @ gain + SEEN_STD**2 * np.eye(16))
  made = mean + (images - mean) @ operator.T @ gain.T
  values = psnr(np.mean(np.square(made - images), axis=1))
  rng = np.random.default_rng(0)
  return interval(np.array([rng.choice(values, len(values)).mean() for _ in range(1000)]))


def main(_) -> None:
  """Prints a table for each number of evaluations."""
  points, images = exact_targets.split_digits()
  runs = image_runs.load() if flags.FLAGS.run else []
  if runs:
    examples = runs[0].experiment.examples
    points, images = examples.train.reshape(-1, 64), examples.test.reshape(-1, 64)
    named = {"Trained model": [trained(run) for run in runs]}
  else:
    law = toy.kernel_density(jnp.asarray(points, jnp.float32), exact_targets.KERNEL)
    named = {"Exact denoiser": [(toy.mixture_denoiser(law, VE), float(np.std(points)))]}
  points, images = np.asarray(points, np.float64), images[: _HELD_OUT.value]
  pairs = np.random.default_rng(3).permutation(points)[: _PAIRS.value]
  print(f"Linear regression: {regression(points, images)} dB")
  for name, denoisers in named.items():
    for nfe in map(int, _NFE.value):
      solve = functools.partial(solver, nfe=nfe)
      found = [measured(solve(d, data_std=std), points, pairs, images) for d, std in denoisers]
      report(name, nfe, found)
    if _FIGURE.value:
      draw_figure(found[0].samples, _FIGURE.value)


if __name__ == "__main__":
  app.run(main)
