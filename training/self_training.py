"""Which of a model's own answers it is trained on next, and how many more to draw.

A round of self-training is: attempt problems (`evaluation.attempts`), keep some answers, train on
them, repeat. Everything here runs on the host and keeps the order of problems and of draws:

  kept = rejection_sampled(attempts, at_most=4)                       # or best_of, star
  source = data.tokenize(records(kept), task.tokenizer, ("prompt", "answer"))

Two answers with one text are one answer. What is wrong on purpose is in `corruption`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..evaluation import attempts as attempts_lib
from ..tasks import base as tasks

Attempts = Sequence[attempts_lib.Attempt]


class Sample(NamedTuple):
  """An answer to train on, and the problem it answers."""

  problem: tasks.Problem
  response: str


def records(samples: Iterable[Sample]) -> list[dict[str, str]]:
  """What `data.tokenize` reads: {"prompt", "answer"} of each sample."""
  return [{"prompt": sample.problem.prompt, "answer": sample.response} for sample in samples]


def correct(attempt: attempts_lib.Attempt) -> list[str]:
  """The distinct right answers, as they were drawn."""
  pairs = zip(attempt.responses, attempt.verdicts, strict=True)
  return list(dict.fromkeys(response for response, verdict in pairs if verdict.correct))


def wrong(attempt: attempts_lib.Attempt) -> list[str]:
  """The distinct wrong answers, as they were drawn.

  A text may be right in one draw and wrong in another, which did not end; it is then not here.
  """
  right = set(correct(attempt))
  return [response for response in dict.fromkeys(attempt.responses) if response not in right]


def rejection_sampled(attempts: Attempts, *, at_most: int | None = None) -> list[Sample]:
  """Every distinct right answer, at most so many a problem: the first drawn.

  One round of expert iteration, and rejection sampling fine-tuning. Draws are independent, so the
  first are as good a choice as any.

  Args:
    attempts: of a round; a problem in two attempts counts twice.
    at_most: answers kept of a problem; None keeps all.

  Reference: Anthony et al. 2017, arXiv 1705.08439; Yuan et al. 2023, arXiv 2308.01825.
  """
  return [
    Sample(attempt.problem, response)
    for attempt in attempts
    for response in correct(attempt)[:at_most]
  ]


def best_of(attempts: Attempts, reward: Callable[[tasks.Problem, str], float]) -> list[Sample]:
  """Of each problem the answer of highest reward, right or wrong; of equals, the first.

  Of K draws with distribution function F of the reward, the one kept has F^K.

  Args:
    attempts: problems with at least one answer each.
    reward: (problem, answer) -> a number; the verdict is not looked at.

  Raises:
    ValueError: on a reward that is not a number, which no order would hold.

  Reference: Dong et al. 2023 (RAFT), arXiv 2304.06767.
  """
  kept = []
  for attempt in attempts:
    rewards = [float(reward(attempt.problem, response)) for response in attempt.responses]
    if np.isnan(rewards).any():
      raise ValueError(f"a reward is NaN for the problem {attempt.problem.prompt!r}")
    kept.append(Sample(attempt.problem, attempt.responses[int(np.argmax(rewards))]))
  return kept


def star(
  attempts: Attempts,
  hint: Callable[[tasks.Problem], str],
  attempt_again: Callable[[list[tasks.Problem]], Attempts],
  *,
  at_most: int | None = 1,
) -> list[Sample]:
  """Right answers; and of problems without any, right answers that the model gives when helped.

  The model is asked again with a prompt that holds the answer. What it then gets right is kept as
  an answer to the prompt without help, in the place of the problem.

  Args:
    attempts: of a round.
    hint: problem -> a prompt that gives the answer away.
    attempt_again: problems with that prompt -> their attempts, in order; not called with none.
    at_most: see `rejection_sampled`; the paper has one of each.

  Raises:
    ValueError: `attempt_again` does not return one attempt a problem.

  Reference: Zelikman et al. 2022 (STaR), arXiv 2203.14465, rationalization.
  """
  failed = [i for i, attempt in enumerate(attempts) if not attempt.num_correct]
  helped = [attempts[i].problem for i in failed]
  helped = [problem._replace(prompt=hint(problem)) for problem in helped]
  merged = list(attempts)
  for i, again in zip(failed, attempt_again(helped) if helped else (), strict=True):
    merged[i] = again._replace(problem=attempts[i].problem)
  return rejection_sampled(merged, at_most=at_most)


def wanted_by_difficulty(
  num_correct: ArrayLike, num_tried: ArrayLike, *, most: int, at_least: int = 1
) -> np.ndarray:
  """How many right answers to collect of each problem, in proportion to how often it is failed.

    ceil(most * fail / max fail),  fail = 1 - correct / tried,  and at_least where that is less

  So the hardest problem gets `most`. To be counted from one round of equally many tries, and kept:
  the tries that follow are not spread evenly. (Equal numbers for all are the other allocation of
  the paper: just `most`.)

  Args:
    num_correct: [P].
    num_tried: [P], at least 1.
    most: k_p of the paper.
    at_least: of every problem.

  Raises:
    ValueError: a problem has not been tried.

  Returns:
    [P], int64.

  Reference: Tong et al. 2024 (DART-Math, Prop2Diff), arXiv 2407.13690.
  """
  c, n = np.broadcast_arrays(np.asarray(num_correct, np.int64), np.asarray(num_tried, np.int64))
  if (n < 1).any():
    raise ValueError("a problem has not been tried: its difficulty is not known")
  fail = (n - c) / n
  hardest = max(fail.max(initial=0.0), 1 / n.max(initial=1))  # where none is failed, 0 and not NaN
  shares = np.ceil(most * fail / hardest - 1e-9)  # a share that is whole stays so
  return np.maximum(shares, at_least).astype(np.int64)


def draws(
  num_correct: ArrayLike, num_tried: ArrayLike, wanted: ArrayLike, *, max_tries: int
) -> np.ndarray:
  """How many more answers to draw of each problem, until enough are right or it was tried enough.

    min(ceil((wanted - c) (n + 2) / (c + 1)), max_tries - n);  0 where c >= wanted

  (c + 1) / (n + 2) is the mean rate of success after c of n (Laplace's rule), so a round draws
  about as many as are missing, and few rounds do.

  Args:
    num_correct: c [P], so far.
    num_tried: n [P], so far.
    wanted: [P] or one for all: the uniform allocation.
    max_tries: of a problem, in all.

  Returns:
    [P], int64.

  Reference: Tong et al. 2024 (DART-Math), arXiv 2407.13690.
  """
  c, n, wanted = np.broadcast_arrays(
    *(np.asarray(x, np.int64) for x in (num_correct, num_tried, wanted))
  )
  missing = np.maximum(wanted - c, 0)
  return np.minimum(-(-missing * (n + 2) // (c + 1)), np.maximum(max_tries - n, 0))


def verified(response: str, right: Iterable[str]) -> str:
  """The longest beginning of a response, in whole lines, that a right answer begins with.

  It is empty, or ends with a newline: a last line without one may have been cut off.
  """

  def shared(answer):
    pairs = enumerate(zip(response, answer, strict=False))
    end = next((i for i, (a, b) in pairs if a != b), min(len(response), len(answer)))
    return response[: response.rfind("\n", 0, end) + 1]

  return max(map(shared, right), key=len, default="")


def partially_correct(attempts: Attempts, *, at_least: int = 1) -> list[Sample]:
  """The right beginnings of wrong answers, whole lines, to be trained on without an end.

  A beginning is `verified` by the problem's own answer or by a right answer that was drawn. What
  begins another one that is kept, or a right answer that was drawn, teaches nothing more and is
  left out.

  `corruption.example` of (Piece(response, True), Piece("", False)) has no end to learn.

  Args:
    attempts: of a round.
    at_least: lines.

  Reference: Ni et al. 2022 (self-sampled partially-correct solutions), arXiv 2205.14318; their
    states are variables of a program that is run, here they are the lines of a transcript.
  """
  kept = []
  for attempt in attempts:
    right = correct(attempt)
    begun = [verified(text, [attempt.problem.answer, *right]) for text in wrong(attempt)]
    begun = [text for text in dict.fromkeys(begun) if text.count("\n") >= at_least]
    more = lambda text, longer=(*begun, *right): any(
      other != text and other.startswith(text) for other in longer
    )
    kept += [Sample(attempt.problem, text) for text in begun if not more(text)]
  return kept
