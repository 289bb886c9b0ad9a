import collections
import itertools
import math
import pickle

import numpy as np
import pytest

from ancestral.tasks import base, sudoku


def _legal(grid):
  """Whether a grid of symbols obeys every rule, with arrays and not with units."""
  side = math.isqrt(len(grid))
  box = math.isqrt(side)
  cells = np.array(list(grid)).reshape(side, side)
  boxes = cells.reshape(box, box, box, box).swapaxes(1, 2).reshape(side, side)
  want = set(sudoku.SYMBOLS[:side])
  return all({*group} == want for group in (*cells, *cells.T, *boxes))


def _every_grid():
  """All solved grids of box side 2, from rows that are permutations."""
  rows = ["".join(row) for row in itertools.permutations("1234")]
  return {grid for four in itertools.product(rows, repeat=4) if _legal(grid := "".join(four))}


GRIDS = _every_grid()


def _fits(puzzle, grid):
  return all(clue in (sudoku.BLANK, symbol) for clue, symbol in zip(puzzle, grid, strict=True))


def test_there_are_288_grids_and_draws_are_uniform_over_them():
  assert len(GRIDS) == 288
  draws = [p.answer for p in base.problems(sudoku.sudoku(levels=(1,)), 0, 12 * 288)]
  counts = collections.Counter(draws)
  assert set(counts) == GRIDS
  statistic = sum((counts[grid] - 12) ** 2 / 12 for grid in GRIDS)
  assert abs(statistic - 287) <= 4 * math.sqrt(2 * 287)


def test_puzzles_have_one_solution_by_brute_force():
  levels = tuple(range(1, 13))
  seen = set()
  for problem in base.problems(sudoku.sudoku(levels=levels), 0, 200):
    puzzle = problem.prompt.removesuffix("=")
    assert [grid for grid in GRIDS if _fits(puzzle, grid)] == [problem.answer]
    assert problem.metadata["level"] == puzzle.count(sudoku.BLANK)
    seen.add(problem.metadata["level"])
  assert seen == set(levels)


def test_solutions_are_all_of_them():
  rng = np.random.default_rng(0)
  for grid in sorted(GRIDS)[::7]:
    hidden = rng.random(16) < 0.8
    puzzle = "".join(sudoku.BLANK if h else c for c, h in zip(grid, hidden, strict=True))
    found = sudoku.solutions(puzzle, limit=1000)
    assert len(found) == len(set(found))
    assert set(found) == {grid for grid in GRIDS if _fits(puzzle, grid)}
    assert sudoku.solutions(puzzle) == found[:2]
  assert sudoku.solutions("11" + 14 * ".") == []
  assert sudoku.solutions("123...4" + 9 * ".") == []  # no rule is broken yet, and no way is left


def test_nine_by_nine():
  for problem in base.problems(sudoku.sudoku(box=3, levels=(30, 52)), 0, 12):
    puzzle = problem.prompt.removesuffix("=")
    assert _legal(problem.answer) and _fits(puzzle, problem.answer)
    assert sudoku.solutions(puzzle) == [problem.answer]
    # Another solution differs in a blank: forbid each blank its symbol, one at a time.
    for i, symbol in enumerate(puzzle):
      for other in set("123456789") - {problem.answer[i]} if symbol == sudoku.BLANK else ():
        assert not sudoku.solutions(puzzle[:i] + other + puzzle[i + 1 :])


def test_a_published_puzzle():
  puzzle = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
  problem = sudoku.ask(puzzle)
  assert problem.answer == (
    "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
  )
  assert problem.prompt == puzzle + "=" and problem.metadata["level"] == 51


def test_keys_are_shared_by_puzzles_with_symbols_renamed_only():
  puzzle = "1.3..41..14...2."
  renamed = puzzle.translate(str.maketrans("1234", "3142"))
  asked = [sudoku.ask(p) for p in (puzzle, renamed, puzzle[::-1])]
  keys = [problem.metadata["key"] for problem in asked]
  assert keys[0] == keys[1] == "1.2..31..13...4." and keys[2] != keys[0]
  assert asked[1].answer == asked[0].answer.translate(str.maketrans("1234", "3142"))


def test_wrong_answers_have_a_reason():
  task = sudoku.sudoku()
  problem = sudoku.ask("1.3..41..14...2.")
  right = problem.answer
  assert right == "1234341221434321" and task.verify(problem, right) == (True, "")
  reason = lambda response: task.verify(problem, response).reason
  assert reason(right[:-1]) == "wrong length: got 15 cells, expected 16"
  assert reason("") == "wrong length: got 0 cells, expected 16"
  assert reason(right[:1] + "." + right[2:]).startswith("format: '.' at row 1, column 2")
  assert reason(right[:1] + "5" + right[2:]).startswith("format: '5' at row 1, column 2")
  assert reason("2" + right[1:]) == "changed clue at row 1, column 1: got 2, expected 1"
  assert reason(right[:1] + "1" + right[2:]) == "duplicate 1 in row 1"
  swapped = right[4:6] + right[2:4] + right[:2] + right[6:]
  assert reason(swapped).startswith("changed clue")
  empty = base.Problem(16 * "." + "=", right, {})
  verify = lambda response: task.verify(empty, response)
  for grid in sorted(GRIDS)[:20]:
    assert verify(grid).correct
  assert verify("1234" * 4).reason == "duplicate 1 in column 1"
  latin = "1234234134124123"  # rows and columns, but no boxes
  assert verify(latin).reason == "duplicate 2 in box 1"


def test_every_change_of_an_answer_is_wrong():
  task = sudoku.sudoku(levels=(6, 12))
  for problem in base.problems(task, 0, 5):
    assert task.verify(problem, problem.answer).correct
    for i in range(16):
      for symbol in "1234.=":
        if symbol != problem.answer[i]:
          changed = problem.answer[:i] + symbol + problem.answer[i + 1 :]
          correct, reason = task.verify(problem, changed)
          assert not correct and reason
    assert not any(task.verify(problem, grid).correct for grid in GRIDS - {problem.answer})


def test_the_tokenizer_has_the_alphabet_and_sides_are_disjoint():
  task = sudoku.sudoku(levels=(5, 9))
  assert task.tokenizer.vocab_size == 3 + 6
  assert sudoku.sudoku(box=3, levels=(5,)).tokenizer.vocab_size == 3 + 11
  sides = [base.problems(base.restrict(task, side), 0, 100) for side in ("train", "test")]
  keys = [{problem.metadata["key"] for problem in side} for side in sides]
  assert not keys[0] & keys[1]
  for problem in sides[0]:
    text = problem.prompt + problem.answer
    assert task.tokenizer.decode(task.tokenizer.encode(text)) == text


def test_tasks_can_be_sent_to_workers_and_repeat():
  task = sudoku.sudoku(box=3, levels=(40,))
  draw, verify = pickle.loads(pickle.dumps((task.problem, task.verify)))
  problem = draw(np.random.default_rng(3))
  assert problem == task.problem(np.random.default_rng(3))
  assert verify(problem, problem.answer).correct


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: sudoku.sudoku(box=4), "box=4"),
    (lambda: sudoku.sudoku(levels=()), "levels has None"),
    (lambda: sudoku.sudoku(levels=(13,)), "from 1 to 12"),
    (lambda: sudoku.sudoku(levels=(0,)), "levels has 0"),
    (lambda: sudoku.sudoku(box=3, levels=(2.5,)), "levels has 2.5"),
    (lambda: sudoku.ask("123"), "is no grid"),
    (lambda: sudoku.ask("5" + 15 * "."), "is no grid"),
    (lambda: sudoku.ask(16 * "."), "several solutions"),
    (lambda: sudoku.ask("11" + 14 * "."), "no solution"),
  ],
)
def test_bad_input_is_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()
