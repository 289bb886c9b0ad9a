"""Verifiers in processes of their own: one that hangs, dies or floods costs its sample only.

    with workers.workers(task.verify, num_workers=2, timeout=5.0) as verify:
      verdicts = verify([(problem, response), ...])     # in order

A worker is a fresh Python process that imports what the verifier needs and nothing else: no jax,
not the program's main module. What a verifier prints goes nowhere; its verdict comes back as a line
of JSON over a socket. A worker that is late, silent or garbled is killed with its process group,
and another takes its place while the rest go on. (It is no sandbox: what a verifier runs has the
rights of the program.)
"""

import contextlib
import ctypes
import dataclasses
import json
import os
import pickle
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from . import base

Verify = Callable[[base.Problem, str], base.Verification]
VerifyAll = Callable[[Sequence[tuple[base.Problem, str]]], list[base.Verification]]

FAULT = "verifier: "  # how the reason begins where the verifier, not the response, is at fault
_START_SECONDS = 60.0  # for a worker to import what it needs
_REASON_LENGTH = 1_000  # characters of a reason that are kept
_MOST_BYTES = 65_536  # of an answer


@dataclasses.dataclass(eq=False)
class _Worker:
  process: subprocess.Popen
  channel: socket.socket
  late: float  # when it is, with what it is doing
  started: bool = False
  index: int | None = None  # of the response it verifies
  received: bytes = b""


@contextlib.contextmanager
def workers(
  verify: Verify, *, num_workers: int = 2, timeout: float = 5.0, max_memory: int = 2**31
) -> Iterator[VerifyAll]:
  """Within it, a function that verifies many responses, `num_workers` at a time.

  A response whose verifier takes longer than `timeout`, raises, dies, or returns no Verification is
  not correct, for a reason that begins with `FAULT`; the others are not concerned.

  Args:
    verify: what can be pickled, such as a function of a module.
    num_workers: processes.
    timeout: seconds for one response.
    max_memory: bytes of address space that a worker may have.

  Raises:
    ValueError: no worker or no time; a verifier that cannot be pickled.
    RuntimeError: a worker cannot start, as is known when `verify` is called.
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
    for _ in range(num_workers):
      pool.append(start())
    yield lambda pairs: _verify_all(pool, start, pairs, timeout)
  finally:
    for worker in pool:
      _stop(worker)


def _start(pickled: bytes, max_memory: int) -> _Worker:
  ours, theirs = socket.socketpair()
  with theirs:
    process = subprocess.Popen(
      [sys.executable, "-m", __name__, str(theirs.fileno()), str(max_memory)],
      pass_fds=[theirs.fileno()],
      stdin=subprocess.DEVNULL,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
      start_new_session=True,  # so that what it starts can be killed with it
    )
  worker = _Worker(process, ours, time.monotonic() + _START_SECONDS)
  _send(worker, pickled)
  return worker


def _stop(worker: _Worker) -> None:
  worker.channel.close()
  if worker.process.returncode is None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
      os.killpg(worker.process.pid, signal.SIGKILL)
  worker.process.wait()


def _send(worker: _Worker, message: bytes) -> None:
  worker.channel.settimeout(_START_SECONDS)
  with contextlib.suppress(OSError):  # it died: what it does not answer is its fault
    worker.channel.sendall(struct.pack("!Q", len(message)) + message)
  worker.channel.setblocking(False)


def _verify_all(pool, start, pairs, timeout) -> list[base.Verification]:
  """Gives responses to whoever is free, until each has a verdict."""
  verdicts: dict[int, base.Verification] = {}
  waiting = list(range(len(pairs)))[::-1]
  try:
    while len(verdicts) < len(pairs):
      for worker in pool:
        if waiting and worker.started and worker.index is None:
          worker.index, worker.late = waiting.pop(), time.monotonic() + timeout
          _send(worker, pickle.dumps((worker.index, *pairs[worker.index])))
      awaited = [worker for worker in pool if not worker.started or worker.index is not None]
      left = min(worker.late for worker in awaited) - time.monotonic()
      select.select([worker.channel for worker in awaited], [], [], max(left, 0))
      for worker in awaited:
        fault = _heard(worker, verdicts, timeout)
        if fault:
          if not worker.started:
            raise RuntimeError(f"A verifier's process {fault} before it had started.")
          verdicts[worker.index] = base.Verification(False, FAULT + fault)
          _stop(worker)
          pool[pool.index(worker)] = start()
  except BaseException:  # whoever is busy would answer the next call
    for slot, worker in enumerate(pool):
      if worker.started and worker.index is not None:
        _stop(worker)
        pool[slot] = start()
    raise
  return [verdicts[index] for index in range(len(pairs))]


def _heard(worker: _Worker, verdicts: dict[int, base.Verification], timeout: float) -> str:
  """Reads what a worker has said, without waiting; what is wrong with it, "" if nothing is."""
  ended = False
  with contextlib.suppress(BlockingIOError):
    try:
      part = worker.channel.recv(_MOST_BYTES)
      worker.received, ended = worker.received + part, not part
    except ConnectionError:
      ended = True
  line, newline, worker.received = worker.received.partition(b"\n")
  if newline:
    return _taken(worker, line, verdicts)
  worker.received = line
  if ended:
    return _death(worker)
  if len(line) > _MOST_BYTES:
    return "answered what is no verdict"
  return f"took longer than {timeout:g} s" if time.monotonic() >= worker.late else ""


def _taken(worker, line, verdicts) -> str:
  """Notes the verdict, or that the worker has started."""
  try:
    index, correct, reason = json.loads(line)
    if index != worker.index or not isinstance(reason, str):
      return "answered what is no verdict"
  except (ValueError, TypeError):
    return "answered what is no verdict"
  if not worker.started:
    if reason:
      return f"failed ({reason})"
    worker.started, worker.late = True, float("inf")
    return ""
  verdicts[index] = base.Verification(bool(correct), reason)
  worker.index = None
  return ""


def _death(worker: _Worker) -> str:
  with contextlib.suppress(subprocess.TimeoutExpired):
    status = worker.process.wait(timeout=0.5)
    names = {number.value: number.name for number in signal.Signals}
    how = f"status {status}" if status >= 0 else names.get(-status, f"signal {-status}")
    return f"died ({how})"
  return "closed its socket"


def _verdict(verify: Verify, problem: base.Problem, response: str) -> base.Verification:
  """What the verifier says, or what is wrong with it."""
  try:
    found = verify(problem, response)
    return base.Verification(bool(found.correct), str(found.reason)[:_REASON_LENGTH])
  except Exception as error:
    return base.Verification(False, f"{FAULT}{type(error).__name__}: {error}"[:_REASON_LENGTH])


def _received(channel: socket.socket) -> bytes:
  """The next message; EOFError where there is none."""

  def exactly(count):
    found = b""
    while len(found) < count:
      part = channel.recv(count - len(found))
      if not part:
        raise EOFError
      found += part
    return found

  return exactly(*struct.unpack("!Q", exactly(8)))


def _limit(max_memory: int) -> None:
  """Memory; and on Linux, death with the program, even one that is killed."""
  _, hard = resource.getrlimit(resource.RLIMIT_AS)
  most = max_memory if hard == resource.RLIM_INFINITY else min(max_memory, hard)
  resource.setrlimit(resource.RLIMIT_AS, (most, hard))
  if sys.platform == "linux":
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _serve(channel: socket.socket, max_memory: int) -> None:
  """A worker's whole life."""
  say = lambda *message: channel.sendall(json.dumps(message).encode() + b"\n")
  try:
    _limit(max_memory)
    verify = pickle.loads(_received(channel))
  except Exception as error:
    say(None, False, f"{type(error).__name__}: {error}"[:_REASON_LENGTH])
    return
  say(None, True, "")
  with contextlib.suppress(EOFError):
    while True:
      index, problem, response = pickle.loads(_received(channel))
      say(index, *_verdict(verify, problem, response))


if __name__ == "__main__":
  _serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
