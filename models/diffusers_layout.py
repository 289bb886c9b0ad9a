"""Diffusion networks in the layout of diffusers' models, which compute the same.

`dit_to_diffusers` is for `DiTTransformer2DModel(**dit_settings(config))`, `unet_to_diffusers` for
`UNet2DModel(**unet_settings(config))`: state dictionaries of numpy arrays by their names there.
`save` makes folders that the models' `from_pretrained` reads, and `load` reads them back.
"""

import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import base, dit, flat_safetensors, unet

State = dict[str, np.ndarray]
Path = tuple[str, ...]
VERSION = "0.42.1"  # of diffusers, whose layout this is


class _Tensor(NamedTuple):
  """Where a tensor is in diffusers' layout and in ours, and how it lies in each."""

  theirs: str
  ours: Path
  there: Callable[[np.ndarray], np.ndarray] = lambda x: x
  here: Callable[[np.ndarray], np.ndarray] = lambda x: x


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


def _dit_config(settings: Mapping[str, Any]) -> dit.DiTConfig:
  side, heads = settings["sample_size"], settings["num_attention_heads"]
  return dit.DiTConfig(
    image_shape=(side, side, settings["in_channels"]),
    patch_size=settings["patch_size"],
    num_layers=settings["num_layers"],
    width=heads * settings["attention_head_dim"],
    num_heads=heads,
    num_classes=settings["num_embeds_ada_norm"],
  )


_DIT_FIXED = {
  "activation_fn": "gelu-approximate",
  "attention_bias": True,
  "norm_type": "ada_norm_zero",
  "norm_elementwise_affine": False,
  "norm_eps": 1e-5,
}


def dit_to_diffusers(params: base.Params, config: dit.DiTConfig) -> State:
  """The params by their names in diffusers' DiTTransformer2DModel, [out, in] as torch has them."""
  return _there(params, _dit_tensors(config))


def _dit_tensors(config: dit.DiTConfig) -> Iterator[_Tensor]:
  size, channels, width = config.patch_size, config.image_shape[2], config.width
  yield _Tensor(
    "pos_embed.proj.weight",
    ("patch_in", "kernel"),
    lambda x: x.reshape(size, size, channels, width).transpose(3, 2, 0, 1),
    lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
  )
  yield _Tensor("pos_embed.proj.bias", ("patch_in", "bias"))
  yield from _linear("proj_out_1", ("modulation",))
  yield from _linear("proj_out_2", ("patch_out",))
  for i in range(config.num_layers):
    ours, name = f"block_{i}", f"transformer_blocks.{i}"
    embedder = f"{name}.norm1.emb"  # each block has its copy
    yield from _linear(f"{embedder}.timestep_embedder.linear_1", ("conditioning", "level_in"))
    yield from _linear(f"{embedder}.timestep_embedder.linear_2", ("conditioning", "level_out"))
    yield _Tensor(f"{embedder}.class_embedder.embedding_table.weight", ("conditioning", "classes"))
    yield from _linear(f"{name}.norm1.linear", (ours, "modulation"))
    yield from _attention(f"{name}.attn1", (ours, "attention"))
    yield from _linear(f"{name}.ff.net.0.proj", (ours, "up"))
    yield from _linear(f"{name}.ff.net.2", (ours, "down"))


def unet_settings(config: unet.UNetConfig) -> dict[str, Any]:
  """The arguments of diffusers' UNet2DModel.

  Raises:
    ValueError: the network has what that model has not.
  """
  if config.multipliers[0] != 1:
    raise ValueError(f"diffusers' U-Net has multipliers[0]=1, not {config.multipliers[0]}.")
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


def _unet_config(settings: Mapping[str, Any]) -> unet.UNetConfig:
  channels, classes = settings["block_out_channels"], settings["num_class_embeds"]
  types = enumerate(settings["down_block_types"])
  return unet.UNetConfig(
    image_shape=(*settings["sample_size"], settings["in_channels"]),
    channels=channels[0],
    multipliers=tuple(c // channels[0] for c in channels),
    num_blocks=settings["layers_per_block"],
    attention=tuple(level for level, kind in types if kind.startswith("Attn")),
    head_dim=settings["attention_head_dim"],
    num_groups=settings["norm_num_groups"],
    num_classes=None if classes is None else classes - 1,
  )


_UNET_FIXED = {
  "center_input_sample": False,
  "time_embedding_type": "positional",
  "time_embedding_dim": None,
  "freq_shift": 0,
  "flip_sin_to_cos": True,
  "mid_block_type": "UNetMidBlock2D",
  "mid_block_scale_factor": 1,
  "downsample_padding": 1,
  "downsample_type": "conv",
  "upsample_type": "conv",
  "act_fn": "silu",
  "norm_eps": 1e-5,
  "add_attention": True,
  "class_embed_type": None,
}


def unet_to_diffusers(params: base.Params, config: unet.UNetConfig) -> State:
  """The params by their names in diffusers' UNet2DModel, convolutions [out, in, H, W]."""
  return _there(params, _unet_tensors(config))


def _unet_tensors(config: unet.UNetConfig) -> Iterator[_Tensor]:
  last, abstract = len(config.multipliers) - 1, _abstract(unet.unet, config)
  yield from _convolution("conv_in", ("conv_in",))
  yield from _convolution("conv_out", ("conv_out",))
  yield from _norm("conv_norm_out", ("norm_out",))
  yield from _linear("time_embedding.linear_1", ("conditioning", "level_in"))
  yield from _linear("time_embedding.linear_2", ("conditioning", "level_out"))
  if config.num_classes is not None:
    yield _Tensor("class_embedding.weight", ("conditioning", "classes"))
  for theirs, ours, attention in _unet_blocks(config):
    yield from _residual(theirs, ours, "shortcut" in abstract[ours])
    if "attention" in abstract[ours]:
      yield from _norm(f"{attention}.group_norm", (ours, "attention", "norm"))
      yield from _attention(attention, (ours, "attention", "attention"))
  for i in range(last):
    yield from _convolution(f"down_blocks.{i}.downsamplers.0.conv", (f"halve_{i}",))
    yield from _convolution(f"up_blocks.{i}.upsamplers.0.conv", (f"double_{last - i}",))


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


def _layer(name: str, path: Path, weight: str, *moves) -> Iterator[_Tensor]:
  yield _Tensor(f"{name}.weight", (*path, weight), *moves)
  yield _Tensor(f"{name}.bias", (*path, "bias"))


def _linear(name: str, path: Path) -> Iterator[_Tensor]:
  return _layer(name, path, "kernel", np.transpose, np.transpose)


def _convolution(name: str, path: Path) -> Iterator[_Tensor]:
  there, here = lambda x: x.transpose(3, 2, 0, 1), lambda x: x.transpose(2, 3, 1, 0)
  return _layer(name, path, "kernel", there, here)


def _norm(name: str, path: Path) -> Iterator[_Tensor]:
  return _layer(name, path, "scale")


def _attention(name: str, path: Path) -> Iterator[_Tensor]:
  names = {"query": "to_q", "key": "to_k", "value": "to_v", "output": "to_out.0"}
  for ours, theirs in names.items():
    yield from _linear(f"{name}.{theirs}", (*path, ours))


def _residual(name: str, ours: str, has_shortcut: bool) -> Iterator[_Tensor]:
  yield from _norm(f"{name}.norm1", (ours, "norm_in"))
  yield from _convolution(f"{name}.conv1", (ours, "conv_in"))
  yield from _linear(f"{name}.time_emb_proj", (ours, "modulation"))
  yield from _norm(f"{name}.norm2", (ours, "norm_out"))
  yield from _convolution(f"{name}.conv2", (ours, "conv_out"))
  if has_shortcut:  # a convolution of one pixel
    there, here = lambda x: x.T[:, :, None, None], lambda x: x[:, :, 0, 0].T
    yield from _layer(f"{name}.conv_shortcut", (ours, "shortcut"), "kernel", there, here)


def _there(params: base.Params, tensors: Iterator[_Tensor]) -> State:
  at = lambda path: np.asarray(functools.reduce(lambda node, name: node[name], path, params))
  return {tensor.theirs: tensor.there(at(tensor.ours)) for tensor in tensors}


class _Model(NamedTuple):
  """A model of diffusers: what settings of it are ours, and where its tensors are."""

  network: Callable[[Any], base.Network]
  settings: Callable[[Any], dict[str, Any]]
  config: Callable[[Mapping[str, Any]], Any]
  tensors: Callable[[Any], Iterator[_Tensor]]
  fixed: Mapping[str, Any]  # settings that every network of ours has, diffusers' defaults
  idle: Sequence[str]  # settings that do not change what it computes


_MODELS = {
  "DiTTransformer2DModel": _Model(
    dit.dit,
    dit_settings,
    _dit_config,
    _dit_tensors,
    _DIT_FIXED,
    ("dropout", "norm_num_groups", "upcast_attention"),
  ),
  "UNet2DModel": _Model(
    unet.unet,
    unet_settings,
    _unet_config,
    _unet_tensors,
    _UNET_FIXED,
    ("dropout", "num_train_timesteps"),
  ),
}
_NAMES = {dit.DiTConfig: "DiTTransformer2DModel", unet.UNetConfig: "UNet2DModel"}
_WEIGHTS = "diffusion_pytorch_model.safetensors"


def save(
  directory: str | os.PathLike, params: base.Params, config: dit.DiTConfig | unet.UNetConfig
) -> None:
  """Writes a folder that `from_pretrained` of diffusers' model reads: config.json and weights.

  Dropout and the dtype of the computation are not in it.

  Raises:
    ValueError: the network has what diffusers' model has not: nothing is written.
    KeyError: the params are not the network's.
  """
  directory, name = pathlib.Path(directory), _NAMES[type(config)]
  model = _MODELS[name]
  settings = {**model.fixed, **model.settings(config)}
  state = _there(params, model.tensors(config))
  flat_safetensors.write_tensors(directory / _WEIGHTS, state, {"format": "pt"})
  text = json.dumps({"_class_name": name, "_diffusers_version": VERSION, **settings}, indent=2)
  (directory / "config.json").write_text(text + "\n")


def load(directory: str | os.PathLike) -> tuple[base.Params, dit.DiTConfig | unet.UNetConfig]:
  """The params, bit for bit, and the network's configuration, from such a folder.

  It may be one of diffusers' own making, of a model that we have.

  Raises:
    FileNotFoundError: config.json or the weights are not there.
    ValueError: a setting that our network has not; tensors that are missing, too many, or of
      another shape; blocks of a DiT whose embedders differ, which ours share.
  """
  path = pathlib.Path(directory) / "config.json"
  try:
    settings = dict(json.loads(path.read_text()))
  except (TypeError, ValueError) as error:
    raise ValueError(f"{path} is not an object in JSON ({error}).") from error
  model = _MODELS.get(settings.get("_class_name"))
  if model is None:
    raise ValueError(f"{path} is of {settings.get('_class_name')}, not of {', '.join(_MODELS)}.")
  config = _checked_config(path, model, settings)
  state, _ = flat_safetensors.read_tensors(path.with_name(_WEIGHTS))
  return _here(path.with_name(_WEIGHTS), state, model, config), config


def _checked_config(path: pathlib.Path, model: _Model, settings: Mapping[str, Any]) -> Any:
  settings = {name: x for name, x in settings.items() if not name.startswith("_")}
  try:
    config = model.config(settings)
    expected = model.settings(config)
  except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
    raise ValueError(f"{path} is of no network of ours: {error!r}.") from error
  expected = json.loads(json.dumps({**model.fixed, **expected}))
  for name, value in settings.items():
    if name not in model.idle and (name not in expected or value != expected[name]):
      known = f"ours has {expected[name]!r}" if name in expected else "which is not known here"
      raise ValueError(f"{path} has {name}={value!r}; {known}.")
  return config


def _here(path: pathlib.Path, state: State, model: _Model, config: Any) -> base.Params:
  abstract, tensors = _abstract(model.network, config), [*model.tensors(config)]
  names = {tensor.theirs for tensor in tensors}
  for what, found in {"lacks": names - {*state}, "has, and we have not,": {*state} - names}.items():
    if found:
      raise ValueError(f"{path} {what} {len(found)} tensors, such as {min(found)}.")
  params: dict[str, Any] = {}
  seen: dict[Path, np.ndarray] = {}
  for theirs, ours, there, here in tensors:
    array = state[theirs]
    leaf = functools.reduce(lambda node, name: node[name], ours, abstract)
    shape = there(np.broadcast_to(np.float32(0), leaf.shape)).shape
    if array.shape != shape:
      raise ValueError(f"{path}: {theirs} is {array.shape}, and of this network {shape}.")
    if ours in seen and seen[ours].tobytes() != array.tobytes():
      raise ValueError(f"{path}: {theirs} differs from that of other blocks, which ours share.")
    seen[ours] = array
    flat_safetensors.put(params, ours, np.array(here(array), order="C"))
  return params


def _abstract(network: Callable[[Any], base.Network], config: Any) -> base.Params:
  """Shapes of the network's params."""
  x = jax.ShapeDtypeStruct((1, *config.image_shape), jnp.float32)
  return jax.eval_shape(network(config).init, jax.random.key(0), x)
