"""Search at inference: over initial noises, and over paths, for what a verifier scores highest.

    sample = noise_search.of_table(denoise, multistep.dpmpp_2m(schedule, times))
    algorithm = noise_search.zero_order(sample, verifier, width=4, distance=0.3)
    state = base.start(keys, algorithm, jnp.zeros((batch, 28, 28, 1)))
    state, info = base.run(keys, algorithm, state, num_rounds)
    state.x, state.score, state.evaluations

A solver without noise is a function of its initial noise z ~ N(0, I), and a verifier scores what
comes out; more evaluations buy more candidates instead of more steps. Rows are requests, searched
side by side: row b depends on its own key alone. Candidates are a vmapped axis in front of the
rows, so that a denoiser or a verifier that knows the labels [B] of the rows needs no more of them.

What is counted is calls of the denoiser on a row of the batch, `evaluations`, and calls of the
verifier on one, `verifications`. A denoiser of `guidance` may run its network twice a call.

What is found is not a draw of any tilted law. Best of n has density n p(x) F(r(x))^(n - 1), F the
distribution function of the score r under p, for which KL(best of n, p) = log n - (n - 1) / n where
scores have no ties; the other two have no such formula, and a verifier's flaws are sought out too.

Reference: Ma et al. 2025, Inference-time scaling for diffusion models beyond scaling denoising
  steps, arXiv 2501.09732.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..models import base as models
from ..models import schedules
from . import base, solvers, tables

# noise [B, ...] -> (x [B, ...], evaluations of the denoiser [B] int32), row by row
Sample = Callable[[jax.Array], tuple[jax.Array, jax.Array]]

# x [B, ...] -> [B], row by row; the higher the better, NaN is the worst
Verifier = Callable[[jax.Array], jax.Array]

# (keys [B], noise [B, ...] of the best so far, K) -> noises [K, B, ...]
Propose = Callable[[base.Keys, jax.Array, int], jax.Array]


class State(NamedTuple):
  """The best that has been found."""

  step: jax.Array  # [B] int32, rounds
  noise: jax.Array  # [B, ...], that which gives x
  x: jax.Array  # [B, ...]
  score: jax.Array  # [B]
  evaluations: jax.Array  # [B] int32, spent in all
  verifications: jax.Array  # [B] int32


class Info(NamedTuple):
  """The scores of a round's candidates."""

  scores: jax.Array  # [B, K]


class Found(NamedTuple):
  """What a search over paths ends with."""

  x: jax.Array  # [B, ...]
  score: jax.Array  # [B]
  evaluations: jax.Array  # [B] int32
  verifications: jax.Array  # [B] int32


def of_table(
  denoise: models.Denoiser, table: tables.SolverTable, *, checkpointed: bool = False
) -> Sample:
  """Sampling by a solver without noise, as a function of the initial noise.

  It starts from start[1] z; the clean input, of weight start[0], is 0.

  Args:
    denoise: (x_t [B, ...], t [B]) -> E[x_0 | x_t].
    table: of the solver.
    checkpointed: whether to keep, for derivatives, a step's input alone and evaluate it again.

  Raises:
    ValueError: the table draws noise at its steps: its samples are no function of the first one.
  """
  if table.noise is not None:
    raise ValueError("The table draws noise at its steps; give one of a solver without noise.")

  def sample(noise):
    noise = jnp.asarray(noise, jnp.promote_types(noise.dtype, jnp.float32))
    first = jnp.asarray(table.start[1], noise.dtype) * noise
    x, _, evaluations = _solved(denoise, table, first, checkpointed)
    return x, evaluations

  return sample


def _solved(denoise, table, first, checkpointed=False):
  """(sample, the last E[x_0 | x_t], evaluations [B]) of a table without noise, from x_t `first`."""
  algorithm = solvers.tabulated(denoise, table)
  slots = jnp.stack([first, *[jnp.zeros_like(first)] * (table.carry.shape[1] - 1)], axis=1)
  state = solvers.State(jnp.zeros(first.shape[:1], jnp.int32), slots)

  def body(carry, _):
    state, info = algorithm.step(None, carry[0])
    return (state, info.denoised.astype(first.dtype)), None

  body = jax.checkpoint(body, prevent_cse=False) if checkpointed else body
  (state, denoised), _ = jax.lax.scan(body, (state, first), length=table.num_rows)
  return state.slots[:, 0], denoised, state.step


def search(
  sample: Sample, verifier: Verifier, propose: Propose, width: int
) -> base.SamplingAlgorithm:
  """Scores `width` proposed noises a round and keeps the best of them and of what it had.

  The first noise of each row is drawn from N(0, I); inputs [B, ...] give its shape and dtype alone.
  After r rounds 1 + r width samples have been made, and the score has not fallen.
  """

  def init(keys, x):
    noise = solvers.white(keys, None, jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32)))
    x, evaluations = sample(noise)
    zero = jnp.zeros_like(evaluations)
    return State(zero, noise, x, _ordered(verifier(x)), evaluations, zero + 1)

  def step(keys, state):
    noises = propose(keys, state.noise, width)
    x, evaluations = jax.vmap(sample)(noises)
    scores = _ordered(jax.vmap(verifier)(x))
    best, score = jnp.argmax(scores, axis=0), jnp.max(scores, axis=0)
    new = state._replace(noise=_taken(noises, best), x=_taken(x, best), score=score)
    state = base.select_rows(score > state.score, new, state)
    counted = state._replace(
      step=state.step + 1,
      evaluations=state.evaluations + jnp.sum(evaluations, axis=0),
      verifications=state.verifications + width,
    )
    return counted, Info(scores.T)

  return base.SamplingAlgorithm(init, step)


def random_search(sample: Sample, verifier: Verifier, *, width: int = 1) -> base.SamplingAlgorithm:
  """The best of n = 1 + rounds width independent noises: exactly best of n.

  Args:
    sample: noise to sample, see `of_table`.
    verifier: to score it.
    width: noises a round, run as one batch; of no consequence but for memory and speed.
  """
  return search(sample, verifier, independent, width)


def zero_order(
  sample: Sample, verifier: Verifier, *, width: int, distance: float | jax.Array
) -> base.SamplingAlgorithm:
  """Zero-order search: `width` neighbours of the best noise a round, see `neighbours`.

  Where no neighbour is better the noise stays, so the score does not fall.

  Args:
    sample: noise to sample, see `of_table`.
    verifier: to score it.
    width: K neighbours a round.
    distance: l in [0, 1]; 0 stays, 1 is random search.
  """
  return search(sample, verifier, neighbours(distance), width)


def independent(keys: base.Keys, noise: jax.Array, width: int) -> jax.Array:
  """Independent N(0, I), [K, B, ...], whatever the noise [B, ...]."""
  draw = lambda key: jax.random.normal(key, (width, *noise.shape[1:]), noise.dtype)
  return jnp.swapaxes(jax.vmap(draw)(keys), 0, 1)


def neighbours(distance: float | jax.Array) -> Propose:
  """z' = sqrt(1 - l^2) z + l n, n ~ N(0, I): what leaves N(0, I) as it is.

  If z ~ N(0, I), so is each z', and the move is reversible: what drives the noise away from the
  prior is the verifier's choice alone. The paper has z' at a distance of the pivot, z + l u with
  |u| = 1; |z|^2 then grows by l^2 a round whether or not the verifier has a say, to noise that the
  network has not seen. To keep |z| exactly, as other code does, holds a quantity that is random.

  Args:
    distance: l in [0, 1]; the correlation of z and z' is sqrt(1 - l^2).

  Reference: Ma et al. 2025, arXiv 2501.09732; the move is that of Cotter et al. 2013, arXiv
    1202.0709 (preconditioned Crank-Nicolson).
  """

  def propose(keys, noise, width):
    l = jnp.asarray(distance, noise.dtype)
    return jnp.sqrt(1 - l**2) * noise[None] + l * independent(keys, noise, width)

  return propose


class Plan(NamedTuple):
  """The levels of a search over paths, for J rounds."""

  descent: tables.SolverTable  # from noise to the first level at which paths are kept
  renoise: np.ndarray  # [J, 2]: x_f = renoise[0] x + renoise[1] z, up from a level
  rounds: tables.SolverTable  # from there to the next level; its arrays lead with [J]


def plan(
  schedule: schedules.Schedule,
  solver: tables.Solver,
  descent: Sequence[float],
  rounds: Sequence[Sequence[float]],
) -> Plan:
  """Tables and coefficients of a search over paths.

  With s the level that a round begins at and f the one that it re-noises to,

    x_f = alpha_f / alpha_s x_s + sqrt(sigma_f^2 - (alpha_f sigma_s / alpha_s)^2) z ~ q(x_f | x_s).

  Args:
    schedule: of x_t.
    solver: (schedule, times) -> table without noise.
    descent: times from the noisiest to the first level.
    rounds: J times [m + 1] each, from the f of a round to the level that it ends at. The paper's
      delta_f is f - s, its delta_b is f less the next level; the last level is 0, or near it.

  Raises:
    ValueError: a round begins below the level before it, the rounds are not of one length, or the
      solver draws noise.
  """
  if len({len(times) for times in rounds}) != 1:
    raise ValueError("The rounds of a search over paths all have as many times; give [J][m + 1].")
  renoise, s = [], descent[-1]
  for times in rounds:
    share = float(schedule.alpha(times[0]) / schedule.alpha(s))
    variance = float(schedule.sigma(times[0]) ** 2 - (share * schedule.sigma(s)) ** 2)
    if variance < -1e-9:
      raise ValueError(f"A round from time {times[0]} is below the level {s} that it starts from.")
    renoise.append((share, np.sqrt(max(variance, 0.0))))
    s = times[-1]
  made = [tables.from_state(solver(schedule, times)) for times in rounds]
  descend = solver(schedule, descent)
  if descend.noise is not None:
    raise ValueError("The solver draws noise at its steps; give one without.")
  return Plan(descend, np.array(renoise), _stacked(made))


def _stacked(made):
  """Tables of as many rows in arrays that lead with [J]; slots that one does not use hold 0."""
  k = max(table.carry.shape[1] for table in made)

  def widened(table):
    more = k - table.carry.shape[1]
    carry = np.pad(table.carry, ((0, 0), (0, more), (0, more)))
    return table._replace(carry=carry, output=np.pad(table.output, ((0, 0), (0, more), (0, 0))))

  return jax.tree.map(lambda *arrays: np.stack(arrays), *map(widened, made))


def over_paths(
  keys: base.Keys,
  denoise: models.Denoiser,
  plan: Plan,
  verifier: Verifier,
  x: jax.Array,
  *,
  num_paths: int,
  num_forks: int,
) -> Found:
  """Search over paths: N paths, each forked into M by noise at every level, the best N kept.

  N noises go down to the first level. A round forks each path into M by forward noising, solves all
  N M down to the next level, and keeps the N whose E[x_0 | x_t] the verifier scores highest, that
  of the round's last evaluation: it costs none of its own (the paper evaluates once more at the
  level reached). In the end the best of the N samples is kept. Spent are N n + J N M m evaluations,
  of n steps down and J rounds of m.

  With N = M = 1 nothing is chosen: it is sampling with noise added at the levels, which leaves the
  law as it is up to the solver's error, or the solver itself where nothing is added (f = s).

  Args:
    keys: [B].
    denoise: (x_t [B, ...], t [B]) -> E[x_0 | x_t].
    plan: of the levels, see `plan`; its arrays may be traced.
    verifier: of samples, and of E[x_0 | x_t] in their place, which is blurred at much noise.
    x: [B, ...]; its shape and dtype alone are read.
    num_paths: N.
    num_forks: M.

  Reference: Ma et al. 2025, arXiv 2501.09732.
  """
  x = jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))
  at = lambda r: base.row_keys_at(keys, jnp.full(keys.shape, r))
  solve = jax.vmap(lambda table, x: _solved(denoise, table, x), in_axes=(None, 0))
  noise = jnp.asarray(plan.descent.start[1], x.dtype) * independent(at(0), x, num_paths)
  paths, _, evaluations = solve(plan.descent, noise)

  def body(carry, inputs):
    paths, evaluations = carry
    r, (share, scale), table = inputs
    z = independent(at(r), x, num_paths * num_forks)
    forked = share * jnp.repeat(paths, num_forks, axis=0) + scale * z
    forked, denoised, spent = solve(table, forked)
    scores = _ordered(jax.vmap(verifier)(denoised))
    _, best = jax.lax.top_k(scores.T, num_paths)  # [B, N]
    paths = jax.vmap(lambda best: _taken(forked, best), in_axes=1)(best)
    return (paths, evaluations + jnp.sum(spent, axis=0)), None

  rounds = jnp.arange(1, len(plan.renoise) + 1), jnp.asarray(plan.renoise, x.dtype), plan.rounds
  (paths, evaluations), _ = jax.lax.scan(body, (paths, jnp.sum(evaluations, axis=0)), rounds)
  scores = _ordered(jax.vmap(verifier)(paths))
  best = jnp.argmax(scores, axis=0)
  verified = num_paths * (num_forks * len(plan.renoise) + 1)
  counted = jnp.full_like(evaluations, verified)
  return Found(_taken(paths, best), jnp.max(scores, axis=0), evaluations, counted)


def _ordered(scores):
  """Scores of which NaN is the lowest."""
  return jnp.where(jnp.isnan(scores), -jnp.inf, scores)


def _taken(candidates, best):
  """Row b of candidate best[b], [B, ...] of [K, B, ...]."""
  return candidates[best, jnp.arange(best.shape[0])]
