import hashlib
import math
import pickle

import numpy as np
import pytest

from ancestral.tasks import arithmetic, base, expressions


def test_split_is_pinned():
  # Fixed for ever: a change would leak yesterday's test problems into tomorrow's training set.
  digest = hashlib.blake2b(b"12+345", digest_size=8).hexdigest()
  assert base.split_of("12+345") == ("test" if int(digest, 16) % 100 < 10 else "train")
  assert [k for k in range(60) if base.split_of(f"{k}+{k}") == "test"] == [16, 17, 30]


def test_split_shares():
  keys = [f"{a}+{b}" for a in range(200) for b in range(a, 200)]
  for percent in (0, 5, 10, 50, 100):
    share = np.mean([base.split_of(key, test_percent=percent) == "test" for key in keys])
    p = percent / 100
    assert abs(share - p) <= 4 * math.sqrt(p * (1 - p) / len(keys))


def test_bad_arguments_name_the_culprit():
  task = arithmetic.addition()
  with pytest.raises(ValueError, match="test_percent is 101"):
    base.restrict(task, "train", test_percent=101)
  with pytest.raises(ValueError, match="split is 'valid'"):
    base.restrict(task, "valid")


def test_an_empty_side_is_an_error_that_names_the_level():
  task = base.restrict(arithmetic.addition(levels=(2,)), "test", test_percent=0, max_draws=50)
  with pytest.raises(ValueError, match=r"no test problem of level 2 in 50 draws at test_percent=0"):
    task.problem(np.random.default_rng(0))


@pytest.mark.parametrize("operation", arithmetic.TASKS.values(), ids=arithmetic.TASKS)
def test_small_levels_are_disjoint_and_complete(operation):
  task = operation(levels=(1,))
  keys = {
    split: {p.metadata["key"] for p in base.problems(base.restrict(task, split), 0, 1200)}
    for split in ("train", "test")
  }
  assert not keys["train"] & keys["test"]
  ordered = [p.metadata["operands"] for p in base.problems(task, 1, 3000)]
  assert set(ordered) == {(a, b) for a in range(10) for b in range(10)}
  everything = {p.metadata["key"] for p in base.problems(task, 1, 3000)}
  assert keys["train"] | keys["test"] == everything
  assert len(everything) == (100 if operation is arithmetic.subtraction else 55)


def _sides(seed, counts, **options):
  for name, operation in arithmetic.TASKS.items():
    for split, count in counts.items():
      task = base.restrict(operation(levels=(1, 2, 3), **options), split)
      yield name, split, base.problems(task, seed, count)


def test_large_samples_are_disjoint_in_every_format_and_order():
  asked: dict[tuple[str, str], set[tuple[int, int]]] = {}
  for seed, style in enumerate(arithmetic.FORMATS.values()):
    for name, split, drawn in _sides(seed, {"train": 2000, "test": 200}, style=style):
      pairs = {p.metadata["operands"] for p in drawn}
      if name != "subtraction":
        pairs |= {(b, a) for a, b in pairs}
      asked[name, split] = asked.get((name, split), set()) | pairs
  for name in arithmetic.TASKS:
    assert len(asked[name, "test"]) > 100
    assert not asked[name, "train"] & asked[name, "test"]


def test_levels_of_a_side_are_those_of_the_task():
  for _, _, drawn in _sides(0, {"train": 1500, "test": 400}):
    levels = np.array([p.metadata["level"] for p in drawn])
    for level in (1, 2, 3):
      share = np.mean(levels == level)
      assert abs(share - 1 / 3) <= 4 * math.sqrt(2 / 9 / len(levels))


def test_expressions_are_disjoint():
  for max_operand in (3, 100):
    limits = expressions.Limits(max_operand=max_operand)
    task = expressions.expressions(levels=(1, 2), limits=limits)
    keys = {
      split: {p.metadata["key"] for p in base.problems(base.restrict(task, split), 0, 1000)}
      for split in ("train", "test")
    }
    assert keys["train"] and keys["test"] and not keys["train"] & keys["test"]


def test_problems_depend_on_seed_and_index_alone():
  task = arithmetic.addition(levels=(3,))
  listed = base.problems(task, 7, 20)
  assert [base.problem_at(task, 7, i) for i in reversed(range(20))] == listed[::-1]
  assert base.problems(task, 7, 5) == listed[:5]
  assert base.problems(task, 8, 20) != listed


def test_one_seed_asks_the_same_in_every_format():
  operands = [
    [p.metadata["operands"] for p in base.problems(arithmetic.subtraction(style=style), 0, 30)]
    for style in arithmetic.FORMATS.values()
  ]
  assert operands[0] == operands[1] == operands[2] == operands[3]


def test_distinct_problems():
  task = base.restrict(arithmetic.addition(levels=(1, 2)), "test")
  found = base.problems(task, 0, 80, distinct=True)
  assert len({p.metadata["key"] for p in found}) == 80
  assert base.problems(task, 0, 30, distinct=True) == found[:30]
  with pytest.raises(ValueError, match=r"only 55 distinct problems .* fewer than 56"):
    base.problems(arithmetic.addition(levels=(1,)), 0, 56, distinct=True, max_repeats=500)


def test_tasks_pickle_for_worker_processes():
  for task in (arithmetic.multiplication(), expressions.expressions()):
    restricted = base.restrict(task, "train")
    copy = pickle.loads(pickle.dumps(restricted))
    assert base.problems(copy, 0, 20) == base.problems(restricted, 0, 20)
    problem = base.problem_at(copy, 0, 0)
    assert copy.verify(problem, problem.answer).correct
    assert copy.tokenizer.decode(copy.tokenizer.encode(problem.prompt)) == problem.prompt
