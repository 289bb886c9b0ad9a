"""Counts against collections.Counter, and the interpolation against plain Python."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.sampling import ngram

RNG = np.random.default_rng(0)
DOCUMENTS = [RNG.integers(0, 4, size).tolist() for size in (300, 1, 2, 57)]


def counter(size):
  """Every run of `size` tokens within a document."""
  return collections.Counter(
    tuple(document[i : i + size]) for document in DOCUMENTS for i in range(len(document) - size + 1)
  )


count = jax.jit(ngram.count)
count_followed = jax.jit(ngram.count_followed)
interpolated = jax.jit(ngram.interpolated)


@pytest.mark.parametrize("order, sizes", [(1, [1]), (6, [1, 2, 6])])
def test_counts_are_exact(order, sizes):
  table = ngram.build(DOCUMENTS, order)
  assert table.order == order and int(table.before[-1]) == sum(map(len, DOCUMENTS))
  for size in sizes:
    expected = counter(size)
    # Everything that occurs, what does not, and tokens that the corpus has none of.
    asked = [*expected, *map(tuple, RNG.integers(0, 6, (200, size)).tolist())]
    counted = count(table, jnp.asarray(asked, jnp.int32))
    assert counted.dtype == jnp.int32
    np.testing.assert_array_equal(counted, [expected[sequence] for sequence in asked])
    assert size < 5 or 0 in counted


def test_what_follows_a_context_does_not_cross_documents():
  table = ngram.build(DOCUMENTS, 4)
  longer, contexts = counter(3), list(counter(2))
  expected = [sum(n for run, n in longer.items() if run[:2] == c) for c in contexts]
  asked = jnp.asarray(contexts, jnp.int32)
  followed = count_followed(table, asked)
  np.testing.assert_array_equal(followed, expected)
  assert np.any(np.asarray(count(table, asked)) > followed)


def test_any_leading_shape():
  table = ngram.build(DOCUMENTS, 3)
  asked = RNG.integers(0, 4, (2, 3, 5, 2)).astype(np.int32)
  expected = counter(2)
  flat = [expected[tuple(run)] for run in asked.reshape(-1, 2).tolist()]
  np.testing.assert_array_equal(count(table, asked), np.reshape(flat, (2, 3, 5)))


def test_interpolation_equals_the_sum_over_orders():
  weights = (0.01, 0.04, 0.15, 0.18, 0.12)
  table = ngram.build(DOCUMENTS, 6)
  tokens = RNG.integers(0, 4, (3, 2, 12)).astype(np.int32)
  tokens[0, 0, :5] = DOCUMENTS[0][40:45]  # a context of every order
  length = np.array([[5, 9], [1, 2], [12, 4]], np.int32)
  candidates = np.broadcast_to(np.array([0, 3, 2, 5], np.int32), (3, 2, 4))
  out = interpolated(table, weights, tokens, length, candidates)
  for b, i in np.ndindex(3, 2):
    row = tokens[b, i, : length[b, i]].tolist()
    for c, candidate in enumerate(candidates[b, i].tolist()):
      expected = 0.0
      for n, weight in enumerate(weights, start=2):
        context, runs = tuple(row[-(n - 1) :]), counter(n)
        whole = sum(runs[*context, v] for v in range(6)) if len(row) >= n - 1 else 0
        expected += weight * runs[*context, candidate] / whole if whole else 0
      np.testing.assert_allclose(out[b, i, c], expected, atol=1e-6)
  np.testing.assert_allclose(out[..., 3], 0)
  assert np.all(np.sum(out, axis=-1) <= sum(weights) + 1e-6)


def test_all_candidates_of_a_known_context_sum_to_the_weights():
  table = ngram.build(DOCUMENTS, 3)
  tokens = jnp.asarray([DOCUMENTS[0][10:14]], jnp.int32)
  out = interpolated(table, (0.3, 0.5), tokens, jnp.array([4]), jnp.arange(4)[None])
  np.testing.assert_allclose(np.sum(out), 0.8, atol=1e-6)


@pytest.mark.parametrize(
  "documents, order, message",
  [
    ([], 2, "at least one token"),
    ([[]], 2, "at least one token"),
    ([[1, -1]], 2, "tokens of at least 0"),
    ([[1]], 0, "order=0"),
    ([[1]], 31, "order=31"),
  ],
)
def test_bad_corpora_are_named(documents, order, message):
  with pytest.raises(ValueError, match=message) as error:
    ngram.build(documents, order)
  assert "\n" not in str(error.value)


def test_weights_beyond_the_table_are_refused():
  table = ngram.build(DOCUMENTS, 3)
  tokens = jnp.zeros((1, 4), jnp.int32)
  with pytest.raises(ValueError, match="orders 2 to 4; the table counts up to 3"):
    ngram.interpolated(table, (0.1, 0.2, 0.3), tokens, jnp.array([4]), jnp.zeros((1, 2), jnp.int32))
