"""Blanks to be filled in, anywhere in the text of another task's problem.

    inner text  12+30=42
    prompt      1_+30=__
    answer      12+30=42

Any text that keeps what is not blank and is a problem of the task with a right answer is right:
13+30=43 as well. A blank is no token: where the prompt has one, a masked model sees its mask.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from . import arithmetic, base, tokenizer

BLANK = "_"

# A whole text -> the problem it asks, and its answer; ValueError where it asks none.
Read = Callable[[str], tuple[base.Problem, str]]
# (generator, problem) -> which characters of prompt + answer are blank, [len] bool
Pattern = Callable[[np.random.Generator, base.Problem], np.ndarray]


class Equations(NamedTuple):
  """Reads arithmetic's texts: `a`, the operation's symbol, `b`, `=` and the answer.

  It serves the formats that are one equation, plain and reversed: operands are written alike in
  both, and the answer is the task's to judge. The others spell their working out.
  """

  operation: arithmetic.Operation
  style: arithmetic.Format

  def __call__(self, text: str) -> tuple[base.Problem, str]:
    """See `Read`."""
    symbol = re.escape(self.operation.symbol)
    found = re.fullmatch(rf"(0|[1-9][0-9]*){symbol}(0|[1-9][0-9]*)=([^=]*)", text)
    if found is None:
      raise ValueError(
        f"no equation such as 12{self.operation.symbol}30=..., without leading zeros"
      )
    a, b, answer = found.groups()
    return arithmetic.ask(self.operation, self.style, int(a), int(b)), answer


def equations(operation: arithmetic.Operation, style: arithmetic.Format) -> Equations:
  """How arithmetic's texts are read; see `Equations`.

  Raises:
    ValueError: the style is neither plain nor reversed.
  """
  if style not in (arithmetic.plain_format, arithmetic.reversed_format):
    raise ValueError("Blanks are filled in equations: the style has to be plain or reversed.")
  return Equations(operation, style)


class Anywhere(NamedTuple):
  """Every character is blank with probability `rate`, apart from the others, given that one is."""

  rate: float

  def __call__(self, rng: np.random.Generator, problem: base.Problem) -> np.ndarray:
    """See `Pattern`."""
    length = len(problem.prompt) + len(problem.answer)
    while not (blank := rng.random(length) < self.rate).any():
      pass
    return blank


def anywhere(rate: float = 0.5) -> Pattern:
  """Random positions; see `Anywhere`.

  Raises:
    ValueError: the rate is not in (0, 1].
  """
  if not 0 < rate <= 1:
    raise ValueError(f"rate={rate}; it is the share of characters that are blank, in (0, 1]")
  return Anywhere(rate)


def operand(rng: np.random.Generator, problem: base.Problem) -> np.ndarray:
  """All digits of one number of the prompt, the first or a later one alike likely."""
  blank = np.zeros(len(problem.prompt) + len(problem.answer), bool)
  numbers = [number.span() for number in re.finditer(r"[0-9]+", problem.prompt)]
  start, end = numbers[rng.integers(len(numbers))]
  blank[start:end] = True
  return blank


def result(rng: np.random.Generator, problem: base.Problem) -> np.ndarray:
  """The whole answer: the inner task itself."""
  del rng
  return np.arange(len(problem.prompt) + len(problem.answer)) >= len(problem.prompt)


PATTERNS = {"anywhere": anywhere, "operand": lambda: operand, "result": lambda: result}
"""Patterns by name, each made without arguments."""


def blanks(
  task: base.Task, read: Read, *, patterns: Sequence[Pattern] = (anywhere(), operand, result)
) -> base.Task:
  """Problems of a task, prompt and answer, with blanks; the answer is the whole text.

  Metadata is the inner problem's, "level" and "key" among it, so that a split by keys is the inner
  task's: no text of one side is hidden behind the blanks of the other.

  Args:
    task: the inner task; its tokenizer has no `_`.
    read: how a filled text becomes one of its problems and an answer, such as `equations`.
    patterns: which characters are blank; drawn uniformly.

  Raises:
    ValueError: no patterns.
  """
  if not patterns:
    raise ValueError("patterns is empty; give one at least, such as blanks.operand")
  return base.Task(
    problem=functools.partial(_problem, task.problem, tuple(patterns)),
    verify=functools.partial(_verify, task.verify, read),
    tokenizer=task.tokenizer,
  )


def ask(problem: base.Problem, blank: np.ndarray) -> base.Problem:
  """The problem of filling an inner problem's text in where `blank` [len] is true."""
  text = problem.prompt + problem.answer
  shown = "".join(BLANK if hidden else c for c, hidden in zip(text, blank, strict=True))
  return base.Problem(shown, text, problem.metadata)


def pattern(prompt: str) -> np.ndarray:
  """Which characters of a prompt are blank, [len] bool."""
  return np.array([character == BLANK for character in prompt], bool)


def tokens(code: tokenizer.Tokenizer, prompt: str, blank: str = BLANK) -> list[int]:
  """The prompt as a masked model reads it, each blank the mask, `code.vocab_size`: one token."""
  shown = [code.encode(part) for part in prompt.split(blank)]
  filled = [code.bos] if code.adds_bos else []
  for i, part in enumerate(shown):
    filled += [code.vocab_size, *part] if i else part
  return filled


def _problem(
  draw: Callable[[np.random.Generator], base.Problem],
  patterns: tuple[Pattern, ...],
  rng: np.random.Generator,
) -> base.Problem:
  problem = draw(rng)
  return ask(problem, patterns[rng.integers(len(patterns))](rng, problem))


def _verify(
  verify: Callable[[base.Problem, str], base.Verification],
  read: Read,
  problem: base.Problem,
  response: str,
) -> base.Verification:
  wrong = lambda reason: base.Verification(False, reason)
  prompt = problem.prompt
  if len(response) != len(prompt):
    return wrong(f"wrong length: got {len(response)} characters, expected {len(prompt)}")
  for position, (shown, character) in enumerate(zip(prompt, response, strict=True)):
    if shown not in (BLANK, character):
      return wrong(f"changed text at position {position}: got {character!r}, expected {shown!r}")
  try:
    inner, answer = read(response)
  except ValueError as error:
    return wrong(f"format: {error}")
  return verify(inner, answer)
