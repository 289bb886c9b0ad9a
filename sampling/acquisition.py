"""Active Diffusion Subsampling: what to measure next, by where samples of the posterior differ.

Particles are samples of the posterior given what is measured so far. What a candidate measurement
would give is, by them, a mixture of Gaussians of the measurement's noise about each particle's; the
candidate whose mixture has the most entropy is measured next.

    guide = lambda measured, y: guidance.pigdm(...)  # a denoiser, given what is measured
    rule = functools.partial(acquisition.entropy, std=0.3)
    found = acquisition.subsample(keys, guide, table, acquire, acquisition.pixels, rule, x, at=at)

Reference: Nolan et al. 2024, arXiv 2406.14388.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..models import base as models
from . import base, solvers, tables

# x [P, ...] -> [P, C, M], the M entries of x that each of C candidates measures; every entry is of
# one candidate at most
Candidates = Callable[[jax.Array], jax.Array]

# what the particles have for each candidate [P, C, M] -> how much each is wanted [C]
Rule = Callable[[jax.Array], jax.Array]

# (measured [C] bool, y [C, M], 0 where not measured) -> E[x_0 | x_t, y], a denoiser of particles
Guide = Callable[[jax.Array, jax.Array], models.Denoiser]


def entropy(particles: jax.Array, std: float | jax.Array) -> jax.Array:
  """The entropy of each candidate's mixture over that of the noise alone: [C], in nats.

    H_c = -(1 / P) sum_i log (1 / P) sum_j exp(-|y_ic - y_jc|^2 / (2 s^2))

  in log-sum-exp form, so that no distance overflows and particles far from all others count as
  log P. The exponent is -KL between two of the Gaussians, which makes H_c an upper bound; 4 s^2 for
  2 s^2, and (M / 2) (log 2 - 1) added, is a lower one. The code that came with the paper sums
  exp(+|y_i - y_j|^2 / (2 s^2)): it grows with the distances too, and so often chooses the same, but
  is no entropy and overflows.

  Args:
    particles: [P, C] or [P, C, M], what each particle has for each candidate of M numbers.
    std: s, of the measurement: how far apart particles are told apart.

  Raises:
    ValueError: a shape without candidates.

  Reference: Nolan et al. 2024, arXiv 2406.14388, section 4; Hershey and Olsen 2007. The
    bounds: Kolchinsky and Tracey 2017, arXiv 1706.02419; Huber et al. 2008.
  """
  y = _numbers(particles)
  square = jnp.sum(jnp.square(y[:, None] - y[None]), axis=-1)  # [P, P, C]
  log_density = jax.nn.logsumexp(-square / (2 * jnp.square(std)), axis=1)
  return jnp.log(y.shape[0]) - jnp.mean(log_density, axis=0)


def variance(particles: jax.Array) -> jax.Array:
  """The particles' total variance of each candidate, [C]: the rule of a Gaussian posterior.

  Args:
    particles: as of `entropy`.
  """
  return jnp.sum(jnp.var(_numbers(particles), axis=0), axis=-1)


def in_order(values: jax.Array) -> Rule:
  """The rule that takes the highest of values [C] first, whatever the particles: a fixed mask.

  Numbers drawn at random make a random mask, prior variances the best one in advance.
  """
  return lambda particles: values


def choose(values: jax.Array, measured: jax.Array) -> jax.Array:
  """The candidate of the highest value [C] that is not measured yet [C] bool: [] int32."""
  return jnp.argmax(jnp.where(measured, -jnp.inf, values)).astype(jnp.int32)


def pixels(x: jax.Array) -> jax.Array:
  """Of images [P, H, W, C], the H W pixels: [P, H W, C]."""
  return x.reshape(x.shape[0], -1, x.shape[-1])


def lines(x: jax.Array) -> jax.Array:
  """Of images [P, H, W, C], the H lines: [P, H, W C]."""
  return x.reshape(*x.shape[:2], -1)


def columns(x: jax.Array) -> jax.Array:
  """Of images [P, H, W, C], the W columns: [P, W, H C]."""
  return lines(jnp.swapaxes(x, 1, 2))


def placed(candidates: Candidates, values: jax.Array, x: jax.Array) -> jax.Array:
  """Values [C, M] of the candidates where they are in x [P, ...]; 0 elsewhere: [1, ...].

  Of ones, it is the mask of what the candidates see.
  """
  one = jax.ShapeDtypeStruct((1, *x.shape[1:]), values.dtype)
  return jax.linear_transpose(candidates, one)(values[None])[0]


class Subsampled(NamedTuple):
  """What was measured, and samples of the posterior given that."""

  x: jax.Array  # [P, ...], the particles at the table's last time
  order: jax.Array  # [k] int32, the candidates in the order of their choice
  measured: jax.Array  # [C] bool
  y: jax.Array  # [C, M], 0 where not measured


def subsample(
  keys: base.Keys,
  guide: Guide,
  table: tables.SolverTable,
  acquire: Callable[[jax.Array], jax.Array],
  candidates: Candidates,
  rule: Rule,
  x: jax.Array,
  *,
  at: Sequence[int],
) -> Subsampled:
  """Measures k times in the course of one reverse diffusion, n evaluations a particle in all.

  Particles are those of one object. At each row of the table in `at`, the rule sees what the
  particles' E[x_0 | x_t, y] have for the candidates, and the one it wants most is measured; it
  guides from the next row on. Early, E[x_0 | x_t, y] differ less than samples of the posterior do.

  Args:
    keys: [P].
    guide: given what is measured.
    table: of a solver with one output.
    acquire: candidate [] int32 -> its measurement [M]. In a simulation, `lambda c: y[c]`.
    candidates: what is measured of x_0; `pixels`, `lines` and `columns` are some.
    rule: `entropy` of a standard deviation, `variance`, or `in_order`.
    x: [P, ...], zeros.
    at: the rows after whose evaluation to measure, rising.

  Raises:
    ValueError: the rows do not rise, or the last measurement would guide nothing, or there are more
      measurements than candidates.
  """
  at, n = np.asarray(at, int), table.num_rows
  _, num, size = jax.eval_shape(candidates, x).shape
  if at.ndim != 1 or np.any(np.diff(at) <= 0) or np.any(at < 0) or np.any(at >= n - 1):
    raise ValueError(f"at={at.tolist()} of {n} rows: has to rise, from 0 on, to {n - 2} at most.")
  if at.size > num:
    raise ValueError(f"{at.size} measurements of {num} candidates.")
  due = np.zeros(n, bool)
  due[at] = True

  def body(carry, due):
    state, measured, y = carry
    algorithm = solvers.tabulated(guide(measured, y), table)
    state, info = algorithm.step(base.row_keys_at(keys, state.step), state)
    chosen = choose(rule(candidates(info.denoised)), measured)
    new = due & (jnp.arange(num) == chosen)
    y = jnp.where(new[:, None], acquire(chosen)[None], y)
    return (state, measured | new, y), chosen

  measured, y = jnp.zeros(num, bool), jnp.zeros((num, size), x.dtype)
  state = base.start(keys, solvers.tabulated(guide(measured, y), table), x)
  (state, measured, y), chosen = jax.lax.scan(body, (state, measured, y), jnp.asarray(due))
  return Subsampled(state.slots[:, 0], chosen[at], measured, y)


def _numbers(particles):
  """[P, C, M] of [P, C] or [P, C, M]."""
  if particles.ndim not in (2, 3):
    raise ValueError(f"particles have shape {particles.shape}: it is [P, C] or [P, C, M].")
  return particles.reshape(*particles.shape[:2], -1)
