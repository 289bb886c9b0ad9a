"""Searched solvers: evolution over grids and over the choices of every step.

A candidate is a list of choices; what it is worth is any number that a table has, by default what
it is off by (`solver_learning.error`), else a distance between distributions. Every candidate of n
evaluations runs in one compiled program.

`time_steps` searches which of many times a fixed solver evaluates (AutoDiffusion); `strategies`
searches besides, for every step, the order, the form of prediction, the rule and the corrector (USF
and its S^3), screened by a regression on the candidates seen.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..models import schedules
from ..sampling import forms, tables, unified
from . import solver_learning


class Found(NamedTuple):
  """The best candidate of a search."""

  table: tables.SolverTable
  genes: np.ndarray
  loss: float
  num_runs: int  # tables whose loss was measured
  history: np.ndarray  # [generations], the least loss so far


class Evolution(NamedTuple):
  """Sizes of a search; AutoDiffusion's, but for the number of generations and the screening."""

  population: int = 50
  parents: int = 15
  mutations: int = 25  # of a generation; the rest are crossovers
  generations: int = 20
  rate: float = 0.25  # of mutating genes
  candidates: int = 1  # proposed for each that is measured; above 1, a regression picks


EVOLUTION, SCREENED = Evolution(), Evolution(generations=30, candidates=4)
FORMS = (forms.data(), forms.noise(), forms.flow())
RULES = (forms.exact(forms.log_snr), forms.midpoint, forms.exact(forms.noise_ratio))
MAX_ORDER = 4
# Values of a step's order, form, rule and corrector.
_SIZES = (MAX_ORDER, len(FORMS), len(RULES), MAX_ORDER)


def time_steps(
  rng: np.random.Generator,
  loss: Callable[[tables.SolverTable], float],
  schedule: schedules.Schedule,
  fine: np.ndarray,
  num_steps: int,
  solver: solver_learning.Solver,
  *,
  evolution: Evolution = EVOLUTION,
  seeds: Sequence[np.ndarray] = (),
) -> Found:
  """Which of the `fine` times a solver should stop at, by evolution.

  Args:
    rng: of the search.
    loss: table -> what is minimised; not a number counts as infinite.
    schedule: of the model.
    fine: [m + 1] times, the first and last of which every candidate has.
    num_steps: n, at most m.
    solver: (schedule, times) -> table.
    evolution: sizes.
    seeds: [n - 1] places each, strictly within 0 and m, that the population begins with.

  Raises:
    ValueError: n is not in 1 .. m.

  Reference: Li et al. 2023 (AutoDiffusion), arXiv 2309.10438, algorithm 1; its search over layers
    needs a network that can drop them and is left out.
  """
  inner = _inner(fine, num_steps)
  make = lambda genes: solver(schedule, fine[[0, *genes, len(fine) - 1]])
  draw = lambda: _places(rng, inner, num_steps - 1)
  mutate = lambda genes: _moved(rng, genes, inner, evolution.rate)
  cross = lambda a, b: _repaired(rng, np.where(rng.random(len(a)) < 0.5, a, b), inner)
  return _evolve(rng, make, loss, draw, mutate, cross, evolution, seeds)


def strategies(
  rng: np.random.Generator,
  loss: Callable[[tables.SolverTable], float],
  schedule: schedules.Schedule,
  fine: np.ndarray,
  num_steps: int,
  *,
  evolution: Evolution = SCREENED,
  seeds: Sequence[np.ndarray] = (),
) -> Found:
  """The times, and for every step the order, form, rule and corrector, by screened evolution.

  Genes are the n - 1 places, then [n, 4] choices; see `moves`. Each generation proposes
  `candidates` times what it measures, and measures those that a ridge regression of the logarithm
  of the loss on the genes (places and one-hot choices) ranks best. The paper's predictor is a
  network trained by a ranking loss; at a few hundred measured candidates, the regression does.

  Args: see `time_steps`; seeds are of whole genes.

  Reference: Liu et al. 2023 (USF, S^3), arXiv 2312.07243, section 4.
  """
  inner, places = _inner(fine, num_steps), num_steps - 1

  def mutate(genes):
    choices = genes[places:].reshape(num_steps, 4)
    fresh = _choices(rng, num_steps)
    mutated = np.where(rng.random(choices.shape) < evolution.rate, fresh, choices)
    return np.concatenate([_moved(rng, genes[:places], inner, evolution.rate), mutated.ravel()])

  def cross(a, b):
    mixed = np.where(rng.random(len(a)) < 0.5, a, b)
    return np.concatenate([_repaired(rng, mixed[:places], inner), mixed[places:]])

  draw = lambda: np.concatenate([_places(rng, inner, places), _choices(rng, num_steps).ravel()])
  make = lambda genes: unified.solver(schedule, fine[0], moves(fine, genes))
  features = functools.partial(_features, places=places, inner=max(inner, 1))
  return _evolve(rng, make, loss, draw, mutate, cross, evolution, seeds, features)


def moves(fine: np.ndarray, genes: np.ndarray) -> list[unified.Move]:
  """What genes stand for: places in `fine`, then each step's order - 1, form, rule, corrector."""
  num_steps = (len(genes) + 1) // 5
  times = fine[[*genes[: num_steps - 1], len(fine) - 1]]
  return [
    unified.Move(float(time), 1 + order, FORMS[form], RULES[rule], corrector)
    for time, (order, form, rule, corrector) in zip(
      times, genes[num_steps - 1 :].reshape(num_steps, 4), strict=True
    )
  ]


def genes_of(
  places: Sequence[int], order: int = 2, form: int = 0, rule: int = 0, corrector: int = 0
) -> np.ndarray:
  """The genes of a fixed solver, the same choices at every step."""
  step = [order - 1, form, rule, corrector]
  return np.array([*places, *(step * (len(places) + 1))])


def nearest_places(fine: np.ndarray, times: np.ndarray) -> np.ndarray:
  """Places in `fine` of a grid's inner times, each its own and in order, [n - 1]."""
  found = []
  for i, time in enumerate(times[1:-1]):
    nearest = int(np.argmin(np.abs(fine - time)))
    low, high = (found[-1] + 1 if found else 1), len(fine) - 1 - (len(times) - 2 - i)
    found.append(min(max(nearest, low), high))
  return np.array(found, int)


def _inner(fine, num_steps):
  if not 1 <= num_steps < len(fine):
    raise ValueError(f"num_steps={num_steps}: from 1 to {len(fine) - 1}, one less than the times.")
  return len(fine) - 2


def _places(rng, inner, count):
  return np.sort(rng.choice(np.arange(1, inner + 1), count, replace=False))


def _moved(rng, genes, inner, rate):
  """Places, some of which went elsewhere: half of these nearby."""
  near = genes + rng.integers(-3, 4, len(genes))
  far = rng.integers(1, inner + 1, len(genes)) if inner else genes
  to = np.where(rng.random(len(genes)) < 0.5, near, far)
  return _repaired(rng, np.where(rng.random(len(genes)) < rate, to, genes), inner)


def _repaired(rng, genes, inner):
  """In order, within bounds, and with others in place of repeated ones."""
  kept = np.unique(np.clip(genes, 1, inner))
  free = np.setdiff1d(np.arange(1, inner + 1), kept)
  return np.sort(np.append(kept, rng.choice(free, len(genes) - len(kept), replace=False)))


def _choices(rng, num_steps):
  return np.stack([rng.integers(0, size, num_steps) for size in _SIZES], axis=1)


def _features(genes, places, inner):
  choices = genes[places:].reshape(-1, 4)
  hot = [np.eye(size)[choices[:, j]].ravel() for j, size in enumerate(_SIZES)]
  place = genes[:places] / inner
  return np.concatenate([[1.0], place, place**2, *hot])


def _ridge(features, targets, penalty=1.0):
  gram = features.T @ features + penalty * np.eye(features.shape[1])
  return np.linalg.solve(gram, features.T @ targets)


def _evolve(rng, make, loss, draw, mutate, cross, sizes, seeds, features=None):
  """The best genes: the first generation drawn, later ones of the best so far."""
  seen: dict[bytes, Any] = {}

  def measure(genes):
    table = make(genes)
    value = loss(table)
    seen[genes.tobytes()] = (value if np.isfinite(value) else np.inf, len(seen), genes, table)

  def propose(count, parents):
    made, tries = [], 0
    while len(made) < count and tries < 50 * count:
      tries += 1
      if not parents:
        genes = draw()
      elif len(made) < sizes.mutations * count / sizes.population:
        genes = mutate(parents[rng.integers(len(parents))])
      else:
        genes = cross(*(parents[k] for k in rng.integers(len(parents), size=2)))
      if genes.tobytes() not in seen and not any(np.array_equal(genes, g) for g in made):
        made.append(genes)
    return made

  history = []
  for genes in seeds:
    measure(np.asarray(genes))
  for _ in range(sizes.generations):
    ranked = sorted(seen.values(), key=lambda item: item[:2])
    parents = [item[2] for item in ranked[: sizes.parents]] if history else []
    made = propose(sizes.population * (sizes.candidates if parents else 1), parents)
    if features and parents:
      finite = [item for item in ranked if np.isfinite(item[0])]
      weights = _ridge(
        np.stack([features(item[2]) for item in finite]), np.log([item[0] for item in finite])
      )
      made = sorted(made, key=lambda genes: features(genes) @ weights)[: sizes.population]
    for genes in made:
      measure(genes)
    history.append(min(item[0] for item in seen.values()))
  value, _, genes, table = min(seen.values(), key=lambda item: item[:2])
  return Found(table, genes, value, len(seen), np.array(history))
