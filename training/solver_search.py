"""Searched solvers: evolution over grids and over the choices of every step.

A candidate is a list of choices; what it is worth is any number that a table has: what it is off by
(`solver_learning.error`), or a distance between distributions. Every candidate of n
evaluations runs in one compiled program.

`time_steps` searches which of many times a fixed solver evaluates (AutoDiffusion); `strategies`
searches besides, for every step, the order, the form of prediction, the rule and the corrector (USF
and its S^3), screened by a regression on the candidates seen.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ..models import schedules
from ..sampling import forms, tables, unified


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
  solver: tables.Solver,
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
  space = _Space(
    make=lambda genes: solver(schedule, fine[[0, *genes, len(fine) - 1]]),
    draw=lambda: _places(rng, inner, num_steps - 1),
    mutate=lambda genes: _moved(rng, genes, inner, evolution.rate),
    cross=lambda a, b: _repaired(rng, _mixed(rng, a, b), inner),
    features=lambda genes: _place_features(genes, inner),
  )
  return _evolve(rng, loss, space, evolution, seeds)


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
    mixed = _mixed(rng, a, b)
    return np.concatenate([_repaired(rng, mixed[:places], inner), mixed[places:]])

  space = _Space(
    make=lambda genes: unified.solver(schedule, fine[0], moves(fine, genes)),
    draw=lambda: np.concatenate([_places(rng, inner, places), _choices(rng, num_steps).ravel()]),
    mutate=mutate,
    cross=cross,
    features=lambda genes: np.concatenate(
      [_place_features(genes[:places], inner), _choice_features(genes[places:])]
    ),
  )
  return _evolve(rng, loss, space, evolution, seeds)


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


def _mixed(rng, a, b):
  return np.where(rng.random(len(a)) < 0.5, a, b)


def _place_features(places, inner):
  share = places / max(inner, 1)
  return np.concatenate([[1.0], share, share**2])


def _choice_features(choices):
  choices = choices.reshape(-1, 4)
  return np.concatenate([np.eye(size)[choices[:, j]].ravel() for j, size in enumerate(_SIZES)])


class _Space(NamedTuple):
  """Candidates: what they stand for, how they are made, and what a regression sees of them."""

  make: Callable[[np.ndarray], tables.SolverTable]
  draw: Callable[[], np.ndarray]
  mutate: Callable[[np.ndarray], np.ndarray]
  cross: Callable[[np.ndarray, np.ndarray], np.ndarray]
  features: Callable[[np.ndarray], np.ndarray]


class _Measured(NamedTuple):
  """A candidate; tuples of these sort by loss, the earlier first."""

  loss: float
  number: int
  genes: np.ndarray
  table: tables.SolverTable


def _evolve(rng, loss, space, sizes, seeds):
  """The best genes: the first generation drawn, later ones of the best so far."""
  seen: dict[bytes, _Measured] = {}
  ranked = lambda: sorted(seen.values(), key=lambda item: item[:2])

  def measure(genes):
    table = space.make(genes)
    value = loss(table)
    value = value if np.isfinite(value) else np.inf
    seen[genes.tobytes()] = _Measured(value, len(seen), genes, table)

  history = []
  for genes in seeds:
    measure(np.asarray(genes))
  for generation in range(sizes.generations):
    best = ranked() if generation else []
    made = _proposed(rng, space, sizes, [item.genes for item in best[: sizes.parents]], seen)
    for genes in _screened(space, made, best, sizes.population):
      measure(genes)
    history.append(min(item.loss for item in seen.values()))
  best = ranked()[0]
  return Found(best.table, best.genes, best.loss, len(seen), np.array(history))


def _proposed(rng, space, sizes, parents, seen):
  """New genes: drawn where there are no parents, else mutations of parents and crosses."""
  count = sizes.population * (sizes.candidates if parents else 1)
  mutations = sizes.mutations * count / sizes.population
  made = {}
  for _ in range(50 * count):
    if len(made) == count:
      break
    if not parents:
      genes = space.draw()
    elif len(made) < mutations:
      genes = space.mutate(parents[rng.integers(len(parents))])
    else:
      genes = space.cross(*(parents[k] for k in rng.integers(len(parents), size=2)))
    if genes.tobytes() not in seen:
      made.setdefault(genes.tobytes(), genes)
  return list(made.values())


def _screened(space, made, measured, count):
  """The `count` of the proposals that a ridge regression on what is measured ranks best."""
  measured = [item for item in measured if np.isfinite(item.loss)]
  if len(made) <= count or not measured:
    return made[:count]
  features = np.stack([space.features(item.genes) for item in measured])
  gram = features.T @ features + np.eye(features.shape[1])
  weights = np.linalg.solve(gram, features.T @ np.log([item.loss for item in measured]))
  return sorted(made, key=lambda genes: space.features(genes) @ weights)[:count]
