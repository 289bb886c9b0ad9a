"""Our solver tables against the schedulers of diffusers: coefficients, and samples.

Both are given the scheduler's own times. What diffusers gets wrong is in `scheduler_defects_test`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.models import toy
from ancestral.sampling import base, grids, solvers, tables
from parity import scheduler_pairs, schedulers

pytestmark = pytest.mark.peers


def every_pair(steps=slice(None)):
  return pytest.mark.parametrize(
    "pair, num_steps",
    [
      pytest.param(pair, n, id=f"{name} {n}")
      for name, pair in scheduler_pairs.PAIRS.items()
      for n in pair.num_steps[steps]
    ],
  )


@every_pair()
def test_coefficients(pair, num_steps):
  theirs = schedulers.expansion(pair.case, num_steps)
  ours = tables.expand(pair.table(pair.case.view.schedule, theirs.times))
  np.testing.assert_allclose(ours.times, theirs.times, rtol=1e-9)
  for name in ("inputs", "outputs", "noises"):
    np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-6, atol=1e-9)


CHAIN = schedulers.LINEAR.schedule
EULER = "euler_discrete.EulerDiscreteScheduler"
MULTISTEP = "dpmsolver_multistep.DPMSolverMultistepScheduler"


def spaced(spacing):
  settings = {"clip_sample": False, "timestep_spacing": spacing}
  return schedulers.Case("ddpm.DDPMScheduler", schedulers.LINEAR, settings)


def between_ends(grid):
  """N noise ratios from the chain's last to its first, and 0."""
  ends = {
    "start": CHAIN.sigma(1000.0) / CHAIN.alpha(1000.0),
    "end": CHAIN.sigma(1.0) / CHAIN.alpha(1.0),
  }
  exploding = schedulers.EXPLODING.schedule
  return lambda n: grids.to_zero(grid(exploding, n - 1, **ends))


FLOW = schedulers.STRAIGHT.schedule


@pytest.mark.parametrize("num_steps", [2, 5, 16])
@pytest.mark.parametrize(
  "case, grid",
  [
    (spaced("leading"), lambda n: grids.leading(CHAIN, n)),
    (spaced("trailing"), lambda n: grids.trailing(CHAIN, n)),
    (spaced("linspace"), lambda n: grids.linspace(CHAIN, n)),
    (
      schedulers.Case("edm_euler.EDMEulerScheduler", schedulers.KARRAS),
      lambda n: grids.to_zero(
        grids.karras(schedulers.KARRAS.schedule, n - 1, start=80.0, end=0.002)
      ),
    ),
    (
      schedulers.Case(EULER, schedulers.EXPLODING, {"use_karras_sigmas": True}),
      between_ends(grids.karras),
    ),
    (
      schedulers.Case(EULER, schedulers.EXPLODING, {"use_exponential_sigmas": True}),
      between_ends(grids.log_snr),
    ),
    (
      schedulers.Case(EULER, schedulers.EXPLODING, {"use_beta_sigmas": True}),
      between_ends(grids.beta),
    ),
    (
      schedulers.Case(MULTISTEP, schedulers.PRESERVING, {"use_lu_lambdas": True}),
      between_ends(grids.log_snr),
    ),
    (
      schedulers.Case(
        "flow_match_euler_discrete.FlowMatchEulerDiscreteScheduler", schedulers.STRAIGHT
      ),
      lambda n: grids.to_zero(grids.uniform(FLOW, n - 1, start=1.0, end=0.001)),
    ),
  ],
  ids=["leading", "trailing", "linspace", "EDM", "Karras", "exponential", "beta", "lu", "flow"],
)
def test_grids(case, grid, num_steps):
  with schedulers.in_double(case):
    theirs = case.view.times(case.build(num_steps))
  np.testing.assert_allclose(grid(num_steps), theirs, rtol=1e-9, atol=1e-9)


MIXTURE = toy.GaussianMixture(
  np.array([0.2, 0.5, 0.3]),
  np.array([[-1.0, 0.5], [0.8, 0.2], [0.3, -1.1]]),
  np.array([0.02, 0.05, 0.1]),
)
BATCH, ROWS = 4, 32


@functools.cache
def sampler(schedule):
  """Our samples of the mixture by a table of any length, from x [B, 2] and noise [ROWS, B, 2]."""
  denoise = toy.mixture_denoiser(MIXTURE, schedule)

  @jax.jit
  def sample(table, x, z, num_rows):
    keys = base.row_keys(jax.random.key(0), jnp.arange(BATCH))
    noise = lambda keys, step, x: z[step[0]]
    return solvers.sample(keys, denoise, table, x, num_rows=num_rows, noise=noise)

  return sample


@functools.cache
def exact_mean(schedule):
  return jax.jit(toy.mixture_denoiser(MIXTURE, schedule))


@every_pair(slice(-1, None))
def test_samples(pair, num_steps):
  schedule = pair.case.view.schedule
  scheduler = pair.case.build(num_steps)
  times = pair.case.view.times(scheduler)
  z = np.random.default_rng(0).normal(size=(ROWS + 1, BATCH, 2)).astype(np.float32)
  x = np.float32(schedule.alpha(times[0])) + np.float32(schedule.sigma(times[0])) * z[-1]
  denoise = lambda i, x, t: np.asarray(
    exact_mean(schedule)(jnp.asarray(x.reshape(BATCH, 2)), jnp.float32(t))
  ).ravel()
  visited = schedulers.points(pair.case, scheduler, denoise, x, lambda i: z[i])
  table = tables.from_state(pair.table(schedule, times))
  ours = sampler(schedule)(tables.padded(table, ROWS), x, z[:-1], table.num_rows)
  condition = np.sum(np.abs(tables.expand(table).outputs), axis=1).max()  # of what is rounded
  np.testing.assert_allclose(ours.ravel(), visited[-1], atol=pair.atol * condition)
