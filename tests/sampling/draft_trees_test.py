"""Trees of drafts: the target's law, greedy for greedy, whatever the tree and how it was drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.models import toy
from ancestral.sampling import (
  coupling,
  decode,
  draft_trees,
  logits,
  speculative,
  trees,
  truncation,
)

NUM, NEW, PROMPT = 30_000, 3, (2, 1)
SIBLINGS = {
  "K-SEQ": (draft_trees.independent, None),
  "RRS": (draft_trees.independent, coupling.recursive_rejection),
  "match": (draft_trees.independent, coupling.sample_and_match),
  "RRS without replacement": (draft_trees.without_replacement, None),
  "likeliest": (draft_trees.likeliest, None),
}
SHAPES = {
  "siblings": (-1, -1, -1),
  "chains": trees.chains(2, 2),
  "ragged": (-1, -1, 1, 0, 1, 4),
}


def generated(target, drafter, prompts, keys, **settings):
  model, params = target
  return jax.device_get(
    jax.jit(
      lambda params, keys, prompts: speculative.generate(
        model, params, drafter, keys, prompts, **settings
      )
    )(params, keys, prompts)
  )


def by_table(shape, siblings, transform=logits.chain):
  model, params = targets.table_target(vocab_size=4, order=2, seed=5)
  drawn, rule = SIBLINGS[siblings]
  return draft_trees.by_model(
    model, params, parents=SHAPES[shape], siblings=drawn, rule=rule, transform=transform()
  )


def filters():
  return logits.chain(logits.temperature(1.5), truncation.top_k(3))


SLOWLY = [("siblings", name, logits.chain) for name in ("RRS", "match", "K-SEQ")]
SLOWLY += [("ragged", "K-SEQ", filters), ("ragged", "RRS", filters)]


@pytest.mark.parametrize(
  ("shape", "siblings", "transform"),
  [
    ("chains", "K-SEQ", logits.chain),
    ("ragged", "RRS without replacement", filters),
    ("ragged", "likeliest", filters),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOWLY),
  ],
)
def test_the_law_is_the_targets(shape, siblings, transform):
  target = targets.table_target(vocab_size=4, order=2)
  prompts = decode.Prompts(jnp.broadcast_to(jnp.array(PROMPT), (NUM, 2)), jnp.full(NUM, 2))
  samples = generated(
    target,
    by_table(shape, siblings, transform),
    prompts,
    targets.keys_of(np.arange(NUM)),
    transform=transform(),
    max_new_tokens=NEW,
  )
  conditional = np.asarray(target[1], np.float64)
  if transform is filters:
    conditional = targets.filtered(conditional / 1.5, lambda row: targets.top_k_set(row, 3))
  law = toy.table_law(targets.softmax(conditional), PROMPT, NEW)
  targets.check_law(samples.tokens[:, 2:], law)
  drawn = tuple(samples.tokens[:, 2:].T)
  np.testing.assert_allclose(np.exp(samples.log_prob.sum(axis=1)), law[drawn], rtol=1e-4)
  # No rule beats the optimum of its drafts; the mean over rows is within four standard errors.
  gain = samples.num_accepted - samples.optimum
  assert gain.mean() <= 4 * gain.std() / NUM**0.5
  if siblings in ("likeliest",):  # and the one of certain drafts is it
    assert abs(gain.mean()) <= 4 * gain.std() / NUM**0.5


def tiny(seed):
  return targets.tiny_target(num_layers=1, seed=seed, positions="learned")


ROWS = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5], [8, 9, 7, 9], [3, 2]]


@pytest.mark.parametrize("siblings", ["K-SEQ", "RRS without replacement"])
def test_drafts_are_of_the_laws_that_are_given_with_them(siblings):
  """Of a tree two deep, against the tables; and the tokens of one parent differ or not."""
  drafter = by_table("ragged", siblings)
  _, table = targets.table_target(vocab_size=4, order=2, seed=5)
  law, num = targets.softmax(table), 20_000
  prompts = decode.Prompts(jnp.broadcast_to(jnp.array(PROMPT), (num, 2)), jnp.full(num, 2))

  @jax.jit
  def draft(keys, prompts):
    slots = 2 + 4 + len(drafter.parents)
    context = logits.Context(decode.buffer(prompts, slots), prompts.length, prompts.length)
    return drafter.draft(keys, context, drafter.init(prompts, slots))[0]

  drafts = jax.device_get(draft(targets.keys_of(np.arange(num)), prompts))
  first, second = drafts.tokens[:, 0], drafts.tokens[:, 1]
  assert np.any(first == second) == (siblings == "K-SEQ")
  pair = law[2, 1][:, None] * law[2, 1][None, :]
  if siblings != "K-SEQ":
    pair = np.where(np.eye(4, dtype=bool), 0, pair) / (1 - law[2, 1][:, None])
  targets.check_law(np.stack([first, second], axis=1), pair)
  np.testing.assert_allclose(targets.softmax(drafts.logits[:, 3]), law[1][first], atol=1e-6)
  parent = drafts.tokens[:, 4]  # a child of `second`, and the parent of the last
  np.testing.assert_allclose(targets.softmax(drafts.logits[:, 4]), law[1][second], atol=1e-6)
  np.testing.assert_allclose(targets.softmax(drafts.logits[:, 5]), law[second, parent], atol=1e-6)


@pytest.mark.parametrize(
  ("parents", "message"), [((), "at least 1"), ((-1, 1), "parents come first")]
)
def test_a_tree_that_is_none_is_refused(parents, message):
  with pytest.raises(ValueError, match=message):
    draft_trees.by_model(*tiny(1), parents=parents)


def test_a_tree_is_not_verified_in_part():
  drafter = draft_trees.by_model(*tiny(1), parents=(-1, -1))
  with pytest.raises(ValueError, match="verified whole"):
    speculative.speculative(*tiny(0), drafter, max_length=8, max_new_tokens=2, widths=(1,))


def test_a_sliding_window_refuses_trees():
  model, params = targets.tiny_target(num_layers=1, window=4)
  drafter = draft_trees.by_model(*tiny(1), parents=(-1, -1))
  with pytest.raises(ValueError, match="sliding window"):
    generated(
      (model, params),
      drafter,
      targets.prompts_of(ROWS),
      targets.keys_of(np.arange(5)),
      max_new_tokens=3,
    )


def test_the_likeliest_that_cannot_be_drawn_are_no_drafts():
  log_q = jnp.log(jnp.array([0.0, 0.0, 0.0, 1.0, 0.0]))
  log_p = jnp.log(jnp.array([0.6, 0.1, 0.1, 0.1, 0.1]))
  np.testing.assert_allclose(draft_trees.likeliest.optimum(log_q, log_p, 3), 0.1, rtol=1e-6)


@pytest.mark.parametrize("max_new_tokens", [0, 1, 5])
def test_a_tree_may_be_a_chain(max_new_tokens):
  model, params = targets.tiny_target(num_layers=1)
  drafter = draft_trees.by_model(*tiny(1), parents=trees.chain(2))
  prompts, keys = targets.prompts_of(ROWS), targets.keys_of(np.arange(5))
  samples = generated((model, params), drafter, prompts, keys, max_new_tokens=max_new_tokens)
  np.testing.assert_array_equal(samples.length - samples.prompt_length, max_new_tokens)


def test_a_rule_for_another_tree_is_refused():
  drafter = draft_trees.by_model(*tiny(1), parents=(-1, -1, 0))
  with pytest.raises(ValueError, match="3 deep, the drafter's are 2"):
    generated(
      tiny(0),
      drafter,
      targets.prompts_of(ROWS),
      targets.keys_of(np.arange(5)),
      max_new_tokens=3,
      verify=coupling.tree(coupling.sample_and_match, trees.chain(3)),
    )
