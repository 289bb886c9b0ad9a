"""Exact laws of what masked samplers draw, on laws small enough to be enumerated.

A sampler that unmasks positions independently of what is written passes from one set of written
positions to the next, and what it draws can be followed as an array for every set: a sampler is
checked against its own law, and its law against the data's, without a noise floor.
"""

import itertools
from collections.abc import Sequence

import numpy as np


def conditionals(joint: np.ndarray, given: Sequence[int]) -> dict[int, np.ndarray]:
  """p(x_i | x_S) of every i that is not in S, as arrays that broadcast to [V] * L.

  Args:
    joint: probabilities [V] * L.
    given: S. Where its tokens have probability 0, the conditionals are 0 too.
  """
  length = joint.ndim
  marginal = lambda kept: joint.sum(
    axis=tuple(i for i in range(length) if i not in kept), keepdims=True
  )
  below = marginal(set(given))
  found = {}
  for i in set(range(length)) - set(given):
    above = marginal({*given, i})
    found[i] = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
  return found


def ancestral_law(joint: np.ndarray, unmask_probs: Sequence[float]) -> np.ndarray:
  """The law [V] * L that `masked.ancestral` draws with the exact predictor of a law.

  Args:
    joint: probabilities [V] * L.
    unmask_probs: of each step, `mask_schedules.unmask_prob`; the last is 1.
  """
  length = joint.ndim
  subsets = [s for n in range(length + 1) for s in itertools.combinations(range(length), n)]
  known = {s: conditionals(joint, s) for s in subsets}
  reached = {(): np.ones((1,) * length)}  # set written -> probability of each content
  for prob in unmask_probs:
    following: dict[tuple[int, ...], np.ndarray] = {}
    for written, mass in reached.items():
      rest = [i for i in range(length) if i not in written]
      for chosen in (c for n in range(len(rest) + 1) for c in itertools.combinations(rest, n)):
        weight = prob ** len(chosen) * (1 - prob) ** (len(rest) - len(chosen))
        if weight == 0:
          continue
        moved = weight * mass
        for i in chosen:
          moved = moved * known[written][i]
        target = tuple(sorted(written + chosen))
        following[target] = following.get(target, 0) + moved
    reached = following
  return reached[tuple(range(length))]
