"""Noise schedules: what x_t = alpha(t) x_0 + sigma(t) z means at time t, from 0 (data) to max_time.

Functions of time take numpy arrays on the host, in float64 (solver tables are made there), and jax
arrays inside jit (networks and guidance). Three ratios recur, of one piece of information:

    rho = sigma / alpha,    kappa = alpha / sigma,    lambda = log(alpha / sigma),

lambda being half of the logarithm of the signal-to-noise ratio.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Time = np.ndarray | jax.Array | float


class Schedule(NamedTuple):
  """A path from data to noise, x_t = alpha(t) x_0 + sigma(t) z with z ~ N(0, I).

  Attributes:
    alpha: t [...] -> [...], falling, alpha(0) = 1.
    sigma: t [...] -> [...], rising, sigma(0) = 0.
    time: lambda [...] -> t [...], the inverse of `half_log_snr`; inf gives 0.
    max_time: the noisiest t.
  """

  alpha: Callable[[Time], Time]
  sigma: Callable[[Time], Time]
  time: Callable[[Time], Time]
  max_time: float


def half_log_snr(schedule: Schedule, t: Time) -> Time:
  """lambda(t) = log(alpha(t) / sigma(t)): inf at time 0, -inf where the signal is gone."""
  xp = _namespace(t)
  with np.errstate(divide="ignore"):
    return xp.log(schedule.alpha(t)) - xp.log(schedule.sigma(t))


def shifted(schedule: Schedule, shift: float) -> Schedule:
  """The schedule whose noise ratio rho is `shift` times as large at every time.

  lambda'(t) = lambda(t) - log(shift), along the same family of (alpha, sigma). An image with twice
  the side has four pixels where it had one, and their mean carries the signal at half the noise;
  shift = 2 makes up for it. For networks trained with the shift; to give a network of the plain
  schedule a grid of times that dwells where it is noisy, see `grids.shifted`, not both.

  Raises:
    ValueError: the shift is not above 0, or leads beyond the noisiest state of a chain.

  Reference: Hoogeboom et al. 2023, arXiv 2301.11093, section 3.1; Esser et al. 2024, arXiv
    2403.03206, eq. 23.
  """
  if not shift > 0:
    raise ValueError(f"shift={shift}: has to be above 0; 1 leaves the schedule as it is.")
  noisiest = half_log_snr(schedule, schedule.max_time) - np.log(shift)
  if not np.isclose(half_log_snr(schedule, schedule.time(noisiest)), noisiest):
    raise ValueError(
      f"A shift of {shift} leads to noise that this chain does not reach: give `from_betas` betas "
      "of zero terminal signal, or shift by 1 at most."
    )
  moved = lambda t: schedule.time(half_log_snr(schedule, t) - np.log(shift))
  return schedule._replace(
    alpha=lambda t: schedule.alpha(moved(t)),
    sigma=lambda t: schedule.sigma(moved(t)),
    time=lambda half_log_snr: schedule.time(half_log_snr + np.log(shift)),
  )


def variance_exploding(max_sigma: float = 80.0) -> Schedule:
  """alpha = 1, sigma = t: time is the noise level.

  Reference: Karras et al. 2022 (EDM), arXiv 2206.00364, table 1.
  """
  return Schedule(
    alpha=lambda t: _namespace(t).ones_like(_array(t)),
    sigma=lambda t: _array(t),
    time=lambda half_log_snr: _exp(-_array(half_log_snr)),
    max_time=max_sigma,
  )


def rectified_flow() -> Schedule:
  """alpha = 1 - t, sigma = t: straight lines from data to noise; at t = 1 no signal is left.

  Reference: Liu et al. 2022, arXiv 2209.03003; Lipman et al. 2022, arXiv 2210.02747, eq. 20.
  """
  return Schedule(
    alpha=lambda t: 1 - _array(t),
    sigma=lambda t: _array(t),
    time=lambda half_log_snr: _sigmoid(-half_log_snr),
    max_time=1.0,
  )


def trigonometric() -> Schedule:
  """alpha = cos(pi t / 2), sigma = sin(pi t / 2): quarter circles; at t = 1 no signal is left.

  Reference: Albergo et al. 2023, arXiv 2303.08797, table 4.
  """
  return Schedule(
    alpha=lambda t: _namespace(t).sin(np.pi / 2 * (1 - _array(t))),
    sigma=lambda t: _namespace(t).sin(np.pi / 2 * _array(t)),
    time=lambda half_log_snr: (
      2 / np.pi * _namespace(half_log_snr).arctan(_exp(-_array(half_log_snr)))
    ),
    max_time=1.0,
  )


def linear(beta_min: float = 0.1, beta_max: float = 20.0) -> Schedule:
  """Variance preserving with beta(t) = beta_min + t (beta_max - beta_min), t in [0, 1].

  log alpha = -(t^2 (beta_max - beta_min) / 4 + t beta_min / 2), sigma^2 = 1 - alpha^2.

  Reference: Song et al. 2021, arXiv 2011.13456, eq. 32.
  """
  slope = beta_max - beta_min

  def log_alpha(t):
    return -(_array(t) ** 2 * slope / 4 + _array(t) * beta_min / 2)

  def time(half_log_snr):
    decay = 0.5 * _softplus(-2 * _array(half_log_snr))  # -log alpha
    return 4 * decay / (beta_min + _namespace(decay).sqrt(beta_min**2 + 4 * slope * decay))

  return Schedule(
    alpha=lambda t: _namespace(t).exp(log_alpha(t)),
    sigma=lambda t: _namespace(t).sqrt(-_namespace(t).expm1(2 * log_alpha(t))),
    time=time,
    max_time=1.0,
  )


def cosine(offset: float = 0.008) -> Schedule:
  """Variance preserving, alpha(t) = cos(b) / cos(a), b = pi/2 (t + s) / (1 + s), a its value at 0.

  At t = 1 no signal is left. With cos^2 a - cos^2 b = sin(b - a) sin(b + a), sigma is exact at
  both ends.

  Reference: Nichol and Dhariwal 2021, arXiv 2102.09672, eq. 17.
  """
  scale = np.pi / 2 / (1 + offset)
  a = scale * offset

  def sigma(t):
    xp, t = _namespace(t), _array(t)
    return xp.sqrt(xp.sin(scale * t) * xp.sin(scale * t + 2 * a)) / np.cos(a)

  def time(half_log_snr):
    xp, given = _namespace(half_log_snr), _array(half_log_snr)
    noise = np.cos(a) ** 2 * _sigmoid(-2 * given)  # sin^2 b - sin^2 a
    sin_b, cos_b = xp.sqrt(noise + np.sin(a) ** 2), np.cos(a) * xp.sqrt(_sigmoid(2 * given))
    sine = noise / (sin_b * np.cos(a) + cos_b * np.sin(a))  # of b - a
    return xp.arctan2(sine, cos_b * np.cos(a) + sin_b * np.sin(a)) / scale

  return Schedule(
    alpha=lambda t: _namespace(t).sin(scale * (1 - _array(t))) / np.cos(a),
    sigma=sigma,
    time=time,
    max_time=1.0,
  )


def sigmoid(start: float = -3.0, end: float = 3.0, temperature: float = 1.0) -> Schedule:
  """Variance preserving, sigma^2 rising as a logistic function from `start` to `end`.

  With s(u) = 1 / (1 + exp(-u / temperature)) and u = start + t (end - start),
  sigma^2 = (s(u) - s(start)) / (s(end) - s(start)). At t = 1 no signal is left.

  Reference: Jabri et al. 2022, arXiv 2212.11972; Chen 2023, arXiv 2301.10972, algorithm 1.
  """
  low, high = start / temperature, end / temperature
  width = high - low

  def rise(by, one, other):
    """s(one) - s(other), exact where `by` = one - other is."""
    xp = _namespace(by)
    return xp.sinh(by / 2) / (2 * xp.cosh(one / 2) * xp.cosh(other / 2))

  span = rise(width, high, low)

  def alpha(t):
    t = _array(t)
    return _namespace(t).sqrt(rise((1 - t) * width, high, low + t * width) / span)

  def sigma(t):
    t = _array(t)
    return _namespace(t).sqrt(rise(t * width, low + t * width, low) / span)

  def time(half_log_snr):
    risen = _sigmoid(-2 * _array(half_log_snr)) * span
    xp = _namespace(risen)
    return (xp.log1p(risen / _sigmoid(low)) - xp.log1p(-risen / _sigmoid(-low))) / width

  return Schedule(alpha, sigma, time, max_time=1.0)


def from_betas(betas: np.ndarray) -> Schedule:
  """The chain alpha_t^2 = prod_{s <= t} (1 - beta_s), sigma^2 = 1 - alpha^2, for t in [0, T].

  Time t = 1, .., T is the state after t steps of noise; networks that count from 0 take t - 1.
  Between, lambda is linear in t; before 1, rho is, and after T - 1, if the last state has no
  signal (beta_T = 1), kappa is: both reach their 0.

  Args:
    betas: [T], from `linear_betas` and its like.

  Raises:
    ValueError: a beta is outside (0, 1), the last excepted, which may be 1.

  Reference: Ho et al. 2020, arXiv 2006.11239, eq. 4.
  """
  betas = np.asarray(betas, np.float64)
  if not (len(betas) > 1 and np.all(betas > 0) and np.all(betas[:-1] < 1) and betas[-1] <= 1):
    raise ValueError("betas have to be two at least, above 0 and below 1 (the last may be 1).")
  with np.errstate(divide="ignore"):
    log_alpha = 0.5 * np.cumsum(np.log1p(-betas))
    knots = log_alpha - 0.5 * np.log(-np.expm1(2 * log_alpha))  # lambda at 1, .., T
  last = len(betas)
  finite = knots[np.isfinite(knots)]
  places = np.arange(1, len(finite) + 1, dtype=np.float64)

  def half_log_snr(t):
    xp, t = _namespace(t), _array(t)
    inner = xp.interp(t, xp.asarray(places, t.dtype), xp.asarray(finite, t.dtype))
    with np.errstate(divide="ignore"):
      inner = inner - xp.log(xp.minimum(t, 1.0))
      if len(finite) < last:
        inner = inner + xp.log(xp.clip(last - t, 0.0, 1.0))
    return inner

  def time(half_log_snr):
    xp, given = _namespace(half_log_snr), _array(half_log_snr)
    inner = xp.interp(-given, xp.asarray(-finite, given.dtype), xp.asarray(places, given.dtype))
    inner = inner * xp.exp(xp.minimum(finite[0] - given, 0.0))
    if len(finite) < last:
      inner = inner + 1 - xp.exp(xp.minimum(given - finite[-1], 0.0))
    return inner

  return Schedule(
    alpha=lambda t: _exp(-0.5 * _softplus(-2 * half_log_snr(t))),
    sigma=lambda t: _exp(-0.5 * _softplus(2 * half_log_snr(t))),
    time=time,
    max_time=float(last),
  )


def linear_betas(num_steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> np.ndarray:
  """beta_1 .. beta_T on a line, [T]. Reference: Ho et al. 2020, arXiv 2006.11239, section 4."""
  return np.linspace(first, last, num_steps)


def scaled_linear_betas(
  num_steps: int = 1000, first: float = 0.00085, last: float = 0.012
) -> np.ndarray:
  """sqrt(beta_1) .. sqrt(beta_T) on a line, [T]: latent diffusion's.

  Reference: Rombach et al. 2022, arXiv 2112.10752.
  """
  return np.linspace(np.sqrt(first), np.sqrt(last), num_steps) ** 2


def cosine_betas(num_steps: int = 1000, cap: float = 0.999) -> np.ndarray:
  """beta_t = min(1 - alpha_t^2 / alpha_{t-1}^2, cap) of the cosine schedule, [T].

  Reference: Nichol and Dhariwal 2021, arXiv 2102.09672, eq. 17.
  """
  square = cosine().alpha(np.arange(num_steps + 1) / num_steps) ** 2
  return np.minimum(1 - square[1:] / square[:-1], cap)


def sigmoid_betas(num_steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> np.ndarray:
  """beta_t from `first` to `last` along a logistic function over [-6, 6], [T]."""
  return first + (last - first) * _sigmoid(np.linspace(-6.0, 6.0, num_steps))


def zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
  """The betas of the chain whose alpha is shifted and scaled to reach 0 at T, [T]; the last is 1.

  alpha'_t = (alpha_t - alpha_T) alpha_1 / (alpha_1 - alpha_T).

  Reference: Lin et al. 2023, arXiv 2305.08891, algorithm 1.
  """
  alpha = np.sqrt(np.cumprod(1 - np.asarray(betas, np.float64)))
  alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
  return 1 - np.square(alpha / np.concatenate([[1.0], alpha[:-1]]))


def _namespace(x: Time):
  return jnp if isinstance(x, jax.Array) else np


def _array(x: Time) -> np.ndarray | jax.Array:
  return x if isinstance(x, jax.Array) else np.asarray(x, np.float64)


def _exp(x: Time) -> Time:
  """Of what may be an infinity or too large for a number."""
  with np.errstate(over="ignore"):
    return _namespace(x).exp(x)


def _softplus(x: Time) -> Time:
  return _namespace(x).logaddexp(x, _namespace(x).zeros_like(x))


def _sigmoid(x: Time) -> Time:
  return _exp(-_softplus(-_array(x)))
