"""The chosen noise against the closed form of a linear sampler, on pairs it was not chosen on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.models import schedules, toy
from ancestral.sampling import boundary, grids, guidance, multistep, noise_search


def linear(noise, conditions):
  """x = condition + s z: the error of one noise is (s |z|)^2 / size, whatever the condition."""
  return conditions + 0.5 * noise


def test_the_best_noise_of_a_linear_sampler_is_the_shortest():
  candidates = jax.random.normal(jax.random.key(0), (50, 4))
  conditions = jax.random.normal(jax.random.key(1), (10, 4))
  found = boundary.search(linear, candidates, conditions, conditions)
  lengths = np.sum(np.asarray(candidates) ** 2, 1)
  expected = np.broadcast_to(0.25 * lengths[:, None] / 4, (50, 10))
  np.testing.assert_allclose(found.errors, expected, rtol=1e-4)
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


def test_the_distance_and_the_batch_are_the_callers():
  """By brute force, of the largest error of an entry: another candidate than the mean square's."""
  candidates = jnp.array([[1.0, 1.0, 1.0], [1.6, 0.0, 0.0]])
  pairs = jnp.zeros((2, 3))
  largest = lambda x, y: jnp.max(jnp.abs(x - y), axis=1)
  square = boundary.search(linear, candidates, pairs, pairs, batch_size=2)
  other = boundary.search(linear, candidates, pairs, pairs, distance=largest)
  np.testing.assert_array_equal(square.noise, candidates[1])
  np.testing.assert_array_equal(other.noise, candidates[0])
  np.testing.assert_allclose(other.errors, [[0.5, 0.5], [0.8, 0.8]], rtol=1e-6)


def test_of_a_guided_gaussian_diffusion_the_choice_is_that_of_the_closed_form():
  """x_0 ~ N(0, d^2 I), two of four numbers seen exactly: the ODE's sample is a line in x_T.

  The seen ones are y; the others are d z T / sqrt(T^2 + d^2), d z nearly: the best noise is the one
  whose hidden part is nearest to the mean, 0, of what it stands for, on pairs and on others alike.
  """
  schedule, d = schedules.variance_exploding(20.0), 0.7
  law = toy.GaussianMixture(jnp.ones(1), jnp.zeros((1, 4)), jnp.array([d**2]))
  operator = jnp.eye(4)[:2]
  table = multistep.dpmpp_2m(schedule, grids.to_zero(grids.log_snr(schedule, 60, end=0.005)))

  def solve(noise, y):
    denoise = toy.mixture_denoiser(law, schedule)
    guided = guidance.pigdm(denoise, operator, y, 0.0, schedule, data_std=d)
    return noise_search.of_table(guided, table)(noise)[0]

  candidates = jax.random.normal(jax.random.key(5), (30, 4))
  targets = d * jax.random.normal(jax.random.key(6), (400, 4))
  pairs, others = targets[:200], targets[200:]
  with jax.default_matmul_precision("highest"):
    found = boundary.search(solve, candidates, pairs[:, :2], pairs, batch_size=10)
  hidden = d * np.asarray(candidates)[:, None, 2:]
  exact = lambda of: np.sum((hidden - np.asarray(of)[None, :, 2:]) ** 2, axis=2) / 4
  np.testing.assert_allclose(found.errors, exact(pairs), atol=0.03)
  best = int(np.argmin(exact(pairs).mean(axis=1)))
  np.testing.assert_array_equal(found.noise, candidates[best])
  held_out = exact(others).mean(axis=1)
  assert held_out[best] < np.quantile(held_out, 0.1)
