"""Solver tables that draw from a guided law and say how likely the model's own would have been.

    pair = guidance.both(guidance.reward(denoise, reward, schedule, 1 / alpha), denoise)
    algorithm = particles.smc(
      twisted.twisted(pair, ancestral.ddpm(schedule, times)), value, num_particles=16,
      temperature=alpha, log_ratio=twisted.log_ratio, calls=lambda state: 2 * state.step,
    )

Weights put right what the guidance got wrong, and the guidance brings particles where they count.

Reference: Wu et al. 2023 (TDS), arXiv 2306.17775.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..models import base as models
from . import base, guidance, solvers, tables


class Info(NamedTuple):
  """A step of a guided table."""

  time: jax.Array  # [B]
  denoised: jax.Array  # [B, ...], the model's own
  log_ratio: jax.Array  # [B], log p(x' | x) - log q(x' | x), x' drawn from the guided q


def twisted(
  pair: guidance.Pair, table: tables.SolverTable, *, noise: solvers.Noise = solvers.white
) -> base.SamplingAlgorithm:
  """`solvers.tabulated` with the guided denoiser, in steps with noise; elsewhere with the other.

  A step draws x' = mean_q + s z where the model's own mean is mean_q - s d, so

    log p(x' | x) - log q(x' | x) = -(d . z + |d|^2 / 2).

  A step without noise, as the last one is, goes where the model's own does, or there would be no
  ratio.

  Args:
    pair: (x_t, t) -> (guided, the model's own), each E[x_0 | x_t] [B, ...].
    table: of one array and one output a step, and with noise; its arrays may be traced.
    noise: N(0, I), independent of the steps before.

  Raises:
    ValueError: the table carries more than x_t, has another number of outputs, or draws no noise.
  """
  if table.output.shape[1:] != (1, 1) or table.noise is None:
    raise ValueError("Guided steps need a table of one array with noise, as ancestral.ddpm is.")
  n = table.num_rows
  rows = (table.carry[:, 0, 0], table.output[:, 0, 0], table.noise[:, 0])
  carry, output, scale = (jnp.asarray(a, jnp.float32) for a in rows)
  times = jnp.asarray(table.times, jnp.float32)
  start = solvers.tabulated(lambda x, t: pair(x, t)[1], table)

  def step(keys, state):
    row = jnp.minimum(state.step, n - 1)
    x, spread = state.slots[:, 0], scale[row]
    guided, own = (d.astype(x.dtype) for d in pair(x, times[row]))
    z = noise(keys, row, x)
    noisy = spread > 0
    turn = output[row] * noisy / jnp.where(noisy, spread, 1)
    d = models.per_row(turn, x) * (guided - own)
    mean = models.per_row(carry[row], x) * x + models.per_row(output[row], x) * own
    new = mean + models.per_row(spread, x) * (d + z)
    inner = jnp.sum((d * z + d**2 / 2).reshape(x.shape[0], -1), axis=1)
    unfinished = state.step < n
    slots = base.select_rows(unfinished, new[:, None], state.slots)
    info = Info(times[row], own, jnp.where(unfinished, -inner, 0))
    return solvers.State(jnp.minimum(state.step + 1, n), slots), info

  return base.SamplingAlgorithm(start.init, step)


def log_ratio(old: Any, new: Any, info: Info) -> jax.Array:
  """Of the step, for `particles.smc`. [B]."""
  del old, new
  return info.log_ratio
