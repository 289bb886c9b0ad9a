"""Checkpoints: orbax's CheckpointManager, a seal on every value, and a way back from a bad one.

A step directory holds two items: `state`, the leaves of the train state under their paths
("params/layers/mlp/up/kernel"), and `record`, a JSON object with the step, the configuration, the
metrics, the position of the data iterator of each process, and per leaf its shape, dtype and
checksum. The record carries its own SHA-256. What is restored is what was saved, or it is an error:
orbax does not see a flipped bit in array data. Leaves are stored by path, so part of a state (the
parameters, or their average) restores without the structure of the rest (the optimiser).
"""

import contextlib
import dataclasses
import gc
import hashlib
import json
import logging as std_logging
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from . import fingerprint, record

Manager = ocp.CheckpointManager
MismatchError = record.MismatchError
CorruptCheckpointError = record.CorruptCheckpointError
check_config = record.check_config
Score = Callable[[Mapping[str, float]], float]


class Restored(NamedTuple):
  """What was found: the step, the train state (or part of it), data position, configuration."""

  step: int
  state: Any
  data_state: Any
  config: Any


def _is_key(leaf: Any) -> bool:
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_impl(dtype: Any) -> str:
  impls = ("threefry2x32", "rbg", "unsafe_rbg")
  return next(i for i in impls if jax.random.key(0, impl=i).dtype == dtype)


def _paths(tree: Any, prefix: str = "") -> list[str]:
  names = (
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, _ in jax.tree.leaves_with_path(tree)
  )
  return ["/".join(filter(None, (prefix, name))) for name in names]


def _plain(leaf: Any) -> jax.Array:
  """The leaf as orbax stores it: typed keys by their data, numbers as arrays."""
  leaf = leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)
  return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _plain_shape(leaf: Any) -> jax.ShapeDtypeStruct:
  leaf = leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
  sharding = getattr(leaf, "sharding", None)
  shape = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
  shape = jax.eval_shape(jax.random.key_data, shape) if _is_key(shape) else shape
  sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def _checksums(leaves: Mapping[str, jax.Array]) -> dict[str, int]:
  # One program: of leaves that are split, each sum is a collective, and devices that CPU threads
  # stand for may wait for one another's forever where many are under way.
  sums = jax.device_get(_all_checksums(dict(leaves)))
  return {path: int(value) for path, value in sums.items()}


@jax.jit
def _all_checksums(leaves):
  return jax.tree.map(fingerprint.checksum, leaves)


def digest(tree: Any) -> str:
  """16 digits that say which arrays these are, wherever they are: of their checksums by path."""
  leaves = dict(zip(_paths(tree), map(_plain, jax.tree.leaves(tree)), strict=True))
  return hashlib.sha256(json.dumps(_checksums(leaves)).encode()).hexdigest()[:16]


def _score(directory: epath.Path, step: int, best: Score, metrics: Any = None) -> float:
  """The score of one checkpoint; minus infinity when it is NaN or cannot be read."""
  try:
    metrics = record.read(directory, step)["metrics"] if metrics is None else metrics
    value = float(best(metrics))
  except (OSError, ValueError, LookupError, TypeError):
    return -math.inf
  return -math.inf if math.isnan(value) else value


@dataclasses.dataclass(frozen=True)
class _BestN:
  """Preserves the n checkpoints of highest score; of equal ones the earliest."""

  directory: epath.Path
  best: Score
  n: int

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    """One flag per checkpoint."""
    del context
    values = [_score(self.directory, c.step, self.best, c.metrics) for c in checkpoints]
    order = sorted(range(len(values)), key=lambda i: -values[i])
    kept = {i for i in order[: self.n] if values[i] > -math.inf}
    return [i in kept for i in range(len(values))]


def open_manager(
  directory: epath.PathLike,
  *,
  keep: int = 3,
  keep_best: int = 1,
  best: Score | None = None,
  create: bool = True,
) -> Manager:
  """The checkpoints in a directory; use in a `with`, or `close` it: saving is asynchronous.

  Args:
    directory: one folder per step, named by it.
    keep: how many of the latest checkpoints to keep.
    keep_best: how many of the best to keep besides.
    best: score of the metrics given to `save`, higher is better; None: none is best.
    create: make the directory, and clear what an interrupted save left; False only to look.

  Raises:
    FileNotFoundError: no such directory, and `create` is False.
  """
  directory = epath.Path(directory).absolute()
  if not create and not directory.is_dir():
    raise FileNotFoundError(f"no checkpoint directory {directory}: train first, or fix the path")
  policies = [checkpoint_managers.LatestN(keep)]
  if best is not None:
    policies.append(_BestN(directory, best, keep_best))
  options = ocp.CheckpointManagerOptions(
    preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
    create=create,
    cleanup_tmp_directories=create,
  )
  return Manager(directory, options=options)


def _set_aside(manager: Manager, steps: Sequence[int]) -> None:
  """Renames step directories that a new save would collide with; deletes nothing."""
  if not steps:
    return
  manager.wait_until_finished()
  if jax.process_index() == 0:
    for step in steps:
      names = (f"{step}.set_aside_{n}" for n in range(10**6))
      target = next(manager.directory / n for n in names if not (manager.directory / n).exists())
      logging.warning("checkpoint %s is set aside as %s", manager.directory / str(step), target)
      (manager.directory / str(step)).rename(target)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("set_aside")
  manager.reload()


def save(
  manager: Manager,
  step: int,
  state: Any,
  data_state: Any = None,
  config: Any = None,
  metrics: Mapping[str, float] | None = None,
) -> None:
  """Saves in the background; the arrays may be donated or overwritten once this returns.

  Checkpoints at this or later steps belong to a run that was wound back (or are corrupt, which is
  why it was): they are renamed, not deleted. Every process has to call this.

  Args:
    manager: from `open_manager`.
    step: the number of steps taken.
    state: pytree of arrays, typed keys and numbers.
    data_state: JSON; the position of this process's data iterator.
    config: JSON; returned by `restore` and `load_config`.
    metrics: numbers by name, for the score of the best.
  """
  step = int(step)
  _set_aside(manager, [s for s in manager.all_steps() if s >= step])
  leaves = dict(zip(_paths(state), map(_plain, jax.tree.leaves(state)), strict=True))
  sums = _checksums(leaves)
  metrics = None if metrics is None else {k: float(v) for k, v in metrics.items()}
  content = {
    "step": step,
    "config": config,
    "metrics": metrics,
    "data": record.from_all_processes(data_state),
    "leaves": {p: [list(x.shape), str(x.dtype), sums[p]] for p, x in leaves.items()},
  }
  sealed = ocp.args.JsonSave(record.seal(content))
  items = ocp.args.Composite(state=ocp.args.PyTreeSave(leaves), record=sealed)
  manager.save(step, args=items, metrics=metrics, force=True)


def _match(saved: Mapping[str, list], wanted: Mapping[str, jax.ShapeDtypeStruct], where: str):
  """Raises at the first leaf that differs in path, shape or dtype."""
  fix = "use the configuration that it was saved with"
  for path, leaf in wanted.items():
    if path not in saved:
      raise record.MismatchError(f"{where} has no leaf {path} {leaf.shape} {leaf.dtype}: {fix}")
    shape, dtype, _ = saved[path]
    if (tuple(shape), dtype) != (leaf.shape, str(leaf.dtype)):
      raise record.MismatchError(
        f"{where} has leaf {path} as {tuple(shape)} {dtype} where {leaf.shape} {leaf.dtype} "
        f"is wanted: {fix}"
      )


def _match_all(saved: Mapping[str, list], wanted: Mapping[str, Any], where: str) -> None:
  _match(saved, wanted, where)
  for path, (shape, dtype, _) in saved.items():
    if path not in wanted:
      raise record.MismatchError(
        f"{where} has leaf {path} {tuple(shape)} {dtype}, which this state lacks: "
        "use the configuration that it was saved with"
      )


def _read_leaves(
  manager: Manager, step: int, saved: Mapping[str, list], wanted: Mapping[str, Any]
) -> list[jax.Array]:
  """Reads the wanted leaves into their shardings and verifies every checksum."""
  placed = {
    path: ocp.ArrayRestoreArgs(sharding=s.sharding, global_shape=s.shape, dtype=s.dtype)
    for path, s in wanted.items()
  }
  arguments = ocp.args.PyTreeRestore(item=dict(wanted), restore_args=placed, partial_restore=True)
  leaves = manager.restore(step, args=ocp.args.Composite(state=arguments)).state
  for path, value in _checksums(leaves).items():
    if value != saved[path][2]:
      raise record.CorruptCheckpointError(f"leaf {path} does not match its checksum")
  return [leaves[path] for path in wanted]


def _everywhere(ok: bool) -> bool:
  if jax.process_count() == 1:
    return ok
  return bool(multihost_utils.process_allgather(np.asarray(ok)).all())


@contextlib.contextmanager
def _quiet():
  """Keeps the tasks that a failed read leaves behind from filling the terminal with tracebacks."""
  asyncio_log, hook = std_logging.getLogger("asyncio"), sys.unraisablehook
  level = asyncio_log.level
  asyncio_log.setLevel(std_logging.CRITICAL + 1)
  sys.unraisablehook = lambda unraisable: None
  try:
    yield
  finally:
    asyncio_log.setLevel(level)
    sys.unraisablehook = hook


def _attempt(read: Callable[[int], Restored], step: int) -> tuple[Restored | None, str]:
  with _quiet():
    try:
      return read(step), ""
    except (record.MismatchError, MemoryError, PermissionError):
      raise  # these say nothing of the bytes
    except Exception as e:  # whatever the storage stack makes of bad bytes
      error = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
    time.sleep(0.05)  # lets the reads under way end, so that what they raise is dropped here
    gc.collect()
  return None, error


def _newest_good(manager: Manager, step: int | None, read: Callable[[int], Restored]) -> Restored:
  """`read` of the newest step at which it succeeds on every process, or of the one asked for."""
  manager.wait_until_finished()
  steps = sorted(manager.all_steps(), reverse=True)
  for path in manager.directory.iterdir():
    if path.name.isdigit() and int(path.name) not in steps:
      logging.warning("checkpoint %s was never completed and is skipped", path)
  if not steps or (step is not None and step not in steps):
    which = "no checkpoint" if step is None else f"no checkpoint of step {step}"
    raise FileNotFoundError(
      f"{which} in {manager.directory} (steps: {steps[::-1]}): train first, or fix path or step"
    )
  failures = []
  for candidate in steps if step is None else [step]:
    found, error = _attempt(read, candidate)
    if _everywhere(found is not None):
      return found
    failures.append(f"{manager.directory / str(candidate)} ({error or 'bad on another process'})")
    logging.warning("checkpoint %s is corrupt and is skipped", failures[-1])
  raise record.CorruptCheckpointError(
    f"no usable checkpoint: {'; '.join(failures)}: restore a backup or train anew in a new folder"
  )


def _restore(manager: Manager, abstract: Any, prefix: str, step: int | None, match) -> Restored:
  leaves, treedef = jax.tree.flatten(abstract)
  wanted = dict(zip(_paths(abstract, prefix), map(_plain_shape, leaves), strict=True))

  def read(step):
    content = record.read(manager.directory, step)
    match(content["leaves"], wanted, f"checkpoint {manager.directory / str(step)}")
    values = _read_leaves(manager, step, content["leaves"], wanted)
    for i, leaf in enumerate(leaves):
      if hasattr(leaf, "dtype") and _is_key(leaf):
        values[i] = jax.random.wrap_key_data(values[i], impl=_key_impl(leaf.dtype))
    state = jax.tree.unflatten(treedef, values)
    data_state = record.on_this_process(content["data"])
    return Restored(step, state, data_state, content["config"])

  return _newest_good(manager, step, read)


def restore(manager: Manager, abstract_state: Any, step: int | None = None) -> Restored:
  """The newest checkpoint that is sound, bit for bit what was saved; nothing on disk changes.

  A corrupt one is named in a warning and passed over, unless it was asked for by `step`.

  Args:
    manager: from `open_manager`.
    abstract_state: `jax.eval_shape` of the state (or a state); leaves are placed by its shardings.
    step: take this step, or fail.

  Raises:
    FileNotFoundError: there is no checkpoint, or none of this step.
    MismatchError (a ValueError): paths, shapes or dtypes are not those of `abstract_state`.
    CorruptCheckpointError (a ValueError): all are corrupt; names each.
  """
  return _restore(manager, abstract_state, "", step, _match_all)


def restore_part(manager: Manager, abstract: Any, prefix: str, step: int | None = None) -> Restored:
  """The subtree of a state at `prefix` ("params", "average"), as `restore` does the whole of it.

  Reads nothing else, so the structure of the optimiser need not be known.
  """
  return _restore(manager, abstract, prefix, step, _match)


def load_config(directory: epath.PathLike, step: int | None = None) -> Any:
  """The configuration saved with the newest readable checkpoint, or with that of `step`."""
  with open_manager(directory, create=False) as manager:

    def read(step):
      return Restored(step, None, None, record.read(manager.directory, step)["config"])

    return _newest_good(manager, step, read).config


def best_step(manager: Manager, best: Score) -> int:
  """The step of highest score under `best`; FileNotFoundError when none has one."""
  manager.wait_until_finished()
  scores = {step: _score(manager.directory, step, best) for step in manager.all_steps()}
  scores = {step: value for step, value in scores.items() if value > -math.inf}
  if not scores:
    raise FileNotFoundError(f"no checkpoint with a score in {manager.directory}: save metrics")
  return max(scores, key=scores.get)
