"""Which rows of a round of rollouts to learn from: with advantages, right ones, pairs, or judged.

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
      group * len(row) + j
      for group, row in enumerate(rewards)
      for j in _different(made.attempts[group].responses, row > 0)[:limit]
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
      responses, first = made.attempts[group].responses, group * len(row)
      best = _different(responses, row == row.max())
      rest = _different(responses, row < row.max(), {responses[j] for j in best})
      found += [
        (first + best[i % len(best)], first + worse) for i, worse in enumerate(rest[:limit])
      ]
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


def judged(made: rollouts.Rollouts, rewards: np.ndarray) -> step.Batch:
  """Every sample, good where its reward is above 0: a `Select` for losses without pairs.

  Returns:
    `sample`, rows; `desirable` [M] bool; and `weight` [M], which is 1.
  """
  sample = _rows(made.rows, np.arange(rewards.size))
  desirable = rewards.ravel() > 0
  return {"sample": sample, "desirable": desirable, "weight": np.ones(rewards.size, np.float32)}


def judged_and_mismatched(made: rollouts.Rollouts, rewards: np.ndarray) -> step.Batch:
  """The same and `mismatched`: each row's prompt with a sample of the next problem, cyclically.

  Their log-ratios estimate KTO's reference point (Ethayarajh et al. 2024, arXiv 2402.01306).

  Raises:
    ValueError: there is one problem only.
  """
  problems, group_size = rewards.shape
  if problems < 2:
    raise ValueError("Mismatched samples are of another problem, and a round has one: give more.")
  others = np.roll(np.arange(rewards.size), -group_size)
  return {**judged(made, rewards), "mismatched": _answered(made.rows, others)}


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


def _answered(rows, others) -> rollouts.Rows:
  """Row i with the tokens drawn in row others[i] in place of its own.

  Rows have room for the longest prompt and the most that is drawn, so each fits.
  """
  tokens, targets, mask = (np.zeros_like(rows[name]) for name in ("tokens", "targets", "mask"))
  for row, other in enumerate(others):
    drawn, start = _drawn(rows, other), int(np.argmax(rows["mask"][row] != 0))
    end = start + len(drawn)
    sequence = [*rows["tokens"][row, : start + 1], *drawn]
    tokens[row, :end], targets[row, :end] = sequence[:-1], sequence[1:]
    mask[row, start:end] = 1
  return {"tokens": tokens, "targets": targets, "mask": mask}


def _with_advantage(rows, index, advantage) -> step.Batch:
  chosen = _rows(rows, index)
  return {
    **chosen,
    "advantage": advantage[:, None] * chosen["mask"],
    "old_log_prob": chosen["log_prob"],
  }


def _drawn(rows, row) -> list[int]:
  return rows["targets"][row][rows["mask"][row] != 0].tolist()


def _different(responses, wanted, but=()) -> list[int]:
  """Of a group's wanted samples [G] bool, the first of each text that is not in `but`."""
  first: dict[str, int] = {}
  for j in np.flatnonzero(wanted):
    if responses[j] not in but:
      first.setdefault(responses[j], int(j))
  return list(first.values())
