"""Params of any network as one safetensors file, for whoever reads that format.

The leaf params["a"]["b"] is the tensor "a/b", as it is, no axis moved. The file's metadata has
"format": "ancestral", and in "record" JSON of what else belongs to the params, such as the
configuration of their network.
"""

import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from . import base

_FORMAT = "ancestral"


def write(path: str | os.PathLike, params: base.Params, record: Any) -> None:
  """Writes the file beside its place and renames it, so that it is there whole or not at all.

  Args:
    path: the file; its folder is made when missing.
    params: nested dictionaries of arrays, on this process.
    record: whatever JSON holds.

  Raises:
    ValueError: params that are not such dictionaries, or have a name with "/" in it.
    TypeError: JSON does not hold the record.
  """
  metadata = {"format": _FORMAT, "record": json.dumps(record)}
  write_tensors(path, dict(_flat(params, ())), metadata)


def read(path: str | os.PathLike) -> tuple[base.Params, Any]:
  """The params of a file that `write` has made, bit for bit, as numpy arrays; and its record.

  Raises:
    FileNotFoundError: it is not there.
    ValueError: it is cut off, or was written by something else.
  """
  tensors, metadata = read_tensors(path)
  if metadata.get("format") != _FORMAT:
    raise ValueError(
      f"{path} has format={metadata.get('format')!r} in its metadata, not {_FORMAT!r}: it is not "
      "of this layout."
    )
  params: dict[str, Any] = {}
  for name, array in tensors.items():
    put(params, tuple(name.split("/")), array)
  return params, json.loads(metadata["record"])


def put(params: dict[str, Any], path: tuple[str, ...], leaf: Any) -> None:
  """Sets params[path[0]][path[1]]..., making dictionaries on the way."""
  *folders, last = path
  for name in folders:
    params = params.setdefault(name, {})
  params[last] = leaf


def _flat(node: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
  if not isinstance(node, Mapping):
    if not path or isinstance(node, (tuple, list)) or node is None:
      where, kind = "/".join(path) or "the whole", type(node).__name__
      raise ValueError(f"Params are nested dictionaries of arrays; {where} is a {kind}.")
    yield "/".join(path), node
    return
  if not node:
    raise ValueError(f"The dictionary {'/'.join(path) or 'of all params'} is empty.")
  for name, inner in node.items():
    if not isinstance(name, str) or "/" in name:
      raise ValueError(f"Params have a name {name!r}: names are strings without '/'.")
    yield from _flat(inner, (*path, name))


def write_tensors(
  path: str | os.PathLike, tensors: Mapping[str, Any], metadata: Mapping[str, str]
) -> None:
  """A safetensors file, there whole or not at all; see `write`."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  beside = path.with_name(path.name + ".tmp")
  # The package writes an array's memory in whatever order it lies: not its axes', if transposed.
  plain = {name: np.array(array, order="C") for name, array in tensors.items()}
  safetensors_numpy.save_file(plain, beside, dict(metadata))
  beside.replace(path)


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """The tensors of a safetensors file, and its metadata.

  Raises:
    FileNotFoundError: it is not there.
    ValueError: it is cut off or is not of the format.
  """
  if not pathlib.Path(path).is_file():
    raise FileNotFoundError(f"{path} is not there.")
  try:
    with safetensors.safe_open(path, "numpy") as file:
      return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
  except safetensors.SafetensorError as error:
    raise ValueError(f"{path} is not a whole safetensors file ({error}): copy it again.") from error
