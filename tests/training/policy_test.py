"""Surrogates by hand, on policy, at extremes; entropies and the masks of tokens."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.training import policy

RNG = np.random.default_rng(0)
PLAIN_OREAL = functools.partial(policy.oreal, positive=1.0, negative=1.0)
TOKENWISE = [
  policy.reinforce,
  policy.ppo_clip,
  policy.dual_clip,
  policy.gspo_token,
  policy.cispo,
  policy.sapo,
  PLAIN_OREAL,
  policy.dro,
]
SURROGATES = [*TOKENWISE, policy.gspo, policy.gmpo]


def slope(surrogate, ratio, advantage, log_prob=-2.0):
  """The gradient by log pi of one token."""
  one = lambda x: jnp.full((1,), x, jnp.float32)
  old = one(log_prob - math.log(ratio))
  loss = lambda x: surrogate(x, old, one(advantage), one(1)).sum()
  return float(jax.grad(loss)(one(log_prob))[0])


@pytest.mark.parametrize(
  "surrogate, ratio, advantage, expected",
  [
    (policy.ppo_clip, 1.5, 1.0, 0.0),
    (policy.ppo_clip, 0.5, 1.0, -0.5),
    (policy.ppo_clip, 1.5, -1.0, 1.5),  # 0 in EasyDeL 0.3.0
    (policy.ppo_clip, 0.5, -1.0, 0.0),  # 0.5 in EasyDeL 0.3.0
    (policy.ppo_clip, 1.25, 1.0, 0.0),
    (functools.partial(policy.ppo_clip, high=0.28), 1.25, 1.0, -1.25),
    (policy.dual_clip, 2.9, -2.0, 5.8),
    (policy.dual_clip, 3.1, -2.0, 0.0),
    (policy.dual_clip, 3.1, 2.0, 0.0),
    (policy.gspo, 1.0003, 1.0, -1.0003),
    (policy.gspo, 1.0005, 1.0, 0.0),
    (policy.gspo_token, 0.9998, -1.0, 0.9998),
    (policy.gspo_token, 0.9996, -1.0, 0.0),
    (policy.cispo, 1.0, 1.0, -1.0),  # +1 in EasyDeL 0.3.0, without its stop_gradient
    (policy.cispo, 4.0, 1.0, -4.0),
    (policy.cispo, 100.0, 1.0, -5.0),
    (functools.partial(policy.cispo, least=0.5), 0.1, -1.0, 0.5),
    (
      policy.sapo,
      3.0,
      1.0,
      -3.0 / math.cosh(1.0) ** 2,
    ),  # 4 s (1 - s) = 1 / cosh^2(tau (r - 1) / 2)
    (policy.sapo, 3.0, -1.0, 3.0 / math.cosh(1.05) ** 2),
    (policy.gmpo, 1.4, 1.0, -1.4),
    (policy.gmpo, 1.5, 1.0, 0.0),  # e^0.4 = 1.49
    (policy.gmpo, 0.6, -1.0, 0.0),
    (policy.gmpo, 0.7, -1.0, 0.7),
    (policy.oreal, 7.0, 1.5, -1.5),  # cloned
    (policy.oreal, 7.0, -1.0, 3.5),  # half, reweighted
    (policy.reinforce, 7.0, -1.0, 1.0),
    (policy.dro, math.exp(10), 1.0, 0.0),  # A / beta
    (policy.dro, math.exp(20), 1.0, 1.0),
  ],
)
def test_gradients_worked_by_hand(surrogate, ratio, advantage, expected):
  assert slope(surrogate, ratio, advantage) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_values_worked_by_hand():
  old = jnp.log(jnp.array([0.2, 0.2, 0.2]))
  log_prob, mask = old + jnp.log(jnp.array([2.0, 0.5, 4.0])), jnp.array([1, 1, 0])
  advantage = jnp.array([1.0, -2.0, 3.0])
  value = lambda surrogate, **constants: surrogate(log_prob, old, advantage, mask, **constants)
  np.testing.assert_allclose(value(policy.ppo_clip), [-1.2, 1.6, 0], rtol=1e-5)
  np.testing.assert_allclose(value(policy.gspo), [-1, 2, 0], rtol=1e-5)  # 2 / 2 = 1
  np.testing.assert_allclose(
    value(policy.gmpo), [-math.exp(0.0), 2 * math.exp(0.0), 0], rtol=1e-5
  )  # 0.4 - 0.4
  np.testing.assert_allclose(value(policy.oreal), [-math.log(0.4), -0.5 * -2 * 0.5, 0], rtol=1e-5)


def batch(seed=1, shape=(4, 6)):
  rng = np.random.default_rng(seed)
  log_prob = jnp.asarray(-rng.exponential(2, shape), jnp.float32)
  mask = jnp.asarray(rng.random(shape) < 0.6)
  return log_prob, jnp.asarray(rng.normal(size=shape), jnp.float32), mask


@pytest.mark.parametrize("surrogate", TOKENWISE)
def test_on_policy_gradients_of_tokens_are_reinforces(surrogate):
  log_prob, advantage, mask = batch()
  gradient = jax.grad(lambda x: surrogate(x, log_prob, advantage, mask).sum())(log_prob)
  np.testing.assert_allclose(gradient, -np.asarray(advantage * mask), rtol=1e-5)


@pytest.mark.parametrize("surrogate", [policy.gspo, policy.gmpo])
def test_on_policy_gradients_of_rows_are_reinforces_of_the_mean_advantage(surrogate):
  log_prob, advantage, mask = batch()
  gradient = jax.grad(lambda x: surrogate(x, log_prob, advantage, mask).sum())(log_prob)
  count = np.asarray(mask).sum(axis=1, keepdims=True)
  mean = np.asarray(advantage * mask).sum(axis=1, keepdims=True) / np.maximum(count, 1)
  np.testing.assert_allclose(gradient, -mean * np.asarray(mask), rtol=1e-5)


def test_oreals_factors_scale_its_gradient():
  log_prob, advantage, mask = batch()
  loss = lambda x: policy.oreal(x, log_prob, advantage, mask, positive=3.0, negative=0.25).sum()
  scaled = np.where(np.asarray(advantage) > 0, 3, 0.25) * np.asarray(advantage * mask)
  np.testing.assert_allclose(jax.grad(loss)(log_prob), -scaled, rtol=1e-5)


def test_gspos_agree_off_policy_where_a_row_has_one_advantage():
  log_prob, advantage, mask = batch()
  old = log_prob + 0.3 * batch(2)[1]
  advantage = jnp.broadcast_to(advantage[:, :1], advantage.shape)
  wide = {"low": 0.1, "high": 0.1}
  both = [
    jax.value_and_grad(lambda x, f=f: f(x, old, advantage, mask, **wide).sum())(log_prob)
    for f in (policy.gspo, policy.gspo_token)
  ]
  np.testing.assert_allclose(both[0][0], both[1][0], rtol=1e-5)
  np.testing.assert_allclose(both[0][1], both[1][1], rtol=1e-4, atol=1e-6)
  assert 0 < np.any(np.asarray(both[0][1]) != 0, axis=1).sum() < 4  # some rows are clipped


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_masked_tokens_are_not_read(surrogate):
  log_prob, advantage, mask = batch()
  mask = mask.at[2].set(False)
  old = log_prob + 0.1
  junk = [jnp.where(mask, x, bad) for x, bad in ((log_prob, -jnp.inf), (old, -jnp.inf))]
  worth = jnp.where(mask, advantage, jnp.nan)
  loss = lambda x, old, advantage: surrogate(x, old, advantage, mask.astype(jnp.float32)).sum()
  expected = jax.value_and_grad(loss)(log_prob, old, advantage)
  found = jax.value_and_grad(loss)(*junk, worth)
  np.testing.assert_array_equal(found[0], expected[0])
  np.testing.assert_array_equal(found[1], expected[1])
  assert not np.any(surrogate(*junk, worth, mask)[2]) and not np.any(found[1][2])
  assert not np.any(np.asarray(found[1])[~np.asarray(mask)])


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_extreme_ratios_have_finite_values_and_gradients(surrogate):
  sizes = [0.0, 19.0, 21.0, 100.0, 1e3]
  cases = np.array(list(itertools.product(sizes, [-1, 1], [-1, 0, 1])))
  for shape in ((30, 1), (5, 6)):  # a row each, and all of one size in a row, which cancel
    log_ratio = jnp.asarray((cases[:, 0] * cases[:, 1]).reshape(shape), jnp.float32)
    advantage = jnp.asarray(cases[:, 2].reshape(shape), jnp.float32)
    old = jnp.full(shape, -1e3)
    loss = lambda x, old=old, a=advantage: surrogate(x, old, a, jnp.ones(old.shape)).sum()
    value, gradient = jax.value_and_grad(loss)(old + log_ratio)
    assert np.isfinite(value) and np.all(np.isfinite(gradient))
  assert surrogate in (policy.gspo, policy.gmpo) or np.any(gradient != 0)


@pytest.mark.parametrize("log_ratio", [-1e3, -1.0, 1.0, 1e3])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_dual_clip_has_a_gradient_only_between_its_bounds(log_ratio, advantage):
  old, one = jnp.full((1,), -3.0), jnp.ones(1)
  loss = lambda x: policy.dual_clip(x, old, advantage * one, one).sum()
  value, gradient = jax.value_and_grad(loss)(old + log_ratio)
  ratio = math.exp(min(log_ratio, 10))
  bounded = min(ratio, 1.2) if advantage > 0 else min(max(ratio, 0.8), 3)
  assert value == pytest.approx(-advantage * bounded, rel=1e-5)
  assert gradient[0] == pytest.approx(-advantage * ratio if bounded == ratio else 0, rel=1e-5)


def test_clip_fraction_marks_the_tokens_without_a_gradient():
  log_prob, advantage, mask = batch()
  old = log_prob + 0.5 * batch(3)[1]
  marked = policy.clip_fraction(log_prob, old, advantage, mask)
  gradient = jax.grad(lambda x: policy.ppo_clip(x, old, advantage, mask).sum())(log_prob)
  np.testing.assert_array_equal(marked, (np.asarray(gradient) == 0) & np.asarray(mask))
  assert 0 < marked.sum() < mask.sum()


def test_entropy_of_laws_worked_by_hand():
  laws = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [1, 2, 1, 0]], jnp.float32)
  entropies = policy.entropy(jnp.log(laws) + 5)
  np.testing.assert_allclose(entropies, [math.log(4), math.log(2), 0, 1.5 * math.log(2)], atol=1e-6)


def test_gradient_of_entropy_is_its_closed_form_with_impossible_tokens():
  logits = jnp.asarray(RNG.normal(0, 3, (5, 7)), jnp.float32).at[0, :3].set(-jnp.inf)
  gradient = jax.grad(lambda x: policy.entropy(x).sum())(logits)
  exact = np.asarray(logits, np.float64)
  p = np.exp(exact - exact.max(axis=-1, keepdims=True))
  p /= p.sum(axis=-1, keepdims=True)
  log_p = np.log(np.where(p > 0, p, 1))
  entropy = -(p * log_p).sum(axis=-1, keepdims=True)
  np.testing.assert_allclose(gradient, -p * (log_p + entropy), atol=1e-6)
  assert np.all(np.isfinite(jax.grad(lambda x: policy.entropy(x).sum())(300 * logits)))


def test_top_entropy_keeps_its_share_of_the_kept_tokens():
  entropy = jnp.asarray(RNG.permutation(40).reshape(4, 10), jnp.float32)
  mask = jnp.ones((4, 10)).at[:, 0].set(0)
  chosen = np.asarray(policy.top_entropy(entropy, mask, share=0.25))
  kept = np.asarray(entropy)[:, 1:]
  assert chosen.sum() == 9 and not chosen[:, 0].any()
  assert set(np.asarray(entropy)[chosen]) == set(np.sort(kept, axis=None)[-9:])
  assert not policy.top_entropy(entropy, jnp.zeros((4, 10))).any()
  assert policy.top_entropy(entropy, mask, share=1.0).sum() == 36


def test_top_covariance_marks_likely_tokens_of_high_advantage():
  log_prob, advantage, mask = batch(4, (5, 20))
  count = int(mask.sum())
  kept = np.asarray(mask)
  log_p, worth = np.asarray(log_prob, np.float64), np.asarray(advantage, np.float64)
  covariance = (log_p - log_p[kept].mean()) * (worth - worth[kept].mean())
  for share, expected in ((2e-4, 1), (0.1, int(0.1 * count))):
    chosen = np.asarray(policy.top_covariance(log_prob, advantage, mask, share=share))
    assert chosen.sum() == expected and not np.any(chosen & ~kept)
    assert covariance[chosen].min() > covariance[kept & ~chosen].max()
  assert not policy.top_covariance(log_prob, advantage, jnp.zeros((5, 20))).any()
