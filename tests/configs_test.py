"""Every variant of every configuration: it builds, is locked, and says the truth about its size."""

import contextlib
import importlib
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import rich.console

from ancestral.configs import arithmetic, masked_lm, text
from ancestral.launch import (
  answers,
  decoding,
  draws,
  experiment,
  fields,
  filled_answers,
  held_out,
  language,
  masked,
  train,
  unmasking,
)
from ancestral.launch import texts as texts_lib
from ancestral.sampling import logits
from ancestral.training import data, step

VARIANTS = [("arithmetic", name) for name in arithmetic.VARIANTS] + [
  ("text", name) for name in text.DATA
]


def config_of(module, variant, folder):
  """The variant, its data in a folder where it needs some."""
  config = importlib.import_module(f"ancestral.configs.{module}").get_config(variant)
  with config.unlocked():
    if variant == "jsonl":
      path = folder / "texts.jsonl"
      path.write_text('{"text": "a b c d"}\n' * 50)
      config.data.path = str(path)
  return config


def abstract_state(built):
  return jax.eval_shape(lambda key: experiment.init_state(built, key), jax.random.key(0))


def num_params(built):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_state(built).params))


@pytest.fixture
def texts(monkeypatch):
  """In place of a tensorflow-datasets data set that has to be downloaded."""
  record = lambda index: {"text": f"text number {index}".encode()}
  monkeypatch.setattr(data, "tfds_source", lambda name, split, data_dir: data.Source(50, record))


@pytest.mark.parametrize("module, variant", VARIANTS)
def test_a_variant_builds_is_locked_and_starts(module, variant, tmp_path, texts):
  config = config_of(module, variant, tmp_path)
  assert config.is_locked
  with pytest.raises(AttributeError, match="optimizer"):
    config.optimzer = 1
  with pytest.raises(TypeError):
    config.train.num_steps = "many"
  built = experiment.build(config)
  assert num_params(built) > 1e5
  batches = data.batches(built.source, built.rows, batch_size=2, seed=0)
  batch = next(batches)
  assert batch["tokens"].shape == (2, config.data.row_length) and batch["mask"].sum() > 0
  (loss, weight), _ = jax.eval_shape(
    built.loss_fn, jax.random.key(0), abstract_state(built).params, batch
  )
  assert loss.shape == weight.shape == (2,)


@pytest.mark.parametrize("module, variant", VARIANTS)
def test_a_docstring_states_the_measured_number_of_parameters(module, variant, tmp_path, texts):
  doc = importlib.import_module(f"ancestral.configs.{module}").__doc__
  entry = re.search(rf"^  {variant} .*\n(   .*\n)*", doc, re.MULTILINE).group()
  stated = re.search(r"([\d.]+)M parameters", entry)
  if module == "arithmetic":
    measured = num_params(experiment.build(config_of(module, variant, tmp_path)))
    assert stated.group(1) == f"{measured / 1e6:.1f}"
  else:
    assert stated is None


def test_the_default_text_is_the_standard_library():
  built = experiment.build(text.get_config())
  document = built.tokenizer.decode(built.source[0]["tokens"])
  assert len(built.source) > 100 and ("import" in document or "def" in document)


@pytest.mark.parametrize("module, wrong", [(arithmetic, "tinny"), (text, "folders")])
def test_a_misspelt_variant(module, wrong):
  with pytest.raises(ValueError, match=f"no variant '{wrong}': it has .*, ") as error:
    module.get_config(wrong)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "name", [path.stem for path in pathlib.Path(text.__file__).parent.glob("[a-z]*.py")]
)
def test_two_configurations_share_nothing(name):
  """A field without a value is a reference: one of two owners would set it for both."""
  module = importlib.import_module(f"ancestral.configs.{name}")
  one, other = module.get_config(), module.get_config()
  value = {int: 1, float: 1.0, tuple: (1,)}
  with one.unlocked():
    for path in leaves(one):
      *sections, field = path.split(".")
      section, twin = one, other
      for inner in sections:
        section, twin = section[inner], twin[inner]
      if section[field] is None:
        section[field] = value[section.get_type(field)]
        assert twin[field] is None, path


def leaves(config, path=""):
  for name in config:
    inner = f"{path}{name}"
    if isinstance(config[name], ml_collections.ConfigDict):
      yield from leaves(config[name], f"{inner}.")
    else:
      yield inner


class Reads:
  """Which fields of a configuration are read by name, by whatever holds it."""

  def __init__(self, monkeypatch):
    self.paths, self.found, self.muted = {}, set(), False
    self.getitem = ml_collections.ConfigDict.__getitem__
    monkeypatch.setattr(
      ml_collections.ConfigDict, "__getitem__", lambda config, name: self.read(config, name)
    )
    # These look at every field, for nobody.
    for module, whole in (
      (fields, "to_json"),
      (fields, "check"),
      (language, "_check"),
      (masked, "_check"),
      (unmasking, "check"),
    ):
      monkeypatch.setattr(module, whole, self.mute(getattr(module, whole)))

  def mute(self, function):
    def muted(*args):
      with self.silence():
        return function(*args)

    return muted

  @contextlib.contextmanager
  def silence(self):
    before, self.muted = self.muted, True
    yield
    self.muted = before

  def watch(self, config):
    with self.silence():
      self.paths[id(config)] = ""
      self.root = config
      stack = [config]
      while stack:
        node = stack.pop()
        for name in node:
          if isinstance(child := node[name], ml_collections.ConfigDict):
            self.paths[id(child)] = f"{self.paths[id(node)]}{name}."
            stack.append(child)
    return config

  def read(self, config, name):
    if not self.muted and id(config) in self.paths:
      self.found.add(f"{self.paths[id(config)]}{name}")
    return self.getitem(config, name)


TINY = {
  "model": {"num_layers": 1, "width": 16, "num_heads": 2},
  "train": {"num_steps": 2, "batch_size": 4, "evaluate_every": 2, "save_every": 2},
  "optimizer": {"name": "adamw", "warmup_fraction": 0.5},
}


@pytest.mark.parametrize("variant", ["jsonl", "tfds"])
def test_every_field_of_the_data_is_read_by_something(variant, tmp_path, texts, monkeypatch):
  config = config_of("text", variant, tmp_path)
  expected = {name for name in leaves(config) if name.startswith("data.")}
  reads = Reads(monkeypatch)
  assert len(experiment.build(reads.watch(config)).source[0]["tokens"])
  assert expected - reads.found == set()


@pytest.mark.parametrize("module, variant", [("arithmetic", "tiny"), ("text", "folder")])
def test_every_field_is_read_by_something(module, variant, tmp_path, monkeypatch):
  config = config_of(module, variant, tmp_path)
  config.update(TINY)
  if module == "text":
    config.data.row_length = config.evaluation.max_new_tokens + 28
    config.evaluation.num_batches = 1
  else:
    config.evaluation.update(num_problems=2, num_samples=2, batch_size=4)
  expected = set(leaves(config))
  reads = Reads(monkeypatch)
  reads.watch(config)
  train.train(train.open_run(config, str(tmp_path / "run")))
  built, params, _ = experiment.restore_params(config, str(tmp_path / "run"))
  if module == "arithmetic":
    attempts = language.verified(built, num_samples=config.evaluation.num_samples)(
      params, jax.random.key(0)
    )
    assert answers.record(attempts)["table"]
  else:
    assert held_out.mean_loss(built)(params) > 0
    for name, value in {
      "PROMPT": ["a"],
      "PROMPTS": None,
      "NUM_PROBLEMS": 0,
      "NUM_SAMPLES": 1,
      "_MAX_NEW_TOKENS": None,
      "_STOP": [],
    }.items():
      monkeypatch.setattr(texts_lib, name, Flag(value))
    monkeypatch.setattr(draws, "SEED", Flag(0))
    plain = decoding.Decoding(lambda settings: logits.chain(), {}, {})
    asks = texts_lib.asks_of(built, plain, {})
    assert len(list(texts_lib.draw(built, params, asks, plain, lambda progress: None))) == 1
    expected -= {"tokenizer.path"}  # read where the tokenizer is a file: launch/bad_input_test.py
  assert expected - reads.found == set()


@pytest.mark.parametrize("variant", ["arithmetic", "sudoku4", "text", "blocks"])
def test_every_field_of_a_masked_model_is_read(variant, tmp_path, monkeypatch):
  config = masked_lm.get_config(variant)
  config.update(TINY)
  config.evaluation.update(batch_size=4)
  if "task" in config:
    config.evaluation.update(num_problems=2, num_samples=2)
  else:
    config.data.row_length, config.evaluation.num_batches = 32, 1
  expected = set(leaves(config))
  reads = Reads(monkeypatch)
  reads.watch(config)
  train.train(train.open_run(config, str(tmp_path / "run")))
  built, params, _ = experiment.restore_params(config, str(tmp_path / "run"))
  monkeypatch.setattr(unmasking, "_FLAGS", {})  # not parsed
  console = rich.console.Console(quiet=True)
  assert filled_answers.evaluate(built, params, str(tmp_path / "run"), console)
  blockwise = config.loss.block_length is not None
  keys, tokens = (
    jax.random.split(jax.random.key(0), 1),
    np.full((1, config.data.row_length), built.mask),
  )
  for settings in (
    {"sampler": "ordered"},
    {"order": "margin", "threshold": 0.5},
    {"threshold": None, "entropy_bound": 0.5},
    *(() if blockwise else ({"sampler": "ancestral"}, {"sampler": "remasking"})),
  ):
    config.evaluation.unmasking.update(settings)
    fill = masked.filler(built, logits.temperature, config.evaluation.unmasking)
    assert not np.any(fill(params, 1.0, keys, tokens).tokens == built.mask)
  if blockwise:  # refused with blocks
    expected -= {f"evaluation.unmasking.{name}" for name in ("steps", "remask", "guidance")}
    expected -= {"loss.unconditional"}
  expected -= {"tokenizer.path"}  # read where the tokenizer is a file
  assert expected - reads.found == set()


class Flag:
  def __init__(self, value):
    self.value = value


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("variant", ["tiny", "paper"])
def test_training_and_sampling_lower_for(platform, variant):
  built = experiment.build(arithmetic.get_config(variant))
  c = built.config
  key = jax.eval_shape(lambda: jax.random.key(0))
  rows = jax.ShapeDtypeStruct((c.train.batch_size, c.data.row_length), jnp.int32)
  batch = {"tokens": rows, "targets": rows, "mask": rows.update(dtype=jnp.float32)}

  @jax.jit
  def train_step(key, state, batch):
    return step.train_step(
      key,
      state,
      batch,
      loss_fn=built.loss_fn,
      optimizer=built.optimizer,
      averaging=built.averaging,
      num_microbatches=2,
    )

  state = abstract_state(built)
  lowered = train_step.trace(key, state, batch).lower(lowering_platforms=(platform,))
  assert "stablehlo.dot_general" in lowered.as_text()

  prompts = language.decode.Prompts(
    jax.ShapeDtypeStruct((4, 8), np.int32), jax.ShapeDtypeStruct((4,), np.int32)
  )
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 4))
  params = jax.eval_shape(language.finished, state.params)
  draw = language.sampler(built, max_new_tokens=c.evaluation.max_new_tokens)
  number = jax.ShapeDtypeStruct((), jnp.float32)
  lowered = draw.trace(params, number, keys, prompts).lower(lowering_platforms=(platform,))
  assert "stablehlo.while" in lowered.as_text()
