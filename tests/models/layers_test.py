"""Attention against loops over its definition, rotary geometry, cache writes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.models import layers


def random(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_attend_equals_loops(num_kv_heads):
  batch, heads, length, slots, channels = 2, 4, 3, 5, 6
  query = random(0, batch, heads, length, channels)
  keys, values = (random(seed, batch, num_kv_heads, slots, channels) for seed in (1, 2))
  mask = np.random.default_rng(3).random((batch, length, slots)) < 0.6
  mask[..., 0] = True
  out = layers.attend(query, layers.KeyValues(keys, values), jnp.asarray(mask))
  for b, h, i in itertools.product(range(batch), range(heads), range(length)):
    k = h // (heads // num_kv_heads)
    seen = [s for s in range(slots) if mask[b, i, s]]
    scores = [float(np.dot(query[b, h, i], keys[b, k, s])) / channels**0.5 for s in seen]
    expected = targets.softmax(np.array(scores)) @ np.asarray(values)[b, k, seen]
    np.testing.assert_allclose(out[b, h, i], expected, atol=1e-5)


def test_query_that_sees_nothing_gets_zero_and_finite_gradients():
  query, keys, values = (random(seed, 1, 2, 3, 4) for seed in range(3))
  mask = jnp.ones((1, 3, 3), bool).at[0, 1].set(False)

  def total(query, keys, values):
    out = layers.attend(query, layers.KeyValues(keys, values), mask)
    return jnp.sum(jnp.square(out) + out), out

  gradients, out = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(query, keys, values)
  assert np.all(out[0, :, 1] == 0) and np.all(out[0, :, 0] != 0)
  assert all(np.all(np.isfinite(g)) for g in gradients)
  assert np.all(gradients[0][0, :, 1] == 0) and np.any(gradients[0][0, :, 0] != 0)


def test_scores_are_scaled_then_bounded():
  query, keys, values = (random(seed, 1, 1, 3, 4) for seed in range(3))
  out = layers.attend(query, layers.KeyValues(keys, values), None, scale=3.0, softcap=0.5)
  scores = 0.5 * np.tanh(3.0 * np.asarray(query)[0, 0] @ np.asarray(keys)[0, 0].T / 0.5)
  np.testing.assert_allclose(out[0, 0], targets.softmax(scores) @ values[0, 0], atol=1e-6)


def test_attend_keeps_low_precision_inputs_but_a_wide_softmax():
  # 512 equal keys: bfloat16 sums of 1 stop at 256, so a narrow softmax would double the mean.
  query = jnp.zeros((1, 1, 1, 4), jnp.bfloat16)
  keys = jnp.zeros((1, 1, 512, 4), jnp.bfloat16)
  out = layers.attend(query, layers.KeyValues(keys, keys + 1), jnp.ones((1, 1, 512), bool))
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(out.astype(jnp.float32), 1, rtol=1e-2)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_attention_mask_by_definition(causal, window):
  held, length, num_slots = np.array([0, 4]), 3, 9
  slots = held[:, None] + np.arange(length)[None]
  mask = layers.attention_mask(jnp.asarray(slots), num_slots, causal=causal, window=window)
  assert mask.shape == (2, length, num_slots)
  for b, i, s in itertools.product(range(2), range(length), range(num_slots)):
    written = s < held[b] + length
    near = window is None or abs(int(slots[b, i]) - s) < window
    assert mask[b, i, s] == (written and near and (not causal or s <= slots[b, i])), (b, i, s)


def test_write_places_ragged_rows_and_drops_what_is_beyond_the_cache():
  cache = layers.KeyValues(random(0, 2, 2, 4, 3), random(1, 2, 2, 4, 3))
  new = layers.KeyValues(random(2, 2, 2, 3, 3), random(3, 2, 2, 3, 3))
  slots = np.array([[0, 1, 2], [3, 4, 5]])
  written = layers.write(cache, new, jnp.asarray(slots))
  for old, entries, out in zip(cache, new, written, strict=True):
    expected = np.array(old)
    for b, i in itertools.product(range(2), range(3)):
      if slots[b, i] < 4:
        expected[b, :, slots[b, i]] = entries[b, :, i]
    np.testing.assert_array_equal(out, expected)


def test_rotary_inner_product_depends_on_the_difference_alone():
  query, key = random(0, 1, 1, 1, 8), random(1, 1, 1, 1, 8)

  def score(i, j):
    turned = [
      layers.rotate(x, layers.rotary_angles(jnp.array([[at]]), 8, 100.0))
      for x, at in ((query, i), (key, j))
    ]
    return float(jnp.vdot(*turned))

  assert score(5, 2) == pytest.approx(score(23, 20), abs=1e-4)
  assert score(2, 5) == pytest.approx(score(0, 3), abs=1e-4)
  assert score(0, 0) == pytest.approx(float(jnp.vdot(query, key)), abs=1e-6)
  assert abs(score(5, 2) - score(2, 5)) > 1e-2  # the sign of the difference counts


def test_rotate_turns_planes_as_complex_numbers():
  x, positions, channels = random(0, 2, 3, 4, 6), np.array([[0, 1, 5, 9], [2, 3, 4, 30]]), 6
  out = layers.rotate(x, layers.rotary_angles(jnp.asarray(positions), channels, 10_000.0))
  planes = np.asarray(x)[..., :3] + 1j * np.asarray(x)[..., 3:]
  speed = np.array([1.0, 10_000.0 ** (-1 / 3), 10_000.0 ** (-2 / 3)])
  turned = planes * np.exp(1j * positions[:, None, :, None] * speed)
  np.testing.assert_allclose(out, np.concatenate([turned.real, turned.imag], -1), atol=1e-5)


def test_randomised_positions_are_a_uniform_subset_in_order():
  positions = np.asarray(layers.randomised_positions(jax.random.key(0), 20_000, 2, 5))
  assert np.all(positions[:, 0] < positions[:, 1])
  law = np.triu(np.full((5, 5), 0.1), 1)  # ten pairs
  targets.check_law(positions, law)


def test_rms_norm_by_hand():
  params = {"params": {"scale": jnp.array([1.0, 2.0])}}
  out = layers.RMSNorm(epsilon=0.5).apply(params, jnp.array([[[1.0, 2.0]]]))
  np.testing.assert_allclose(out[0, 0], [1 / 3**0.5, 4 / 3**0.5], rtol=1e-6)  # mean square 2.5


def test_zero_centred_rms_norm_adds_one_to_the_scale_bitwise():
  x = random(0, 1, 3, 4)
  scale = jnp.asarray([2.0**-20, -0.3, 0.7, 0.0])
  out = layers.RMSNorm(1e-6, zero_centred=True).apply({"params": {"scale": scale}}, x)
  plain = layers.RMSNorm(1e-6).apply({"params": {"scale": 1 + scale}}, x)
  np.testing.assert_array_equal(out, plain)


def test_layer_norm_by_hand():
  params = {"params": {"scale": jnp.array([1.0, 2.0]), "bias": jnp.array([0.5, 0.0])}}
  out = layers.LayerNorm(epsilon=3.0).apply(params, jnp.array([[[4.0, 6.0]]]))
  np.testing.assert_allclose(out[0, 0], [0.0, 1.0], atol=1e-6)  # (x - 5) / sqrt(1 + 3)


def test_layer_norm_of_a_large_mean_keeps_its_digits():
  params = {"params": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}
  x = jnp.array([[1.0, -1.0, 1.0, -1.0]]) + 4096
  np.testing.assert_allclose(layers.LayerNorm(1e-12).apply(params, x), x - 4096, rtol=1e-6)


@pytest.mark.parametrize("gated", [True, False])
def test_mlp_by_numpy(gated):
  init = jax.nn.initializers.lecun_normal()
  mlp = layers.MLP(6, "gelu_tanh", gated, True, init, jnp.dtype("float32"))
  x = random(0, 2, 3, 4)
  params = jax.tree.map(lambda leaf: leaf + 0.1, mlp.init(jax.random.key(0), x)["params"])
  assert set(params) == {"up", "down", *(["gate"] if gated else [])}
  dense = lambda name, y: y @ np.asarray(params[name]["kernel"]) + np.asarray(params[name]["bias"])
  gelu = lambda y: y * (1 + np.tanh((2 / np.pi) ** 0.5 * (y + 0.044715 * y**3))) / 2
  rows = np.asarray(x)
  hidden = gelu(dense("gate", rows)) * dense("up", rows) if gated else gelu(dense("up", rows))
  out = mlp.apply({"params": params}, x)
  np.testing.assert_allclose(out, dense("down", hidden), atol=1e-5)
