"""Mask schedules: their ends, their inverses, and rates against differences of alpha."""

import jax
import jax.numpy as jnp
import masked_cases
import numpy as np
import pytest

from ancestral.models import mask_schedules

SCHEDULES = {**masked_cases.SCHEDULES, "narrow": mask_schedules.geometric(0.1, 5.0)}
TIMES = np.linspace(0.02, 0.98, 49)


def _closed_form(name, t):
  """1 - alpha in float64."""
  t = np.asarray(t, np.float64)
  if name in ("geometric", "narrow"):
    least, most = (1e-5, 20.0) if name == "geometric" else (0.1, 5.0)
    noise = lambda t: -np.expm1(-(least ** (1 - t) * most**t))
    kept = lambda t: (1 - noise(t) - (1 - noise(1.0))) / (noise(1.0) - noise(0.0))
    return 1 - kept(t)
  power = {"linear": 1.0, "square": 2.0, "root": 0.5}
  return np.sin(np.pi * t / 2) if name == "cosine" else t ** power[name]


@pytest.mark.parametrize("name", SCHEDULES)
def test_alpha_is_its_closed_form_and_falls_from_one_to_zero(name):
  alpha = SCHEDULES[name].alpha
  np.testing.assert_allclose(alpha(TIMES), 1 - _closed_form(name, TIMES), atol=3e-7)
  np.testing.assert_allclose(alpha(jnp.array([0.0, 1.0])), [1, 0], atol=1e-7)
  assert np.all(np.diff(alpha(jnp.linspace(0, 1, 201))) <= 0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_rate_is_the_slope_of_the_logarithm_of_the_noise(name):
  step = 1e-5
  log_noise = lambda t: np.log(_closed_form(name, t))
  slope = (log_noise(TIMES + step) - log_noise(TIMES - step)) / (2 * step)
  np.testing.assert_allclose(SCHEDULES[name].rate(TIMES), slope, rtol=3e-5)
  # d alpha / dt of the schedule itself
  by_jax = jax.vmap(jax.grad(SCHEDULES[name].alpha))(jnp.asarray(TIMES, jnp.float32))
  noise = _closed_form(name, TIMES)
  np.testing.assert_allclose(-by_jax / noise, slope, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_are_not_negative_and_integrable_at_the_ends(name):
  rate = SCHEDULES[name].rate(jnp.array([2.0**-24, 1 - 2.0**-24, 1.0]))
  assert np.all(np.isfinite(rate)) and np.all(rate >= 0)
  power = {"square": 2.0, "root": 0.5}.get(name, 1.0)
  np.testing.assert_allclose(rate[0] * 2.0**-24, power, rtol=1e-5)  # as power / t


@pytest.mark.parametrize("name", SCHEDULES)
def test_time_is_the_inverse(name):
  schedule = SCHEDULES[name]
  kept = jnp.linspace(0, 1, 41)
  np.testing.assert_allclose(schedule.alpha(schedule.time(kept)), kept, atol=3e-6)
  np.testing.assert_allclose(schedule.time(jnp.array([1.0, 0.0])), [0, 1], atol=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_unmasking_in_steps_is_unmasking_at_once(name):
  schedule = SCHEDULES[name]
  times = jnp.linspace(1, 0, 9)
  prob = mask_schedules.unmask_prob(schedule, times[:-1], times[1:])
  assert np.all((prob >= 0) & (prob <= 1))
  np.testing.assert_allclose(prob[-1], 1)
  # Still masked after some steps is masked with probability 1 - alpha.
  np.testing.assert_allclose(np.cumprod(1 - prob), 1 - schedule.alpha(times[1:]), atol=3e-7)
  noise = _closed_form(name, np.array([0.7, 0.3]))
  one = mask_schedules.unmask_prob(schedule, jnp.float32(0.7), jnp.float32(0.3))
  np.testing.assert_allclose(one, 1 - noise[1] / noise[0], atol=1e-5)


def test_alpha_ends_at_zero_and_not_below():
  for least, most in ((1e-5, 20.0), (1e-3, 2.0), (0.1, 5.0)):
    assert 0 <= float(mask_schedules.geometric(least, most).alpha(1.0)) < 1e-6
  t = np.float32(1 - 1e-4)  # 1 - sin would have two digits left
  expected = 1 - np.sin(np.pi / 2 * np.float64(t))
  np.testing.assert_allclose(mask_schedules.cosine().alpha(t), expected, rtol=1e-3)


def test_nothing_stays_masked_where_alpha_rounds_to_one():
  schedule = mask_schedules.geometric()
  t = jnp.float32(1e-4)
  assert schedule.alpha(t) == 1
  assert mask_schedules.unmask_prob(schedule, t, jnp.float32(0)) == 1
  assert mask_schedules.unmask_prob(schedule, jnp.float32(0), jnp.float32(0)) == 1


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: mask_schedules.polynomial(0.0), "power=0.0"),
    (lambda: mask_schedules.geometric(0.0), "least=0.0"),
    (lambda: mask_schedules.geometric(2.0, 1.0), "most=1.0"),
  ],
)
def test_bad_input_is_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()
