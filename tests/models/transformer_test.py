"""The transformer: cache, causality, packing, layouts of params, configs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.models import base, rotary, transformer

VARIANTS = {
  "multi_head": {"num_kv_heads": 4},
  "grouped": {},
  "multi_query": {"num_kv_heads": 1},
  "wide_heads": {"head_dim": 12},
  "window": {"window": 3},
  "alternating": {"window": 3, "window_pattern": (True, False), "num_layers": 3},
  "scaled": {"rotary_scaling": rotary.Linear(factor=3.0), "embedding_scale": 2.0},
  "post_norms": {"post_norms": True, "zero_centred_norms": True, "attention_softcap": 2.0},
  "layer_norm": {"norm": "layer", "gated_mlp": False, "activation": "gelu_tanh"},
  "qk_norm": {"qk_norm": True},
  "bias": {"use_bias": True},
  "learned": {"positions": "learned"},
  "no_positions": {"positions": "none"},
  "randomised": {"position_range": 96},
  "randomised_learned": {"positions": "learned", "position_range": 96},
  "untied": {"tied_embeddings": False},
  "softcap": {"logit_softcap": 2.0},
  "everything": {
    "window": 4,
    "qk_norm": True,
    "use_bias": True,
    "tied_embeddings": False,
    "logit_softcap": 5.0,
    "position_range": 64,
    "scan_layers": False,
  },
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 23, (3, 12)), jnp.int32)


@pytest.fixture(autouse=True)
def exact_matmuls():
  with jax.default_matmul_precision("highest"):
    yield


def full_logits(model, params, tokens, **kwargs):
  return model.readout(params, targets.apply(model, params, tokens, **kwargs)[0])


@pytest.mark.parametrize("name", VARIANTS)
def test_decoding_with_a_cache_equals_the_full_pass(name):
  model, params = targets.tiny_target(**VARIANTS[name])
  prompt_length = np.array([2, 7, 5])

  @jax.jit
  def incremental(params, tokens, length):
    cache = model.init_cache(params, 3, 12)
    prefilled, cache = base.apply(model, params, tokens[:, :7], cache)

    def one(cache, _):
      token = jnp.take_along_axis(tokens, cache.length[:, None], 1)
      hidden, cache = base.apply(model, params, token, cache)
      return cache, hidden[:, 0]

    cache, seen = jax.lax.scan(one, cache._replace(length=length), length=4)
    return model.readout(params, prefilled), model.readout(params, jnp.swapaxes(seen, 0, 1)), cache

  prefilled, decoded, cache = incremental(transformer.unstack(params), TOKENS, prompt_length)
  expected = np.asarray(jax.jit(lambda p, t: full_logits(model, p, t))(params, TOKENS))
  assert expected.std() > 0.5  # logits that a wrong mask would move
  np.testing.assert_array_equal(cache.length, prompt_length + 4)
  for b, length in enumerate(prompt_length):
    assert np.abs(prefilled[b, :length] - expected[b, :length]).max() < 1e-4
    assert np.abs(decoded[b] - expected[b, length : length + 4]).max() < 1e-4


def test_stacked_params_decode_too():
  model, params = targets.tiny_target()
  cache = model.init_cache(params, 3, 12)
  stacked, _ = targets.apply(model, params, TOKENS, cache)
  expected, _ = targets.apply(model, params, TOKENS)
  np.testing.assert_allclose(stacked, expected, atol=1e-4)


def test_rewinding_forgets():
  model, params = targets.tiny_target(scan_layers=False)
  cache = model.init_cache(params, 3, 12)
  _, cache = targets.apply(model, params, TOKENS[:, :8], cache)
  other = jnp.flip(TOKENS, axis=1)[:, :5]
  rewound, _ = targets.apply(model, params, other, cache._replace(length=jnp.array([0, 3, 7])))
  for b, kept in enumerate((0, 3, 7)):
    row = TOKENS.at[b, kept : kept + 5].set(other[b])
    expected = targets.apply(model, params, row)[0][b, kept : kept + 5]
    np.testing.assert_allclose(rewound[b], expected, atol=1e-4)


def test_what_overflows_the_cache_leaves_its_entries_alone():
  model, params = targets.tiny_target(scan_layers=False)
  _, held = targets.apply(model, params, TOKENS[:, :4], model.init_cache(params, 3, 4))
  _, after = targets.apply(model, params, TOKENS[:, 4:7], held)
  for before, now in zip(jax.tree.leaves(held.layers), jax.tree.leaves(after.layers), strict=True):
    np.testing.assert_array_equal(before, now)


def influence(model, params, length=9):
  """[t, s]: whether d hidden[t] / d embedding[s] is not exactly 0."""
  x = model.embed(params, TOKENS[:1, :length])
  weight = jnp.asarray(np.random.default_rng(1).normal(size=x.shape[-1]), jnp.float32)
  jacobian = jax.jit(jax.jacrev(lambda x: model.trunk(params, x)[0][0] @ weight))(x)
  return np.any(np.asarray(jacobian[:, 0]) != 0, axis=-1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3])
def test_influence_by_gradients(causal, window):
  model, params = targets.tiny_target(causal=causal, window=window)
  distance = np.arange(9)[:, None] - np.arange(9)[None, :]
  reach = 9 if window is None else 2 * (window - 1)  # two layers
  expected = (distance <= reach) & (distance >= (0 if causal else -reach))
  np.testing.assert_array_equal(influence(model, params), expected)


@pytest.mark.parametrize("window_pattern", [(True, False), (False, True), (False, False)])
def test_layers_without_the_window_see_everything(window_pattern):
  model, params = targets.tiny_target(window=3, window_pattern=window_pattern)
  distance = np.arange(9)[:, None] - np.arange(9)[None, :]
  np.testing.assert_array_equal(influence(model, params), distance >= 0)
  model, params = targets.tiny_target(window=3, window_pattern=window_pattern, num_layers=1)
  reach = 2 if window_pattern[0] else 9
  expected = (distance >= 0) & (distance <= reach)
  np.testing.assert_array_equal(influence(model, params), expected)


@pytest.mark.parametrize("fields", [{}, {"positions": "learned"}, {"causal": False}])
def test_packed_documents_equal_the_documents_apart(fields):
  model, params = targets.tiny_target(**fields)
  document = jnp.array([0] * 7 + [1] * 5)
  positions = jnp.concatenate([jnp.arange(7), jnp.arange(5)])[None].repeat(3, axis=0)
  mask = jnp.broadcast_to(document[:, None] == document[None, :], (3, 12, 12))
  packed = full_logits(model, params, TOKENS, positions=positions, mask=mask)
  np.testing.assert_allclose(packed[:, :7], full_logits(model, params, TOKENS[:, :7]), atol=1e-4)
  np.testing.assert_allclose(packed[:, 7:], full_logits(model, params, TOKENS[:, 7:]), atol=1e-4)


def test_a_mask_narrows_the_cache_as_well():
  model, params = targets.tiny_target(scan_layers=False)
  _, cache = targets.apply(model, params, TOKENS[:, :6], model.init_cache(params, 3, 12))
  mask = jnp.broadcast_to(jnp.arange(12) >= 6, (3, 2, 12))  # the second document
  positions = jnp.broadcast_to(jnp.arange(2), (3, 2))
  hidden, _ = targets.apply(model, params, TOKENS[:, 6:8], cache, mask=mask, positions=positions)
  np.testing.assert_allclose(hidden, targets.apply(model, params, TOKENS[:, 6:8])[0], atol=1e-4)


def test_dropout_needs_a_key():
  model, params = targets.tiny_target(dropout=0.5)
  plain, _ = targets.tiny_target()
  hidden = lambda model, key=None: targets.apply(model, params, TOKENS, key=key)[0]
  np.testing.assert_array_equal(hidden(model), hidden(plain))
  np.testing.assert_array_equal(hidden(plain, jax.random.key(0)), hidden(plain))
  first, again, other = (hidden(model, jax.random.key(seed)) for seed in (1, 1, 2))
  np.testing.assert_array_equal(first, again)
  assert np.all(np.any(first != other, axis=-1)) and np.all(np.any(first != hidden(model), axis=-1))


@pytest.mark.parametrize("span", [96, 72])  # 32 positions: 3 or 9/4 apart
def test_positions_are_spread_evenly_or_by_a_key(span):
  model, params = targets.tiny_target(position_range=span)
  plain = targets.tiny_target()[0]
  without = targets.apply(model, params, TOKENS)[0]
  ranks = jnp.broadcast_to(jnp.arange(12), (3, 12))
  np.testing.assert_array_equal(targets.apply(model, params, TOKENS, positions=ranks)[0], without)
  spread = np.broadcast_to(np.arange(12) * span // 32, (3, 12))
  expected = targets.apply(plain, params, TOKENS, positions=spread)[0]
  np.testing.assert_array_equal(expected, without)
  random = targets.apply(model, params, TOKENS, key=jax.random.key(0))[0]
  assert np.all(np.any(random[:, 1:] != without[:, 1:], axis=-1))
  packed = targets.apply(model, params, TOKENS, positions=ranks, key=jax.random.key(0))[0]
  np.testing.assert_array_equal(packed, random)


def test_a_bidirectional_model_does_not_read_a_cache_unmasked():
  model, params = targets.tiny_target(causal=False)
  with pytest.raises(ValueError, match="needs a mask"):
    base.apply(model, params, TOKENS, model.init_cache(params, 3, 20))


def test_a_token_outside_the_vocabulary_is_not_another_token():
  model, params = targets.tiny_target()
  assert np.all(np.isnan(model.embed(params, jnp.array([10_000]))))


@pytest.mark.parametrize(
  "fields", [{}, {"window_pattern": (False, True, True), "num_layers": 4}, {"remat": "full"}]
)
def test_scan_equals_loop_with_gradients(fields):
  fields = {**VARIANTS["everything"], "dropout": 0.3, "scan_layers": True, **fields}
  model, params = targets.tiny_target(**fields)

  def loss(params):
    logits = full_logits(model, params, TOKENS, key=jax.random.key(3))
    return jnp.mean(jnp.square(logits - 1))

  value, gradient = jax.jit(jax.value_and_grad(loss))(params)
  looped, looped_gradient = jax.jit(jax.value_and_grad(loss))(transformer.unstack(params))
  np.testing.assert_allclose(value, looped, rtol=1e-5)
  for one, other in zip(
    jax.tree.leaves(gradient), jax.tree.leaves(transformer.stack(looped_gradient)), strict=True
  ):
    assert np.abs(one).max() > 0
    np.testing.assert_allclose(one, other, atol=1e-5 * max(1, np.abs(one).max()))


def test_stack_and_unstack_are_inverse():
  _, params = targets.tiny_target()
  loose = transformer.unstack(params)
  assert len(loose["layers"]) == 2
  restacked = transformer.stack(loose)
  assert jax.tree.structure(restacked) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, restacked, params)
  assert transformer.stack(params) is params and transformer.unstack(loose) is loose


@pytest.mark.parametrize("scan_layers", [True, False])
def test_init_draws_layers_apart(scan_layers):
  model = transformer.transformer(targets.tiny_config(scan_layers=scan_layers, num_layers=3))
  params = jax.jit(model.init)(jax.random.key(0), TOKENS)
  assert isinstance(params["layers"], dict) == scan_layers
  first, second, _ = transformer.unstack(params)["layers"]
  assert np.any(first["mlp"]["up"]["kernel"] != second["mlp"]["up"]["kernel"])
  # fan-in scaling; the branches that add to the residual stream are smaller by sqrt(2 * 3)
  up, down = first["mlp"]["up"]["kernel"], first["mlp"]["down"]["kernel"]
  assert up.shape == (32, 96)
  assert np.std(up) == pytest.approx(32**-0.5, rel=0.1)
  assert np.std(down) == pytest.approx(96**-0.5 / 6**0.5, rel=0.1)


@pytest.mark.parametrize("softcap", [0.5, 3.0])
def test_softcap_bounds_logits_in_order(softcap):
  model, params = targets.tiny_target(logit_softcap=softcap)
  plain, _ = targets.tiny_target()
  capped, logits = (full_logits(m, params, TOKENS) for m in (model, plain))
  assert np.abs(capped).max() <= softcap < np.abs(logits).max()
  small = np.abs(capped) < 0.9 * softcap
  uncapped = softcap * np.arctanh(np.asarray(capped, np.float64)[small] / softcap)
  np.testing.assert_allclose(uncapped, logits[small], rtol=1e-3, atol=1e-4)


def test_defaults_of_a_config():
  config = transformer.TransformerConfig(
    vocab_size=8, max_length=8, num_layers=1, width=128, num_heads=4
  )
  filled = config.resolved()
  assert (filled.num_kv_heads, filled.head_dim, filled.mlp_width) == (4, 32, 352)
  wider = dataclasses.replace(config, width=256, num_heads=8).resolved()
  assert (wider.num_kv_heads, wider.head_dim, wider.mlp_width) == (8, 32, 704)
  with pytest.raises(dataclasses.FrozenInstanceError):
    config.width = 64


@pytest.mark.parametrize(
  "fields, culprit",
  [
    ({"num_kv_heads": 3}, "num_kv_heads=3"),
    ({"positions": "alibi"}, "positions='alibi'"),
    ({"head_dim": 7}, "head_dim=7"),
    ({"position_range": 16}, "position_range=16"),
    ({"positions": "none", "position_range": 64}, "positions='none'"),
    ({"window": 0}, "window=0"),
    ({"num_layers": 0}, "num_layers=0"),
    ({"num_kv_heads": 0}, "num_kv_heads=0"),
    ({"width": 33}, "width=33"),
    ({"num_heads": 64}, "num_heads=64"),
    ({"dropout": 1.0}, "dropout=1.0"),
    ({"dropout": -0.1}, "dropout=-0.1"),
  ],
)
def test_fields_that_do_not_fit_are_named(fields, culprit):
  with pytest.raises(ValueError, match=culprit) as error:
    targets.tiny_config(**fields)
  assert "\n" not in str(error.value)


def test_learned_positions_have_an_end():
  config = targets.tiny_config(positions="learned")
  model = transformer.transformer(config)
  params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  tokens = jnp.zeros((1, config.max_length + 1), jnp.int32)
  base.apply(model, params, tokens[:, 1:])
  with pytest.raises(ValueError, match=f"max_length={config.max_length}"):
    base.apply(model, params, tokens)
  with pytest.raises(ValueError, match=f"max_length={config.max_length}"):
    cache = model.init_cache(params, 1, config.max_length + 1)
    base.apply(model, params, tokens[:, :1], cache)
