"""Data pipelines: what rows hold, how processes share them, and that positions restore."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from ancestral.tasks import tokenizer as tokenizers
from ancestral.training import data

PAD, BOS, EOS = 0, 1, 2


def decode(tokens):
  return "".join(chr(int(t) - 3 + ord(" ")) for t in tokens if t > EOS)


TOKENIZER = tokenizers.Tokenizer(
  lambda text: [ord(c) - ord(" ") + 3 for c in text], decode, 98, pad=PAD, bos=BOS, eos=EOS
)


def add(generator):
  a, b = (int(x) for x in generator.integers(0, 1000, 2))
  return SimpleNamespace(prompt=f"{a}+{b}=", answer=str(a + b), metadata={})


TASK = SimpleNamespace(problem=add, tokenizer=TOKENIZER)
SPLITTERS = {
  "pad": data.pad(14, PAD),
  "concatenate": data.concatenate(11, PAD),
  "first_fit": data.first_fit(31, PAD, num_bins=3),
}


def texts(num=40):
  generator = np.random.default_rng(0)
  strings = ["".join(generator.choice(list("abcdef"), n)) for n in generator.integers(0, 40, num)]
  return strings, data.tokenize([{"text": s} for s in strings], TOKENIZER)


def take(iterator, n):
  return [next(iterator) for _ in range(n)]


def assert_same(left, right):
  assert len(left) == len(right)
  for a, b in zip(left, right, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      assert a[name].dtype == b[name].dtype
      np.testing.assert_array_equal(a[name], b[name])


def test_task_rows_mask_exactly_the_answer_and_eos():
  batch = next(data.batches(data.task_source(TASK, 7), data.pad(14, PAD), batch_size=32))
  assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
    "tokens": ((32, 14), "int32"), "targets": ((32, 14), "int32"), "mask": ((32, 14), "float32"),
  }  # fmt: skip
  for tokens, targets, mask in zip(batch["tokens"], batch["targets"], batch["mask"], strict=True):
    assert tokens[0] == BOS
    problem, answer = decode(tokens).split("=")
    a, b = problem.split("+")
    assert int(a) + int(b) == int(answer)
    predicted = targets[mask > 0]
    assert decode(predicted) == answer and predicted[-1] == EOS
    assert len(predicted) == len(answer) + 1
    assert set(mask) <= {0.0, 1.0}


def test_task_source_depends_on_seed_and_index_alone():
  source = data.task_source(TASK, 3, size=50)
  forward = [source[i]["tokens"] for i in range(50)]
  backward = [data.task_source(TASK, 3, size=9)[i]["tokens"] for i in reversed(range(9))][::-1]
  for a, b in zip(forward, backward, strict=False):
    np.testing.assert_array_equal(a, b)
  assert len({a.tobytes() for a in forward}) > 45
  other = [data.task_source(TASK, 4, size=50)[i]["tokens"].tobytes() for i in range(50)]
  assert not {a.tobytes() for a in forward} & set(other)


def test_concatenate_predicts_every_token_once_and_in_order():
  strings, source = texts()
  rows = data.batches(source, data.concatenate(11, PAD), batch_size=1, shuffle=False, epochs=1)
  rows = [{k: v[0] for k, v in row.items()} for row in rows]
  targets = np.concatenate([r["targets"][r["mask"] > 0] for r in rows])
  expected = [t for s in strings for t in [*TOKENIZER.encode(s), EOS]]
  np.testing.assert_array_equal(targets, expected)
  assert all((r["segments"] > 0).all() for r in rows[:-1])
  padding = rows[-1]["segments"] == 0
  assert (rows[-1]["tokens"][padding] == PAD).all() and (rows[-1]["mask"][padding] == 0).all()
  for r in rows:  # inside a segment the target is the next token, and positions count from zero
    same = (r["segments"][1:] == r["segments"][:-1]) & (r["segments"][1:] > 0)
    np.testing.assert_array_equal(r["tokens"][1:][same], r["targets"][:-1][same])
    for s in range(1, r["segments"].max() + 1):
      inside = r["positions"][r["segments"] == s]
      np.testing.assert_array_equal(inside, np.arange(len(inside)))


def test_first_fit_keeps_examples_whole():
  source = data.task_source(TASK, 0, size=30)
  rows = list(data.batches(source, SPLITTERS["first_fit"], batch_size=1, shuffle=False, epochs=1))
  found = []
  for row in rows:
    row = {k: v[0] for k, v in row.items()}
    for s in range(1, row["segments"].max() + 1):
      inside = row["segments"] == s
      found.append((*row["tokens"][inside], row["targets"][inside][-1]))
      masked = row["targets"][inside & (row["mask"] > 0)]
      assert decode(masked) == decode(row["tokens"][inside]).split("=")[1]
  assert sorted(found) == sorted(tuple(source[i]["tokens"]) for i in range(30))
  assert max(r["segments"].max() for r in rows) >= 2


@pytest.mark.parametrize("name", SPLITTERS)
@pytest.mark.parametrize("prefetch", [0, 2])
def test_restored_position_continues_bitwise(name, prefetch):
  source = data.task_source(TASK, 5, size=23)
  made = []

  def make():
    made.append(
      data.batches(source, SPLITTERS[name], batch_size=4, seed=1, epochs=3, prefetch=prefetch)
    )
    return made[-1]

  whole = list(make())
  assert len(whole) > 6
  for stop in range(0, len(whole) + 1, 3):
    iterator = make()
    assert_same(take(iterator, stop), whole[:stop])
    state = json.loads(json.dumps(data.get_state(iterator)))
    fresh = make()
    data.set_state(fresh, state)
    assert data.get_state(fresh) == state
    assert_same(list(fresh), whole[stop:])
    if stop == 3:  # an iterator that has run on can be wound back
      take(iterator, 3)
      data.set_state(iterator, state)
      assert_same(take(iterator, 3), whole[stop : stop + 3])
    while prefetch and made:
      made.pop().close()  # its thread must not be the one that collects it


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", SPLITTERS)
def test_processes_share_the_same_global_batches(name, count):
  source = data.task_source(TASK, 5, size=35)
  make = lambda i, n: list(
    data.batches(
      source, SPLITTERS[name], batch_size=6, seed=2, epochs=3, process_index=i, process_count=n
    )
  )
  single, shards = make(0, 1), [make(i, count) for i in range(count)]
  assert len(single) > 3
  joined = [
    {k: np.concatenate([s[k] for s in step]) for k in step[0]} for step in zip(*shards, strict=True)
  ]
  assert_same(joined, single)


def test_a_process_reads_only_its_own_padded_rows():
  read = []

  def item(index):
    read.append(index)
    return data.task_source(TASK, 0)[index]

  iterator = data.batches(
    data.Source(64, item), SPLITTERS["pad"], batch_size=8, shuffle=False,
    process_index=1, process_count=4,
  )  # fmt: skip
  take(iterator, 2)
  assert read == [2, 3, 10, 11]


def test_shuffle_visits_everything_once_an_epoch_in_new_orders():
  source = data.Source(12, lambda i: {"index": np.asarray(i)})
  rows = lambda seed: [
    int(i)
    for b in data.batches(source, lambda d: d, batch_size=4, seed=seed, epochs=2)
    for i in b["index"]
  ]
  first = rows(0)
  assert sorted(first[:12]) == sorted(first[12:]) == list(range(12))
  assert first[:12] != first[12:] and first[:12] != list(range(12))
  assert rows(0) == first
  assert rows(1)[:12] not in (first[:12], first[12:])  # not grain's seed + epoch


def test_errors_name_the_culprit_and_the_fix():
  strings, source = texts()
  long = max(range(len(strings)), key=lambda i: len(strings[i]))
  needed = len(strings[long]) + 1
  for rows in (data.pad(needed - 1, PAD), data.first_fit(needed - 1, PAD)):
    with pytest.raises(
      ValueError, match=rf"example {long} needs a row of {needed} .*have {needed - 1}: raise"
    ):
      list(data.batches(source, rows, batch_size=1, epochs=1))
  list(data.batches(source, data.pad(needed, PAD), batch_size=1, epochs=1))  # exactly full is fine
  with pytest.raises(ValueError, match="batch_size=6 does not divide over 4 processes"):
    data.batches(source, SPLITTERS["pad"], batch_size=6, process_index=0, process_count=4)
  with pytest.raises(ValueError, match=r"40 rows in 1 epochs are less than batch_size=64"):
    data.batches(source, SPLITTERS["pad"], batch_size=64, epochs=1)
  with pytest.raises(ValueError, match="no items"):
    data.batches([], SPLITTERS["pad"], batch_size=1)
  iterator = data.batches(source, SPLITTERS["concatenate"], batch_size=1)
  with pytest.raises(ValueError, match="does not fit this pipeline"):
    data.set_state(iterator, {"next_index": 3})


def test_passages_cut_every_text_and_lose_nothing():
  source = data.Source(2, lambda i: {"text": ["abcdefg", "xy"][i]})
  cut = data.passages(source, 3)
  assert [cut[i]["text"] for i in range(len(cut))] == ["abc", "def", "g", "xy"]
  sides = [data.side(data.passages(source, 1), name, test_percent=40) for name in ("train", "test")]
  assert len(sides[0]) + len(sides[1]) == 9


def test_text_source_reads_sorted_files(tmp_path):
  (tmp_path / "b").mkdir()
  for name, text in {"b/x.txt": "bx", "a.txt": "naïve", "c.md": "no", "empty.txt": ""}.items():
    (tmp_path / name).write_text(text, encoding="utf-8")
  (tmp_path / "d.txt").write_bytes(b"\xffz")
  source = data.text_source(tmp_path)
  assert [source[i]["text"] for i in range(len(source))] == ["naïve", "bx", "\ufffdz"]
  with pytest.raises(FileNotFoundError, match=r"'\*\.csv' in"):
    data.text_source(tmp_path, "*.csv")


def test_jsonl_source_reads_text_and_pairs(tmp_path):
  path = tmp_path / "x.jsonl"
  first = '{"prompt": "1+1=", "answer": "2"}'
  second = '{"prompt": "a\u2028b", "answer": "c", "n": 1}'
  path.write_text(f"{first}\n\n{second}\n[1]\n{{", encoding="utf-8")
  source = data.jsonl_source(path, ("prompt", "answer"))
  assert source[1] == {"prompt": "a\u2028b", "answer": "c"} and len(source) == 4
  example = data.tokenize(source, TOKENIZER, ("prompt", "answer"))[0]
  assert decode(example["tokens"][example["mask"]]) == "2" and decode(example["tokens"]) == "1+1=2"
  with pytest.raises(ValueError, match=r"x\.jsonl:4 lacks string fields .* it has list"):
    source[2]
  with pytest.raises(ValueError, match=r"x\.jsonl:5 is not JSON"):
    source[3]
  with pytest.raises(ValueError, match=r"lacks string fields \('text',\): it has \['answer'"):
    data.jsonl_source(path)[0]
  with pytest.raises(FileNotFoundError):
    data.jsonl_source(tmp_path / "none.jsonl")
  (tmp_path / "a").mkdir()
  (tmp_path / "a" / "y.jsonl").write_text('{"text": "first"}\n')
  (tmp_path / "a" / "x.jsonl").write_text('{"text": "zeroth"}\n')
  folder = data.jsonl_source(tmp_path / "a")
  assert [record["text"] for record in (folder[0], folder[1])] == ["zeroth", "first"]
  (tmp_path / "b").mkdir()
  with pytest.raises(ValueError, match="has no lines"):
    data.jsonl_source(tmp_path / "b")


TFDS = """
import sys
import tensorflow_datasets as tfds
from ancestral.training import data

class Tiny(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version("1.0.0")
  def _info(self):
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(
        {"text": tfds.features.Text()}))
  def _split_generators(self, downloads):
    return {"train": ((i, {"text": f"document {i}"}) for i in range(5))}
  def _generate_examples(self):
    raise NotImplementedError

Tiny(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
source = data.tfds_source("tiny", "train", sys.argv[1])
texts = [source[i]["text"].decode() for i in range(len(source))]
again = data.tfds_source("tiny", "train[:2]", sys.argv[1])
try:
  data.tfds_source("absent", "train", sys.argv[1])
except FileNotFoundError as e:
  error = str(e)
print("REPORT", sorted(texts), len(again), "tensorflow" in sys.modules, error, sep="|")
"""


def test_tfds_source_needs_no_tensorflow(tmp_path):
  script = tmp_path / "build" / "tiny.py"
  script.parent.mkdir()
  script.write_text(TFDS)
  done = subprocess.run(
    [sys.executable, "-W", "error", str(script), str(tmp_path / "data")],
    capture_output=True, text=True, timeout=120, env={**os.environ, "JAX_PLATFORMS": "cpu"},
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-2000:]
  report = done.stdout.split("REPORT|")[1].strip().split("|")
  assert report[:3] == [str([f"document {i}" for i in range(5)]), "2", "False"]
  assert report[3].startswith("tfds data set 'absent' is not prepared in")


def test_sides_share_out_the_items():
  source = data.Source(300, lambda index: {"text": str(index)})
  train, test = (data.side(source, split, test_percent=20) for split in ("train", "test"))
  texts = [{side[i]["text"] for i in range(len(side))} for side in (train, test)]
  assert not texts[0] & texts[1] and len(texts[0] | texts[1]) == 300
  assert abs(len(test) - 60) < 4 * (300 * 0.2 * 0.8) ** 0.5
  with pytest.raises(ValueError, match="none of 300 items is on the test side"):
    data.side(source, "test", test_percent=0)


def test_batches_of_one_have_no_end():
  source = data.Source(3, lambda index: {"x": np.int64(index)})
  stream = data.batches(source, lambda rows: rows, batch_size=1)
  assert len({int(next(stream)["x"][0]) for _ in range(9)}) == 3
