"""Resampling: unbiased by counting, with the copies that each rule promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.sampling import resampling

WEIGHTS = np.array([0.05, 0.0, 0.43, 0.12, 0.4])
RULES = [resampling.multinomial, resampling.residual, resampling.systematic]


def log(weights):
  with np.errstate(divide="ignore"):
    return jnp.asarray(np.log(weights), jnp.float32)


def copies(rule, weights, num=20000, shift=3.0):
  rows = jnp.broadcast_to(log(weights)[None] + shift, (num, len(weights)))
  ancestors = np.asarray(jax.jit(rule)(targets.keys_of(np.arange(num)), rows))
  assert ancestors.dtype == np.int32 and ancestors.shape == (num, len(weights))
  return np.stack([(ancestors == n).sum(axis=1) for n in range(len(weights))], axis=1)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_copies_are_n_times_the_weight_on_average(rule):
  found, n = copies(rule, WEIGHTS), len(WEIGHTS)
  assert np.all(found.sum(axis=1) == n)
  assert np.all(found[:, WEIGHTS == 0] == 0)
  error = found.std(axis=0, ddof=1) / np.sqrt(len(found))
  assert np.all(np.abs(found.mean(axis=0) - n * WEIGHTS) <= 4 * error + 1e-6)


def test_how_much_copies_vary():
  """Multinomially n w (1 - w); of the others at least the floor, and of systematic one more."""
  n = len(WEIGHTS)
  independent, rest, even = (copies(rule, WEIGHTS) for rule in RULES)
  expected = n * WEIGHTS * (1 - WEIGHTS)
  np.testing.assert_allclose(independent.var(axis=0), expected, rtol=0.05, atol=1e-9)
  floor = np.floor(n * WEIGHTS)
  assert np.all(rest >= floor) and np.all(even >= floor) and np.all(even <= floor + 1)
  part = n * WEIGHTS - floor
  np.testing.assert_allclose(even.var(axis=0), part * (1 - part), rtol=0.05, atol=1e-9)
  assert np.all(rest.var(axis=0) <= independent.var(axis=0) + 1e-9)


@pytest.mark.parametrize("rule", RULES[1:], ids=lambda rule: rule.__name__)
def test_weights_alike_leave_everyone_one_copy(rule):
  for n in (1, 3, 16):
    found = copies(rule, np.full(n, 1 / n), num=500)
    assert found.min() >= 0 and np.mean(found == 1) > 0.99  # but for n (1 / n) < 1 in float32
    np.testing.assert_array_equal(found.sum(axis=1), n)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_one_that_lives_has_all_the_copies(rule):
  for alive in range(4):
    np.testing.assert_array_equal(copies(rule, np.eye(4)[alive], num=300)[:, alive], 4)


def test_the_last_point_does_not_fall_on_who_weighs_nothing():
  """With many particles the sum of weights is not 1 in float32; those that end it weigh 0."""
  weights = np.append(np.random.default_rng(0).dirichlet(np.ones(3000)), np.zeros(1000))
  found = copies(resampling.systematic, weights, num=200)
  assert found[:, 3000:].sum() == 0


def test_effective_size():
  rows = np.stack([np.full(4, 0.25), [1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.7, 0.1, 0.1, 0.1]])
  expected = [4, 1, 2, 1 / np.sum(rows[3] ** 2)]
  for shift in (0.0, -200.0, 200.0):
    found = resampling.effective_size(log(rows) + shift)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
  np.testing.assert_array_equal(resampling.effective_size(jnp.full((1, 3), -jnp.inf)), [0])
