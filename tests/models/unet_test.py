"""The U-Net: how it begins, skip connections and their scales, conditions, what it refuses."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.models import base, unet

SHAPE = (4, 6, 2)
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, *SHAPE)), jnp.float32)
LEVEL = jnp.array([3.0, 700.0])
TRACES = []


@pytest.fixture(autouse=True)
def exact_matmuls():
  with jax.default_matmul_precision("highest"):
    yield


def config(**fields):
  shape = {"image_shape": SHAPE, "channels": 8, "num_blocks": 1, "head_dim": 8, "num_groups": 4}
  return unet.UNetConfig(**{**shape, **fields})


def drawn(shapes):
  """Parameters none of which is 0, as after training."""
  rng = np.random.default_rng(1)

  def draw(leaf):
    fan_in = max(np.prod(leaf.shape[:-1]), 4)
    return jnp.asarray(rng.normal(size=leaf.shape) / fan_in**0.5, leaf.dtype)

  return jax.tree.map(draw, shapes)


def shapes(c):
  x = jnp.zeros((2, *c.image_shape))
  return jax.eval_shape(unet.unet(c).init, jax.random.key(0), x)


@functools.cache
def made(**fields):
  """Jitted (params, x, level, condition, key, skip_scale) -> output, and parameters."""
  c = config(**fields)

  def apply(params, x, level, condition=None, key=None, scale=None):
    TRACES.append(fields)
    return unet.unet(c, skip_scale=scale).apply(params, x, level, condition, key=key)

  return jax.jit(apply), drawn(shapes(c))


def conv(params, x):
  """Of 3x3, the border padded by zeros, in numpy."""
  padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  _, height, width, _ = x.shape
  kernel = np.asarray(params["kernel"], np.float64)
  out = np.asarray(params["bias"], np.float64)
  for i, j in np.ndindex(3, 3):
    out = out + padded[:, i : i + height, j : j + width] @ kernel[i, j]
  return out


def test_the_output_begins_at_zero_and_residual_blocks_as_the_identity():
  """What is left of a network of one level are its first and last layers and two shortcuts."""
  network = unet.unet(config(multipliers=(1,), attention=()))

  @jax.jit
  def first(key, kernel):
    params = network.init(key, X)
    other = params | {"conv_out": params["conv_out"] | {"kernel": kernel}}
    return params, network.apply(params, X, LEVEL), network.apply(other, X, LEVEL)

  kernel = np.random.default_rng(2).normal(size=(3, 3, 8, 2))
  params, output, found = first(jax.random.key(0), jnp.asarray(kernel, jnp.float32))
  np.testing.assert_array_equal(output, 0)
  skip = x = conv(params["conv_in"], np.asarray(X, np.float64))
  for name in ("up_0_0", "up_0_1"):
    shortcut = np.asarray(params[name]["shortcut"]["kernel"], np.float64)
    x = np.concatenate([x, skip], axis=-1) @ shortcut  # its bias begins at 0
  groups = x.reshape(2, -1, 4, 2)  # of 2 channels each
  mean, variance = (f(groups, axis=(1, 3), keepdims=True) for f in (np.mean, np.var))
  x = ((groups - mean) / np.sqrt(variance + 1e-5)).reshape(x.shape)
  expected = conv({"kernel": kernel, "bias": np.zeros(2)}, x / (1 + np.exp(-x)))
  np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("multipliers, num_blocks", [((1,), 1), ((1, 2), 1), ((1, 2, 2), 2)])
def test_skips_are_as_many_as_the_blocks_that_read_one(multipliers, num_blocks):
  c = config(multipliers=multipliers, num_blocks=num_blocks, image_shape=(8, 8, 1), attention=())
  params = shapes(c)
  up = [leaves for name, leaves in params.items() if name.startswith("up_")]
  assert len(up) == c.num_skips
  # Each reads channels that the block before did not make.
  assert all("shortcut" in leaves for leaves in up)


def test_scales_of_one_are_no_scales():
  apply, params = made()
  ones = np.ones(config().num_skips, np.float32)
  found = apply(params, X, LEVEL, scale=ones)
  np.testing.assert_array_equal(found, apply(params, X, LEVEL))
  np.testing.assert_array_equal(
    found, apply(params, X, LEVEL, scale=unet.linear_skips(config(), 1))
  )


def test_every_scale_has_the_gradient_of_its_finite_difference():
  apply, params = made()
  weights = jnp.asarray(np.random.default_rng(2).normal(size=X.shape), jnp.float32)
  total = lambda scale: jnp.vdot(weights, apply(params, X, LEVEL, scale=scale))
  scale, step = jnp.array([1.0, 0.5, 0.8, 1.2]), 0.02
  gradient = jax.jit(jax.grad(total))(scale)
  for i in range(4):
    moved = [total(scale.at[i].add(by)) for by in (-step, step)]
    slope = (moved[1] - moved[0]) / (2 * step)
    assert np.abs(gradient[i]) > 1e-2
    np.testing.assert_allclose(gradient[i], slope, rtol=2e-2, atol=2e-3)


def test_a_scale_of_zero_cuts_the_skip():
  """The way through the middle is cut by hand; then only the two shallow skips carry the input."""
  apply, params = made()
  params = params | {"halve_0": jax.tree.map(jnp.zeros_like, params["halve_0"])}

  def change(scale):
    return apply(params, X + 0.1, LEVEL, scale=scale) - apply(params, X, LEVEL, scale=scale)

  np.testing.assert_array_equal(change(jnp.array([0.0, 0.0, 1.0, 1.0])), 0)
  for scale in ([1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]):
    assert np.abs(change(jnp.array(scale))).max() > 1e-3


def test_linear_skips_end_where_they_are_told():
  c = config(multipliers=(1, 2), num_blocks=2)
  np.testing.assert_allclose(unet.linear_skips(c, 0.5), [1, 0.9, 0.8, 0.7, 0.6, 0.5])
  np.testing.assert_allclose(unet.linear_skips(c, 0.5, 0.0), [0, 0.1, 0.2, 0.3, 0.4, 0.5])


def test_a_traced_scale_compiles_once():
  apply, params = made()
  first, *others = (
    apply(params, X, LEVEL, scale=jnp.asarray(unet.linear_skips(config(), end), jnp.float32))
    for end in (0.9, 0.7, 0.4)
  )
  traced = len(TRACES)
  for scale, other in zip(np.random.default_rng(3).uniform(size=(2, 4)), others, strict=True):
    apply(params, X, LEVEL, scale=jnp.asarray(scale, jnp.float32))
    assert np.abs(first - other).max() > 1e-3
  assert len(TRACES) == traced


@pytest.mark.parametrize("scale", [np.ones(3), np.ones(5), np.ones((4, 1)), np.float32(1)])
def test_scales_are_one_for_each_skip(scale):
  with pytest.raises(ValueError, match="has 4 skip connections"):
    unet.unet(config(), skip_scale=scale)


def test_a_row_without_its_class_has_the_class_none():
  apply, params = made(num_classes=3)
  of = lambda *labels: base.Condition(jnp.array(labels))
  found = apply(params, X, LEVEL, base.without(of(1, 2), 3, jnp.array([True, False])))
  own, none = apply(params, X, LEVEL, of(1, 2)), apply(params, X, LEVEL, of(3, 3))
  np.testing.assert_array_equal(found[0], none[0])
  np.testing.assert_array_equal(found[1], own[1])
  assert np.all(np.abs(own - none).max(axis=(1, 2, 3)) > 1e-3)


def test_the_level_reaches_the_output():
  apply, params = made()
  assert np.abs(apply(params, X, LEVEL) - apply(params, X, LEVEL + 9)).max() > 1e-3


def test_dropout_needs_a_key():
  apply, params = made(dropout=0.5, multipliers=(1,), attention=())
  plain = apply(params, X, LEVEL)
  first, again, other = (apply(params, X, LEVEL, key=jax.random.key(seed)) for seed in (1, 1, 2))
  np.testing.assert_array_equal(first, again)
  for a, b in itertools.combinations((plain, first, other), 2):
    assert np.abs(a - b).max() > 1e-3


def test_bfloat16_is_close_to_float32():
  """Eight bits of mantissa through eight blocks: a few percent of the output's size."""
  (wide, params), (narrow, _) = made(), made(dtype="bfloat16")
  expected, found = wide(params, X, LEVEL), narrow(params, X, LEVEL)
  assert found.dtype == jnp.float32
  error = np.sqrt(np.mean(np.square(found - expected)) / np.mean(np.square(expected)))
  assert 1e-4 < error < 0.05


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"channels": 0}, "channels=0"),
    ({"num_blocks": 0}, "num_blocks=0"),
    ({"head_dim": 0}, "head_dim=0"),
    ({"num_groups": 0}, "num_groups=0"),
    ({"multipliers": ()}, "multipliers are empty"),
    ({"multipliers": (1, 2, 2)}, "4x6 cannot be halved 2x"),
    ({"attention": (2,)}, r"attention=\(2,\) names a level that is not one of \[0, 1\]"),
    ({"attention": (-1,)}, "names a level"),
    ({"num_groups": 3}, "8 channels are not a multiple of num_groups=3"),
    ({"head_dim": 12}, "16 channels are not a multiple of head_dim=12"),
    ({"attention": (0,), "head_dim": 16}, "8 channels are not a multiple of head_dim=16"),
    ({"dropout": 1.0}, "dropout=1.0"),
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
    ({}, X, base.Condition(jnp.zeros(2, jnp.int32)), "no classes was given label"),
    ({}, X, base.Condition(None, jnp.zeros((2, 1, 3))), "takes no text"),
  ],
)
def test_inputs_that_do_not_fit_are_refused(fields, x, condition, message):
  apply, params = made(**fields)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(apply, params, x, LEVEL, condition)
