"""Speculative decoding as couplings of a target law p and a draft law q that leave p's marginal.

Drafts are drawn from q, a rule looks at them and puts out a token, and whatever the rule, that
token's law is p. The rules differ in how often the token is one of the drafts. A Rule is a pure
function without randomness: it says with what probability each draft is taken, and what the law is
when none is. So the law of the output is a finite sum over drafts, which the tests carry out;
`select` tosses the coins and draws, and `chain`, `tree` and `block` judge all the drafts of a step.

Laws are given by log-probabilities [..., V], float32, -inf where impossible. Keys are one per row:
their shape is the leading dimensions `...`, which may be none.

A draft with q(x) = 0 cannot have been drawn; it is refused and changes nothing. So a row with fewer
drafts than its neighbours is padded by draft logits of -inf throughout: there, p itself is drawn.
Where p = q the residual is 0/0; it is never needed, and is set to p in case rounding asks for it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import logits as logits_lib
from . import trees


class Judgement(NamedTuple):
  """What a rule makes of n drafts, given the drafts."""

  accept: jax.Array  # [..., n] probability that draft i is taken if none before it was
  residual: jax.Array  # [..., V] log-weights of the token if none is; not normalised


class Selection(NamedTuple):
  """The token put out at one position."""

  token: jax.Array  # [...] int32, of law p
  index: jax.Array  # [...] int32, the draft taken, or -1 if none
  accept_prob: jax.Array  # [..., n] probability that draft i is taken, given the drafts


class Verdict(NamedTuple):
  """The drafts accepted, and the one token more that every verification gives.

  The expected number of accepted drafts, given the drafts, is the sum over drafts of the product of
  `accept_prob` over the draft and its ancestors.
  """

  num_accepted: jax.Array  # [...] int32
  token: jax.Array  # [...] int32, follows the accepted drafts: a correction, or a bonus after all
  accept_prob: jax.Array  # [..., K] probability that a draft is accepted if its parent is
  path: jax.Array  # [..., depth] int32, the accepted drafts' indices in order, then -1


# (drafts [..., n], log_q [..., V], log_p [..., V])
Rule = Callable[[jax.Array, jax.Array, jax.Array], Judgement]
# (keys [...], drafts [..., n], log_q [..., V], log_p [..., V])
Select = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], Selection]
# (keys [...], drafts [..., K], draft logits [..., K, V], target logits [..., K + 1, V])
Verify = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], Verdict]


def maximal_one(drafts: jax.Array, log_q: jax.Array, log_p: jax.Array) -> Judgement:
  """Maximal coupling, of one draft: takes x with probability min(1, p(x) / q(x)).

  If not, the token is drawn from max(p - q, 0), normalised. A draft is taken with probability
  sum_v min(p, q) = 1 - TV(p, q), and no coupling does better.

  Raises:
    ValueError: there is not one draft.

  Reference: Leviathan et al. 2022, arXiv 2211.17192, algorithm 1; Chen et al. 2023, 2302.01318.
  """
  if drafts.shape[-1] != 1:
    raise ValueError(f"maximal_one judges 1 draft, not {drafts.shape[-1]}; use k_sequential.")
  return Judgement(_ratio_test(drafts, log_q, log_p), _else(log_minus(log_p, log_q), log_p))


def k_sequential(drafts: jax.Array, log_q: jax.Array, log_p: jax.Array) -> Judgement:
  """K-SEQ: the drafts in turn, each taken with probability min(1, p(x) / (rho q(x))).

  With b(rho) = sum_v min(q, p / rho), rho solves 1 - (1 - b)^n = rho b. Then v is taken with
  probability min(q, p / rho) (1 - (1 - b)^n) / b = min(rho q, p), so the residual is
  max(p - rho q, 0). The drafts are n independent ones of q. At least 1 - 1/e of the optimum.

  Reference: Sun et al. 2023 (SpecTr), arXiv 2310.15141.
  """
  log_rho = jnp.log(k_sequential_ratio(log_q, log_p, drafts.shape[-1]))[..., None]
  accept = _ratio_test(drafts, log_q + log_rho, log_p)
  return Judgement(accept, _else(log_minus(log_p, log_q + log_rho), log_p))


def k_sequential_ratio(log_q: jax.Array, log_p: jax.Array, n: int) -> jax.Array:
  """rho in [1, n], [...], of `k_sequential` for n drafts: 1 - (1 - b)^n = rho b.

  Solved as sum_v max(p - rho q, 0) = (sum_v max(q - p / rho, 0))^n, the same equation without
  cancellation: the left side falls and the right side grows. Newton's steps, or half of what is
  left where those do not halve, down to rounding: 5 to 12 passes over the vocabulary for most
  rows, 40 at most. Where p = q, rho is 1.
  """
  q, p = jnp.exp(log_q), jnp.exp(log_p)
  total = functools.partial(jnp.sum, axis=-1)
  accuracy = 2 * jnp.finfo(p.dtype).eps

  def unsolved(bounds):
    count, _, _, rho, move = bounds
    return (count < 40) & jnp.any(move > accuracy * rho)

  def step(bounds):
    count, low, high, rho, move = bounds
    excess = p - rho[..., None] * q
    left, right = total(jnp.maximum(excess, 0)), total(jnp.maximum(-excess, 0)) / rho
    low, high = jnp.where(left > right**n, rho, low), jnp.where(left > right**n, high, rho)
    slope = total(jnp.where(excess > 0, q, 0))
    slope += n * right ** (n - 1) * total(jnp.where(excess < 0, p, 0)) / rho**2
    newton = rho + (left - right**n) / jnp.where(slope > 0, slope, 1)
    better = (newton >= low) & (newton <= high) & (2 * jnp.abs(newton - rho) <= move)
    following = jnp.where(better, newton, (low + high) / 2)
    return count + 1, low, high, following, jnp.abs(following - rho)

  one = jnp.ones_like(p[..., 0])
  return jax.lax.while_loop(unsolved, step, (0, one, n * one, one, n * one))[3]


def recursive_rejection(drafts: jax.Array, log_q: jax.Array, log_p: jax.Array) -> Judgement:
  """The maximal coupling again and again, each time with what is left of p.

  p_1 = p; draft i is taken with probability min(1, p_i(x) / q(x)); if not, p_{i+1} is
  max(p_i - q, 0), normalised. The drafts are n independent ones of q.

  Reference: Miao et al. 2023 (SpecInfer), arXiv 2305.09781.
  """
  return _recursive(drafts, log_q, log_p, lambda log_q, draft: log_q)


def recursive_rejection_without_replacement(
  drafts: jax.Array, log_q: jax.Array, log_p: jax.Array
) -> Judgement:
  """`recursive_rejection` of drafts drawn one after the other, without replacement.

  Draft i is of q without the drafts before it, normalised, and is judged by that law: what Gumbel
  top-n draws of q give, in their order. No token is tried twice, so more drafts are taken.

  Reference: Li et al. 2024 (EAGLE), arXiv 2401.15077; Jeon et al. 2024, 2402.14160.
  """
  without = lambda log_q, draft: log_law(_without(log_q, draft))
  return _recursive(drafts, log_q, log_p, without)


def _recursive(drafts, log_q, log_p, next_q):
  accept = []
  for draft in jnp.split(drafts, drafts.shape[-1], axis=-1):
    accept.append(_ratio_test(draft, log_q, log_p))
    log_p = log_law(_else(log_minus(log_p, log_q), log_p))
    log_q = next_q(log_q, draft)
  return Judgement(jnp.concatenate(accept, axis=-1), log_p)


def sample_and_match(drafts: jax.Array, log_q: jax.Array, log_p: jax.Array) -> Judgement:
  """Draws the token from p, and sees whether it is among the drafts: the plainest lossless rule.

  Of q, it needs no more than where it is 0, so it judges drafts of any origin, such as the n
  likeliest tokens; n independent drafts of q it takes with probability sum_v p (1 - (1 - q)^n).
  """
  return matching(drafts, log_q, log_p, log_p)


def matching(
  drafts: jax.Array, log_q: jax.Array, log_p: jax.Array, log_conditional: jax.Array
) -> Judgement:
  """The rule whose token has the law log_conditional [..., V] given the drafts [..., n].

  Any coupling of drafts and token can be written so; see `acceptance.optimal_transport`.
  """
  again = jnp.any(jnp.tril(drafts[..., :, None] == drafts[..., None, :], -1), axis=-1)
  possible = jnp.take_along_axis(log_q, drafts, axis=-1) > -jnp.inf
  mass = jnp.exp(jnp.take_along_axis(log_conditional, drafts, axis=-1))
  mass = jnp.where(possible & ~again, mass, 0)
  residual = _without(log_conditional, jnp.where(possible, drafts, -1))
  # 1 - (the mass of the drafts before), as a sum of what is left.
  left = jnp.cumsum(mass[..., ::-1], axis=-1)[..., ::-1]
  left += jnp.sum(jnp.exp(residual), axis=-1, keepdims=True)
  return Judgement(mass / jnp.where(left > 0, left, 1), _else(residual, log_p))


def _without(log_weights, tokens):
  drawn = jax.nn.one_hot(tokens, log_weights.shape[-1], dtype=bool)
  return jnp.where(jnp.any(drawn, axis=-2), -jnp.inf, log_weights)


def _ratio_test(drafts, log_q, log_p):
  """min(1, p / q) at the drafts, [..., n]; 0 where q is 0."""
  log_q, log_p = (jnp.take_along_axis(law, drafts, axis=-1) for law in (log_q, log_p))
  possible = (log_q > -jnp.inf) & (log_p > -jnp.inf)
  return jnp.where(possible, jnp.exp(jnp.minimum(jnp.where(possible, log_p - log_q, 0), 0)), 0)


def log_minus(log_a: jax.Array, log_b: jax.Array) -> jax.Array:
  """log max(a - b, 0) of logs a and b, without cancellation beyond that of the logs."""
  more = log_a > log_b
  difference = jnp.where(more, log_b - jnp.where(more, log_a, 0), -1)
  return jnp.where(more, log_a + jnp.log(-jnp.expm1(difference)), -jnp.inf)


def _else(log_weights, log_p):
  """The weights, or p where all of them are 0."""
  return jnp.where(jnp.any(log_weights > -jnp.inf, axis=-1, keepdims=True), log_weights, log_p)


def log_law(logits: jax.Array) -> jax.Array:
  """log_softmax of logits [..., V] in float32 or more; a row of -inf stays as it is."""
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  some = jnp.any(logits > -jnp.inf, axis=-1, keepdims=True)
  return jnp.where(some, jax.nn.log_softmax(jnp.where(some, logits, 0), axis=-1), -jnp.inf)


def _per_row(function, keys, *arrays):
  """function(key, *rows) over the leading dimensions, those of keys."""
  flat = [a.reshape(keys.size, *a.shape[keys.ndim :]) for a in (keys, *arrays)]
  return jax.tree.map(lambda x: x.reshape(*keys.shape, *x.shape[1:]), jax.vmap(function)(*flat))


def _first(accept):
  """The probability [..., n] that draft i is the first one taken."""
  before = jnp.cumprod(1 - accept, axis=-1)[..., :-1]
  return accept * jnp.concatenate([jnp.ones_like(accept[..., :1]), before], axis=-1)


def _draw(key, log_weights):
  return logits_lib.draw(key[None], log_weights[None])[0]


def select(rule: Rule) -> Select:
  """The rule carried out: (keys [...], drafts [..., n], log_q, log_p [..., V]) -> Selection."""

  def one(key, drafts, log_q, log_p):
    coin_key, token_key = jax.random.split(key)
    accept, residual = rule(drafts, log_q, log_p)
    # A coin of 23 bits would take a draft of p / q = 1e-9 a hundred times too often.
    taken = jax.random.bernoulli(coin_key, accept, mode="high")
    index = jnp.where(jnp.any(taken), jnp.argmax(taken), -1).astype(jnp.int32)
    token = jnp.where(index >= 0, drafts[index], _draw(token_key, residual))
    return Selection(token.astype(jnp.int32), index, _first(accept))

  return lambda keys, drafts, log_q, log_p: _per_row(one, keys, drafts, log_q, log_p)


def chain(rule: Rule) -> Verify:
  """Judges a chain of K drafts in turn, up to the first that is refused.

  Each draft alone is judged by the rule at its own position; with `maximal_one`, this is
  speculative decoding as first published.

  Reference: Leviathan et al. 2022, arXiv 2211.17192, algorithm 1.
  """

  def verify(keys, drafts, draft_logits, target_logits):
    links = tree(rule, range(-1, drafts.shape[-1] - 1))
    return links(keys, drafts, draft_logits, target_logits)

  return verify


def tree(rule: Rule, parents: Sequence[int]) -> Verify:
  """Judges a tree of drafts from the root: the children of an accepted node, together.

  Args:
    rule: for n drafts at one position.
    parents: of each draft, the index of the one it continues, lower than its own; -1 for a draft
      that continues the text itself. The children of one node, in the order of their indices, are
      n draws of one law, independent or not as the rule has it: the first one's logits are read.

  Returns:
    A Verify. Row 0 of the target's logits is the law that continues the text, row i + 1 the one
    after draft i.

  Raises:
    ValueError: a parent does not come before its child.

  Reference: Miao et al. 2023 (SpecInfer), arXiv 2305.09781.
  """
  parents = trees.checked(parents)
  families, lineage = trees.families(parents), trees.lineage(parents)
  depth = lineage.sum(axis=1)
  levels = np.arange(1, max(depth, default=0) + 1)

  def one(key, drafts, draft_logits, target_logits):
    coin_key, token_key = jax.random.split(key)
    log_q, log_p = log_law(draft_logits), log_law(target_logits)
    judge = lambda at, children: rule(drafts[children], log_q[children[..., 0]], log_p[at])
    accept, accept_prob = jnp.zeros((2, len(parents)), log_p.dtype)
    for at, children in families:
      judged = judge(at, children).accept
      accept = accept.at[children].set(judged)
      accept_prob = accept_prob.at[children].set(_first(judged))
    coins = jax.random.bernoulli(coin_key, accept, mode="high")
    taken = jnp.zeros_like(coins)
    for _, children in families:
      first = jnp.cumsum(coins[children], axis=-1) == 1
      taken = taken.at[children].set(coins[children] & first)
    reached = jnp.all(taken[None] | ~lineage, axis=1)
    last = jnp.max(jnp.where(reached, np.arange(1, len(parents) + 1), 0), initial=0)
    residual = log_p[last]  # of a leaf
    for at, children in families:
      # The residual is worked out where it is drawn from, and nowhere else.
      here = jnp.argmax(at == last)
      judged = judge(last, jnp.asarray(children)[here])
      residual = jnp.where(jnp.any(at == last), judged.residual, residual)
    at_level = reached[None] & (depth == levels[:, None])
    path = jnp.max(jnp.where(at_level, np.arange(len(parents))[None], -1), axis=1, initial=-1)
    num_accepted = jnp.sum(reached, dtype=jnp.int32)
    token = _draw(token_key, residual)
    return Verdict(num_accepted, token, accept_prob, path.astype(jnp.int32))

  return functools.partial(_per_row, one)


def block_law(drafts: jax.Array, log_q: jax.Array, log_p: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The coins h [K] of `block` and the residuals [K + 1, V], log-weights, after 0, ..., K drafts.

  Of one row: drafts [K], log_q [K, V], log_p [K + 1, V].
  """
  at = lambda law: jnp.take_along_axis(law, drafts[:, None], axis=-1)[:, 0]
  possible = at(log_q) > -jnp.inf
  steps = jnp.where(possible, at(log_p[:-1]) - jnp.where(possible, at(log_q), 0), -jnp.inf)
  add = lambda ratio, step: (jnp.minimum(ratio + step, 0),) * 2
  start = jnp.zeros((), log_p.dtype)
  log_ratio = jnp.append(start, jax.lax.scan(add, start, steps)[1])
  residual = log_minus(log_ratio[:-1, None] + log_p[:-1], log_q)
  mass = jnp.sum(jnp.exp(residual[1:]), axis=-1)
  rest = mass - jnp.expm1(log_ratio[1:-1])
  # 0/0 where the ratio is 1 and nothing is left: what follows is accepted as well.
  h = jnp.where(rest > 0, mass / jnp.where(rest > 0, rest, 1), 1)
  h = jnp.append(h, jnp.exp(log_ratio[-1]))[: drafts.size]
  return h, _else(jnp.append(residual, log_p[-1:], axis=0), log_p)


def block(
  keys: jax.Array, drafts: jax.Array, draft_logits: jax.Array, target_logits: jax.Array
) -> Verdict:
  """Judges a chain of K drafts as a whole, and so accepts more of it than any chain of coins.

  With r_0 = 1 and r_i = min(1, r_{i-1} p(x_i) / q(x_i)), the drafts up to i are accepted with
  probability r_i. Coins of h_i = m_i / (m_i + 1 - r_i), m_i = sum_v max(r_i p - q, 0), h_K = r_K,
  are tossed and the largest i that comes up is taken; the token is then of max(r_i p - q, 0),
  normalised, or of p after all K. It accepts as many drafts as any lossless rule that is told the
  drafts' conditional laws only.

  Args:
    keys: [...]; drafts: [..., K]; draft_logits: [..., K, V], the laws the drafts are of;
      target_logits: [..., K + 1, V].

  Reference: Sun et al. 2024, arXiv 2403.10444.
  """

  def one(key, drafts, draft_logits, target_logits):
    coin_key, token_key = jax.random.split(key)
    h, residual = block_law(drafts, log_law(draft_logits), log_law(target_logits))
    coins = jax.random.bernoulli(coin_key, h, mode="high")
    numbers = np.arange(1, drafts.size + 1)
    num_accepted = jnp.max(jnp.where(coins, numbers, 0), initial=0).astype(jnp.int32)
    # Given the drafts, i or more are accepted unless all coins from i on fail.
    at_least = 1 - jnp.cumprod(1 - h[::-1])[::-1]
    before = jnp.append(jnp.ones_like(h[:1]), at_least[:-1])
    accept_prob = at_least / jnp.where(before > 0, before, 1)
    path = jnp.where(numbers <= num_accepted, numbers - 1, -1).astype(jnp.int32)
    return Verdict(num_accepted, _draw(token_key, residual[num_accepted]), accept_prob, path)

  return _per_row(one, keys, drafts, draft_logits, target_logits)
