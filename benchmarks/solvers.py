"""Diffusion solvers on models whose denoisers are exact: order, error by evaluations, cost.

  python -m ancestral.benchmarks.solvers --figure=docs/figures/solvers.png     # minutes of CPU

Everything but the cost is numpy in float64. If diffusers is installed its schedulers are measured
beside: their coefficients are read off in float64 (see tests/parity/schedulers.py) and run on the
same denoiser from the same noise.

Errors by evaluations are against the solution of the probability flow equation at no noise. Of
many solvers and grids the best is chosen for each number of evaluations, by the errors shown: ours
of every solver on every grid, theirs of the settings listed, which are fewer.
"""

import functools
import importlib.util
import math
import pathlib
import sys
import timeit
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from ancestral.benchmarks import exact_targets
from ancestral.models import schedules
from ancestral.sampling import (
  base,
  correctors,
  forms,
  grids,
  multistep,
  singlestep,
  solvers,
  tables,
)

_NFE = flags.DEFINE_list("nfe", "3,5,6,8,10,15,20,30,50", "Numbers of evaluations.")
_FIGURE = flags.DEFINE_string("figure", None, "File for the figure.")
_CSV = flags.DEFINE_string("csv", None, "File for every error measured.")
_ROWS = flags.DEFINE_integer("rows", 256, "Samples.")
_PEERS = flags.DEFINE_bool(
  "peers", importlib.util.find_spec("diffusers") is not None, "Measure diffusers beside."
)

VE = schedules.variance_exploding()
CHAIN = schedules.from_betas(schedules.scaled_linear_betas())
LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


# Solvers, as (schedule, times) -> table.


def stepping(step: multistep.Step) -> Callable:
  """The same step over the grid."""
  return lambda schedule, times: singlestep.singlestep(schedule, times, step)


def lowered(make: Callable, order: int) -> Callable:
  """With orders that fall to 1 at the end, as short runs want."""
  return lambda schedule, times: make(
    schedule, times, multistep.lowered_at_the_end(order, len(times) - 1)
  )


partial = functools.partial
PUBLISHED_3M = partial(
  multistep.adams_bashforth, order=3, form=forms.data(), rule=multistep.published_third_order
)
DEIS_IN_LAMBDA = partial(multistep.deis, variable=forms.log_snr)
EXPONENTIAL_4 = partial(multistep.exponential, order=4)
SA_ODE = partial(correctors.sa_solver, tau=lambda t: 0.0)
RK4, RK3 = singlestep.rk4, singlestep.rk3
DPM, SA = "dpmsolver_multistep.DPMSolverMultistepScheduler", "sasolver.SASolverScheduler"
SINGLE = "dpmsolver_singlestep.DPMSolverSinglestepScheduler"
UNIPC, DEIS = "unipc_multistep.UniPCMultistepScheduler", "deis_multistep.DEISMultistepScheduler"
LMS, EULER = "lms_discrete.LMSDiscreteScheduler", "euler_discrete.EulerDiscreteScheduler"


def sa_settings(predictor_order: int, corrector_order: int) -> dict:
  """SA-Solver without noise, of diffusers."""
  orders = {"predictor_order": predictor_order, "corrector_order": corrector_order}
  return orders | {"tau_func": lambda t: 0.0}


# name: nominal order, ours
ORDERS = {
  "DDIM": (1, stepping(singlestep.euler)),
  "DPM++ 2M": (2, multistep.dpmpp_2m),
  "DPM++ 3M": (3, multistep.dpmpp_3m),
  "DPM++ 3M, the published rule": (3, PUBLISHED_3M),
  "DPM++ 3M, 3S start": (3, partial(multistep.dpmpp_3m, start=singlestep.dpm_3s(forms.data()))),
  "exp. Adams-Bashforth 4": (4, EXPONENTIAL_4),
  "exp. Adams-Bashforth 4, RK4 start": (4, partial(EXPONENTIAL_4, start=RK4(forms.data()))),
  "DPM++ 2S": (2, stepping(singlestep.dpm_2s(forms.data()))),
  "DPM++ 3S": (3, stepping(singlestep.dpm_3s(forms.data()))),
  "Heun": (2, stepping(singlestep.heun(forms.noise()))),
  "RK3": (3, stepping(RK3(forms.noise()))),
  "RK4": (4, stepping(RK4(forms.noise()))),
  "DEIS-2": (2, partial(DEIS_IN_LAMBDA, order=2)),
  "DEIS-3": (3, partial(DEIS_IN_LAMBDA, order=3)),
  "DEIS-3, RK3 start": (3, partial(DEIS_IN_LAMBDA, order=3, start=RK3(forms.noise()))),
  "LMS-4": (4, multistep.lms),
  "LMS-4, RK4 start": (4, partial(multistep.lms, start=RK4(forms.noise()))),
  **{f"UniPC-{p}": (p + 1, partial(correctors.unipc, order=p)) for p in (1, 2, 3, 4)},
  "SA p2c2, tau 0": (2, partial(SA_ODE, predictor_order=2, corrector_order=2)),
  "SA p3c4, tau 0": (4, SA_ODE),
}

PEER_ORDERS = {
  "DDIM": (EULER, {}),
  "DPM++ 2M": (DPM, {}),
  "DPM++ 3M": (DPM, {"solver_order": 3}),
  "DPM++ 3M, the published rule": (DPM, {"solver_order": 3}),
  "DPM++ 2S": (SINGLE, {"solver_order": 2}),
  "DPM++ 3S": (SINGLE, {"solver_order": 3}),
  "DEIS-2": (DEIS, {}),
  "DEIS-3": (DEIS, {"solver_order": 3}),
  "LMS-4": (LMS, {}),
  **{f"UniPC-{p}": (UNIPC, {"solver_order": p}) for p in (1, 2, 3, 4)},
  "SA p2c2, tau 0": (SA, sa_settings(2, 2)),
  "SA p3c4, tau 0": (SA, sa_settings(3, 4)),
}


def peers():
  """The harness of the tests that reads coefficients off diffusers."""
  root = str(pathlib.Path(__file__).resolve().parents[1] / "tests")
  if root not in sys.path:
    sys.path.append(root)
  from parity import schedulers

  return schedulers


def peer_view(name: str):
  """How a scheduler's state is to be read."""
  return peers().EXPLODING if name in (LMS, EULER) else peers().PRESERVING


def peer_on_grid(name: str, settings: dict, ratios: np.ndarray) -> tables.Expansion:
  """A scheduler's expansion where its list of noise ratios is replaced by this one."""
  harness = peers()
  import torch

  class OnGrid(harness.Case):
    def build(self, num_steps):
      scheduler = super().build(num_steps)
      scheduler.sigmas = torch.from_numpy(ratios)
      return scheduler

  more = {} if name in (LMS, EULER) else {"lower_order_final": False}
  if name in (DPM, SINGLE, UNIPC):
    more["final_sigmas_type"] = "sigma_min"
  return harness.expansion(OnGrid(name, peer_view(name), settings | more), len(ratios) - 1)


def order_table(num_samples: int) -> None:
  """Errors at 256 steps and the slope from 128 to 256, in lambda from -2 to 3."""
  sizes, target = (32, 64, 128, 256), exact_targets.four_modes()
  x = np.exp(2.0) * np.random.default_rng(0).normal(size=(num_samples, 2))
  truth = exact_targets.reference(target, x, -2.0, 3.0, 1e-12)
  grid = lambda n: np.exp(np.linspace(2.0, -3.0, n + 1))

  def theirs(peer, n):
    schedule = peer_view(peer[0]).schedule
    first, last = schedule.alpha(grid(n)[[0, -1]])
    # Their lists have the stages of a step in it, ours the steps.
    ratios = grid(n * peer[1]["solver_order"]) if peer[0] == SINGLE else grid(n)
    return exact_targets.replay(peer_on_grid(*peer, ratios), schedule, target, first * x) / last

  def cells(sample_of):
    errors = [exact_targets.rms(sample_of(n) - truth) for n in sizes]
    return f"{errors[0]:.2e} | {errors[-1]:.2e} | {math.log2(errors[-2] / errors[-1]):.2f}"

  print("\n| solver | order | error at 32 | at 256 | slope | diffusers: at 32 | at 256 | slope |")
  print("|---|---|---|---|---|---|---|---|")
  for name, (order, make) in ORDERS.items():
    ours = cells(lambda n, make=make: exact_targets.run(make(VE, grid(n)), VE, target, x))
    beside = "| | "
    if _PEERS.value and name in PEER_ORDERS:
      beside = cells(lambda n, peer=PEER_ORDERS[name]: theirs(peer, n))
    print(f"| {name} | {order} | {ours} | {beside} |", flush=True)


SOLVERS = {
  "DDIM": stepping(singlestep.euler),
  "2M": multistep.dpmpp_2m,
  "3M": multistep.dpmpp_3m,
  "3M lowered": lowered(multistep.exponential, 3),
  "AB4 lowered": lowered(multistep.exponential, 4),
  "UniPC-2": lowered(correctors.unipc, 2),
  "UniPC-3": lowered(correctors.unipc, 3),
  "DEIS-2": partial(DEIS_IN_LAMBDA, order=2),
  "tAB-DEIS-3": multistep.deis,
  "LMS-4": multistep.lms,
  "iPNDM": multistep.ipndm,
  "SA p3c4": SA_ODE,
  "Heun": stepping(singlestep.heun(forms.noise())),
  "2S": stepping(singlestep.dpm_2s(forms.data())),
  "3S": stepping(singlestep.dpm_3s(forms.data())),
}

SPACINGS = {
  "log_snr": grids.log_snr,
  "karras": grids.karras,
  "uniform": grids.uniform,
  "quadratic": grids.power,
}

# The chain's first state, time 1, is where grids end: there, or with a jump to 0.
GRIDS = {
  f"{name}, {end}": make
  for name, spacing in SPACINGS.items()
  for end, make in {
    "stop": lambda n, spacing=spacing: spacing(CHAIN, n, end=1.0),
    "jump": lambda n, spacing=spacing: grids.to_zero(spacing(CHAIN, n - 1, end=1.0)),
  }.items()
}

PEERS = {
  "DDIM trailing": ("ddim.DDIMScheduler", {"timestep_spacing": "trailing"}),
  "PNDM": ("pndm.PNDMScheduler", {"skip_prk_steps": True}),
  "PNDM trailing": ("pndm.PNDMScheduler", {"skip_prk_steps": True, "timestep_spacing": "trailing"}),
  "DPM++ 2M": (DPM, {}),
  "DPM++ 2M lu": (DPM, {"use_lu_lambdas": True}),
  "DPM++ 2M karras": (DPM, {"use_karras_sigmas": True}),
  "DPM++ 3M lu": (DPM, {"solver_order": 3, "use_lu_lambdas": True}),
  "DPM++ 3M karras": (DPM, {"solver_order": 3, "use_karras_sigmas": True}),
  "UniPC-2": (UNIPC, {}),
  "UniPC-2 karras": (UNIPC, {"use_karras_sigmas": True}),
  "UniPC-2 exponential": (UNIPC, {"use_exponential_sigmas": True}),
  "UniPC-3 karras": (UNIPC, {"solver_order": 3, "use_karras_sigmas": True}),
  "DEIS-2 karras": (DEIS, {"use_karras_sigmas": True}),
  "DEIS-3": (DEIS, {"solver_order": 3}),
  "DPM++ 2M beta": (DPM, {"use_beta_sigmas": True}),
  "UniPC-2 beta": (UNIPC, {"use_beta_sigmas": True}),
  "LMS karras": (LMS, {"use_karras_sigmas": True}),
  "SA tau 0": (SA, sa_settings(2, 2)),
}


@functools.cache
def ours_within(solver: str, grid: str, nfe: int) -> tables.SolverTable:
  """The most steps whose evaluations are within this number."""
  n = nfe
  while (table := SOLVERS[solver](CHAIN, GRIDS[grid](n))).num_rows > nfe and n > 1:
    n = max(1, min(n - 1, n * nfe // table.num_rows + 1))
  return table


@functools.cache
def theirs_within(name: str, nfe: int) -> tuple[tables.Expansion, schedules.Schedule]:
  """A scheduler's most steps whose evaluations are within this number."""
  harness, (scheduler, settings) = peers(), PEERS[name]
  chain = scheduler.startswith(("ddim", "pndm"))
  view = harness.LATENT_TO_FIRST if chain else peer_view(scheduler)
  settings = settings | LATENT | ({"set_alpha_to_one": False} if chain else {})
  case = harness.Case(scheduler, view, settings)
  n = nfe
  while len(case.build(n).timesteps) > nfe:
    n -= 1
  return harness.expansion(case, n), view.schedule


def scores(target: exact_targets.Target, nfes: list[int], num_samples: int) -> tuple[dict, dict]:
  """{(solver, grid, nfe): score} of ours, {(scheduler, nfe): score} of theirs."""
  x = np.random.default_rng(1).normal(size=(num_samples, target.means.shape[1]))
  truth = exact_targets.solution(target, CHAIN, x)
  ours = {
    (solver, grid, nfe): exact_targets.score(
      target, exact_targets.run(ours_within(solver, grid, nfe), CHAIN, target, x), truth
    )
    for solver in SOLVERS
    for grid in GRIDS
    for nfe in nfes
  }
  theirs = {}
  for name in PEERS if _PEERS.value else ():
    for nfe in nfes:
      expansion, schedule = theirs_within(name, nfe)
      # Variance exploding, the state is x / alpha. Where a first time is lower, x stays as it is.
      scale = CHAIN.alpha(CHAIN.max_time) if PEERS[name][0] == LMS else 1.0
      sample = exact_targets.replay(expansion, schedule, target, x / scale)
      theirs[name, nfe] = exact_targets.score(target, sample, truth)
  return ours, theirs


def best(found: dict, nfe: int, kept: Callable = lambda key: True) -> tuple:
  """The key of the lowest RMS among those of this number of evaluations."""
  return min((key for key in found if key[-1] == nfe and kept(key)), key=lambda key: found[key].rms)


def error_tables(target: exact_targets.Target, nfes: list[int], ours: dict, theirs: dict) -> None:
  """RMS by evaluations: each solver on its best grid, each grid with its best solver, theirs."""
  row = lambda name, cells: print(f"| {name} | " + " | ".join(cells) + " |")
  keys = lambda where, name: [best(ours, n, lambda key: key[where] == name) for n in nfes]
  print(f"\n### {target.name}\n\nRMS; solvers on the best grid of {len(GRIDS)} for each number.\n")
  row("evaluations", [str(n) for n in nfes])
  print("|---" * (len(nfes) + 1) + "|")
  for solver in SOLVERS:
    row(solver, [f"{ours[key].rms:.4f}" for key in keys(0, solver)])
  for grid in GRIDS:
    row(f"any solver on {grid}", [f"{ours[key].rms:.4f}" for key in keys(1, grid)])
  for name in dict.fromkeys(name for name, _ in theirs):
    row(f"diffusers {name}", [f"{theirs[name, n].rms:.4f}" for n in nfes])
  print("\nThe best by RMS.\n\n| evaluations | of | which | RMS | median | another mode |")
  print("|---" * 6 + "|")
  for n in nfes:
    for whose, found in (("ours", ours), ("diffusers", theirs)):
      if found:
        at = found[key := best(found, n)]
        numbers = [f"{at.rms:.4f}", f"{at.median:.5f}", f"{at.moved:.1%}"]
        row(str(n), [whose, ", ".join(key[:-1]), *numbers])


def least_time(function: Callable) -> float:
  """Seconds, the least of some runs."""
  return min(timeit.repeat(function, number=1, repeat=8))


def step_cost(num_rows: int = 50) -> None:
  """Microseconds a step at 64 x 3 x 32 x 32, beside moving 2 k + 1 arrays at a copy's speed."""
  shape = (64, 3, 32, 32)
  size = 64 * 2**20  # bytes; out of cache
  source, target = np.ones(size // 4, np.float32), np.empty(size // 4, np.float32)
  bandwidth = 2 * size / least_time(lambda: np.copyto(target, source))
  keys, x = base.row_keys(jax.random.key(0), jnp.arange(shape[0])), jnp.zeros(shape)
  times = grids.log_snr(CHAIN, num_rows, end=1.0)
  print(f"\nA copy moves {bandwidth / 1e9:.1f} GB/s, read and written, on {jax.devices()[0]}.\n")
  print("| k | noise | us a step | moving 2 k + 1 arrays | ratio |\n|---|---|---|---|---|")
  for eta in (0.0, 1.0):
    for order in (1, 2, 3):
      table = multistep.exponential(CHAIN, times, order, eta=eta)
      k = table.carry.shape[1]
      draw = jax.jit(lambda table, x: solvers.sample(keys, lambda x, t: 0.5 * x, table, x))
      took = (
        least_time(lambda draw=draw, table=table: draw(table, x).block_until_ready()) / num_rows
      )
      bound = (2 * k + 1) * 4 * math.prod(shape) / bandwidth
      noise = "none" if table.noise is None else "white"
      print(f"| {k} | {noise} | {1e6 * took:.0f} | {1e6 * bound:.0f} | {took / bound:.1f} |")


def draw_figure(
  path: str, nfes: list[int], results: list[tuple[exact_targets.Target, dict, dict]]
) -> None:
  """Error by evaluations, a panel a target: the best of ours for each grid, the best of theirs."""
  from matplotlib import figure as figures  # no global state, so no pyplot
  from matplotlib.backends import backend_agg

  figure = figures.Figure(figsize=(9, 3.6), dpi=110)
  canvas = backend_agg.FigureCanvasAgg(figure)
  panels = figure.subplots(1, len(results))
  for panel, (target, ours, theirs) in zip(panels, results, strict=True):
    for spacing in SPACINGS:
      of_spacing = lambda key, spacing=spacing: key[1].startswith(spacing)
      errors = [ours[best(ours, n, of_spacing)].rms for n in nfes]
      panel.loglog(nfes, errors, marker=".", label=f"ours, {spacing}")
    if theirs:
      errors = [theirs[best(theirs, n)].rms for n in nfes]
      panel.loglog(nfes, errors, "k--", marker="x", label=f"best of {len(PEERS)} of diffusers")
    panel.set_title(target.name)
    panel.set_xlabel("evaluations")
    panel.set_xticks(nfes, [str(n) for n in nfes])
    panel.minorticks_off()
  panels[0].set_ylabel("RMS to the equation's solution")
  panels[0].legend(frameon=False, fontsize=8)
  figure.tight_layout()
  canvas.print_png(path)


def main(_):
  """Prints the tables; writes what flags ask for."""
  nfes, results, lines = (
    [int(n) for n in _NFE.value],
    [],
    ["target,whose,which,nfe,rms,median,moved"],
  )
  order_table(_ROWS.value)
  for target in (exact_targets.four_modes(), exact_targets.digits()):
    ours, theirs = scores(target, nfes, _ROWS.value)
    error_tables(target, nfes, ours, theirs)
    results.append((target, ours, theirs))
    for whose, found in (("ours", ours), ("diffusers", theirs)):
      for (*which, nfe), at in found.items():
        numbers = f"{at.rms:.6g},{at.median:.6g},{at.moved:.4f}"
        lines.append(f"{target.name},{whose},{' / '.join(which).replace(',', '')},{nfe},{numbers}")
  if _CSV.value:
    pathlib.Path(_CSV.value).write_text("\n".join(lines) + "\n")
  if _FIGURE.value:
    draw_figure(_FIGURE.value, nfes, results)
  step_cost()


if __name__ == "__main__":
  app.run(main)
