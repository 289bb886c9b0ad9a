"""Predictor-corrector solvers: once a point is evaluated, its output corrects the point.

A corrector costs no evaluation: the output at the predicted point closes the interval, so that the
step to it can be made anew with the slope interpolated instead of extrapolated.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from ..models import schedules
from . import forms, multistep, tables


def predictor_corrector(
  schedule: schedules.Schedule,
  times: Sequence[float],
  orders: int | Sequence[int],
  corrector_orders: int | Sequence[int],
  *,
  form: forms.Form | Sequence[forms.Form],
  rule: forms.Rule,
  revise: Callable[[list[forms.Evaluation]], list[forms.Evaluation]] = lambda history: history,
) -> tables.SolverTable:
  """`multistep.adams_bashforth`, each point remade once it is evaluated.

  The step to a point is made again from the corrected point before it, with the slope through the
  new output and those before, and the noise that led to it. Slopes are those of the points that
  were evaluated; the last point is the sample: nothing is evaluated there, so it is not corrected.

  Args:
    schedule: alpha and sigma of time.
    times: [n + 1].
    orders: outputs that the predictor extrapolates, p, or one for each step [n].
    corrector_orders: outputs that the corrector has besides the new one, p, or [n].
    form: one, or one for each step [n].
    rule: of both.
    revise: what the predictor and later steps read, of the evaluations, the latest first.

  Raises:
    ValueError: as `multistep.adams_bashforth`.
  """
  times = tables.grid(schedule, times)
  n = len(times) - 1
  p, c = (multistep.orders_of(order, n) for order in (orders, corrector_orders))
  each = multistep.forms_of(form, n)
  path = tables.Path(schedule, n)
  x, base, z, history = path.start(times[0]), None, None, []
  for i, (s, t) in enumerate(itertools.pairwise(times)):
    seen = forms.Evaluation(s, x, path.evaluate(x, s))
    if i > 0:
      nodes = with_new(history[: c[i - 1]], seen)
      x = forms.advance(path, each[i - 1], rule, base, times[i - 1], s, nodes, z=z)
    base, z = x, path.noise()
    history = revise([seen, *history])
    x = forms.advance(path, each[i], rule, x, s, t, history[: p[i]])
  return path.table(x, times[-1])


def with_new(known: Sequence[forms.Evaluation], seen: forms.Evaluation) -> list[forms.Evaluation]:
  """Nodes of a corrector: the evaluation that the step starts from, the new one, the others."""
  return [known[0], seen, *known[1:]]


def unic(
  table: tables.SolverTable,
  schedule: schedules.Schedule,
  order: int | Sequence[int],
) -> tables.SolverTable:
  """Any table of one evaluation a step, with the corrector UniC-p of the data form.

  A table's step is x_{i+1} = a x_i + sum_j b_j D_j: what its expansion has at point i + 1 less a
  times what it has at point i, a making the input cancel. The same step is made from the
  corrected x_i.

  Args:
    table: each row evaluates a point of the solution; it draws no noise.
    schedule: the table's.
    order: p, or one for each row [n]: of the step from row i to i + 1.

  Raises:
    ValueError: the table draws noise, or a point has nothing of the input.

  Reference: Zhao et al. 2023, arXiv 2302.04867, algorithm 1, theorem 3.1.
  """
  expansion, n = tables.expand(table), table.num_rows
  inputs = np.linalg.norm(expansion.inputs, axis=1)
  if table.noise is not None or np.any(inputs[:-1] == 0):
    raise ValueError("UniC is for tables without noise whose points go back to the input.")
  orders, outputs = multistep.orders_of(order, n), expansion.outputs[:, :, 0]
  path, times = tables.Path(schedule, n), table.times
  x, base, history = path.given(table.start), None, []
  for i in range(n):
    seen = forms.Evaluation(times[i], x, path.evaluate(x, times[i]))
    if i > 0:
      nodes = with_new(history[: orders[i - 1]], seen)
      x = forms.advance(path, forms.data(), bh2, base, times[i - 1], times[i], nodes)
    base = x
    history.insert(0, seen)
    kept = expansion.inputs[i + 1] @ expansion.inputs[i] / inputs[i] ** 2
    weights = outputs[i + 1, : i + 1] - kept * outputs[i, : i + 1]
    x = kept * x + sum(w * node.output for w, node in zip(weights[::-1], history, strict=True))
  return path.table(x, times[n])


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
  form = forms.data() if form is None else form
  return predictor_corrector(schedule, times, order, order, form=form, rule=rule)


def dc_solver(
  schedule: schedules.Schedule,
  times: Sequence[float],
  ratios: Sequence[float],
  order: int | Sequence[int] = 2,
  *,
  form: forms.Form | None = None,
  rule: forms.Rule = bh2,
) -> tables.SolverTable:
  """DC-Solver: UniPC whose last output is moved along the path before the predictor reads it.

  The corrector leaves the corrected point with an output that is of the predicted one. In its place
  comes the parabola in time through the last three outputs (as they stand), at
  t' = r_i t_i + (1 - r_i) t_{i-1}; the output stays so changed for later steps. r = 1 is UniPC.

  Args:
    schedule: alpha and sigma of time.
    times: [n + 1].
    ratios: r_i of steps 2, .., n - 1, [max(n - 2, 0)]: the first two have too few outputs.
    order: as `unipc`.
    form: data, unless another is given.
    rule: as `unipc`.

  Raises:
    ValueError: as `unipc`; the ratios are not as many.

  Reference: Zhao et al. 2024, arXiv 2409.03755, eq. 8 and 9, K = 2.
  """
  form, n = forms.data() if form is None else form, len(times) - 1
  if len(ratios) != max(n - 2, 0):
    raise ValueError(
      f"{len(ratios)} ratios for {n} steps: {max(n - 2, 0)}, from the third step on."
    )

  def compensate(history):
    if len(history) < 3:
      return history
    nodes = np.array([node.time for node in history[:3]])
    place = nodes[1] + ratios[len(history) - 3] * (nodes[0] - nodes[1])
    weights = [
      np.prod([(place - nodes[k]) / (nodes[j] - nodes[k]) for k in range(3) if k != j])
      for j in range(3)
    ]
    moved = sum(w * node.output for w, node in zip(weights, history[:3], strict=True))
    return [history[0]._replace(output=moved), *history[1:]]

  return predictor_corrector(schedule, times, order, order, form=form, rule=rule, revise=compensate)


def sa_solver(
  schedule: schedules.Schedule,
  times: Sequence[float],
  *,
  predictor_order: int = 3,
  corrector_order: int = 4,
  tau: Callable[[float], float] = lambda t: 1.0,
  rule: forms.Rule | None = None,
) -> tables.SolverTable:
  """SA-Solver: stochastic Adams, with the variance-controlled SDE's noise tau(t)^2.

  Exponential Adams-Bashforth and Adams-Moulton of the data form with eta = tau^2, the corrector
  with the predictor's noise. tau = 0 is the ODE, tau = 1 the usual reverse SDE. The paper's weights
  are exact integrals; the authors' code takes `bh1` as its rule.

  Args:
    schedule: alpha and sigma of time.
    times: [n + 1].
    predictor_order: s of the paper, evaluations extrapolated.
    corrector_order: s-hat, evaluations interpolated, the new one among them.
    tau: of the time at which a step starts.
    rule: exact integration, unless another is given.

  Reference: Xue et al. 2023, arXiv 2305.15388, eq. 14, 15, 17, algorithm 1.
  """
  times = tables.grid(schedule, times)
  form = [forms.data(tau(t) ** 2) for t in times[:-1]]
  orders, rule = predictor_order, forms.exact(forms.log_snr) if rule is None else rule
  if corrector_order < 2:
    return multistep.adams_bashforth(schedule, times, orders, form=form, rule=rule)
  return predictor_corrector(schedule, times, orders, corrector_order - 1, form=form, rule=rule)
