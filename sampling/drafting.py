"""Drafters: where the tokens come from that speculative decoding verifies.

A drafter proposes K tokens that continue a text, with the law each was drawn from. Good ones are
likely under the target; any is correct, since `coupling` corrects for its law.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..models import base as models
from . import base, decode
from . import logits as logits_lib


class Drafts(NamedTuple):
  """A chain of K drafted tokens."""

  tokens: jax.Array  # [B, K] int32
  logits: jax.Array  # [B, K, V] of the law that each was drawn from; all -inf where there is none


class Drafter(NamedTuple):
  """How to draft K tokens.

  Attributes:
    num_drafts: K.
    init: (prompts, max_length) -> State, leaves [B, ...].
    draft: (keys [B], context, state) -> (Drafts, State). The state may have read any prefix of the
      context's tokens, and tokens that were refused since; what it goes by is the context.
  """

  num_drafts: int
  init: Callable[[decode.Prompts, int], Any]
  draft: Callable[[base.Keys, logits_lib.Context, Any], tuple[Drafts, Any]]


def without_feedback(transform: logits_lib.LogitsTransform | None) -> logits_lib.LogitsTransform:
  """The transform, if its law at a draft needs no state that is still to be computed.

  Raises:
    ValueError: it feeds back.
  """
  transform = logits_lib.chain() if transform is None else transform
  if jax.tree.leaves(jax.eval_shape(lambda: transform.init(1))):
    raise ValueError(
      "This transform feeds back (as Mirostat and automata do), so the law at a draft needs the "
      "state after the drafts before it: leave it out, or decode with `decode.autoregressive`."
    )
  return transform


def _check(num_drafts):
  if num_drafts < 1:
    raise ValueError(f"num_drafts={num_drafts}: a drafter drafts at least 1.")


def by_model(
  model: models.LanguageModel,
  params: models.Params,
  *,
  num_drafts: int,
  transform: logits_lib.LogitsTransform | None = None,
) -> Drafter:
  """Drafts x_t ~ transform(q(. | x_<t)) by another model, K calls of it in a row.

  The first call reads the last two tokens: after a step that accepted every draft, the cache lacks
  the one before the last. Reading it again costs less than a call of its own.

  Args:
    model: a smaller model of the same vocabulary.
    params: its parameters, unstacked.
    num_drafts: K.
    transform: the target's; drafts of another law are accepted less often.
  """
  transform = without_feedback(transform)
  _check(num_drafts)

  def init(prompts, max_length):
    return decode.prefill(model, params, prompts, max_length)

  def begin(context, cache):
    """The law after the context, and the cache that holds all of it."""
    first = jnp.maximum(context.length - 2, 0)
    tokens = jnp.pad(context.tokens, ((0, 0), (0, 1)))  # a buffer of one slot has no pair
    pair = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, 2))(tokens, first)
    hidden, cache = models.apply(model, params, pair, cache._replace(length=first))
    last = (context.length - 1 - first)[:, None, None]
    hidden = jnp.take_along_axis(hidden, last, axis=1)
    return hidden[:, 0], cache._replace(length=context.length)

  def draft(keys, context, cache):
    hidden, cache = begin(context, cache)
    rows = jnp.arange(keys.shape[0])

    def draw(i, hidden, context):
      law = transform.apply(model.readout(params, hidden), context, ())
      token = logits_lib.draw(base.row_keys_at(keys, jnp.full(keys.shape, i)), law)
      tokens = context.tokens.at[rows, context.length].set(token, mode="drop")
      return law, token, context._replace(tokens=tokens, length=context.length + 1)

    def body(carry, i):
      hidden, cache, context = carry
      law, token, context = draw(i, hidden, context)
      hidden, cache = models.apply(model, params, token[:, None], cache)
      return (hidden[:, 0], cache, context), (token, law)

    carry = hidden, cache, context
    (hidden, cache, context), drawn = jax.lax.scan(body, carry, jnp.arange(num_drafts - 1))
    law, token, _ = draw(num_drafts - 1, hidden, context)  # nothing reads the last draft
    tokens, laws = jax.tree.map(
      lambda some, one: jnp.concatenate([jnp.swapaxes(some, 0, 1), one[:, None]], axis=1),
      drawn,
      (token, law),
    )
    return Drafts(tokens, laws), cache

  return Drafter(num_drafts, init, draft)


def lookup(vocab_size: int, *, num_drafts: int, ngram: int = 2) -> Drafter:
  """Prompt lookup: what followed the last `ngram` tokens when they last came before. No model.

  Drafts are certain, q(d) = 1, so a draft is accepted with probability p(d). Where the n-gram is
  new, or nothing follows, there is no draft and p itself is drawn.

  Reference: Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding, which takes the first
  match and tries shorter n-grams.
  """

  _check(num_drafts)

  def draft(keys, context, state):
    del keys
    tokens, length = context.tokens, context.length
    size = tokens.shape[1]
    index = jnp.arange(size)[None, :]
    matches = (index >= ngram - 1) & (index < length[:, None] - 1)
    for back in range(ngram):
      last = jnp.take_along_axis(tokens, jnp.maximum(length - 1 - back, 0)[:, None], axis=1)
      matches &= jnp.roll(tokens, back, axis=1) == last
    end = jnp.max(jnp.where(matches, index, -1), axis=1)
    places = end[:, None] + 1 + jnp.arange(num_drafts)[None, :]
    known = (end[:, None] >= 0) & (places < length[:, None])
    drafts = jnp.take_along_axis(tokens, jnp.minimum(places, size - 1), axis=1)
    one_hot = jnp.arange(vocab_size)[None, None, :] == drafts[:, :, None]
    return Drafts(drafts, jnp.where(one_hot & known[:, :, None], 0.0, -jnp.inf)), state

  return Drafter(num_drafts, lambda prompts, max_length: (), draft)
