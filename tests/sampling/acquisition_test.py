"""The choice of measurements against the exact rule of a Gaussian, and against sums by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from ancestral.models import schedules
from ancestral.sampling import acquisition, ancestral, base, grids


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
  measured = np.zeros(6, bool)
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


def test_shapes_are_checked():
  with pytest.raises(ValueError, match=r"it is \[P, C\] or \[P, C, M\]"):
    acquisition.entropy(jax.numpy.zeros(3), 1.0)


def test_the_entropy_of_the_mixture_is_between_its_two_bounds():
  """H - H(noise), by quadrature, is below the sum of 2 s^2 and above that of 4 s^2."""
  means, s = np.array([-1.0, -0.8, 0.3, 2.0]), 0.3
  grid = np.linspace(-4, 5, 20001)
  density = np.mean(scipy.stats.norm.pdf(grid[:, None], means, s), axis=1)
  exact = -np.sum(density * np.log(density)) * (grid[1] - grid[0])
  noise = 0.5 * np.log(2 * np.pi * np.e * s**2)
  above = float(acquisition.entropy(jnp.asarray(means[:, None]), s)[0])
  wider = float(acquisition.entropy(jnp.asarray(means[:, None]), s * np.sqrt(2))[0])
  assert wider + 0.5 * (np.log(2) - 1) < exact - noise < above
  assert above - (exact - noise) < 0.25


def test_entropy_does_not_see_shifts_or_the_order_of_particles_and_scales_with_its_unit():
  y = jax.random.normal(jax.random.key(0), (6, 4, 2))
  found = acquisition.entropy(y, 0.5)
  np.testing.assert_allclose(acquisition.entropy(y + 3.0, 0.5), found, rtol=1e-5)
  np.testing.assert_allclose(acquisition.entropy(y[::-1], 0.5), found, rtol=1e-5)
  np.testing.assert_allclose(acquisition.entropy(10 * y, 5.0), found, rtol=1e-5)
  assert np.min(np.abs(np.asarray(acquisition.entropy(y, 1.0) - found))) > 0.01


@pytest.mark.parametrize("candidates", [acquisition.pixels, acquisition.lines, acquisition.columns])
def test_candidates_are_parts_of_the_image(candidates):
  x = jnp.arange(2 * 3 * 4 * 1.0).reshape(2, 3, 4, 1) + 1
  parts = candidates(x)
  assert (
    parts.shape[1:] == {"pixels": (12, 1), "lines": (3, 4), "columns": (4, 3)}[candidates.__name__]
  )
  np.testing.assert_array_equal(acquisition.placed(candidates, parts[1], x)[0], x[1])
  chosen = jnp.zeros(parts.shape[1:]).at[1].set(1.0)
  mask = np.asarray(acquisition.placed(candidates, chosen, x))[0, :, :, 0]
  expected = np.zeros((3, 4))
  expected[{"pixels": (0, 1), "lines": 1, "columns": (slice(None), 1)}[candidates.__name__]] = 1
  np.testing.assert_array_equal(mask, expected)


SCHEDULE = schedules.variance_exploding(20.0)
COVARIANCE = np.diag([4.4, 4.0, 2.0, 0.5])
COVARIANCE[0, 1] = COVARIANCE[1, 0] = 0.99 * np.sqrt(4.4 * 4.0)
STD = 0.1  # of measurements


def gaussian_posterior(measured, y):
  """Mean and covariance of N(0, COVARIANCE) given y of what is measured."""
  precision = jnp.linalg.inv(COVARIANCE) + jnp.diag(measured / STD**2)
  covariance = jnp.linalg.inv(precision)
  return covariance @ (measured * y[:, 0]) / STD**2, covariance


def exact_guide(measured, y):
  mean, covariance = gaussian_posterior(measured, y)

  def denoise(x, t):
    total = covariance[None] + jnp.eye(4)[None] * t[:, None, None] ** 2
    residual = x - mean[None]
    return mean[None] + jnp.einsum("ij,bj->bi", covariance, solve(total, residual))

  solve = lambda total, residual: jnp.linalg.solve(total, residual[..., None])[..., 0]
  return denoise


def drawn(rule, at, num=2000):
  truth = jnp.array([[1.7], [1.5], [-1.0], [0.4]])
  table = ancestral.ddpm(SCHEDULE, grids.to_zero(grids.log_snr(SCHEDULE, 200, end=0.01)))
  keys = base.row_keys(jax.random.key(0), jnp.arange(num))
  run = lambda keys: acquisition.subsample(
    keys, exact_guide, table, lambda c: truth[c], lambda x: x[:, :, None], rule,
    jnp.zeros((num, 4)), at=at,
  )  # fmt: skip
  with jax.default_matmul_precision("highest"):
    return jax.jit(run)(keys), truth


@pytest.mark.parametrize("rule", [functools.partial(acquisition.entropy, std=0.1), None])
def test_a_diffusion_measures_in_the_exact_greedy_order_and_ends_in_the_posterior(rule):
  """By hand: 0 (4.4), not its double 1 (left with .08) but 2 (2.0), then 3 (.5), then 1.

  Particles settle at the end in the Gaussian posterior given what was measured.
  """
  rule = acquisition.variance if rule is None else rule
  found, truth = drawn(rule, [10, 23, 36])
  np.testing.assert_array_equal(found.order, [0, 2, 3])
  np.testing.assert_array_equal(found.measured, [True, False, True, True])
  np.testing.assert_array_equal(found.y, truth * found.measured[:, None])
  mean, covariance = gaussian_posterior(found.measured, truth)
  deviation = np.sqrt(np.diag(covariance))
  error = (np.mean(found.x, axis=0) - mean) / deviation
  assert np.max(np.abs(error)) < 5 / np.sqrt(2000), error
  np.testing.assert_allclose(np.std(found.x, axis=0), deviation, rtol=0.08)


def test_a_fixed_mask_is_measured_in_its_order():
  found, _ = drawn(acquisition.in_order(jnp.array([1.0, 4.0, 2.0, 3.0])), [3, 4], num=2)
  np.testing.assert_array_equal(found.order, [1, 3])


@pytest.mark.parametrize(
  "at, message",
  [([2, 2], "has to rise"), ([200], "to 199 at most"), ([0, 1, 2, 3, 4], "5 measurements of 4")],
)
def test_measurements_have_to_fit(at, message):
  with pytest.raises(ValueError, match=message):
    drawn(acquisition.variance, at, num=2)
