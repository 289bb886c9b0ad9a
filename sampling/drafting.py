"""Drafters: where the tokens come from that speculative decoding verifies.

A drafter proposes K tokens that continue a text, a chain or a tree of them, with the law each was
drawn from. Good ones are likely under the target; any is correct, since `coupling` corrects for its
law. Here are the interface and drafts by a model, which may be the target itself leaving early
(`early_exit`); `draft_trees` has trees, `lookup` drafts without a model, `features`
drafts from the target's own hidden states.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..models import base as models
from . import acceptance, base, coupling, decode, trees
from . import logits as logits_lib


class Drafts(NamedTuple):
  """K drafted tokens."""

  tokens: jax.Array  # [B, K] int32
  logits: jax.Array  # [B, K, V] of the law that each was drawn from; all -inf where there is none


class Drafter(NamedTuple):
  """How to draft K tokens.

  Attributes:
    parents: which draft continues which, K of them; see `trees`.
    init: (prompts, capacity) -> State, leaves [B, ...]; capacity counts the slots of a row.
    draft: (keys [B], context, state, active=None) -> (Drafts, State), for the rows that are active
      [B], all if None; what others are given is not looked at. The state may have read any prefix
      of the context's tokens, and tokens that were refused since; what it goes by is the context.
    observe: (hidden [B, K + 1, D], verdict, state) -> State: what the target made of the last token
      of the text and of each draft.
    verify: a lossless Verify for drafts drawn this way.
    optimum: (log_q, log_p, n) -> [...], the best acceptance of n drafts of one parent.
  """

  parents: trees.Parents
  init: Callable[[decode.Prompts, int], Any]
  draft: Callable[..., tuple[Drafts, Any]]
  observe: Callable[[jax.Array, coupling.Verdict, Any], Any] = lambda hidden, verdict, state: state
  verify: coupling.Verify = coupling.block
  optimum: Callable[[jax.Array, jax.Array, int], jax.Array] = acceptance.optimal_acceptance


# (hidden [B, D] that the draft is drawn from, draft [B], its law's logits [B, V]) -> [B], an
# estimate of the probability that it is accepted if those before it are.
Confidence = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


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


def by_model(
  model: models.LanguageModel,
  params: models.Params,
  *,
  num_drafts: int,
  transform: logits_lib.LogitsTransform | None = None,
  confidence: Confidence | None = None,
  threshold: float | jax.Array = 0.3,
) -> Drafter:
  """Drafts a chain x_t ~ transform(q(. | x_<t)) by another model, K calls of it in a row.

  The first call reads the last two tokens: after a step that accepted every draft, the cache lacks
  the one before the last. Reading it again costs less than a call of its own.

  Args:
    model: a smaller model of the same vocabulary.
    params: its parameters, unstacked.
    num_drafts: K; with `confidence`, the most.
    transform: the target's; drafts of another law are accepted less often.
    confidence: see `chain_of`.
    threshold: see `chain_of`.
  """
  transform = without_feedback(transform)

  def init(prompts, capacity):
    return decode.prefill(model, params, prompts, capacity)

  def draft(keys, context, cache, active=None):
    first = jnp.maximum(context.length - 2, 0)
    pair = window(context.tokens, first, 2)
    hidden, cache = models.apply(model, params, pair, cache._replace(length=first))
    hidden = jnp.take_along_axis(hidden, (context.length - 1 - first)[:, None, None], axis=1)
    return chain_of(
      keys,
      context,
      hidden[:, 0],
      cache._replace(length=context.length),
      num_drafts=num_drafts,
      law=lambda hidden, context: transform.apply(model.readout(params, hidden), context, ()),
      advance=lambda hidden, token, cache: _read_one(model, params, token, cache),
      confidence=confidence,
      threshold=threshold,
      active=active,
    )

  return Drafter(trees.chain(num_drafts), init, draft)


def _read_one(model, params, token, cache):
  hidden, cache = models.apply(model, params, token[:, None], cache)
  return hidden[:, 0], cache


def window(tokens: jax.Array, first: jax.Array, size: int) -> jax.Array:
  """tokens[b, first[b] : first[b] + size], [B, size]; zeros beyond the last."""
  padded = jnp.pad(tokens, ((0, 0), (0, size)))
  return jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, size))(padded, first)


def appended(context: logits_lib.Context, token: jax.Array) -> logits_lib.Context:
  """The context with one token [B] more."""
  rows = jnp.arange(token.size)
  tokens = context.tokens.at[rows, context.length].set(token, mode="drop")
  return context._replace(tokens=tokens, length=context.length + 1)


def chain_of(
  keys: base.Keys,
  context: logits_lib.Context,
  hidden: jax.Array,
  cache: models.Cache,
  *,
  num_drafts: int,
  law: Callable[[jax.Array, logits_lib.Context], jax.Array],
  advance: Callable[[jax.Array, jax.Array, models.Cache], tuple[jax.Array, models.Cache]],
  confidence: Confidence | None,
  threshold: float | jax.Array,
  active: jax.Array | None,
) -> tuple[Drafts, models.Cache]:
  """Draws up to K tokens in turn, each from what the ones before it lead to.

  With a `confidence`, a row drafts on while the estimated probability that some draft is refused,
  1 - prod_i confidence_i, is at most `threshold`; its first draft is drawn in any case. What a row
  drafts depends on no other row, and the loop ends with the last of them.

  Args:
    keys: [B].
    context: the text.
    hidden: [B, D], after it.
    cache: that holds it.
    num_drafts: K.
    law: (hidden, context) -> logits [B, V].
    advance: (hidden, token [B], cache) -> (hidden, cache), which has read the token.
    confidence: of a draft; without, every row drafts K.
    threshold: h, scalar or [B].
    active: [B], rows that draft; all if None.

  Reference: Huang et al. 2024 (SpecDec++), arXiv 2405.19715, for the threshold policy.
  """

  def draw(i, hidden, context, kept):
    """Draft i, in the rows that go on; what is kept is (drafts, survival [B], going [B])."""
    drafts, survival, going = kept
    logits = law(hidden, context)
    token = logits_lib.draw(base.row_keys_at(keys, jnp.full(keys.shape, i)), logits)
    drafts = Drafts(
      drafts.tokens.at[:, i].set(jnp.where(going, token, 0)),
      drafts.logits.at[:, i].set(jnp.where(going[:, None], logits, -jnp.inf)),
    )
    if confidence is not None:
      survival *= confidence(hidden, token, logits)
      going &= 1 - survival <= threshold
    return token, appended(context, token), (drafts, survival, going)

  def unfinished(carry):
    i, *_, (_, _, going) = carry
    return (i < num_drafts) & jnp.any(going)

  def body(carry):
    i, token, hidden, cache, context, kept = carry
    hidden, cache = advance(hidden, token, cache)
    token, context, kept = draw(i, hidden, context, kept)
    return i + 1, token, hidden, cache, context, kept

  batch_size = keys.shape[0]
  shape = jax.eval_shape(law, hidden, context)
  empty = Drafts(
    jnp.zeros((batch_size, num_drafts), jnp.int32),
    jnp.full((batch_size, num_drafts, shape.shape[1]), -jnp.inf, shape.dtype),
  )
  going = jnp.ones(batch_size, bool) if active is None else active
  kept = empty, jnp.ones(batch_size, jnp.float32), going
  token, context, kept = draw(0, hidden, context, kept)
  carry = jnp.int32(1), token, hidden, cache, context, kept
  *_, cache, _, (drafts, _, _) = jax.lax.while_loop(unfinished, body, carry)
  return drafts, cache
