"""Steps: the weighted kernel against a loop, which tokens methods weigh, margins, doubt."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.training import preference, stepwise


def test_weighted_ratio_is_a_loop_over_tokens_in_value_and_gradient():
  rng = np.random.default_rng(0)
  ratios, weights = rng.normal(size=(2, 3, 4, 5))
  weights[0, 0] = 0  # a response without tokens
  weights[1, 1, 2:] = 0
  bad = np.where(weights == 0, np.nan, ratios)
  found = stepwise.weighted_ratio(jnp.asarray(bad, jnp.float32), jnp.asarray(weights, jnp.float32))
  expected = np.zeros((3, 4))
  for i, j, t in np.ndindex(3, 4, 5):
    expected[i, j] += weights[i, j, t] * ratios[i, j, t]
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
  gradient = jax.grad(
    lambda x: stepwise.weighted_ratio(x, jnp.asarray(weights, jnp.float32)).sum()
  )(jnp.asarray(bad, jnp.float32))
  np.testing.assert_allclose(gradient, weights, rtol=1e-6)


def test_ones_over_all_tokens_are_dpo_and_weights_over_length_its_mean():
  rng = np.random.default_rng(1)
  tokens = jnp.asarray(rng.normal(size=(2, 6)), jnp.float32)
  plain = preference.dpo(*stepwise.weighted_ratio(tokens, jnp.ones((2, 6))))
  np.testing.assert_allclose(plain, preference.dpo(*jnp.sum(tokens, -1)), rtol=1e-6)
  mean = stepwise.weighted_ratio(tokens, jnp.full((2, 6), 1 / 6))
  np.testing.assert_allclose(mean, np.mean(tokens, -1), rtol=1e-5)


def test_only_the_step_has_a_gradient():
  tokens = [5, 6, 0, 7, 8, 0, 9]
  steps = stepwise.step_numbers(tokens, separator=0)
  np.testing.assert_array_equal(steps, [0, 0, 0, 1, 1, 1, 2])
  wrong = stepwise.first_wrong([True, False, False])
  weight = stepwise.in_step(steps, wrong)
  np.testing.assert_array_equal(weight, [0, 0, 0, 1, 1, 1, 0])
  loss = lambda r: preference.dpo(jnp.zeros(()), stepwise.weighted_ratio(r, jnp.asarray(weight)))
  np.testing.assert_allclose(jax.grad(loss)(jnp.zeros(7)), 0.05 * weight, rtol=1e-6)
  assert stepwise.first_wrong([True, True]) is None


def test_divergence_starts_at_the_first_different_token():
  chosen, rejected = stepwise.after_divergence([1, 2, 3, 4], [1, 2, 5, 4, 6])
  np.testing.assert_array_equal(chosen, [0, 0, 1, 1])
  np.testing.assert_array_equal(rejected, [0, 0, 1, 1, 1])
  chosen, rejected = stepwise.after_divergence([1, 2], [1, 2, 3])
  np.testing.assert_array_equal(chosen, [0, 0])
  np.testing.assert_array_equal(rejected, [0, 0, 1])
  assert not np.concatenate(stepwise.after_divergence([4, 4], [4, 4])).any()


@pytest.mark.parametrize(
  "edited, weights",
  [
    ([1, 2, 9, 4, 5], ([0, 0, 1, 0, 0], [0, 0, 1, 0, 0])),  # replaced
    ([1, 2, 9, 9, 4, 5], ([0, 0, 1, 0, 0], [0, 0, 1, 1, 0, 0])),  # and longer
    ([1, 2, 4, 5], ([0, 0, 1, 0, 0], [0, 0, 0, 0])),  # left out
    ([9, 2, 3, 4, 8], ([1, 0, 0, 0, 1], [1, 0, 0, 0, 1])),  # twice
    ([1, 2, 3, 4, 5], ([0] * 5, [0] * 5)),
  ],
)
def test_changed_tokens_are_those_of_the_edit(edited, weights):
  for found, expected in zip(
    stepwise.changed_tokens([1, 2, 3, 4, 5], edited), weights, strict=True
  ):
    np.testing.assert_array_equal(found, expected)


def test_what_is_not_weighed_is_the_same_in_both():
  rng = np.random.default_rng(0)
  for _ in range(50):
    solution, edited = (rng.integers(0, 4, rng.integers(1, 12)).tolist() for _ in range(2))
    first, second = stepwise.changed_tokens(solution, edited)
    kept = [
      [t for t, w in zip(y, m, strict=True) if w == 0]
      for y, m in ((solution, first), (edited, second))
    ]
    assert kept[0] == kept[1]


def test_step_advantages_telescope_and_weigh_their_tokens():
  values = np.array([0.5, 0.75, 0.25, 1.0])
  advantages = stepwise.step_advantages(values)
  np.testing.assert_array_equal(advantages, [0.25, -0.5, 0.75])
  assert advantages.sum() == values[-1] - values[0]
  weights = stepwise.of_steps(np.array([0, 0, 1, 2]), advantages)
  np.testing.assert_array_equal(weights, [0.25, 0.25, -0.5, 0.75])
  assert stepwise.step_advantages(np.zeros((4, 6))).shape == (4, 5)


def test_best_and_worst_make_a_pair_only_where_they_differ():
  assert stepwise.best_and_worst([0.1, 0.9, -0.3, 0.9]) == (1, 2)
  assert stepwise.best_and_worst([0.5, 0.5]) is None


def test_step_apo_asks_for_a_margin_of_the_advantage():
  # beta (c - r) = log 4 + alpha (Q_w - Q_l): sigmoid 4/5
  gap = 2 * (0.5 - -0.5)
  chosen = jnp.array([(math.log(4) + gap) / 0.3], jnp.float32)
  loss = lambda c: stepwise.step_apo(
    c, jnp.zeros(1), jnp.full(1, 0.5), jnp.full(1, -0.5), alpha=2.0
  )
  np.testing.assert_allclose(loss(chosen), math.log(5 / 4), rtol=1e-5)
  np.testing.assert_allclose(jax.grad(lambda c: loss(c)[0])(chosen), [-0.3 / 5], rtol=1e-5)
  same = stepwise.step_apo(chosen, jnp.zeros(1), jnp.ones(1), jnp.ones(1))
  np.testing.assert_allclose(same, preference.dpo(chosen, jnp.zeros(1), beta=0.3), rtol=1e-6)


def test_visit_smoothing_is_the_share_of_the_worse_step_up_to_a_half():
  chosen, rejected = jnp.array([3, 10, 0, 2, 0]), jnp.array([1, 0, 1, 8, 0])
  found = stepwise.visit_smoothing(chosen, rejected)
  np.testing.assert_allclose(found, [1 / 4, 0, 1 / 2, 1 / 2, 0])
