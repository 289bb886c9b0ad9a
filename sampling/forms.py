"""The forms of the probability flow equation that solvers discretise, and one step of any of them.

Divided by a base, the state moves with a clock at a slope that is known where the model is:

    d (x / base) = slope d clock

               base               clock                        slope
    data       sigma rho^eta      (alpha / sigma)^(1 + eta)    D = E[x_0 | x]
    noise      alpha              (1 + eta) sigma / alpha      e = (x - alpha D) / sigma
    flow       alpha + sigma      sigma / (alpha + sigma)      e - D

with eta the share of the reverse SDE's noise: 0 is the ODE, 1 the usual SDE. Every method below
replaces the slope by a polynomial through slopes seen and integrates it: what differs is the form,
the variable the polynomial is in, and where the slopes are from.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ..models import schedules
from . import tables


class Form(NamedTuple):
  """d (x / base) = slope d clock, and the noise that a step adds.

  Attributes:
    base: (alpha, sigma) -> [].
    clock: lambda -> [], monotone.
    rate: lambda -> d clock / d lambda.
    slope: (point, output, alpha, sigma) -> vector.
    spread: (schedule, s, t) -> standard deviation of the noise of a step from s to t.
  """

  base: Callable[[float, float], float]
  clock: Callable[[np.ndarray], np.ndarray]
  rate: Callable[[np.ndarray], np.ndarray]
  slope: Callable[..., np.ndarray]
  spread: Callable[[schedules.Schedule, float, float], float]


class Evaluation(NamedTuple):
  """An output of the model, and the point and time it is of."""

  time: float
  point: np.ndarray
  output: np.ndarray


# (form, lambdas of the nodes, lambda_s, lambda_t) -> weights of the nodes' slopes: the integral of
# the slope over the clock from s to t.
Rule = Callable[[Form, np.ndarray, float, float], np.ndarray]


def data(eta: float = 0.0) -> Form:
  """Of data prediction, as DPM-Solver++ has it.

  x_t = (sigma_t / sigma_s) e^(-eta h) x_s
        + alpha_t int (1 + eta) e^((1 + eta) (lambda - lambda_t)) D d lambda
        + sigma_t sqrt(1 - e^(-2 eta h)) z,   h = lambda_t - lambda_s.

  Reference: Lu et al. 2022, arXiv 2211.01095, eq. 8 and section 4.3; Xue et al. 2023 (SA-Solver),
    arXiv 2305.15388, eq. 11, where eta is tau^2.
  """

  def spread(schedule, s, t):
    h = _lambda(schedule, t) - _lambda(schedule, s)
    return schedule.sigma(t) * np.sqrt(-np.expm1(-2 * eta * h)) if eta else 0.0

  return Form(
    base=lambda alpha, sigma: sigma * (sigma / alpha) ** eta if eta else sigma,
    clock=lambda half_log_snr: np.exp((1 + eta) * half_log_snr),
    rate=lambda half_log_snr: (1 + eta) * np.exp((1 + eta) * half_log_snr),
    slope=lambda point, output, alpha, sigma: output,
    spread=spread,
  )


def noise(eta: float = 0.0) -> Form:
  """Of noise prediction, as DPM-Solver and DEIS have it.

  x_t / alpha_t = x_s / alpha_s + (1 + eta) int e d rho + sqrt(eta (rho_s^2 - rho_t^2)) z.

  Reference: Lu et al. 2022, arXiv 2206.00927, eq. 3.4; Zhang and Chen 2022 (DEIS), arXiv
    2204.13902, eq. 17.
  """

  def spread(schedule, s, t):
    if not eta or schedule.alpha(s) == 0:
      return 0.0
    rho_s, rho_t = (schedule.sigma(u) / schedule.alpha(u) for u in (s, t))
    return schedule.alpha(t) * np.sqrt(eta * (rho_s**2 - rho_t**2))

  return Form(
    base=lambda alpha, sigma: alpha,
    clock=lambda half_log_snr: (1 + eta) * np.exp(-half_log_snr),
    rate=lambda half_log_snr: -(1 + eta) * np.exp(-half_log_snr),
    slope=lambda point, output, alpha, sigma: (point - alpha * output) / sigma,
    spread=spread,
  )


def flow() -> Form:
  """Of velocity prediction: for alpha = 1 - t, sigma = t it is dx / dt = e - D.

  Reference: Lipman et al. 2022, arXiv 2210.02747.
  """
  clock = lambda half_log_snr: np.exp(-np.logaddexp(0, half_log_snr))
  return Form(
    base=lambda alpha, sigma: alpha + sigma,
    clock=clock,
    rate=lambda half_log_snr: -clock(half_log_snr) * clock(-half_log_snr),
    slope=lambda point, output, alpha, sigma: (point - alpha * output) / sigma - output,
    spread=lambda schedule, s, t: 0.0,
  )


def advance(
  path: tables.Path,
  form: Form,
  rule: Rule,
  x: np.ndarray,
  s: float,
  t: float,
  nodes: Sequence[Evaluation],
  *,
  z: np.ndarray | None = None,
) -> np.ndarray:
  """x_t from x_s: base_t (x_s / base_s + sum_j weight_j slope_j) + spread z.

  Where the clock or the base is infinite at an end (the data form at sigma = 0, the noise form at
  alpha = 0) it is `ddim`'s step, which is what order one comes to in every form.

  Args:
    nodes: slopes to interpolate, the first of them at s for that step's sake.
    z: the noise; that of the last evaluation's row where it is not given.
  """
  schedule, z = path.schedule, path.noise() if z is None else z
  lam_s, lam_t = _lambda(schedule, s), _lambda(schedule, t)
  with np.errstate(divide="ignore", over="ignore"):
    base_s, base_t = (form.base(schedule.alpha(u), schedule.sigma(u)) for u in (s, t))
    clocks = form.clock(lam_s), form.clock(lam_t)
  spread = form.spread(schedule, s, t)
  if not np.all(np.isfinite([*clocks, base_t])) or base_s == 0 or base_t == 0:
    return ddim(schedule, nodes[0], x, s, t) + spread * z
  weights = rule(form, np.array([_lambda(schedule, node.time) for node in nodes]), lam_s, lam_t)
  moved = sum(w * slope(form, schedule, node) for w, node in zip(weights, nodes, strict=True))
  return base_t * (x / base_s + moved) + spread * z


def slope(form: Form, schedule: schedules.Schedule, node: Evaluation) -> np.ndarray:
  """The form's slope at an evaluated point."""
  alpha, sigma = schedule.alpha(node.time), schedule.sigma(node.time)
  return form.slope(node.point, node.output, alpha, sigma)


def ddim(
  schedule: schedules.Schedule, node: Evaluation, x: np.ndarray, s: float, t: float
) -> np.ndarray:
  """x_t = alpha_t D + sigma_t (x_s - alpha_s D) / sigma_s: at time 0, x_0 = D."""
  ratio = schedule.sigma(t) / schedule.sigma(s)
  return schedule.alpha(t) * node.output + ratio * (x - schedule.alpha(s) * node.output)


def exact(variable: Callable[[np.ndarray], np.ndarray]) -> Rule:
  """The polynomial in `variable` (of lambda) through the nodes, integrated over the clock.

  weight_j = int prod_{k != j} (u - u_k) / (u_j - u_k) d clock, by Gauss-Legendre quadrature in
  lambda, to rounding. A node whose u is infinite, or is another's, is left out; if u is infinite
  at an end, all but the first are.
  """

  def rule(form, nodes, lam_s, lam_t):
    with np.errstate(over="ignore"):
      u, ends = variable(nodes), variable(np.array([lam_s, lam_t]))
    kept = _distinct(u) if np.all(np.isfinite(ends)) else [0]
    weights = np.zeros(len(nodes))
    if len(kept) == 1:
      weights[kept] = form.clock(lam_t) - form.clock(lam_s)
      return weights
    for j in kept:
      others = [k for k in kept if k != j]
      basis = lambda along, j=j, others=others: np.prod(
        [(variable(along) - u[k]) / (u[j] - u[k]) for k in others], axis=0
      )
      weights[j] = integral(form, basis, lam_s, lam_t)
    return weights

  return rule


def log_snr(half_log_snr: np.ndarray) -> np.ndarray:
  """The variable lambda."""
  return half_log_snr


def noise_ratio(half_log_snr: np.ndarray) -> np.ndarray:
  """The variable rho = sigma / alpha."""
  return np.exp(-half_log_snr)


def midpoint(form: Form, nodes: np.ndarray, lam_s: float, lam_t: float) -> np.ndarray:
  """The line in lambda through two nodes, held at its value in the middle of the step.

  slope(s) + (h / 2) (slope(s) - slope(s')) / (lambda_s - lambda_s'): of second order, as `exact`
  is, and what DPM-Solver(++) 2M and 2S do by default. One node counts as order one.
  """
  total = form.clock(lam_t) - form.clock(lam_s)
  gap = nodes[0] - nodes[1] if len(nodes) > 1 and np.all(np.isfinite(nodes[:2])) else 0.0
  tilt = 0.5 * steps_per(gap, lam_s, lam_t)
  return total * np.array([1 + tilt, -tilt, *np.zeros(len(nodes))][: len(nodes)])


def fixed(weights: Sequence[float]) -> Rule:
  """The mean of the slopes with these weights, whatever the nodes: of Runge-Kutta, of iPNDM."""
  return lambda form, nodes, lam_s, lam_t: (
    (form.clock(lam_t) - form.clock(lam_s)) * np.asarray(weights, np.float64)
  )


def steps_per(gap: float, lam_s: float, lam_t: float) -> float:
  """(lambda_t - lambda_s) / gap, and 0, for order one, where that is no number."""
  finite = gap != 0 and np.isfinite(gap) and np.isfinite(lam_t - lam_s)
  return (lam_t - lam_s) / gap if finite else 0.0


def _distinct(u):
  """Indices of finite values that are not repeated, first come first kept."""
  kept = []
  for j, value in enumerate(u):
    near = [abs(value - u[k]) <= 1e-10 * max(abs(value), abs(u[k])) for k in kept]
    if np.isfinite(value) and not any(near):
      kept.append(j)
  return kept or [0]


_FAR = 60.0  # in lambda: what is left of the integrals beyond, e^-60, is rounding
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(200)


def integral(
  form: Form, function: Callable[[np.ndarray], np.ndarray], lam_s: float, lam_t: float
) -> float:
  """int function(lambda) d clock from lambda_s to lambda_t, either of which may be infinite."""
  low = lam_t - _FAR if np.isneginf(lam_s) else lam_s
  high = lam_s + _FAR if np.isposinf(lam_t) else lam_t
  half = (high - low) / 2
  places = low + half * (1 + _NODES)
  return float(np.sum(half * _WEIGHTS * form.rate(places) * function(places)))


def _lambda(schedule, t):
  return float(schedules.half_log_snr(schedule, t))
