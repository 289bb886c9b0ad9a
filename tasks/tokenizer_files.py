"""Tokenizers as the files of a model's directory: `tokenizer.json` and what goes with it.

`tokenizers` and transformers' AutoTokenizer read them, and encode as the tokenizer does that they
are of: a text begins with its beginning-of-sequence token. Format: the JSON of the `tokenizers`
library, version 1.0.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

# Of the tokenizers that this package makes, ids 0, 1, 2. Spelt out in a text they are read as the
# tokens, so they are names that texts do not have.
SPECIALS = {"pad": "<|pad|>", "bos": "<|bos|>", "eos": "<|eos|>"}

_OF_A_TOKENIZER = (
  *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
  *("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja"),
)


def settings(directory: pathlib.Path) -> dict[str, Any]:
  """Fields of `tokenizer_config.json` and, of special tokens' ids, of the model's configurations.

  Raises:
    ValueError: a file is no JSON object.
  """
  found: dict[str, Any] = {}
  for file in ("config.json", "generation_config.json"):
    fields = _object(directory / file)
    ids = {name: i for name, i in fields.items() if name.endswith("_token_id")}
    found |= {name: i for name, i in ids.items() if i not in (None, [])}
  return found | _object(directory / "tokenizer_config.json")


def of_characters(symbols: Sequence[str]) -> dict[str, bytes]:
  """Files of one token per character, after the specials."""
  vocabulary = {**_special_ids(), **{s: len(SPECIALS) + i for i, s in enumerate(symbols)}}
  return _files(
    {
      "pre_tokenizer": {
        "type": "Split",
        "pattern": {"Regex": r"[\s\S]"},
        "behavior": "Isolated",
        "invert": False,
      },
      "decoder": {"type": "Fuse"},
      # Its unknown token is none of the vocabulary, so that an unknown character is an error.
      "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<|unknown|>"},
    }
  )


def of_bytes() -> dict[str, bytes]:
  """Files of one token per byte, after the specials."""
  level = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": False,
    "use_regex": False,
  }
  vocabulary = {**_special_ids(), **{s: len(SPECIALS) + i for i, s in enumerate(_byte_names())}}
  model = {"type": "BPE", "vocab": vocabulary, "merges": [], "fuse_unk": False}
  return _files({"pre_tokenizer": level, "decoder": level, "model": model})


def _byte_names() -> list[str]:
  """The characters that stand for the bytes in byte-level BPE: printable ones for themselves.

  Reference: Radford et al. 2019, GPT-2's encoder.py, `bytes_to_unicode`.
  """
  printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
  others = iter(range(0x100, 0x200))
  return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def of_file(path: pathlib.Path, names: Mapping[str, str], bos: int) -> dict[str, bytes]:
  """A tokenizers JSON file, without its own padding, truncation and template.

  Args:
    path: of it.
    names: of the special tokens, by "pad", "bos", "eos".
    bos: the id of its "bos".
  """
  return _files(json.loads(path.read_text()), names, bos)


def of_directory(directory: pathlib.Path) -> dict[str, bytes]:
  """The files of a model's directory that are its tokenizer's, as they are."""
  paths = [directory / name for name in _OF_A_TOKENIZER]
  paths += sorted(directory.glob("additional_chat_templates/*.jinja"))
  return {str(p.relative_to(directory)): p.read_bytes() for p in paths if p.is_file()}


def _special_ids() -> dict[str, int]:
  return {name: i for i, name in enumerate(SPECIALS.values())}


def _files(
  fields: Mapping[str, Any], names: Mapping[str, str] | None = None, bos: int = 1
) -> dict[str, bytes]:
  added = [
    {
      **{"id": i, "content": name, "special": True},
      **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
    }
    for name, i in _special_ids().items()
  ]
  names = names or SPECIALS
  tokenizer = {
    "version": "1.0",
    "added_tokens": added,
    "normalizer": None,
    **fields,
    "truncation": None,
    "padding": None,
    "post_processor": _beginning(names["bos"], bos),
  }
  config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": False,
    **{f"{role}_token": name for role, name in names.items()},
  }
  made = {"tokenizer.json": tokenizer, "tokenizer_config.json": config}
  return {name: (json.dumps(fields, indent=1) + "\n").encode() for name, fields in made.items()}


def _beginning(name: str, i: int) -> dict[str, Any]:
  """A template that puts the token before a text."""
  begin = {"SpecialToken": {"id": name, "type_id": 0}}
  text = lambda which, kind: {"Sequence": {"id": which, "type_id": kind}}
  return {
    "type": "TemplateProcessing",
    "single": [begin, text("A", 0)],
    "pair": [begin, text("A", 0), text("B", 1)],
    "special_tokens": {name: {"id": name, "ids": [i], "tokens": [name]}},
  }


def _object(path: pathlib.Path) -> dict[str, Any]:
  """The JSON object of a file, empty where there is none."""
  if not path.is_file():
    return {}
  try:
    return dict(json.loads(path.read_text("utf-8")))
  except (TypeError, ValueError) as error:
    raise ValueError(f"{path} is not an object in JSON ({error}).") from None
