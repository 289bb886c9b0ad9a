"""Singlestep solvers: a step evaluates the model at stages of its own and remembers nothing.

A `Step` writes one step from s to t on a path, and `singlestep` makes a table of a step and a
grid. Every step to time 0 is one evaluation and the jump x_0 = D: nothing can be evaluated where
there is no noise. What makes a step stochastic wraps it: see `ancestral`.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from ..models import schedules
from . import forms, tables
from .multistep import Step


def singlestep(
  schedule: schedules.Schedule, times: Sequence[float], step: Step | Sequence[Step]
) -> tables.SolverTable:
  """The same step over a grid, or one for each interval.

  Args:
    schedule: alpha and sigma of time.
    times: [n + 1].
    step: or n of them.

  Raises:
    ValueError: as `tables.grid`.
  """
  times = tables.grid(schedule, times)
  steps = list(step) if isinstance(step, Sequence) else [step] * (len(times) - 1)
  path = tables.Path(schedule, 4 * len(times))
  x = path.start(times[0])
  for make, (s, t) in zip(steps, itertools.pairwise(times), strict=True):
    x, _ = make(path, x, s, t)
  return path.table(x, times[-1])


def evaluated(path: tables.Path, x: np.ndarray, t: float) -> forms.Evaluation:
  """The model evaluated at x of time t."""
  return forms.Evaluation(t, x, path.evaluate(x, t))


def between(schedule: schedules.Schedule, s: float, t: float, share: float) -> float:
  """The time a share of the way from s to t in lambda."""
  lam_s, lam_t = (schedules.half_log_snr(schedule, u) for u in (s, t))
  return float(schedule.time(lam_s + share * (lam_t - lam_s)))


def euler(path: tables.Path, x: np.ndarray, s: float, t: float):
  """One evaluation and DDIM's step, which is Euler's in rho."""
  seen = evaluated(path, x, s)
  return forms.ddim(path.schedule, seen, x, s, t), seen


def runge_kutta(
  stages: Sequence[Sequence[float]], weights: Sequence[float], form: forms.Form
) -> Step:
  """An explicit Runge-Kutta method in a form's clock.

  k_j = slope at clock c_s + (c_t - c_s) sum(stages[j]) of x_s / base_s + (c_t - c_s) sum_l
  stages[j][l] k_l;  x_t / base_t = x_s / base_s + (c_t - c_s) sum_j weights[j] k_j.

  Args:
    stages: rows of the Butcher tableau below its first, of 1, 2, .. entries.
    weights: of the stages.
    form: without noise.
  """

  def step(path, x, s, t):
    schedule, first = path.schedule, evaluated(path, x, s)
    if schedule.sigma(t) == 0 or form.base(schedule.alpha(s), schedule.sigma(s)) == 0:
      return forms.ddim(schedule, first, x, s, t), first
    seen = [first]
    for row in stages:
      time = _time_of_clock(schedule, form, s, t, sum(row))
      point = forms.advance(path, form, forms.fixed(np.asarray(row) / sum(row)), x, s, time, seen)
      seen.append(evaluated(path, point, time))
    return forms.advance(path, form, forms.fixed(weights), x, s, t, seen), first

  return step


def _time_of_clock(schedule, form, s, t, share):
  """The time a share of the way from s to t on the form's clock, by bisection in lambda."""
  if share in (0, 1):
    return (s, t)[int(share)]
  low, high = (schedules.half_log_snr(schedule, u) for u in (s, t))
  start, end = form.clock(low), form.clock(high)
  goal = start + share * (end - start)
  if np.isinf(low):  # no signal at s: far enough out, the clock does not tell
    low = high - 60.0
  for _ in range(200):
    middle = (low + high) / 2
    past = (form.clock(middle) - goal) * (end - start) > 0
    low, high = (low, middle) if past else (middle, high)
  return float(schedule.time((low + high) / 2))


# stages, weights
HEUN = ((1.0,),), (1 / 2, 1 / 2)
MIDPOINT = ((1 / 2,),), (0.0, 1.0)
RALSTON = ((2 / 3,),), (1 / 4, 3 / 4)
KUTTA_3 = ((1 / 2,), (-1.0, 2.0)), (1 / 6, 2 / 3, 1 / 6)
HEUN_3 = ((1 / 3,), (0.0, 2 / 3)), (1 / 4, 0.0, 3 / 4)
SSP_3 = ((1.0,), (1 / 4, 1 / 4)), (1 / 6, 1 / 6, 2 / 3)
KUTTA_4 = ((1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)


def heun(form: forms.Form) -> Step:
  """Heun's second-order step; in `forms.noise()` it is EDM's.

  Reference: Karras et al. 2022, arXiv 2206.00364, algorithm 1.
  """
  return runge_kutta(*HEUN, form)


def rk3(form: forms.Form) -> Step:
  """Kutta's third-order step; in `forms.noise()` it is rhoRK-DEIS."""
  return runge_kutta(*KUTTA_3, form)


def rk4(form: forms.Form) -> Step:
  """Kutta's fourth-order step."""
  return runge_kutta(*KUTTA_4, form)


def dpm_2s(form: forms.Form, *, share: float = 0.5, rule: forms.Rule = forms.midpoint) -> Step:
  """DPM-Solver(++) 2S: a stage a share of the step on in lambda, then the line through both.

  In `forms.noise()` it is DPM-Solver-2, at share 1/2 also called DPM2; in `forms.data()`
  DPM-Solver++ (2S); in `forms.data(1.0)` each stage draws its noise.

  Reference: Lu et al. 2022, arXiv 2206.00927, algorithm 4; arXiv 2211.01095, algorithm 1.
  """

  def step(path, x, s, t):
    schedule, first = path.schedule, evaluated(path, x, s)
    if schedule.sigma(t) == 0 or schedule.alpha(s) == 0:
      return forms.ddim(schedule, first, x, s, t), first
    middle = between(schedule, s, t, share)
    point = forms.advance(path, form, rule, x, s, middle, [first])
    second = evaluated(path, point, middle)
    return forms.advance(path, form, rule, x, s, t, [first, second]), first

  return step


def dpm_3s(
  form: forms.Form,
  *,
  shares: tuple[float, float] = (1 / 3, 2 / 3),
  rule: forms.Rule | None = None,
) -> Step:
  """DPM-Solver(++) 3S: stages at shares of the step in lambda, of third order.

  The first stage is a step of order one; the second extrapolates the line through both slopes, by
  `rule` (exactly, if none is given); the step integrates the line through the first and the last.

  Reference: Lu et al. 2022, arXiv 2206.00927, algorithm 5 (DPM-Solver-3).
  """
  exact = forms.exact(forms.log_snr)
  stage = exact if rule is None else rule

  def step(path, x, s, t):
    schedule, first = path.schedule, evaluated(path, x, s)
    if schedule.sigma(t) == 0 or schedule.alpha(s) == 0:
      return forms.ddim(schedule, first, x, s, t), first
    early, late = (between(schedule, s, t, share) for share in shares)
    point = forms.advance(path, form, stage, x, s, early, [first])
    point = forms.advance(path, form, stage, x, s, late, [first, evaluated(path, point, early)])
    last = evaluated(path, point, late)
    return forms.advance(path, form, exact, x, s, t, [first, last]), first

  return step
