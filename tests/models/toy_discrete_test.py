"""Exact predictors of noised laws, against Bayes by loops."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.models import mask_schedules, toy, toy_discrete

SCHEDULE = mask_schedules.cosine()
JOINT = np.random.default_rng(0).dirichlet(np.full(27, 0.5)).reshape((3,) * 3)


def kernel(alpha, vocab_size):
  """q(x_t | x_0), [V, V]."""
  return alpha * np.eye(vocab_size) + (1 - alpha) / vocab_size


def test_sequences_are_in_the_order_of_the_law():
  law = np.arange(8).reshape(2, 2, 2)
  rows = toy_discrete.sequences(2, 3)
  assert [law[tuple(row)] for row in rows] == list(range(8))


def test_noised_law_by_the_kernel():
  q = kernel(0.3, 3)
  expected = np.einsum("abc,ax,by,cz->xyz", JOINT, q, q, q)
  found = toy_discrete.uniform_noised(jnp.asarray(JOINT, jnp.float32), 0.3)
  np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("given", [(), (1,), (0, 2)])
def test_uniform_predictor_equals_bayes(given):
  times = np.array([0.02, 0.4, 0.99])
  predict = toy_discrete.uniform_predictor(jnp.asarray(JOINT, jnp.float32), SCHEDULE, given=given)
  for t in times:
    q = kernel(float(SCHEDULE.alpha(t)), 3)
    kernels = [np.eye(3) if i in given else q for i in range(3)]
    tokens = toy_discrete.sequences(3, 3)
    expected = np.zeros((27, 3, 3))
    for row, out in zip(tokens, expected, strict=True):
      for outcome in itertools.product(range(3), repeat=3):
        weight = JOINT[outcome] * np.prod([kernels[i][outcome[i], row[i]] for i in range(3)])
        for i in range(3):
          out[i, outcome[i]] += weight
    expected /= expected.sum(-1, keepdims=True)
    found = predict(jnp.asarray(tokens), jnp.full(27, t, jnp.float32))
    np.testing.assert_allclose(np.exp(found), expected, atol=2e-5)


@pytest.mark.parametrize("masks", [False, True])
def test_markov_predictor_equals_that_of_its_law(masks):
  transition = np.random.default_rng(1).dirichlet(np.ones(3), size=3)
  law = jnp.asarray(toy.markov_law(transition, 0, 4), jnp.float32)
  first, chain = (jnp.asarray(a, jnp.float32) for a in (transition[0], transition))
  tokens = jnp.asarray(toy_discrete.sequences(4 if masks else 3, 4))
  t = jnp.linspace(0.01, 1, tokens.shape[0])
  if masks:
    expected = toy.joint_predictor(law)(tokens, t)
    found = toy_discrete.markov_predictor(first, chain)(tokens, t)
  else:
    expected = toy_discrete.uniform_predictor(law, SCHEDULE)(tokens, t)
    found = toy_discrete.markov_predictor(first, chain, SCHEDULE)(tokens, t)
  np.testing.assert_allclose(np.exp(found), np.exp(expected), atol=2e-5)
