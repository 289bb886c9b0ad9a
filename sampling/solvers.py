"""The kernel that runs every solver table.

    keys = base.row_keys(run_key, requests)
    table = multistep.dpmpp_2m(schedule, grids.karras(schedule, 20, end=0.01))
    images = solvers.sample(keys, denoise, table, jnp.zeros((batch, 28, 28, 1)))

Inside jit the table is an argument like the parameters: another table of the same shape, another
guidance scale, or fewer steps of a `tables.padded` one run the same program.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..models import base as models
from . import base, tables

# (keys [B], step [B], x [B, ...]) -> z, of x's shape and dtype, N(0, 1) everywhere
Noise = Callable[[base.Keys, jax.Array, jax.Array], jax.Array]


class State(NamedTuple):
  """Before row `step` of the table."""

  step: jax.Array  # [B] int32
  slots: jax.Array  # [B, k, ...]; the first is x_t, in the end the sample


class Info(NamedTuple):
  """What one evaluation was of, and what came out."""

  time: jax.Array  # [B]
  denoised: jax.Array  # [B, ...], the model's (first) output: E[x_0 | x_t]


def white(keys: base.Keys, step: jax.Array, x: jax.Array) -> jax.Array:
  """Independent noise at every step. For noise that is one path, see `brownian`."""
  del step
  return jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(keys)


def tabulated(
  denoise: models.Denoiser, table: tables.SolverTable, *, noise: Noise = white
) -> base.SamplingAlgorithm:
  """Diffusion sampling by any fixed-grid solver, one evaluation of the model a step.

    m = denoise(S[0], times[i]),    S <- carry[i] S + output[i] m + noise[i] z

  Inputs are clean samples x [B, ...], zeros to start from noise alone, or noisy ones if the table
  is `tables.from_state`. A row that has gone through the table stays as it is.

  Args:
    denoise: (x_t [B, ...], t [B]) -> E[x_0 | x_t], or, for tables with o outputs, a tuple of o.
    table: its arrays may be traced.
    noise: what z is; drawn only in rows of the table that use it.
  """
  n, k, _ = table.carry.shape
  start, times, carry, output = (jnp.asarray(a, jnp.float32) for a in table[:4])
  scale = None if table.noise is None else jnp.asarray(table.noise, jnp.float32)

  def init(keys, x):
    x = jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))
    first = start[0] * x + start[1] * white(keys, None, x)
    slots = jnp.stack([first, *[jnp.zeros_like(first)] * (k - 1)], axis=1)
    return State(jnp.zeros(x.shape[:1], jnp.int32), slots)

  def step(keys, state):
    row = jnp.minimum(state.step, n - 1)
    x, time = state.slots[:, 0], times[row]
    outputs = denoise(x, time)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    terms = [state.slots[:, j] for j in range(k)] + [m.astype(x.dtype) for m in outputs]
    weights = jnp.concatenate([carry[row], output[row]], axis=2)  # [B, k, k + o]
    unfinished = state.step < n
    if scale is not None:
      used = jnp.any((scale[row] != 0) & unfinished[:, None])
      drawn = lambda keys: noise(keys, row, x)
      terms.append(base.cond(keys, used, drawn, lambda: jnp.zeros_like(x)))
      weights = jnp.concatenate([weights, scale[row][:, :, None]], axis=2)
    # Stacked, the new slots are one loop over memory: half the time of a tuple's k loops.
    slots = jnp.stack([_combined(weights[:, j], terms) for j in range(k)], axis=1)
    slots = base.select_rows(unfinished, slots, state.slots)
    return State(jnp.minimum(state.step + 1, n), slots), Info(time, outputs[0])

  return base.SamplingAlgorithm(init, step)


def _combined(weights, terms):
  """sum_l weights[:, l] terms[l], row by row."""
  return sum(models.per_row(weights[:, l], term) * term for l, term in enumerate(terms))


def sample(
  keys: base.Keys,
  denoise: models.Denoiser,
  table: tables.SolverTable,
  x: jax.Array,
  *,
  num_rows: int | jax.Array | None = None,
  noise: Noise = white,
) -> jax.Array:
  """The samples [B, ...] at the table's last time, from inputs x [B, ...]; see `tabulated`.

  Args:
    num_rows: of a `padded` table, how many rows it has without its padding; may be traced.
  """
  algorithm = tabulated(denoise, table, noise=noise)
  state = base.start(keys, algorithm, x)
  if num_rows is None:
    state, _ = base.run(keys, algorithm, state, table.num_rows)
  else:
    state = base.run_until(keys, algorithm, state, lambda s: s.step >= num_rows, table.num_rows)
  return state.slots[:, 0]


class Trajectory(NamedTuple):
  """The way of a solver."""

  points: jax.Array  # [n, B, ...], where the model was evaluated
  outputs: jax.Array  # [n, o, B, ...]
  sample: jax.Array  # [B, ...]


def trajectory(
  denoise: models.Denoiser, expansion: tables.Expansion, x: jax.Array, z: jax.Array
) -> Trajectory:
  """The points of an expanded table that draws no noise after z, and its sample.

    point_i = inputs[i] . (x, z) + sum_j outputs[i, j] . m_j,    m_i = denoise(point_i, times[i])

  What `sample` gives of the table, slower: n outputs are kept where a table carries k arrays. But
  every coefficient is free, so that gradients reach all of them, and expansions of one n are of one
  shape: one program runs every solver of n evaluations. `noises` is not read.

  Args:
    denoise: as `tabulated`.
    expansion: its arrays may be traced.
    x: [B, ...], clean samples.
    z: [B, ...], noise.
  """
  times, inputs, outputs = (jnp.asarray(a, z.dtype) for a in expansion[:3])
  n, o = outputs.shape[1:]

  def point(inputs, outputs, seen):  # seen [n, o, B, ...]
    moved = jnp.tensordot(outputs.reshape(n * o), seen.reshape(n * o, *z.shape), axes=1)
    return inputs[0] * x + inputs[1] * z + moved

  def row(seen, at):
    i, time, inputs, outputs = at
    here = point(inputs, outputs, seen)
    made = denoise(here, jnp.full(z.shape[:1], time))
    made = jnp.stack(made if isinstance(made, tuple) else (made,)).astype(z.dtype)
    return seen.at[i].set(made), here

  seen = jnp.zeros((n, o, *z.shape), z.dtype)
  rows = jnp.arange(n), times[:-1], inputs[:-1], outputs[:-1]
  seen, points = jax.lax.scan(row, seen, rows)
  return Trajectory(points, seen, point(inputs[-1], outputs[-1], seen))
