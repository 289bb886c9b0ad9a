"""Preference losses: values by hand, gradients against numbers, limits, ties, masks, extremes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.training import divergences, preference, reference_free, stepwise, unpaired

partial = functools.partial
PAIRS = {
  "dpo": preference.dpo,
  "conservative": preference.conservative,
  "robust": preference.robust,
  "hinge": preference.hinge,
  "ipo": preference.ipo,
  "exo": preference.exo,
  "nca": preference.nca,
  "bco": partial(preference.bco, shift=0.3),
  "sppo": preference.sppo,
  "apo_zero": preference.apo_zero,
  "apo_down": preference.apo_down,
  "discopop": preference.discopop,
  "mixed": preference.mixed([preference.dpo, partial(preference.bco, shift=0.0)], [0.8, 0.2]),
  "forward": lambda c, r: preference.dpo(divergences.forward_kl(c), divergences.forward_kl(r)),
  "forward_ipo": lambda c, r: preference.ipo(divergences.forward_kl(c), divergences.forward_kl(r)),
  "jensen": lambda c, r: preference.dpo(
    divergences.jensen_shannon(c), divergences.jensen_shannon(r)
  ),
  "aot": preference.aot,
  "aot_unpaired": unpaired.aot,
  "kto": lambda c, r: unpaired.kto(c, c > r, 0.2) + unpaired.kto(r, c <= r, 0.2),
  "unpaired_bco": lambda c, r: unpaired.bco(c, c > r, 0.2) + unpaired.bco(r, c <= r, 0.2),
  "unpaired_apo": lambda c, r: unpaired.apo_zero(c, c > r) + unpaired.apo_zero(r, c <= r),
  "step_apo": lambda c, r: stepwise.step_apo(c, r, jnp.ones(c.shape), -jnp.ones(c.shape)),
  "simpo": reference_free.simpo,
  "alphapo": reference_free.alphapo,
  "cpo": lambda c, r: reference_free.cpo(c, r, -c),
  "orpo": reference_free.orpo,
  "redi": reference_free.redi,
}
FREE = ("simpo", "alphapo", "cpo", "orpo", "redi")  # of log-probabilities, which are at most 0


def ratios(name, scale=3.0, size=256):  # one shape for most tests: each is compiled
  rng = np.random.default_rng(3)
  chosen, rejected = scale * rng.normal(size=(2, size))
  if name in FREE:
    chosen, rejected = -np.abs(chosen) - 1e-3, -np.abs(rejected) - 1e-3
  return jnp.asarray(chosen, jnp.float32), jnp.asarray(rejected, jnp.float32)


def value_and_gradients(loss, chosen, rejected):
  total = lambda c, r: loss(c, r).sum()
  return loss(chosen, rejected), jax.grad(total, argnums=(0, 1))(chosen, rejected)


@pytest.mark.parametrize("name", PAIRS)
def test_gradient_is_the_slope_of_the_value(name):
  pair = ratios(name)
  along = np.random.default_rng(4).normal(size=(2, pair[0].size)).astype(np.float32)
  gradients = value_and_gradients(PAIRS[name], *pair)[1]
  step = 1e-2
  moved = lambda s: PAIRS[name](*(x + s * v for x, v in zip(pair, along, strict=True)))
  up, down = (np.asarray(moved(s), np.float64).sum() for s in (step, -step))
  slope, scale = (up - down) / (2 * step), np.abs(along * np.asarray(gradients)).sum()
  assert scale > 0.01
  np.testing.assert_allclose(np.sum(along * np.asarray(gradients)), slope, atol=3e-3 * scale)


EXTREMES = [0.0, 1e-6, 1.0, 30.0, 88.0, 89.0, 200.0, 1e3]


@pytest.mark.parametrize("name", PAIRS)
def test_extremes_and_ties_are_finite_in_value_and_gradient(name):
  values = np.array([s * x for x in EXTREMES for s in (-1, 1)])
  values = -np.abs(values) if name in FREE else values
  chosen, rejected = (jnp.asarray(x.ravel(), jnp.float32) for x in np.meshgrid(values, values))
  losses, gradients = value_and_gradients(PAIRS[name], chosen, rejected)
  assert np.isfinite(losses).all() and all(np.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("name", PAIRS)
def test_losses_are_float32_of_narrow_inputs_and_keep_leading_dimensions(name):
  narrow = [x.astype(jnp.bfloat16) for x in ratios(name)]
  wide = [x.astype(jnp.float32) for x in narrow]
  losses = PAIRS[name](*narrow)
  assert losses.dtype == jnp.float32
  np.testing.assert_array_equal(losses, PAIRS[name](*wide))
  if name != "aot_unpaired":
    square = PAIRS[name](*(x.reshape(16, 16) for x in wide))
    assert square.shape == (16, 16)
    if name != "aot":
      np.testing.assert_allclose(square.ravel(), losses, rtol=1e-6)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_either_side_changes_nothing_and_empty_rows_have_no_gradient(name, side):
  rng = np.random.default_rng(5)
  tokens = -np.abs(rng.normal(size=(2, 3, 5))).astype(np.float32)
  lengths = np.array([[5, 3, 0], [4, 1, 0]])
  order = np.arange(5) if side == "right" else np.arange(5)[::-1]
  mask = jnp.asarray((order < lengths[..., None]).astype(np.float32))
  padded = jnp.where(mask != 0, jnp.asarray(tokens), jnp.nan)

  def loss(log_prob):
    summed = stepwise.weighted_ratio(log_prob, mask)
    return jnp.sum(PAIRS[name](summed[0], summed[1]) * jnp.asarray([1.0, 1.0, 0.0]))

  value, gradient = jax.value_and_grad(loss)(padded)
  sums = [[tokens[i, j][order < n].sum() for j, n in enumerate(lengths[i])] for i in (0, 1)]
  expected = PAIRS[name](*(jnp.asarray(x, jnp.float32) for x in sums))[:2].sum()
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  assert np.isfinite(gradient).all()
  assert np.abs(gradient[:, :2]).sum() > 0
  assert (np.asarray(gradient)[np.asarray(mask) == 0] == 0).all()


# (loss, value, slope by beta c) at beta c = log 4 and r = 0, where sigmoid(beta (c - r)) = 4/5.
LOG = math.log
BY_HAND = {
  "dpo": (preference.dpo, LOG(5 / 4), -1 / 5),
  "conservative": (
    partial(preference.conservative, label_smoothing=0.25),
    0.75 * LOG(5 / 4) + 0.25 * LOG(5),
    0.75 * -1 / 5 + 0.25 * 4 / 5,
  ),
  "robust": (
    partial(preference.robust, label_smoothing=0.25),
    1.5 * LOG(5 / 4) - 0.5 * LOG(5),
    1.5 * -1 / 5 - 0.5 * 4 / 5,
  ),
  "hinge": (preference.hinge, 0.0, 0.0),
  "ipo": (preference.ipo, (LOG(4) - 0.5) ** 2, 2 * (LOG(4) - 0.5)),
  "exo": (  # KL((4/5, 1/5) || (3/4, 1/4)); its slope is p (1 - p) times the gap of log-odds
    partial(preference.exo, label_smoothing=0.25),
    0.8 * LOG(0.8 / 0.75) + 0.2 * LOG(0.2 / 0.25),
    0.16 * (LOG(4) - LOG(3)),
  ),
  "nca": (preference.nca, LOG(5 / 4) + 0.5 * LOG(5) + 0.5 * LOG(2), -1 / 5 + 0.5 * 4 / 5),
  "bco": (
    partial(preference.bco, shift=LOG(2)),  # sigmoid(log 4 - log 2) = 2/3, sigmoid(log 2) = 2/3
    2 * LOG(3 / 2),
    -1 / 3,
  ),
  "sppo": (preference.sppo, (LOG(4) - 0.5) ** 2 + 0.25, 2 * (LOG(4) - 0.5)),
  "sppo_even": (partial(preference.sppo, win_rate=0.5), LOG(4) ** 2, 2 * LOG(4)),
  "apo_zero": (preference.apo_zero, 1 / 5 + 1 / 2, -0.16),
  "apo_down": (preference.apo_down, 4 / 5 + 1 / 5, 0.0),
  "discopop": (  # tau = 1: g = 4/5
    partial(preference.discopop, tau=1.0),
    LOG(5 / 4) / 5 + 4 / 5 / 4,
    -0.16 * LOG(5 / 4) - 1 / 25 + 0.16 / 4 - 1 / 5,
  ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_values_and_slopes_worked_by_hand(name):
  loss, expected, slope = BY_HAND[name]
  beta = (
    1.0 if name in ("ipo", "sppo", "sppo_even") else 0.1
  )  # squares are not of beta times ratios
  chosen, rejected = jnp.array([LOG(4) / beta], jnp.float32), jnp.array([0.0])
  losses, gradients = value_and_gradients(partial(loss, beta=beta), chosen, rejected)
  np.testing.assert_allclose(losses, [expected], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(gradients[0], [beta * slope], rtol=1e-5, atol=1e-6)


# Slopes by beta r at c = 0 and beta r = log 4, of losses that are not of c - r.
REJECTED = {
  "nca": (preference.nca, 0.5 * 4 / 5),
  "bco": (partial(preference.bco, shift=LOG(2)), 2 / 3),
  "apo_zero": (preference.apo_zero, 0.16),
  "apo_down": (preference.apo_down, 0.16),
  "sppo": (preference.sppo, 2 * (LOG(4) + 0.5)),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejected_responses_are_pushed_down_as_worked_by_hand(name):
  loss, slope = REJECTED[name]
  beta = 1.0 if name == "sppo" else 0.1
  rejected = jnp.array([LOG(4) / beta], jnp.float32)
  _, gradients = value_and_gradients(partial(loss, beta=beta), jnp.zeros(1), rejected)
  np.testing.assert_allclose(gradients[1], [beta * slope], rtol=1e-5)


def test_sppo_is_zero_at_its_two_targets():
  loss = preference.sppo(jnp.array([2.5, -2.5]), jnp.array([-2.5, 2.5]), beta=0.2)
  np.testing.assert_allclose(loss, [0, 50])


MARGIN = ["dpo", "conservative", "robust", "hinge", "ipo", "exo", "forward", "jensen"]


@pytest.mark.parametrize("name", MARGIN)
def test_losses_of_the_margin_pull_both_responses_alike_at_a_tie(name):
  tie = jnp.zeros(1)
  _, (chosen, rejected) = value_and_gradients(PAIRS[name], tie, tie)
  assert chosen[0] < 0
  np.testing.assert_array_equal(chosen, -rejected)


def test_dpo_at_a_tie_is_log_two_with_slope_half_beta():
  losses, gradients = value_and_gradients(preference.dpo, jnp.full(1, 7.0), jnp.full(1, 7.0))
  np.testing.assert_allclose(losses, math.log(2), rtol=1e-6)
  np.testing.assert_allclose(gradients, [[-0.05], [0.05]], rtol=1e-6)


def test_smoothed_losses_are_least_where_the_label_is_as_doubtful():
  # all gradients vanish at sigmoid(beta d) = 1 - e = 0.9
  margin = jnp.array([math.log(9) / 0.1], jnp.float32)
  for loss in (preference.conservative, partial(preference.exo, label_smoothing=0.1)):
    _, gradients = value_and_gradients(loss, margin, jnp.zeros(1))
    np.testing.assert_allclose(gradients, 0, atol=1e-8)


def test_robust_is_unbiased_over_flipped_labels():
  chosen, rejected = ratios("robust")
  rate = 0.3
  loss = partial(preference.robust, label_smoothing=rate)
  mean = (1 - rate) * loss(chosen, rejected) + rate * loss(rejected, chosen)
  np.testing.assert_allclose(mean, preference.dpo(chosen, rejected), rtol=2e-5)


def test_label_smoothing_may_differ_between_pairs():
  chosen, rejected = ratios("conservative", size=3)
  losses = preference.conservative(chosen, rejected, label_smoothing=jnp.array([0.0, 0.5, 1.0]))
  right, wrong = preference.dpo(chosen, rejected), preference.dpo(rejected, chosen)
  expected = [right[0], (right[1] + wrong[1]) / 2, wrong[2]]
  np.testing.assert_allclose(losses, expected, rtol=1e-6)


def test_discopop_increases_around_a_tie():
  slope = jax.grad(preference.discopop)(jnp.zeros(()), jnp.zeros(()))
  np.testing.assert_allclose(slope, 0.1 * ((1 - math.log(2)) / 0.2 - 0.75), rtol=1e-5)
  assert slope > 0


def test_discopop_turns_from_logistic_to_exponential():
  wrong, right = jnp.array([-80.0]), jnp.array([80.0])
  zero = jnp.zeros(1)
  np.testing.assert_allclose(
    preference.discopop(wrong, zero), preference.dpo(wrong, zero), rtol=1e-5
  )
  np.testing.assert_allclose(preference.discopop(right, zero), math.exp(-8), rtol=1e-5)


def test_aot_pairs_sorted_margins_and_sends_gradients_back_to_their_pairs():
  policy, reference = jnp.array([3.0, -1.0, 2.0]), jnp.array([0.5, 4.0, 0.0])
  losses = preference.aot(policy, reference)
  expected = [np.log1p(np.exp(-0.1 * d)) for d in (-1 - 0, 2 - 0.5, 3 - 4)]
  np.testing.assert_allclose(losses, expected, rtol=1e-6)
  gradient = jax.grad(lambda p: preference.aot(p, reference)[0])(policy)  # of the smallest, pair 1
  assert gradient[1] < 0 and gradient[0] == gradient[2] == 0


def test_mixed_is_the_weighted_sum():
  chosen, rejected = ratios("dpo")
  loss = preference.mixed([preference.hinge, preference.ipo], [0.5, 2.0])
  expected = 0.5 * np.maximum(1 - 0.1 * (chosen - rejected), 0) + 2 * (chosen - rejected - 5) ** 2
  np.testing.assert_allclose(loss(chosen, rejected), expected, rtol=1e-5)
  with pytest.raises(ValueError, match="2 losses have 1 weights"):
    preference.mixed([preference.hinge, preference.ipo], [1.0])


@pytest.mark.parametrize("mask", [[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]])
def test_length_desensitised_weighs_what_is_beyond_the_other_response(mask):
  tokens = np.array([1.0, 2.0, 4.0, 8.0])
  row = np.full(5, np.nan)
  row[np.array(mask) == 1] = tokens
  log_prob, mask = jnp.asarray([row] * 3, jnp.float32), jnp.asarray([mask] * 3)
  other = jnp.array([2, 4, 9])
  found = preference.length_desensitised(log_prob, mask, other, alpha=0.25)
  np.testing.assert_allclose(found, [3 + 0.25 * 12, 15, 15])
  total = lambda x: preference.length_desensitised(x, mask, other, alpha=0.25)[0]
  weights = np.asarray(jax.grad(total)(log_prob))[0]
  np.testing.assert_allclose(weights[np.asarray(mask)[0] == 1], [1, 1, 0.25, 0.25])
  assert weights[np.asarray(mask)[0] == 0] == 0


def test_length_desensitised_of_no_tokens_is_zero():
  empty = jnp.full((1, 4), -jnp.inf)
  value, gradient = jax.value_and_grad(
    lambda x: preference.length_desensitised(x, jnp.zeros((1, 4)), jnp.array([2])).sum()
  )(empty)
  assert value == 0 and (gradient == 0).all()


def test_wpo_weight_of_flat_and_of_peaked_laws():
  # flat over V: log p - log sum p^2 = 0; p = (1/2, 1/4, 1/4) has sum p^2 = 3/8
  for size in (3, 50):
    flat = jnp.zeros((2, size))
    np.testing.assert_allclose(preference.log_collision(flat), -math.log(size), rtol=1e-6)
  peaked = jnp.log(jnp.array([2.0, 1.0, 1.0]))
  np.testing.assert_allclose(preference.log_collision(peaked), math.log(3 / 8), rtol=1e-6)
  likely, rare = math.log(1 / 2) - math.log(3 / 8), math.log(1 / 4) - math.log(3 / 8)
  weight = preference.wpo_weight(jnp.array([likely, likely]), jnp.array([likely, rare]))
  np.testing.assert_allclose(weight, [1, 4 / 3 * 2 / 3], rtol=1e-6)
  gradient = jax.grad(lambda a: preference.wpo_weight(a, a).sum())(jnp.array([-1.0]))
  assert gradient == 0


def test_reference_sync_mixes_at_multiples_only():
  reference = {"w": jnp.array([0.0, 10.0]), "n": jnp.zeros((), jnp.bfloat16)}
  params = {"w": jnp.array([1.0, 20.0]), "n": jnp.ones((), jnp.bfloat16)}
  sync = jax.jit(preference.reference_sync)
  for step in (0, 1, 511, 513):
    np.testing.assert_array_equal(sync(reference, params, step)["w"], reference["w"])
  for step in (512, 1024):
    mixed = sync(reference, params, step)
    np.testing.assert_allclose(mixed["w"], [0.6, 16.0], rtol=1e-6)
    assert mixed["n"].dtype == jnp.bfloat16
