"""Light Schroedinger bridges: Gaussian pairs against the closed form, and a swiss roll.

  python -m ancestral.benchmarks.light_bridge --figure=docs/figures/light_bridge.png   # minutes

Both are trained on fresh draws of both marginals with `training.step`. The floor beside the errors
on Gaussians is the closed form of empirical moments of as many draws as training saw, which is the
minimiser of the loss on all of them if there is one component. Errors, over x_0 ~ p0:

  mean   sqrt(E |m(x_0) - m*(x_0)|^2 / tr cov1),    covariance   E |V(x_0) - V*|_F / |V*|_F,
  UVP    100 E BW^2(N(m(x_0), V(x_0)), N(m*(x_0), V*)) / (tr cov1 / 2), in per cent

with m and V the moments of the plan's x_1 given x_0 (cBW2^2-UVP of Gushchin et al. 2023, arXiv
2306.10161), and of x_1 alone the same ratio of the second marginals.
"""

import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from ancestral.models import bridges as models
from ancestral.sampling import base, bridges
from ancestral.training import bridges as training
from ancestral.training import state, step

_FIGURE = flags.DEFINE_string("figure", None, "File for the figure.")
_STEPS = flags.DEFINE_integer("steps", 3000, "Training steps.")
_RATE = flags.DEFINE_float("rate", 0.01, "Adam's learning rate at first; it ends at 0.")
_BATCH = flags.DEFINE_integer("batch", 512, "Draws of each marginal a step.")

Draw = Callable[[jax.Array, int], jax.Array]  # (key, number) -> points [number, D]


@functools.partial(jax.jit, static_argnames=("draw0", "draw1", "eps", "num_steps", "batch", "rate"))
def trained(
  key: jax.Array,
  bridge: models.LightBridge,
  *,
  draw0: Draw,
  draw1: Draw,
  eps: float,
  num_steps: int,
  batch: int,
  rate: float,
) -> models.LightBridge:
  """The bridge after training on fresh draws.

  Adam's usual b2 of 0.999 remembers the first, large gradients too long where eps is small: of the
  Gaussians in tests/training at eps = 0.1, 1500 steps from 0.03 leave KL = 2e-3 and not 3e-13.
  """
  optimizer = optax.adam(optax.cosine_decay_schedule(rate, num_steps), b2=0.99)
  averaging = state.no_average()
  init_key, data_key, step_key = jax.random.split(key, 3)

  def one(held, key):
    start_key, end_key = jax.random.split(key)
    points = {"start": draw0(start_key, batch), "end": draw1(end_key, batch)}
    return step.train_step(
      step_key,
      held,
      points,
      loss_fn=training.light_bridge_loss(eps),
      optimizer=optimizer,
      averaging=averaging,
    )

  held = state.init(init_key, lambda key: bridge, optimizer, averaging)
  return jax.lax.scan(one, held, jax.random.split(data_key, num_steps))[0].params


def timed(function: Callable, *args, **kwargs) -> tuple:
  """The result and the seconds it took, its compilation apart."""
  compiled = function.lower(*args, **kwargs).compile()
  begun = time.perf_counter()
  return jax.block_until_ready(compiled(*args)), time.perf_counter() - begun


# Gaussian pairs.


def gaussian_pair(dim: int) -> tuple[np.ndarray, ...]:
  """Means of N(0, I) and covariances turned at random, of eigenvalues from 1/4 to 4."""
  rng, parts = np.random.default_rng(dim), []
  for _ in range(2):
    axes = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    parts += [rng.normal(size=dim), axes * 4 ** rng.uniform(-1, 1, dim) @ axes.T]
  return tuple(parts)


def normal_draw(mean: np.ndarray, covariance: np.ndarray) -> Draw:
  """Draws of a Gaussian, float32."""
  mean, factor = jnp.asarray(mean, jnp.float32), jnp.asarray(np.linalg.cholesky(covariance).T)
  factor = factor.astype(jnp.float32)
  return lambda key, num: mean[None] + jax.random.normal(key, (num, len(mean))) @ factor


def root(covariance: np.ndarray) -> np.ndarray:
  """Square roots of symmetric matrices [..., D, D]."""
  values, axes = np.linalg.eigh(covariance)
  return (axes * np.sqrt(np.maximum(values, 0))[..., None, :]) @ np.swapaxes(axes, -1, -2)


def bures_wasserstein(means: np.ndarray, covariances: np.ndarray, mean, covariance) -> np.ndarray:
  """Squared distances of Gaussians [N], from N(mean, covariance) or row by row."""
  half = root(covariance)
  trace = lambda matrix: np.trace(matrix, axis1=-2, axis2=-1)
  cross = trace(root(half @ covariances @ half))
  return ((means - mean) ** 2).sum(-1) + trace(covariances) + trace(covariance) - 2 * cross


def moments(bridge: models.LightBridge, x0: np.ndarray, eps: float) -> tuple:
  """Mean [N, D] and covariance [N, D, D] of x_1 given x0 [N, D], float64."""
  plan = jax.jit(models.plan)(bridge, jnp.asarray(x0, bridge.means.dtype), eps)
  log_weights, means, covariances = (np.asarray(part, np.float64) for part in plan)
  weights = np.exp(log_weights)
  mean = np.einsum("bk,bki->bi", weights, means)
  apart = means - mean[:, None]
  within = np.einsum("bk,kij->bij", weights, covariances)
  return mean, within + np.einsum("bk,bki,bkj->bij", weights, apart, apart)


def errors(bridge: models.LightBridge, true: models.GaussianBridge, eps: float) -> list[float]:
  """Of mean and covariance given x_0, and UVP in per cent, given x_0 and of x_1 alone."""
  x0 = np.random.default_rng(1).multivariate_normal(true.mean0, true.covariance0, size=1000)
  (mean, covariance), exact = moments(bridge, x0, eps), moments(models.from_gaussian(true), x0, eps)
  size = np.trace(true.covariance1)
  marginal_mean, apart = mean.mean(0), mean - mean.mean(0)
  marginal = covariance.mean(0) + apart.T @ apart / len(x0)
  exact_apart = exact[0] - exact[0].mean(0)  # of the same x_0, so that their noise is shared
  exact_marginal = exact[1].mean(0) + exact_apart.T @ exact_apart / len(x0)
  square = bures_wasserstein(marginal_mean, marginal, exact[0].mean(0), exact_marginal)
  norm = lambda matrix: np.linalg.norm(matrix, axis=(-2, -1))
  return [
    np.sqrt(((mean - exact[0]) ** 2).sum(-1).mean() / size),
    (norm(covariance - exact[1]) / norm(exact[1])).mean(),
    200 * bures_wasserstein(mean, covariance, *exact).mean() / size,
    200 * square / size,
  ]


def empirical(pair: tuple[np.ndarray, ...], num: int) -> list[np.ndarray]:
  """The moments of `num` draws of each marginal."""
  rng, parts = np.random.default_rng(2), []
  for mean, covariance in (pair[:2], pair[2:]):
    draws = rng.multivariate_normal(mean, covariance, size=num)
    parts += [draws.mean(0), np.cov(draws.T)]
  return parts


def gaussian_table(num_steps: int, batch: int, rate: float) -> None:
  """Errors and seconds, for sizes, noises and numbers of components."""
  print("| D | eps | K | mean | covariance | UVP % given x_0 | UVP % of x_1 | seconds |")
  print("|---|---|---|---|---|---|---|---|")
  for dim in (2, 8, 16):
    pair = gaussian_pair(dim)
    drawn = empirical(pair, num_steps * batch)
    draw0, draw1 = normal_draw(*pair[:2]), normal_draw(*pair[2:])
    for eps in (0.1, 1.0, 10.0):
      true = models.gaussian_bridge(*pair, eps)
      settings = {"draw0": draw0, "draw1": draw1, "eps": eps}
      settings |= {"num_steps": num_steps, "batch": batch, "rate": rate}
      for k in (1, 5):
        bridge = models.init(jax.random.key(0), k, dim)
        bridge, seconds = timed(trained, jax.random.key(1), bridge, **settings)
        report(dim, eps, str(k), errors(bridge, true, eps), f"{seconds:.1f}")
      with jax.enable_x64(True):
        floor = models.from_gaussian(models.gaussian_bridge(*drawn, eps))
        found = errors(floor, true, eps)
      report(dim, eps, "floor", found, "")


def report(dim: int, eps: float, name: str, found: list[float], seconds: str) -> None:
  """Prints a row."""
  cells = " | ".join(f"{value:.2g}" for value in found)
  print(f"| {dim} | {eps:g} | {name} | {cells} | {seconds} |", flush=True)


# The swiss roll.


def swiss_roll(key: jax.Array, num: int) -> jax.Array:
  """sklearn's swiss roll, seen along its axis, with noise 0.8, over 7.5."""
  angle_key, noise_key = jax.random.split(key)
  angle = 1.5 * np.pi * (1 + 2 * jax.random.uniform(angle_key, (num,)))
  points = angle[:, None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)
  return (points + 0.8 * jax.random.normal(noise_key, points.shape)) / 7.5


def standard_normal(key: jax.Array, num: int) -> jax.Array:
  """N(0, I) in the plane."""
  return jax.random.normal(key, (num, 2))


def energy_distance(x: np.ndarray, y: np.ndarray) -> float:
  """2 E|x - y| - E|x - x'| - E|y - y'|, unbiased: about 0, of either sign, for equal laws."""
  from scipy.spatial import distance

  cross = distance.cdist(x, y).mean()
  return 2 * cross - distance.pdist(x).mean() - distance.pdist(y).mean()


@functools.partial(jax.jit, static_argnames=("eps", "num_steps"))
def paths(
  key: jax.Array, bridge: models.LightBridge, x0: jax.Array, *, eps: float, num_steps: int
) -> jax.Array:
  """The bridge's paths from x0 [B, 2], [num_steps + 1, B, 2]."""
  times = np.linspace(0, 1, num_steps + 1)
  algorithm = bridges.euler_maruyama(models.drift(bridge, eps), times, eps)
  keys = base.row_keys(key, jnp.arange(len(x0)))
  start = base.start(keys, algorithm, x0)
  _, x = base.run(keys, algorithm, start, num_steps, lambda state, info: state.x)
  return jnp.concatenate([x0[None], x])


def roll_table(num_steps: int, batch: int, rate: float, num: int = 4000) -> list[tuple]:
  """Prints distances from the roll; returns (eps, plan's draws, paths) for each eps."""
  keys = jax.random.split(jax.random.key(3), 6)
  target, again = np.asarray(swiss_roll(keys[0], num)), np.asarray(swiss_roll(keys[1], num))
  x0, found = standard_normal(keys[2], num), []
  print(f"\nEnergy distance from the swiss roll, {num} draws; two sets of true draws are at")
  print(f"{energy_distance(again, target):.1e}.\n")
  print("| eps | K | by the plan | by 100 steps of Euler | by 10 | seconds |")
  print("|---|---|---|---|---|---|")
  for eps in (0.01, 0.1, 1.0):
    bridge = models.init(jax.random.key(0), 100, 2, slope=0.1)
    bridge = bridge._replace(means=swiss_roll(jax.random.key(4), 100))
    settings = {"draw0": standard_normal, "draw1": swiss_roll, "eps": eps}
    settings |= {"num_steps": num_steps, "batch": batch, "rate": rate}
    bridge, seconds = timed(trained, jax.random.key(1), bridge, **settings)
    ends = np.asarray(jax.jit(models.plan_sample)(keys[3], bridge, x0, eps))
    fine, coarse = (
      np.asarray(paths(keys[4], bridge, x0, eps=eps, num_steps=steps)) for steps in (100, 10)
    )
    cells = [f"{energy_distance(x, target):.1e}" for x in (ends, fine[-1], coarse[-1])]
    print(f"| {eps:g} | 100 | " + " | ".join(cells) + f" | {seconds:.1f} |", flush=True)
    found.append((eps, ends, fine))
  return found


def draw_figure(path: str, found: list[tuple]) -> None:
  """The roll, and for each eps draws of the plan and some paths."""
  from matplotlib import figure as figures  # no global state, so no pyplot
  from matplotlib.backends import backend_agg

  figure = figures.Figure(figsize=(12, 3.3), dpi=110)
  canvas = backend_agg.FigureCanvasAgg(figure)
  panels = figure.subplots(1, len(found) + 1, sharex=True, sharey=True)
  roll = np.asarray(swiss_roll(jax.random.key(5), 2000))
  panels[0].scatter(*roll.T, s=2, color="tab:green", linewidths=0)
  panels[0].set_title("$p_1$, 2,000 draws")
  for panel, (eps, ends, x) in zip(panels[1:], found, strict=True):
    panel.scatter(*ends[:2000].T, s=2, color="tab:green", linewidths=0, alpha=0.6)
    for b in range(12):
      panel.plot(*x[:, b].T, linewidth=0.7, color=f"C{b % 10}")
    panel.scatter(*x[0, :12].T, s=12, color="black", zorder=3)
    panel.scatter(*x[-1, :12].T, s=14, color="tab:red", zorder=3)
    panel.set_title(rf"$\varepsilon$ = {eps:g}: plan, 12 paths")
  for panel in panels:
    panel.set_aspect("equal")
    panel.set_xlim(-2.9, 2.9)
    panel.set_ylim(-2.6, 2.6)
  figure.tight_layout()
  canvas.print_png(path)


def main(_):
  """Prints the tables; draws the figure if asked to."""
  begun = time.perf_counter()
  settings = _STEPS.value, _BATCH.value, _RATE.value
  gaussian_table(*settings)
  found = roll_table(*settings)
  if _FIGURE.value:
    draw_figure(_FIGURE.value, found)
  print(f"\n{time.perf_counter() - begun:.0f} s in all, on {jax.devices()[0]}.")


if __name__ == "__main__":
  app.run(main)
