"""Trees of drafts by a model: several tokens at a position, for rules that judge them together."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..models import base as models
from . import acceptance, base, coupling, decode, drafting, trees
from . import logits as logits_lib


class Siblings(NamedTuple):
  """How the children of a node are drawn from one law, and what goes with that.

  Attributes:
    draw: (keys [B], logits [B, V], n) -> tokens [B, n].
    rule: a lossless one for such drafts.
    optimum: (log_q, log_p, n) -> [...], the best acceptance of any such rule.
  """

  draw: Callable[[base.Keys, jax.Array, int], jax.Array]
  rule: coupling.Rule
  optimum: Callable[[jax.Array, jax.Array, int], jax.Array]


def _draw_independent(keys, logits, n):
  numbers = jnp.arange(n)
  draw = lambda i: logits_lib.draw(base.row_keys_at(keys, jnp.full(keys.shape, i)), logits)
  return jax.vmap(draw, out_axes=1)(numbers)


def _draw_without_replacement(keys, logits, n):
  draw = lambda key: jax.random.gumbel(key, logits.shape[1:], mode="high")
  return jax.lax.top_k(logits.astype(jnp.float32) + jax.vmap(draw)(keys), n)[1].astype(jnp.int32)


def _likeliest(keys, logits, n):
  del keys
  return jax.lax.top_k(logits, n)[1].astype(jnp.int32)


def _acceptance_of_likeliest(log_q, log_p, n):
  highest, chosen = jax.lax.top_k(log_q, n)
  p = jnp.exp(jnp.take_along_axis(log_p, chosen, axis=-1))
  return jnp.sum(jnp.where(highest > -jnp.inf, p, 0), axis=-1)  # what is impossible is no draft


independent = Siblings(
  _draw_independent, coupling.k_sequential, acceptance.optimal_acceptance
)  # SpecTr's
without_replacement = Siblings(  # EAGLE's and SpecInfer's stochastic trees
  _draw_without_replacement,
  coupling.recursive_rejection_without_replacement,
  acceptance.optimal_acceptance_without_replacement,
)
# The n likeliest tokens, which no rule takes more often than the target draws one of them.
likeliest = Siblings(_likeliest, coupling.sample_and_match, _acceptance_of_likeliest)


def by_model(
  model: models.LanguageModel,
  params: models.Params,
  *,
  parents: Sequence[int],
  siblings: Siblings = without_replacement,
  rule: coupling.Rule | None = None,
  transform: logits_lib.LogitsTransform | None = None,
) -> drafting.Drafter:
  """Drafts a tree by another model, level by level, one call of it for each.

  The children of a node are drawn from transform(q(. | path to the node)). The first call reads the
  last tokens again, as many as a step can add, since what the cache held of them lay in the order
  of the tree.

  Args:
    model: a smaller model of the same vocabulary, that takes positions and a mask.
    params: its parameters, unstacked.
    parents: the tree.
    siblings: how the children of a node are drawn.
    rule: of `coupling`, for drafts drawn so; that of the siblings if None.
    transform: the target's; drafts of another law are accepted less often.

  Raises:
    ValueError: the tree is none, has no draft, or a node more children than there are tokens.

  Reference: Miao et al. 2023 (SpecInfer), arXiv 2305.09781.
  """
  parents = trees.checked(parents)
  if not parents:
    raise ValueError("A tree without drafts: it has at least 1.")
  transform = drafting.without_feedback(transform)
  depth = trees.depths(parents)
  again = int(depth.max()) + 1

  def init(prompts, capacity):
    spare = trees.spare(parents)
    return decode.prefill(model, params, prompts, capacity - spare, spare=spare)

  def begin(context, cache):
    """Hidden states [B, 1, D] after the text, and the cache that holds it."""
    first = jnp.maximum(context.length - again, 0)
    tokens = drafting.window(context.tokens, first, again)
    positions = first[:, None] + jnp.arange(again)[None, :]
    cache = cache._replace(length=first)
    hidden, cache = models.apply(model, params, tokens, cache, positions=positions)
    last = (context.length - 1 - first)[:, None, None]
    return jnp.take_along_axis(hidden, last, axis=1), cache._replace(length=context.length)

  def draft(keys, context, cache, active=None):
    del active
    hidden, cache = begin(context, cache)
    nodes, read = np.zeros(1, int), np.zeros(0, int)  # those of `hidden`, and those in the cache
    tokens, laws = jnp.zeros((keys.size, len(parents)), jnp.int32), {}
    while True:
      law = _laws(model.readout(params, hidden), transform, context, parents, nodes, tokens)
      laws |= {node: law[:, i] for i, node in enumerate(nodes)}
      tokens = _grow(keys, siblings, parents, nodes, law, tokens)
      nodes = np.array([i + 1 for i in sorted(set(parents)) if i >= 0 and parents[i] + 1 in nodes])
      if nodes.size == 0:
        break
      read = np.append(read, nodes)
      allowed = trees.lineage(parents)[nodes[:, None] - 1, read[None, :] - 1]
      positions = context.length[:, None] - 1 + depth[nodes - 1][None, :]
      mask = trees.visible(context.length, allowed, context.tokens.shape[1])
      hidden, cache = models.apply(
        model, params, tokens[:, nodes - 1], cache, positions=positions, mask=mask
      )
    drawn_from = jnp.stack([laws[parent + 1] for parent in parents], axis=1)
    return drafting.Drafts(tokens, drawn_from), cache

  return drafting.Drafter(
    parents,
    init,
    draft,
    verify=coupling.tree(siblings.rule if rule is None else rule, parents),
    optimum=siblings.optimum,
  )


def _laws(logits, transform, context, parents, nodes, tokens):
  """The transform's law [B, G, V] at each of the nodes, of their logits."""
  contexts = trees.contexts(context, parents, tokens, nodes)
  apply = lambda logits, context: transform.apply(logits, context, ())
  return jax.vmap(apply, in_axes=1, out_axes=1)(logits, contexts)


def _grow(keys, siblings, parents, nodes, law, tokens):
  """The drafts [B, K] with the children of the nodes filled in."""
  for some, children in trees.families(parents):
    at = np.flatnonzero(np.isin(some, nodes))
    if at.size:
      n = children.shape[1]
      if n > law.shape[2]:
        raise ValueError(
          f"A node has {n} children, of a vocabulary of {law.shape[2]}: draft fewer."
        )
      draw = lambda node, law, n=n: siblings.draw(
        base.row_keys_at(keys, jnp.full(keys.shape, node)), law, n
      )
      places = np.array([np.flatnonzero(nodes == node)[0] for node in some[at]])
      drawn = jax.vmap(draw, in_axes=(0, 1), out_axes=1)(jnp.asarray(some[at]), law[:, places])
      tokens = tokens.at[:, children[at]].set(drawn)
  return tokens
