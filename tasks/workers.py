"""Verifiers in processes of their own: one that hangs, dies or floods costs its sample only.

    with workers.workers(task.verify, num_workers=2, timeout=5.0) as verify:
      verdicts = verify([(problem, response), ...])     # in order

A worker is a fresh Python process that imports what the verifier needs and nothing else: no jax,
not the program's main module. It answers over a pipe of its own; what a verifier prints goes
nowhere. One that is late is killed with all it started, and another takes its place.
"""

import contextlib
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from typing import NamedTuple

from . import base

Verify = Callable[[base.Problem, str], base.Verification]
VerifyAll = Callable[[Sequence[tuple[base.Problem, str]]], list[base.Verification]]

_START_SECONDS = 60.0  # for a worker to import what it needs
_REASON_LENGTH = 1_000  # characters of a reason that are kept


class _Worker(NamedTuple):
  process: subprocess.Popen
  pipe: connection.Connection


@contextlib.contextmanager
def workers(
  verify: Verify, *, num_workers: int = 2, timeout: float = 5.0, max_memory: int = 2**31
) -> Iterator[VerifyAll]:
  """Within it, a function that verifies many responses, `num_workers` at a time.

  A response whose verifier takes longer than `timeout`, raises, dies, or returns no Verification is
  not correct, for a reason that begins with "verifier: "; the others are not concerned.

  Args:
    verify: what can be pickled, such as a function of a module.
    num_workers: processes.
    timeout: seconds for one response.
    max_memory: bytes of address space that a worker may have.

  Raises:
    ValueError: no worker or no time; a verifier that cannot be pickled.
    RuntimeError: a worker cannot start.
  """
  if num_workers < 1 or not timeout > 0:
    raise ValueError(f"{num_workers=} is at least 1 and {timeout=} above 0.")
  try:
    pickled = pickle.dumps(verify)
  except (pickle.PicklingError, AttributeError, TypeError) as error:
    raise ValueError(f"A verifier has to be a function of a module: {error}.") from None
  start = lambda: _start(pickled, max_memory)
  pool: list[_Worker] = []
  try:
    pool += [start() for _ in range(num_workers)]
    for worker in pool:
      _await(worker)
    yield lambda pairs: _verify_all(pool, start, pairs, timeout)
  finally:
    for worker in pool:
      _stop(worker)


def _start(pickled: bytes, max_memory: int) -> _Worker:
  ours, theirs = multiprocessing.Pipe()
  process = subprocess.Popen(
    [sys.executable, "-m", __name__, str(theirs.fileno()), str(max_memory)],
    pass_fds=[theirs.fileno()],
    stdin=subprocess.DEVNULL,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
    start_new_session=True,  # so that what it starts can be killed with it
  )
  theirs.close()
  ours.send_bytes(pickled)
  return _Worker(process, ours)


def _await(worker: _Worker) -> None:
  fault = "it did not start"
  with contextlib.suppress(EOFError, OSError):
    if worker.pipe.poll(_START_SECONDS):
      fault = worker.pipe.recv()
  if fault:
    raise RuntimeError(f"A verifier's process: {fault}.")


def _stop(worker: _Worker) -> None:
  worker.pipe.close()
  with contextlib.suppress(ProcessLookupError):
    os.killpg(worker.process.pid, signal.SIGKILL)
  worker.process.wait()


def _verify_all(pool, start, pairs, timeout) -> list[base.Verification]:
  verdicts: list[base.Verification | None] = [None] * len(pairs)
  waiting = list(range(len(pairs)))[::-1]
  busy: dict[int, tuple[int, float]] = {}  # worker: which response, and when it is late

  def give(slot):
    if waiting:
      index = waiting.pop()
      busy[slot] = index, time.monotonic() + timeout
      try:
        pool[slot].pipe.send(pairs[index])
      except OSError:  # it died between two responses: the one before left it dying
        replace(slot)
        pool[slot].pipe.send(pairs[index])

  def replace(slot):
    _stop(pool[slot])
    pool[slot] = start()
    _await(pool[slot])

  for slot in range(len(pool)):
    give(slot)
  while busy:
    left = min(late for _, late in busy.values()) - time.monotonic()
    ready = connection.wait([pool[slot].pipe for slot in busy], max(left, 0))
    for slot, (index, late) in list(busy.items()):
      if pool[slot].pipe in ready:
        verdicts[index] = _answer(pool[slot])
      elif time.monotonic() >= late:
        verdicts[index] = _fault(f"took longer than {timeout:g} s")
      else:
        continue
      del busy[slot]
      if pool[slot].process.poll() is not None or pool[slot].pipe not in ready:
        replace(slot)
      give(slot)
  return verdicts


def _answer(worker: _Worker) -> base.Verification:
  try:
    return worker.pipe.recv()
  except (EOFError, OSError):
    status = worker.process.wait()
    how = signal.Signals(-status).name if status < 0 else f"status {status}"
    return _fault(f"died ({how})")


def _fault(text: str) -> base.Verification:
  return base.Verification(False, f"verifier: {text}")


def _verdict(verify: Verify, problem: base.Problem, response: str) -> base.Verification:
  """What the verifier says, or what is wrong with it."""
  try:
    found = verify(problem, response)
    return base.Verification(bool(found.correct), str(found.reason)[:_REASON_LENGTH])
  except Exception as error:
    return _fault(f"{type(error).__name__}: {error}"[:_REASON_LENGTH])


def _serve(pipe: connection.Connection, max_memory: int) -> None:
  """A worker's whole life."""
  try:
    verify = pickle.loads(pipe.recv_bytes())
    resource.setrlimit(resource.RLIMIT_AS, (max_memory, max_memory))
  except Exception as error:
    pipe.send(f"{type(error).__name__}: {error}")
    return
  pipe.send("")
  with contextlib.suppress(EOFError):
    while True:
      pipe.send(_verdict(verify, *pipe.recv()))


if __name__ == "__main__":
  _serve(connection.Connection(int(sys.argv[1])), int(sys.argv[2]))
