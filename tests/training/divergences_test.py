"""Links of f-divergences: they are f' of the divergence, numerically, and meet at their limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.training import divergences

X = np.linspace(-4, 4, 17)


def alpha_divergence(order):
  return lambda u: (u ** (1 - order) - (1 - order) * u - order) / (order * (order - 1))


GENERATORS = {
  "forward": (lambda u: -np.log(u), divergences.forward_kl),
  "jensen": (lambda u: u * np.log(u) - (u + 1) * np.log((u + 1) / 2), divergences.jensen_shannon),
  "alpha": (alpha_divergence(0.3), lambda x: divergences.alpha(x, order=0.3)),
  "hellinger": (
    lambda u: 4 * (1 - np.sqrt(u)),
    divergences.alpha,
  ),  # order 1/2, up to u's multiples
}


@pytest.mark.parametrize("name", GENERATORS)
def test_the_link_is_the_slope_of_the_generator_less_its_slope_at_one(name):
  generator, link = GENERATORS[name]
  slope = lambda u: (generator(u * (1 + 1e-6)) - generator(u * (1 - 1e-6))) / (2e-6 * u)
  expected = slope(np.exp(X)) - slope(1.0)
  np.testing.assert_allclose(link(jnp.asarray(X, jnp.float32)), expected, rtol=1e-5, atol=1e-6)


def test_alpha_goes_from_reverse_to_forward_kl():
  x = jnp.asarray(X, jnp.float32)
  np.testing.assert_allclose(divergences.alpha(x, order=1e-4), X, rtol=1e-3)
  np.testing.assert_allclose(divergences.alpha(x, order=1.0), 1 - np.exp(-X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("order", [0.25, 0.5, 1.0])
def test_steep_links_go_on_as_tangents(order):
  at = -30 / order
  x = jnp.array([at, at - 1, at - 2, at - 1000], jnp.float32)
  values = divergences.alpha(x, order=order)
  slopes = jax.vmap(jax.grad(lambda x: divergences.alpha(x, order=order)))(x)
  np.testing.assert_allclose(slopes, np.exp(30.0), rtol=1e-5)
  np.testing.assert_allclose(
    values[:-1] - values[1:], np.exp(30.0) * np.array([1, 1, 998]), rtol=1e-3
  )


def test_jensen_shannon_is_bounded_above_and_linear_below():
  values = divergences.jensen_shannon(jnp.array([1e3, -1e3], jnp.float32))
  np.testing.assert_allclose(values, [np.log(2), np.log(2) - 1e3], rtol=1e-6)
