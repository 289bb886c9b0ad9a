"""Transformers in Hugging Face's Llama layout: what their config and state dict call each array."""

from typing import Any

import numpy as np

from . import base, transformer


def llama_config(config: transformer.TransformerConfig) -> dict[str, Any]:
  """The keyword arguments of `transformers.LlamaConfig` for the same architecture.

  Raises:
    ValueError: the model has something that Llama has not.
  """
  config = config.resolved()
  unsupported = {
    "positions": config.positions != "rotary",
    "causal": not config.causal,
    "window": config.window is not None,
    "qk_norm": config.qk_norm,
    "logit_softcap": config.logit_softcap is not None,
    "position_range": config.position_range is not None,
  }
  found = [name for name, present in unsupported.items() if present]
  if found:
    raise ValueError(f"Llama has no counterpart of {', '.join(found)} as configured.")
  return {
    "vocab_size": config.vocab_size,
    "hidden_size": config.width,
    "intermediate_size": config.mlp_width,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "max_position_embeddings": config.max_length,
    "rms_norm_eps": config.norm_epsilon,
    "tie_word_embeddings": config.tied_embeddings,
    "attention_bias": config.use_bias,
    "mlp_bias": config.use_bias,
    "rope_parameters": {"rope_type": "default", "rope_theta": config.rotary_base},
  }


_DENSE = {
  ("attention", "query"): "self_attn.q_proj",
  ("attention", "key"): "self_attn.k_proj",
  ("attention", "value"): "self_attn.v_proj",
  ("attention", "output"): "self_attn.o_proj",
  ("mlp", "gate"): "mlp.gate_proj",
  ("mlp", "up"): "mlp.up_proj",
  ("mlp", "down"): "mlp.down_proj",
}
_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


def llama_state_dict(params: base.Params) -> dict[str, np.ndarray]:
  """A transformer's params as Llama's state dict; kernels become [out, in]."""
  state = {
    "model.embed_tokens.weight": params["embedding"],
    "model.norm.weight": params["final_norm"]["scale"],
  }
  state["lm_head.weight"] = params["readout"].T if "readout" in params else params["embedding"]
  for i, layer in enumerate(transformer.unstack(params)["layers"]):
    prefix = f"model.layers.{i}."
    for (module, name), theirs in _DENSE.items():
      dense = layer[module][name]
      state[f"{prefix}{theirs}.weight"] = dense["kernel"].T
      if "bias" in dense:
        state[f"{prefix}{theirs}.bias"] = dense["bias"]
    for name, theirs in _NORMS.items():
      state[f"{prefix}{theirs}.weight"] = layer[name]["scale"]
  return {name: np.array(value) for name, value in state.items()}
