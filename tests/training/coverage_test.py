"""Coverage: its value and gradient against exact arithmetic, its ends, and of a model's rows."""

import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.models import toy
from ancestral.training import coverage, likelihood


def exact(p: float, n: int) -> tuple[float, float]:
  """The loss and the factor of its gradient, from whole numbers."""
  p = Fraction(p)
  found = 1 - (1 - p) ** n
  factor = n * p * (1 - p) ** (n - 1) / found
  if found > Fraction(1, 2):
    return -np.log1p(-float((1 - p) ** n)), float(factor)
  shift = found.numerator.bit_length() - found.denominator.bit_length()  # beyond floats' range
  return -(np.log(float(found / Fraction(2) ** shift)) + shift * np.log(2)), float(factor)


def value_and_gradient(log_prob, n):
  loss = lambda x: coverage.coverage(x, n)
  log_prob = jnp.asarray(log_prob, jnp.float32)
  return jax.jit(jax.vmap(jax.value_and_grad(loss)))(log_prob)


@pytest.mark.parametrize("n", [1, 2, 16, 1000])
def test_value_and_gradient_are_exact_from_rare_to_nearly_certain(n):
  probability = [2.0**-200, 2.0**-90, 2.0**-80, 2.0**-40, 1e-6, 1e-3, 0.1, 0.4, 0.6, 0.9, 1 - 1e-6]
  log_prob = np.log(probability).astype(np.float32)
  losses, gradients = value_and_gradient(log_prob, n)
  for i, rounded in enumerate(np.exp(log_prob.astype(np.float64))):  # of the float32 log prob
    loss, factor = exact(float(rounded), n)
    np.testing.assert_allclose(losses[i], loss, rtol=2e-6 * max(1, n * rounded), atol=1e-37)
    np.testing.assert_allclose(-gradients[i], factor, rtol=2e-5 * max(1, n * rounded), atol=1e-37)


def test_of_two_samples_by_hand():
  # p = 1/2: found 3/4; the factor is 2 (1/2) (1/2) / (3/4) = 2/3
  losses, gradients = value_and_gradient(np.log([0.5]), 2)
  np.testing.assert_allclose(losses, [np.log(4 / 3)], rtol=1e-6)
  np.testing.assert_allclose(gradients, [-2 / 3], rtol=1e-6)


def test_the_gradient_is_that_of_numerical_differences():
  log_prob, n, h = -1.3, 7, 1e-5
  loss = lambda x: -np.log1p(-np.exp(n * np.log1p(-np.exp(x))))
  numeric = (loss(log_prob + h) - loss(log_prob - h)) / (2 * h)
  np.testing.assert_allclose(value_and_gradient([log_prob], n)[1], [numeric], rtol=1e-5)


def test_one_sample_is_cross_entropy_at_every_probability():
  log_prob = np.array([-1e3, -100.0, -61.0, -60.0, -1.0, -1e-3, -1e-20, -1e-38, 0.0], np.float32)
  losses, gradients = value_and_gradient(log_prob, 1)
  np.testing.assert_allclose(losses, -log_prob, rtol=2e-6, atol=1e-37)
  np.testing.assert_allclose(gradients, -np.ones(9), rtol=2e-5)


@pytest.mark.parametrize("n", [2, 64, 100_000])
def test_the_ends_are_finite_and_certainty_has_no_gradient(n):
  losses, gradients = value_and_gradient([-1e3, -61.0, -1e-30, -1e-38, 0.0], n)
  np.testing.assert_allclose(losses, [1e3 - np.log(n), 61 - np.log(n), 0, 0, 0], atol=1e-4)
  np.testing.assert_allclose(gradients, [-1, -1, 0, 0, 0], atol=1e-6)


def test_second_derivatives_are_finite_between_the_ends():
  second = jax.vmap(jax.grad(jax.grad(lambda x: coverage.coverage(x, 4))))
  assert np.all(np.isfinite(second(jnp.array([-1e3, -3.0, -0.7, -0.1]))))


def test_under_jit_and_vmap_of_every_shape():
  log_prob = -jnp.arange(1.0, 7.0).reshape(2, 3)
  together = jax.jit(lambda x: coverage.coverage(x, 4))(log_prob)
  apart = [[coverage.coverage(x, 4) for x in row] for row in log_prob]
  np.testing.assert_allclose(together, np.array(apart), rtol=1e-6)


def rows():
  """All continuations of two tokens after a prompt, and a row of none."""
  tokens = np.array([(1, *drawn) for drawn in itertools.product(range(3), repeat=2)] + [(0, 0, 0)])
  mask = np.ones((10, 2), bool)
  mask[-1] = False
  return {
    "tokens": jnp.asarray(tokens[:, :-1]),
    "targets": jnp.asarray(tokens[:, 1:]),
    "mask": jnp.asarray(mask),
  }


def test_direct_coverage_is_of_the_law_of_the_model():
  model, params = targets.table_target(vocab_size=3, order=1)
  law = toy.table_law(targets.softmax(params), (1,), 2).reshape(-1)
  (losses, weights), metrics = coverage.direct(model, num_samples=5)(
    jax.random.key(0), params, rows()
  )
  found = [sum(law[i] * (1 - law[i]) ** k for k in range(5)) for i in range(9)]  # first at draw k
  np.testing.assert_allclose(losses, [*-np.log(found), 0], rtol=1e-4)
  np.testing.assert_array_equal(weights, [1] * 9 + [0])
  np.testing.assert_allclose(metrics["coverage"], [*found, 0], rtol=1e-4)
  assert metrics["confidence_factor"][9] == 0
  assert set(metrics) == {"coverage", "confidence_factor"}


def test_an_answer_is_a_row_and_its_gradient_is_scaled_by_the_factor():
  model, params = targets.table_target(vocab_size=3, order=1)
  batch = rows()

  def gradient(loss_fn, batch):
    loss = lambda params: loss_fn(jax.random.key(0), params, batch)[0][0].sum()
    return jax.jit(jax.grad(loss))(params)

  one = {name: array[4:5] for name, array in batch.items()}
  plain = gradient(likelihood.next_token(model), one)
  for n, expected in ((1, 1), (30, 0.5)):
    factor = coverage.direct(model, num_samples=n)(None, params, one)[1]["confidence_factor"]
    assert factor[0] == pytest.approx(expected, abs=1e-5 if n == 1 else 0.3)
    found = gradient(coverage.direct(model, num_samples=n), one)
    np.testing.assert_allclose(found, factor[0] * plain, rtol=1e-4, atol=1e-6)
  nothing = {name: array[9:] for name, array in batch.items()}
  np.testing.assert_array_equal(gradient(coverage.direct(model, num_samples=1), nothing), 0)


def test_the_optimum_of_many_samples_is_less_confident():
  # Of two answers that are right 3 and 1 times in 4, 2 samples want odds of 1.9 and not 3: q = p
  # maximises E log q, and E log(1 - (1 - q)^2) is flatter where q is large.
  def best(n):
    loss = lambda s: (
      0.75 * coverage.coverage(jax.nn.log_sigmoid(s), n)
      + 0.25 * coverage.coverage(jax.nn.log_sigmoid(-s), n)
    )
    descend = lambda _, logit: logit - 2 * jax.grad(loss)(logit)
    return float(jax.nn.sigmoid(jax.lax.fori_loop(0, 400, descend, jnp.float32(0.0))))

  grid = np.linspace(0.001, 0.999, 999)
  pass_at_2 = 0.75 * np.log(1 - (1 - grid) ** 2) + 0.25 * np.log(1 - grid**2)
  assert best(1) == pytest.approx(0.75, abs=1e-3)
  assert best(2) == pytest.approx(grid[pass_at_2.argmax()], abs=1e-3)
  assert best(2) < 0.72


def test_packed_rows_are_refused():
  model, params = targets.table_target(vocab_size=3, order=1)
  batch = {**rows(), "segments": jnp.ones((10, 2), jnp.int32)}
  with pytest.raises(ValueError, match=r"data\.pad"):
    coverage.direct(model, num_samples=2)(jax.random.key(0), params, batch)
