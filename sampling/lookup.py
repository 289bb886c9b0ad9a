"""Drafters without a model: what followed the same tokens when they last came before.

Their drafts are certain, q(d) = 1, so a draft is accepted with probability p(d). Where there is
nothing to copy there is no draft, and p itself is drawn.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from . import drafting, trees
from . import logits as logits_lib


def ngram(vocab_size: int, *, num_drafts: int, size: int = 2) -> drafting.Drafter:
  """Prompt lookup: what followed the last `size` tokens when they last came before.

  Raises:
    ValueError: size is not at least 1.

  Reference: Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding, which takes the first
  match and tries shorter n-grams.
  """
  logits_lib.require("size", size, lambda size: size >= 1, "at least 1")

  def draft(keys, context, state, active=None):
    del keys, active
    tokens, length = context.tokens, context.length
    index = jnp.arange(tokens.shape[1])[None, :]
    matches = (index >= size - 1) & (index < length[:, None] - 1)
    for back in range(size):
      last = jnp.take_along_axis(tokens, jnp.maximum(length - 1 - back, 0)[:, None], axis=1)
      matches &= jnp.roll(tokens, back, axis=1) == last
    end = jnp.max(jnp.where(matches, index, -1), axis=1)
    return _copied(context, end, vocab_size, num_drafts), state

  return drafting.Drafter(trees.chain(num_drafts), lambda prompts, capacity: (), draft)


class Suffixes(NamedTuple):
  """The matches of a text's end with itself."""

  read: jax.Array  # [B] int32, tokens of the text that are accounted for
  match: jax.Array  # [B, S] int32: of slot j, how many tokens up to j are those at the end


def suffix(vocab_size: int, *, num_drafts: int, shortest: int = 1) -> drafting.Drafter:
  """What followed the longest suffix of the text that came before; of several, the latest.

  What a suffix automaton of the text finds. Appending token x_t updates the lengths of all matches,

    m_t[j] = m_{t-1}[j - 1] + 1 if x_j = x_t else 0,    j < t,

  S comparisons at once where the automaton follows pointers, and without its table of V
  transitions a state.

  Args:
    vocab_size: V.
    num_drafts: K.
    shortest: suffixes that are shorter are not taken.

  Reference: SuffixDecoding, arXiv 2411.04975, which also keeps the outputs of other requests and
  drafts trees by their frequencies.
  """

  def init(prompts, capacity):
    read = jnp.zeros_like(prompts.length)
    match = jnp.zeros((read.size, capacity), jnp.int32)
    return _read_on(prompts.tokens, prompts.length, Suffixes(read, match))

  def draft(keys, context, state, active=None):
    del keys, active
    state = _read_on(context.tokens, context.length, state)
    index = jnp.arange(state.match.shape[1])[None, :]
    longest = jnp.max(state.match, axis=1, keepdims=True)
    latest = jnp.max(jnp.where(state.match == longest, index, -1), axis=1)
    end = jnp.where(longest[:, 0] >= shortest, latest, -1)
    return _copied(context, end, vocab_size, num_drafts), state

  return drafting.Drafter(trees.chain(num_drafts), init, draft)


def _read_on(tokens, length, state):
  """The matches once the tokens [B, P] up to `length` are read."""
  index = jnp.arange(state.match.shape[1])[None, :]
  fitted = jnp.pad(tokens, ((0, 0), (0, index.size - tokens.shape[1])))

  def behind(state):
    return jnp.any(state.read < length)

  def read(state):
    at = jnp.minimum(state.read, length - 1)[:, None]
    same = (fitted == jnp.take_along_axis(fitted, at, axis=1)) & (index < at)
    shifted = jnp.pad(state.match, ((0, 0), (1, 0)))[:, :-1]
    going = state.read < length
    match = jnp.where(going[:, None], jnp.where(same, shifted + 1, 0), state.match)
    return Suffixes(state.read + going, match)

  return jax.lax.while_loop(behind, read, state)


def _copied(context, end, vocab_size, num_drafts):
  """The tokens after slot `end` [B], as far as the text goes; none where it is -1."""
  tokens, length = context.tokens, context.length
  places = end[:, None] + 1 + jnp.arange(num_drafts)[None, :]
  known = (end[:, None] >= 0) & (places < length[:, None])
  drafts = jnp.take_along_axis(tokens, jnp.minimum(places, tokens.shape[1] - 1), axis=1)
  one_hot = jnp.arange(vocab_size)[None, None, :] == drafts[:, :, None]
  return drafting.Drafts(drafts, jnp.where(one_hot & known[:, :, None], jnp.float32(0), -jnp.inf))
