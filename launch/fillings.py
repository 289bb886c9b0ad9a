"""Samples of texts from a masked diffusion model:
  python -m ancestral.launch.sample --workdir=runs/masked --prompt="def " --length=128
  python -m ancestral.launch.sample --workdir=runs/masked --prompt="for _ in ____:" --blank=_
  python -m ancestral.launch.sample --workdir=runs/sums --prompt=1_+3_=94
  python -m ancestral.launch.sample --workdir=runs/sudoku --num_problems=5 --block=4

A prompt without blanks is continued to --length tokens, an empty one is sampling from nothing. One
with blanks is filled in and has its own length; --blank says what stands for one, and is `_` where
the run's task has blanks. How masks are filled in is said by --sampler and its flags, the
configuration's if unset; how a token is drawn, by --preset and its settings.

With --output, each batch of samples is written as soon as it is filled in, one JSON object a line:
index, prompt, text, stop_reason ("stop", an end token; "length"; "filled", of blanks), tokens,
calls (of the network, two for each with guidance) and what it was drawn with. An interrupted
command goes on with --resume.
"""  # fmt: skip

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
from absl import flags as absl_flags

from ..evaluation import attempts, fillings
from ..sampling import base
from ..sampling import masked as sampling
from ..tasks import base as tasks
from . import decoding, draws, flags, masked, records, texts, unmasking
from . import experiment as experiment_lib

_LENGTH = absl_flags.DEFINE_integer(
  "length", None, "Tokens of prompt and continuation; a row of the data if unset.", lower_bound=1
)
_BLANK = absl_flags.DEFINE_string(
  "blank", None, "What stands for a token to be filled in, in texts: one character."
)
FLAGS = (
  texts.PROMPT,
  texts.PROMPTS,
  texts.NUM_PROBLEMS,
  texts.NUM_SAMPLES,
  texts.RESUME,
  texts.BATCH_SIZE,
  _LENGTH,
  _BLANK,
  draws.SEED,
  draws.OUTPUT,
  *unmasking.FLAGS,
  *decoding.FLAGS,
)


class Ask(NamedTuple):
  """A sample to draw."""

  query: fillings.Query
  record: dict[str, Any]  # what is known of it beforehand, and written with it
  problem: tasks.Problem | None
  filled: bool  # in, and not continued


def _prompts(experiment: masked.Experiment) -> list[tuple[str, tasks.Problem | None]]:
  if not texts.NUM_PROBLEMS.value:
    lines = texts.lines_of(0)  # no number of tokens that a line could give
    for line in lines:
      if line != texts.Line(line.prompt, 0, stop=line.stop) or line.stop:
        raise ValueError("A line for a masked model has a prompt, and nothing else.")
    return [(line.prompt, None) for line in lines]
  found = texts.problems(experiment, masked.held_out_problems)
  return [(problem.prompt, problem) for problem in found]


def _query(experiment: masked.Experiment, prompt: str) -> tuple[fillings.Query, bool]:
  """What a prompt asks, and whether it is to be filled in; see the module.

  Raises:
    ValueError: there is no room, or the blank is not one character, or not in the prompt.
  """
  blank = _BLANK.value
  task = experiment.task is not None and bool(experiment.config.task.get("blanks"))
  if _LENGTH.value is not None and (blank is not None or task):
    raise ValueError("--length is of continuations; what is filled in has its own.")
  if blank is not None and experiment.task is not None:
    raise ValueError("--blank is for texts; a task has its own.")
  if blank is not None and len(blank) != 1:
    raise ValueError(f"--blank={blank!r} has to be one character.")
  if blank is None:
    return masked.query(experiment, prompt, _LENGTH.value), task
  if blank not in prompt:
    raise ValueError(f"--blank={blank} is not in the prompt {prompt!r}.")
  return masked.infilling(experiment, prompt, blank), True


def asks_of(
  experiment: masked.Experiment, origin: Mapping[str, Any], how: Mapping[str, Any]
) -> list[Ask]:
  """Every sample to draw, and what its record says of it.

  Args:
    experiment: whose model.
    origin: of the params.
    how: it is drawn.

  Raises:
    ValueError, OSError: what the flags ask for cannot be asked.
  """
  asks, n = [], texts.NUM_SAMPLES.value
  prompts = _prompts(experiment)
  if not prompts:
    raise ValueError(f"--prompts={texts.PROMPTS.value} holds no prompt.")
  for i, (prompt, problem) in enumerate(prompts):
    query, filled = _query(experiment, prompt)
    asked = {"prompt": prompt, "blank": _BLANK.value, "length": len(query.tokens)}
    for j in range(n):
      known = {"index": i * n + j, **asked, "run_seed": draws.SEED.value, **origin, **how}
      asks.append(Ask(query, known, problem, filled))
  return asks


def _record(experiment: masked.Experiment, ask: Ask, tokens: np.ndarray, calls: int) -> Any:
  response = fillings.response(experiment.tokenizer, tokens, ask.query.start)
  ended = np.isin(tokens[ask.query.start :], experiment.tokenizer.stops).any()
  text, reason = response.text, "stop" if ended else "length"
  if ask.filled:
    reason = "filled"
    if experiment.task is None:  # what comes after an end is still what was given
      text = experiment.tokenizer.decode(tokens.tolist())
  judged = {}
  if ask.problem is not None:
    (verdict,) = attempts.judge(experiment.task, ask.problem, [response]).verdicts
    judged = verdict._asdict()
  return {
    **ask.record,
    "text": text,
    "stop_reason": reason,
    **judged,
    "tokens": tokens.tolist(),
    "calls": int(calls),
  }


def draw(
  experiment: masked.Experiment, params: Any, asks: Sequence[Ask], fill: Any, rows: int
) -> Iterator[dict[str, Any]]:
  """The record of each sample, batch by batch; sequences of one length go together."""
  by_length: dict[int, list[Ask]] = {}
  for ask in asks:
    by_length.setdefault(len(ask.query.tokens), []).append(ask)
  key = jax.random.key(draws.SEED.value)
  for group in by_length.values():
    size = min(rows, len(group))
    for first in range(0, len(group), size):
      some = group[first : first + size]
      padded = [*some, *[some[-1]] * (size - len(some))]
      keys = base.row_keys(key, jnp.asarray([ask.record["index"] for ask in padded]))
      filled = fill(params, keys, np.stack([ask.query.tokens for ask in padded]))
      for ask, tokens, calls in zip(some, *map(np.asarray, filled), strict=False):
        yield _record(experiment, ask, tokens, calls)


def _prepare(wanted: Mapping[str, Any]):
  """The experiment, its params, what is asked, how it is drawn, and where it goes.

  Raises:
    ValueError, OSError: the flags do not go together, or what they name is not there.
  """
  output = texts.checked_output()
  experiment, params, step = experiment_lib.restore_params(**wanted)
  chosen = unmasking.chosen(experiment.config)
  drawn = decoding.from_flags(experiment.tokenizer)
  sampling.check_transform(drawn.transform(drawn.settings), experiment.mask)
  settings = {**drawn.fixed, **drawn.settings}
  schedule = experiment.config.loss.schedule
  how = {"settings": settings, "unmasking": {**chosen.to_dict(), "schedule": schedule}}
  origin = {"step": step, "last": flags.LAST.value, "params": texts.digest(params)}
  asks = asks_of(experiment, origin, how)
  expected = [ask.record for ask in asks]
  done = records.finished(output, expected) if output and output.exists() else set()
  fill = masked.filler(experiment, drawn.transform, chosen)
  left = [ask for ask in asks if ask.record["index"] not in done]
  rows = texts.BATCH_SIZE.value or experiment.config.evaluation.batch_size
  bound = lambda params, keys, tokens: fill(params, drawn.settings, keys, tokens)
  return draw(experiment, params, left, bound, rows), len(asks), output


def run(wanted: Mapping[str, Any]) -> None:
  """Fills in what the flags ask for, from a checkpoint.

  Args:
    wanted: which, as `flags.checkpoint` has it.
  """
  console = rich.console.Console(highlight=False, emoji=False)
  with flags.one_line_errors():
    found, total, output = _prepare(wanted)
  records.deliver(found, total, output, console)
