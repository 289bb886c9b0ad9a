"""llama.cpp's samplers by their C interface, without a model: on an array of candidates.

A filtered token is absent there and -inf here, so the candidates are the tokens that are not -inf.
"""

import contextlib
import ctypes
import pathlib
import struct
from collections.abc import Iterator, Sequence

import numpy as np

INF = np.inf
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


@contextlib.contextmanager
def sampler(peer, made, history: Sequence[int] = ()) -> Iterator:
  """A sampler that was made, told of the tokens written so far, and freed at the end."""
  for token in history:
    peer.llama_sampler_accept(made, int(token))
  yield made
  peer.llama_sampler_free(made)


def chain(peer, stages: Sequence):
  """Samplers as one, which frees them."""
  made = peer.llama_sampler_chain_init(peer.llama_sampler_chain_default_params())
  for stage in stages:
    peer.llama_sampler_chain_add(made, stage)
  return made


def apply(peer, made, row: np.ndarray) -> tuple[np.ndarray, int]:
  """What a sampler leaves of logits [V], -inf where absent, and the token it chose, or -1."""
  ids = np.flatnonzero(row > -INF)
  candidates = np.zeros(len(ids), _CANDIDATE)
  candidates["id"], candidates["logit"] = ids, row[ids]
  pointer = candidates.ctypes.data_as(ctypes.POINTER(peer.llama_token_data))
  array = peer.llama_token_data_array(pointer, len(ids), -1, False)
  peer.llama_sampler_apply(made, ctypes.byref(array))
  moved = ctypes.addressof(array.data.contents) - candidates.ctypes.data  # XTC moves the pointer
  left = candidates[moved // _CANDIDATE.itemsize :][: array.size]
  out = np.full(len(row), -INF, np.float32)
  out[left["id"]] = left["logit"]
  return out, int(left["id"][array.selected]) if array.selected >= 0 else -1


_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9


def _value(kind, value):
  if kind == _STRING:
    return struct.pack("<Q", len(value.encode())) + value.encode()
  return struct.pack({_UINT32: "<I", _INT32: "<i", _FLOAT32: "<f", _BOOL: "<?"}[kind], value)


def write_vocabulary(path: pathlib.Path, tokens: Sequence[str]) -> None:
  """A GGUF file, version 3, of no tensors and a SentencePiece vocabulary: all of it that is read.

  Three tokens for unknown, begin and end come first, as its reader has it.
  """
  fields = {
    "general.architecture": (_STRING, "llama"),
    "tokenizer.ggml.model": (_STRING, "llama"),
    "tokenizer.ggml.add_space_prefix": (_BOOL, False),
  }
  names = ["<unk>", "<s>", "</s>", *tokens]
  arrays = {
    "tokenizer.ggml.tokens": (_STRING, names),
    "tokenizer.ggml.scores": (_FLOAT32, [0.0] * len(names)),
    "tokenizer.ggml.token_type": (_INT32, [2, 3, 3] + [1] * len(tokens)),
  }
  parts = [b"GGUF", struct.pack("<IQQ", 3, 0, len(fields) + len(arrays))]
  for key, (kind, value) in fields.items():
    parts += [_value(_STRING, key), struct.pack("<I", kind), _value(kind, value)]
  for key, (kind, values) in arrays.items():
    parts += [_value(_STRING, key), struct.pack("<IIQ", _ARRAY, kind, len(values))]
    parts += [_value(kind, value) for value in values]
  path.write_bytes(b"".join(parts))


@contextlib.contextmanager
def vocabulary(peer, path: pathlib.Path) -> Iterator:
  """The vocabulary of a GGUF file."""
  params = peer.llama_model_default_params()
  params.vocab_only = True
  model = peer.llama_model_load_from_file(str(path).encode(), params)
  assert model, f"llama.cpp does not read {path}"
  yield peer.llama_model_get_vocab(model)
  peer.llama_model_free(model)
