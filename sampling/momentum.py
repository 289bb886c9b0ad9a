"""Momentum: multistep solvers whose slopes are averaged, less accurate and stable for longer steps.

In rho = sigma / alpha the equation is d (x / alpha) = e d rho. A step moves by u_i (rho_t - rho_s),
u_i a combination of e_0, .., e_i; v is the velocity, b the damping, v_0 = e_0:

    heavy ball                v_i = (1 - b) v_{i-1} + b AB_k(e),    u_i = v_i
    generalised heavy ball    v_i = (1 - b) v_{i-1} + b e_i,        u_i = sum_j w_j v_{i-j}, j < k

With b = 1 both are Adams-Bashforth, `multistep.ipndm`. The paper writes k and b as one number:
GHVB 3.8 is k = 4, b = .8.

Reference: Wizadwongsa et al. 2023, arXiv 2307.11118.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from ..models import schedules
from . import forms, multistep, tables


def weights(order: int, damping: float = 1.0) -> np.ndarray:
  """w_j of the last velocities, the latest first, [order]; Adams-Bashforth's at damping 1.

  With the backward difference D, Adams-Bashforth is u = G(D) e, G(D) = -D / ((1 - D) log(1 - D)) =
  1 + D / 2 + 5 D^2 / 12 + .., and v = b e / (b + (1 - b) D). So u = G(D) (1 + (1 - b) D / b) v, cut
  at D^(order - 1): after so long that the first velocity is forgotten, u is exact for slopes that
  are polynomials of degree below `order` in the step.

  Raises:
    ValueError: order below 1; damping outside (0, 1].

  Reference: Wizadwongsa et al. 2023, arXiv 2307.11118.
  """
  if order < 1 or not 0 < damping <= 1:
    raise ValueError(f"order={order}, damping={damping}: above 0, and in (0, 1].")
  series = []
  for j in range(order):
    series.append(1 - sum(c / (j + 1 - i) for i, c in enumerate(series)))
  series = np.polynomial.Polynomial(series) * [1, 1 / damping - 1]
  of_lag = series.cutdeg(order - 1)(np.polynomial.Polynomial([1, -1])).coef
  return np.pad(of_lag, (0, order - len(of_lag)))


def heavy_ball(
  schedule: schedules.Schedule, times: Sequence[float], order: int = 2, *, damping: float = 0.8
) -> tables.SolverTable:
  """Heavy ball (HB): Adams-Bashforth's slopes averaged over time; of first order whatever k.

  v_i = (1 - b) v_{i-1} + b AB_k(e), v_0 = e_0. One evaluation a step; orders rise from 1.

  Args:
    schedule: alpha and sigma of time.
    times: [n + 1].
    order: k.
    damping: b in (0, 1]; 1 is `multistep.ipndm`.

  Raises:
    ValueError: as `weights` and `tables.grid`.

  Reference: Wizadwongsa et al. 2023, arXiv 2307.11118.
  """
  weights(order, damping)  # raises
  num = len(times) - 1
  velocities = averaged(_latest(np.eye(num), lambda count: weights(min(order, count))), damping)
  return _moved(schedule, times, lambda i: velocities[i])


def ghvb(
  schedule: schedules.Schedule, times: Sequence[float], order: int = 2, *, damping: float = 0.8
) -> tables.SolverTable:
  """Generalised heavy ball (GHVB): the velocity of e, and weights that give back its order.

  v_i = (1 - b) v_{i-1} + b e_i, v_0 = e_0, u_i = sum_j w_j v_{i-j} with `weights` of order
  min(k, i + 1). Those are of order k on a grid even in rho, once the first velocity is forgotten.
  On other grids they are of order 2, as Adams-Bashforth's constant weights are, and v_0 = e_0,
  O(h) off what they assume, makes it 2 on every grid. `exact` is of order k on all.

  Args:
    schedule: alpha and sigma of time.
    times: [n + 1].
    order: k.
    damping: b in (0, 1]; 1 is `multistep.ipndm`.

  Raises:
    ValueError: as `weights` and `tables.grid`.

  Reference: Wizadwongsa et al. 2023, arXiv 2307.11118.
  """
  weights(order, damping)  # raises
  velocities = averaged(np.eye(len(times) - 1), damping)
  slopes = _latest(velocities, lambda count: weights(min(order, count), damping))
  return _moved(schedule, times, lambda i: slopes[i])


def exact(
  schedule: schedules.Schedule,
  times: Sequence[float],
  order: int = 2,
  *,
  damping: float = 0.8,
  variable: Callable[[np.ndarray], np.ndarray] = forms.log_snr,
  start: multistep.Step | None = None,
) -> tables.SolverTable:
  """GHVB with the weights of the grid at hand, and of the velocities that there are.

  sum_j w_j v_{i-j} = int e d rho / (rho_t - rho_s) for every e that is a polynomial of degree below
  k in the variable: k equations, which know how v began. Of order k on any grid after a `start`
  of that order; with b = 1 it is DEIS, `multistep.deis`, in the variable.

  Args:
    schedule: alpha and sigma of time.
    times: [n + 1].
    order: k.
    damping: b in (0, 1].
    variable: of lambda. Where it is infinite at an end of a step, u = e.
    start: makes the first k - 1 steps, as in `multistep.adams_bashforth`.

  Raises:
    ValueError: as `weights` and `tables.grid`.
  """
  weights(order, damping)  # raises
  times = tables.grid(schedule, times)
  num, half_log_snr = len(times) - 1, schedules.half_log_snr(schedule, times)
  with np.errstate(over="ignore"):
    u = variable(half_log_snr)
  first = int(np.argmax(np.isfinite(u)))  # before it, v has not begun
  velocities = averaged(np.eye(num)[first:], damping)

  def slope(i):
    if i < first or not np.isfinite(u[i + 1]) or u[i] == u[i + 1]:
      return np.eye(num)[i]
    place = lambda lam: (variable(lam) - u[i]) / (u[i + 1] - u[i])
    seen, powers = velocities[i - first :: -1][:order], range(min(order, i + 1 - first))
    means = _means(place, powers, half_log_snr[i], half_log_snr[i + 1])
    at = place(half_log_snr[first : i + 1])
    return _solved(np.array([seen[:, first : i + 1] @ at**m for m in powers]), means) @ seen

  return _moved(schedule, times, slope, start, order - 1)


def _means(place, powers, low, high):
  """Of place^m over rho, from lambda = low to high."""
  form = forms.noise()
  total = form.clock(high) - form.clock(low)
  along = [lambda lam, m=m: place(lam) ** m for m in powers]
  return np.array([forms.integral(form, power, low, high) for power in along]) / total


def _solved(moments, means):
  """Weights with these moments; of as many as there can be, where slopes repeat."""
  size = len(means)
  while size > 1 and np.linalg.cond(moments[:size, :size]) > 1e12:
    size -= 1
  return np.pad(np.linalg.solve(moments[:size, :size], means[:size]), (0, len(means) - size))


def averaged(slopes: np.ndarray, damping: float) -> np.ndarray:
  """v_0 = slope_0, v_i = (1 - b) v_{i-1} + b slope_i, along the first axis of slopes [n, ...]."""
  following = lambda v, slope: (1 - damping) * v + damping * slope
  return np.array(list(itertools.accumulate(slopes, following)))


def _latest(rows, weigh):
  """Row i: the last rows up to row i, weighed by weigh(i + 1), the latest first."""
  out = np.zeros_like(rows)
  for i in range(len(rows)):
    w = weigh(i + 1)
    out[i] = w @ rows[i::-1][: len(w)]
  return out


def _moved(schedule, times, slope, start=None, num_start=0):
  """The solver whose step i has the slope slope(i) . (e_0, e_1, ..), the first by `start`."""
  times, form = tables.grid(schedule, times), forms.noise()
  path = tables.Path(schedule, len(times) + 3 * num_start)
  x, history = path.start(times[0]), []
  for i, (s, t) in enumerate(itertools.pairwise(times)):
    if start is not None and i < num_start and t > 0:
      x, seen = start(path, x, s, t)
      history.insert(0, seen)
      continue
    history.insert(0, forms.Evaluation(s, x, path.evaluate(x, s)))
    x = forms.advance(path, form, forms.fixed(slope(i)[i::-1]), x, s, t, history)
  return path.table(x, times[-1])


def amplification(mix: np.ndarray, damping: float, z: np.ndarray) -> np.ndarray:
  """The largest modulus of the characteristic roots for x' = lambda x, z = lambda h, [...].

  x_{n+1} - x_n = h u_n and u_n - (1 - b) u_{n-1} = b sum_j mix_j e_{n-j}, e = lambda x, so that

    (r - 1) (r - (1 - b)) r^(m - 2) = z b sum_j mix_j r^(m - 1 - j),    m = max(k, 2).

  Where it is below 1 errors die out. The root 1 - b at z = 0 is the velocity's memory.

  Args:
    mix: [k], `weights(k, b)` for GHVB, `weights(k)` for HB.
    damping: b.
    z: [...], complex or real.

  Reference: Wizadwongsa et al. 2023, arXiv 2307.11118; Hairer and Wanner 1996, V.1.
  """
  z, degree = np.asarray(z, np.complex128), max(len(mix), 2)
  companion = np.zeros((*z.shape, degree, degree), np.complex128)
  companion[..., np.arange(1, degree), np.arange(degree - 1)] = 1
  companion[..., 0, 0] = 2 - damping
  companion[..., 0, 1] = damping - 1
  companion[..., 0, : len(mix)] += z[..., None] * damping * mix
  return np.abs(np.linalg.eigvals(companion)).max(-1)


def real_extent(mix: np.ndarray, damping: float) -> float:
  """z < 0 at which the root -1 appears: -2 (2 - b) / (b sum_j mix_j (-1)^j).

  Where the region of stability ends on the negative real axis, for the methods here. Heavy ball
  moves it (2 - b) / b times as far; of GHVB it is -2 (2 - b) / b, -(2 - b),
  -2 (2 - b) / (4 - b / 3), -3 (2 - b) / (11 - b) at k = 1, .., 4: for small b at most what
  Adams-Bashforth has of order k - 1.
  """
  return -2 * (2 - damping) / (damping * float(mix @ (-1.0) ** np.arange(len(mix))))
