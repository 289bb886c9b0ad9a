"""CHES by hand and by gradients, whatever the padding; what a step does to the chosen response."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.models import base as models
from ancestral.training import displacement

SIMILARITIES = {"sum": displacement.ches, "mean": displacement.mean_ches}


def by_hand(chosen, rejected, normalised):
  """Python's own loops, of states [n, D] of the response alone."""
  sums = [[sum(row[d] for row in rows) for d in range(len(rows[0]))] for rows in (chosen, rejected)]
  if normalised:
    sums = [[x / len(rows) for x in s] for s, rows in zip(sums, (chosen, rejected), strict=True)]
  return sum(a * b for a, b in zip(*sums, strict=True)) - sum(a * a for a in sums[0])


def test_ches_of_small_numbers():
  chosen = jnp.array([[1.0, 2.0], [3.0, -1.0], [100.0, 100.0]])
  rejected = jnp.array([[1.0, 2.0], [50.0, 50.0]])
  masks = jnp.array([1, 1, 0]), jnp.array([1, 0])
  assert displacement.ches(chosen, rejected, *masks) == 4 * 1 + 1 * 2 - (16 + 1)
  assert displacement.mean_ches(chosen, rejected, *masks) == 2 * 1 + 0.5 * 2 - (4 + 0.25)


@pytest.mark.parametrize("name", SIMILARITIES)
@pytest.mark.parametrize("left, right", [(0, 0), (0, 3), (3, 0), (2, 4)])
def test_padding_on_either_side_changes_nothing(name, left, right):
  rng = np.random.default_rng(0)
  chosen, rejected = rng.normal(size=(2, 4, 5)), rng.normal(size=(2, 3, 5))

  def padded(states):
    ends = lambda n: rng.normal(size=(2, n, 5)) * np.inf  # states of padding may be anything
    mask = np.zeros((2, left + states.shape[1] + right))
    mask[:, left : left + states.shape[1]] = 1
    return jnp.asarray(np.concatenate([ends(left), states, ends(right)], axis=1)), jnp.asarray(mask)

  (c, c_mask), (r, r_mask) = padded(chosen), padded(rejected)
  found = SIMILARITIES[name](c, r, c_mask, r_mask)
  expected = [by_hand(*pair, name == "mean") for pair in zip(chosen, rejected, strict=True)]
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  gradient = jax.grad(lambda c: SIMILARITIES[name](c, r, c_mask, r_mask).sum())(c)
  assert np.isfinite(gradient).all()
  assert not np.any(np.where(c_mask[..., None] == 0, gradient, 0))


@pytest.mark.parametrize("name", SIMILARITIES)
def test_of_a_response_without_tokens_it_is_0(name):
  states = jnp.full((2, 3, 4), jnp.nan)
  found = SIMILARITIES[name](states, jnp.ones((2, 3, 4)), jnp.zeros((2, 3)), jnp.ones((2, 3)))
  np.testing.assert_array_equal(found, 0)


def test_it_is_minus_the_readouts_rate_where_token_vectors_agree():
  """Two tokens, flat readout: e(0) - p = (1, -1) / 2, of inner product 1/2 with itself."""
  rng = np.random.default_rng(1)
  chosen, rejected = (jnp.asarray(rng.normal(size=(n, 3)), jnp.float32) for n in (4, 2))
  log_prob = lambda states: lambda readout: jnp.sum(jax.nn.log_softmax(states @ readout)[:, 0])
  rate = displacement.chosen_rate(log_prob(chosen), log_prob(rejected), jnp.zeros((3, 2)))
  score = displacement.ches(chosen, rejected, jnp.ones(4), jnp.ones(2))
  np.testing.assert_allclose(rate, -0.5 * score, rtol=1e-5)


def test_the_rate_is_that_of_a_small_step():
  rng = np.random.default_rng(2)
  params = jnp.asarray(rng.normal(size=(2, 4)), jnp.float32)
  chosen = lambda p: jnp.sum(jax.nn.log_softmax(p)[:, 0] * jnp.array([1.0, 2.0]))
  rejected = lambda p: jnp.sum(jax.nn.log_softmax(p)[:, 1])
  margin = lambda p: chosen(p) - rejected(p)
  step = 1e-3 * jax.grad(margin)(params)
  expected = (chosen(params + step) - chosen(params - step)) / 2e-3
  np.testing.assert_allclose(
    displacement.chosen_rate(chosen, rejected, params), expected, rtol=1e-3
  )


def rows(prompts, responses, length, left=0):
  """Rows as training reads them: the mask is where the target is of the response."""
  tokens, mask = np.zeros((2, len(prompts), length), np.int32)
  targets = np.zeros_like(tokens)
  for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
    text = prompt + response
    tokens[i, left : left + len(text)] = text
    targets[i, left : left + len(text) - 1] = text[1:]
    mask[i, left + len(prompt) - 1 : left + len(text) - 1] = 1
  return {"tokens": tokens, "targets": targets, "mask": mask}


PROMPTS = [[1, 2, 3], [4, 5]]
CHOSEN = [[6, 7, 0], [6, 0]]
REJECTED = [[6, 0], [7, 6, 5, 0]]


def tiny():
  """A model whose state is of all tokens attended to, and of where the token is."""

  def trunk(params, x, cache=None, *, positions=None, mask=None, key=None):
    batch_size, length = x.shape[:2]
    seen = jnp.broadcast_to(jnp.tri(length, dtype=bool), (batch_size, length, length))
    seen = seen if mask is None else seen & mask
    places = jnp.arange(length)[None] if positions is None else positions
    return jnp.tanh(jnp.matmul(seen.astype(x.dtype), x) * params["scale"]) + places[..., None], None

  embed = lambda params, tokens: params["embedding"][tokens]
  readout = lambda params, hidden: hidden @ params["embedding"].T
  params = {"embedding": jax.random.normal(jax.random.key(0), (8, 4)), "scale": jnp.float32(0.3)}
  return models.LanguageModel(None, None, embed, trunk, readout), params


@pytest.mark.parametrize("name", SIMILARITIES)
def test_pairs_of_a_model_are_the_states_that_predict_the_response(name):
  model, params = tiny()
  with jax.default_matmul_precision("highest"):
    pair = rows(PROMPTS, CHOSEN, 9), rows(PROMPTS, REJECTED, 12)
    score = lambda params: displacement.of_pairs(model, params, *pair, SIMILARITIES[name])
    found = jax.jit(score)(params)
    alone = jax.jit(lambda tokens: model.trunk(params, model.embed(params, tokens))[0])
    for i, prompt in enumerate(PROMPTS):
      states = []
      for response in (CHOSEN[i], REJECTED[i]):  # one row alone, as long as it is
        hidden = alone(np.array([prompt + response]))[0]
        states.append(np.asarray(hidden[len(prompt) - 1 : -1]).tolist())
      np.testing.assert_allclose(found[i], by_hand(*states, name == "mean"), rtol=1e-4, atol=1e-4)


def test_rows_padded_on_the_left_score_the_same():
  model, params = tiny()

  def at(left, responses):
    made = rows(PROMPTS, responses, 12, left)
    inside = np.arange(12) >= left
    made["segments"] = np.broadcast_to(inside.astype(np.int32), (2, 12))
    made["positions"] = np.broadcast_to(np.maximum(np.arange(12) - left, 0), (2, 12))
    return made

  with jax.default_matmul_precision("highest"):
    score = lambda left: displacement.of_pairs(
      model, params, at(left, CHOSEN), at(left, REJECTED), displacement.mean_ches
    )
    np.testing.assert_allclose(score(0), score(4), rtol=1e-4)


def test_one_token_each_has_one_state_and_the_score_0():
  model, params = tiny()
  pair = rows(PROMPTS, [[6], [7]], 6), rows(PROMPTS, [[5], [1]], 6)
  score = jax.jit(lambda params: displacement.of_pairs(model, params, *pair))
  np.testing.assert_allclose(score(params), 0, atol=1e-5)


def test_a_models_chosen_response_can_fall_and_the_rate_says_so():
  """Logits at a tied embedding: pushing token 1 away from its neighbour 0 takes 0 down as well."""
  embedding = jnp.array([[1.0, 0.02], [1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
  log_prob = lambda token: lambda hidden: jax.nn.log_softmax(embedding @ hidden)[token]
  hidden = jnp.array([1.0, -1.0])
  chosen, rejected, other = log_prob(0), log_prob(1), log_prob(2)
  rate = displacement.chosen_rate(chosen, rejected, hidden)
  step = hidden + 10 * jax.grad(lambda h: chosen(h) - rejected(h))(hidden)
  moved = [float(f(step) - f(hidden)) for f in (chosen, rejected, other)]
  assert rate < 0 and moved[0] < 0
  assert moved[1] < moved[0] < 0 < moved[2]  # the mass goes to what lies along e_w - e_l


def test_the_filter_keeps_the_lowest_scores():
  scores = jnp.array([3.0, -1.0, 2.0, -5.0, 2.0, 9.0])
  np.testing.assert_array_equal(
    displacement.least_similar(scores, 0.5), [False, True, True, True, False, False]
  )
  assert displacement.least_similar(scores, 1.0).all()
  assert not displacement.least_similar(scores, 0.0).any()
  with pytest.raises(ValueError, match="within 0 to 1"):
    displacement.least_similar(scores, 1.5)


@pytest.mark.parametrize(
  "one, other, distance",
  [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("ab", "ba", 2)],
)
def test_edit_distances_of_known_words(one, other, distance):
  assert displacement.edit_distance([*map(ord, one)], [*map(ord, other)]) == distance
  assert displacement.edit_distance([*map(ord, other)], [*map(ord, one)]) == distance
