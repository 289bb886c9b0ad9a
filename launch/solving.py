"""Solvers of diffusion by name, and the flags that choose one."""

import functools
import pathlib
from typing import Any

import ml_collections
import numpy as np
from absl import flags

from ..models import schedules
from ..sampling import ancestral, correctors, forms, grids, multistep, singlestep, tables
from . import draws, fields


def _steps(step: multistep.Step) -> tables.Solver:
  return functools.partial(_singlestep, step)


def _singlestep(step, schedule, times):
  return singlestep.singlestep(schedule, times, step)


_of = functools.partial
_DEIS = _of(multistep.deis, variable=forms.log_snr)

# Deterministic, then stochastic.
SOLVERS: dict[str, tables.Solver] = {
  "ddim": ancestral.ddim,
  "heun": _steps(singlestep.heun(forms.noise())),
  "rk4": _steps(singlestep.rk4(forms.noise())),
  "dpmpp_2m": multistep.dpmpp_2m,
  "dpmpp_3m": multistep.dpmpp_3m,
  "dpmpp_2s": _steps(singlestep.dpm_2s(forms.data())),
  "exponential_4": _of(multistep.exponential, order=4),
  "deis_2": _of(_DEIS, order=2),
  "deis_3": _of(_DEIS, order=3),
  "lms": multistep.lms,
  "ipndm": multistep.ipndm,
  "unipc_2": _of(correctors.unipc, order=2),
  "unipc_3": _of(correctors.unipc, order=3),
  "sa_ode": _of(correctors.sa_solver, tau=lambda t: 0.0),
  "ddpm": ancestral.ddpm,
  "euler_ancestral": _steps(ancestral.renoised(singlestep.euler)),
  "dpmpp_2m_sde": _of(multistep.dpmpp_2m, eta=1.0),
  "sa_sde": correctors.sa_solver,
}

# Of a schedule and a number of steps; the last time is `end`.
GRIDS = {
  "karras": grids.karras,
  "log_snr": grids.log_snr,
  "uniform": grids.uniform,
  "power": grids.power,
  "beta": grids.beta,
}

SOLVER = flags.DEFINE_string(
  "solver", None, f"One of {', '.join(SOLVERS)}, or a .json file of a table; the config's if unset."
)
EVALUATIONS = flags.DEFINE_integer(
  "evaluations", None, "Calls of the network, at most; the config's if unset.", lower_bound=1
)
GRID = flags.DEFINE_string("grid", None, f"One of {', '.join(GRIDS)}; the config's if unset.")
FLAGS = (SOLVER, EVALUATIONS, GRID, draws.GUIDANCE)


def chosen(config: fields.Config) -> fields.Config:
  """`config.evaluation` with what the flags say instead."""
  made = config.evaluation.copy_and_resolve_references()
  with made.unlocked():
    for flag in FLAGS:
      if flag.value is not None:
        made[flag.name] = flag.value
  return made


def span(schedule: schedules.Schedule, config: fields.Config) -> tuple[float, float]:
  """The times of the noise ratios `noisiest` (or the schedule's last) and `cleanest`."""
  start, end = (float(schedule.time(-np.log(r))) for r in (config.noisiest, config.cleanest))
  return min(start, schedule.max_time), end


def table(
  schedule: schedules.Schedule, config: fields.Config, **instead: Any
) -> tables.SolverTable:
  """The table of a solver by name on a grid by name, of as many evaluations as it may have.

  Args:
    schedule: of the model.
    config: with `solver` (or a JSON file of a table), `grid`, `evaluations`, and the noise ratios
      `noisiest` and `cleanest` between which the grid lies; its last step goes to no noise.
    instead: of fields of config.

  Raises:
    ValueError: there is none of that name, or none of so few evaluations.
  """
  config = ml_collections.ConfigDict({**config, **instead})
  if config.solver.endswith(".json"):
    return tables.from_json(pathlib.Path(config.solver).read_text())
  solver = fields.choose("evaluation.solver", config.solver, SOLVERS)
  grid = fields.choose("evaluation.grid", config.grid, GRIDS)
  start, end = span(schedule, config)

  def at(num_steps):
    return solver(schedule, grids.to_zero(grid(schedule, num_steps - 1, start=start, end=end)))

  for num_steps in range(config.evaluations, 0, -1):  # solvers may evaluate more than once a step
    made = at(num_steps)
    if made.num_rows <= config.evaluations:
      return made
  raise ValueError(f"{config.solver} needs {at(1).num_rows} evaluations; give as many.")
