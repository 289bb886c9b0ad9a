import fractions
import itertools
import math

import numpy as np
import pytest
import scipy.stats

from ancestral.evaluation import coverage


def test_pass_at_k_by_enumerating_subsets():
  for n in range(1, 8):
    for k in range(1, n + 1):
      subsets = list(itertools.combinations(range(n), k))
      counts = np.arange(n + 1)
      expected = [np.mean([min(subset) < c for subset in subsets]) for c in counts]
      np.testing.assert_allclose(coverage.pass_at_k(n, counts, k), expected, rtol=1e-13, atol=0)


def test_pass_at_k_is_unbiased():
  # The mean of the estimate over c ~ Binomial(n, p) is 1 - (1 - p)^k.
  n, p = 12, 0.23
  law = scipy.stats.binom.pmf(np.arange(n + 1), n, p)
  for k in (1, 3, 12):
    mean = law @ coverage.pass_at_k(n, np.arange(n + 1), k)
    np.testing.assert_allclose(mean, 1 - (1 - p) ** k, rtol=1e-12)


@pytest.mark.parametrize("k", [1, 16, 1000, 999_990, 1_000_000])
def test_pass_at_k_of_a_million_samples(k):
  n, counts = 1_000_000, [0, 1, 7, 300, 999_999, 1_000_000]
  found = coverage.pass_at_k(n, counts, k)
  for c, value in zip(counts, found, strict=True):
    miss = fractions.Fraction(1)  # the shorter of the two equal products, exactly
    for i in range(min(c, k)):
      miss *= fractions.Fraction(n - max(c, k) - i, n - i)
      if not miss:
        break
    np.testing.assert_allclose(value, float(1 - miss), rtol=1e-9, atol=0)


def test_pass_at_k_limits_and_mixed_sample_counts():
  n, c = np.array([[4, 10], [7, 4]]), np.array([[1, 3], [7, 0]])
  np.testing.assert_allclose(coverage.pass_at_k(n, c, 1), c / n, rtol=1e-14)
  single = [[coverage.pass_at_k(n[i, j], c[i, j], 3) for j in (0, 1)] for i in (0, 1)]
  np.testing.assert_array_equal(coverage.pass_at_k(n, c, 3), single)
  np.testing.assert_array_equal(coverage.pass_at_k(4, [0, 1, 4], 4), [0, 1, 1])
  assert str(coverage.pass_at_k(4, [0], 2)[0]) == "0.0"
  assert coverage.pass_at_k(4, np.array([], int), 2).shape == (0,)


@pytest.mark.parametrize(
  ("n", "c", "k", "message"),
  [
    (4, [1], 5, "k is 5 with 4 samples"),
    (4, [1], 0, "k is 0"),
    (4, [5], 1, "num_correct is 5 of 4"),
    (4, [-1], 1, "num_correct has to hold counts"),
    (4, [0.5], 1, "num_correct has to hold counts"),
  ],
)
def test_pass_at_k_names_the_culprit(n, c, k, message):
  with pytest.raises(ValueError, match=message):
    coverage.pass_at_k(n, c, k)


def test_majority_vote():
  assert coverage.majority_vote(["a", "b", "b"]) == "b"
  assert coverage.majority_vote(["b", "a", "a", "b", "c"]) == "b"  # tie: the first to appear
  assert coverage.majority_vote(["c", "a", "b", "b", "a"]) == "a"
  assert coverage.majority_vote([3]) == 3
  with pytest.raises(ValueError, match="no answers"):
    coverage.majority_vote([])


def test_wilson_interval_against_scipy_and_its_defining_equation():
  z = 1.959963984540054
  for n, s in ((1, 0), (1, 1), (10, 3), (50, 50), (1000, 999), (200, 0)):
    low, high = coverage.wilson_interval(s, n, z)
    peer = scipy.stats.binomtest(s, n).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose([low, high], [peer.low, peer.high], atol=1e-12)
    for end in (low, high):
      if 0 < end < 1:
        np.testing.assert_allclose(abs(s / n - end), z * math.sqrt(end * (1 - end) / n), rtol=1e-9)
  assert coverage.wilson_interval(0, 5)[0] == 0 and coverage.wilson_interval(5, 5)[1] == 1
  for s, n in ((1, 0), (3, 2), (-1, 4)):
    with pytest.raises(ValueError, match="is not a proportion"):
      coverage.wilson_interval(s, n)


def test_wilson_interval_covers():
  n, p = 40, 0.9
  law = scipy.stats.binom.pmf(np.arange(n + 1), n, p)
  intervals = [coverage.wilson_interval(s, n) for s in range(n + 1)]
  covered = sum(q for q, (low, high) in zip(law, intervals, strict=True) if low <= p <= high)
  assert 0.92 <= covered <= 0.98


def test_bootstrap_interval_of_a_mean_is_the_normal_one():
  values = np.random.default_rng(0).normal(size=400)
  low, high = coverage.bootstrap_interval(np.random.default_rng(1), values, num_resamples=4000)
  error = values.std() / math.sqrt(400)
  # a 2.5% quantile of 4,000 resamples is known to sqrt(.025 .975 / 4000) / pdf(1.96) = 0.042 errors
  assert abs(low - (values.mean() - 1.96 * error)) <= 4 * 0.042 * error + 0.05 * error
  assert abs(high - (values.mean() + 1.96 * error)) <= 4 * 0.042 * error + 0.05 * error


def test_bootstrap_interval_by_enumerating_resamples():
  # The sum of three draws from 0, 1, 5 is at most 1 in 4 of 27 cases and at most 2 in 7, at most 7
  # in 20 and at most 10 in 23: its quantiles at 0.2 and 0.8 are 2 and 10.
  values = np.array([0.0, 1.0, 5.0])
  low, high = coverage.bootstrap_interval(np.random.default_rng(0), values, confidence=0.6)
  np.testing.assert_allclose([low, high], [2 / 3, 10 / 3])


def test_bootstrap_interval_statistic_seed_and_errors():
  rows = np.array([[1, 2], [3, 4], [5, 9]])
  ratio = lambda r: r[:, 0].sum() / r[:, 1].sum()
  draw = lambda seed: coverage.bootstrap_interval(
    np.random.default_rng(seed), rows, ratio, num_resamples=300
  )
  assert draw(0) == draw(0)
  assert 1 / 2 <= draw(0)[0] < ratio(rows) < draw(0)[1] <= 3 / 4
  for values, confidence in (([], 0.9), ([1.0], 1.0)):
    with pytest.raises(ValueError, match="confidence"):
      coverage.bootstrap_interval(np.random.default_rng(0), values, confidence=confidence)


def test_by_level():
  levels, values = [2, 1, 2, 1, 1, 2], [1.0, 0.0, 0.5, 1.0, 0.0, 1.0]
  first, second = coverage.by_level(levels, values)
  assert first == (1, 3, 1 / 3, *coverage.wilson_interval(1, 3))
  assert second[:2] == (2, 3)
  assert (second.mean, second.low) == (2.5 / 3, coverage.wilson_interval(2.5, 3)[0])
  (row,) = coverage.by_level([7, 7], [2.0, 4.0], interval=lambda v: (v.min(), v.max()))
  assert row == (7, 2, 3.0, 2.0, 4.0)
  assert coverage.by_level([], []) == ()
  with pytest.raises(ValueError, match=r"levels \(2,\) and values \(3,\)"):
    coverage.by_level([1, 2], [1, 2, 3])
