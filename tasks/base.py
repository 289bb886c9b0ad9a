"""The types that every task speaks, and the split of its problems into train and test."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from . import tokenizer

Split = Literal["train", "test"]


class Problem(NamedTuple):
  """A question, and the one text that answers it.

  `metadata` holds at least "level" (int, the difficulty) and "key" (str, the problem itself, free
  of format and of the order of commuting operands: problems with one key are the same problem).
  """

  prompt: str
  answer: str  # what the model should write after the prompt, without end-of-sequence
  metadata: Mapping[str, Any]


class Verification(NamedTuple):
  """A verdict; `reason` is empty when `correct`, and otherwise says the first thing wrong."""

  correct: bool
  reason: str


def last_line(response: str) -> str:
  """What a response comes to, where its working is above."""
  return response.rsplit("\n", 1)[-1]


class Task(NamedTuple):
  """A source of problems that knows how they are checked and written as tokens."""

  problem: Callable[[np.random.Generator], Problem]
  verify: Callable[[Problem, str], Verification]
  tokenizer: tokenizer.Tokenizer
  result: Callable[[str], str] = last_line  # of a response: what a majority is a majority of


def split_of(key: str, *, test_percent: int = 10) -> Split:
  """The side a problem is on: test where blake2b(key) mod 100 < test_percent, else train.

  It depends on the key alone, so it holds in every format, seed, process and version of Python.
  """
  if not 0 <= test_percent <= 100:
    raise ValueError(f"test_percent is {test_percent}; it is a percentage, from 0 to 100")
  digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
  return "test" if int.from_bytes(digest, "big") % 100 < test_percent else "train"


def restrict(task: Task, split: Split, *, test_percent: int = 10, max_draws: int = 100_000) -> Task:
  """The same task over one side of the split, so that train and test are disjoint by construction.

  The first draw fixes the level; problems are then drawn until one of that level is on this side.
  So the law of levels is the task's own, although the split of a small level is far from even, and
  within a level the law is the task's conditioned on the side.

  Args:
    task: the task to restrict.
    split: "train" or "test".
    test_percent: the share of problems, in percent, that is held out; the same on both sides.
    max_draws: how many draws to try for one problem.

  Raises:
    ValueError: on an unknown split, or, when drawing, where a level has nothing on this side.
  """
  if split not in ("train", "test"):
    raise ValueError(f"split is {split!r}; it is 'train' or 'test'")
  split_of("", test_percent=test_percent)  # a bad percentage fails here, not at the first draw
  return task._replace(problem=_Restricted(task.problem, split, test_percent, max_draws))


class _Restricted(NamedTuple):
  """A function with its arguments bound, rather than a closure, so that workers can pickle it."""

  draw: Callable[[np.random.Generator], Problem]
  split: Split
  test_percent: int
  max_draws: int

  def __call__(self, rng: np.random.Generator) -> Problem:
    problem = self.draw(rng)
    level = problem.metadata["level"]
    for _ in range(self.max_draws):
      if problem.metadata["level"] == level:
        if split_of(problem.metadata["key"], test_percent=self.test_percent) == self.split:
          return problem
      problem = self.draw(rng)
    raise ValueError(
      f"no {self.split} problem of level {level} in {self.max_draws} draws at test_percent="
      f"{self.test_percent}; leave this level out or change test_percent"
    )


def problem_at(task: Task, seed: int, index: int) -> Problem:
  """Problem number `index` of the stream `seed`: the same at any time and in any order."""
  return task.problem(np.random.default_rng((seed, index)))


def problems(
  task: Task, seed: int, count: int, *, distinct: bool = False, max_repeats: int = 10_000
) -> list[Problem]:
  """The first `count` problems of the stream `seed`; with `distinct`, those with a new key.

  A longer list begins with the shorter one. Distinct lists hold each small level until it is used
  up, so they lean towards the larger levels.

  Raises:
    ValueError: if `max_repeats` draws in a row bring nothing new.
  """
  if not distinct:
    return [problem_at(task, seed, index) for index in range(count)]
  found: dict[str, Problem] = {}
  index = repeats = 0
  while len(found) < count:
    problem = problem_at(task, seed, index)
    repeats = repeats + 1 if problem.metadata["key"] in found else 0
    if repeats >= max_repeats:
      raise ValueError(
        f"only {len(found)} distinct problems in {index} draws; ask for fewer than {count} "
        "or add levels"
      )
    found.setdefault(problem.metadata["key"], problem)
    index += 1
  return list(found.values())
