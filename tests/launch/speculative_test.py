"""The launcher of speculation: what its configuration names, and the whole of it on little text."""

import json
import subprocess
import sys

import numpy as np
import pytest

from ancestral.configs import speculative as config_lib
from ancestral.launch import speculative


@pytest.fixture
def folder(tmp_path):
  texts = tmp_path / "texts"
  texts.mkdir()
  for i in range(40):
    (texts / f"{i}.txt").write_text(f"the cat number {i} sat on the mat number {i} again\n" * 3)
  return texts


def small(folder):
  """The configuration with little of everything, of the text in a folder."""
  config = config_lib.get_config()
  with config.unlocked():
    for model in (config.target, config.draft):
      model.data.update(folder=str(folder), pattern="*.txt", row_length=64, test_percent=30)
      model.model.update(width=32, num_heads=2)
      model.train.update(num_steps=2, batch_size=4)
      model.evaluation.update(num_batches=1, batch_size=2)
    config.target.model.num_layers = 2
    config.eagle.num_steps = config.confidence.num_steps = 2
    config.decode.update(batch_sizes=(1,), num_steps=2, prompt_length=16, num_most=5)
  return config


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("decode.exit_layer", 99, "99"),
    ("decode.num_siblings", 0, "decode.num_siblings is 0; it is at least 1"),
    ("decode.num_siblings", 999, "999 children"),
    ("decode.temperature", -1.0, "decode.temperature is -1.0; it is at least 0"),
    ("decode.batch_sizes", (), "decode.batch_sizes is"),
    ("eagle.num_steps", 0, "eagle.num_steps is 0"),
    ("confidence.peak", 0.0, "confidence.peak is 0.0; it is above 0"),
    ("target.model.window", 8, "sliding window"),
    ("target.model.positions", "learned", "no positions beyond"),
  ],
)
def test_what_cannot_be_decoded_is_refused_before_training(folder, field, value, message):
  config = small(folder)
  with config.unlocked():
    config.update_from_flattened_dict({field: value})
    config.decode.num_steps = 12
  with pytest.raises(ValueError, match=message):
    speculative.build(config)


def test_held_out_prompts_are_held_out_text(folder):
  pair = speculative.build(small(folder))
  prompts = speculative.held_out_prompts(pair, 3)
  text = pair.target.tokenizer.decode(np.asarray(prompts.tokens).reshape(-1).tolist())
  assert prompts.tokens.shape == (3, 16) and "cat number" in text
  with pytest.raises(ValueError, match="not 9999 prompts of 16"):
    speculative.held_out_prompts(pair, 9999)


def test_two_vocabularies_are_refused(folder, tmp_path):
  tokenizers = pytest.importorskip("tokenizers")
  path = tmp_path / "tokenizer.json"
  words = {"[PAD]": 0, "[BOS]": 1, "[EOS]": 2, "a": 3}
  tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[PAD]")).save(str(path))
  config = small(folder)
  with config.unlocked():
    config.draft.tokenizer.update(name="file", path=str(path))
  with pytest.raises(ValueError, match="have to agree"):
    speculative.build(config)


@pytest.mark.slow
def test_it_trains_decodes_and_goes_on(folder, tmp_path):
  config, workdir = small(folder), tmp_path / "run"
  fields = [
    f"--config.{path}={value}"
    for path, value in changed(config_lib.get_config().to_dict(), config.to_dict())
  ]
  path = config_lib.__file__
  command = [sys.executable, "-m", "ancestral.launch.speculative", f"--config={path}"]
  command += [*fields, f"--workdir={workdir}"]
  first = subprocess.run(command, capture_output=True, text=True, check=False)
  assert first.returncode == 0, first.stderr
  rows = json.loads((workdir / "speculative.json").read_text())
  assert {row["drafter and rule"] for row in rows} == set(
    speculative.entries(speculative.build(config))
  )
  for row in rows:
    assert 1 <= row["tokens"] <= 9 and 0 <= row["accepted"] <= 1 and row["realised"] > 0
    assert row["drafter and rule"] in first.stdout
  again = subprocess.run(command, capture_output=True, text=True, check=False)
  assert again.returncode == 0, again.stderr
  assert "eagle: step" in first.stdout and "eagle: step" not in again.stdout


def changed(before, after, path=""):
  """(path, value) of the fields that differ."""
  for name, value in after.items():
    if isinstance(value, dict):
      yield from changed(before[name], value, f"{path}{name}.")
    elif value != before[name]:
      yield f"{path}{name}", value
