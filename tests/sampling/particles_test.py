"""Particles on an enumerable chain: laws against sums over sequences, and what samplers keep."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

import targets
from ancestral.models import tilted, toy
from ancestral.sampling import base, particles, resampling, soft_values

K, L, ALPHA = 3, 4, 0.6
TRANSITION = np.array([[0.6, 0.3, 0.1], [0.3, 0.4, 0.3], [0.5, 0.2, 0.3]])
LAW = toy.markov_law(TRANSITION, 0, L)
OUTCOMES = np.array(list(itertools.product(range(K), repeat=L)))
PREDICT = toy.joint_predictor(jnp.asarray(LAW, jnp.float32))
ASK = soft_values.predicted(PREDICT, K)
GIVEN = jnp.array([[0, 1, 2, 0], [K, 1, K, 0], [K, K, K, K]])  # rows with 0, 2 and 4 to fill in
ROWS = 20000


def motif(tokens):
  """How often a 1 is followed by a 2: no gradient, and not a sum over positions."""
  return jnp.sum((tokens[:, :-1] == 1) & (tokens[:, 1:] == 2), axis=1).astype(jnp.float32)


REWARD = np.asarray(motif(jnp.asarray(OUTCOMES)), np.float64).reshape(LAW.shape)
WEIGHT = np.exp(REWARD / ALPHA)
Z = np.sum(LAW * WEIGHT)
TARGET = LAW * WEIGHT / Z
V = tilted.joint_soft_value(jnp.asarray(LAW, jnp.float32), jnp.asarray(REWARD / ALPHA, jnp.float32))
EXACT = soft_values.of_state(lambda state: ALPHA * V(state.tokens))


class State(NamedTuple):
  step: jax.Array
  tokens: jax.Array


def one_at_a_time(predict=PREDICT):
  """Exact: a masked position, any alike, and its token from the exact conditional."""

  def of_row(key, tokens, log_p):
    place_key, token_key = jax.random.split(key)
    hidden = tokens == K
    place = jax.random.categorical(place_key, jnp.where(hidden, 0.0, -jnp.inf), mode="high")
    token = jax.random.categorical(token_key, log_p[place], mode="high")
    return jnp.where(hidden & (jnp.arange(tokens.size) == place), token, tokens)

  def step(keys, state):
    tokens = jax.vmap(of_row)(keys, state.tokens, predict(state.tokens, 0.0))
    return State(state.step + jnp.any(state.tokens == K, axis=1), tokens), tokens

  init = lambda keys, tokens: State(jnp.zeros(tokens.shape[:1], jnp.int32), tokens)
  return base.SamplingAlgorithm(init, step)


is_done = lambda state: ~jnp.any(state.tokens == K, axis=1)
blank = lambda rows: jnp.full((rows, L), K, jnp.int32)


def run(algorithm, rows=ROWS, steps=L, tokens=None, of=lambda state: state):
  """The state after some steps, and the infos stacked."""
  tokens = blank(rows) if tokens is None else tokens

  def go(keys, tokens):
    state = base.start(keys, algorithm, tokens)
    state, info = base.run(keys, algorithm, state, steps, lambda state, info: info)
    return of(state), info

  return jax.jit(go)(targets.keys_of(np.arange(len(tokens))), tokens)


def drawn(state):
  keys = targets.keys_of(np.arange(len(state.step)), 99)
  return particles.drawn(keys, state).tokens


def steered(num, value=EXACT, temperature=ALPHA, **kwargs):
  return particles.smc(one_at_a_time(), value, num_particles=num, temperature=temperature, **kwargs)


def decoded(num, value=EXACT, temperature=ALPHA):
  return particles.svdd(one_at_a_time(), value, num_candidates=num, temperature=temperature)


def chosen_of(p, w, num):
  """The law of one of `num` independent draws of p [n] that is chosen by weights w [n].

  M p_k E[w_k / (w_k + S)] for S the sum of the others' weights, by 1 / a = int exp(-a u) du:
  M p_k w_k int exp(-w_k u) phi(u)^(M - 1) du, phi the Laplace transform of one weight.
  """
  scale = 1 / np.sum(p * w)
  phi = lambda u: np.sum(p * np.exp(-np.minimum(w * scale * u, 700)))
  integrand = lambda s: (
    np.exp(s) * np.exp(-np.minimum(w * scale * np.exp(s), 700)) * (phi(np.exp(s)) ** (num - 1))
  )
  return num * p * w * scale * integrate.quad_vec(integrand, -30, 8)[0]


def completing(state):
  """Where LAW has the sequences that agree with a state."""
  return tuple(slice(None) if token == K else token for token in state)


@functools.cache
def svdd_law(num):
  """The exact law of SVDD with `num` candidates and the exact value, by going through states."""
  states = {(K,) * L: 1.0}
  for _ in range(L):
    after = {}
    for state, mass in states.items():
      places = [i for i in range(L) if state[i] == K]
      nexts = [(*state[:i], x, *state[i + 1 :]) for i in places for x in range(K)]
      prior = np.array([LAW[completing(new)].sum() for new in nexts])
      w = np.array([(LAW * WEIGHT)[completing(new)].sum() for new in nexts]) / prior
      p = prior / LAW[completing(state)].sum() / len(places)
      for new, q in zip(nexts, chosen_of(p, w, num), strict=True):
        after[new] = after.get(new, 0.0) + mass * q
    states = after
  law = np.zeros(LAW.shape)
  for state, mass in states.items():
    law[state] = mass
  np.testing.assert_allclose(law.sum(), 1, rtol=1e-6)
  return law / law.sum()


def test_choosing_by_weight_by_hand():
  p, w = np.array([0.3, 0.7]), np.array([2.0, 1.0])
  two = 0.3**2 + 2 * 0.3 * 0.7 * 2 / 3
  np.testing.assert_allclose(chosen_of(p, w, 2), [two, 1 - two], rtol=1e-6)
  np.testing.assert_allclose(chosen_of(p, w, 1), p, rtol=1e-6)


def test_svdd_with_the_exact_value_tends_to_the_target():
  """What is claimed of its law, on the law itself: there is nothing to sample."""
  np.testing.assert_allclose(svdd_law(1), LAW, rtol=1e-5)
  far = [targets.total_variation(svdd_law(num), TARGET) for num in (1, 2, 8, 32)]
  assert far[0] > 0.2 and far[0] > 1.2 * far[1] > 2 * far[2]
  np.testing.assert_allclose(far[2] / far[3], 4, rtol=0.25)  # O(1 / M)


@pytest.mark.parametrize("num", [1, 2, 8])
def test_svdd_draws_from_its_own_law(num):
  state, _ = run(decoded(num))
  targets.check_law(state.state.tokens, svdd_law(num))


def test_no_temperature_is_the_best_candidate_and_much_of_it_the_prior():
  state, info = run(decoded(4, temperature=0.0), rows=500)
  np.testing.assert_array_equal(info.chosen, np.argmax(info.values, axis=2))
  state, _ = run(decoded(4, temperature=jnp.inf))
  targets.check_law(state.state.tokens, LAW)


@pytest.mark.parametrize(
  "potentials, value",
  [
    ("DIFFERENCES", "exact"),
    ("DIFFERENCES", "opposed"),
    ("MAXIMA", "mode"),
    ("MAXIMA", "opposed"),
    ("SUMS", "mode"),
  ],
)
def test_the_estimate_of_z_is_unbiased_whatever_the_potentials(potentials, value):
  """Four particles, values that are right, rough, or opposed to the reward until the last."""
  opposed = lambda state: jnp.where(is_done(state), motif(state.tokens), -V(state.tokens))
  values = {
    "exact": EXACT,
    "mode": soft_values.mode(motif, ASK, mask=K),
    "opposed": soft_values.of_state(opposed),
  }
  algorithm = steered(4, values[value], threshold=0.7, potentials=getattr(particles, potentials))
  log_z, info = run(algorithm, of=particles.log_z)
  z = np.exp(np.asarray(log_z, np.float64))
  assert 0.02 < np.mean(info.resampled) < 1
  assert abs(z.mean() - Z) < 4 * z.std() / np.sqrt(ROWS)


@pytest.mark.parametrize("resample", [resampling.residual, resampling.systematic])
def test_weighted_particles_have_the_targets_law(resample):
  """Z times the weighted frequencies is unbiased for p exp(r / alpha), outcome by outcome."""

  def of(state):
    return particles.log_z(state)[:, None] + particles.log_weights(state), state.states.tokens

  algorithm = steered(4, soft_values.mode(motif, ASK, mask=K), threshold=1.0, resample=resample)
  (log_mass, tokens), _ = run(algorithm, of=of)
  index = np.ravel_multi_index(tuple(np.moveaxis(np.asarray(tokens), -1, 0)), LAW.shape)
  mass = np.exp(np.asarray(log_mass, np.float64))
  of_row = np.zeros((ROWS, LAW.size))
  np.add.at(of_row, (np.arange(ROWS)[:, None], index), mass)
  error = of_row.std(axis=0) / np.sqrt(ROWS)
  off = np.abs(of_row.mean(axis=0) - (LAW * WEIGHT).ravel())
  often = LAW.ravel() > 1e-3
  assert often.sum() > 60
  assert np.all(off[often] < 4.5 * error[often])


def test_drawing_without_resampling_has_the_law_of_a_choice():
  state, info = run(steered(2, threshold=0.0))
  assert not np.any(info.resampled)
  law = chosen_of(LAW.ravel(), WEIGHT.ravel(), 2).reshape(LAW.shape)
  targets.check_law(jax.jit(drawn)(state), law)


def test_the_bias_of_a_drawn_particle_falls_as_one_over_n():
  truth, rows = np.sum(TARGET * REWARD), 20000
  bias, error = [], []
  for num in (4, 8):
    reward = np.asarray(motif(run(steered(num), rows, of=drawn)[0]))
    bias.append(truth - reward.mean())
    error.append(reward.std() / np.sqrt(rows))
  assert bias[0] > 10 * error[0]
  assert abs(bias[0] - 2 * bias[1]) < 0.2 * bias[0] + 4 * np.hypot(error[0], 2 * error[1])


def test_many_particles_draw_from_the_target():
  tokens, _ = run(steered(64), of=drawn, rows=3000)
  targets.check_law(tokens, TARGET)


@pytest.mark.parametrize("algorithm", [steered(1), decoded(1)], ids=["smc", "svdd"])
def test_one_of_them_is_the_sampler_draw_by_draw(algorithm):
  seen, _ = run(algorithm, rows=50)
  tokens = seen.state.tokens if isinstance(seen, particles.Guided) else seen.states.tokens[:, 0]
  plain = one_at_a_time()
  state = State(jnp.zeros(50, jnp.int32), blank(50))
  for i in range(L):
    keys = base.row_keys_at(targets.keys_of(np.arange(50)), jnp.full(50, i))
    moves = jax.vmap(lambda key: jax.random.split(key, 3))(keys)[:, 1]
    state, _ = plain.step(soft_values.several(moves, 1)[0], state)
  np.testing.assert_array_equal(tokens, state.tokens)


def test_best_of_n_is_the_best_of_n():
  """Of density F(r)^n - F(r-)^n over the values of the reward, and p's among those alike."""
  algorithm = particles.best_of_n(
    one_at_a_time(), lambda state: motif(state.tokens), is_done, num=5
  )
  state, _ = run(algorithm)
  below = np.array([[np.sum(LAW[REWARD < r]), np.sum(LAW[REWARD <= r])] for r in REWARD.ravel()])
  share = LAW.ravel() / (below[:, 1] - below[:, 0])
  law = (share * (below[:, 1] ** 5 - below[:, 0] ** 5)).reshape(LAW.shape)
  targets.check_law(particles.best(state).tokens, law)
  np.testing.assert_array_equal(state.calls, [5 * L] * ROWS)


def test_infilling_keeps_what_is_given_and_rows_of_other_lengths_stop():
  state, info = run(steered(8, threshold=1.0), steps=6, tokens=jnp.repeat(GIVEN, 4000, axis=0))
  np.testing.assert_array_equal(state.step.reshape(3, -1), np.repeat([[0], [2], [4]], 4000, 1))
  steps = np.arange(6)[:, None, None]
  assert not np.any(np.asarray(info.resampled).reshape(6, 3, -1) & (steps >= [[[0], [2], [4]]]))
  tokens = np.asarray(jax.jit(drawn)(state)).reshape(3, 4000, L)
  np.testing.assert_array_equal(tokens[0], np.broadcast_to(GIVEN[0], (4000, L)))
  np.testing.assert_array_equal(tokens[1][:, [1, 3]], [[1, 0]] * 4000)
  z = np.exp(np.asarray(particles.log_z(state), np.float64)).reshape(3, -1)
  np.testing.assert_allclose(z[0], np.exp(1 / ALPHA), rtol=1e-5)
  inside = LAW[:, 1, :, 0] * WEIGHT[:, 1, :, 0]
  expected = inside.sum() / LAW[:, 1, :, 0].sum()
  assert abs(z[1].mean() - expected) < 4 * z[1].std() / np.sqrt(4000)


def test_run_until_stops_when_all_particles_are_done():
  algorithm = steered(3)
  keys = targets.keys_of(np.arange(6))
  given = jnp.tile(GIVEN, (2, 1))
  go = lambda keys, tokens: base.run_until(
    keys, algorithm, base.start(keys, algorithm, tokens), particles.all_done(is_done), 100
  )
  state = jax.jit(go)(keys, given)
  np.testing.assert_array_equal(state.step, [0, 2, 4] * 2)
  fixed, _ = run(algorithm, tokens=given)
  jax.tree.map(np.testing.assert_array_equal, state, fixed)


def test_calls_are_those_of_steps_and_values():
  mode = soft_values.mode(motif, ASK, mask=K)
  state, _ = run(decoded(5, mode), tokens=GIVEN, steps=6)
  # a step's own call, and of 5 candidates' values all but those of full sequences
  np.testing.assert_array_equal(state.calls, [0, 2 + 5 * 1, 4 + 5 * 3])
  state, _ = run(steered(3, mode), tokens=GIVEN, steps=6)
  # values at the start, too, of those that are not full
  np.testing.assert_array_equal(state.calls, [0, 3 * (2 + 2), 3 * (4 + 4)])


@pytest.mark.parametrize("make", [particles.smc, particles.svdd], ids=["smc", "svdd"])
def test_held_calls_serve_values_and_steps_alike(make):
  """The same draws as with a call for each, and one call for every state that is not full."""
  num = {"num_particles" if make is particles.smc else "num_candidates": 3}
  asking = soft_values.mode(motif, ASK, mask=K)
  reading = soft_values.mode(motif, soft_values.held_predicted(K), mask=K)
  once = soft_values.held(one_at_a_time, PREDICT, soft_values.tokens_point(K))
  twice, seen = run(make(one_at_a_time(), asking, temperature=ALPHA, **num), tokens=GIVEN[1:])
  state, info = run(
    make(once, reading, temperature=ALPHA, calls=soft_values.one_at_first, **num), tokens=GIVEN[1:]
  )
  if make is particles.smc:
    np.testing.assert_array_equal(state.states.state.tokens, twice.states.tokens)
    np.testing.assert_allclose(state.log_weights, twice.log_weights, rtol=1e-5)
    np.testing.assert_array_equal(state.calls, [3 * 2, 3 * 4])
  else:
    np.testing.assert_array_equal(state.state.state.tokens, twice.state.tokens)
    np.testing.assert_allclose(info.values, seen.values, rtol=1e-5)
    np.testing.assert_array_equal(state.calls, [1 + 3 * 1, 1 + 3 * 3])


@pytest.mark.parametrize("bad", [jnp.nan, -jnp.inf])
def test_what_must_not_come_out_does_not(bad):
  forbidden = lambda state: jnp.where(is_done(state) & (state.tokens[:, 1] == 1), bad, 0.0)
  value = soft_values.of_state(forbidden)
  state, _ = run(steered(8, value), rows=4000, of=lambda state: (drawn(state), state))
  tokens, state = state
  dead = np.all(np.asarray(state.states.tokens)[:, :, 1] == 1, axis=1)
  np.testing.assert_array_equal(np.asarray(tokens)[:, 1] == 1, dead)
  np.testing.assert_array_equal(np.isneginf(particles.log_z(state)), dead)
  z = np.exp(np.asarray(particles.log_z(state), np.float64))
  assert abs(z.mean() - (1 - LAW[:, 1].sum())) < 4 * z.std() / np.sqrt(4000)
  assert np.all(np.isfinite(particles.log_weights(state)) | ~dead[:, None])
  state, _ = run(decoded(8, value, temperature=jnp.array(0.3)), rows=4000)
  seen, last = np.asarray(state.state.tokens)[:, 1], LAW[:, 1].sum()
  assert np.mean(seen == 1) < last  # of eight candidates, all may have it already


def test_rows_of_dead_particles_go_on_as_the_sampler_does():
  dead = soft_values.of_state(lambda state: jnp.full(state.step.shape, -jnp.inf))
  state, info = run(steered(3, dead), of=lambda state: (drawn(state), particles.log_z(state)))
  targets.check_law(state[0], LAW)
  assert np.all(np.isneginf(state[1])) and not np.any(info.resampled)
  np.testing.assert_array_equal(info.effective_size, 0)
  for temperature in (0.0, 0.5):
    state, _ = run(decoded(3, dead, temperature))
    targets.check_law(state.state.tokens, LAW)


def test_a_temperature_for_each_row_is_that_row_s_own_and_compiles_nothing():
  traces = []

  def make(alpha):
    traces.append(1)
    value = soft_values.mode(motif, ASK, mask=K)
    return steered(4, value, alpha), decoded(4, value, alpha)

  @jax.jit
  def go(keys, alpha):
    one, other = make(alpha)
    one, _ = base.run(keys, one, base.start(keys, one, blank(4)), L)
    other, _ = base.run(keys, other, base.start(keys, other, blank(4)), L)
    return one.states.tokens, particles.log_z(one), other.state.tokens

  keys, alphas = targets.keys_of(np.arange(4)), jnp.array([0.1, 0.5, 2.0, 50.0])
  together = go(keys, alphas)
  for row, alpha in enumerate(alphas):
    alone = go(keys, jnp.full(4, alpha))
    jax.tree.map(
      lambda a, b, row=row: np.testing.assert_allclose(a[row], b[row], rtol=1e-5), together, alone
    )
  assert len(traces) == 1


def test_a_row_depends_on_its_own_key_alone():
  given = jnp.array([[K, K, 2, K], [K, 1, K, 0], [K, K, K, K], [0, K, K, K]])

  @jax.jit
  def go(keys, tokens):
    one, other = steered(3), decoded(3)
    one, _ = base.run(keys, one, base.start(keys, one, tokens), L)
    other, _ = base.run(keys, other, base.start(keys, other, tokens), L)
    return one.states.tokens, other.state.tokens

  every, third = (go(targets.keys_of(rows), given[np.array(rows)]) for rows in (range(4), [2]))
  for together, alone in zip(every, third, strict=True):
    np.testing.assert_array_equal(together[2:3], alone)


@pytest.mark.parametrize(
  "make, said",
  [
    (lambda: decoded(0), "num_candidates=0: it has to be at least 1"),
    (lambda: steered(0), "num_particles=0: it has to be at least 1"),
    (lambda: decoded(2, temperature=-1.0), "at least 0"),
    (lambda: steered(2, temperature=0.0), "above 0"),
    (lambda: steered(2, threshold=1.5), "threshold"),
    (
      lambda: particles.best_of_n(one_at_a_time(), None, is_done, num=2, temperature=jnp.inf),
      "below inf",
    ),
  ],
)
def test_bad_input_is_said(make, said):
  with pytest.raises(ValueError, match=said):
    make()
