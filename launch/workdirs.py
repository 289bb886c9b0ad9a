"""Where a run keeps its checkpoints, and the configuration saved with them."""

from ..training import checkpoint
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
