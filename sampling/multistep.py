"""Multistep solvers: one evaluation a step, and slopes remembered from the steps before.

All are `adams_bashforth` with a form of the equation and a rule (see `forms`), except for the
pseudo methods, whose coefficients are those of an even grid whatever the grid. The first steps,
where there is less to remember, are of lower order; one step of order one leaves an error of
O(h^2), so that alone makes every method of second order. `start` makes them of high order.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from ..models import schedules
from . import forms, tables

# (path, x, s, t) -> x_t and the evaluation at s: one step of a singlestep method
Step = Callable[[tables.Path, np.ndarray, float, float], tuple[np.ndarray, forms.Evaluation]]


def adams_bashforth(
  schedule: schedules.Schedule,
  times: Sequence[float],
  order: int | Sequence[int],
  *,
  form: forms.Form | Sequence[forms.Form],
  rule: forms.Rule,
  start: Step | None = None,
) -> tables.SolverTable:
  """A form of the equation with the slope extrapolated from the last `order` evaluations.

  Args:
    schedule: alpha and sigma of time.
    times: [n + 1], falling from noise to data, or rising to invert. If the last is 0, the last
      step goes to sigma = 0.
    order: p, or one for each step [n]; fewer evaluations are used where there are not so many.
    form: data, noise or flow, with or without noise; or one for each step [n].
    rule: how the slope is extrapolated.
    start: makes the first max(order) - 1 steps, so that what follows has its order from the
      beginning; of the same order as the method, or one less.

  Raises:
    ValueError: as `tables.grid`; orders not as many as steps, or below 1.
  """
  times = tables.grid(schedule, times)
  orders, each = orders_of(order, len(times) - 1), forms_of(form, len(times) - 1)
  path = tables.Path(schedule, len(times) + 3 * max(orders))  # a start's steps take up to 4 rows
  x, history = path.start(times[0]), []
  for i, (s, t) in enumerate(itertools.pairwise(times)):
    if start is not None and i < max(orders) - 1 and t > 0:
      x, seen = start(path, x, s, t)
      history.insert(0, seen)
      continue
    history.insert(0, forms.Evaluation(s, x, path.evaluate(x, s)))
    x = forms.advance(path, each[i], rule, x, s, t, history[: orders[i]])
  return path.table(x, times[-1])


def orders_of(order: int | Sequence[int], num_steps: int) -> list[int]:
  """An order for each step; ValueError where they are not as many, or one is below 1."""
  orders = [order] * num_steps if np.ndim(order) == 0 else list(order)
  if len(orders) != num_steps or min(orders) < 1:
    raise ValueError(f"order={order}: one above 0, or {num_steps} of them, one for each step.")
  return orders


def forms_of(form: forms.Form | Sequence[forms.Form], num_steps: int) -> list[forms.Form]:
  """A form for each step; ValueError where they are not as many."""
  each = [form] * num_steps if isinstance(form, forms.Form) else list(form)
  if len(each) != num_steps:
    raise ValueError(f"{len(each)} forms for {num_steps} steps: one, or one for each step.")
  return each


def lowered_at_the_end(order: int, num_steps: int) -> list[int]:
  """Orders p, .., p, p - 1, .., 1: short runs end with steps that extrapolate less."""
  return [min(order, num_steps - i) for i in range(num_steps)]


def exponential(
  schedule: schedules.Schedule,
  times: Sequence[float],
  order: int | Sequence[int],
  *,
  eta: float = 0.0,
  start: Step | None = None,
) -> tables.SolverTable:
  """Exponential Adams-Bashforth of any order: D a polynomial in lambda, integrated exactly.

  Order 1 is DDIM, 2 is DPM-Solver++ 2M with the phi_2 weight, 3 is DPM-Solver++ 3M; p is UniP-p
  solved in full.

  Reference: Lu et al. 2022, arXiv 2211.01095; Hochbruck and Ostermann 2010, section 2.
  """
  rule = forms.exact(forms.log_snr)
  return adams_bashforth(schedule, times, order, form=forms.data(eta), rule=rule, start=start)


def dpmpp_2m(
  schedule: schedules.Schedule,
  times: Sequence[float],
  *,
  eta: float = 0.0,
  rule: forms.Rule = forms.midpoint,
) -> tables.SolverTable:
  """DPM-Solver++ (2M), and with eta = 1 SDE-DPM-Solver++ (2M).

  x_t = (sigma_t / sigma_s) x - alpha_t (e^-h - 1) ((1 + 1 / 2r) D_s - D_s' / 2r), r = h' / h.

  Reference: Lu et al. 2022, arXiv 2211.01095, algorithm 2. `exact(log_snr)` as the rule is the
    variant that others call "heun".
  """
  return adams_bashforth(schedule, times, 2, form=forms.data(eta), rule=rule)


def dpmpp_3m(
  schedule: schedules.Schedule,
  times: Sequence[float],
  *,
  eta: float = 0.0,
  start: Step | None = None,
) -> tables.SolverTable:
  """DPM-Solver++ (3M), of third order: D a parabola in lambda, integrated exactly.

  Public implementations have second order; see `published_third_order`.

  Reference: Lu et al. 2022, arXiv 2211.01095, appendix B.
  """
  return exponential(schedule, times, 3, eta=eta, start=start)


def published_third_order(
  form: forms.Form, nodes: np.ndarray, lam_s: float, lam_t: float
) -> np.ndarray:
  """The rule of DPM-Solver(++) 3M as it is published in code: of second order only.

  It takes the divided difference D2 = (D1_0 - D1_1) / (r_0 + r_1) for the second derivative, which
  is 2 D2, so that the parabola's quadratic term counts half. Half of it is what three nodes add
  to the tangent at s of that parabola. With two nodes it is `midpoint`.
  """
  if len(nodes) < 3 or not np.all(np.isfinite([*nodes, lam_t])):
    return forms.midpoint(form, nodes, lam_s, lam_t)
  h0, h1 = nodes[0] - nodes[1], nodes[0] - nodes[2]
  second = np.array([1 / (h0 * h1), -1 / (h0 * (h1 - h0)), 1 / (h1 * (h1 - h0))])
  square = forms.integral(form, lambda lam: np.square(lam - lam_s), lam_s, lam_t)
  return forms.exact(forms.log_snr)(form, nodes, lam_s, lam_t) - 0.5 * square * second


def lms(
  schedule: schedules.Schedule, times: Sequence[float], order: int = 4, *, start: Step | None = None
) -> tables.SolverTable:
  """Linear multistep: e a polynomial in rho, integrated over rho; with it rhoAB-DEIS.

  Reference: Karras et al. 2022, arXiv 2206.00364, section 3; DEIS, arXiv 2204.13902, section 3.
  """
  return deis(schedule, times, order, variable=forms.noise_ratio, start=start)


def deis(
  schedule: schedules.Schedule,
  times: Sequence[float],
  order: int | Sequence[int] = 3,
  *,
  variable: Callable[[np.ndarray], np.ndarray] | None = None,
  start: Step | None = None,
) -> tables.SolverTable:
  """DEIS: e a polynomial, integrated over rho; in the schedule's time (tAB), by default.

  In `forms.noise_ratio` it is rhoAB, in `forms.log_snr` what diffusers calls DEIS.

  Reference: Zhang and Chen 2022, arXiv 2204.13902, eq. 15.
  """
  rule = forms.exact(schedule.time if variable is None else variable)
  return adams_bashforth(schedule, times, order, form=forms.noise(), rule=rule, start=start)


# Adams-Bashforth's weights of the last slopes, the latest first, on an even grid.
_EVEN = {
  1: [1.0],
  2: [3 / 2, -1 / 2],
  3: [23 / 12, -16 / 12, 5 / 12],
  4: [55 / 24, -59 / 24, 37 / 24, -9 / 24],
}


def _transfer(path, x, s, t, nodes, weights):
  """DDIM's step with a mean of noise predictions, sum_j weights[j] e_j, in place of one."""
  schedule = path.schedule
  alpha, sigma = schedule.alpha(s), schedule.sigma(s)
  if alpha == 0:  # D = (x - sigma e) / alpha cannot be had from e
    return forms.ddim(schedule, nodes[0], x, s, t)
  slopes = (forms.slope(forms.noise(), schedule, node) for node in nodes)
  noise = sum(w * slope for w, slope in zip(weights, slopes, strict=False))
  return schedule.alpha(t) / alpha * (x - sigma * noise) + schedule.sigma(t) * noise


def ipndm(
  schedule: schedules.Schedule, times: Sequence[float], order: int = 4
) -> tables.SolverTable:
  """iPNDM: Adams-Bashforth's constant weights on e, then DDIM's step; orders rise from 1.

  Reference: Liu et al. 2022 (PNDM), arXiv 2202.09778; Zhang and Chen 2022, arXiv 2204.13902,
    appendix H.2.
  """
  if order not in _EVEN:
    raise ValueError(f"order={order}: has to be 1, 2, 3 or 4.")
  times = tables.grid(schedule, times)
  path = tables.Path(schedule, len(times))
  x, history = path.start(times[0]), []
  for s, t in itertools.pairwise(times):
    history.insert(0, forms.Evaluation(s, x, path.evaluate(x, s)))
    x = _transfer(path, x, s, t, history, _EVEN[min(order, len(history))])
  return path.table(x, times[-1])


def plms(schedule: schedules.Schedule, times: Sequence[float]) -> tables.SolverTable:
  """Pseudo linear multistep of order 4, n + 1 evaluations: its first step is an improved Euler.

  Reference: Liu et al. 2022, arXiv 2202.09778, eq. 12, as latent diffusion starts it.
  """
  times = tables.grid(schedule, times)
  path = tables.Path(schedule, len(times))
  x, history = path.start(times[0]), []
  for i, (s, t) in enumerate(itertools.pairwise(times)):
    history.insert(0, forms.Evaluation(s, x, path.evaluate(x, s)))
    if i == 0 and t > 0:
      guess = _transfer(path, x, s, t, history, [1.0])
      ahead = forms.Evaluation(t, guess, path.evaluate(guess, t))
      x = _transfer(path, x, s, t, [history[0], ahead], [0.5, 0.5])
    else:
      x = _transfer(path, x, s, t, history, _EVEN[min(4, len(history))])
  return path.table(x, times[-1])


def pndm(schedule: schedules.Schedule, times: Sequence[float]) -> tables.SolverTable:
  """PNDM: three pseudo Runge-Kutta steps of four evaluations each, then `plms`; n + 9 in all.

  The middle of a Runge-Kutta step is that of its time.

  Reference: Liu et al. 2022, arXiv 2202.09778, algorithm 2, eq. 13.
  """
  times = tables.grid(schedule, times)
  path = tables.Path(schedule, len(times) + 9)
  x, history = path.start(times[0]), []
  for i, (s, t) in enumerate(itertools.pairwise(times)):
    history.insert(0, forms.Evaluation(s, x, path.evaluate(x, s)))
    if i < 3 and t > 0:
      x = _pseudo_runge_kutta(path, x, s, t, history[0])
    else:
      x = _transfer(path, x, s, t, history, _EVEN[min(4, len(history))])
  return path.table(x, times[-1])


def _pseudo_runge_kutta(path, x, s, t, first):
  middle, stages = (s + t) / 2, [first]
  for time in (middle, middle, t):
    point = _transfer(path, x, s, time, stages[-1:], [1.0])
    stages.append(forms.Evaluation(time, point, path.evaluate(point, time)))
  return _transfer(path, x, s, t, stages, [1 / 6, 1 / 3, 1 / 3, 1 / 6])
