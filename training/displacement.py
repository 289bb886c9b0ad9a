"""Which preference pairs push their own chosen response down, told before training on them.

A step on a pair raises log pi(y_w) - log pi(y_l), and may lower both: where the two responses are
represented alike, the push away from y_l takes y_w along (likelihood displacement). Score pairs
under the reference model, drop those most alike, and train on the others:

  scores = displacement.of_pairs(model, params, chosen, rejected, displacement.mean_ches)
  kept = displacement.least_similar(scores, 0.5)

States are summed where the mask is, position i of a row being the state that predicts target i. So
the sum runs from the last token of the prompt to the last but one of the response, and padding on
either side, or a prompt of any length, adds nothing.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ..models import base as models
from . import likelihood, step

# (chosen_hidden [..., T, D], rejected_hidden [..., T', D], chosen_mask, rejected_mask) -> [...]
Similarity = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def ches(
  chosen_hidden: jax.Array,
  rejected_hidden: jax.Array,
  chosen_mask: jax.Array,
  rejected_mask: jax.Array,
) -> jax.Array:
  """<H_w, H_l> - |H_w|^2, [...], H the sum of a response's hidden states: high is risky.

  Let G = sum_t (e(y_t) - p_t) h_t^T, the gradient of log pi(y) by the readout matrix. A step on the
  pair changes log pi(y_w), by the readout alone, at the rate |G_w|^2 - <G_w, G_l>. CHES is minus
  that with every inner product of the vectors e(y_t) - p_t replaced by 1: what hidden states say of
  it, and not tokens. It is 0 for any two responses of one token, which share their only state.

  The authors' code takes every column of a padded batch but the last for the response, so that rows
  padded on the right count states of padding, which are not 0, and their length as well. This
  follows the paper, which the code agrees with for one row without padding.

  Args:
    chosen_hidden: after the final norm, [..., T, D].
    rejected_hidden: [..., T', D].
    chosen_mask: [..., T], 1 where a state predicts a token of the response. Elsewhere states are
      not read.
    rejected_mask: [..., T'].

  Reference: Razin et al. 2024, arXiv 2410.08847.
  """
  chosen, rejected = _sum(chosen_hidden, chosen_mask), _sum(rejected_hidden, rejected_mask)
  return jnp.sum(chosen * (rejected - chosen), axis=-1)


def mean_ches(
  chosen_hidden: jax.Array,
  rejected_hidden: jax.Array,
  chosen_mask: jax.Array,
  rejected_mask: jax.Array,
) -> jax.Array:
  """`ches` of means in place of sums, [...]: long chosen responses do not lead by their length.

  The variant with which the paper filters data. A response without tokens has the mean 0.

  Reference: Razin et al. 2024, arXiv 2410.08847.
  """
  return ches(chosen_hidden, rejected_hidden, _share(chosen_mask), _share(rejected_mask))


def of_pairs(
  model: models.LanguageModel,
  params: models.Params,
  chosen: step.Batch,
  rejected: step.Batch,
  similarity: Similarity = ches,
) -> jax.Array:
  """The similarity of each pair's hidden states under a model, [B].

  Args:
    model: the one that training starts from.
    params: its parameters.
    chosen: rows as `scoring.scores` reads them, `tokens` and `mask` [B, L] and for rows padded on
      the left `segments` and `positions`.
    rejected: likewise, [B, L'].
    similarity: `ches` or `mean_ches`.
  """
  states = [likelihood.hidden_states(model, params, rows, None) for rows in (chosen, rejected)]
  return similarity(*states, chosen["mask"], rejected["mask"])


def chosen_rate(
  chosen: Callable[[models.Params], jax.Array],
  rejected: Callable[[models.Params], jax.Array],
  params: models.Params,
) -> jax.Array:
  """<grad c, grad (c - r)>: the rate of c along gradient ascent on the pair's margin c - r.

  All that a small gradient step does to log pi(y_w), up to a positive factor; below 0 it falls. It
  is what CHES estimates, without a gradient and with the other sign.

  Args:
    chosen: params -> c = log pi(y_w) [...].
    rejected: params -> r [...]. Only the sum of c - r over leading dimensions is ascended.
    params: where.

  Returns:
    Of the shape of c.
  """
  margin = lambda params: jnp.sum(chosen(params) - rejected(params))
  return jax.jvp(chosen, (params,), (jax.grad(margin)(params),))[1]


def least_similar(scores: jax.Array, share: float) -> jax.Array:
  """True at the round(share B) pairs of lowest score, [B]; of equal scores, the first.

  Args:
    scores: [B].
    share: of pairs to keep, 0 to 1.

  Raises:
    ValueError: share is outside of 0 to 1.
  """
  if not 0 <= share <= 1:
    raise ValueError(f"The share to keep is {share}, not within 0 to 1.")
  rank = jnp.argsort(jnp.argsort(scores, stable=True), stable=True)
  return rank < round(share * scores.shape[0])


def edit_distance(chosen: list[int], rejected: list[int]) -> int:
  """Fewest insertions, deletions and substitutions of one token: a yardstick for the others."""

  def row(above, token):
    made = [above[0] + 1]
    for i, other in enumerate(rejected):
      made.append(min(above[i + 1] + 1, made[i] + 1, above[i] + (token != other)))
    return made

  return functools.reduce(row, chosen, list(range(len(rejected) + 1)))[-1]


def _sum(hidden, mask):
  inside = (mask != 0)[..., None]
  states = jnp.where(inside, hidden.astype(jnp.float32), 0)
  return jnp.sum(states * mask.astype(jnp.float32)[..., None], axis=-2)


def _share(mask):
  mask = mask.astype(jnp.float32)
  count = jnp.sum(mask, axis=-1, keepdims=True)
  return mask / jnp.where(count != 0, count, 1)
