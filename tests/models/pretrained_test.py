"""Checkpoints without transformers: the way there and back, what is refused, where params go."""

import json
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import targets
from ancestral.models import pretrained, rotary, transformer

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
QWEN = {"tied_embeddings": False, "qkv_bias": True}
GEMMA = {**targets.GEMMA2, "attention_scale": 20**-0.5}
# By name, the family that is found and the fields.
VARIANTS = {
  "llama": ("llama", {"rotary_base": 500.0}),
  "llama_bias": ("llama", {"use_bias": True, "head_dim": 12, "mlp_width": 40}),
  "llama_untied": ("llama", {"tied_embeddings": False, "norm_epsilon": 1e-3}),
  "llama_yarn": ("llama", {"rotary_scaling": rotary.parse(YARN)}),
  "mistral": ("mistral", {"window": 5, "num_kv_heads": 1}),
  "qwen2": ("qwen2", QWEN),
  "qwen2_windows": ("qwen2", {**QWEN, "window": 5, "window_pattern": (False, True)}),
  "qwen3": ("qwen3", {"qk_norm": True, "head_dim": 12}),
  "gemma2": ("gemma2", GEMMA),
  "gemma2_plain": ("gemma2", {**GEMMA, "window": None, "attention_softcap": None, "head_dim": 16}),
  "gpt2": ("gpt2", targets.GPT2),
  "gpt2_unscaled": ("gpt2", {**targets.GPT2, "attention_scale": 1.0, "activation": "gelu"}),
}


def fixed(name):
  """The config of a variant and params, stacked."""
  fields = VARIANTS[name][1] if name in VARIANTS else {}
  config = targets.tiny_config(**fields)
  return config, targets.fixed_params(transformer.transformer(config))


def check_same(one, other):
  """Trees of the same arrays, bit by bit."""
  assert jax.tree.structure(one) == jax.tree.structure(other)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def edit(path, **fields):
  path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


QUERY = "model.layers.1.self_attn.q_proj.weight"
DTYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}


def arrays_of(path):
  """The tensors of a safetensors file by name, as the format says."""
  raw = path.read_bytes()
  start = 8 + struct.unpack("<Q", raw[:8])[0]
  arrays = {}
  for name, entry in json.loads(raw[8:start]).items():
    if name != "__metadata__":
      first, last = (start + offset for offset in entry["data_offsets"])
      flat = np.frombuffer(raw[first:last], DTYPES[entry["dtype"]])
      arrays[name] = flat.reshape(entry["shape"])
  return arrays


def rewrite(path, change):
  """The file with `change` applied to its tensors."""
  names = {np.dtype(dtype): name for name, dtype in DTYPES.items()} | {np.dtype(np.int8): "I8"}
  header, body = {}, b""
  for name, array in change(arrays_of(path)).items():
    offsets = [len(body), len(body) + array.nbytes]
    header[name] = {"dtype": names[array.dtype], "shape": array.shape, "data_offsets": offsets}
    body += array.tobytes()
  text = json.dumps(header).encode()
  path.write_bytes(struct.pack("<Q", len(text)) + text + body)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
  """A checkpoint that no test changes."""
  directory = tmp_path_factory.mktemp("llama") / "model"
  pretrained.write(directory, *fixed("llama"))
  return directory


@pytest.fixture
def copy(llama, tmp_path):
  """The same to spoil."""
  for path in llama.iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  return tmp_path


@pytest.mark.parametrize("name", VARIANTS)
def test_what_was_written_is_read_bit_by_bit(name, tmp_path):
  family, _ = VARIANTS[name]
  config, params = fixed(name)
  assert pretrained.write(tmp_path / "one", config, params) == family
  read_config, read = pretrained.read(tmp_path / "one")
  check_same(read, transformer.unstack(params))
  check_same(pretrained.read(tmp_path / "one", stacked=True)[1], params)
  assert pretrained.write(tmp_path / "two", read_config, read, family=family) == family
  for path in (tmp_path / "one").iterdir():
    assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
  tokens = jnp.asarray([[1, 2, 3, 4, 5, 6, 7, 8]])
  before, after = (
    targets.apply(transformer.transformer(c), params, tokens)[0] for c in (config, read_config)
  )
  np.testing.assert_array_equal(before, after)  # what is not a parameter was written as well


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_shards_hold_what_one_file_holds(name, tmp_path):
  config, params = fixed(name)
  pretrained.write(tmp_path / "shards", config, params, max_shard_bytes=6000)
  files = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
  assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
  largest = max(leaf.nbytes // 2 for leaf in jax.tree.leaves(params))
  for file in files:
    assert (tmp_path / "shards" / file).stat().st_size < 2000 + max(6000, 3 * largest)
  index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
  assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  check_same(pretrained.read(tmp_path / "shards")[1], transformer.unstack(params))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_stays_as_it_is(name, dtype, tmp_path):
  config, params = fixed(name)
  low = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
  pretrained.write(tmp_path / "low", config, low)
  pretrained.write(tmp_path / "cast", config, params, dtype=dtype)
  for folder in ("low", "cast"):
    read_config, read = pretrained.read(tmp_path / folder)
    assert read_config.dtype == pretrained.read_config(tmp_path / folder).dtype == dtype
    check_same(read, transformer.unstack(low))
  wide_config, wide = pretrained.read(tmp_path / "low", dtype="float32", stacked=True)
  assert wide_config.dtype == "float32"
  check_same(wide, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), low))


@pytest.mark.parametrize(
  "name, tensor, transposed",
  [
    ("llama", "model.layers.1.mlp.down_proj.weight", True),
    ("gpt2", "transformer.h.1.mlp.c_proj.weight", False),
  ],
)
def test_kernels_are_written_as_their_classes_have_them(name, tensor, transposed, tmp_path):
  config, params = fixed(name)
  pretrained.write(tmp_path / "model", config, params)
  kernel = np.asarray(params["layers"]["mlp"]["down"]["kernel"])[1]
  found = arrays_of(tmp_path / "model" / "model.safetensors")
  np.testing.assert_array_equal(found[tensor], kernel.T if transposed else kernel)


def test_layers_of_several_dtypes_are_stacked_in_one_that_holds_all(copy):
  change = lambda arrays: {**arrays, QUERY: arrays[QUERY].astype(ml_dtypes.bfloat16)}
  rewrite(copy / "model.safetensors", change)
  kernel = np.asarray(fixed("llama")[1]["layers"]["attention"]["query"]["kernel"])
  low = kernel[1].astype(ml_dtypes.bfloat16)
  first, second = pretrained.read(copy)[1]["layers"]
  check_same(second["attention"]["query"]["kernel"], low)
  assert first["attention"]["query"]["kernel"].dtype == jnp.float32
  stacked = pretrained.read(copy, stacked=True)[1]["layers"]["attention"]["query"]["kernel"]
  check_same(stacked, np.stack([kernel[0], low.astype(np.float32)]))


@pytest.mark.parametrize("read", [pretrained.read_config, pretrained.read])
def test_a_dtype_that_cannot_be_asked_for_is_named(llama, read):
  with pytest.raises(ValueError, match=r"^dtype='int8' is not one of"):
    read(llama, dtype="int8")


def test_gpt2s_queries_keys_and_values_are_one_tensor(tmp_path):
  config, params = fixed("gpt2")
  pretrained.write(tmp_path / "model", config, params)
  found = arrays_of(tmp_path / "model" / "model.safetensors")
  attention = params["layers"]["attention"]
  for leaf, ending in (("kernel", "weight"), ("bias", "bias")):
    parts = [attention[part][leaf][1] for part in ("query", "key", "value")]
    fused = found[f"transformer.h.1.attn.c_attn.{ending}"]
    np.testing.assert_array_equal(fused, np.concatenate(parts, axis=-1))


def test_the_first_gpt2_has_no_prefix_and_keeps_its_masks(tmp_path):
  config, params = fixed("gpt2")
  pretrained.write(tmp_path / "model", config, params)

  def older(arrays):
    bare = {name.removeprefix("transformer."): array for name, array in arrays.items()}
    mask = np.ones((1, 1, 32, 32), np.int8)
    return {**bare, "h.0.attn.bias": mask, "h.1.attn.masked_bias": mask}

  rewrite(tmp_path / "model" / "model.safetensors", older)
  check_same(pretrained.read(tmp_path / "model")[1], transformer.unstack(params))


def test_a_readout_beside_tied_embeddings_is_left_alone(copy):
  head = {"lm_head.weight": np.zeros((23, 32), np.float32)}
  rewrite(copy / "model.safetensors", lambda arrays: {**arrays, **head})
  check_same(pretrained.read(copy)[1], transformer.unstack(fixed("llama")[1]))


def test_token_ids_are_found_in_either_file(tmp_path, llama):
  ids = {"bos_token_id": 1, "eos_token_id": [2, 3]}
  pretrained.write(tmp_path / "model", *fixed("llama"), token_ids=ids)
  assert pretrained.token_ids(tmp_path / "model") == ids
  edit(tmp_path / "model" / "generation_config.json", eos_token_id=7)
  assert pretrained.token_ids(tmp_path / "model") == {"bos_token_id": 1, "eos_token_id": 7}
  (tmp_path / "model" / "generation_config.json").unlink()
  assert pretrained.token_ids(tmp_path / "model") == ids
  assert pretrained.token_ids(llama) == {}
  said = json.loads((llama / "config.json").read_text())
  assert said["eos_token_id"] is None  # or transformers would take its class's


@pytest.mark.parametrize(
  "fields, culprit",
  [
    ({"hidden_act": "relu"}, "hidden_act='relu' is not supported, only 'silu'"),
    ({"architectures": ["OPTForCausalLM"]}, "OPTForCausalLM.*only 'LlamaForCausalLM'"),
    ({"architectures": None, "model_type": "opt"}, "model_type='opt'"),
    ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type='longrope'.*'default' or 'linear'"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
    ({"rope_scaling": {"type": "linear"}}, r"needs \['factor'\]"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "no fields.*full_attention"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"hidden_size": None}, "hidden_size is missing"),
    ({"hidden_size": "32"}, "another type"),
    ({"num_key_value_heads": 3}, "num_kv_heads=3"),
    ({"dtype": "int8"}, "dtype='int8'.*float32"),
  ],
)
def test_what_config_json_says_and_is_not_supported_is_named(copy, fields, culprit):
  edit(copy / "config.json", **fields)
  for read in (pretrained.read_config, pretrained.read):
    with pytest.raises(ValueError, match=culprit) as error:
      read(copy)
    assert "\n" not in str(error.value) and str(copy / "config.json") in str(error.value)


@pytest.mark.parametrize(
  "name, fields, culprit",
  [
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "only False"),
    ("gpt2", {"activation_function": "tanh"}, "activation_function='tanh'"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma2", {"layer_types": ["full_attention"]}, "only 2 of"),
    ("qwen2", {"layer_types": ["chunked_attention"] * 2}, "chunked_attention"),
  ],
)
def test_so_is_what_other_families_say(tmp_path, name, fields, culprit):
  pretrained.write(tmp_path / "model", *fixed(name))
  edit(tmp_path / "model" / "config.json", **fields)
  with pytest.raises(ValueError, match=culprit):
    pretrained.read_config(tmp_path / "model")


def without(name):
  return lambda arrays: {key: array for key, array in arrays.items() if key != name}


@pytest.mark.parametrize(
  "change, culprit",
  [
    (without(QUERY), f"no tensor {QUERY}"),
    (lambda arrays: {"model.norm.weight": arrays["model.norm.weight"]}, "18 more are missing"),
    (lambda arrays: {**arrays, "model.layers.2.a": np.zeros(3, np.float32)}, "model.layers.2.a is"),
    (lambda arrays: {**arrays, QUERY: arrays[QUERY][:8]}, rf"{QUERY} is \[8, 32\], and \[32, 32\]"),
    (lambda arrays: {**arrays, QUERY: arrays[QUERY].astype(np.int8)}, f"{QUERY} is I8, not one of"),
  ],
)
def test_tensors_that_are_not_as_config_json_says_are_named(copy, change, culprit):
  rewrite(copy / "model.safetensors", change)
  with pytest.raises(ValueError, match=culprit) as error:
    pretrained.read(copy)
  assert "\n" not in str(error.value) and str(copy) in str(error.value)


def spoil(path, spoiled):
  path.write_bytes(spoiled(path.read_bytes()))


@pytest.mark.parametrize(
  "spoiled, culprit",
  [
    (lambda raw: raw[:-5], "it was cut off"),
    (lambda raw: raw + b"more", "added to"),
    (lambda raw: raw[:100], "cut off"),
    (lambda raw: raw[:4], "4 bytes"),
    (lambda raw: raw[:8] + b"x" * (len(raw) - 8), "header is not JSON"),
    (lambda raw: raw.replace(b'"F32"', b'"F16"', 1), "does not fill bytes"),
    (lambda raw: raw.replace(b'"shape"', b'"shave"', 1), "not of the format"),
  ],
)
def test_a_spoiled_file_is_named(copy, spoiled, culprit):
  spoil(copy / "model.safetensors", spoiled)
  with pytest.raises(ValueError, match=culprit) as error:
    pretrained.read(copy)
  assert "\n" not in str(error.value) and str(copy / "model.safetensors") in str(error.value)


def test_files_that_are_not_there_are_named(copy):
  (copy / "model.safetensors").rename(copy / "model-00001-of-00002.safetensors")
  with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
    pretrained.read(copy)
  index = copy / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": {QUERY: "model-00002-of-00002.safetensors"}}))
  with pytest.raises(FileNotFoundError, match="model-00002-of-00002"):
    pretrained.read(copy)
  index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
  with pytest.raises(ValueError, match="no tensor a, which"):
    pretrained.read(copy)
  index.write_text("{}")
  with pytest.raises(ValueError, match="no weight_map"):
    pretrained.read(copy)
  index.write_text("[")
  with pytest.raises(ValueError, match="not JSON"):
    pretrained.read(copy)
  (copy / "config.json").unlink()
  with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
    pretrained.read(copy)
