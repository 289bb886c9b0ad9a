"""Samples of texts from a language model.

Prompts are continued as they are; --num_problems asks held-out problems instead, and says what the
verifier says. A file of prompts has one a line; if it is named .jsonl, a line is an object of
`prompt` and, where they differ from the flags, `max_new_tokens`, `seed`, `stop` (texts) and
`settings` (numbers). How tokens are drawn is said by --preset and its settings (`decoding`).

With --output, each sample is written there as soon as it is finished, one JSON object a line:
index, prompt, text (without the stop text), tokens, log_prob and model_log_prob of each token,
stop_reason ("stop", an end token; "ending", a stop text; "length"), and what it was drawn with. An
interrupted command goes on with --resume.
"""

import contextlib
import functools
import json
import pathlib
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import rich.console
import rich.progress
import rich.text
from absl import flags as absl_flags

from ..evaluation import attempts
from ..sampling import decode, serve
from . import decoding, draws, flags, language
from . import experiment as experiment_lib

_PROMPT = absl_flags.DEFINE_multi_string("prompt", [], "Text to continue; may be repeated.")
_PROMPTS = absl_flags.DEFINE_string("prompts", None, "File of prompts; - is the standard input.")
_NUM_PROBLEMS = absl_flags.DEFINE_integer(
  "num_problems", 0, "Held-out problems to answer.", lower_bound=0
)
_NUM_SAMPLES = absl_flags.DEFINE_integer(
  "num_samples", 1, "Samples for each prompt.", lower_bound=1
)
_MAX_NEW_TOKENS = absl_flags.DEFINE_integer(
  "max_new_tokens", None, "The configuration's if unset.", lower_bound=1
)
_STOP = absl_flags.DEFINE_multi_string("stop", [], "Text that ends a sample; may be repeated.")
_RESUME = absl_flags.DEFINE_bool("resume", False, "Go on with an --output that was interrupted.")
FLAGS = (
  _PROMPT,
  _PROMPTS,
  _NUM_PROBLEMS,
  _NUM_SAMPLES,
  _MAX_NEW_TOKENS,
  _STOP,
  _RESUME,
  draws.SEED,
  draws.OUTPUT,
  *decoding.FLAGS,
)


class Ask(NamedTuple):
  """A sample to draw."""

  request: serve.Request
  record: dict[str, Any]  # what is known of it beforehand, and written with it
  stop: tuple[str, ...]
  judge: Callable[[attempts.Response], dict[str, Any]]  # what a verifier adds to the record


class Line(NamedTuple):
  """A prompt and what its line sets."""

  prompt: str
  max_new_tokens: int
  seed: int | None = None
  stop: Sequence[str] = ()
  settings: Mapping[str, float] = types.MappingProxyType({})


def _lines(max_new_tokens: int) -> list[Line]:
  """The prompts of the flags.

  Raises:
    ValueError, OSError: a file of prompts cannot be read as one.
  """
  line = Line("", max_new_tokens, stop=_STOP.value)
  if _PROMPTS.value is None:
    return [line._replace(prompt=prompt) for prompt in _PROMPT.value]
  path = _PROMPTS.value
  try:
    text = sys.stdin.read() if path == "-" else pathlib.Path(path).read_text("utf-8-sig")
  except UnicodeDecodeError as error:
    raise ValueError(f"--prompts={path} is not UTF-8: {error}.") from None
  rows = text.removesuffix("\n").split("\n") if text else []  # splitlines cuts at form feeds too
  if not path.endswith(".jsonl"):
    return [line._replace(prompt=prompt) for prompt in rows]
  lines = []
  for number, row in enumerate(rows, 1):
    try:
      lines.append(line._replace(**{"prompt": None, **json.loads(row)}))
      _check_kinds(lines[-1])
    except (ValueError, TypeError) as error:
      raise ValueError(
        f"{path}, line {number}: {error}; a line is an object of {', '.join(Line._fields)}."
      ) from None
  return lines


def _check_kinds(line: Line) -> None:
  kinds = Line(str, int, int | None, list, Mapping)
  for name, value, kind in zip(Line._fields, line, kinds, strict=True):
    wrong = isinstance(value, bool) or not isinstance(value, kind)
    if wrong or (name == "stop" and not all(isinstance(text, str) for text in value)):
      raise ValueError(f"{name} is {value!r}, of another type than it should be")


def asks_of(experiment, drawn: decoding.Decoding, step: int) -> list[Ask]:
  """Every sample to draw; sample j of prompt i has seed s n + j, s its line's seed, or i."""
  max_new_tokens = _MAX_NEW_TOKENS.value or experiment.config.evaluation.max_new_tokens
  language.check_new_tokens(experiment, max_new_tokens)
  judges = []
  if _NUM_PROBLEMS.value:
    problems = _problems(experiment)
    lines = [Line(problem.prompt, max_new_tokens) for problem in problems]
    judges = [_verifier(experiment.task, problem) for problem in problems]
  else:
    lines = _lines(max_new_tokens)
    if not lines:
      raise ValueError(f"--prompts={_PROMPTS.value} holds no prompt.")
    judges = [lambda response: {}] * len(lines)
  for line in lines:
    for name in line.settings.keys() - drawn.settings.keys():
      raise ValueError(f"A line sets {name}: give --{name} too, as the value of the others.")
  tokenizer, n = experiment.tokenizer, _NUM_SAMPLES.value
  asks = []
  for i, (line, judge) in enumerate(zip(lines, judges, strict=True)):
    prompt = [tokenizer.bos, *tokenizer.encode(line.prompt)]
    ending = {"ending": serve.stop_strings(tokenizer.decode, line.stop)} if line.stop else {}
    for j in range(n):
      seed = (i if line.seed is None else line.seed) * n + j
      request = serve.Request(prompt, line.max_new_tokens, seed, line.settings, **ending)
      record = {
        "index": i * n + j,
        "prompt": line.prompt,
        "seed": seed,
        "run_seed": draws.SEED.value,
        "step": step,
        "last": flags.LAST.value,
        "max_new_tokens": line.max_new_tokens,
        "stop": list(line.stop),
        "settings": {**drawn.fixed, **drawn.settings, **line.settings},
      }
      asks.append(Ask(request, record, tuple(line.stop), judge))
  return asks


def _problems(experiment) -> list:
  if experiment.task is None:
    raise ValueError("--num_problems needs a task, and this run's data are text: give --prompt.")
  per_level = -(-_NUM_PROBLEMS.value // len(experiment.config.task.levels))
  return language.held_out_problems(experiment, per_level)[-_NUM_PROBLEMS.value :]


def _verifier(task, problem):
  def judge(response):
    (verdict,) = attempts.judge(task, problem, [response]).verdicts
    return verdict._asdict()

  return judge


def _record(ask: Ask, result: serve.Result, tokenizer) -> dict[str, Any]:
  """The line of a sample."""
  text = tokenizer.decode(result.tokens)
  ends = [at for stop in ask.stop if (at := text.find(stop)) >= 0]
  response = attempts.response(tokenizer, result.tokens, float(result.log_prob.sum()))
  return {
    **ask.record,
    "text": text[: min(ends)] if ends else text,
    "stop_reason": result.reason,
    **ask.judge(response),
    "tokens": result.tokens,
    "log_prob": result.log_prob.tolist(),
    "model_log_prob": result.model_log_prob.tolist(),
  }


def _finished(path: pathlib.Path, asks: Sequence[Ask]) -> set[int]:
  """The samples that an interrupted output holds; a line cut short is taken out of it.

  Raises:
    ValueError: it is of other samples than those asked for.
  """
  whole, _, cut = path.read_bytes().rpartition(b"\n")
  start = b'{"index": '
  try:
    records = [json.loads(line) for line in whole.split(b"\n") if whole]
  except ValueError as error:
    raise ValueError(f"--resume: {path} is no file of samples: {error}.") from None
  if cut[: len(start)] != start[: len(cut)] or not all(isinstance(r, dict) for r in records):
    raise ValueError(f"--resume: {path} is no file of samples: name another --output.")
  for record in records:
    index = record.get("index")
    expected = asks[index].record if index in range(len(asks)) else {"index": "none"}
    for name, value in expected.items():
      if record.get(name) != value:
        raise ValueError(
          f"--resume: {path} has {name} {record.get(name)!r} where this command would have "
          f"{value!r}, in sample {index}: give its own flags, or another --output."
        )
  if len({record["index"] for record in records}) < len(records):
    raise ValueError(f"--resume: {path} has a sample twice: name another --output.")
  with open(path, "r+b") as file:
    file.truncate(len(whole) + bool(whole))
  return {record["index"] for record in records}


@contextlib.contextmanager
def _progress(total: int, done: int) -> Iterator[Callable[[serve.Progress], None]]:
  """A bar of samples with tokens per second, where somebody looks at the standard error."""
  console = rich.console.Console(stderr=True)
  columns = (
    *rich.progress.Progress.get_default_columns(),
    rich.progress.MofNCompleteColumn(),
    rich.progress.TextColumn("{task.fields[rate]:.0f} tokens/s"),
  )
  # On one terminal the samples themselves show how far it is.
  hidden = not console.is_terminal or (draws.OUTPUT.value is None and sys.stdout.isatty())
  with rich.progress.Progress(*columns, console=console, disable=hidden) as bar:
    task = bar.add_task("samples", total=total, completed=done, rate=0.0)
    drawn = 0

    def update(progress):
      nonlocal drawn
      drawn += sum(map(len, progress.drawn.values()))
      elapsed = bar.tasks[task].elapsed or 1
      bar.update(task, completed=done + progress.num_finished, rate=drawn / elapsed)

    yield update


def _show(console: rich.console.Console, record: dict[str, Any]) -> None:
  line = rich.text.Text(record["prompt"]).append(record["text"], "bold")
  if "correct" in record:
    reason, colour = ("correct", "green") if record["correct"] else (record["reason"], "red")
    line.append(f"  {reason}", colour)
  elif record["stop_reason"] == "length":
    line.append("  (cut)", "dim")
  console.print(line, soft_wrap=True)


def draw(
  experiment: language.Experiment,
  params,
  asks: Sequence[Ask],
  drawn: decoding.Decoding,
  on_chunk: Callable[[serve.Progress], None],
) -> Iterator[dict[str, Any]]:
  """The record of each sample, in the order of finishing.

  Raises:
    ValueError: before anything is drawn, a prompt or a setting is not right.
  """
  run = serve.server(
    functools.partial(decode.autoregressive, experiment.model),
    drawn.transform,
    settings=drawn.settings,
    rows=min(len(asks), experiment.config.evaluation.batch_size) or 1,
    vocab_size=experiment.tokenizer.vocab_size,
    max_length=experiment.model_config.max_length,
    stop=(experiment.tokenizer.eos,),
  )
  key = jax.random.key(draws.SEED.value)
  results = run(params, key, [ask.request for ask in asks], on_chunk)
  return (_record(asks[result.index], result, experiment.tokenizer) for result in results)


def _prepare(wanted: Mapping[str, Any]):
  """What `run` needs, from the flags.

  Raises:
    ValueError, OSError: the flags do not go together, or what they name is not there.
  """
  if sum(map(bool, (_PROMPT.value, _PROMPTS.value, _NUM_PROBLEMS.value))) != 1:
    raise ValueError("Give either --prompt=TEXT, --prompts=FILE or --num_problems=N.")
  output = draws.output()
  if output and output.exists() and not _RESUME.value:
    raise ValueError(f"--output={output} exists: give --resume to go on with it, or another name.")
  if _NUM_PROBLEMS.value and _STOP.value:
    raise ValueError("--stop is for prompts; answers have their own end: leave it out.")
  if _RESUME.value and not output:
    raise ValueError("--resume goes on with an --output: name it.")
  experiment, params, step = experiment_lib.restore_params(**wanted)
  drawn = decoding.from_flags(experiment.tokenizer)
  asks = asks_of(experiment, drawn, step)
  done = _finished(output, asks) if output and output.exists() else set()
  return experiment, params, drawn, asks, done, output


def _write(records: Iterator[dict[str, Any]], output: pathlib.Path) -> None:
  """Appends each record as it comes, so that whatever happens to the next, it is there."""
  with open(output, "a") as file:
    for record in records:
      file.write(json.dumps(record) + "\n")
      file.flush()


def _print(records: Iterator[dict[str, Any]], console: rich.console.Console) -> None:
  """Shows the samples in their order, each as soon as those before it are there."""
  waiting, shown = {}, 0
  for record in records:
    waiting[record["index"]] = record
    while shown in waiting:
      _show(console, waiting.pop(shown))
      shown += 1


def run(wanted: Mapping[str, Any]) -> None:
  """Samples from a checkpoint.

  Args:
    wanted: which, as `flags.checkpoint` has it.
  """
  console = rich.console.Console(highlight=False, emoji=False)
  with contextlib.ExitStack() as stack:
    with flags.one_line_errors():
      experiment, params, drawn, asks, done, output = _prepare(wanted)
      left = [ask for ask in asks if ask.record["index"] not in done]
      on_chunk = stack.enter_context(_progress(len(asks), len(done)))
      records = draw(experiment, params, left, drawn, on_chunk)
    try:
      if output is None:
        _print(records, console)
      else:
        _write(records, output)
    except KeyboardInterrupt:
      hint = f"; --resume goes on with {output}." if output else "."
      print(f"interrupted{hint}", file=sys.stderr)
      sys.exit(130)
  if output:
    console.print(f"{len(asks)} samples in {output}", soft_wrap=True)
