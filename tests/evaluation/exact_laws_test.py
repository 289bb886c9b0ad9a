"""Laws pushed through steps, against loops over all pairs of sequences and against samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.evaluation import exact_laws
from ancestral.models import mask_schedules, toy, toy_discrete
from ancestral.sampling import base, jumps, noises

V, L = 3, 3
TRANSITION = np.random.default_rng(2).dirichlet(np.ones(V), size=V)
LAW = toy.markov_law(TRANSITION, 0, L)


def problem(name, schedule=None):
  """(predictor, noise)."""
  schedule = mask_schedules.linear() if schedule is None else schedule
  noise = getattr(noises, name)(schedule, V)
  chain = (jnp.asarray(a, jnp.float32) for a in (TRANSITION[0], TRANSITION))
  return toy_discrete.markov_predictor(*chain, *([schedule] if name == "uniform" else [])), noise


def test_pushed_equals_the_sum_over_all_pairs():
  rng = np.random.default_rng(0)
  weights, to = rng.dirichlet(np.ones(8)), rng.dirichlet(np.ones(2), size=(8, 3))
  rows = toy_discrete.sequences(2, 3)
  expected = [
    sum(weights[n] * np.prod([to[n, i, y[i]] for i in range(3)]) for n in range(8)) for y in rows
  ]
  found = exact_laws.pushed(jnp.asarray(weights, jnp.float32), jnp.asarray(to, jnp.float32))
  np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["uniform", "masking"])
@pytest.mark.parametrize(
  "law", [jumps.euler_law, jumps.tau_leaping_law, jumps.posterior_law], ids=lambda f: f.__name__
)
def test_the_sampler_draws_its_law(name, law):
  """Samples of `jumps.factorised` follow the law computed without sampling."""
  predict, noise = problem(name)
  steps = jumps.Steps(jnp.array([1.0, 0.7, 0.2, 0.0]), jnp.array([1.0, 0.8, 1.3]))
  expected = exact_laws.sampler_law(predict, noise, law(noise), steps, L)

  @jax.jit
  def sample(keys):
    sampler = jumps.factorised(
      predict, noise, law(noise), steps.times, coefficients=steps.coefficients
    )
    state = base.start(keys, sampler, jnp.full((keys.shape[0], L), V))
    return base.run(keys, sampler, state, 4)[0]

  num = 30_000
  state = sample(targets.keys_of(np.arange(num)))
  expected = np.asarray(expected, np.float64)
  targets.check_law(np.asarray(state.tokens), expected / expected.sum())
  assert np.all(np.asarray(state.step) == 3)
  if name == "uniform":
    assert np.all(np.asarray(state.calls) == 3)
  else:
    assert np.all(np.asarray(state.calls) <= 3) and np.asarray(state.calls).mean() < 3


@pytest.mark.parametrize("name", ["uniform", "masking"])
@pytest.mark.parametrize(
  "law", [jumps.euler_law, jumps.tau_leaping_law, jumps.posterior_law], ids=lambda f: f.__name__
)
def test_error_falls_like_the_step(name, law):
  predict, noise = problem(name)
  target = jnp.asarray(LAW, jnp.float32)

  @jax.jit
  def error(times):
    steps = jumps.Steps(times, jnp.ones(times.shape[0] - 1))
    made = exact_laws.sampler_law(predict, noise, law(noise), steps, L)
    return exact_laws.total_variation(made, target)

  errors = np.array([error(jnp.linspace(1, 0, n + 1)) for n in (32, 64, 128)])
  slopes = np.log2(errors[:-1] / errors[1:])
  assert np.all((slopes > 0.85) & (slopes < 1.3)), (errors, slopes)


def test_masking_euler_is_ancestral_under_the_linear_schedule():
  """There rate (t - s) = (t - s) / t, which is the chance itself; under the cosine's it is not."""
  steps = jumps.Steps(jnp.array([1.0, 0.6, 0.3, 0.0]), jnp.ones(3))
  for schedule, same in ((mask_schedules.linear(), True), (mask_schedules.cosine(), False)):
    predict, noise = problem("masking", schedule)
    one, other = (
      exact_laws.sampler_law(predict, noise, law(noise), steps, L)
      for law in (jumps.euler_law, jumps.posterior_law)
    )
    assert np.allclose(one, other, atol=1e-6) == same


def test_kl_and_total_variation_by_hand():
  one, other = jnp.array([0.5, 0.5, 0.0]), jnp.array([0.25, 0.5, 0.25])
  np.testing.assert_allclose(exact_laws.kl(one, other), 0.5 * np.log(2), rtol=1e-6)
  np.testing.assert_allclose(exact_laws.total_variation(one, other), 0.25, rtol=1e-6)
  assert exact_laws.kl(other, one) == np.inf
