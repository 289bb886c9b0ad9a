"""Drafts from the target's own hidden states, by a head that foretells them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..models import base as models
from ..models import eagle
from . import drafting, trees
from . import logits as logits_lib


class FeatureState(NamedTuple):
  """What the head has read, and the features for the `count` last tokens, which it has not."""

  cache: models.Cache  # the head's
  hidden: jax.Array  # [B, K + 1, D], the target's before each of these, then what is left over
  count: jax.Array  # [B] int32, from 1 to K + 1


def by_features(
  model: models.LanguageModel,
  params: models.Params,
  head: eagle.FeatureModel,
  head_params: models.Params,
  *,
  num_drafts: int,
  transform: logits_lib.LogitsTransform | None = None,
  confidence: drafting.Confidence | None = None,
  threshold: float | jax.Array = 0.3,
) -> drafting.Drafter:
  """Drafts a chain x_{t+1} ~ transform(readout(f'_t)), K calls of the head in a row.

  The first call reads the pairs of the tokens that the last step wrote, with the target's true
  features; it replaces what the head had put there of its own. Those after it read the feature that
  the head predicted and the token drawn from it. The prompts are read twice by the target: once
  here for their features, whole, and once to fill its cache.

  Args:
    model: the target.
    params: its parameters, unstacked.
    head: of the target's width.
    head_params: its parameters, unstacked.
    num_drafts: K; with `confidence`, the most.
    transform: the target's; drafts of another law are accepted less often.
    confidence: see `drafting.chain_of`.
    threshold: see `drafting.chain_of`.

  Reference: Li et al. 2024 (EAGLE), arXiv 2401.15077; its chain, not its tree.
  """
  transform = drafting.without_feedback(transform)

  def init(prompts, capacity):
    embedded = model.embed(params, prompts.tokens)
    features = eagle.before(model.trunk(params, embedded)[0])
    cache = head.init_cache(head_params, prompts.length.size, capacity)
    _, cache = head.trunk(head_params, features, embedded, cache)
    last = jnp.take_along_axis(features, (prompts.length - 1)[:, None, None], axis=1)
    hidden = jnp.pad(last, ((0, 0), (0, num_drafts), (0, 0)))
    return FeatureState(cache, hidden, jnp.ones_like(prompts.length))

  def draft(keys, context, state, active=None):
    # A row that ended early wrote less than it had counted; it is not drafted for, but goes along.
    first = jnp.maximum(context.length - state.count, 0)
    embedded = model.embed(params, drafting.window(context.tokens, first, num_drafts + 1))
    cache = state.cache._replace(length=first)
    hidden, cache = head.trunk(head_params, state.hidden, embedded, cache)
    hidden = jnp.take_along_axis(hidden, (state.count - 1)[:, None, None], axis=1)
    drafts, cache = drafting.chain_of(
      keys,
      context,
      hidden[:, 0],
      cache._replace(length=context.length),
      num_drafts=num_drafts,
      law=lambda hidden, context: transform.apply(model.readout(params, hidden), context, ()),
      advance=advance,
      confidence=confidence,
      threshold=threshold,
      active=active,
    )
    return drafts, state._replace(cache=cache)

  def advance(hidden, token, cache):
    embedded = model.embed(params, token[:, None])
    hidden, cache = head.trunk(head_params, hidden[:, None], embedded, cache)
    return hidden[:, 0], cache

  def observe(hidden, verdict, state):
    return state._replace(hidden=hidden, count=verdict.num_accepted + 1)

  return drafting.Drafter(trees.chain(num_drafts), init, draft, observe)
