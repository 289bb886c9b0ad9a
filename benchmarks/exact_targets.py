"""What solvers are measured on: exact denoisers, and tables run on them, in numpy and float64."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import integrate

from ancestral.models import schedules
from ancestral.sampling import tables


class Target(NamedTuple):
  """sum_k weights[k] N(means[k], variances[k] I)."""

  name: str
  weights: np.ndarray  # [K]
  means: np.ndarray  # [K, D]
  variances: np.ndarray  # [K]


def four_modes() -> Target:
  """Four modes of unequal width and weight."""
  means = np.array([[1.0, 0.3], [-0.5, 0.9], [-0.7, -0.6], [0.6, -0.9]])
  variances = np.array([0.02, 0.04, 0.03, 0.05])
  return Target("4 modes in 2-D", np.array([0.3, 0.3, 0.2, 0.2]), means, variances)


KERNEL = 0.15  # deviation about each digit


def digits() -> Target:
  """The 1797 digits of 8 x 8 pixels in [-1, 1], each with a kernel of deviation KERNEL."""
  from sklearn import datasets

  points = datasets.load_digits().data / 8 - 1
  num = len(points)
  return Target("digits in 64-D", np.full(num, 1 / num), points, np.full(num, KERNEL**2))


def split_digits() -> tuple[np.ndarray, np.ndarray]:
  """1,500 of the digits, for a density, and the 297 others, [N, 64]."""
  points = np.random.default_rng(0).permutation(digits().means)
  return points[:1500], points[1500:]


def distances(points: np.ndarray, means: np.ndarray) -> np.ndarray:
  """|x_i - m_k|^2, [B, K]."""
  squares = np.sum(points**2, axis=1)[:, None] + np.sum(means**2, axis=1)[None]
  return squares - 2 * points @ means.T


def denoised(target: Target, x: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
  """E[x_0 | x_t = x] in float64, [B, D]; see `toy.mixture_denoiser`."""
  total = alpha**2 * target.variances + sigma**2
  log_joint = np.log(target.weights) - 0.5 * x.shape[1] * np.log(total)
  log_joint = log_joint[None] - 0.5 * distances(x, alpha * target.means) / total[None]
  share = np.exp(log_joint - log_joint.max(axis=1, keepdims=True))
  share /= share.sum(axis=1, keepdims=True)
  share /= total[None]
  slope = share @ target.variances
  return sigma**2 * share @ target.means + alpha * slope[:, None] * x


def applied(
  table: tables.SolverTable, denoise: Callable[[np.ndarray, float], np.ndarray], x: np.ndarray
) -> np.ndarray:
  """The sample from the state x [B, D] at times[0], by the table's recurrence, without noise."""
  slots = np.zeros((table.carry.shape[1], *x.shape))
  slots[0] = x
  for i in range(table.num_rows):
    output = denoise(slots[0], table.times[i])
    slots = np.einsum("jl,lbd->jbd", table.carry[i], slots)
    slots += table.output[i, :, 0][:, None, None] * output[None]
  return slots[0]


def run(
  table: tables.SolverTable, schedule: schedules.Schedule, target: Target, x: np.ndarray
) -> np.ndarray:
  """`applied` to the target's denoiser."""
  denoise = lambda x, t: denoised(target, x, schedule.alpha(t), schedule.sigma(t))
  return applied(table, denoise, x)


def replay(
  expansion: tables.Expansion, schedule: schedules.Schedule, target: Target, x: np.ndarray
) -> np.ndarray:
  """The same of an expansion, whose points are inputs of the state x at times[0] and outputs."""
  alpha, sigma = schedule.alpha(expansion.times), schedule.sigma(expansion.times)
  scale = expansion.inputs[:, 1] / expansion.inputs[0, 1]
  outputs = np.zeros((len(expansion.times) - 1, *x.shape))
  for i in range(len(outputs)):
    point = scale[i] * x + np.einsum("j,jbd->bd", expansion.outputs[i, :i, 0], outputs[:i])
    outputs[i] = denoised(target, point, alpha[i], sigma[i])
  return scale[-1] * x + np.einsum("j,jbd->bd", expansion.outputs[-1, :, 0], outputs)


def reference(target: Target, x: np.ndarray, first: float, last: float, tolerance: float):
  """x / alpha at lambda = last, from x / alpha at lambda = first.

  d (x / alpha) / d lambda = D - x / alpha, by DOP853 with this relative and absolute tolerance.
  """

  def slope(half_log_snr, y):
    y = y.reshape(x.shape)
    return (denoised(target, y, 1.0, np.exp(-half_log_snr)) - y).ravel()

  path = integrate.solve_ivp(
    slope, (first, last), x.ravel(), method="DOP853", rtol=tolerance, atol=tolerance
  )
  return path.y[:, -1].reshape(x.shape)


def solution(target: Target, schedule: schedules.Schedule, x: np.ndarray) -> np.ndarray:
  """x_0 [B, D] from x [B, D] of the schedule's last time: at lambda = 8, then denoised."""
  first = float(schedules.half_log_snr(schedule, schedule.max_time))
  low = reference(target, x / schedule.alpha(schedule.max_time), first, 8.0, 1e-9)
  return denoised(target, low, 1.0, np.exp(-8.0))


def rms(error: np.ndarray) -> float:
  """Root of the mean square."""
  return float(np.sqrt(np.mean(error**2)))


class Score(NamedTuple):
  """Of samples against the reference's."""

  rms: float
  median: float  # of the samples' own RMS
  moved: float  # share whose nearest mean is another


def score(target: Target, x: np.ndarray, truth: np.ndarray) -> Score:
  """Samples [B, D] against the truth from the same noise."""
  if not np.all(np.isfinite(x)):
    return Score(np.inf, np.inf, 1.0)
  nearest = lambda points: np.argmin(distances(points, target.means), axis=1)
  each = np.sqrt(np.mean((x - truth) ** 2, axis=1))
  return Score(rms(x - truth), float(np.median(each)), np.mean(nearest(x) != nearest(truth)))
