"""Embeddings of noise, place and class against loops written out, and functions of the level."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.models import base, embeddings


@pytest.mark.parametrize("shift, slowest", [(0.0, 1e4 ** (-4 / 5)), (1.0, 1e-4)])
def test_sinusoidal_by_a_loop(shift, slowest):
  positions, channels = np.array([[0.0, 1.0, 2.5], [40.0, 300.0, 999.0]]), 10
  found = embeddings.sinusoidal(jnp.asarray(positions, jnp.float32), channels, shift=shift)
  assert found.shape == (2, 3, channels)
  ratio = slowest ** (1 / 4)  # of neighbouring frequencies, from 1 to the slowest
  for place in np.ndindex(2, 3):
    for i in range(5):
      angle = positions[place] * ratio**i
      np.testing.assert_allclose(found[place][i], math.cos(angle), atol=1e-4)
      np.testing.assert_allclose(found[place][5 + i], math.sin(angle), atol=1e-4)


def test_another_period_stretches_it():
  t = jnp.array([3.0])
  found = embeddings.sinusoidal(t, 4, max_period=100.0)
  np.testing.assert_allclose(found, [np.r_[np.cos([3, 0.3]), np.sin([3, 0.3])]], rtol=1e-5)


def test_grid_sincos_by_a_loop():
  height, width, channels = 3, 5, 12
  found = embeddings.grid_sincos(height, width, channels)
  assert found.shape == (height * width, channels) and found.dtype == np.float32
  for row in range(height):
    for column in range(width):
      expected = []
      for place in (column, row):
        angles = [place / 10_000 ** (i / 3) for i in range(3)]
        expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
      np.testing.assert_allclose(found[row * width + column], expected, atol=1e-6)


def test_grid_rotary_angles_by_a_loop():
  height, width, channels = 3, 5, 8
  found = embeddings.grid_rotary_angles(height, width, channels, period=16.0)
  for row in range(height):
    for column in range(width):
      expected = [row, row / 4, column, column / 4]
      np.testing.assert_allclose(found[row * width + column], expected, rtol=1e-6)


@pytest.mark.parametrize("function", [embeddings.grid_sincos, embeddings.grid_rotary_angles])
def test_channels_for_two_axes_are_a_multiple_of_four(function):
  with pytest.raises(ValueError, match="6 channels do not divide"):
    function(2, 2, 6)


def conditioning(num_classes):
  return embeddings.Conditioning(8, 16, 0.0, num_classes, jnp.dtype("float32"))


def test_the_table_of_classes_has_a_row_for_none():
  level, labels = jnp.array([5.0, 5.0, 700.0, 700.0]), jnp.array([0, 3, 1, 3])
  with_labels, alone = conditioning(3), conditioning(None)
  condition = base.Condition(labels)
  params = with_labels.init(jax.random.key(0), level, condition)["params"]
  assert params["classes"].shape == (4, 8)
  assert 0.3 < np.std(params["classes"]) < 0.7
  found = with_labels.apply({"params": params}, level, condition)
  rest = {name: leaf for name, leaf in params.items() if name != "classes"}
  of_level = alone.apply({"params": rest}, level, base.Condition())
  np.testing.assert_allclose(found - of_level, params["classes"][labels], atol=1e-6)
  assert np.abs(of_level[0] - of_level[2]).max() > 1e-3


@pytest.mark.parametrize(
  "num_classes, label, message",
  [(None, jnp.zeros(1, jnp.int32), "no classes was given label"), (3, None, "3 classes")],
)
def test_a_label_is_given_where_there_are_classes(num_classes, label, message):
  with pytest.raises(ValueError, match=message):
    conditioning(num_classes).init(jax.random.key(0), jnp.zeros(1), base.Condition(label))


def test_a_level_function_begins_at_zero_and_is_linear_in_its_features():
  function, level = embeddings.level_function(8), jnp.array([0.0, 12.0, 800.0])
  params = function.init(jax.random.key(0), None)
  np.testing.assert_array_equal(function.apply(params, None, level), 0)
  gradient = jax.jacobian(lambda params: function.apply(params, None, level))(params)
  np.testing.assert_allclose(gradient, embeddings.sinusoidal(level, 8), atol=1e-6)


def test_a_level_function_can_follow_a_smooth_curve():
  """Fitted by least squares to ln of a loss that falls by e^6 over the levels, to 3 percent."""
  level = np.linspace(0, 1000, 400)
  wanted = -6 / (1 + np.exp(-(level - 500) / 100))
  features = np.asarray(embeddings.sinusoidal(jnp.asarray(level, jnp.float32), 64), np.float64)
  weights = np.linalg.lstsq(features, wanted, rcond=1e-6)[0]
  function = embeddings.level_function()
  params = jnp.asarray(weights, jnp.float32)
  found = function.apply(params, None, jnp.asarray(level, jnp.float32))
  assert function.init(None, None).shape == params.shape
  assert np.abs(found - wanted).max() < 0.03
