"""Averages by training time: against sums of the stored parameters, and found after training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.training import averaging, state

STDS = (0.05, 0.10)
STEPS = 1024


@pytest.mark.parametrize("relative_std", [0.001, 0.05, 0.1, 0.2, 0.27])
def test_the_exponent_is_that_of_its_standard_deviation(relative_std):
  """Of the density (gamma + 1) u^gamma on [0, 1], by moments on a fine grid."""
  gamma = averaging.exponent(relative_std)
  edges = np.linspace(0, 1, 400_001)
  weights, middle = np.diff(edges ** (gamma + 1)), (edges[1:] + edges[:-1]) / 2
  mean = weights @ middle
  np.testing.assert_allclose((weights @ (middle - mean) ** 2) ** 0.5, relative_std, rtol=1e-4)


def test_exponents_are_the_papers():
  """Appendix C of the paper: 5% is gamma = 16.97, 10% is 6.94."""
  np.testing.assert_allclose([averaging.exponent(std) for std in STDS], [16.97, 6.94], atol=5e-3)


@pytest.mark.parametrize("relative_std", [-0.1, 0.0, 0.28, np.nan])
def test_a_deviation_outside_its_range_is_refused(relative_std):
  with pytest.raises(ValueError, match="above 0 and below"):
    averaging.exponent(relative_std)


@functools.cache
def trajectory(stds=STDS, num_steps=STEPS, size=64):
  """A random walk [T, n], float32, and after every step its running averages, [T, n] each."""
  rng = np.random.default_rng(0)
  walk = jnp.asarray(np.cumsum(rng.normal(size=(num_steps, size)), axis=0), jnp.float32)
  kept = averaging.power_average(stds)

  def body(average, inputs):
    params, step = inputs
    average = kept.update(average, {"w": params}, step)
    return average, average

  first = kept.init({"w": jnp.ones(size)})  # is forgotten at the first step
  _, averages = jax.jit(lambda: jax.lax.scan(body, first, (walk, jnp.arange(num_steps))))()
  return np.asarray(walk, np.float64), [np.asarray(average["w"]) for average in averages]


def summed(walk, relative_std, step):
  """The average at `step` by its definition, float64."""
  gamma = averaging.exponent(relative_std)
  shares = np.arange(step + 1) / step
  return np.diff(shares ** (gamma + 1)) @ walk[:step]


@pytest.mark.parametrize("step", [1, 2, 3, 10, 100, STEPS])
def test_a_running_average_is_the_sum_of_its_profile(step):
  walk, averages = trajectory()
  for std, average in zip(STDS, averages, strict=True):
    expected = summed(walk, std, step)
    size = np.abs(walk[:step]).max()
    np.testing.assert_allclose(average[step - 1], expected, atol=1e-6 * size)
    weights = averaging.profile(std, step, np.arange(step + 1))
    np.testing.assert_allclose(weights @ walk[:step], expected, atol=1e-12 * size)


def test_profiles_sum_to_one_and_leave_out_what_came_later():
  edges = np.array([0, 10, 30, 50, 70])
  weights = averaging.profile(0.1, 50, edges)
  np.testing.assert_allclose(weights.sum(), 1, rtol=1e-12)
  assert np.all(weights[:3] > 0) and weights[3] == 0


@pytest.mark.parametrize("step", [10**5, 10**7])
def test_late_in_training_an_average_still_moves_at_its_own_rate(step):
  """1 - (1 - 1 / t)^(gamma + 1), where 1 - 1 / t has lost digits in float32."""
  kept = averaging.power_average(STDS)
  moved = jax.jit(kept.update)((jnp.zeros(1),) * 2, jnp.ones(1), jnp.int32(step - 1))
  for std, found in zip(STDS, moved, strict=True):
    expected = -np.expm1((averaging.exponent(std) + 1) * np.log1p(-1 / step))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def snapshots(num, num_steps=STEPS):
  """Evenly spaced, the last at the end: stds, steps."""
  steps = [round(num_steps * (i + 1) / num) for i in range(num)]
  return [std for std in STDS for _ in steps], steps * len(STDS)


@pytest.mark.parametrize("step", [512, 1024])
@pytest.mark.parametrize("std", STDS)
def test_a_stored_average_is_found_as_itself(std, step):
  stds, steps = snapshots(4)
  weights = averaging.posthoc_weights(stds, steps, std, step)
  expected = [float(pair == (std, step)) for pair in zip(stds, steps, strict=True)]
  np.testing.assert_allclose(weights, expected, atol=1e-9)


def reconstructed(num, relative_std, step=STEPS):
  """Relative error of the average found from `num` snapshots of each of two, on the walk."""
  walk, averages = trajectory()
  stds, steps = snapshots(num)
  held = [averages[STDS.index(std)][at - 1] for std, at in zip(stds, steps, strict=True)]
  weights = averaging.posthoc_weights(stds, steps, relative_std, step)
  np.testing.assert_allclose(weights.sum(), 1, atol=1e-9)
  found = averaging.combined(zip(weights, ({"w": jnp.asarray(x)} for x in held), strict=True))
  expected = summed(walk, relative_std, step)
  return np.linalg.norm(found["w"] - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("relative_std", [0.03, 0.07, 0.15, 0.2])
def test_a_third_average_is_found_the_better_the_more_snapshots_there_are(relative_std):
  """Found: of 3%, 4.6e-2, 3.0e-2, 7.7e-3, 1.5e-3; of 7%, 1e-2 to 9e-5; of 20%, 9e-2 to 1.4e-3."""
  errors = [reconstructed(num, relative_std) for num in (2, 4, 8, 16)]
  assert np.all(np.diff(errors) < 0)
  assert errors[-1] < 0.01


def test_an_average_at_a_step_between_snapshots():
  errors = [reconstructed(num, 0.1, step=900) for num in (4, 16)]
  assert errors[1] < 0.01 < errors[0]


def test_one_snapshot_is_all_there_is():
  np.testing.assert_array_equal(averaging.posthoc_weights([0.1], [50], 0.2, 50), [1.0])


def test_long_runs_are_compared_on_fewer_intervals():
  """The weights depend on shares of training time, so scaling all steps changes nothing."""
  stds, steps = snapshots(4)
  short = averaging.posthoc_weights(stds, steps, 0.15, STEPS)
  long = averaging.posthoc_weights(stds, [1000 * at for at in steps], 0.15, 1000 * STEPS)
  np.testing.assert_allclose(long, short, atol=5e-3)


def test_combined_sums_in_float64_and_keeps_types():
  trees = [
    {"a": jnp.array([1.0, 2.0]), "b": jnp.array(3.0, jnp.bfloat16)},
    {"a": jnp.array([10.0, 20.0]), "b": jnp.array(1.0, jnp.bfloat16)},
  ]
  found = averaging.combined(zip([0.5, -2.0], trees, strict=True))
  np.testing.assert_array_equal(found["a"], [-19.5, -39.0])
  assert found["b"] == -0.5 and found["b"].dtype == jnp.bfloat16 and found["a"].dtype == jnp.float32
  large = [(1.0, jnp.float32(1e8)), (1.0, jnp.float32(1)), (-1.0, jnp.float32(1e8))]
  assert averaging.combined(large) == 1


@pytest.mark.parametrize("steps, there", [([], r"\[\]"), ([5, 9, 5], r"\[5, 9\]")])
def test_an_average_after_the_last_snapshot_is_refused(steps, there):
  with pytest.raises(ValueError, match=f"step 10 or later: there are {there}"):
    averaging.posthoc_weights([0.1] * len(steps), steps, 0.15, 10)


@pytest.mark.parametrize("params", [{"w": jnp.ones(3)}, jnp.ones(3), (jnp.ones(3), jnp.zeros(2))])
def test_the_first_average_is_used_where_there_is_one(params):
  other = jax.tree.map(lambda leaf: leaf + 1, params)
  use = lambda average: averaging.used(state.TrainState(jnp.int32(1), params, (), average))
  assert use(()) is params
  assert use(other) is other
  assert use((other,)) is other
  assert use((other, params)) is other
