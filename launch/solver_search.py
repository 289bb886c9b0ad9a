"""Searches or learns solvers for a trained diffusion model, each one a file for launch.sample:
  python -m ancestral.launch.solver_search --workdir=runs/digits --nfe=5,8,10
  python -m ancestral.launch.sample --workdir=runs/digits --solver=runs/digits/solver_learned_8.json

Errors are root mean squares, over pixels, to where --reference evaluations take the same noise.
Each method is fitted on --trajectories of them, begins with (or is compared with) the best of the
named solvers, and is measured on as many that it has not seen.
"""  # fmt: skip

import functools
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
from absl import flags as absl_flags

from ..models import schedules
from ..sampling import grids, multistep, tables
from ..training import solver_learning, solver_search
from . import draws, fields, flags, images, solving
from . import experiment as experiment_lib

_NFE = absl_flags.DEFINE_list("nfe", "5,8,10", "Numbers of evaluations.")
_METHOD = absl_flags.DEFINE_list(
  "method", "learned", "Some of learned, grid, compensated, time_steps, strategies, gits."
)
_TRAJECTORIES = absl_flags.DEFINE_integer("trajectories", 128, "To fit to.", lower_bound=2)
_REFERENCE = absl_flags.DEFINE_integer("reference", 200, "Evaluations of one.", lower_bound=20)
_FIT_STEPS = absl_flags.DEFINE_integer(
  "fit_steps", 20, "Of a fit, or generations of a search.", lower_bound=1
)
_TABLES = absl_flags.DEFINE_string("tables", None, "Folder for the tables; the workdir if unset.")
READS = (flags.WORKDIR, flags.STEP, flags.AVERAGE_STD, flags.LAST, flags.BEST)
READS += (_NFE, _METHOD, _TRAJECTORIES, _REFERENCE, _FIT_STEPS, _TABLES)
READS += (draws.SEED, draws.GUIDANCE)

_FINE = 40  # times that searches choose from


class Search(NamedTuple):
  """What a method is given."""

  schedule: schedules.Schedule
  config: fields.Config  # the model's evaluation
  teacher: solver_learning.Teacher
  fine: np.ndarray  # times to choose from
  rng: np.random.Generator
  steps: int


class Named(NamedTuple):
  """A named solver on a named grid."""

  error: float
  solver: str
  grid: str
  table: tables.SolverTable


def ranked(search: Search, n: int) -> list[Named]:
  """The named solvers without noise, on every grid, of n evaluations, the best first."""
  found = []
  for solver in solving.SOLVERS:
    for grid in solving.GRIDS:
      try:
        table = solving.table(
          search.schedule, search.config, solver=solver, grid=grid, evaluations=n
        )
      except ValueError:  # it evaluates more than that in a step
        continue
      if table.noise is None and table.num_rows == n:
        found.append(Named(solver_learning.error(search.teacher, table), solver, grid, table))
  return sorted(found, key=lambda named: named.error)


def best_multistep(search: Search, best: list[Named]) -> Named:
  """The best that evaluates once a step, so that its times are a grid."""
  for named in best:
    times = named.table.times
    if np.all(np.diff(times) < 0):
      made = solving.SOLVERS[named.solver](search.schedule, times)
      if made.num_rows == named.table.num_rows:
        return named
  raise ValueError("No named solver evaluates once a step.")


def learned(search: Search, best: list[Named], n: int) -> tables.SolverTable:
  """Every coefficient, from the two best of the named solvers."""
  fits = [
    solver_learning.learned(search.teacher, search.schedule, named.table, max_steps=search.steps)
    for named in best[:2]
  ]
  return min(fits, key=lambda found: found.after).table


def grid(search: Search, best: list[Named], n: int) -> tables.SolverTable:
  """The best of the named solvers of one evaluation a step, on a grid of its own."""
  named = best_multistep(search, best)
  solver, times = solving.SOLVERS[named.solver], named.table.times
  return solver_learning.tuned_grid(
    search.teacher, search.schedule, solver, times, max_steps=search.steps
  ).table


def compensated(search: Search, best: list[Named], n: int) -> tables.SolverTable:
  """DC-Solver on the grid of the best."""
  times = best_multistep(search, best).table.times
  return solver_learning.compensated(
    search.teacher, search.schedule, times, max_steps=search.steps
  ).table


def time_steps(search: Search, best: list[Named], n: int) -> tables.SolverTable:
  """AutoDiffusion's search over times, of DPM-Solver++ 2M."""
  sizes = solver_search.EVOLUTION._replace(generations=search.steps)
  loss = functools.partial(solver_learning.error, search.teacher)
  return solver_search.time_steps(
    search.rng, loss, search.schedule, search.fine, n, multistep.dpmpp_2m, evolution=sizes
  ).table


def strategies(search: Search, best: list[Named], n: int) -> tables.SolverTable:
  """S^3's search over times and choices, beginning with the named solvers' grids."""
  sizes = solver_search.SCREENED._replace(generations=search.steps)
  loss = functools.partial(solver_learning.error, search.teacher)
  places = solver_search.nearest_places(search.fine, best_multistep(search, best).table.times)
  seeds = [solver_search.genes_of(places, order, form) for order in (2, 3) for form in (0, 1)]
  return solver_search.strategies(
    search.rng, loss, search.schedule, search.fine, n, evolution=sizes, seeds=seeds
  ).table


def gits(search: Search, best: list[Named], n: int) -> tables.SolverTable:
  """DPM-Solver++ 2M on times chosen by dynamic programming over local errors of DDIM."""
  table = multistep.dpmpp_3m(search.schedule, search.fine)
  points, outputs, sample = solver_learning.trajectory(search.teacher, table)
  states = np.concatenate([points, sample[None]])
  costs = grids.local_errors(search.schedule, table.times, states, np.asarray(outputs[:, 0]))
  chosen = grids.dynamic_programming(costs, n, gamma=1.15)
  return multistep.dpmpp_2m(search.schedule, search.fine[chosen])


METHODS: dict[str, Callable[[Search, list[Named], int], tables.SolverTable]] = {
  "learned": learned,
  "grid": grid,
  "compensated": compensated,
  "time_steps": time_steps,
  "strategies": strategies,
  "gits": gits,
}


def teachers(
  experiment: images.Experiment, params: Any, config: fields.Config, seed: int, num: int, fine: int
) -> list[solver_learning.Teacher]:
  """Trajectories to fit to, and as many held out: of a model, with the classes in turn."""
  num_classes = experiment.examples.num_classes
  shape = experiment.examples.train.shape[1:]
  labels = jnp.arange(num) % (num_classes or 1)

  def denoise(context, x, t):
    params, labels = context
    return images.denoiser(experiment.model, params, labels, num_classes, config.guidance)(x, t)

  table = solving.table(
    experiment.noising, config, solver="dpmpp_3m", grid="karras", evaluations=fine
  )
  keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), 2)  # not those of samples
  noise = [jax.random.normal(key, (num, *shape)) for key in keys]
  return [solver_learning.teacher(denoise, (params, labels), z, table) for z in noise]


def _prepare(wanted) -> tuple[Search, solver_learning.Teacher]:
  """The search, and the held-out trajectories, as the flags say."""
  experiment, params, _ = experiment_lib.restore_params(**wanted)
  if not isinstance(experiment, images.Experiment):
    raise ValueError("This run is of no diffusion model: it has no solver.")
  for name in _METHOD.value:
    fields.choose("method", name, METHODS)
  for text in _NFE.value:
    if not text.isdigit() or int(text) < 2:
      raise ValueError(f"--nfe={text}: numbers of evaluations are 2 or more.")
  config, seed = solving.chosen(experiment.config), draws.SEED.value
  fitted, held_out = teachers(
    experiment, params, config, seed, _TRAJECTORIES.value, _REFERENCE.value
  )
  start, end = solving.span(experiment.noising, config)
  times = grids.to_zero(grids.karras(experiment.noising, _FINE, start=start, end=end))
  rng = np.random.default_rng(seed)
  return Search(experiment.noising, config, fitted, times, rng, _FIT_STEPS.value), held_out


def main(_: Sequence[str]) -> None:
  """Searches, writes the tables, and shows what they are off by."""
  with flags.one_line_errors():
    wanted = flags.checkpoint()
    search, held_out = _prepare(wanted)
  folder = pathlib.Path(_TABLES.value or wanted["workdir"])
  folder.mkdir(parents=True, exist_ok=True)
  console = rich.console.Console(soft_wrap=True)
  shown = rich.table.Table("evaluations", "solver", "error fitted", "held out", "seconds", "file")
  for n in map(int, _NFE.value):
    best = ranked(search, n)
    row = [f"{best[0].error:.4f}", f"{solver_learning.error(held_out, best[0].table):.4f}"]
    shown.add_row(str(n), f"best named: {best[0].solver}, {best[0].grid}", *row, "", "")
    for name in _METHOD.value:
      began = time.perf_counter()
      table = METHODS[name](search, best, n)
      seconds = f"{time.perf_counter() - began:.0f}"
      path = folder / f"solver_{name}_{n}.json"
      path.write_text(tables.to_json(table))
      errors = [f"{solver_learning.error(t, table):.4f}" for t in (search.teacher, held_out)]
      shown.add_row(str(n), name, *errors, seconds, str(path))
      console.print(f"{name} {n}: {errors[1]} held out, {seconds} s, {path}")
  console.print(shown)


if __name__ == "__main__":
  flags.run(main, READS)
