"""One step of every rule, against simulation and by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.models import mask_schedules, toy
from ancestral.sampling import base, jumps, noises

V = 3
SCHEDULE = mask_schedules.cosine()
P = np.random.default_rng(0).dirichlet(np.ones(V), size=(1, 2))
TOKENS = {"uniform": np.array([[0, 2]]), "masking": np.array([[V, 1]])}


def step_of(name, law, t=0.5, s=0.3, scale=1.0):
  """The law [2, M] of one step, its rates [2, M] and the noise."""
  noise = getattr(noises, name)(SCHEDULE, V)
  p, tokens = jnp.asarray(P, jnp.float32), jnp.asarray(TOKENS[name])
  t, s, scale = (jnp.full(1, value, jnp.float32) for value in (t, s, scale))
  rates = np.asarray(noise.rates(p, tokens, t))[0]
  return np.asarray(law(noise)(p, tokens, t, s, scale))[0], rates, noise


@pytest.mark.parametrize("name", TOKENS)
def test_euler_by_hand(name):
  found, rates, _ = step_of(name, jumps.euler_law, scale=0.5)
  expected = 0.5 * 0.2 * rates
  for i, x in enumerate(TOKENS[name][0]):
    expected[i, x] = 1 - expected[i].sum()
  np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("name", TOKENS)
def test_euler_surely_jumps_where_it_would_more_than_once(name):
  found, rates, _ = step_of(name, jumps.euler_law, scale=1e4)
  for i, x in enumerate(TOKENS[name][0]):
    if rates[i].sum():
      np.testing.assert_allclose(found[i], rates[i] / rates[i].sum(), atol=1e-6)
    else:
      assert found[i, x] == 1


@pytest.mark.parametrize("name", TOKENS)
def test_tau_leaping_is_poisson_jumps_of_which_several_are_refused(name):
  found, rates, _ = step_of(name, jumps.tau_leaping_law, scale=4.0)
  num = 40_000
  numbers = np.random.default_rng(1).poisson(0.8 * rates, size=(num, *rates.shape))
  for i, x in enumerate(TOKENS[name][0]):
    total = numbers[:, i].sum(-1)
    to = np.where(total == 1, np.argmax(numbers[:, i], axis=-1), x)
    targets.check_law(to[:, None], np.float64(found[i]) / np.float64(found[i]).sum())


@pytest.mark.parametrize("name", TOKENS)
def test_scaled_posterior_moves_so_much_more(name):
  once, _, noise = step_of(name, jumps.posterior_law)
  more, _, _ = step_of(name, jumps.posterior_law, scale=1.1)
  at = np.eye(noise.num_states)[TOKENS[name][0]] > 0
  np.testing.assert_allclose(more[~at], 1.1 * once[~at], rtol=1e-5)
  np.testing.assert_allclose(more.sum(-1), 1, rtol=1e-6)


def test_the_last_step_leaves_no_mask_and_what_is_given_stays():
  law = toy.markov_law(np.random.default_rng(2).dirichlet(np.ones(V), size=V), 0, 3)
  predict = toy.joint_predictor(jnp.asarray(law, jnp.float32))
  noise = noises.masking(SCHEDULE, V)
  num = 8_000
  tokens = jnp.broadcast_to(jnp.array([V, 1, V]), (num, 3))
  keys = targets.keys_of(np.arange(num))

  @jax.jit
  def sample(keys, tokens):
    sampler = jumps.tau_leaping(predict, noise, jnp.array([1.0, 0.8, 0.6]))
    return base.run(keys, sampler, base.start(keys, sampler, tokens), 2)[0]

  out = np.asarray(sample(keys, tokens).tokens)
  assert np.all(out[:, 1] == 1) and np.all(out < V)
  conditional = law[:, 1] / law[:, 1].sum()  # given the middle, a chain's ends are independent
  targets.check_law(out[:, [0, 2]], conditional)


def test_coefficients_of_one_change_nothing_and_finished_rows_stay():
  noise = noises.uniform(SCHEDULE, V)
  predict = lambda tokens, t: jax.nn.one_hot(tokens, V) * 2 + t[:, None, None]
  keys, times = targets.keys_of(np.arange(16)), jnp.linspace(1, 0, 4)

  @functools.partial(jax.jit, static_argnums=0)
  def sample(num_steps, coefficients=None):
    sampler = jumps.euler(predict, noise, times, coefficients=coefficients)
    state = base.start(keys, sampler, jnp.full((16, 4), V))
    return base.run(keys, sampler, state, num_steps)[0]

  plain, ones, longer = sample(3), sample(3, jnp.ones(3)), sample(5)
  jax.tree.map(np.testing.assert_array_equal, plain, ones)
  jax.tree.map(np.testing.assert_array_equal, plain, longer)
  assert np.any(np.asarray(sample(3, jnp.array([1, 0.2, 0.2])).tokens) != plain.tokens)
