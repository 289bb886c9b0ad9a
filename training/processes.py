"""The processes of one run: a barrier that names who is missing, and one word for all.

With a single process, each of these does nothing.
"""

import contextlib
import itertools
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

_CALLS = itertools.count()  # of all runs of the process: the service's count never restarts


class MissingProcessError(RuntimeError):
  """Some processes did not come to a barrier in time."""


def barrier(name: str, *, timeout: float) -> None:
  """Waits for all processes.

  Args:
    name: the same on all, and never used twice.
    timeout: seconds.

  Raises:
    MissingProcessError: names those that did not come.
  """
  if jax.process_count() == 1:
    return
  try:
    ocp.multihost.get_barrier_sync_fn()(key=name, timeout_ms=round(1000 * timeout))
  except jax.errors.JaxRuntimeError as error:
    found = re.search(r"task names?:\s*((?:\d+\s)+)", str(error))
    who = ", ".join(found[1].split()) if found else f"unknown ({' '.join(str(error).split())})"
    raise MissingProcessError(
      f"Not all of {jax.process_count()} processes came to {name!r} within {timeout:g} s. Missing "
      f"(by --process_id): {who}. See what they printed last."
    ) from None


@contextlib.contextmanager
def together(name: str, *, timeout: float) -> Iterator[None]:
  """What fails within it on one process, fails with the name of those that are gone.

  Where a process is killed, the others' sums over devices fail at once, or hang. Neither says who.
  JAX's coordination service does when it has heard nothing for its heartbeat time-out, and ends
  every process with "The following tasks are unhealthy"; so a failing process waits for that. If
  the process that leads is killed, 0, it ends them at once: "the leader task was preempted / died".

  Args:
    name: of what is done, never used twice.
    timeout: seconds, above that of the heartbeat.

  Raises:
    MissingProcessError: others are there but hang, or run on; its cause is what failed here.
  """
  try:
    yield
  except Exception as error:
    if jax.process_count() > 1:  # the service may end this process before it can raise
      print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    try:
      barrier(f"the end of {name}", timeout=timeout)
    except MissingProcessError as missing:
      raise missing from error
    raise


def from_first(value: Any) -> Any:
  """The JSON value that process 0 has, on all."""
  if jax.process_count() == 1:
    return value
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  size = int(multihost_utils.broadcast_one_to_all(np.asarray(len(text))))
  row = np.zeros(size, np.uint8)
  if jax.process_index() == 0:
    row = text
  return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(row))))


@contextlib.contextmanager
def signals() -> Iterator[Callable[[], str | None]]:
  """Within it, SIGTERM and SIGINT are only noted; yields a function: the name of what came, if any.

  The first says so on standard error. A second one is taken as impatience: KeyboardInterrupt. Of
  several processes one is enough: at the same call, the function says the same to all, who have to
  call it alike. JAX notes the signal there, within a second or so.
  """
  caught: list[str] = []
  several = jax.process_count() > 1

  def note(number, frame):
    del frame
    if caught:
      raise KeyboardInterrupt
    caught.append(signal.Signals(number).name)
    text = f"\n{caught[0]}: finishing this step, then saving; once more stops without saving\n"
    os.write(2, text.encode())  # print is not safe in a handler
    if several:
      signal.raise_signal(signal.SIGTERM)

  def among_all():
    return "SIGTERM" if multihost_utils.reached_preemption_sync_point(next(_CALLS)) else None

  names = ("SIGINT",) if several else ("SIGTERM", "SIGINT")
  previous = {name: signal.signal(getattr(signal, name), note) for name in names}
  try:
    yield among_all if several else lambda: caught[0] if caught else None
  finally:
    for name, handler in previous.items():
      signal.signal(getattr(signal, name), handler)
