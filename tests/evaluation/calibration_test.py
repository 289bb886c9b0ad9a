"""Calibration: by hand, by brute force over pairs and orders, and of models calibrated or not."""

import itertools

import numpy as np
import pytest
from scipy import special

from ancestral.evaluation import calibration


def test_brier_score_by_hand():
  # (0.1^2 + 0.5^2 + 1^2) / 3
  assert calibration.brier_score([0.9, 0.5, 0.0], [1, 0, 1]) == pytest.approx(1.26 / 3)


def test_brier_score_is_least_at_the_true_probability():
  outcome = [1] * 7 + [0] * 3
  score = {p: calibration.brier_score([p / 20] * 10, outcome) for p in range(21)}
  assert min(score, key=score.get) == 14


def test_equal_widths_put_the_ends_in_the_outer_bins():
  bins = calibration.equal_width(4)(np.array([0.0, 0.2499, 0.25, 0.5, 0.99, 1.0]))
  np.testing.assert_array_equal(bins, [0, 0, 1, 2, 3, 3])


def test_equal_masses_share_out_and_keep_equal_predictions_together():
  bins = calibration.equal_mass(3)(np.array([0.9, 0.1, 0.2, 0.8, 0.5, 0.4]))
  np.testing.assert_array_equal(bins, [2, 0, 0, 2, 1, 1])
  tied = calibration.equal_mass(3)(np.array([0.5, 0.5, 0.5, 0.5, 0.1, 0.9]))
  assert len(set(tied[:4])) == 1 and len(set(tied)) == 3 - (tied[4] == tied[0])


def test_reliability_and_error_by_hand():
  p, y = [0.1, 0.3, 0.8, 0.9, 0.7], [0, 1, 1, 1, 0]
  rows = calibration.reliability(p, y, calibration.equal_width(2))
  assert [row.count for row in rows] == [2, 3]
  np.testing.assert_allclose([row[1:] for row in rows], [(0.2, 0.5), (0.8, 2 / 3)])
  error = calibration.expected_calibration_error(p, y, calibration.equal_width(2))
  assert error == pytest.approx((2 * 0.3 + 3 * (0.8 - 2 / 3)) / 5)


def test_the_error_does_not_depend_on_the_order():
  rng = np.random.default_rng(0)
  p = rng.integers(0, 5, 60) / 4  # many ties
  y = rng.integers(0, 2, 60)
  expected = calibration.expected_calibration_error(p, y)
  order = rng.permutation(60)
  assert calibration.expected_calibration_error(p[order], y[order]) == pytest.approx(expected)


def test_the_floor_holds_for_the_calibrated_and_not_for_the_overconfident():
  rng = np.random.default_rng(1)
  honest = overconfident = 0
  for _ in range(40):
    log_odds = rng.normal(size=600)
    p = special.expit(log_odds)
    y = rng.random(600) < p
    for scale in (1, 3):
      said = special.expit(scale * log_odds)
      floor = calibration.error_of_the_calibrated(rng, said, num_resamples=60)
      above = calibration.expected_calibration_error(said, y) > floor
      honest, overconfident = honest + above * (scale == 1), overconfident + above * (scale == 3)
  assert honest <= 8  # 2 of 40 are expected: 8 or fewer but once in 2,000
  assert overconfident == 40


def test_area_under_curve_counts_pairs():
  rng = np.random.default_rng(2)
  score, correct = rng.integers(0, 6, 30), rng.integers(0, 2, 30)
  pairs = [
    1.0 if a > b else 0.5 if a == b else 0.0
    for a, right in zip(score, correct, strict=True)
    for b, other in zip(score, correct, strict=True)
    if right and not other
  ]
  assert calibration.area_under_curve(score, correct) == pytest.approx(np.mean(pairs))
  assert calibration.area_under_curve([3, 2, 1], [1, 0, 0]) == 1
  assert calibration.area_under_curve([1, 1, 1], [1, 0, 0]) == 0.5
  with pytest.raises(ValueError, match="2 right and 0 wrong"):
    calibration.area_under_curve([1, 2], [1, 1])


def test_selective_accuracy_is_the_mean_over_orders_of_ties():
  score, correct = [0.2, 0.9, 0.5, 0.5, 0.5], [0, 1, 0, 1, 0]
  curves = []
  for order in itertools.permutations(range(5)):
    by_score = sorted(order, key=lambda i: -score[i])  # stable: ties as permuted
    curves.append(np.cumsum(np.array(correct)[by_score]) / np.arange(1, 6))
  expected = np.mean(curves, axis=0)
  np.testing.assert_allclose(calibration.selective_accuracy(score, correct), expected)
  np.testing.assert_allclose(calibration.selective_accuracy([1] * 4, [1, 0, 0, 1]), [0.5] * 4)


def test_the_temperature_is_the_one_the_outcomes_were_drawn_at():
  true = np.random.default_rng(3).normal(scale=2, size=4000)
  share = special.expit(true)  # expected outcomes: no noise
  for temperature in (0.3, 1.0, 4.0, 50.0):
    found = calibration.fit_temperature(temperature * true, share)
    assert found == pytest.approx(temperature, rel=1e-6)


def test_the_temperature_is_the_likeliest():
  rng = np.random.default_rng(4)
  log_odds = rng.normal(scale=3, size=200)
  outcome = rng.random(200) < special.expit(log_odds / 2)
  found = calibration.fit_temperature(log_odds, outcome)

  def likelihood(temperature):
    p = special.expit(log_odds / temperature)
    return np.log(np.where(outcome, p, 1 - p)).sum()

  assert likelihood(found) > max(likelihood(0.99 * found), likelihood(1.01 * found))


@pytest.mark.parametrize(
  "log_odds, outcome, message",
  [
    ([1, -1, 2], [0, 1, 0], "do not rise"),
    ([0, 0], [0, 1], "do not rise"),
    ([1, -1, 2], [1, 0, 1], "temperature is 0"),
  ],
)
def test_without_a_temperature_it_says_why(log_odds, outcome, message):
  with pytest.raises(ValueError, match=message):
    calibration.fit_temperature(log_odds, outcome)


def test_what_is_no_probability_is_refused():
  with pytest.raises(ValueError, match="probability has"):
    calibration.brier_score([1.2], [1])
  with pytest.raises(ValueError, match="give one of each"):
    calibration.brier_score([0.2, 0.3], [1])
