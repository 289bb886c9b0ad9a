"""Soft values: exact at the end, against closed forms and enumeration before it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.models import mask_schedules, schedules, toy
from ancestral.sampling import ancestral, base, masked, particles, soft_values, solvers

K, L, ALPHA = 3, 3, 0.7
LAW = np.random.default_rng(0).dirichlet(np.ones(K**L)).reshape((K,) * L)
PREDICT = toy.joint_predictor(jnp.asarray(LAW, jnp.float32))
ASK = soft_values.predicted(PREDICT, K)
STATES = np.array(list(itertools.product(range(K + 1), repeat=L)))


def state_of(tokens):
  return masked.start(jnp.asarray(tokens))


def reward(tokens):
  return jnp.sum(tokens * jnp.array([[4, 2, 1]]), axis=1) % 5 / 2.0


def logits_of(state):
  return np.asarray(PREDICT(jnp.asarray(state)[None], 0.0), np.float64)[0]


def test_completions_estimate_the_mean_over_independent_positions():
  """exp(v / alpha) is a mean over draws, so its mean over keys is the sum over completions."""
  value = soft_values.completions(reward, ASK, mask=K, num_draws=4, temperature=ALPHA)
  for state in ([K, 1, K], [K, K, K], [0, 2, K]):
    p = np.exp(logits_of(state))
    expected = 0.0
    for tokens in itertools.product(range(K), repeat=L):
      mass = np.prod([p[i, x] for i, x in enumerate(tokens)])
      expected += mass * np.exp(float(reward(jnp.array([tokens]))[0]) / ALPHA)
    rows = 20000
    many = state_of(np.broadcast_to(state, (rows, L)))
    v, calls = jax.jit(value, static_argnums=2)(targets.keys_of(np.arange(rows)), many, None)
    found = np.exp(np.asarray(v, np.float64) / ALPHA)
    assert abs(found.mean() - expected) < 4 * found.std() / np.sqrt(rows)
    np.testing.assert_array_equal(calls, 1)


def test_a_draw_that_is_forbidden_counts_as_nothing():
  """NaN as -inf, among draws that are not; a state of forbidden draws alone is raised."""
  keys, state = targets.keys_of(np.arange(200)), state_of(np.full((200, L), K))
  found = {}
  for bad in (jnp.nan, -jnp.inf):
    forbids = lambda tokens, bad=bad: jnp.where(tokens[:, 0] < 2, bad, reward(tokens))
    value = soft_values.completions(forbids, ASK, mask=K, num_draws=2, temperature=ALPHA)
    found[str(bad)], _ = value(keys, state, None)
  np.testing.assert_array_equal(found["nan"], found["-inf"])
  lost = np.isneginf(found["nan"])
  assert 0 < lost.mean() < 1 and not np.any(np.isnan(found["nan"]))
  done = lambda state: ~jnp.any(state.tokens == K, axis=1)
  kept, _ = soft_values.raised(value, 0.5, done)(keys, state, None)
  np.testing.assert_allclose(kept, np.maximum(found["nan"], 0.5), rtol=1e-6)


def test_estimates_that_forbid_too_early_are_raised():
  """Of two draws both may be forbidden where others are not: raised, Z stays unbiased."""
  forbids = lambda tokens: jnp.where(tokens[:, 1] == 0, jnp.nan, reward(tokens))
  drawn = soft_values.completions(forbids, ASK, mask=K, num_draws=2, temperature=ALPHA)
  done = lambda state: ~jnp.any(state.tokens == K, axis=1)
  hitting = masked.first_hitting(PREDICT, mask_schedules.linear(), mask=K)
  keys = targets.keys_of(np.arange(20_000))
  outcomes = np.array(list(itertools.product(range(K), repeat=L)))
  weight = np.where(outcomes[:, 1] == 0, 0, np.exp(np.asarray(reward(outcomes)) / ALPHA))
  expected = np.sum(LAW.reshape(-1) * weight)

  def off(value):
    """Standard errors from Z."""
    algorithm = particles.smc(hitting, value, num_particles=4, temperature=ALPHA)

    @jax.jit
    def run(keys):
      state = base.start(keys, algorithm, jnp.full((len(keys), L), K))
      return particles.log_z(base.run(keys, algorithm, state, L)[0])

    z = np.exp(np.asarray(run(keys), np.float64))
    return (z.mean() - expected) / z.std() * np.sqrt(len(z))

  assert abs(off(soft_values.raised(drawn, -1.0, done))) < 4
  assert off(drawn) < -8


def test_the_mode_is_the_likeliest_token_of_each_position():
  v, calls = soft_values.mode(reward, ASK, mask=K)(None, state_of(STATES), None)
  for state, value, called in zip(STATES, v, calls, strict=True):
    filled = np.where(state == K, np.argmax(logits_of(state), axis=1), state)
    np.testing.assert_allclose(value, reward(jnp.asarray(filled)[None])[0])
    assert called == np.any(state == K)


@pytest.mark.parametrize("alpha", [0.3, jnp.array([0.2, 0.5] * 13 + [3.0])], ids=["one", "rows"])
def test_a_sequence_without_masks_is_worth_its_reward(alpha):
  full = STATES[np.all(STATES < K, axis=1)]
  keys = targets.keys_of(np.arange(len(full)))
  of = soft_values.completions(reward, ASK, mask=K, num_draws=3, temperature=alpha)
  for value in (of, soft_values.mode(reward, ASK, mask=K)):
    v, calls = value(keys, state_of(full), None)
    np.testing.assert_allclose(v, reward(jnp.asarray(full)), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(calls, 0)


def test_nothing_is_known_before_the_end():
  done = lambda state: ~jnp.any(state.tokens == K, axis=1)
  value = soft_values.at_end(lambda state: 1 + reward(state.tokens), done)
  v, calls = value(None, state_of(STATES), None)
  full = np.all(STATES < K, axis=1)
  np.testing.assert_allclose(v, np.where(full, 1 + reward(jnp.asarray(STATES)), 0))
  np.testing.assert_array_equal(calls, 0)


FLOW = schedules.rectified_flow()
TABLE = ancestral.ddpm(FLOW, [1.0, 0.6, 0.3, 0.0])
MEAN, STD = 0.5, 0.7


def denoise(x, t):
  """Of x_0 ~ N(MEAN, STD^2), in closed form."""
  t = jnp.asarray(t).reshape(-1, 1)
  gain = (1 - t) * STD**2 / ((1 - t) ** 2 * STD**2 + t**2)
  return MEAN + gain * (x - (1 - t) * MEAN)


def test_values_of_a_table_are_rewards_of_what_it_sees():
  """Of each state its own denoised, or that of the state before; at the end the sample."""
  x = jnp.zeros((5, 2))
  score = lambda x: jnp.sum(x**3, axis=1)
  algorithm = solvers.tabulated(denoise, TABLE)
  looking = soft_values.posterior_mean(score, soft_values.table_denoised(denoise, TABLE))
  seen = soft_values.seen_mean(score, TABLE)
  keys = targets.keys_of(np.arange(5))
  state, info, before = base.start(keys, algorithm, x), None, 0.0 * x[:, 0]
  for i in range(5):  # two steps beyond the end of the table
    here, calls = looking(keys, state, info)
    ended = i >= 3
    point = state.slots[:, 0]
    expected = score(point) if ended else score(denoise(point, TABLE.times[i]))
    np.testing.assert_allclose(here, expected, rtol=1e-5)
    np.testing.assert_array_equal(calls, [not ended] * 5)
    late, calls = seen(keys, state, info)
    np.testing.assert_allclose(late, expected if ended else before, rtol=1e-5)
    np.testing.assert_array_equal(calls, 0)
    before = expected
    state, info = algorithm.step(base.row_keys_at(keys, state.step + i), state)


def test_several_keys_are_all_different():
  keys = targets.keys_of([3, 3, 5])
  data = jax.random.key_data(soft_values.several(keys, 4))
  assert data.shape[:2] == (4, 3)
  assert len(np.unique(np.asarray(data).reshape(12, -1), axis=0)) == 8  # two rows are one request
  np.testing.assert_array_equal(data[:, 0], data[:, 1])


def test_bad_input_is_said():
  for alpha in (0.0, float("inf")):
    with pytest.raises(ValueError, match="above 0 and below inf"):
      soft_values.completions(reward, ASK, mask=K, num_draws=2, temperature=alpha)
