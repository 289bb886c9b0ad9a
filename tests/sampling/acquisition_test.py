"""The choice of measurements against the exact rule of a Gaussian, and against sums by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.sampling import acquisition


def test_entropy_is_the_sum_by_hand():
  y = np.random.default_rng(0).normal(size=(5, 3, 2))
  expected = np.zeros(3)
  for c in range(3):
    for i in range(5):
      near = [np.exp(-np.sum((y[i, c] - y[j, c]) ** 2) / (2 * 0.7**2)) for j in range(5)]
      expected[c] -= np.log(np.mean(near)) / 5
  np.testing.assert_allclose(acquisition.entropy(jnp.asarray(y), 0.7), expected, rtol=1e-5)


def test_of_gaussians_it_ranks_as_the_variance():
  """E log E exp(-(y - y')^2 / 2 s^2) of N(0, v) is monotone in v."""
  std = np.array([0.1, 0.5, 0.8, 1.5, 3.0])
  particles = jnp.asarray(std * np.random.default_rng(1).normal(size=(2000, 5)))
  found = acquisition.entropy(particles, 0.5)
  np.testing.assert_array_equal(np.argsort(found), np.arange(5))
  np.testing.assert_array_equal(np.argsort(acquisition.variance(particles)), np.arange(5))
  v, s = std**2, 0.5  # -E log sqrt(s^2 / (s^2 + v)) exp(-y^2 / (2 (s^2 + v)))
  exact = 0.5 * np.log(1 + v / s**2) + v / (2 * (v + s**2))
  np.testing.assert_allclose(found, exact, atol=0.06)


def test_nothing_overflows_and_equal_particles_have_no_entropy():
  far = acquisition.entropy(jnp.array([[0.0, 1.0], [1e15, 1.0]]), 1e-3)
  np.testing.assert_allclose(far, [np.log(2), 0.0], atol=1e-6)


def test_what_is_measured_is_not_chosen_again():
  values = jnp.array([3.0, 5.0, 4.0])
  assert acquisition.choose(values, jnp.array([False, True, False])) == 2


def test_sequential_choices_are_those_of_a_gaussian_posterior():
  """Greedy by exact conditional variances, beside particles of the exact posterior."""
  rng = np.random.default_rng(2)
  factor = rng.normal(size=(6, 6)) * np.array([3.0, 1, 1, 0.5, 0.2, 0.1])
  cov, noise = factor @ factor.T, 0.1
  measured, exact = np.zeros(6, bool), []
  for step in range(3):
    kept = np.flatnonzero(measured)
    gain = cov[:, kept] @ np.linalg.inv(cov[np.ix_(kept, kept)] + noise**2 * np.eye(len(kept)))
    posterior = cov - gain @ cov[kept]
    particles = rng.multivariate_normal(np.zeros(6), posterior, 600, method="eigh")
    entropy = acquisition.entropy(jnp.asarray(particles), 0.3)
    best = int(acquisition.choose(entropy, jnp.asarray(measured)))
    open_variance = np.where(measured, -1, np.diag(posterior))
    assert open_variance[best] > 0.9 * open_variance.max(), step
    measured[int(np.argmax(open_variance))] = True
    exact.append(best)
  assert len(exact) == 3


def test_shapes_are_checked():
  with pytest.raises(ValueError, match=r"it is \[P, C\] or \[P, C, M\]"):
    acquisition.entropy(jax.numpy.zeros(3), 1.0)
