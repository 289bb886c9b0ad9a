"""Mask schedules: how likely a token is to be kept at time t, from 0 (data) to 1 (all masked).

At time t every token, apart from the others, is still itself with probability alpha(t) and
otherwise noise: the mask, or in uniform-state diffusion any token. alpha(0) = 1 and alpha(1) = 0.

Forward, a kept token becomes noise at the rate beta(t) = -alpha'(t) / alpha(t). Backward, a masked
token is unmasked at the rate -alpha'(t) / (1 - alpha(t)), which is also the weight of a masked
token's cross-entropy in the bound of the likelihood; beta = rate (1 - alpha) / alpha.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class MaskSchedule(NamedTuple):
  """A path from tokens to noise.

  Attributes:
    alpha: t [...] -> [...], falling from 1 at 0 to 0 at 1.
    rate: t [...] -> [...], -alpha'(t) / (1 - alpha(t)); inf at 0.
    time: alpha [...] -> t [...], the inverse.
  """

  alpha: Callable[[jax.Array], jax.Array]
  rate: Callable[[jax.Array], jax.Array]
  time: Callable[[jax.Array], jax.Array]


def linear() -> MaskSchedule:
  """alpha = 1 - t; the log-linear noise of SEDD and MDLM.

  Reference: Lou et al. 2023 (SEDD), arXiv 2310.16834; Sahoo et al. 2024 (MDLM), arXiv 2406.07524.
  """
  return polynomial(1.0)


def polynomial(power: float) -> MaskSchedule:
  """alpha = 1 - t^power.

  Raises:
    ValueError: power is not above 0.

  Reference: Shi et al. 2024 (MD4), arXiv 2406.04329, table 4.
  """
  if not power > 0:
    raise ValueError(f"power={power}: it has to be above 0; 1 is the linear schedule.")
  return MaskSchedule(
    alpha=lambda t: 1 - jnp.asarray(t) ** power,
    rate=lambda t: power / jnp.asarray(t),
    time=lambda alpha: (1 - jnp.asarray(alpha)) ** (1 / power),
  )


def cosine() -> MaskSchedule:
  """alpha = 1 - cos(pi (1 - t) / 2) = 1 - sin(pi t / 2): few tokens are unmasked at first.

  Reference: Shi et al. 2024 (MD4), arXiv 2406.04329, table 4; Chang et al. 2022 (MaskGIT), arXiv
    2202.04200, section 3.2.
  """
  quarter = jnp.pi / 2

  def alpha(t):  # 1 - sin x = 2 sin^2((pi / 2 - x) / 2), which does not cancel at 1
    t = jnp.asarray(t)
    return jnp.where(t < 0.5, 1 - jnp.sin(quarter * t), 2 * jnp.sin(quarter * (1 - t) / 2) ** 2)

  return MaskSchedule(
    alpha=alpha,
    rate=lambda t: jnp.maximum(quarter / jnp.tan(quarter * jnp.asarray(t)), 0),
    time=lambda alpha: jnp.arcsin(1 - jnp.asarray(alpha)) / quarter,
  )


def geometric(least: float = 1e-5, most: float = 20.0) -> MaskSchedule:
  """alpha = exp(-s(t)), s(t) = least^(1 - t) most^t, shifted and scaled to end at 1 and 0.

  The papers' own runs from exp(-least) to exp(-most); a chain that begins with masks only is then
  not quite at its end, which the scaling mends.

  Raises:
    ValueError: not 0 < least < most.

  Reference: Lou et al. 2023 (SEDD), arXiv 2310.16834; Shi et al. 2024, arXiv 2406.04329, table 4.
  """
  if not 0 < least < most:
    raise ValueError(f"least={least}, most={most}: have to be above 0, the first below the other.")
  log_ratio = jnp.log(most / least)
  total = -jnp.expm1(least - most)

  def above(t):  # s(t) - s(0)
    return least * jnp.expm1(log_ratio * jnp.asarray(t))

  def time(alpha):
    above_least = -jnp.log1p(-total * (1 - jnp.asarray(alpha)))
    return jnp.minimum(jnp.log1p(above_least / least) / log_ratio, 1)

  return MaskSchedule(
    alpha=lambda t: jnp.maximum(1 + jnp.expm1(-above(t)) / total, 0),
    rate=lambda t: log_ratio * (above(t) + least) / jnp.expm1(above(t)),
    time=time,
  )


def unmask_prob(schedule: MaskSchedule, t: jax.Array, s: jax.Array) -> jax.Array:
  """(alpha(s) - alpha(t)) / (1 - alpha(t)): a token masked at t is not at s <= t.

  It is 1 where alpha(t) is 1, in float32 at times just above 0 as well: none stays masked.
  """
  noise = 1 - schedule.alpha(t)
  some = noise > 0
  prob = (schedule.alpha(s) - schedule.alpha(t)) / jnp.where(some, noise, 1)
  return jnp.where(some, jnp.clip(prob, 0, 1), 1)
