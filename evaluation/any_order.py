"""What a masked model says of short sequences, exactly: over all orders of writing them.

A predictor of masked tokens is a model of x for every order pi of its L positions,
p_pi(x) = prod_k p(x_pi(k) | x_pi(1) .. x_pi(k-1)). Of a predictor whose conditionals are those of
one law all are that law; of any other they differ, and then

    elbo(x) = E_pi log p_pi(x)  <=  log E_pi p_pi(x) = log_likelihood(x).

The first is the bound that is trained (`training.masked`), the second the law of what is sampled
one position at a time in random order: `masked.first_hitting`, and `masked.ancestral` as its steps
get short. Both look at all 2^L sets of masks, so L is small. The predictor is told the share of
positions that are masked as the time.

Reference: Uria et al. 2014, arXiv 1310.1757; Hoogeboom et al. 2021, arXiv 2110.02037.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ..models import base as models

_LONGEST = 16


def elbo(predict: models.Predictor, tokens: jax.Array, *, mask: int) -> jax.Array:
  """E_pi log p_pi(x) of each row, in nats, [B].

  It is sum_M (m - 1)! (L - m)! / L! sum_(i in M) log p(x_i | x without M) over the sets M of m > 0
  masked positions: i is next after the others in that share of orders.

  Args:
    predict: (tokens [B, L], t [B]) -> logits [B, L, V].
    tokens: x, [B, L].
    mask: V.

  Raises:
    ValueError: rows are longer than 16.
  """
  length = tokens.shape[1]
  hidden = ~_known(length)
  weight = [0, *(1 / (m * math.comb(length, m)) for m in range(1, length + 1))]
  weights = np.array(weight, np.float32)[hidden.sum(axis=1)][:, None] * hidden
  total = lambda log_p: jnp.sum(weights * jnp.where(hidden, log_p, 0))
  return _by_row(total, predict, tokens, mask)


def log_likelihood(predict: models.Predictor, tokens: jax.Array, *, mask: int) -> jax.Array:
  """log E_pi p_pi(x) of each row, in nats, [B]; see `elbo`.

  By dynamic programming: f(S), the probability that S is written before the rest and as in x, has
  f({}) = 1 and f(S) = sum_(i in S) f(S - i) p(x_i | x_(S - i)) / (L - |S| + 1).
  """
  length = tokens.shape[1]
  known = _known(length)
  size = known.sum(axis=1)

  def total(log_p):
    reached = jnp.zeros(2**length)
    for k in range(1, length + 1):
      sets = np.flatnonzero(size == k)  # [n]
      last = np.array([np.flatnonzero(known[s]) for s in sets])  # [n, k], the one written last
      before = sets[:, None] - 2**last
      ways = reached[before] + log_p[before, last] - math.log(length - k + 1)
      reached = reached.at[sets].set(jax.nn.logsumexp(ways, axis=1))
    return reached[-1]

  return _by_row(total, predict, tokens, mask)


def order_log_likelihood(
  predict: models.Predictor, tokens: jax.Array, order: Sequence[int], *, mask: int
) -> jax.Array:
  """log p_pi(x) of each row, [B], of one order pi of its positions; L calls.

  Raises:
    ValueError: the order is not one of 0 .. L - 1.
  """
  length = tokens.shape[1]
  if sorted(order) != list(range(length)):
    raise ValueError(f"order={tuple(order)} has to name each of {length} positions once.")
  total = jnp.zeros(tokens.shape[0])
  for k, i in enumerate(order):
    known = np.isin(np.arange(length), order[:k])
    t = jnp.full(tokens.shape[:1], (length - k) / length)
    logits = predict(jnp.where(known[None], tokens, mask), t)
    total += _of_tokens(logits, tokens)[:, i]
  return total


def _known(length: int) -> np.ndarray:
  """[2^L, L] bool: set number n holds the positions of n's bits."""
  if length > _LONGEST:
    raise ValueError(f"Rows of {length} have 2^{length} sets of masks: {_LONGEST} are the most.")
  bits = itertools.product((False, True), repeat=length)
  return np.array(list(bits), bool).reshape(-1, length)[:, ::-1]


def _by_row(
  total: Callable[[jax.Array], jax.Array],
  predict: models.Predictor,
  tokens: jax.Array,
  mask: int,
) -> jax.Array:
  """total(log p(x_i | x_S) [2^L, L], of all sets S of known positions) of every row."""
  known = _known(tokens.shape[1])
  share = jnp.asarray(1 - known.mean(axis=1), jnp.float32)

  def one(row):
    every = jnp.broadcast_to(row[None], known.shape)
    return total(_of_tokens(predict(jnp.where(known, every, mask), share), every))

  return jax.lax.map(one, tokens)


def _of_tokens(logits, tokens):
  """log p [..., L] of tokens [..., L]."""
  log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  return jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]
