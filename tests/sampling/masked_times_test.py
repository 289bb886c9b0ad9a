"""The time that a predictor is told, which one that looks at it depends on.

The predictor's token is the time, in 64ths: what is written says what it was told.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.models import mask_schedules
from ancestral.sampling import base, masked, masked_guidance, remasking, unmasking

V, L, ROWS = 64, 8, 50
SCHEDULE = mask_schedules.polynomial(2.0)
TIMES = jnp.linspace(1, 0, 9)


def code(t):
  """The token that stands for a time in [0, 1]."""
  return np.asarray(jnp.round(jnp.asarray(t) * (V - 1)).astype(jnp.int32))


def predict(tokens, t):
  token = jnp.broadcast_to(jnp.round(t * (V - 1)), tokens.shape[:1]).astype(jnp.int32)
  law = 100.0 * jax.nn.one_hot(token, V)
  return jnp.broadcast_to(law[:, None], (*tokens.shape, V))


@pytest.mark.parametrize("name", ["ancestral", "remasking", "unmask"])
def test_a_step_is_told_the_time_that_it_starts_from(name):
  algorithm = {
    "ancestral": lambda: masked.ancestral(predict, SCHEDULE, TIMES, mask=V),
    "remasking": lambda: remasking.remasking(predict, SCHEDULE, TIMES, remasking.cap(0.3), mask=V),
    "unmask": lambda: masked.unmask(predict, unmasking.top(unmasking.random_order), mask=V),
  }[name]()
  keys = targets.keys_of(np.arange(ROWS))
  state = base.start(keys, algorithm, jnp.full((ROWS, L), V))
  for k in range(8):
    told = code(jnp.mean(state.tokens == V, axis=1) if name == "unmask" else TIMES[k])
    state, info = jax.jit(algorithm.step)(base.row_keys_at(keys, state.step), state)
    expected = np.broadcast_to(told.reshape(-1, 1), (ROWS, L))[np.asarray(info.written)]
    np.testing.assert_array_equal(np.asarray(state.tokens)[np.asarray(info.written)], expected)
    assert expected.size > 0


def half_written():
  """A state in which every other position is written, with a token that stands for no time."""
  tokens = jnp.full((ROWS, L), V).at[:, ::2].set(V - 2)
  free = jnp.ones((ROWS, L), bool)
  return remasking.start(tokens, V)._replace(free=free, step=jnp.full(ROWS, 5, jnp.int32))


@pytest.mark.parametrize("name", ["gibbs", "forward_backward"])
def test_a_corrector_is_told_the_time_that_it_goes_back_to(name):
  correct, told = {
    "gibbs": (remasking.gibbs(predict, mask=V), (L // 2 + 1) / L),
    "forward_backward": (
      remasking.forward_backward(predict, SCHEDULE, TIMES, 0.25, mask=V),
      TIMES[5] + 0.25,
    ),
  }[name]
  before = half_written()
  tokens = np.asarray(jax.jit(correct)(targets.keys_of(np.arange(ROWS)), before).tokens)
  written = (tokens != V) & (tokens != V - 2)
  assert written.sum() >= ROWS
  np.testing.assert_array_equal(tokens[written], code(told))


def test_a_classifier_is_told_the_time_too():
  """log p(y | .) = t times the number of tokens 1: the law is tilted by exp(t) there."""
  log_prob = lambda tokens, t: t * jnp.sum(tokens == 1, axis=1)
  flat = lambda tokens, t: jnp.zeros((*tokens.shape, 3))
  tokens, t = jnp.full((2, 3), 3), jnp.array([0.25, 2.0])
  logits = masked_guidance.classifier(flat, log_prob)(tokens, t)
  expected = np.broadcast_to(np.array([[[0.25]], [[2.0]]]), (2, 3, 1))
  np.testing.assert_allclose(logits[..., 1:2] - logits[..., :1], expected, rtol=1e-6)
