"""Grids of times: where a diffusion solver evaluates the model, and where it ends.

A grid is [n + 1] times in float64, made on the host; a solver with one evaluation a step evaluates
at all of them but the last, n evaluations in all. There is one rule for the end: `end` is the last
time, and what lives there still has noise sigma(end). The samples without noise are at time 0,
by `end=0`, where a spacing has a place for it, or by one more step, which for a solver of the first
order is to take the denoised sample:

    karras(schedule, 10, end=0.002)             10 evaluations, ends at noise sigma(0.002)
    to_zero(karras(schedule, 9, end=0.002))     10 evaluations, the last at time 0.002

A grid of 0 steps is its start alone, so that `to_zero` of it is one step. Solvers that evaluate
more than once a step say so themselves. Reversed, `times[::-1]`, a grid whose end is above 0 leads
from data to noise: inversion.
"""

from collections.abc import Sequence

import numpy as np
import scipy.special

from ..models import schedules
from . import tables


def uniform(
  schedule: schedules.Schedule, num_steps: int, *, start: float | None = None, end: float
) -> np.ndarray:
  """Evenly spaced times, [num_steps + 1].

  Args:
    schedule: of the model.
    num_steps: n >= 0.
    start: the first time, by default the schedule's last.
    end: the last time, from 0 to below `start`.

  Raises:
    ValueError: the number of steps is negative, or 0 <= end < start <= max_time does not hold.
  """
  start = _ends(schedule, num_steps, start, end)
  return _pinned(np.linspace(start, end, num_steps + 1), start, end)


def power(
  schedule: schedules.Schedule,
  num_steps: int,
  *,
  start: float | None = None,
  end: float,
  exponent: float = 2.0,
) -> np.ndarray:
  """t^(1 / exponent) evenly spaced, [num_steps + 1]: quadratic by default; 1 is `uniform`.

  Args and Raises: see `uniform`; besides, an exponent that is not above 0.

  Reference: Song et al. 2020 (DDIM), arXiv 2010.02502, appendix D.2; Zhang and Chen 2022 (DEIS),
    arXiv 2204.13902.
  """
  start = _ends(schedule, num_steps, start, end)
  _positive(exponent=exponent)
  root = np.linspace(start ** (1 / exponent), end ** (1 / exponent), num_steps + 1)
  return _pinned(root**exponent, start, end)


def beta(
  schedule: schedules.Schedule,
  num_steps: int,
  *,
  start: float | None = None,
  end: float,
  a: float = 0.6,
  b: float = 0.6,
) -> np.ndarray:
  """Quantiles of Beta(a, b) at even levels, from [0, 1] to [end, start], [num_steps + 1].

  Parameters below 1 put more steps at both ends; a = b = 1 is `uniform`.

  Args and Raises: see `uniform`; besides, an a or b that is not above 0.

  Reference: Lee et al. 2024, arXiv 2407.12173.
  """
  start = _ends(schedule, num_steps, start, end)
  _positive(a=a, b=b)
  quantile = scipy.special.betaincinv(a, b, np.linspace(1.0, 0.0, num_steps + 1))
  return _pinned(end + quantile * (start - end), start, end)


def log_snr(
  schedule: schedules.Schedule, num_steps: int, *, start: float | None = None, end: float
) -> np.ndarray:
  """lambda = log(alpha / sigma) evenly spaced, [num_steps + 1].

  It is the exponential grid too, whose noise ratios sigma / alpha = exp(-lambda) are a geometric
  sequence.

  Args and Raises: see `uniform`; besides, an infinite lambda at either end: time 0 has one, and so
    has the first time of a schedule that leaves no signal there.

  Reference: Lu et al. 2022 (DPM-Solver), arXiv 2206.00927, section 3.4.
  """
  return polyexponential(schedule, num_steps, start=start, end=end, exponent=1.0)


def polyexponential(
  schedule: schedules.Schedule,
  num_steps: int,
  *,
  start: float | None = None,
  end: float,
  exponent: float,
) -> np.ndarray:
  """lambda_i = lambda_n - (1 - i / n)^exponent (lambda_n - lambda_0), [num_steps + 1].

  Above 1, the exponent puts more steps where there is little noise; 1 is `log_snr`.

  Args and Raises: see `log_snr`; besides, an exponent that is not above 0.
  """
  start = _ends(schedule, num_steps, start, end)
  _positive(exponent=exponent)
  first, last = _half_log_snrs(schedule, [start, end])
  ramp = np.linspace(1.0, 0.0, num_steps + 1) ** exponent
  return _pinned(schedule.time(last - ramp * (last - first)), start, end)


def karras(
  schedule: schedules.Schedule,
  num_steps: int,
  *,
  start: float | None = None,
  end: float,
  rho: float = 7.0,
) -> np.ndarray:
  """The noise ratio to the power of 1 / rho evenly spaced, [num_steps + 1].

  (sigma / alpha)_i = (r_0^(1 / rho) + i / n (r_n^(1 / rho) - r_0^(1 / rho)))^rho, from the ratio
  r_0 at `start` to r_n at `end`.

  Args and Raises: see `log_snr`; besides, a rho that is not above 0.

  Reference: Karras et al. 2022 (EDM), arXiv 2206.00364, eq. 5, whose N noise levels before 0 are
    to_zero(karras(schedule, N - 1, ..)).
  """
  start = _ends(schedule, num_steps, start, end)
  _positive(rho=rho)
  first, last = _half_log_snrs(schedule, [start, end])
  root = np.linspace(np.exp(-first / rho), np.exp(-last / rho), num_steps + 1)
  return _pinned(schedule.time(-rho * np.log(root)), start, end)


def leading(
  schedule: schedules.Schedule, num_steps: int, *, offset: int = 0, end: float = 0.0
) -> np.ndarray:
  """Times of a chain, T // n apart, the lowest 1 + offset, then `end`: [num_steps + 1].

  The three spacings of chains, `leading`, `trailing` and `linspace`, evaluate at n whole times
  t = 1, .., T of a `schedules.from_betas` (others count from 0: t - 1) and then step to `end`: 0,
  or 1 for pipelines that stop at the chain's first state.

  Args:
    schedule: of T = max_time steps.
    num_steps: n, from 1 to T.
    offset: added to every time but the last.
    end: the last time, below the one before.

  Raises:
    ValueError: n is not in 1 .. T, a time is beyond T, or the last does not fall.

  Reference: Lin et al. 2023, arXiv 2305.08891, table 2.
  """
  length = _chain_length(schedule, num_steps)
  times = np.arange(num_steps)[::-1] * (length // num_steps) + 1.0 + offset
  return given(schedule, [*times, end])


def trailing(schedule: schedules.Schedule, num_steps: int, *, end: float = 0.0) -> np.ndarray:
  """Whole times nearest to T (n - i) / n, i < n, then `end`: [num_steps + 1]; see `leading`."""
  length = _chain_length(schedule, num_steps)
  return given(schedule, [*np.rint(np.arange(num_steps, 0, -1) * length / num_steps), end])


def linspace(schedule: schedules.Schedule, num_steps: int, *, end: float = 0.0) -> np.ndarray:
  """Whole times nearest to n even ones from T to 1, then `end`: [num_steps + 1]; see `leading`."""
  length = _chain_length(schedule, num_steps)
  even = np.linspace(0, length - 1, num_steps)[::-1] if num_steps > 1 else [length - 1]
  return given(schedule, [*(1 + np.rint(even)), end])


def given(schedule: schedules.Schedule, times: Sequence[float]) -> np.ndarray:
  """These times, float64, after a look at them.

  Raises:
    ValueError: fewer than two, one outside [0, max_time], or they neither all fall nor all rise.
  """
  times = tables.grid(schedule, times)
  step = np.diff(times)
  if not (np.all(step < 0) or np.all(step > 0)):
    raise ValueError("times have to fall throughout, or to rise throughout.")
  return times


def to_zero(times: np.ndarray) -> np.ndarray:
  """The grid with one more step, to time 0.

  Raises:
    ValueError: it is there already, or the times rise.
  """
  times = np.asarray(times, np.float64)
  if times[-1] <= 0 or times[-1] > times[0]:
    raise ValueError(f"The last time is {times[-1]}; it has to be above 0 and the lowest.")
  return np.append(times, 0.0)


def shifted(schedule: schedules.Schedule, times: np.ndarray, shift: float) -> np.ndarray:
  """The grid with `shift` times the noise ratio at every time: for a higher resolution.

  lambda(t') = lambda(t) - log(shift), which for rectified flow is t' = k t / (1 + (k - 1) t). Times
  without noise or without signal stay. The network is the plain schedule's; for networks trained
  with a shift, `schedules.shifted` has it already, and grids made on that schedule need none. The
  shift that depends on resolution by mu is exp(mu).

  Args:
    schedule: of the model.
    times: [n + 1].
    shift: k > 0; below 1, less noise.

  Raises:
    ValueError: k is not above 0, or takes a time beyond the schedule's last.

  Reference: Esser et al. 2024, arXiv 2403.03206, eq. 23.
  """
  _positive(shift=shift)
  times = np.asarray(times, np.float64)
  half_log_snr = schedules.half_log_snr(schedule, times) - np.log(shift)
  lowest = schedules.half_log_snr(schedule, schedule.max_time)
  if np.min(half_log_snr) < lowest - 1e-12 * abs(lowest):
    raise ValueError(
      f"shift={shift} takes time {np.max(times)} beyond {schedule.max_time}, the schedule's last: "
      "the grid has to start lower."
    )
  return np.minimum(schedule.time(half_log_snr), schedule.max_time)


def stretched(times: np.ndarray, end: float) -> np.ndarray:
  """The grid scaled about its start such that it ends at `end`: t_0 + c (t - t_0), c > 0.

  Raises:
    ValueError: the end is on the wrong side of the start.
  """
  times = np.asarray(times, np.float64)
  reach = times[-1] - times[0]
  if not (end - times[0]) * reach > 0:
    raise ValueError(f"end={end}: the times go from {times[0]} to {times[-1]}.")
  return _pinned(times[0] + (times - times[0]) * ((end - times[0]) / reach), times[0], end)


def resampled(schedule: schedules.Schedule, times: np.ndarray, num_steps: int) -> np.ndarray:
  """A grid of another number of steps that dwells where this one does, [num_steps + 1].

  lambda as a function of i / n is interpolated linearly: how a published list of times for one
  number of steps serves another. A last step to time 0 is left out and appended again.

  Raises:
    ValueError: see `given`; num_steps is below 1, or a time before the last has no finite lambda.

  Reference: Sabour et al. 2024 (Align Your Steps), arXiv 2404.14507.
  """
  times = given(schedule, times)
  if num_steps < 1:
    raise ValueError(f"num_steps={num_steps}: has to be 1 or more.")
  if num_steps == 1:
    return times[[0, -1]]
  if times[-1] == 0:
    return to_zero(resampled(schedule, times[:-1], num_steps - 1))
  half_log_snr = _half_log_snrs(schedule, times)
  places = np.linspace(0.0, 1.0, num_steps + 1)
  knots = np.linspace(0.0, 1.0, len(times))
  return _pinned(schedule.time(np.interp(places, knots, half_log_snr)), times[0], times[-1])


def local_errors(
  schedule: schedules.Schedule, times: np.ndarray, states: np.ndarray, denoised: np.ndarray
) -> np.ndarray:
  """What one DDIM step from time i to time j > i is off by, averaged over trajectories.

  cost[i, j] = mean_b || alpha_j D_i + sigma_j (x_i - alpha_i D_i) / sigma_i - x_j || / alpha_j

  The error is of x / alpha, in which the equation is the same for every schedule, and at the end
  alpha is about 1. The norm is Euclidean; the authors also have costs by deviation from a chord.

  Args:
    schedule: of the model.
    times: [m + 1], fine; those after the first with some signal, those before the last with noise.
    states: [m + 1, B, ...], x_i of B accurate trajectories.
    denoised: [m, B, ...] or [m + 1, B, ...], D_i = E[x_0 | x_i].

  Returns:
    [m + 1, m + 1], inf where j <= i.

  Raises:
    ValueError: there are not as many states as times, or fewer outputs than steps.

  Reference: Chen et al. 2024 (GITS), arXiv 2405.11326.
  """
  count = len(times)
  if len(states) != count or len(denoised) < count - 1:
    raise ValueError(f"{count} times, {len(states)} states, {len(denoised)} outputs do not match.")
  alpha, sigma = schedule.alpha(np.asarray(times)), schedule.sigma(np.asarray(times))
  flat = lambda a: np.asarray(a, np.float64).reshape(len(a), len(a[0]), -1)
  states, denoised = flat(states), flat(denoised)
  costs = np.full((count, count), np.inf)
  for i in range(count - 1):
    noise = (states[i] - alpha[i] * denoised[i]) / sigma[i]
    a, s = alpha[i + 1 :, None, None], sigma[i + 1 :, None, None]
    error = denoised[i][None] + (s * noise[None] - states[i + 1 :]) / a
    costs[i, i + 1 :] = np.mean(np.linalg.norm(error, axis=-1), axis=-1)
  return costs


def dynamic_programming(costs: np.ndarray, num_steps: int, *, gamma: float = 1.0) -> np.ndarray:
  """Indices [num_steps + 1] of the cheapest path from the first time to the last.

  It minimises sum_k gamma^k cost[i_k, i_{k + 1}] over 0 = i_0 < .. < i_n = m. The grid is
  `times[indices]`. What is left of a local error at the end is another matter: later steps damp
  it. A gamma above 1 makes early errors cheaper; the authors' code takes 1.15.

  Args:
    costs: [m + 1, m + 1], from `local_errors`; only above the diagonal.
    num_steps: n, from 1 to m.
    gamma: how much more a step weighs than the one before.

  Raises:
    ValueError: there is no path of n steps.

  Reference: Chen et al. 2024 (GITS), arXiv 2405.11326.
  """
  costs = np.asarray(costs, np.float64)
  last = len(costs) - 1
  if not 1 <= num_steps <= last:
    raise ValueError(f"num_steps={num_steps}: from 1 to {last}, one less than there are times.")
  forward = np.where(np.triu(np.ones(costs.shape, bool), 1), costs, np.inf)
  to_go = np.where(np.arange(last + 1) == last, 0.0, np.inf)  # after the last step
  following = []
  for _ in range(num_steps):
    total = forward + gamma * to_go[None, :]
    following.append(np.argmin(total, axis=1))
    to_go = np.min(total, axis=1)
  path = [0]
  for choice in reversed(following):
    path.append(choice[path[-1]])
  return np.array(path)


def _ends(schedule, num_steps, start, end):
  """The start, after a look at what every grid is made of."""
  start = float(schedule.max_time if start is None else start)
  if num_steps < 0:
    raise ValueError(f"num_steps={num_steps}: has to be 0 or more.")
  if not 0 <= end < start <= schedule.max_time * (1 + 1e-12):
    raise ValueError(f"start={start}, end={end}: need 0 <= end < start <= {schedule.max_time}.")
  return start


def _pinned(times, start, end):
  """The times, with the two that are known exactly."""
  times = np.array(times, np.float64)
  times[-1] = end
  times[0] = start
  return times


def _positive(**values):
  for name, value in values.items():
    if not value > 0:
      raise ValueError(f"{name}={value}: has to be above 0.")


def _half_log_snrs(schedule, times):
  """lambda, which has to be finite."""
  times = np.asarray(times, np.float64)
  half_log_snr = schedules.half_log_snr(schedule, times)
  if not np.all(np.isfinite(half_log_snr)):
    raise ValueError(
      f"lambda is infinite at time {times[~np.isfinite(half_log_snr)][0]}; the grid has to keep "
      f"off it, strictly within 0 and {schedule.max_time}."
    )
  return half_log_snr


def _chain_length(schedule, num_steps):
  length = int(schedule.max_time)
  if length != schedule.max_time or not 1 <= num_steps <= length:
    raise ValueError(f"num_steps={num_steps}: a chain of {schedule.max_time} has 1 up to so many.")
  return length
