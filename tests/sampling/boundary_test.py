"""The chosen noise against the closed form of a linear sampler, on pairs it was not chosen on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.sampling import boundary


def linear(noise, conditions):
  """x = condition + s z: the error of one noise is (s |z|)^2 / size, whatever the condition."""
  return conditions + 0.5 * noise


def test_the_best_noise_of_a_linear_sampler_is_the_shortest():
  candidates = jax.random.normal(jax.random.key(0), (50, 4))
  conditions = jax.random.normal(jax.random.key(1), (10, 4))
  found = boundary.search(linear, candidates, conditions, conditions)
  lengths = np.sum(np.asarray(candidates) ** 2, 1)
  np.testing.assert_allclose(found.errors, 0.25 * lengths / 4, rtol=1e-5)
  np.testing.assert_array_equal(found.noise, candidates[np.argmin(lengths)])


def test_it_is_the_best_on_others_too_where_noise_and_condition_interact():
  solve = lambda noise, c: c * (1 + 0.3 * noise)  # the error |c|^2 |0.3 z - 0.3 z*|^2, by size
  candidates, wanted = jax.random.normal(jax.random.key(2), (200, 3)), jnp.array([0.5, -0.5, 1.0])
  pairs = jax.random.normal(jax.random.key(3), (20, 3))
  found = boundary.search(solve, candidates, pairs, pairs * (1 + 0.3 * wanted[None]))
  new = jax.random.normal(jax.random.key(4), (500, 3))
  error = lambda z: float(jnp.mean((solve(z[None], new) - new * (1 + 0.3 * wanted[None])) ** 2))
  errors = [error(z) for z in candidates]
  assert error(found.noise) < np.quantile(errors, 0.03)


def test_pairs_have_to_match():
  with pytest.raises(ValueError, match="3 conditions for 2 targets"):
    boundary.search(linear, jnp.zeros((1, 2)), jnp.zeros((3, 2)), jnp.zeros((2, 2)))
