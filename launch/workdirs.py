"""A run's folder: its checkpoints, what was saved with them, and which one another begins with."""

from collections.abc import Mapping

from ..training import checkpoint, processes
from . import fields


def checkpoints(workdir: str) -> str:
  """The folder of a run's checkpoints."""
  return f"{workdir}/checkpoints"


def saved_config(workdir: str, step: int | None = None) -> fields.Config:
  """The configuration that a checkpoint of the run was saved with.

  Args:
    workdir: of the run.
    step: the checkpoint; None is the latest.

  Raises:
    FileNotFoundError: the workdir has no such checkpoint.
    ValueError: it is corrupt.
  """
  return fields.Config(checkpoint.load_config(checkpoints(workdir), step)).lock()


def quality(scalars: Mapping[str, float]) -> float:
  """Which checkpoint is best: that of most right answers, or of least held-out loss."""
  for name in ("pass@1", "accuracy"):
    if name in scalars:
      return scalars[name]
  return -scalars["held_out_loss"]


def started(config: fields.Config) -> tuple[fields.Config, fields.Config]:
  """The configuration with one checkpoint as its start, and what that was saved with.

  A run that names "the latest" or "the best" means the one of that moment: it is written down, so
  that the run does not change with the run it began with.

  Raises:
    ValueError, FileNotFoundError: the run is not named, not there, or has no such checkpoint.
  """
  c = config.start
  fields.require(bool(c.workdir), "start.workdir is empty; give a trained run's")
  fields.require(not (c.best and c.step is not None), "start has a step and best: give one of them")
  step = c.step
  if step is None:
    with checkpoint.open_manager(checkpoints(c.workdir), create=False) as manager:
      step = checkpoint.best_step(manager, quality) if c.best else manager.latest_step()
  step = processes.from_first(step)  # the other run may go on meanwhile
  saved = saved_config(c.workdir, step)
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.start.update(step=step, best=False)
  return config.lock(), saved


def resumed(config: fields.Config, workdir: str) -> fields.Config:
  """The configuration with the start that the run in the workdir has, if it has one and they agree.

  For a command that is given again: "the latest" may be another checkpoint by now.
  """
  if not config.get("start") or "workdir" not in config.start or config.start.step is not None:
    return config
  try:
    saved = saved_config(workdir)
  except FileNotFoundError:
    return config
  if not saved.get("start") or saved.start.workdir != config.start.workdir:
    return config
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.start.update(step=saved.start.step, best=saved.start.best)
  return config.lock()
