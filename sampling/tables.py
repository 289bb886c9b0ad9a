"""Diffusion solvers as tables of coefficients: what a solver is, apart from the model it is run on.

A solver with a fixed grid evaluates the model at points that are linear combinations of the input,
of the model's outputs so far and of noise. The coefficients depend on the schedule and the grid,
so they are known beforehand, on the host, in float64. A solver is written down as its `Path`:

    path = Path(schedule, num_rows)
    x = path.start(times[0])
    for s, t in itertools.pairwise(times):
      m = path.evaluate(x, s)                 # E[x_0 | x_s], a vector of coefficients, as x is
      x = alpha(t) * m + sigma(t) * (x - alpha(s) * m) / sigma(s)                     # DDIM
    table = path.table(x, times[-1])

with every quantity a numpy vector. `table` finds the fewest arrays that have to be carried from
one evaluation to the next; `solvers.tabulated` runs it.
"""

import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ..models import schedules

# A remainder this small, relative to what it is of, is rounding.
_ROUNDING = 1e-9


class SolverTable(NamedTuple):
  """A solver of n evaluations that carries k arrays, of a model with o outputs.

  Row i, with S the k arrays and z ~ N(0, I):

    m = denoise(S[0], times[i]),    S <- carry[i] S + output[i] m + noise[i] z,

  from S[0] = start[0] x + start[1] z, the others 0. In the end S[0] is the sample at times[n]. The
  input x is a clean sample (0 to start from noise alone) unless `from_state` changes it.
  """

  start: np.ndarray  # [2]
  times: np.ndarray  # [n + 1]
  carry: np.ndarray  # [n, k, k]
  output: np.ndarray  # [n, k, o]
  noise: np.ndarray | None  # [n, k]; None draws nothing

  @property
  def num_rows(self) -> int:
    """n, the number of evaluations."""
    return self.carry.shape[0]


# (schedule, times [n + 1]) -> table, for models of this schedule
Solver = Callable[[schedules.Schedule, Sequence[float]], SolverTable]


class Expansion(NamedTuple):
  """A solver's n evaluation points and its sample, in terms of what goes in.

  point_i = inputs[i] . (x, z_start) + sum_j outputs[i, j] . m_j + sum_j noises[i, j] z_j, j < i.
  Tables that carry different things but have one expansion are one solver.
  """

  times: np.ndarray  # [n + 1]
  inputs: np.ndarray  # [n + 1, 2]
  outputs: np.ndarray  # [n + 1, n, o], 0 for j >= i
  noises: np.ndarray  # [n + 1, n], 0 for j >= i


class Path:
  """A solver being written down: points are vectors over (x, z_start, m_0, .., z_0, ..).

  Args:
    schedule: alpha and sigma of time.
    num_rows: evaluations, at most.
    num_outputs: o, of the model.
  """

  def __init__(self, schedule: schedules.Schedule, num_rows: int, num_outputs: int = 1):
    self.schedule, self._num_rows, self._num_outputs = schedule, num_rows, num_outputs
    self._points, self._times = [], []

  def _units(self, first: int, count: int = 1) -> np.ndarray:
    """Unit vectors of the coordinates from `first`, [count, width]."""
    return np.eye(count, 2 + self._num_rows * (self._num_outputs + 1), first)

  def given(self, start: np.ndarray) -> np.ndarray:
    """start[0] x + start[1] z."""
    return np.asarray(start) @ self._units(0, 2)

  def start(self, t: float) -> np.ndarray:
    """alpha(t) x + sigma(t) z: the input, noised to time t."""
    return self.given([self.schedule.alpha(t), self.schedule.sigma(t)])

  def renoise(self, x: np.ndarray, s: float, t: float) -> np.ndarray:
    """x_t from x_s at a noisier t: alpha_t (x / alpha_s + sqrt(rho_t^2 - rho_s^2) z).

    Before the first evaluation there is no z of a row; the input is noised to t instead.
    """
    if not self._points:
      return self.start(t)
    alpha_s, alpha_t = self.schedule.alpha(s), self.schedule.alpha(t)
    rho_s, rho_t = self.schedule.sigma(s) / alpha_s, self.schedule.sigma(t) / alpha_t
    return alpha_t * (x / alpha_s + np.sqrt(max(rho_t**2 - rho_s**2, 0.0)) * self.noise())

  def evaluate(self, point: np.ndarray, t: float) -> np.ndarray:
    """The model's output at a point of time t; [o, ..] where o is not 1."""
    first = 2 + len(self._points) * self._num_outputs
    self._points.append(np.array(point))  # whatever becomes of the caller's
    self._times.append(t)
    outputs = self._units(first, self._num_outputs)
    return outputs if self._num_outputs > 1 else outputs[0]

  def noise(self) -> np.ndarray:
    """The z of the last evaluation's row: one a row, the same however often it is asked for."""
    return self._units(2 + self._num_rows * self._num_outputs + len(self._points) - 1)[0]

  def expansion(self, sample: np.ndarray, t: float) -> Expansion:
    """The solver that ends with this sample, at time t."""
    n, o = len(self._points), self._num_outputs
    points = np.stack([*self._points, sample])
    first_noise = 2 + self._num_rows * o
    used = [*range(2 + n * o), *range(first_noise, first_noise + n)]
    return _expansion(np.array([*self._times, t], np.float64), points[:, used], n, o)

  def table(self, sample: np.ndarray, t: float) -> SolverTable:
    """The expansion, as a table with as few slots as it can have."""
    return realise(self.expansion(sample, t))


def expand(table: SolverTable) -> Expansion:
  """The evaluation points in terms of the input, the outputs and the noise before them."""
  n, k, o = table.output.shape
  noise = np.zeros((n, k)) if table.noise is None else table.noise
  units = np.eye(2 + n * o + n)
  slots = np.zeros((k, len(units)))
  slots[0, :2] = table.start
  points = [slots[0]]
  for i in range(n):
    outputs = units[2 + i * o : 2 + (i + 1) * o]
    slots = (
      table.carry[i] @ slots + table.output[i] @ outputs + np.outer(noise[i], units[2 + n * o + i])
    )
    points.append(slots[0])
  return _expansion(np.asarray(table.times), np.stack(points), n, o)


def _expansion(times, points, n, o):
  """Points [n + 1, 2 + n o + n] over (x, z_start, outputs, noises), as an Expansion."""
  outputs = points[:, 2 : 2 + n * o].reshape(n + 1, n, o)
  return Expansion(times, points[:, :2], outputs, points[:, 2 + n * o :])


def realise(expansion: Expansion) -> SolverTable:
  """The table of an expansion, with as few slots as it can have.

  Backwards over the rows: what row i has to hand on spans point i and whatever row i + 1 has to
  hand on, less the output and the noise that row i itself contributes. A basis of that span is
  the slots: point i first, then recent outputs of the model where they lie in it, then what is
  left. The number of slots is the rank of the span, so none could have fewer.

  Raises:
    ValueError: a point uses an output or a noise that comes after it, the first point is not a
      combination of the input and z_start alone, or a later one is of another such combination.
  """
  times, inputs, outputs, noises = expansion
  n, o = outputs.shape[1:]
  for i in range(n):
    if np.any(outputs[i, i:]) or np.any(noises[i, i:]):
      raise ValueError(f"Point {i} uses an output or a noise of row {i} or later.")
  points = np.concatenate([inputs, outputs.reshape(n + 1, n * o), noises], axis=1)
  turned = np.abs(inputs @ [inputs[0, 1], -inputs[0, 0]]) / np.linalg.norm(inputs[0])
  if np.any(turned > 1e-6 * np.linalg.norm(points, axis=1)):
    raise ValueError(
      "A point has another mixture of x and z_start than the first: a table starts from one."
    )
  slots, rows = points[n:], []
  for i in reversed(range(n)):
    own = [*range(2 + i * o, 2 + (i + 1) * o), 2 + n * o + i]
    kept = slots.copy()
    kept[:, own] = 0
    basis = _basis(points[i], kept, _recent_outputs(i, o, points.shape[1]))
    carry = np.linalg.lstsq(basis.T, kept.T, rcond=None)[0].T
    carry[np.abs(carry) < 1e-14] = 0
    rows.append((carry, slots[:, own[:-1]], slots[:, own[-1]]))
    slots = basis
  return _padded(inputs[0], times, rows[::-1])


def _recent_outputs(i, o, width):
  """Unit vectors of the model's outputs before row i, the latest first."""
  count = min(i, 8) * o
  return np.eye(count, width, 2 + i * o - count)[::-1]


def _basis(first, kept, candidates):
  """Rows that span `first` and `kept`: `first`, candidates within the span, the rest of `kept`."""
  span = np.concatenate([first[None], kept])
  span = span / np.maximum(np.linalg.norm(span, axis=1, keepdims=True), np.finfo(float).tiny)
  _, size, directions = np.linalg.svd(span, full_matrices=False)
  directions = directions[size > _ROUNDING * size[0]]
  basis, orthonormal = [first], [first / np.linalg.norm(first)]
  within = [v for v in candidates if np.linalg.norm(v - directions.T @ (directions @ v)) < 1e-7]
  for j, vector in enumerate([*within, *kept]):
    if len(basis) == len(directions):
      break
    rest = vector - sum(u * (u @ vector) for u in orthonormal)
    rest = rest - sum(u * (u @ rest) for u in orthonormal)
    if np.linalg.norm(rest) > _ROUNDING * np.linalg.norm(vector):
      orthonormal.append(rest / np.linalg.norm(rest))
      # What is left of `kept` is nearly parallel to `first`: its own direction keeps the digits.
      basis.append(vector if j < len(within) else orthonormal[-1])
  return np.stack(basis)


def _padded(start, times, rows):
  """Rows of different numbers of slots in arrays of one; slots not in use hold 0."""
  k = max(max(carry.shape) for carry, _, _ in rows)
  n, o = len(rows), rows[0][1].shape[1]
  carry, output, noise = np.zeros((n, k, k)), np.zeros((n, k, o)), np.zeros((n, k))
  for i, (a, b, c) in enumerate(rows):
    carry[i, : a.shape[0], : a.shape[1]] = a
    output[i, : len(b)] = b
    noise[i, : len(c)] = c
  return SolverTable(start, times, carry, output, noise if np.any(noise) else None)


def guided(expansion: Expansion, scale: float) -> Expansion:
  """The solver of negative + w (positive - negative), as one of both outputs.

  So the scale of guidance is in the table, and a table may have another at every step.

  Args:
    expansion: of one output.
    scale: w.

  Raises:
    ValueError: it has more outputs than one.
  """
  if expansion.outputs.shape[2] != 1:
    raise ValueError(f"The solver reads {expansion.outputs.shape[2]} outputs; it has to read one.")
  return expansion._replace(outputs=expansion.outputs * np.array([scale, 1 - scale]))


def from_state(table: SolverTable) -> SolverTable:
  """The same solver, its input being the state at times[0] instead of a clean sample."""
  return table._replace(start=np.array([1.0, 0.0]))


def padded(table: SolverTable, num_rows: int) -> SolverTable:
  """The table with rows after its end that leave the sample as it is.

  Tables of different lengths then have one shape, and one compiled program runs them all: the
  number of rows is an argument of `solvers.sample`.

  Raises:
    ValueError: the table has more rows.
  """
  n, k, _ = table.carry.shape
  more = num_rows - n
  if more < 0:
    raise ValueError(f"The table has {n} rows; it does not fit into {num_rows}.")
  fill = lambda a: np.concatenate([a, np.zeros((more, *a.shape[1:]))])
  return SolverTable(
    table.start,
    np.concatenate([table.times[:-1], np.full(more, table.times[-2]), table.times[-1:]]),
    np.concatenate([table.carry, np.tile(np.eye(k), (more, 1, 1))]),
    fill(table.output),
    None if table.noise is None else fill(table.noise),
  )


def to_json(table: SolverTable) -> str:
  """The table as text, its numbers to the last bit."""
  as_list = lambda a: None if a is None else np.asarray(a, np.float64).tolist()
  return json.dumps({name: as_list(a) for name, a in table._asdict().items()})


def from_json(text: str) -> SolverTable:
  """The table that `to_json` wrote.

  Raises:
    ValueError: the text is not of a table, or its arrays do not fit together.
  """
  fields = json.loads(text)
  if not isinstance(fields, dict) or set(fields) != set(SolverTable._fields):
    raise ValueError(f"A table has the fields {', '.join(SolverTable._fields)}.")
  table = SolverTable(**{k: None if v is None else np.array(v) for k, v in fields.items()})
  check(table)
  return table


def check(table: SolverTable) -> None:
  """Raises ValueError where a table's arrays do not fit together or are not finite."""
  n, k = table.carry.shape[:2] if table.carry.ndim == 3 else (0, 0)
  shapes = {"start": (2,), "times": (n + 1,), "carry": (n, k, k), "noise": (n, k)}
  shapes["output"] = (n, k, *table.output.shape[2:3])
  for name, array in table._asdict().items():
    if array is None and name == "noise":
      continue
    if n < 1 or array.shape != shapes[name]:
      raise ValueError(
        f"{name} has shape {array.shape}; with carry {table.carry.shape}, it is {shapes[name]}."
      )
    if not np.all(np.isfinite(array)):
      raise ValueError(f"{name} is not finite everywhere.")


def grid(schedule: schedules.Schedule, times: Sequence[float]) -> np.ndarray:
  """Times [n + 1] as a float64 array, after a look at them.

  Raises:
    ValueError: fewer than two, one outside [0, max_time], or time 0 before the end.
  """
  times = np.asarray(times, np.float64)
  if times.ndim != 1 or len(times) < 2:
    raise ValueError(f"times have shape {times.shape}; they are [n + 1], for n >= 1 steps.")
  if not np.all((times >= 0) & (times <= schedule.max_time * (1 + 1e-12))):
    raise ValueError(f"times have to be within 0 and {schedule.max_time}, the schedule's last.")
  if np.any(times[:-1] == 0):
    raise ValueError("time 0 has no noise to remove: it can only be the last time.")
  return times
