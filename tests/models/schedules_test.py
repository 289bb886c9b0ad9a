"""Noise schedules: their inverses, their ends, and their papers' formulas computed another way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.models import schedules

CHAIN = schedules.from_betas(schedules.linear_betas())
ZERO_TERMINAL = schedules.from_betas(schedules.zero_terminal_snr(schedules.scaled_linear_betas()))

EVERY = {
  "variance_exploding": schedules.variance_exploding(),
  "rectified_flow": schedules.rectified_flow(),
  "trigonometric": schedules.trigonometric(),
  "linear": schedules.linear(),
  "cosine": schedules.cosine(),
  "sigmoid": schedules.sigmoid(),
  "lopsided_sigmoid": schedules.sigmoid(0.0, 3.0, 0.7),
  "chain": CHAIN,
  "cosine_chain": schedules.from_betas(schedules.cosine_betas()),
  "zero_terminal_chain": ZERO_TERMINAL,
  "shifted_linear": schedules.shifted(schedules.linear(), 3.0),
  "shifted_cosine": schedules.shifted(schedules.cosine(), 2.0),
  "shifted_chain": schedules.shifted(ZERO_TERMINAL, 0.5),
}
VARIANCE_PRESERVING = sorted(set(EVERY) - {"variance_exploding", "rectified_flow"})
NO_SIGNAL_LEFT = [
  "rectified_flow",
  "trigonometric",
  "cosine",
  "sigmoid",
  "lopsided_sigmoid",
  "zero_terminal_chain",
  "shifted_cosine",
  "shifted_chain",
]


def times_of(schedule):
  """Dense, and near both ends."""
  near = np.geomspace(1e-4, 0.5, 60)
  return schedule.max_time * np.concatenate([near, np.linspace(0.51, 0.999, 60)])


@pytest.mark.parametrize("name", EVERY)
def test_time_is_the_inverse_of_lambda(name):
  schedule, t = EVERY[name], times_of(EVERY[name])
  np.testing.assert_allclose(
    schedule.time(schedules.half_log_snr(schedule, t)), t, rtol=1e-11, atol=0
  )
  half_log_snr = np.linspace(*schedules.half_log_snr(schedule, t[[-1, 0]]), 97)
  back = schedules.half_log_snr(schedule, schedule.time(half_log_snr))
  np.testing.assert_allclose(back, half_log_snr, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", EVERY)
def test_time_is_the_inverse_of_lambda_in_float32_inside_jit(name):
  schedule = EVERY[name]
  t = jnp.asarray(times_of(schedule), jnp.float32)
  half_log_snr = jax.jit(lambda t: schedules.half_log_snr(schedule, t))(t)
  expected = schedules.half_log_snr(schedule, np.asarray(t, np.float64))
  np.testing.assert_allclose(half_log_snr, expected, rtol=0, atol=3e-5)
  back = jax.jit(schedule.time)(half_log_snr)
  assert half_log_snr.dtype == back.dtype == jnp.float32
  np.testing.assert_allclose(back, t, rtol=3e-6, atol=0)


@pytest.mark.parametrize("name", EVERY)
def test_alpha_and_sigma_in_float32_are_those_of_float64(name):
  schedule = EVERY[name]
  t = jnp.asarray([0.0, *times_of(schedule), schedule.max_time], jnp.float32)
  for part in (schedule.alpha, schedule.sigma):
    out = jax.jit(part)(t)
    assert out.dtype == jnp.float32
    expected = part(np.asarray(t, np.float64))
    np.testing.assert_allclose(out, expected, rtol=5e-6, atol=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_signal_falls_and_noise_rises(name):
  schedule = EVERY[name]
  t = np.linspace(0, schedule.max_time, 2003)
  assert np.all(np.diff(schedule.alpha(t)) <= 0) and np.all(np.diff(schedule.sigma(t)) >= 0)
  assert np.all(np.diff(schedules.half_log_snr(schedule, t[1:-1])) < 0)


@pytest.mark.parametrize("name", EVERY)
def test_at_time_zero_there_is_data(name):
  schedule = EVERY[name]
  for zero in (0, 0.0, np.float64(0), jnp.float32(0)):
    assert schedule.alpha(zero) == pytest.approx(1, abs=1e-7) and schedule.sigma(zero) == 0
    assert schedules.half_log_snr(schedule, zero) == np.inf
  for end in (np.inf, jnp.float32(np.inf)):
    assert schedule.time(end) == 0


@pytest.mark.parametrize("name", NO_SIGNAL_LEFT)
def test_at_the_last_time_no_signal_is_left(name):
  schedule = EVERY[name]
  last = schedule.max_time
  assert schedule.alpha(last) == 0 and schedule.sigma(last) == pytest.approx(1, abs=1e-14)
  assert schedules.half_log_snr(schedule, last) == -np.inf
  assert schedule.time(-np.inf) == pytest.approx(last, rel=1e-14)


@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
def test_variance_is_preserved(name):
  schedule = EVERY[name]
  t = np.linspace(0, schedule.max_time, 101)
  np.testing.assert_allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, 1, rtol=1e-13)


def test_host_times_give_float64_of_their_shape():
  for schedule in EVERY.values():
    t = np.full((2, 3), 0.3 * schedule.max_time, np.float32)
    for part in (schedule.alpha, schedule.sigma, schedule.time):
      out = part(t)
      assert isinstance(out, np.ndarray) and out.dtype == np.float64 and out.shape == (2, 3)


@pytest.mark.parametrize(
  "name, t, alpha, sigma",
  [
    ("variance_exploding", 7.0, 1, 7),
    ("rectified_flow", 0.25, 0.75, 0.25),
    ("trigonometric", 1 / 3, 0.75**0.5, 0.5),
    ("sigmoid", 0.5, 0.5**0.5, 0.5**0.5),  # by its symmetry
  ],
)
def test_values_by_hand(name, t, alpha, sigma):
  assert EVERY[name].alpha(t) == pytest.approx(alpha, rel=1e-14)
  assert EVERY[name].sigma(t) == pytest.approx(sigma, rel=1e-14)


def test_linear_integrates_beta():
  t = np.linspace(0, 0.7, 7001)
  beta = 0.1 + t * (20 - 0.1)
  integral = np.sum((beta[1:] + beta[:-1]) / 2 * np.diff(t))
  assert schedules.linear().alpha(0.7) == pytest.approx(np.exp(-integral / 2), rel=1e-12)


def test_cosine_is_the_ratio_of_squared_cosines():
  square = lambda t: np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
  t = np.linspace(0, 1, 11)
  np.testing.assert_allclose(
    schedules.cosine().alpha(t) ** 2, square(t) / square(0.0), rtol=1e-12, atol=1e-30
  )


@pytest.mark.parametrize("start, end, temperature", [(-3.0, 3.0, 1.0), (0.0, 3.0, 0.7)])
def test_sigmoid_is_a_logistic_function_scaled_to_its_ends(start, end, temperature):
  logistic = lambda t: 1 / (1 + np.exp(-(start + t * (end - start)) / temperature))
  t = np.linspace(0, 1, 11)
  expected = (logistic(1.0) - logistic(t)) / (logistic(1.0) - logistic(0.0))
  schedule = schedules.sigmoid(start, end, temperature)
  np.testing.assert_allclose(schedule.alpha(t) ** 2, expected, rtol=1e-12, atol=1e-15)


BETAS = {
  "linear": schedules.linear_betas(),
  "scaled_linear": schedules.scaled_linear_betas(),
  "cosine": schedules.cosine_betas(),
  "sigmoid": schedules.sigmoid_betas(),
  "zero_terminal": schedules.zero_terminal_snr(schedules.linear_betas(50)),
  "two": np.array([0.1, 0.6]),
}


@pytest.mark.parametrize("name", BETAS)
def test_a_chain_is_the_cumulative_product_at_whole_times(name):
  schedule = schedules.from_betas(BETAS[name])
  assert schedule.max_time == len(BETAS[name])
  square, expected = 1.0, [1.0]
  for beta in BETAS[name]:
    square *= 1 - beta
    expected.append(square)
  t = np.arange(len(expected))
  np.testing.assert_allclose(schedule.alpha(t) ** 2, expected, rtol=1e-11, atol=0)
  np.testing.assert_allclose(schedule.sigma(t) ** 2, 1 - np.array(expected), rtol=1e-9, atol=1e-14)


def test_between_whole_times_a_chain_is_straight_in_lambda_and_at_its_ends_in_the_ratios():
  betas = schedules.zero_terminal_snr(np.array([0.1, 0.2, 0.4, 0.5]))
  schedule = schedules.from_betas(betas)
  half_log_snr = lambda t: schedules.half_log_snr(schedule, t)
  assert half_log_snr(1.25) == pytest.approx(0.75 * half_log_snr(1.0) + 0.25 * half_log_snr(2.0))
  rho = lambda t: schedule.sigma(t) / schedule.alpha(t)
  assert rho(0.3) == pytest.approx(0.3 * rho(1.0), rel=1e-13)
  assert 1 / rho(3.7) == pytest.approx(0.3 / rho(3.0), rel=1e-13)


def test_betas_by_hand():
  np.testing.assert_allclose(schedules.linear_betas(3, 0.1, 0.3), [0.1, 0.2, 0.3], rtol=1e-14)
  np.testing.assert_allclose(
    schedules.scaled_linear_betas(3, 0.01, 0.09), [0.01, 0.04, 0.09], rtol=1e-14
  )
  sigmoid = schedules.sigmoid_betas(7, 0.1, 0.5)
  np.testing.assert_allclose(sigmoid + sigmoid[::-1], 0.6, rtol=1e-14)  # odd about its middle
  assert sigmoid[0] == pytest.approx(0.1 + 0.4 / (1 + np.exp(6)), rel=1e-14)


def test_cosine_betas_follow_the_cosine_until_the_cap():
  betas = schedules.cosine_betas(100, cap=0.9)
  assert betas.shape == (100,) and betas[-1] == 0.9 and np.sum(betas == 0.9) < 5
  alpha = schedules.from_betas(betas).alpha(np.arange(101))
  np.testing.assert_allclose(alpha[:95], schedules.cosine().alpha(np.arange(95) / 100), rtol=1e-11)


@pytest.mark.parametrize("betas", [schedules.linear_betas(), schedules.scaled_linear_betas(7)])
def test_zero_terminal_snr_keeps_the_first_alpha_and_spaces_the_others_alike(betas):
  before = schedules.from_betas(betas).alpha(np.arange(1, len(betas) + 1))
  rescaled = schedules.zero_terminal_snr(betas)
  after = schedules.from_betas(rescaled).alpha(np.arange(1, len(betas) + 1))
  assert rescaled[-1] == 1 and after[-1] == 0
  assert after[0] == pytest.approx(before[0], rel=1e-14)
  ratios = np.diff(after) / np.diff(before)
  np.testing.assert_allclose(ratios, ratios[0], rtol=1e-8)


@pytest.mark.parametrize("name", ["rectified_flow", "linear", "cosine", "zero_terminal_chain"])
@pytest.mark.parametrize("shift", [0.4, 3.0])
def test_shifted_has_the_noise_ratio_times_the_shift(name, shift):
  schedule, t = EVERY[name], times_of(EVERY[name])
  moved = schedules.shifted(schedule, shift)
  ratio = moved.sigma(t) / moved.alpha(t)
  np.testing.assert_allclose(ratio, shift * schedule.sigma(t) / schedule.alpha(t), rtol=1e-9)


def test_shifts_undo_each_other_and_one_changes_nothing():
  schedule, t = schedules.cosine(), np.linspace(0, 1, 21)
  for same in (
    schedules.shifted(schedule, 1.0),
    schedules.shifted(schedules.shifted(schedule, 3.0), 1 / 3),
  ):
    np.testing.assert_allclose(same.alpha(t), schedule.alpha(t), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(same.sigma(t), schedule.sigma(t), rtol=1e-12, atol=1e-15)
    half_log_snr = np.linspace(-5, 5, 11)
    np.testing.assert_allclose(same.time(half_log_snr), schedule.time(half_log_snr), rtol=1e-12)


def test_shifted_rectified_flow_moves_time_along_a_hyperbola():
  t, k = np.linspace(0, 1, 11), 3.0
  moved = schedules.shifted(schedules.rectified_flow(), k)
  np.testing.assert_allclose(moved.sigma(t), k * t / (1 + (k - 1) * t), rtol=1e-13, atol=0)
  np.testing.assert_allclose(moved.alpha(t), (1 - t) / (1 + (k - 1) * t), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("betas", [[], [0.1], [0.0, 0.1], [0.1, -0.1], [1.0, 0.1], [0.1, 1.1]])
def test_a_chain_of_impossible_betas_is_refused(betas):
  with pytest.raises(ValueError, match="betas"):
    schedules.from_betas(betas)


@pytest.mark.parametrize("shift", [0.0, -2.0, float("nan")])
def test_an_impossible_shift_is_refused(shift):
  with pytest.raises(ValueError, match="shift"):
    schedules.shifted(schedules.rectified_flow(), shift)


def test_a_shift_beyond_the_end_of_a_chain_is_refused():
  chain = schedules.from_betas(schedules.linear_betas())
  with pytest.raises(ValueError, match="does not reach"):
    schedules.shifted(chain, 3.0)
