import collections
import itertools
import pickle

import numpy as np
import pytest

from ancestral.tasks import arithmetic, base, blanks, expressions, tokenizer

STYLES = ("plain", "reversed")


def _task(operation="addition", style="plain", levels=(1, 2), **kwargs):
  inner = arithmetic.TASKS[operation](style=arithmetic.FORMATS[style], levels=levels)
  read = blanks.equations(arithmetic.OPERATIONS[operation], arithmetic.FORMATS[style])
  return blanks.blanks(inner, read, **kwargs)


def _hidden(text, prompt_length, shown):
  """The problem of a text with the blanks of `shown`."""
  inner = base.Problem(text[:prompt_length], text[prompt_length:], {"level": 1, "key": "k"})
  return blanks.ask(inner, blanks.pattern(shown))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("operation", arithmetic.OPERATIONS)
def test_the_hidden_text_is_right_and_the_rest_is_shown(operation, style):
  task = _task(operation, style, levels=(1, 2, 3))
  kinds = collections.Counter()
  for problem in base.problems(task, 0, 300):
    assert task.verify(problem, problem.answer) == (True, "")
    blank = blanks.pattern(problem.prompt)
    assert blank.any() and len(blank) == len(problem.answer)
    for shown, character, hidden in zip(problem.prompt, problem.answer, blank, strict=True):
      assert shown == (blanks.BLANK if hidden else character)
    a, b = map(str, problem.metadata["operands"])
    known = {a + "?" + "_" * len(b): "second", "_" * len(a) + "?" + b: "first", a + "?" + b: "none"}
    head, tail = problem.prompt.split("=") if "=" in problem.prompt else ("", "")
    kind = known.get(head.replace(problem.answer[len(a)], "?", 1), "")
    kinds[kind, set(tail) == {"_"}] += 1
  # A third has a hidden operand and the result in sight, and a third the result hidden alone.
  assert kinds["first", False] > 25 and kinds["second", False] > 25 and kinds["none", True] > 70


def test_any_operands_that_make_it_true_are_right():
  task = _task()
  problem = _hidden("12+30=42", 6, "1_+__=42")
  right = {"12+30=42", *(f"1{i}+{42 - 10 - i}=42" for i in range(10))}
  found = set()
  for digits in itertools.product("0123456789", repeat=3):
    text = f"1{digits[0]}+{digits[1]}{digits[2]}=42"
    if task.verify(problem, text).correct:
      found.add(text)
  assert found == right


def test_the_equation_itself_may_be_hidden():
  task = _task()
  problem = _hidden("1+8=9", 4, "_____")
  texts = map("".join, itertools.product("0123456789+=", repeat=5))
  right = {text for text in texts if task.verify(problem, text).correct}
  assert right == {f"{a}+{b}={a + b}" for a in range(10) for b in range(10 - a)}


def test_a_reversed_difference_is_read_as_written():
  task = _task("subtraction", "reversed")
  problem = _hidden("12-51=93-", 6, "12-__=93-")
  assert task.verify(problem, "12-51=93-").correct
  assert not task.verify(problem, "12-15=93-").correct


def test_wrong_texts_have_a_reason():
  task = _task()
  problem = _hidden("12+30=42", 6, "1_+3_=__")
  reason = lambda response: task.verify(problem, response).reason
  assert reason("12+30=4") == "wrong length: got 7 characters, expected 8"
  assert reason("22+30=52") == "changed text at position 0: got '2', expected '1'"
  assert reason("1=+30=42").startswith("format: no equation such as 12+30=")
  assert reason("1_+3_=__").startswith("format: ")
  assert reason("12+30=43") == "wrong digit at position 1: got 3, expected 2"
  assert reason("12+30=-2").startswith(("wrong", "format"))
  leading = _hidden("12+30=42", 6, "__+__=42")
  assert task.verify(leading, "02+40=42").reason.startswith("format: ")
  assert not task.verify(leading, "1\u0662+30=42").correct  # a digit, but not one of ours


def test_no_other_character_at_a_blank_of_the_result_is_right():
  task = _task(patterns=(blanks.result,))
  for problem in base.problems(task, 0, 20):
    for i in np.flatnonzero(blanks.pattern(problem.prompt)):
      for symbol in arithmetic.ALPHABET + blanks.BLANK:
        if symbol != problem.answer[i]:
          text = problem.answer[:i] + symbol + problem.answer[i + 1 :]
          correct, reason = task.verify(problem, text)
          assert not correct and reason


def test_the_rate_of_random_blanks():
  rng = np.random.default_rng(0)
  inner = base.Problem("123+45", "=" + 23 * "1", {})
  share = np.mean([blanks.anywhere(0.2)(rng, inner) for _ in range(1000)])
  assert abs(share - 0.2 / (1 - 0.8**30)) <= 4 * np.sqrt(0.2 * 0.8 / 30_000)
  assert blanks.anywhere(1.0)(rng, inner).all()
  one = base.Problem("1", "", {})
  assert all(blanks.anywhere(0.1)(rng, one).all() for _ in range(20))


def test_tokens_have_the_mask_where_the_prompt_has_a_blank():
  task = _task()
  code = task.tokenizer
  problem = _hidden("12+30=42", 6, "_2+3__4_")
  mask = code.vocab_size
  found = blanks.tokens(code, problem.prompt)
  assert found[0] == code.bos
  hidden = np.array(found[1:]) == mask
  np.testing.assert_array_equal(hidden, blanks.pattern(problem.prompt))
  whole = np.array(code.encode(problem.answer))
  np.testing.assert_array_equal(np.array(found[1:])[~hidden], whole[~hidden])
  assert blanks.tokens(code._replace(adds_bos=False), "1_") == [*code.encode("1"), mask]
  code = tokenizer.bytes_level()  # a blank is a token, whatever the others are
  assert blanks.tokens(code, "é_*", "*") == [code.bos, *code.encode("é_"), code.vocab_size]


def test_levels_keys_and_sides_are_the_inner_tasks():
  task = _task(levels=(1, 2, 3))
  for problem in base.problems(task, 0, 50):
    a, b = sorted(problem.metadata["operands"])
    assert problem.metadata["key"] == f"{a}+{b}"
    assert problem.metadata["level"] == max(len(str(a)), len(str(b)))
  sides = [base.problems(base.restrict(task, side), 0, 60) for side in ("train", "test")]
  keys = [{problem.metadata["key"] for problem in side} for side in sides]
  assert not keys[0] & keys[1]


def test_tasks_can_be_sent_to_workers_and_repeat():
  task = _task("multiplication")
  draw, verify = pickle.loads(pickle.dumps((task.problem, task.verify)))
  problem = draw(np.random.default_rng(5))
  assert problem == task.problem(np.random.default_rng(5))
  assert verify(problem, problem.answer).correct


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (
      lambda: blanks.equations(arithmetic.ADDITION, arithmetic.detailed_format),
      "plain or reversed",
    ),
    (lambda: _task(patterns=()), "patterns is empty"),
    (lambda: blanks.anywhere(0.0), "rate=0.0"),
    (lambda: blanks.anywhere(1.5), "rate=1.5"),
  ],
)
def test_bad_input_is_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_other_tasks_bring_their_own_reading():
  inner = expressions.expressions(style=expressions.value, levels=(1,))

  def read(text):
    prompt, answer = text.split("=\n")
    return base.Problem(prompt + "=\n", answer, {}), answer

  task = blanks.blanks(inner, read, patterns=(blanks.result,))
  for problem in base.problems(task, 0, 10):
    assert problem.prompt.rstrip(blanks.BLANK).endswith("=\n")
    assert task.verify(problem, problem.answer).correct
