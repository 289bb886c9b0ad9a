"""Greedy speculation is greedy decoding, token for token, for every drafter, at batch 1 and 16."""

import functools

import jax
import numpy as np
import pytest

import targets
from ancestral.models import base as models
from ancestral.models import eagle, early_exit, transformer
from ancestral.sampling import (
  decode,
  draft_trees,
  drafting,
  features,
  logits,
  lookup,
  speculative,
  trees,
)

NEW, STOP = 14, (7,)
CONFIG = targets.tiny_config(positions="learned")
HEAD = eagle.eagle(CONFIG)


@functools.cache
def all_params():
  _, target = targets.tiny_target(0, positions="learned")
  _, draft = targets.tiny_target(1, num_layers=1, positions="learned")
  return {
    "target": transformer.unstack(target),
    "draft": transformer.unstack(draft),
    "head": transformer.unstack(HEAD.init(jax.random.key(2))),
  }


def by_draft(params, **settings):
  model, _ = targets.tiny_target(1, num_layers=1, positions="learned")
  return drafting.by_model(model, params["draft"], transform=logits.greedy(), **settings)


def confidence(hidden, token, law):
  return 0.6 + 0.02 * (token % 20)


def tree_of(siblings):
  def drafter(params):
    model, _ = targets.tiny_target(1, num_layers=1, positions="learned")
    shape = (-1, -1, 1, 1, 0, 3, 5)
    return draft_trees.by_model(model, params["draft"], parents=shape, siblings=siblings)

  return drafter


def itself(params):
  model, _ = targets.tiny_target(0, positions="learned")
  return drafting.by_model(model, params["target"], num_drafts=4, transform=logits.greedy())


def exiting(params):
  model = early_exit.early_exit(CONFIG, 1)
  return drafting.by_model(model, params["target"], num_drafts=3, transform=logits.greedy())


def by_head(params):
  model, _ = targets.tiny_target(0, positions="learned")
  return features.by_features(
    model, params["target"], HEAD, params["head"], num_drafts=3, transform=logits.greedy()
  )


DRAFTERS = {
  "model": functools.partial(by_draft, num_drafts=3),
  "adaptive": functools.partial(by_draft, num_drafts=5, confidence=confidence, threshold=0.5),
  "itself": itself,
  "early exit": exiting,
  "features": by_head,
  "n-gram": lambda params: lookup.ngram(23, num_drafts=3),
  "suffix": lambda params: lookup.suffix(23, num_drafts=3),
  "chains": lambda params: draft_trees.by_model(
    itself_model(), params["target"], parents=trees.chains(2, 3)
  ),
  "tree without replacement": tree_of(draft_trees.without_replacement),
  "tree of the likeliest": tree_of(draft_trees.likeliest),
}


def itself_model():
  return targets.tiny_target(0, positions="learned")[0]


@functools.cache
def request(batch_size):
  rng = np.random.default_rng(batch_size)
  rows = [rng.integers(0, 23, size).tolist() for size in rng.integers(1, 9, batch_size)]
  return targets.prompts_of(rows, 8), targets.keys_of(np.arange(batch_size))


@functools.cache
def plain(batch_size):
  """What greedy decoding draws, where it is never nearly a tie."""
  model, params = itself_model(), all_params()["target"]
  prompts, keys = request(batch_size)

  @jax.jit
  def sample(params, keys, prompts):
    samples = decode.generate(
      model, params, keys, prompts, max_new_tokens=NEW, transform=logits.greedy(), stop=STOP
    )
    hidden, _ = models.apply(model, params, samples.tokens)
    return samples, jax.lax.top_k(model.readout(params, hidden), 2)[0]

  samples, top = jax.device_get(sample(params, keys, prompts))
  places = np.arange(samples.tokens.shape[1])[None]
  drawn_after = (places >= samples.prompt_length[:, None] - 1) & (
    places < samples.length[:, None] - 1
  )
  assert np.min((top[..., 0] - top[..., 1])[drawn_after]) > 1e-4
  return samples


@pytest.mark.parametrize(
  ("drafter", "batch_size", "bucket"),
  [(drafter, 16, 256) for drafter in DRAFTERS]
  + [(drafter, 16, 8) for drafter in ("features", "tree of the likeliest")]
  + [pytest.param(drafter, 1, 256, marks=pytest.mark.slow) for drafter in DRAFTERS],
)
def test_greedy_is_greedy_token_for_token(drafter, batch_size, bucket):
  """With a bucket of 8 the caches grow on the way, where any row needs it."""

  @jax.jit
  def sample(params, keys, prompts):
    made = DRAFTERS[drafter](params)
    return speculative.generate(
      itself_model(),
      params["target"],
      made,
      keys,
      prompts,
      max_new_tokens=NEW,
      transform=logits.greedy(),
      stop=STOP,
      bucket=bucket,
      widths=() if trees.spare(made.parents) else (0, 1, 3),
    )

  prompts, keys = request(batch_size)
  samples = jax.device_get(sample(all_params(), keys, prompts))
  expected = plain(batch_size)
  for name in ("tokens", "length", "prompt_length"):
    np.testing.assert_array_equal(getattr(samples, name), getattr(expected, name), err_msg=name)
  assert np.all(samples.log_prob == 0)
  np.testing.assert_allclose(samples.model_log_prob, expected.model_log_prob, atol=1e-4)
  drawn = samples.length - samples.prompt_length
  assert np.all(samples.num_calls <= drawn)
  if drafter == "itself":  # four drafts and a bonus, every call
    np.testing.assert_array_equal(samples.num_calls, -(-drawn // 5))
