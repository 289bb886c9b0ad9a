"""The binaries end to end on tiny runs: sweeps, evaluation, samples, text, and the quickstart."""

import html.parser
import json
import random
import re
import sys

import jax
import numpy as np
import pytest

from ancestral.configs import image_classifier
from ancestral.launch import (
  evaluate,
  experiment,
  fields,
  quickstart,
  report,
  sample,
  train,
  workdirs,
)
from ancestral.training import checkpoint, metrics


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("binaries")


@pytest.fixture
def trained(command, tiny, folder):
  """A workdir of a run that keeps an average, made once."""
  workdir = folder / "trained"
  if not workdir.exists():
    outcome = command(train, f"--workdir={workdir}", *tiny(train__average_decay=0.9))
    assert outcome.status == 0 and "done. Next: python -m ancestral.launch.evaluate" in outcome.err
  return workdir


def saved(workdir):
  return checkpoint.load_config(workdirs.checkpoints(workdir))


def params(workdir, **kwargs):
  return experiment.restore_params(None, workdir, **kwargs)[1]


@pytest.mark.slow
def test_a_sweep_is_the_product_of_its_axes_typed_and_independent(command, tiny, tmp_path):
  outcome = command(
    train,
    f"--workdir={tmp_path}/grid",
    *tiny(train__num_steps=2),
    "--sweep=optimizer.peak=1e-2,3",
    "--sweep=optimizer.schedule=warmup_cosine",
    "--seeds=0,1",
  )
  assert outcome.status == 0
  expected = {
    f"optimizer.peak={peak},optimizer.schedule=warmup_cosine,seed={seed}": (float(peak), seed)
    for peak in ("1e-2", "3")
    for seed in (0, 1)
  }
  assert {path.name for path in (tmp_path / "grid").iterdir()} == set(expected)
  for name, values in expected.items():
    config = saved(tmp_path / "grid" / name)
    found = config["optimizer"]["peak"], config["seed"]
    assert found == values and list(map(type, found)) == [float, int]
    assert config == json.loads((tmp_path / "grid" / name / "config.json").read_text())
  embeddings = {
    np.asarray(params(tmp_path / "grid" / name)["embedding"]).tobytes() for name in expected
  }
  assert len(embeddings) == len(expected)

  alone = tmp_path / "alone"  # the same run without the others
  assert (
    command(
      train, f"--workdir={alone}", *tiny(train__num_steps=2, optimizer__peak=3, seed=1)
    ).status
    == 0
  )
  among = tmp_path / "grid" / "optimizer.peak=3,optimizer.schedule=warmup_cosine,seed=1"
  for one, other in zip(*(jax.tree.leaves(params(path)) for path in (alone, among)), strict=True):
    np.testing.assert_array_equal(one, other)


def test_evaluation_as_a_table_and_as_json(command, trained):
  outcome = command(evaluate, f"--workdir={trained}")
  assert outcome.status == 0
  for word in ("level", "problems", "pass@1", "majority@2", "pass@2", "Step 4"):
    assert word in outcome.out
  result = json.loads((trained / "evaluation.json").read_text())
  assert result["step"] == 4
  assert [row["level"] for row in result["table"]["pass@1"]] == [1, 2, 3]
  assert {len(a["responses"]) for a in result["attempts"]} == {2}
  for level in (1, 2, 3):  # counted by hand
    mine = [a for a in result["attempts"] if a["level"] == level]
    row = next(row for row in result["table"]["pass@2"] if row["level"] == level)
    right = [any(r["correct"] for r in a["responses"]) for a in mine]
    assert row["count"] == len(mine) <= 3 and row["mean"] == sum(right) / len(mine)
  for attempt in result["attempts"]:
    assert all(r["correct"] == (not r["reason"]) for r in attempt["responses"])
  command(evaluate, f"--workdir={trained}")
  assert json.loads((trained / "evaluation.json").read_text()) == result


def test_evaluation_of_more_samples_and_of_other_levels(command, tiny, trained):
  more = tiny(train__average_decay=0.9, evaluation__num_samples=3, task__levels=(2,))
  assert command(evaluate, f"--workdir={trained}", *more).status == 0
  result = json.loads((trained / "evaluation.json").read_text())
  assert set(result["table"]) == {"pass@1", "majority@3", "pass@3"}
  assert {attempt["level"] for attempt in result["attempts"]} == {2}


def test_the_average_is_evaluated_unless_the_last_is_asked_for(command, trained, tmp_path):
  average, last = params(trained), params(trained, last=True)
  restored = {}
  with checkpoint.open_manager(workdirs.checkpoints(trained), create=False) as manager:
    for name in ("average", "params"):
      shape = {"embedding": jax.ShapeDtypeStruct(last["embedding"].shape, np.float32)}
      restored[name] = checkpoint.restore_part(manager, shape, name).state["embedding"]
  np.testing.assert_array_equal(average["embedding"], restored["average"])
  np.testing.assert_array_equal(last["embedding"], restored["params"])
  assert not np.array_equal(average["embedding"], last["embedding"])
  # What was saved decides, not the configuration that evaluation happens to be given.
  config = fields.Config(saved(trained))
  config.train.average_decay = 0.0
  again = experiment.restore_params(config.lock(), trained)[1]
  np.testing.assert_array_equal(again["embedding"], average["embedding"])
  found = []
  for flag in ("--nolast", "--last"):
    path = tmp_path / flag
    command(sample, f"--workdir={trained}", "--prompt=1+1=", flag, f"--output={path}")
    found.append(json.loads(path.read_text())["log_prob"])
  assert found[0] != found[1]


def test_a_run_is_not_shortened_after_the_fact(command, tiny, trained):
  arguments = tiny(train__average_decay=0.9, train__num_steps=2)
  outcome = command(train, f"--workdir={trained}", *arguments)
  assert outcome.status == 2 and "has made 4 steps" in outcome.err and "=2" in outcome.err
  assert saved(trained)["train"]["num_steps"] == 4


def test_a_second_interrupt_ends_at_once(command, tiny, tmp_path, monkeypatch):
  def impatient(run, profile):
    run.batches.close()
    run.manager.close()
    raise KeyboardInterrupt

  monkeypatch.setattr(train, "train", impatient)
  monkeypatch.setattr(train.os, "_exit", sys.exit)  # the status, without ending the tests
  outcome = command(train, f"--workdir={tmp_path / 'run'}", *tiny())
  assert outcome.status == 130 and "goes on from what was saved" in outcome.err


def test_the_best_checkpoint_is_the_one_that_evaluated_best(command, tiny, tmp_path):
  fields = {"data__folder": tmp_path, "data__pattern": "*.txt", "data__row_length": 16}
  for i in range(20):
    (tmp_path / f"{i}.txt").write_text("abcdefgh" * 20)
  peak = {"optimizer__peak": 30.0, "train__num_steps": 6}  # it gets worse
  every = {"train__evaluate_every": 1, "train__save_every": 1, "train__keep": 1}
  workdir = tmp_path / "run"
  arguments = tiny("text.py", evaluation__max_new_tokens=8, **fields, **peak, **every)
  assert command(train, f"--workdir={workdir}", *arguments).status == 0
  records = metrics.read_jsonl(workdir / "metrics.jsonl")
  losses = {r["step"]: r["held_out_loss"] for r in records if "held_out_loss" in r}
  best = min(losses, key=losses.get)
  assert best < 6
  for extra, step in (["--best"], best), ([], 6):
    assert command(evaluate, f"--workdir={workdir}", *extra).status == 0
    result = json.loads((workdir / "evaluation.json").read_text())
    assert result["step"] == step
    assert result["loss"] == pytest.approx(losses[step], rel=1e-6)
  assert (
    "--best and --step=6" in command(evaluate, f"--workdir={workdir}", "--best", "--step=6").err
  )


@pytest.mark.slow
def test_text_of_a_folder_and_of_a_jsonl_file(command, tiny, tmp_path):
  rng = random.Random(0)
  (tmp_path / "texts").mkdir()
  words = lambda: " ".join(rng.choice(["ab", "cd", "[b]", ":x:"]) for _ in range(30))
  for i in range(20):
    (tmp_path / "texts" / f"{i}.txt").write_text(words())
  pairs = [{"prompt": words(), "answer": "ab"} for _ in range(40)]
  (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
  shared = {"data__row_length": 128, "evaluation__max_new_tokens": 8}
  runs = {
    "folder": tiny("text.py", data__folder=tmp_path / "texts", data__pattern="*.txt", **shared),
    "jsonl": tiny(
      "text.py:jsonl",
      data__path=tmp_path / "pairs.jsonl",
      data__rows="pad",
      data__fields="('prompt','answer')",
      **shared,
    ),
  }
  for name, arguments in runs.items():
    workdir = tmp_path / name
    assert command(train, f"--workdir={workdir}", *arguments).status == 0
    outcome = command(evaluate, f"--workdir={workdir}")
    loss = json.loads((workdir / "evaluation.json").read_text())["loss"]
    assert f"{loss:.4f} nats" in outcome.out and 0 < loss < 2 * np.log(259)
    last = [r for r in metrics.read_jsonl(workdir / "metrics.jsonl") if "held_out_loss" in r][-1]
    assert last == {"step": 4, "held_out_loss": pytest.approx(loss, rel=1e-6)}
    outcome = command(sample, f"--workdir={workdir}", "--prompt=[b] :x: é")
    assert outcome.status == 0 and outcome.out.startswith("[b] :x: é")
    outcome = command(sample, f"--workdir={workdir}", "--num_problems=2")
    assert outcome.status == 2 and "give --prompt" in outcome.err


class Page(html.parser.HTMLParser):
  """The tags of a page with their attributes, and its text."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.text = [], ""
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_data(self, data):
    self.text += data


def test_the_quickstart_ends_in_a_self_contained_report(command, tmp_path, monkeypatch):
  made = quickstart.configs  # smaller evaluation than the quickstart's own

  def smaller(workdir):
    sums, learning, digits = made(workdir)
    with sums.unlocked(), learning.unlocked(), digits.unlocked():
      for config in (sums, learning):
        config.evaluation.update(num_problems=4, num_samples=2, batch_size=24)
      learning.train.update(batch_size=8, num_minibatches=2)
      learning.rollouts.batch_size = 64
      digits.evaluation.update(num_images=20, batch_size=20)
      digits.model.update(num_layers=1, width=16)
    return quickstart.Configs(sums, learning, digits)

  monkeypatch.setattr(quickstart, "configs", smaller)
  monkeypatch.setattr(quickstart, "SAMPLERS", (("dpmpp_2m", 2), ("ddim", 3)))
  classifier = image_classifier.get_config()
  with classifier.unlocked():
    classifier.train.update(num_steps=10, batch_size=16)
  monkeypatch.setattr(image_classifier, "get_config", lambda: classifier)
  outcome = command(quickstart, f"--workdir={tmp_path}", "--num_steps=6")
  assert outcome.status == 0 and str(tmp_path / "report.html") in outcome.out
  assert "pass@1" in outcome.out and "majority@2" in outcome.out
  weak, learned = re.search(r"sums: ([\d.]+) weak, ([\d.]+) after", outcome.out).groups()
  text = (tmp_path / "report.html").read_text()
  page = Page(text)
  assert "http:" not in text and "https:" not in text and "url(" not in text
  assert {tag for tag, _ in page.tags} >= {"table", "img", "style", "h1", "h2"}
  assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
  images = [attributes for tag, attributes in page.tags if tag == "img"]
  assert len(images) == 5  # two pairs of curves; digits that are real, and of two solvers
  assert all(image["src"].startswith("data:image/png;base64,iVBOR") for image in images)
  assert "dpmpp_2m, 2 evaluations" in page.text and "frechet" in page.text
  for folder, mean in ((tmp_path, weak), (tmp_path / "learned", learned)):
    result = json.loads((folder / "evaluation.json").read_text())
    for rows in result["table"].values():
      for row in rows:
        assert f"{row['mean']:.3f} [{row['low']:.2f}, {row['high']:.2f}]" in page.text
    right = [r["correct"] for a in result["attempts"] for r in a["responses"]]
    assert f"{np.mean(right):.3f}" == mean
  assert (tmp_path / "learned" / "rollouts.html").exists()
  assert result["attempts"][0]["responses"][0]["reason"] in page.text
  records = metrics.read_jsonl(tmp_path / "metrics.jsonl")
  assert records[-1]["step"] == 6 and "pass@1/level_3" in records[-1]


def test_a_report_shows_what_was_sampled_and_not_what_it_would_mean_as_html():
  hostile = '<img src="http://x"> & "<b>"'
  attempts = [
    {
      "prompt": hostile,
      "answer": hostile,
      "level": 1,
      "responses": [
        {"text": hostile, "correct": False, "reason": hostile},
        {"text": "2", "correct": True, "reason": ""},
      ],
    }
  ]
  page = Page(report.answers(attempts))
  assert {tag for tag, _ in page.tags} <= {"p", "table", "tr", "th", "td", "code", "span"}
  assert page.text.count(hostile) == 6  # each problem and true answer, and a wrong one's two more
