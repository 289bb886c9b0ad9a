"""Writers: what is written is read back, after a crash too, with no TensorBoard or terminal."""

import io
import json
import math
import os
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
from absl import logging as absl_logging

from ancestral.training import metrics


def test_chain_passes_everything_in_order():
  seen = []
  note = lambda name: metrics.Writer(
    lambda step, scalars: seen.append((name, step, dict(scalars))),
    lambda step: seen.append((name, step)),
    lambda: seen.append(name),
  )
  writer = metrics.chain(note("a"), note("b"))
  writer.write(3, {"x": 1.0})
  writer.tick(4)
  writer.close()
  assert seen == [("a", 3, {"x": 1.0}), ("b", 3, {"x": 1.0}), ("a", 4), ("b", 4), "a", "b"]
  metrics.chain().write(1, {})


def test_text_and_images_pass_through_a_chain_to_those_that_take_them():
  seen = []
  takes = metrics.Writer(
    lambda step, scalars: None,
    text=lambda *args: seen.append(args),
    image=lambda step, name, pixels: seen.append((step, name, pixels.shape)),
  )
  writer = metrics.chain(metrics.Writer(lambda step, scalars: None), takes)
  writer.text(2, "samples", "1 + 1 = 2")
  writer.image(2, "grid", np.zeros((4, 6, 3), np.uint8))
  assert seen == [(2, "samples", "1 + 1 = 2"), (2, "grid", (4, 6, 3))]


def test_only_passes_what_is_kept():
  seen = []
  note = metrics.Writer(
    lambda step, scalars: seen.append((step, scalars)), close=lambda: seen.append("closed")
  )
  writer = metrics.only(lambda name: name.startswith("speed/"), note)
  writer.write(1, {"loss": 1.0, "speed/mfu": 0.5})
  writer.write(2, {"loss": 1.0})
  writer.close()
  assert seen == [(1, {"speed/mfu": 0.5}), "closed"]


def strict(text):
  def refuse(name):
    raise AssertionError(name)

  return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_jsonl_is_strict_json_and_keeps_non_finite_values(tmp_path):
  path = tmp_path / "new" / "metrics.jsonl"
  writer = metrics.jsonl(path)
  writer.write(1, {"loss": 0.1 + 0.2, "bad": math.nan})
  assert strict(path.read_text()) == [{"step": 1, "loss": 0.30000000000000004, "bad": "NaN"}]
  writer.write(2, {"up": math.inf, "down": -math.inf})
  writer.close()
  assert strict(path.read_text())[1] == {"step": 2, "up": "Infinity", "down": "-Infinity"}
  first, second = metrics.read_jsonl(path)
  assert first["loss"] == 0.1 + 0.2 and math.isnan(first["bad"])
  assert second == {"step": 2, "up": math.inf, "down": -math.inf}


def test_jsonl_resumes_without_repeating_a_step(tmp_path):
  path = tmp_path / "metrics.jsonl"
  writer = metrics.jsonl(path)
  for step in range(1, 8):
    writer.write(step, {"loss": float(step)})
  writer.write(5, {"eval/accuracy": 0.5})  # out of order, and of a step that is kept
  writer.close()
  with path.open("a") as file:
    file.write('{"step": 8, "lo')  # killed while writing
  resumed = metrics.jsonl(path, step=5)
  assert [r["step"] for r in metrics.read_jsonl(path)] == [1, 2, 3, 4, 5, 5]
  resumed.write(6, {"loss": -6.0})
  resumed.close()
  records = metrics.read_jsonl(path)
  assert records[-2:] == [{"step": 5, "eval/accuracy": 0.5}, {"step": 6, "loss": -6.0}]
  keys = [(r["step"], k) for r in records for k in r if k != "step"]
  assert len(keys) == len(set(keys)) == 7
  assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
  metrics.jsonl(path).close()  # a new run in an old folder starts afresh
  assert path.read_text() == ""


def test_console_off_a_terminal_writes_few_lines():
  now = [0.0]
  out = io.StringIO()
  writer = metrics.console(100, interval=10.0, file=out, clock=lambda: now[0])
  now[0] = 30.0  # compilation, inside the first step
  for step in range(1, 101):
    writer.tick(step)
    writer.write(step, {"loss": 1 / step})
    if step == 50:
      writer.write(step, {"pass@1": 0.25, "pass@1/level_1": 0.5})
    now[0] += 0.5
  writer.close()
  lines = out.getvalue().splitlines()
  assert lines[0] == "step 1/100  loss 1"
  assert lines[1] == "step 21/100  2 steps/s  ETA 0:00:40  loss 0.04762"
  assert lines[3] == "step 50/100  2 steps/s  ETA 0:00:25  pass@1 0.25"
  assert lines[-1] == "step 100/100  2 steps/s  ETA 0:00:00  loss 0.01"
  assert len(lines) == 7


def test_console_shows_the_last_part_of_a_name():
  out = io.StringIO()
  metrics.console(3, file=out).write(1, {"loss": 2.0, "speed/mfu": 0.41, "speed/data_wait": 0.2})
  assert out.getvalue() == "step 1/3  loss 2  mfu 0.41\n"


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_console_on_a_terminal_shows_one_bar(monkeypatch):
  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.setenv("COLUMNS", "120")
  out, now = Terminal(), [0.0]
  writer = metrics.console(10, step=2, file=out, clock=lambda: now[0])
  for step in range(3, 11):
    writer.write(step, {"loss": 2.5})
    writer.tick(step)
    now[0] += 2.0
  writer.close()
  last = out.getvalue().splitlines()[-2]
  assert "10/10" in last and "0.5 steps/s" in last and "loss 2.5" in last and "ETA 0:00:00" in last
  assert "step " not in out.getvalue().replace("steps", "")


READ = """
import sys
sys.modules["tensorflow"] = None  # an import of it fails
from ancestral.training import metrics
from tensorboard.backend.event_processing import event_accumulator
first = metrics.tensorboard(sys.argv[1])
for step in range(1, 9):
  first.write(step, {"loss": 1 / step, "eval/accuracy": float("nan")})
first.close()
resumed = metrics.tensorboard(sys.argv[1], step=5)
resumed.write(6, {"loss": -6.0})
resumed.close()
events = event_accumulator.EventAccumulator(sys.argv[1]).Reload()
print("REPORT", [(e.step, e.value) for e in events.Scalars("loss")],
      sorted(events.Tags()["scalars"]), [n for n in sys.modules if n.startswith("tensorflow.")],
      sep="|")
"""


def test_tensorboard_files_are_read_by_tensorboard_without_tensorflow(tmp_path):
  pytest.importorskip("tensorboard")
  done = subprocess.run(
    [sys.executable, "-W", "error", "-c", READ, str(tmp_path)],
    capture_output=True, text=True, timeout=120, env={**os.environ, "JAX_PLATFORMS": "cpu"},
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-3000:]
  scalars, tags, tensorflow = done.stdout.split("REPORT|")[1].strip().split("|")
  found = json.loads(scalars.replace("(", "[").replace(")", "]"))
  assert [s for s, _ in found] == [1, 2, 3, 4, 5, 6]
  expected = [1.0, 0.5, 1 / 3, 0.25, 0.2, -6.0]
  assert [v for _, v in found] == pytest.approx(expected, rel=1e-6)  # stored as float32
  assert tags == "['eval/accuracy', 'loss']" and tensorflow == "[]"


def read_by_tensorboard(directory):
  """As TensorBoard's own plugins find it."""
  metrics._tensorboard_modules()
  from tensorboard.backend.event_processing import plugin_event_accumulator

  return plugin_event_accumulator.EventAccumulator(str(directory)).Reload()


@pytest.mark.parametrize("shape, mode", [((4, 6, 3), "RGB"), ((5, 2, 1), "L"), ((3, 3, 4), "RGBA")])
def test_text_and_images_are_read_back_from_tensorboards_files(tmp_path, shape, mode):
  pytest.importorskip("tensorboard")
  pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
  writer = metrics.tensorboard(tmp_path)
  writer.text(3, "samples", "2 → **6**")
  writer.text(7, "samples", "")
  writer.image(7, "grid", pixels)
  writer.close()
  events = read_by_tensorboard(tmp_path)
  assert set(events.PluginTagToContent("text")) == {"samples"}
  found = [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors("samples")]
  assert found == [(3, "2 → **6**"), (7, "")]
  assert set(events.PluginTagToContent("images")) == {"grid"}
  (event,) = events.Tensors("grid")
  width, height, png = event.tensor_proto.string_val
  assert (event.step, int(width), int(height)) == (7, shape[1], shape[0])
  image = PIL.Image.open(io.BytesIO(png))
  assert image.mode == mode
  np.testing.assert_array_equal(np.asarray(image).reshape(shape), pixels)


@pytest.mark.parametrize("pixels", [np.zeros((4, 4, 3)), np.zeros((4, 4, 2), np.uint8)])
def test_what_is_not_an_image_is_refused(tmp_path, pixels):
  pytest.importorskip("tensorboard")
  writer = metrics.tensorboard(tmp_path)
  with pytest.raises(ValueError, match="an image is uint8"):
    writer.image(1, "grid", pixels)
  writer.close()


def test_without_tensorboard_one_line_says_so(tmp_path, monkeypatch):
  lines = []
  monkeypatch.setattr(absl_logging, "warning", lines.append)
  monkeypatch.setitem(sys.modules, "tensorboard.summary.writer", None)
  writer = metrics.tensorboard(tmp_path / "events")
  writer.write(1, {"loss": 1.0})
  writer.close()
  assert len(lines) == 1 and "pip install 'ancestral[tensorboard]'" in lines[0]
  assert not (tmp_path / "events").exists()
