"""Checkpoints of Hugging Face transformers, in and out: `config.json` and safetensors files.

A checkpoint is read tensor by tensor, each straight to where it is to be, and nothing is allocated
before all of it is known to fit. What the families have and how they name it is in `families`.
"""

import dataclasses
import functools
import gc
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import base, families, safetensors_files, transformer

Directory = str | os.PathLike

# (path as of `jax.tree_util.tree_map_with_path`, shape and dtype) -> where a parameter is to be;
# None is the default device.
Place = Callable[[Any, jax.ShapeDtypeStruct], jax.sharding.Sharding | None]

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_DTYPES = {str(dtype): dtype for dtype in safetensors_files.DTYPES.values()}


def read_config(directory: Directory, *, dtype: str | None = None) -> transformer.TransformerConfig:
  """The configuration of a checkpoint, without dropout, which is a matter of training.

  Args:
    directory: of `config.json`.
    dtype: of the computation; if None, what `config.json` says the weights are.

  Raises:
    FileNotFoundError: no `config.json`.
    ValueError: an architecture, a dtype or a value of a field that is not supported.
  """
  return _read_config(pathlib.Path(directory), dtype)[1]


def token_ids(directory: Directory) -> dict[str, int | list[int]]:
  """Those of `TOKENS` that `generation_config.json` has, or else `config.json`."""
  found = {}
  for name in ("config.json", "generation_config.json"):
    path = pathlib.Path(directory) / name
    given = safetensors_files.read_json(path) if path.exists() else {}
    found |= {key: given[key] for key in TOKENS if given.get(key) is not None}
  return found


def shapes(
  config: transformer.TransformerConfig, *, stacked: bool = False, dtype: str = "float32"
) -> base.Params:
  """The params of a configuration as a tree of `jax.ShapeDtypeStruct`, to plan where they go."""
  model = transformer.transformer(dataclasses.replace(config, scan_layers=stacked))
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  params = jax.eval_shape(lambda tokens: model.init(jax.random.key(0), tokens), tokens)
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, _dtype(dtype)), params)


def read(
  directory: Directory,
  *,
  place: Place | None = None,
  dtype: str | None = None,
  stacked: bool = False,
) -> tuple[transformer.TransformerConfig, base.Params]:
  """The configuration and the params of a checkpoint.

  Of a parameter that is split over devices, each process reads what its devices hold. On the host
  there is one parameter at a time besides those that stay there.

  Args:
    directory: of `config.json` and `model.safetensors`, or shards and their index.
    place: where each parameter goes; if None, all go to the default device.
    dtype: of params and computation; if None, params keep the files' and the computation has what
      `config.json` says.
    stacked: the layers' params in arrays [N, ...], for training; otherwise a tuple, for decoding.

  Raises:
    FileNotFoundError: a file that is not there.
    ValueError: what `read_config` raises; a file that is cut off; a tensor that is missing, too
      many, or of another shape or dtype than the configuration says.
  """
  directory = pathlib.Path(directory)
  family, config = _read_config(directory, dtype)
  tree = shapes(config, stacked=stacked)
  origin = _origin(family, tree)
  held = _matched(directory, family, origin)

  def made(path, leaf):
    pieces = tuple(_Piece(held[source.name], source) for source in origin[_name(path)].sources)
    kept = _common(safetensors_files.DTYPES[piece.tensor.dtype] for piece in pieces)
    leaf = jax.ShapeDtypeStruct(leaf.shape, kept if dtype is None else _dtype(dtype))
    return _placed(pieces, leaf, None if place is None else place(path, leaf))

  return config, jax.tree_util.tree_map_with_path(made, tree)


def write(
  directory: Directory,
  config: transformer.TransformerConfig,
  params: base.Params,
  *,
  family: str | None = None,
  max_shard_bytes: int = 5 * 10**9,
  dtype: str | None = None,
  token_ids: Mapping[str, int | Sequence[int]] | None = None,
) -> str:
  """Writes a checkpoint that `read` and transformers load; returns the name of its family.

  The files are written beside the directory, which appears when they are complete.

  Args:
    directory: a new one, or an empty one.
    config: of the model.
    params: stacked or not.
    family: of `families.FAMILIES`; if None, the first that has all that the model has.
    max_shard_bytes: of one file; what does not fit is written in shards with an index.
    dtype: of the tensors; if None, the params'.
    token_ids: those of `TOKENS` that are to be known.

  Raises:
    FileExistsError: the directory has something in it.
    ValueError: no family has what the model has; params of another configuration or dtype; token
      ids of another name; shards of no bytes.
  """
  directory = pathlib.Path(directory).absolute()
  if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
    raise FileExistsError(f"{directory}: there is something in it; write to a new directory.")
  if max_shard_bytes < 1:
    raise ValueError(f"max_shard_bytes={max_shard_bytes} is not at least 1.")
  ids = dict(token_ids or {})
  if not set(ids) <= set(TOKENS):
    raise ValueError(f"token_ids has {sorted(set(ids) - set(TOKENS))}, and may have {TOKENS}.")
  name, theirs = families.to_json(config, family)
  planned = _planned(families.FAMILIES[name], config, params, dtype)
  stored = str(next(iter(planned.values())).dtype)
  # What is left out would be filled in by the defaults of transformers' class.
  theirs |= {"dtype": stored, "torch_dtype": stored, **dict.fromkeys(TOKENS), **ids}
  beside = directory.parent / f".{directory.name}.partial-{os.getpid()}"
  beside.mkdir(parents=True)
  try:
    safetensors_files.write(beside, planned, max_shard_bytes)
    _write_json(beside / "config.json", theirs)
    if ids:
      _write_json(beside / "generation_config.json", ids)
    beside.rename(directory)
  except BaseException:
    shutil.rmtree(beside, ignore_errors=True)
    raise
  return name


def _dtype(name: str) -> np.dtype:
  if name not in _DTYPES:
    raise ValueError(f"dtype={name!r} is not one of {tuple(_DTYPES)}.")
  return _DTYPES[name]


def _common(dtypes: Iterable[np.dtype]) -> np.dtype:
  """What holds the values of all."""
  return functools.reduce(jnp.promote_types, dtypes)


def _read_config(directory, dtype):
  if dtype is not None:
    _dtype(dtype)
  path = directory / "config.json"
  theirs = safetensors_files.read_json(path)
  try:
    family, config = families.from_json(theirs)
    name = dtype or theirs.get("dtype") or theirs.get("torch_dtype") or "float32"
    return families.FAMILIES[family], dataclasses.replace(config, dtype=str(_dtype(name)))
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def _write_json(path, fields):
  path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def _name(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


class _Origin(NamedTuple):
  """The tensors that make a parameter, one for each layer of a stacked one."""

  sources: tuple[families.Source, ...]
  shape: tuple[int, ...]  # of each, as a parameter

  def tensor_shape(self, source: families.Source) -> tuple[int, ...]:
    """The same as a tensor."""
    shape = (*self.shape[:-1], self.shape[-1] * source.parts)
    return shape[::-1] if source.transposed else shape


def _origin(family: families.Family, tree: base.Params) -> dict[str, _Origin]:
  """By a parameter's path, where it comes from."""
  found = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    first, *rest = _name(path).split("/")
    if first != "layers":
      of_model = families.source(family, "/".join([first, *rest]))
      found[_name(path)] = _Origin((of_model,), leaf.shape)
    elif isinstance(tree["layers"], dict):
      sources = (families.source(family, "/".join(rest), i) for i in range(leaf.shape[0]))
      found[_name(path)] = _Origin(tuple(sources), leaf.shape[1:])
    else:
      number, *inside = rest
      of_layer = families.source(family, "/".join(inside), int(number))
      found[_name(path)] = _Origin((of_layer,), leaf.shape)
  return found


def _matched(directory, family, origin) -> dict[str, safetensors_files.Tensor]:
  """The tensors of the files by name, all of them as the configuration says."""
  held = safetensors_files.tensors(directory)
  if not any(name.startswith(family.prefix) for name in held):  # of a trunk that was saved alone
    head = lambda name: name == "lm_head.weight"
    held = {name if head(name) else family.prefix + name: one for name, one in held.items()}
  expected = {
    source.name: one.tensor_shape(source) for one in origin.values() for source in one.sources
  }
  missing = [name for name in expected if name not in held]
  if missing:
    more = f" ({len(missing) - 1} more are missing)" if len(missing) > 1 else ""
    raise ValueError(f"{directory}: no tensor {missing[0]}, which config.json asks for{more}.")
  may_be = () if "readout" in origin else ("lm_head.weight",)
  for name, tensor in held.items():
    if name not in expected:
      if name not in may_be and not name.endswith(family.ignored):
        raise ValueError(
          f"{tensor.path}: {name} is not a tensor of a {family.architecture} as config.json says."
        )
    elif tensor.shape != expected[name]:
      raise ValueError(
        f"{tensor.path}: {name} is {list(tensor.shape)}, and {list(expected[name])} by config.json."
      )
    elif tensor.dtype not in safetensors_files.DTYPES:
      known = ", ".join(safetensors_files.DTYPES)
      raise ValueError(f"{tensor.path}: {name} is {tensor.dtype}, not one of {known}.")
  return held


class _Piece(NamedTuple):
  """A tensor, and how a parameter lies in it."""

  tensor: safetensors_files.Tensor
  source: families.Source

  def view(self) -> np.ndarray:
    """The parameter in the mapped file."""
    whole = self.tensor.mapped()
    whole = whole.T if self.source.transposed else whole
    size = whole.shape[-1] // self.source.parts
    return whole[..., self.source.part * size : (self.source.part + 1) * size]


def _placed(pieces, leaf, sharding):
  """The parameter of that shape and dtype; each of its shards is read when it is made."""
  stacked = len(leaf.shape) > len(pieces[0].tensor.shape)

  def value(index):
    if not stacked:
      return np.array(pieces[0].view()[index], leaf.dtype, order="C")
    sizes = [len(range(*one.indices(size))) for one, size in zip(index, leaf.shape, strict=True)]
    out = np.empty(sizes, leaf.dtype)
    for row, piece in zip(out, pieces[index[0]], strict=True):
      row[...] = piece.view()[index[1:]]
    return out

  if sharding is None:
    made = jax.device_put(value((slice(None),) * len(leaf.shape)))
  else:
    once = _once(value)  # devices may hold the same shard
    made = jax.make_array_from_callback(leaf.shape, sharding, once, dtype=leaf.dtype)
  jax.block_until_ready(made)  # or the host would run ahead, with all of the parameters
  gc.collect(0)  # when jax lets go of what it has copied from
  return made


def _once(value):
  """The same function of an index, which makes each value once."""
  made: dict[Any, np.ndarray] = {}

  def call(index):
    key = tuple((one.start, one.stop) for one in index)  # slices are not hashable before 3.12
    if key not in made:
      made[key] = value(index)
    return made[key]

  return call


def _planned(family, config, params, dtype) -> dict[str, safetensors_files.Planned]:
  """What is to be written, by tensor."""
  tree = shapes(config, stacked=isinstance(params["layers"], dict))
  origin = _origin(family, tree)
  expected = {_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
  given = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
  for name in sorted(set(expected) | set(given)):
    found = given[name].shape if name in given else None
    if found != expected.get(name):
      raise ValueError(f"params: {name} is {found}, and {expected.get(name)} by the configuration.")
  parts: dict[str, list[tuple[_Origin, families.Source, Any, int | None]]] = {}
  for name, one in origin.items():
    for i, source in enumerate(one.sources):
      layer = i if len(expected[name]) > len(one.shape) else None
      parts.setdefault(source.name, []).append((one, source, given[name], layer))
  return {name: _tensor(parts[name], dtype) for name in sorted(parts, key=_by_number)}


def _by_number(name: str) -> list[str | int]:
  """A key to sort by that has layer 2 before layer 10, so that a shard holds layers in a row."""
  return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _tensor(parts, dtype) -> safetensors_files.Planned:
  """A tensor of the parameters that are side by side in it, or of a single one."""
  ordered = sorted(parts, key=lambda part: part[1].part)
  one, source, _, _ = ordered[0]
  kept = _common(_dtype(str(leaf.dtype) if dtype is None else dtype) for _, _, leaf, _ in ordered)

  def value():
    whole = np.concatenate([_on_host(leaf, i) for _, _, leaf, i in ordered], axis=-1)
    return (whole.T if source.transposed else whole).astype(kept)

  return safetensors_files.Planned(one.tensor_shape(source), kept, value)


def _on_host(leaf, layer):
  # An array remembers its value on the host once it was asked for it; a copy is forgotten.
  part = jnp.copy(leaf) if layer is None else leaf[layer]
  return np.asarray(part)
