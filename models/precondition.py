"""What a diffusion network puts out, and E[x_0 | x_t]: one from the other, on any schedule.

With x_t = alpha x_0 + sigma z, D = E[x_0 | x_t] and eps = E[z | x_t] = (x_t - alpha D) / sigma, a
network's output is a combination of two of x_t, D and eps, so any of them gives the others:

    head       output                                          D from it at alpha = 0
    NOISE      eps                                             infinite
    SCORE      grad log p(x_t) = -eps / sigma                  infinite
    DATA       D                                               finite
    VELOCITY   alpha eps - sigma D                             finite
    FLOW       eps - D, dx/dt where alpha = 1 - t, sigma = t   finite
    karras     (D - c_skip x_t) / c_out                        finite

Each fits every schedule, but for NOISE and SCORE at alpha = 0, where D is x_t / 0: a network that
predicts noise cannot start where no signal is left (`rectified_flow`, `trigonometric`, `cosine`,
`sigmoid`, chains with beta_T = 1). D is finite at sigma = 0 whatever the head. The output from D is
not, but for DATA: with no noise in it x_t says nothing of what the output was, and it is 0 / 0.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from . import base, schedules


class Head(NamedTuple):
  """A network's output in terms of the denoised, and back.

  Attributes:
    to_denoised: (x, output, alpha, sigma) -> D, all [B, ...] or in a shape that multiplies it.
    from_denoised: (x, D, alpha, sigma) -> output.
  """

  to_denoised: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
  from_denoised: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


# eps. Reference: Ho et al. 2020, arXiv 2006.11239, eq. 9 and 15.
NOISE = Head(
  to_denoised=lambda x, eps, alpha, sigma: (x - sigma * eps) / alpha,
  from_denoised=lambda x, denoised, alpha, sigma: (x - alpha * denoised) / sigma,
)

# grad log p(x_t). Reference: Song et al. 2021, arXiv 2011.13456, eq. 7.
SCORE = Head(
  to_denoised=lambda x, score, alpha, sigma: (x + sigma**2 * score) / alpha,
  from_denoised=lambda x, denoised, alpha, sigma: (alpha * denoised - x) / sigma**2,
)

# D itself.
DATA = Head(
  to_denoised=lambda x, denoised, alpha, sigma: denoised,
  from_denoised=lambda x, denoised, alpha, sigma: denoised,
)

# v = alpha eps - sigma D = (alpha x - (alpha^2 + sigma^2) D) / sigma. Its inverse is the familiar
# alpha x - sigma v where alpha^2 + sigma^2 = 1 alone.
# Reference: Salimans and Ho 2022, arXiv 2202.00512, appendix D.
VELOCITY = Head(
  to_denoised=lambda x, v, alpha, sigma: (alpha * x - sigma * v) / (alpha**2 + sigma**2),
  from_denoised=lambda x, denoised, alpha, sigma: (
    (alpha * x - (alpha**2 + sigma**2) * denoised) / sigma
  ),
)

# u = eps - D = (x - (alpha + sigma) D) / sigma, the velocity dx/dt of `rectified_flow`, whose time
# rises with noise. Reference: Lipman et al. 2022, arXiv 2210.02747; Liu et al. 2022, arXiv
# 2209.03003, eq. 1 (both with time the other way).
FLOW = Head(
  to_denoised=lambda x, u, alpha, sigma: (x - sigma * u) / (alpha + sigma),
  from_denoised=lambda x, denoised, alpha, sigma: (x - (alpha + sigma) * denoised) / sigma,
)


def karras(sigma_data: float = 0.5) -> Head:
  """The head whose target has unit variance for data of standard deviation sigma_data.

    D = c_skip x + c_out F,    c_skip = alpha s^2 / (sigma^2 + alpha^2 s^2),
                               c_out = sigma s / sqrt(sigma^2 + alpha^2 s^2),    s = sigma_data.

  The paper's coefficients have alpha = 1; these are theirs of x / alpha and sigma / alpha. c_skip x
  is E[x_0 | x_t] of Gaussian data N(0, s^2 I), so F is what the data adds to that.

  Reference: Karras et al. 2022 (EDM), arXiv 2206.00364, table 1 and eq. 7.
  """

  def skip_and_out(alpha, sigma):
    total = sigma**2 + (alpha * sigma_data) ** 2
    return alpha * sigma_data**2 / total, sigma * sigma_data / jnp.sqrt(total)

  def to_denoised(x, output, alpha, sigma):
    skip, out = skip_and_out(alpha, sigma)
    return skip * x + out * output

  def from_denoised(x, denoised, alpha, sigma):
    skip, out = skip_and_out(alpha, sigma)
    return (denoised - skip * x) / out

  return Head(to_denoised, from_denoised)


def coefficients(
  schedule: schedules.Schedule, x: jax.Array, t: schedules.Time
) -> tuple[jax.Array, jax.Array]:
  """alpha(t) and sigma(t) of t [B] or [], in a shape that multiplies x [B, ...]."""
  t = jnp.asarray(t, jnp.promote_types(x.dtype, jnp.float32))
  return base.per_row(schedule.alpha(t), x), base.per_row(schedule.sigma(t), x)


def denoiser(
  network: Callable[[jax.Array, jax.Array], jax.Array],
  schedule: schedules.Schedule,
  head: Head,
  label: Callable[[jax.Array], jax.Array] = lambda t: t,
) -> base.Denoiser:
  """E[x_0 | x_t] from a network's output.

  Args:
    network: (x_t [B, ...], label(t)) -> output [B, ...].
    schedule: of x_t; the one that the network was trained on.
    head: what the output is.
    label: t [B] or [] -> what the network is told of it, t - 1 for one that counts steps from 0.
  """

  def denoise(x, t):
    return head.to_denoised(x, network(x, label(t)), *coefficients(schedule, x, t))

  return denoise


def predictor(
  denoise: base.Denoiser, schedule: schedules.Schedule, head: Head
) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """The output (x_t, t) -> [B, ...] of a network with this head; the inverse of `denoiser`.

  At t = 0 it is NaN for every head but DATA.
  """

  def predict(x, t):
    return head.from_denoised(x, denoise(x, t), *coefficients(schedule, x, t))

  return predict


def converted(
  denoise: base.Denoiser, schedule: schedules.Schedule, other: schedules.Schedule
) -> base.Denoiser:
  """E[x_0 | x_t] for x_t of another schedule than the one that `denoise` knows.

  D depends on x_t / alpha and sigma / alpha alone, so x_t of `other` is scaled to the time of
  `schedule` with the same ratio. Where alpha of either is 0 it is NaN.
  """

  def convert(x, t):
    alpha, _ = coefficients(other, x, t)
    same = schedule.time(schedules.half_log_snr(other, jnp.asarray(t, jnp.float32)))
    own, _ = coefficients(schedule, x, same)
    return denoise(own / alpha * x, same)

  return convert


def scaled(
  network: Callable[[jax.Array, jax.Array], jax.Array],
  schedule: schedules.Schedule,
  sigma_data: float = 0.5,
  label: Callable[[jax.Array], jax.Array] | None = None,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """(x_t, t) -> network(c_in x_t, label(t)), c_in = 1 / sqrt(sigma^2 + alpha^2 sigma_data^2).

  The network then reads coordinates of variance 1 at every time, whatever the schedule.

  Reference: Karras et al. 2022 (EDM), arXiv 2206.00364, eq. 7.
  """
  if label is None:
    label = noise_level(schedule)

  def output(x, t):
    alpha, sigma = coefficients(schedule, x, t)
    return network(x / jnp.sqrt(sigma**2 + (alpha * sigma_data) ** 2), label(t))

  return output


def noise_level(schedule: schedules.Schedule) -> Callable[[jax.Array], jax.Array]:
  """t -> 1000 sqrt(sigma) / (sqrt(alpha) + sqrt(sigma)): how noisy x_t is, from 0 to 1000.

  A function of sigma / alpha alone, so it means the same on every schedule, with both ends finite;
  from sigma / alpha = .002 to 80 it goes from 43 to 899, steepest in the middle. It is
  1000 sigmoid(-lambda / 2).
  """

  def label(t):
    t = jnp.asarray(t, jnp.float32)
    noise, signal = jnp.sqrt(schedule.sigma(t)), jnp.sqrt(jnp.maximum(schedule.alpha(t), 0))
    return 1000 * noise / (signal + noise)

  return label


def edm(
  network: Callable[[jax.Array, jax.Array], jax.Array],
  schedule: schedules.Schedule,
  sigma_data: float = 0.5,
  label: Callable[[jax.Array], jax.Array] | None = None,
) -> base.Denoiser:
  """D(x_t) = c_skip x_t + c_out F(c_in x_t, c_noise): `karras` of a `scaled` network.

    c_noise = ln(sigma / alpha) / 4.

  c_noise is infinite at t = 0 and where alpha = 0; there `label` has to be given.

  Args:
    network: F: (c_in x_t [B, ...], c_noise [B] or []) -> [B, ...].
    schedule: of x_t.
    sigma_data: the standard deviation of the data's coordinates.
    label: t -> c_noise, if not the paper's.

  Reference: Karras et al. 2022 (EDM), arXiv 2206.00364, table 1 and eq. 7.
  """
  if label is None:
    label = lambda t: -0.25 * schedules.half_log_snr(schedule, t)
  return denoiser(scaled(network, schedule, sigma_data, label), schedule, karras(sigma_data))
