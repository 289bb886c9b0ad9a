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
