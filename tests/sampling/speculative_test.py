"""Speculative decoding has the target's law, whatever the drafter, the rule and the batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.models import toy
from ancestral.sampling import (
  base,
  coupling,
  decode,
  draft_trees,
  drafting,
  feedback,
  logits,
  lookup,
  speculative,
  truncation,
)

NUM, NEW, PROMPT = 30_000, 3, [2, 1]
VERIFY = {"block": coupling.block, "chain": coupling.chain(coupling.maximal_one)}


def filters():
  return logits.chain(logits.temperature(1.5), truncation.top_k(3))


def by_table(seed, num_drafts=2, transform=logits.chain):
  model, params = targets.table_target(vocab_size=4, order=2, seed=seed)
  return drafting.by_model(model, params, num_drafts=num_drafts, transform=transform())


DRAFTERS = {
  "model": lambda transform: by_table(5, transform=transform),
  "itself": lambda transform: by_table(0, transform=transform),
  "another law": lambda transform: by_table(5, num_drafts=4),
  "lookup": lambda transform: lookup.ngram(4, num_drafts=3, size=1),
}


def generated(target, drafter, prompts, keys, **settings):
  model, params = target
  settings = {"max_new_tokens": NEW, **settings}
  return jax.device_get(
    jax.jit(
      lambda params, keys, prompts: speculative.generate(
        model, params, drafter, keys, prompts, **settings
      )
    )(params, keys, prompts)
  )


@pytest.mark.parametrize("rule", VERIFY)
@pytest.mark.parametrize("transform", [logits.chain, filters], ids=["plain", "filtered"])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_the_law_is_the_targets(drafter, transform, rule):
  target = targets.table_target(vocab_size=4, order=2)
  prompts = decode.Prompts(jnp.broadcast_to(jnp.array(PROMPT), (NUM, 2)), jnp.full(NUM, 2))
  samples = generated(
    target,
    DRAFTERS[drafter](transform),
    prompts,
    targets.keys_of(np.arange(NUM)),
    transform=transform(),
    verify=VERIFY[rule],
  )
  conditional = np.asarray(target[1], np.float64)
  if transform is filters:
    conditional = targets.filtered(conditional / 1.5, lambda row: targets.top_k_set(row, 3))
  law = toy.table_law(targets.softmax(conditional), tuple(PROMPT), NEW)
  targets.check_law(samples.tokens[:, 2:], law)
  drawn = tuple(samples.tokens[:, 2:].T)
  np.testing.assert_allclose(np.exp(samples.log_prob.sum(axis=1)), law[drawn], rtol=1e-4)
  model_law = toy.table_law(targets.softmax(target[1]), tuple(PROMPT), NEW)
  np.testing.assert_allclose(
    np.exp(samples.model_log_prob.sum(axis=1)), model_law[drawn], rtol=1e-4
  )
  if drafter == "itself":  # every draft stands: three tokens in one call
    assert np.all(samples.num_calls == 1) and np.all(samples.num_accepted == 2)
  else:
    assert 1 < samples.num_calls.mean() <= 3


ROWS = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5], [8, 9, 7, 9], [3, 2]]


@functools.cache
def tiny(seed):
  return targets.tiny_target(num_layers=1, seed=seed)


def test_rows_do_not_know_each_other_and_end_where_they_should():
  prompts, keys = targets.prompts_of(ROWS, 8), targets.keys_of(np.arange(5))
  drafter = drafting.by_model(*tiny(1), num_drafts=3)
  settings = {"max_new_tokens": 12, "stop": (7, 11)}
  together = generated(tiny(0), drafter, prompts, keys, **settings)
  assert len(set(together.length - together.prompt_length)) > 1
  order = np.array([3, 0, 0, 4, 2])
  again = generated(
    tiny(0), drafter, jax.tree.map(lambda leaf: leaf[order], prompts), keys[order], **settings
  )
  for name in ("tokens", "length", "num_calls", "num_accepted"):
    np.testing.assert_array_equal(getattr(again, name), getattr(together, name)[order])
  for tokens, start, length in zip(
    together.tokens, together.prompt_length, together.length, strict=True
  ):
    drawn = tokens[start:length].tolist()
    assert not {7, 11} & set(drawn[:-1]) and np.all(tokens[length:] == 0)
    assert len(drawn) == 12 or drawn[-1] in (7, 11)


def test_each_row_may_have_its_own_bound():
  model, params = tiny(0)
  drafter = drafting.by_model(*tiny(1), num_drafts=4)
  bounds = jnp.array([0, 1, 2, 3, 9])

  @jax.jit
  def sample(params, keys, prompts):
    algorithm = speculative.speculative(
      model, params, drafter, max_length=12, max_new_tokens=bounds
    )
    state = base.start(keys, algorithm, prompts)
    return base.run_until(keys, algorithm, state, lambda state: state.done, 20)

  state = sample(params, targets.keys_of(np.arange(5)), targets.prompts_of(ROWS))
  drawn = np.asarray(state.length - state.prompt_length)
  np.testing.assert_array_equal(drawn, [0, 1, 2, 3, 9])
  assert int(state.step[0]) == 0 and np.all(state.cache.length == state.length - 1)


@pytest.mark.parametrize("ngram", [1, 2, 3])
def test_lookup_copies_what_followed_the_latest_match(ngram):
  rng = np.random.default_rng(ngram)
  rows = [rng.integers(0, 3, size).tolist() for size in rng.integers(1, 20, 60)]
  prompts = targets.prompts_of(rows, 20)
  context = logits.Context(prompts.tokens, prompts.length, prompts.length)
  drafts, _ = lookup.ngram(3, num_drafts=4, size=ngram).draft(None, context, ())
  found = 0
  for row, tokens, laws in zip(rows, drafts.tokens, drafts.logits, strict=True):
    end = row[-ngram:] if len(row) >= ngram else None
    starts = [i for i in range(len(row) - ngram) if end is not None and row[i : i + ngram] == end]
    expected = row[starts[-1] + ngram :][:4] if starts else []
    found += bool(expected)
    for k in range(4):
      if k < len(expected):
        assert tokens[k] == expected[k] and laws[k][expected[k]] == 0
      assert np.isfinite(laws[k]).sum() == (k < len(expected))
  assert found >= 10


def test_a_transform_that_feeds_back_is_refused():
  model, params = tiny(0)
  with pytest.raises(ValueError, match="feeds back"):
    speculative.speculative(
      model,
      params,
      lookup.ngram(23, num_drafts=2),
      max_length=9,
      max_new_tokens=3,
      transform=feedback.mirostat_v2(3.0),
    )


X64 = {
  "chain": lambda: drafting.by_model(*tiny(1), num_drafts=2, confidence=sure),
  "tree": lambda: draft_trees.by_model(*tiny(1), parents=(-1, -1, 0)),
  "n-gram": lambda: lookup.ngram(23, num_drafts=2),
  "suffix": lambda: lookup.suffix(23, num_drafts=2),
}


def sure(hidden, token, law):
  return 0.99 - 0.01 * token


@pytest.mark.parametrize("drafter", X64)
def test_it_traces_where_64_bits_are_the_default(drafter):
  (model, params), made = tiny(0), X64[drafter]()
  with jax.enable_x64(True):
    samples = jax.eval_shape(
      lambda params, keys, prompts: speculative.generate(
        model, params, made, keys, prompts, max_new_tokens=4
      ),
      params,
      targets.keys_of(np.arange(5)),
      targets.prompts_of(ROWS),
    )
  assert samples.tokens.shape == (5, 11) and samples.log_prob.dtype == "float32"


def test_idle_rows_keep_no_draft_loop_going():
  """A row that is done is sure of every draft, one that goes on of none: one draft is drawn."""
  calls = []
  model, params = tiny(1)

  def trunk(params, x, *args, **kwargs):
    jax.debug.callback(lambda: calls.append(1))
    return model.trunk(params, x, *args, **kwargs)

  confidence = lambda hidden, token, law: jnp.array([0.0, 1.0])
  drafter = drafting.by_model(
    model._replace(trunk=trunk), params, num_drafts=8, confidence=confidence
  )
  prompts = targets.prompts_of([[1, 2], [3, 4]])
  context = logits.Context(decode.buffer(prompts, 16), prompts.length, prompts.length)
  cache = drafter.init(prompts, 16)
  calls.clear()
  keys, active = targets.keys_of([0, 1]), jnp.array([True, False])
  drafts, _ = jax.jit(drafter.draft)(keys, context, cache, active)
  jax.effects_barrier()
  assert len(calls) == 1 and np.isfinite(drafts.logits[0, 0]).all()
  assert np.all(drafts.logits[1] == -np.inf) and np.all(drafts.logits[0, 1:] == -np.inf)
