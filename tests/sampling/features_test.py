"""Drafts from features: the target's law, and the head as it is over the whole text."""

import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.models import base as models
from ancestral.models import eagle, transformer
from ancestral.sampling import base, decode, features, feedback, logits, speculative

ROWS = [[3, 1, 4], [1], [5, 0, 2, 6, 5, 3, 5], [2, 4, 6, 1], [3, 2]]
SMALL = {"num_layers": 1, "vocab_size": 7, "tied_embeddings": False}  # tied, it repeats itself


@functools.cache
def pair(num_layers=1, **fields):
  """A target, a head that was never trained, and the params of both."""
  config = targets.tiny_config(**{**SMALL, **fields})
  model, head = transformer.transformer(config), eagle.eagle(config, num_layers)
  shim = types.SimpleNamespace(init=lambda key, tokens: head.init(key))
  params = {
    "target": transformer.unstack(targets.fixed_params(model, 0)),
    "head": transformer.unstack(targets.fixed_params(shim, 1)),
  }
  return model, head, params


def drafter_of(model, head, params, **settings):
  return features.by_features(model, params["target"], head, params["head"], **settings)


def generated(the_pair, cases, *, num_drafts=3, transform=None, **settings):
  """Samples of several (keys, prompts) of one shape, by one compiled program."""
  model, head, params = the_pair
  settings = {"max_new_tokens": 12, "transform": transform, **settings}

  @jax.jit
  def sample(params, keys, prompts):
    drafter = drafter_of(model, head, params, num_drafts=num_drafts, transform=transform)
    return speculative.generate(model, params["target"], drafter, keys, prompts, **settings)

  return [jax.device_get(sample(params, *case)) for case in cases]


@functools.partial(jax.jit, static_argnums=(0, 1))
def rolled_out(model, head, params, tokens, length, drafts):
  """Logits [B, K, V] of the laws the drafts should be of, by whole passes without a cache."""
  rows = jnp.arange(tokens.shape[0])
  known = eagle.before(models.apply(model, params["target"], tokens)[0])
  laws = []
  for k in range(drafts.shape[1]):
    embedded = model.embed(params["target"], tokens)
    hidden, _ = head.trunk(params["head"], known, embedded)
    last = hidden[rows, length + k - 1]
    laws.append(model.readout(params["target"], last))
    tokens = tokens.at[rows, length + k].set(drafts[:, k])
    known = known.at[rows, length + k].set(last)
  return jnp.stack(laws, axis=1)


def test_after_ragged_steps_it_drafts_as_the_head_over_the_whole_text():
  # Learned positions are absolute: with rotary ones, wrong slots would show less.
  model, head, params = the_pair = pair(num_layers=2, positions="learned")
  keys = targets.keys_of(np.arange(5))
  bounds = jnp.array([24, 24, 24, 6, 0])  # one row ends within a step, one before the first

  def algorithm(params):
    drafter = drafter_of(model, head, params, num_drafts=3)
    return drafter, speculative.speculative(
      model, params["target"], drafter, max_length=32, max_new_tokens=bounds
    )

  @jax.jit
  def step(params, state):
    drafter, sampler = algorithm(params)
    context = logits.Context(state.tokens, state.length, state.prompt_length)
    drafts, _ = drafter.draft(keys, context, state.draft)
    return drafts, *sampler.step(base.row_keys_at(keys, state.step), state)

  begin = jax.jit(lambda params, prompts: base.start(keys, algorithm(params)[1], prompts))
  state, accepted = begin(params, targets.prompts_of(ROWS, 8)), []
  for _ in range(7):
    drafts, following, info = step(params, state)
    expected = rolled_out(*the_pair, state.tokens, state.length, drafts.tokens)
    assert np.asarray(expected).std() > 0.5
    going = ~np.asarray(state.done)
    np.testing.assert_allclose(drafts.logits[going], expected[going], atol=2e-4)
    finite = [np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((drafts, state))]
    assert all(finite), "a row that is done goes along, but never as NaN"
    state = following
    accepted += list(np.asarray(info.num_accepted)[going])
  np.testing.assert_array_equal(state.done, [False, False, False, True, True])
  assert set(accepted) == {0, 1, 2, 3}


def test_the_law_is_the_targets():
  num, new, prompt = 20_000, 3, [2, 1]
  model, _, params = the_pair = pair(vocab_size=4, width=8, num_heads=2, num_kv_heads=1)
  prompts = decode.Prompts(jnp.broadcast_to(jnp.array(prompt), (num, 2)), jnp.full(num, 2))
  case = targets.keys_of(np.arange(num)), prompts
  (samples,) = generated(the_pair, [case], num_drafts=2, max_new_tokens=new)
  texts = jnp.array([prompt + list(drawn) for drawn in itertools.product(range(4), repeat=new)])
  hidden, _ = targets.apply(model, params["target"], texts)
  conditional = targets.softmax(model.readout(params["target"], hidden))[:, 1:-1]
  law = np.take_along_axis(conditional, np.asarray(texts)[:, 2:, None], axis=2).prod(axis=(1, 2))
  targets.check_law(samples.tokens[:, 2:], law.reshape((4,) * new))
  assert 0.1 < samples.num_accepted.sum() / samples.num_drafted.sum() < 0.9


@pytest.mark.slow
def test_greedy_is_greedy_token_for_token():
  model, _, params = pair()
  case = targets.keys_of(np.arange(5)), targets.prompts_of(ROWS)
  settings = {"max_new_tokens": 16, "transform": logits.greedy(), "stop": (6,)}
  plain = jax.jit(
    lambda params, keys, prompts: decode.generate(model, params, keys, prompts, **settings)
  )(params["target"], *case)
  (samples,) = generated(pair(), [case], num_drafts=4, **settings)
  for name in ("tokens", "length", "prompt_length"):
    np.testing.assert_array_equal(getattr(samples, name), getattr(plain, name), err_msg=name)
  np.testing.assert_allclose(samples.model_log_prob, plain.model_log_prob, atol=2e-5)
  drawn = samples.length - samples.prompt_length
  assert len(set(drawn)) > 1 and np.any(samples.num_calls < drawn)


def test_rows_do_not_know_each_other():
  prompts, keys = targets.prompts_of(ROWS, 8), targets.keys_of(np.arange(5))
  order = np.array([3, 0, 0, 4, 2])
  permuted = keys[order], jax.tree.map(lambda leaf: leaf[order], prompts)
  together, again = generated(pair(), [(keys, prompts), permuted], stop=(0,))
  drawn = together.length - together.prompt_length
  assert len(set(drawn)) > 2 and drawn.max() == 12
  for name in ("tokens", "length", "num_calls", "num_accepted"):
    np.testing.assert_array_equal(getattr(again, name), getattr(together, name)[order])


def test_one_who_doubts_drafts_less():
  model, head, params = pair()
  prompts = targets.prompts_of(ROWS)
  context = logits.Context(decode.buffer(prompts, 16), prompts.length, prompts.length)

  @jax.jit
  def draft(params, keys):
    drafter = drafter_of(
      model, head, params, num_drafts=3, confidence=lambda hidden, token, laws: jnp.full(5, 0.8)
    )
    return drafter.draft(keys, context, drafter.init(prompts, 16))[0]

  drafts = draft(params, targets.keys_of(np.arange(5)))
  # 1 - 0.8 <= 0.3 < 1 - 0.8^2: two drafts
  np.testing.assert_array_equal(np.isfinite(drafts.logits).all(axis=2), [[True, True, False]] * 5)


def test_a_feature_before_the_first_token_of_a_text_is_zero():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 3)), jnp.float32)
  shifted = np.concatenate([np.zeros((2, 1, 3)), x[:, :-1]], axis=1)
  np.testing.assert_array_equal(eagle.before(x), shifted)
  packed = eagle.before(x, jnp.array([[0, 1, 0, 1, 2], [0, 1, 2, 3, 0]]))
  shifted[0, 2], shifted[1, 4] = 0, 0
  np.testing.assert_array_equal(packed, shifted)


def test_what_is_refused():
  model, head, params = pair()
  with pytest.raises(ValueError, match="causal=False"):
    eagle.eagle(targets.tiny_config(causal=False))
  with pytest.raises(ValueError, match="feeds back"):
    drafter_of(model, head, params, num_drafts=2, transform=feedback.mirostat_v2(3.0))
