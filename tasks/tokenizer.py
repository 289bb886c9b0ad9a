"""Text to token ids and back: characters, bytes, or any file of the `tokenizers` library.

`encode` adds no special token and `decode` drops them; beginning, end and padding are the caller's.
"""

import contextlib
import functools
import importlib
import itertools
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from . import tokenizer_files

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
  eos: int  # what training puts after a text
  other_stops: tuple[int, ...] = ()  # that end a sample as well
  adds_bos: bool = True  # before every text; else before an empty one
  files: Callable[[], Mapping[str, bytes]] = dict  # what `pretrained` reads back; none if it cannot

  @property
  def stops(self) -> tuple[int, ...]:
    """All tokens that end a sample, `eos` first."""
    return (self.eos, *self.other_stops)

  def opened(self, text: str) -> list[int]:
    """The text as a model reads it: never empty, since the first token is drawn after another."""
    ids = self.encode(text)
    return [self.bos, *ids] if self.adds_bos or not ids else ids

  def continued(self, before: Sequence[int], ids: Iterable[int]) -> str:
    """What the ids add to a text that ends with `before`.

    Where a word's token holds the space before it, `decode` drops that of a text's first.
    """
    last = list(before[-1:])
    return self.decode([*last, *ids])[len(self.decode(last)) :]


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
    files=functools.partial(tokenizer_files.of_characters, symbols),
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
  return Tokenizer(
    encode=_encode_bytes,
    decode=_decode_bytes,
    vocab_size=_NUM_SPECIALS + 256,
    pad=0,
    bos=1,
    eos=2,
    files=tokenizer_files.of_bytes,
  )


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
  tokenizer = _library(path)
  vocabulary = tokenizer.get_vocab(with_added_tokens=True)
  find = functools.partial(_special, vocabulary, path)
  specials = {"pad": find("pad", pad), "bos": find("bos", bos), "eos": find("eos", eos)}
  names = {role: tokenizer.id_to_token(i) for role, i in specials.items()}
  return Tokenizer(
    encode=functools.partial(_encode_file, tokenizer),
    decode=functools.partial(_decode_file, tokenizer, frozenset(specials.values())),
    vocab_size=max(vocabulary.values()) + 1,  # ids may have gaps
    **specials,
    files=functools.partial(tokenizer_files.of_file, pathlib.Path(path), names, specials["bos"]),
  )


def pretrained(directory: str | pathlib.Path) -> Tokenizer:
  """The tokenizer of a model's directory: `tokenizer.json` and what the files beside it say.

  A special token is the one that `tokenizer_config.json` names, or the id in
  `generation_config.json` or `config.json`, or has its usual name; without padding or a beginning
  the end stands for them. All ends that the files list stop a sample. A text begins with what the
  file's own post-processor puts before it, whatever `add_bos_token` says, as in transformers 5:
  with nothing for GPT-2 and Qwen.

  Ids beyond the vocabulary, which a padded embedding has, decode to nothing.

  Raises:
    ImportError: if the library is missing.
    FileNotFoundError: if there is no `tokenizer.json`.
    ValueError: if a file does not parse, no token ends a text, or several are put before it.
  """
  directory = pathlib.Path(directory)
  tokenizer = _library(directory / "tokenizer.json")
  vocabulary = tokenizer.get_vocab(with_added_tokens=True)
  told = tokenizer_files.settings(directory)
  given = {role: _told(role, told, vocabulary) for role in ("eos", "bos", "pad")}
  if not given["eos"]:
    raise ValueError(
      f"{directory}: no token ends a text; name it in tokenizer_config.json, as eos_token."
    )
  eos = given["eos"][0]
  before = _put_before(tokenizer, directory)
  bos, pad = (*before, *given["bos"], eos)[0], (*given["pad"], eos)[0]
  others = tuple(dict.fromkeys(i for i in given["eos"] if i != eos))
  return Tokenizer(
    encode=functools.partial(_encode_file, tokenizer),
    decode=functools.partial(_decode_file, tokenizer, frozenset((pad, bos, eos, *others))),
    vocab_size=max(vocabulary.values()) + 1,
    pad=pad,
    bos=bos,
    eos=eos,
    other_stops=others,
    adds_bos=bool(before),
    files=functools.partial(tokenizer_files.of_directory, directory),
  )


def _told(role: str, told: Mapping[str, Any], vocabulary: Mapping[str, int]) -> list[int]:
  """Ids that the files say a special token has, the likeliest to be meant first."""
  token = told.get(f"{role}_token")
  token = token.get("content") if isinstance(token, Mapping) else token
  found = [vocabulary[token]] if token in vocabulary else []
  listed = told.get(f"{role}_token_id")
  listed = listed if isinstance(listed, list) else [listed]
  found += [i for i in listed if type(i) is int and i >= 0]  # -1 is for none
  return found or [vocabulary[name] for name in _USUAL_NAMES[role] if name in vocabulary][:1]


def _put_before(tokenizer: Any, directory: pathlib.Path) -> list[int]:
  """What the file's post-processor puts before a text, one token at most."""
  text = _some_text(tokenizer)
  whole, plain = (tokenizer.encode(text, add_special_tokens=adds).ids for adds in (True, False))
  starts = range(len(whole) - len(plain) + 1)
  start = next(i for i in starts if whole[i : i + len(plain)] == plain)
  if start > 1:
    raise ValueError(f"{directory}: texts begin with the tokens {whole[:start]}; one is supported.")
  return whole[:start]


def _some_text(tokenizer: Any) -> str:
  """One that the tokenizer has tokens for: those of an alphabet may lack any given letter."""
  candidates = (tokenizer.decode([i]) for i in range(tokenizer.get_vocab_size()))
  for text in itertools.chain("x", candidates):
    with contextlib.suppress(Exception):  # bare, of a character that it does not know
      if tokenizer.encode(text, add_special_tokens=False).ids:
        return text
  return ""


def _library(path: str | pathlib.Path) -> Any:
  try:
    library = importlib.import_module("tokenizers")
  except ImportError:
    raise ImportError(f"{path} needs tokenizers; pip install 'ancestral[tokenizers]'") from None
  if not pathlib.Path(path).is_file():
    raise FileNotFoundError(f"no tokenizer file {path}; give the path of a tokenizers JSON file")
  try:
    tokenizer = library.Tokenizer.from_file(str(path))
  except Exception as error:  # the library raises bare Exception
    raise ValueError(f"{path} is not a tokenizers JSON file: {error}") from None
  tokenizer.no_padding()
  tokenizer.no_truncation()
  return tokenizer


def _special(
  vocabulary: Mapping[str, int], path: str | pathlib.Path, role: str, name: str | None
) -> int:
  names = _USUAL_NAMES[role] if name is None else (name,)
  for candidate in names:
    if candidate in vocabulary:
      return vocabulary[candidate]
  raise ValueError(f"no {role} token among {', '.join(names)} in {path}; pass {role}=<its token>")


def _encode_file(tokenizer: Any, text: str) -> list[int]:
  try:
    return tokenizer.encode(text, add_special_tokens=False).ids
  except Exception as error:  # bare, where a character is not in the vocabulary
    raise ValueError(f"The tokenizer has no tokens for {text!r}: {error}") from None


def _decode_file(tokenizer: Any, specials: frozenset[int], ids: Iterable[int]) -> str:
  plain = [int(i) for i in ids if int(i) not in specials]
  return tokenizer.decode(plain, skip_special_tokens=True)
