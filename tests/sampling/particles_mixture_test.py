"""Particles of diffusion on a mixture whose tilted law is a mixture, with its exact denoiser."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import targets
from ancestral.models import schedules, tilted, toy
from ancestral.sampling import (
  ancestral,
  base,
  grids,
  guidance,
  multistep,
  particles,
  soft_values,
  solvers,
  twisted,
)

FLOW = schedules.rectified_flow()
PRIOR = toy.GaussianMixture(
  jnp.array([0.5, 0.3, 0.2]),
  jnp.array([[-1.2, 0.0], [0.8, 1.0], [1.0, -1.0]]),
  jnp.array([0.1, 0.1, 0.1]),
)
# r = alpha (a . x - b |x|^2 / 2), so that the tilt is the same at every temperature
ALPHA, LINEAR, QUADRATIC = 0.5, jnp.array([1.6, 0.8]), 0.5
TARGET, LOG_Z = tilted.mixture(PRIOR, LINEAR, QUADRATIC)
TABLE = ancestral.ddpm(
  FLOW,
  grids.to_zero(np.array(FLOW.time(np.linspace(-4, 3.5, 64)))),
  scale=lambda small, large: large,
)
DENOISE = toy.mixture_denoiser(PRIOR, FLOW)
SOFT = tilted.mixture_soft_value(PRIOR, LINEAR, QUADRATIC, FLOW)
ROWS = 2000


def reward(x):
  return ALPHA * (x @ LINEAR - QUADRATIC * jnp.sum(x**2, axis=1) / 2)


def exact(state):
  """The soft value at the state's own time; at the end, where no noise is left, r itself."""
  x, time = state.slots[:, 0], jnp.asarray(TABLE.times, jnp.float32)[state.step]
  ended = state.step == TABLE.num_rows
  soft = SOFT(x, jnp.where(ended, 0.5, time))
  return jnp.where(ended, reward(x), ALPHA * soft)


EXACT = soft_values.of_state(exact)
MEAN = soft_values.posterior_mean(reward, soft_values.table_denoised(DENOISE, TABLE))
SEEN = soft_values.seen_mean(reward, TABLE)
OWN = solvers.tabulated(DENOISE, TABLE)


def run(algorithm, of, rows=ROWS, seed=0):
  def go(keys, x):
    state, info = base.run(
      keys,
      algorithm,
      base.start(keys, algorithm, x),
      TABLE.num_rows,
      lambda state, info: info.resampled if isinstance(info, particles.Info) else (),
    )
    return of(state), info

  return jax.jit(go)(targets.keys_of(np.arange(rows), seed), jnp.zeros((rows, 2)))


def drawn(state):
  keys = targets.keys_of(np.arange(state.step.shape[0]), 77)
  return particles.drawn(keys, state).slots[:, 0]


def z_and_drawn(state):
  return particles.log_z(state), drawn(state)


EDGES = np.array([-np.inf, -1.3, -0.7, 0.2, 0.7, 1.1, np.inf])


def masses(mixture):
  """Of the cells between EDGES, [6, 6]: a mixture of products of normals."""
  weights, means, variances = (np.asarray(leaf, np.float64) for leaf in mixture)
  cdf = stats.norm.cdf((EDGES[:, None, None] - means[None]) / np.sqrt(variances)[None, :, None])
  inside = np.diff(cdf, axis=0)  # [6, K, 2]
  return np.einsum("k,ik,jk->ij", weights, inside[..., 0], inside[..., 1])


def off(x, mixture):
  """Total variation on the cells, less the noise floor."""
  counts, _, _ = np.histogram2d(
    *np.clip(np.asarray(x, np.float64).T, -9, 9), [np.clip(EDGES, -9, 9)] * 2
  )
  law = masses(mixture)
  np.testing.assert_allclose(law.sum(), 1, rtol=1e-6)
  return targets.total_variation(counts, law) - targets.noise_floor(law, len(x))


def test_the_solver_is_near_the_mixture_and_the_target_is_far_from_it():
  """What the table's 64 steps cost is within the noise of the tests below."""
  x, _ = run(OWN, lambda state: state.slots[:, 0])
  assert off(x, PRIOR) < 0 and off(x, TARGET) > 0.3


@pytest.mark.parametrize("value", [EXACT, MEAN, SEEN], ids=["exact", "mean", "seen"])
def test_smc_draws_from_the_tilted_mixture_and_knows_z(value):
  algorithm = particles.smc(OWN, value, num_particles=24, temperature=ALPHA)
  (log_z, x), resampled = run(algorithm, z_and_drawn, rows=1500)
  assert np.mean(resampled) > 0.005
  assert off(x, TARGET) < 0.01
  z = np.exp(np.asarray(log_z, np.float64))
  assert abs(z.mean() / np.exp(LOG_Z) - 1) < 4 * z.std() / z.mean() / np.sqrt(1500) + 0.02


def test_svdd_with_the_exact_value_draws_from_the_tilted_mixture():
  """At one temperature; with the best candidate alone it gets much too sure of itself."""
  x, _ = run(
    particles.svdd(OWN, EXACT, num_candidates=24, temperature=ALPHA),
    lambda state: state.state.slots[:, 0],
  )
  assert off(x, TARGET) < 0.02
  x, _ = run(
    particles.svdd(OWN, EXACT, num_candidates=24, temperature=0.0),
    lambda state: state.state.slots[:, 0],
    rows=1000,
  )
  assert off(x, TARGET) > 0.3


def test_calls_count_what_goes_through_the_denoiser():
  """Candidates share the call at the state that they come from, also when it is really made."""
  seen = []

  def counting(x, t):
    jax.debug.callback(lambda x: seen.append(x.size // 2), x)
    return DENOISE(x, t)

  own = solvers.tabulated(counting, TABLE)
  mean = soft_values.posterior_mean(reward, soft_values.table_denoised(counting, TABLE))
  n = TABLE.num_rows
  for make, expected in (
    (particles.svdd(own, mean, num_candidates=5, temperature=ALPHA), n + 5 * (n - 1)),
    (particles.smc(own, mean, num_particles=3, temperature=ALPHA), 3 * 2 * n),
    (particles.smc(own, SEEN, num_particles=3, temperature=ALPHA), 3 * n),
  ):
    seen.clear()
    calls, _ = run(make, lambda state: state.calls, rows=2)
    jax.block_until_ready(calls)
    jax.effects_barrier()
    np.testing.assert_array_equal(calls, [expected] * 2)
    values_at_the_end = sum(seen) - 2 * expected  # run all the same, and thrown away
    assert values_at_the_end in (0, 2 * 5, 2 * 3)


def test_a_held_denoiser_is_the_denoiser():
  own = soft_values.held(
    lambda denoise: solvers.tabulated(denoise, TABLE), DENOISE, soft_values.table_point(TABLE)
  )
  value = soft_values.posterior_mean(reward, soft_values.held_denoised(TABLE))
  kwargs = {"num_particles": 3, "temperature": ALPHA}
  held, _ = run(particles.smc(own, value, calls=soft_values.one_at_first, **kwargs), lambda s: s, 4)
  asked, _ = run(particles.smc(OWN, MEAN, **kwargs), lambda s: s, 4)
  np.testing.assert_allclose(held.states.state.slots, asked.states.slots, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(held.log_weights, asked.log_weights, rtol=1e-3, atol=1e-3)
  np.testing.assert_array_equal(held.calls, 3 * TABLE.num_rows)
  np.testing.assert_array_equal(asked.calls, 3 * 2 * TABLE.num_rows)


def pair(scale=1.0):
  """The tilted law's denoiser, and beyond; and the model's own."""
  guided = toy.mixture_denoiser(TARGET, FLOW)
  return guidance.both(lambda x, t: DENOISE(x, t) + scale * (guided(x, t) - DENOISE(x, t)), DENOISE)


def test_a_twisted_step_says_how_much_likelier_the_model_would_have_made_it():
  """Against the two normal densities."""
  algorithm = twisted.twisted(pair(2.0), TABLE)
  keys, x = targets.keys_of(np.arange(6)), jnp.zeros((6, 2))
  state, step = base.start(keys, algorithm, x), jax.jit(algorithm.step)
  for i in range(TABLE.num_rows + 1):
    new, info = step(base.row_keys_at(keys, state.step), state)
    if i < TABLE.num_rows - 1:
      before, after = (np.asarray(s.slots[:, 0], np.float64) for s in (state, new))
      guided, own = (
        np.asarray(d, np.float64) for d in pair(2.0)(state.slots[:, 0], TABLE.times[i])
      )
      log_pdf = lambda d, i=i, after=after, before=before: stats.norm.logpdf(
        after, TABLE.carry[i, 0, 0] * before + TABLE.output[i, 0, 0] * d, TABLE.noise[i, 0]
      ).sum(axis=1)
      np.testing.assert_allclose(
        info.log_ratio, log_pdf(own) - log_pdf(guided), rtol=2e-3, atol=2e-3
      )
    else:  # to time 0 there is no noise, and beyond it no step
      np.testing.assert_array_equal(info.log_ratio, 0)
    state = new
  np.testing.assert_array_equal(state.step, TABLE.num_rows)


def test_twisting_by_nothing_is_the_table():
  keys, x = targets.keys_of(np.arange(8)), jnp.zeros((8, 2))
  algorithm = twisted.twisted(pair(0.0), TABLE)
  go = lambda algorithm: (
    base.run(keys, algorithm, base.start(keys, algorithm, x), TABLE.num_rows)[0].slots
  )
  np.testing.assert_allclose(go(algorithm), go(OWN), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_weights_make_up_for_any_twist(scale):
  """Z and the law are those of the target whatever the guidance, here right and too weak."""
  algorithm = particles.smc(
    twisted.twisted(pair(scale), TABLE),
    EXACT,
    num_particles=8,
    temperature=ALPHA,
    log_ratio=twisted.log_ratio,
  )
  (log_z, x), _ = run(algorithm, z_and_drawn, rows=1500)
  z = np.exp(np.asarray(log_z, np.float64))
  assert abs(z.mean() / np.exp(LOG_Z) - 1) < 4 * z.std() / z.mean() / np.sqrt(1500) + 0.02
  assert off(x, TARGET) < 0.02
  plain = particles.smc(OWN, EXACT, num_particles=8, temperature=ALPHA)
  untwisted, _ = run(plain, particles.log_z, rows=1500)
  assert np.std(log_z) < 0.8 * np.std(untwisted)


def test_bad_tables_are_refused():
  with pytest.raises(ValueError, match="one array with noise"):
    twisted.twisted(pair(), ancestral.ddim(FLOW, [1.0, 0.5, 0.0]))
  with pytest.raises(ValueError, match="one array with noise"):
    twisted.twisted(pair(), multistep.dpmpp_2m(FLOW, [0.9, 0.5, 0.2, 0.0], eta=1.0))
