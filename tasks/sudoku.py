"""Sudoku, 4 by 4 and 9 by 9: a grid whose rows, columns and boxes hold each symbol once.

Cells are in reading order, `.` for a blank, and the answer is the whole solved grid. Of a 4 by 4:

    prompt  1.3..41..14...2.=
    answer  1234341221434321

Every puzzle has one solution, so an answer is right if it keeps the clues and breaks no rule.

Level k: k blanks. Levels are uniform. Given the level, a solved grid is drawn, and its cells are
blanked in uniform order wherever the solution stays the only one, until k are; where the order runs
out before, all begins again, so that grids which allow many blanks come more often at the highest
levels. The grids of box side 2 are drawn uniformly from the 288 there are. Those of side 3 come
from a depth-first search that fills the first cell with fewest candidates, trying them in uniform
order: every grid may come, the law does not change when symbols are renamed, but it is not quite
uniform.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from . import base, tokenizer

BLANK = "."
SYMBOLS = "123456789"
MOST_BLANKS = {2: 12, 3: 56}
"""The most blanks of a level, by box side: 4 by 4 none has more, 9 by 9 draws would take long."""

_MAX_GRIDS = 10_000


class _Geometry(NamedTuple):
  """Cells of a grid, numbered in reading order, and its units: rows, columns and boxes."""

  side: int
  every: int  # a bit per symbol
  units: tuple[tuple[int, ...], ...]  # 3 side of them, the cells in each
  units_of: tuple[tuple[int, int, int], ...]  # of each cell: its row, its column, its box
  names: tuple[str, ...]  # of units


@functools.cache
def _geometry(box: int) -> _Geometry:
  side = box * box
  unit_of = lambda r, c: (r, side + c, 2 * side + r // box * box + c // box)
  units_of = tuple(unit_of(r, c) for r in range(side) for c in range(side))
  units = tuple(
    tuple(cell for cell in range(side * side) if unit in units_of[cell]) for unit in range(3 * side)
  )
  names = tuple(f"{kind} {i + 1}" for kind in ("row", "column", "box") for i in range(side))
  return _Geometry(side, (1 << side) - 1, units, units_of, names)


def sudoku(*, box: int = 2, levels: Sequence[int] = (4, 6, 8)) -> base.Task:
  """Puzzles to be solved.

  Metadata: "level", the number of blanks; "key", the puzzle with its symbols renamed in the order
  in which they occur. So a puzzle with two symbols exchanged is the same problem; one turned or
  with rows moved is another, since no reading order is left that makes them alike.

  Args:
    box: n, the side of a box, 2 or 3; the grid's is n^2.
    levels: numbers of blanks, drawn uniformly.

  Raises:
    ValueError: on another box, or levels that are not from 1 to `MOST_BLANKS`.
  """
  if box not in MOST_BLANKS:
    raise ValueError(f"box={box!r}; a box has a side of 2 (of 4 by 4) or 3 (of 9 by 9)")
  levels = tuple(levels)
  for level in levels or (None,):
    if not isinstance(level, (int, np.integer)) or not 1 <= level <= MOST_BLANKS[box]:
      raise ValueError(
        f"levels has {level!r}; give numbers of blanks from 1 to {MOST_BLANKS[box]} at {box=}"
      )
  return base.Task(
    problem=functools.partial(_problem, box, tuple(int(level) for level in levels)),
    verify=functools.partial(_verify, box),
    tokenizer=tokenizer.characters(f"{BLANK}={SYMBOLS[: box * box]}"),
  )


def ask(puzzle: str) -> base.Problem:
  """The problem of a given puzzle, its cells in reading order.

  Raises:
    ValueError: it is no grid, or has no solution or several.
  """
  box = {side**4: side for side in MOST_BLANKS}.get(len(puzzle))
  if box is None or not set(puzzle) <= {BLANK, *SYMBOLS[: box * box]}:
    raise ValueError(f"{puzzle!r} is no grid; give 16 cells of .1234 or 81 of .123456789")
  found = solutions(puzzle)
  if len(found) != 1:
    count = "several solutions" if found else "no solution"
    raise ValueError(f"{puzzle!r} has {count}; it needs just one")
  return _asked(puzzle, found[0])


def solutions(puzzle: str, limit: int = 2) -> list[str]:
  """The solutions of a puzzle of n^4 cells, `limit` of them at most."""
  box = round(len(puzzle) ** 0.25)
  cells = [SYMBOLS.find(symbol) + 1 for symbol in puzzle]
  if _broken(_geometry(box), cells) is not None:
    return []
  found = _solved(_geometry(box), cells)
  return [_text(solved) for solved, _ in zip(found, range(limit), strict=False)]


def _problem(box: int, levels: tuple[int, ...], rng: np.random.Generator) -> base.Problem:
  level = levels[rng.integers(len(levels))]
  for _ in range(_MAX_GRIDS):
    solved = _grid(box, rng)
    puzzle = _blanked(_geometry(box), solved, level, rng)
    if puzzle is not None:
      return _asked(_text(puzzle), _text(solved))
  raise ValueError(f"no puzzle with {level} blanks from {_MAX_GRIDS} grids; ask for fewer blanks")


def _asked(puzzle: str, solved: str) -> base.Problem:
  order = dict.fromkeys(puzzle.replace(BLANK, ""))
  renamed = str.maketrans(dict(zip(order, SYMBOLS, strict=False)))
  metadata = {"level": puzzle.count(BLANK), "key": puzzle.translate(renamed)}
  return base.Problem(f"{puzzle}=", solved, metadata)


def _text(cells: Sequence[int]) -> str:
  return "".join(map((BLANK + SYMBOLS).__getitem__, cells))


def _grid(box: int, rng: np.random.Generator) -> list[int]:
  """A solved grid."""
  if box == 2:
    grids = _smallest_grids()
    return list(grids[rng.integers(len(grids))])
  geometry = _geometry(box)
  side = geometry.side
  in_order = np.broadcast_to(np.arange(side), (side * side, side))
  orders = rng.permuted(in_order, axis=1).tolist()  # of the symbols tried at each cell
  return next(_solved(geometry, [0] * side * side, orders))


@functools.cache
def _smallest_grids() -> tuple[tuple[int, ...], ...]:
  """All solved grids of box side 2."""
  return tuple(map(tuple, _solved(_geometry(2), [0] * 16)))


def _blanked(
  geometry: _Geometry, solved: Sequence[int], level: int, rng: np.random.Generator
) -> list[int] | None:
  """The grid with `level` cells blanked and no other solution; None where the order has no more."""
  cells, left = list(solved), level
  for cell in rng.permutation(len(cells)).tolist():
    symbol, cells[cell] = cells[cell], 0
    if _forced(geometry, cells, cell, symbol) or _alone(geometry, cells, cell, symbol):
      left -= 1
      if not left:
        return cells
    else:
      cells[cell] = symbol
  return None


def _free(geometry: _Geometry, cells: Sequence[int], cell: int) -> int:
  """The symbols, as bits, that no other cell of the cell's units has."""
  taken = 0
  for unit in geometry.units_of[cell]:
    for other in geometry.units[unit]:
      taken |= 1 << cells[other]
  return geometry.every & ~(taken >> 1)


def _forced(geometry: _Geometry, cells: Sequence[int], cell: int, symbol: int) -> bool:
  """Whether the symbol is the cell's only one, or the cell the symbol's only place in a unit.

  Enough for a solution to stay the only one, and quick; not necessary.
  """
  bit = 1 << (symbol - 1)
  if _free(geometry, cells, cell) == bit:
    return True
  return any(
    all(
      cells[other] or other == cell or not _free(geometry, cells, other) & bit
      for other in geometry.units[unit]
    )
    for unit in geometry.units_of[cell]
  )


def _alone(geometry: _Geometry, cells: Sequence[int], cell: int, symbol: int) -> bool:
  """Whether no solution has another symbol in the cell."""
  others = _free(geometry, cells, cell) & ~(1 << (symbol - 1))
  return not any(
    next(_solved(geometry, [*cells[:cell], other + 1, *cells[cell + 1 :]]), None)
    for other in range(geometry.side)
    if others >> other & 1
  )


def _solved(
  geometry: _Geometry, cells: Sequence[int], orders: Sequence[Sequence[int]] | None = None
) -> Iterator[list[int]]:
  """All ways to fill the blanks, of cells that break no rule; symbols are tried in `orders`."""
  cells = list(cells)
  bits = [1 << symbol >> 1 for symbol in cells]
  taken = [sum(bits[cell] for cell in unit) for unit in geometry.units]
  blanks = [cell for cell, symbol in enumerate(cells) if not symbol]
  yield from _fillings(geometry, cells, taken, blanks, orders)


def _fillings(geometry, cells, taken, blanks, orders):
  """`_solved` of the blanks left, by depth-first search; `taken` has the symbols of each unit.

  The cell with fewest candidates is filled first, so what is forced is filled before any guess, and
  a cell without a candidate ends a branch at once.
  """
  if not blanks:
    yield list(cells)
    return
  cell, candidates = _narrowest(geometry, taken, blanks)
  left = [blank for blank in blanks if blank != cell]
  row, column, box = geometry.units_of[cell]
  for symbol in range(geometry.side) if orders is None else orders[cell]:
    bit = 1 << symbol
    if candidates & bit:
      cells[cell] = symbol + 1
      taken[row] |= bit
      taken[column] |= bit
      taken[box] |= bit
      yield from _fillings(geometry, cells, taken, left, orders)
      taken[row] ^= bit
      taken[column] ^= bit
      taken[box] ^= bit
  cells[cell] = 0


def _narrowest(geometry, taken, blanks):
  """The first blank with the fewest candidates, and these."""
  fewest, found = geometry.side + 1, (0, 0)
  for cell in blanks:
    row, column, box = geometry.units_of[cell]
    candidates = geometry.every & ~(taken[row] | taken[column] | taken[box])
    count = candidates.bit_count()
    if count < fewest:
      fewest, found = count, (cell, candidates)
      if count < 2:
        break
  return found


def _broken(geometry: _Geometry, cells: Sequence[int]) -> tuple[int, int] | None:
  """The first unit that has a symbol twice, and the symbol; None where there is none."""
  for unit, members in enumerate(geometry.units):
    seen = set()
    for symbol in filter(None, (cells[cell] for cell in members)):
      if symbol in seen:
        return unit, symbol
      seen.add(symbol)
  return None


def _verify(box: int, problem: base.Problem, response: str) -> base.Verification:
  geometry, puzzle = _geometry(box), problem.prompt[:-1]
  wrong = lambda reason: base.Verification(False, reason)
  if len(response) != len(puzzle):
    return wrong(f"wrong length: got {len(response)} cells, expected {len(puzzle)}")
  for i, (clue, symbol) in enumerate(zip(puzzle, response, strict=True)):
    place = f"row {i // geometry.side + 1}, column {i % geometry.side + 1}"
    if symbol not in SYMBOLS[: geometry.side]:
      return wrong(f"format: {symbol!r} at {place} is no symbol of the grid")
    if clue not in (BLANK, symbol):
      return wrong(f"changed clue at {place}: got {symbol}, expected {clue}")
  broken = _broken(geometry, [SYMBOLS.index(symbol) + 1 for symbol in response])
  if broken is not None:
    unit, symbol = broken
    return wrong(f"duplicate {SYMBOLS[symbol - 1]} in {geometry.names[unit]}")
  return base.Verification(True, "")
