"""What a run shows of itself: speeds, a trace, samples in TensorBoard, the batch of a bad step."""

import json

import numpy as np
import pytest

from ancestral.launch import train
from ancestral.training import checkpoint, metrics


def events(workdir):
  """{tag: plugin or kind} of the event files."""
  from tensorboard.backend.event_processing import event_accumulator

  found = event_accumulator.EventAccumulator(str(workdir), size_guidance={"tensors": 0})
  found.Reload()
  return found


def test_speeds_are_beside_the_metrics_that_a_rerun_repeats(command, tiny, tmp_path):
  outcome = command(train, f"--workdir={tmp_path}", "--profile", *tiny(train__num_steps=14))
  assert outcome.status == 0, outcome.err
  speeds = metrics.read_jsonl(tmp_path / "speed.jsonl")
  assert speeds[-1]["step"] == 14 and speeds[-1]["speed/tokens_per_second"] > 0
  assert 0 <= speeds[-1]["speed/data_wait"] <= 1
  assert not any(
    "speed" in name for m in metrics.read_jsonl(tmp_path / "metrics.jsonl") for name in m
  )
  assert list((tmp_path / "profile").rglob("*.trace.json.gz"))


def test_samples_are_shown(command, tiny, tmp_path):
  assert command(train, f"--workdir={tmp_path}", *tiny()).status == 0
  found = events(tmp_path)
  (shown,) = [found.Tensors(tag) for tag in found.Tags()["tensors"] if "samples" in tag]
  table = shown[-1].tensor_proto.string_val[0].decode()
  assert table.startswith("| prompt | answer | verdict |") and table.count("\n") > 3
  assert "loss" in found.Tags()["scalars"]


def test_so_are_texts_and_images(command, tiny, tmp_path):
  assert (
    command(train, f"--workdir={tmp_path / 'text'}", *tiny("text.py", data__row_length=32)).status
    == 0
  )
  assert any("samples" in tag for tag in events(tmp_path / "text").Tags()["tensors"])
  images = [f for f in tiny("image_diffusion.py") if "num_problems" not in f]
  outcome = command(
    train, f"--workdir={tmp_path / 'digits'}", *images, "--config.evaluation.evaluations=3"
  )
  assert outcome.status == 0, outcome.err
  (image,) = events(tmp_path / "digits").Images("samples")
  assert image.width == image.height == (6 * 9 - 1) * 8


def test_a_bad_step_stops_and_leaves_its_batch(command, tiny, tmp_path):
  """With a huge rate a later step is not finite; what was saved before it is good."""
  flags = tiny(train__num_steps=40, train__save_every=1, optimizer__peak=1e30)
  outcome = command(train, f"--workdir={tmp_path}", *flags, "--config.optimizer.clip_norm=1e30")
  assert outcome.status == 1 and "nothing of it is saved" in outcome.err
  (folder,) = (tmp_path / "diverged").iterdir()
  step = int(folder.name.removeprefix("step_"))
  with np.load(folder / "batch_0.npz") as batch:
    assert batch["tokens"].shape[0] == 8 and batch["mask"].sum() > 0
  written = json.loads((folder / "metrics.json").read_text())
  assert any(value in ("NaN", "Infinity") for value in written.values())
  with checkpoint.open_manager(tmp_path / "checkpoints", create=False) as manager:
    assert manager.latest_step() < step
  assert f"step {step}" in outcome.err and str(folder) in outcome.err


def test_other_runs_of_a_sweep_go_on(command, tiny, tmp_path):
  flags = tiny(optimizer__clip_norm=1e30, train__num_steps=12)
  outcome = command(train, f"--workdir={tmp_path}", *flags, "--sweep=optimizer.peak=1e30,1e-3")
  assert outcome.status == 1 and outcome.err.count("done. Next") == 1
  assert (tmp_path / "optimizer.peak=1e-3" / "checkpoints" / "12").exists()


@pytest.mark.parametrize("factor, status", [(1e-3, 1), (1e6, 0)])
def test_a_leap_of_the_loss_stops_where_asked(command, tiny, tmp_path, factor, status, monkeypatch):
  from ancestral.training import guard

  spikes = guard.spikes
  monkeypatch.setattr(guard, "spikes", lambda factor: spikes(factor, window=4))
  flags = tiny(train__num_steps=30, train__spike_factor=factor, optimizer__peak=1e-9)
  outcome = command(train, f"--workdir={tmp_path}", *flags)
  assert outcome.status == status, outcome.err
  assert ("deviations above" in outcome.err) == bool(status)
