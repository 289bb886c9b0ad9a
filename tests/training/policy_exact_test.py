"""The policy gradient by enumeration: a softmax table of 3 tokens, 3 places and 27 sequences."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.training import advantages, aggregation, importance, kl, policy

V, T = 3, 3
SEQUENCES = np.array(list(itertools.product(range(V), repeat=T)))  # [27, 3]
PREFIX = np.stack([np.zeros(27, int), 1 + SEQUENCES[:, 0], 4 + SEQUENCES[:, :2] @ [3, 1]], axis=1)
RNG = np.random.default_rng(0)
TABLE = jnp.asarray(RNG.normal(size=(1 + 3 + 9, V)), jnp.float32)  # logits after each prefix
OTHER = TABLE + jnp.asarray(0.5 * RNG.normal(size=TABLE.shape), jnp.float32)
REWARD = np.float32(RNG.normal(size=27))
SOLVED = np.float32(RNG.random(27) < 0.3)
MASK = np.ones((27, T), np.float32)
WORTH = np.float32(REWARD[:, None] * MASK)


def log_probs(table):
  """Of each token of each sequence, [27, 3]."""
  return jax.nn.log_softmax(table)[PREFIX, SEQUENCES]


def law(table):
  """Of sequences, by products of probabilities in float64, [27]."""
  p = np.exp(np.asarray(table, np.float64))
  return (p / p.sum(axis=-1, keepdims=True))[PREFIX, SEQUENCES].prod(axis=-1)


def probabilities(table):
  return jnp.exp(jnp.sum(log_probs(table), axis=-1))


def gradient_of_mean(values):
  """d / d table of sum p(sequence) value(sequence)."""
  return jax.grad(lambda table: jnp.dot(probabilities(table), values))(TABLE)


def per_sequence(surrogate, old=None):
  """The gradient of each sequence's summed loss, [27, ...]."""
  old = log_probs(TABLE) if old is None else old
  losses = lambda table: surrogate(log_probs(table), old, WORTH, MASK)
  return jax.jacobian(lambda table: aggregation.sequence_sum(losses(table), MASK)[0])(TABLE)


SCORES = np.asarray(
  jax.jacobian(lambda table: jnp.sum(log_probs(table), axis=-1))(TABLE), np.float64
)
LAW = law(TABLE)
SURROGATES = [
  policy.reinforce,
  policy.ppo_clip,
  policy.dual_clip,
  policy.gspo,
  policy.gspo_token,
  policy.cispo,
  policy.sapo,
  policy.gmpo,
  functools.partial(policy.oreal, positive=1.0, negative=1.0),
  policy.dro,
]


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_the_mean_gradient_is_that_of_the_mean_reward(surrogate):
  mean = np.tensordot(LAW, np.asarray(per_sequence(surrogate), np.float64), 1)
  expected = -np.asarray(gradient_of_mean(REWARD))
  np.testing.assert_allclose(mean, expected, atol=1e-6)
  assert np.abs(expected).max() > 0.05


@pytest.mark.parametrize("surrogate", [policy.reinforce, policy.dual_clip, policy.gspo])
def test_samples_agree_with_the_exact_gradient(surrogate):
  num = 20000
  counts = np.random.default_rng(1).multinomial(num, LAW)
  each = np.asarray(per_sequence(surrogate), np.float64)
  mean = np.tensordot(counts / num, each, 1)
  error = np.sqrt(np.tensordot(counts / num, np.square(each - mean), 1) / num)
  exact = -np.asarray(gradient_of_mean(REWARD))
  assert np.all(np.abs(mean - exact) < 4 * error + 1e-7)
  assert error.max() < 0.1 * np.abs(exact).max()


def test_weights_of_whole_sequences_make_another_samplers_gradient_exact():
  log_ratio = log_probs(TABLE) - log_probs(OTHER)
  weight = importance.truncated_sequence(log_ratio, MASK, cap=np.inf)
  weighted = lambda *arguments: weight * policy.reinforce(*arguments)
  mean = np.tensordot(law(OTHER), np.asarray(per_sequence(weighted), np.float64), 1)
  expected = -np.asarray(gradient_of_mean(REWARD))
  np.testing.assert_allclose(mean, expected, atol=1e-6)
  plain = np.tensordot(law(OTHER), np.asarray(per_sequence(policy.reinforce), np.float64), 1)
  tokens = importance.truncated_tokens(log_ratio, MASK, cap=np.inf)
  weighted = lambda *arguments: tokens * policy.reinforce(*arguments)
  by_token = np.tensordot(law(OTHER), np.asarray(per_sequence(weighted), np.float64), 1)
  off = lambda x: np.abs(x - expected).max()
  assert off(plain) > off(by_token) > 1e-2


def of_groups(advantage, size):
  """E[mean over a group of A_i grad log pi_i], through every group of so many sequences."""
  groups = np.array(list(itertools.product(range(27), repeat=size)))
  chance = LAW[groups].prod(axis=-1)
  weight = np.asarray(advantage(groups), np.float64) * chance[:, None] / size
  per_sequence = np.zeros(27)
  np.add.at(per_sequence, groups.ravel(), weight.ravel())
  return np.tensordot(per_sequence, SCORES, 1)


@pytest.mark.parametrize("size", [2, 3])
def test_leave_one_out_is_unbiased(size):
  found = of_groups(lambda groups: advantages.leave_one_out(jnp.asarray(REWARD[groups])), size)
  np.testing.assert_allclose(found, gradient_of_mean(REWARD), atol=1e-6)


def test_failures_leave_one_out_is_unbiased():
  found = of_groups(
    lambda groups: advantages.failures_leave_one_out(
      jnp.asarray(REWARD[groups]), jnp.asarray(REWARD[groups] < 0.3)
    ),
    3,
  )
  np.testing.assert_allclose(found, gradient_of_mean(REWARD), atol=1e-6)


def test_greedy_baseline_is_unbiased():
  found = of_groups(
    lambda groups: advantages.greedy_baseline(
      jnp.asarray(REWARD[groups]), jnp.full(len(groups), 0.7)
    ),
    1,
  )
  np.testing.assert_allclose(found, gradient_of_mean(REWARD), atol=1e-6)


def test_a_centred_group_has_that_gradient_times_its_factor_and_a_normalised_one_another():
  exact = np.asarray(gradient_of_mean(REWARD))
  found = of_groups(lambda groups: advantages.group_centred(jnp.asarray(REWARD[groups])), 3)
  np.testing.assert_allclose(found, 2 / 3 * exact, atol=1e-6)
  found = of_groups(lambda groups: advantages.group_normalised(jnp.asarray(REWARD[groups])), 3)
  scale = np.vdot(found, exact) / np.vdot(exact, exact)
  assert np.abs(found - scale * exact).max() > 0.01 * np.abs(scale * exact).max()


@pytest.mark.parametrize("k, size, rewards", [(2, 2, REWARD), (2, 3, SOLVED), (3, 3, REWARD)])
def test_pass_at_k_is_the_gradient_of_the_best_of_k(k, size, rewards):
  found = of_groups(lambda groups: advantages.pass_at_k(jnp.asarray(rewards[groups]), k=k), size)
  order = np.argsort(rewards)

  def best(table):  # E[max of k] = sum of r_(i) (F_i^k - F_(i-1)^k), F the law's distribution
    below = jnp.cumsum(probabilities(table)[order])
    chance = jnp.diff(below**k, prepend=0.0)
    return jnp.dot(chance, rewards[order])

  np.testing.assert_allclose(found, jax.grad(best)(TABLE), atol=2e-6)


FIRST = jax.nn.log_softmax(TABLE[0])  # one token, [3]
FIRST_REFERENCE = jax.nn.log_softmax(OTHER[0])


def mean_gradient(estimator):
  """E_pi[grad estimator] by the logits of one token, samples held fixed."""
  chance = jnp.exp(FIRST)
  return jax.grad(
    lambda logits: jnp.dot(chance, estimator(jax.nn.log_softmax(logits), FIRST_REFERENCE))
  )(FIRST)


def reverse(logits):
  log_p = jax.nn.log_softmax(logits)
  return jnp.dot(jnp.exp(log_p), log_p - FIRST_REFERENCE)


def forward(logits):
  return jnp.dot(jnp.exp(FIRST_REFERENCE), FIRST_REFERENCE - jax.nn.log_softmax(logits))


def test_gradients_of_kl_estimators_are_those_of_three_different_things():
  of_reverse, of_forward = jax.grad(reverse)(FIRST), jax.grad(forward)(FIRST)
  assert np.abs(of_reverse - of_forward).max() > 1e-2
  np.testing.assert_allclose(mean_gradient(kl.k1), np.zeros(3), atol=1e-6)
  np.testing.assert_allclose(mean_gradient(kl.k2), of_reverse, atol=1e-6)
  np.testing.assert_allclose(mean_gradient(kl.k3), of_forward, atol=1e-6)
  through = kl.straight_through(kl.k3, kl.k2)
  np.testing.assert_allclose(mean_gradient(through), of_reverse, atol=1e-6)


def test_values_of_kl_estimators_are_the_kl_but_for_k2():
  mean = lambda estimator: float(jnp.dot(jnp.exp(FIRST), estimator(FIRST, FIRST_REFERENCE)))
  exact = float(reverse(FIRST))
  for estimator in (kl.k1, kl.k3, kl.straight_through(kl.k1, kl.k2)):
    assert mean(estimator) == pytest.approx(exact, rel=1e-4)
  assert abs(mean(kl.k2) - exact) > 1e-3


@pytest.mark.parametrize("estimator", [kl.k1, kl.k3])
@pytest.mark.parametrize("old", [FIRST, FIRST_REFERENCE, jax.nn.log_softmax(OTHER[1])])
def test_importance_weighted_estimators_have_the_kl_and_its_gradient(estimator, old):
  weighted = kl.importance_weighted(estimator)
  mean = lambda logits: jnp.dot(
    jnp.exp(old), weighted(jax.nn.log_softmax(logits), FIRST_REFERENCE, old)
  )
  value, gradient = jax.value_and_grad(mean)(FIRST)
  np.testing.assert_allclose(value, reverse(FIRST), atol=1e-6)
  np.testing.assert_allclose(gradient, jax.grad(reverse)(FIRST), atol=1e-6)
