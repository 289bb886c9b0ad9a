"""Sampling towards a reward without its gradient: SVDD, sequential Monte Carlo, and best of n.

    value = soft_values.posterior_mean(reward, soft_values.table_denoised(denoise, table))
    algorithm = particles.smc(
      solvers.tabulated(denoise, table), value, num_particles=16, temperature=0.5
    )
    state, info = base.run(keys, algorithm, base.start(keys, algorithm, x), table.num_rows)
    sample = particles.drawn(base.row_keys_at(keys, state.step), state).slots[:, 0]

The target is p(x) exp(r(x) / alpha) / Z, for p the law of any sampler of `base`: masked tokens,
solver tables with noise, decoding. Nothing is asked of it but steps with noise. Rows are requests
and do not know each other; candidates and particles are a vmapped axis of their own, so that a
model that knows the labels [B] of the rows needs no more of them.

What is given up is different. SVDD chooses at every step among candidates from one state, and never
goes back: with the exact soft value its law tends to the target as candidates grow, with an
estimate it does not. SMC keeps particles, whose weights make up for whatever the values were, if
only the last one is r: right as particles grow, and its estimate of Z is unbiased for any number.
A sampler without noise has nothing to choose among, and its particles stay copies once resampled.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from . import base, resampling
from . import logits as logits_lib
from .soft_values import Value, at_end, several

Temperature = float | jax.Array  # alpha, in units of the reward; [] or [B]

# state -> network calls that the row has needed so far [B] int32
Calls = Callable[[Any], jax.Array]


def one_a_step(state: Any) -> jax.Array:
  """A call of the network every step, as `solvers.tabulated` makes."""
  return state.step


class Guided(NamedTuple):
  """A sampler's state, chosen step by step."""

  step: jax.Array  # [B] int32, the inner state's
  state: Any
  calls: jax.Array  # [B] int32, of the network, for its steps and for values


class Choice(NamedTuple):
  """What one step chose among."""

  values: jax.Array  # [B, M]
  chosen: jax.Array  # [B] int32
  info: Any  # the inner sampler's, of the candidate that was chosen


def svdd(
  algorithm: base.SamplingAlgorithm,
  value: Value,
  *,
  num_candidates: int,
  temperature: Temperature,
  calls: Calls = one_a_step,
) -> base.SamplingAlgorithm:
  """Soft value-based decoding: of M candidates for the next state, one by softmax(v / alpha).

  With x' the candidates drawn from p(x' | x) and v the exact soft value, M -> inf gives the
  transitions of the target, p(x' | x) exp((v(x') - v(x)) / alpha). At finite M the law is nearer
  to the prior, by O(1 / M) a step. alpha = inf is the prior whatever M, alpha = 0 takes the best
  candidate: that is what the released code does, which has no alpha; its law then goes on moving as
  M grows, and has no target. What is drawn by `init` is not chosen.

  Where no candidate's value is above -inf, one is drawn as if they were alike. Candidates that
  need the network need it at the one state that they come from: a step counts its calls once, and
  those of the M values.

  Args:
    algorithm: any sampler.
    value: v on the scale of rewards; NaN counts as -inf.
    num_candidates: M; 1 is the sampler itself.
    temperature: alpha, at least 0; may be traced.
    calls: counts those of the sampler.

  Raises:
    ValueError: M below 1, a temperature below 0.

  Reference: Li et al. 2024, arXiv 2408.08252, algorithm 1.
  """
  _require_count("num_candidates", num_candidates)
  logits_lib.require("temperature", temperature, lambda a: a >= 0, "at least 0")

  def init(keys, inputs):
    state = algorithm.init(keys, inputs)
    return Guided(state.step, state, calls(state))

  def step(keys, guided):
    choose, moves, looks = _keys(keys, num_candidates)
    made, info = jax.vmap(algorithm.step, in_axes=(0, None), out_axes=1)(moves, guided.state)
    values, looked = jax.vmap(value, in_axes=(0, 1, 1), out_axes=1)(looks, made, info)
    values = _ordered(values)
    chosen = logits_lib.draw(choose, _tempered(values, temperature))
    spent = jnp.max(_over(calls, made), axis=1) - calls(guided.state) + jnp.sum(looked, axis=1)
    state, info = _taken((made, info), chosen)
    advanced = state.step > guided.step
    spent = guided.calls + jnp.where(advanced, spent, 0)
    return Guided(state.step, state, spent), Choice(values, chosen, info)

  return base.SamplingAlgorithm(init, step)


class Potentials(NamedTuple):
  """How values become the weights that resampling goes by: exp(spent_k) for the path to step k.

  Attributes:
    first: of the memory before the first value.
    update: (memory, spent, psi), all [B, N] -> (memory, spent).
  """

  first: float
  update: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


# A step's weight is exp(psi_k - psi_(k - 1)), so spent_k = psi_k: a path has gathered what its
# place says. With the exact soft value, particles then have the target's law at every step.
DIFFERENCES = Potentials(0.0, lambda memory, spent, psi: (memory, psi))

# A step's weight is exp(the highest psi so far).
MAXIMA = Potentials(
  -jnp.inf, lambda memory, spent, psi: (jnp.maximum(memory, psi), spent + jnp.maximum(memory, psi))
)

# A step's weight is exp(the sum of psi so far).
SUMS = Potentials(0.0, lambda memory, spent, psi: (memory + psi, spent + memory + psi))


class Particles(NamedTuple):
  """N weighted states a row."""

  step: jax.Array  # [B] int32
  states: Any  # [B, N, ...], the sampler's
  psi: jax.Array  # [B, N], v / alpha
  memory: jax.Array  # [B, N], of the potentials
  spent: jax.Array  # [B, N], the logarithm of the potentials so far
  log_weights: jax.Array  # [B, N], towards exp(spent), since they were resampled
  log_mean: jax.Array  # [B], of the weights that resampling took away
  calls: jax.Array  # [B] int32, of the network, for all particles and their values


class Info(NamedTuple):
  """What a step made of the particles that it found."""

  effective_size: jax.Array  # [B], in particles
  resampled: jax.Array  # [B] bool
  ancestors: jax.Array  # [B, N] int32
  info: Any  # the inner sampler's, [B, N, ...]


def no_ratio(old: Any, new: Any, info: Any) -> jax.Array:
  """The sampler draws from p itself."""
  return jnp.zeros(new.step.shape)


def smc(
  algorithm: base.SamplingAlgorithm,
  value: Value,
  *,
  num_particles: int,
  temperature: Temperature,
  threshold: float | jax.Array = 0.5,
  potentials: Potentials = DIFFERENCES,
  resample: resampling.Resample = resampling.systematic,
  log_ratio: Callable[[Any, Any, Any], jax.Array] = no_ratio,
  calls: Calls = one_a_step,
) -> base.SamplingAlgorithm:
  """Sequential Monte Carlo towards p(x) exp(r(x) / alpha) / Z: twisted, or Feynman-Kac steering.

  N particles move by the sampler and are weighed by the potentials G of their values; where the
  effective size has fallen below a share of N, they are resampled before they move. With psi =
  v / alpha, and v = r at the end, a path's weight there is

    prod_k G_k  *  exp(psi - sum_k log G_k)  =  exp(r / alpha),

  and a particle drawn by weight (`drawn`) has the target's law as N grows, its bias falling as
  1 / N; E[exp(log_z)] = Z = E_p[exp(r / alpha)] for any N, any values before the last, any
  potentials and any of the rules of `resampling`. One particle is the sampler itself.

  A particle of value -inf is dead, though its value might rise again: values before the last must
  not be -inf where r need not be (`soft_values.raised`). A row of dead particles goes on without
  resampling, `log_z` is -inf, and what is drawn from it is an untilted sample. Rows that make no
  step change nothing.

  Args:
    algorithm: any sampler, all of whose particles start from the row's inputs.
    value: v, on the scale of rewards; NaN counts as -inf.
    num_particles: N.
    temperature: alpha, above 0; may be traced.
    threshold: share of N, in [0, 1]; at 0 nothing is resampled (importance sampling).
    potentials: DIFFERENCES, or MAXIMA or SUMS of FK steering.
    resample: unbiased.
    log_ratio: (old, new, info) -> log p(new | old) - log q(new | old) [B], where the sampler draws
      from another law q than p; see `twisted`.
    calls: counts those of the sampler.

  Raises:
    ValueError: N below 1, a temperature not above 0, a threshold outside [0, 1].

  Reference: Wu et al. 2023 (TDS), arXiv 2306.17775, algorithm 1; Singhal et al. 2025 (FK steering),
    arXiv 2501.06848; Whiteley et al. 2016, arXiv 1309.2918, on resampling where weights ask for it.
  """
  _require_count("num_particles", num_particles)
  logits_lib.require("temperature", temperature, lambda a: a > 0, "above 0")
  logits_lib.require("threshold", threshold, lambda share: 0 <= share <= 1, "in [0, 1]")
  evaluate = lambda keys, *state: _looked(value, temperature, keys, *state)

  def init(keys, inputs):
    _, moves, looks = _keys(keys, num_particles)
    states = jax.vmap(algorithm.init, in_axes=(0, None), out_axes=1)(moves, inputs)
    psi, looked = evaluate(looks, states, None)
    first = jnp.full(psi.shape, potentials.first, psi.dtype)
    memory, spent = potentials.update(first, jnp.zeros_like(psi), psi)
    counted = jnp.sum(_over(calls, states) + looked, axis=1)
    log_mean = jnp.zeros(psi.shape[:1], psi.dtype)
    step = jnp.zeros(psi.shape[:1], jnp.int32)
    return Particles(step, states, psi, memory, spent, spent, log_mean, counted)

  def step(keys, old):
    choose, moves, looks = _keys(keys, num_particles)
    due, size, ancestors = _due(choose, old.log_weights, threshold, resample)
    parents = _copied(old, due, ancestors)
    states, info = jax.vmap(algorithm.step, in_axes=(0, 1), out_axes=1)(moves, parents.states)
    psi, looked = evaluate(looks, states, info)
    memory, spent = potentials.update(parents.memory, parents.spent, psi)
    ratio = jax.vmap(log_ratio, in_axes=1, out_axes=1)(parents.states, states, info)
    weights = _added(parents.log_weights, spent + ratio, parents.spent)
    called = _over(calls, states) - _over(calls, parents.states) + looked
    counted = old.calls + jnp.sum(called, axis=1)
    new = Particles(old.step + 1, states, psi, memory, spent, weights, parents.log_mean, counted)
    advanced = jnp.any(states.step > parents.states.step, axis=1)
    return base.select_rows(advanced, new, old), Info(size, due & advanced, ancestors, info)

  return base.SamplingAlgorithm(init, step)


def best_of_n(
  algorithm: base.SamplingAlgorithm,
  reward: Callable[[Any], jax.Array],
  is_done: Callable[[Any], jax.Array],
  *,
  num: int,
  temperature: Temperature = 1.0,
  calls: Calls = one_a_step,
) -> base.SamplingAlgorithm:
  """n samples that know nothing of each other: `best` of them, or one `drawn` by exp(r / alpha).

  The first is best of n, of density n p(x) F(r(x))^(n - 1); the second is importance sampling
  towards the target, `smc` without its resampling. All calls are the sampler's.

  Args:
    algorithm: any sampler.
    reward: its state -> r [B].
    is_done: its state -> [B] bool; before, no reward is read.
    num: n.
    temperature: alpha, above 0 and below inf; of no consequence for `best`.
    calls: counts those of the sampler.

  Raises:
    ValueError: n below 1, a temperature that is not above 0 and below inf.
  """
  rule = "above 0 and below inf"
  logits_lib.require("temperature", temperature, lambda a: 0 < a < float("inf"), rule)
  value = at_end(reward, is_done)
  return smc(
    algorithm, value, num_particles=num, temperature=temperature, threshold=0.0, calls=calls
  )


def log_weights(particles: Particles) -> jax.Array:
  """Of the particles, towards exp(v / alpha) of where they are; normalised. [B, N].

  At the end: sum_n exp(log_weights) f(x_n) estimates the target's mean of f. Alike if all are dead.
  """
  weights = _final(particles)
  alive = jnp.any(weights > -jnp.inf, axis=1, keepdims=True)
  return jax.nn.log_softmax(jnp.where(alive, weights, 0), axis=1)


def log_z(particles: Particles) -> jax.Array:
  """log Z [B]; its exponential is unbiased."""
  return particles.log_mean + _log_mean(_final(particles))


def drawn(keys: base.Keys, particles: Particles) -> Any:
  """One of each row's states, by weight; `keys` those of the step after the last."""
  return _taken(particles.states, logits_lib.draw(keys, log_weights(particles)))


def best(particles: Particles) -> Any:
  """Each row's state of the highest value."""
  return _taken(particles.states, jnp.argmax(particles.psi, axis=1))


def all_done(is_done: Callable[[Any], jax.Array]) -> Callable[[Particles], jax.Array]:
  """For `base.run_until`: whether the sampler is done with every particle of a row, [B]."""
  return lambda particles: jnp.all(_over(is_done, particles.states), axis=1)


def _due(keys, log_weights, threshold, resample):
  """Which rows [B] are to be resampled, their effective sizes before, and ancestors [B, N]."""
  num = log_weights.shape[1]
  size = resampling.effective_size(log_weights)
  due = (size > 0) & (size < threshold * num)
  ancestors = resample(keys, jnp.where(due[:, None], log_weights, 0))
  own = jnp.arange(num, dtype=jnp.int32)[None, :]
  return due, size, jnp.where(due[:, None], ancestors, own)


def _copied(particles, due, ancestors):
  """The particles of the ancestors, in rows that are due of weight 1 again."""
  states, psi, memory, spent = jax.vmap(lambda leaf, i: jax.tree.map(lambda x: x[i], leaf))(
    particles[1:5], ancestors
  )
  weights = jnp.where(due[:, None], 0, particles.log_weights)
  log_mean = particles.log_mean + jnp.where(due, _log_mean(particles.log_weights), 0)
  step, calls = particles.step, particles.calls
  return Particles(step, states, psi, memory, spent, weights, log_mean, calls)


def _looked(value, temperature, keys, states, info):
  """psi = v / alpha [B, N], and the calls that they took."""
  in_axes = (0, 1, None if info is None else 1)
  values, calls = jax.vmap(value, in_axes=in_axes, out_axes=1)(keys, states, info)
  alpha = jnp.asarray(temperature, values.dtype).reshape(-1, 1)
  values = _ordered(values)
  return jnp.where(values > -jnp.inf, values / alpha, -jnp.inf), calls


def _added(log_weights, more, less):
  """log_weights + more - less, where they are not -inf; what is dead stays so."""
  alive = log_weights > -jnp.inf
  return jnp.where(alive, log_weights + more - jnp.where(alive, less, 0), -jnp.inf)


def _final(particles):
  """Weights towards exp(psi) instead of the potentials that were spent."""
  return _added(particles.log_weights, particles.psi, particles.spent)


def _tempered(values, temperature):
  """v / alpha [B, M], at alpha = 0 the highest alone; all alike where none is above -inf."""
  tempered = logits_lib.temperature(temperature).apply(values, None, ())
  tempered = jnp.where(values > -jnp.inf, tempered, -jnp.inf)
  return jnp.where(jnp.any(values > -jnp.inf, axis=1, keepdims=True), tempered, 0)


def _ordered(values):
  """Values of which whatever is not below inf, NaN too, is the lowest."""
  return jnp.where(values < jnp.inf, values, -jnp.inf)


def _log_mean(log_weights):
  return jax.nn.logsumexp(log_weights, axis=1) - jnp.log(log_weights.shape[1])


def _keys(keys, num):
  """A key [B] to choose with, and keys [num, B] of moves and of values."""
  first = jax.vmap(lambda key: jax.random.split(key, 3))(keys)
  return first[:, 0], several(first[:, 1], num), several(first[:, 2], num)


def _over(function, states):
  """Of each of states [B, N, ...], [B, N]."""
  return jax.vmap(function, in_axes=1, out_axes=1)(states)


def _taken(states, chosen):
  """Row b's state number chosen[b], of leaves [B, N, ...]."""
  rows = jnp.arange(chosen.shape[0])
  return jax.tree.map(lambda leaf: leaf[rows, chosen], states)


def _require_count(name, count):
  if count < 1:
    raise ValueError(f"{name}={count}: it has to be at least 1.")
