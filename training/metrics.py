"""Metrics: writers of scalars to the console, to a JSONL file and to TensorBoard, composed.

Text and images, for people to look at, go to TensorBoard alone.

In a run of several processes only the first should write: give the others `chain()`.
"""

import datetime
import io
import json
import math
import os
import pathlib
import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any, NamedTuple

import numpy as np
import PIL.Image
from absl import logging
from rich import console as rich_console
from rich import progress as rich_progress

Scalars = Mapping[str, float]


class Writer(NamedTuple):
  """Takes scalars by name; steps count from 1, the steps made so far."""

  write: Callable[[int, Scalars], None]  # (step, scalars)
  tick: Callable[[int], None] = lambda step: None  # at the end of every step: progress
  close: Callable[[], None] = lambda: None
  text: Callable[[int, str, str], None] = lambda step, name, text: None  # (step, name, Markdown)
  image: Callable[[int, str, np.ndarray], None] = lambda step, name, pixels: None  # uint8 [H, W, C]


def chain(*writers: Writer) -> Writer:
  """Every writer in turn; of none, a writer that does nothing."""

  def each(name):
    def call(*args):
      for writer in writers:
        getattr(writer, name)(*args)

    return call

  return Writer(*map(each, Writer._fields))


def write_all(writer: Writer, step: int, found: Mapping[str, Any]) -> dict[str, float]:
  """Writes scalars together, and each text and image by its name; returns the scalars."""
  scalars = {}
  for name, value in found.items():
    if isinstance(value, str):
      writer.text(step, name, value)
    elif isinstance(value, np.ndarray):
      writer.image(step, name, value)
    else:
      scalars[name] = value
  writer.write(step, scalars)
  return scalars


def only(keep: Callable[[str], bool], writer: Writer) -> Writer:
  """The writer, told of those scalars alone whose names are kept; of none, nothing."""

  def write(step, scalars):
    kept = {name: value for name, value in scalars.items() if keep(name)}
    if kept:
      writer.write(step, kept)

  return writer._replace(write=write)


def _to_json(value: Any) -> float | str:
  value = float(value)
  if math.isfinite(value):
    return value
  return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _complete(lines: Iterable[bytes]) -> Iterator[tuple[bytes, dict]]:
  """Lines that are JSON objects with a step; a run killed while writing may leave another."""
  for line in lines:
    try:
      record = json.loads(line)
      yield line, {"step": record.pop("step"), **record}
    except (ValueError, LookupError, TypeError, AttributeError):
      continue


def read_jsonl(path: str | os.PathLike) -> list[dict[str, float]]:
  """The lines of a metrics file as {"step": int, name: float, ...}, NaN and infinities included."""
  lines = pathlib.Path(path).read_bytes().split(b"\n")
  return [
    {k: v if k == "step" else float(v) for k, v in record.items()} for _, record in _complete(lines)
  ]


def resumed(path: str | os.PathLike, step: int) -> IO[str]:
  """A JSONL file of records with "step", open to append to, without those beyond `step`.

  So no step of a resumed run appears twice. The file and its folder are made when missing.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  if path.exists():  # the rename leaves the old file or the new one, whenever it is stopped
    beside = path.with_name(path.name + ".tmp")
    with path.open("rb") as old, beside.open("wb") as new:
      for line, record in _complete(old):
        if record["step"] <= step:
          new.write(line.removesuffix(b"\n") + b"\n")
    beside.replace(path)
  return path.open("a", encoding="utf-8")


def jsonl(path: str | os.PathLike, *, step: int = 0) -> Writer:
  """One line {"step": 10, "loss": 0.5, ...} per write, flushed at once.

  JSON has no NaN or infinity: they are the strings "NaN", "Infinity" and "-Infinity", which
  Python's and JavaScript's number parsers take, so every line is strict JSON. A resumed run first
  drops the lines beyond the step that it starts from; see `resumed`.

  Args:
    path: the file, made when missing.
    step: the step from which the run starts or resumes.
  """
  file = resumed(path, step)

  def write(step, scalars):
    record = {"step": int(step), **{k: _to_json(v) for k, v in scalars.items()}}
    file.write(json.dumps(record, allow_nan=False) + "\n")
    file.flush()

  return Writer(write, close=file.close)


def _tensorboard_modules() -> tuple[Any, Any, Any]:
  # TensorBoard takes TensorFlow where it is installed, unless this module exists: its own switch.
  sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf"))
  from tensorboard.compat.proto import event_pb2, summary_pb2
  from tensorboard.summary.writer import event_file_writer

  return event_pb2, summary_pb2, event_file_writer


def tensorboard(directory: str | os.PathLike, *, step: int = 0) -> Writer:
  """Event files for TensorBoard, written without TensorFlow.

  A resumed run tells TensorBoard to forget what lies beyond the step that it starts from. Without
  the package (extra `tensorboard`) nothing is written, and one line says so.
  """
  try:
    event_pb2, summary_pb2, event_file_writer = _tensorboard_modules()
  except ImportError:
    logging.warning("no TensorBoard files: pip install 'ancestral[tensorboard]' to have them")
    return chain()
  events = event_file_writer.EventFileWriter(os.fspath(directory), flush_secs=10)
  Event, Value = event_pb2.Event, summary_pb2.Summary.Value
  if step:
    started = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    events.add_event(Event(wall_time=time.time(), step=int(step) + 1, session_log=started))

  def add(step, *values):
    summary = summary_pb2.Summary(value=values)
    events.add_event(Event(wall_time=time.time(), step=int(step), summary=summary))

  def write(step, scalars):
    add(step, *(Value(tag=name, simple_value=float(value)) for name, value in scalars.items()))

  def text(step, name, text):
    metadata = summary_pb2.SummaryMetadata(
      plugin_data={"plugin_name": "text"}, data_class="DATA_CLASS_TENSOR"
    )
    tensor = {"dtype": "DT_STRING", "tensor_shape": {}, "string_val": [text.encode()]}
    add(step, Value(tag=name, metadata=metadata, tensor=tensor))

  def image(step, name, pixels):
    height, width, channels = pixels.shape
    fields = {"height": height, "width": width, "colorspace": channels}
    add(step, Value(tag=name, image={**fields, "encoded_image_string": _png(pixels)}))

  return Writer(write, close=events.close, text=text, image=image)


def _png(pixels: np.ndarray) -> bytes:
  """An image [H, W, C], C of 1, 3 or 4, as PNG."""
  if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] not in (1, 3, 4):
    raise ValueError(f"an image is uint8 [H, W, 1, 3 or 4], not {pixels.dtype} {pixels.shape}")
  file = io.BytesIO()
  PIL.Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "PNG")
  return file.getvalue()


CONSOLE = ("loss", "accuracy", "reward", "pass@1", "held_out_loss", "speed/mfu")
"""What people are shown while they wait; files get everything."""


class _Speed:
  """Steps per second since the first was dispatched: its compilation does not count."""

  def __init__(self, clock: Callable[[], float]):
    self.clock, self.first, self.rate = clock, None, math.nan

  def tick(self, step: int) -> None:
    now = self.clock()
    self.first = self.first or (step, now)
    steps, seconds = step - self.first[0], now - self.first[1]
    self.rate = steps / seconds if seconds > 0 else math.nan


def _status(speed: _Speed, remaining: int, scalars: Scalars) -> str:
  parts = []
  if speed.rate > 0:
    left = datetime.timedelta(seconds=round(remaining / speed.rate))
    parts = [f"{speed.rate:.3g} steps/s", f"ETA {left}"]
  last = lambda name: name.rpartition("/")[2]
  shown = (f"{last(name)} {scalars[name]:.4g}" for name in CONSOLE if name in scalars)
  return "  ".join([*parts, *shown])


def console(
  num_steps: int,
  *,
  step: int = 0,
  interval: float = 10.0,
  file: IO[str] | None = None,
  clock: Callable[[], float] = time.monotonic,
) -> Writer:
  """Progress for people: a bar on a terminal, elsewhere a line now and then.

  Both show steps per second, the time left, and of the scalars written last those of `CONSOLE`.

  Args:
    num_steps: total.
    step: the step from which the run starts or resumes.
    interval: seconds between lines of the same scalars, where there is no terminal. The first and
      the last step's lines always come.
    file: defaults to standard error.
    clock: seconds.
  """
  screen = rich_console.Console(file=file, stderr=file is None, highlight=False, soft_wrap=True)
  speed = _Speed(clock)
  if screen.is_terminal:
    return _bar(screen, speed, num_steps, step)
  return _lines(screen, speed, num_steps, interval)


def _bar(screen, speed, num_steps, step) -> Writer:
  shown: dict[str, float] = {}
  bar = rich_progress.Progress(
    rich_progress.BarColumn(bar_width=10),
    rich_progress.MofNCompleteColumn(),
    rich_progress.TextColumn("{task.fields[status]}"),
    console=screen,
  )
  task = bar.add_task("", total=num_steps, completed=step, status="compiling")
  bar.start()

  def tick(step):
    speed.tick(step)
    bar.update(task, completed=step, status=_status(speed, num_steps - step, shown))

  return Writer(lambda step, scalars: shown.update(scalars), tick, bar.stop)


def _lines(screen, speed, num_steps, interval) -> Writer:
  due: dict[tuple[str, ...], float] = {}  # by the names written: evaluation has lines of its own

  def write(step, scalars):
    names, now = tuple(scalars), speed.clock()
    if now < due.get(names, -math.inf) and step != num_steps:
      return
    due[names] = now + interval
    status = _status(speed, num_steps - step, scalars)
    screen.print(f"step {step}/{num_steps}  {status}", markup=False)

  return Writer(write, speed.tick)
