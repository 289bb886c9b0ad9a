"""Weights of imitation and losses of pairs: closed forms, laws that selection gives, gradients."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.models import schedules
from ancestral.training import denoising, diffusion_learning, preference, weightings

SCHEDULE = schedules.variance_exploding(20.0)


def test_the_best_of_a_group_and_of_equals_the_first():
  rewards = np.array([[1.0, 3.0, 3.0, -2.0], [0.0, 0.0, 0.0, 0.0]], np.float32)
  np.testing.assert_array_equal(
    diffusion_learning.best(rewards, keep=1), [[0, 1, 0, 0], [1, 0, 0, 0]]
  )
  np.testing.assert_array_equal(
    diffusion_learning.best(rewards, keep=3), [[1, 1, 1, 0], [1, 1, 1, 0]]
  )
  assert diffusion_learning.best(rewards, keep=4).all()
  for keep in (0, 5):
    with pytest.raises(ValueError, match=f"keep={keep} of groups of 4"):
      diffusion_learning.best(rewards, keep=keep)


# A law of three images, two of equal reward, and groups of four: all 81 groups.
LAW, REWARD, SIZE = np.array([0.5, 0.3, 0.2]), np.array([0.0, 1.0, 1.0]), 4


def imitated(weights):
  """The law of what is imitated: every group, by its probability."""
  groups = np.array(list(itertools.product(range(3), repeat=SIZE)))
  mass = LAW[groups].prod(-1)[:, None] * weights(REWARD[groups])
  found = np.array([mass[groups == image].sum() for image in range(3)])
  return found / found.sum()


def test_the_best_of_k_tilts_by_the_distribution_function_of_rewards():
  """F_-^K at the lower reward, the rest to the upper in proportion: K F^{K-1} p with ties."""
  low = 0.5**SIZE
  expected = [low, (1 - low) * 0.6, (1 - low) * 0.4]
  np.testing.assert_allclose(imitated(diffusion_learning.best), expected, atol=1e-6)


def test_softmax_in_groups_is_luces_choice_among_them():
  """p E[e^r / (e^r + sum of the others' e^r)], the others' number of high rewards binomial."""

  def chosen(reward):
    others = np.array([1, 3, 3, 1]) / 8  # how many of three have reward 1
    rest = np.arange(4) * np.e + (3 - np.arange(4))
    return SIZE * np.sum(others * np.exp(reward) / (np.exp(reward) + rest))

  expected = LAW * [chosen(0), chosen(1), chosen(1)]
  np.testing.assert_allclose(expected.sum(), 1, rtol=1e-12)
  np.testing.assert_allclose(imitated(diffusion_learning.tilted), expected, atol=1e-6)


def test_softmax_in_large_groups_is_the_exponential_tilt():
  rng = np.random.default_rng(0)
  images = rng.choice(3, size=(50, 4000), p=LAW)
  weights = diffusion_learning.tilted(REWARD[images], temperature=0.5)
  found = [weights[images == image].sum() for image in range(3)]
  expected = LAW * np.exp(REWARD / 0.5)
  np.testing.assert_allclose(found / np.sum(found), expected / expected.sum(), atol=0.005)


def test_softmax_weights_have_mean_1_and_are_finite_and_cold_ones_are_the_best():
  rewards = np.array([[0.0, 1e3, -1e3, 999.0], [-1e3, -1e3, -1e3, -1e3]])
  weights = diffusion_learning.tilted(rewards)
  np.testing.assert_allclose(weights.mean(-1), 1, rtol=1e-6)
  np.testing.assert_array_equal(weights[1], 1)
  cold = diffusion_learning.tilted(rewards[:1], temperature=1e-3)
  np.testing.assert_allclose(cold, SIZE * diffusion_learning.best(rewards[:1]), atol=1e-6)


def test_extremes_of_a_group_and_none_of_equals():
  rewards = np.array([[1.0, 3.0, 3.0, -2.0], [7.0, 7.0, 7.0, 7.0], [0.0, -1.0, -1.0, -0.5]])
  high, low, weight = diffusion_learning.extremes(rewards)
  np.testing.assert_array_equal(np.stack([high, low]), [[1, 0, 0], [3, 0, 1]])
  np.testing.assert_array_equal(weight, [1, 0, 1])


def two_points(log_odds, x, t, condition=None, key=None):
  """E[x_0 | x_t] of a law on {-1, 1} with these log-odds of 1, on SCHEDULE; x is [B, 1]."""
  return jnp.tanh(x / jnp.square(SCHEDULE.sigma(t))[:, None] + log_odds / 2)


def test_retraining_on_the_best_of_k_is_at_rest_where_k_f_to_the_k_minus_1_says():
  """Of points -1 and 1, reward x: the odds of 1 become (1 - q^K) / q^K, q the share of -1."""
  share, size = 0.6, 3
  rng = np.random.default_rng(1)
  x = rng.choice([-1.0, 1.0], size=(8000, size), p=[share, 1 - share])
  weight = diffusion_learning.best(x).ravel()
  times = lambda quantiles: jnp.full(quantiles.shape, 1.0)
  loss_fn = diffusion_learning.weighted(
    denoising.denoising(two_points, SCHEDULE, weightings.noise, times)
  )
  batch = {"x": jnp.asarray(x.reshape(-1, 1), jnp.float32), "weight": jnp.asarray(weight)}
  losses = lambda odds: loss_fn(jax.random.key(0), odds, batch)[0][0]
  per_row = jax.jit(jax.jacfwd(losses))
  rest = np.log((1 - share**size) / share**size)

  def within(odds):
    found = np.asarray(per_row(jnp.float32(odds)))[weight > 0]
    return abs(found.mean()) / (found.std() / len(found) ** 0.5)

  assert within(rest) < 3
  assert within(np.log((1 - share) / share)) > 10
  assert within(rest + 0.5) > 10


def test_rows_of_weight_0_add_nothing_and_others_add_in_proportion():
  times = lambda quantiles: jnp.full(quantiles.shape, 1.0)
  plain = denoising.denoising(two_points, SCHEDULE, weightings.data, times)
  loss_fn = diffusion_learning.weighted(plain)
  x = jnp.array([[1.0], [-1.0], [1.0]])
  (own, _), own_metrics = plain(jax.random.key(3), jnp.float32(0.2), {"x": x})
  (losses, seen), metrics = loss_fn(
    jax.random.key(3), jnp.float32(0.2), {"x": x, "weight": jnp.array([2.0, 0.0, 0.5])}
  )
  np.testing.assert_allclose(losses, own * np.array([2, 0, 0.5]), rtol=1e-6)
  np.testing.assert_array_equal(seen, [2, 0, 0.5])
  np.testing.assert_allclose(metrics["error"], own_metrics["error"] * np.array([2, 0, 0.5]))


def test_log_ratio_by_hand():
  clean = jnp.array([[1.0, 0.0], [0.0, 2.0]])
  denoised = jnp.array([[1.0, 1.0], [0.0, 0.0]], jnp.bfloat16)
  reference = jnp.array([[3.0, 0.0], [0.0, 1.0]])
  found = diffusion_learning.log_ratio(denoised, reference, clean, jnp.array([2.0, 4.0]))
  np.testing.assert_array_equal(found, [2 / 2 * (4 - 1), 4 / 2 * (1 - 4)])
  assert found.dtype == jnp.float32


def test_log_ratio_keeps_a_small_difference_of_large_errors():
  """Of D_ref = D + h and errors of 100: h (2 * 100 + h) / 2, to 1e-6 of it."""
  denoised = np.full((1, 1), 100.0, np.float32)
  reference = np.nextafter(denoised, np.float32(200))
  h = float(reference[0, 0]) - 100.0
  found = diffusion_learning.log_ratio(denoised, reference, jnp.zeros((1, 1)), jnp.ones(1))
  np.testing.assert_allclose(found, [h * (200 + h) / 2], rtol=1e-6)
  zero = diffusion_learning.log_ratio(denoised, denoised, jnp.zeros((1, 1)), jnp.ones(1))
  np.testing.assert_array_equal(zero, 0)


def gaussian(mean, x, t, condition=None, key=None):
  """E[x_0 | x_t] of N(mean, I) on SCHEDULE."""
  keep = 1 / (1 + jnp.square(SCHEDULE.sigma(t)))[:, None]
  return keep * x + (1 - keep) * mean[None]


LOW, HIGH = 0.002, 2000.0  # sigma
SPAN = 2 * np.log(HIGH / LOW)  # of log SNR: drawn uniformly, with density 1 / SPAN


@pytest.mark.parametrize("x_0", [[0.5, -1.0], [2.0, 0.0]])
def test_the_mean_log_ratio_of_gaussians_is_that_of_their_densities(x_0):
  """With w = SNR / q; the bound is exact where denoisers are: log N(x; m, I) - log N(x; 0, I)."""
  schedule = schedules.variance_exploding(HIGH)
  mean, x_0, num = np.array([1.0, -0.5]), np.array(x_0), 40_000
  times = weightings.log_uniform(schedule, LOW, HIGH)
  t = times(weightings.low_discrepancy(jax.random.key(0), num))
  alpha, sigma = schedule.alpha(t), schedule.sigma(t)
  clean = jnp.broadcast_to(jnp.asarray(x_0, jnp.float32), (num, 2))
  x = clean + sigma[:, None] * jax.random.normal(jax.random.key(1), (num, 2))
  denoised, reference = gaussian(jnp.asarray(mean), x, t), gaussian(jnp.zeros(2), x, t)
  weight = SPAN * weightings.noise(alpha, sigma)
  found = np.asarray(diffusion_learning.log_ratio(denoised, reference, clean, weight), np.float64)
  expected = 0.5 * np.sum(x_0**2) - 0.5 * np.sum((x_0 - mean) ** 2)
  assert abs(found.mean() - expected) < 4 * found.std() / num**0.5
  assert found.std() / num**0.5 < 0.05


BETA, WEIGHT_AT = 0.3, 0.7
DPO = functools.partial(preference.dpo, beta=BETA)


def preferences(reference, pair_loss=DPO, model=gaussian):
  times = lambda quantiles: WEIGHT_AT + quantiles
  return diffusion_learning.preferences(
    model, reference, SCHEDULE, weightings.noise, times, pair_loss
  )


def pairs(num=6):
  chosen, rejected = np.random.default_rng(2).normal(size=(2, num, 2)).astype(np.float32)
  weight = jnp.array([1.0] * (num - 1) + [0.0])
  return {"chosen": {"x": chosen}, "rejected": {"x": rejected}, "weight": weight}


def test_at_the_reference_the_loss_is_log_2_and_its_gradient_half_beta_times_the_difference():
  """-beta / 2 d(c - r): of c = w / 2 (const - |D - x_0|^2), dc/dm = w (1 - keep)(x_0 - D)."""
  reference, batch = jnp.array([0.4, -0.2]), pairs()
  loss = lambda mean: preferences(reference)(jax.random.key(5), mean, batch)[0][0]
  losses = loss(reference)
  np.testing.assert_allclose(losses[:-1], np.log(2), rtol=1e-6)
  assert losses[-1] == 0
  time_key, noise_key = jax.random.split(jax.random.key(5))
  t = WEIGHT_AT + np.asarray(weightings.low_discrepancy(time_key, 6), np.float64)
  z = np.asarray(jax.random.normal(noise_key, (6, 2)), np.float64)
  keep, snr = 1 / (1 + t**2), t**-2.0
  slope = lambda x: (
    (snr * (1 - keep))[:, None]
    * (x - keep[:, None] * (x + t[:, None] * z) - (1 - keep)[:, None] * np.asarray(reference))
  )
  gap = slope(batch["chosen"]["x"]) - slope(batch["rejected"]["x"])
  expected = -BETA / 2 * gap * np.asarray(batch["weight"])[:, None]
  np.testing.assert_allclose(jax.jacrev(loss)(reference), expected, rtol=2e-4, atol=1e-5)


def test_of_equal_images_the_loss_is_log_2_and_has_no_gradient_anywhere():
  batch = pairs()
  batch["rejected"] = batch["chosen"]
  loss = lambda mean: preferences(jnp.zeros(2))(jax.random.key(5), mean, batch)[0][0]
  mean = jnp.array([3.0, -2.0])
  np.testing.assert_allclose(loss(mean)[:-1], np.log(2), rtol=1e-6)
  np.testing.assert_allclose(jax.jacrev(loss)(mean), 0, atol=1e-5)


def test_both_of_a_pair_have_one_time_and_one_noise_and_their_condition():
  seen = []

  def model(params, x, t, condition=None, key=None):
    seen.append((np.asarray(x), np.asarray(t), np.asarray(condition.label)))
    assert key is None
    return params * x

  batch = {**pairs(), "label": jnp.arange(6)}
  preferences(jnp.float32(0.5), model=model)(jax.random.key(5), jnp.float32(0.6), batch)
  for x, t, label in seen:
    first, second = np.split(t, 2)
    np.testing.assert_array_equal(first, second)
    noise = (x - np.concatenate([batch["chosen"]["x"], batch["rejected"]["x"]])) / t[:, None]
    np.testing.assert_allclose(*np.split(noise, 2), atol=1e-5)
    np.testing.assert_array_equal(label, [*range(6), *range(6)])
  assert len(seen) == 2 and len(np.unique(seen[0][1])) == 6


def test_a_step_down_the_gradient_prefers_the_chosen():
  batch, reference = pairs(), jnp.zeros(2)

  def loss(mean):
    (losses, _), metrics = preferences(reference)(jax.random.key(5), mean, batch)
    return jnp.sum(losses), metrics

  gradient, _ = jax.grad(loss, has_aux=True)(reference)
  before, after = loss(reference), loss(reference - 0.1 * gradient)
  assert after[0] < before[0]
  assert after[1]["chosen"].sum() > after[1]["rejected"].sum()
  assert before[1]["accuracy"].sum() == 0 < after[1]["accuracy"].sum()


@pytest.mark.parametrize("scale", [300.0, -300.0])
def test_far_from_the_reference_loss_and_gradient_are_finite(scale):
  batch = pairs()
  loss = lambda mean: jnp.sum(preferences(jnp.zeros(2))(jax.random.key(5), mean, batch)[0][0])
  value, gradient = jax.value_and_grad(loss)(jnp.array([scale, 1.0]))
  ratios = preferences(jnp.zeros(2))(jax.random.key(5), jnp.array([scale, 1.0]), batch)[1]
  assert np.abs(ratios["chosen"]).max() > 100
  assert np.isfinite(value) and np.isfinite(gradient).all()


def test_it_takes_any_loss_of_pairs_of_log_ratios():
  reference, batch = jnp.zeros(2), pairs()
  ipo = functools.partial(preference.ipo, beta=0.5)
  mean = jnp.array([0.3, 0.1])
  (losses, _), metrics = preferences(reference, ipo)(jax.random.key(5), mean, batch)
  margin = np.asarray(metrics["chosen"] - metrics["rejected"])[:-1]
  np.testing.assert_allclose(losses[:-1], (margin - 1) ** 2, rtol=1e-5)


def test_without_a_key_the_draws_are_the_same_each_time():
  loss = lambda: preferences(jnp.zeros(2))(None, jnp.ones(2), pairs())[0][0]
  np.testing.assert_array_equal(loss(), loss())
