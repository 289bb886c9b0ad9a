"""A table is what it expands to; a point mass is exact; padding and JSON change nothing."""

import numpy as np
import pytest
import solver_cases

from ancestral.models import schedules
from ancestral.sampling import tables

SCHEDULES = {
  "ve": schedules.variance_exploding(),
  "flow": schedules.rectified_flow(),
  "cosine": schedules.cosine(),
  "chain": schedules.from_betas(schedules.scaled_linear_betas()),
  "zero-snr": schedules.from_betas(schedules.zero_terminal_snr(schedules.linear_betas())),
}


def random_table(n=6, k=3, o=2, seed=0):
  rng = np.random.default_rng(seed)
  return tables.SolverTable(
    start=rng.normal(size=2),
    times=np.linspace(1, 0, n + 1),
    carry=rng.normal(size=(n, k, k)),
    output=rng.normal(size=(n, k, o)),
    noise=rng.normal(size=(n, k)),
  )


def test_expansion_is_what_running_the_rows_on_numbers_gives():
  """With numbers for the input, outputs and noise that do not depend on the points."""
  table, rng = random_table(), np.random.default_rng(1)
  x, z_start, m, z = rng.normal(), rng.normal(), rng.normal(size=(6, 2)), rng.normal(size=6)
  slots, points = np.array([table.start @ [x, z_start], 0, 0]), []
  for i in range(6):
    points.append(slots[0])
    slots = table.carry[i] @ slots + table.output[i] @ m[i] + table.noise[i] * z[i]
  expansion = tables.expand(table)
  out = expansion.inputs @ [x, z_start] + np.einsum("ijo,jo->i", expansion.outputs, m)
  np.testing.assert_allclose(out + expansion.noises @ z, [*points, slots[0]], rtol=1e-12)


@pytest.mark.parametrize("name", solver_cases.ALL)
def test_fewest_slots_have_the_same_expansion(name):
  schedule = SCHEDULES["ve"]
  times = np.exp(np.linspace(np.log(10), np.log(0.05), 9))
  written = []
  realise = tables.realise
  try:
    tables.realise = lambda expansion: written.append(expansion) or realise(expansion)
    table = solver_cases.ALL[name](schedule, times)
  finally:
    tables.realise = realise
  for one, other in zip(written[-1], tables.expand(table), strict=True):
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-12 * max(1, np.abs(one).max()))


def test_slots_are_as_few_as_the_methods_need():
  times = np.exp(np.linspace(np.log(10), np.log(0.05), 13))
  slots = {
    name: solver_cases.ALL[name](SCHEDULES["ve"], times).carry.shape[1] for name in solver_cases.ALL
  }
  expected = {"ddim": 1, "ddpm": 1, "2m": 2, "sde-2m": 2, "heun": 2, "2s": 2, "3m": 3, "lms": 4}
  expected |= {"unipc-2": 3, "unipc-3": 4, "rk4": 3, "plms": 4, "pndm": 5, "deis-3": 3}
  assert {name: slots[name] for name in expected} == expected


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("name", solver_cases.ALL)
def test_all_points_of_a_point_mass_are_exact(name, schedule):
  """If all data is c then D = c: a point of time t has mean alpha c and variance sigma^2 exactly.

  With 1, 2, 3 and 8 steps, one of them of no length, to time 0 or not.
  """
  for num_steps in (1, 2, 3, 8):
    for end in (0.0, 0.02):
      times = np.linspace(1, end, num_steps + 1) * schedule.max_time
      times = np.insert(times, 2, times[2]) if num_steps == 8 else times
      table = solver_cases.ALL[name](schedule, times)
      tables.check(table)
      points = tables.expand(table)
      mean = points.inputs[:, 0] + points.outputs.sum((1, 2))
      variance = points.inputs[:, 1] ** 2 + np.square(points.noises).sum(1)
      sigma = schedule.sigma(points.times)
      np.testing.assert_allclose(mean, schedule.alpha(points.times), rtol=0, atol=1e-8)
      np.testing.assert_allclose(np.sqrt(variance), sigma, rtol=1e-8, atol=1e-8)


def test_a_padded_table_ends_where_the_table_does():
  table = random_table()
  padded = tables.padded(table, 9)
  tables.check(padded)
  one, other = tables.expand(table), tables.expand(padded)
  np.testing.assert_array_equal(other.inputs[6:], np.tile(one.inputs[6], (4, 1)))
  np.testing.assert_array_equal(other.outputs[9, :6], one.outputs[6])
  assert padded.times[-1] == table.times[-1] and padded.times[5] == padded.times[8]
  with pytest.raises(ValueError, match="6 rows"):
    tables.padded(table, 5)


@pytest.mark.parametrize("table", [random_table(), random_table()._replace(noise=None)])
def test_json_keeps_every_bit(table):
  back = tables.from_json(tables.to_json(table))
  for one, other in zip(table, back, strict=True):
    assert (one is None and other is None) or np.array_equal(one, other)


def test_what_is_no_table_is_refused():
  table = random_table()
  for fields in (
    {"times": table.times[:-1]},
    {"output": table.output[:, :1]},
    {"noise": table.noise * np.nan},
  ):
    with pytest.raises(ValueError, match=next(iter(fields))):
      tables.check(table._replace(**fields))
  with pytest.raises(ValueError, match="fields"):
    tables.from_json("{}")
  future = tables.expand(table)
  future.outputs[2, 2] = 1.0
  with pytest.raises(ValueError, match="Point 2"):
    tables.realise(future)


@pytest.mark.parametrize("times", [[1.0], [1.0, 0.0, 0.5], [2.0, 1.0], [0.0, 1.0]])
def test_impossible_times_are_refused(times):
  with pytest.raises(ValueError, match="time"):
    tables.grid(schedules.rectified_flow(), times)


def test_points_of_two_mixtures_of_input_and_noise_are_refused():
  inputs = np.array([[1.0, 1.0], [1.0, 0.0]])
  outputs = np.array([[[0.0]], [[1.0]]])
  with pytest.raises(ValueError, match="another mixture of x and z_start"):
    tables.realise(tables.Expansion(np.array([1.0, 0.0]), inputs, outputs, np.zeros((2, 1))))
