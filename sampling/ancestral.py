"""Stochastic solvers: where the noise of a step comes from.

DDIM's family draws from the posterior q(x_t | x_s, x_0 = D); `renoised` lets any step go past t and
noises back; `churned` noises before a step; `restart` between steps; consistency models noise
their clean samples anew. With noise, the data form of `multistep` and `singlestep` is an SDE too.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ..models import schedules
from . import forms, singlestep, tables
from .multistep import Step


def ddim(
  schedule: schedules.Schedule, times: Sequence[float], eta: float = 0.0
) -> tables.SolverTable:
  """DDIM: x_t = alpha_t D + sqrt(sigma_t^2 - v) e + sqrt(v) z.

  v = eta^2 sigma_t^2 (1 - rho_t^2 / rho_s^2), which for a chain is eta^2 (sigma_t / sigma_s)^2
  (1 - alpha_s^2 / alpha_t^2). At eta = 1 it is the variance of q(x_t | x_s, x_0): DDPM. At 0 the
  step is Euler's in rho.

  Args:
    schedule: alpha and sigma of time.
    times: [n + 1].
    eta: in [0, 1].

  Reference: Song et al. 2021, arXiv 2010.02502, eq. 12 and 16.
  """
  return ddpm(schedule, times, scale=lambda small, large: eta * small)


def ddpm(
  schedule: schedules.Schedule,
  times: Sequence[float],
  *,
  scale: Callable[[float, float], float] = lambda small, large: small,
) -> tables.SolverTable:
  """Ancestral sampling: the mean of q(x_t | x_s, x_0 = D) where the noise is the posterior's.

  Args:
    schedule: alpha and sigma of time.
    times: [n + 1].
    scale: (posterior's standard deviation, that of q(x_s | x_t)) -> the noise's: DDPM's "fixed
      small" is the first, "fixed large" the second. Noise above the posterior's is added to its
      mean, as DDPM does; below, the direction of e makes up for it, as DDIM does. None to time 0.

  Reference: Ho et al. 2020, arXiv 2006.11239, eq. 7; Nichol and Dhariwal 2021, arXiv 2102.09672.
  """
  times = tables.grid(schedule, times)
  path = tables.Path(schedule, len(times))
  x = path.start(times[0])
  for s, t in itertools.pairwise(times):
    seen = singlestep.evaluated(path, x, s)
    small, large = _transition_scales(schedule, s, t)
    spread = scale(small, large)
    kept = np.sqrt(schedule.sigma(t) ** 2 - min(spread, small) ** 2) / schedule.sigma(s)
    x = schedule.alpha(t) * seen.output + kept * (x - schedule.alpha(s) * seen.output)
    x = x + (spread if t > 0 else 0.0) * path.noise()
  return path.table(x, times[-1])


def _transition_scales(schedule, s, t):
  """Standard deviations of q(x_t | x_s, x_0) and of q(x_s | x_t)."""
  alpha_s, alpha_t, sigma_s, sigma_t = (f(u) for f in schedule[:2] for u in (s, t))
  large = np.sqrt(max(sigma_s**2 - (alpha_s / alpha_t * sigma_t) ** 2, 0.0))
  return sigma_t / sigma_s * large, large


def _down(schedule, s, t, eta):
  """The time that a step from s to t goes to, and the noise that leads back from it, in x / alpha.

  In rho: up = min(rho_t, eta sqrt(rho_t^2 (1 - rho_t^2 / rho_s^2))), down^2 = rho_t^2 - up^2.
  """
  if schedule.sigma(t) == 0:
    return t, 0.0
  rho_t = schedule.sigma(t) / schedule.alpha(t)
  share = schedule.alpha(s) * schedule.sigma(t) / (schedule.alpha(t) * schedule.sigma(s))
  up = min(rho_t, eta * rho_t * np.sqrt(max(1 - share**2, 0.0)))
  down = np.sqrt(max(rho_t**2 - up**2, 0.0))
  with np.errstate(divide="ignore"):
    return float(schedule.time(-np.log(down))), up


def renoised(step: Step, eta: float = 1.0) -> Step:
  """A step to a cleaner time than t, and noise back up to t: ancestral sampling with any step.

  With `singlestep.euler` it is Euler ancestral, with DPM-Solver's 2S in `forms.noise()` DPM2
  ancestral, in `forms.data()` DPM++ 2S ancestral.

  Reference: Karras et al. 2022, arXiv 2206.00364, appendix; the split is k-diffusion's.
  """

  def ancestral_step(path, x, s, t):
    down, up = _down(path.schedule, s, t, eta)
    x, seen = step(path, x, s, down)
    alpha_t, alpha_down = path.schedule.alpha(t), path.schedule.alpha(down)
    return alpha_t * (x / alpha_down + up * path.noise()), seen

  return ancestral_step


def churned(step: Step, gamma: float, *, low: float = 0.0, high: float = np.inf) -> Step:
  """EDM's churn: noise from rho up to (1 + gamma) rho, then the step from there, all the way to t.

  The model is evaluated at the noised point. Noise stays within the schedule: at its noisiest time
  there is nothing to add.

  Args:
    step: in EDM's algorithm 2 `singlestep.heun(forms.noise())`.
    gamma: min(S_churn / n, sqrt(2) - 1) in n steps.
    low: S_min, in rho.
    high: S_max, in rho.

  Reference: Karras et al. 2022, arXiv 2206.00364, algorithm 2, with S_noise = 1.
  """

  def churned_step(path, x, s, t):
    schedule = path.schedule
    lam = schedules.half_log_snr(schedule, s)
    if low <= np.exp(-lam) <= high:
      lowest = schedules.half_log_snr(schedule, schedule.max_time)
      up = float(schedule.time(max(lam - np.log1p(gamma), lowest)))
      x, s = path.renoise(x, s, up), up
    return step(path, x, s, t)

  return churned_step


def dpmpp_sde(eta: float = 1.0) -> Step:
  """DPM-Solver++ (SDE): both stages of 2S are ancestral steps, the second one with D of the first.

  Reference: Lu et al. 2022, arXiv 2211.01095, section 4.3; the split is k-diffusion's.
  """

  def step(path, x, s, t):
    schedule = path.schedule
    if schedule.sigma(t) == 0 or schedule.alpha(s) == 0:
      return renoised(singlestep.euler, eta)(path, x, s, t)
    middle = singlestep.between(schedule, s, t, 0.5)
    point, first = renoised(singlestep.euler, eta)(path, x, s, middle)
    second = path.evaluate(point, middle)
    down, up = _down(schedule, s, t, eta)
    x = forms.ddim(schedule, first._replace(output=second), x, s, down)
    return schedule.alpha(t) * (x / schedule.alpha(down) + up * path.noise()), first

  return step


class Restart(NamedTuple):
  """Back up to times[0] and down again `repeats` times, once the grid has come to times[-1]."""

  times: Sequence[float]  # [m + 1], falling
  repeats: int


def restart(
  schedule: schedules.Schedule, times: Sequence[float], step: Step, restarts: Sequence[Restart]
) -> tables.SolverTable:
  """Restart sampling: an ODE solver that goes back to noisier times and comes down again.

  Noise contracts the error that the solver had made until then; the solver is as accurate as on
  the ODE between.

  Args:
    schedule: alpha and sigma of time.
    times: [n + 1].
    step: in the paper `singlestep.heun(forms.noise())`.
    restarts: each ending at one of `times`.

  Raises:
    ValueError: as `tables.grid`; a restart's last time is none of the grid's, or 0.

  Reference: Xu et al. 2023, arXiv 2306.14878, algorithm 1.
  """
  times = tables.grid(schedule, times)
  for back in restarts:
    if back.times[-1] not in times[1:] or back.times[-1] == 0:
      raise ValueError(f"A restart ends at {back.times[-1]}: not a time of the grid above 0.")
  rows = len(times) + sum(len(back.times) * back.repeats for back in restarts)
  path = tables.Path(schedule, 4 * rows)
  x = path.start(times[0])
  for s, t in itertools.pairwise(times):
    x, _ = step(path, x, s, t)
    for back in restarts:
      for _ in range(back.repeats if back.times[-1] == t else 0):
        x = path.renoise(x, t, back.times[0])
        for high, low in itertools.pairwise(back.times):
          x, _ = step(path, x, high, low)
  return path.table(x, times[-1])


def consistency(
  schedule: schedules.Schedule,
  times: Sequence[float],
  boundary: Callable[[float], tuple[float, float]] = lambda t: (0.0, 1.0),
) -> tables.SolverTable:
  """Multistep consistency sampling (LCM): x_t = alpha_t f + sigma_t z, f = c_skip x + c_out D.

  Args:
    schedule: alpha and sigma of time.
    times: [n + 1].
    boundary: t -> (c_skip, c_out); a consistency model that gives f itself has (0, 1), latent
      consistency models have `latent_boundary`.

  Reference: Song et al. 2023, arXiv 2303.01469, algorithm 1; Luo et al. 2023, arXiv 2310.04378.
  """
  times = tables.grid(schedule, times)
  path = tables.Path(schedule, len(times))
  x = path.start(times[0])
  for s, t in itertools.pairwise(times):
    skip, out = boundary(s)
    clean = skip * x + out * path.evaluate(x, s)
    x = schedule.alpha(t) * clean + schedule.sigma(t) * path.noise()
  return path.table(x, times[-1])


def latent_boundary(sigma_data: float = 0.5, scale: float = 10.0) -> Callable:
  """c_skip = s^2 / (u^2 + s^2), c_out = u / sqrt(u^2 + s^2), u = scale (t - 1), t of `from_betas`.

  Reference: Luo et al. 2023, arXiv 2310.04378, section 4.1 and its published scale.
  """

  def boundary(t):
    u = scale * (t - 1)
    return sigma_data**2 / (u**2 + sigma_data**2), u / np.sqrt(u**2 + sigma_data**2)

  return boundary


def trajectory_consistency(
  schedule: schedules.Schedule, times: Sequence[float], gamma: float = 0.3
) -> tables.SolverTable:
  """TCD: DDIM's step to time (1 - gamma) t, and noise from there up to t.

  gamma = 0 is DDIM, 1 `consistency`.

  Reference: Zheng et al. 2024, arXiv 2402.19159, algorithm 4 (strategic stochastic sampling).
  """
  times = tables.grid(schedule, times)
  path = tables.Path(schedule, len(times))
  x = path.start(times[0])
  for s, t in itertools.pairwise(times):
    x, _ = singlestep.euler(path, x, s, (1 - gamma) * t)
    x = path.renoise(x, (1 - gamma) * t, t)
  return path.table(x, times[-1])


def ddim_cfgpp(schedule: schedules.Schedule, times: Sequence[float]) -> tables.SolverTable:
  """CFG++: x_t = alpha_t D_guided + sigma_t e_unguided, of a model with both outputs.

  Reference: Chung et al. 2024, arXiv 2406.08070, algorithm 2.
  """
  times = tables.grid(schedule, times)
  path = tables.Path(schedule, len(times), num_outputs=2)
  x = path.start(times[0])
  for s, t in itertools.pairwise(times):
    guided, unguided = path.evaluate(x, s)
    noise = (x - schedule.alpha(s) * unguided) / schedule.sigma(s)
    x = schedule.alpha(t) * guided + schedule.sigma(t) * noise
  return path.table(x, times[-1])
