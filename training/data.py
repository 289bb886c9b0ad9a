"""Data: random-access sources, rows with loss masks, and batches whose position can be saved.

  source (len, getitem) -> shuffle -> repeat -> rows (pad, first_fit or concatenate) -> batches

Sources and rows are functions of (seed, index), so a pipeline's position is a few integers, which
`get_state` returns for the checkpoint. All work is done in the calling process.

An example is {"tokens": [N] int32, "mask": [N] bool, "index": int}; `mask` marks the tokens to be
predicted. A batch is {"tokens", "targets": [B, L] int32, "mask": [B, L] float32} with targets[b, t]
following tokens[b, t]; packed rows also have "segments" (1, 2, ... in a row, 0 is padding) and
"positions" (from 0 in each segment), both [B, L] int32.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
import tensorflow_datasets as tfds
from grain import experimental as grain_experimental

from ..tasks import base as tasks

Example = dict[str, Any]
Rows = Callable[[grain.MapDataset], grain.MapDataset | grain.IterDataset]


@dataclasses.dataclass(frozen=True)
class Source:
  """A random-access source: `size` items, item i being `item(i)`."""

  size: int
  item: Callable[[int], Any]

  def __len__(self) -> int:
    return self.size

  def __getitem__(self, index: int) -> Any:
    return self.item(int(index))


def example(tokenizer: Any, prompt: str, answer: str, index: int) -> Example:
  """[bos] prompt answer [eos], of which answer and eos are to be predicted."""
  head = tokenizer.opened(prompt)
  tail = [*tokenizer.encode(answer), tokenizer.eos]
  mask = np.arange(len(head) + len(tail)) >= len(head)
  return {"tokens": np.asarray(head + tail, np.int32), "mask": mask, "index": index}


def answered(tokenizer: Any, problem: Any, index: int) -> Example:
  """The `example` of a problem and its answer."""
  return example(tokenizer, problem.prompt, problem.answer, index)


def task_source(
  task,
  seed: int,
  *,
  size: int = 2**31 - 1,
  example_of: Callable[[Any, Any, int], Example] = answered,
) -> Source:
  """Examples of a task: item i is `task.problem(default_rng((seed, i)))`, encoded.

  Args:
    task: has `problem(generator) -> Problem(prompt, answer, ...)` and `tokenizer`.
    seed: non-negative; different seeds give different problems.
    size: number of problems in an epoch.
    example_of: (tokenizer, problem, index) -> example.

  Returns:
    A Source of examples.
  """

  def item(index):
    problem = task.problem(np.random.default_rng((seed, index)))
    return example_of(task.tokenizer, problem, index)

  return Source(size, item)


def tfds_source(name: str, split: str, data_dir: str | None = None, **kwargs) -> Source:
  """Records of a prepared tensorflow-datasets data set, read without TensorFlow.

  Raises:
    FileNotFoundError: nothing prepared under that name and folder.
    ValueError: it was prepared in a file format without random access.
  """
  try:
    records = tfds.data_source(name, split=split, data_dir=data_dir, download=False, **kwargs)
  except (tfds.core.DatasetNotFoundError, FileNotFoundError, AssertionError) as e:
    raise FileNotFoundError(
      f"tfds data set {name!r} is not prepared in {data_dir or 'the default folder'}: "
      "run tfds.builder(name, data_dir=..., file_format='array_record').download_and_prepare()"
    ) from e
  except NotImplementedError as e:
    raise ValueError(
      f"tfds data set {name!r} has no random access: prepare it with file_format='array_record'"
    ) from e
  return Source(len(records), records.__getitem__)


def text_source(folder: str | pathlib.Path, pattern: str = "**/*.txt") -> Source:
  """One record {"text"} per non-empty file matching `pattern`, in the order of their paths.

  Files are read as UTF-8 when asked for; bytes that are not UTF-8 become U+FFFD.

  Raises:
    FileNotFoundError: no such folder, or no file in it matches.
  """
  folder = pathlib.Path(folder)
  paths = sorted(p for p in folder.glob(pattern) if p.is_file() and p.stat().st_size)
  if not paths:
    raise FileNotFoundError(f"no non-empty file matches {pattern!r} in {folder}: check the path")
  return Source(
    len(paths), lambda index: {"text": paths[index].read_text(encoding="utf-8", errors="replace")}
  )


def passages(source: Any, length: int) -> Source:
  """Records {"text"} cut into passages of `length` characters, the last of each what is left.

  Where a corpus is one file, so that some of it can be held out; all is read to be cut.
  """
  texts = (source[i]["text"] for i in range(len(source)))
  cut = [text[at : at + length] for text in texts for at in range(0, len(text), length)]
  return Source(len(cut), lambda index: {"text": cut[index]})


def jsonl_source(path: str | pathlib.Path, fields: Sequence[str] = ("text",)) -> Source:
  """One record per non-blank line of a JSONL file, or of all in a folder, in order of their paths.

  Args:
    path: a file, or a folder with *.jsonl files at any depth.
    fields: what is read of each line, all of them strings.

  Raises:
    FileNotFoundError: no such file.
    ValueError: when a line is read that is not an object with these fields; names the line.
  """
  path = pathlib.Path(path)
  numbered = [
    (file, number, line)
    for file in (sorted(path.glob("**/*.jsonl")) if path.is_dir() else [path])
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1)  # not inside strings
    if line.strip()
  ]
  if not numbered:
    raise ValueError(f"{path} has no lines: check the path")

  def item(index):
    path, number, line = numbered[index]
    try:
      record = json.loads(line)
    except ValueError as e:
      raise ValueError(f"{path}:{number} is not JSON ({e}): fix or remove the line") from e
    if not (isinstance(record, dict) and all(isinstance(record.get(f), str) for f in fields)):
      held = sorted(record) if isinstance(record, dict) else type(record).__name__
      raise ValueError(f"{path}:{number} lacks string fields {tuple(fields)}: it has {held}")
    return {field: record[field] for field in fields}

  return Source(len(numbered), item)


def tokenize(source: Any, tokenizer: Any, fields: Sequence[str] = ("text",)) -> Source:
  """Examples from records: ("text",) predicts every token, ("prompt", "answer") only the answer.

  Raises:
    ValueError: `fields` has neither one nor two names.
  """
  if len(fields) not in (1, 2):
    raise ValueError(f"fields={tuple(fields)}: name a text field, or a prompt and an answer field")

  def item(index):
    record = source[index]
    values = [record[field] for field in fields]
    texts = [v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in values]
    prompt, answer = ["", *texts][-2:]
    return example(tokenizer, prompt, answer, index)

  return Source(len(source), item)


def side(source: Any, split: tasks.Split, *, test_percent: int = 10) -> Source:
  """The items of one side of a split by a hash of their index, as tasks' problems are by their key.

  Raises:
    ValueError: no item is on this side.
  """
  mine = [
    i for i in range(len(source)) if tasks.split_of(str(i), test_percent=test_percent) == split
  ]
  if not mine:
    raise ValueError(
      f"none of {len(source)} items is on the {split} side at test_percent="
      f"{test_percent}: change it, or give more items"
    )
  return Source(len(mine), lambda index: source[mine[index]])


def _shift(example: Example, length: int | None = None) -> Example:
  """Aligns each token with its successor: rows may then be cut anywhere and lose no target."""
  tokens, mask = example["tokens"], example["mask"]
  if length is not None and len(tokens) - 1 > length:
    raise ValueError(
      f"example {example['index']} needs a row of {len(tokens) - 1} tokens but rows have {length}: "
      "raise the row length or filter the source"
    )
  return {"tokens": tokens[:-1], "targets": tokens[1:], "mask": mask[1:].astype(np.float32)}


def padded(example: Example, length: int, pad_id: int) -> dict[str, np.ndarray]:
  """A row of one example, padded on the right with `pad_id`, where the mask is zero.

  Raises:
    ValueError: it is longer than a row.
  """
  aligned = _shift(example, length)
  fill = {"tokens": pad_id, "targets": pad_id, "mask": 0}
  row = {k: np.full(length, fill[k], v.dtype) for k, v in aligned.items()}
  for k, v in aligned.items():
    row[k][: len(v)] = v
  return row


def pad(length: int, pad_id: int) -> Rows:
  """Rows of one example each; see `padded`.

  Raises (when read): ValueError naming an example that is longer than a row.
  """
  return lambda dataset: dataset.map(lambda example: padded(example, length, pad_id))


def _packed(pad_id: int) -> Callable[[dict], dict]:
  def row(packed):
    segments = packed["tokens_segment_ids"]
    tokens, targets = (np.where(segments, packed[k], pad_id) for k in ("tokens", "targets"))
    return {
      "tokens": tokens.astype(np.int32),
      "targets": targets.astype(np.int32),
      "mask": packed["mask"],
      "segments": segments.astype(np.int32),
      "positions": packed["tokens_positions"].astype(np.int32),
    }

  return row


def _lengths(length: int) -> dict[str, int]:
  return dict.fromkeys(("tokens", "targets", "mask"), length)


def _iterable(dataset: grain.MapDataset) -> grain.IterDataset:
  return dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))


def concatenate(length: int, pad_id: int) -> Rows:
  """Full rows: documents end to end, cut every `length` tokens; for text.

  The rest of a cut document opens the next row as a segment of its own, at position 0. Every token
  is a target exactly once, but for those in a last partial batch. Only the last row has padding.
  """

  def stage(dataset):
    aligned = _iterable(dataset.map(_shift))
    rows = grain_experimental.ConcatThenSplitIterDataset(aligned, length_struct=_lengths(length))
    return rows.map(_packed(pad_id))

  return stage


def first_fit(length: int, pad_id: int, *, num_bins: int = 16) -> Rows:
  """Rows of whole examples, never cut: each goes to the first of `num_bins` open rows with room.

  Raises (when read): ValueError naming an example that is longer than a row.
  """

  def stage(dataset):
    aligned = _iterable(dataset.map(lambda example: _shift(example, length)))
    rows = grain_experimental.FirstFitPackIterDataset(
      aligned, length_struct=_lengths(length), num_packing_bins=num_bins, shuffle_bins=False
    )
    return rows.map(_packed(pad_id))

  return stage


def _local_batches(rows, batch_size: int, index: int, count: int) -> grain.IterDataset:
  """Process `index` gets rows [index * b, (index + 1) * b) of every global batch, b = B / count."""
  local = batch_size // count
  if isinstance(rows, grain.MapDataset):  # slices the indices: other processes' rows are not read
    # An endless data set has the greatest length there is, of which grain cannot take a slice.
    whole = min(len(rows), 2**62) // batch_size * batch_size
    return _iterable(rows[:whole].batch(local)[index::count])
  mine = slice(index * local, (index + 1) * local)
  whole_batches = rows.batch(batch_size, drop_remainder=True)
  return whole_batches.map(lambda batch: {k: v[mine] for k, v in batch.items()})


def batches(
  source: Any,
  rows: Rows,
  *,
  batch_size: int,
  seed: int = 0,
  shuffle: bool = True,
  epochs: int | None = None,
  process_index: int | None = None,
  process_count: int | None = None,
  prefetch: int = 0,
) -> grain.DatasetIterator:
  """Iterates over this process's share of the batches; deterministic in its arguments.

  Local batches, concatenated in the order of the process index, are the batch that a single process
  would see, however many processes there are. A padded row is read by its own process only; packed
  rows depend on all that came before, so every process packs the whole stream and keeps its part.

  Args:
    source: random access (`len`, `[i]`) to examples, or to whatever `rows` takes.
    rows: `pad`, `first_fit`, `concatenate`, or any function from a grain data set of items to one
      of rows.
    batch_size: rows in the global batch.
    seed: of the shuffle, which differs between epochs.
    shuffle: whether to permute the source in every epoch.
    epochs: passes over the source, or None for no end. Batches may span epochs; a last partial one
      is dropped.
    process_index: defaults to `jax.process_index()`.
    process_count: defaults to `jax.process_count()`.
    prefetch: batches made ahead in one background thread, until the iterator's `close`; 0 makes
      them when asked.

  Returns:
    A grain iterator over dictionaries of arrays; see `get_state` and `set_state`.

  Raises:
    ValueError: the batch does not divide over the processes, or the source is too small for one.
  """
  index = jax.process_index() if process_index is None else process_index
  count = jax.process_count() if process_count is None else process_count
  if batch_size < 1 or batch_size % count:
    raise ValueError(
      f"batch_size={batch_size} does not divide over {count} processes: use a multiple of {count}"
    )
  dataset = grain.MapDataset.source(source)
  if not len(dataset):
    raise ValueError("the source has no items: check its path, split or size")
  if shuffle:  # grain permutes epoch e with seed + e: hashing keeps runs of nearby seeds apart
    dataset = dataset.shuffle(seed=int(np.random.SeedSequence(seed).generate_state(1)[0]))
  made = rows(dataset.repeat(epochs))
  if isinstance(made, grain.MapDataset) and len(made) < batch_size:
    raise ValueError(
      f"{len(made)} rows in {epochs} epochs are less than batch_size={batch_size}: "
      "lower the batch size or raise the epochs"
    )
  stream = _local_batches(made, batch_size, index, count)
  if prefetch:
    stream = grain_experimental.ThreadPrefetchIterDataset(stream, prefetch_buffer_size=prefetch)
  return iter(stream)


def get_state(iterator: grain.DatasetIterator) -> dict:
  """The iterator's position as plain JSON: what to save beside the parameters."""
  return json.loads(json.dumps(iterator.get_state()))


def _tuples(node: Any) -> Any:
  if isinstance(node, dict):
    return {k: _tuples(v) for k, v in node.items()}
  return tuple(map(_tuples, node)) if isinstance(node, list) else node


def set_state(iterator: Iterator, state: dict) -> None:
  """Moves an iterator, made with the same arguments, to a saved position.

  JSON has no tuples, and grain's packing compares its state with tuples: they are put back here.

  Raises:
    ValueError: the state is not one of such a pipeline.
  """
  try:
    iterator.set_state(_tuples(state))
  except (KeyError, TypeError, IndexError) as e:
    raise ValueError(
      f"data state {json.dumps(state)[:80]} does not fit this pipeline ({e}): "
      "resume with the data configuration of the checkpoint"
    ) from e
