"""Answers that a model gives to problems, their verdicts, and how often they are right."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..sampling import base as sampling
from ..sampling import decode, sharded
from ..tasks import base as tasks
from ..tasks import tokenizer as tokenizers
from ..tasks import workers
from . import coverage

# (keys [B], prompts) -> Samples, jitted, with its parameters bound; B is the same at every call.
Sample = Callable[[sampling.Keys, decode.Prompts], decode.Samples]


class Attempt(NamedTuple):
  """A problem, what was answered, and what the verifier said of each answer."""

  problem: tasks.Problem
  responses: tuple[str, ...]
  verdicts: tuple[tasks.Verification, ...]
  majority_correct: bool  # the most frequent result (of equals, the first) of those that ended

  @property
  def num_correct(self) -> int:
    """Right answers."""
    return sum(verdict.correct for verdict in self.verdicts)


class Response(NamedTuple):
  """A continuation of a prompt."""

  text: str  # without special tokens
  fault: str  # why it is not a text and the end-of-sequence token after it; "" if it is
  log_prob: float  # of its tokens, under the law they were drawn from


def respond(
  sample: Sample,
  tokenizer: tokenizers.Tokenizer,
  texts: Sequence[str],
  key: jax.Array,
  *,
  num_samples: int,
  batch_size: int,
  max_length: int,
  max_new_tokens: int,
) -> list[list[Response]]:
  """`num_samples` continuations of each text, drawn in batches of one shape.

  Sample j of text i is request i * num_samples + j of the run `key`, so it does not depend on the
  batch size, nor on the other texts unless they change its bucket of padding.
  """
  encoded = [tokenizer.opened(text) for text in texts]
  prompts = decode.pad_prompts(
    encoded, vocab_size=tokenizer.vocab_size, max_length=max_length, max_new_tokens=max_new_tokens
  )
  requests = np.arange(len(texts) * num_samples)
  drawn = []
  for first in range(0, len(requests), batch_size):
    # The last batch is filled up with its own last request.
    batch = np.minimum(np.arange(first, first + batch_size), requests[-1])
    keys = sampling.row_keys(key, jnp.asarray(batch))
    rows = jax.tree.map(lambda leaf, batch=batch: leaf[batch // num_samples], prompts)
    drawn.append(sample(keys, rows))  # all are dispatched before the first is waited for
  responses = [
    response(tokenizer, tokens[prompt_length:length].tolist(), float(log_prob.sum()))
    for samples in map(sharded.to_host, drawn)
    for tokens, length, prompt_length, log_prob, _ in zip(*samples, strict=True)
  ]
  return [responses[i * num_samples : (i + 1) * num_samples] for i in range(len(texts))]


def response(tokenizer: tokenizers.Tokenizer, drawn: Sequence[int], log_prob: float) -> Response:
  """What the tokens drawn say, and whether they ended as they should."""
  fault = ""
  if not {*tokenizer.stops} & {*drawn}:
    fault = f"did not end within {len(drawn)} tokens"
  elif ({tokenizer.pad, tokenizer.bos} - {*tokenizer.stops}) & {*drawn}:
    fault = "holds a padding or beginning-of-sequence token"
  return Response(tokenizer.decode(drawn), fault, log_prob)


def attempt(
  sample: Sample,
  task: tasks.Task,
  problems: Sequence[tasks.Problem],
  key: jax.Array,
  *,
  max_new_tokens: int,
  **kwargs,
) -> list[Attempt]:
  """Lets the model answer each problem and verifies every answer; see `respond`.

  An answer that has not ended is wrong, however right it looks so far. The majority is of results
  and not of their working (self-consistency, Wang et al. 2022, arXiv 2203.11171).
  """
  responses = respond(
    sample,
    task.tokenizer,
    [problem.prompt for problem in problems],
    key,
    max_new_tokens=max_new_tokens,
    **kwargs,
  )

  return judge_all(task, problems, responses, in_process(task.verify))


def in_process(verify: workers.Verify) -> workers.VerifyAll:
  """A verifier of many responses that trusts the verifier of one; else see `tasks.workers`."""
  return lambda pairs: [verify(*pair) for pair in pairs]


def judge(task: tasks.Task, problem: tasks.Problem, responses: Sequence[Response]) -> Attempt:
  """Verifies each response to a problem."""
  return judge_all(task, [problem], [responses], in_process(task.verify))[0]


def judge_all(
  task: tasks.Task,
  problems: Sequence[tasks.Problem],
  responses: Sequence[Sequence[Response]],
  verify_all: workers.VerifyAll,
) -> list[Attempt]:
  """Verifies the responses that ended; the majority is of these too."""
  asked = [
    (problem, response.text)
    for problem, row in zip(problems, responses, strict=True)
    for response in row
    if not response.fault
  ]
  verdicts = iter(verify_all(asked))
  return [_attempt(task, *pair, verdicts) for pair in zip(problems, responses, strict=True)]


def _attempt(task, problem, responses, verdicts) -> Attempt:
  fault = lambda response: tasks.Verification(False, f"format: {response.fault}")
  votes = [task.result(response.text) for response in responses if not response.fault]
  return Attempt(
    problem,
    tuple(response.text for response in responses),
    tuple(fault(response) if response.fault else next(verdicts) for response in responses),
    bool(votes) and coverage.majority_vote(votes) == task.result(problem.answer),
  )


def summarise(attempts: Sequence[Attempt]) -> dict[str, tuple[coverage.Row, ...]]:
  """pass@1, majority@n and pass@n by level, for n answers to each problem."""
  n = len(attempts[0].responses)
  levels = [attempt.problem.metadata["level"] for attempt in attempts]
  correct = np.array([attempt.num_correct for attempt in attempts])
  columns = {
    "pass@1": coverage.pass_at_k(n, correct, 1),
    f"majority@{n}": [attempt.majority_correct for attempt in attempts],
    f"pass@{n}": coverage.pass_at_k(n, correct, n),
  }
  return {name: coverage.by_level(levels, values) for name, values in columns.items()}
