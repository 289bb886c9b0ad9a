"""Time-Shift: Gaussian data, whose variance at a time is known; and the rules on DDIM's table."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.models import schedules
from ancestral.sampling import ancestral, tables, time_shift

VE, VP, FLOW = schedules.variance_exploding(), schedules.linear(), schedules.rectified_flow()
TIMES = np.append(np.geomspace(5, 0.2, 6), 0.0)
ROWS, SIZE = 128, 4096


def gaussian(variance):
  return jnp.sqrt(variance) * jax.random.normal(jax.random.key(0), (ROWS, SIZE))


def shifts(schedule, x, t, window, **kwargs):
  """lambda(t_s) - lambda(t) of each row."""
  found = time_shift.matching_time(schedule, x, jnp.float32(t), window, **kwargs)
  assert found.shape == (ROWS,)
  log_snr = lambda t: np.asarray(schedules.half_log_snr(schedule, t))
  return log_snr(found) - log_snr(jnp.float32(t))


@pytest.mark.parametrize("schedule, t", [(VE, 2.0), (VE, 0.8), (FLOW, 0.7)])
def test_data_of_the_variance_assumed_are_not_shifted_on_average(schedule, t):
  """The variance's relative error is sqrt(2 / D), and its slope in lambda turns it into the
  shift's: a mean of 0 within four standard errors, and that deviation."""
  alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
  x = gaussian(alpha**2 + sigma**2)
  found = shifts(schedule, x, t, 0.5, data_variance=1.0)
  # v' = d v / d lambda: along VE, -2 sigma^2; along the flow alpha' = alpha sigma in lambda
  slope = 2 * sigma**2 if schedule is VE else 2 * alpha * sigma * (sigma - alpha)
  spread = (alpha**2 + sigma**2) * np.sqrt(2 / SIZE) / slope
  assert abs(found.mean()) < 4 * spread / np.sqrt(ROWS)
  np.testing.assert_allclose(found.std(), spread, rtol=0.25)


def test_where_the_variance_is_the_same_at_all_times_nothing_is_shifted():
  """Unit data on a variance-preserving schedule; compared with the noise's variance alone, the
  paper's rule takes the same samples for noisier ones, by half the window."""
  x = gaussian(1.0)
  np.testing.assert_array_equal(shifts(VP, x, 0.5, 0.5, data_variance=1.0), 0)
  np.testing.assert_allclose(shifts(VP, x, 0.5, 0.5), -0.25, atol=1e-4)


def test_the_rule_without_the_data_finds_the_noise_that_would_have_the_variance():
  """sigma_s^2 = 1 + sigma^2 where it is inside the window."""
  x = gaussian(1 + 3.0**2)
  expected = -0.5 * np.log(1 + 1 / 3.0**2)
  found = shifts(VE, x, 3.0, 0.5)
  np.testing.assert_allclose(found.mean(), expected, atol=0.005)
  np.testing.assert_allclose(shifts(VE, x, 3.0, 0.02), -0.01, atol=1e-5)


def test_rows_are_their_own_and_the_cutoff_is_of_time():
  x = jnp.concatenate([gaussian(4.0)[:2], gaussian(9.0)[:2]])
  t = jnp.array([2.0, 3.0, 2.0, 3.0])
  found = time_shift.matching_time(VE, x, t, 2.0)
  np.testing.assert_allclose(found, [2, 2, 3, 3], rtol=0.05)
  found = time_shift.matching_time(VE, x, t, 2.0, cutoff=2.5)
  np.testing.assert_allclose(found, [2, 2, 2, 3], rtol=0.05)
  assert found[2] == 2.0
  alone = time_shift.matching_time(VE, x[1:2], t[1:2], 2.0)
  np.testing.assert_array_equal(alone, time_shift.matching_time(VE, x, t, 2.0)[1:2])


def test_ends_of_the_schedule_are_not_shifted():
  x = gaussian(0.5)
  assert np.all(time_shift.matching_time(FLOW, x, jnp.float32(1.0), 1.0) == 1)
  assert np.all(time_shift.matching_time(FLOW, x, jnp.float32(0.0), 1.0) == 0)
  assert np.all(time_shift.matching_time(VE, gaussian(1e6), jnp.float32(79.0), 1.0) == 80)


def denoise(x, t):
  t = jnp.broadcast_to(t, x.shape[:1])[:, None]
  return jnp.tanh(x) / (1 + t)


def run(table, model, x):
  slots = jnp.zeros((table.carry.shape[1], *x.shape)).at[0].set(x)
  for i in range(table.num_rows):
    output = model(slots[0], jnp.float32(table.times[i]))
    slots = jnp.einsum("jl,lbd->jbd", jnp.asarray(table.carry[i], jnp.float32), slots)
    slots += jnp.asarray(table.output[i, :, 0], jnp.float32)[:, None, None] * output[None]
  return np.asarray(slots[0])


def by_hand(x, rule, window):
  """DDIM, alpha = 1: x_n = D + sigma_u (x - D) / sigma_s, of the times s and u of a rule."""
  for t, n in itertools.pairwise(TIMES):
    t, n = jnp.full(len(x), t, jnp.float32), jnp.full(len(x), n, jnp.float32)
    source, target = t, n
    if rule == "source":
      source = time_shift.matching_time(VE, x, t, window)
    else:
      target = time_shift.matching_time(VE, x, n, window)
    out = denoise(x, source)
    x = out + (target / source)[:, None] * (x - out)
  return np.asarray(x)


@pytest.mark.parametrize("rule", ["source", "target"])
def test_on_the_table_of_ddim_they_take_the_steps_that_they_say(rule):
  x = 5 * jax.random.normal(jax.random.key(1), (4, 64))
  table = tables.from_state(ancestral.ddim(VE, TIMES))
  make = {"source": time_shift.shifted_source, "target": time_shift.shifted_target}[rule]
  out = run(table, make(denoise, VE, TIMES, 0.4), x)
  np.testing.assert_allclose(out, by_hand(x, rule, 0.4), rtol=0, atol=2e-5)
  plain = run(table, denoise, x)
  assert np.abs(out - plain).max() > 1e-2
  for unshifted in (make(denoise, VE, TIMES, 0.0), make(denoise, VE, TIMES, 0.4, cutoff=9.0)):
    np.testing.assert_allclose(run(table, unshifted, x), plain, rtol=0, atol=2e-5)


def test_the_label_is_where_the_model_is_called():
  x, seen = 2 * jax.random.normal(jax.random.key(2), (3, SIZE)), []
  shifted = time_shift.shifted_label(lambda x, t: seen.append(t) or x, VE, 1.0)
  np.testing.assert_array_equal(shifted(x, jnp.float32(1.5)), x)
  np.testing.assert_allclose(seen[0], 2.0, rtol=0.05)
