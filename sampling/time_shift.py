"""Time-Shift: the time of a sample read off its variance, where a sampler's errors have moved it.

A sample of time t has, over its elements, variance sigma(t)^2 + alpha(t)^2 s^2, s^2 that of clean
data. One whose variance is another's is taken for a sample of that other time t_s:

    t_s = argmin |var(x) - sigma(u)^2 - alpha(u)^2 s^2|  over u in a window around t.

That depends on the sample, so no table has it: here are denoisers made of denoisers, row by row.
The paper compares with 1 - alpha-bar alone, s = 0, and shifts only above a cut-off time, where
there is little of the data; its window is in steps of its chain, here in lambda = log(alpha /
sigma), as that is the same on every schedule.

Reference: Li et al. 2023, arXiv 2305.15583.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ..models import base as models
from ..models import precondition, schedules

_HALF = 32  # candidate times on each side
_GAIN = 1e-5  # of the variance, by which a candidate has to be better


def matching_time(
  schedule: schedules.Schedule,
  x: jax.Array,
  t: jax.Array,
  window: float,
  cutoff: float = 0.0,
  *,
  data_variance: float = 0.0,
) -> jax.Array:
  """t_s [B]: of 65 times the one whose variance is nearest the sample's; t, where none is nearer.

  Args:
    schedule: of x.
    x: [B, ...], at least two elements a row.
    t: [B] or [], around which to look.
    window: its width in lambda; half of it on each side of t.
    cutoff: times up to it are not shifted.
    data_variance: s^2, of the elements of a clean sample about that sample's mean.

  Times without noise or without signal are not shifted. Where alpha^2 + sigma^2 = 1 and s^2 = 1 the
  variance is 1 at all times and says nothing: there is no shift.
  """
  t = jnp.broadcast_to(jnp.asarray(t, jnp.float32), x.shape[:1])
  variance = jnp.var(x.reshape(x.shape[0], -1).astype(jnp.float32), axis=1)
  half_log_snr = schedules.half_log_snr(schedule, t)
  moved = half_log_snr[:, None] + window * jnp.linspace(-0.5, 0.5, 2 * _HALF + 1)[None]
  times = jnp.minimum(schedule.time(moved), schedule.max_time)  # [B, 65]
  expected = lambda u: schedule.sigma(u) ** 2 + data_variance * schedule.alpha(u) ** 2
  gaps = jnp.abs(expected(times) - variance[:, None])
  best = jnp.argmin(gaps, axis=1)[:, None]
  nearer = jnp.take_along_axis(gaps, best, 1)[:, 0] + _GAIN * variance
  shifts = (nearer < jnp.abs(expected(t) - variance)) & (t > cutoff) & jnp.isfinite(half_log_snr)
  return jnp.where(shifts, jnp.take_along_axis(times, best, 1)[:, 0], t)


def shifted_label(
  denoise: models.Denoiser,
  schedule: schedules.Schedule,
  window: float,
  cutoff: float = 0.0,
  *,
  data_variance: float = 0.0,
) -> models.Denoiser:
  """E[x_0 | x_{t_s} = x] in place of E[x_0 | x_t = x]: the denoiser is called at another time.

  For any solver, whose coefficients stay those of t. Arguments as `matching_time`.
  """

  def shifted(x, t):
    return denoise(x, matching_time(schedule, x, t, window, cutoff, data_variance=data_variance))

  return shifted


def shifted_source(
  denoise: models.Denoiser,
  schedule: schedules.Schedule,
  times: Sequence[float],
  window: float,
  cutoff: float = 0.0,
  *,
  data_variance: float = 0.0,
) -> models.Denoiser:
  """The paper's rule: x is of t_s, so it is evaluated there and the step begins there.

  Run by DDIM's table on `times`, x_n = alpha_n D + sigma_n (x - alpha(t_s) D) / sigma(t_s) with
  D = E[x_0 | x_{t_s} = x]. Other tables read the same output, the D with which DDIM gets there.

  Args:
    denoise: x_t [B, ...], t -> E[x_0 | x_t].
    schedule: of x.
    times: [n + 1], falling: n of the step is the next of them.
    window: see `matching_time`, as are the others.
    cutoff: of t.
    data_variance: s^2.

  Reference: Li et al. 2023, arXiv 2305.15583.
  """

  def shifted(x, t):
    source = matching_time(schedule, x, t, window, cutoff, data_variance=data_variance)
    following = _next(times, jnp.broadcast_to(t, x.shape[:1]))
    return _as_if(schedule, x, denoise(x, source), (t, following), (source, following))

  return shifted


def shifted_target(
  denoise: models.Denoiser,
  schedule: schedules.Schedule,
  times: Sequence[float],
  window: float,
  cutoff: float = 0.0,
  *,
  data_variance: float = 0.0,
) -> models.Denoiser:
  """The released code's rule: the step from t ends at the time near the next that matches x.

  It looks around the next time, at the variance of the sample before the step: with steps wider
  than half the window that is the window's noisy end. The sample goes on as one of the next time.

  Args and reference: as `shifted_source`, read from the authors' code; run by DDIM's table,
  x_n = alpha_s D + sigma_s (x - alpha_t D) / sigma_t at the time s found, D = E[x_0 | x_t = x].
  """

  def shifted(x, t):
    t = jnp.broadcast_to(t, x.shape[:1])
    following = _next(times, t)
    target = matching_time(schedule, x, following, window, data_variance=data_variance)
    target = jnp.where(t > cutoff, target, following)
    return _as_if(schedule, x, denoise(x, t), (t, following), (t, target))

  return shifted


def _next(times, t):
  """The largest of the times below t, [B]; t has been through float32."""
  times = jnp.asarray(times, jnp.float32)
  below = times[None] < t[:, None] * (1 - 1e-5)
  return jnp.max(jnp.where(below, times[None], jnp.min(times)), axis=1)


def _as_if(schedule, x, denoised, step, wanted):
  """The output with which DDIM's step between two times goes where the wanted one goes with D."""
  (alpha, sigma), (alpha_n, sigma_n) = (precondition.coefficients(schedule, x, u) for u in step)
  (alpha_s, sigma_s), (alpha_u, sigma_u) = (
    precondition.coefficients(schedule, x, u) for u in wanted
  )
  ahead = alpha_u * denoised + sigma_u / sigma_s * (x - alpha_s * denoised)
  ratio = sigma_n / sigma
  return (ahead - ratio * x) / (alpha_n - ratio * alpha)
