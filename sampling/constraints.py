"""Transforms that say what may be drawn: biases, forbidden tokens, lengths, languages.

Put them first in a chain: a truncation before a constraint may leave nothing that it allows. Where
a ban would leave nothing, it is not applied; `constrain` keeps its word even then.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from . import automata, history
from . import logits as logits_lib


def _members(name, tokens, vocab_size):
  """[V] bool on the host, true at `tokens`, which have to be in the vocabulary."""
  outside = [int(token) for token in tokens if not 0 <= token < vocab_size]
  if outside:
    raise ValueError(
      f"{name} names token {outside[0]}, outside the vocabulary of {vocab_size} "
      f"(0 to {vocab_size - 1}): is it another model's tokenizer?"
    )
  return np.isin(np.arange(vocab_size), np.asarray(tokens, np.int64))


def logit_bias(bias: jax.Array | Mapping[int, float]) -> logits_lib.LogitsTransform:
  """z + bias. A bias of -inf forbids a token; in a row where nothing is left, nothing is added.

  Args:
    bias: [V], [B, V], or {token: bias} with 0 elsewhere; finite or -inf.

  Raises:
    ValueError: when applied, on a token outside the vocabulary.
  """

  def apply(logits):
    if isinstance(bias, Mapping):
      _members("logit_bias", list(bias), logits.shape[-1])
      values = jnp.asarray(list(bias.values()), logits.dtype)
      biased = logits.at[:, np.asarray(list(bias), np.int32)].add(values[None, :])
    else:
      values = jnp.asarray(bias, logits.dtype)
      values = values[None, :] if values.ndim == 1 else values
      biased = jnp.where(values == 0, logits, logits + values)  # -0.0 + 0.0 is 0.0
    return jnp.where(jnp.any(biased > -jnp.inf, axis=-1, keepdims=True), biased, logits)

  return logits_lib.stateless(apply)


def suppress(tokens: Sequence[int]) -> logits_lib.LogitsTransform:
  """Forbids `tokens`.

  Raises:
    ValueError: when applied, on a token outside the vocabulary.
  """

  def apply(logits):
    return history.forbid(logits, _members("suppress", tokens, logits.shape[-1])[None, :])

  return logits_lib.stateless(apply)


def allow(tokens: Sequence[int]) -> logits_lib.LogitsTransform:
  """Forbids all but `tokens`.

  Raises:
    ValueError: when applied, on a token outside the vocabulary.
  """

  def apply(logits):
    return history.forbid(logits, ~_members("allow", tokens, logits.shape[-1])[None, :])

  return logits_lib.stateless(apply)


def bad_words(
  sequences: Sequence[Sequence[int]], counted: history.Counted = history.whole
) -> logits_lib.LogitsTransform:
  """Forbids the last token of each sequence where the row ends in the rest of it.

  Args:
    sequences: token sequences; one of a single token is always forbidden.
    counted: the tokens that the rest of a sequence may be in. transformers: prompt and output;
      vLLM: the output.

  Raises:
    ValueError: an empty sequence; when applied, a token outside the vocabulary.
  """
  if any(len(sequence) == 0 for sequence in sequences):
    raise ValueError("bad_words has an empty sequence, which has no last token: leave it out.")
  width = max((len(sequence) - 1 for sequence in sequences), default=0)
  anything = -2  # in a sequence that is shorter than the longest; no row has that token
  rest = np.full((len(sequences), width), anything, np.int32)
  for i, sequence in enumerate(sequences):
    rest[i, width - len(sequence) + 1 :] = sequence[:-1]
  final = np.array([sequence[-1] for sequence in sequences], np.int32)

  def apply(logits, context):
    _members("bad_words", [token for sequence in sequences for token in sequence], logits.shape[-1])
    counts = counted(context) & history.whole(context)
    places = context.length[:, None] - width + jnp.arange(width)[None, :]
    tokens = jnp.where(counts, context.tokens, -1)
    recent = jnp.take_along_axis(tokens, jnp.maximum(places, 0), axis=1)
    recent = jnp.where(places >= 0, recent, -1)[:, None, :]
    complete = jnp.all((recent == rest[None]) | (rest == anything)[None], axis=-1)  # [B, N]
    forbidden = jnp.zeros(logits.shape, bool).at[:, final].max(complete)
    return history.forbid(logits, forbidden)

  return history.of_context(apply)


def min_new_tokens(n: int | jax.Array, stop: Sequence[int]) -> logits_lib.LogitsTransform:
  """Forbids the stop tokens until n tokens were drawn.

  Args:
    n: at least 0, scalar or [B]; 0 is off.
    stop: tokens that end a row. (Others too: n = 1 keeps them from coming first.)
  """
  logits_lib.require("min_new_tokens", n, lambda n: n >= 0, "at least 0; 0 is off")
  return _not_before(
    "min_new_tokens", n, stop, lambda context: context.length - context.prompt_length
  )


def min_length(n: int | jax.Array, stop: Sequence[int]) -> logits_lib.LogitsTransform:
  """Forbids the stop tokens until the row has n tokens, its prompt included.

  Args:
    n: at least 0, scalar or [B]; 0 is off.
    stop: tokens that end a row.
  """
  logits_lib.require("min_length", n, lambda n: n >= 0, "at least 0; 0 is off")
  return _not_before("min_length", n, stop, lambda context: context.length)


def _not_before(name, n, stop, count):
  def apply(logits, context):
    early = count(context)[:, None] < logits_lib.per_row(n)
    return history.forbid(logits, early & _members(name, stop, logits.shape[-1])[None, :])

  return history.of_context(apply)


def exponential_length_decay(
  start: int | jax.Array, factor: float | jax.Array, stop: Sequence[int]
) -> logits_lib.LogitsTransform:
  """Makes the stop tokens likelier from token to token, once `start` tokens were drawn.

    z + |z| (factor^(n - start) - 1)   after n > start drawn tokens

  Not invariant: adding a constant to all logits changes the law, and z = 0 never grows. The power
  is held below e^80 (transformers overflows).

  Args:
    start: at least 0, scalar or [B].
    factor: above 0, scalar or [B]; 1 is off, less than 1 puts the end off.
    stop: tokens that end a row.

  Reference: transformers, ExponentialDecayLengthPenalty (no paper).
  """
  logits_lib.require("exponential_length_decay start", start, lambda n: n >= 0, "at least 0")
  logits_lib.require(
    "exponential_length_decay factor", factor, lambda f: f > 0, "above 0; 1 is off"
  )

  def apply(logits, context):
    over = (context.length - context.prompt_length)[:, None] - logits_lib.per_row(start)
    log_factor = jnp.log(logits_lib.per_row(factor).astype(logits.dtype))
    growth = jnp.expm1(jnp.minimum(over * log_factor, 80))
    stops = _members("exponential_length_decay", stop, logits.shape[-1])[None, :]
    grows = stops & (over > 0) & (growth != 0) & (logits > -jnp.inf)
    return jnp.where(grows, logits + jnp.abs(logits) * growth, logits)

  return history.of_context(apply)


def constrain(
  automaton: automata.Automaton,
  stop: Sequence[int] = (),
  max_new_tokens: int | jax.Array | None = None,
) -> logits_lib.LogitsTransform:
  """Draws words of an automaton's language, and nothing else.

  A token is allowed if the word so far and the token begin a word; a stop token, if the word so far
  is one. The law is the model's over what is allowed, token by token. (That is not the model's law
  given that the text is a word, which would look ahead.) The state is the automaton's, [B].

  With `max_new_tokens`, a token is allowed only if its word can be completed in the tokens that are
  left, so every row ends in a word, whether a stop token still fits or not. A row that could not
  complete a word to begin with follows the language as if it had no limit.

  Where no allowed token has a chance (a truncation before this one took them all), the allowed ones
  are equally likely.

  Args:
    automaton: the language of what is drawn; its start is the state after the prompt, [] or [B].
    stop: tokens that end a row, as given to `decode`; they are no part of a word. Leave it out if
      the automaton was given them by `automata.ended`, on the host, as it has to be to be an
      argument of jit, where large tables belong.
    max_new_tokens: scalar or [B], as given to `decode`.

  Raises:
    ValueError: a state in which no token is allowed, or too few `max_new_tokens` for any word.
  """
  if len(stop):
    automaton = automata.ended(automaton, stop)
  _check(automaton, max_new_tokens)
  transitions, distance = jnp.asarray(automaton.transitions), jnp.asarray(automaton.distance)

  def init(batch_size):
    return jnp.broadcast_to(jnp.asarray(automaton.start, jnp.int32), (batch_size,))

  def apply(logits, context, state):
    following = transitions[state]
    allowed = following >= 0
    if max_new_tokens is not None:
      drawn = (context.length - context.prompt_length)[:, None]
      in_time = allowed & (distance[following] < logits_lib.per_row(max_new_tokens) - drawn)
      allowed = jnp.where(jnp.any(in_time, axis=-1, keepdims=True), in_time, allowed)
    kept = jnp.where(allowed, logits, -jnp.inf)
    possible = jnp.any(kept > -jnp.inf, axis=-1, keepdims=True)
    return jnp.where(possible, kept, jnp.where(allowed, 0, -jnp.inf))

  def update(model_logits, token, state):
    return automata.advance(automaton, state, token)

  return logits_lib.LogitsTransform(init, apply, update)


def _check(automaton, max_new_tokens):
  """Refuses what is known to fail, of an automaton that is not an argument of jit."""
  if not isinstance(automaton.transitions, np.ndarray):
    return
  ends = (automaton.distance == 0) & np.all(automaton.transitions < 0, axis=1)
  if ends.any():
    raise ValueError(
      f"Nothing may follow state {int(np.argmax(ends))} of the automaton, which ends a word: "
      "give constrain the stop tokens."
    )
  if isinstance(max_new_tokens, int) and isinstance(automaton.start, int | np.ndarray | np.generic):
    least = int(np.max(automaton.distance[automaton.start]))
    if least > max_new_tokens:
      raise ValueError(
        f"constrain: max_new_tokens is {max_new_tokens}, but the shortest word takes {least}."
      )
