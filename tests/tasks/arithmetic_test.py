import math
import operator
import re

import numpy as np
import pytest

from ancestral.tasks import arithmetic, base

OPERATORS = {"addition": operator.add, "subtraction": operator.sub, "multiplication": operator.mul}
PAIRS = [(o, f) for o in arithmetic.TASKS for f in arithmetic.FORMATS]


def _task(operation, style, levels=(1, 2, 3, 4)):
  return arithmetic.TASKS[operation](style=arithmetic.FORMATS[style], levels=levels)


def _ask(operation, style, a, b):
  return arithmetic.ask(operation, arithmetic.FORMATS[style], a, b)


def test_sums_are_written_as_in_the_paper():
  ask = lambda style: _ask(arithmetic.ADDITION, style, 128, 367)
  assert ask("plain")[:2] == ("128+367=", "495")
  assert ask("reversed")[:2] == ("128+367=", "594")
  prompt = "Input:\n128+367\nTarget:\n"
  assert ask("simplified")[:2] == (prompt, "A->5 , C->1\nA->9 , C->0\nA->4 , C->0.\n495")
  assert ask("detailed")[:2] == (
    prompt,
    "<scratch>\n[1,2,8] has 3 digits.\n[3,6,7] has 3 digits.\n"
    "[1,2,8] + [3,6,7] , A=[] , C=0 , 8+7+0=15 , A->5 , C->1\n"
    "[1,2] + [3,6] , A=[5] , C=1 , 2+6+1=9 , A->9 , C->0\n"
    "[1] + [3] , A=[9,5] , C=0 , 1+3+0=4 , A->4 , C->0\n"
    "[] + [] , A=[4,9,5] C=0 , END\n</scratch>\n4 9 5",
  )


def test_differences_put_the_sign_first_and_reversed_ones_last():
  ask = lambda style: _ask(arithmetic.SUBTRACTION, style, 128, 367).answer
  assert ask("plain") == "-239"
  assert ask("reversed") == "932-"
  assert ask("simplified") == "A->1 , C->0\nA->6 , C->-1\nA->-3 , C->-1\n-300+61=-239.\n-239"
  assert ask("detailed") == (
    "<scratch>\n[1,2,8] has 3 digits.\n[3,6,7] has 3 digits.\n"
    "[1,2,8] - [3,6,7] , A=[] , C=0 , 8-7-0=1 , A->1 , C->0\n"
    "[1,2] - [3,6] , A=[1] , C=0 , 2-6-0+10=6 , A->6 , C->-1\n"
    "[1] - [3] , A=[6,1] , C=-1 , 1-3-1=-3 , A->-3 , C->-1\n"
    "[] - [] , A=[-3,6,1]\n-300+61=-239 , END\n</scratch>\n-2 3 9"
  )
  assert _ask(arithmetic.SUBTRACTION, "reversed", 300, 180).answer == "021"
  assert _ask(arithmetic.SUBTRACTION, "plain", 7, 7).answer == "0"


def test_products():
  ask = lambda style: _ask(arithmetic.MULTIPLICATION, style, 128, 36).answer
  assert (ask("plain"), ask("reversed")) == ("4608", "8064")
  assert ask("simplified") == "A->768 , C->768\nA->384 , C->4608.\n4608"
  assert ask("detailed") == (
    "<scratch>\n[1,2,8] has 3 digits.\n[3,6] has 2 digits.\n"
    "[1,2,8] * 6 , A=[7,6,8] , k=1 , B=[7,6,8] , C=0+768=768\n"
    "[1,2,8] * 3 , A=[3,8,4] , k=10 , B=[3,8,4,0] , C=768+3840=4608 , END\n</scratch>\n4 6 0 8"
  )


@pytest.mark.parametrize(("operation", "style"), PAIRS)
def test_answers_verify_and_are_true(operation, style):
  task = _task(operation, style)
  for problem in base.problems(task, 0, 250):
    assert task.verify(problem, problem.answer) == (True, "")
    a, b = (int(n) for n in re.findall(r"\d+", problem.prompt))
    assert (a, b) == problem.metadata["operands"]
    result = problem.answer.split("\n")[-1].replace(" ", "")
    true = OPERATORS[operation](a, b)
    assert int(result[::-1] if style == "reversed" else result) == true
    # Every equation in the working holds (operands are single numbers, signs included).
    for left, right in re.findall(r"([-+\d]+)=(-?\d+)", problem.answer):
      assert sum(int(term) for term in re.findall(r"[-+]?\d+", left)) == int(right)


def test_simplified_working_spells_the_result():
  for problem in base.problems(_task("addition", "simplified"), 0, 200):
    *steps, result = problem.answer.split("\n")
    found = [re.fullmatch(r"A->(\d) , C->([01])\.?", step).groups() for step in steps]
    carry = found[-1][1].replace("0", "")
    assert carry + "".join(digit for digit, _ in reversed(found)) == result
    assert sum(int(c) for _, c in found) == problem.metadata["carries"]


def test_alphabet_is_exactly_what_is_used_and_encodes_it():
  used, tokens = set(), None
  for operation, style in PAIRS:
    task = _task(operation, style)
    for problem in base.problems(task, 0, 100):
      text = problem.prompt + problem.answer
      used |= set(text)
      tokens = task.tokenizer.encode(text)
      assert task.tokenizer.decode(tokens) == text
  assert used == set(arithmetic.ALPHABET)
  assert task.tokenizer.vocab_size == len(arithmetic.ALPHABET) + 3


def _corruptions(answer):
  for position in range(len(answer)):
    for symbol in arithmetic.ALPHABET:
      if symbol != answer[position]:
        yield position, symbol, answer[:position] + symbol + answer[position + 1 :]


KINDS = ("format: ", "wrong digit at", "wrong sign at", "wrong length: ", "wrong step ")


@pytest.mark.parametrize(("operation", "style"), PAIRS)
def test_every_changed_character_is_rejected_with_the_right_reason(operation, style):
  task = _task(operation, style, levels=(1, 3))
  for problem in base.problems(task, 0, 8):
    answer, start = problem.answer, problem.answer.rfind("\n") + 1
    for position, symbol, response in _corruptions(answer):
      correct, reason = task.verify(problem, response)
      assert not correct and reason.startswith(KINDS), (response, reason)
      if symbol.isdigit() and answer[position].isdigit():
        line = answer.count("\n", 0, position)
        expected = (
          f"wrong digit at position {position}: got {symbol}, expected {answer[position]}"
          if position >= start
          else f"wrong step {line}: "
        )
        assert reason.startswith(expected), reason
        assert reason.endswith(
          ("the final answer is right",)
          if position < start
          else ("every step is right",)
          if start
          else (f"expected {answer[position]}",)
        )
      elif symbol in "gNE<[":  # no line stays of its kind
        assert reason.startswith("format: "), (response, reason)


@pytest.mark.parametrize(("operation", "style"), PAIRS)
def test_every_insertion_and_deletion_is_rejected(operation, style):
  task = _task(operation, style, levels=(2,))
  for problem in base.problems(task, 0, 5):
    answer = problem.answer
    for position in range(len(answer) + 1):
      for response in (
        answer[:position] + answer[position + 1 :] if position < len(answer) else answer + "\n",
        answer[:position] + "7" + answer[position:],
        answer[:position] + "\n" + answer[position:],
        answer[:position] + "\u0663" + answer[position:],  # a digit, but not one of ours
      ):
        correct, reason = task.verify(problem, response)
        assert not correct and reason.startswith(KINDS), (response, reason)


def test_reasons_read_as_promised():
  task = _task("addition", "simplified")
  problem = _ask(arithmetic.ADDITION, "simplified", 128, 367)
  reason = lambda response: task.verify(problem, response).reason
  steps = "A->5 , C->1\nA->9 , C->0\nA->4 , C->0.\n"
  assert reason(steps + "485") == (
    "wrong digit at position 38: got 8, expected 9; every step is right"
  )
  assert (steps + "485")[38] == "8"
  assert reason(steps.replace("9 , C->0", "8 , C->0") + "495") == (
    "wrong step 1: got 'A->8 , C->0', expected 'A->9 , C->0'; the final answer is right"
  )
  assert reason(steps.replace("9 , C->0", "8 , C->0") + "485").endswith(
    "the final answer is wrong too"
  )
  assert reason(steps + "49") == ("wrong length: got 2 characters, expected 3; every step is right")
  assert reason(steps + "495\n495") == "wrong length: got 5 lines, expected 4"
  assert reason(steps[:-1]) == "wrong length: got 3 lines, expected 4"
  assert reason("A->5 , C->1\nsay 4") == (
    "format: line 1 should look like 'A->5 , C->1', got 'say 4'"
  )
  assert len(reason("x" * 10**6)) < 250
  plain = _task("addition", "plain")
  problem = _ask(arithmetic.ADDITION, "plain", 128, 367)
  assert plain.verify(problem, "").reason == "format: the answer should look like '495', got ''"
  assert plain.verify(problem, "-95").reason == "wrong sign at position 0: got -, expected 4"
  assert plain.verify(problem, "0495").reason == "wrong length: got 4 characters, expected 3"


def _balanced(values, choices):
  """Every choice occurs equally often, within four standard errors."""
  p = 1 / len(choices)
  for choice in choices:
    share = np.mean([value == choice for value in values])
    assert abs(share - p) <= 4 * math.sqrt(p * (1 - p) / len(values)), (choice, share)


@pytest.mark.parametrize("operation", OPERATORS)
def test_levels_lengths_order_and_carries_are_balanced(operation):
  found = [p.metadata for p in base.problems(_task(operation, "plain"), 0, 8000)]
  _balanced([m["level"] for m in found], (1, 2, 3, 4))
  for level in (1, 2, 3, 4):
    here = [m for m in found if m["level"] == level]
    assert all(max(m["lengths"]) == level for m in here)
    _balanced([min(m["lengths"]) for m in here], range(1, level + 1))
    uneven = [m["lengths"] for m in here if m["lengths"][0] != m["lengths"][1]]
    if level > 1:
      _balanced([a > b for a, b in uneven], (True, False))
    if operation != "multiplication":
      most = level if operation == "addition" else level - 1
      _balanced([m["carries"] for m in here], range(most + 1))
      for short in range(1, level + 1):  # and independent of the lengths
        carries = [m["carries"] for m in here if min(m["lengths"]) == short]
        _balanced(carries, range(most + 1))


def test_carries_are_the_carries():
  for problem in base.problems(_task("subtraction", "plain"), 0, 300):
    small, large = sorted(problem.metadata["operands"])
    assert problem.metadata["carries"] == sum(
      small % 10**i > large % 10**i for i in range(1, len(str(large)) + 1)
    )


def test_keys_sort_commuting_operands_only():
  key = lambda operation, a, b: _ask(operation, "plain", a, b).metadata["key"]
  assert key(arithmetic.ADDITION, 12, 7) == key(arithmetic.ADDITION, 7, 12) == "7+12"
  assert key(arithmetic.MULTIPLICATION, 12, 7) == key(arithmetic.MULTIPLICATION, 7, 12)
  assert key(arithmetic.SUBTRACTION, 12, 7) != key(arithmetic.SUBTRACTION, 7, 12)


@pytest.mark.parametrize("levels", [(), (0,), (1, -2), (1.5,), ("3",)])
def test_bad_levels(levels):
  with pytest.raises(ValueError, match="levels has "):
    arithmetic.addition(levels=levels)
