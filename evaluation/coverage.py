"""How often samples are right: pass@k, majority vote, and their intervals, level by level."""

import collections
import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike

Answer = TypeVar("Answer", bound=Hashable)
Interval = tuple[float, float]


def pass_at_k(num_samples: ArrayLike, num_correct: ArrayLike, k: int) -> np.ndarray:
  r"""The unbiased estimate of the chance that one of k samples is right, for each problem.

      1 - C(n - c, k) / C(n, k)  =  1 - prod_{i = n-c+1}^{n} (1 - k / i)

  summed as log1p and closed by expm1, so nothing overflows and small chances keep their digits.

  Args:
    num_samples: n, samples of each problem, [...] or one for all.
    num_correct: c, how many of them are right, [...].
    k: samples that are looked at, 1 <= k <= n.

  Returns:
    The estimates, float64 [...], by broadcasting n and c; their mean over problems is pass@k.

  Raises:
    ValueError: unless 1 <= k <= n and 0 <= c <= n everywhere.

  Reference: Chen et al. 2021, arXiv 2107.03374, equation 1.
  """
  n, c = _counts("num_samples", num_samples), _counts("num_correct", num_correct)
  n, c = np.broadcast_arrays(n, c)
  if not 1 <= k <= n.min(initial=k):
    raise ValueError(f"k is {k} with {n.min(initial=k)} samples; it is from 1 to num_samples")
  if (c > n).any():
    raise ValueError(f"num_correct is {c[c > n][0]} of {n[c > n][0]} samples; it is at most all")
  result = np.ones(n.shape)  # exactly 1 where fewer than k samples are wrong
  for samples in np.unique(n):
    logs = np.cumsum(np.log1p(-k / np.arange(samples, k, -1.0)))  # [n - k]: c = 1, ..., n - k
    here = (n == samples) & (c <= samples - k)
    result[here] = 0.0 - np.expm1(np.concatenate([[0.0], logs])[c[here]])
  return result


def _counts(name: str, values: ArrayLike) -> np.ndarray:
  counts = np.asarray(values)
  if counts.size and not (np.issubdtype(counts.dtype, np.integer) and counts.min() >= 0):
    raise ValueError(f"{name} has to hold counts (integers from 0), not {counts.dtype} {values!r}")
  return counts.astype(np.int64)


def majority_vote(answers: Sequence[Answer]) -> Answer:
  """The most frequent answer; among equally frequent ones, the one that appears first.

  Raises:
    ValueError: if there are no answers.

  Reference: self-consistency, Wang et al. 2022, arXiv 2203.11171.
  """
  if not answers:
    raise ValueError("no answers to vote on; give at least one sample")
  counts = collections.Counter(answers)  # keeps the order of first appearance
  return max(counts, key=counts.__getitem__)


def wilson_interval(successes: float, trials: float, z: float = 1.96) -> Interval:
  """The score interval of a proportion.

      all p with |successes / trials - p| <= z sqrt(p (1 - p) / trials)

  It keeps a width at 0 and at all successes. With fractional successes (a sum of values in [0, 1])
  it is conservative, since a variable in [0, 1] varies at most as much as a coin of its mean.

  Raises:
    ValueError: unless 0 <= successes <= trials and trials > 0.

  Reference: Wilson 1927, JASA 22, 209-212.
  """
  if not (trials > 0 and 0 <= successes <= trials):
    raise ValueError(f"{successes} successes of {trials} trials is not a proportion; trials > 0")
  share, spread = successes / trials, z * z / trials
  centre = (share + spread / 2) / (1 + spread)
  half = z / (1 + spread) * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
  low = 0.0 if successes == 0 else centre - half  # exactly 0 and 1 at the ends, not nearly
  high = 1.0 if successes == trials else centre + half
  return low, high


def bootstrap_interval(
  rng: np.random.Generator,
  values: ArrayLike,
  statistic: Callable[[np.ndarray], float] = np.mean,
  *,
  num_resamples: int = 2000,
  confidence: float = 0.95,
) -> Interval:
  """The percentile interval of a statistic over problems, by resampling problems.

  It has no width where all values are equal; for proportions near 0 or 1 use `wilson_interval`.

  Args:
    rng: the generator that resamples; seed it, and the interval is the same every time.
    values: one value (or row of values) per problem, [P] or [P, ...].
    statistic: what is estimated, from an array like values.
    num_resamples: how many resamples to take.
    confidence: the share of resamples inside the interval.

  Raises:
    ValueError: if there are no values, or confidence is not in (0, 1).

  Reference: Efron 1979, Annals of Statistics 7, 1-26.
  """
  values = np.asarray(values)
  if not len(values) or not 0 < confidence < 1:
    raise ValueError(f"{len(values)} values at confidence {confidence}; at least 1, within (0, 1)")
  resampled = [
    statistic(values[rng.integers(len(values), size=len(values))]) for _ in range(num_resamples)
  ]
  low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
  return float(low), float(high)


class Row(NamedTuple):
  """The mean over the problems of one level, with its interval."""

  level: int
  count: int  # problems
  mean: float
  low: float
  high: float


def share_interval(values: np.ndarray) -> Interval:
  """The Wilson interval of the mean of values in [0, 1], one per problem: a safe default."""
  return wilson_interval(float(np.sum(values)), len(values))


def by_level(
  levels: Sequence[int],
  values: ArrayLike,
  interval: Callable[[np.ndarray], Interval] = share_interval,
) -> tuple[Row, ...]:
  """The mean of `values` for each level, in order of level.

  One call makes one column of a report: pass@1 and pass@16 with `pass_at_k(...)` as values, the
  majority with 1.0 where the vote is right. The default interval counts problems, not samples,
  because samples of one problem are not independent draws of the level.

  Args:
    levels: the level of each problem, [P].
    values: the value of each problem, [P], in [0, 1] for the default interval.
    interval: values of one level -> (low, high).

  Raises:
    ValueError: if levels and values differ in length.
  """
  levels, values = np.asarray(levels), np.asarray(values, dtype=np.float64)
  if levels.shape != values.shape or levels.ndim != 1:
    raise ValueError(f"levels {levels.shape} and values {values.shape}; give one of each a problem")
  rows = []
  for level in np.unique(levels):
    here = values[levels == level]
    rows.append(Row(int(level), len(here), float(here.mean()), *interval(here)))
  return tuple(rows)
