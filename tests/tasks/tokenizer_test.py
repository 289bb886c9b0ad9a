import json
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


def write_model(folder, specials=("<|endoftext|>", "<|im_end|>"), settings=None, ids=None, **files):
  """A model's directory: its tokenizer, and what the files beside it say."""
  made = _write(folder / "tokenizer.json", specials)
  for name, fields in {
    "tokenizer_config": settings or {},
    "generation_config": ids or {},
    **files,
  }.items():
    (folder / f"{name}.json").write_text(json.dumps(fields))
  return made


def begin_with(made, folder, *tokens):
  library = pytest.importorskip("tokenizers")
  made.post_processor = library.processors.TemplateProcessing(
    single=" ".join([*tokens, "$A", "<|im_end|>"]),
    special_tokens=[(name, made.token_to_id(name)) for name in {*tokens, "<|im_end|>"}],
  )
  made.save(str(folder / "tokenizer.json"))


def test_how_a_text_begins():
  code = tokenizer.characters("ab")
  assert code.opened("ab") == [1, 3, 4] and code.opened("") == [1]
  bare = code._replace(adds_bos=False)
  assert bare.opened("ab") == [3, 4] and bare.opened("") == [1]
  assert code.stops == (2,) and code._replace(other_stops=(3,)).stops == (2, 3)


def test_a_model_without_a_beginning(tmp_path):
  """As Qwen: texts begin with themselves, an answer with <|im_end|> or <|endoftext|>."""
  write_model(
    tmp_path,
    settings={"eos_token": {"content": "<|im_end|>"}, "pad_token": "<|endoftext|>"},
    ids={"eos_token_id": [1, 0], "bos_token_id": None},
    config={"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1},
  )
  code = tokenizer.pretrained(tmp_path)
  assert (code.pad, code.bos, code.eos, code.stops) == (0, 0, 1, (1, 0))
  assert code.opened("the cat") == code.encode("the cat") and code.opened("") == [0]
  assert code.decode([0, *code.encode("the cat"), 1, 0]) == "the cat"


@pytest.mark.parametrize("begins", [True, False])
def test_the_post_processor_says_how_a_text_begins(tmp_path, begins):
  settings = {"add_bos_token": not begins}
  made = write_model(tmp_path, ["<s>", "<|im_end|>"], settings, {"eos_token_id": 1})
  begin_with(made, tmp_path, *["<s>"] * begins)
  code = tokenizer.pretrained(tmp_path)
  assert code.opened("at") == [*[0] * begins, *code.encode("at")] and code.opened("") == [0]
  assert (code.bos, code.eos, code.pad) == (0, 1, 1)  # padding has no token of its own


def test_the_beginning_may_be_known_from_the_post_processor_alone(tmp_path):
  made = write_model(tmp_path, ["<|im_end|>", "<begin>"], {"eos_token": "<|im_end|>"})
  begin_with(made, tmp_path, "<begin>")
  code = tokenizer.pretrained(tmp_path)
  assert (code.bos, code.eos, code.opened("")) == (1, 0, [1])
  begin_with(made, tmp_path, "<begin>", "<begin>")
  with pytest.raises(ValueError, match=r"texts begin with the tokens \[1, 1\]; one is supported"):
    tokenizer.pretrained(tmp_path)


def test_ids_beyond_the_vocabulary_are_no_text(tmp_path):
  write_model(tmp_path)
  code = tokenizer.pretrained(tmp_path)
  ids = code.encode("cat")
  assert code.decode([code.vocab_size, ids[0], 10**6, *ids[1:]]) == "cat"


def test_a_models_directory_has_to_hold_a_tokenizer(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"no tokenizer file .*tokenizer.json"):
    tokenizer.pretrained(tmp_path)
  write_model(tmp_path, ["<mask>"])
  with pytest.raises(ValueError, match=r"no token ends a text; name it in tokenizer_config.json"):
    tokenizer.pretrained(tmp_path)
  (tmp_path / "config.json").write_text("[1, 2]")
  with pytest.raises(ValueError, match=r"config.json is not an object in JSON"):
    tokenizer.pretrained(tmp_path)


def test_a_continuation_keeps_the_space_before_it(tmp_path):
  """Tokens that hold the space before their word, as Llama 2's do, whose first loses it."""
  library = pytest.importorskip("tokenizers")
  words = {"<s>": 0, "</s>": 1, "\u2581the": 2, "\u2581cat": 3, "s": 4}
  made = library.Tokenizer(library.models.BPE(words, []))
  made.decoder = library.decoders.Metaspace()
  made.save(str(tmp_path / "tokenizer.json"))
  code = tokenizer.pretrained(tmp_path)
  assert code.decode([2, 3, 4]) == "the cats" and code.decode([3, 4]) == "cats"
  assert code.continued([2], [3, 4]) == " cats" and code.continued([2, 3], [4]) == "s"
  assert code.continued([], [2, 3]) == "the cat"
  plain = tokenizer.characters("ab")
  assert plain.continued([1, 3], [4, 3, 2]) == plain.decode([4, 3, 2]) == "ba"


TEXT = "plain, ünïcødé, 漢字, \0\n<s></s> \U0001f600"


def _alphabet(folder):
  return tokenizer.characters(sorted(set(TEXT)))


def _file(folder):
  _write(folder / "t.json", ["</s>", "<pad>", "<s>"], noisy=True)
  return tokenizer.from_file(folder / "t.json")


@pytest.mark.parametrize("make", [_alphabet, lambda folder: tokenizer.bytes_level(), _file])
def test_files_of_a_tokenizer_read_back_the_same(tmp_path, make):
  pytest.importorskip("tokenizers")
  code = make(tmp_path)
  for name, data in code.files().items():
    (tmp_path / name).write_bytes(data)
  again = tokenizer.pretrained(tmp_path)
  assert again[2:8] == code[2:8]  # sizes, specials, and how texts begin
  assert again.encode(TEXT) == code.encode(TEXT) and again.opened(TEXT) == code.opened(TEXT)
  ids = [code.bos, *code.encode(TEXT), code.eos, code.pad]
  assert again.decode(ids) == code.decode(ids)
  assert again.files() == {
    name: (tmp_path / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")
  }


def test_files_of_characters_know_no_others(tmp_path):
  pytest.importorskip("tokenizers")
  for name, data in tokenizer.characters("12+=").files().items():
    (tmp_path / name).write_bytes(data)
  code = tokenizer.pretrained(tmp_path)
  assert code.opened("1+1=") == [1, 3, 5, 3, 6]
  with pytest.raises(ValueError, match=r"no tokens for '1\+x'"):
    code.encode("1+x")


def test_bytes_that_are_no_text_decode_alike(tmp_path):
  pytest.importorskip("tokenizers")
  code = tokenizer.bytes_level()
  for name, data in code.files().items():
    (tmp_path / name).write_bytes(data)
  again = tokenizer.pretrained(tmp_path)
  for cut in (b"a\xff", b"\xe6\xbc", b"\xe6\xbcb", b"\x80\x80", b"\xf0\x9f\x98x\xc3"):
    assert again.decode([3 + byte for byte in cut]) == code.decode([3 + byte for byte in cut])
