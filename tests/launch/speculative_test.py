"""The launcher of speculation: what its configuration names, and the whole of it on little text."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.configs import speculative as config_lib
from ancestral.launch import speculative
from ancestral.models import transformer
from ancestral.sampling import base
from ancestral.sampling import speculative as sampling


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


def test_every_drafter_of_the_table_draws_of_untrained_params(folder):
  """Shapes of a step, and that each drafter finds what it needs among the params."""
  pair = speculative.build(small(folder))
  prompts = speculative.held_out_prompts(pair, 2)
  keys = base.row_keys(jax.random.key(0), jnp.arange(2))
  tokens = jnp.zeros((1, 1), jnp.int32)

  def init(key):
    target_key, draft_key, eagle_key, confidence_key = jax.random.split(key, 4)
    return {
      "target": transformer.unstack(pair.target.model.init(target_key, tokens)),
      "draft": transformer.unstack(pair.draft.model.init(draft_key, tokens)),
      "eagle": transformer.unstack(pair.eagle.init(eagle_key)),
      "confidence": pair.confidence.init(confidence_key, pair.draft.model_config.width),
    }

  params = jax.eval_shape(init, jax.random.key(0))
  for name, entry in speculative.entries(pair).items():

    def step(params, keys, entry=entry):
      drafter = entry.drafter(params)
      algorithm = sampling.speculative(
        pair.target.model,
        params["target"],
        drafter,
        max_length=64,
        max_new_tokens=20,
        **entry.settings,
      )
      return algorithm.step(keys, base.start(keys, algorithm, prompts))

    state, info = jax.eval_shape(step, params, keys)
    assert state.tokens.shape[0] == 2 and info.token.shape[1] >= 5, name


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
