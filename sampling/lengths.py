"""How many tokens to draft: what a round of speculative decoding earns and costs, and when to stop.

A round drafts k tokens, one after the other, and verifies them in one call of the target. Costs are
in units of a plain step of the target: a draft costs c, verifying k + 1 tokens v[k]. With a_i the
probability that draft i is accepted if those before it are, a round yields
1 + sum_{j<=k} prod_{i<=j} a_i tokens on average. Theory on the host, in float64; `confidence` is
what a drafter stops by.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..models import base as models
from ..models import confidence as heads
from . import drafting
from . import logits as logits_lib


def expected_tokens(accept: float, num_drafts: int) -> float:
  """(1 - a^(k+1)) / (1 - a), tokens of a round of k drafts, each accepted with probability a.

  As the sum of a^i, which loses nothing as a goes to 1.

  Reference: Leviathan et al. 2022, arXiv 2211.17192, equation 1.
  """
  return float(np.sum(np.float64(accept) ** np.arange(num_drafts + 1)))


def speed_up(accept: float, num_drafts: int, draft_cost: float, verify_cost: np.ndarray) -> float:
  """E / (v[k] + k c), tokens per plain step of the target.

  Args:
    accept: a, of each draft, whatever the others.
    num_drafts: k.
    draft_cost: c.
    verify_cost: v [K + 1].
  """
  cost = verify_cost[num_drafts] + num_drafts * draft_cost
  return expected_tokens(accept, num_drafts) / float(cost)


def best_fixed(accept: float, draft_cost: float, verify_cost: np.ndarray) -> int:
  """The number of drafts, 0 to K, of the largest `speed_up`; of equals, the least."""
  every = range(len(verify_cost))
  return int(np.argmax([speed_up(accept, k, draft_cost, verify_cost) for k in every]))


class Policy(NamedTuple):
  """After k drafts, draft on while 1 - (the probability that all stand) <= thresholds[k]."""

  thresholds: np.ndarray  # [K] float64; -1 where one never goes on
  rate: float  # expected tokens of a round / its expected cost


def optimal_stopping(
  values: np.ndarray,
  weights: np.ndarray,
  draft_cost: float,
  verify_cost: np.ndarray,
  *,
  num_cells: int = 2048,
) -> Policy:
  """The policy of most tokens per cost, where each draft's acceptance is seen once it is drawn.

  Acceptances are independent draws of a discrete law. By renewal, the long-run rate of a policy is
  E[tokens] / E[cost] of a round, and the best rate lambda is where max E[tokens - lambda cost] = 0.
  With s the probability that all k drafts stand, what going on adds to it is

    W_k(s) = max(0, E[s a + W_{k+1}(s a)] - lambda (c + v[k+1] - v[k])),  W_K = 0.

  The second term grows with s, by induction, so the policy is a threshold on s for each k. Where v
  is convex, looking one draft ahead is enough: s falls and the next draft's cost does not, so once
  it does not pay none after it will, and all there is to it is

    thresholds[k] = 1 - lambda (c + v[k+1] - v[k]) / E a,

  the same for all k where v is a line. In general W is needed. It is convex and piecewise linear,
  held on a grid of s over [0, 1] and interpolated linearly: too high by O(1 / num_cells^2). lambda
  is found by Newton's method on the convex value (Dinkelbach).

  Args:
    values: [N] in [0, 1].
    weights: [N], sums to 1.
    draft_cost: c.
    verify_cost: v [K + 1].
    num_cells: of the grid.

  Raises:
    ValueError: the law is none.

  Reference: Huang et al. 2024 (SpecDec++), arXiv 2405.19715, for stopping as a Markov decision
  process and its thresholds; Dinkelbach 1967, Management Science 13, 492-498.
  """
  values, weights = np.asarray(values, np.float64), np.asarray(weights, np.float64)
  if not (np.all((values >= 0) & (values <= 1)) and np.all(weights >= 0)):
    raise ValueError("values are acceptance probabilities, in [0, 1], and weights at least 0.")
  if abs(weights.sum() - 1) > 1e-9:
    raise ValueError(f"The weights sum to {weights.sum()}: they are a law, and sum to 1.")
  survival = np.linspace(0, 1, num_cells + 1)
  average = _average(values, weights, num_cells)
  mean = survival * np.dot(values, weights)
  extra = draft_cost + np.diff(np.asarray(verify_cost, np.float64))
  rate = 1 / float(verify_cost[0])
  for _ in range(100):
    value, cost = np.zeros_like(survival), np.zeros_like(survival)
    thresholds = []
    for step in extra[::-1]:
      gain = mean + average @ value - rate * step
      cost = np.where(gain > 0, step + average @ cost, 0)
      value = np.maximum(gain, 0)
      thresholds.append(_threshold(survival, gain))
    move = (1 - rate * verify_cost[0] + value[-1]) / (verify_cost[0] + cost[-1])
    rate += float(move)
    if abs(move) <= 1e-12 * rate:
      break
  return Policy(np.array(thresholds[::-1]), rate)


def _average(values, weights, num_cells):
  """The matrix that takes a function on the grid to E f(s a), interpolated, on the grid."""
  place = np.arange(num_cells + 1)[:, None] * values[None, :]
  low = np.minimum(place.astype(int), num_cells - 1)
  matrix = np.zeros((num_cells + 1, num_cells + 1))
  rows = np.broadcast_to(np.arange(num_cells + 1)[:, None], low.shape)
  np.add.at(matrix, (rows, low), weights[None, :] * (1 - (place - low)))
  np.add.at(matrix, (rows, low + 1), weights[None, :] * (place - low))
  return matrix


def _threshold(survival, gain):
  """1 - s at the root of the gain, which grows with s."""
  if gain[-1] <= 0:
    return -1.0
  first = int(np.argmax(gain > 0))
  if first == 0:
    return 1.0
  low, high = gain[first - 1], gain[first]
  return 1 - (survival[first] - (survival[first] - survival[first - 1]) * high / (high - low))


def num_drafted(survival: np.ndarray, thresholds: float | np.ndarray) -> np.ndarray:
  """How many drafts rounds make under a threshold policy, [...], as `drafting.chain_of` does.

  There a round drafts at least once; here not at all if 0 > thresholds[0].

  Args:
    survival: [..., K], the estimated probability that drafts 1 to k all stand.
    thresholds: scalar or [K]; see `Policy`.
  """
  before = np.concatenate([np.ones_like(survival[..., :1]), survival[..., :-1]], axis=-1)
  return np.cumprod(1 - before <= thresholds, axis=-1).sum(axis=-1)


def outcome(
  accept: np.ndarray, num_drafts: np.ndarray, draft_cost: float, verify_cost: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Expected tokens [...] of rounds, given their drafts, and their cost [...].

  Args:
    accept: [..., K], each draft's probability to be accepted if those before it are.
    num_drafts: [...], how many of them the round made.
    draft_cost: c.
    verify_cost: v [K + 1].
  """
  made = np.arange(accept.shape[-1]) < np.asarray(num_drafts)[..., None]
  tokens = 1 + np.sum(np.where(made, np.cumprod(accept, axis=-1), 0), axis=-1)
  return tokens, np.asarray(verify_cost)[num_drafts] + draft_cost * num_drafts


def rate(
  accept: np.ndarray, num_drafts: np.ndarray, draft_cost: float, verify_cost: np.ndarray
) -> float:
  """Tokens per cost of all rounds together; see `outcome`."""
  tokens, cost = outcome(accept, num_drafts, draft_cost, verify_cost)
  return float(tokens.sum() / cost.sum())


def best_threshold(
  survival: np.ndarray,
  accept: np.ndarray,
  draft_cost: float,
  verify_cost: np.ndarray,
  *,
  num_tried: int = 201,
) -> float:
  """The threshold of most tokens per cost over some rounds, among quantiles of 1 - survival.

  Args:
    survival: [..., K], what the threshold is on; see `num_drafted`.
    accept: [..., K], the true probabilities; see `outcome`.
    draft_cost: c.
    verify_cost: v [K + 1].
    num_tried: quantiles.
  """
  tried = np.quantile(1 - survival, np.linspace(0, 1, num_tried))
  made = [num_drafted(survival, h) for h in tried]
  return float(tried[np.argmax([rate(accept, one, draft_cost, verify_cost) for one in made])])


def hindsight(accept: np.ndarray, draft_cost: float, verify_cost: np.ndarray) -> np.ndarray:
  """The numbers of drafts [...] of most tokens per cost, were all acceptances known beforehand.

  No policy that decides draft by draft does better. As in `optimal_stopping`, each round takes the
  k of most tokens - lambda cost, and lambda is the rate that comes of it.

  Args:
    accept: [..., K].
    draft_cost: c.
    verify_cost: v [K + 1].
  """
  start = np.ones_like(accept[..., :1])
  tokens = np.cumsum(np.cumprod(np.concatenate([start, accept], axis=-1), axis=-1), axis=-1)
  cost = np.asarray(verify_cost) + draft_cost * np.arange(tokens.shape[-1])
  value, before = 1 / cost[0], 0.0
  while value > before * (1 + 1e-12):
    made = np.argmax(tokens - value * cost, axis=-1)
    before, value = value, rate(accept, made, draft_cost, verify_cost)
  return made


class Roofline(NamedTuple):
  """A target and a machine: a call takes as long as its memory traffic, or as its arithmetic."""

  num_parameters: float  # N; a token costs 2 N FLOP
  weight_bytes: float  # W
  flops: float  # F, FLOP/s
  bandwidth: float  # bytes/s
  cache_bytes: float = 0.0  # keys and values that a row reads

  def seconds(self, num_tokens: int, batch_size: float) -> float:
    """Of a call on `num_tokens` tokens of each row."""
    memory = (self.weight_bytes + batch_size * self.cache_bytes) / self.bandwidth
    return max(memory, 2 * self.num_parameters * num_tokens * batch_size / self.flops)

  def verify_cost(self, num_drafts: int, batch_size: float) -> float:
    """v: seconds to verify k drafts in each row / seconds of a plain step."""
    return self.seconds(num_drafts + 1, batch_size) / self.seconds(1, batch_size)


def crossover(accept: float, num_drafts: int, draft_cost: float, roofline: Roofline) -> float:
  """The least batch size at which k drafts do not pay: E / (v + k c) <= 1; inf if they always do.

  Speculation spends idle arithmetic. v grows from 1, when weights take all the time, to at most
  k + 1, so it stops paying where v = E - k c =: u. There the plain step is still bound by memory
  (or about to leave it, as u <= k + 1), so 2 N (k + 1) B / F = u (W + B C) / bandwidth.

  Args:
    accept: a, of each draft.
    num_drafts: k, at least 1.
    draft_cost: c, in plain steps at the same batch size.
    roofline: of the target.

  Raises:
    ValueError: there is no draft.
  """
  if num_drafts < 1:
    raise ValueError(f"num_drafts={num_drafts}: without a draft there is nothing to pay.")
  u = expected_tokens(accept, num_drafts) - num_drafts * draft_cost
  if u <= roofline.verify_cost(num_drafts, 1):
    return 1.0
  per_row = 2 * roofline.num_parameters * (num_drafts + 1) / roofline.flops
  per_row -= u * roofline.cache_bytes / roofline.bandwidth
  if per_row <= 0:
    return math.inf
  return float(math.ceil(u * roofline.weight_bytes / roofline.bandwidth / per_row))


def own_probability(hidden: jax.Array, token: jax.Array, logits: jax.Array) -> jax.Array:
  """q(draft), [B], a `drafting.Confidence` that needs no head: a draft model that is sure is right.

  It is below the acceptance, so thresholds are higher than those of a calibrated head.
  """
  del hidden
  return jnp.exp(logits_lib.log_prob(logits, token))


def confidence(
  head: heads.Head, head_params: models.Params, embed: Callable[[jax.Array], jax.Array]
) -> drafting.Confidence:
  """A trained acceptance head as what `drafting.by_model` stops by.

  Args:
    head: see `models.confidence`.
    head_params: its parameters.
    embed: tokens -> [..., D], the draft model's.
  """

  def accepted(hidden, token, logits):
    return jax.nn.sigmoid(head.logit(head_params, heads.features(hidden, token, logits, embed)))

  return accepted
