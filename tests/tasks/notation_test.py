import fractions
import re

import pytest

from ancestral.tasks import base, expressions, notation


def python_value(text):
  """The value by Python's own grammar, every integer an exact fraction."""
  source = re.sub(r"\d+", lambda m: f"F({m.group()})", text)
  source = source.replace("^F(2)", "**2").replace("^F(3)", "**3")
  return eval(source, {"F": fractions.Fraction})


@pytest.mark.parametrize(
  ("text", "value"),
  [
    ("7", 7),
    ("-7/3", fractions.Fraction(-7, 3)),
    ("2 - 3 - 4", -5),
    ("2 - (3 - 4)", 3),
    ("2 + 3 * 4", 14),
    ("(2 + 3) * 4", 20),
    ("24 / 4 / 2", 3),
    ("24 / (4 / 2)", 12),
    ("2 * 3^2", 18),
    ("(2 * 3)^2", 36),
    ("((2 + 1)^2)^3", 729),
    ("2 / (3/4)", fractions.Fraction(8, 3)),
    ("2 - (-3)", 5),
    ("(-3)^3", -27),
  ],
)
def test_parse_and_evaluate(text, value):
  tree = notation.parse(text)
  assert notation.evaluate(tree) == value == python_value(text)
  assert notation.render(tree) == text


def test_render_and_parse_are_inverse():
  task = expressions.expressions(levels=(1, 2, 3, 5, 9, 17))
  for problem in base.problems(task, 0, 300):
    for line in [problem.prompt.removesuffix(" =\n"), *problem.answer.split("\n")]:
      tree = notation.parse(line)
      assert notation.render(tree) == line
      assert notation.evaluate(tree) == python_value(line)


@pytest.mark.parametrize(
  "text",
  [
    "",
    " ",
    "1 +",
    "1+2",
    "+ 1",
    "(1",
    "1)",
    "()",
    "1 2",
    "2^4",
    "2^2^2",
    "--1",
    "1 - -1",
    "(1/0)",
    "1/0",
    "a",
    "1\n",
    "\u0663",
    "(" * 5000 + "1" + ")" * 5000,
    "9" * 5000,
    "1 ** 2",
    "1  + 2",
  ],
)
def test_what_is_not_an_expression(text):
  with pytest.raises(ValueError):
    notation.parse(text)
  assert not notation.is_expression(text)


def test_reduce_takes_the_leftmost_ready_operation():
  tree = notation.parse("(1 + 2) * 3 - 8 / (6 - 2)^2")
  lines = []
  while isinstance(tree, notation.Node):
    tree = notation.reduce(tree)
    lines.append(notation.render(tree))
  assert lines == [
    "3 * 3 - 8 / (6 - 2)^2",
    "9 - 8 / (6 - 2)^2",
    "9 - 8 / 4^2",
    "9 - 8 / 16",
    "9 - (1/2)",
    "17/2",
  ]


def test_canonical_keys():
  key = lambda text: notation.canonical(notation.parse(text))
  assert key("1 + 2 * 3") == key("3 * 2 + 1") == key("2 * 3 + 1")
  assert key("(1 + 2)^2 / 3") == key("(2 + 1)^2 / 3")
  different = ["1 - 2", "2 - 1", "1 / 2", "2 / 1", "1 + 2 + 3", "1 + (2 + 3)", "(1/2)", "1 + 2"]
  assert len({key(text) for text in different}) == len(different)


def test_size_counts_operations():
  assert notation.size(notation.parse("(1 + 2)^2 / 3 - (1/2)")) == 4
  assert notation.size(notation.parse("(-1/2)")) == 0
