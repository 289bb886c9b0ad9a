"""Minority scores, the choice of measurements, and chosen boundary noise, on exact denoisers.

  python -m ancestral.benchmarks.steering                       # two minutes on two cores

Images are scikit-learn's digits, 8 x 8 in [-1, 1]: the law is a kernel density of 1,500 of them,
the images measured are of the 297 others. Plus-minus is the standard error, over seeds or images.
"""  # fmt: skip

import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from absl import app

from ancestral.benchmarks import exact_targets
from ancestral.models import schedules, toy
from ancestral.sampling import (
  acquisition,
  base,
  boundary,
  grids,
  guidance,
  minority,
  multistep,
  solvers,
  tables,
)

SCHEDULE = schedules.variance_exploding(20.0)
TABLE = multistep.dpmpp_2m(SCHEDULE, grids.to_zero(grids.log_snr(SCHEDULE, 9, end=0.05)))
KERNEL = 0.15


def shown(values, digits: int = 3) -> str:
  """The mean and its standard error."""
  values = np.asarray(values, float)
  return f"{values.mean():.{digits}f} ± {values.std(ddof=1) / len(values) ** 0.5:.{digits}f}"


def digits() -> tuple[np.ndarray, np.ndarray]:
  """Those of the density, and the others, [N, 64]."""
  points = np.random.default_rng(0).permutation(exact_targets.digits().means)
  return points[:1500], points[1500:]


def keys_of(num: int, seed: int) -> base.Keys:
  """One key a row."""
  return base.row_keys(jax.random.key(seed), jnp.arange(num))


def minorities(points: np.ndarray) -> None:
  """Rank correlation of score and -log density; the share of a rare mode under guidance."""
  modes = toy.GaussianMixture(
    jnp.array([0.9, 0.1]), jnp.array([[1.0, 0.5], [-1.5, -1.0]]), jnp.array([0.1, 0.1])
  )
  density = toy.kernel_density(jnp.asarray(points, jnp.float32), KERNEL)
  print("\n### Minority score: Spearman's rank correlation with -log density, five seeds\n")
  for name, law, noises in (
    ("two modes", modes, (0.5, 1.5, 4.0)),
    ("digits", density, (0.5, 1.0, 2.0)),
  ):
    denoise = toy.mixture_denoiser(law, SCHEDULE)
    for t in noises:
      found = []
      for seed in range(5):
        x = toy.mixture_sample(jax.random.key(seed), law, 300)
        score = minority.score(keys_of(300, seed), denoise, SCHEDULE, x, t)
        found.append(scipy.stats.spearmanr(score, -toy.mixture_log_prob(law, x)).statistic)
      print(f"{name}, noise {t}: {shown(found)}", flush=True)
  log_prob = toy.class_log_prob(modes, jnp.array([0, 1]), 2, SCHEDULE)
  denoise = toy.mixture_denoiser(modes, SCHEDULE)
  print("\nShare of the mode of weight .1, by the exact classifier's scale:")
  for scale in (0.0, 0.25, 0.5, 1.0, 2.0):
    guided = guidance.classifier(denoise, lambda x, t: log_prob(x, t)[:, 1], SCHEDULE, scale)
    shares = []
    for seed in range(5):
      x = solvers.sample(keys_of(1000, seed), guided, TABLE, jnp.zeros((1000, 2)))
      shares.append(float(jnp.mean(x[:, 0] < -0.25)))
    print(f"scale {scale}: {shown(shares)}")


def posterior(rng, points, image, kept, std, num):
  """Particles [num, D] given image[kept] with noise std; the posterior mean."""
  v, y = KERNEL**2, image[kept]
  log_weight = -0.5 * np.sum((points[:, kept] - y) ** 2, axis=1) / (v + std**2)
  weight = np.exp(log_weight - log_weight.max())
  weight /= weight.sum()
  gain = v / (v + std**2)
  mean = weight @ points
  mean[kept] += gain * (y - mean[kept])
  x = points[rng.choice(len(points), num, p=weight)].copy()
  spread = np.full(x.shape[1], KERNEL)
  x[:, kept] += gain * (y - x[:, kept])
  spread[kept] = KERNEL * np.sqrt(1 - gain)
  return x + spread * rng.normal(size=x.shape), mean


def measurements(points: np.ndarray, images: np.ndarray, std: float = 0.05) -> None:
  """Mean absolute error of the posterior mean, by pixels measured and how they are chosen."""
  entropy = jax.jit(functools.partial(acquisition.entropy, std=0.3))
  fixed = np.argsort(-points.var(axis=0))
  rules = {
    "entropy (ADS)": lambda rng, x, done: np.asarray(entropy(jnp.asarray(x, jnp.float32))),
    "variance": lambda rng, x, done: np.var(x, axis=0),
    "random": lambda rng, x, done: rng.random(x.shape[1]),
    "fixed, most variance first": lambda rng, x, done: -np.argsort(fixed).astype(float),
  }
  budgets = (3, 6, 10, 16)
  print("\n### Pixels measured of 64: mean absolute error of the others\n")
  print("| rule | " + " | ".join(map(str, budgets)) + " |\n" + "|---" * 5 + "|")
  for name, rule in rules.items():
    errors = {budget: [] for budget in budgets}
    for i, image in enumerate(images[:100]):
      rng, done = np.random.default_rng(i), np.zeros(image.size, bool)
      noisy = image + std * rng.normal(size=image.shape)
      for count in range(1, budgets[-1] + 1):
        x, _ = posterior(rng, points, noisy, np.flatnonzero(done), std, 64)
        done[np.argmax(np.where(done, -np.inf, rule(rng, x, done)))] = True
        if count in budgets:
          _, mean = posterior(rng, points, noisy, np.flatnonzero(done), std, 1)
          errors[count].append(np.mean(np.abs(mean - image)[~done]))
    print(f"| {name} | " + " | ".join(shown(errors[b]) for b in budgets) + " |", flush=True)


def gaussian_rule(num: int = 50) -> None:
  """How often the entropy's choice is the exact greedy one, of Gaussian posteriors."""
  rng, same, lost = np.random.default_rng(0), [], []
  for _ in range(num):
    factor = rng.normal(size=(16, 16)) * rng.uniform(0.2, 2.0, 16)
    covariance = factor @ factor.T / 16
    x = rng.multivariate_normal(np.zeros(16), covariance, 256)
    best = int(np.argmax(acquisition.entropy(jnp.asarray(x, jnp.float32), 0.3)))
    variances = np.diag(covariance)
    same.append(best == np.argmax(variances))
    lost.append(variances[best] / variances.max())
  print(f"\nGaussian, 16 candidates, 256 particles: the exact choice {shown(same, 2)} of the time; "
        f"its variance {shown(lost)} of the largest.")  # fmt: skip


def super_resolution(points: np.ndarray, images: np.ndarray) -> None:
  """PSNR of 4 x 4 -> 8 x 8 by a guided ODE: chosen noise, and noises at random."""
  rows = np.kron(np.eye(4), np.full(2, 0.5))  # [4, 8]
  operator = jnp.asarray(np.kron(rows, rows), jnp.float32)
  law = toy.kernel_density(jnp.asarray(points, jnp.float32), KERNEL)
  denoise = toy.mixture_denoiser(law, SCHEDULE)
  table = tables.from_state(TABLE)

  @jax.jit
  def solve(noise, y):
    guided = guidance.pigdm(denoise, operator, y, 0.05, SCHEDULE)
    keys = keys_of(noise.shape[0], 0)  # of nothing: the table draws no noise
    return solvers.sample(keys, guided, table, TABLE.start[1] * noise)

  images = jnp.asarray(images, jnp.float32)
  y = images @ operator.T
  candidates = jax.random.normal(jax.random.key(1), (100, 64))
  psnr = lambda x, of: -10 * jnp.log10(jnp.mean(jnp.square((x - of) / 2), axis=1))
  of_noise = lambda z: psnr(solve(boundary.repeated(z, 200), y[20:220]), images[20:220])
  others = np.stack([of_noise(z) for z in jax.random.normal(jax.random.key(2), (20, 64))])
  print("\n### Super-resolution, 10 evaluations, 200 images: PSNR in dB\n")
  means, spread = others.mean(axis=1), others.std(axis=0).mean()
  print(f"noises at random: {shown(means, 2)}, from {means.min():.2f} to {means.max():.2f}; "
        f"spread over noises of one image {spread:.2f}")  # fmt: skip
  for pairs in (5, 20):
    found = boundary.search(solve, candidates, y[:pairs], images[:pairs])
    chosen = np.asarray(of_noise(found.noise))
    gain = chosen - others.mean(axis=0)
    print(f"chosen of 100 on {pairs}: {shown(chosen, 2)}; gain on the same image {shown(gain, 2)}",
          flush=True)  # fmt: skip


def main(_) -> None:
  """Prints all of it."""
  points, images = digits()
  minorities(points)
  gaussian_rule()
  measurements(points, images)
  super_resolution(points, images)


if __name__ == "__main__":
  app.run(main)
