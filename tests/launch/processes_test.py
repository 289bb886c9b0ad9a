"""Runs of several processes over loopback: the losses of one, a stop for all, and a killed one."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from ancestral.training import checkpoint, metrics

CONFIG = """
from ancestral.configs import arithmetic


def get_config():
  config = arithmetic.get_config()
  with config.unlocked():
    config.task.levels = (1, 2)
    config.data.row_length = 11
    config.evaluation.update(num_problems=8, num_samples=1, batch_size=16, max_new_tokens=5)
    config.model.update(num_layers=1, width=32, num_heads=2, dropout=0.1)
    config.optimizer.update(name="adamw", schedule="warmup_stable_decay", warmup_fraction=0.0)
    config.train.update(
      num_steps=24, batch_size=16, log_every=1, evaluate_every=24, save_every=8, keep=9
    )
  return config.lock()
"""
SECONDS = 240  # for anything: the machine may be busy


def free_port():
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


class Run:
  """Processes that train together in a workdir; their standard error goes to files."""

  def __init__(self, folder, workdir, num, *flags, binary="train", config=CONFIG):
    self.folder, self.workdir = folder, workdir
    (folder / "config.py").write_text(config)
    port = free_port()
    command = [sys.executable, "-m", f"ancestral.launch.{binary}", f"--workdir={workdir}"]
    command += [f"--config={folder / 'config.py'}", *flags]
    self.logs = [folder / f"process_{i}.log" for i in range(num)]
    self.processes = []
    for i, log in enumerate(self.logs):
      joining = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={num}", f"--process_id={i}"]
      with log.open("w") as file:
        self.processes.append(
          subprocess.Popen(
            [*command, *(joining if num > 1 else [])],
            stderr=file,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
          )
        )

  def wait(self):
    """Exit codes of all."""
    try:
      return [process.wait(SECONDS) for process in self.processes]
    finally:
      for process in self.processes:
        process.kill()

  def until(self, step):
    """Waits for the metrics of a step."""
    end = time.monotonic() + SECONDS
    path = self.workdir / "metrics.jsonl"
    while not path.exists() or max((m["step"] for m in metrics.read_jsonl(path)), default=0) < step:
      assert time.monotonic() < end and not any(p.poll() for p in self.processes), self.said()
      time.sleep(0.02)

  def said(self):
    return "\n".join(log.read_text() for log in self.logs)


def losses(workdir):
  return [m["loss"] for m in metrics.read_jsonl(workdir / "metrics.jsonl") if "loss" in m]


def steps(workdir):
  with checkpoint.open_manager(workdir / "checkpoints", create=False) as manager:
    return sorted(manager.all_steps())


@pytest.fixture(scope="module")
def alone_run(tmp_path_factory):
  """A run of one process."""
  folder = tmp_path_factory.mktemp("alone")
  run = Run(folder, folder / "run", 1)
  assert run.wait() == [0], run.said()
  return folder / "run"


@pytest.fixture(scope="module")
def alone(alone_run):
  """The losses of a run of one process."""
  return losses(alone_run)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
  """A run of four processes, of which one was told to stop."""
  folder = tmp_path_factory.mktemp("stopped")
  run = Run(folder, folder / "run", 4, "--config.mesh.fsdp=2", "--config.train.num_steps=100000")
  run.until(9)
  run.processes[2].send_signal(signal.SIGTERM)
  return run, run.wait()


@pytest.mark.slow
def test_a_signal_to_one_of_four_saves_all_at_the_same_step(stopped, alone):
  run, codes = stopped
  assert codes == [128 + signal.SIGTERM] * 4, run.said()
  said = [log.read_text() for log in run.logs]
  (where,) = {text.split("stopped by SIGTERM after step ")[1].split()[0] for text in said}
  assert steps(run.workdir)[-1] == int(where) >= 9
  assert len(losses(run.workdir)) == int(where)  # written by one of them
  np.testing.assert_allclose(losses(run.workdir)[:9], alone[:9], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("num", [1, 2])
def test_a_run_of_four_goes_on_with_fewer(stopped, alone, num, tmp_path):
  """From step 8, where the rate is still the same whatever the number of steps."""
  shutil.copytree(stopped[0].workdir, tmp_path / "run")
  for step in steps(tmp_path / "run"):
    if step > 8:
      shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
  run = Run(tmp_path, tmp_path / "run", num, "--config.mesh.fsdp=1")
  assert run.wait() == [0] * num, run.said()
  assert "from step 8 to 24" in run.said()
  np.testing.assert_allclose(losses(tmp_path / "run"), alone, atol=1e-5)


@pytest.mark.slow
def test_two_train_as_one_and_go_on_after_one_was_killed(alone, tmp_path):
  run = Run(tmp_path, tmp_path / "run", 2, "--heartbeat_timeout=10")
  run.until(18)
  run.processes[1].kill()
  began = time.monotonic()
  codes = run.wait()
  assert time.monotonic() - began < 60 and codes[0] not in (0, None)
  assert "unhealthy (stopped sending heartbeats):\n1" in run.logs[0].read_text(), run.said()
  assert steps(tmp_path / "run")[-1] in (8, 16)
  again = Run(tmp_path, tmp_path / "run", 2)
  assert again.wait() == [0, 0], again.said()
  np.testing.assert_allclose(losses(tmp_path / "run"), alone, atol=1e-5)
  assert len(losses(tmp_path / "run")) == 24


@pytest.mark.slow
def test_one_that_never_comes_is_waited_for_so_long(tmp_path):
  run = Run(tmp_path, tmp_path / "run", 2, "--start_timeout=10")
  run.processes[1].kill()
  assert run.wait()[0] != 0
  assert "DEADLINE_EXCEEDED" in run.logs[0].read_text(), run.said()


LEARN = """
from ancestral.configs import policy


def get_config():
  config = policy.get_config("grpo")
  with config.unlocked():
    config.start.workdir = "{start}"
    config.rollouts.update(group_size=4, num_workers=1, reward="random")
    config.train.update(num_steps=3, batch_size=8, evaluate_every=3, save_every=3)
    config.evaluation.update(num_problems=4, num_samples=1, batch_size=8)
  return config.lock()
"""


@pytest.mark.slow
def test_two_learn_from_samples_as_one_and_evaluate(alone_run, tmp_path):
  config, found = LEARN.format(start=alone_run), []
  for num in (1, 2):
    workdir = tmp_path / f"run_{num}"
    run = Run(tmp_path, workdir, num, config=config)
    assert run.wait() == [0] * num, run.said()
    found.append([(m["loss"], m["reward"], m["length"]) for m in rounds(workdir)])
    run = Run(tmp_path, workdir, num, binary="evaluate", config=config)
    assert run.wait() == [0] * num, run.said()
    found[-1].append((workdir / "evaluation.json").read_text())
    found[-1].append((workdir / "rollouts.jsonl").read_text().count('"text"'))
  np.testing.assert_allclose(*[rows[:3] for rows in found], atol=1e-5)
  assert found[0][3:] == found[1][3:] and found[0][4] == 3 * 8 * 4


def rounds(workdir):
  return [m for m in metrics.read_jsonl(workdir / "metrics.jsonl") if "reward" in m]


PREFER = """
from ancestral.configs import preference


def get_config():
  config = preference.get_config("file")
  with config.unlocked():
    config.start.workdir = "{start}"
    config.data.path = "{pairs}"
    config.train.update(num_steps=4, batch_size=8, log_every=1, evaluate_every=4, save_every=4)
    config.evaluation.update(num_problems=4, num_samples=1, batch_size=8)
  return config.lock()
"""


@pytest.mark.slow
def test_two_learn_from_pairs_as_one(alone_run, tmp_path):
  """Each scores its own rows by the reference."""
  pairs = tmp_path / "pairs.jsonl"
  rows = [(i, j, (i + j) % 10, (i * j + 1) % 10) for i in range(10) for j in range(10)]
  line = '{{"prompt": "{}+{}=", "chosen": "{}", "rejected": "{}"}}\n'
  pairs.write_text("".join(line.format(*row) for row in rows))
  config, found = PREFER.format(start=alone_run, pairs=pairs), []
  for num in (1, 2):
    run = Run(tmp_path, tmp_path / f"run_{num}", num, config=config)
    assert run.wait() == [0] * num, run.said()
    found.append(losses(tmp_path / f"run_{num}"))
  np.testing.assert_allclose(*found, atol=1e-5)
  assert len(found[0]) == 4 and len(set(found[0])) > 1
