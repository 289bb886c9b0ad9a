"""Samples of texts on their way out: to a file of JSON lines, or to the screen."""

import contextlib
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import rich.console
import rich.progress
import rich.text

from ..sampling import serve
from . import draws

Record = Mapping[str, Any]  # of a sample, as JSON


def finished(path: pathlib.Path, expected: Sequence[Record]) -> set[int]:
  """The samples that an interrupted output holds; a line cut short is taken out of it.

  Args:
    path: the output.
    expected: what is known of each sample beforehand.

  Raises:
    ValueError: it is of other samples than those expected.
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
    known = expected[index] if index in range(len(expected)) else {"index": "none"}
    for name, value in known.items():
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
def progress(total: int, done: int) -> Iterator[Callable[[serve.Progress], None]]:
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


def deliver(
  records: Iterator[Record], total: int, output: pathlib.Path | None, console: rich.console.Console
) -> None:
  """Writes the records to the output, or shows them; an interruption ends the program, status 130.

  Args:
    records: as they come.
    total: how many there are in the end.
    output: a file, or None.
    console: where they are shown, or the file's name is.
  """
  try:
    if output is None:
      show(records, console)
    else:
      write(records, output)
  except KeyboardInterrupt:
    hint = f"; --resume goes on with {output}." if output else "."
    print(f"interrupted{hint}", file=sys.stderr)
    sys.exit(130)
  if output:
    console.print(f"{total} samples in {output}", soft_wrap=True)


def write(records: Iterator[Record], output: pathlib.Path) -> None:
  """Appends each record as it comes, so that whatever happens to the next, it is there."""
  with open(output, "a") as file:
    for record in records:
      file.write(json.dumps(record) + "\n")
      file.flush()


def show(records: Iterator[Record], console: rich.console.Console) -> None:
  """Shows the samples in their order, each as soon as those before it are there."""
  waiting, shown = {}, 0
  for record in records:
    waiting[record["index"]] = record
    while shown in waiting:
      _show(console, waiting.pop(shown))
      shown += 1


def _show(console: rich.console.Console, record: Record) -> None:
  asked = record["messages"][-1]["content"] + "\n" if "messages" in record else record["prompt"]
  if record["stop_reason"] == "filled":
    asked = ""  # the text is all of it
  line = rich.text.Text(asked).append(record["text"], "bold")
  if "correct" in record:
    reason, colour = ("correct", "green") if record["correct"] else (record["reason"], "red")
    line.append(f"  {reason}", colour)
  elif record["stop_reason"] == "length":
    line.append("  (cut)", "dim")
  console.print(line, soft_wrap=True)
