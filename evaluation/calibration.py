"""Whether probabilities mean what they say, and whether they rank: of predictions of correctness.

Everything takes predictions [N] and outcomes [N], 0 or 1, or a share of samples between. Bins are
a function of the predictions, `equal_mass(15)` or `equal_width(15)`.

  error = expected_calibration_error(p, correct)
  floor = error_of_the_calibrated(rng, p)          # what a perfect model would stay under
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special, stats

# predictions [N] -> the bin of each, int [N]
Binning = Callable[[np.ndarray], np.ndarray]


class Bin(NamedTuple):
  """Predictions that were near each other, and what came of them."""

  count: int
  confidence: float  # their mean
  accuracy: float  # the mean outcome


def equal_width(num_bins: int) -> Binning:
  """[0, 1] in intervals [i / n, (i + 1) / n), the last closed; a bin may be empty.

  Reference: Guo et al. 2017, arXiv 1706.04599.
  """
  return lambda p: np.minimum((np.asarray(p) * num_bins).astype(int), num_bins - 1)


def equal_mass(num_bins: int) -> Binning:
  """As many predictions in each bin; equal predictions share one, however many they are.

  Less biased than equal widths where predictions crowd (Roelofs et al. 2020, arXiv 2012.08668).
  """

  def bins(p):
    p = np.asarray(p)
    return np.searchsorted(np.sort(p), p, side="left") * num_bins // len(p)

  return bins


def brier_score(probability: ArrayLike, outcome: ArrayLike) -> float:
  """The mean of (p - y)^2: least, in expectation, at the true probability.

  Reference: Brier 1950, Monthly Weather Review 78, 1-3.
  """
  probability, outcome = _pair(probability, outcome)
  return float(np.mean(np.square(probability - outcome)))


def reliability(probability: ArrayLike, outcome: ArrayLike, binning: Binning) -> tuple[Bin, ...]:
  """The bins that hold something, by rising prediction."""
  probability, outcome = _pair(probability, outcome)
  where = binning(probability)
  rows = []
  for number in np.unique(where):
    here = where == number
    rows.append(Bin(int(here.sum()), float(probability[here].mean()), float(outcome[here].mean())))
  return tuple(rows)


def expected_calibration_error(
  probability: ArrayLike, outcome: ArrayLike, binning: Binning | None = None
) -> float:
  """sum_b (n_b / N) |confidence_b - accuracy_b|.

  A calibrated model's is not 0, as each bin's accuracy has noise: see `error_of_the_calibrated`.

  Args:
    probability: [N].
    outcome: [N].
    binning: 15 bins of equal mass if None.

  Reference: Naeini et al. 2015, AAAI; Guo et al. 2017, arXiv 1706.04599.
  """
  rows = reliability(probability, outcome, binning or equal_mass(15))
  gap = sum(row.count * abs(row.confidence - row.accuracy) for row in rows)
  return gap / sum(row.count for row in rows)


def error_of_the_calibrated(
  rng: np.random.Generator,
  probability: ArrayLike,
  binning: Binning | None = None,
  *,
  num_resamples: int = 1000,
  confidence: float = 0.95,
) -> float:
  """The calibration error that a calibrated model stays under, with probability `confidence`.

  Outcomes are drawn from the predictions themselves, one trial each, and the error is measured.

  Reference: Broecker and Smith 2007 (consistency resampling), Weather and Forecasting 22, 651-661.
  """
  p = _pair(probability, probability)[0]
  errors = [
    expected_calibration_error(p, rng.random(len(p)) < p, binning) for _ in range(num_resamples)
  ]
  return float(np.quantile(errors, confidence))


def area_under_curve(score: ArrayLike, correct: ArrayLike) -> float:
  """The chance that a right answer scores above a wrong one, equal scores counted half (AUROC).

  Args:
    score: [N], any real numbers.
    correct: [N], 0 or 1.

  Raises:
    ValueError: unless some are right and some wrong.

  Reference: Mann and Whitney 1947, Annals of Mathematical Statistics 18, 50-60.
  """
  score, correct = np.asarray(score, np.float64), np.asarray(correct).astype(bool)
  right, wrong = int(correct.sum()), int((~correct).sum())
  if not (right and wrong):
    raise ValueError(f"{right} right and {wrong} wrong answers; ranking takes one of each at least")
  ranks = stats.rankdata(score)
  return float((ranks[correct].sum() - right * (right + 1) / 2) / (right * wrong))


def selective_accuracy(score: ArrayLike, correct: ArrayLike) -> np.ndarray:
  """How right the k surest answers are, for k = 1 to N, [N].

  Among equal scores every order is as likely, and this is the mean over orders; so a constant score
  has a flat curve.

  Reference: El-Yaniv and Wiener 2010, JMLR 11, 1605-1641 (the risk-coverage curve).
  """
  score, correct = np.asarray(score, np.float64), np.asarray(correct, np.float64)
  _, group = np.unique(-score, return_inverse=True)
  mean = np.bincount(group, correct) / np.bincount(group)
  return np.cumsum(mean[np.sort(group)]) / np.arange(1, len(score) + 1)


def fit_temperature(log_odds: ArrayLike, outcome: ArrayLike) -> float:
  """The T > 0 that makes sigmoid(log_odds / T) likeliest.

  The negative log likelihood is convex in 1 / T, with derivative sum s (sigmoid(s / T) - y), whose
  root is bracketed and found.

  Args:
    log_odds: s [N], not calibrated.
    outcome: y [N].

  Raises:
    ValueError: there is none, as the outcomes do not rise with the log odds (T would be infinite or
      negative), or are all on the side that the log odds say (T would be 0).

  Reference: Guo et al. 2017, arXiv 1706.04599 (temperature scaling, here of two classes).
  """
  s, y = np.asarray(log_odds, np.float64), np.asarray(outcome, np.float64)
  scale = np.abs(s).max(initial=0.0)
  slope = lambda inverse: float(np.sum(s * (special.expit(inverse * s) - y)))
  if scale == 0 or slope(0.0) >= 0:
    raise ValueError("the outcomes do not rise with the log odds: no temperature calibrates them")
  high = 1 / scale
  while slope(high) <= 0:
    high *= 2
    if high * scale > 1e6:
      raise ValueError("the sign of the log odds says every outcome: the best temperature is 0")
  return 1 / optimize.brentq(slope, 0.0, high, xtol=1e-12 / scale, rtol=1e-12)


def _pair(probability, outcome):
  probability, outcome = np.asarray(probability, np.float64), np.asarray(outcome, np.float64)
  if probability.shape != outcome.shape or probability.ndim != 1 or not len(probability):
    raise ValueError(
      f"probabilities {probability.shape} and outcomes {outcome.shape}; give one of each an answer"
    )
  for name, values in (("probability", probability), ("outcome", outcome)):
    if not np.all((values >= 0) & (values <= 1)):
      raise ValueError(f"{name} has {values.min()} to {values.max()}; it is from 0 to 1")
  return probability, outcome
