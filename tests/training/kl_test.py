"""Estimators of a KL divergence by hand and at extremes; their laws are in policy_exact_test."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.training import kl

LOG_PROB = jnp.log(jnp.array([0.5, 0.2]))
REFERENCE = jnp.log(jnp.array([0.25, 0.6]))
THROUGH = kl.straight_through(kl.k3, kl.k2)


@pytest.mark.parametrize(
  "estimator, values, slopes",
  [
    (kl.k1, [math.log(2), -math.log(3)], [1, 1]),
    (kl.k2, [math.log(2) ** 2 / 2, math.log(3) ** 2 / 2], [math.log(2), -math.log(3)]),
    (kl.k3, [0.5 - 1 + math.log(2), 3 - 1 - math.log(3)], [1 - 0.5, 1 - 3]),
    (THROUGH, [0.5 - 1 + math.log(2), 3 - 1 - math.log(3)], [math.log(2), -math.log(3)]),
  ],
)
def test_estimators_worked_by_hand(estimator, values, slopes):
  np.testing.assert_allclose(estimator(LOG_PROB, REFERENCE), values, rtol=1e-5)
  gradient = jax.grad(lambda x: estimator(x, REFERENCE).sum())(LOG_PROB)
  np.testing.assert_allclose(gradient, slopes, rtol=1e-5)


def test_an_importance_weight_worked_by_hand():
  old = jnp.log(jnp.array([0.25, 0.4]))  # ratios 2 and 1 / 2
  weighted = kl.importance_weighted(kl.k1)
  values = weighted(LOG_PROB, REFERENCE, old)
  np.testing.assert_allclose(values, [2 * math.log(2), -0.5 * math.log(3)], rtol=1e-5)
  gradient = jax.grad(lambda x: weighted(x, REFERENCE, old).sum())(LOG_PROB)
  expected = [2 * (1 + math.log(2)), 0.5 * (1 - math.log(3))]
  np.testing.assert_allclose(gradient, expected, rtol=1e-5)


def test_k3_of_a_small_log_ratio_does_not_cancel():
  log_ratio = 1e-3
  found = kl.k3(jnp.zeros(1), jnp.full(1, log_ratio))
  assert found[0] == pytest.approx(log_ratio**2 / 2 + log_ratio**3 / 6, rel=1e-3)


ESTIMATORS = [
  kl.k1,
  kl.k2,
  kl.k3,
  THROUGH,
  lambda x, y: kl.importance_weighted(kl.k3)(x, y, jnp.zeros(x.shape)),
]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_extremes_are_finite_and_ties_are_0(estimator):
  log_prob = jnp.array([-1e3, 0.0, -1e3, -20.5, -1e3])
  reference = jnp.array([0.0, -1e3, -1e3, 0.0, -2e3])
  values = estimator(log_prob, reference)
  gradient = jax.grad(functools.partial(lambda x: estimator(x, reference).sum()))(log_prob)
  assert np.all(np.isfinite(values)) and np.all(np.isfinite(gradient))
  assert values[2] == 0
