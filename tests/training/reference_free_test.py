"""Reference-free losses: by hand, the odds near certainty, limits, means over tokens."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.training import preference, reference_free

LOW, HIGH = jnp.array([math.log(1 / 4)], jnp.float32), jnp.array([math.log(1 / 2)], jnp.float32)


def slopes(loss, chosen, rejected):
  return jax.grad(lambda c, r: loss(c, r).sum(), argnums=(0, 1))(chosen, rejected)


def test_length_mean_ignores_padding_of_either_side_and_is_zero_of_nothing():
  log_prob = jnp.array([[-1.0, -3.0, jnp.nan], [-jnp.inf, -2.0, -6.0], [jnp.nan] * 3])
  mask = jnp.array([[1, 1, 0], [0, 1, 1], [0, 0, 0]])
  np.testing.assert_array_equal(reference_free.length_mean(log_prob, mask), [-2, -4, 0])
  gradient = jax.grad(lambda x: reference_free.length_mean(x, mask).sum())(log_prob)
  np.testing.assert_array_equal(gradient, [[0.5, 0.5, 0], [0, 0.5, 0.5], [0, 0, 0]])


def test_simpo_by_hand():
  # beta (w - l) - gamma = 2 log 2 - log 4 = 0
  loss = functools.partial(reference_free.simpo, gamma=math.log(4))
  np.testing.assert_allclose(loss(HIGH, LOW), math.log(2), rtol=1e-5)
  np.testing.assert_allclose(slopes(loss, HIGH, LOW), [[-1.0], [1.0]], rtol=1e-5)
  # with no margin it is DPO without a reference
  loss = functools.partial(reference_free.simpo, beta=0.1, gamma=0.0)
  np.testing.assert_allclose(loss(HIGH, LOW), preference.dpo(HIGH, LOW), rtol=1e-6)


def test_alphapo_by_hand_and_its_limit():
  # alpha = 1: rewards 1 - 1/p are -1 and -3; alpha = -1: rewards p - 1
  for alpha, gap in ((1.0, 2.0), (-1.0, 0.25)):
    loss = functools.partial(reference_free.alphapo, alpha=alpha, beta=1.5, gamma=0.3)
    expected = math.log1p(math.exp(-(1.5 * gap - 0.3)))
    np.testing.assert_allclose(loss(HIGH, LOW), expected, rtol=1e-5)
  limit = reference_free.alphapo(HIGH, LOW, alpha=1e-4)
  np.testing.assert_allclose(limit, reference_free.simpo(HIGH, LOW), rtol=1e-3)


def test_cpo_adds_the_likelihood_of_the_chosen_one():
  found = reference_free.cpo(HIGH, LOW, -HIGH, beta=1.0, nll_weight=0.5)
  np.testing.assert_allclose(found, math.log(3 / 2) + 0.5 * math.log(2), rtol=1e-6)
  loss = lambda w, other: reference_free.cpo(w, other, -w, beta=1.0, nll_weight=0.5)
  np.testing.assert_allclose(slopes(loss, HIGH, LOW), [[-1 / 3 - 0.5], [1 / 3]], rtol=1e-6)


def test_orpo_by_hand():
  # odds 1 and 1/3, of ratio 3; d log odds / d log p = 1 / (1 - p) = 2 and 4/3
  loss = functools.partial(reference_free.orpo, weight=0.5)
  np.testing.assert_allclose(loss(HIGH, LOW), math.log(2) + 0.5 * math.log(4 / 3), rtol=1e-6)
  expected = [[-1 - 0.5 * 2 / 4], [0.5 * (4 / 3) / 4]]
  np.testing.assert_allclose(slopes(loss, HIGH, LOW), expected, rtol=1e-6)


@pytest.mark.parametrize("log_prob", [-1e-6, -1e-3, -0.5, -0.6931, -0.6932, -1.0, -20.0, -300.0])
def test_orpo_near_certainty_and_near_impossibility_is_that_of_float64(log_prob):
  p = np.exp(np.float64(np.float32(log_prob)))
  gap = np.float64(np.float32(log_prob)) - np.log(-np.expm1(np.float64(np.float32(log_prob))))
  x, half = jnp.array([log_prob], jnp.float32), HIGH
  expected = -np.float64(np.float32(log_prob)) + 0.1 * np.logaddexp(0, -gap)
  np.testing.assert_allclose(reference_free.orpo(x, half), [expected], rtol=2e-5)
  slope = -1 - 0.1 / (1 + np.exp(gap)) / -np.expm1(np.log(p))
  np.testing.assert_allclose(slopes(reference_free.orpo, x, half)[0], [slope], rtol=2e-5)


@pytest.mark.parametrize("log_prob", [0.0, -1e-9, -1e-30])
def test_orpo_of_certain_responses_is_finite(log_prob):
  x = jnp.array([log_prob], jnp.float32)
  for pair in ((x, LOW), (LOW, x), (x, x)):
    assert np.isfinite(reference_free.orpo(*pair)).all()
    assert np.isfinite(slopes(reference_free.orpo, *pair)).all()


def test_redi_pulls_with_one_and_pushes_with_alpha():
  np.testing.assert_allclose(
    reference_free.redi(HIGH, LOW), math.log(2) - 0.8 * math.log(4), rtol=1e-6
  )
  np.testing.assert_allclose(slopes(reference_free.redi, HIGH, LOW), [[-1], [0.8]], rtol=1e-6)
