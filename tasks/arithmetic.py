r"""Addition, subtraction and multiplication in four formats, from answers to full working.

Those of Lee, Sreenivasan, Lee, Lee and Papailiopoulos 2023, "Teaching Arithmetic to Small
Transformers" (arXiv 2307.03381), as their code writes them. For 128 + 367:

    format      prompt                       answer
    plain       128+367=                     495
    reversed    128+367=                     594
    simplified  Input:\n128+367\nTarget:\n   A->5 , C->1\nA->9 , C->0\nA->4 , C->0.\n495
    detailed    Input:\n128+367\nTarget:\n   <scratch>
                                             [1,2,8] has 3 digits.
                                             [3,6,7] has 3 digits.
                                             [1,2,8] + [3,6,7] , A=[] , C=0 , 8+7+0=15 , A->5 , C->1
                                             ...
                                             [] + [] , A=[4,9,5] C=0 , END
                                             </scratch>
                                             4 9 5

The `$` that they put around a sample, and the newline after it, are our beginning- and
end-of-sequence tokens, which are not in these texts. They define no simplified product; ours is in
scratchpad.py. A negative difference has its sign first, or last where the answer is reversed
(12-51= is -39, or 93-), as in their data.

Level n: the longer operand has n digits, the other from 1 to n, in either order. A one-digit
operand may be 0. Levels are uniform, and given the level the shorter length and the number of
carries are uniform and independent; given these, the operands are uniform over all that fit.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from . import base, digits, scratchpad, tokenizer, transcript

ALPHABET = "\n *+,-./0123456789:<=>ABCDEINT[]acdeghiknprstu"
"""Exactly the characters of all prompts and answers: one alphabet, so that models compare."""


class Operation(NamedTuple):
  """An operation: its value, its operands, and its working in the two scratchpad formats."""

  symbol: str
  apply: Callable[[int, int], int]
  commutes: bool
  draw: Callable[[np.random.Generator, int], tuple[int, int, dict[str, int]]]
  simplified: Callable[[int, int], tuple[str, ...]]
  detailed: Callable[[int, int], tuple[str, ...]]


class Format(NamedTuple):
  """How a problem is asked, what its answer's lines are, and the kinds of line there may be."""

  prompt: str  # a template of a, b and symbol
  lines: Callable[[Operation, int, int], tuple[str, ...]]
  shapes: tuple[transcript.Shape, ...]


def _draw_sum(rng: np.random.Generator, level: int) -> tuple[int, int, dict[str, int]]:
  short, carries = int(rng.integers(1, level + 1)), int(rng.integers(level + 1))
  return *digits.draw(rng, digits.ADD, level, short, carries), {"carries": carries}


def _draw_difference(rng: np.random.Generator, level: int) -> tuple[int, int, dict[str, int]]:
  """Carries are the borrows in taking the smaller from the larger, from 0 to level - 1."""
  short, carries = int(rng.integers(1, level + 1)), int(rng.integers(level))
  return *digits.draw(rng, digits.SUBTRACT, level, short, carries), {"carries": carries}


def _draw_product(rng: np.random.Generator, level: int) -> tuple[int, int, dict[str, int]]:
  short = int(rng.integers(1, level + 1))
  return digits.number(rng, level), digits.number(rng, short), {}


ADDITION = Operation(
  "+", operator.add, True, _draw_sum, scratchpad.simplified_sum, scratchpad.detailed_sum
)
SUBTRACTION = Operation(
  "-",
  operator.sub,
  False,
  _draw_difference,
  scratchpad.simplified_difference,
  scratchpad.detailed_difference,
)
MULTIPLICATION = Operation(
  "*", operator.mul, True, _draw_product, scratchpad.simplified_product, scratchpad.detailed_product
)


def _plain_lines(operation: Operation, a: int, b: int) -> tuple[str, ...]:
  return (str(operation.apply(a, b)),)


def _reversed_lines(operation: Operation, a: int, b: int) -> tuple[str, ...]:
  return (str(operation.apply(a, b))[::-1],)


def _simplified_lines(operation: Operation, a: int, b: int) -> tuple[str, ...]:
  return operation.simplified(a, b)


def _detailed_lines(operation: Operation, a: int, b: int) -> tuple[str, ...]:
  return operation.detailed(a, b)


_EQUATION = "{a}{symbol}{b}="
_INSTRUCTION = "Input:\n{a}{symbol}{b}\nTarget:\n"
_NUMBER = r"-?\d+"
_LIST = r"\[(?:(?:\d|-\d|-10)(?:,\d)*)?\]"  # a top digit that keeps its sign reaches 0 - 9 - 1
_STATE = rf"{_LIST} {{}} {_LIST} , A={_LIST}"
_UPDATE = rf"A->{_NUMBER} , C->-?\d"
_INTEGER = transcript.shape(_NUMBER, "495")

plain_format = Format(_EQUATION, _plain_lines, (_INTEGER,))
reversed_format = Format(_EQUATION, _reversed_lines, (transcript.shape(r"\d+-?", "594"),))
simplified_format = Format(
  _INSTRUCTION,
  _simplified_lines,
  (
    _INTEGER,
    transcript.shape(rf"A->{_NUMBER} , C->{_NUMBER}\.?", "A->5 , C->1"),
    transcript.shape(rf"{_NUMBER}\+\d+={_NUMBER}\.", "-100+61=-39."),
  ),
)
detailed_format = Format(
  _INSTRUCTION,
  _detailed_lines,
  (
    transcript.shape(r"-?\d( \d)*", "4 9 5"),
    transcript.shape("<scratch>", "<scratch>"),
    transcript.shape("</scratch>", "</scratch>"),
    transcript.shape(rf"{_LIST} has \d+ digits\.", "[1,2,8] has 3 digits."),
    transcript.shape(
      rf"{_STATE.format('[+]')} , C=\d , \d\+\d\+\d=\d+ , {_UPDATE}",
      "[1,2,8] + [3,6,7] , A=[] , C=0 , 8+7+0=15 , A->5 , C->1",
    ),
    transcript.shape(rf"{_STATE.format('[+]')} C=\d , END", "[] + [] , A=[4,9,5] C=0 , END"),
    transcript.shape(
      rf"{_STATE.format('-')} , C=-?\d , \d-\d-\d(?:\+\d+)?={_NUMBER} , {_UPDATE}",
      "[1,2] - [5,8] , A=[] , C=0 , 2-8-0+10=4 , A->4 , C->-1",
    ),
    transcript.shape(_STATE.format("-"), "[] - [] , A=[-1,6,1]"),
    transcript.shape(rf"{_NUMBER}\+\d+={_NUMBER} , END", "-100+61=-39 , END"),
    transcript.shape(
      rf"{_LIST} \* \d , A={_LIST} , k=\d+ , B={_LIST} , C=\d+\+\d+=\d+(?: , END)?",
      "[1,2] * 3 , A=[3,6] , k=1 , B=[3,6] , C=0+36=36",
    ),
  ),
)


def arithmetic(
  operation: Operation, *, style: Format = reversed_format, levels: Sequence[int] = (1, 2, 3)
) -> base.Task:
  """Problems of one operation in one format.

  Metadata: "level"; "key", such as "12+345", operands in order where the operation commutes;
  "operands"; "lengths", their numbers of digits; and "carries" for sums and differences.

  Args:
    operation: what to compute.
    style: how it is written.
    levels: the levels to draw from, uniformly.

  Raises:
    ValueError: if levels is empty or one is not a positive integer.
  """
  levels = tuple(levels)
  for level in levels or (None,):
    if not isinstance(level, (int, np.integer)) or level < 1:
      raise ValueError(f"levels has {level!r}; give the numbers of digits, such as (1, 2, 3)")
  return base.Task(
    problem=functools.partial(_problem, operation, style, tuple(int(level) for level in levels)),
    verify=functools.partial(_verify, style),
    tokenizer=tokenizer.characters(ALPHABET),
  )


def _problem(
  operation: Operation, style: Format, levels: tuple[int, ...], rng: np.random.Generator
) -> base.Problem:
  level = levels[rng.integers(len(levels))]
  a, b, metadata = operation.draw(rng, level)
  if rng.integers(2):
    a, b = b, a
  return ask(operation, style, a, b, **metadata)


def ask(operation: Operation, style: Format, a: int, b: int, **metadata: Any) -> base.Problem:
  """The problem of two given operands, for prompts that are not drawn; they are not negative."""
  ordered = sorted((a, b)) if operation.commutes else (a, b)
  lengths = len(str(a)), len(str(b))
  return base.Problem(
    prompt=style.prompt.format(a=a, b=b, symbol=operation.symbol),
    answer="\n".join(style.lines(operation, a, b)),
    metadata={
      "level": max(lengths),
      "key": f"{ordered[0]}{operation.symbol}{ordered[1]}",
      "operands": (a, b),
      "lengths": lengths,
      **metadata,
    },
  )


def _verify(style: Format, problem: base.Problem, response: str) -> base.Verification:
  return transcript.verify(problem.answer, response, style.shapes)


addition = functools.partial(arithmetic, ADDITION)
subtraction = functools.partial(arithmetic, SUBTRACTION)
multiplication = functools.partial(arithmetic, MULTIPLICATION)

FORMATS = {
  "plain": plain_format,
  "reversed": reversed_format,
  "simplified": simplified_format,
  "detailed": detailed_format,
}
OPERATIONS = {
  "addition": ADDITION,
  "subtraction": SUBTRACTION,
  "multiplication": MULTIPLICATION,
}
TASKS = {
  "addition": addition,
  "subtraction": subtraction,
  "multiplication": multiplication,
}
