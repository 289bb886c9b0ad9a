"""Training state: the average's recursion by hand, buffers that are nobody else's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ancestral.training import state

OPTIMIZER = optax.adam(0.1)


def init_params(key):
  return {"kernel": jax.random.normal(key, (3, 2)), "bias": jnp.zeros(2)}


def test_init_counts_from_0_and_draws_params_from_the_key():
  made = state.init(jax.random.key(3), init_params, OPTIMIZER, state.no_average())
  assert made.step == 0 and made.step.dtype == jnp.int32 and made.average == ()
  jax.tree.map(np.testing.assert_array_equal, made.params, init_params(jax.random.key(3)))
  assert jax.tree.structure(made.optimizer) == jax.tree.structure(OPTIMIZER.init(made.params))


def test_first_averages_by_hand():
  averaging = state.exponential_average(0.99)
  average = averaging.init(jnp.array([8.0]))
  average = averaging.update(average, jnp.array([18.0]), jnp.int32(0))
  np.testing.assert_allclose(average, [17.0], rtol=1e-6)  # 1/10 of 8 and 9/10 of 18
  average = averaging.update(average, jnp.array([28.0]), jnp.int32(1))
  np.testing.assert_allclose(average, [26.0], rtol=1e-6)  # 2/11 of 17 and 9/11 of 28


@pytest.mark.parametrize("decay, first_capped", [(0.5, 8), (0.9, 80)])
def test_the_average_is_a_weighted_sum_of_all_params(decay, first_capped):
  # d = (1 + t) / (10 + t) reaches 1/2 at t = 8 and 9/10 at t = 80, and stays there.
  num_steps = 100
  seen = np.random.default_rng(0).normal(size=num_steps + 1)
  averaging = state.exponential_average(decay)
  update, average = jax.jit(averaging.update), averaging.init(jnp.float32(seen[0]))
  for step in range(num_steps):
    average = update(average, jnp.float32(seen[step + 1]), jnp.int32(step))
  d = np.array([(1 + t) / (10 + t) if t < first_capped else decay for t in range(num_steps)])
  kept = np.cumprod(np.concatenate([[1.0], d[::-1]]))[::-1]  # how much of step t - 1 is left
  weights = kept * np.concatenate([[1.0], 1 - d])
  assert weights.sum() == pytest.approx(1)
  assert average == pytest.approx(weights @ seen, abs=1e-5)


def test_an_average_of_constants_stays_and_keeps_its_type():
  averaging = state.exponential_average(0.9)
  params = {"wide": jnp.float32(0.3), "narrow": jnp.bfloat16(0.3)}
  average = averaging.init(params)
  for step in range(3):
    average = averaging.update(average, params, jnp.int32(step))
  assert {name: leaf.dtype for name, leaf in average.items()} == {
    "wide": jnp.float32,
    "narrow": jnp.bfloat16,
  }
  jax.tree.map(np.testing.assert_array_equal, average, params)


def test_no_average_is_empty():
  averaging = state.no_average()
  assert averaging.init(jnp.ones(2)) == () == averaging.update((), jnp.ones(2), jnp.int32(4))


@pytest.mark.parametrize("compiled", [False, True])
def test_no_two_leaves_share_a_buffer(compiled):
  make = lambda key: state.init(key, init_params, OPTIMIZER, state.exponential_average(0.9))
  made = (jax.jit(make) if compiled else make)(jax.random.key(0))
  average, params = jax.device_get((made.average, made.params))
  jax.tree.map(np.testing.assert_array_equal, average, params)
  pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(made)]
  assert len(set(pointers)) == len(pointers)


def test_the_average_outlives_donated_params():
  made, same = (
    state.init(jax.random.key(0), init_params, OPTIMIZER, state.exponential_average(0.9))
    for _ in range(2)
  )
  jax.jit(lambda params: jax.tree.map(lambda leaf: leaf + 1, params), donate_argnums=0)(made.params)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(made.params))
  jax.tree.map(np.testing.assert_array_equal, made.average, same.params)
