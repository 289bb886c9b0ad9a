"""Likelihoods over all orders, by going through every order and every sequence."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.evaluation import any_order
from ancestral.models import toy, toy_discrete

V, L = 3, 4
RNG = np.random.default_rng(0)
LAW = toy.markov_law(RNG.dirichlet(np.ones(V), size=V), 0, L)
EVERY = jnp.asarray(toy_discrete.sequences(V, L))
EXACT = toy.joint_predictor(jnp.asarray(LAW, jnp.float32))
BUMPS = jnp.asarray(RNG.normal(size=((V + 1) ** L, L, V)), jnp.float32)
PLACES = jnp.asarray((V + 1) ** np.arange(L), jnp.int32)


def perturbed(tokens, t):
  """Conditionals that belong to no law: those of one, moved by a number for each pattern."""
  which = jnp.sum(tokens * PLACES[None], axis=1)
  return jnp.maximum(EXACT(tokens, t), -10) + 0.7 * BUMPS[which]


def _by_orders(predict, tokens):
  """log p_pi(x) of every order, [L!, B], one token at a time, in float64."""
  results = []
  for order in itertools.permutations(range(L)):
    total = np.zeros(len(tokens))
    for k, i in enumerate(order):
      held = np.full(tokens.shape, V)
      held[:, order[:k]] = np.asarray(tokens)[:, order[:k]]
      logits = np.asarray(predict(jnp.asarray(held), jnp.ones(len(tokens))), np.float64)[:, i]
      log_p = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
      total += log_p[np.arange(len(tokens)), np.asarray(tokens)[:, i]]
    results.append(total)
  return np.array(results)


def test_both_are_means_over_orders():
  orders = _by_orders(jax.jit(perturbed), EVERY)
  elbo = any_order.elbo(perturbed, EVERY, mask=V)
  log_likelihood = any_order.log_likelihood(perturbed, EVERY, mask=V)
  np.testing.assert_allclose(elbo, orders.mean(axis=0), atol=1e-5)
  np.testing.assert_allclose(log_likelihood, np.log(np.exp(orders).mean(axis=0)), atol=1e-5)
  assert np.all(elbo < log_likelihood) and np.mean(log_likelihood - elbo) > 0.1


def test_one_order_at_a_time():
  orders = _by_orders(jax.jit(perturbed), EVERY[:5])
  for n, order in enumerate(itertools.permutations(range(L))):
    found = any_order.order_log_likelihood(perturbed, EVERY[:5], order, mask=V)
    np.testing.assert_allclose(found, orders[n], atol=1e-5)


def test_what_random_orders_write_is_a_law():
  log_likelihood = any_order.log_likelihood(perturbed, EVERY, mask=V)
  np.testing.assert_allclose(np.exp(log_likelihood).sum(), 1, atol=1e-5)
  assert np.exp(any_order.elbo(perturbed, EVERY, mask=V)).sum() < 0.99


def test_consistent_conditionals_give_the_law_in_every_order():
  seen = LAW.reshape(-1) > 0
  expected = np.log(LAW.reshape(-1)[seen])
  for f in (any_order.elbo, any_order.log_likelihood):
    np.testing.assert_allclose(f(EXACT, EVERY[seen], mask=V), expected, atol=1e-5)


def test_the_predictor_is_told_the_share_that_is_masked():
  def told(tokens, t):
    share = jnp.mean(tokens == V, axis=1)
    same = jnp.abs(share - jnp.broadcast_to(t, share.shape)) < 1e-6
    return jnp.where(same[:, None, None], jnp.zeros((*tokens.shape, V)), jnp.nan)

  uniform = -L * math.log(V)
  rows = EVERY[:2]
  np.testing.assert_allclose(any_order.elbo(told, rows, mask=V), uniform, rtol=1e-6)
  np.testing.assert_allclose(any_order.log_likelihood(told, rows, mask=V), uniform, rtol=1e-6)
  order = range(L)
  found = any_order.order_log_likelihood(told, rows, order, mask=V)
  np.testing.assert_allclose(found, uniform, rtol=1e-6)


@pytest.mark.parametrize("f", [any_order.elbo, any_order.log_likelihood])
def test_gradients_are_those_of_differences(f):
  row = EVERY[17:18]
  direction = jnp.asarray(RNG.normal(size=V), jnp.float32)

  def value(size):
    predict = lambda tokens, t: (
      perturbed(tokens, t)
      + size
      * direction[None, None]
      * jnp.arange(1.0, L + 1)[None, :, None]
      * (1 + jnp.sum(tokens == V, axis=1))[:, None, None]
    )
    return f(predict, row, mask=V)[0]

  expected = (value(0.02) - value(-0.02)) / 0.04
  np.testing.assert_allclose(jax.jit(jax.grad(value))(0.0), expected, rtol=5e-3)


def test_bad_input_is_named():
  with pytest.raises(ValueError, match=r"2\^17"):
    any_order.elbo(perturbed, jnp.zeros((1, 17), jnp.int32), mask=V)
  with pytest.raises(ValueError, match="order="):
    any_order.order_log_likelihood(perturbed, EVERY, (0, 1, 1, 2), mask=V)
