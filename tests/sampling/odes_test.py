"""The probability flow against closed forms, scipy, and the densities of mixtures."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

import targets
from ancestral.models import schedules, toy
from ancestral.sampling import odes

VE = schedules.variance_exploding()
LINEAR = schedules.linear()
FLOW = schedules.rectified_flow()

WEIGHTS = np.array([0.2, 0.5, 0.3])
MEANS = np.array([[0.3, -0.3], [1.3, 0.2], [-1.1, 0.7]])
VARIANCES = np.array([0.05, 0.1, 0.3])


def mixture(dtype=jnp.float32):
  return toy.GaussianMixture(*(jnp.asarray(part, dtype) for part in (WEIGHTS, MEANS, VARIANCES)))


def component_log_probs(x, alpha, sigma):
  """log of weights[k] N(x; alpha m_k, (alpha^2 v_k + sigma^2) I), [B, K], in numpy."""
  total = alpha**2 * VARIANCES + sigma**2
  square = np.sum((x[:, None] - alpha * MEANS[None]) ** 2, axis=-1)
  return np.log(WEIGHTS) - np.log(2 * np.pi * total) - 0.5 * square / total


def log_density(x, schedule, t):
  joint = component_log_probs(x, schedule.alpha(t), schedule.sigma(t))
  return np.log(np.sum(np.exp(joint), axis=-1))


def draws(schedule, t, num, seed=0):
  """x_t of the mixture, float64."""
  rng = np.random.default_rng(seed)
  k = rng.choice(3, size=num, p=WEIGHTS)
  clean = MEANS[k] + np.sqrt(VARIANCES[k])[:, None] * rng.normal(size=(num, 2))
  return schedule.alpha(t) * clean + schedule.sigma(t) * rng.normal(size=(num, 2))


def gaussian_denoiser(schedule, variance):
  """Of N(mean, variance I) data, the mean [B, ...] being the condition."""

  def denoise(x, t, mean):
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x - alpha * mean)

  return denoise


@pytest.mark.parametrize("schedule, start, end", [(VE, 80.0, 0.002), (FLOW, 0.001, 0.99)])
def test_the_flow_of_gaussian_data_keeps_its_quantile(schedule, start, end):
  rng = np.random.default_rng(0)
  mean, z, variance = rng.normal(size=(5, 3, 1)), rng.normal(size=(5, 3, 1)), 0.3

  def at(t):
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return alpha * mean + np.sqrt(alpha**2 * variance + sigma**2) * z

  denoise = gaussian_denoiser(schedule, variance)
  x, _ = jax.jit(lambda x, c: odes.solve(denoise, schedule, x, start, end, condition=c))(
    jnp.asarray(at(start), jnp.float32), jnp.asarray(mean, jnp.float32)
  )
  np.testing.assert_allclose(x, at(end), rtol=0, atol=2e-4)


def reference(schedule, x, start, end):
  """The flow of the mixture, d(x / alpha) / d(sigma / alpha) = (x - alpha D) / sigma, by scipy."""

  def slope(rho, u):
    u = u.reshape(-1, 2)
    joint = component_log_probs(u, 1.0, rho)
    share = np.exp(joint - joint.max(axis=1, keepdims=True))
    share = share / share.sum(axis=1, keepdims=True) / (VARIANCES + rho**2)
    denoised = rho**2 * share @ MEANS + np.sum(share * VARIANCES, axis=1, keepdims=True) * u
    return ((u - denoised) / rho).ravel()

  rho = [schedule.sigma(t) / schedule.alpha(t) for t in (start, end)]
  solved = scipy.integrate.solve_ivp(
    slope, rho, (x / schedule.alpha(start)).ravel(), method="DOP853", rtol=1e-11, atol=1e-11
  )
  return schedule.alpha(end) * solved.y[:, -1].reshape(-1, 2)


def test_the_flow_of_a_mixture_is_scipys_and_encoding_undoes_it():
  x = np.random.default_rng(1).normal(size=(16, 2))
  expected = reference(FLOW, x, 0.99, 0.001)
  with jax.enable_x64(True):
    denoise = toy.mixture_denoiser(mixture(jnp.float64), FLOW)
    flow = lambda x, *ends: odes.solve(denoise, FLOW, x, *ends, rtol=1e-9, atol=1e-9)
    out, count = jax.jit(lambda x: flow(x, 0.99, 0.001))(jnp.asarray(x))
    back, _ = jax.jit(lambda x: flow(x, 0.001, 0.99))(out)
    assert out.dtype == jnp.float64 and np.all(count > 200)
  np.testing.assert_allclose(out, expected, rtol=0, atol=1e-6)
  np.testing.assert_allclose(back, x, rtol=0, atol=1e-6)


def rows():
  """Sixteen starts, one of them far from any data."""
  return jnp.asarray(draws(LINEAR, 1.0, 16), jnp.float32).at[3].set(30.0)


@functools.cache
def solver(max_steps=4096):
  denoise = toy.mixture_denoiser(mixture(), LINEAR)
  return jax.jit(lambda x: odes.solve(denoise, LINEAR, x, 1.0, 0.001, max_steps=max_steps))


def solved(max_steps=4096):
  return solver(max_steps)(rows())


def test_the_flow_is_within_its_tolerance_in_float32():
  out, _ = solved()
  error = np.abs(out - reference(LINEAR, np.asarray(rows(), np.float64), 1.0, 0.001)).max(axis=1)
  assert np.median(error) < 5e-5 and np.max(error) < 5e-3


def test_a_row_does_not_depend_on_its_neighbours():
  out, count = solved()
  assert len(set(count.tolist())) > 1
  others = jnp.asarray(draws(LINEAR, 1.0, 16, seed=9), jnp.float32)
  for row in (0, 3):
    x, own = solver()(others.at[row].set(rows()[row]))
    np.testing.assert_array_equal(x[row], out[row])
    assert own[row] == count[row] and np.any(own != count)


def test_a_row_alone_is_the_same_and_its_count_is_of_calls_of_the_model():
  calls = []
  inner = toy.mixture_denoiser(mixture(), LINEAR)

  def denoise(x, t):
    assert x.shape == (1, 2) and t.shape == ()
    jax.debug.callback(lambda: calls.append(None))
    return inner(x, t)

  alone = jax.jit(lambda x: odes.solve(denoise, LINEAR, x, 1.0, 0.001))
  out, _ = solved()
  for row in (0, 5):
    calls.clear()
    x, count = alone(rows()[row : row + 1])
    jax.effects_barrier()
    assert count.shape == (1,) and count[0] == len(calls)
    np.testing.assert_allclose(x[0], out[row], rtol=0, atol=5e-5)  # rounding can refuse a step


def test_a_row_that_does_not_arrive_is_not_a_number():
  expected, count = solved()
  allowed = int(np.median(count)) // 6
  out, _ = solved(max_steps=allowed)
  late = (np.asarray(count) - 1) // 6 > allowed
  assert 0 < late.sum() < 16
  np.testing.assert_array_equal(np.isnan(out), np.stack([late, late], axis=1))
  np.testing.assert_allclose(out[~late], expected[~late], rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(
  "start, end", [(1.0, 0.1), (0.5, 0.0), (0.5, 1.0), (0.5, 0.5), (1.5, 0.5), (0.5, -0.1)]
)
def test_impossible_times_are_refused(start, end):
  with pytest.raises(ValueError, match="between two times"):
    odes.solve(lambda x, t: x, FLOW, jnp.zeros((1, 2)), start, end)


def likelihood(schedule, start, end, dtype, **kwargs):
  """Of the mixture, what is exact at the start included; (x, probes) -> as `log_likelihood`."""
  law = mixture(dtype)
  noised = toy.noised(law, float(schedule.alpha(start)), float(schedule.sigma(start)))
  denoise = toy.mixture_denoiser(law, schedule)
  prior = lambda x: toy.mixture_log_prob(noised, x[None])[0]
  given = {"start": start, "end": end, "prior_log_prob": prior, **kwargs}
  return jax.jit(
    lambda x, probes=None: odes.log_likelihood(denoise, schedule, x, probes=probes, **given)
  )


def test_the_likelihood_of_a_mixture_is_its_density():
  x = draws(LINEAR, 0.001, 64)
  out, count = likelihood(LINEAR, 1.0, 0.001, jnp.float32)(jnp.asarray(x, jnp.float32))
  error = (out - log_density(x, LINEAR, 0.001)) / 2 / np.log(2)  # bits per number
  assert out.shape == count.shape == (64,)
  assert np.max(np.abs(error)) < 5e-4 and np.sqrt(np.mean(error**2)) < 1e-4


def test_the_likelihood_is_as_exact_as_asked_for():
  x = draws(FLOW, 0.001, 32)
  with jax.enable_x64(True):
    function = likelihood(FLOW, 0.99, 0.001, jnp.float64, rtol=1e-8, atol=1e-8)
    out, _ = function(jnp.asarray(x))
  np.testing.assert_allclose(out, log_density(x, FLOW, 0.001), rtol=0, atol=1e-6)


def test_by_default_the_flow_starts_from_pure_noise():
  """Of N(0, v) data the flow is a scaling, so it makes another Gaussian of that noise."""
  variance = 0.3
  std = 80 * np.sqrt((variance + 0.002**2) / (variance + 80**2))
  x = std * np.random.default_rng(0).normal(size=(4, 3, 2))
  denoise = gaussian_denoiser(VE, variance)
  function = lambda x, c: odes.log_likelihood(denoise, VE, x, end=0.002, condition=c)
  out, _ = jax.jit(function)(jnp.asarray(x, jnp.float32), jnp.zeros((4, 1, 1)))
  expected = -0.5 * np.sum((x / std) ** 2, axis=(1, 2)) - 6 * np.log(std * np.sqrt(2 * np.pi))
  np.testing.assert_allclose(out, expected, rtol=0, atol=6e-4)


def test_hutchinsons_estimate_is_unbiased_and_along_the_axes_exact():
  num = 512
  x = np.tile(draws(LINEAR, 0.1, 1, seed=3), (num, 1))
  function = likelihood(LINEAR, 1.0, 0.1, jnp.float32)
  probes = odes.rademacher(targets.keys_of(range(num)), 2, (2,))
  out, _ = function(jnp.asarray(x, jnp.float32), probes)
  out, expected = np.asarray(out, np.float64), log_density(x[:1], LINEAR, 0.1)[0]
  error = np.std(out) / num**0.5
  assert error > 1e-3  # that it is an estimate
  assert abs(np.mean(out) - expected) < 4 * error
  axes = jnp.tile(np.sqrt(2) * jnp.eye(2)[None], (num, 1, 1))
  out, _ = function(jnp.asarray(x, jnp.float32), axes)
  np.testing.assert_allclose(out, expected, rtol=0, atol=3e-4)


def test_probes_are_signs_of_each_rows_own_key():
  probes = odes.rademacher(targets.keys_of([3, 5]), 4, (2, 50))
  assert probes.shape == (2, 4, 2, 50) and set(np.unique(probes)) == {-1, 1}
  np.testing.assert_array_equal(probes[1], odes.rademacher(targets.keys_of([5]), 4, (2, 50))[0])
  assert np.abs(np.mean(probes)) < 4 / 800**0.5 and np.any(probes[0] != probes[1])


@pytest.mark.slow
def test_the_flow_has_gradients():
  """Of N(0, v) data it scales by the ratio of the standard deviations."""
  denoise = lambda x, t: gaussian_denoiser(LINEAR, 0.3)(x, t, 0.0)
  total = lambda t: LINEAR.alpha(t) ** 2 * 0.3 + LINEAR.sigma(t) ** 2

  def first(x):
    return odes.solve(denoise, LINEAR, x, 1.0, 0.1, rtol=1e-3, atol=1e-3, max_steps=64)[0][0, 0]

  out = jax.jit(jax.grad(first))(jnp.array([[0.4, -0.9]]))
  np.testing.assert_allclose(out, [[np.sqrt(total(0.1) / total(1.0)), 0]], rtol=0, atol=2e-3)
