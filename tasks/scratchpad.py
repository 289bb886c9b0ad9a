"""The written-out working of sums, differences and products, as lines of text.

The texts are those of Lee et al. 2023, "Teaching Arithmetic to Small Transformers" (arXiv
2307.03381), as the authors' code writes them. The one simplified working that they do not define,
that of a product, is ours: one line per digit of the second operand.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple


class _Column(NamedTuple):
  x: int
  y: int
  carry: int  # in
  digit: int
  out: int  # the carry out


def _work(a: int, b: int, column: Callable[[int, int, int, bool], tuple[int, int]]):
  """The columns of a and b from the lowest, with carries."""
  width, carry, columns = max(len(str(a)), len(str(b))), 0, []
  for position in range(width):
    x, y = a // 10**position % 10, b // 10**position % 10
    digit, out = column(x, y, carry, position == width - 1)
    columns.append(_Column(x, y, carry, digit, out))
    carry = out
  return columns


def _add(x: int, y: int, carry: int, top: bool) -> tuple[int, int]:
  del top
  out, digit = divmod(x + y + carry, 10)
  return digit, out


def _subtract(x: int, y: int, carry: int, top: bool) -> tuple[int, int]:
  """The top column keeps its sign instead of borrowing, so that it can be added to the rest."""
  total = x - y + carry
  return (total if top else total % 10), (-1 if total < 0 else 0)


def _listed(digits: Sequence[int] | str) -> str:
  return "[" + ",".join(str(digit) for digit in digits) + "]"


def _rest(n: int, position: int) -> str:
  """The digits of n that are left once the lowest `position` are used up."""
  return _listed(str(n)[: max(0, len(str(n)) - position)])


def _done(columns: Sequence[_Column], position: int) -> str:
  return _listed([column.digit for column in columns[:position][::-1]])


def _recombine(columns: Sequence[_Column]) -> str:
  """The signed top digit plus the others, which a difference ends with: -100+61=-39."""
  top = columns[-1].digit * 10 ** (len(columns) - 1)
  rest = sum(column.digit * 10**i for i, column in enumerate(columns[:-1]))
  return f"{top}+{rest}={top + rest}"


def _short(columns: Sequence[_Column]) -> list[str]:
  return [f"A->{column.digit} , C->{column.out}" for column in columns]


def simplified_sum(a: int, b: int) -> tuple[str, ...]:
  """Digit and carry of each column, a full stop, and the sum."""
  return (*_stop(_short(_work(a, b, _add))), str(a + b))


def simplified_difference(a: int, b: int) -> tuple[str, ...]:
  """Digit and borrow (0 or -1) of each column, the top one signed; their sum; the difference."""
  columns = _work(a, b, _subtract)
  return (*_short(columns), _recombine(columns) + ".", str(a - b))


def simplified_product(a: int, b: int) -> tuple[str, ...]:
  """A, a times a digit of b, and C, the running total, for each digit of b from the lowest."""
  lines, total = [], 0
  for position, digit in enumerate(reversed(str(b))):
    total += a * int(digit) * 10**position
    lines.append(f"A->{a * int(digit)} , C->{total}")
  return (*_stop(lines), str(total))


def _stop(lines: Sequence[str]) -> list[str]:
  return [*lines[:-1], lines[-1] + "."]


def detailed_sum(a: int, b: int) -> tuple[str, ...]:
  """Every column with the digits that are left, the digits found, the carry and the sum made."""
  columns = _work(a, b, _add)
  steps = [
    f"{_rest(a, i)} + {_rest(b, i)} , A={_done(columns, i)} , C={c.carry} , "
    f"{c.x}+{c.y}+{c.carry}={c.digit + 10 * c.out} , A->{c.digit} , C->{c.out}"
    for i, c in enumerate(columns)
  ]
  end = f"[] + [] , A={_done(columns, len(columns))} C={columns[-1].out} , END"
  return _scratch(a, b, [*steps, end], a + b)


def detailed_difference(a: int, b: int) -> tuple[str, ...]:
  """As the sum, with borrows; then the signed top digit plus the rest."""
  columns = _work(a, b, _subtract)
  steps = [
    f"{_rest(a, i)} - {_rest(b, i)} , A={_done(columns, i)} , C={c.carry} , "
    f"{c.x}-{c.y}-{-c.carry}{'+10' if c.digit > c.x - c.y + c.carry else ''}={c.digit} , "
    f"A->{c.digit} , C->{c.out}"
    for i, c in enumerate(columns)
  ]
  end = [f"[] - [] , A={_done(columns, len(columns))}", f"{_recombine(columns)} , END"]
  return _scratch(a, b, [*steps, *end], a - b)


def detailed_product(a: int, b: int) -> tuple[str, ...]:
  """For each digit of b from the lowest: A = a times it, B = A times its place k, C += B."""
  steps, total = [], 0
  for position, digit in enumerate(reversed(str(b))):
    part, place = a * int(digit), 10**position
    steps.append(
      f"{_listed(str(a))} * {digit} , A={_listed(str(part))} , k={place} , "
      f"B={_listed(str(part * place))} , C={total}+{part * place}={total + part * place}"
    )
    total += part * place
  steps[-1] += " , END"
  return _scratch(a, b, steps, total)


def _scratch(a: int, b: int, steps: Sequence[str], result: int) -> tuple[str, ...]:
  """Wraps the steps; the result is written digit by digit with spaces, its sign first."""
  lengths = [f"{_listed(str(n))} has {len(str(n))} digits." for n in (a, b)]
  sign = "-" if result < 0 else ""
  return ("<scratch>", *lengths, *steps, "</scratch>", sign + " ".join(str(abs(result))))
