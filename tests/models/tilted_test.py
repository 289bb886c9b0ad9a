"""Tilted toys: against enumeration and quadrature."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ancestral.models import schedules, tilted, toy

PRIOR = toy.GaussianMixture(
  jnp.array([0.3, 0.7]), jnp.array([[-1.0, 0.4], [0.8, -0.2]]), jnp.array([0.2, 0.5])
)
LINEAR, QUADRATIC = jnp.array([1.5, -0.7]), 0.8


def test_soft_values_of_a_joint_are_those_of_the_sums():
  rng = np.random.default_rng(0)
  joint, w = rng.dirichlet(np.ones(27)).reshape(3, 3, 3), rng.normal(size=(3, 3, 3))
  w[1, 0, 2] = -np.inf
  states = np.array(list(itertools.product(range(4), repeat=3)))  # 3 is the mask
  found = tilted.joint_soft_value(jnp.asarray(joint), jnp.asarray(w))(jnp.asarray(states))
  for state, value in zip(states, found, strict=True):
    rows = tuple(slice(None) if token == 3 else token for token in state)
    expected = np.sum(joint[rows] * np.exp(w[rows])) / np.sum(joint[rows])
    np.testing.assert_allclose(np.exp(value), expected, rtol=1e-5)


def grid(num=400):
  axis = np.linspace(-7, 7, num)
  points = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
  return points, (axis[1] - axis[0]) ** 2


def density(mixture, x):
  weights, means, variances = (np.asarray(leaf, np.float64) for leaf in mixture)
  parts = zip(weights, means, variances, strict=True)
  return sum(w * stats.multivariate_normal(m, v).pdf(x) for w, m, v in parts)


def tilt(x):
  return np.exp(x @ np.asarray(LINEAR) - QUADRATIC * np.sum(x**2, axis=-1) / 2)


def test_a_tilted_mixture_is_the_tilted_density():
  x, area = grid()
  law, log_z = tilted.mixture(PRIOR, LINEAR, QUADRATIC)
  unnormalised = density(PRIOR, x) * tilt(x)
  np.testing.assert_allclose(np.exp(log_z), unnormalised.sum() * area, rtol=1e-5)
  expected = unnormalised / (unnormalised.sum() * area)
  np.testing.assert_allclose(density(law, x), expected, rtol=1e-4, atol=1e-6)


def test_no_tilt_is_the_mixture():
  law, log_z = tilted.mixture(PRIOR, jnp.zeros(2))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), law, PRIOR)
  np.testing.assert_allclose(log_z, 0, atol=1e-6)


@pytest.mark.parametrize(
  "schedule", [schedules.rectified_flow(), schedules.variance_exploding(5.0)], ids=["flow", "ve"]
)
def test_soft_values_of_a_mixture_are_means_over_the_posterior(schedule):
  x_0, _ = grid(300)
  x_t = np.array([[0.3, -0.8], [1.2, 0.5], [-2.0, 0.1]])
  t = np.array([0.2, 0.5, 0.8])
  found = tilted.mixture_soft_value(PRIOR, LINEAR, QUADRATIC, schedule)(
    jnp.asarray(x_t, jnp.float32), jnp.asarray(t, jnp.float32)
  )
  for x, time, value in zip(x_t, t, found, strict=True):
    alpha, sigma = float(schedule.alpha(time)), float(schedule.sigma(time))
    weights = density(PRIOR, x_0) * np.exp(-np.sum((x - alpha * x_0) ** 2, 1) / (2 * sigma**2))
    expected = np.sum(weights * tilt(x_0)) / np.sum(weights)
    np.testing.assert_allclose(value, np.log(expected), rtol=1e-4, atol=1e-4)


def test_a_time_for_all_rows_is_that_time_for_each():
  value = tilted.mixture_soft_value(PRIOR, LINEAR, QUADRATIC, schedules.rectified_flow())
  x = jnp.array([[0.3, -0.8], [1.2, 0.5]])
  np.testing.assert_allclose(value(x, 0.4), value(x, jnp.full(2, 0.4)), rtol=1e-6)
