r"""Random arithmetic expressions of any depth, worked out one operation at a time.

After the RandomCalculation benchmark of Wu et al. 2025, "Reasoning or Memorization?" (arXiv
2507.10532): fresh expressions over integers with + - * /, squares and cubes, of a chosen number of
steps, which no training corpus holds. The text, the number ranges and the law are ours, not theirs.

    prompt      (3 + 4)^2 / 2 =\n
    derivation  7^2 / 2\n49 / 2\n49/2
    value       49/2

Each line of a derivation does the leftmost operation whose operands are numbers; the last is the
value. Arithmetic is exact. A fraction is in lowest terms and has no spaces (49/2), whereas division
has (49 / 2); inside an expression fractions and negative numbers stand in parentheses: 2 - (-1/3).

Level n: n operations, squares and cubes included, and so n lines of derivation.
"""

import fractions
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from . import base, notation, tokenizer, transcript

ALPHABET = "\n ()*+-/0123456789=^"


Style = Callable[[notation.Expression], tuple[str, ...]]
"""The lines of an answer."""


class Limits(NamedTuple):
  """Bounds on the numbers of an expression; `max_denominator=1` keeps every value an integer."""

  max_operand: int = 100  # the integers written in the prompt are from 0 to this
  max_value: int = 100_000  # of the numerator of every intermediate value, in magnitude
  max_denominator: int = 1_000

  def admit(self, value: notation.Number) -> bool:
    """Whether an intermediate value is within the bounds."""
    return abs(value.numerator) <= self.max_value and value.denominator <= self.max_denominator


LIMITS = Limits()


def derivation(expression: notation.Expression) -> tuple[str, ...]:
  """The expression after each operation, down to its value."""
  lines = []
  while isinstance(expression, notation.Node):
    expression = notation.reduce(expression)
    lines.append(notation.render(expression))
  return tuple(lines)


def value(expression: notation.Expression) -> tuple[str, ...]:
  """The value alone."""
  return (notation.render(notation.evaluate(expression)),)


STYLES = {"derivation": derivation, "value": value}

_SHAPES = (
  transcript.shape(r"-?\d+(?:/\d+)?", "-7/3"),
  transcript.Shape(notation.is_expression, "2 - (-1/3) * (4 + 5)"),
)


def expressions(
  *,
  style: Style = derivation,
  levels: Sequence[int] = (1, 2, 3, 4),
  operations: Sequence[notation.Operation] = notation.OPERATIONS,
  limits: Limits = LIMITS,
) -> base.Task:
  """Problems that ask for the value of an expression.

  The level is uniform. Each node of a tree has one operand (a square or a cube) or two in
  proportion to the `operations` of each kind; the operations left are shared uniformly between two
  operands; numbers are uniform; and the operation is uniform over those that keep its value within
  the limits (never a division by zero; with max_denominator=1, only exact divisions). Where none
  does, a number takes the place of the power, or one of the two operands is drawn again.

  Metadata: "level"; "key", the expression with the operands of sums and products in order.

  Args:
    style: the lines of the answer: `derivation` or `value`.
    levels: numbers of operations, from 1 to 100, drawn uniformly.
    operations: what may occur; ADD and SUBTRACT have to, as one of them keeps integers in bounds.
    limits: bounds on the numbers.

  Raises:
    ValueError: on levels, operations or limits that are not as above.
  """
  levels, operations = tuple(int(level) for level in levels), tuple(operations)
  if not levels or not all(1 <= level <= notation.MAX_DEPTH for level in levels):
    raise ValueError(f"levels is {levels}; give numbers of operations from 1 to 100")
  if not {notation.ADD, notation.SUBTRACT} <= set(operations):
    raise ValueError("operations lacks ADD or SUBTRACT; include both")
  if not (0 <= limits.max_operand <= limits.max_value and limits.max_denominator >= 1):
    raise ValueError(f"{limits} admits no numbers; max_operand <= max_value, max_denominator >= 1")
  return base.Task(
    problem=functools.partial(_problem, style, levels, operations, limits),
    verify=_verify,
    tokenizer=tokenizer.characters(ALPHABET),
  )


def ask(expression: notation.Expression, style: Style = derivation) -> base.Problem:
  """The problem of a given expression, which holds at least one operation."""
  return base.Problem(
    prompt=notation.render(expression) + " =\n",
    answer="\n".join(style(expression)),
    metadata={
      "level": notation.size(expression),
      "key": notation.canonical(expression),
    },
  )


def _problem(
  style: Style,
  levels: tuple[int, ...],
  operations: tuple[notation.Operation, ...],
  limits: Limits,
  rng: np.random.Generator,
) -> base.Problem:
  level = levels[rng.integers(len(levels))]
  return ask(_draw(rng, level, operations, limits)[0], style)


def _draw(
  rng: np.random.Generator,
  count: int,
  operations: tuple[notation.Operation, ...],
  limits: Limits,
) -> tuple[notation.Expression, notation.Number]:
  """An expression of `count` operations, with its value."""
  if count == 0:
    number = fractions.Fraction(int(rng.integers(limits.max_operand + 1)))
    return number, number
  arity = operations[rng.integers(len(operations))].arity
  left = int(rng.integers(count)) if arity == 2 else count - 1
  sizes = [left, count - 1 - left][:arity]
  operands = [_draw(rng, size, operations, limits) for size in sizes]
  while not (results := _results(operations, [value for _, value in operands], limits)):
    if len(operands) == 1:  # its powers are too large, so it joins a new number instead
      sizes, operands = [*sizes, 0], [*operands, _draw(rng, 0, operations, limits)]
    else:  # fractions that do not combine: the smaller operand is the cheaper to draw again
      i = sizes.index(min(sizes))
      operands[i] = _draw(rng, sizes[i], operations, limits)
  operation, result = results[rng.integers(len(results))]
  return notation.Node(operation, tuple(tree for tree, _ in operands)), result


def _results(
  operations: tuple[notation.Operation, ...], operands: Sequence[notation.Number], limits: Limits
) -> list[tuple[notation.Operation, notation.Number]]:
  """The operations that these operands admit, with their values."""
  results = []
  for operation in operations:
    by_zero = operation == notation.DIVIDE and operands[-1] == 0
    if operation.arity == len(operands) and not by_zero:
      result = operation.apply(*operands)
      if limits.admit(result):
        results.append((operation, result))
  return results


def _verify(problem: base.Problem, response: str) -> base.Verification:
  return transcript.verify(problem.answer, response, _SHAPES)
