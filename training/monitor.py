"""What a run costs while it runs: where its time goes, memory, and a trace of some steps."""

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from . import chips


class Stopwatch:
  """Speeds of training, between one call of `rates` and the next.

  A window ends with `rates`, called when the device has done all that it was given, as the loop
  does when it writes. Evaluation and saving are taken out of it by `aside`. The first window begins
  when step 1 is done, so it has no compilation.
  """

  def __init__(
    self,
    *,
    flops: Callable[[Any], float] | None = None,
    devices: Sequence[jax.Device] | None = None,
    shares: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
  ):
    """Starts outside any window.

    Args:
      flops: (batch) -> those of a step on all devices (`cost.flops`), asked once, of the first
        batch; None leaves their utilisation out.
      devices: that train, of one kind; None is all.
      shares: of how many like it a batch of numpy arrays is one, None is of all processes'. An
        array of JAX is the whole.
      clock: seconds.
    """
    devices = jax.devices() if devices is None else devices
    peak = chips.peak_flops(devices[0].device_kind)
    self._flops = flops if peak else None
    self._peak, self._per_step = (peak or 0.0) * len(devices), None
    self._shares = jax.process_count() if shares is None else shares
    self._clock = clock
    self._open(None, np.zeros(3))

  def _open(self, began: float | None, counts: np.ndarray) -> None:
    self._began, self._counts, self._aside, self._waited = began, counts, 0.0, 0.0

  def batches(self, batches: Iterable[Any]) -> Iterator[Any]:
    """The same batches; how long each was waited for is noted, and what is in it."""
    batches, asked, counts = iter(batches), 0, np.zeros(3)
    while True:
      asked, began = asked + 1, self._clock()
      if self._began is None and asked == 3:  # the loop has waited for step 1, step 2 is under way
        self._open(began, counts)
      try:
        batch = next(batches)
      except StopIteration:
        return
      self._waited += self._clock() - began
      if self._flops is not None and self._per_step is None:
        self._per_step = self._flops(batch)
      counts = _counts(batch, self._shares)
      self._counts = self._counts + counts
      yield batch

  def aside(self, action: Callable[..., Any]) -> Callable[..., Any]:
    """The same action, whose time is not training's."""

    def timed(*args):
      began = self._clock()
      try:
        return action(*args)
      finally:
        self._aside += self._clock() - began

    return timed

  def rates(self, scalars: Mapping[str, float] | None = None) -> dict[str, float]:
    """The window's speeds, by name; begins the next. Of the first step alone there are none.

    Names are speed/ and steps_per_second; examples_per_second; tokens_per_second, of every token in
    leaves called "tokens", padding too; weight_per_second, of the weight in `scalars`, the last
    step's, as if all had it; data_wait, the share of time spent waiting for batches; mfu, the FLOPs
    done as a share of the devices' peak in bfloat16, where flops were given and the peak is known.
    """
    now, began = self._clock(), self._began
    seconds = 0.0 if began is None else now - began - self._aside
    found = self._found(seconds, scalars or {}) if seconds > 0 else {}
    self._open(now, np.zeros(3))
    return {f"speed/{name}": float(value) for name, value in found.items()}

  def _found(self, seconds, scalars):
    steps, examples, tokens = self._counts / seconds
    found = {"steps_per_second": steps, "examples_per_second": examples}
    if tokens:
      found["tokens_per_second"] = tokens
    if "weight" in scalars:
      found["weight_per_second"] = steps * scalars["weight"]
    found["data_wait"] = self._waited / seconds
    if self._per_step is not None:
      found["mfu"] = steps * self._per_step / self._peak
    return found


def _counts(batch: Any, shares: int) -> np.ndarray:
  """(1, examples, tokens) of the whole batch; see `Stopwatch`."""
  leaves = jax.tree.leaves_with_path(batch)
  whole = lambda x: 1 if isinstance(x, jax.Array) else shares
  name = lambda path: jax.tree_util.keystr(path[-1:], simple=True)
  tokens = sum(np.size(x) * whole(x) for path, x in leaves if name(path) == "tokens")
  rows = [np.shape(x)[0] * whole(x) for _, x in leaves[:1] if np.ndim(x)]
  return np.array([1, sum(rows), tokens], float)


def memory(devices: Sequence[jax.Device] | None = None) -> dict[str, float]:
  """Bytes in use, and the most there were, on the fullest of this process's devices.

  Names are memory/in_use and memory/peak; there are none where the backend does not say (CPU).
  """
  devices = jax.local_devices() if devices is None else devices
  stats = [found for device in devices if (found := device.memory_stats())]
  names = {"in_use": "bytes_in_use", "peak": "peak_bytes_in_use"}
  return {
    f"memory/{ours}": float(max(found[theirs] for found in stats))
    for ours, theirs in names.items()
    if stats and all(theirs in found for found in stats)
  }


@contextlib.contextmanager
def profiled(
  step: Callable[..., Any],
  directory: str | os.PathLike,
  *,
  first: int = 10,
  last: int = 13,
  done: int = 0,
) -> Iterator[Callable[..., Any]]:
  """Yields the same step, some of whose calls are traced into the directory.

  What was dispatched before is waited for, and what is traced is too, so that the trace has the
  steps `first` to `last` whole and no other, each annotated by its number. xprof and TensorBoard
  read the directory, Perfetto the *.trace.json.gz in it.

  Args:
    step: (...) -> anything.
    directory: made when missing.
    first: call that is traced first, counted from 1.
    last: call that is traced last; when the context ends before, the trace ends with it.
    done: steps made before the first call, for the annotations' numbers.

  Raises:
    ValueError: not 1 <= first <= last.
  """
  if not 1 <= first <= last:
    raise ValueError(f"profile steps {first} to {last}: give 1 <= first <= last.")
  count, tracing = 0, contextlib.ExitStack()

  def traced(*args):
    nonlocal count
    count += 1
    if count == first:
      jax.block_until_ready(args)
      tracing.enter_context(jax.profiler.trace(os.fspath(directory)))
    if not first <= count <= last:
      return step(*args)
    with jax.profiler.StepTraceAnnotation("train", step_num=done + count):
      out = step(*args)
    if count == last:
      jax.block_until_ready(out)
      tracing.close()
    return out

  with tracing:
    yield traced
  if count < first:
    logging.warning("no profile: the run ended after %d steps, before step %d", count, first)
