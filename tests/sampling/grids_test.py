"""Grids of times: lists by hand, closed forms, and every path there is."""

import itertools

import numpy as np
import pytest
import scipy.stats

from ancestral.models import schedules
from ancestral.sampling import grids

VE = schedules.variance_exploding()
FLOW = schedules.rectified_flow()
LINEAR = schedules.linear()
CHAIN = schedules.from_betas(schedules.linear_betas())
SCHEDULES = {
  "variance_exploding": VE,
  "rectified_flow": FLOW,
  "linear": LINEAR,
  "cosine": schedules.cosine(),
  "chain": CHAIN,
}
GRIDS = {
  "uniform": grids.uniform,
  "power": grids.power,
  "beta": grids.beta,
  "log_snr": grids.log_snr,
  "polyexponential": lambda *args, **kw: grids.polyexponential(*args, exponent=2.0, **kw),
  "karras": grids.karras,
}


@pytest.mark.parametrize("num_steps", [1, 2, 3, 1000])
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("of", SCHEDULES)
def test_every_grid_falls_from_start_to_end(of, name, num_steps):
  schedule = SCHEDULES[of]
  start, end = 0.99 * schedule.max_time, 1e-3 * schedule.max_time
  times = GRIDS[name](schedule, num_steps, start=start, end=end)
  assert times.shape == (num_steps + 1,) and times.dtype == np.float64
  assert times[0] == start and times[-1] == end and np.all(np.diff(times) < 0)


@pytest.mark.parametrize("name", GRIDS)
def test_of_no_steps_the_start_is_left_and_to_zero_is_one_step(name):
  times = GRIDS[name](VE, 0, end=0.1)
  np.testing.assert_array_equal(times, [80.0])
  np.testing.assert_array_equal(grids.to_zero(times), [80.0, 0.0])


@pytest.mark.parametrize("name", GRIDS)
def test_the_start_is_the_schedules_last_time_by_default(name):
  assert GRIDS[name](LINEAR, 4, end=0.01)[0] == 1


@pytest.mark.parametrize("name", ["uniform", "power", "beta"])
def test_grids_in_time_can_end_at_zero_and_start_without_signal(name):
  times = GRIDS[name](FLOW, 5, end=0)
  assert times[0] == 1 and times[-1] == 0 and np.all(np.diff(times) < 0)


@pytest.mark.parametrize("name", ["log_snr", "polyexponential", "karras"])
@pytest.mark.parametrize("ends", [{"end": 0.0, "start": 0.9}, {"end": 0.1}])
def test_grids_in_lambda_need_signal_and_noise(name, ends):
  with pytest.raises(ValueError, match="infinite"):
    GRIDS[name](FLOW, 5, **ends)


def test_lists_by_hand():
  np.testing.assert_allclose(grids.uniform(FLOW, 4, end=0.2), [1, 0.8, 0.6, 0.4, 0.2], rtol=1e-15)
  np.testing.assert_allclose(grids.power(FLOW, 4, end=0), np.array([16, 9, 4, 1, 0]) / 16)
  np.testing.assert_allclose(
    grids.power(VE, 2, start=27, end=1, exponent=3.0), [27, 8, 1], rtol=1e-14
  )
  np.testing.assert_allclose(grids.log_snr(VE, 3, start=8, end=1), [8, 4, 2, 1], rtol=1e-14)
  np.testing.assert_allclose(  # noise ratios 9, 3, 1 are times 9/10, 3/4, 1/2
    grids.log_snr(FLOW, 2, start=0.9, end=0.5), [0.9, 0.75, 0.5], rtol=1e-14
  )
  np.testing.assert_allclose(
    grids.polyexponential(VE, 2, start=16, end=1, exponent=2.0), [16, 2, 1], rtol=1e-14
  )
  np.testing.assert_allclose(
    grids.karras(VE, 2, start=0.03**7, end=0.01**7, rho=7),
    np.array([0.03, 0.02, 0.01]) ** 7,
    rtol=1e-13,
  )
  np.testing.assert_allclose(  # ratios 9, 4, 1
    grids.karras(FLOW, 2, start=0.9, end=0.5, rho=2), [0.9, 0.8, 0.5], rtol=1e-14
  )


def test_karras_of_sigma_is_a_power_of_time():
  np.testing.assert_allclose(
    grids.karras(VE, 17, end=0.002), grids.power(VE, 17, end=0.002, exponent=7.0), rtol=1e-12
  )


def test_one_is_the_exponent_that_changes_nothing():
  ends = {"start": 0.9, "end": 0.01}
  np.testing.assert_allclose(
    grids.power(LINEAR, 9, exponent=1.0, **ends), grids.uniform(LINEAR, 9, **ends), rtol=1e-14
  )
  np.testing.assert_allclose(
    grids.polyexponential(LINEAR, 9, exponent=1.0, **ends),
    grids.log_snr(LINEAR, 9, **ends),
    rtol=1e-14,
  )
  np.testing.assert_allclose(
    grids.beta(LINEAR, 9, a=1.0, b=1.0, **ends), grids.uniform(LINEAR, 9, **ends), rtol=1e-13
  )


def test_exponential_grids_are_those_of_log_snr():
  for schedule in (VE, LINEAR, CHAIN):
    times = grids.log_snr(schedule, 8, end=0.01)
    ratio = schedule.sigma(times) / schedule.alpha(times)
    np.testing.assert_allclose(ratio[1:] / ratio[:-1], ratio[1] / ratio[0], rtol=1e-9)


def test_beta_has_its_quantiles():
  levels = np.linspace(1, 0, 12)
  arcsine = 0.1 + 0.9 * np.sin(np.pi / 2 * levels) ** 2  # of Beta(1/2, 1/2)
  np.testing.assert_allclose(grids.beta(FLOW, 11, end=0.1, a=0.5, b=0.5), arcsine, rtol=1e-12)
  times = grids.beta(FLOW, 11, end=0, a=0.6, b=0.9)
  np.testing.assert_allclose(scipy.stats.beta(0.6, 0.9).cdf(times), levels, rtol=0, atol=1e-12)
  falls = -np.diff(grids.beta(FLOW, 10, end=0))
  np.testing.assert_allclose(falls, falls[::-1], rtol=1e-10)
  assert falls[0] < falls[4]


def test_spacings_of_a_chain_are_those_of_the_table():
  np.testing.assert_array_equal(grids.leading(CHAIN, 10), [*range(901, 0, -100), 0])
  np.testing.assert_array_equal(
    grids.linspace(CHAIN, 10), [1000, 889, 778, 667, 556, 445, 334, 223, 112, 1, 0]
  )
  np.testing.assert_array_equal(grids.trailing(CHAIN, 10), [*range(1000, 0, -100), 0])


def test_spacings_of_a_chain_that_do_not_divide_it():
  np.testing.assert_array_equal(grids.leading(CHAIN, 3, offset=1, end=1), [668, 335, 2, 1])
  np.testing.assert_array_equal(grids.trailing(CHAIN, 3, end=1), [1000, 667, 333, 1])
  np.testing.assert_array_equal(grids.linspace(CHAIN, 4), [1000, 667, 334, 1, 0])


@pytest.mark.parametrize("spacing", [grids.leading, grids.trailing, grids.linspace])
def test_spacings_of_a_chain_fall_for_every_number_of_steps(spacing):
  chain = schedules.from_betas(schedules.linear_betas(97))
  for n in range(1, 98):
    times = spacing(chain, n)
    assert times.shape == (n + 1,) and np.all(np.diff(times) < 0)
    np.testing.assert_array_equal(times, np.rint(times))
  np.testing.assert_array_equal(spacing(chain, 97), np.arange(97, -1, -1))
  for n in (0, 98):
    with pytest.raises(ValueError, match="num_steps"):
      spacing(chain, n)


def test_spacings_are_of_chains_and_within_them():
  assert grids.trailing(CHAIN, 1)[0] == grids.linspace(CHAIN, 1)[0] == 1000
  with pytest.raises(ValueError, match="num_steps"):
    grids.trailing(schedules.variance_exploding(80.5), 4)
  with pytest.raises(ValueError, match="within"):
    grids.leading(CHAIN, 10, offset=100)
  with pytest.raises(ValueError, match="fall"):
    grids.linspace(CHAIN, 10, end=1)


def test_given_times_are_as_given():
  np.testing.assert_array_equal(grids.given(FLOW, (1, 0.3, 0)), [1.0, 0.3, 0.0])
  np.testing.assert_array_equal(grids.given(FLOW, [0.1, 0.3]), [0.1, 0.3])


@pytest.mark.parametrize("times", [[0.5], [0.5, 0.5], [0.5, 0.2, 0.3], [1.5, 0.2], [0.0, 0.5]])
def test_impossible_times_are_refused(times):
  with pytest.raises(ValueError, match="time"):
    grids.given(FLOW, times)


def test_to_zero_adds_one_step():
  np.testing.assert_array_equal(grids.to_zero(np.array([0.9, 0.2])), [0.9, 0.2, 0.0])
  for times in ([0.9, 0.0], [0.2, 0.9]):
    with pytest.raises(ValueError, match="last time"):
      grids.to_zero(np.array(times))


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize(
  "arguments", [{"end": -0.1}, {"end": 0.5, "start": 0.5}, {"end": 0.1, "start": 1.1}]
)
def test_impossible_ends_are_refused(name, arguments):
  with pytest.raises(ValueError, match="start"):
    GRIDS[name](FLOW, 3, **arguments)


@pytest.mark.parametrize("name", GRIDS)
def test_a_negative_number_of_steps_is_refused(name):
  with pytest.raises(ValueError, match="num_steps"):
    GRIDS[name](LINEAR, -1, end=0.1)


def test_exponents_have_to_be_above_zero():
  for make in (
    lambda: grids.power(LINEAR, 3, end=0.1, exponent=0.0),
    lambda: grids.karras(LINEAR, 3, end=0.1, rho=-1.0),
    lambda: grids.polyexponential(LINEAR, 3, end=0.1, exponent=0.0),
    lambda: grids.beta(LINEAR, 3, end=0.1, a=0.0),
    lambda: grids.beta(LINEAR, 3, end=0.1, b=-1.0),
    lambda: grids.shifted(LINEAR, np.array([0.5, 0.1]), 0.0),
  ):
    with pytest.raises(ValueError, match="above 0"):
      make()


def test_a_shifted_flow_follows_the_hyperbola():
  t, k = grids.uniform(FLOW, 4, end=0), 3.0
  moved = grids.shifted(FLOW, t, k)
  np.testing.assert_allclose(moved, k * t / (1 + (k - 1) * t), rtol=1e-14, atol=0)
  assert moved[0] == 1 and moved[-1] == 0  # where there is no signal, and no noise
  # Once, not twice: its four steps end at 3/4 -> 9/10, 1/2 -> 3/4, 1/4 -> 1/2.
  np.testing.assert_allclose(moved, [1, 0.9, 0.75, 0.5, 0], rtol=1e-14)


@pytest.mark.parametrize("schedule", [VE, LINEAR, CHAIN, schedules.cosine()])
def test_a_shift_multiplies_the_noise_ratio_and_is_undone_by_its_inverse(schedule):
  t = schedule.max_time * np.array([0.5, 0.2, 0.1, 0.0])
  ratio = lambda t: schedule.sigma(t) / schedule.alpha(t)
  moved = grids.shifted(schedule, t, 1.5)
  np.testing.assert_allclose(ratio(moved), 1.5 * ratio(t), rtol=1e-9)
  np.testing.assert_allclose(grids.shifted(schedule, moved, 1 / 1.5), t, rtol=1e-9)
  whole = grids.uniform(schedule, 7, end=0)
  np.testing.assert_allclose(grids.shifted(schedule, whole, 1.0), whole, rtol=1e-9)


@pytest.mark.parametrize("schedule", [VE, LINEAR, CHAIN])
def test_a_shift_beyond_the_last_time_is_refused(schedule):
  with pytest.raises(ValueError, match="beyond"):
    grids.shifted(schedule, grids.uniform(schedule, 4, end=0), 1.5)


def test_stretched_reaches_its_end_and_keeps_its_start():
  np.testing.assert_allclose(
    grids.stretched(np.array([1.0, 0.8, 0.5]), 0.1), [1, 0.64, 0.1], rtol=1e-14
  )
  np.testing.assert_allclose(grids.stretched(np.array([0.1, 0.2, 0.4]), 0.7), [0.1, 0.3, 0.7])
  for end in (1.0, 1.5):
    with pytest.raises(ValueError, match="end"):
      grids.stretched(np.array([1.0, 0.8, 0.5]), end)


def test_resampled_interpolates_lambda():
  np.testing.assert_allclose(grids.resampled(VE, [64, 4, 1], 4), [64, 16, 4, 2, 1], rtol=1e-14)
  np.testing.assert_allclose(grids.resampled(VE, [64, 4, 1, 0], 5), [64, 16, 4, 2, 1, 0])
  times = grids.karras(LINEAR, 6, end=0.01)
  np.testing.assert_allclose(grids.resampled(LINEAR, times, 6), times, rtol=1e-12)
  np.testing.assert_array_equal(grids.resampled(VE, [64, 0], 1), [64, 0])
  np.testing.assert_array_equal(grids.resampled(VE, [1, 4, 64], 1), [1, 64])
  with pytest.raises(ValueError, match="num_steps"):
    grids.resampled(VE, [64, 0], 0)
  with pytest.raises(ValueError, match="infinite"):
    grids.resampled(FLOW, [1, 0.5, 0.1], 4)


def gaussian_teacher(schedule, times, num=5, variance=0.3, mean=0.7):
  """Exact trajectories of N(mean, variance) data, which are of constant z, and their E[x_0 | x]."""
  z = np.random.default_rng(0).normal(size=(1, num, 2, 3))
  alpha, sigma = (part(times)[:, None, None, None] for part in (schedule.alpha, schedule.sigma))
  total = alpha**2 * variance + sigma**2
  states = alpha * mean + np.sqrt(total) * z
  return states, mean + alpha * variance / total * (states - alpha * mean)


@pytest.mark.parametrize("schedule", [VE, FLOW, LINEAR])
def test_local_errors_are_what_a_step_misses(schedule):
  times = grids.to_zero(grids.uniform(schedule, 5, end=0.1))
  states, denoised = gaussian_teacher(schedule, times)
  costs = grids.local_errors(schedule, times, states, denoised[:-1])
  assert costs.shape == (7, 7)
  for i, j in itertools.product(range(7), repeat=2):
    if j <= i:
      assert costs[i, j] == np.inf
      continue
    a, s = schedule.alpha(times), schedule.sigma(times)
    noise = (states[i] - a[i] * denoised[i]) / s[i]
    missed = (a[j] * denoised[i] + s[j] * noise - states[j]) / a[j]
    expected = np.mean([np.sqrt(np.sum(row**2)) for row in missed])
    assert costs[i, j] == pytest.approx(expected, rel=1e-9)
  np.testing.assert_allclose(costs, grids.local_errors(schedule, times, states, denoised))


def test_local_errors_do_not_depend_on_the_schedule():
  """They are of x / alpha at the same noise ratios."""
  times = grids.log_snr(VE, 6, start=4.0, end=0.1)
  same = LINEAR.time(-np.log(times))
  np.testing.assert_allclose(
    grids.local_errors(VE, times, *gaussian_teacher(VE, times)),
    grids.local_errors(LINEAR, same, *gaussian_teacher(LINEAR, same)),
    rtol=1e-9,
  )


def test_local_errors_need_a_state_at_every_time():
  times = grids.uniform(VE, 3, end=0.1)
  states, denoised = gaussian_teacher(VE, times)
  for wrong in ((states[1:], denoised), (states, denoised[:2])):
    with pytest.raises(ValueError, match="match"):
      grids.local_errors(VE, times, *wrong)


@pytest.mark.parametrize("gamma", [1.0, 1.15, 0.5])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 7])
def test_dynamic_programming_finds_the_cheapest_of_all_paths(num_steps, gamma):
  costs = np.random.default_rng(num_steps).exponential(size=(8, 8))
  total = lambda path: sum(
    gamma**k * costs[i, j] for k, (i, j) in enumerate(itertools.pairwise(path))
  )
  paths = [(0, *inner, 7) for inner in itertools.combinations(range(1, 7), num_steps - 1)]
  found = grids.dynamic_programming(costs, num_steps, gamma=gamma)
  assert tuple(found) in paths
  assert total(found) == pytest.approx(min(map(total, paths)), rel=1e-12)


def test_dynamic_programming_lowers_the_error_at_the_end():
  """A grid made for the trajectory beats the uniform one of as many DDIM steps."""
  fine = grids.to_zero(grids.uniform(LINEAR, 60, end=0.002))
  states, denoised = gaussian_teacher(LINEAR, fine, variance=0.01)
  costs = grids.local_errors(LINEAR, fine, states, denoised)

  def error(times):
    x, alpha, sigma = states[0], LINEAR.alpha(times), LINEAR.sigma(times)
    for i in range(len(times) - 1):
      total = alpha[i] ** 2 * 0.01 + sigma[i] ** 2
      clean = 0.7 + alpha[i] * 0.01 / total * (x - alpha[i] * 0.7)
      x = alpha[i + 1] * clean + sigma[i + 1] * (x - alpha[i] * clean) / sigma[i]
    return np.sqrt(np.mean((x - states[-1]) ** 2))

  found = fine[grids.dynamic_programming(costs, 6)]
  assert error(found) < 0.5 * error(grids.uniform(LINEAR, 6, end=0))


@pytest.mark.parametrize("num_steps", [0, 5])
def test_dynamic_programming_needs_enough_times(num_steps):
  with pytest.raises(ValueError, match="num_steps"):
    grids.dynamic_programming(np.ones((5, 5)), num_steps)
