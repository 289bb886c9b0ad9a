"""Weightings against the heads that they are of; laws of times, and how evenly they are drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ancestral.models import precondition, schedules
from ancestral.training import weightings

SCHEDULES = {
  "linear": schedules.linear(),
  "variance exploding": schedules.variance_exploding(),
  "rectified flow": schedules.rectified_flow(),
}
ON_EVERY_SCHEDULE = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
OWN = {
  "noise": (precondition.NOISE, weightings.noise),
  "data": (precondition.DATA, weightings.data),
  "velocity": (precondition.VELOCITY, weightings.velocity),
  "flow": (precondition.FLOW, weightings.flow),
  "karras": (precondition.karras(0.7), weightings.karras(0.7)),
}
SMALLEST = 2.0**-24
NUM = 20_000
FAR = 1.95 / NUM**0.5  # Kolmogorov's distance of NUM draws from their own law, once in a thousand


@pytest.mark.parametrize("name", OWN)
@ON_EVERY_SCHEDULE
def test_a_weighting_is_the_squared_error_of_its_own_output(schedule, name):
  head, weighting = OWN[name]
  data, denoised, noise = np.random.default_rng(0).normal(size=(3, 4))
  with jax.enable_x64(True):
    t = jnp.asarray(schedule.max_time * np.array([0.01, 0.2, 0.5, 0.95]))
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x = alpha * data + sigma * noise
    output, target = (head.from_denoised(x, known, alpha, sigma) for known in (denoised, data))
    expected = np.square(output - target)
    found = weighting(alpha, sigma) * np.square(denoised - data)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_weightings_by_hand():
  """SNR 4, 1 and 1 / 9; any scale of alpha and sigma, where a weighting is of their ratio."""
  for scale in (1.0, 0.3):
    alpha, sigma = scale * jnp.array([2.0, 1.0, 1.0]), scale * jnp.array([1.0, 1.0, 3.0])
    expected = {
      weightings.min_snr(2.0): [2, 1, 1 / 9],
      weightings.min_snr(): [4, 1, 1 / 9],
      weightings.p2(): [4 / 5, 1 / 2, 1 / 10],
      weightings.p2(k=2.0, gamma=0.5): [4 / 6**0.5, 1 / 3**0.5, 1 / 9 / (19 / 9) ** 0.5],
      weightings.p2(gamma=0.0): [4, 1, 1 / 9],
      weightings.flow: [9, 4, 16 / 9],
      weightings.karras(0.5): [8, 5, 4 + 1 / 9],
    }
    for weighting, by_hand in expected.items():
      np.testing.assert_allclose(weighting(alpha, sigma), by_hand, rtol=1e-5)


@pytest.mark.parametrize("num", [1, 2, 7, 256])
def test_low_discrepancy_has_one_in_every_interval(num):
  draw = jax.jit(jax.vmap(lambda key: weightings.low_discrepancy(key, num)))
  drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 50)), np.float64)
  cells = np.floor(drawn * num + 1e-4)  # a float32 quantile may round to the edge of its cell
  np.testing.assert_array_equal(np.sort(cells, axis=-1), np.tile(np.arange(num), (50, 1)))
  within = drawn * num - cells  # one shift for all
  np.testing.assert_allclose(within, within[:, :1] * np.ones(num), atol=1e-4)


@pytest.mark.parametrize("quantiles", [weightings.independent, weightings.low_discrepancy])
def test_each_quantile_is_uniform_whatever_its_place(quantiles):
  keys = jax.random.split(jax.random.key(1), NUM)
  drawn = np.asarray(jax.jit(jax.vmap(lambda key: quantiles(key, 4)))(keys))
  for place in range(4):
    assert stats.kstest(drawn[:, place], "uniform").statistic < FAR


def test_independent_quantiles_are_uncorrelated_and_stratified_ones_are_not():
  """Of four in as many cells: -1/3 between cells, 15/16 of the variance, and 1 between shifts."""
  keys = jax.random.split(jax.random.key(2), NUM)
  for quantiles, expected in ((weightings.independent, 0), (weightings.low_discrepancy, -0.25)):
    drawn = np.asarray(
      jax.jit(jax.vmap(lambda key, q=quantiles: q(key, 4)))(jax.random.clone(keys))
    )
    found = np.corrcoef(drawn.T)[np.triu_indices(4, 1)]
    np.testing.assert_allclose(found, expected, atol=4 / NUM**0.5)


def test_quantiles_are_never_0_or_1():
  """With keys that have a 0 among four million, and a shift that rounds the last to 1."""
  zero, one, num = jax.random.key(4), jax.random.key(18), 2**20
  assert jax.random.uniform(jax.random.clone(zero), (2**22,)).min() == 0
  assert weightings.independent(zero, 2**22).min() == SMALLEST
  stratified = weightings.low_discrepancy(one, num)
  assert stratified.min() >= SMALLEST and stratified.max() == 1 - SMALLEST < 1


def test_the_mean_over_a_batch_varies_less():
  """Var of the mean of n uniforms is 1 / 12 n; of n in as many cells with one shift, 1 / 12 n^2."""
  num, keys = 16, jax.random.split(jax.random.key(3), 1000)
  for quantiles, expected in (
    (weightings.independent, 1 / (12 * num)),
    (weightings.low_discrepancy, 1 / (12 * num**2)),
  ):
    means = jax.jit(jax.vmap(lambda key, q=quantiles: jnp.mean(q(key, num))))(
      jax.random.clone(keys)
    )
    np.testing.assert_allclose(np.var(means), expected, rtol=4 * (2 / 1000) ** 0.5)


def log_ratio(schedule, times):
  """ln(sigma / alpha), float64, of times at quantiles that are evenly spread in float32."""
  quantiles = weightings.low_discrepancy(jax.random.key(5), NUM)
  t = np.asarray(jax.jit(times)(quantiles), np.float64)
  assert np.all(t > 0) and np.all(t <= schedule.max_time)
  return -np.asarray(schedules.half_log_snr(schedule, t))


# In low discrepancy a distance is 1 / NUM, not 1 / sqrt(NUM); rounding of t adds some.
NEAR = 10 / NUM


@pytest.mark.parametrize("mean, std", [(-1.2, 1.2), (0.0, 1.0)])
@ON_EVERY_SCHEDULE
def test_log_normal_is_the_law_of_the_log_ratio(schedule, mean, std):
  found = log_ratio(schedule, weightings.log_normal(schedule, mean, std))
  assert stats.kstest(found, stats.norm(mean, std).cdf).statistic < NEAR


def test_log_normal_of_a_straight_path_is_logit_normal():
  schedule = schedules.rectified_flow()
  quantiles = weightings.low_discrepancy(jax.random.key(6), NUM)
  t = np.asarray(weightings.log_normal(schedule, 0.0, 1.0)(quantiles), np.float64)
  assert stats.kstest(np.log(t / (1 - t)), "norm").statistic < NEAR


def test_log_normal_stays_within_the_schedule():
  schedule = schedules.variance_exploding(max_sigma=2.0)
  quantiles = jnp.array([SMALLEST, 0.5, 1 - SMALLEST])
  t = weightings.log_normal(schedule, mean=0.5)(quantiles)
  np.testing.assert_allclose(t[1:], [np.exp(0.5), 2.0], rtol=1e-5)
  assert 0 < t[0] < 0.01


@ON_EVERY_SCHEDULE
def test_log_uniform_is_between_its_ends(schedule):
  found = log_ratio(schedule, weightings.log_uniform(schedule))
  low, high = np.log([0.002, 80])
  assert stats.kstest(found, stats.uniform(low, high - low).cdf).statistic < NEAR
  found = log_ratio(schedule, weightings.log_uniform(schedule, 0.1, 10.0))
  law = stats.uniform(-np.log(10), 2 * np.log(10))
  assert stats.kstest(found, law.cdf).statistic < NEAR


@ON_EVERY_SCHEDULE
def test_uniform_is_of_time(schedule):
  quantiles = weightings.independent(jax.random.key(7), NUM)
  t = weightings.uniform(schedule)(quantiles) / schedule.max_time
  assert stats.kstest(np.asarray(t), "uniform").statistic < FAR
  t = weightings.uniform(schedule, start=0.5, end=0.2)(quantiles)
  assert stats.kstest(np.asarray(t), stats.uniform(0.2, 0.3).cdf).statistic < FAR
