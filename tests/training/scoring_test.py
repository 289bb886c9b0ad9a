"""Scores of what was drawn: the sampler's own law, padding, gradients, on a tiny transformer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.models import toy
from ancestral.sampling import truncation
from ancestral.training import rollouts, scoring

PROMPTS = [[1, 2], [3], [2, 2, 1]]
NEW = 6
FILTERS = {
  "none": (),
  "top_k": (truncation.top_k(3),),
  "top_p": (truncation.top_p(0.7),),
  "both": (truncation.top_k(4), truncation.top_p(0.8), truncation.min_p(0.1)),
}


VOCAB = 7
LAW = np.random.default_rng(0).dirichlet(np.full(VOCAB, 0.7), VOCAB)  # of the next token


def chain():
  return toy.markov(VOCAB), jnp.log(jnp.asarray(LAW, jnp.float32))


def drawn(target, filters=(), temperature=1.0, group_size=40, seed=0):
  model, params = target
  sample = rollouts.sampler(
    model, group_size=group_size, max_new_tokens=NEW, stop=(0,), filters=filters
  )
  keys = targets.keys_of(jnp.arange(len(PROMPTS) * group_size), seed)
  return sample(params, temperature, keys, targets.prompts_of(PROMPTS))


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_trainer_and_sampler_agree_under_filters_and_temperature(name, temperature):
  model, params = chain()
  _, rows = drawn((model, params), FILTERS[name], temperature)
  found = scoring.scores(model, params, rows, temperature=temperature, chunk=4)
  np.testing.assert_allclose(found.log_prob, rows["log_prob"], atol=2e-6)
  mask = np.asarray(rows["mask"]) != 0
  assert abs(np.exp(np.asarray(found.log_prob - rows["log_prob"]))[mask].mean() - 1) < 1e-5
  if name != "none":  # the whole softmax is off by the kept mass
    whole = scoring.scores(
      model, params, {k: v for k, v in rows.items() if k != "kept"}, temperature=temperature
    )
    assert np.exp(np.asarray(whole.log_prob - rows["log_prob"]))[mask].mean() < 0.95


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_scores_are_those_of_the_law_itself(temperature):
  samples, rows = drawn(chain(), temperature=temperature)
  found = scoring.scores(*chain(), rows, temperature=temperature)
  law = LAW ** (1 / temperature)
  law /= law.sum(axis=-1, keepdims=True)
  entropy = -np.sum(law * np.log(law), axis=-1)
  for b, (start, end) in enumerate(zip(samples.prompt_length, samples.length, strict=True)):
    for position in range(rows["tokens"].shape[1]):
      before, after = samples.tokens[b, position], samples.tokens[b, position + 1]
      inside = start <= position + 1 < end
      assert float(rows["mask"][b, position]) == inside
      expected = (np.log(law[before, after]), entropy[before]) if inside else (0, 0)
      both = found.log_prob[b, position], found.entropy[b, position]
      np.testing.assert_allclose(both, expected, atol=2e-6)


def test_kept_sets_are_those_of_the_filters():
  samples, rows = drawn(chain(), FILTERS["top_k"])
  law = LAW[np.asarray(rows["tokens"])]
  expected = law >= np.sort(law, axis=-1)[..., -3:-2]
  kept = np.asarray(scoring.unpack(rows["kept"], VOCAB))
  inside = np.asarray(rows["mask"]) != 0
  np.testing.assert_array_equal(kept[inside], expected[inside])
  assert not kept[~inside].any()
  assert inside.sum() == int((samples.length - samples.prompt_length).sum())


def padded_left(rows, width):
  """The same rows after `width` tokens of padding, a segment of their own."""
  pad = lambda x: jnp.pad(x, ((0, 0), (width, 0)) + ((0, 0),) * (x.ndim - 2))
  length = rows["tokens"].shape[1]
  segments = jnp.ones(rows["tokens"].shape, jnp.int32)
  positions = jnp.broadcast_to(jnp.arange(length)[None, :], segments.shape)
  return jax.tree.map(pad, rows) | {"segments": pad(segments), "positions": pad(positions)}


def test_padding_on_either_side_changes_nothing():
  model, params = targets.tiny_target(num_layers=1)
  _, rows = drawn((model, params), FILTERS["top_k"], group_size=2)
  right = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 2)) + ((0, 0),) * (x.ndim - 2)), rows)
  left = padded_left(rows, 2)

  def total(params, rows):
    found = scoring.scores(model, params, rows, chunk=5)
    return jnp.sum(found.log_prob) + jnp.sum(found.entropy)

  value, gradient = jax.value_and_grad(total)(params, rows)
  for other in (right, left):
    again, other_gradient = jax.value_and_grad(total)(params, other)
    np.testing.assert_allclose(again, value, atol=2e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(other_gradient), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
      assert np.all(np.isfinite(a))


def test_rows_masked_whole_score_0_with_gradient_0():
  model, params = chain()
  _, rows = drawn((model, params), FILTERS["both"])
  nothing = jax.tree.map(jnp.zeros_like, rows)
  total = lambda params: jnp.sum(scoring.scores(model, params, nothing).log_prob)
  value, gradient = jax.value_and_grad(total)(params)
  assert value == 0 and all(not np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_pack_and_unpack_are_inverse():
  kept = jax.random.bernoulli(jax.random.key(0), 0.5, (3, 4, 21))
  bits = scoring.pack(kept)
  assert bits.shape == (3, 4, 3) and bits.dtype == jnp.uint8
  np.testing.assert_array_equal(scoring.unpack(bits, 21), kept)
