import fractions
import math
import re

import numpy as np
import pytest

from ancestral.tasks import base, expressions, notation

INTEGERS = expressions.Limits(max_operand=9, max_value=500, max_denominator=1)


def python_value(text):
  source = re.sub(r"\d+", lambda m: f"F({m.group()})", text)
  source = source.replace("^F(2)", "**2").replace("^F(3)", "**3")
  return eval(source, {"F": fractions.Fraction})


@pytest.mark.parametrize("limits", [expressions.LIMITS, INTEGERS], ids=["fractions", "integers"])
def test_answers_are_true_and_within_the_limits(limits):
  task = expressions.expressions(levels=(1, 2, 4, 8), limits=limits)
  for problem in base.problems(task, 0, 300):
    question, lines = problem.prompt.removesuffix(" =\n"), problem.answer.split("\n")
    assert len(lines) == problem.metadata["level"] == len(re.findall(r" [-+*/] |\^", question))
    assert all(int(n) <= limits.max_operand for n in re.findall(r"(?<!\^)\d+", question))
    assert {python_value(question)} == {python_value(line) for line in lines}
    for number in re.findall(r"(?<!\^)\d+(?:/\d+)?", problem.answer):
      assert limits.admit(fractions.Fraction(number))
    assert str(fractions.Fraction(lines[-1])) == lines[-1]
    assert task.verify(problem, problem.answer) == (True, "")
    assert task.tokenizer.decode(task.tokenizer.encode(problem.answer)) == problem.answer


def test_value_style():
  task = expressions.expressions(style=expressions.STYLES["value"])
  for problem in base.problems(task, 0, 100):
    assert fractions.Fraction(problem.answer) == python_value(problem.prompt.removesuffix(" =\n"))
    assert task.verify(problem, problem.answer).correct


def test_alphabet_is_exactly_what_is_used():
  problems = base.problems(expressions.expressions(), 0, 500)
  assert set("".join(p.prompt + p.answer for p in problems)) == set(expressions.ALPHABET)


def _verdicts(text, style=expressions.derivation):
  task = expressions.expressions(style=style)
  problem = expressions.ask(notation.parse(text), style)
  return problem, lambda response: task.verify(problem, response).reason


def test_reasons_read_as_promised():
  problem, reason = _verdicts("(3 + 4)^2 / 2")
  assert problem.prompt == "(3 + 4)^2 / 2 =\n"
  assert problem.answer == "7^2 / 2\n49 / 2\n49/2"
  assert reason("7^2 / 2\n48 / 2\n49/2") == (
    "wrong step 1: got '48 / 2', expected '49 / 2'; the final answer is right"
  )
  assert reason("7^2 / 2\n48 / 2\n24").endswith("the final answer is wrong too")
  assert reason("7^2 / 2\n49 / 2\n47/2") == (
    "wrong digit at position 16: got 7, expected 9; every step is right"
  )
  assert reason("7^2 / 2\n49 +\n49/2").startswith("format: line 1 should look like '2 - (-1/3)")
  assert reason("7^2 / 2\n49 / 2\n49 / 2").startswith("format: line 2 should look like '-7/3'")
  assert reason("7^2 / 2\n49/2").startswith("wrong step 1: got '49/2'")
  assert reason("7^2 / 2") == "wrong length: got 1 lines, expected 3"
  _, reason = _verdicts("(3 + 4)^2 / 2", expressions.value)
  assert reason("49/2") == ""
  assert reason("98/4") == "wrong digit at position 0: got 9, expected 4"
  assert reason("24.5").startswith("format: the answer should look like '-7/3'")


def test_every_changed_character_is_rejected_with_the_right_reason():
  kinds = ("format: ", "wrong digit at", "wrong sign at", "wrong symbol at", "wrong length: ")
  task = expressions.expressions(levels=(2, 3))
  for problem in base.problems(task, 0, 25):
    answer, start = problem.answer, problem.answer.rfind("\n") + 1
    for position, old in enumerate(answer):
      for new in expressions.ALPHABET + "x":
        if new == old:
          continue
        response = answer[:position] + new + answer[position + 1 :]
        correct, reason = task.verify(problem, response)
        line = answer.count("\n", 0, position)
        assert not correct and reason.startswith((*kinds, f"wrong step {line}: ")), response
        if new == "x":
          assert reason.startswith("format: ")
        elif new.isdigit() and old.isdigit() and answer[position - 1] != "^" and new != "0":
          expected = f"wrong step {line}: "
          if position >= start:
            expected = f"wrong digit at position {position}: got {new}, expected {old}"
          assert reason.startswith(expected), (response, reason)


def test_levels_and_operations_are_spread():
  task = expressions.expressions(levels=(1, 3), limits=expressions.Limits(max_denominator=10**6))
  problems = base.problems(task, 0, 4000)
  share = np.mean([p.metadata["level"] == 1 for p in problems])
  assert abs(share - 1 / 2) <= 4 * math.sqrt(1 / 4 / 4000)
  single = [p.prompt for p in problems if p.metadata["level"] == 1]
  n, third = len(single), 4 / math.sqrt(len(single))
  assert abs(np.mean(["^" in text for text in single]) - 1 / 3) <= third * math.sqrt(2 / 9)
  for symbol in (" + ", " - ", " * ", " / "):  # only x / 0 is ever refused, one time in 101
    found = np.mean([symbol in text for text in single])
    assert abs(found - 1 / 6) <= 4 * math.sqrt(5 / 36 / n) + 1 / 101 / 6


def test_deep_expressions():
  task = expressions.expressions(levels=(100,))
  problem = base.problem_at(task, 0, 0)
  assert task.verify(problem, problem.answer).correct
  assert len(problem.answer.split("\n")) == 100


def test_bad_arguments():
  with pytest.raises(ValueError, match="levels is"):
    expressions.expressions(levels=(101,))
  with pytest.raises(ValueError, match="levels is"):
    expressions.expressions(levels=())
  with pytest.raises(ValueError, match="operations lacks ADD or SUBTRACT"):
    expressions.expressions(operations=(notation.MULTIPLY,))
  with pytest.raises(ValueError, match="admits no numbers"):
    expressions.expressions(limits=expressions.Limits(max_denominator=0))
