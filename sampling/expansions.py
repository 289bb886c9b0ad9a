"""Solvers made of solvers: a table's points with other outputs than the model's own.

A table says how its points follow from outputs. Where an output is replaced by a combination of
what is known by then, the points are linear in what remains, and the result is a table again:

    table = dualfast(multistep.dpmpp_2m(schedule, times), schedule, 0.5)
    table = analytic_first_step(table, schedule, std=0.75)        # one evaluation fewer
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ..models import base as models
from ..models import precondition, schedules
from . import tables


def substituted(
  table: tables.SolverTable,
  path: tables.Path,
  replace: Callable[[int, np.ndarray], np.ndarray],
) -> tables.SolverTable:
  """The table's points on a path, with other vectors in place of the outputs they are made of.

  Args:
    table: of one output a row.
    path: without points as yet.
    replace: (row, point) -> what later points take for that row's output; called once a row, in
      order, it evaluates the path at the point or, if the row draws no noise, does without.

  Raises:
    ValueError: the table has two outputs a row.
  """
  inputs, outputs, noises = tables.expand(table)[1:]
  if outputs.shape[-1] != 1:
    raise ValueError(f"The table's rows have {outputs.shape[-1]} outputs; one can be replaced.")
  used, drawn = [], []
  for i in range(table.num_rows + 1):
    point = path.given(inputs[i])
    for j in range(i):
      point = point + outputs[i, j, 0] * used[j] + noises[i, j] * drawn[j]
    if i == table.num_rows:
      return path.table(point, table.times[i])
    used.append(replace(i, point))
    drawn.append(path.noise())


def dualfast(
  table: tables.SolverTable,
  schedule: schedules.Schedule,
  strength: float | Sequence[float],
  *,
  reference: int = 0,
) -> tables.SolverTable:
  """DualFast: each noise prediction moved away from an earlier one, which is of more noise.

  In place of row i's e_i = (x_i - alpha_i D_i) / sigma_i, for i beyond the reference r,

    e'_i = (1 + c_i) e_i - c_i e_r.

  The paper splits a sampler's error into that of its steps and that of its network, finds the
  second to grow towards the data, and so extrapolates from where it is small. It is no
  discretisation of the exact equation: for the exact score it is an error of order c.

  Args:
    table: of one output a row; in every form, as e and D of a point give each other.
    schedule: the table's.
    strength: c, falling with the row as c (1 - i / n); or c_i for each row [n]. 0 changes nothing.
    reference: r, the first row unless another is given.

  Raises:
    ValueError: strengths not as many as rows, no such row, or as `substituted`.

  Reference: Yu et al. 2025, arXiv 2506.13058; how c falls is an argument here, a line by default.
  """
  n = table.num_rows
  mix = strength * (1 - np.arange(n) / n) if np.ndim(strength) == 0 else np.asarray(strength)
  if mix.shape != (n,) or not 0 <= reference < n:
    raise ValueError(f"strengths {mix.shape}, row {reference}, of a table with {n} rows.")
  alpha, sigma = schedule.alpha(table.times), schedule.sigma(table.times)
  path, noise = tables.Path(schedule, n), []

  def replace(i, point):
    output = path.evaluate(point, table.times[i])
    noise.append((point - alpha[i] * output) / sigma[i])
    if i <= reference or alpha[i] == 0:
      return output
    return output - mix[i] * sigma[i] / alpha[i] * (noise[i] - noise[reference])

  return substituted(table, path, replace)


def analytic_first_step(
  table: tables.SolverTable, schedule: schedules.Schedule, std: float = 0.0
) -> tables.SolverTable:
  """The first evaluation replaced by that of data of which only the deviation is known.

    D_0 = alpha std^2 x_0 / (alpha^2 std^2 + sigma^2)

  at the first point x_0, exact for data N(0, std^2 I); of another mean, `centred` makes it so.
  std = 0 is e_0 = x_0 / sigma, which at a start of pure noise is the paper's e(x_T, T) = x_T. The
  table has one row, and costs one evaluation, less than the one it is made of.

  Args:
    table: of two rows at least; its first row draws no noise.
    schedule: the table's.
    std: of the data.

  Raises:
    ValueError: the table is of another kind, or as `substituted`.

  Reference: Dockhorn et al. 2022 (GENIE), arXiv 2210.05475 (analytic first step, with
    std = 0); Karras et al. 2022, arXiv 2206.00364, c_skip, is the gain of std.
  """
  if table.num_rows < 2 or np.any(tables.expand(table).noises[:, 0]):
    raise ValueError("A table of one row, or with noise in its first, cannot be without it.")
  path = tables.Path(schedule, table.num_rows - 1)
  alpha, sigma = schedule.alpha(table.times[0]), schedule.sigma(table.times[0])
  gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
  replace = lambda i, point: path.evaluate(point, table.times[i]) if i else gain * point
  return substituted(table, path, replace)


def centred(
  denoise: models.Denoiser, schedule: schedules.Schedule, mean: jax.Array
) -> models.Denoiser:
  """The denoiser of the data less their mean [...]: D(x + alpha mean, t) - mean.

  Its samples are those of the data less the mean, from inputs less the mean.
  """

  def denoised(x, t):
    alpha, _ = precondition.coefficients(schedule, x, t)
    shift = jnp.broadcast_to(mean, x.shape)
    return denoise(x + alpha * shift, t) - shift

  return denoised
