import collections
import itertools
import math

import numpy as np
import pytest

from ancestral.tasks import digits


def _carries(a, b):
  """Kummer: carries of a + b are what the digit sum loses, in nines."""
  total = lambda n: sum(map(int, str(n)))
  return (total(a) + total(b) - total(a + b)) // 9


def _numbers(length):
  return range(0 if length == 1 else 10 ** (length - 1), 10**length)


def _support(columns, long, short, count):
  for a, b in itertools.product(_numbers(long), _numbers(short)):
    if columns is digits.ADD and _carries(a, b) == count:
      yield a, b
    if columns is digits.SUBTRACT and a >= b and _carries(b, a - b) == count:
      yield a, b


@pytest.mark.parametrize("columns", [digits.ADD, digits.SUBTRACT], ids=["add", "subtract"])
def test_count_carries(columns):
  for a in range(0, 1200, 7):
    for b in range(0, a + 1, 11):
      expected = _carries(a, b) if columns is digits.ADD else _carries(b, a - b)
      assert digits.count_carries(columns, a, b) == expected


@pytest.mark.parametrize("columns", [digits.ADD, digits.SUBTRACT], ids=["add", "subtract"])
def test_draw_is_uniform_over_all_that_fit(columns):
  rng = np.random.default_rng(0)
  for long, short in ((1, 1), (2, 1), (2, 2), (3, 1)):
    for count in range(long + 1 if columns is digits.ADD else long):
      support = set(_support(columns, long, short, count))
      draws = [digits.draw(rng, columns, long, short, count) for _ in range(12 * len(support))]
      counts = collections.Counter(draws)
      assert set(counts) <= support
      # Pearson's statistic has mean n - 1 and standard deviation sqrt(2 (n - 1)) here.
      freedom = len(support) - 1
      statistic = sum((counts[pair] - 12) ** 2 / 12 for pair in support)
      assert abs(statistic - freedom) <= 4 * math.sqrt(2 * freedom) + 1


@pytest.mark.parametrize("columns", [digits.ADD, digits.SUBTRACT], ids=["add", "subtract"])
def test_draw_of_three_and_long_digits(columns):
  rng = np.random.default_rng(0)
  for long, short in ((3, 2), (3, 3), (25, 1), (25, 25), (200, 60)):
    for count in (0, 1, long - 1):
      a, b = digits.draw(rng, columns, long, short, count)
      assert (len(str(a)), len(str(b))) == (long, short)
      assert count == (_carries(a, b) if columns is digits.ADD else _carries(b, a - b))


def test_impossible_counts():
  rng = np.random.default_rng(0)
  with pytest.raises(ValueError, match="no operands of 2 and 1 digits have 3 carries"):
    digits.draw(rng, digits.ADD, 2, 1, 3)
  with pytest.raises(ValueError, match="no operands of 2 and 2 digits have 2 carries"):
    digits.draw(rng, digits.SUBTRACT, 2, 2, 2)


def test_number():
  rng = np.random.default_rng(0)
  for length in (1, 2):
    counts = collections.Counter(digits.number(rng, length) for _ in range(9000))
    assert set(counts) == set(_numbers(length))
    p = 1 / len(counts)
    assert max(abs(c - 9000 * p) for c in counts.values()) <= 5 * math.sqrt(9000 * p)
  assert len(str(digits.number(rng, 30))) == 30
