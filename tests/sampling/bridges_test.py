"""Euler-Maruyama on bridges: where paths end, on the way, and the order of the error."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

import targets
from ancestral.models import bridges as models
from ancestral.sampling import base, bridges

EPS = 0.5


def random_bridge(num=3, dim=2, seed=0):
  rng = np.random.default_rng(seed)
  parts = rng.normal(size=num), rng.normal(size=(num, dim)), 0.5 * rng.normal(size=(num, dim, dim))
  return models.LightBridge(*(jnp.asarray(part, jnp.float32) for part in parts))


@functools.partial(jax.jit, static_argnames=("num_steps", "eps"))
def paths(keys, bridge, x, *, num_steps, eps=EPS):
  """Every point of the paths, [num_steps, B, D]."""
  algorithm = bridges.euler_maruyama(
    models.drift(bridge, EPS), np.linspace(0, 1, num_steps + 1), eps
  )
  state = base.start(keys, algorithm, x)
  return base.run(keys, algorithm, state, num_steps, lambda state, info: state.x)[1]


def assert_means(values, expected):
  """The means [...] of values [N, ...] are these within four standard errors."""
  error = values.std(axis=0) / np.sqrt(len(values))
  np.testing.assert_array_less(np.abs(values.mean(axis=0) - expected), 4 * error)


def products(x, mean):
  return (x - mean)[:, :, None] * (x - mean)[:, None]


@pytest.mark.parametrize("x0", [(0.0, 0.0), (1.0, -0.8)])
def test_paths_from_a_point_end_as_the_plan_says(x0):
  """Means, covariances, and the share of the line along each axis below each component's mean."""
  num, bridge, x0 = 8000, random_bridge(), np.float32(x0)
  x = np.asarray(paths(targets.keys_of(range(num)), bridge, jnp.tile(x0, (num, 1)), num_steps=200))
  end = x[-1]
  plan = jax.jit(models.plan)(bridge, jnp.asarray(x0)[None], EPS)
  log_weights, means, covariances = (np.asarray(part) for part in plan)
  weights, means = np.exp(log_weights[0]), means[0]
  mean = weights @ means
  apart = means - mean
  assert_means(end, mean)
  covariance = np.einsum("k,kij->ij", weights, covariances + apart[:, :, None] * apart[:, None])
  assert_means(products(end, mean), covariance)
  deviations = np.sqrt(np.diagonal(covariances, axis1=1, axis2=2))
  for cut in means:
    below = weights @ scipy.stats.norm(means, deviations).cdf(cut)
    assert_means(end < cut, below)


def test_marginals_on_the_way_are_the_closed_form_of_gaussians():
  num, num_steps = 8000, 200
  cov0, cov1 = np.array([[1.0, 0.4], [0.4, 0.7]]), np.array([[0.5, -0.3], [-0.3, 1.4]])
  joint = models.gaussian_bridge([0.3, -0.8], cov0, [-0.5, 1.1], cov1, EPS)
  start = np.random.default_rng(0).multivariate_normal(joint.mean0, cov0, size=num)
  bridge = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), models.from_gaussian(joint))
  keys = targets.keys_of(range(num))
  x = np.asarray(paths(keys, bridge, jnp.asarray(start, jnp.float32), num_steps=num_steps))
  for i in (50, 100, 150, 200):
    mean, covariance = models.gaussian_marginal(joint, i / num_steps, EPS)
    assert_means(x[i - 1], mean)
    assert_means(products(x[i - 1], mean), covariance)
  both = (start - joint.mean0)[:, :, None] * (x[-1] - joint.mean1)[:, None]
  assert_means(both, joint.cross)


def test_one_component_without_noise_goes_straight():
  """Whatever the number of steps: the mean path between two points is a line at constant speed."""
  bridge, x0 = random_bridge(num=1), jnp.array([[0.7, -1.2]])
  mean = jax.jit(models.plan)(bridge, x0, EPS).means[:, 0]
  x = paths(targets.keys_of([0]), bridge, x0, num_steps=4, eps=0.0)
  np.testing.assert_allclose(x[:, 0], x0 + np.arange(1, 5)[:, None] / 4 * (mean - x0), atol=1e-5)


def test_the_error_without_noise_is_of_first_order():
  bridge, x0, sizes = random_bridge(), jnp.array([[0.7, -1.2]]), np.array([16, 32, 64, 128])
  field = jax.jit(models.drift(bridge, EPS))
  derivative = lambda t, x: np.asarray(field(jnp.asarray(x, jnp.float32)[None], np.float32(t))[0])
  exact = scipy.integrate.solve_ivp(derivative, (0, 1), x0[0], rtol=1e-6, atol=1e-6).y[:, -1]
  errors = [
    np.linalg.norm(paths(targets.keys_of([0]), bridge, x0, num_steps=n, eps=0.0)[-1, 0] - exact)
    for n in sizes.tolist()
  ]
  slope = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
  assert -1.15 < slope < -0.85, errors


def test_a_step_by_hand_and_the_rows_that_stand():
  times = np.array([0.0, 0.25, 1.0])
  algorithm = bridges.euler_maruyama(lambda x, t: x * t[:, None] + 1, times, 0.36)
  keys = targets.keys_of([0, 1, 2])
  fresh = base.start(keys, algorithm, jnp.ones((3, 2)))
  before = fresh._replace(step=jnp.array([0, 1, 2], jnp.int32))
  after, info = algorithm.step(base.row_keys_at(keys, before.step), before)
  z = np.stack([jax.random.normal(key, (2,)) for key in base.row_keys_at(keys, before.step)])
  np.testing.assert_array_equal(after.step, [1, 2, 2])
  np.testing.assert_allclose(after.x[0], 1.25 + 0.3 * z[0], rtol=1e-6)
  np.testing.assert_allclose(after.x[1], 1 + 0.75 * 1.25 + 0.6 * np.sqrt(0.75) * z[1], rtol=1e-6)
  np.testing.assert_array_equal(after.x[2], [1, 1])
  np.testing.assert_allclose(info.time[:2], [0, 0.25])
  np.testing.assert_allclose(info.drift[1], 1.25)


def test_a_rows_path_is_its_own():
  bridge, x = random_bridge(), jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)), "float32")
  together = paths(targets.keys_of([0, 1, 2, 3]), bridge, x, num_steps=5)
  turned = paths(targets.keys_of([3, 2, 1, 0]), bridge, x[::-1], num_steps=5)
  np.testing.assert_allclose(together, turned[:, ::-1], atol=1e-6)


@pytest.mark.parametrize("times", [[0.0], [0.0, 0.5, 0.5], [1.0, 0.0], [[0.0, 1.0]]])
def test_times_that_do_not_rise_are_refused(times):
  with pytest.raises(ValueError, match="rising"):
    bridges.euler_maruyama(lambda x, t: x, np.array(times), 1.0)
