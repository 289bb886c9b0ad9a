"""Fitted solvers against models whose flow is known, and gradients of an expansion's samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.models import schedules, toy
from ancestral.sampling import ancestral, base, correctors, grids, multistep, solvers, tables
from ancestral.training import solver_learning

SCHEDULE = schedules.variance_exploding(10.0)
TIMES = np.array([10.0, 3.0, 1.0, 0.3, 0.0])
MEANS = jnp.array([[1.0, 0.3], [-0.5, 0.9], [-0.7, -0.6]])
MIXTURE = toy.GaussianMixture(jnp.array([0.4, 0.3, 0.3]), MEANS, jnp.array([0.05, 0.1, 0.06]))


def of_mixture(mixture, x, t):
  return toy.mixture_denoiser(mixture, SCHEDULE)(x, t)


def noise(seed, num=64):
  return jax.random.normal(jax.random.key(seed), (num, 2))


@pytest.fixture(scope="module")
def teachers():
  fine = correctors.unipc(SCHEDULE, grids.to_zero(grids.karras(SCHEDULE, 150, end=0.01)), 3)
  return [solver_learning.teacher(of_mixture, MIXTURE, noise(seed), fine) for seed in (0, 1)]


def test_the_trajectory_of_an_expansion_is_the_tables():
  z, keys = noise(2), base.row_keys(jax.random.key(0), jnp.arange(64))
  table = correctors.unipc(SCHEDULE, TIMES, 2)
  model = lambda x, t: of_mixture(MIXTURE, x, t)
  x = jnp.ones((64, 2))
  found = solvers.trajectory(model, tables.expand(table), x, z)
  start = table.start[0] * x + table.start[1] * z
  sampled = solvers.sample(keys, model, tables.from_state(table), start)
  np.testing.assert_allclose(found.sample, sampled, atol=2e-5)
  for i in range(table.num_rows):
    again = model(found.points[i], jnp.full(64, table.times[i]))
    np.testing.assert_allclose(found.outputs[i, 0], again, atol=1e-5)


def test_gradients_of_an_expansions_samples_are_finite_differences():
  expansion, z = tables.expand(multistep.dpmpp_2m(SCHEDULE, TIMES)), noise(3, 8)
  arrays = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), expansion)
  model = lambda x, t: of_mixture(MIXTURE, x, t)

  def total(expansion):
    return jnp.sum(jnp.square(solvers.trajectory(model, expansion, jnp.zeros_like(z), z).sample))

  gradient = jax.grad(total)(arrays)
  for field, at in [("times", (1,)), ("inputs", (2, 1)), ("outputs", (3, 1, 0))]:
    value = getattr(arrays, field)
    moved = lambda h, f=field, v=value, a=at: total(arrays._replace(**{f: v.at[a].add(h)}))
    difference = (moved(1e-2) - moved(-1e-2)) / 2e-2
    np.testing.assert_allclose(getattr(gradient, field)[at], difference, rtol=2e-2, atol=1e-2)


def test_one_evaluation_learns_the_flow_of_a_gaussian():
  """x_0 = mean + s / sqrt(s^2 + T^2) (z T - mean): linear in z and D."""
  mixture = toy.GaussianMixture(jnp.ones(1), jnp.array([[0.7, -0.2]]), jnp.array([0.04]))
  z = noise(4)
  exact = mixture.means + 0.2 / np.sqrt(0.04 + 100) * (10 * z - mixture.means)
  teacher = solver_learning.Teacher(of_mixture, mixture, z, exact)
  found = solver_learning.learned(teacher, SCHEDULE, ancestral.ddim(SCHEDULE, [10.0, 0.0]))
  assert found.before > 0.15
  assert found.after < 1e-5


def test_learned_solvers_are_better_on_noise_that_was_not_seen(teachers):
  base_table = multistep.dpmpp_2m(SCHEDULE, TIMES)
  found = solver_learning.learned(teachers[0], SCHEDULE, base_table, max_steps=30)
  assert found.table.num_rows == base_table.num_rows
  held_out = [solver_learning.error(teachers[1], table) for table in (base_table, found.table)]
  assert held_out[1] < 0.25 * held_out[0], held_out
  again = tables.from_json(tables.to_json(found.table))
  assert solver_learning.error(teachers[1], again) == held_out[1]


def test_a_tuned_grid_is_better_and_keeps_its_ends(teachers):
  found = solver_learning.tuned_grid(teachers[0], SCHEDULE, multistep.dpmpp_2m, TIMES)
  assert found.after < 0.8 * found.before
  assert found.table.times[0] == TIMES[0] and found.table.times[-1] == 0
  assert np.all(np.diff(found.table.times) < 0)


def test_compensation_finds_the_ratios_a_solver_was_made_with():
  times = grids.to_zero(grids.karras(SCHEDULE, 6, end=0.05))
  ratios = np.array([0.9, 1.1, 0.95, 1.05, 1.0])
  made = correctors.dc_solver(SCHEDULE, times, ratios)
  teacher = solver_learning.teacher(of_mixture, MIXTURE, noise(5), made)
  found = solver_learning.compensated(teacher, SCHEDULE, times)
  assert found.after < 0.01 * found.before
  np.testing.assert_allclose(found.parameters[:4], ratios[:4], atol=0.02)


def test_the_cascade_extends_a_polynomial_law():
  law = lambda n, w: 1 + 0.1 * np.arange(2, n) / n * w - 0.02 * n / 10
  found = [(n, w, law(n, w)) for n in (5, 6, 10) for w in (1.0, 3.0)]
  cascade = solver_learning.cascade(found)
  np.testing.assert_allclose(cascade.ratios(8, 2.0), law(8, 2.0), atol=1e-9)
  with pytest.raises(ValueError, match="3 ratios for 12 coefficients"):
    solver_learning.cascade([(5, 1.0, np.ones(3))])


def test_guidance_in_the_table_is_guidance_of_the_model():
  expansion = tables.expand(multistep.dpmpp_2m(SCHEDULE, TIMES))
  z = noise(6)
  away = MIXTURE._replace(means=-MIXTURE.means)
  pair = lambda x, t: (of_mixture(MIXTURE, x, t), of_mixture(away, x, t))
  combined = lambda x, t: 3.0 * pair(x, t)[0] - 2.0 * pair(x, t)[1]
  zeros = jnp.zeros_like(z)
  inside = solvers.trajectory(pair, tables.guided(expansion, 3.0), zeros, z).sample
  outside = solvers.trajectory(combined, expansion, zeros, z).sample
  np.testing.assert_allclose(inside, outside, rtol=1e-4, atol=1e-4)


def test_stochastic_and_signalless_tables_are_refused(teachers):
  with pytest.raises(ValueError, match="draws noise"):
    solver_learning.error(teachers[0], ancestral.ddpm(SCHEDULE, TIMES))
  flow = schedules.rectified_flow()
  with pytest.raises(ValueError, match="no finite log-SNR"):
    table = ancestral.ddim(flow, [1.0, 0.5, 0.0])
    solver_learning.learned(teachers[0], flow, table)
