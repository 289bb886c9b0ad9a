"""Autoregressive decoding of batches of ragged prompts.

The jit boundary: build the algorithm inside jit, with params an argument, so that weights are not
baked into the program and one compilation serves every update and every prompt of the same bucket:

    @jax.jit
    def sample(params, settings, keys, prompts):
      transform = logits.chain(logits.temperature(settings["temperature"]))
      return decode.generate(model, params, keys, prompts, max_new_tokens=64, transform=transform)
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..models import base as models
from . import base
from . import logits as logits_lib


class Prompts(NamedTuple):
  """B prompts, padded on the right to the longest."""

  tokens: jax.Array  # [B, P] int32
  length: jax.Array  # [B] int32, from 1 to P


class DecodeState(NamedTuple):
  """Where decoding stands. The cache holds every token of a row but the last."""

  step: jax.Array  # [B] int32, tokens drawn
  tokens: jax.Array  # [B, S] int32: the prompt, the tokens drawn, then zeros
  length: jax.Array  # [B] int32, prompt and drawn tokens
  done: jax.Array  # [B] bool; such a row is frozen
  cache: models.Cache
  transform: logits_lib.State

  @property
  def prompt_length(self) -> jax.Array:
    """[B] int32."""
    return self.length - self.step


class DecodeInfo(NamedTuple):
  """What a step did. A frozen row's entries are 0."""

  token: jax.Array  # [B] int32
  count: jax.Array  # [B] int32, tokens drawn: 1
  log_prob: jax.Array  # [B], of the law that the token was drawn from; 0 under greedy
  model_log_prob: jax.Array  # [B], of the model's own law
  kept: jax.Array  # [B, V] bool: the tokens that the law it was drawn from had left


class Samples(NamedTuple):
  """Sequences and the log-probabilities of their drawn tokens, N = max_new_tokens."""

  tokens: jax.Array  # [B, P + N] int32: the prompt, the tokens drawn, then zeros
  length: jax.Array  # [B] int32, a stop token that was drawn included
  prompt_length: jax.Array  # [B] int32
  log_prob: jax.Array  # [B, N] of the n-th drawn token, under the law it was drawn from
  model_log_prob: jax.Array  # [B, N], under the model's own law


def check_prompt(
  row: int, prompt: Sequence[int], *, vocab_size: int, max_length: int, max_new_tokens: int
) -> None:
  """Refuses prompt number `row` if it is empty or too long, or has a token that is none.

  Raises:
    ValueError: says what is wrong with it.
  """
  room = max_length - max_new_tokens
  if not 1 <= len(prompt) <= room:
    raise ValueError(
      f"Prompt {row} has {len(prompt)} tokens; it must have 1 to {room}: a sequence of at most "
      f"{max_length}, of which {max_new_tokens} are kept for new tokens."
    )
  outside = [token for token in prompt if not 0 <= token < vocab_size]
  if outside:
    raise ValueError(
      f"Prompt {row} has token {outside[0]}, outside the vocabulary of "
      f"{vocab_size} (0 to {vocab_size - 1}): is it another model's tokenizer?"
    )


def pad_prompts(
  prompts: Sequence[Sequence[int]], *, vocab_size: int, max_length: int, max_new_tokens: int = 0
) -> Prompts:
  """Checks prompts on the host and pads them to a bucket: a power of two, or all the room there is.

  Prompts of one bucket compile once.

  Args:
    prompts: B token sequences.
    vocab_size: V; tokens are in range(V).
    max_length: the longest sequence that the model or its cache takes.
    max_new_tokens: room left for drawn tokens.

  Raises:
    ValueError: no prompt, an empty or too long one, or a token outside the vocabulary.
  """
  if len(prompts) == 0:
    raise ValueError("There are no prompts: give at least one.")
  for row, prompt in enumerate(prompts):
    check_prompt(
      row, prompt, vocab_size=vocab_size, max_length=max_length, max_new_tokens=max_new_tokens
    )
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  bucket = min(1 << int(lengths.max() - 1).bit_length(), max_length - max_new_tokens)
  tokens = np.zeros((len(prompts), bucket), np.int32)
  for row, prompt in enumerate(prompts):
    tokens[row, : len(prompt)] = prompt
  return Prompts(jnp.asarray(tokens), jnp.asarray(lengths))


def buffer(prompts: Prompts, size: int) -> jax.Array:
  """The prompts where decoding writes on: [B, size] int32, zeros after each."""
  width = prompts.tokens.shape[1]
  inside = jnp.arange(width)[None, :] < prompts.length[:, None]
  return jnp.pad(jnp.where(inside, prompts.tokens, 0), ((0, 0), (0, size - width)))


def prefill(
  model: models.LanguageModel,
  params: models.Params,
  prompts: Prompts,
  max_length: int,
  *,
  chunk: int = 512,
  spare: int = 0,
) -> models.Cache:
  """A cache for `max_length` tokens that holds each prompt but its last token.

  The last token is left to the first step, so that every step is one call of the model and one
  draw. Prompts go through the model `chunk` tokens at a time, as far as the longest of them, so
  wide padding costs nothing. Shorter rows are written with padding, and rewound.

  With `spare`, it has that many slots more, for tokens that share positions; the model is then told
  its positions, for there may be none of the last slots.
  """
  batch_size, width = prompts.tokens.shape
  if width > max_length:
    raise ValueError(
      f"The prompts are {width} tokens wide, the cache holds {max_length}: raise "
      "max_length or shorten the prompts."
    )
  cache = model.init_cache(params, batch_size, max_length + spare)
  held = prompts.length - 1

  def read(tokens, start, cache):
    positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1])[None, :], tokens.shape)
    told = {"positions": positions} if spare else {}
    return models.apply(model, params, tokens, cache, **told)[1]

  if width - 1 <= chunk:
    cache = read(prompts.tokens[:, :-1], 0, cache) if width > 1 else cache
    return cache._replace(length=held)
  tokens = jnp.pad(prompts.tokens, ((0, 0), (0, -width % chunk)))

  def read_part(i, cache):
    return read(jax.lax.dynamic_slice_in_dim(tokens, i * chunk, chunk, axis=1), i * chunk, cache)

  cache = jax.lax.fori_loop(0, -(-jnp.max(held) // chunk), read_part, cache)
  return cache._replace(length=held)


def autoregressive(
  model: models.LanguageModel,
  params: models.Params,
  *,
  max_length: int,
  max_new_tokens: int | jax.Array,
  transform: logits_lib.LogitsTransform | None = None,
  stop: Sequence[int] = (),
  num_samples: int = 1,
  capacity: int | None = None,
  prefill_chunk: int = 512,
) -> base.SamplingAlgorithm:
  """Draws x_t ~ transform(p(. | x_<t)), one token a step, from Prompts.

  A row is done when it draws a token of `stop`, has drawn `max_new_tokens`, or is full; it is then
  frozen, and its Info is 0.

  Args:
    model: the model.
    params: its parameters; a transformer's decode fastest unstacked (`transformer.unstack`).
    max_length: the longest sequence, static.
    max_new_tokens: scalar or [B].
    transform: of the logits; None leaves the model's law.
    stop: tokens that end a row, kept as its last.
    num_samples: rows for each prompt, neighbours that share its prefill; B counts them all.
    capacity: S, the slots to begin with, `max_length` if None. Whoever gives less has to resize
      the state (`base.resized`) before a row `is_cramped`.
    prefill_chunk: tokens of the prompts that go through the model at once.
  """
  transform = logits_lib.chain() if transform is None else transform
  stop = jnp.array(stop, jnp.int32)

  def is_full(length, step):
    return (length >= max_length) | (step >= max_new_tokens)

  def init(keys, prompts):
    del keys
    slots = max_length if capacity is None else capacity
    cache = prefill(model, params, prompts, slots, chunk=prefill_chunk)
    repeat = lambda leaf: jnp.repeat(leaf, num_samples, axis=0)
    prompts, cache = jax.tree.map(repeat, (prompts, cache))
    length = prompts.length
    step = jnp.zeros(length.size, jnp.int32)
    return DecodeState(
      step,
      buffer(prompts, slots),
      length,
      is_full(length, step),
      cache,
      transform.init(length.size),
    )

  def step(keys, state):
    last = jnp.take_along_axis(state.tokens, state.length[:, None] - 1, axis=1)
    hidden, cache = models.apply(model, params, last, state.cache)
    model_logits = model.readout(params, hidden[:, 0])
    context = logits_lib.Context(state.tokens, state.length, state.prompt_length)
    logits = transform.apply(model_logits, context, state.transform)
    token = logits_lib.draw(keys, logits)
    fed_back = transform.update(model_logits, token, state.transform)

    active = ~state.done
    count = active.astype(jnp.int32)
    length, steps = state.length + count, state.step + count
    rows = jnp.arange(token.size)
    slot = jnp.where(active, state.length, state.tokens.shape[1])  # out of bounds: dropped
    stopped = jnp.any(token[:, None] == stop[None, :], axis=1)
    info = DecodeInfo(
      token,
      count,
      logits_lib.log_prob(logits, token),
      logits_lib.log_prob(model_logits, token),
      logits > -jnp.inf,
    )
    state = DecodeState(
      step=steps,
      tokens=state.tokens.at[rows, slot].set(token, mode="drop"),
      length=length,
      done=state.done | stopped | is_full(length, steps),
      cache=cache._replace(length=length - 1),
      transform=base.select_rows(active, fed_back, state.transform),
    )
    return state, base.select_rows(active, info, jax.tree.map(jnp.zeros_like, info))

  return base.SamplingAlgorithm(init, step)


def is_cramped(state: DecodeState) -> jax.Array:
  """Whether a row that goes on has no slot left for its next token, []."""
  return jnp.any(~state.done & (state.length >= state.tokens.shape[1]))


def buckets(first: int, last: int) -> tuple[int, ...]:
  """Powers of two from `first` (rounded up) on, and `last` in place of those above it."""
  sizes = []
  size = 1 << max(first - 1, 0).bit_length()
  while size < last:
    sizes.append(size)
    size *= 2
  return (*sizes, last)


def grown(
  keys: base.Keys,
  algorithm: Callable[[int], base.SamplingAlgorithm],
  prompts: Prompts,
  sizes: Sequence[int],
  is_done: Callable[[Any], jax.Array],
  max_steps: int,
) -> Any:
  """Runs `algorithm(size)` from the prompts on, in states of each of `sizes` slots in turn.

  Attention then reads little more than what is written. Once any row is cramped all of them have to
  count as done, until the state has the next size.
  """
  begin = lambda size: base.start(keys, algorithm(size), prompts)
  state = begin(sizes[0])
  for size in sizes:
    if size != sizes[0]:
      state = base.resized(state, jax.eval_shape(lambda size=size: begin(size)))
    state = base.run_until(keys, algorithm(size), state, is_done, max_steps)
  return state


def generate(
  model: models.LanguageModel,
  params: models.Params,
  keys: base.Keys,
  prompts: Prompts,
  **kwargs,
) -> Samples:
  """Continues each prompt until a stop token or `max_new_tokens`; see `generate_observed`."""
  return generate_observed(model, params, keys, prompts, lambda info: (), **kwargs)[0]


def generate_observed(
  model: models.LanguageModel,
  params: models.Params,
  keys: base.Keys,
  prompts: Prompts,
  observe: Callable[[DecodeInfo], Any],
  *,
  max_new_tokens: int,
  transform: logits_lib.LogitsTransform | None = None,
  stop: Sequence[int] = (),
  num_samples: int = 1,
  bucket: int = 256,
) -> tuple[Samples, Any]:
  """Continuations, and what `observe` made of each drawn token's Info, leaves [B, N, ...].

  The law of row b's new tokens is prod_t transform(p(x_t | x_<t)) exactly, and depends on its
  prompt and keys[b] alone. Call it inside jit; it stops stepping when every row is done. The cache
  begins with `bucket` slots (or the prompts' width) and doubles when it is full, so attention reads
  at most about twice what is written; each size is one more copy of the step to compile.

  Other arguments are those of `autoregressive`.
  """
  width = prompts.tokens.shape[1]
  sizes = buckets(max(bucket, width + 1), width + max_new_tokens)

  def algorithm(capacity):
    return base.recorded(
      autoregressive(
        model,
        params,
        max_length=sizes[-1],
        max_new_tokens=max_new_tokens,
        transform=transform,
        stop=stop,
        num_samples=num_samples,
        capacity=capacity,
      ),
      observe=lambda state, info: (info.log_prob, info.model_log_prob, observe(info)),
      capacity=max_new_tokens,
    )

  state, (log_prob, model_log_prob, observed) = grown(
    keys,
    algorithm,
    prompts,
    sizes,
    lambda recorded: recorded.state.done | is_cramped(recorded.state),
    max_new_tokens,
  )
  samples = Samples(state.tokens, state.length, state.prompt_length, log_prob, model_log_prob)
  return samples, observed
