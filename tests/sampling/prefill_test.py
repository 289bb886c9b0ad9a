"""The prompts' way into the cache: in chunks, once for several samples, and room that grows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.sampling import decode

TARGETS = {
  "table": lambda: targets.table_target(vocab_size=23, order=2),
  "transformer": lambda: targets.tiny_target(num_layers=1),
}
REQUESTS = {0: [3, 1, 4], 1: [1], 2: [5, 9, 2, 6, 5, 3, 5], 3: [8, 9, 7, 9], 4: [3, 2]}


def test_prompts_wider_than_the_cache_are_refused():
  model, params = targets.markov_target()
  with pytest.raises(ValueError, match="5 tokens wide, the cache holds 4"):
    decode.prefill(model, params, targets.prompts_of([[1] * 5]), 4)


@pytest.mark.parametrize("chunk", [1, 2, 4, 6])
def test_prefill_in_chunks_is_the_same_cache(chunk):
  model, params = targets.tiny_target(num_layers=1)
  prompts = targets.prompts_of([[3, 1, 4, 1, 5, 2, 6], [2, 7], [9]], width=12)
  fill = jax.jit(
    lambda params, prompts, chunk: decode.prefill(model, params, prompts, 14, chunk=chunk),
    static_argnums=2,
  )
  whole, parts = fill(params, prompts, 512), fill(params, prompts, chunk)
  np.testing.assert_array_equal(parts.length, prompts.length - 1)
  for b, held in enumerate(prompts.length - 1):
    for one, other in zip(
      jax.tree.leaves(whole.layers), jax.tree.leaves(parts.layers), strict=True
    ):
      np.testing.assert_allclose(one[b, :, :held], other[b, :, :held], atol=1e-6)


def test_prefill_reads_no_chunk_beyond_the_longest_prompt():
  model, params = targets.table_target()
  read = []
  counted = model._replace(
    embed=lambda params, tokens: (
      jax.debug.callback(lambda: read.append(1)),
      model.embed(params, tokens),
    )[1]
  )
  prompts = targets.prompts_of([[1, 2, 3, 1, 2, 3], [1]], width=64)
  cache = jax.jit(lambda params, prompts: decode.prefill(counted, params, prompts, 64, chunk=2))(
    params, prompts
  )
  jax.block_until_ready(cache)
  jax.effects_barrier()
  assert len(read) == 3  # five tokens, by two


def generated(target, prompts, keys, **kwargs):
  model, params = target
  return jax.jit(
    lambda params, keys, prompts: decode.generate(
      model, params, keys, prompts, max_new_tokens=14, stop=(7,), **kwargs
    )
  )(params, keys, prompts)


def assert_same_samples(one, other):
  for name in ("tokens", "length", "prompt_length"):
    np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
  for name in ("log_prob", "model_log_prob"):
    np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=2e-5)


@pytest.mark.parametrize("target", TARGETS)
def test_a_cache_that_grows_draws_the_same(target):
  prompts, keys = targets.prompts_of(list(REQUESTS.values())), targets.keys_of(list(REQUESTS))
  target = TARGETS[target]()
  fixed = generated(target, prompts, keys, bucket=64)
  assert int(fixed.length.max()) > 16  # so it grows
  for bucket in (1, 8, 16):
    assert_same_samples(generated(target, prompts, keys, bucket=bucket), fixed)


@pytest.mark.parametrize(
  "first, last, sizes", [(5, 40, (8, 16, 32, 40)), (9, 9, (9,)), (1, 1, (1,))]
)
def test_buckets_double_up_to_the_room_there_is(first, last, sizes):
  assert decode.buckets(first, last) == sizes


@pytest.mark.parametrize("target", TARGETS)
def test_samples_of_one_prompt_share_its_prefill_and_are_those_of_repeated_prompts(target):
  target, prompts = TARGETS[target](), targets.prompts_of([[3, 1, 4], [1], [5, 9]])
  keys = targets.keys_of(np.arange(6))
  shared = generated(target, prompts, keys, num_samples=2)
  repeated = jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, axis=0), prompts)
  assert_same_samples(shared, generated(target, repeated, keys))
  assert np.any(shared.tokens[::2] != shared.tokens[1::2])


def test_prefill_holds_all_but_the_last_token():
  model, params = targets.tiny_target(scan_layers=False)
  rows = [[3, 1, 4, 1], [5, 9]]
  cache = decode.prefill(model, params, targets.prompts_of(rows), 6)
  np.testing.assert_array_equal(cache.length, [3, 1])
  assert cache.capacity == 6
  other = decode.prefill(model, params, targets.prompts_of([[3, 1, 4, 2], [5, 8]]), 6)
  for one, two in zip(jax.tree.leaves(cache.layers), jax.tree.leaves(other.layers), strict=True):
    np.testing.assert_array_equal(one[0, :, :3], two[0, :, :3])
    np.testing.assert_array_equal(one[1, :, :1], two[1, :, :1])
    assert np.any(one[0, :, :3] != 0)
