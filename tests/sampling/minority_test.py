"""Minority scores against closed forms, and guidance against the exact law of a rare mode."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from ancestral.models import schedules, toy
from ancestral.sampling import base, grids, guidance, minority, multistep, solvers

SCHEDULE = schedules.variance_exploding(10.0)
MODES = toy.GaussianMixture(
  jnp.array([0.9, 0.1]), jnp.array([[1.0, 0.5], [-1.5, -1.0]]), jnp.array([0.1, 0.1])
)


def keys_of(num, seed=0):
  return base.row_keys(jax.random.key(seed), jnp.arange(num))


def test_the_score_of_a_gaussian_is_a_closed_form():
  """D = m + k (x + s z - m), k = v / (v + s^2): E|x - D|^2 = (1 - k)^2 |x - m|^2 + k^2 s^2 dim."""
  mean, v, s = np.array([0.7, -0.2]), 0.3, 0.8
  mixture = toy.GaussianMixture(jnp.ones(1), jnp.asarray(mean[None]), jnp.array([v]))
  x = jnp.array([[0.0, 0.0], [1.0, 2.0], [0.7, -0.2]])
  denoise = toy.mixture_denoiser(mixture, SCHEDULE)
  found = minority.score(keys_of(3), denoise, SCHEDULE, x, s, num_noises=4000)
  k = v / (v + s**2)
  expected = (1 - k) ** 2 * np.sum((np.asarray(x) - mean) ** 2, 1) + 2 * k**2 * s**2
  np.testing.assert_allclose(found, expected, rtol=0.06)


def test_the_score_ranks_as_the_density_does():
  x = toy.mixture_sample(jax.random.key(1), MODES, 500)
  denoise = toy.mixture_denoiser(MODES, SCHEDULE)
  score = minority.score(keys_of(500), denoise, SCHEDULE, x, 1.5, num_noises=20)
  rank = scipy.stats.spearmanr(score, -toy.mixture_log_prob(MODES, x)).statistic
  assert rank > 0.6, rank
  rare = np.asarray(x[:, 0] < -0.25)
  assert np.mean(score[rare]) > 3 * np.mean(score[~rare])


def test_classes_are_equally_frequent_and_in_order():
  scores = jax.random.normal(jax.random.key(2), (100,))
  found = minority.classes(scores, 4)
  np.testing.assert_array_equal(np.bincount(found), [25] * 4)
  assert np.max(scores[found == 0]) <= np.min(scores[found == 1])


def test_guidance_by_the_exact_classifier_gives_the_rare_mode():
  log_prob = toy.class_log_prob(MODES, jnp.array([0, 1]), 2, SCHEDULE)
  denoise = toy.mixture_denoiser(MODES, SCHEDULE)
  guided = guidance.classifier(denoise, lambda x, t: log_prob(x, t)[:, 1], SCHEDULE)
  table = multistep.dpmpp_2m(SCHEDULE, grids.to_zero(grids.karras(SCHEDULE, 40, end=0.02)))
  shares = []
  for model in (denoise, guided):
    x = solvers.sample(keys_of(1000), model, table, jnp.zeros((1000, 2)))
    shares.append(float(jnp.mean(x[:, 0] < -0.25)))
  assert abs(shares[0] - 0.1) < 0.03 and shares[1] > 0.99, shares


def test_a_rows_score_is_its_own_and_the_distance_the_callers():
  denoise = toy.mixture_denoiser(MODES, SCHEDULE)
  x = toy.mixture_sample(jax.random.key(3), MODES, 6)
  alone = minority.score(keys_of(6)[4:], denoise, SCHEDULE, x[4:], 1.0)
  together = minority.score(keys_of(6), denoise, SCHEDULE, x, 1.0)
  np.testing.assert_allclose(alone, together[4:], rtol=1e-5)
  assert np.all(
    np.abs(alone - minority.score(keys_of(6, 1)[4:], denoise, SCHEDULE, x[4:], 1.0)) > 0
  )
  largest = lambda x, y: jnp.max(jnp.abs(x - y), axis=1)
  found = minority.score(
    keys_of(6), lambda x, t: jnp.zeros_like(x), SCHEDULE, x, 1.0, distance=largest
  )
  np.testing.assert_allclose(found, np.abs(np.asarray(x)).max(axis=1), rtol=1e-6)


def test_guidance_towards_the_last_class_of_the_score_gives_that_classs_law():
  """Data are points, their law a kernel density: classes of points have an exact classifier.

  The share of the rare mode is then what counting the points of the last class says, within four
  standard errors and .01 for the solver; it is over five times that of all points.
  """
  points = toy.mixture_sample(jax.random.key(4), MODES, 400)
  law = toy.kernel_density(points, 0.1)
  denoise = toy.mixture_denoiser(law, SCHEDULE)
  score = minority.score(keys_of(400), denoise, SCHEDULE, points, 1.5, num_noises=20)
  classes = minority.classes(score, 10)
  log_prob = toy.class_log_prob(law, classes, 10, SCHEDULE)
  guided = guidance.classifier(denoise, lambda x, t: log_prob(x, t)[:, -1], SCHEDULE)
  table = multistep.dpmpp_2m(SCHEDULE, grids.to_zero(grids.log_snr(SCHEDULE, 40, end=0.02)))
  made = solvers.sample(keys_of(1000, 5), guided, table, jnp.zeros((1000, 2)))
  rare = np.asarray(points[:, 0] < -0.25)
  expected, all_points = rare[np.asarray(classes) == 9].mean(), rare.mean()
  found = float(jnp.mean(made[:, 0] < -0.25))
  noise = 4 * np.sqrt(expected * (1 - expected) / 1000)
  assert abs(found - expected) < noise + 0.01, (found, expected)
  assert expected > 5 * all_points, (expected, all_points)
