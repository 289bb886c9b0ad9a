"""Toy models: their closed forms against the models themselves, quadrature and brute force."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.models import base, toy


def law_by_model(model, params, prompt, vocab_size, num_tokens):
  """p(x_1 .. x_n | prompt), from one full pass over every continuation."""
  continuations = list(itertools.product(range(vocab_size), repeat=num_tokens))
  tokens = np.array([(*prompt, *continuation) for continuation in continuations])
  hidden, _ = base.apply(model, params, jnp.asarray(tokens))
  conditional = targets.softmax(model.readout(params, hidden))
  law = np.zeros((vocab_size,) * num_tokens)
  for row, continuation in zip(conditional, continuations, strict=True):
    law[continuation] = np.prod(
      [row[len(prompt) - 1 + i, token] for i, token in enumerate(continuation)]
    )
  return law


@pytest.mark.parametrize(
  "order, prompt", [(0, (1,)), (1, (2,)), (2, (1,)), (2, (2, 0, 1)), (3, (1, 2))]
)
def test_table_law_is_the_models(order, prompt):
  model, params = targets.table_target(vocab_size=3, order=order)
  law = toy.table_law(targets.softmax(params), prompt, 3)
  assert law.sum() == pytest.approx(1, abs=1e-12)
  np.testing.assert_allclose(law, law_by_model(model, params, prompt, 3, 3), rtol=1e-5)


def test_markov_law_is_the_models():
  model, params = targets.markov_target(vocab_size=3)
  law = toy.markov_law(np.exp(params), 2, 3)
  assert law.sum() == pytest.approx(1, abs=1e-6)
  np.testing.assert_allclose(law, law_by_model(model, params, (0, 2), 3, 3), rtol=1e-5)


def test_markov_init_is_a_transition_matrix_of_its_size():
  params = toy.markov(4).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  assert params.shape == (4, 4)
  np.testing.assert_allclose(np.exp(params).sum(axis=1), 1, rtol=1e-6)


def test_cache_of_a_toy_equals_the_full_pass():
  model, params = targets.table_target(vocab_size=4, order=3)
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 4, (2, 8)))
  expected, _ = targets.apply(model, params, tokens)
  _, cache = targets.apply(model, params, tokens[:, :5], model.init_cache(params, 2, 8))
  cache = cache._replace(length=jnp.array([2, 5]))
  for i in range(3):
    at = cache.length[:, None]
    hidden, cache = targets.apply(model, params, jnp.take_along_axis(tokens, at, 1), cache)
    np.testing.assert_array_equal(hidden[0, 0], expected[0, 2 + i])
    np.testing.assert_array_equal(hidden[1, 0], expected[1, 5 + i])


def test_a_masked_toy_reads_what_it_may_attend_to_in_the_order_of_slots():
  model, params = targets.table_target(vocab_size=4, order=3)
  tokens = jnp.array([[3, 1, 2, 0, 1]])
  mask = np.tril(np.ones((1, 5, 5), bool))
  mask[:, 3, [1, 2]] = False  # 3, 0
  mask[:, 4, 3] = False  # 3, 1, 2, 1
  hidden, _ = targets.apply(model, params, tokens, mask=jnp.asarray(mask))
  for i, seen in enumerate(([3], [3, 1], [3, 1, 2], [3, 0], [3, 1, 2, 1])):
    expected, _ = targets.apply(model, params, jnp.array([seen]))
    np.testing.assert_array_equal(hidden[0, i], expected[0, -1])


def alpha(t):
  return jnp.cos(0.5 * jnp.pi * t)


def sigma(t):
  return jnp.sin(0.5 * jnp.pi * t)


@pytest.mark.parametrize("t", [0.05, 0.5, 0.95])
def test_mixture_denoiser_equals_quadrature(t):
  weights, means, variances = np.array([0.3, 0.7]), np.array([-2.0, 1.0]), np.array([0.2, 0.5])
  mixture = toy.GaussianMixture(
    *(jnp.asarray(part, jnp.float32) for part in (weights, means[:, None], variances))
  )
  x = np.linspace(-3, 3, 7)
  out = toy.mixture_denoiser(mixture, alpha, sigma)(
    jnp.asarray(x[:, None], jnp.float32), jnp.float32(t)
  )
  a, s = np.cos(np.pi * t / 2), np.sin(np.pi * t / 2)
  clean = np.linspace(-8, 8, 40_001)
  prior = sum(
    w / v**0.5 * np.exp(-((clean - m) ** 2) / (2 * v))
    for w, m, v in zip(weights, means, variances, strict=True)
  )
  exponent = -((x[:, None] - a * clean[None]) ** 2) / (2 * s**2)
  posterior = prior * np.exp(exponent - exponent.max(axis=1, keepdims=True))
  expected = (posterior * clean).sum(axis=1) / posterior.sum(axis=1)
  np.testing.assert_allclose(out[:, 0], expected, atol=2e-4)


@pytest.mark.parametrize("t", [0.2, 0.7])
def test_mixture_denoiser_obeys_tweedie(t):
  rng = np.random.default_rng(0)
  mixture = toy.GaussianMixture(
    jnp.array([0.2, 0.5, 0.3]),
    jnp.asarray(rng.normal(size=(3, 2)), jnp.float32),
    jnp.array([0.1, 0.4, 0.9]),
  )
  a, s = alpha(t), sigma(t)

  def log_density(x):
    return jax.nn.logsumexp(
      jnp.stack(
        [
          jnp.log(w)
          + jax.scipy.stats.multivariate_normal.logpdf(x, a * m, (a**2 * v + s**2) * jnp.eye(2))
          for w, m, v in zip(*mixture, strict=True)
        ]
      )
    )

  x = jnp.asarray(rng.normal(size=(6, 2)), jnp.float32)
  tweedie = (x + s**2 * jax.jit(jax.vmap(jax.grad(log_density)))(x)) / a
  out = toy.mixture_denoiser(mixture, alpha, sigma)(x, jnp.float32(t))
  np.testing.assert_allclose(out, tweedie, atol=1e-4)


def test_joint_predictor_equals_enumeration():
  vocab_size, length = 3, 3
  joint = np.random.default_rng(0).dirichlet(np.full(27, 0.5)).reshape((3,) * 3)
  joint[1, :, 2] = 0
  joint /= joint.sum()
  tokens = np.array(list(itertools.product(range(4), repeat=length)))
  possible = np.array(
    [joint[tuple(slice(None) if v == 3 else v for v in row)].sum() > 0 for row in tokens]
  )
  tokens = tokens[possible]
  out = toy.joint_predictor(jnp.asarray(joint, jnp.float32))(jnp.asarray(tokens), jnp.float32(0.3))
  for row, log_probs in zip(tokens, out, strict=True):
    expected = np.zeros((length, vocab_size))
    for outcome in itertools.product(range(vocab_size), repeat=length):
      if all(token in (3, value) for token, value in zip(row, outcome, strict=True)):
        for i, value in enumerate(outcome):
          expected[i, value] += joint[outcome]
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.exp(log_probs), expected, atol=1e-5)
    assert np.all(np.isneginf(log_probs[expected == 0]))


def test_joint_predictor_says_nan_where_the_tokens_are_impossible():
  joint = jnp.array([[0.5, 0.0], [0.25, 0.25]])
  out = toy.joint_predictor(joint)(jnp.array([[0, 1], [0, 2]]), jnp.float32(0.5))
  assert np.all(np.isnan(out[0])) and not np.any(np.isnan(out[1]))
