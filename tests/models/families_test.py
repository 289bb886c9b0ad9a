"""Published models by their `config.json`, as transformers 4 wrote it: how many parameters."""

import jax
import pytest

import targets
from ancestral.models import families, pretrained, rotary

LLAMA3 = {
  "factor": 32.0,
  "high_freq_factor": 4.0,
  "low_freq_factor": 1.0,
  "original_max_position_embeddings": 8192,
  "rope_type": "llama3",
}
QWEN2 = {
  "architectures": ["Qwen2ForCausalLM"],
  "hidden_act": "silu",
  "hidden_size": 896,
  "intermediate_size": 4864,
  "max_position_embeddings": 32768,
  "max_window_layers": 24,
  "num_attention_heads": 14,
  "num_hidden_layers": 24,
  "num_key_value_heads": 2,
  "rms_norm_eps": 1e-06,
  "rope_theta": 1000000.0,
  "sliding_window": 32768,
  "tie_word_embeddings": True,
  "use_sliding_window": False,
  "vocab_size": 151936,
}
CONFIGS = {
  "gpt2": {
    "architectures": ["GPT2LMHeadModel"],
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-05,
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "vocab_size": 50257,
  },
  "llama-3.2-1b": {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": LLAMA3,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
  },
  "mistral-7b-v0.1": {
    "architectures": ["MistralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
  },
  "qwen2.5-0.5b": QWEN2,
  "qwen2.5-math-1.5b": {
    **QWEN2,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "rope_theta": 10000,
  },
  "qwen3-0.6b": {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
  },
  "gemma-2-2b": {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 256000,
  },
}
PARAMETERS = {  # as their model cards have them
  "gpt2": 124_439_808,
  "llama-3.2-1b": 1_235_814_400,
  "mistral-7b-v0.1": 7_241_732_096,
  "qwen2.5-0.5b": 494_032_768,
  "qwen2.5-math-1.5b": 1_543_714_304,
  "qwen3-0.6b": 596_049_920,
  "gemma-2-2b": 2_614_341_888,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_published_models_have_as_many_parameters_as_published(name):
  family, config = families.from_json(CONFIGS[name])
  assert name.replace("gemma-2", "gemma2").startswith(family)
  count = sum(leaf.size for leaf in jax.tree.leaves(pretrained.shapes(config, stacked=True)))
  assert count == PARAMETERS[name]
  again, read = families.from_json(families.to_json(config, family)[1])
  assert again == family and read.resolved() == config.resolved()


def test_what_shapes_do_not_show():
  read = lambda name: families.from_json(CONFIGS[name])[1]
  assert read("llama-3.2-1b").rotary_scaling == rotary.parse(LLAMA3)
  assert read("llama-3.2-1b").rotary_base == 500_000
  assert read("mistral-7b-v0.1").local_layers == (True,) * 32
  assert read("mistral-7b-v0.1").window == 4096
  assert read("qwen2.5-0.5b").window is None and read("qwen3-0.6b").window is None
  gemma = read("gemma-2-2b")
  assert gemma.local_layers == (True, False) * 13 and gemma.window_pattern == (True, False)
  assert (gemma.attention_scale, gemma.embedding_scale) == (1 / 16, 48)
  assert (gemma.attention_softcap, gemma.logit_softcap) == (50, 30)
  gpt2 = read("gpt2")
  assert (gpt2.norm_epsilon, gpt2.activation, gpt2.dropout) == (1e-5, "gelu_tanh", 0)


def test_old_yarn_takes_its_context_from_the_config():
  yarn = {"type": "yarn", "factor": 4.0}
  _, config = families.from_json({**QWEN2, "rope_scaling": yarn})
  assert config.rotary_scaling == rotary.Yarn(factor=4.0, original_max_position_embeddings=32768)
  said = {**yarn, "original_max_position_embeddings": 8192}
  _, config = families.from_json({**QWEN2, "rope_scaling": said})
  assert config.rotary_scaling.original_max_position_embeddings == 8192


def test_windows_from_a_layer_on_are_a_pattern():
  _, config = families.from_json({**QWEN2, "use_sliding_window": True, "max_window_layers": 20})
  assert config.window == 32768 and config.local_layers == (False,) * 20 + (True,) * 4
  _, written = families.to_json(config)
  assert written["max_window_layers"] == 20 and written["use_sliding_window"]


def test_how_attention_is_computed_is_no_part_of_a_family():
  config = targets.tiny_config(attention="xla", remat="full", dropout=0.1)
  assert families.to_json(config)[0] == "llama"
