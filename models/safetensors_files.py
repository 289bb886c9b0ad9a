"""safetensors files, tensor by tensor: a header in JSON, then the bytes of every tensor.

Tensors are mapped, not read: a slice of one reads its own bytes. Format:
https://github.com/huggingface/safetensors, "Format".
"""

import json
import math
import os
import pathlib
import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

DTYPES = {
  "F32": np.dtype(np.float32),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F16": np.dtype(np.float16),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class Tensor(NamedTuple):
  """Where a tensor lies in its file."""

  path: pathlib.Path
  dtype: str  # as the format calls it
  shape: tuple[int, ...]
  offset: int  # bytes from the beginning of the file

  def mapped(self) -> np.ndarray:
    """The tensor, read as its elements are."""
    return np.memmap(self.path, DTYPES[self.dtype], "r", self.offset, self.shape)


def tensors(directory: str | os.PathLike) -> dict[str, Tensor]:
  """All tensors of `model.safetensors`, or of the files that `model.safetensors.index.json` names.

  Raises:
    FileNotFoundError: no such file, or a file of the index is not there.
    ValueError: a file is cut off or is not of the format, or lacks what the index says it has.
  """
  directory = pathlib.Path(directory)
  if not (directory / _INDEX).exists():
    if not (directory / _SINGLE).exists():
      raise FileNotFoundError(f"{directory}: it has neither {_SINGLE} nor {_INDEX}.")
    return header(directory / _SINGLE)
  files = read_json(directory / _INDEX).get("weight_map")
  if not isinstance(files, dict) or not files:
    raise ValueError(f"{directory / _INDEX}: it has no weight_map from tensors to files.")
  headers = {name: header(directory / name) for name in sorted(set(files.values()))}
  for name, file in files.items():
    if name not in headers[file]:
      raise ValueError(f"{directory / file}: no tensor {name}, which {_INDEX} says is in it.")
  return {name: headers[file][name] for name, file in files.items()}


def header(path: pathlib.Path) -> dict[str, Tensor]:
  """The tensors of one file.

  Raises:
    FileNotFoundError: it is not there.
    ValueError: it is cut off, or is not of the format.
  """
  if not path.exists():
    raise FileNotFoundError(f"{path}: no such file.")
  size = path.stat().st_size
  with path.open("rb") as file:
    start = 8 + (struct.unpack("<Q", file.read(8))[0] if size >= 8 else 0)
    if size < 8 or start > size:
      raise ValueError(
        f"{path}: {size} bytes are not a safetensors file; it was cut off, or is other."
      )
    try:
      entries = dict(json.loads(file.read(start - 8)))
    except (UnicodeDecodeError, ValueError, TypeError) as error:
      raise ValueError(f"{path}: its safetensors header is not JSON ({error}).") from error
  entries.pop("__metadata__", None)
  found = {name: _entry(path, name, entry, start) for name, entry in entries.items()}
  end = max((start + entry["data_offsets"][1] for entry in entries.values()), default=start)
  if end != size:
    raise ValueError(
      f"{path}: it has {size} bytes, and its header says {end}: it was cut off or added to; copy "
      "it again."
    )
  return found


def _entry(path: pathlib.Path, name: str, entry: Any, start: int) -> Tensor:
  try:
    dtype, shape = str(entry["dtype"]), tuple(int(size) for size in entry["shape"])
    first, last = (int(offset) for offset in entry["data_offsets"])
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{path}: the header's entry of {name} is not of the format.") from error
  known = DTYPES.get(dtype)
  if first < 0 or (known is not None and last - first != math.prod(shape) * known.itemsize):
    raise ValueError(
      f"{path}: {name} of {dtype}{list(shape)} does not fill bytes {first} to {last}."
    )
  return Tensor(path, dtype, shape, start + first)


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """The object in a JSON file.

  Raises:
    FileNotFoundError: it is not there.
    ValueError: it is something else.
  """
  if not path.exists():
    raise FileNotFoundError(f"{path}: no such file.")
  try:
    found = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f"{path}: it is not JSON ({error}).") from error
  if not isinstance(found, dict):
    raise ValueError(f"{path}: it is not a JSON object.")
  return found


class Planned(NamedTuple):
  """A tensor to be written: what the header says of it, and its value when its turn comes."""

  shape: tuple[int, ...]
  dtype: np.dtype
  value: Callable[[], np.ndarray]

  @property
  def num_bytes(self) -> int:
    """What it takes in the file."""
    return math.prod(self.shape) * self.dtype.itemsize


def write(directory: pathlib.Path, planned: Mapping[str, Planned], max_shard_bytes: int) -> None:
  """One `model.safetensors`, or shards of at most so many bytes of tensors and their index.

  Values are made one at a time. A tensor that is larger than a shard has one to itself.
  """
  shards: list[dict[str, Planned]] = [{}]
  room = max_shard_bytes
  for name, tensor in planned.items():
    if tensor.num_bytes > room and shards[-1]:
      shards.append({})
      room = max_shard_bytes
    shards[-1][name] = tensor
    room -= tensor.num_bytes
  if len(shards) == 1:
    _write_file(directory / _SINGLE, shards[0])
    return
  files = {}
  for i, shard in enumerate(shards):
    file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
    _write_file(directory / file, shard)
    files |= dict.fromkeys(shard, file)
  total = sum(tensor.num_bytes for tensor in planned.values())
  index = {"metadata": {"total_size": total}, "weight_map": files}
  (directory / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_file(path: pathlib.Path, planned: Mapping[str, Planned]) -> None:
  entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
  end = 0
  for name, tensor in planned.items():
    begin, end = end, end + tensor.num_bytes
    dtype = _NAMES[tensor.dtype]
    entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
  text = json.dumps(entries).encode()
  text += b" " * (-len(text) % 8)
  with path.open("wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    for name, tensor in planned.items():
      value = np.ascontiguousarray(tensor.value())
      if value.shape != tensor.shape or value.dtype != tensor.dtype:
        raise ValueError(
          f"{name} is {value.dtype}{value.shape}, planned {tensor.dtype}{tensor.shape}."
        )
      file.write(value.reshape(-1).view(np.uint8))
