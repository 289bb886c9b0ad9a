"""PEFT's directories without PEFT: names and shapes, the way back, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.models import safetensors_files
from ancestral.training import lora, peft_layout

CONFIG = targets.tiny_config()


def adapters_of(patterns, rank=3, **fields):
  _, params = targets.tiny_target(**fields)
  made = lora.init(jax.random.key(0), params, patterns, rank)
  rng = np.random.default_rng(1)
  fill = lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32)
  return {path: lora.Adapter(a, fill(b)) for path, (a, b) in made.items()}


def written(tmp_path, adapters=None, config=CONFIG, **kwargs):
  adapters = adapters_of(("attention/(query|value)/kernel",)) if adapters is None else adapters
  peft_layout.write(tmp_path / "made", config, adapters, **{"alpha": 6.0, **kwargs})
  return tmp_path / "made", adapters


def fields_of(directory):
  return json.loads((directory / "adapter_config.json").read_text())


def edit(directory, **fields):
  changed = {**fields_of(directory), **fields}
  (directory / "adapter_config.json").write_text(json.dumps(changed))


def test_names_shapes_and_values(tmp_path):
  directory, adapters = written(tmp_path)
  held = safetensors_files.header(directory / "adapter_model.safetensors")
  expected = {
    f"base_model.model.model.layers.{layer}.self_attn.{letter}_proj.lora_{half}.weight": shape
    for layer in (0, 1)
    for letter, out in (("q", 32), ("v", 16))
    for half, shape in (("A", (3, 32)), ("B", (out, 3)))
  }
  assert {name: tensor.shape for name, tensor in held.items()} == expected
  name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
  value = adapters["layers/attention/value/kernel"].b[1]
  np.testing.assert_array_equal(held[name].mapped(), np.asarray(value).T)
  fields = fields_of(directory)
  assert fields["peft_type"] == "LORA" and fields["r"] == 3 and fields["lora_alpha"] == 6
  assert fields["target_modules"] == ["q_proj", "v_proj"] and not fields["use_rslora"]
  assert sorted(path.name for path in tmp_path.iterdir()) == ["made"]


def test_targets_are_whole_names_where_last_names_say_more(tmp_path):
  adapters = adapters_of(("layers/1/mlp/up",), scan_layers=False)
  directory, _ = written(tmp_path, adapters)
  assert fields_of(directory)["target_modules"] == ["model.layers.1.mlp.up_proj"]
  found, scale = peft_layout.read(directory, CONFIG)
  assert scale == 2
  jax.tree.map(np.testing.assert_array_equal, found, adapters)
  with pytest.raises(ValueError, match="mlp/up/kernel: layer 0 has no adapter"):
    peft_layout.read(directory, CONFIG, stacked=True)


@pytest.mark.parametrize(
  "fields, patterns",
  [({}, ("kernel",)), ({"tied_embeddings": False}, ("query", "readout"))],
)
def test_there_and_back(tmp_path, fields, patterns):
  adapters, config = adapters_of(patterns, **fields), targets.tiny_config(**fields)
  directory, _ = written(tmp_path, adapters, config, rank_stabilised=True)
  found, scale = peft_layout.read(directory, config, stacked=True)
  assert scale == pytest.approx(6 / 3**0.5)
  jax.tree.map(np.testing.assert_array_equal, found, adapters)


def test_gpt2_has_kernels_the_other_way_round_and_some_side_by_side(tmp_path):
  config = targets.tiny_config(**targets.GPT2)
  directory, _ = written(tmp_path, adapters_of(("mlp/up/kernel",), **targets.GPT2), config)
  assert fields_of(directory)["fan_in_fan_out"]
  with pytest.raises(ValueError, match="layers/0/attention/query/kernel: gpt2 has no module"):
    adapters = adapters_of(("query/kernel",), **targets.GPT2)
    peft_layout.write(tmp_path / "fused", config, adapters, alpha=1.0)
  assert not (tmp_path / "fused").exists()


def test_what_cannot_be_written(tmp_path):
  directory, adapters = written(tmp_path)
  with pytest.raises(FileExistsError, match="something in it"):
    peft_layout.write(directory, CONFIG, adapters, alpha=1.0)
  with pytest.raises(ValueError, match="embedding: llama has no module"):
    peft_layout.write(tmp_path / "a", CONFIG, adapters_of(("embedding",)), alpha=1.0)
  mixed = adapters | adapters_of(("mlp/up",), rank=2)
  for wrong, ranks in ((mixed, r"\[2, 3\]"), ({}, r"\[\]")):
    with pytest.raises(ValueError, match=f"of ranks {ranks}"):
      peft_layout.write(tmp_path / "a", CONFIG, wrong, alpha=1.0)


@pytest.mark.parametrize(
  "change, complaint",
  [
    ({"use_dora": True}, "use_dora is not supported"),
    ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern is not supported"),
    ({"peft_type": "LOHA"}, "peft_type='LOHA' is not supported"),
    ({"r": "three"}, "r or lora_alpha is no number"),
    ({"r": 4}, r"lora_A.weight is \(3, 32\), and \(4, 32\)"),
  ],
)
def test_configurations_that_are_refused(tmp_path, change, complaint):
  directory, _ = written(tmp_path)
  edit(directory, **change)
  with pytest.raises(ValueError, match=complaint):
    peft_layout.read(directory, CONFIG)


def test_tensors_that_are_refused(tmp_path):
  directory, _ = written(tmp_path)
  path = directory / "adapter_model.safetensors"
  raw = path.read_bytes()
  path.write_bytes(raw.replace(b"lora_B", b"lora_C"))
  with pytest.raises(ValueError, match=r"lora_B\.weight is None, and \(32, 3\)"):
    peft_layout.read(directory, CONFIG)
  path.write_bytes(raw.replace(b"q_proj", b"x_proj"))
  with pytest.raises(ValueError, match=r"x_proj\.lora_A\.weight is no adapter"):
    peft_layout.read(directory, CONFIG)
  path.write_bytes(raw[:-4])
  with pytest.raises(ValueError, match="cut off"):
    peft_layout.read(directory, CONFIG)
  path.unlink()
  with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors"):
    peft_layout.read(directory, CONFIG)
