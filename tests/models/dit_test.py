"""The diffusion transformer: by hand in numpy, what its conditions change, and what it refuses."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.models import base, dit, embeddings, layers

SHAPE, PATCH, WIDTH, HEADS, TEXT = (4, 6, 2), 2, 16, 2, 5
X = jnp.asarray(np.random.default_rng(0).normal(size=(3, *SHAPE)), jnp.float32)
LEVEL = jnp.array([3.0, 400.0, 900.0])
WORDS = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4, TEXT)), jnp.float32)
MASK = jnp.array([[True, True, False, False], [True, False, True, True], [False] * 4])


@pytest.fixture(autouse=True)
def exact_matmuls():
  with jax.default_matmul_precision("highest"):
    yield


def config(**fields):
  shape = {"image_shape": SHAPE, "patch_size": PATCH, "num_layers": 2, "width": WIDTH}
  return dit.DiTConfig(**{**shape, "num_heads": HEADS, **fields})


def drawn(network, x=X, seed=0):
  """Parameters none of which is 0, as after training."""
  shapes = jax.eval_shape(network.init, jax.random.key(0), x)
  rng = np.random.default_rng(seed)
  draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / max(leaf.shape[0], 4) ** 0.5)
  return jax.tree.map(lambda leaf: draw(leaf).astype(leaf.dtype), shapes)


@functools.cache
def made(**fields):
  network = dit.dit(config(**fields))
  return jax.jit(network.apply), drawn(network)


def test_patches_are_cut_row_by_row():
  tokens = np.asarray(dit.patches(X, PATCH))
  for i, j, a, c, channel in np.ndindex(2, 3, PATCH, PATCH, 2):
    np.testing.assert_array_equal(
      tokens[:, 3 * i + j, (PATCH * a + c) * 2 + channel],
      X[:, PATCH * i + a, PATCH * j + c, channel],
    )
  np.testing.assert_array_equal(dit.unpatched(jnp.asarray(tokens), (2, 3), PATCH), X)
  assert config().grid == (2, 3)


def test_the_output_begins_at_zero_and_blocks_as_the_identity():
  network = dit.dit(config())
  params = jax.jit(network.init)(jax.random.key(0), X)
  apply = jax.jit(network.apply)
  np.testing.assert_array_equal(apply(params, X, LEVEL), 0)
  out = np.random.default_rng(2).normal(size=(WIDTH, PATCH**2 * 2))
  params["patch_out"]["kernel"] = jnp.asarray(out, jnp.float32)
  tokens = np.asarray(dit.patches(X, PATCH)) @ np.asarray(params["patch_in"]["kernel"])
  tokens = tokens + embeddings.grid_sincos(2, 3, WIDTH)
  expected = normed(tokens) @ out
  found = dit.patches(apply(params, X, LEVEL), PATCH)
  np.testing.assert_allclose(found, expected, atol=2e-5)


def normed(x):
  x = np.asarray(x, np.float64)
  centred = x - x.mean(axis=-1, keepdims=True)
  return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6)


def linear(params, x):
  return x @ np.asarray(params["kernel"], np.float64) + np.asarray(params["bias"], np.float64)


def silu(x):
  return x / (1 + np.exp(-x))


def gelu(x):
  return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def turned_attention(params, x, places, allowed):
  """Of tokens x [L, D] at places [L] (row, column) or None: planes are complex numbers.

  A score is Re sum conj(q) k exp(i frequency (place of k - place of q)): of differences alone.
  """
  size, quarter = WIDTH // HEADS, WIDTH // HEADS // 4
  query, key, value = (linear(params[name], x).reshape(-1, HEADS, size) for name in NAMES)
  plane = lambda x: x[..., : size // 2] + 1j * x[..., size // 2 :]
  frequency = 100.0 ** (-np.arange(quarter) / quarter)
  mixed = np.zeros((len(x), HEADS, size))
  for q, h in np.ndindex(len(x), HEADS):
    scores = np.full(len(x), -np.inf)
    for k in np.flatnonzero(allowed):
      at = [np.zeros(2) if place is None else np.array(place) for place in (places[q], places[k])]
      turn = np.exp(1j * ((at[1] - at[0])[:, None] * frequency).reshape(-1))
      scores[k] = (plane(query[q, h]).conj() * plane(key[k, h]) * turn).sum().real / size**0.5
    weights = np.exp(scores - scores.max())
    mixed[q, h] = weights / weights.sum() @ value[:, h]
  return linear(params["output"], mixed.reshape(len(x), -1))


NAMES = ("query", "key", "value")


def test_one_block_by_hand():
  """Registers, text, its mask and rotary positions together; tokens beside patches stand still."""
  apply, params = made(
    num_layers=1, positions="rotary", num_registers=2, text_width=TEXT, num_classes=3
  )
  labels = jnp.array([0, 2, 3])
  found = apply(params, X, LEVEL, base.Condition(labels, WORDS, MASK))
  c, block = params["conditioning"], params["block_0"]
  for row in range(3):
    angle = LEVEL[row] * 10_000.0 ** (-np.arange(128) / 127)
    vector = linear(c["level_in"], np.concatenate([np.cos(angle), np.sin(angle)]))
    vector = silu(linear(c["level_out"], silu(vector)) + np.asarray(c["classes"][labels[row]]))
    b1, s1, g1, b2, s2, g2 = np.split(linear(block["modulation"], vector), 6)
    patches = linear(params["patch_in"], np.asarray(dit.patches(X, PATCH)[row], np.float64))
    words = linear(params["text_in"], np.asarray(WORDS[row], np.float64))
    x = np.concatenate([params["registers"], words, patches])
    places = [None] * 6 + [divmod(i, 3) for i in range(6)]
    allowed = np.array([True] * 2 + MASK[row].tolist() + [True] * 6)
    x = x + g1 * turned_attention(block["attention"], normed(x) * (1 + s1) + b1, places, allowed)
    inner = gelu(linear(block["up"], normed(x) * (1 + s2) + b2))
    x = x + g2 * linear(block["down"], inner)
    shift, scale = np.split(linear(params["modulation"], vector), 2)
    expected = linear(params["patch_out"], normed(x[6:]) * (1 + scale) + shift)
    got = dit.patches(found[row : row + 1], PATCH)[0]
    np.testing.assert_allclose(got, expected, atol=2e-4 * np.abs(expected).max())


def test_rotary_products_depend_on_both_differences_and_on_nothing_else():
  height, width, channels = 5, 7, 16
  rng = np.random.default_rng(0)
  query, key = (jnp.asarray(rng.normal(size=channels), jnp.float32) for _ in range(2))
  angles = jnp.asarray(embeddings.grid_rotary_angles(height, width, channels))[None]
  everywhere = lambda x: layers.rotate(
    jnp.broadcast_to(x, (1, 1, height * width, channels)), angles
  )
  products = np.asarray(everywhere(query)[0, 0] @ everywhere(key)[0, 0].T)
  seen = {}
  for p, q in np.ndindex(products.shape):
    difference = tuple(np.subtract(divmod(p, width), divmod(q, width)))
    seen.setdefault(difference, []).append(products[p, q])
  assert len(seen) == 9 * 13
  assert max(np.ptp(values) for values in seen.values()) < 1e-4
  distinct = np.sort([values[0] for values in seen.values()])
  assert np.diff(distinct).min() > 1e-4  # no two differences give one product


def test_positions_are_what_tells_patches_apart():
  """Without queries attention is a mean over tokens: rotary positions then say nothing."""
  apply, params = made(positions="rotary")
  still = jax.tree.map_with_path(
    lambda path, leaf: 0 * leaf if "query" in jax.tree_util.keystr(path) else leaf, params
  )
  order = jnp.array([4, 2, 0, 5, 1, 3])
  shuffled = lambda x: dit.unpatched(dit.patches(x, PATCH)[:, order], (2, 3), PATCH)
  moved = lambda params: apply(params, shuffled(X), LEVEL) - shuffled(apply(params, X, LEVEL))
  assert np.abs(moved(still)).max() < 1e-5 < 1e-3 < np.abs(moved(params)).max()


def test_masked_text_has_no_influence():
  apply, params = made(text_width=TEXT, num_registers=1)

  def total(words):
    return jnp.sum(jnp.sin(apply(params, X, LEVEL, base.Condition(None, words, MASK))))

  gradient = np.asarray(jax.jit(jax.grad(total))(WORDS))
  np.testing.assert_array_equal(np.any(gradient != 0, axis=-1), MASK)


def test_a_row_without_text_is_one_whose_mask_is_empty():
  apply, params = made(text_width=TEXT)
  whole = base.Condition(None, WORDS)
  rows = jnp.array([False, False, True])
  none = base.without(whole, None, rows)
  found = apply(params, X, LEVEL, none)
  every = jnp.ones((3, 4), bool)
  told = apply(params, X, LEVEL, base.Condition(None, WORDS, every))
  np.testing.assert_allclose(apply(params, X, LEVEL, whole), told, atol=1e-5)
  np.testing.assert_array_equal(found[:2], told[:2])
  masked = base.Condition(None, WORDS, MASK)
  np.testing.assert_array_equal(found[2], apply(params, X, LEVEL, masked)[2])
  other = base.without(base.Condition(None, 7 - WORDS), None, rows)
  np.testing.assert_array_equal(found[2], apply(params, X, LEVEL, other)[2])
  assert np.abs(found[2] - told[2]).max() > 1e-3


def test_without_takes_conditions_from_rows():
  rows = jnp.array([True, False, True])
  label, words, mask = base.without(base.Condition(jnp.array([0, 1, 2]), WORDS, MASK), 9, rows)
  np.testing.assert_array_equal(label, [9, 1, 9])
  np.testing.assert_array_equal(mask, [[False] * 4, MASK[1], [False] * 4])
  assert words is WORDS
  assert base.without(base.Condition(), None, rows) == base.Condition()
  with pytest.raises(ValueError, match="num_classes"):
    base.without(base.Condition(jnp.array([0, 1, 2])), None, rows)


def test_registers_change_no_other_shape():
  shapes = lambda **fields: jax.eval_shape(dit.dit(config(**fields)).init, jax.random.key(0), X)
  some = dict(shapes(num_registers=3))
  assert some.pop("registers").shape == (3, WIDTH)
  assert some == shapes()
  apply, params = made(num_registers=3)
  out = apply(params, X, LEVEL)
  assert out.shape == X.shape
  for i in range(3):
    other = params | {"registers": params["registers"].at[i].multiply(-1)}
    assert np.abs(apply(other, X, LEVEL) - out).max() > 1e-3


def test_levels_and_classes_reach_the_output():
  apply, params = made(num_classes=3)
  of = lambda label: base.Condition(jnp.full(3, label))
  out = [apply(params, X, LEVEL, of(label)) for label in range(4)]  # 3 is none
  out.append(apply(params, X, LEVEL + 50, of(0)))
  for a, b in itertools.combinations(out, 2):
    assert np.abs(a - b).max() > 1e-3


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_dropout_needs_a_key(rate):
  apply, params = made(dropout=rate)
  plain = apply(params, X, LEVEL)
  first, again, other = (apply(params, X, LEVEL, key=jax.random.key(seed)) for seed in (1, 1, 2))
  np.testing.assert_array_equal(first, again)
  same = [np.array_equal(a, b) for a, b in ((plain, first), (plain, other), (first, other))]
  assert same == [rate == 0] * 3


def test_query_and_key_norms_bound_their_size():
  """Queries of any size then give the same output."""
  apply, params = made(qk_norm=True)
  grown = jax.tree.map_with_path(
    lambda path, leaf: 50 * leaf if "'query'" in jax.tree_util.keystr(path) else leaf, params
  )
  np.testing.assert_allclose(apply(params, X, LEVEL), apply(grown, X, LEVEL), atol=1e-4)


def test_bfloat16_is_close_to_float32():
  """Eight bits of mantissa through two blocks: a few percent of the output's size."""
  fields = {"positions": "rotary", "text_width": TEXT, "num_registers": 1}
  condition = base.Condition(None, WORDS, MASK)
  wide, params = made(**fields)
  narrow, _ = made(**fields, dtype="bfloat16")
  expected, found = wide(params, X, LEVEL, condition), narrow(params, X, LEVEL, condition)
  assert found.dtype == jnp.float32
  error = np.sqrt(np.mean(np.square(found - expected)) / np.mean(np.square(expected)))
  assert 1e-4 < error < 0.03
  params = jax.eval_shape(dit.dit(config(**fields, dtype="bfloat16")).init, jax.random.key(0), X)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"patch_size": 0}, "patch_size=0"),
    ({"num_layers": 0}, "num_layers=0"),
    ({"width": 0}, "width=0"),
    ({"num_heads": 0}, "num_heads=0"),
    ({"patch_size": 4}, "4x6 does not divide"),
    ({"num_heads": 3}, "not a multiple of num_heads=3"),
    ({"positions": "learned"}, "positions='learned'"),
    ({"width": 18}, "width is 18, not a multiple of 4"),
    ({"positions": "rotary", "width": 12}, "width / num_heads is 6"),
    ({"dropout": 1.0}, "dropout=1.0"),
    ({"dropout": -0.1}, "dropout=-0.1"),
  ],
)
def test_fields_that_do_not_fit_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    config(**fields)


@pytest.mark.parametrize(
  "fields, x, condition, message",
  [
    ({}, X[:, :2], None, r"\(2, 6, 2\); the network is of \(4, 6, 2\)"),
    ({"num_classes": 3}, X, None, "3 classes was given label=None"),
    ({}, X, base.Condition(jnp.zeros(3, jnp.int32)), "no classes was given label"),
    ({"text_width": TEXT}, X, None, "text_width=5 was given text None"),
    ({}, X, base.Condition(None, WORDS), r"text_width=None was given text \(3, 4, 5\)"),
  ],
)
def test_inputs_that_do_not_fit_are_refused(fields, x, condition, message):
  apply, params = made(**fields)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(apply, params, x, LEVEL, condition)
