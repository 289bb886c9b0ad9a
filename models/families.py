"""Families of pretrained transformers: what `config.json` and the tensors are called in each.

A family is data: fields, each a pair of functions between their config and ours, and names of
modules. To add one, write down what it has; what it has not is found by reading back what was
written.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from . import config_fields
from .transformer_config import TransformerConfig


class Family(NamedTuple):
  """An architecture of transformers.

  Attributes:
    architecture: the class that config.json names.
    fields: of the configuration.
    modules: their names of our modules and arrays, those of a layer below `layers`.
    prefix: before every tensor but the readout, `lm_head.weight`; files of the trunk alone lack it.
    layers: before a layer's number.
    transposed: kernels are [out, in].
    fused: our modules whose kernels are one tensor, side by side in this order.
    ignored: endings of tensors that hold no parameters.
  """

  architecture: str
  fields: tuple[config_fields.Field, ...]
  modules: Mapping[str, str]
  prefix: str = "model."
  layers: str = "layers"
  transposed: bool = True
  fused: tuple[str, ...] = ()
  ignored: tuple[str, ...] = (".rotary_emb.inv_freq",)


# What Llama, Mistral, Qwen and Gemma have in common.
_SIZES = (
  config_fields.same("vocab_size", "vocab_size"),
  config_fields.same("hidden_size", "width"),
  config_fields.same("intermediate_size", "mlp_width"),
  config_fields.same("num_hidden_layers", "num_layers"),
  config_fields.same("num_attention_heads", "num_heads"),
  config_fields.same("num_key_value_heads", "num_kv_heads", None),
  config_fields.same("max_position_embeddings", "max_length"),
  config_fields.same("rms_norm_eps", "norm_epsilon", 1e-6),
  config_fields.ROTARY,
  config_fields.UNQUANTISED,
)
_UNTIED, _TIED = (
  config_fields.same("tie_word_embeddings", "tied_embeddings", tied) for tied in (False, True)
)
_HEAD_DIM = config_fields.same("head_dim", "head_dim", None)
_SILU = config_fields.activation("hidden_act", config_fields.ACTIVATIONS, "silu")
_ATTENTION_BIAS = config_fields.bias("attention_bias", "qkv_bias", "output_bias")

_MODULES = {
  "embedding": "embed_tokens",
  "final_norm": "norm",
  "attention_norm": "input_layernorm",
  "attention/query": "self_attn.q_proj",
  "attention/key": "self_attn.k_proj",
  "attention/value": "self_attn.v_proj",
  "attention/output": "self_attn.o_proj",
  "attention/query_norm": "self_attn.q_norm",
  "attention/key_norm": "self_attn.k_norm",
  "mlp_norm": "post_attention_layernorm",
  "mlp/gate": "mlp.gate_proj",
  "mlp/up": "mlp.up_proj",
  "mlp/down": "mlp.down_proj",
}
_GEMMA_MODULES = {
  **_MODULES,
  "attention_post_norm": "post_attention_layernorm",
  "mlp_norm": "pre_feedforward_layernorm",
  "mlp_post_norm": "post_feedforward_layernorm",
}
_GPT2_MODULES = {
  "embedding": "wte",
  "positions": "wpe",
  "final_norm": "ln_f",
  "attention_norm": "ln_1",
  **dict.fromkeys(("attention/query", "attention/key", "attention/value"), "attn.c_attn"),
  "attention/output": "attn.c_proj",
  "mlp_norm": "ln_2",
  "mlp/up": "mlp.c_fc",
  "mlp/down": "mlp.c_proj",
}

FAMILIES = {
  "llama": Family(
    "LlamaForCausalLM",
    (
      *_SIZES,
      _HEAD_DIM,
      _UNTIED,
      _SILU,
      _ATTENTION_BIAS,
      config_fields.bias("mlp_bias", "mlp_bias"),
    ),
    _MODULES,
  ),
  "mistral": Family(
    "MistralForCausalLM",
    (*_SIZES, _HEAD_DIM, _UNTIED, _SILU, config_fields.MISTRAL_WINDOW),
    _MODULES,
  ),
  "qwen2": Family(
    "Qwen2ForCausalLM",
    (
      *_SIZES,
      _HEAD_DIM,
      _UNTIED,
      _SILU,
      config_fields.QWEN_WINDOWS,
      config_fields.always(qkv_bias=True),
    ),
    _MODULES,
  ),
  "qwen3": Family(
    "Qwen3ForCausalLM",
    (
      *(*_SIZES, _UNTIED, _SILU, config_fields.QWEN_WINDOWS, _ATTENTION_BIAS),
      config_fields.same("head_dim", "head_dim", 128),
      config_fields.always(qk_norm=True),
    ),
    _MODULES,
  ),
  "gemma2": Family(
    "Gemma2ForCausalLM",
    (
      *(*_SIZES, _TIED, config_fields.GEMMA_WINDOWS, _ATTENTION_BIAS),
      config_fields.same("head_dim", "head_dim", 256),
      config_fields.activation("hidden_activation", config_fields.ACTIVATIONS, "gelu_pytorch_tanh"),
      config_fields.root("query_pre_attn_scalar"),
      config_fields.same("attn_logit_softcapping", "attention_softcap", 50.0),
      config_fields.same("final_logit_softcapping", "logit_softcap", 30.0),
      config_fields.only("use_bidirectional_attention", None, False),
      config_fields.always(zero_centred_norms=True, post_norms=True),
      config_fields.GEMMA_EMBEDDING,
    ),
    _GEMMA_MODULES,
  ),
  "gpt2": Family(
    "GPT2LMHeadModel",
    (
      config_fields.same("vocab_size", "vocab_size"),
      config_fields.same("n_embd", "width"),
      config_fields.same("n_layer", "num_layers"),
      config_fields.same("n_head", "num_heads"),
      config_fields.GPT2_WIDTH,
      config_fields.same("n_positions", "max_length"),
      config_fields.same("layer_norm_epsilon", "norm_epsilon", 1e-5),
      config_fields.activation(
        "activation_function", {"gelu_new": "gelu_tanh", **config_fields.ACTIVATIONS}, "gelu_new"
      ),
      *(config_fields.SCALED_SCORES, _TIED, config_fields.UNQUANTISED),
      *(
        config_fields.only(name, False)
        for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention")
      ),
      config_fields.always(positions="learned", norm="layer", gated_mlp=False, use_bias=True),
    ),
    _GPT2_MODULES,
    prefix="transformer.",
    layers="h",
    transposed=False,
    fused=("attention/query", "attention/key", "attention/value"),
    ignored=(".attn.bias", ".attn.masked_bias"),  # causal masks
  ),
}


def from_json(theirs: Mapping[str, Any]) -> tuple[str, TransformerConfig]:
  """The family of a `config.json` and the configuration that it says.

  Dropout is 0, since it is a matter of training.

  Raises:
    ValueError: another architecture, a field that is missing, or a value that is not supported.
  """
  given = theirs.get("architectures")
  known = {family.architecture: name for name, family in FAMILIES.items()}
  found = known.get(given[0]) if isinstance(given, list) and given else theirs.get("model_type")
  if found not in FAMILIES:
    named = f"architectures={given!r}" if given else f"model_type={theirs.get('model_type')!r}"
    raise ValueError(f"{named} is not supported, only {config_fields.listed(known)}.")
  ours: dict[str, Any] = {}
  try:
    for field in FAMILIES[found].fields:
      ours |= field.read(theirs)
    return found, TransformerConfig(**ours)
  except (TypeError, KeyError) as error:
    raise ValueError(f"a field is missing or of another type ({error!r}).") from error


def to_json(config: TransformerConfig, family: str | None = None) -> tuple[str, dict[str, Any]]:
  """A family that has all that the configuration has, the first if None is asked for, and its JSON.

  Raises:
    ValueError: no family of that name; it, or every family, lacks something.
  """
  if family is not None and family not in FAMILIES:
    raise ValueError(f"family={family!r} is not one of {tuple(FAMILIES)}.")
  lacking = {}
  for name in FAMILIES if family is None else (family,):
    theirs = _written(config, name)
    lacking[name] = _differing(config, from_json(theirs)[1])
    if not lacking[name]:
      return name, theirs
  first, *others = sorted(lacking, key=lambda name: len(lacking[name]))
  beside = ", and the others lack more" if others else ""
  raise ValueError(
    f"{first} has no counterpart of {', '.join(lacking[first])} as configured{beside}."
  )


def _written(config: TransformerConfig, name: str) -> dict[str, Any]:
  theirs = {"architectures": [FAMILIES[name].architecture], "model_type": name}
  for field in FAMILIES[name].fields:
    theirs |= field.write(config.resolved())
  return theirs


# How a model is trained or computed, not what it is.
_APART = {"dropout", "dtype", "scan_layers", "remat", "attention"}


def _differing(config: TransformerConfig, other: TransformerConfig) -> list[str]:
  one, other = _canonical(config), _canonical(other)
  return [
    field.name
    for field in dataclasses.fields(one)
    if field.name not in _APART and getattr(one, field.name) != getattr(other, field.name)
  ]


def _canonical(c: TransformerConfig) -> TransformerConfig:
  """One spelling of what means the same."""
  rotary_base = c.rotary_base if c.positions == "rotary" else 10_000.0
  windowed = any(c.local_layers)
  pattern = config_fields.shortest_pattern(list(c.local_layers)) if windowed else (True,)
  window = c.window if windowed else None
  return dataclasses.replace(
    c.resolved(), rotary_base=rotary_base, use_bias=False, window=window, window_pattern=pattern
  )


class Source(NamedTuple):
  """Where a parameter, or a layer of a stacked one, is among their tensors."""

  name: str
  transposed: bool = False
  part: int = 0  # of `parts` equal ones of the last axis
  parts: int = 1


def source(family: Family, path: str, layer: int | None = None) -> Source:
  """The tensor of a parameter.

  Args:
    family: of the model.
    path: "embedding", or of an array of a layer, "attention/query/kernel".
    layer: its number, if it is of one.
  """
  if path == "readout":
    return Source("lm_head.weight", transposed=True)
  module, _, leaf = path.rpartition("/") if path not in family.modules else (path, "", "")
  where = "" if layer is None else f"{family.layers}.{layer}."
  ending = "bias" if leaf == "bias" else "weight"
  name = f"{family.prefix}{where}{family.modules[module]}.{ending}"
  fused = module in family.fused
  part = family.fused.index(module) if fused else 0
  parts = len(family.fused) if fused else 1
  return Source(name, family.transposed and leaf == "kernel", part, parts)
