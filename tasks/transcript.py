"""Exact comparison of an answer, line by line, that says what the first difference is."""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from . import base


class Shape(NamedTuple):
  """What a kind of line looks like, whatever its numbers."""

  matches: Callable[[str], object]
  example: str


def shape(pattern: str, example: str) -> Shape:
  """A Shape from a regular expression that the whole line must match; digits are ASCII."""
  return Shape(re.compile(pattern, re.ASCII).fullmatch, example)


def verify(expected: str, response: str, shapes: Sequence[Shape]) -> base.Verification:
  r"""Compares a response with the one right answer: steps on lines of their own, the result last.

  The reason, empty when the whole response is right, names the first difference:

      format: line i should look like ..., got ...   the line is not of the kind due here
      wrong step i: got ..., expected ...            with a word on whether the result is right
      wrong digit at position p: got x, expected y   in the result; or "wrong sign", "wrong symbol"
      wrong length: got m ..., expected n            characters of the result, or lines

  Lines and positions count from 0; a position counts characters of the whole response as written.

  Args:
    expected: the right answer.
    response: the text to judge.
    shapes: the kinds of line; the first that matches an expected line is that line's kind.
  """
  if response == expected:
    return base.Verification(True, "")
  want, got = expected.split("\n"), response.split("\n")
  shared = min(len(want), len(got))
  line = next((i for i in range(shared) if want[i] != got[i]), shared)
  if line == shared:
    return _wrong(f"wrong length: got {len(got)} lines, expected {len(want)}")
  kind = next(shape for shape in shapes if shape.matches(want[line]))
  if not kind.matches(got[line]):
    where = f"line {line}" if len(want) > 1 else "the answer"
    return _wrong(f"format: {where} should look like {kind.example!r}, got {_quote(got[line])}")
  if line < len(want) - 1:
    result = "right" if got[-1] == want[-1] else "wrong too"
    return _wrong(
      f"wrong step {line}: got {_quote(got[line])}, expected {_quote(want[line])}; "
      f"the final answer is {result}"
    )
  note = "; every step is right" if line else ""
  return _wrong(_result_reason(want[line], got[line], sum(len(w) + 1 for w in want[:line])) + note)


def _result_reason(want: str, got: str, offset: int) -> str:
  if len(want) != len(got):
    return f"wrong length: got {len(got)} characters, expected {len(want)}"
  position = next(i for i in range(len(want)) if want[i] != got[i])
  pair = want[position] + got[position]
  kind = "digit" if pair.isdigit() else "sign" if "-" in pair else "symbol"
  return (
    f"wrong {kind} at position {offset + position}: got {got[position]}, expected {want[position]}"
  )


def _wrong(reason: str) -> base.Verification:
  return base.Verification(False, reason)


def _quote(text: str, width: int = 120) -> str:
  return repr(text if len(text) <= width else text[:width] + "...")
