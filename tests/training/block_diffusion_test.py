"""Block diffusion's loss against a pass for every block, at both ends, and its attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.models import mask_schedules
from ancestral.sampling import blocks
from ancestral.training import block_diffusion, masked

V, L = 5, 7
MODEL, PARAMS = targets.tiny_target(vocab_size=V + 1, causal=False, num_layers=2)
RNG = np.random.default_rng(0)
TOKENS = jnp.asarray(RNG.integers(0, V, (3, L)), jnp.int32)
LEARNED = jnp.asarray([[1] * L, [0, 0] + [1] * (L - 2), [0] * L], jnp.float32)
BATCH = {"tokens": TOKENS, "mask": LEARNED}


@pytest.fixture(autouse=True)
def exact_matmuls():
  with jax.default_matmul_precision("highest"):
    yield


def _run(loss_fn, key, batch=BATCH):
  return jax.jit(loss_fn)(key, PARAMS, batch)


def _log_p(tokens, block_length):
  """log p [L, V] at the positions of one sequence, of a pass without a second stream.

  Where it is shorter than L it is filled up with tokens that no block of it sees.
  """
  tokens = jnp.asarray([*tokens, *[0] * (L - len(tokens))], jnp.int32)
  seen = blocks.block_mask(L, block_length)[None]
  hidden, _ = targets.apply(MODEL, PARAMS, tokens[None], mask=seen)
  return np.asarray(jax.nn.log_softmax(MODEL.readout(PARAMS, hidden)[0, :, :V], axis=-1))


def test_what_each_position_sees():
  for length, size in ((6, 2), (5, 2), (4, 1), (4, 4), (3, 8)):
    seen = np.asarray(block_diffusion.two_stream_mask(length, size))
    for query in range(2 * length):
      for key in range(2 * length):
        b, c = query % length // size, key % length // size
        noisy = query < length
        expected = (b == c if noisy else False) if key < length else (c < b if noisy else c <= b)
        assert seen[query, key] == expected


@pytest.mark.parametrize("name", ["count", "time"])
def test_blocks_of_one_are_autoregressive(name):
  """Masked at all times, a token costs exactly -log p(x_i | x_<i)."""
  always = lambda key, num: jnp.full(num, 1 - 2.0**-24)
  masking = {
    "count": masked.by_count(),
    "time": masked.by_time(mask_schedules.linear(), quantiles=always),  # all masked, of weight 1
  }[name]
  loss_fn = block_diffusion.block_diffusion(MODEL, masking, 1, mask=V)
  (losses, weights), _ = _run(loss_fn, jax.random.key(0))
  expected = np.zeros(3)
  for b in range(3):
    for i in range(L):
      if LEARNED[b, i]:
        log_p = _log_p([*np.asarray(TOKENS[b, :i]), V], 1)
        expected[b] -= log_p[i, TOKENS[b, i]]
  np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(weights, LEARNED.sum(axis=1))


@pytest.mark.parametrize("size", [L, L + 3])
def test_one_block_is_masked_diffusion(size):
  def masking(key, learned):  # the draws of a row do not depend on what fills its block up
    drawn = masked.by_count()(key, learned[:, :L])
    return drawn._replace(masked=jnp.pad(drawn.masked, ((0, 0), (0, learned.shape[1] - L))))

  whole = _run(masked.masked_diffusion(MODEL, masked.by_count(), mask=V), jax.random.key(1))
  once = _run(block_diffusion.block_diffusion(MODEL, masking, size, mask=V), jax.random.key(1))
  assert once[0][0][0] > 0
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), once, whole)


@pytest.mark.parametrize("size", [2, 3])
def test_each_block_sees_the_clean_ones_before_it(size):
  num_blocks = -(-L // size)
  pattern = RNG.random((3 * num_blocks, size)) < 0.7
  weight = RNG.uniform(0.5, 2, 3 * num_blocks)

  def masking(key, learned):
    return masked.Masked(
      pattern & learned, jnp.ones(len(learned)), jnp.asarray(weight, jnp.float32)
    )

  loss_fn = block_diffusion.block_diffusion(MODEL, masking, size, mask=V, chunk=4)
  (losses, _), metrics = _run(loss_fn, jax.random.key(0))
  expected, right = np.zeros(3), np.zeros(3)
  for b in range(3):
    for n in range(num_blocks):
      places = np.arange(n * size, min((n + 1) * size, L))
      hidden = pattern[b * num_blocks + n][: len(places)] & (np.asarray(LEARNED)[b, places] > 0)
      tokens = np.asarray(TOKENS[b])[: places[-1] + 1].copy()
      tokens[places[hidden]] = V
      log_p = _log_p(tokens, size)
      for i in places[hidden]:
        expected[b] -= weight[b * num_blocks + n] * log_p[i, TOKENS[b, i]]
        right[b] += weight[b * num_blocks + n] * (log_p[i].argmax() == TOKENS[b, i])
  assert np.all(expected[:2] > 0)
  np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(metrics["accuracy"], right, rtol=1e-5, atol=1e-6)


def test_blocks_have_their_own_draws_and_prompts_have_no_loss():
  num = 16
  batch = {"tokens": jnp.tile(TOKENS[:1], (num, 1)), "mask": jnp.ones((num, L)).at[0].set(0)}
  seen = []

  def masking(key, learned):
    drawn = masked.by_count()(key, learned)
    jax.debug.callback(lambda counts: seen.append(counts), drawn.masked.sum(axis=1))
    return drawn

  loss_fn = block_diffusion.block_diffusion(MODEL, masking, 3, mask=V)

  def first(params):
    (losses, weights), _ = loss_fn(jax.random.key(2), params, batch)
    return losses[0], (losses, weights)

  (_, (losses, weights)), slope = jax.jit(jax.value_and_grad(first, has_aux=True))(PARAMS)
  jax.effects_barrier()
  counts = np.asarray(seen[0]).reshape(num, 3)
  assert np.all(counts[0] == 0) and np.all(counts[1:, 2] == 1)
  assert set(counts[1:, :2].ravel()) == {1, 2, 3} and np.any(counts[:, 0] != counts[:, 1])
  assert losses[0] == weights[0] == 0 and np.all(losses[1:] > 0)
  assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(slope))


def test_bad_input_is_named():
  with pytest.raises(ValueError, match="block_length=0"):
    block_diffusion.block_diffusion(MODEL, masked.by_count(), 0, mask=V)
  loss_fn = block_diffusion.block_diffusion(MODEL, masked.by_count(), 2, mask=V)
  with pytest.raises(ValueError, match="packed into rows"):
    loss_fn(jax.random.key(0), PARAMS, {**BATCH, "segments": TOKENS})
