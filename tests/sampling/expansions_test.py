"""Solvers made of solvers: what they leave alone, and what they are on the models they assume."""

import jax.numpy as jnp
import numpy as np
import pytest
import solver_cases

from ancestral.models import schedules
from ancestral.sampling import ancestral, expansions, multistep, tables

SCHEDULES = {
  "linear": (schedules.linear(), np.linspace(0.95, 0.05, 7)),
  "ve": (schedules.variance_exploding(), np.append(np.geomspace(20, 0.1, 6), 0.0)),
  "flow": (schedules.rectified_flow(), np.linspace(0.97, 0, 6)),
}
NAMES = ("ddim", "2m", "deis-3", "unipc-3", "heun", "rk4", "plms", "ghvb-3", "sde-2m", "churn")


def run(table, denoise, x, seed=0):
  """The table on numbers: from the input x [D], with noise by row from the end."""
  rng = np.random.default_rng(seed)
  z_start, z = rng.normal(size=x.shape), rng.normal(size=(100, *x.shape))
  slots = np.zeros((table.carry.shape[1], *x.shape))
  slots[0] = table.start[0] * x + table.start[1] * z_start
  for i in range(table.num_rows):
    output = denoise(slots[0], table.times[i])
    slots = np.einsum("jl,ld->jd", table.carry[i], slots) + np.outer(table.output[i], output)
    if table.noise is not None:
      slots += np.outer(table.noise[i], z[table.num_rows - i])
  return slots[0]


def assert_one_solver(one, other):
  for a, b in zip(tables.expand(one), tables.expand(other), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-8 * max(1, np.abs(b).max()))


@pytest.mark.parametrize("grid", SCHEDULES)
@pytest.mark.parametrize("name", NAMES)
def test_no_strength_changes_nothing(name, grid):
  schedule, times = SCHEDULES[grid]
  table = solver_cases.ALL[name](schedule, times)
  assert_one_solver(expansions.dualfast(table, schedule, 0.0), table)
  with pytest.raises(AssertionError):
    assert_one_solver(expansions.dualfast(table, schedule, 0.1), table)


@pytest.mark.parametrize("grid", SCHEDULES)
@pytest.mark.parametrize("name", NAMES)
def test_constant_noise_stays(name, grid):
  """(1 + c) e - c e = e: with a model whose e is the same everywhere, whatever the strength."""
  schedule, times = SCHEDULES[grid]
  table, noise = solver_cases.ALL[name](schedule, times), np.array([0.3, -1.2, 0.5])
  denoise = lambda x, t: (x - schedule.sigma(t) * noise) / schedule.alpha(t)
  x = np.array([0.1, 0.7, -0.4])
  corrected = expansions.dualfast(table, schedule, np.linspace(1, 0.2, table.num_rows))
  np.testing.assert_allclose(run(corrected, denoise, x), run(table, denoise, x), atol=1e-7)


@pytest.mark.parametrize("reference", [0, 1])
def test_ddim_by_hand(reference):
  """x_t / alpha moves by e' d rho: three steps written out, with a nonlinear model."""
  schedule, times = schedules.linear(), np.array([0.9, 0.6, 0.4, 0.2])
  denoise = lambda x, t: np.tanh(x) * (1 - t)
  strength, x = [7.0, 0.5, 0.25], np.array([0.4, -1.5])
  table = expansions.dualfast(
    ancestral.ddim(schedule, times), schedule, strength, reference=reference
  )
  rho, at, noise = schedule.sigma(times) / schedule.alpha(times), x, []
  for i in range(3):
    alpha, sigma = schedule.alpha(times[i]), schedule.sigma(times[i])
    noise.append((at - alpha * denoise(at, times[i])) / sigma)
    c = strength[i] if i > reference else 0.0
    mixed = (1 + c) * noise[i] - c * noise[min(reference, i)]
    at = schedule.alpha(times[i + 1]) * (at / alpha + (rho[i + 1] - rho[i]) * mixed)
  np.testing.assert_allclose(run(tables.from_state(table), denoise, x), at, rtol=1e-10)


def test_the_strength_falls_along_a_line():
  schedule, times = SCHEDULES["linear"]
  table = multistep.dpmpp_2m(schedule, times)
  falling = 0.6 * np.array([1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
  assert_one_solver(
    expansions.dualfast(table, schedule, 0.6), expansions.dualfast(table, schedule, falling)
  )


@pytest.mark.parametrize("grid", SCHEDULES)
@pytest.mark.parametrize("name", [name for name in NAMES if name in solver_cases.DETERMINISTIC])
def test_the_first_step_is_exact_for_gaussian_data(name, grid):
  """Of the deviation given; one evaluation fewer."""
  schedule, times = SCHEDULES[grid]
  table, std, x = solver_cases.ALL[name](schedule, times), 0.7, np.array([0.5, -2.0])

  def denoise(x, t):
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return alpha * std**2 / (alpha**2 * std**2 + sigma**2) * x

  calls = []
  counted = lambda x, t: calls.append(t) or denoise(x, t)
  shorter = expansions.analytic_first_step(table, schedule, std)
  tables.check(shorter)
  out = run(shorter, counted, x)
  assert len(calls) == table.num_rows - 1 and calls[0] == table.times[1]
  np.testing.assert_allclose(out, run(table, denoise, x), rtol=1e-8)
  wrong = expansions.analytic_first_step(table, schedule, 2 * std)
  assert np.abs(run(wrong, denoise, x) - out).max() > 1e-6


def test_no_deviation_is_noise_alone():
  schedule, times = SCHEDULES["linear"]
  table = multistep.dpmpp_2m(schedule, times)
  x, denoise = np.array([0.3, 2.0]), lambda x, t: np.tanh(x) * (1 - t)
  first = lambda x, t: denoise(x, t) if t < times[0] else 0 * x  # e = x / sigma is D = 0
  for of_input in (lambda table: table, tables.from_state):
    shorter = expansions.analytic_first_step(of_input(table), schedule)
    np.testing.assert_allclose(run(shorter, denoise, x), run(of_input(table), first, x), rtol=1e-8)


def test_a_centred_denoiser_is_that_of_the_data_less_their_mean():
  """Gaussian data: of mean mu, the denoiser in closed form; centred, that of mean 0."""
  schedule, mean = schedules.linear(), jnp.array([0.5, -2.0])
  gain = lambda t: (
    schedule.alpha(t) * 0.49 / (schedule.alpha(t) ** 2 * 0.49 + schedule.sigma(t) ** 2)
  )
  gains = lambda x, t: jnp.broadcast_to(gain(t), x.shape[:1])[:, None]
  moved = lambda x, t: mean[None] + gains(x, t) * (x - schedule.alpha(t)[:, None] * mean[None])
  x, t = jnp.array([[1.0, 2.0], [0.3, -4.0]]), jnp.array([0.3, 0.7])
  centred = expansions.centred(moved, schedule, mean)
  np.testing.assert_allclose(centred(x, t), gains(x, t) * x, rtol=1e-5)


def test_noise_of_later_rows_is_kept():
  schedule, times = SCHEDULES["linear"]
  table = multistep.dpmpp_2m(schedule, times)
  noisy = table._replace(noise=np.zeros((table.num_rows, table.carry.shape[1])))
  noisy.noise[2:, 0] = 0.1
  shorter = expansions.analytic_first_step(noisy, schedule)
  np.testing.assert_allclose(
    tables.expand(shorter).noises, tables.expand(noisy).noises[1:, 1:], atol=1e-9
  )


def test_refused():
  schedule, times = SCHEDULES["flow"]
  with pytest.raises(ValueError, match="2 outputs"):
    expansions.dualfast(ancestral.ddim_cfgpp(schedule, times), schedule, 0.5)
  with pytest.raises(ValueError, match="strengths"):
    expansions.dualfast(multistep.dpmpp_2m(schedule, times), schedule, [0.5])
  with pytest.raises(ValueError, match="noise"):
    expansions.analytic_first_step(ancestral.ddpm(schedule, times), schedule)
  with pytest.raises(ValueError, match="one row"):
    expansions.analytic_first_step(multistep.dpmpp_2m(schedule, times[:2]), schedule)
