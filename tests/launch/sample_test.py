"""The binary that samples: what it asks, how it draws, what it writes, and that it goes on."""

import io
import json
import sys

import numpy as np
import pytest
from absl import flags as absl_flags

from ancestral.launch import sample
from ancestral.sampling import serve


def read(path):
  return sorted(map(json.loads, path.read_text().splitlines()), key=lambda record: record["index"])


@pytest.fixture
def draw(command, trained, tmp_path):
  """(*flags) -> the records written."""

  def run(*arguments, name="samples.jsonl", status=0):
    path = tmp_path / name
    outcome = command(sample, f"--workdir={trained}", *arguments, f"--output={path}")
    assert outcome.status == status, outcome.err
    return read(path)

  return run


def test_samples_of_prompts(command, trained, draw):
  arguments = ["--prompt=1+1=", "--prompt=12+345=", "--num_samples=3"]
  records = draw(*arguments)
  assert [record["prompt"] for record in records] == ["1+1="] * 3 + ["12+345="] * 3
  for record in records:
    assert record["step"] == 4 and record["seed"] == record["index"]
    assert len(record["tokens"]) == len(record["log_prob"]) == len(record["model_log_prob"])
    np.testing.assert_allclose(record["log_prob"], record["model_log_prob"], atol=1e-5)
    assert all(value < 0 for value in record["log_prob"])
    assert record["stop_reason"] == ("stop" if 2 in record["tokens"] else "length")
  outcome = command(sample, f"--workdir={trained}", *arguments)
  shown = [f"{r['prompt']}{r['text']}" for r in records]
  cut = ["  (cut)" * (r["stop_reason"] == "length") for r in records]
  assert outcome.out.splitlines() == [a + b for a, b in zip(shown, cut, strict=True)]
  assert command(sample, f"--workdir={trained}", *arguments).out == outcome.out
  assert command(sample, f"--workdir={trained}", *arguments, "--seed=1").out != outcome.out


def test_presets_and_their_settings_change_the_law(draw):
  asked = ["--prompt=1+1=", "--num_samples=4", "--max_new_tokens=1"]
  greedy = draw(*asked, "--temperature=0", name="greedy")
  assert len({tuple(record["tokens"]) for record in greedy}) == 1
  assert all(record["log_prob"] == [0.0] for record in greedy)
  for number, settings in enumerate(
    (["--top_k=1"], ["--preset=llamacpp", "--temp=0"], ["--preset=vllm", "--top_p=0.0001"])
  ):
    records = draw(*asked, *settings, name=f"{number}")
    assert [record["tokens"] for record in records] == [record["tokens"] for record in greedy]
  token = greedy[0]["tokens"][0]
  banned = draw(*asked, "--temperature=0", f"--suppress_tokens=[{token}]", name="banned")
  assert all(record["tokens"] != [token] for record in banned)
  longer = draw("--prompt=1+1=", "--num_samples=8", "--min_new_tokens=3", name="longer")
  assert all(2 not in record["tokens"][:3] for record in longer)  # 2 ends a sample
  assert longer[0]["settings"]["preset"] == "transformers"


def test_problems_carry_their_verdicts(command, trained, draw):
  records = draw("--num_problems=5", "--num_samples=2")
  assert len(records) == 10 and len({record["prompt"] for record in records}) == 5
  assert all(record["correct"] == (not record["reason"]) for record in records)
  outcome = command(sample, f"--workdir={trained}", "--num_problems=5", "--num_samples=2")
  shown = [f"{r['prompt']}{r['text']}  {r['reason'] or 'correct'}\n" for r in records]
  assert outcome.out == "".join(shown)


def test_prompts_of_a_file_and_of_standard_input(draw, tmp_path, monkeypatch):
  (tmp_path / "prompts.txt").write_text("1+1=\n2+345=\n")
  of_file = draw(f"--prompts={tmp_path}/prompts.txt", name="file")
  monkeypatch.setattr(sys, "stdin", io.StringIO("1+1=\n2+345=\n"))
  assert draw("--prompts=-", name="stdin") == of_file
  assert draw("--prompt=1+1=", "--prompt=2+345=", name="flags") == of_file


def test_lines_of_json_have_their_own_settings(draw, tmp_path):
  lines = [
    {"prompt": "1+1=", "seed": 7},
    {"prompt": "1+1=", "seed": 7, "max_new_tokens": 2},
    {"prompt": "1+1=", "seed": 7, "settings": {"temperature": 0}},
    {"prompt": "1+1=", "seed": 7},
  ]
  (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  records = draw(f"--prompts={tmp_path}/prompts.jsonl", "--temperature=3")
  tokens = [record["tokens"] for record in records]
  assert tokens[0] == tokens[3] and tokens[1] == tokens[0][:2]
  assert [record["settings"]["temperature"] for record in records] == [3, 3, 0, 3]
  assert set(records[2]["log_prob"]) == {0.0} != set(records[0]["log_prob"])


def test_a_stop_text_ends_a_sample_and_is_left_out(draw):
  asked = ["--prompt=1+1=", "--num_samples=8", "--temperature=2"]
  free = draw(*asked, name="free")
  stop = next(record["text"][1:3] for record in free if len(record["text"]) > 3)
  for record, whole in zip(draw(*asked, f"--stop={stop}", name="stopped"), free, strict=True):
    assert record["text"] == whole["text"].split(stop)[0]
    ended = stop in whole["text"]
    assert record["stop_reason"] == ("ending" if ended else whole["stop_reason"])


@pytest.mark.parametrize("cut", [False, True])
def test_an_interrupted_command_keeps_what_is_done_and_resumes(
  command, trained, tmp_path, monkeypatch, draw, cut
):
  asked = ["--prompt=1+1=", "--prompt=2+2=", "--num_samples=6"]
  whole = draw(*asked, name="whole")
  path, made = tmp_path / "samples.jsonl", serve.server

  def failing(*args, **kwargs):
    run = made(*args, **kwargs)

    def results(*args):
      for number, result in enumerate(run(*args)):
        if number == 5:
          raise KeyboardInterrupt
        yield result

    return results

  monkeypatch.setattr(serve, "server", failing)
  outcome = command(sample, f"--workdir={trained}", *asked, f"--output={path}")
  assert outcome.status == 130 and f"--resume goes on with {path}" in outcome.err
  assert len(read(path)) == 5
  monkeypatch.setattr(serve, "server", made)
  if cut:
    path.write_bytes(path.read_bytes()[:-7])  # of the last line
  kept = path.read_bytes()
  assert draw(*asked, "--resume") == whole
  assert path.read_bytes().startswith(kept[: kept.rindex(b"\n") + 1])
  assert draw(*asked, "--resume") == whole  # nothing is left to do


def test_help_has_what_texts_say_and_their_flags():
  found = {flag.name for flag in absl_flags.FLAGS.get_key_flags_for_module(sample.__name__)}
  assert found >= {"prompt", "prompts", "num_problems", "seed", "output", "resume"}
  assert "launch.sample --workdir=" in sample.__doc__
  assert "Prompts are continued as they are" in sample.__doc__
