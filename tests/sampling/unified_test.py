"""Every fixed solver is a point of the space of moves: its expansion is the same."""

import functools
import itertools

import numpy as np
import pytest

from ancestral.models import schedules
from ancestral.sampling import ancestral, correctors, forms, grids, multistep, singlestep, tables
from ancestral.sampling.unified import Move, solver

SCHEDULE = schedules.linear()
TIMES = grids.to_zero(grids.power(SCHEDULE, 6, end=0.01))
DATA, NOISE = forms.data(), forms.noise()
LAMBDA, RHO = forms.exact(forms.log_snr), forms.exact(forms.noise_ratio)
UNIPC = {"rule": correctors.bh2}
EVEN = [[1.0], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12]]  # Adams and Bashforth's


def same(**choice):
  return [Move(time, **choice) for time in TIMES[1:]]


def stages(shares, last):
  """Singlestep moves: stages at shares of a step in lambda, then the step from where it began."""
  moves = []
  for s, t in itertools.pairwise(TIMES[:-1]):
    times = [singlestep.between(SCHEDULE, s, t, share) for share in shares]
    moves += [Move(time, i + 1, DATA, LAMBDA, 0, i) for i, time in enumerate(times)]
    moves.append(Move(t, **last))
  return [*moves, Move(0.0)]


def stepping(step):
  return lambda s, t: singlestep.singlestep(s, t, step)


CASES = {
  "ddim": (ancestral.ddim, same()),
  "2m": (multistep.dpmpp_2m, same(order=2, rule=forms.midpoint)),
  "3m": (multistep.dpmpp_3m, same(order=3)),
  "deis": (
    functools.partial(multistep.deis, order=3, variable=forms.log_snr),
    same(order=3, form=NOISE),
  ),
  "lms": (multistep.lms, same(order=4, form=NOISE, rule=RHO)),
  "ipndm": (
    functools.partial(multistep.ipndm, order=3),
    [
      Move(time, min(i + 1, 3), NOISE, forms.fixed(EVEN[min(i, 2)]))
      for i, time in enumerate(TIMES[1:])
    ],
  ),
  "unipc 2": (functools.partial(correctors.unipc, order=2), same(order=2, corrector=2, **UNIPC)),
  "unipc 3": (functools.partial(correctors.unipc, order=3), same(order=3, corrector=3, **UNIPC)),
  "sa": (
    functools.partial(correctors.sa_solver, tau=lambda t: 0.0),
    same(order=3, corrector=3),
  ),
  "2s": (
    stepping(singlestep.dpm_2s(DATA)),
    stages([0.5], {"order": 2, "rule": forms.midpoint, "back": 1}),
  ),
  "3s": (stepping(singlestep.dpm_3s(DATA)), stages([1 / 3, 2 / 3], {"order": 2, "back": 2})),
}


@pytest.mark.parametrize("name", CASES)
def test_fixed_solvers_are_points_of_the_space(name):
  make, moves = CASES[name]
  expected = tables.expand(make(SCHEDULE, TIMES))
  found = tables.expand(solver(SCHEDULE, TIMES[0], moves))
  for a, b in zip(expected, found, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def test_every_step_has_its_own_choices():
  mixed = [Move(time, 1 + i % 3, (DATA, NOISE)[i % 2]) for i, time in enumerate(TIMES[1:])]
  expected = multistep.adams_bashforth(
    SCHEDULE,
    TIMES,
    [1 + i % 3 for i in range(7)],
    form=[(DATA, NOISE)[i % 2] for i in range(7)],
    rule=LAMBDA,
  )
  found = solver(SCHEDULE, TIMES[0], mixed)
  np.testing.assert_allclose(
    tables.expand(found).outputs, tables.expand(expected).outputs, atol=1e-9
  )


@pytest.mark.parametrize("wrong", [{"order": 0}, {"corrector": -1}, {"back": 1}])
def test_bad_moves_are_refused(wrong):
  with pytest.raises(ValueError, match="Move 0 has"):
    solver(SCHEDULE, 1.0, [Move(0.5, **wrong)])


def test_dc_solver_with_ratios_of_one_is_unipc():
  plain = tables.expand(correctors.unipc(SCHEDULE, TIMES, 2))
  ones = tables.expand(correctors.dc_solver(SCHEDULE, TIMES, np.ones(5)))
  moved = tables.expand(correctors.dc_solver(SCHEDULE, TIMES, np.full(5, 0.9)))
  np.testing.assert_allclose(ones.outputs, plain.outputs, atol=1e-12)
  assert np.max(np.abs(moved.outputs - plain.outputs)) > 1e-3
  with pytest.raises(ValueError, match="4 ratios for 7 steps: 5"):
    correctors.dc_solver(SCHEDULE, TIMES, np.ones(4))
