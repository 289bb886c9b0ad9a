import sys

import pytest

from ancestral.tasks import tokenizer


def test_characters():
  code = tokenizer.characters("cab ")
  assert (code.pad, code.bos, code.eos, code.vocab_size) == (0, 1, 2, 7)
  assert code.encode("abc a") == [4, 5, 3, 6, 4]
  assert code.decode([1, 4, 5, 3, 6, 4, 2, 3, 0, 0]) == "abc ac"  # it stops at nothing
  assert code.encode("") == [] and code.decode([]) == ""


def test_characters_name_the_culprit():
  code = tokenizer.characters("ab")
  with pytest.raises(ValueError, match=r"character 'x' at position 2 is not in the alphabet 'ab'"):
    code.encode("abxa")
  with pytest.raises(ValueError, match="token 5 at position 1 is outside the vocabulary of 5"):
    code.decode([3, 5])
  with pytest.raises(ValueError, match="token -1 at position 0"):
    code.decode([-1])
  with pytest.raises(ValueError, match="entry 'a' is not one new character"):
    tokenizer.characters("aba")
  with pytest.raises(ValueError, match="entry 'ab' is not one new character"):
    tokenizer.characters(["ab"])


def test_bytes_round_trip():
  code = tokenizer.bytes_level()
  text = "plain, ünïcødé, 漢字, \0\n\U0001f600"
  assert code.decode([code.bos, *code.encode(text), code.eos, code.pad]) == text
  assert code.vocab_size == 259
  assert code.encode("\0A") == [3, 68]
  assert max(code.encode(text)) < 259
  assert code.decode([3 + 0xFF, 3 + 65]) == "\N{REPLACEMENT CHARACTER}A"
  with pytest.raises(ValueError, match="token 259 "):
    code.decode([259])


def _write(path, specials, **options):
  tokenizers = pytest.importorskip("tokenizers")
  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=list(specials),
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  made.train_from_iterator(["the cat sat on the mat"] * 5, trainer)
  if options.get("noisy"):  # settings that a file may carry and that must not reach the ids
    made.enable_padding(length=64)
    made.enable_truncation(max_length=3)
    made.post_processor = tokenizers.processors.TemplateProcessing(
      single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
  made.save(str(path))
  return made


def test_file_round_trip(tmp_path):
  made = _write(tmp_path / "t.json", ["<pad>", "<s>", "</s>"], noisy=True)
  code = tokenizer.from_file(tmp_path / "t.json")
  assert (code.pad, code.bos, code.eos) == (0, 1, 2)
  assert code.vocab_size == made.get_vocab_size()
  text = "the cat sat, ünïcødé 漢字 on the mat"
  ids = code.encode(text)
  assert set(ids).isdisjoint({0, 1, 2}) and 3 < len(ids) < 64
  assert len(code.encode("the cat")) < len("the cat")  # merges were learnt
  assert code.decode([1, *ids, 2, 0, 0]) == text


def test_file_specials_are_found_or_given(tmp_path):
  path = tmp_path / "t.json"
  _write(path, ["<|endoftext|>", "<mask>"])
  with pytest.raises(ValueError, match=r"no pad token among <pad>.* pass pad="):
    tokenizer.from_file(path)
  with pytest.raises(ValueError, match="no pad token among <none>"):
    tokenizer.from_file(path, pad="<none>")
  code = tokenizer.from_file(path, pad="<mask>")
  assert (code.pad, code.bos, code.eos) == (1, 0, 0)


def test_file_errors(tmp_path, monkeypatch):
  pytest.importorskip("tokenizers")
  with pytest.raises(FileNotFoundError, match=r"no tokenizer file .*absent.json"):
    tokenizer.from_file(tmp_path / "absent.json")
  (tmp_path / "bad.json").write_text("{}")
  with pytest.raises(ValueError, match=r"bad.json is not a tokenizers JSON file"):
    tokenizer.from_file(tmp_path / "bad.json")
  monkeypatch.setitem(sys.modules, "tokenizers", None)
  with pytest.raises(ImportError, match=r"pip install 'ancestral\[tokenizers\]'"):
    tokenizer.from_file(tmp_path / "bad.json")
