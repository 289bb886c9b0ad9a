"""Which rows of a round of rollouts to learn from, and how: advantages, right answers, or pairs.

Each is a `Select`, composed with the functions of `advantages` and `stepwise`; rewards decide, and
no right answer but the model's own is read.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from . import rollouts, step, stepwise

# (rollouts, rewards [P, G]) -> what to learn from, numpy, leaves [M, ...]
Select = Callable[[rollouts.Rollouts, np.ndarray], step.Batch]

# (rewards [P, G], lengths [P, G]) -> [P, G]
Advantage = Callable[[np.ndarray, np.ndarray], np.ndarray]

# (tokens drawn that are chosen, those rejected) -> a weight for each of both
PairWeights = Callable[[Sequence[int], Sequence[int]], tuple[np.ndarray, np.ndarray]]


def all_samples(advantage: Advantage) -> Select:
  """Every sample, with its advantage: policy gradients."""

  def select(made, rewards):
    values = np.asarray(advantage(rewards, made.lengths), np.float32)
    return _with_advantage(made.rows, np.arange(rewards.size), values.ravel())

  return select


def right_samples(limit: int) -> Select:
  """Up to `limit` different samples of each prompt of reward above 0, with advantage 1: imitation.

  With limit 1 and verified answers it is RAFT (Dong et al. 2023, arXiv 2304.06767), which keeps the
  best of G; a prompt without a right answer gives none. With more it is rejection sampling, or a
  round of expert iteration.
  """

  def select(made, rewards):
    chosen = [
      index
      for group in range(len(rewards))
      for index in _different(made, rewards > 0, group)[:limit]
    ]
    return _with_advantage(made.rows, np.array(chosen, int), np.ones(len(chosen), np.float32))

  return select


def whole(chosen: Sequence[int], rejected: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
  """Pair weights 1: responses are compared as they are."""
  return np.ones(len(chosen), np.float32), np.ones(len(rejected), np.float32)


def first_difference(
  chosen: Sequence[int], rejected: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
  """Pair weights 1 for the first token that differs, else 0: Step-DPO where each token is a step.

  What comes before is shared; what comes after a wrong step follows from it.

  Reference: Lai et al. 2024 (Step-DPO), arXiv 2406.18629.
  """
  return tuple(
    (np.cumsum(weight) * weight == 1).astype(np.float32)
    for weight in stepwise.after_divergence(chosen, rejected)
  )


def pairs(limit: int, weights: PairWeights = whole) -> Select:
  """Up to `limit` pairs of each prompt: a sample of the highest reward, and one of less.

  Samples are different; each worse one goes, in the order of drawing, with the next of the best
  ones, which are repeated where they are fewer.

  Returns (of the Select):
    `chosen` and `rejected`, rows with `weight` [M, L], and `weight` [M], which is 1.
  """

  def select(made, rewards):
    found = []
    for group, row in enumerate(rewards):
      best = _different(made, rewards == row.max(), group)
      rest = _different(made, rewards < row.max(), group)
      found += [(best[i % len(best)], worse) for i, worse in enumerate(rest[:limit])]
    found = np.array(found, int).reshape(-1, 2)
    chosen, rejected = (_rows(made.rows, side) for side in found.T)
    for side in (chosen, rejected):
      side["weight"] = np.zeros_like(side["mask"])
    for row in range(len(found)):
      sides = chosen, rejected
      for side, weight in zip(sides, weights(*(_drawn(side, row) for side in sides)), strict=True):
        side["weight"][row, side["mask"][row] != 0] = weight
    return {"chosen": chosen, "rejected": rejected, "weight": np.ones(len(found), np.float32)}

  return select


def filled(batch: step.Batch, capacity: int) -> step.Batch:
  """The same with `capacity` rows; those that are added have mask, advantage and weight 0.

  Raises:
    ValueError: it has more.
  """

  def fill(x):
    if len(x) > capacity:
      raise ValueError(f"{len(x)} rows to learn from, more than the {capacity} of a round.")
    return np.pad(x, ((0, capacity - len(x)),) + ((0, 0),) * (x.ndim - 1))

  return jax.tree.map(fill, batch)


def _rows(rows: rollouts.Rows, index: np.ndarray) -> rollouts.Rows:
  return {name: np.asarray(x)[index] for name, x in rows.items()}


def _with_advantage(rows, index, advantage) -> step.Batch:
  chosen = _rows(rows, index)
  return {
    **chosen,
    "advantage": advantage[:, None] * chosen["mask"],
    "old_log_prob": chosen["log_prob"],
  }


def _drawn(rows, row) -> list[int]:
  return rows["targets"][row][rows["mask"][row] != 0].tolist()


def _different(made, wanted, group) -> list[int]:
  """Of a group's wanted samples [P, G] bool, the first of each text; indices of rows."""
  first, size = {}, wanted.shape[1]
  for j in np.flatnonzero(wanted[group]):
    first.setdefault(made.attempts[group].responses[j], group * size + j)
  return list(first.values())
