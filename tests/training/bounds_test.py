"""Bits per dimension: I-MMSE on Gaussian data, each term by itself, and data of exactly one bit."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from ancestral.models import base, schedules
from ancestral.training import bounds

SCHEDULES = {
  "linear": schedules.linear(),
  "cosine": schedules.cosine(),
  "chain": schedules.from_betas(schedules.linear_betas(1000)),
}
ON_EVERY_SCHEDULE = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
SIGNS = jnp.array([-1.0, 1.0])


def within(found, expected, num_errors=4):
  """The mean of `found` is `expected` up to its standard errors, of which one is returned."""
  found = np.asarray(found, np.float64)
  error = found.std() / len(found) ** 0.5
  assert abs(found.mean() - expected) < num_errors * error, (found.mean(), expected, error)
  return error


def test_the_diffusion_term_of_gaussian_data_is_the_gain_of_information():
  """I-MMSE: 1/2 int d v / (1 + v SNR) dSNR = d/2 [ln(1 + v SNR)] between the ends."""
  num, d, v, mean = 40_000, 3, 0.6, 2.0
  low, high = -2.0, 1.5  # of half log SNR
  data_key, noise_key, place_key = jax.random.split(jax.random.key(0), 3)
  clean = mean + v**0.5 * jax.random.normal(data_key, (num, d))
  place = jax.random.uniform(place_key, (num,), minval=low, maxval=high)
  alpha, sigma = (jnp.sqrt(jax.nn.sigmoid(sign * 2 * place))[:, None] for sign in (1, -1))
  x = alpha * clean + sigma * jax.random.normal(noise_key, clean.shape)
  gain = alpha * v / (alpha**2 * v + sigma**2)
  denoised = mean + gain * (x - alpha * mean)
  found = bounds.diffusion_term(denoised, clean, place, high - low)
  assert found.shape == (num,)
  expected = d / 2 * np.log((1 + v * np.exp(2 * high)) / (1 + v * np.exp(2 * low)))
  error = within(found, expected)
  assert error < 0.01 * expected
  worse = bounds.diffusion_term(denoised + 0.1, clean, place, high - low)
  assert np.mean(worse) > expected + 4 * error


def test_the_prior_term_is_a_kl_divergence():
  """By quadrature of p ln (p / q), a coordinate at a time."""
  clean, alpha, sigma = np.array([[0.5, -2.0], [0.0, 3.0]]), 0.3, 0.8
  found = bounds.prior_term(jnp.asarray(clean, jnp.float32), jnp.float32(alpha), jnp.float32(sigma))

  def divergence(value):
    law = stats.norm(alpha * value, sigma)
    return integrate.quad(lambda x: law.pdf(x) * (law.logpdf(x) - stats.norm.logpdf(x)), -9, 9)[0]

  expected = [sum(divergence(value) for value in row) for row in clean]
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  same = bounds.prior_term(jnp.ones((2, 3)), jnp.float32(0), jnp.float32(1))
  np.testing.assert_array_equal(same, 0)


def test_the_reconstruction_term_is_bayes_rule():
  """Over every image of two coordinates of three values, by brute force."""
  values, alpha, sigma = np.array([-1.0, 0.25, 2.0]), 0.9, 0.4
  images = np.array([(a, b) for a in values for b in values])
  x = np.random.default_rng(0).normal(size=(9, 2))
  likelihood = stats.norm(alpha * images[None], sigma).pdf(x[:, None]).prod(axis=-1)
  expected = -np.log(np.diag(likelihood / likelihood.sum(axis=1, keepdims=True)))
  found = bounds.reconstruction_term(
    jnp.asarray(x, jnp.float32),
    jnp.asarray(images, jnp.float32),
    jnp.asarray(values, jnp.float32),
    jnp.float32(alpha),
    jnp.float32(sigma),
  )
  np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_what_is_certain_costs_nothing_to_reconstruct():
  clean = jnp.array([[[1.0, -1.0]]])
  one = bounds.reconstruction_term(clean + 0.001, clean, SIGNS, jnp.float32(1), jnp.float32(1e-3))
  np.testing.assert_array_equal(one, 0)


def sign_denoiser(schedule, certainty=1.0):
  """E[x_0 | x_t] = tanh(alpha x / sigma^2) of coordinates that are 1 or -1, each half of the time.

  Another certainty is that of a denoiser that believes in more or less noise.
  """

  def denoise(x, t):
    alpha, sigma = (base.per_row(f(t), x) for f in (schedule.alpha, schedule.sigma))
    return jnp.tanh(certainty * alpha * x / sigma**2)

  return denoise


def bits_of_signs(schedule, certainty=1.0, shape=(4000, 2, 1), **ends):
  data_key, key = jax.random.split(jax.random.key(1))
  clean = jax.random.rademacher(data_key, shape, jnp.float32)
  denoise = sign_denoiser(schedule, certainty)
  run = lambda key: bounds.bits_per_dim(key, denoise, schedule, clean, SIGNS, **ends)
  return jax.jit(run)(key)


@ON_EVERY_SCHEDULE
def test_fair_signs_are_one_bit(schedule):
  """The exact denoiser closes the bound, but for a prior of 1e-6."""
  within(bits_of_signs(schedule), 1.0)


def test_fair_signs_are_one_bit_within_a_percent():
  """A short integral, of less variance, whose ends give away 1e-5 bits."""
  error = within(
    bits_of_signs(schedules.linear(), shape=(36_000, 4), least=0.1, noisiest=10.0, num_times=32),
    1.0,
  )
  assert 4 * error < 0.01


@pytest.mark.parametrize("ends", [{"least": 0.3, "num_times": 8}, {"noisiest": 0.5}])
def test_the_ends_are_accounted_for(ends):
  """Of noise at which signs can be mistaken, and of so much signal that the prior is wrong."""
  looser = 0.0
  if "noisiest" in ends:  # KL(q(x_T) || N(0, 1)), q the mixture of two normals
    alpha, sigma = 1 / 1.25**0.5, 0.5 / 1.25**0.5

    def gap(x):
      q = (stats.norm(alpha, sigma).pdf(x) + stats.norm(-alpha, sigma).pdf(x)) / 2
      return q * (np.log(q) - stats.norm.logpdf(x))

    looser = integrate.quad(gap, -8, 8)[0] / np.log(2)
    assert looser > 0.1
  within(bits_of_signs(schedules.linear(), shape=(8000, 2), **ends), 1.0 + looser)


@pytest.mark.parametrize("certainty", [0.5, 2.0])
def test_a_wrong_denoiser_costs_what_its_error_is(certainty):
  """The excess is int SNR E|D - D*|^2 dlambda, by quadrature over noise and over x_t."""
  nodes, weights = np.polynomial.hermite_e.hermegauss(80)

  def excess(half_log_snr):
    snr = math.exp(2 * half_log_snr)
    evidence = snr + snr**0.5 * nodes  # alpha x / sigma^2, given x_0 = 1
    apart = np.tanh(certainty * evidence) - np.tanh(evidence)
    return snr * (weights @ apart**2) / weights.sum()

  places = np.linspace(-5, 4, 2001)
  expected = 1 + np.trapezoid([excess(place) for place in places], places) / np.log(2)
  assert expected > 1.03
  within(bits_of_signs(schedules.linear(), certainty), expected)


def test_examples_are_estimated_apart():
  """A coordinate that is known costs nothing; one of two values costs a bit."""
  clean = jnp.stack([jnp.ones(2000), jax.random.rademacher(jax.random.key(2), (2000,), float)], 1)
  schedule = schedules.linear()
  signs = sign_denoiser(schedule)
  denoise = lambda x, t: jnp.stack([jnp.ones(x.shape[0]), signs(x, t)[:, 1]], axis=1)
  run = lambda key: bounds.bits_per_dim(key, denoise, schedule, clean, SIGNS)
  found = jax.jit(run)(jax.random.key(3))
  assert found.shape == (2000,)
  within(found, 0.5)


@pytest.mark.parametrize(
  "schedule",
  [schedules.variance_exploding(), schedules.rectified_flow()],
  ids=["exploding", "flow"],
)
def test_a_schedule_that_does_not_preserve_variance_is_refused(schedule):
  with pytest.raises(ValueError, match=r"alpha\^2 \+ sigma\^2 = 1"):
    bounds.bits_per_dim(
      jax.random.key(0), sign_denoiser(schedule), schedule, jnp.ones((2, 3)), SIGNS
    )
