"""The residual network of points: its start, by hand in numpy, its conditions, its dropout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.models import base, embeddings, mlp

X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
LEVEL = jnp.array([0.0, 50.0, 400.0, 950.0])
LABELS = jnp.array([0, 1, 2, 1])


@pytest.fixture(autouse=True)
def exact_matmuls():
  with jax.default_matmul_precision("highest"):
    yield


@functools.cache
def made(**fields):
  """The network, jitted, and parameters none of which is 0, as after training."""
  network = mlp.mlp(mlp.MLPConfig(**{"dim": 3, "width": 8, "num_layers": 2, **fields}))
  shapes = jax.eval_shape(network.init, jax.random.key(0), X)
  rng = np.random.default_rng(1)
  draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 2, jnp.float32)
  return jax.jit(network.apply), jax.tree.map(draw, shapes)


def test_the_output_begins_at_zero():
  network = mlp.mlp(mlp.MLPConfig(dim=3, width=8, num_layers=1))

  @jax.jit
  def first():
    params = network.init(jax.random.key(0), X)
    return params, network.apply(params, X, LEVEL)

  params, output = first()
  np.testing.assert_array_equal(output, 0)
  assert sum(np.any(kernel != 0) for kernel in jax.tree.leaves(params)) == 6  # the other kernels


def test_by_hand():
  apply, params = made(num_classes=2)
  dense = lambda name, x: x @ np.float64(params[name]["kernel"]) + np.float64(params[name]["bias"])
  silu = lambda x: x / (1 + np.exp(-x))

  def norm(x):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6)

  vector = embeddings.Conditioning(8, 64, 0.0, 2, jnp.dtype("float32")).apply(
    {"params": params["conditioning"]}, LEVEL, base.Condition(LABELS)
  )
  vector, hidden = silu(np.float64(vector)), dense("in", np.float64(X))
  for i in range(2):
    scale, shift = np.split(dense(f"modulation_{i}", vector), 2, axis=-1)
    inner = silu(dense(f"up_{i}", norm(hidden) * (1 + scale) + shift))
    hidden = hidden + dense(f"down_{i}", inner)
  found = apply(params, X, LEVEL, base.Condition(LABELS))
  np.testing.assert_allclose(found, dense("out", norm(hidden)), atol=1e-5)


def test_a_row_without_its_class_has_the_class_none():
  apply, params = made(num_classes=2)
  rows = jnp.array([True, False, False, True])
  found = apply(params, X, LEVEL, base.without(base.Condition(LABELS), 2, rows))
  none = apply(params, X, LEVEL, base.Condition(jnp.full(4, 2)))
  own = apply(params, X, LEVEL, base.Condition(LABELS))
  np.testing.assert_array_equal(found, np.where(rows[:, None], none, own))
  moved = np.abs(none - own).max(axis=-1)
  np.testing.assert_array_equal(moved > 1e-3, LABELS != 2)


def test_dropout_needs_a_key():
  apply, params = made(dropout=0.5)
  plain = apply(params, X, LEVEL)
  first, again, other = (apply(params, X, LEVEL, key=jax.random.key(seed)) for seed in (1, 1, 2))
  np.testing.assert_array_equal(first, again)
  for a, b in ((plain, first), (plain, other), (first, other)):
    assert np.abs(a - b).max() > 1e-3


@pytest.mark.parametrize("num_classes, label", [(None, LABELS), (2, None)])
def test_a_label_is_given_where_there_are_classes(num_classes, label):
  apply, params = made(num_classes=num_classes)
  with pytest.raises(ValueError, match="classes was given label"):
    jax.eval_shape(apply, params, X, LEVEL, base.Condition(label))
