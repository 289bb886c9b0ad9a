"""The training loop: steps, and between them what is written, saved and evaluated."""

import contextlib
import functools
import math
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from . import state as state_lib


class Every(NamedTuple):
  """Something done after every `period` steps, and after the last: action(step, what)."""

  period: int
  action: Callable[[int, Any], None]


class Interrupted(Exception):
  """A signal asked the run to stop; the step under way was finished and saved."""

  def __init__(self, name: str, done: int, num_steps: int):
    super().__init__(f"{name} after step {done} of {num_steps}")
    self.signal = name


@contextlib.contextmanager
def signals(*names: str):
  """Within it, the named signals are only noted; yields a function that says which one came.

  The first says so on standard error. A second one is taken as impatience: KeyboardInterrupt.
  """
  caught: list[str] = []

  def note(number, frame):
    del frame
    if caught:
      raise KeyboardInterrupt
    caught.append(signal.Signals(number).name)
    text = f"\n{caught[0]}: finishing this step, then saving; once more stops without saving\n"
    os.write(2, text.encode())  # print is not safe in a handler

  previous = {name: signal.signal(getattr(signal, name), note) for name in names}
  try:
    yield lambda: caught[0] if caught else None
  finally:
    for name, handler in previous.items():
      signal.signal(getattr(signal, name), handler)


def fit(
  state: state_lib.TrainState,
  batches: Iterator[Any],
  step: Callable[[state_lib.TrainState, Any], tuple[state_lib.TrainState, Mapping[str, jax.Array]]],
  *,
  num_steps: int,
  write: Every,
  evaluate: Every,
  save: Every,
  progress: Callable[[int], None] = lambda done: None,
) -> state_lib.TrainState:
  """Trains until `num_steps` steps are made in all, from wherever `state` stands.

  SIGTERM and SIGINT let the step under way finish; then it saves and raises, unless that step was
  the last. Processes of one run have to get the signal together, as they save together. At a step
  that calls for several, evaluation comes before saving, so the checkpoint can carry its result.

  Args:
    state: to start from; donated if `step` donates.
    batches: as many as there are steps left.
    step: the jitted step.
    num_steps: total.
    write: writes the step's metrics.
    evaluate: makes and writes what is costly, from the state.
    save: saves a checkpoint of the state.
    progress: told of every step when the one before it is done.

  Returns:
    The state after the last step.

  Raises:
    Interrupted: after saving.
    FloatingPointError: a metric (the loss, the norm of its gradient) is not finite at a step after
      which anything is due; nothing of it is written or saved.
  """
  done, metrics = int(state.step), {}
  with signals("SIGTERM", "SIGINT") as interrupted:
    while done < num_steps:
      before = metrics
      state, metrics = step(state, next(batches))
      jax.block_until_ready(before)  # one step in flight: progress is of work, not of dispatches
      progress(done := done + 1)
      due = functools.partial(_due, done, num_steps)
      stop = interrupted() if done < num_steps else None
      if due(write) or due(evaluate) or due(save) or stop:
        _check_finite(done, metrics)
      if due(write):
        write.action(done, {name: float(value) for name, value in metrics.items()})
      if due(evaluate) and not stop:
        evaluate.action(done, state)
      if due(save) or stop:
        save.action(done, state)
      if stop:
        raise Interrupted(stop, done, num_steps)
  return state


def _due(done: int, num_steps: int, every: Every) -> bool:
  return done % every.period == 0 or done == num_steps


def _check_finite(step: int, metrics: Mapping[str, jax.Array]) -> None:
  for name, value in metrics.items():  # a finite loss can have an infinite gradient
    if not math.isfinite(float(value)):
      raise FloatingPointError(
        f"The {name} is {float(value)} at step {step}, and nothing of it is saved. Lower the "
        "learning rate or the clipping norm, and start again from the last checkpoint."
      )
