"""How much an error at each noise level counts, and how often each is drawn.

A weighting is a function (alpha, sigma) -> w of the squared error of D = E[x_0 | x_t]; every loss
on another output is one: an error d of D is one of eps by alpha / sigma d, of v by
(alpha^2 + sigma^2) / sigma d, of u = eps - D by (alpha + sigma) / sigma d. The minimiser is the
exact denoiser under any weighting that is positive; they differ in what a network with less than
all capacity gets right. SNR is alpha^2 / sigma^2.

Times are a function of quantiles in (0, 1): how these are drawn (`independent`, `low_discrepancy`)
and which law they are quantiles of (`uniform`, `log_normal`, ...) are two choices.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ..models import schedules

Weighting = Callable[[jax.Array, jax.Array], jax.Array]  # alpha [...], sigma [...] -> [...]
Quantiles = Callable[[jax.Array, int], jax.Array]  # key, B -> [B] in (0, 1)
Times = Callable[[jax.Array], jax.Array]  # quantiles [B] -> t [B]


def noise(alpha: jax.Array, sigma: jax.Array) -> jax.Array:
  """SNR: the squared error of eps. Reference: Ho et al. 2020, arXiv 2006.11239, eq. 14."""
  return jnp.square(alpha / sigma)


def data(alpha: jax.Array, sigma: jax.Array) -> jax.Array:
  """1: the squared error of D."""
  del sigma
  return jnp.ones_like(alpha)


def velocity(alpha: jax.Array, sigma: jax.Array) -> jax.Array:
  """(alpha^2 + sigma^2)^2 / sigma^2: the squared error of v = alpha eps - sigma D.

  SNR + 1 where variance is preserved.

  Reference: Salimans and Ho 2022, arXiv 2202.00512, section 4.
  """
  return jnp.square((alpha**2 + sigma**2) / sigma)


def flow(alpha: jax.Array, sigma: jax.Array) -> jax.Array:
  """(alpha + sigma)^2 / sigma^2: the squared error of u = eps - D, conditional flow matching.

  Reference: Lipman et al. 2022, arXiv 2210.02747, eq. 9.
  """
  return jnp.square((alpha + sigma) / sigma)


def karras(sigma_data: float = 0.5) -> Weighting:
  """1 / c_out^2 = (rho^2 + s^2) / (rho s)^2, rho = sigma / alpha: the squared error of F.

  Reference: Karras et al. 2022 (EDM), arXiv 2206.00364, section 5.
  """
  return lambda alpha, sigma: 1 / sigma_data**2 + jnp.square(alpha / sigma)


def min_snr(gamma: float = 5.0) -> Weighting:
  """min(SNR, gamma). Reference: Hang et al. 2023, arXiv 2303.09556, section 3.4."""
  return lambda alpha, sigma: jnp.minimum(noise(alpha, sigma), gamma)


def p2(k: float = 1.0, gamma: float = 1.0) -> Weighting:
  """SNR / (k + SNR)^gamma: the error of eps, less of it where little noise is left.

  Reference: Choi et al. 2022, arXiv 2204.00227, eq. 8.
  """

  def weight(alpha, sigma):
    snr = noise(alpha, sigma)
    return snr / (k + snr) ** gamma

  return weight


_SMALLEST = 2.0**-24  # quantiles stay as far from 0 and from 1, where some laws have no time


def independent(key: jax.Array, num: int) -> jax.Array:
  """Uniform quantiles, [num]."""
  return jnp.clip(jax.random.uniform(key, (num,)), _SMALLEST, 1 - _SMALLEST)


def low_discrepancy(key: jax.Array, num: int) -> jax.Array:
  """Quantiles (i + u) / num, one u for all, in a random order, [num].

  Each is uniform, and together they have one in every interval of length 1 / num, so a mean over
  them varies less. The order keeps a row's time independent of its place in the batch.

  Reference: Kingma et al. 2021 (VDM), arXiv 2107.00630, appendix I.1.
  """
  shift_key, order_key = jax.random.split(key)
  places = jax.random.permutation(order_key, num) + jax.random.uniform(shift_key)
  return jnp.clip(places / num, _SMALLEST, 1 - _SMALLEST)


def uniform(schedule: schedules.Schedule, *, start: float | None = None, end: float = 0.0) -> Times:
  """Uniform in t between `end` and `start` (max_time)."""
  start = schedule.max_time if start is None else start
  return lambda quantiles: end + quantiles * (start - end)


def log_normal(schedule: schedules.Schedule, mean: float = -1.2, std: float = 1.2) -> Times:
  """ln(sigma / alpha) ~ N(mean, std^2), kept within the schedule.

  Reference: Karras et al. 2022 (EDM), arXiv 2206.00364, table 1. With mean 0 and std 1 on
    `rectified_flow` it is the logit-normal of Esser et al. 2024, arXiv 2403.03206, section 3.1.
  """

  def times(quantiles):
    log_ratio = mean + std * jax.scipy.special.ndtri(quantiles)
    return jnp.minimum(schedule.time(-log_ratio), schedule.max_time)

  return times


def log_uniform(schedule: schedules.Schedule, low: float = 0.002, high: float = 80.0) -> Times:
  """ln(sigma / alpha) uniform between ln(low) and ln(high)."""
  return lambda quantiles: schedule.time(
    -(jnp.log(low) + quantiles * (jnp.log(high) - jnp.log(low)))
  )
