"""Learned solvers: tables fitted to where a model's exact flow takes given noise.

    teacher = Teacher(denoise, context, noise, samples)       # x_0 of many small steps
    table = learned(teacher, schedule, dpmpp_2m(schedule, times)).table
    pathlib.Path("solver.json").write_text(tables.to_json(table))

A solver of n evaluations has about n^2 / 2 + 2 n coefficients, its `tables.Expansion`, and what it
is off by is a vector of as many numbers as there are numbers in the samples. So it is fitted by
least squares (Levenberg and Marquardt's, in scipy's trust-region form) from a solver that is good
already, in some tens of steps, with the Jacobian through the sampler. The network is not trained.

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


def teacher(denoise: ModelOf, context: Any, noise: jax.Array, table: tables.SolverTable) -> Teacher:
  """The teacher whose samples are those of an accurate table, from x = 0 and this noise."""
  return Teacher(denoise, context, noise, _run(denoise, context, noise, _quiet(table)).sample)


def trajectory(teacher: Teacher, table: tables.SolverTable) -> solvers.Trajectory:
  """The way of a table from the teacher's noise.

  Raises:
    ValueError: the table draws noise.
  """
  return _run(teacher.denoise, teacher.context, teacher.noise, _quiet(table))


def error(teacher: Teacher, table: tables.SolverTable) -> float:
  """Root mean square over all numbers of what the table is off by; infinite if it is not finite.

  Raises:
    ValueError: the table draws noise.
  """
  off = np.asarray(trajectory(teacher, table).sample) - np.asarray(teacher.samples)
  root = float(np.sqrt(np.mean(np.square(off, dtype=np.float64))))
  return root if np.isfinite(root) else np.inf


def learned(
  teacher: Teacher,
  schedule: schedules.Schedule,
  table: tables.SolverTable,
  *,
  max_steps: int = 60,
  chunk: int = 8,
) -> Fitted:
  """Every coefficient of a solver, and the time at which each evaluation is made, fitted.

    minimise sum_b | sample(expansion, z_b) - x_b |^2  over times, inputs and outputs

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
    chunk: columns of the Jacobian made at once.

  Raises:
    ValueError: the table draws noise, or a time has no finite log-SNR.

  Reference: Shaul et al. 2023 (Bespoke solvers), arXiv 2310.19075, learn coefficients by stochastic
    gradients.
  """
  base = _quiet(table)
  first = _vector(base, schedule)
  low = np.full(first.size, -np.inf)
  low[: table.num_rows] = schedules.half_log_snr(schedule, schedule.max_time)
  high = np.where(np.arange(first.size) < table.num_rows, _CLEANEST, np.inf)
  data, dtype = teacher[1:], teacher.noise.dtype
  run = functools.partial(_residual, teacher.denoise, schedule, data, base)
  slopes = functools.partial(_jacobian, teacher.denoise, schedule, chunk, data, base)
  found = _least_squares(
    lambda v: np.asarray(run(jnp.asarray(v, dtype)), np.float64),
    np.clip(first, low, high),
    jac=lambda v: np.asarray(slopes(jnp.asarray(v, dtype)), np.float64).T,
    bounds=(low, high),
    max_nfev=max_steps,
  )
  arrays = _expansion(schedule, base, jnp.asarray(found.x))
  made = tables.realise(tables.Expansion(*(np.asarray(array, np.float64) for array in arrays)))
  return _result(teacher, table, made, found)


def fitted(
  teacher: Teacher,
  make: Callable[[np.ndarray], tables.SolverTable],
  start: np.ndarray,
  *,
  max_steps: int = 30,
) -> Fitted:
  """The member of a family of tables that is nearest to the teacher, by finite differences.

  Args:
    teacher: see `learned`.
    make: parameters [P] -> table, of as many evaluations whatever they are.
    start: [P], to begin with.
    max_steps: see `learned`.
  """
  target = np.asarray(teacher.samples, np.float64).ravel()

  def residual(v):
    run = np.asarray(trajectory(teacher, make(v)).sample, np.float64).ravel()
    return np.nan_to_num(run - target, nan=1e3)

  start = np.asarray(start, np.float64)
  found = _least_squares(residual, start, diff_step=_STEP, max_nfev=max_steps)
  return _result(teacher, make(start), make(found.x), found)


def tuned_grid(
  teacher: Teacher,
  schedule: schedules.Schedule,
  solver: tables.Solver,
  times: np.ndarray,
  **settings: Any,
) -> Fitted:
  """A fixed solver on its best grid: log-SNR steps exp(g_i), fitted from those of `times`.

  The first time stays, and so does a last time 0; another last time is fitted with the rest.

  Args:
    teacher: see `learned`.
    schedule: of the model.
    solver: of one evaluation a step.
    times: [n + 1], falling, to begin with; all but a last 0 of finite log-SNR.
    settings: of `fitted`.

  Raises:
    ValueError: a time has no finite log-SNR.
  """
  jumps = int(times[-1] == 0)
  places = _places(schedule, times[: len(times) - jumps])

  def make(logs):
    later = schedule.time(places[0] + np.cumsum(np.exp(np.clip(logs, -12, 3))))
    return solver(schedule, np.concatenate([times[:1], later, [0.0] * jumps]))

  return fitted(teacher, make, np.log(np.diff(places)), **settings)


def compensated(
  teacher: Teacher,
  schedule: schedules.Schedule,
  times: np.ndarray,
  **settings: Any,
) -> Fitted:
  """DC-Solver with the ratios that bring it nearest to the teacher, from 1, which is UniPC.

  The paper takes 40 steps of AdamW on 10 trajectories; of n - 2 numbers least squares are quicker.

  Args:
    teacher: see `learned`.
    schedule: of the model.
    times: [n + 1].
    settings: of `fitted`.

  Reference: Zhao et al. 2024, arXiv 2409.03755, section 3.2.
  """
  make = lambda ratios: correctors.dc_solver(schedule, times, ratios)
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


_CLEANEST = 15.0  # the greatest log-SNR at which the model may be called
_STEP = 1e-3  # of finite differences; the error of a run in float32 is about 1e-6


def _places(schedule, times):
  """Log-SNRs of times, which have to be finite."""
  places = schedules.half_log_snr(schedule, times)
  if not np.all(np.isfinite(places)):
    raise ValueError("A time has no finite log-SNR: start below the schedule's last.")
  return places


def _lower(outputs):
  """Where outputs [n + 1, n, o] may be other than 0."""
  return np.tril_indices(outputs.shape[0], -1, outputs.shape[1])


def _vector(expansion, schedule):
  """Log-SNRs of the evaluations, inputs of z after the first, outputs: what is fitted."""
  places = _places(schedule, expansion.times[:-1])
  lower = expansion.outputs[_lower(expansion.outputs)]
  return np.concatenate([places, expansion.inputs[1:, 1], lower.ravel()])


def _expansion(schedule, base, vector):
  """The expansion of a vector; `base` gives what is not fitted."""
  n, o = base.outputs.shape[1:]
  times = jnp.clip(schedule.time(vector[:n]), 0, schedule.max_time)
  first, last = (jnp.asarray(a, vector.dtype) for a in (base.inputs[0], base.times[-1:]))
  inputs = jnp.concatenate([first[1:], vector[n : 2 * n]])
  outputs = jnp.zeros(base.outputs.shape, vector.dtype)
  return tables.Expansion(
    jnp.concatenate([times, last]),
    jnp.stack([first[0] / first[1] * inputs, inputs], axis=1),  # x and z come in one state
    outputs.at[_lower(base.outputs)].set(vector[2 * n :].reshape(-1, o)),
    jnp.zeros(base.noises.shape, vector.dtype),
  )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _residual(denoise, schedule, data, base, vector):
  """What the solver of a vector is off by, flat."""
  context, noise, samples = data
  run = _run(denoise, context, noise, _expansion(schedule, base, vector))
  return (run.sample - samples).ravel()


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _jacobian(denoise, schedule, chunk, data, base, vector):
  """Its derivatives, one row for each number of the vector."""
  of = functools.partial(_residual, denoise, schedule, data, base)
  column = lambda tangent: jax.jvp(of, (vector,), (tangent,))[1]
  return jax.lax.map(column, jnp.eye(vector.size, dtype=vector.dtype), batch_size=chunk)


def _least_squares(residual, start, **settings):
  """scipy's, told nothing where there is nothing to fit."""
  if not np.size(start):
    nothing = {"x": np.asarray(start), "nfev": 0, "njev": 0}
    return scipy.optimize.OptimizeResult(nothing)
  return scipy.optimize.least_squares(residual, start, x_scale="jac", **settings)


def _result(teacher, before, after, found):
  """What scipy found, as tables and their errors."""
  runs = found.nfev + found.njev * found.x.size
  return Fitted(after, error(teacher, before), error(teacher, after), found.x, runs)


@functools.partial(jax.jit, static_argnums=0)
def _run(denoise, context, z, expansion):
  model = functools.partial(denoise, context)
  return solvers.trajectory(model, expansion, jnp.zeros_like(z), z)


def _quiet(table):
  """The expansion of a table that draws nothing after its start."""
  if table.noise is not None:
    raise ValueError("The table draws noise: only one that ends where the flow does can be fitted.")
  return tables.expand(table)
