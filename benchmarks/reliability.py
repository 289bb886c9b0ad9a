"""Runs that are killed again and again, beside the same runs left alone: nothing may differ.

  JAX_PLATFORMS=cpu python -m ancestral.benchmarks.reliability --kills=20 --folder=runs/reliability

Each run is `launch.train` in processes of its own: once whole, and once killed (SIGKILL) at drawn
moments and started again by the same command until it is done. Of the moments half lie within the
writing of a checkpoint: the process is stopped, seen to have a temporary folder, and killed. A
seventh lie in the start, the rest anywhere. Three runs:

  alone      one process, dropout, an average, microbatches; a checkpoint every other step
  two        two processes over loopback, one of which is killed; the other has to end by itself
  learning   from its own verified samples, by GRPO; a checkpoint every round

Compared are the files of metrics and rollouts, byte for byte, and every leaf of the last state and
the data's position, bit for bit. Steps made again are counted after each kill: they are those made
since the newest complete checkpoint. FOLDER gets the runs and result.json.
"""

import contextlib
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint
import rich.console
import rich.table
from absl import app, flags, logging

from ancestral.benchmarks import decode_hf
from ancestral.launch import experiment, workdirs
from ancestral.models import partition
from ancestral.training import checkpoint, metrics

_FOLDER = flags.DEFINE_string("folder", None, "For the runs; new or empty.", required=True)
_KILLS = flags.DEFINE_integer("kills", 20, "Of the run of one process.", lower_bound=0)
_KILLS_OF_TWO = flags.DEFINE_integer("kills_of_two", 4, "Of one of two processes.", lower_bound=0)
_KILLS_LEARNING = flags.DEFINE_integer("kills_learning", 4, "Of learning.", lower_bound=0)
_DRAWN_BY = flags.DEFINE_integer("moments", 0, "Seed of the moments.")

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"
SECONDS = 300.0  # for anything: the machine may be busy
HEARTBEAT = 10  # seconds of silence after which a process counts as lost

_EVALUATION = {"num_problems": 3, "num_samples": 2, "batch_size": 8}
_LANGUAGE = {
  "task": {"levels": (1,)},
  "model": {"num_layers": 1, "width": 32, "num_heads": 2, "dropout": 0.1},
  "optimizer": {"name": "adamw", "peak": 0.02},
  "evaluation": _EVALUATION,
}


class Case(NamedTuple):
  """A run, and how often it is killed."""

  name: str
  config: str
  fields: dict[str, dict]
  kills: int
  num_processes: int = 1
  files: tuple[str, ...] = ("metrics.jsonl",)  # that have to be the same

  @property
  def num_steps(self) -> int:
    """Of the whole run."""
    return self.fields["train"]["num_steps"]

  @property
  def arguments(self) -> list[str]:
    """Of `launch.train`."""
    fields = {f"{a}.{b}": value for a, part in self.fields.items() for b, value in part.items()}
    return [
      f"--config={CONFIGS / self.config}",
      *(f"--config.{name}={value}" for name, value in fields.items()),
    ]


class Kill(NamedTuple):
  """What a kill found, and what it cost."""

  moment: str  # starting, training or writing
  process: int
  began: int  # the step that the killed attempt went on from
  reached: int  # the last step in its metrics
  saved: int  # the newest complete checkpoint
  cut: bool  # a checkpoint was left half written
  orphans: int  # children that outlived it
  seconds: float  # until the other processes had ended

  @property
  def lost(self) -> int:
    """Steps that have to be made again."""
    return max(self.reached - self.saved, 0)


def reached(workdir: pathlib.Path) -> int:
  """The last step in the metrics."""
  path = workdir / "metrics.jsonl"
  lines = metrics.read_jsonl(path) if path.exists() else []
  return max((line["step"] for line in lines), default=0)


def saved(workdir: pathlib.Path) -> int:
  """The newest complete checkpoint: a folder gets its number when it is complete."""
  names = [path.name for path in (workdir / "checkpoints").glob("*")]
  return max((int(name) for name in names if name.isdigit()), default=0)


def writing(workdir: pathlib.Path) -> bool:
  """Whether a checkpoint is there in part."""
  return any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def identity(path: pathlib.Path) -> int | None:
  """A number that changes when the file is replaced."""
  return path.stat().st_ino if path.exists() else None


def children(pid: int) -> list[int]:
  """Processes that this one started, where /proc says."""
  found = []
  for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
    with contextlib.suppress(OSError):  # it has ended
      parent = int(path.read_text().rpartition(")")[2].split()[1])
      found += [int(path.parent.name)] if parent == pid else []
  return found


def living(pids: Iterable[int]) -> int:
  """How many of them there are still, a while later."""
  for _ in range(100):
    left = sum(pathlib.Path(f"/proc/{pid}").exists() for pid in pids)
    if not left:
      break
    time.sleep(0.05)
  return left


class Attempt:
  """The processes of a run, from one start of them to their end."""

  def __init__(self, case: Case, workdir: pathlib.Path):
    self.workdir, self.stale = workdir, identity(workdir / "metrics.jsonl")
    command = [sys.executable, "-m", "ancestral.launch.train", f"--workdir={workdir}"]
    with socket.socket() as probe:
      probe.bind(("127.0.0.1", 0))
      port = probe.getsockname()[1]
    self.logs = [workdir.with_suffix(f".{i}.log") for i in range(case.num_processes)]
    self.processes = []
    for i, log in enumerate(self.logs):
      joining = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={case.num_processes}"]
      joining += [f"--process_id={i}", f"--heartbeat_timeout={HEARTBEAT}"]
      arguments = command + case.arguments + (joining if case.num_processes > 1 else [])
      with log.open("w") as file:
        self.processes.append(subprocess.Popen(arguments, stdout=file, stderr=file))

  def began(self) -> int | None:
    """The step that it goes on from, once it is under way."""
    said = self.logs[0].read_text()
    if ": from step " not in said or identity(self.workdir / "metrics.jsonl") == self.stale:
      return None
    return int(said.partition(": from step ")[2].split()[0])

  def until(self, holds: Callable[[], bool]) -> None:
    """Waits for it; a run that ends before is an error."""
    end = time.monotonic() + SECONDS
    while not holds():
      if time.monotonic() > end or any(p.poll() is not None for p in self.processes):
        said = "\n".join(log.read_text() for log in self.logs)
        raise RuntimeError(f"{self.workdir}: ended, or stood still, before it was killed:\n{said}")
      time.sleep(0.001)

  def steps_since(self, step: int) -> bool:
    """Whether it has made that step, and one of its own."""
    began = self.began()
    return began is not None and reached(self.workdir) >= max(step, began + 1)

  def ended(self) -> list[int]:
    """Exit codes; a process that does not end is killed."""
    end = time.monotonic() + SECONDS
    try:
      return [process.wait(max(end - time.monotonic(), 0.1)) for process in self.processes]
    finally:
      self.kill()

  def kill(self) -> None:
    """Leaves no process."""
    for process in self.processes:
      process.kill()
      process.wait()


def stopped_in_writing(attempt: Attempt, victim: subprocess.Popen, rng: random.Random) -> None:
  """Stops the process at a drawn moment at which a checkpoint is there in part."""
  while True:
    attempt.until(lambda: writing(attempt.workdir))
    time.sleep(rng.uniform(0, 0.04))
    victim.send_signal(signal.SIGSTOP)
    time.sleep(0.002)
    if writing(attempt.workdir):
      return
    victim.send_signal(signal.SIGCONT)


def killed(case, workdir, moment, step, startup, rng) -> Kill:
  """Starts the run, kills it, or one of its processes, at the moment, and looks."""
  attempt = Attempt(case, workdir)
  try:
    process = rng.randrange(case.num_processes)
    victim = attempt.processes[process]
    if moment == "starting":
      time.sleep(rng.uniform(0, startup))
    else:
      attempt.until(lambda: attempt.steps_since(step))
      time.sleep(rng.uniform(0, 0.3))
    if moment == "writing":
      stopped_in_writing(attempt, victim, rng)
    if victim.poll() is not None:
      raise RuntimeError(f"{workdir} ended by itself:\n{attempt.logs[process].read_text()}")
    descendants = children(victim.pid)
    victim.kill()
    began = time.monotonic()
    codes = attempt.ended()
    seconds = time.monotonic() - began
  finally:
    attempt.kill()
  if codes[process] != -signal.SIGKILL or 0 in codes:
    raise RuntimeError(f"{workdir}: exit codes {codes} after process {process} was killed")
  found, newest = attempt.began(), saved(workdir)
  first, last = (newest, newest) if found is None else (found, reached(workdir))
  cut = found is not None and writing(workdir)  # an earlier one is gone once it is under way
  return Kill(moment, process, first, last, newest, cut, living(descendants), seconds)


def moments(case: Case, rng: random.Random) -> list[tuple[str, int]]:
  """Of each kill, what the run is to be doing, and the least step; half are in writing."""
  count, last = case.kills, case.num_steps - 8
  names = ["writing"] * ((count + 1) // 2) + ["starting"] * (count // 7)
  names += ["training"] * (count - len(names))
  rng.shuffle(names)
  steps = sorted(rng.sample(range(1, last), count))
  return list(zip(names, steps, strict=True))


def whole(case: Case, workdir: pathlib.Path) -> tuple[float, float]:
  """Runs it; seconds to the first step, and in all."""
  began = time.monotonic()
  attempt = Attempt(case, workdir)
  try:
    attempt.until(lambda: attempt.steps_since(1))
    startup = time.monotonic() - began
    codes = attempt.ended()
  finally:
    attempt.kill()
  if any(codes):
    raise RuntimeError(f"{workdir} failed:\n{attempt.logs[0].read_text()}")
  return startup, time.monotonic() - began


def state_of(workdir: pathlib.Path, step: int) -> dict[str, bytes]:
  """Every leaf of the state, read back, and the data's position."""
  made = experiment.build(workdirs.saved_config(str(workdir), step))
  abstract = experiment.abstract_state(made, partition.make_mesh())
  with checkpoint.open_manager(workdirs.checkpoints(str(workdir)), create=False) as manager:
    restored = checkpoint.restore(manager, abstract, step)
  leaves = jax.tree.leaves_with_path(restored.state)
  found = {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}
  return {**found, "data": json.dumps(restored.data_state).encode()}


def differing(first: pathlib.Path, second: pathlib.Path) -> list[str]:
  """Nothing, or the file and what in its lines is not the same."""
  if first.read_bytes() == second.read_bytes():
    return []
  pairs = zip(*(map(json.loads, path.open()) for path in (first, second)), strict=False)
  names = {key for a, b in pairs for key in a.keys() | b.keys() if a.get(key) != b.get(key)}
  return [f"{first.name} ({', '.join(sorted(names)) or 'lines'})"]


def differences(case: Case, alone: pathlib.Path, broken: pathlib.Path) -> list[str]:
  """Files and leaves of the state that are not the same, bit for bit."""
  found = [what for name in case.files for what in differing(alone / name, broken / name)]
  first, second = state_of(alone, case.num_steps), state_of(broken, case.num_steps)
  paths = sorted(first.keys() | second.keys())
  return found + [path for path in paths if first.get(path) != second.get(path)]


def measure(case: Case, folder: pathlib.Path) -> dict:
  """The run whole, the same killed until it is done, and what differs."""
  alone, broken = folder / f"{case.name}_whole", folder / f"{case.name}_killed"
  rng = random.Random(f"{case.name} {_DRAWN_BY.value}")
  startup, seconds = whole(case, alone)
  print(f"{case.name}: whole in {seconds:.0f} s, first step after {startup:.1f} s", flush=True)
  began, kills, wrong = time.monotonic(), [], []
  for moment, step in moments(case, rng):
    kill = killed(case, broken, moment, step, startup, rng)
    if kills and kill.began != kills[-1].saved:
      wrong.append(f"went on from step {kill.began}, not {kills[-1].saved}")
    kills.append(kill)
    print(f"{case.name}: killed in {moment}: {kill}", flush=True)
  whole(case, broken)
  last = kills[-1].saved if kills else 0
  if f": from step {last} to " not in broken.with_suffix(".0.log").read_text():
    wrong.append(f"went on last not from step {last}")
  wrong += differences(case, alone, broken)
  wrong += ["a temporary folder is left"] if writing(broken) else []
  return {
    "name": case.name,
    "processes": case.num_processes,
    "steps": case.num_steps,
    "kills": [{**kill._asdict(), "lost": kill.lost} for kill in kills],
    "bytes_compared": sum((alone / name).stat().st_size for name in case.files),
    "leaves_compared": len(state_of(alone, case.num_steps)) - 1,
    "whole_seconds": seconds,
    "killed_seconds": time.monotonic() - began,
    "differences": wrong,
  }


def cases(folder: pathlib.Path) -> list[Case]:
  """The three, the last of which learns from the first's whole run."""
  every = {"save_every": 2, "log_every": 1}
  alone = {"num_steps": 200, "batch_size": 32, "evaluate_every": 50}
  alone |= {"num_microbatches": 2, "average_decay": 0.9}
  two = {"num_steps": 60, "batch_size": 16, "evaluate_every": 60}
  learning = {"num_steps": 30, "batch_size": 8, "save_every": 1, "evaluate_every": 15}
  start = {"workdir": folder / "alone_whole"}
  rollouts = {"group_size": 4, "batch_size": 32, "num_workers": 1}
  return [
    Case(
      "alone",
      "arithmetic.py",
      {**_LANGUAGE, "train": {**every, **alone, "evaluate_every": 50}},
      _KILLS.value,
    ),
    Case("two", "arithmetic.py", {**_LANGUAGE, "train": {**every, **two}}, _KILLS_OF_TWO.value, 2),
    Case(
      "learning",
      "policy.py:grpo",
      {"start": start, "rollouts": rollouts, "train": learning, "evaluation": _EVALUATION},
      _KILLS_LEARNING.value,
      files=("metrics.jsonl", "rollouts.jsonl"),
    ),
  ]


def show(rows: list[dict]) -> None:
  """The table."""
  names = ("run", "steps", "kills", "writing", "cut", "lost, most", "lost, all", "orphans")
  table = rich.table.Table(*names, "s whole", "s killed", "differs")
  for row in rows:
    kills = row["kills"]
    total = lambda key, kills=kills: str(sum(kill[key] for kill in kills))
    table.add_row(
      row["name"],
      str(row["steps"]),
      str(len(kills)),
      str(sum(kill["moment"] == "writing" for kill in kills)),
      total("cut"),
      str(max((kill["lost"] for kill in kills), default=0)),
      total("lost"),
      total("orphans"),
      f"{row['whole_seconds']:.0f}",
      f"{row['killed_seconds']:.0f}",
      ", ".join(row["differences"]) or "nothing",
    )
  rich.console.Console(width=160).print(table)


def main(_):
  """Runs the cases, prints the table, and writes it; fails where anything differs."""
  logging.set_verbosity(logging.WARNING)
  folder = pathlib.Path(_FOLDER.value).resolve()
  if folder.exists() and any(folder.iterdir()):
    raise app.UsageError(f"--folder={folder} is not empty: give a new one.")
  folder.mkdir(parents=True, exist_ok=True)
  rows = [measure(case, folder) for case in cases(folder)]
  result = {
    "date": time.strftime("%Y-%m-%d"),
    "machine": f"{decode_hf.processor()}; load {os.getloadavg()[0]:.1f}",
    "versions": {"jax": jax.__version__, "orbax": orbax.checkpoint.__version__},
    "rows": rows,
  }
  (folder / "result.json").write_text(json.dumps(result, indent=1))
  show(rows)
  sys.exit(any(row["differences"] for row in rows))


if __name__ == "__main__":
  app.run(main)
