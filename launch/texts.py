"""Samples of texts from a language model.

Prompts are continued as they are; --num_problems asks held-out problems instead, and says what the
verifier says. A file of prompts has one a line; if it is named .jsonl, a line is an object of
`prompt` and, where they differ from the flags, `max_new_tokens`, `seed`, `stop` (texts) and
`settings` (numbers). How tokens are drawn is said by --preset and its settings (`decoding`).

--pretrained takes a directory of transformers' in place of a run. With --chat a prompt is what a
user says, after --system, in the model's own chat template; a line of .jsonl may have `messages`
([{"role": ..., "content": ...}, ...]) in place of a prompt. --adapters merges a directory of
PEFT's in; --quantise holds weights in 8 bits, of a run too.

With --output, each sample is written there as soon as it is finished, one JSON object a line:
index, prompt, text (without the stop text), tokens, log_prob and model_log_prob of each token,
stop_reason ("stop", an end token; "ending", a stop text; "length"), and what it was drawn with. An
interrupted command goes on with --resume.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import rich.console
from absl import flags as absl_flags

from ..evaluation import attempts
from ..models import quantised
from ..sampling import decode, serve
from ..tasks import base as tasks
from ..tasks import chat
from ..training import fingerprint
from . import decoding, draws, flags, language, pretrained, records
from . import experiment as experiment_lib

PROMPT = absl_flags.DEFINE_multi_string("prompt", [], "Text to continue; may be repeated.")
PROMPTS = absl_flags.DEFINE_string("prompts", None, "File of prompts; - is the standard input.")
NUM_PROBLEMS = absl_flags.DEFINE_integer(
  "num_problems", 0, "Held-out problems to answer.", lower_bound=0
)
NUM_SAMPLES = absl_flags.DEFINE_integer("num_samples", 1, "Samples for each prompt.", lower_bound=1)
_MAX_NEW_TOKENS = absl_flags.DEFINE_integer(
  "max_new_tokens", None, "The configuration's if unset.", lower_bound=1
)
_STOP = absl_flags.DEFINE_multi_string("stop", [], "Text that ends a sample; may be repeated.")
RESUME = absl_flags.DEFINE_bool("resume", False, "Go on with an --output that was interrupted.")
_MAX_LENGTH = absl_flags.DEFINE_integer(
  "max_length",
  None,
  "Of prompt and sample together; the model's if unset, and the cache is as long as is needed.",
  lower_bound=2,
)
BATCH_SIZE = absl_flags.DEFINE_integer(
  "batch_size", None, "Samples drawn at once; the configuration's, or 16, if unset.", lower_bound=1
)
_FORMATS = {"int8": "int8", "fp8": "float8_e4m3fn"}
_QUANTISE = absl_flags.DEFINE_enum(
  "quantise", None, list(_FORMATS), "Hold weights in 8 bits; see docs/quantised.md."
)
FLAGS = (
  PROMPT,
  PROMPTS,
  NUM_PROBLEMS,
  NUM_SAMPLES,
  _MAX_NEW_TOKENS,
  _STOP,
  RESUME,
  _MAX_LENGTH,
  BATCH_SIZE,
  _QUANTISE,
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
  """A prompt, or messages, and what its line sets."""

  prompt: str
  max_new_tokens: int
  seed: int | None = None
  stop: Sequence[str] = ()
  settings: Mapping[str, float] = types.MappingProxyType({})
  messages: Sequence[chat.Message] | None = None


def lines_of(max_new_tokens: int) -> list[Line]:
  """The prompts of the flags.

  Raises:
    ValueError, OSError: a file of prompts cannot be read as one.
  """
  line = Line("", max_new_tokens, stop=_STOP.value)
  if PROMPTS.value is None:
    return [line._replace(prompt=prompt) for prompt in PROMPT.value]
  path = PROMPTS.value
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
      lines.append(line._replace(**_fields(json.loads(row))))
      _check_kinds(lines[-1])
    except (ValueError, TypeError) as error:
      raise ValueError(
        f"{path}, line {number}: {error}; a line is an object of {', '.join(Line._fields)}."
      ) from None
  return lines


def _fields(row: Any) -> dict[str, Any]:
  if isinstance(row, dict) and "messages" in row:
    if "prompt" in row or not isinstance(row["messages"], list):
      raise ValueError("messages are a list, in place of a prompt")
    return {"prompt": "", **row}
  return {"prompt": None, **row}


def _check_kinds(line: Line) -> None:
  kinds = Line(str, int, int | None, list, Mapping, list | None)
  for name, value, kind in zip(Line._fields, line, kinds, strict=True):
    wrong = isinstance(value, bool) or not isinstance(value, kind)
    if wrong or (name == "stop" and not all(isinstance(text, str) for text in value)):
      raise ValueError(f"{name} is {value!r}, of another type than it should be")


def asks_of(
  experiment,
  drawn: decoding.Decoding,
  origin: Mapping[str, Any],
  template: chat.Template | None = None,
) -> list[Ask]:
  """Every sample to draw; sample j of prompt i has seed s n + j, s its line's seed, or i.

  Args:
    experiment: whose model continues.
    drawn: how.
    origin: of the params, as records say it.
    template: of conversations; None continues prompts as they are.

  Raises:
    ValueError, OSError: what the flags ask for cannot be asked.
  """
  max_new_tokens = _MAX_NEW_TOKENS.value or experiment.config.evaluation.max_new_tokens
  _check_room(experiment, max_new_tokens)
  judges = []
  if NUM_PROBLEMS.value:
    found = problems(experiment, language.held_out_problems)
    lines = [Line(problem.prompt, max_new_tokens) for problem in found]
    judges = [_verifier(experiment.task, problem) for problem in found]
  else:
    lines = lines_of(max_new_tokens)
    if not lines:
      raise ValueError(f"--prompts={PROMPTS.value} holds no prompt.")
    judges = [lambda response: {}] * len(lines)
  asks, n = [], NUM_SAMPLES.value
  for i, (line, judge) in enumerate(zip(lines, judges, strict=True)):
    for name in line.settings.keys() - drawn.settings.keys():
      raise ValueError(f"A line sets {name}: give --{name} too, as the value of the others.")
    asked, prompt = _asked(line, experiment.tokenizer, template)
    read = functools.partial(experiment.tokenizer.continued, prompt)
    ending = {"ending": serve.stop_strings(read, line.stop)} if line.stop else {}
    for j in range(n):
      seed = (i if line.seed is None else line.seed) * n + j
      request = serve.Request(prompt, line.max_new_tokens, seed, line.settings, **ending)
      record = {
        **{"index": i * n + j, **asked, "seed": seed, "run_seed": draws.SEED.value, **origin},
        "max_new_tokens": line.max_new_tokens,
        "stop": list(line.stop),
        "settings": {**drawn.fixed, **drawn.settings, **line.settings},
      }
      asks.append(Ask(request, record, tuple(line.stop), judge))
  return asks


def _asked(line: Line, tokenizer, template) -> tuple[dict[str, Any], list[int]]:
  """What a line asks, as its records say it, and its tokens."""
  if template is None:
    if line.messages is not None:
      raise ValueError("A line has messages: give --chat, or prompts.")
    return {"prompt": line.prompt}, tokenizer.opened(line.prompt)
  messages = line.messages
  if messages is None:
    system = pretrained.SYSTEM.value
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages += [{"role": "user", "content": line.prompt}]
  text = template(messages)
  return {"prompt": text, "messages": messages}, tokenizer.encode(text)


def _check_room(experiment, max_new_tokens: int) -> None:
  max_length = experiment.model_config.max_length
  if max_new_tokens >= max_length:
    raise ValueError(
      f"max_new_tokens={max_new_tokens} leaves no room for a prompt in a sequence of "
      f"{max_length} tokens (the model's, or --max_length): lower it."
    )


def problems(
  experiment: Any, held_out: Callable[[Any, int], list[tasks.Problem]]
) -> list[tasks.Problem]:
  """The --num_problems held-out problems, of all levels and the last of them the highest.

  Args:
    experiment: whose task.
    held_out: (experiment, how many of each level) -> problems.

  Raises:
    ValueError: there is no task.
  """
  if experiment.task is None:
    raise ValueError("--num_problems needs a task, and this model has none: give --prompt.")
  per_level = -(-NUM_PROBLEMS.value // len(experiment.config.task.levels))
  return held_out(experiment, per_level)[-NUM_PROBLEMS.value :]


def _verifier(task, problem):
  def judge(response):
    (verdict,) = attempts.judge(task, problem, [response]).verdicts
    return verdict._asdict()

  return judge


def _record(ask: Ask, result: serve.Result, tokenizer) -> dict[str, Any]:
  """The line of a sample."""
  text = tokenizer.continued(ask.request.prompt, result.tokens)
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


def draw(
  experiment: language.Experiment,
  params,
  asks: Sequence[Ask],
  drawn: decoding.Decoding,
  on_chunk: Callable[[serve.Progress], None],
  rows: int | None = None,
) -> Iterator[dict[str, Any]]:
  """The record of each sample, in the order of finishing.

  Args:
    experiment: whose model continues.
    params: of it.
    asks: the samples to draw.
    drawn: how.
    on_chunk: told of progress.
    rows: drawn at once; None is the configuration's.

  Raises:
    ValueError: before anything is drawn, a prompt or a setting is not right.
  """
  run = serve.server(
    functools.partial(decode.autoregressive, experiment.model),
    drawn.transform,
    settings=drawn.settings,
    rows=min(len(asks), rows or experiment.config.evaluation.batch_size) or 1,
    vocab_size=experiment.model_config.vocab_size,
    max_length=experiment.model_config.max_length,
    stop=experiment.tokenizer.stops,
  )
  key = jax.random.key(draws.SEED.value)
  results = run(params, key, [ask.request for ask in asks], on_chunk)
  return (_record(asks[result.index], result, experiment.tokenizer) for result in results)


# () -> what is read of an experiment, its params, and where they are from, as records say it.
Restore = Callable[[], tuple[Any, Any, dict[str, Any]]]


def _of_run(wanted: Mapping[str, Any]):
  experiment, params, step = experiment_lib.restore_params(**wanted)
  return experiment, params, {"step": step, "last": flags.LAST.value}


def digest(params: Any) -> str:
  """What tells parameters from others in records, so that two models do not share an output."""
  return f"{int(fingerprint.digest(params)):08x}"


def checked_output() -> pathlib.Path | None:
  """The file that samples go to; None is the screen.

  Raises:
    ValueError, OSError: what is asked for is not said once, or the file is there already.
  """
  if jax.process_count() > 1:
    raise ValueError(f"Texts are drawn by one process, and there are {jax.process_count()}.")
  if sum(map(bool, (PROMPT.value, PROMPTS.value, NUM_PROBLEMS.value))) != 1:
    raise ValueError("Give either --prompt=TEXT, --prompts=FILE or --num_problems=N.")
  output = draws.output()
  if output and output.exists() and not RESUME.value:
    raise ValueError(f"--output={output} exists: give --resume to go on with it, or another name.")
  if RESUME.value and not output:
    raise ValueError("--resume goes on with an --output: name it.")
  return output


def _prepare(restore: Restore, template: Callable[[], chat.Template | None]):
  """What `_draw` needs, from the flags.

  Raises:
    ValueError, OSError: the flags do not go together, or what they name is not there.
  """
  output = checked_output()
  if NUM_PROBLEMS.value and _STOP.value:
    raise ValueError("--stop is for prompts; answers have their own end: leave it out.")
  chosen = template()
  experiment, params, origin = restore()
  origin |= {"params": digest(params)}
  experiment = _limited(experiment)
  if _QUANTISE.value:
    params = quantised.quantise(params, _FORMATS[_QUANTISE.value])
    experiment = experiment._replace(model=quantised.quantised(experiment.model))
    origin |= {"quantise": _QUANTISE.value}
  drawn = decoding.from_flags(experiment.tokenizer)
  asks = asks_of(experiment, drawn, origin, chosen)
  expected = [ask.record for ask in asks]
  done = records.finished(output, expected) if output and output.exists() else set()
  return experiment, params, drawn, asks, done, output


def _limited(experiment):
  """The experiment for sequences of --max_length; what the model's positions are does not change.

  Raises:
    ValueError: the model does not go so far.
  """
  most = experiment.model_config.max_length
  if _MAX_LENGTH.value is None:
    return experiment
  if _MAX_LENGTH.value > most:
    raise ValueError(f"--max_length={_MAX_LENGTH.value} is more than the model's {most}.")
  limited = dataclasses.replace(experiment.model_config, max_length=_MAX_LENGTH.value)
  return experiment._replace(model_config=limited)


def run(wanted: Mapping[str, Any]) -> None:
  """Samples from a checkpoint.

  Args:
    wanted: which, as `flags.checkpoint` has it.
  """
  _draw(functools.partial(_of_run, wanted), lambda: None)


def run_pretrained(mesh: jax.sharding.Mesh) -> None:
  """Samples from --pretrained."""
  folder = pretrained.DIRECTORY.value
  restore = functools.partial(
    *(pretrained.restore, folder, mesh),
    dtype=pretrained.DTYPE.value,
    adapters=pretrained.ADAPTERS.value,
  )
  _draw(restore, pretrained.template)


def _draw(restore: Restore, template: Callable[[], chat.Template | None]) -> None:
  console = rich.console.Console(highlight=False, emoji=False)
  with contextlib.ExitStack() as stack:
    with flags.one_line_errors():
      experiment, params, drawn, asks, done, output = _prepare(restore, template)
      left = [ask for ask in asks if ask.record["index"] not in done]
      on_chunk = stack.enter_context(records.progress(len(asks), len(done)))
      found = draw(experiment, params, left, drawn, on_chunk, BATCH_SIZE.value)
    records.deliver(found, len(asks), output, console)
