"""Whole runs over meshes of eight devices: every kind of experiment, evaluated and sampled there.

The `eight_*` functions need eight devices: `test_on_eight_devices` runs them in a process that has.
"""

import jax
import numpy as np
import pytest

import targets
from ancestral.launch import evaluate, experiment, sample, train
from ancestral.models import partition
from ancestral.training import metrics

MESHES = {
  "tensor": {"mesh__fsdp": 2, "mesh__tensor": 2},
  "over_data": {"mesh__fsdp": 4, "mesh__optimizer_over_data": True},
}
NUMBERS = ("loss", "gradient_norm", "held_out_loss", "pass@1", "accuracy", "reward", "ratio")


def test_on_eight_devices():
  assert "skipped" not in targets.run_on_eight_devices(__file__, "-k", "language")


@pytest.mark.slow
def test_every_kind_on_eight_devices():
  assert "skipped" not in targets.run_on_eight_devices(__file__, "-k", "not language")


def numbers(workdir):
  found = metrics.read_jsonl(workdir / "metrics.jsonl")
  return [[m[name] for name in NUMBERS if name in m] for m in found]


def same(command, make, workdirs, **changed):
  """Runs over data=8 and over a mesh write the same numbers; the last workdir is of the mesh."""
  for workdir, more in zip(workdirs, ({}, changed), strict=True):
    outcome = command(train, f"--workdir={workdir}", *make(**more))
    assert outcome.status == 0, outcome.err
  expected, found = map(numbers, workdirs)
  assert len(expected) > 2
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def tiny_sums(tiny):
  return lambda **more: tiny(
    task__levels="(1,)", model__width=32, model__num_heads=4, train__batch_size=16, **more
  )


@pytest.mark.parametrize("name", MESHES)
def eight_devices_train_a_language_model(command, tiny, tmp_path, name):
  workdirs = tmp_path / "data", tmp_path / name
  same(command, tiny_sums(tiny), workdirs, **MESHES[name])
  drawn = []
  for mesh in ("data=8", "fsdp=2,tensor=4"):
    ask = [f"--workdir={workdirs[1]}", "--prompt=1+2=", "--num_samples=8", f"--mesh={mesh}"]
    outcome = command(sample, *ask)
    assert outcome.status == 0, outcome.err
    drawn.append(outcome.out)
  assert drawn[0] == drawn[1] and len(set(drawn[0].splitlines())) > 2
  outcome = command(evaluate, f"--workdir={workdirs[1]}", "--mesh=tensor=2")
  assert outcome.status == 0, outcome.err


def eight_devices_refuse_a_language_model_s_batch(command, tiny, tmp_path):
  outcome = command(train, f"--workdir={tmp_path / 'run'}", *tiny(train__batch_size=12))
  assert (
    outcome.status == 2
    and "train.batch_size=12 in 1 microbatches does not divide over the 8" in outcome.err
  )
  outcome = command(sample, f"--workdir={tmp_path / 'run'}", "--prompt=1", "--mesh=fsdp=3")
  assert outcome.status == 2 and "does not fill the 8 devices" in outcome.err
  outcome = command(sample, f"--workdir={tmp_path / 'run'}", "--prompt=1", "--mesh=rows=8")
  assert outcome.status == 2 and "--mesh=rows=8 is no list of axis=devices" in outcome.err


def eight_devices_go_on_over_another_mesh_with_a_language_model(command, tiny, tmp_path):
  make, run = tiny_sums(tiny), tmp_path / "run"
  assert command(train, f"--workdir={tmp_path / 'whole'}", *make(train__num_steps=4)).status == 0
  more = {"train__num_steps": 2, "optimizer__schedule": "warmup_cosine"}
  assert command(train, f"--workdir={run}", *make(**more, mesh__fsdp=8)).status == 0
  outcome = command(train, f"--workdir={run}", *make(train__num_steps=4, mesh__tensor=2))
  assert outcome.status == 0 and "from step 2 to 4" in outcome.err


@pytest.mark.parametrize("variant", ["arithmetic", "sudoku4"])
def eight_devices_fill_masks_in(command, tiny, tmp_path, variant):
  def make(**more):
    sizes = {"model__width": 32, "model__num_heads": 4, "train__batch_size": 16}
    return tiny(f"masked_lm.py:{variant}", evaluation__num_problems=4, **sizes, **more)

  workdirs = tmp_path / "data", tmp_path / "split"
  same(command, make, workdirs, **MESHES["tensor"])
  drawn = []
  for mesh in ("data=8", "fsdp=2,tensor=4"):
    ask = [f"--workdir={workdirs[1]}", "--num_problems=8", f"--mesh={mesh}"]
    outcome = command(sample, *ask)
    assert outcome.status == 0, outcome.err
    drawn.append(outcome.out)
  assert drawn[0] == drawn[1]
  outcome = command(evaluate, f"--workdir={workdirs[1]}", "--mesh=tensor=2")
  assert outcome.status == 0, outcome.err


@pytest.mark.parametrize("config", ["image_diffusion.py:digits", "image_classifier.py"])
def eight_devices_train_on_images(command, tiny, tmp_path, config):
  def make(**more):
    flags = tiny(config, train__batch_size=16, **more)
    if config.startswith("image_classifier"):  # it has no such fields
      flags = [f for f in flags if "config.model" not in f and "num_batches" not in f]
      return [f for f in flags if "evaluation" not in f]
    return [*flags, "--config.evaluation.evaluations=4"]

  same(command, make, (tmp_path / "data", tmp_path / "mesh"), mesh__fsdp=4, mesh__tensor=2)


def eight_devices_learn_from_samples(command, tiny, tmp_path):
  start = tmp_path / "start"
  make = tiny_sums(tiny)
  assert command(train, f"--workdir={start}", *make(train__num_steps=20)).status == 0

  def learn(**more):
    flags = {
      "start__workdir": start,
      "rollouts__group_size": 4,
      "rollouts__num_workers": 1,
      "rollouts__reward": "random",
      "train__num_steps": 3,
      "train__batch_size": 8,
      "train__evaluate_every": 3,
      "evaluation__num_problems": 4,
      "evaluation__num_samples": 1,
      "evaluation__batch_size": 8,
      **more,
    }
    named = [f"--config.{name.replace('__', '.')}={value}" for name, value in flags.items()]
    return ["--config=configs/policy.py:grpo", *named]

  runs = tmp_path / "data", tmp_path / "mesh"
  same(command, learn, runs, mesh__fsdp=2, mesh__tensor=2)
  texts = [(run / "rollouts.jsonl").read_text().count('"text"') for run in runs]
  assert texts == [3 * 8 * 4] * 2


def eight_devices_use_what_others_trained(command, tiny, tmp_path):
  """Pairs are scored with a reference on the mesh of the command, not of the run."""
  start, run, pairs = tmp_path / "start", tmp_path / "run", tmp_path / "pairs.jsonl"
  assert command(train, f"--workdir={start}", *tiny_sums(tiny)(train__num_steps=4)).status == 0
  pairs.write_text('{"prompt": "1+2=", "chosen": "3", "rejected": "4"}\n' * 40)
  flags = [f"--workdir={run}", "--config=configs/preference.py:file"]
  settings = {
    "start.workdir": start,
    "data.path": pairs,
    "train.num_steps": 2,
    "train.batch_size": 8,
    "train.evaluate_every": 2,
    "evaluation.batch_size": 8,
    "evaluation.num_problems": 2,
    "mesh.fsdp": 2,
    "mesh.tensor": 2,
  }
  outcome = command(train, *flags, *(f"--config.{k}={v}" for k, v in settings.items()))
  assert outcome.status == 0, outcome.err
  outcome = command(evaluate, f"--workdir={run}", "--mesh=data=8")
  assert outcome.status == 0, outcome.err


def eight_devices_keep_many_split_averages(command, tiny, tmp_path):
  """Their checksums are one program; and what is made of them later is split as the others."""
  flags = [f"--workdir={tmp_path / 'run'}", *tiny("image_diffusion.py:digits", mesh__fsdp=8)]
  flags += ["--config.train.average_stds=(0.1,0.05)", "--config.model.width=32"]
  outcome = command(train, *flags, "--config.evaluation.evaluations=4")
  assert outcome.status == 0, outcome.err
  mesh = partition.make_mesh(fsdp=8)
  kept, found = (
    experiment.restore_params(None, str(tmp_path / "run"), mesh=mesh, average_std=std)[1]
    for std in (None, 0.08)
  )
  at = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
  assert at(kept) == at(found)
  assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(found))
