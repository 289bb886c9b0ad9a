"""Block diffusion with a cache: from one token a block, autoregressive, to one block of all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.models import base as models
from ancestral.models import masked as masked_models
from ancestral.sampling import base, blocks, masked, unmasking

V = targets.TINY["vocab_size"] - 1
L = 8


def target():
  return targets.tiny_target(causal=False)


def blank(num=3):
  return jnp.full((num, L), V, jnp.int32)


def drawn(algorithm, tokens, steps):
  @jax.jit
  def run(params, keys, tokens):
    made = algorithm(params)
    state = base.start(keys, made, tokens)
    state, info = base.run(keys, made, state, steps, lambda state, info: info)
    return state.tokens, state.calls, info

  return run(target()[1], targets.keys_of(np.arange(len(tokens))), tokens)


def in_blocks(block_length, rule=None):
  rule = unmasking.top(unmasking.random_order) if rule is None else rule
  return lambda params: blocks.unmask(target()[0], params, rule, block_length, mask=V)


def test_one_block_is_masked_diffusion():
  """The same tokens from the same keys as without a cache."""
  rule = unmasking.top(unmasking.margin, 2)
  predict = lambda params: masked_models.predictor(target()[0], params)
  whole, _, _ = drawn(lambda p: masked.unmask(predict(p), rule, mask=V), blank(), L)
  cached, calls, _ = drawn(in_blocks(L, rule), blank(), L)
  np.testing.assert_array_equal(cached, whole)
  np.testing.assert_array_equal(calls, L // 2)


@pytest.mark.parametrize("block_length", [1, 2, 4])
def test_log_prob_is_that_of_whole_passes_with_the_block_mask(block_length):
  """What the cache gives equals a pass over everything under the block mask, block by block."""
  model, params = target()
  tokens, calls, info = drawn(in_blocks(block_length), blank(), 2 * L)
  written, log_prob = np.asarray(info.written), np.asarray(info.log_prob)
  assert np.all(np.asarray(tokens) < V)
  np.testing.assert_array_equal(calls, L + L // block_length - 1)  # and the last is not cached
  mask = np.broadcast_to(blocks.block_mask(L, block_length), (3, L, L))
  state = np.full((3, L), V)
  for step in range(2 * L):
    for b, i in zip(*np.nonzero(written[step]), strict=True):
      hidden, _ = targets.apply(model, params, jnp.asarray(state), mask=jnp.asarray(mask))
      law = jax.nn.log_softmax(model.readout(params, hidden)[b, i, :-1])
      np.testing.assert_allclose(log_prob[step, b, i], law[tokens[b, i]], atol=2e-4)
    state = np.where(written[step], tokens, state)


def test_blocks_of_one_token_are_autoregressive():
  """The tokens' law is p(x_t | x_<t) of the same weights, read with a causal mask and one mask."""
  model, params = target()
  tokens, _, info = drawn(in_blocks(1), blank(), 2 * L)
  assert np.all(np.asarray(info.written).sum(axis=2) <= 1)
  order = [np.flatnonzero(row.any(axis=1))[0] for row in np.moveaxis(info.written, 2, 0)]
  assert order == sorted(order)
  total = np.asarray(info.log_prob).sum(axis=(0, 2))
  expected = np.zeros(3)
  causal = np.tril(np.ones((L, L), bool))
  for t in range(L):
    seen = jnp.asarray(tokens).at[:, t:].set(V)
    hidden, _ = targets.apply(
      model, params, seen[:, : t + 1], mask=jnp.asarray(causal[None, : t + 1, : t + 1].repeat(3, 0))
    )
    law = jax.nn.log_softmax(model.readout(params, hidden)[:, t, :-1])
    expected += np.asarray(law)[np.arange(3), np.asarray(tokens)[:, t]]
  np.testing.assert_allclose(total, expected, atol=1e-3)


def test_given_blocks_are_read_at_once_and_stay():
  tokens = blank().at[:, :5].set(jnp.arange(5)[None]).at[:, 7].set(3)
  out, calls, info = drawn(in_blocks(2), tokens, 2 * L)
  given = np.asarray(tokens) != V
  np.testing.assert_array_equal(np.asarray(out)[given], np.asarray(tokens)[given])
  assert np.all(np.asarray(out) < V)
  # Blocks of [0, 1], [2, 3] are given; one call writes 5, one caches it, one writes 6.
  np.testing.assert_array_equal(calls, 3)
  np.testing.assert_array_equal(np.asarray(info.written).sum(axis=(0, 2)), 2)


def test_rows_go_at_their_own_pace():
  """A row's tokens do not depend on how far the others have come."""
  early = blank().at[1, :6].set(1).at[2, 4:].set(2)
  together, _, _ = drawn(in_blocks(2), early, 2 * L)

  @jax.jit
  def alone(params, keys, tokens):
    algorithm = in_blocks(2)(params)
    return masked.sample(keys, algorithm, tokens, mask=V)

  for b in range(3):
    out = alone(target()[1], targets.keys_of(np.array([b])), early[b : b + 1])
    np.testing.assert_array_equal(out[0], together[b])


def test_nothing_masked_needs_no_call():
  tokens = jnp.zeros((2, L), jnp.int32)
  out, calls, _ = drawn(in_blocks(2), tokens, 3)
  np.testing.assert_array_equal(out, tokens)
  assert not np.any(calls)


def test_a_length_of_no_whole_blocks_is_refused():
  with pytest.raises(ValueError, match="no whole number of blocks of 3"):
    drawn(in_blocks(3), blank(), 1)


def test_the_model_needs_to_be_told_what_is_cached():
  model, params = target()
  cache = model.init_cache(params, 1, 4)
  with pytest.raises(ValueError, match="bidirectional"):
    models.apply(model, params, jnp.zeros((1, 2), jnp.int32), cache)
