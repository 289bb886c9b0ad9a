"""The kernel: what the table says, row by row, one program for tables of one shape; and laws."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import solver_cases

import targets
from ancestral.models import schedules, toy
from ancestral.sampling import ancestral, base, forms, multistep, singlestep, solvers, tables

FLOW = schedules.rectified_flow()
MIXTURE = toy.GaussianMixture(
  jnp.array([0.3, 0.7]), jnp.array([[1.0, 0.3], [-0.6, -0.4]]), jnp.array([0.05, 0.2])
)
DENOISE = toy.mixture_denoiser(MIXTURE, FLOW)


def test_the_kernel_evaluates_the_points_of_the_expansion():
  """With outputs and noise replaced by known numbers: x is a function of the expansion alone."""
  rng = np.random.default_rng(0)
  table = tables.SolverTable(
    start=np.array([0.5, 0.0]),
    times=np.linspace(1, 0, 5),
    carry=rng.normal(size=(4, 3, 3)),
    output=rng.normal(size=(4, 3, 2)),
    noise=rng.normal(size=(4, 3)),
  )
  one, other = rng.normal(size=(2, 4)).astype(np.float32)  # by time 1, .75, .5, .25
  z = rng.normal(size=4).astype(np.float32)
  at = lambda values, t, x: values[jnp.round(4 - 4 * t).astype(int)][:, None] * jnp.ones_like(x)
  denoise = lambda x, t: (at(jnp.asarray(one), t, x), at(jnp.asarray(other), t, x))
  noise = lambda keys, step, x: jnp.asarray(z)[step][:, None] * jnp.ones_like(x)
  x = jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)
  out = solvers.sample(targets.keys_of([0, 1, 2]), denoise, table, x, noise=noise)
  expansion = tables.expand(table)
  expected = expansion.inputs[4, 0] * np.asarray(x) + expansion.noises[4] @ z
  expected += np.einsum("jo,jo->", expansion.outputs[4], np.stack([one, other], 1))
  np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_clean_inputs_are_noised_and_noisy_ones_are_not():
  table = multistep.dpmpp_2m(FLOW, np.linspace(0.6, 0, 5))
  x = jnp.full((2000, 1), 3.0)
  keys = targets.keys_of(range(2000))
  first = base.start(keys, solvers.tabulated(DENOISE, table), x).slots[:, 0]
  assert abs(float(first.mean()) - 0.4 * 3) < 4 * 0.6 / 2000**0.5
  assert abs(float(first.std()) - 0.6) < 4 * 0.6 / 4000**0.5
  state = base.start(keys, solvers.tabulated(DENOISE, tables.from_state(table)), x)
  np.testing.assert_array_equal(state.slots[:, 0], x)


def test_one_program_serves_all_tables_of_a_shape_and_all_lengths():
  traces = []

  @jax.jit
  def sample(keys, table, num_rows, x):
    traces.append(1)
    return solvers.sample(keys, DENOISE, table, x, num_rows=num_rows)

  keys, x = targets.keys_of(range(4)), jnp.zeros((4, 2))
  for num_steps in (3, 5, 8):
    for make in (multistep.dpmpp_2m, lambda s, t: multistep.dpmpp_2m(s, t, rule=RULE)):
      table = make(FLOW, np.linspace(0.95, 0, num_steps + 1))
      out = sample(keys, tables.padded(table, 8), num_steps, x)
      alone = solvers.sample(keys, DENOISE, table, x)
      np.testing.assert_allclose(out, alone, rtol=0, atol=1e-5)
  assert len(traces) == 1


RULE = forms.exact(forms.log_snr)


def test_a_finished_row_stays_while_others_go_on():
  table = ancestral.ddpm(FLOW, np.linspace(1, 0, 5))
  algorithm = solvers.tabulated(DENOISE, table)
  keys = targets.keys_of([0, 1])
  state = base.start(keys, algorithm, jnp.zeros((2, 2)))
  done, _ = base.run(keys, algorithm, state, 4)
  mixed = base.select_rows(jnp.array([True, False]), done, state)
  after, _ = base.run(keys, algorithm, mixed, 4)
  np.testing.assert_allclose(after.slots[:, 0], done.slots[:, 0], rtol=0, atol=1e-6)
  assert after.step.tolist() == [4, 4]


def test_rows_at_different_steps_are_what_they_are_alone():
  table = ancestral.ddpm(FLOW, np.linspace(1, 0, 7))
  algorithm = solvers.tabulated(DENOISE, table)
  keys = targets.keys_of([5, 9])
  state = base.start(keys, algorithm, jnp.zeros((2, 2)))
  ahead, _ = base.run(keys, algorithm, state, 3)
  mixed = base.select_rows(jnp.array([True, False]), ahead, state)
  end, _ = base.run(keys, algorithm, mixed, 6)
  whole, _ = base.run(keys, algorithm, state, 6)
  np.testing.assert_allclose(end.slots[:, 0], whole.slots[:, 0], rtol=0, atol=1e-5)


def test_inversion_leads_back():
  times = np.linspace(0.95, 0.02, 81)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)), jnp.float32)
  keys = targets.keys_of(range(4))
  there = tables.from_state(multistep.dpmpp_2m(FLOW, times[::-1]))
  back = tables.from_state(multistep.dpmpp_2m(FLOW, times))
  encoded = solvers.sample(keys, DENOISE, there, x)
  np.testing.assert_allclose(solvers.sample(keys, DENOISE, back, encoded), x, rtol=0, atol=5e-3)
  assert float(jnp.abs(encoded - x).max()) > 0.1


def moments_of_error(samples, exact):
  """The largest error of the means and covariances of samples [N, D], in standard errors."""
  n, deviations = len(samples), []
  for products in (lambda x: x, lambda x: x[:, :, None] * x[:, None, :]):
    one, other = (products(np.asarray(x, np.float64)).reshape(len(x), -1) for x in (samples, exact))
    error = np.sqrt(one.var(0) / n + other.var(0) / len(other))
    deviations.append(np.abs(one.mean(0) - other.mean(0)) / error)
  return np.concatenate(deviations).max()


def sliced_wasserstein(one, other, num_directions=16):
  """The root mean square over directions of the distance of sorted projections."""
  directions = np.random.default_rng(0).normal(size=(2, num_directions))
  directions /= np.linalg.norm(directions, axis=0)
  gaps = np.sort(one @ directions, axis=0) - np.sort(other @ directions, axis=0)
  return np.sqrt(np.mean(np.square(gaps)))


# Of a consistency model's own outputs; of a denoiser's they have no law to keep.
NO_LAW = ("consistency", "trajectory-consistency")


LAWFUL = [name for name in solver_cases.ALL if name not in NO_LAW]
QUICK = ("ddpm", "sde-2m", "churn", "unipc-2")


@pytest.mark.parametrize(
  "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in LAWFUL]
)
def test_law(name):
  """From x_T ~ p_T exactly, the samples have the mixture's moments, within four standard errors.

  And with its sliced Wasserstein distance: at most 1.5 times that of an honest sample of the size
  plus the solver's own error of .02, which few steps leave.
  """
  num_rows = 4096
  data_key, other_key = jax.random.split(jax.random.key(0))
  data = toy.mixture_sample(data_key, MIXTURE, num_rows)
  honest = np.asarray(toy.mixture_sample(other_key, MIXTURE, num_rows))
  lam = np.linspace(-4, 4, STEPS.get(name, 48) + 1)
  table = solver_cases.ALL[name](FLOW, np.append(FLOW.time(lam), 0.0))
  out = np.asarray(solvers.sample(targets.keys_of(range(num_rows)), DENOISE, table, data))
  floor = sliced_wasserstein(np.asarray(data), honest)
  assert sliced_wasserstein(out, honest) < 1.5 * floor + 0.02
  assert moments_of_error(out, honest) < 4


FIRST_ORDER = ("ddim", "euler", "ddim-half", "ddpm", "euler-ancestral", "sde")
STEPS = dict.fromkeys(FIRST_ORDER, 300)


def test_restart_returns_to_the_law():
  times = FLOW.time(np.linspace(-4, 4, 25))
  back = ancestral.Restart(FLOW.time(np.linspace(-1, 4 / 3, 8)), repeats=2)
  step = singlestep.heun(forms.noise())
  grid = np.append(np.sort(np.append(times, back.times[-1]))[::-1], 0.0)
  table = ancestral.restart(FLOW, grid, step, [back])
  assert table.num_rows == 2 * (len(grid) - 2) + 1 + 2 * 2 * 7
  data_key, other_key = jax.random.split(jax.random.key(0))
  data = toy.mixture_sample(data_key, MIXTURE, 4096)
  honest = np.asarray(toy.mixture_sample(other_key, MIXTURE, 4096))
  out = np.asarray(solvers.sample(targets.keys_of(range(4096)), DENOISE, table, data))
  assert moments_of_error(out, honest) < 4
  with pytest.raises(ValueError, match="restart"):
    ancestral.restart(FLOW, times, step, [ancestral.Restart([0.5, 0.123], 1)])


def test_plus_plus_takes_its_noise_from_the_second_output():
  """With both outputs equal it is DDIM; the first output enters with alpha, the second with -."""
  times = np.linspace(0.9, 0, 5)
  both, plain = ancestral.ddim_cfgpp(FLOW, times), ancestral.ddim(FLOW, times)
  one, other = tables.expand(both), tables.expand(plain)
  np.testing.assert_allclose(one.outputs.sum(-1, keepdims=True), other.outputs, atol=1e-12)
  np.testing.assert_allclose(one.outputs[1, 0], [0.325, -0.325 * 0.1 / 0.325 * 0.675 / 0.9])


def test_the_new_solver_of_the_documentation_is_order_two_of_lms():
  schedule = schedules.variance_exploding()
  times = np.array([10, 6, 3, 1.0, 0.2])

  def adams_bashforth_2(schedule, times):
    path = tables.Path(schedule, len(times))
    x, before = path.start(times[0]), None
    for s, t in itertools.pairwise(times):
      slope = (x - path.evaluate(x, s)) / schedule.sigma(s)
      step = slope if before is None else 1.5 * slope - 0.5 * before
      x, before = x + (schedule.sigma(t) - schedule.sigma(s)) * step, slope
    return path.table(x, times[-1])

  even = np.linspace(10, 2, 5)
  one, other = adams_bashforth_2(schedule, even), multistep.lms(schedule, even, 2)
  for a, b in zip(tables.expand(one), tables.expand(other), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-9)
  assert adams_bashforth_2(schedule, times).carry.shape[1] == 2


@pytest.mark.parametrize("name", ["ddpm", "sde-2m", "churn"])
def test_a_row_is_the_same_alone(name):
  table = solver_cases.ALL[name](FLOW, np.linspace(0.95, 0, 5))
  sample = jax.jit(lambda keys, x: solvers.sample(keys, DENOISE, table, x))
  x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)), jnp.float32)
  together = sample(targets.keys_of([4, 7, 9]), x)
  alone = sample(targets.keys_of([7]), x[1:2])
  np.testing.assert_allclose(alone[0], together[1], rtol=0, atol=1e-6)
