"""Transforms that look at what was written: they penalise or forbid what repeats it.

Which tokens count is a function of the context: `whole`, `output` or `last(n)`. Whatever it says,
padding does not count. Where a transform is off (a penalty of 0 or 1, n = 0) the logits are
unchanged, bit by bit.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from . import logits as logits_lib

Counted = Callable[[logits_lib.Context], jax.Array]  # -> [B, S] bool, the tokens that count


def whole(context: logits_lib.Context) -> jax.Array:
  """Counts the prompt and what was drawn, [B, S]; not the padding."""
  return _places(context) < context.length[:, None]


def output(context: logits_lib.Context) -> jax.Array:
  """Counts what was drawn, [B, S]."""
  return whole(context) & (_places(context) >= context.prompt_length[:, None])


def last(n: int | jax.Array) -> Counted:
  """Counts the last n tokens of prompt and drawn ones; n scalar or [B], at least 0."""
  logits_lib.require("last", n, lambda n: n >= 0, "at least 0")
  return lambda context: (
    whole(context) & (_places(context) >= context.length[:, None] - logits_lib.per_row(n))
  )


def _places(context):
  return jnp.arange(context.tokens.shape[1])[None, :]


def of_context(apply: Callable[[jax.Array, logits_lib.Context], jax.Array]):
  """A transform without feedback, from (logits [B, V], context) -> logits [B, V]."""
  return logits_lib.LogitsTransform(
    init=lambda batch_size: (),
    apply=lambda logits, context, state: apply(logits, context),
    update=lambda model_logits, token, state: state,
  )


def forbid(logits: jax.Array, forbidden: jax.Array) -> jax.Array:
  """-inf where `forbidden` [B, V]; a row in which nothing would be left stays as it is."""
  kept = jnp.where(forbidden, -jnp.inf, logits)
  return jnp.where(jnp.any(kept > -jnp.inf, axis=-1, keepdims=True), kept, logits)


def counts(context: logits_lib.Context, counted: Counted, vocab_size: int) -> jax.Array:
  """How often each token was written where it counts, [B, V] int32."""
  return _scatter(context.tokens, counted(context) & whole(context), vocab_size).add(1, mode="drop")


def _scatter(tokens, counted, vocab_size):
  """The entries (b, tokens[b, p]) of zeros [B, V], for the places p that count, to be updated."""
  rows = jnp.arange(tokens.shape[0])[:, None]
  columns = jnp.where(counted, tokens, vocab_size)  # vocab_size is out of bounds: dropped
  return jnp.zeros((tokens.shape[0], vocab_size), jnp.int32).at[rows, columns]


def repetition_penalty(
  value: float | jax.Array, counted: Counted = whole
) -> logits_lib.LogitsTransform:
  """Makes the tokens that were written less likely: z / r where z > 0, and z r where z < 0.

  The paper divides only, which would raise negative logits; every library does as here. Not
  invariant: adding a constant to all logits changes the law.

  Args:
    value: r > 0, scalar or [B]; 1 is off, less than 1 rewards.
    counted: which tokens count. transformers and vLLM: prompt and output; llama.cpp: the last 64.

  Reference: Keskar et al. 2019 (CTRL), arXiv 1909.05858, section 4.1.
  """
  logits_lib.require("repetition_penalty", value, lambda r: r > 0, "above 0; 1 is off")

  def apply(logits, context):
    r = logits_lib.per_row(value).astype(logits.dtype)
    written = counts(context, counted, logits.shape[-1]) > 0
    return jnp.where(written, jnp.where(logits < 0, logits * r, logits / r), logits)

  return of_context(apply)


def frequency_penalty(
  value: float | jax.Array, counted: Counted = output
) -> logits_lib.LogitsTransform:
  """z - value c for a token that was written c times.

  Args:
    value: scalar or [B]; 0 is off, negative rewards.
    counted: which tokens count. OpenAI and vLLM: the output; llama.cpp: the last 64 of everything.

  Reference: the OpenAI API's definition.
  """

  def apply(logits, context):
    c = counts(context, counted, logits.shape[-1])
    return logits - logits_lib.per_row(value).astype(logits.dtype) * c.astype(logits.dtype)

  return of_context(apply)


def presence_penalty(
  value: float | jax.Array, counted: Counted = output
) -> logits_lib.LogitsTransform:
  """z - value for a token that was written, however often; arguments as `frequency_penalty`'s."""

  def apply(logits, context):
    written = counts(context, counted, logits.shape[-1]) > 0
    return jnp.where(written, logits - logits_lib.per_row(value).astype(logits.dtype), logits)

  return of_context(apply)


def suffix_match(tokens: jax.Array, length: jax.Array, at_most: jax.Array) -> jax.Array:
  """For each place p, how many tokens before it are the row's last ones.

    m(p) = max {m <= at_most : tokens[p - m : p] = tokens[length - m : length]},  p < length

  One pass over the row per token of the longest match, in O(S) memory.

  Args:
    tokens: [B, S]; negative ones equal nothing, not even each other.
    length: [B].
    at_most: [B, 1].

  Returns:
    [B, S] int32, 0 at places p >= length.
  """

  def unfinished(carry):
    return jnp.any(carry[2])

  def body(carry):
    m, before, alive, match = carry
    place = length[:, None] - 1 - m
    tail = jnp.take_along_axis(tokens, jnp.maximum(place, 0), axis=1)
    alive &= (before == tail) & (tail >= 0) & (place >= 0) & (m < at_most)
    return m + 1, _shift(before), alive, match + alive

  alive = jnp.arange(tokens.shape[1])[None, :] < length[:, None]
  carry = jnp.int32(0), _shift(tokens), alive, jnp.zeros(tokens.shape, jnp.int32)
  return jax.lax.while_loop(unfinished, body, carry)[3]


def _shift(tokens):
  """Each place's token is the one before it; the first place's is none."""
  return jnp.pad(tokens, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]


def no_repeat_ngram(n: int | jax.Array, counted: Counted = whole) -> logits_lib.LogitsTransform:
  """Forbids the tokens that would write an n-gram for the second time; n = 1, any token twice.

  Where that forbids everything, nothing is forbidden (transformers leaves only -inf and then
  fails).

  Args:
    n: at least 0, scalar or [B]; 0 is off.
    counted: which tokens count; an n-gram counts if all of its tokens do.

  Reference: Paulus et al. 2017, arXiv 1705.04304, section 2.5 (trigrams).
  """
  logits_lib.require("no_repeat_ngram", n, lambda n: n >= 0, "at least 0; 0 is off")

  def apply(logits, context):
    counts_here = counted(context) & whole(context)
    tokens = jnp.where(counts_here, context.tokens, -1)
    rest = logits_lib.per_row(n) - 1
    match = suffix_match(tokens, context.length, rest)
    repeats = counts_here & (rest >= 0) & (match >= rest)
    return forbid(logits, _scatter(tokens, repeats, logits.shape[-1]).max(1, mode="drop") > 0)

  return of_context(apply)


def dry(
  multiplier: float | jax.Array,
  base: float | jax.Array = 1.75,
  allowed_length: int | jax.Array = 2,
  counted: Counted = whole,
  breakers: Sequence[Sequence[int]] = (),
) -> logits_lib.LogitsTransform:
  """Don't Repeat Yourself: penalises a token by the length of the repeat that it would go on.

    z - multiplier base^(L - allowed_length)  where L >= allowed_length

  L is the length of the longest suffix of the row that also stands before an earlier occurrence of
  the token. A repeat does not reach back over a breaker, and a breaker of one token is never
  penalised. The penalty is held below 1e35, so that a row always keeps a law.

  llama.cpp and text-generation-webui agree with this, but for their limits: llama.cpp counts the
  last 64 tokens by default and takes from each first token of a breaker the longest breaker there,
  so that a breaker inside another one can hide it; text-generation-webui caps L at 50 and takes
  breakers of one token. llama.cpp with allowed_length 0 penalises every token of its window.

  Args:
    multiplier: at least 0, scalar or [B]; 0 is off.
    base: at least 1, scalar or [B].
    allowed_length: at least 1, scalar or [B].
    counted: which tokens count; a repeat counts if all of its tokens do.
    breakers: token sequences. For a string, each token whose text holds it is a breaker.

  Reference: p-e-w 2024, text-generation-webui pull request 5677 (no paper).
  """
  logits_lib.require("dry", multiplier, lambda m: m >= 0, "at least 0; 0 is off")
  logits_lib.require("dry base", base, lambda b: b >= 1, "at least 1")
  logits_lib.require("dry allowed_length", allowed_length, lambda a: a >= 1, "at least 1")

  def apply(logits, context):
    counts_here = counted(context) & whole(context)
    tokens = jnp.where(counts_here, context.tokens, -1)
    allowed = logits_lib.per_row(allowed_length)
    log_base = jnp.log(logits_lib.per_row(base).astype(logits.dtype))
    # base^80/log(base) is e^80: longer repeats change nothing, and need not be followed.
    most = jnp.where(log_base > 0, jnp.minimum(80 / log_base, 1e9), 0).astype(jnp.int32)
    unbroken = _since_breaker(tokens, context.length, breakers, logits.shape[-1])
    match = suffix_match(tokens, context.length, jnp.minimum(allowed + most, unbroken))
    longest = _scatter(tokens, counts_here, logits.shape[-1]).max(match, mode="drop")
    penalty = logits_lib.per_row(multiplier) * jnp.exp(log_base * (longest - allowed))
    extends = (longest >= allowed) & ~_single(breakers, logits.shape[-1])[None, :]
    return jnp.where(extends, logits - jnp.minimum(penalty, 1e35), logits)

  return of_context(apply)


def _single(sequences, vocab_size):
  """[V], the tokens that are a sequence alone."""
  singles = [sequence[0] for sequence in sequences if len(sequence) == 1]
  return np.isin(np.arange(vocab_size), singles)


def _since_breaker(tokens, length, breakers, vocab_size):
  """How many tokens follow the end of the last breaker, [B, 1]."""
  ends = jnp.asarray(_single(breakers, vocab_size))[tokens] & (tokens >= 0)
  for breaker in breakers:
    matches, before = jnp.ones(tokens.shape, bool), tokens
    for token in reversed(breaker):
      matches, before = matches & (before == token), _shift(before)
    ends |= matches if len(breaker) > 1 else False
  places = jnp.arange(tokens.shape[1])[None, :]
  return length[:, None] - 1 - jnp.max(jnp.where(ends, places, -1), axis=1, keepdims=True)
