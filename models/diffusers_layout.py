"""Weights of diffusion networks in the layout of diffusers' models, which compute the same.

`dit_to_diffusers` is for `DiTTransformer2DModel(**dit_settings(config))`, `unet_to_diffusers` for
`UNet2DModel(**unet_settings(config))`: state dictionaries of numpy arrays by their names there.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from . import base, dit, unet

State = dict[str, np.ndarray]


def dit_settings(config: dit.DiTConfig) -> dict[str, Any]:
  """The arguments of diffusers' DiTTransformer2DModel.

  Raises:
    ValueError: the network has what that model has not.
  """
  height, width, channels = config.image_shape
  for name, plain in {
    "positions": "sincos",
    "num_registers": 0,
    "text_width": None,
    "qk_norm": False,
    "mlp_ratio": 4.0,
  }.items():
    if getattr(config, name) != plain:
      raise ValueError(f"diffusers' DiT has {name}={plain!r}, not {getattr(config, name)!r}.")
  if height != width or config.num_classes is None:
    raise ValueError("diffusers' DiT is of square images with classes.")
  return {
    "num_attention_heads": config.num_heads,
    "attention_head_dim": config.width // config.num_heads,
    "in_channels": channels,
    "out_channels": channels,
    "num_layers": config.num_layers,
    "sample_size": height,
    "patch_size": config.patch_size,
    "num_embeds_ada_norm": config.num_classes,
  }


def dit_to_diffusers(params: base.Params, config: dit.DiTConfig) -> State:
  """The params by their names in diffusers' DiTTransformer2DModel, [out, in] as torch has them."""
  _, _, channels = config.image_shape
  size, kernel = config.patch_size, np.asarray(params["patch_in"]["kernel"])
  conv = kernel.reshape(size, size, channels, config.width).transpose(3, 2, 0, 1)
  state = {
    "pos_embed.proj.weight": conv,
    "pos_embed.proj.bias": np.asarray(params["patch_in"]["bias"]),
    **_linear("proj_out_1", params["modulation"]),
    **_linear("proj_out_2", params["patch_out"]),
  }
  conditioning = params["conditioning"]
  for i in range(config.num_layers):
    block, name = params[f"block_{i}"], f"transformer_blocks.{i}"
    embedder = f"{name}.norm1.emb"  # each block has its copy
    state |= {
      **_linear(f"{embedder}.timestep_embedder.linear_1", conditioning["level_in"]),
      **_linear(f"{embedder}.timestep_embedder.linear_2", conditioning["level_out"]),
      f"{embedder}.class_embedder.embedding_table.weight": np.asarray(conditioning["classes"]),
      **_linear(f"{name}.norm1.linear", block["modulation"]),
      **_attention(f"{name}.attn1", block["attention"]),
      **_linear(f"{name}.ff.net.0.proj", block["up"]),
      **_linear(f"{name}.ff.net.2", block["down"]),
    }
  return state


def unet_settings(config: unet.UNetConfig) -> dict[str, Any]:
  """The arguments of diffusers' UNet2DModel."""
  height, width, channels = config.image_shape
  attends = [level in config.attention for level in range(len(config.multipliers))]
  return {
    "sample_size": (height, width),
    "in_channels": channels,
    "out_channels": channels,
    "block_out_channels": config.level_channels,
    "layers_per_block": config.num_blocks,
    "down_block_types": tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
    "up_block_types": tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]),
    "attention_head_dim": config.head_dim,
    "norm_num_groups": config.num_groups,
    "attn_norm_num_groups": config.num_groups,
    "resnet_time_scale_shift": "scale_shift",
    "num_class_embeds": None if config.num_classes is None else config.num_classes + 1,
  }


def unet_to_diffusers(params: base.Params, config: unet.UNetConfig) -> State:
  """The params by their names in diffusers' UNet2DModel, convolutions [out, in, H, W]."""
  conditioning, last = params["conditioning"], len(config.multipliers) - 1
  state = {
    **_convolution("conv_in", params["conv_in"]),
    **_convolution("conv_out", params["conv_out"]),
    **_norm("conv_norm_out", params["norm_out"]),
    **_linear("time_embedding.linear_1", conditioning["level_in"]),
    **_linear("time_embedding.linear_2", conditioning["level_out"]),
  }
  if config.num_classes is not None:
    state["class_embedding.weight"] = np.asarray(conditioning["classes"])
  for theirs, ours, attention in _unet_blocks(config):
    state |= _residual(theirs, params[ours])
    if "attention" in params[ours]:
      inner = params[ours]["attention"]
      state |= {
        **_norm(f"{attention}.group_norm", inner["norm"]),
        **_attention(attention, inner["attention"]),
      }
  for i in range(last):
    state |= _convolution(f"down_blocks.{i}.downsamplers.0.conv", params[f"halve_{i}"])
    double = params[f"double_{last - i}"]
    state |= _convolution(f"up_blocks.{i}.upsamplers.0.conv", double)
  return state


def _unet_blocks(config) -> Iterator[tuple[str, str, str]]:
  """(name of a residual block there, here, name there of the attention after it)."""
  last = len(config.multipliers) - 1
  for i in range(last + 1):
    for j in range(config.num_blocks):
      yield f"down_blocks.{i}.resnets.{j}", f"down_{i}_{j}", f"down_blocks.{i}.attentions.{j}"
    for j in range(config.num_blocks + 1):
      up = f"up_blocks.{last - i}"
      yield f"{up}.resnets.{j}", f"up_{i}_{j}", f"{up}.attentions.{j}"
  for j in range(2):
    yield f"mid_block.resnets.{j}", f"middle_{j}", f"mid_block.attentions.{j}"


def _linear(name: str, layer: Mapping[str, Any]) -> State:
  kernel, bias = np.asarray(layer["kernel"]), np.asarray(layer["bias"])
  return {f"{name}.weight": kernel.T, f"{name}.bias": bias}


def _convolution(name: str, layer: Mapping[str, Any]) -> State:
  kernel = np.asarray(layer["kernel"]).transpose(3, 2, 0, 1)
  return {f"{name}.weight": kernel, f"{name}.bias": np.asarray(layer["bias"])}


def _norm(name: str, layer: Mapping[str, Any]) -> State:
  scale, bias = np.asarray(layer["scale"]), np.asarray(layer["bias"])
  return {f"{name}.weight": scale, f"{name}.bias": bias}


def _attention(name: str, layer: Mapping[str, Any]) -> State:
  names = {"query": "to_q", "key": "to_k", "value": "to_v", "output": "to_out.0"}
  state = {}
  for ours, theirs in names.items():
    state |= _linear(f"{name}.{theirs}", layer[ours])
  return state


def _residual(name: str, block: Mapping[str, Any]) -> State:
  state = {
    **_norm(f"{name}.norm1", block["norm_in"]),
    **_convolution(f"{name}.conv1", block["conv_in"]),
    **_linear(f"{name}.time_emb_proj", block["modulation"]),
    **_norm(f"{name}.norm2", block["norm_out"]),
    **_convolution(f"{name}.conv2", block["conv_out"]),
  }
  if "shortcut" in block:  # a convolution of one pixel
    shortcut = _linear(f"{name}.conv_shortcut", block["shortcut"])
    shortcut[f"{name}.conv_shortcut.weight"] = shortcut[f"{name}.conv_shortcut.weight"][
      :, :, None, None
    ]
    state |= shortcut
  return state
