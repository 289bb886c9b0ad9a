"""Operands of given lengths and a given number of carries, drawn exactly uniformly.

Columns are numbered from the lowest digit; the shorter number has the digit 0 above its top. Column
by column, the carry is drawn with the number of digit pairs that lead to it as its weight (counted
from the top down, once), then the digits given the carries. Nothing is rejected.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Columns(NamedTuple):
  """How an operation works in columns: its carry, and the carries that may leave the top column."""

  carry: Callable[[int, int, int], int]  # digits x, y and the carry in -> carry out, 0 or 1
  top: tuple[int, ...]


def _add(x: int, y: int, carry: int) -> int:
  return int(x + y + carry >= 10)


def _borrow(x: int, y: int, carry: int) -> int:
  return int(x - y - carry < 0)


ADD = Columns(_add, top=(0, 1))
SUBTRACT = Columns(_borrow, top=(0,))  # the difference is not negative


def count_carries(columns: Columns, a: int, b: int) -> int:
  """The number of columns of a and b that carry (or borrow)."""
  count = carry = 0
  for position in range(max(len(str(a)), len(str(b)))):
    carry = columns.carry(a // 10**position % 10, b // 10**position % 10, carry)
    count += carry
  return count


def draw(
  rng: np.random.Generator, columns: Columns, long: int, short: int, count: int
) -> tuple[int, int]:
  """A pair (a, b) uniform over those of `long` and `short` digits with `count` carries.

  A number of one digit may be 0; longer ones do not begin with 0.

  Raises:
    ValueError: if there is no such pair.
  """
  if not _ways(columns, long, short, 0, 0, count):
    raise ValueError(f"no operands of {long} and {short} digits have {count} carries")
  a = b = carry = 0
  for position in range(long):
    ways = [
      len(_pairs(columns, long, short, position, carry, out))
      * _ways(columns, long, short, position + 1, out, count - out)
      for out in (0, 1)
    ]
    out = int(rng.random() < ways[1] / sum(ways))
    pairs = _pairs(columns, long, short, position, carry, out)
    x, y = pairs[rng.integers(len(pairs))]
    a, b = a + x * 10**position, b + y * 10**position
    carry, count = out, count - out
  return a, b


def number(rng: np.random.Generator, length: int) -> int:
  """A number uniform over those of `length` digits, 0 included where length is 1."""
  top = int(rng.integers(length > 1, 10))
  return functools.reduce(lambda n, d: 10 * n + int(d), rng.integers(0, 10, length - 1), top)


def _digits(length: int, position: int) -> range:
  if position >= length:
    return range(1)
  return range(int(position == length - 1 and length > 1), 10)


@functools.lru_cache(maxsize=2**14)
def _pairs(
  columns: Columns, long: int, short: int, position: int, carry: int, out: int
) -> tuple[tuple[int, int], ...]:
  """The digit pairs that a column may hold, given its carries in and out."""
  return tuple(
    (x, y)
    for x in _digits(long, position)
    for y in _digits(short, position)
    if columns.carry(x, y, carry) == out
  )


@functools.lru_cache(maxsize=2**16)
def _ways(columns: Columns, long: int, short: int, position: int, carry: int, count: int) -> int:
  """The number of digit pairs of columns position, ..., long - 1 with `count` carries in all."""
  if position == long:
    return int(count == 0 and carry in columns.top)
  return sum(
    len(_pairs(columns, long, short, position, carry, out))
    * _ways(columns, long, short, position + 1, out, count - out)
    for out in (0, 1)
    if out <= count
  )
