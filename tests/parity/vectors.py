"""The logit vectors that parity is judged on, and the judgement.

A filter's result is a multiset of kept logits. Where ours and a peer's differ, there is a reason:

  ties       tokens as good as the last one kept are kept here, a definition
  rounding   what differs is so near the boundary that the precision cannot tell
  underflow  what differs has p < 1e-34, which float32 adds to nothing
"""

import collections
import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import targets
from ancestral.sampling import logits as logits_lib
from parity import boundaries

INF = np.inf
ROWS = {2: 150, 3: 150, 7: 210, 50: 230, 1000: 200, 32_000: 36, 50_257: 24}  # V: rows, 1,000 in all


def _normal(rng, size):
  return rng.normal(size=size) * 2


def _filtered(rng, size):
  z = _normal(rng, size)
  z[rng.permutation(size)[: rng.integers(1, size)]] = -INF
  return z


def _one_hot(low, high):
  return lambda rng, size: np.where(np.arange(size) == rng.integers(size), high, low)


KINDS = {
  "normal": _normal,
  "wide": lambda rng, size: 5 * _normal(rng, size),
  "ties": lambda rng, size: np.round(2 * _normal(rng, size)) / 2,
  "zipf": lambda rng, size: rng.permutation(-1.1 * np.log(np.arange(1, size + 1))),
  "filtered": _filtered,
  "one_hot": _one_hot(-INF, 1.0),
  "nearly_one_hot": _one_hot(0.0, 15.0),
  "uniform": lambda rng, size: np.full(size, rng.normal()),
  "bf16": _normal,  # rounded when it is tempered
}


def row(kind: str, rng: np.random.Generator, size: int) -> np.ndarray:
  """Logits [V] of one kind, at a temperature from 0.1 to 5, float32."""
  z = KINDS[kind](rng, size) / np.exp(rng.uniform(np.log(0.1), np.log(5)))
  return z.astype(ml_dtypes.bfloat16 if kind == "bf16" else np.float32).astype(np.float32)


def batches(seed: int = 0) -> Iterator[tuple[np.random.Generator, np.ndarray]]:
  """1,000 vectors: for each V, a generator for the parameters and logits [B, V]."""
  for size, rows in ROWS.items():
    rng = np.random.default_rng((seed, size))
    kinds = itertools.islice(itertools.cycle(KINDS), rows)
    yield rng, np.stack([row(kind, rng, size) for kind in kinds])


def histories(rng: np.random.Generator, rows: int, size: int, room: int = 24) -> logits_lib.Context:
  """Texts of 1 to `room` tokens, most of them of few different tokens so that they repeat."""
  alphabet = np.minimum(rng.choice([2, 3, 6, size], (rows, 1)), size)
  length = rng.integers(1, room + 1, rows)
  prompt_length = rng.integers(1, length + 1)
  tokens = rng.integers(0, alphabet, (rows, room))  # what lies beyond the length counts for nothing
  return logits_lib.Context(*(np.int32(leaf) for leaf in (tokens, length, prompt_length)))


def text(context: logits_lib.Context, b: int) -> np.ndarray:
  """Row b without its padding."""
  return context.tokens[b, : context.length[b]]


def compiled(make: Callable[..., logits_lib.LogitsTransform]) -> Callable[..., np.ndarray]:
  """(logits [B, V], context, *values [B]) -> what make(*values) makes; one compile per V."""

  @jax.jit
  def apply(logits, context, values):
    transform = make(*values)
    return transform.apply(logits, context, transform.init(logits.shape[0]))

  return lambda logits, context, *values: np.asarray(
    apply(jnp.asarray(logits), context, tuple(jnp.asarray(value) for value in values))
  )


def float32(values: np.ndarray) -> np.ndarray:
  """Numbers that float32 has, so that both sides are given the same."""
  return np.asarray(values, np.float32).astype(np.float64)


def canonical(kept: np.ndarray, row: np.ndarray) -> np.ndarray:
  """As many tokens kept of each value, those of lowest index: [V] bool."""
  _, group, size = np.unique(row, return_inverse=True, return_counts=True)
  rank = np.empty(len(row), int)
  rank[np.argsort(group, kind="stable")] = np.arange(len(row))
  rank -= (np.cumsum(size) - size)[group]  # 0, 1, .. among equals
  return rank < np.bincount(group, kept)[group]


def judge(
  row: np.ndarray,
  ours: np.ndarray,
  theirs: np.ndarray,
  undecided: Callable[[np.ndarray], np.ndarray],
  tie: Callable[[np.ndarray], np.ndarray] | None = None,
) -> str:
  """Compares two filters' results [V] of one row, in a word; raises on what has no reason.

  Args:
    row: the logits given.
    ours: -inf where filtered.
    theirs: the same, by the peer.
    undecided: row -> [V] bool: tokens that rounding may keep or drop, equals kept by index.
    tie: row -> [V]: what ours keeps the smallest of, and all that ties, where theirs does not.
  """
  kept, wanted = ours > -INF, theirs > -INF
  np.testing.assert_array_equal(ours[kept], row[kept])
  np.testing.assert_array_equal(theirs[wanted], row[wanted])
  if np.array_equal(np.sort(ours[kept]), np.sort(theirs[wanted])):
    return "equal"
  differ = canonical(kept, row) != canonical(wanted, row)
  if np.all(boundaries.log_law(row)[differ] < -80):
    return "underflow"
  if tie and np.array_equal(kept, (tie(row) <= tie(row)[wanted].max()) & (row > -INF)):
    return "ties"
  wrong = differ & ~undecided(row)
  assert not wrong.any(), (
    f"{kept.sum()} and {wanted.sum()} kept, wrong: {np.flatnonzero(wrong)[:9]}"
  )
  return "rounding"


def same_law(ours: np.ndarray, theirs: np.ndarray, precision: float = 1e-4) -> None:
  """Asserts that the sorted laws of [B, V] are equal: ours as JAX has it, theirs in float64."""
  out = np.sort(np.asarray(jax.nn.softmax(jnp.asarray(ours))))
  expected = np.sort(targets.softmax(np.float64(theirs)))
  np.testing.assert_allclose(out, expected, rtol=precision, atol=1e-6)


def report(name: str, verdicts: list[str]) -> collections.Counter:
  """Prints a line of the table of docs (pytest -rP) and returns the counts."""
  counts = collections.Counter(verdicts)
  print(f"parity | {name} | {dict(counts)}")
  assert counts.total() == 1000
  return counts
