"""Counts of token sequences in a corpus: a sorted table, built on the host and read under jit."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_END = -1  # after the last token of a document: before every token in the order
_ANY = -2  # fills a query up: before _END


class NgramTable(NamedTuple):
  """The distinct runs of N tokens of a corpus, in lexicographic order, and how many come before.

  Sequences that begin alike lie together, so the count of any sequence of up to N tokens is the
  difference of two places, and exact. 4 (N + 1) bytes for each distinct run.
  """

  grams: jax.Array  # [U, N] int32; a document's last runs are filled up with -1
  before: jax.Array  # [U + 1] int32: occurrences of the runs before the u-th

  @property
  def order(self) -> int:
    """N, the longest sequence that can be counted."""
    return self.grams.shape[1]


def build(documents: Iterable[Sequence[int]], order: int) -> NgramTable:
  """Counts every run of `order` tokens, on the host; none crosses the end of a document.

  Args:
    documents: token sequences, lists or integer arrays.
    order: N, from 1 to 30.

  Raises:
    ValueError: there is no token, a negative one, or no order.
  """
  if not 1 <= order <= 30:
    raise ValueError(f"order={order}: it has to be from 1 to 30.")
  parts = [np.asarray(document, np.int32) for document in documents]
  parts = [part for part in parts if part.size]
  if not parts or min(part.min() for part in parts) < 0:
    raise ValueError("An n-gram table needs at least one token, and tokens of at least 0.")
  padding = np.full(order - 1, _END, np.int32)
  runs = [
    np.lib.stride_tricks.sliding_window_view(np.concatenate([part, padding]), order)
    for part in parts
  ]
  runs = np.concatenate(runs)
  runs = runs[np.lexsort(runs.T[::-1])]
  is_new = np.concatenate([[True], np.any(runs[1:] != runs[:-1], axis=1)])
  before = np.append(np.flatnonzero(is_new), len(runs))
  return NgramTable(jnp.asarray(runs[is_new]), jnp.asarray(before, jnp.int32))


def count(table: NgramTable, sequences: jax.Array) -> jax.Array:
  """Occurrences [...] int32 of token sequences [..., n], n from 1 to N."""
  return jnp.diff(_before(table, _around(table, sequences, sequences)), axis=-1)[..., 0]


def count_followed(table: NgramTable, sequences: jax.Array) -> jax.Array:
  """Occurrences [...] int32 of sequences [..., n], n below N, that another token follows."""
  return jnp.diff(_before(table, _around(table, _first(sequences), sequences)), axis=-1)[..., 0]


def interpolated(
  table: NgramTable,
  weights: Sequence[float] | jax.Array,
  tokens: jax.Array,
  length: jax.Array,
  candidates: jax.Array,
) -> jax.Array:
  """sum_n weights[n - 2] count(c_n v) / count(c_n followed by a token), n = 2, 3, ...

  c_n are the last n - 1 tokens. An order whose context is longer than the row, or does not occur,
  adds 0 (the weights are not rescaled).

  Args:
    table: of an order of at least len(weights) + 1.
    weights: [W], of orders 2 to W + 1.
    tokens: [..., S].
    length: [...], of the tokens that are there.
    candidates: [..., M], tokens v.

  Returns:
    [..., M] float32.
  """
  weights = jnp.asarray(weights, jnp.float32)
  most = weights.shape[0]
  if most >= table.order:
    raise ValueError(
      f"{most} weights are of orders 2 to {most + 1}; the table counts up to {table.order}: build "
      f"it with order={most + 1}."
    )
  queries = []  # of all orders, for one search: [..., 1 + M, 2, N] each
  for size in range(1, most + 1):
    places = length[..., None] - size + jnp.arange(size).reshape((1,) * length.ndim + (-1,))
    context = jnp.take_along_axis(tokens, jnp.maximum(places, 0), axis=-1)[..., None, :]
    each = jnp.broadcast_to(context, (*candidates.shape, size))
    joint = jnp.concatenate([each, candidates[..., None]], axis=-1)
    whole = _around(table, _first(context), context)
    queries.append(jnp.concatenate([whole, _around(table, joint, joint)], axis=-3))
  counts = jnp.diff(_before(table, jnp.stack(queries)), axis=-1)[..., 0]  # [W, ..., 1 + M]
  whole, joint = counts[..., :1], counts[..., 1:]
  sizes = jnp.arange(1, most + 1).reshape((-1,) + (1,) * length.ndim)
  known = (whole > 0) & (length[None] >= sizes)[..., None]
  shares = jnp.where(known, joint / jnp.where(known, whole, 1), 0)
  return jnp.sum(weights.reshape((-1,) + (1,) * candidates.ndim) * shares, axis=0)


def _first(sequences):
  """The sequences [..., n] followed by token 0: [..., n + 1]."""
  return jnp.pad(sequences, [(0, 0)] * (sequences.ndim - 1) + [(0, 1)])


def _around(table, start, sequences):
  """Queries [..., 2, N]: `start` [..., m], and what comes after all that begin as `sequences`."""

  def fill(rows):
    missing = table.order - rows.shape[-1]
    widths = [(0, 0)] * (rows.ndim - 1) + [(0, missing)]
    return jnp.pad(rows, widths, constant_values=_ANY)

  return jnp.stack([fill(start), fill(sequences.at[..., -1].add(1))], axis=-2)


def _before(table, queries):
  """Occurrences in the corpus that come before queries [..., N] in the order: a bisection."""
  # The sign of the first difference decides: it outweighs all the later ones together.
  places = 1 << np.arange(table.order - 1, -1, -1, dtype=np.int32)
  places = jnp.asarray(places).reshape((1,) * (queries.ndim - 1) + (-1,))

  def halve(_, bounds):
    low, high = bounds
    middle = (low + high) // 2
    less = jnp.sum(jnp.sign(table.grams[middle] - queries) * places, axis=-1) < 0
    is_open = low < high
    low = jnp.where(is_open & less, middle + 1, low)
    return low, jnp.where(is_open & ~less, middle, high)

  low = jnp.zeros(queries.shape[:-1], jnp.int32)
  size = table.grams.shape[0]
  bounds = low, jnp.full_like(low, size)
  return table.before[jax.lax.fori_loop(0, size.bit_length(), halve, bounds)[0]]
