"""A run that was stopped, however, and resumed is bit for bit the run that was not."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from absl import logging as absl_logging

from ancestral.launch import experiment, fields, train, workdirs
from ancestral.training import checkpoint, metrics

FIELDS = {"train__average_decay": 0.9, "model__dropout": 0.2, "train__num_microbatches": 2}


def final(workdir, step):
  """All leaves of the checkpoint as bytes, the data's position, and the metrics file."""
  directory = workdirs.checkpoints(workdir)
  config = fields.Config(checkpoint.load_config(directory, step))
  made = experiment.build(config.lock())
  shape = jax.eval_shape(lambda key: experiment.init_state(made, key), jax.random.key(0))
  with checkpoint.open_manager(directory, create=False) as manager:
    restored = checkpoint.restore(manager, shape, step)
  leaves = {
    jax.tree_util.keystr(path): np.asarray(leaf).tobytes()
    for path, leaf in jax.tree.leaves_with_path(restored.state)
  }
  assert any("average" in path for path in leaves) and any("optimizer" in path for path in leaves)
  return leaves, restored.data_state, metrics.read_jsonl(workdir / "metrics.jsonl")


def steps(workdir):
  return sorted(
    int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()
  )


def truncate(directory):
  for path in directory.rglob("*"):
    if path.is_file():
      os.truncate(path, path.stat().st_size // 2)


def flip(directory):
  """Bits all over the largest file, which holds the arrays, and some bytes that hold nothing."""
  path = max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  content = bytearray(path.read_bytes())
  for position in range(len(content) // 4, 3 * len(content) // 4, 64):
    content[position] ^= 0x10
  path.write_bytes(content)


def reached(workdir):
  path = workdir / "metrics.jsonl"
  records = metrics.read_jsonl(path) if path.exists() else []
  return max((record["step"] for record in records), default=0)


def stopped(number, moment, workdir, arguments):
  """Trains in a process that gets the signal some time after the step; its status and stderr."""
  with subprocess.Popen(
    [sys.executable, "-m", "ancestral.launch.train", f"--workdir={workdir}", *arguments],
    text=True,
    stderr=subprocess.PIPE,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
  ) as process:
    while reached(workdir) < moment and process.poll() is None:
      time.sleep(0.005)
    time.sleep(0.001 * random.Random(moment).randrange(30))
    process.send_signal(number)
    printed = process.communicate()[1]
  return process.returncode, printed


@pytest.mark.slow
def test_killed_corrupted_terminated_and_interrupted(command, tiny, tmp_path):
  num_steps, rng = 120, random.Random(0)
  arguments = tiny(
    **FIELDS, train__num_steps=num_steps, train__save_every=8, train__evaluate_every=num_steps
  )
  whole, broken = tmp_path / "whole", tmp_path / "broken"
  later = lambda: reached(broken) + rng.randrange(20, 30)

  assert stopped(signal.SIGKILL, later(), broken, arguments)[0] == -signal.SIGKILL
  *_, previous, newest = steps(broken)
  truncate(broken / "checkpoints" / str(newest))

  status, printed = stopped(signal.SIGTERM, later(), broken, arguments)
  assert status == 128 + signal.SIGTERM
  assert f"{broken / 'checkpoints' / str(newest)} " in printed and "corrupt" in printed
  assert f"{broken}: from step {previous} to {num_steps}" in printed
  last = steps(broken)[-1]
  assert f"stopped by SIGTERM after step {last} of {num_steps}" in printed
  assert "The same command goes on." in printed and "Traceback" not in printed

  status, printed = stopped(signal.SIGINT, later(), broken, arguments)
  assert status == 128 + signal.SIGINT and f"from step {last} to {num_steps}" in printed
  last = steps(broken)[-1]
  assert f"stopped by SIGINT after step {last} of {num_steps}" in printed

  outcome = command(train, f"--workdir={broken}", *arguments)
  assert outcome.status == 0 and f"from step {last} to {num_steps}" in outcome.err
  assert command(train, f"--workdir={whole}", *arguments).status == 0
  assert final(broken, num_steps) == final(whole, num_steps)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """Whole runs by name, each made once."""
  return tmp_path_factory.mktemp("finished"), set()


def texts(folder):
  path = folder / "texts.jsonl"
  rng = random.Random(0)
  path.write_text("".join('{"text": "%s"}\n' % ("ab" * rng.randrange(1, 40)) for _ in range(60)))
  return path


CASES = {
  "muon": ("arithmetic.py", {"optimizer__name": "muon"}),
  "packed": ("arithmetic.py", {"data__rows": "first_fit"}),
  "text": (
    "text.py:jsonl",
    {"data__path": "{texts}", "data__row_length": 16, "evaluation__max_new_tokens": 4},
  ),
}


@pytest.mark.parametrize(
  "case, fault",
  [
    ("muon", truncate),
    ("muon", flip),
    ("muon", shutil.rmtree),
    ("packed", flip),
    ("text", shutil.rmtree),
  ],
)
def test_the_newest_checkpoint_is_lost(command, tiny, finished, tmp_path, monkeypatch, case, fault):
  folder, made = finished
  config, fields = CASES[case]
  fields = {name: str(value).format(texts=texts(folder)) for name, value in fields.items()}
  arguments = tiny(config, **FIELDS, train__num_steps=6, train__evaluate_every=6, **fields)
  whole, broken = folder / case, tmp_path / "broken"
  if case not in made:
    made.add(case)
    assert command(train, f"--workdir={whole}", *arguments).status == 0
  assert steps(whole) == [4, 6]
  shutil.copytree(whole, broken)
  fault(broken / "checkpoints" / "6")

  warned = []
  monkeypatch.setattr(absl_logging, "warning", lambda text, *values: warned.append(text % values))
  outcome = command(train, f"--workdir={broken}", *arguments)
  assert outcome.status == 0 and "from step 4 to 6" in outcome.err
  if fault is not shutil.rmtree:
    assert any(f"{broken / 'checkpoints' / '6'} " in line and "corrupt" in line for line in warned)
  assert final(broken, 6) == final(whole, 6)
  numbered = [record["step"] for record in final(broken, 6)[2] if "loss" in record]
  assert numbered == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_only_says_so(command, tiny, tmp_path, snapshot):
  arguments = [f"--workdir={tmp_path}", *tiny()]
  assert command(train, *arguments).status == 0
  before = snapshot(tmp_path / "checkpoints")
  outcome = command(train, *arguments)
  assert outcome.status == 0 and "from step 4 to 4" in outcome.err and "done" in outcome.err
  assert snapshot(tmp_path / "checkpoints") == before
