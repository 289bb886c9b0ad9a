"""Advantages by hand, by brute force over subsets and over n-step returns; equal rewards."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.training import advantages

RNG = np.random.default_rng(0)
REWARDS = jnp.array([[1.0, 0.0, 0.0, 3.0], [0.5, 0.5, 0.5, 0.5]])


def test_groups_worked_by_hand():
  centred = advantages.group_centred(REWARDS)
  np.testing.assert_allclose(centred, [[0, -1, -1, 2], [0] * 4], atol=1e-6)
  alone = advantages.leave_one_out(REWARDS)
  np.testing.assert_allclose(alone, [[0, -4 / 3, -4 / 3, 8 / 3], [0] * 4], atol=1e-6)
  for ddof, std in ((1, 2**0.5), (0, 1.5**0.5)):
    found = advantages.group_normalised(REWARDS, ddof=ddof, epsilon=0.1)
    expected = np.array([[0, -1, -1, 2], [0] * 4]) / (std + 0.1)
    np.testing.assert_allclose(found, expected, atol=1e-6)
  greedy = advantages.greedy_baseline(REWARDS, jnp.array([1.0, 2.0]))
  np.testing.assert_allclose(greedy, [[0, -1, -1, 2], [-1.5] * 4], atol=1e-6)


@pytest.mark.parametrize("group", [3, 16])
def test_equal_rewards_have_exactly_no_advantage(group):
  rewards = jnp.array([[0.669], [0.806], [1e-3], [-7.3], [1e6]]) * jnp.ones((1, group))
  failed = jnp.ones((5, group), bool)
  lengths = jnp.asarray(RNG.integers(1, 9, (5, group)))
  for found in (
    advantages.group_centred(rewards),
    advantages.group_normalised(rewards, epsilon=1e-8),
    advantages.leave_one_out(rewards),
    advantages.failures_leave_one_out(rewards, failed),
    advantages.optimal_baseline(rewards, lengths),
    advantages.pass_at_k(rewards, k=2),
    advantages.batch_whitened(rewards[:1], jnp.ones((1, group))),
  ):
    assert found.shape[1] == group and not np.any(found)


def test_a_group_of_one():
  one = jnp.array([[2.0]])
  assert advantages.group_normalised(one) == 0 and advantages.group_centred(one) == 0
  with pytest.raises(ValueError, match="two samples or more, not 1"):
    advantages.leave_one_out(one)


def test_failures_are_the_baseline_worked_by_hand():
  rewards = jnp.array([[1.0, 1.0, -0.4, -0.2], [1.0, 1.0, 1.0, -0.5], [1.0, 2.0, 3.0, 4.0]])
  failed = rewards < 0
  found = advantages.failures_leave_one_out(rewards, failed)
  expected = [[1.3, 1.3, -0.2, 0.2], [1.5, 1.5, 1.5, -0.5], [1, 2, 3, 4]]
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_optimal_baseline_minimises_the_weighted_square():
  rewards, lengths = RNG.normal(size=(3, 8)), RNG.integers(1, 50, (3, 8))
  found = advantages.optimal_baseline(jnp.asarray(rewards, jnp.float32), jnp.asarray(lengths))
  baseline = rewards - np.asarray(found)
  np.testing.assert_allclose(baseline, baseline[:, :1] * np.ones((1, 8)), atol=1e-5)
  square = lambda b: (lengths * (rewards - b) ** 2).sum(axis=1)
  best = square(baseline[:, :1])
  assert np.all(best < square(baseline[:, :1] + 0.01)) and np.all(
    best < square(baseline[:, :1] - 0.01)
  )
  assert np.all(np.isfinite(advantages.optimal_baseline(REWARDS, jnp.zeros((2, 4), jnp.int32))))


def marginal(rewards, k):
  """By every set of k samples: how much each raises the best of its set."""
  found = np.zeros(len(rewards))
  for chosen in itertools.combinations(range(len(rewards)), k):
    for i in chosen:
      others = max(rewards[j] for j in chosen if j != i)
      found[i] += max(rewards[i], others) - others
  return found * len(rewards) / math.comb(len(rewards), k)


@pytest.mark.parametrize("k", [2, 3, 5, 6])
def test_pass_at_k_is_what_a_sample_adds_to_its_sets(k):
  continuous = RNG.normal(size=(3, 6))
  binary = RNG.random((4, 6)) < 0.4
  tied = RNG.integers(0, 3, (4, 6))
  rewards = np.concatenate([continuous, binary, tied])
  found = advantages.pass_at_k(jnp.asarray(rewards, jnp.float32), k=k)
  np.testing.assert_allclose(found, [marginal(row, k) for row in rewards], rtol=1e-5, atol=1e-6)


def test_pass_at_k_of_one_success_worked_by_hand():
  found = advantages.pass_at_k(jnp.array([0.0, 1.0, 0.0, 0.0]), k=2)
  np.testing.assert_allclose(found, [0, 2, 0, 0], rtol=1e-6)
  found = advantages.pass_at_k(jnp.array([0.0, 1.0, 1.0, 0.0]), k=2)  # 2 C(2, 1) / C(3, 1)
  np.testing.assert_allclose(found, [0, 4 / 3, 4 / 3, 0], rtol=1e-6)
  for k in (1, 5):
    with pytest.raises(ValueError, match=r"not within 2 \.\. 4"):
      advantages.pass_at_k(REWARDS, k=k)


def test_soft_value_lies_between_the_mean_and_the_best():
  value = lambda beta: advantages.soft_value(REWARDS[0], beta=beta)
  assert value(1e3) == pytest.approx(1.0, abs=2e-3)
  assert value(1e-3) == pytest.approx(3.0, abs=2e-3)
  expected = math.log((math.e + 2 + math.exp(3)) / 4)
  assert value(1.0) == pytest.approx(expected, rel=1e-5)


def test_whitening_of_a_masked_batch():
  values = jnp.asarray(RNG.normal(3, 2, (4, 5)), jnp.float32)
  mask = jnp.asarray(RNG.random((4, 5)) < 0.6)
  found = np.asarray(advantages.batch_whitened(jnp.where(mask, values, jnp.nan), mask))
  kept = found[np.asarray(mask)]
  assert kept.mean() == pytest.approx(0, abs=1e-5) and kept.std(ddof=1) == pytest.approx(
    1, rel=1e-5
  )
  assert np.corrcoef(kept, np.asarray(values)[np.asarray(mask)])[0, 1] > 0.99999
  assert not np.any(found[~np.asarray(mask)])
  assert not np.any(advantages.batch_whitened(values, jnp.zeros((4, 5))))


def n_step(rewards, values, gamma, lam):
  """The lambda-return of a row without gaps: the mixture of its n-step returns."""
  length, returns = len(rewards), []
  for t in range(length):
    total, steps = 0.0, length - t
    for n in range(1, steps + 1):
      bootstrap = gamma**n * values[t + n]
      n_return = sum(gamma**i * rewards[t + i] for i in range(n)) + bootstrap
      total += ((1 - lam) * lam ** (n - 1) if n < steps else lam ** (n - 1)) * n_return
    returns.append(total)
  return np.array(returns)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (0.9, 0.0), (0.8, 1.0)])
def test_lambda_returns_are_mixtures_of_n_step_returns_of_the_kept_tokens(gamma, lam):
  rewards, values = RNG.normal(size=(4, 6)), RNG.normal(size=(4, 7))
  mask = np.array(
    [[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 1, 0, 1, 1, 0]], bool
  )
  junk = [jnp.asarray(np.where(mask, x, np.nan), jnp.float32) for x in (rewards, values[:, :-1])]
  given = jnp.concatenate([junk[1], jnp.asarray(values[:, -1:], jnp.float32)], axis=1)
  found = advantages.lambda_returns(junk[0], given, jnp.asarray(mask), gamma=gamma, lam=lam)
  errors = advantages.gae(junk[0], given, jnp.asarray(mask), gamma=gamma, lam=lam)
  for b, kept in enumerate(mask):
    row = n_step(rewards[b, kept], [*values[b, :-1][kept], values[b, -1]], gamma, lam)
    np.testing.assert_allclose(np.asarray(found)[b, kept], row, rtol=1e-4, atol=1e-5)
    expected = row - values[b, :-1][kept]
    np.testing.assert_allclose(np.asarray(errors)[b, kept], expected, rtol=1e-4, atol=1e-5)
    assert not np.any(np.asarray(found)[b, ~kept]) and not np.any(np.asarray(errors)[b, ~kept])


def test_reinforce_plus_plus_whitens_returns_to_go():
  rewards = np.zeros((2, 4))
  rewards[0, 2], rewards[1, 3], rewards[1, 1] = 1, -1, 0.5
  mask = jnp.array([[1, 1, 1, 0], [1, 1, 1, 1]])
  found = advantages.reinforce_plus_plus(jnp.asarray(rewards, jnp.float32), mask, gamma=0.5)
  returns = np.array([0.25, 0.5, 1, 0.125, 0.25, -0.5, -1])
  expected = (returns - returns.mean()) / returns.std(ddof=1)
  np.testing.assert_allclose(np.asarray(found)[np.asarray(mask) != 0], expected, rtol=1e-5)
