"""Arithmetic expressions as trees: written, read, reduced and evaluated exactly.

    sum     = product ((" + " | " - ") product)*
    product = power ((" * " | " / ") power)*
    power   = atom ("^2" | "^3")?
    atom    = digits | "(" value ")" | "(" sum ")"          value = "-"? digits ("/" digits)?

Sums and products associate to the left. A whole text may also be a bare value, such as -7/3.
"""

import fractions
import operator
import re
from collections.abc import Callable
from typing import NamedTuple

MAX_DEPTH = 100
"""Parentheses may nest this deep, so that hostile text cannot exhaust the stack."""

Number = fractions.Fraction


class Operation(NamedTuple):
  """An operation on exact numbers; `precedence` binds tighter when larger."""

  symbol: str
  arity: int
  precedence: int
  apply: Callable[..., Number]
  commutes: bool = False


class Node(NamedTuple):
  """An operation on expressions."""

  operation: Operation
  operands: tuple["Expression", ...]


Expression = Number | Node


def _square(x: Number) -> Number:
  return x * x


def _cube(x: Number) -> Number:
  return x * x * x


ADD = Operation(" + ", 2, 1, operator.add, commutes=True)
SUBTRACT = Operation(" - ", 2, 1, operator.sub)
MULTIPLY = Operation(" * ", 2, 2, operator.mul, commutes=True)
DIVIDE = Operation(" / ", 2, 2, operator.truediv)
SQUARE = Operation("^2", 1, 3, _square)
CUBE = Operation("^3", 1, 3, _cube)
OPERATIONS = (ADD, SUBTRACT, MULTIPLY, DIVIDE, SQUARE, CUBE)
_BY_SYMBOL = {operation.symbol: operation for operation in OPERATIONS}

_TOKEN = re.compile(r"\((-?\d+(?:/\d+)?)\)|(\d+)| [-+*/] |\^[23]|[()]", re.ASCII)
_VALUE = re.compile(r"-?\d+(?:/\d+)?", re.ASCII)


def evaluate(expression: Expression) -> Number:
  """The value. Raises ZeroDivisionError on a division by zero."""
  if isinstance(expression, Node):
    return expression.operation.apply(*map(evaluate, expression.operands))
  return expression


def reduce(expression: Node) -> Expression:
  """The expression once the leftmost operation whose operands are all numbers is done."""
  operation, operands = expression
  for i, operand in enumerate(operands):
    if isinstance(operand, Node):
      return Node(operation, (*operands[:i], reduce(operand), *operands[i + 1 :]))
  return operation.apply(*operands)


def size(expression: Expression) -> int:
  """The number of operations."""
  if isinstance(expression, Node):
    return 1 + sum(map(size, expression.operands))
  return 0


def render(expression: Expression) -> str:
  """The text, with the fewest parentheses that keep the tree: parse(render(e)) == e."""
  if isinstance(expression, Node):
    return _join(expression, [_operand(expression, i) for i in range(len(expression.operands))])
  return str(expression)


def canonical(expression: Expression) -> str:
  """A key: the fully parenthesised text with the operands of sums and products in order.

  Expressions equal up to commutation have one key; reassociated ones are different problems.
  """
  if isinstance(expression, Node):
    operands = [canonical(operand) for operand in expression.operands]
    ordered = sorted(operands) if expression.operation.commutes else operands
    return f"({_join(expression, ordered)})"
  return str(expression)


def _join(node: Node, operands: list[str]) -> str:
  symbol = node.operation.symbol
  return symbol.join(operands) if node.operation.arity == 2 else operands[0] + symbol


def _operand(node: Node, i: int) -> str:
  operand = node.operands[i]
  text = render(operand)
  if not isinstance(operand, Node):
    return text if text.isdigit() else f"({text})"
  tighter = operand.operation.precedence - node.operation.precedence
  to_the_left = i == 0 and node.operation.arity == 2
  return text if tighter > 0 or (tighter == 0 and to_the_left) else f"({text})"


def is_expression(text: str) -> bool:
  """Whether `parse` reads the text."""
  try:
    parse(text)
  except ValueError:
    return False
  return True


def parse(text: str) -> Expression:
  """Reads an expression, by recursive descent. Raises ValueError where the text is not one."""
  if _VALUE.fullmatch(text):
    return _number(text)
  tokens, position = [], 0
  while position < len(text):
    match = _TOKEN.match(text, position)
    if match is None:
      raise ValueError(f"character {text[position]!r} at {position} fits no expression: {text!r}")
    tokens.append(match)
    position = match.end()
  expression, rest = _parse_binary(tokens[::-1], 1, 0)
  if rest:
    raise ValueError(f"unexpected {rest[-1].group()!r} at {rest[-1].start()} in {text!r}")
  return expression


def _number(text: str) -> Number:
  try:
    return Number(text)
  except ZeroDivisionError:
    raise ValueError(f"number {text!r} has denominator 0") from None


_Parsed = tuple[Expression, list[re.Match[str]]]  # what was read, and the tokens left, last first


def _parse_binary(tokens: list[re.Match[str]], precedence: int, depth: int) -> _Parsed:
  """Reads operations of this precedence (1 sums, 2 products) over those of the next."""
  if precedence == 3:
    return _parse_power(tokens, depth)
  left, tokens = _parse_binary(tokens, precedence + 1, depth)
  while tokens and _precedence(tokens[-1]) == precedence:
    operation = _BY_SYMBOL[tokens.pop().group()]
    right, tokens = _parse_binary(tokens, precedence + 1, depth)
    left = Node(operation, (left, right))
  return left, tokens


def _parse_power(tokens: list[re.Match[str]], depth: int) -> _Parsed:
  base, tokens = _parse_atom(tokens, depth)
  if tokens and _precedence(tokens[-1]) == 3:
    base = Node(_BY_SYMBOL[tokens.pop().group()], (base,))
  return base, tokens


def _parse_atom(tokens: list[re.Match[str]], depth: int) -> _Parsed:
  if not tokens:
    raise ValueError("the expression ends where a number is due")
  token = tokens.pop()
  number = token.group(1) or token.group(2)
  if number is not None:
    return _number(number), tokens
  if token.group() != "(" or depth == MAX_DEPTH:
    raise ValueError(f"{token.group()!r} at {token.start()} where a number is due, or too deep")
  inner, tokens = _parse_binary(tokens, 1, depth + 1)
  if not tokens or tokens.pop().group() != ")":
    raise ValueError(f"the parenthesis at {token.start()} is not closed")
  return inner, tokens


def _precedence(token: re.Match[str]) -> int:
  operation = _BY_SYMBOL.get(token.group())
  return operation.precedence if operation else 0
