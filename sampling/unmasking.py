"""Rules of masked diffusion: which positions are written next.

A rule is made of a score of positions and of how many are taken. Position-first scores look at the
laws of the tokens only. One position a step is then exact with exact conditionals; several a step
are a trade of calls of the network for the dependence between their tokens.

`sampled_probability` looks at the tokens that were drawn, and prefers those that are likely. Even
one position a step then draws from another law, since an unlikely token is put off and drawn again
later: .57 in total variation on a Markov chain of 4 states and 6 tokens (docs/masked.md). It is
LLaDA's `low_confidence`, Dream's `maskgit_plus`, and the rule of MaskGIT without its Gumbel noise.
Where the token is the likeliest one, as at temperature 0, it is `max_probability`.

Scores are of the predictor's own law, whatever temperature or filter the tokens are drawn with: at
temperature 0 every token of a tempered law would be certain.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ..models import mask_schedules
from . import logits as logits_lib
from .masked import Rule, View, interval

# (key, view) -> [L], the higher the sooner
Score = Callable[[jax.Array, View], jax.Array]


def random_order(key: jax.Array, view: View) -> jax.Array:
  """Any order alike: one a step is `masked.first_hitting`."""
  return jax.random.uniform(key, view.masked.shape)


def left_to_right(key: jax.Array, view: View) -> jax.Array:
  """The first masked position."""
  del key
  return -jnp.arange(view.masked.size, dtype=jnp.float32)


def max_probability(key: jax.Array, view: View) -> jax.Array:
  """max_v p(v): the probability of the likeliest token, drawn or not."""
  del key
  return jnp.exp(jnp.max(view.log_p, axis=-1))


def margin(key: jax.Array, view: View) -> jax.Array:
  """The likeliest token's probability less the second's.

  Reference: Kim et al. 2025, arXiv 2502.06768, section 4 (top probability margin).
  """
  del key
  likeliest = jnp.argmax(view.log_p, axis=-1, keepdims=True)
  rest = jnp.where(jnp.arange(view.log_p.shape[-1])[None] == likeliest, -jnp.inf, view.log_p)
  # Two maxima: on CPU `top_k` of 256 tokens takes longer than a small network.
  return jnp.exp(jnp.max(view.log_p, axis=-1)) - jnp.exp(jnp.max(rest, axis=-1))


def negative_entropy(key: jax.Array, view: View) -> jax.Array:
  """sum_v p log p."""
  del key
  return -entropies(view.log_p)


def sampled_probability(key: jax.Array, view: View) -> jax.Array:
  """p(token) of the token that was drawn: biased, see above.

  Reference: Chang et al. 2022 (MaskGIT), arXiv 2202.04200, section 3.2; Nie et al. 2025 (LLaDA),
    arXiv 2502.09992, section 2.4.
  """
  del key
  return jnp.exp(jnp.take_along_axis(view.log_p, view.token[:, None], axis=-1)[:, 0])


def entropies(log_p: jax.Array) -> jax.Array:
  """-sum_v p log p [L] of laws [L, V]."""
  return -jnp.sum(jnp.where(log_p > -jnp.inf, jnp.exp(log_p) * log_p, 0), axis=-1)


def expected_number(
  schedule: mask_schedules.MaskSchedule, times: jax.Array
) -> Callable[[View], jax.Array]:
  """As many as `masked.ancestral` unmasks on average on this grid, rounded up.

  With the linear schedule it is LLaDA's number of tokens a step; with the cosine one nearly
  MaskGIT's, which rounds what is left down and not what is taken up. Steps are counted from the
  start of the sequence: not for `semi_autoregressive`.
  """
  times = jnp.asarray(times, jnp.float32)

  def number(view):
    unfinished, t, s = interval(times, view.step)
    prob = jnp.where(unfinished, mask_schedules.unmask_prob(schedule, t, s), 1)
    # In float32, a third of 6,000 may come to a little more than 2,000.
    return jnp.ceil(prob * jnp.sum(view.masked) - 1e-2).astype(jnp.int32)

  return number


def top(score: Score, num: int | jax.Array | Callable[[View], jax.Array] = 1) -> Rule:
  """The `num` positions of the highest score, at least one.

  Args:
    score: of positions.
    num: how many, or a function of the view (`expected_number`).
  """

  def rule(key, view):
    wanted = num(view) if callable(num) else num
    return _rank(score(key, view), view.masked) < jnp.maximum(wanted, 1)

  return rule


def threshold(score: Score, least: float | jax.Array) -> Rule:
  """All positions whose score is at least `least`, and the best one in any case.

  For scores that mean the same at every position: `max_probability`, `margin`.

  With `max_probability` and .9, for greedy tokens: Wu et al. 2025 (Fast-dLLM), arXiv 2505.22618,
  section 3.3.
  """

  def rule(key, view):
    scores = score(key, view)
    best = jnp.argmax(jnp.where(view.masked, scores, -jnp.inf))
    return (scores >= least) | (jnp.arange(scores.size) == best)

  return rule


def factor(most: float | jax.Array) -> Rule:
  """The n likeliest positions, for the largest n with (n + 1) (1 - p_(n)) < most; at least one.

  p_(n) is `max_probability` of the n-th. Under it the joint and the factorised law have the same
  likeliest tokens, most = 1.

  Reference: Wu et al. 2025 (Fast-dLLM), arXiv 2505.22618, theorem 1 and section 3.3.
  """

  def rule(key, view):
    probability = max_probability(key, view)
    rank = _rank(probability, view.masked)
    fits = (rank + 2) * (1 - probability) < most
    # (n + 1)(1 - p_(n)) rises with n: what fits is a prefix of the ranks.
    return (fits & view.masked) | (rank < 1)

  return rule


def entropy_bound(bound: float | jax.Array) -> Rule:
  """The k positions of least entropy H, for the largest k with sum H - max H <= bound.

  The sum of the k entropies less their joint entropy, at least the largest, bounds the information
  that drawing them independently ignores. bound = 0 writes one a step, or those that are certain.

  Raises:
    ValueError: a number for the bound that is below 0.

  Reference: Ben-Hamu et al. 2025 (EB-Sampler), arXiv 2505.24857, section 3.
  """

  logits_lib.require("entropy_bound", bound, lambda bound: bound >= 0, "at least 0")

  def rule(key, view):
    del key
    entropy = entropies(view.log_p)
    order = jnp.argsort(jnp.where(view.masked, entropy, jnp.inf), stable=True)
    # What a prefix adds up to less its last, the largest of it, is the sum of those before.
    taken = jnp.where(view.masked, entropy, 0)[order]
    before = jnp.cumsum(taken) - taken
    fits = jnp.zeros(view.masked.shape, bool).at[order].set(before <= bound)
    return fits & view.masked

  return rule


def semi_autoregressive(rule: Rule, block_length: int) -> Rule:
  """The rule, within the leftmost block of `block_length` positions that has a mask.

  Blocks are counted from the start of the sequence. Of length 1 it is left to right, of the whole
  length the rule itself. The network still reads everything; `blocks` keeps what is finished.

  Raises:
    ValueError: the length is not at least 1.

  Reference: Arriola et al. 2025, arXiv 2503.09573; Nie et al. 2025 (LLaDA), arXiv 2502.09992.
  """
  if block_length < 1:
    raise ValueError(f"block_length={block_length}: it has to be at least 1.")

  def within(key, view):
    block = jnp.arange(view.masked.size) // block_length
    first = jnp.min(jnp.where(view.masked, block, view.masked.size))
    masked = view.masked & (block == first)
    return rule(key, view._replace(masked=masked)) & masked

  return within


def _rank(scores: jax.Array, masked: jax.Array) -> jax.Array:
  """Ranks [L] from 0, the highest score of a masked position; of equals, the leftmost first."""
  order = jnp.argsort(jnp.where(masked, -scores, jnp.inf), stable=True)
  return jnp.zeros(scores.shape, jnp.int32).at[order].set(jnp.arange(scores.size, dtype=jnp.int32))
