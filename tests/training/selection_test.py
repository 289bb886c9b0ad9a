"""What is selected of hand-made rollouts."""

import jax
import numpy as np
import pytest

from ancestral.evaluation import attempts
from ancestral.tasks import base as tasks
from ancestral.training import advantages, rollouts, selection

# Two problems, four samples each: their tokens, and whether they are right.
SAMPLES = [
  [([5, 6, 2], 1), ([5, 6, 2], 1), ([5, 7, 2], 0), ([8, 2], 0)],
  [([9, 2], 0), ([9, 2], 0), ([3, 9, 9, 2], 0), ([4, 2], 0)],
]
LENGTH = 6  # one token of prompt, at most four drawn, one of padding


def made():
  rows = {name: np.zeros((8, LENGTH)) for name in ("tokens", "targets", "mask", "log_prob")}
  problem = tasks.Problem("", "", {})
  found = []
  for i, group in enumerate(SAMPLES):
    for j, (drawn, _) in enumerate(group):
      row, width = i * 4 + j, len(drawn)
      rows["tokens"][row, : width + 1] = [1, *drawn]
      rows["targets"][row, :width] = drawn
      rows["mask"][row, :width] = 1
      rows["log_prob"][row, :width] = -0.1 * np.arange(1, width + 1)
    verdicts = tuple(tasks.Verification(bool(right), "") for _, right in group)
    texts = tuple(str(drawn) for drawn, _ in group)
    found.append(attempts.Attempt(problem, texts, verdicts, False))
  lengths = np.array([[len(drawn) for drawn, _ in group] for group in SAMPLES])
  return rollouts.Rollouts(found, lengths, rows, {})


REWARDS = np.array([[right for _, right in group] for group in SAMPLES], np.float32)


def test_every_sample_has_its_advantage_on_its_own_tokens():
  advantage = lambda rewards, lengths: np.asarray(advantages.leave_one_out(rewards))
  batch = selection.all_samples(advantage)(made(), REWARDS)
  expected = np.array([2 / 3, 2 / 3, -2 / 3, -2 / 3, 0, 0, 0, 0])
  mask = made().rows["mask"]
  np.testing.assert_allclose(batch["advantage"], expected[:, None] * mask, rtol=1e-6)
  np.testing.assert_array_equal(batch["old_log_prob"], made().rows["log_prob"])


@pytest.mark.parametrize("limit", [1, 4])
def test_right_samples_are_different_ones_and_wrong_ones_never(limit):
  batch = selection.right_samples(limit)(made(), REWARDS)
  np.testing.assert_array_equal(batch["targets"][:, :3], [[5, 6, 2]])  # the second is a repetition
  np.testing.assert_array_equal(batch["advantage"], batch["mask"])
  assert not len(selection.right_samples(limit)(made(), 0 * REWARDS)["targets"])


def test_pairs_are_of_a_better_and_a_worse_sample():
  batch = selection.pairs(2)(made(), REWARDS)
  np.testing.assert_array_equal(batch["chosen"]["targets"][:, :3], [[5, 6, 2]] * 2)
  np.testing.assert_array_equal(batch["rejected"]["targets"][:, :3], [[5, 7, 2], [8, 2, 0]])
  for side in ("chosen", "rejected"):
    np.testing.assert_array_equal(batch[side]["weight"], batch[side]["mask"])
  np.testing.assert_array_equal(batch["weight"], [1, 1])
  assert len(selection.pairs(1)(made(), REWARDS)["weight"]) == 1
  graded = REWARDS + np.array([[0, 0, 0, 0], [0, 0, 0.5, 0.2]])  # the second group has a best now
  assert len(selection.pairs(4)(made(), graded)["weight"]) == 2 + 2
  assert not len(selection.pairs(4)(made(), 0 * REWARDS)["weight"])


def test_a_pair_is_compared_at_the_first_step_that_differs():
  batch = selection.pairs(2, selection.first_difference)(made(), REWARDS)
  np.testing.assert_array_equal(batch["chosen"]["weight"][:, :3], [[0, 1, 0], [1, 0, 0]])
  np.testing.assert_array_equal(batch["rejected"]["weight"][:, :3], [[0, 1, 0], [1, 0, 0]])


def test_filling_adds_rows_that_weigh_nothing():
  batch = selection.pairs(2)(made(), REWARDS)
  full = selection.filled(batch, 5)
  assert {len(leaf) for leaf in jax.tree.leaves(full)} == {5}
  np.testing.assert_array_equal(full["weight"], [1, 1, 0, 0, 0])
  assert not full["chosen"]["mask"][2:].any()
  with pytest.raises(ValueError, match="2 rows to learn from, more than the 1"):
    selection.filled(batch, 1)


def test_judged_samples_are_all_of_them_with_what_the_reward_says():
  batch = selection.judged(made(), REWARDS - np.array([[0, 1, 0, 0], [0, -0.5, 0, 0]]))
  np.testing.assert_array_equal(batch["desirable"], [1, 0, 0, 0, 0, 1, 0, 0])
  np.testing.assert_array_equal(batch["weight"], np.ones(8))
  jax.tree.map(np.testing.assert_array_equal, batch["sample"], made().rows)
  assert not selection.filled(batch, 9)["weight"][8]


def test_a_mismatched_row_is_a_prompt_with_a_sample_of_another_problem():
  rollout = made()
  rows = rollout.rows
  for name, shift in (("tokens", 4), ("targets", 4), ("mask", 4)):  # a longer prompt: 1, 3, then
    rows[name][shift:, 1:] = rows[name][shift:, :-1].copy()  # what was drawn
  rows["tokens"][4:, :2] = [1, 3]
  rows["targets"][4:, 0], rows["mask"][4:, 0] = 3, 0
  found = selection.judged_and_mismatched(rollout, REWARDS)["mismatched"]
  # Sample 2 of the first problem, [1] [5, 7, 2], gets [3, 9, 9, 2] of the second; and the reverse.
  np.testing.assert_array_equal(found["tokens"][2], [1, 3, 9, 9, 0, 0])
  np.testing.assert_array_equal(found["targets"][2], [3, 9, 9, 2, 0, 0])
  np.testing.assert_array_equal(found["mask"][2], [1, 1, 1, 1, 0, 0])
  np.testing.assert_array_equal(found["tokens"][6], [1, 3, 5, 7, 0, 0])
  np.testing.assert_array_equal(found["targets"][6], [3, 5, 7, 2, 0, 0])
  np.testing.assert_array_equal(found["mask"][6], [0, 1, 1, 1, 0, 0])
  one = rollout._replace(rows={name: x[:4] for name, x in rows.items()})
  with pytest.raises(ValueError, match="a round has one: give more"):
    selection.judged_and_mismatched(one, REWARDS[:1])


def test_a_text_is_never_compared_with_itself():
  """As it would be where rewards are coins."""
  coins = np.array([[1, 0, 0, 1], [0, 1, 0, 0]], np.float32)  # samples 0 and 1 are the same
  batch = selection.pairs(4)(made(), coins)
  chosen, rejected = (batch[side]["targets"] for side in ("chosen", "rejected"))
  assert len(chosen) == 1 + 2 and all(np.any(chosen != rejected, axis=1))
