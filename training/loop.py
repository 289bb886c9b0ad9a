"""The training loop: steps, and between them what is written, saved and evaluated."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from . import guard, processes
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


class Diverged(FloatingPointError):
  """A step was judged bad: neither it nor what came after is saved.

  Attributes:
    step: steps made with it.
    batch: that it was made on.
    metrics: {name: float} of it.
  """

  def __init__(self, why: str, step: int, batch: Any, metrics: Mapping[str, float]):
    super().__init__(
      f"The {why} at step {step}, and nothing of it is saved. Lower the learning rate or the "
      "clipping norm, and start again from the last checkpoint."
    )
    self.step, self.batch, self.metrics = step, batch, metrics


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
  judge: guard.Judge = guard.finite,
) -> state_lib.TrainState:
  """Trains until `num_steps` steps are made in all, from wherever `state` stands.

  SIGTERM and SIGINT let the step under way finish; then it saves and raises, after the last step
  too: there may be other runs to come. Of several processes one is enough to stop all, after the
  same step. At a step that calls for several, evaluation comes before saving, so the checkpoint can
  carry its result.

  Every step is judged, in order: when the next one is dispatched, so that the device does not wait,
  or at once where anything is due after it or its metrics are no arrays of a device. So nothing is
  written or saved of a bad step, or after.

  Args:
    state: to start from; donated if `step` donates.
    batches: as many as there are steps left; none is donated.
    step: the jitted step.
    num_steps: total.
    write: writes the step's metrics.
    evaluate: makes and writes what is costly, from the state.
    save: saves a checkpoint of the state.
    progress: told of every step when the one before it is done.
    judge: of a step's metrics: those of `guard.WATCHED`, and all of them where anything is due.

  Returns:
    The state after the last step.

  Raises:
    Interrupted: after saving.
    Diverged: the judge found a step bad.
  """
  done, before = int(state.step), None
  with processes.signals() as interrupted:
    while done < num_steps:
      batch = next(batches)
      state, metrics = step(state, batch)
      if before:  # one step in flight: progress is of work, not of dispatches
        _judged(judge, guard.WATCHED, *before)
      progress(done := done + 1)
      before = (done, batch, metrics)
      due = functools.partial(_due, done, num_steps)
      stop = interrupted()
      on_host = not any(isinstance(value, jax.Array) for value in metrics.values())
      if due(write) or due(evaluate) or due(save) or stop or on_host:
        scalars, before = _judged(judge, metrics, *before), None
      if due(write):
        write.action(done, scalars)
      if due(evaluate) and (not stop or done == num_steps):
        evaluate.action(done, state)
      if due(save) or stop:
        save.action(done, state)
      stop = stop or (interrupted() if done == num_steps else None)  # what came while saving
      if stop:
        raise Interrupted(stop, done, num_steps)
  return state


def _due(done: int, num_steps: int, every: Every) -> bool:
  return done % every.period == 0 or done == num_steps


def _judged(judge, names, done, batch, metrics) -> dict[str, float]:
  """The named metrics of a step, which waits for it to be done; Diverged where it is bad."""
  jax.block_until_ready(metrics)
  floats = lambda names: {name: float(metrics[name]) for name in names if name in metrics}
  scalars = floats(names)
  if why := judge(scalars):
    raise Diverged(why, done, batch, floats(metrics))
  return scalars
