"""Unpaired losses: by hand, around their reference point, statistics of a batch, quantiles."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.training import preference, unpaired

GOOD = jnp.array([True, False])


def test_kto_by_hand():
  # beta (x - kl) = log 4: 1 - 4/5 of a good one, 4/5 of a bad one, slope -+ 4/25 beta
  x = jnp.full(2, 1.0 + math.log(4) / 0.5, jnp.float32)
  loss = functools.partial(
    unpaired.kto, desirable=GOOD, kl=1.0, beta=0.5, desirable_weight=2.0, undesirable_weight=3.0
  )
  np.testing.assert_allclose(loss(x), [2 / 5, 3 * 4 / 5], rtol=1e-5)
  gradient = jax.grad(lambda x: loss(x).sum())(x)
  np.testing.assert_allclose(gradient, [-2 * 0.16 * 0.5, 3 * 0.16 * 0.5], rtol=1e-5)


def test_kto_around_zero_is_apo_zero_of_a_pair():
  chosen, rejected = jnp.array([1.3, -2.0]), jnp.array([0.4, 5.0])
  good = unpaired.apo_zero(chosen, jnp.full(2, True))
  bad = unpaired.apo_zero(rejected, jnp.full(2, False))
  np.testing.assert_allclose(good + bad, preference.apo_zero(chosen, rejected), rtol=1e-6)
  np.testing.assert_array_equal(good, unpaired.kto(chosen, jnp.full(2, True), 0.0))


def test_kto_kl_is_a_clamped_mean_without_gradient():
  ratios = jnp.array([3.0, -1.0, jnp.nan])
  weight = jnp.array([1.0, 1.0, 0.0])
  np.testing.assert_allclose(unpaired.kto_kl(ratios, weight), 1.0)
  assert unpaired.kto_kl(-ratios, weight) == 0
  assert unpaired.kto_kl(ratios, jnp.zeros(3)) == 0
  loss = lambda r: unpaired.kto(jnp.ones(2), GOOD, unpaired.kto_kl(r, weight)).sum()
  np.testing.assert_array_equal(jax.grad(loss)(ratios), 0)


def test_bco_by_hand_and_as_halves_of_the_paired_loss():
  # beta x - shift = log 3: log(4/3) of a good one, log 4 of a bad one
  x = jnp.full(2, (math.log(3) + 0.2) / 0.1, jnp.float32)
  losses = unpaired.bco(x, GOOD, 0.2)
  np.testing.assert_allclose(losses, [math.log(4 / 3), math.log(4)], rtol=1e-5)
  np.testing.assert_allclose(losses.sum(), preference.bco(x[0], x[1], 0.2), rtol=1e-6)
  gradient = jax.grad(lambda x: unpaired.bco(x, GOOD, 0.2).sum())(x)
  np.testing.assert_allclose(gradient, [-0.1 / 4, 0.1 * 3 / 4], rtol=1e-5)


def test_bco_shift_is_halfway_between_the_kinds():
  ratios = jnp.array([4.0, 8.0, 9.0, -2.0, jnp.nan])
  good = jnp.array([True, True, True, False, False])
  weight = jnp.array([1.0, 1.0, 1.0, 1.0, 0.0])
  shift = lambda r, w: unpaired.bco_shift(r, good, w, beta=0.5)
  np.testing.assert_allclose(shift(ratios, weight), 0.5 * (7 - 2) / 2)
  np.testing.assert_allclose(shift(ratios, weight.at[3].set(0)), 0.5 * 7)
  assert shift(ratios, jnp.zeros(5)) == 0
  np.testing.assert_array_equal(jax.grad(shift)(ratios, weight), 0)


def test_aot_compares_order_statistics():
  chosen, rejected = jnp.array([3.0, -1.0, 2.0]), jnp.array([0.5, 4.0, 0.0])
  expected = [math.log1p(math.exp(-0.1 * d)) for d in (-1 - 0, 2 - 0.5, 3 - 4)]
  np.testing.assert_allclose(unpaired.aot(chosen, rejected), expected, rtol=1e-6)
  smooth = functools.partial(preference.conservative, label_smoothing=0.5)
  expected = [(a + a - 0.1 * d * -1) / 2 for a, d in zip(expected, (-1, 1.5, -1), strict=True)]
  np.testing.assert_allclose(unpaired.aot(chosen, rejected, loss=smooth), expected, rtol=1e-6)


@pytest.mark.parametrize("repeats", [2, 3])
def test_aot_of_unequal_counts_reads_quantiles(repeats):
  # quantile functions by numpy's own interpolation of the same levels
  rng = np.random.default_rng(0)
  chosen, rejected = rng.normal(size=4 * repeats), rng.normal(size=4)
  levels = (np.arange(4 * repeats) + 0.5) / (4 * repeats)
  other = np.quantile(rejected, levels, method="hazen")
  expected = np.logaddexp(0, -0.1 * (np.sort(chosen) - other))
  found = unpaired.aot(jnp.asarray(chosen, jnp.float32), jnp.asarray(rejected, jnp.float32))
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  constant = unpaired.aot(jnp.full(7, 2.0), jnp.full(3, 2.0))
  np.testing.assert_allclose(constant, math.log(2), rtol=1e-6)


def test_aot_of_unequal_counts_sends_gradients_to_all():
  gradient = jax.grad(lambda c, r: unpaired.aot(c, r).sum(), argnums=(0, 1))(
    jnp.array([1.0, 1.0, 0.0, 5.0, 2.0]), jnp.array([0.0, 3.0])
  )
  assert (np.asarray(gradient[0]) < 0).all() and (np.asarray(gradient[1]) > 0).all()
