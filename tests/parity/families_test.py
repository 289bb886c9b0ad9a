"""Families of pretrained models against transformers: the same files, the same numbers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.models import pretrained, transformer
from ancestral.sampling import base as sampling
from ancestral.sampling import decode, logits

pytestmark = pytest.mark.peers

NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SIZES = {
  "vocab_size": 61,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 128,
  **NO_TOKENS,
}
GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, **NO_TOKENS}
GEMMA = {**SIZES, "head_dim": 16, "sliding_window": 7, "query_pre_attn_scalar": 24}
BIAS = {"attention_bias": True}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
QWEN_WINDOWS = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
CASES = {
  "llama": ("Llama", SIZES),
  "llama_bias": ("Llama", {**SIZES, **BIAS, "mlp_bias": True, "head_dim": 12}),
  "llama_tied": ("Llama", {**SIZES, **TIED, "num_key_value_heads": 4, "rms_norm_eps": 1e-3}),
  "mistral": ("Mistral", {**SIZES, "sliding_window": 7, "num_key_value_heads": 1}),
  "mistral_whole": ("Mistral", {**SIZES, "sliding_window": None, **TIED}),
  "qwen2": ("Qwen2", {**SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
  "qwen2_tied": ("Qwen2", {**SIZES, **TIED, "num_key_value_heads": 1}),
  "qwen2_windows": ("Qwen2", {**SIZES, **QWEN_WINDOWS}),
  "qwen2_wide_heads": ("Qwen2", {**SIZES, "head_dim": 12}),
  "qwen3": ("Qwen3", {**SIZES, "head_dim": 16}),
  "qwen3_bias": ("Qwen3", {**SIZES, **TIED, **BIAS, **QWEN_WINDOWS, "head_dim": 12}),
  "gemma2": ("Gemma2", GEMMA),
  "gemma2_untied": ("Gemma2", {**GEMMA, **UNTIED, **BIAS, "num_key_value_heads": 4}),
  "gemma2_uncapped": (
    "Gemma2",
    {**GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": 3.0, "head_dim": 12},
  ),
  "gpt2": ("GPT2", GPT2),
  "gpt2_untied": ("GPT2", {**GPT2, **UNTIED, "n_inner": 40, "layer_norm_epsilon": 1e-3}),
  "gpt2_unscaled": (
    "GPT2",
    {**GPT2, "scale_attn_weights": False, "activation_function": "gelu"},
  ),
}
ONE_EACH = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt2")
ROTARY = {
  "linear": {"rope_type": "linear", "factor": 3.0},
  "llama3": {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
  },
  "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
  "yarn_fields": {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "attention_factor": 0.8,
    "beta_fast": 4.0,
    "beta_slow": 0.5,
    "truncate": False,
  },
  "yarn_mscale": {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "mscale": 0.7,
    "mscale_all_dim": 1.2,
  },
}


@pytest.fixture(autouse=True)
def exact_matmuls():
  with jax.default_matmul_precision("highest"):
    yield


def made(peers, kind, fields, *, gain=1.5, embedding=0.5):
  """A model of theirs with weights that make every part of it matter."""
  torch, transformers, _ = peers
  of = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
  model = getattr(transformers, of)(getattr(transformers, f"{kind}Config")(**fields)).eval()
  rng = np.random.default_rng(0)
  with torch.no_grad():
    for name, leaf in model.named_parameters():
      noise = rng.normal(size=leaf.shape)
      if name.endswith("bias"):
        noise = 0.3 * noise
      elif leaf.ndim == 1:
        noise = 0.2 * noise + (0 if kind == "Gemma2" else 1)
      elif "wte" in name or "wpe" in name or "embed" in name:
        noise = embedding * noise
      else:
        inputs = leaf.shape[0 if kind == "GPT2" and "lm_head" not in name else 1]
        noise = gain * noise / inputs**0.5
      leaf.copy_(torch.from_numpy(noise))
  return model


def their_logits(peers, model, tokens):
  torch, _, _ = peers
  with torch.inference_mode():
    return model(torch.from_numpy(tokens)).logits.float().numpy()


def our_logits(config, params, tokens):
  model = transformer.transformer(config)
  hidden, _ = targets.apply(model, params, jnp.asarray(tokens))
  return np.asarray(model.readout(params, hidden))


def loaded(peers, directory, **kwargs):
  """Their model of a directory, all of whose tensors they know and none of which they miss."""
  _, transformers, _ = peers
  model, found = transformers.AutoModelForCausalLM.from_pretrained(
    directory, output_loading_info=True, **kwargs
  )
  for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
    assert not found.get(problem), (problem, found)
  return model.eval()


def check_same(one, other):
  assert jax.tree.structure(one) == jax.tree.structure(other)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


TOKENS = np.random.default_rng(0).integers(0, 61, (2, 40))


@pytest.mark.parametrize("name", CASES)
def test_logits_are_theirs_there_and_back(peers, name, tmp_path):
  model = made(peers, *CASES[name])
  model.save_pretrained(tmp_path / "theirs")
  config, params = pretrained.read(tmp_path / "theirs")
  expected = their_logits(peers, model, TOKENS)
  out = our_logits(config, params, TOKENS)
  assert expected.std() > 0.5
  assert np.abs(out - expected).max() < 1e-4

  family = CASES[name][0].lower()
  assert pretrained.write(tmp_path / "ours", config, params, family=family) == family
  again, read = pretrained.read(tmp_path / "ours")
  assert again.resolved() == config.resolved()
  check_same(read, params)
  written = loaded(peers, tmp_path / "ours")
  assert type(written) is type(model)
  np.testing.assert_array_equal(their_logits(peers, written, TOKENS), expected)
  for name, leaf in model.state_dict().items():
    assert peers[0].equal(leaf, written.state_dict()[name])


@pytest.mark.parametrize("name", ["llama_bias", "mistral", "qwen2_windows", *ONE_EACH[3:]])
def test_greedy_decoding_is_theirs_token_for_token(peers, name, tmp_path):
  torch, _, _ = peers
  # With large embeddings a tied model says what it was told, over and over.
  model = made(peers, *CASES[name], gain=3.0, embedding=0.05)
  model.save_pretrained(tmp_path / "theirs")
  config, params = pretrained.read(tmp_path / "theirs")
  rows = np.random.default_rng(1).integers(1, 61, (3, 5))
  inputs = torch.from_numpy(rows)
  with torch.inference_mode():
    expected = model.generate(
      inputs,
      attention_mask=torch.ones_like(inputs),
      do_sample=False,
      max_new_tokens=64,
      min_new_tokens=64,
      use_cache=True,
      pad_token_id=0,
    ).numpy()
  keys = sampling.row_keys(jax.random.key(0), jnp.arange(3))
  ours = transformer.transformer(config)
  samples = jax.jit(
    lambda params, keys, prompts: decode.generate(
      ours, params, keys, prompts, max_new_tokens=64, transform=logits.greedy()
    )
  )(params, keys, targets.prompts_of(rows.tolist()))
  np.testing.assert_array_equal(samples.tokens[:, :69], expected)
  assert min(len(np.unique(row[5:])) for row in expected) > 8  # not one token over and over


@pytest.mark.parametrize("name", ROTARY)
@pytest.mark.parametrize("older", [False, True])
def test_rotary_scaling_is_theirs_beyond_the_original_context(peers, name, older, tmp_path):
  rope = {**ROTARY[name], "rope_theta": 100.0}
  model = made(peers, "Llama", {**SIZES, "rope_parameters": rope})
  model.save_pretrained(tmp_path / "theirs")
  path = tmp_path / "theirs" / "config.json"
  if older:  # as transformers 4 wrote it
    said = json.loads(path.read_text())
    del said["rope_parameters"]
    path.write_text(json.dumps({**said, "rope_theta": 100.0, "rope_scaling": ROTARY[name]}))
  config, params = pretrained.read(tmp_path / "theirs")
  tokens = np.random.default_rng(2).integers(0, 61, (2, 120))
  expected = their_logits(peers, model, tokens)
  assert np.abs(our_logits(config, params, tokens) - expected).max() < 1e-4
  unscaled = made(peers, "Llama", {**SIZES, "rope_parameters": {**rope, "rope_type": "default"}})
  assert np.abs(their_logits(peers, unscaled, tokens) - expected)[:, 64:].max() > 0.1
  pretrained.write(tmp_path / "ours", config, params)
  written = loaded(peers, tmp_path / "ours")
  np.testing.assert_array_equal(their_logits(peers, written, tokens), expected)


@pytest.mark.parametrize("name", ONE_EACH)
def test_shards_both_ways(peers, name, tmp_path):
  model = made(peers, *CASES[name])
  model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
  model.save_pretrained(tmp_path / "whole")
  assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 3
  config, params = pretrained.read(tmp_path / "theirs")
  check_same(params, pretrained.read(tmp_path / "whole")[1])
  pretrained.write(tmp_path / "ours", config, params, max_shard_bytes=20_000)
  assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 3
  written = loaded(peers, tmp_path / "ours")
  for tensor, leaf in model.state_dict().items():
    assert peers[0].equal(leaf, written.state_dict()[tensor])


@pytest.mark.parametrize("name", ONE_EACH)
def test_bfloat16_stays_bit_by_bit_and_computes_as_well(peers, name, tmp_path):
  torch, _, _ = peers
  model = made(peers, *CASES[name])
  model.bfloat16().save_pretrained(tmp_path / "theirs")
  config, params = pretrained.read(tmp_path / "theirs")
  assert config.dtype == "bfloat16"
  assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"bfloat16"}
  pretrained.write(tmp_path / "ours", config, params)
  written = loaded(peers, tmp_path / "ours", dtype="auto")
  for tensor, leaf in model.state_dict().items():
    assert leaf.dtype == torch.bfloat16 and torch.equal(leaf, written.state_dict()[tensor])
  exact = their_logits(peers, loaded(peers, tmp_path / "theirs", dtype="float32"), TOKENS)
  wide_config, wide = pretrained.read(tmp_path / "theirs", dtype="float32")
  assert np.abs(our_logits(wide_config, wide, TOKENS) - exact).max() < 1e-4
  ours = np.abs(our_logits(config, params, TOKENS) - exact).mean()
  theirs = np.abs(their_logits(peers, model, TOKENS) - exact).mean()
  assert 0 < ours < 1.2 * theirs


def test_their_generation_knows_our_token_ids(peers, tmp_path):
  model = made(peers, *CASES["llama"])
  model.save_pretrained(tmp_path / "theirs")
  assert pretrained.token_ids(tmp_path / "theirs") == {}
  config, params = pretrained.read(tmp_path / "theirs")
  ids = {"bos_token_id": 3, "eos_token_id": [5, 7], "pad_token_id": 0}
  pretrained.write(tmp_path / "ours", config, params, token_ids=ids)
  written = loaded(peers, tmp_path / "ours")
  for found in (written.generation_config, written.config):
    assert {name: getattr(found, name) for name in ids} == ids
  written.save_pretrained(tmp_path / "theirs_again")
  assert pretrained.token_ids(tmp_path / "theirs_again") == ids
