"""Text to token ids and back: characters, bytes, or any file of the `tokenizers` library.

`encode` adds no special token and `decode` drops them; beginning, end and padding are the caller's.
"""

import functools
import importlib
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

_NUM_SPECIALS = 3  # pad 0, bos 1, eos 2 come first in the tokenizers that this file makes
_USUAL_NAMES = {
  "pad": ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>"),
  "bos": ("<s>", "<bos>", "[BOS]", "<|bos|>", "<|begin_of_text|>", "<|endoftext|>", "[CLS]"),
  "eos": ("</s>", "<eos>", "[EOS]", "<|eos|>", "<|end_of_text|>", "<|endoftext|>", "[SEP]"),
}


class Tokenizer(NamedTuple):
  """A code for text; `decode(encode(text)) == text` for the character and byte levels."""

  encode: Callable[[str], list[int]]
  decode: Callable[[Iterable[int]], str]
  vocab_size: int  # ids are below it, specials included
  pad: int
  bos: int
  eos: int


def characters(alphabet: Iterable[str]) -> Tokenizer:
  """One token per character of `alphabet`, in the order given, after pad, bos and eos.

  Raises:
    ValueError: if the alphabet repeats a character or has an entry that is not one character; from
      `encode`, on a character outside the alphabet; from `decode`, on an id outside the vocabulary.
  """
  symbols = tuple(alphabet)
  for position, symbol in enumerate(symbols):
    if len(symbol) != 1 or symbol in symbols[:position]:
      raise ValueError(f"alphabet entry {symbol!r} is not one new character; list each just once")
  index = {symbol: _NUM_SPECIALS + i for i, symbol in enumerate(symbols)}
  return Tokenizer(
    encode=functools.partial(_encode_characters, index),
    decode=functools.partial(_decode_characters, symbols),
    vocab_size=_NUM_SPECIALS + len(symbols),
    pad=0,
    bos=1,
    eos=2,
  )


def _encode_characters(index: Mapping[str, int], text: str) -> list[int]:
  try:
    return [index[symbol] for symbol in text]
  except KeyError as error:
    symbol = error.args[0]
    raise ValueError(
      f"character {symbol!r} at position {text.index(symbol)} is not in the alphabet "
      f"{''.join(index)!r}; remove it from the text or add it to the alphabet"
    ) from None


def _decode_characters(symbols: Sequence[str], ids: Iterable[int]) -> str:
  plain = _without_specials(ids, _NUM_SPECIALS + len(symbols))
  return "".join(symbols[i - _NUM_SPECIALS] for i in plain)


def bytes_level() -> Tokenizer:
  """One token per byte of the UTF-8 text: 256, after pad, bos and eos.

  `decode` puts U+FFFD where sampled bytes are not UTF-8.
  """
  return Tokenizer(_encode_bytes, _decode_bytes, _NUM_SPECIALS + 256, pad=0, bos=1, eos=2)


def _encode_bytes(text: str) -> list[int]:
  return [byte + _NUM_SPECIALS for byte in text.encode()]


def _decode_bytes(ids: Iterable[int]) -> str:
  plain = _without_specials(ids, _NUM_SPECIALS + 256)
  return bytes(i - _NUM_SPECIALS for i in plain).decode(errors="replace")


def _without_specials(ids: Iterable[int], vocab_size: int) -> list[int]:
  plain = []
  for position, i in enumerate(int(i) for i in ids):
    if not 0 <= i < vocab_size:
      raise ValueError(
        f"token {i} at position {position} is outside the vocabulary of {vocab_size}; "
        "decode with the tokenizer that the model was trained with"
      )
    if i >= _NUM_SPECIALS:
      plain.append(i)
  return plain


def from_file(
  path: str | pathlib.Path,
  *,
  pad: str | None = None,
  bos: str | None = None,
  eos: str | None = None,
) -> Tokenizer:
  """A tokenizer read from a `tokenizers` JSON file (`tokenizer.json` of a Hugging Face model).

  Specials are looked up by their usual names unless the token is given. The file's own padding,
  truncation and template (added specials) are left out: `encode` returns the text's ids alone. A
  special token spelt out in the text is still read as that token, as that library does.

  Raises:
    ImportError: if the library is missing.
    FileNotFoundError: if the file is.
    ValueError: if the file does not parse, or a special token is not in its vocabulary.
  """
  try:
    library = importlib.import_module("tokenizers")
  except ImportError:
    raise ImportError("from_file needs tokenizers; pip install 'ancestral[tokenizers]'") from None
  if not pathlib.Path(path).is_file():
    raise FileNotFoundError(f"no tokenizer file {path}; give the path of a tokenizers JSON file")
  try:
    tokenizer = library.Tokenizer.from_file(str(path))
  except Exception as error:  # the library raises bare Exception
    raise ValueError(f"{path} is not a tokenizers JSON file: {error}") from None
  tokenizer.no_padding()
  tokenizer.no_truncation()
  vocabulary = tokenizer.get_vocab(with_added_tokens=True)
  find = functools.partial(_special, vocabulary, path)
  specials = {"pad": find("pad", pad), "bos": find("bos", bos), "eos": find("eos", eos)}
  return Tokenizer(
    encode=functools.partial(_encode_file, tokenizer),
    decode=functools.partial(_decode_file, tokenizer, frozenset(specials.values())),
    vocab_size=max(vocabulary.values()) + 1,  # ids may have gaps
    **specials,
  )


def _special(
  vocabulary: Mapping[str, int], path: str | pathlib.Path, role: str, name: str | None
) -> int:
  names = _USUAL_NAMES[role] if name is None else (name,)
  for candidate in names:
    if candidate in vocabulary:
      return vocabulary[candidate]
  raise ValueError(f"no {role} token among {', '.join(names)} in {path}; pass {role}=<its token>")


def _encode_file(tokenizer: Any, text: str) -> list[int]:
  return tokenizer.encode(text, add_special_tokens=False).ids


def _decode_file(tokenizer: Any, specials: frozenset[int], ids: Iterable[int]) -> str:
  plain = [int(i) for i in ids if int(i) not in specials]
  return tokenizer.decode(plain, skip_special_tokens=True)
