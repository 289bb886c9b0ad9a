"""A space of solvers: every step with its own form, order, rule, corrector and starting point.

The steps of DDIM, DPM-Solver(++), DEIS, iPNDM, LMS, UniPC, SA-Solver without noise, Runge-Kutta's
and DPM-Solver(++) 2S and 3S are `Move`s, one for each evaluation, and so are mixtures of them:

    moves = [Move(t, order=2, form=forms.noise()) for t in times[1:]]
    table = solver(schedule, times[0], moves)

What is searched over is then a list of choices (`training.solver_search`), and each of the fixed
solvers is one of its points.

Reference: Liu et al. 2023 (USF), arXiv 2312.07243, section 3, whose strategy has the same choices;
the starting point, which makes singlestep methods part of it, is added here.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ..models import schedules
from . import correctors, forms, tables


class Move(NamedTuple):
  """How the next point is made, after an evaluation.

  Attributes:
    time: of the next point.
    order: evaluations whose slopes are used; fewer where there are not so many.
    form: of the equation, without noise.
    rule: how the slopes are weighted. Nodes are the evaluation at the starting point, then the
      others, the latest first.
    corrector: evaluations, besides the new one, by which the point is made again once it is
      evaluated; 0 leaves it. The last point is not evaluated, and so not corrected.
    back: the starting point: 0 the point just evaluated, b the b-th before it.
  """

  time: float
  order: int = 1
  form: forms.Form = forms.data()
  rule: forms.Rule = forms.exact(forms.log_snr)
  corrector: int = 0
  back: int = 0


def solver(schedule: schedules.Schedule, start: float, moves: Sequence[Move]) -> tables.SolverTable:
  """The table of n moves from time `start`, n evaluations.

  Args:
    schedule: alpha and sigma of time.
    start: the first time.
    moves: [n].

  Raises:
    ValueError: as `tables.grid`; an order below 1, or a start before the first point.
  """
  times = tables.grid(schedule, [start, *(move.time for move in moves)])
  for i, move in enumerate(moves):
    if move.order < 1 or move.corrector < 0 or not 0 <= move.back <= i:
      raise ValueError(
        f"Move {i} has order {move.order}, corrector {move.corrector} and back {move.back}: "
        f"they are at least 1, at least 0, and from 0 to {i}."
      )
  path = tables.Path(schedule, len(moves))
  x, origin, history, points = path.start(times[0]), None, [], []
  for i, move in enumerate(moves):
    seen = forms.Evaluation(times[i], x, path.evaluate(x, times[i]))
    if i and moves[i - 1].corrector:
      last = moves[i - 1]
      nodes = correctors.with_new(_from(history, last.back)[: last.corrector], seen)
      x = forms.advance(path, last.form, last.rule, origin.point, origin.time, times[i], nodes)
    history.insert(0, seen)
    points.insert(0, seen._replace(point=x))
    origin = points[move.back]
    nodes = _from(history, move.back)[: move.order]
    x = forms.advance(path, move.form, move.rule, origin.point, origin.time, times[i + 1], nodes)
  return path.table(x, times[-1])


def _from(history, back):
  """Evaluations: at the starting point, then the others, the latest first."""
  return [history[back], *history[:back], *history[back + 1 :]]
