"""Learned solvers: tables fitted to where a model's exact flow takes given noise.

    teacher = Teacher(denoise, context, noise, samples)       # x_0 of many small steps
    table = learned(teacher, schedule, dpmpp_2m(schedule, times)).table
    pathlib.Path("solver.json").write_text(tables.to_json(table))

A solver of n evaluations has about n^2 / 2 + 2 n coefficients, its `tables.Expansion`, and what it
is off by is a vector of as many numbers as there are numbers in the samples. So it is fitted by
least squares (Levenberg and Marquardt's, in scipy's trust-region form) from a solver that is good
already, which takes tens of steps where stochastic gradients take thousands. The network is not
trained.

`fitted` is for families with few parameters, of which nothing is differentiable but the table is
known: the places of a grid (`tuned_grid`), the ratios of DC-Solver (`compensated`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from ..models import schedules
from ..sampling import correctors, solvers, tables

# (context, x_t [B, ...], t [B]) -> E[x_0 | x_t], or a tuple of o outputs
ModelOf = Callable[[Any, jax.Array, jax.Array], Any]


class Teacher(NamedTuple):
  """A model, and where its flow takes noise.

  The function is compiled for; all else is an argument of the program.
  """

  denoise: ModelOf
  context: Any  # parameters, conditions [B] of the samples
  noise: jax.Array  # [B, ...], z: what a table starts from, beside x = 0
  samples: jax.Array  # [B, ...], x_0


class Fitted(NamedTuple):
  """A fitted solver, with its root mean squared error to the teacher before and after."""

  table: tables.SolverTable
  before: float
  after: float
  parameters: np.ndarray  # of the family
  num_runs: int  # of the sampler, Jacobians counted as one for each parameter


def teacher(
  denoise: ModelOf,
  context: Any,
  noise: jax.Array,
  table: tables.SolverTable,
) -> Teacher:
  """The teacher whose samples are those of an accurate table, from x = 0 and this noise."""
  return Teacher(
    denoise, context, noise, _run(denoise, context, noise, _traced(_quiet(tables.expand(table))))
  )


def samples(teacher: Teacher, table: tables.SolverTable) -> np.ndarray:
  """What a table makes of the teacher's noise, [B, ...].

  Raises:
    ValueError: the table draws noise.
  """
  expansion = _traced(_quiet(tables.expand(table)))
  return np.asarray(_run(teacher.denoise, teacher.context, teacher.noise, expansion))


def error(teacher: Teacher, table: tables.SolverTable) -> float:
  """Root mean square over all numbers of what the table is off by; infinite if it is not finite."""
  off = samples(teacher, table) - np.asarray(teacher.samples)
  root = float(np.sqrt(np.mean(np.square(off, dtype=np.float64))))
  return root if np.isfinite(root) else np.inf


def learned(
  teacher: Teacher,
  schedule: schedules.Schedule,
  table: tables.SolverTable,
  *,
  max_steps: int = 60,
  loss: str = "linear",
  scale: float = 0.05,
  chunk: int = 8,
) -> Fitted:
  """Every coefficient of a solver, and the time at which each evaluation is made, fitted.

    minimise sum_b rho(| replay(expansion, z_b) - x_b |^2)  over times, inputs and outputs

  from a table's. The times are log-SNRs at which the model is called: they are bounded by the
  schedule's own but not ordered. All explicit solvers of n evaluations are in the space, so the
  forms of prediction are too, and, of a table of two outputs (`tables.guided`), guidance of every
  step its own.

  Args:
    teacher: trajectories to fit to. There should be several numbers for each coefficient; more
      where samples fall into basins, as each only counts where it changes smoothly.
    schedule: of the model.
    table: to begin with, of n evaluations that all have noise and signal.
    max_steps: of the optimiser, each one Jacobian.
    loss: scipy's rho: "linear" is the squares', "soft_l1" counts samples that are far off less.
    scale: of rho, what is far, in the units of the samples.
    chunk: columns of the Jacobian made at once.

  Raises:
    ValueError: the table draws noise, or a time has no finite log-SNR.

  Reference: Shaul et al. 2023 (Bespoke solvers), arXiv 2310.19075, learn coefficients by stochastic
    gradients.
  """
  family = _Coefficients(_quiet(tables.expand(table)), schedule)
  bounds = family.bounds()

  @jax.jit
  def residual(data, vector):
    context, noise, samples = data
    run = _run(teacher.denoise, context, noise, family.expansion(vector))
    return (run - samples).ravel()

  @jax.jit
  def jacobian(data, vector):
    of = functools.partial(residual, data)
    column = lambda tangent: jax.jvp(of, (vector,), (tangent,))[1]
    return jax.lax.map(column, jnp.eye(vector.size, dtype=vector.dtype), batch_size=chunk)

  data, dtype = (teacher.context, teacher.noise, teacher.samples), teacher.noise.dtype
  found = _least_squares(
    lambda v: np.asarray(residual(data, jnp.asarray(v, dtype)), np.float64),
    np.clip(family.first, *bounds),
    jac=lambda v: np.asarray(jacobian(data, jnp.asarray(v, dtype)), np.float64).T,
    bounds=bounds,
    max_nfev=max_steps,
    loss=loss,
    f_scale=scale,
  )
  made = tables.realise(_host(family.expansion(jnp.asarray(found.x))))
  runs = found.nfev + found.njev * family.first.size
  return Fitted(made, error(teacher, table), error(teacher, made), found.x, runs)


def fitted(
  teacher: Teacher,
  make: Callable[[np.ndarray], tables.SolverTable],
  start: np.ndarray,
  *,
  max_steps: int = 30,
  loss: str = "linear",
  scale: float = 0.05,
  step: float = 1e-3,
) -> Fitted:
  """The member of a family of tables that is nearest to the teacher, by finite differences.

  Args:
    teacher: see `learned`.
    make: parameters [P] -> table, of as many evaluations whatever they are.
    start: [P], to begin with.
    max_steps, loss, scale: see `learned`.
    step: of the differences; the error of a run in float32 is about 1e-6.
  """
  expansion = lambda v: _traced(_quiet(tables.expand(make(v))))
  target = np.asarray(teacher.samples, np.float64).ravel()

  def residual(v):
    run = _run(teacher.denoise, teacher.context, teacher.noise, expansion(v))
    return np.nan_to_num(np.asarray(run, np.float64).ravel() - target, nan=1e3)

  start = np.asarray(start, np.float64)
  before = error(teacher, make(start))
  found = _least_squares(
    residual, start, diff_step=step, max_nfev=max_steps, loss=loss, f_scale=scale
  )
  runs = found.nfev + found.njev * start.size
  return Fitted(make(found.x), before, error(teacher, make(found.x)), found.x, runs)


Solver = Callable[[schedules.Schedule, Sequence[float]], tables.SolverTable]


def tuned_grid(
  teacher: Teacher, schedule: schedules.Schedule, solver: Solver, times: np.ndarray, **settings: Any
) -> Fitted:
  """A fixed solver on its best grid: log-SNR steps exp(g_i), fitted from those of `times`.

  The first time stays, and so does a last time 0; another last time is fitted with the rest.

  Args:
    teacher: see `learned`.
    schedule: of the model.
    solver: (schedule, times) -> table.
    times: [n + 1], falling, to begin with; all but a last 0 of finite log-SNR.
    settings: of `fitted`.
  """
  jumps = int(times[-1] == 0)
  places = schedules.half_log_snr(schedule, times[: len(times) - jumps])
  if not np.all(np.isfinite(places)):
    raise ValueError("A time has no finite log-SNR: start below the schedule's last.")

  def make(logs):
    later = schedule.time(places[0] + np.cumsum(np.exp(np.clip(logs, -12, 3))))
    return solver(schedule, np.concatenate([times[:1], later, [0.0] * jumps]))

  return fitted(teacher, make, np.log(np.diff(places)), **settings)


def compensated(
  teacher: Teacher,
  schedule: schedules.Schedule,
  times: np.ndarray,
  solver: Callable[..., tables.SolverTable] = correctors.dc_solver,
  **settings: Any,
) -> Fitted:
  """DC-Solver with the ratios that bring it nearest to the teacher, from 1, which is UniPC.

  The paper takes 40 steps of AdamW on 10 trajectories; of n - 2 numbers least squares are quicker.

  Args:
    teacher: see `learned`.
    schedule: of the model.
    times: [n + 1].
    solver: (schedule, times, ratios) -> table.
    settings: of `fitted`.

  Reference: Zhao et al. 2024, arXiv 2409.03755, section 3.2.
  """
  make = lambda ratios: solver(schedule, times, ratios)
  return fitted(teacher, make, np.ones(max(len(times) - 3, 0)), **settings)


class Cascade(NamedTuple):
  """Ratios of DC-Solver for any number of evaluations and scale of guidance; see `cascade`."""

  weights: np.ndarray  # [p + 1, q + 1, r + 1]

  def ratios(self, evaluations: int, scale: float) -> np.ndarray:
    """sum_abc weights[a, b, c] place^a (evaluations / 10)^b scale^c, [max(evaluations - 2, 0)]."""
    terms = _monomials(evaluations, scale, self.weights.shape)
    return terms.reshape(-1, self.weights.size) @ self.weights.ravel()


def cascade(
  found: Sequence[tuple[int, float, np.ndarray]], degrees: tuple[int, int, int] = (2, 1, 1)
) -> Cascade:
  """Cascade polynomial regression: ratios for settings of which there was no fit.

  Ratios are a polynomial of degree p in the place along the run, whose coefficients are polynomials
  of degree q in the number of evaluations, whose coefficients are polynomials of degree r in the
  scale. Nested, they are one polynomial, so that one least squares fits all; the paper fits one
  after the other.

  Args:
    found: (evaluations, scale, ratios [evaluations - 2]) of fits.
    degrees: p, q, r.

  Raises:
    ValueError: fewer ratios than coefficients.

  Reference: Zhao et al. 2024, arXiv 2409.03755, section 3.3.
  """
  shape = tuple(degree + 1 for degree in degrees)
  terms = np.concatenate([_monomials(n, scale, shape) for n, scale, _ in found])
  ratios = np.concatenate([ratios for _, _, ratios in found])
  if ratios.size < np.prod(shape):
    raise ValueError(f"{ratios.size} ratios for {np.prod(shape)} coefficients: lower the degrees.")
  weights = np.linalg.lstsq(terms.reshape(ratios.size, -1), ratios, rcond=None)[0]
  return Cascade(weights.reshape(shape))


def _monomials(evaluations, scale, shape):
  """[n - 2, p + 1, q + 1, r + 1], the place of the i-th ratio being (i + 2) / n."""
  place = np.arange(2, evaluations) / evaluations
  a, b, c = (np.arange(size) for size in shape)
  rest = (evaluations / 10.0) ** b[:, None] * float(scale) ** c[None]
  return (place[:, None] ** a[None])[:, :, None, None] * rest[None, None]


class _Coefficients(NamedTuple):
  """An expansion as a vector: log-SNRs of the evaluations, inputs after the first, outputs."""

  base: tables.Expansion
  schedule: schedules.Schedule

  @property
  def first(self):
    places = schedules.half_log_snr(self.schedule, self.base.times[:-1])
    if not np.all(np.isfinite(places)):
      raise ValueError("A time has no finite log-SNR: start below the schedule's last.")
    lower = self.base.outputs[self._used]
    return np.concatenate([places, self.base.inputs[1:, 1], lower.ravel()])

  @property
  def _used(self):
    return np.tril_indices(len(self.base.times), -1, len(self.base.times) - 1)

  def bounds(self):
    n, low = len(self.base.times) - 1, np.full(self.first.shape, -np.inf)
    low[:n] = schedules.half_log_snr(self.schedule, self.schedule.max_time)
    return low, np.where(np.arange(low.size) < n, 15.0, np.inf)

  def expansion(self, vector):
    """Of numpy or traced arrays."""
    n, o = self.base.outputs.shape[1:]
    places, inputs, lower = vector[:n], vector[n : 2 * n], vector[2 * n :].reshape(-1, o)
    times = jnp.clip(self.schedule.time(places), 0, self.schedule.max_time)
    inputs = jnp.concatenate([jnp.asarray(self.base.inputs[:1, 1], vector.dtype), inputs])
    ratio = self.base.inputs[0, 0] / self.base.inputs[0, 1]  # x and z come in one state
    return tables.Expansion(
      jnp.concatenate([times, jnp.asarray(self.base.times[-1:], vector.dtype)]),
      jnp.stack([ratio * inputs, inputs], axis=1),
      jnp.zeros(self.base.outputs.shape, vector.dtype).at[self._used].set(lower),
      jnp.zeros(self.base.noises.shape, vector.dtype),
    )


def _least_squares(residual, start, **settings):
  """scipy's, told nothing where there is nothing to fit."""
  if not np.size(start):
    nothing = {"x": np.asarray(start), "nfev": 0, "njev": 0}
    return scipy.optimize.OptimizeResult(nothing)
  return scipy.optimize.least_squares(residual, start, x_scale="jac", **settings)


@functools.partial(jax.jit, static_argnums=0)
def _run(denoise, context, z, expansion):
  return solvers.replayed(functools.partial(denoise, context), expansion, jnp.zeros_like(z), z)


def _quiet(expansion):
  """The expansion, of a table that draws nothing after its start."""
  if np.any(expansion.noises):
    raise ValueError("The table draws noise: only one that ends where the flow does can be fitted.")
  return expansion


def _host(expansion):
  """In float64, as tables are made."""
  return tables.Expansion(*(np.asarray(array, np.float64) for array in expansion))


def _traced(expansion):
  """Without float64 where jax has none."""
  return jax.tree.map(jnp.asarray, expansion)
