r"""Answers that are wrong on purpose: to be told from right ones, to be corrected, to be read past.

Errors are injected into text (`inject_errors`), a wrong step with its correction goes into a right
answer (`self_correction`), and tokens that a model reads are hidden from it (`masked_thought`):

  near_miss = inject_errors(rng, task.verify, problem, problem.answer)
  pieces = self_correction(problem.answer, near_miss.text, marker="no\n")
  row = example(task.tokenizer, problem.prompt, pieces)       # errors are read, and not learned
  loss_fn = masked_thought(likelihood.next_token(model), mask_token=tokenizer.pad)
"""

import string
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..tasks import base as tasks
from ..tasks import tokenizer as tokenizers
from . import self_training, step


class Piece(NamedTuple):
  """A part of an answer, and whether it is to be learned or only read."""

  text: str
  learn: bool


class Injected(NamedTuple):
  """A text with errors, and the characters that are not those of the original."""

  text: str
  positions: tuple[int, ...]  # rising


def example(
  tokenizer: tokenizers.Tokenizer, prompt: str, pieces: Sequence[Piece], index: int = 0
) -> dict[str, Any]:
  """[bos] prompt pieces [eos] with a mask of the pieces to be learned, as `data`'s rows take it.

  The end-of-sequence token is learned where the last piece is: an answer that goes on has an empty
  last piece that is not. Pieces are encoded apart, so where a tokenizer would merge characters
  across their border, it does not.
  """
  parts = [(tokenizer.opened(prompt), False)]
  parts += [(tokenizer.encode(piece.text), piece.learn) for piece in pieces]
  parts.append(([tokenizer.eos], pieces[-1].learn))
  return {
    "tokens": np.array([token for tokens, _ in parts for token in tokens], np.int32),
    "mask": np.array([learn for tokens, learn in parts for _ in tokens], bool),
    "index": index,
  }


def inject_errors(
  rng: np.random.Generator,
  verify: Callable[[tasks.Problem, str], tasks.Verification],
  problem: tasks.Problem,
  response: str,
  *,
  num_errors: int = 1,
  max_draws: int = 100,
) -> Injected:
  """A right answer with a few of its digits changed to others, which the verifier finds wrong.

  Positions are uniform over sets of digits and each new digit uniform over the nine others, given
  that the result is wrong. The paper has the model edit its own answer by a prompt that names
  kinds of error; here the kind is a wrong digit, and no model is asked.

  Args:
    rng: a generator.
    verify: the task's.
    problem: what is answered.
    response: a right answer.
    num_errors: digits to change.
    max_draws: how often to try.

  Raises:
    ValueError: the response is not right, has too few digits, or stays right in `max_draws` draws.

  Reference: Xu et al. 2024 (RISE), arXiv 2410.06638.
  """
  if reason := verify(problem, response).reason:
    raise ValueError(f"{response!r} is wrong already ({reason}): inject errors into a right answer")
  digits = [i for i, character in enumerate(response) if character in string.digits]
  if not 1 <= num_errors <= len(digits):
    raise ValueError(f"{num_errors} errors do not fit the {len(digits)} digits of {response!r}")
  for _ in range(max_draws):
    positions = sorted(rng.choice(digits, num_errors, replace=False).tolist())
    changed = list(response)
    for i in positions:
      changed[i] = str((int(response[i]) + int(rng.integers(1, 10))) % 10)
    if not verify(problem, text := "".join(changed)).correct:
      return Injected(text, tuple(positions))
  raise ValueError(f"{response!r} is still right after each of {max_draws} draws of errors")


def self_correction(right: str, wrong: str, *, marker: str) -> tuple[Piece, ...]:
  r"""The right answer with the first wrong line of another before the line it should have been.

    lines before it | the wrong line | marker | the right line and the rest

  All but the wrong line is learned: to see that a line is wrong, and what is right; not to err.

  Args:
    right: a right answer.
    wrong: an answer that was sampled, or had errors injected; what follows its first error is left
      out.
    marker: what says that a line was wrong, such as "no\n", ending as a line ends.

  Raises:
    ValueError: no line of `wrong` is one that `right` does not have in its place, or the only such
      line was cut off before it could be wrong.

  Reference: Yan et al. 2024 (S3c-Math), arXiv 2409.01524.
  """
  lines, errors = right.split("\n"), wrong.split("\n")
  before = self_training.verified(wrong, [right])
  at = before.count("\n")
  if errors[at] == lines[at]:
    raise ValueError(f"{wrong!r} has no wrong line in the place of one of {right!r}")
  if at == len(errors) - 1 and lines[at].startswith(errors[at]):
    raise ValueError(f"{wrong!r} ends within a line of {right!r}, which is not yet wrong")
  rest = right[len(before) :]
  pieces = Piece(before, True), Piece(errors[at] + "\n", False), Piece(marker + rest, True)
  return pieces if before else pieces[1:]


def corrected(response: str, *, marker: str) -> str:
  """The response without its lines that the marker, on the next, takes back: what to verify."""
  while (at := response.find("\n" + marker)) >= 0:
    start = response.rfind("\n", 0, at) + 1
    response = response[:start] + response[at + 1 + len(marker) :]
  return response


def mask_tokens(
  key: jax.Array, tokens: jax.Array, where: jax.Array, *, rate: float, mask_token: int
) -> jax.Array:
  """Each token of `where` replaced by `mask_token` with probability `rate`, independently.

  Args:
    key: a key.
    tokens: [...] int.
    where: [...] bool, which may be replaced.
    rate: from 0 to 1.
    mask_token: a token of the vocabulary.
  """
  drawn = jax.random.bernoulli(key, rate, tokens.shape)
  return jnp.where(drawn & where, jnp.asarray(mask_token, tokens.dtype), tokens)


def masked_thought(loss_fn: step.LossFn, *, mask_token: int, rate: float = 0.4) -> step.LossFn:
  """The loss of the same targets where some tokens of the answer cannot be read.

  Tokens of the answer are those that were targets: t where the mask has t - 1, in its own document.
  They are hidden from the model and remain targets. Without a key, as in evaluation, none is.

  The authors' script raises the rate from 0 over the first 0.66 of training; here it is constant.

  Args:
    loss_fn: of a batch with `tokens` and `mask`, [B, L], and perhaps `segments`.
    mask_token: one that texts do not have, such as the padding.
    rate: 0.4 in the authors' script for GSM8K.

  Reference: Chen et al. 2024 (masked thought), arXiv 2403.02178.
  """

  def loss(key, params, batch):
    if key is None:
      return loss_fn(key, params, batch)
    mask_key, loss_key = jax.random.split(key)
    answer = _after(batch["mask"] != 0)
    if "segments" in batch:
      answer &= _after(batch["segments"]) == batch["segments"]
    tokens = mask_tokens(mask_key, batch["tokens"], answer, rate=rate, mask_token=mask_token)
    return loss_fn(loss_key, params, {**batch, "tokens": tokens})

  return loss


def _after(x):
  """What was one position before, [B, L]; nothing was before the first."""
  return jnp.pad(x[:, :-1], ((0, 0), (1, 0)))
