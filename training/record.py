"""The record beside a checkpoint's arrays: sealed JSON, and what a mismatch with it is called."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils


class CorruptCheckpointError(ValueError):
  """A checkpoint does not hold what was saved."""


class MismatchError(ValueError):
  """A checkpoint is sound but belongs to another state or configuration."""


def _digest(record: Any) -> str:
  return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def seal(record: Any) -> dict:
  """The record with its SHA-256, as JSON."""
  record = json.loads(json.dumps(record))  # as it will be read: no tuples, keys are strings
  return {"record": record, "sha256": _digest(record)}


def read(directory: epath.Path, step: int) -> dict:
  """The record of a step; CorruptCheckpointError, or what JSON raises, when it is damaged."""
  sealed = json.loads((directory / str(step) / "record" / "metadata").read_text())
  if sealed["sha256"] != _digest(sealed["record"]):
    raise CorruptCheckpointError("the record does not match its SHA-256")
  return sealed["record"]


def from_all_processes(data_state: Any) -> list:
  """Every process's data position, in the order of the process index."""
  if jax.process_count() == 1:
    return [data_state]
  text = np.frombuffer(json.dumps(data_state).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.asarray(len(text))).ravel()
  row = np.pad(text, (0, int(sizes.max()) - len(text)))
  rows = multihost_utils.process_allgather(row)
  return [json.loads(bytes(r[:n])) for r, n in zip(rows, sizes, strict=True)]


def on_this_process(data_states: Sequence) -> Any:
  """This process's data position among those saved."""
  if len(data_states) == jax.process_count():
    return data_states[jax.process_index()]
  if all(s == data_states[0] for s in data_states):  # random access: one position for all
    return data_states[0]
  raise MismatchError(
    f"data positions of {len(data_states)} processes do not fit {jax.process_count()}: "
    "resume on as many processes"
  )


def check_config(saved: Any, current: Any, *, ignore: Sequence[str] = (), path: str = "") -> None:
  """Raises MismatchError naming the first field, by its dotted path, that differs.

  Args:
    saved: JSON, from a checkpoint.
    current: JSON, of this run.
    ignore: dotted paths of fields, or of their parents, that may differ.
    path: of the objects compared.
  """
  if path in ignore or saved == current:
    return
  if isinstance(saved, dict) and isinstance(current, dict):
    for key in sorted(saved.keys() | current.keys()):
      inner = f"{path}.{key}" if path else key
      absent = "(absent)"
      check_config(saved.get(key, absent), current.get(key, absent), ignore=ignore, path=inner)
    return
  raise MismatchError(
    f"config.{path} is {json.dumps(current)} but the checkpoint has {json.dumps(saved)}: "
    "set it back, or use a new workdir"
  )
