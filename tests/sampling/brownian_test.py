"""Noise of one path: its covariances exactly, its law by draws, its sums across grids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.models import schedules
from ancestral.sampling import base, brownian, grids

VE = schedules.variance_exploding()
LINEAR = schedules.linear()
FLOW = schedules.rectified_flow()


def coefficients(clock, bits=20):
  """Of every step, its weights by name."""
  nodes, weights, counts = brownian.increments(clock, bits)
  return [
    dict(zip(row[:count].tolist(), weight[:count], strict=True))
    for row, weight, count in zip(nodes, weights, counts, strict=True)
  ]


def covariance(one, other):
  """Of the steps' numbers, [n, m], the nodes being independent and standard."""
  return np.array([[sum(w * b.get(h, 0) for h, w in a.items()) for b in other] for a in one])


def overlap(one, other):
  """|I and J| / sqrt(|I| |J|) for the steps I, J of two rising clocks: that of a Brownian path."""
  low = np.maximum(one[:-1, None], other[None, :-1])
  high = np.minimum(one[1:, None], other[None, 1:])
  return np.maximum(high - low, 0) / np.sqrt(np.diff(one)[:, None] * np.diff(other)[None])


CLOCKS = {
  "within an octave": np.array([1.0, 1.125, 1.5, 1.6875, 1.75]),
  "across octaves": np.array([0.3125, 0.5, 3.0, 3.5, 40.0, 1000.0]),
  "eight orders": 10.0 ** np.arange(-4.0, 5.0, 0.5),
  "from zero": np.array([0.0, 1e-3, 1.0, 1.75]),
  "karras": brownian.clock(VE, grids.karras(VE, 30, end=0.002)),
  "flow": brownian.clock(FLOW, grids.uniform(FLOW, 30, end=0.01)),
}


@pytest.mark.parametrize("name", CLOCKS)
@pytest.mark.parametrize("other", CLOCKS)
def test_steps_of_any_two_clocks_have_the_covariance_of_one_path(name, other):
  out = covariance(coefficients(CLOCKS[name]), coefficients(CLOCKS[other]))
  np.testing.assert_allclose(out, overlap(CLOCKS[name], CLOCKS[other]), rtol=0, atol=3e-6)


@pytest.mark.parametrize("bits", [6, 20, 24])
@pytest.mark.parametrize("name", ["across octaves", "eight orders", "karras"])
def test_steps_are_standard_and_independent_to_the_last_bit(name, bits):
  steps = coefficients(CLOCKS[name], bits)
  np.testing.assert_allclose(covariance(steps, steps), np.eye(len(steps)), atol=1e-14)


def test_names_are_no_step_numbers():
  extremes = np.array([0.0, 1e-30, 1e-30, 1.0, 1.9 * 2.0**126, np.inf])
  nodes, weights, counts = brownian.increments(extremes, 24)
  names = np.concatenate([row[:count] for row, count in zip(nodes, counts, strict=True)])
  assert names.min() == 2**24 - 1 and names.max() < 2**32 - 2**24
  assert weights.shape == nodes.shape and np.all(weights[nodes == 0] == 0)


def test_the_path_does_not_depend_on_the_bits():
  clock = CLOCKS["karras"]
  out = covariance(coefficients(clock, 14), coefficients(clock, 24))
  np.testing.assert_allclose(out, np.eye(len(out)), atol=2e-3)


def test_cost_is_two_numbers_a_bit():
  for num_steps in (10, 100, 1000):
    clock = brownian.clock(VE, grids.log_snr(VE, num_steps, end=0.002))
    assert np.mean(brownian.increments(clock, 20).counts) < 40


def draws(clock, num_rows=64, size=256, seed=0, **kwargs):
  """z of every step, [n, num_rows * size]."""
  noise = brownian.brownian(targets.keys_of(range(num_rows), seed), clock, **kwargs)
  x, n = jnp.zeros((num_rows, size)), len(clock) - 1
  one = lambda step: noise(None, jnp.full(num_rows, step), x)
  return np.asarray(jax.jit(lambda: jax.lax.map(one, jnp.arange(n)))()).reshape(n, -1)


def test_every_step_is_standard_normal_and_independent_of_the_others():
  clock = brownian.clock(LINEAR, grids.to_zero(grids.log_snr(LINEAR, 7, end=0.01)))
  assert clock[-1] == np.inf
  z = draws(clock).astype(np.float64)
  num = z.shape[1]
  assert np.all(np.isfinite(z))
  np.testing.assert_allclose(np.mean(z, axis=1), 0, atol=4 / num**0.5)
  second = z @ z.T / num
  error = np.where(np.eye(len(z)), 2**0.5, 1)  # of a square, and of a product
  assert np.all(np.abs(second - np.eye(len(z))) < 4 * error / num**0.5)
  np.testing.assert_allclose(np.mean(z**4, axis=1), 3, atol=4 * (96 / num) ** 0.5)
  level = np.mean(np.abs(z) < 1, axis=1)
  np.testing.assert_allclose(level, 0.682689, atol=4 * (0.22 / num) ** 0.5)


def test_rows_and_pixels_are_independent():
  z = draws(np.array([1.0, 2.0, 5.0]), num_rows=16, size=4096).reshape(2, 16, 4096)[1]
  of_rows, of_pixels = z @ z.T / 4096, np.mean(z[:, 1:] * z[:, :-1])
  off = of_rows[~np.eye(16, dtype=bool)]
  assert np.max(np.abs(off)) < 4.5 / 4096**0.5  # of 120
  assert np.abs(of_pixels) < 4 / z.size**0.5


@pytest.mark.parametrize("schedule, end", [(VE, 0.002), (FLOW, 0.001)])
def test_two_half_steps_make_the_noise_of_the_whole_step(schedule, end):
  """sigma_t exp(-lambda_t) (W - W), and what the second step makes of the noise before it."""
  fine = grids.log_snr(schedule, 32, start=0.99 * schedule.max_time, end=end)
  fine = grids.to_zero(fine[:-1])
  sigma, lam = schedule.sigma(fine), schedules.half_log_snr(schedule, fine)

  def noise(index):
    z = draws(brownian.clock(schedule, fine[index]), num_rows=2, size=8)
    s, t = index[:-1], index[1:]
    return sigma[t, None] * np.sqrt(-np.expm1(-2 * (lam[t] - lam[s])))[:, None] * z

  halves, whole = noise(np.arange(33)), noise(np.arange(0, 33, 2))
  s, t = np.arange(1, 32, 2), np.arange(2, 33, 2)
  shrunk = sigma[t] / sigma[s] * np.exp(lam[s] - lam[t])
  total = shrunk[:, None] * halves[::2] + halves[1::2]
  assert np.all(whole[-1] == 0) and np.all(np.isfinite(halves))
  scale = sigma[t, None] + (sigma[t, None] == 0)
  np.testing.assert_allclose(total / scale, whole / scale, rtol=0, atol=1e-5)


def test_a_sampler_converges_to_one_sample():
  """Of N(0, 1/4) data: one path's steps refine a sample, another path leads to another."""
  begin = 4.0 * np.random.default_rng(0).normal(size=128)

  def sample(num_steps):  # by the paths of two keys, from one start
    times = grids.log_snr(VE, num_steps, start=4.0, end=0.05)
    z = draws(brownian.clock(VE, times), num_rows=2, size=128).reshape(num_steps, 2, 128)
    x = np.stack([begin, begin])
    for i in range(num_steps):
      ratio = times[i + 1] / times[i]
      clean = 0.25 / (0.25 + times[i] ** 2) * x
      x = ratio**2 * x + (1 - ratio**2) * clean + times[i + 1] * np.sqrt(1 - ratio**2) * z[i]
    return x

  rms = lambda a, b: np.sqrt(np.mean((a - b) ** 2))
  finest = sample(200)
  errors = [rms(sample(n), finest) for n in (16, 64)]
  assert errors[1] < 0.3 * errors[0] and errors[1] < 0.03
  assert rms(finest[0], finest[1]) > 0.3


def test_a_falling_clock_goes_back_along_the_path():
  clock = CLOCKS["across octaves"]
  back = [{h: -w for h, w in step.items()} for step in coefficients(clock)[::-1]]
  assert coefficients(clock[::-1]) == back


def test_a_step_of_no_length_or_no_end_has_a_number_of_its_own():
  first, still, last, *out = coefficients(np.array([1.0, 2.0, 2.0, 3.0, np.inf, np.inf]))
  assert [first, last] == coefficients(np.array([1.0, 2.0, 3.0]))
  for step in (still, *out):
    assert list(step.values()) == [1] and not set(step) & (set(first) | set(last))


def test_a_row_depends_on_its_own_key_and_step_alone():
  clock = CLOCKS["karras"]
  keys, step, x = targets.keys_of(range(4)), jnp.array([0, 7, 7, 29]), jnp.zeros((4, 3, 5))

  @jax.jit
  def noise(keys, step_keys, step, x):
    return brownian.brownian(keys, clock)(step_keys, step, x)

  z = noise(keys, base.row_keys_at(keys, step), step, x)
  others = targets.keys_of(range(4), seed=9)
  np.testing.assert_array_equal(z, noise(keys, others, step, x))
  for row in range(4):
    alone = noise(targets.keys_of([row]), others, step[row : row + 1], x[:1] + 1)
    np.testing.assert_array_equal(z[row], alone[0])
  assert np.all(z != noise(others, keys, step, x)) and np.all(z[1] != z[2])


def test_a_scan_over_traced_steps_draws_what_single_steps_draw():
  clock, keys, x = CLOCKS["across octaves"], targets.keys_of(range(2)), jnp.zeros((2, 6))

  @jax.jit
  def scanned(keys):
    noise = brownian.brownian(keys, clock)
    step = lambda step, _: (step + 1, noise(None, step, x))
    return jax.lax.scan(step, jnp.zeros(2, jnp.int32), length=5)[1]

  noise = jax.jit(lambda step: brownian.brownian(keys, clock)(None, step, x))
  expected = [noise(jnp.full(2, i)) for i in range(5)]
  np.testing.assert_allclose(scanned(keys), expected, rtol=1e-6)


def test_noise_has_the_samples_dtype():
  noise = brownian.brownian(targets.keys_of([0]), np.array([1.0, 2.0]))
  with jax.enable_x64(True):
    for dtype in (jnp.bfloat16, jnp.float32, jnp.float64):
      z = jax.eval_shape(noise, None, jnp.zeros(1, jnp.int32), jnp.zeros((1, 2), dtype))
      assert z.dtype == dtype and z.shape == (1, 2)


def test_the_clock_is_a_power_of_the_signal_to_noise_ratio():
  np.testing.assert_allclose(
    brownian.clock(FLOW, np.array([0.75, 0.5, 0.25, 0.0])), [1 / 9, 1, 9, np.inf], rtol=1e-14
  )
  np.testing.assert_allclose(brownian.clock(FLOW, np.array([1.0, 0.25]), eta=0.5), [0, 3])


@pytest.mark.parametrize("eta", [0.0, -1.0, float("nan")])
def test_no_noise_has_no_clock(eta):
  with pytest.raises(ValueError, match="eta"):
    brownian.clock(VE, np.array([1.0, 0.5]), eta)


@pytest.mark.parametrize(
  "clock, message",
  [
    ([1.0], "n \\+ 1"),
    ([[1.0, 2.0]], "n \\+ 1"),
    ([-1.0, 2.0], "n \\+ 1"),
    ([1.0, float("nan")], "n \\+ 1"),
    ([1.0, 2.0**127], "n \\+ 1"),
    ([1.0, 2.0, 1.5], "throughout"),
    ([1.0, 1.0 + 2.0**-22], "too short"),
  ],
)
def test_impossible_clocks_are_refused(clock, message):
  with pytest.raises(ValueError, match=message):
    brownian.increments(np.array(clock))


@pytest.mark.parametrize("bits", [0, 25])
def test_impossible_bits_are_refused(bits):
  with pytest.raises(ValueError, match="bits"):
    brownian.brownian(targets.keys_of([0]), np.array([1.0, 2.0]), bits=bits)
