"""Predictor-corrector solvers: once a point is evaluated, its output corrects the point.

A corrector costs no evaluation: the output at the predicted point closes the interval, so that the
step to it can be made anew with the slope interpolated instead of extrapolated.
"""

from collections.abc import Callable, Sequence

import numpy as np

from ..models import schedules
from . import forms, multistep, tables


def unic(
  table: tables.SolverTable,
  schedule: schedules.Schedule,
  order: int | Sequence[int],
  *,
  form: forms.Form | Sequence[forms.Form] | None = None,
  rule: forms.Rule | None = None,
) -> tables.SolverTable:
  """Any table of one evaluation a step, with a corrector: UniC-p, one order higher than p.

  The point that row i + 1 evaluates is remade from the corrected point before it, with the slope
  through D_{i+1}, D_i and p - 1 outputs before, and the noise that led to it; the table goes on
  from there. The last point is the sample: nothing is evaluated there, so it is not corrected.

  Args:
    table: its rows evaluate one point of the solution each; a clean or `from_state` input.
    schedule: the table's.
    order: p, or one for each row [n]: of the step from row i to i + 1.
    form: data, unless another is given; that of the table if the table draws noise.
    rule: `bh2`, unless another is given.

  Reference: Zhao et al. 2023, arXiv 2302.04867, algorithm 1, theorem 3.1.
  """
  n, k, _ = table.output.shape
  orders = multistep.orders_of(order, n)
  each = multistep.forms_of(forms.data() if form is None else form, n)
  noise = np.zeros((n, k)) if table.noise is None else table.noise
  path, times = tables.Path(schedule, n), table.times
  slots = np.zeros((k, path.width))
  slots[0] = base = path.given(table.start)
  history, z = [], None
  for i in range(n):
    point = slots[0].copy()
    seen = forms.Evaluation(times[i], point, path.evaluate(point, times[i]))
    if i > 0:
      known = history[: orders[i - 1]]
      nodes = [known[0], seen, *known[1:]]
      s, t = times[i - 1 : i + 1]
      slots[0] = forms.advance(path, each[i - 1], rule or bh2, base, s, t, nodes, z)
    base, z = slots[0].copy(), path.noise()
    history.insert(0, seen)
    slots = table.carry[i] @ slots + np.outer(table.output[i], seen.output) + np.outer(noise[i], z)
  return path.table(slots[0], times[n])


def bh1(form: forms.Form, nodes: np.ndarray, lam_s: float, lam_t: float) -> np.ndarray:
  """UniPC's weights with B(h) = h; see `bh2`. B matters where there are two nodes only."""
  h = lam_t - lam_s
  return _unified(form, nodes, lam_s, lam_t, h * form.rate(lam_t) if np.isfinite(h) else 0.0)


def bh2(form: forms.Form, nodes: np.ndarray, lam_s: float, lam_t: float) -> np.ndarray:
  """UniPC's weights with B(h) = e^h - 1: with two nodes slope(s) + B / 2r (slope' - slope(s)).

  r is the second node's place, in steps from s. With more nodes the weights solve the order
  conditions in full, which is exact integration of the polynomial, and B drops out.

  Reference: Zhao et al. 2023, arXiv 2302.04867, eq. 6 to 9 and appendix F.
  """
  return _unified(form, nodes, lam_s, lam_t, form.clock(lam_t) - form.clock(lam_s))


def _unified(form, nodes, lam_s, lam_t, scale):
  if len(nodes) != 2:
    return forms.exact(forms.log_snr)(form, nodes, lam_s, lam_t)
  gap = nodes[1] - nodes[0] if np.all(np.isfinite(nodes)) else 0.0
  tilt = 0.5 * scale * forms.steps_per(gap, lam_s, lam_t)
  return np.array([form.clock(lam_t) - form.clock(lam_s) - tilt, tilt])


def unip(
  schedule: schedules.Schedule,
  times: Sequence[float],
  order: int | Sequence[int] = 2,
  *,
  form: forms.Form | None = None,
  rule: forms.Rule = bh2,
) -> tables.SolverTable:
  """UniP-p, the predictor alone. Reference: Zhao et al. 2023, arXiv 2302.04867, algorithm 2."""
  form = forms.data() if form is None else form
  return multistep.adams_bashforth(schedule, times, order, form=form, rule=rule)


def unipc(
  schedule: schedules.Schedule,
  times: Sequence[float],
  order: int | Sequence[int] = 2,
  *,
  form: forms.Form | None = None,
  rule: forms.Rule = bh2,
) -> tables.SolverTable:
  """UniPC-p: UniP-p corrected by UniC-p, of order p + 1.

  Args:
    schedule: alpha and sigma of time.
    times: [n + 1].
    order: p, or one for each step [n]; `multistep.lowered_at_the_end` is what the authors use.
    form: data, unless another is given.
    rule: `bh1` or `bh2`.

  Reference: Zhao et al. 2023, arXiv 2302.04867, algorithms 1 and 2.
  """
  predictor = unip(schedule, times, order, form=form, rule=rule)
  return unic(predictor, schedule, order, form=form, rule=rule)


def sa_solver(
  schedule: schedules.Schedule,
  times: Sequence[float],
  *,
  predictor_order: int = 3,
  corrector_order: int = 4,
  tau: Callable[[float], float] = lambda t: 1.0,
) -> tables.SolverTable:
  """SA-Solver: stochastic Adams, with the variance-controlled SDE's noise tau(t)^2.

  Exponential Adams-Bashforth and Adams-Moulton of the data form with eta = tau^2, the corrector
  with the predictor's noise. tau = 0 is the ODE, tau = 1 the usual reverse SDE. The authors' code
  alters the weights of order two; these are the paper's.

  Args:
    schedule: alpha and sigma of time.
    times: [n + 1].
    predictor_order: s of the paper, evaluations extrapolated.
    corrector_order: s-hat, evaluations interpolated, the new one among them.
    tau: of the time at which a step starts.

  Reference: Xue et al. 2023, arXiv 2305.15388, eq. 14, 15, 17, algorithm 1.
  """
  times = tables.grid(schedule, times)
  each = [forms.data(tau(t) ** 2) for t in times[:-1]]
  rule = forms.exact(forms.log_snr)
  predictor = multistep.adams_bashforth(schedule, times, predictor_order, form=each, rule=rule)
  if corrector_order < 2:
    return predictor
  return unic(predictor, schedule, corrector_order - 1, form=each, rule=rule)
