"""Corrections of the sampler by hand, on policy, of filtered samplers, and at extremes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.training import importance

LOG_RATIO = jnp.log(jnp.array([[0.25, 4.0, 2.0], [6.0, 0.5, 1.0], [8.0, 8.0, 8.0]]))
MASK = jnp.array([[1, 1, 0], [1, 1, 1], [0, 0, 0]])
WEIGHTS = [
  importance.truncated_tokens,
  importance.masked_tokens,
  importance.truncated_sequence,
  importance.masked_sequence,
]


@pytest.mark.parametrize(
  "weigh, expected",
  [
    (importance.truncated_tokens, [[0.25, 2, 0], [2, 0.5, 1]]),
    (importance.masked_tokens, [[0, 4, 0], [0, 0.5, 1]]),
    (functools.partial(importance.masked_tokens, low=0.2, high=3.0), [[0.25, 0, 0], [0, 0.5, 1]]),
    (importance.truncated_sequence, [[1, 1, 0], [3, 3, 3]]),
    (functools.partial(importance.truncated_sequence, cap=2.0), [[1, 1, 0], [2, 2, 2]]),
    (functools.partial(importance.masked_sequence, high=2.9), [[1, 1, 0], [0, 0, 0]]),
    (functools.partial(importance.masked_sequence, low=1.5, high=4), [[0, 0, 0], [3, 3, 3]]),
  ],
)
def test_weights_worked_by_hand(weigh, expected):
  np.testing.assert_allclose(weigh(LOG_RATIO, MASK), [*expected, [0, 0, 0]], rtol=1e-5)


@pytest.mark.parametrize("weigh", WEIGHTS)
def test_weights_are_1_on_policy_and_constants(weigh):
  np.testing.assert_array_equal(weigh(jnp.zeros((3, 3)), MASK), MASK)
  weighted = jax.grad(lambda x: jnp.sum(x * weigh(x, MASK)))(LOG_RATIO)
  np.testing.assert_array_equal(weighted, weigh(LOG_RATIO, MASK))


@pytest.mark.parametrize("weigh", WEIGHTS)
def test_extremes_are_finite_and_masked_tokens_are_not_read(weigh):
  extreme = jnp.array([[1e3, -1e3, 0.0], [-1e3, -1e3, -1e3], [1e3, 1e3, 1e3]])
  weights = weigh(extreme, jnp.ones((3, 3)))
  assert np.all(np.isfinite(weights)) and np.all(np.asarray(weights) >= 0)
  junk = jnp.where(MASK != 0, LOG_RATIO, jnp.nan)
  np.testing.assert_array_equal(weigh(junk, MASK), weigh(LOG_RATIO, MASK))


def test_diagnostics_worked_by_hand():
  found = importance.diagnostics(LOG_RATIO, MASK)
  ratios = np.array([0.25, 4, 6, 0.5, 1])
  assert found.mean_ratio == pytest.approx(ratios.mean(), rel=1e-5)
  assert found.max_ratio == pytest.approx(6, rel=1e-5)
  expected = ratios.sum() ** 2 / (ratios**2).sum() / 5
  assert found.effective_sample_size == pytest.approx(expected, rel=1e-5)


def test_diagnostics_on_policy_of_extremes_and_of_nothing():
  assert importance.diagnostics(jnp.zeros((3, 3)), MASK) == (1, 1, 1)
  found = importance.diagnostics(jnp.array([1e3, -1e3, 0.0, -1e3]), jnp.ones(4))
  assert np.all(np.isfinite(found)) and found.effective_sample_size == pytest.approx(1 / 4)
  found = importance.diagnostics(jnp.full(4, -1e3), jnp.ones(4))
  assert found.effective_sample_size == pytest.approx(1) and found.mean_ratio == 0
  assert importance.diagnostics(jnp.full(4, jnp.nan), jnp.zeros(4)) == (0, 0, 0)


def test_a_trainer_that_ignores_the_samplers_filter_sees_the_kept_mass_as_mean_ratio():
  law = np.array([0.4, 0.3, 0.2, 0.06, 0.04])
  kept = np.array([True, True, True, False, False])  # top-p 0.9
  sampled = np.where(kept, law, 0) / 0.9
  drawn = np.flatnonzero(kept)
  counts = np.round(sampled[drawn] * 900).astype(int)  # every token as often as its law says
  tokens = np.repeat(drawn, counts)
  mask = jnp.ones(len(tokens))
  ignoring = jnp.asarray(np.log(law[tokens]) - np.log(sampled[tokens]), jnp.float32)
  assert importance.diagnostics(ignoring, mask).mean_ratio == pytest.approx(0.9, rel=1e-5)
  carried = np.log(law[tokens] / law[kept].sum()) - np.log(sampled[tokens])
  carried = importance.diagnostics(jnp.asarray(carried, jnp.float32), mask)
  np.testing.assert_allclose(carried, [1, 1, 1], rtol=1e-6)
  assert math.isclose(sampled.sum(), 1)
