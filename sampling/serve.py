"""Continuous refill: a fixed number of rows kept busy by a queue of requests.

    decoder = functools.partial(decode.autoregressive, model)
    serve = serve.server(decoder, transform, settings={"temperature": 1.0}, rows=16, ...)
    for result in serve(params, key, requests):
      ...

Rows step in jitted chunks; between chunks the host takes out what has finished and admits what
waits, so a straggler holds up nobody. One program serves every request of a bucket of lengths.
"""

import collections
import dataclasses
import functools
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import base, decode
from . import logits as logits_lib


class Request(NamedTuple):
  """A prompt to continue. What is drawn depends on the request and the run's key alone."""

  prompt: Sequence[int]
  max_new_tokens: int
  seed: int = 0  # its key is fold_in(run key, seed), so equal requests give equal results
  settings: Mapping[str, float] = {}  # those that differ from the server's
  # (tokens drawn) -> how many of them to keep if they are enough, else None; see `stop_strings`.
  ending: Callable[[Sequence[int]], int | None] = lambda tokens: None


class Result(NamedTuple):
  """What a request came to, n tokens."""

  index: int  # of the request
  tokens: list[int]  # drawn, a stop token included
  log_prob: np.ndarray  # [n], under the law they were drawn from
  model_log_prob: np.ndarray  # [n], under the model's own
  reason: str  # of its end: "stop" (a token), "ending" (the request's own), or "length"
  num_calls: int  # of the model, in which it drew; a speculative one draws several tokens


class Progress(NamedTuple):
  """Where serving stands after a chunk."""

  num_steps: int  # of the model over all rows, since the beginning
  num_active: int  # rows that were busy in this chunk
  num_waiting: int
  num_finished: int
  drawn: Mapping[int, list[int]]  # index of a request: its tokens of this chunk


class Slots(NamedTuple):
  """What the host knows of each row, handed to every jitted call."""

  seed: np.ndarray  # [B] uint32
  max_new_tokens: np.ndarray  # [B] int32
  settings: dict[str, np.ndarray]  # of [B]
  is_free: np.ndarray  # [B] bool


Serve = Callable[..., Iterator[Result]]


def stop_strings(decode_tokens: Callable[[Sequence[int]], str], strings: Sequence[str]):
  """An ending: keeps the tokens up to the one that completes any of `strings`, however they split.

  Args:
    decode_tokens: tokens to text.
    strings: not empty ones.

  Raises:
    ValueError: a string is empty.
  """
  if not all(strings):
    raise ValueError("A stop string is empty: every text holds it.")

  def ending(tokens):
    def ends(count):
      text = decode_tokens(tokens[:count])
      return any(string in text for string in strings)

    if not ends(len(tokens)):
      return None
    return next(count for count in range(1, len(tokens) + 1) if ends(count))

  return ending


class Programs(NamedTuple):
  """What runs on the device, each compiled once for a number of slots S."""

  width: Callable  # (params, slots, S) -> M, the most tokens that a row draws in a step
  blank: Callable  # (params, slots, S) -> state of free rows
  resize: Callable  # (params, slots, state, S) -> state
  admit: Callable  # (params, key, slots of R rows, prompts [R, S], rows [R], state, S) -> state
  advance: Callable  # (params, key, slots, state, S) -> state, Drawn


class Drawn(NamedTuple):
  """What the rows drew in a chunk of steps, up to M tokens each step."""

  token: jax.Array  # [chunk, B, M] int32
  count: jax.Array  # [chunk, B] int32, of them
  log_prob: jax.Array  # [chunk, B, M]
  model_log_prob: jax.Array  # [chunk, B, M]


def _programs(algorithm, chunk) -> Programs:
  """Of algorithm(params, slots, S), for `chunk` steps at once."""

  def fill(params, key, slots, prompts, capacity):
    keys = base.row_keys(key, slots.seed)
    return base.start(keys, algorithm(params, slots, capacity), prompts)

  def shapes(params, slots, capacity):
    rows = slots.seed.size
    prompts = decode.Prompts(jnp.zeros((rows, 1), jnp.int32), jnp.ones(rows, jnp.int32))
    return jax.eval_shape(
      lambda params, slots: fill(params, jax.random.key(0), slots, prompts, capacity), params, slots
    )

  def blank(params, slots, capacity):
    like = shapes(params, slots, capacity)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)

  def admit(params, key, slots, prompts, rows, state, capacity):
    return base.admit(state, fill(params, key, slots, prompts, capacity), rows)

  def advance(params, key, slots, state, capacity):
    state = _vacate(state, slots.is_free)
    of_step = lambda leaf: leaf.reshape(slots.seed.size, -1)
    return base.run(
      base.row_keys(key, slots.seed),
      algorithm(params, slots, capacity),
      state,
      chunk,
      observe=lambda state, info: Drawn(
        of_step(info.token), info.count, of_step(info.log_prob), of_step(info.model_log_prob)
      ),
    )

  def resize(params, slots, state, capacity):
    return base.resized(state, shapes(params, slots, capacity))

  @functools.partial(jax.jit, static_argnums=2)
  def drawn(params, slots, capacity):  # traced once, and never run
    state = blank(params, slots, capacity)
    return advance(params, jax.random.key(0), slots, state, capacity)[1]

  def width(params, slots, capacity):
    return drawn.eval_shape(params, slots, capacity).token.shape[2]

  return Programs(
    width,
    # Takes params so that its state is committed to devices where theirs are; else what follows
    # compiles twice.
    jax.jit(blank, static_argnums=2, keep_unused=True),
    jax.jit(resize, static_argnums=3),
    jax.jit(admit, donate_argnums=5, static_argnums=6),
    jax.jit(advance, donate_argnums=3, static_argnums=4),
  )


def _vacate(state: decode.DecodeState, is_free: jax.Array) -> decode.DecodeState:
  """Free rows hold one token and are done: whatever they were, they stay within any capacity."""
  return state._replace(
    step=jnp.where(is_free, 0, state.step),
    length=jnp.where(is_free, 1, state.length),
    done=state.done | is_free,
    cache=state.cache._replace(length=jnp.where(is_free, 0, state.cache.length)),
  )


@dataclasses.dataclass
class _Row:
  """A request in its slot, and what it has come to."""

  index: int
  request: Request
  tokens: list[int] = dataclasses.field(default_factory=list)
  log_prob: list[float] = dataclasses.field(default_factory=list)
  model_log_prob: list[float] = dataclasses.field(default_factory=list)
  num_calls: int = 0

  @property
  def length(self) -> int:
    return len(self.request.prompt) + len(self.tokens)

  def take(self, chunk: Drawn, row: int) -> list[int]:
    """Adds what the row drew in a chunk; returns the tokens."""
    made = chunk.count[:, row, None] > np.arange(chunk.token.shape[2])
    drawn = chunk.token[:, row][made].tolist()
    self.tokens += drawn
    self.log_prob += chunk.log_prob[:, row][made].tolist()
    self.model_log_prob += chunk.model_log_prob[:, row][made].tolist()
    self.num_calls += int(np.count_nonzero(chunk.count[:, row]))
    return drawn

  def result(self, reason: str, count: int) -> Result:
    """The first `count` tokens."""
    floats = [np.array(v[:count], np.float32) for v in (self.log_prob, self.model_log_prob)]
    return Result(self.index, self.tokens[:count], *floats, reason, self.num_calls)


def server(
  decoder: Callable[..., base.SamplingAlgorithm],
  transform: Callable[[Mapping[str, Any]], logits_lib.LogitsTransform],
  *,
  settings: Mapping[str, float],
  rows: int,
  vocab_size: int,
  max_length: int,
  stop: Sequence[int] = (),
  chunk: int = 16,
  bucket: int = 256,
  prefill_rows: int | None = None,
  prefill_chunk: int = 64,
) -> Serve:
  """A function `serve(params, key, requests, on_chunk)`, an iterator of Results as they finish.

  Results come in the order of finishing, say which request they are of, and do not depend on the
  rows, the chunk, or what else is served. Against the greedy list schedule of the same lengths it
  takes at most chunk - 1 more steps for each request, in which its row waits for the chunk to end.
  Keep the server: it holds the compiled programs, one for each (rows, bucket).

  Args:
    decoder: (params, *, transform, max_length, max_new_tokens, stop, capacity, prefill_chunk) ->
      what decodes: functools.partial(decode.autoregressive, model), or a function that makes a
      drafter and returns `speculative`, of params that hold the parameters of both.
    transform: of settings, {name: [B]} inside the programs. It is also called with the plain
      numbers of each request, so that bad ones are refused before anything runs.
    settings: their defaults, whose types (int or float) stay.
    rows: B, requests in flight.
    vocab_size: V; tokens are in range(V).
    max_length: the longest sequence, prompt and drawn tokens.
    stop: tokens that end a request, kept as its last.
    chunk: steps between two looks of the host.
    bucket: the fewest slots of the cache; it holds a power of two times more as rows grow.
    prefill_rows: prompts admitted at once, an eighth of the rows if None.
    prefill_chunk: tokens of a prompt that go through the model at once.

  Raises:
    ValueError: there are no rows; from `serve`, before anything runs: a request is not right.
  """
  if rows < 1:
    raise ValueError(f"rows={rows}: serving takes at least 1.")

  def algorithm(params, slots, capacity):
    return decoder(
      params,
      max_length=max_length,
      max_new_tokens=slots.max_new_tokens,
      transform=transform(slots.settings),
      stop=stop,
      capacity=capacity,
      prefill_chunk=prefill_chunk,
    )

  programs = _programs(algorithm, chunk)
  sizes = decode.buckets(bucket, max_length)
  group = prefill_rows or max(1, rows // 8)

  def serve(params, key, requests, on_chunk=lambda progress: None):
    requests = list(requests)
    for index, request in enumerate(requests):
      _check(index, request, settings, transform, vocab_size=vocab_size, max_length=max_length)
    return run(params, key, collections.deque(map(_Row, range(len(requests)), requests)), on_chunk)

  def run(params, key, waiting, on_chunk):
    busy: list[_Row | None] = [None] * rows
    state, held = programs.blank(params, _slots(busy, settings), sizes[0]), sizes[0]
    num_steps = num_finished = 0
    most = chunk * programs.width(params, _slots(busy, settings), sizes[0])
    while waiting or any(busy):
      fresh = [row for row in range(rows) if busy[row] is None][: len(waiting)]
      for row in fresh:
        busy[row] = waiting.popleft()
      slots, capacity = _slots(busy, settings), _capacity(busy, sizes, most, max_length)
      if capacity != held:
        state, held = programs.resize(params, slots, state, capacity), capacity
      for first in range(0, len(fresh), group):
        admission = _admission(busy, fresh[first : first + group], group, settings, capacity)
        state = programs.admit(params, key, *admission, state, capacity)
      state, chunk_drawn = programs.advance(params, key, slots, state, capacity)
      num_steps += chunk
      drawn, finished = _collect(busy, *jax.device_get((chunk_drawn, state.done)), stop)
      num_finished += len(finished)
      on_chunk(Progress(num_steps, len(drawn), len(waiting), num_finished, drawn))
      yield from finished

  return serve


def _check(index, request, settings, transform, *, vocab_size, max_length) -> None:
  """Raises at what is wrong with a request."""
  decode.check_prompt(
    index, request.prompt, vocab_size=vocab_size, max_length=max_length, max_new_tokens=1
  )
  if request.max_new_tokens < 1:
    raise ValueError(f"Request {index}: max_new_tokens={request.max_new_tokens}; give at least 1.")
  if request.max_new_tokens > np.iinfo(np.int32).max:
    raise ValueError(f"Request {index}: max_new_tokens={request.max_new_tokens} is no such number.")
  for name, value in request.settings.items():
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
      raise ValueError(f"Request {index} sets {name} to {value!r}; it is a number.")
    if name not in settings:
      raise ValueError(
        f"Request {index} sets {name!r}; there is {', '.join(settings) or 'nothing'}."
      )
    if isinstance(settings[name], int) and not float(value).is_integer():
      raise ValueError(f"Request {index} sets {name} to {value}; it is a whole number.")
  try:
    transform({**settings, **request.settings})
  except ValueError as error:
    raise ValueError(f"Request {index}: {error}") from None


def _slots(busy: Sequence[_Row | None], settings: Mapping[str, float]) -> Slots:
  """What the device is told of the rows; a free one gets the defaults."""
  requests = [None if row is None else row.request for row in busy]
  of = lambda read, free, dtype: np.array([free if r is None else read(r) for r in requests], dtype)
  return Slots(
    seed=of(lambda r: r.seed % 2**32, 0, np.uint32),
    max_new_tokens=of(lambda r: r.max_new_tokens, 0, np.int32),
    settings={
      name: of(
        lambda r, name=name: r.settings.get(name, settings[name]),
        default,
        np.int32 if isinstance(default, int) else np.float32,
      )
      for name, default in settings.items()
    },
    is_free=np.array([row is None for row in busy]),
  )


def _capacity(busy, sizes, growth, max_length) -> int:
  """The fewest slots in which every row has room for the `growth` of a chunk."""
  needed = max(
    min(row.length + growth, len(row.request.prompt) + row.request.max_new_tokens, max_length)
    for row in busy
    if row is not None
  )
  return next(size for size in sizes if size >= needed)


def _admission(busy, fresh, group, settings, capacity):
  """Slots, prompts and places of the rows `fresh`; up to `group`, rows that go nowhere."""
  rows = [busy[row] for row in fresh]
  spare = group - len(fresh)
  tokens = np.zeros((group, capacity), np.int32)
  length = np.ones(group, np.int32)
  for r, row in enumerate(rows):
    length[r] = len(row.request.prompt)
    tokens[r, : length[r]] = row.request.prompt
  places = np.array(fresh + [len(busy)] * spare, np.int32)
  return _slots(rows + [None] * spare, settings), decode.Prompts(tokens, length), places


def _collect(busy, chunk, done, stop) -> tuple[dict[int, list[int]], list[Result]]:
  """Takes a chunk's tokens into the rows, and out of their slots those that have finished."""
  drawn, finished = {}, []
  for place, row in enumerate(busy):
    if row is None:
      continue
    before = len(row.tokens)
    drawn[row.index] = row.take(chunk, place)
    kept = row.request.ending(row.tokens)
    if kept is not None:
      drawn[row.index] = row.tokens[before:kept]
      finished.append(row.result("ending", kept))
    elif done[place]:
      reason = "stop" if row.tokens and row.tokens[-1] in stop else "length"
      finished.append(row.result(reason, len(row.tokens)))
    if kept is not None or done[place]:
      busy[place] = None
  return drawn, finished
