"""Diffusion solvers on models whose denoisers are exact: order, error by evaluations, cost.

  python -m ancestral.benchmarks.solvers --figure=docs/figures/solvers.png     # minutes of CPU

Everything but the cost is numpy in float64. If diffusers is installed its schedulers are measured
beside: their coefficients are read off in float64 (see tests/parity/schedulers.py) and run on the
same denoiser from the same noise.

Errors by evaluations are against the solution of the probability flow equation at no noise. Of
many solvers and grids the best one is chosen for each number of evaluations, by the errors shown:
ours and theirs alike, of as many as are stated.
"""

import functools
import importlib.util
import math
import pathlib
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from scipy import integrate

from ancestral.models import schedules
from ancestral.sampling import (
  ancestral,
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

EXACT = forms.exact(forms.log_snr)
VE = schedules.variance_exploding()
CHAIN = schedules.from_betas(schedules.scaled_linear_betas())
LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


class Target(NamedTuple):
  """sum_k weights[k] N(means[k], variances[k] I)."""

  name: str
  weights: np.ndarray  # [K]
  means: np.ndarray  # [K, D]
  variances: np.ndarray  # [K]


def four_modes() -> Target:
  means = np.array([[1.0, 0.3], [-0.5, 0.9], [-0.7, -0.6], [0.6, -0.9]])
  variances = np.array([0.02, 0.04, 0.03, 0.05])
  return Target("4 modes in 2-D", np.array([0.3, 0.3, 0.2, 0.2]), means, variances)


def digits() -> Target:
  """The 1797 digits of 8 x 8 pixels in [-1, 1], each with a kernel of deviation 0.15."""
  from sklearn import datasets

  points = datasets.load_digits().data / 8 - 1
  num = len(points)
  return Target("digits in 64-D", np.full(num, 1 / num), points, np.full(num, 0.15**2))


def distances(points: np.ndarray, means: np.ndarray) -> np.ndarray:
  """|x_i - m_k|^2, [B, K]."""
  squares = np.sum(points**2, axis=1)[:, None] + np.sum(means**2, axis=1)[None]
  return squares - 2 * points @ means.T


def denoised(target: Target, x: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
  """E[x_0 | x_t = x] in float64, [B, D]; see `toy.mixture_denoiser`."""
  total = alpha**2 * target.variances + sigma**2
  log_joint = np.log(target.weights) - 0.5 * x.shape[1] * np.log(total)
  log_joint = log_joint[None] - 0.5 * distances(x, alpha * target.means) / total[None]
  share = np.exp(log_joint - log_joint.max(axis=1, keepdims=True))
  share /= share.sum(axis=1, keepdims=True)
  share /= total[None]
  slope = share @ target.variances
  return sigma**2 * share @ target.means + alpha * slope[:, None] * x


def run(table: tables.SolverTable, schedule, target: Target, x: np.ndarray) -> np.ndarray:
  """The sample from the state x [B, D] at times[0], by the table's recurrence."""
  slots = np.zeros((table.carry.shape[1], *x.shape))
  slots[0] = x
  alpha, sigma = schedule.alpha(table.times), schedule.sigma(table.times)
  for i in range(table.num_rows):
    output = denoised(target, slots[0], alpha[i], sigma[i])
    slots = np.einsum("jl,lbd->jbd", table.carry[i], slots)
    slots += table.output[i, :, 0][:, None, None] * output[None]
  return slots[0]


def replay(expansion: tables.Expansion, schedule, target: Target, x: np.ndarray) -> np.ndarray:
  """The same of an expansion, whose points are inputs of the state x at times[0] and outputs."""
  alpha, sigma = schedule.alpha(expansion.times), schedule.sigma(expansion.times)
  scale = expansion.inputs[:, 1] / expansion.inputs[0, 1]
  outputs = np.zeros((len(expansion.times) - 1, *x.shape))
  for i in range(len(outputs)):
    point = scale[i] * x + np.einsum("j,jbd->bd", expansion.outputs[i, :i, 0], outputs[:i])
    outputs[i] = denoised(target, point, alpha[i], sigma[i])
  return scale[-1] * x + np.einsum("j,jbd->bd", expansion.outputs[-1, :, 0], outputs)


def reference(target: Target, x: np.ndarray, first: float, last: float, tolerance: float):
  """x / alpha at lambda = last from x / alpha at lambda = first: d (x / alpha) = (D - x / alpha) d lambda."""

  def slope(half_log_snr, y):
    y = y.reshape(x.shape)
    return (denoised(target, y, 1.0, np.exp(-half_log_snr)) - y).ravel()

  span = dict(method="DOP853", rtol=tolerance, atol=tolerance)
  return integrate.solve_ivp(slope, (first, last), x.ravel(), **span).y[:, -1].reshape(x.shape)


# Solvers, as (schedule, times) -> table.


def stepping(step: multistep.Step) -> Callable:
  return lambda schedule, times: singlestep.singlestep(schedule, times, step)


def exponential(order: int, start: multistep.Step | None = None) -> Callable:
  return lambda schedule, times: multistep.exponential(schedule, times, order, start=start)


def published_3m(schedule, times) -> tables.SolverTable:
  rule = multistep.published_third_order
  return multistep.adams_bashforth(schedule, times, 3, form=forms.data(), rule=rule)


def deis(order: int, start: multistep.Step | None = None) -> Callable:
  return lambda schedule, times: multistep.deis(
    schedule, times, order, variable=forms.log_snr, start=start
  )


def lms(start: multistep.Step | None = None) -> Callable:
  return lambda schedule, times: multistep.lms(schedule, times, start=start)


def unipc(order: int) -> Callable:
  return lambda schedule, times: correctors.unipc(schedule, times, order)


def lowered(make: Callable, order: int) -> Callable:
  """With orders that fall to 1 at the end, as short runs want."""
  return lambda schedule, times: make(
    schedule, times, multistep.lowered_at_the_end(order, len(times) - 1)
  )


def sa(predictor_order: int, corrector_order: int) -> Callable:
  orders = {"predictor_order": predictor_order, "corrector_order": corrector_order}
  return lambda schedule, times: correctors.sa_solver(schedule, times, **orders, tau=lambda t: 0.0)


RK4, RK3 = singlestep.rk4, singlestep.rk3
DPM, SA = "dpmsolver_multistep.DPMSolverMultistepScheduler", "sasolver.SASolverScheduler"
SINGLE = "dpmsolver_singlestep.DPMSolverSinglestepScheduler"
UNIPC, DEIS = "unipc_multistep.UniPCMultistepScheduler", "deis_multistep.DEISMultistepScheduler"
LMS, EULER = "lms_discrete.LMSDiscreteScheduler", "euler_discrete.EulerDiscreteScheduler"


def sa_settings(predictor_order: int, corrector_order: int) -> dict:
  orders = {"predictor_order": predictor_order, "corrector_order": corrector_order}
  return orders | {"tau_func": lambda t: 0.0}


# name: nominal order, ours, diffusers' class and settings
ORDERS = {
  "DDIM": (1, stepping(singlestep.euler), (EULER, {})),
  "DPM++ 2M": (2, multistep.dpmpp_2m, (DPM, {"solver_order": 2})),
  "DPM++ 3M": (3, exponential(3), (DPM, {"solver_order": 3})),
  "DPM++ 3M, the published rule": (3, published_3m, (DPM, {"solver_order": 3})),
  "DPM++ 3M, 3S start": (3, exponential(3, singlestep.dpm_3s(forms.data())), None),
  "exp. Adams-Bashforth 4": (4, exponential(4), None),
  "exp. Adams-Bashforth 4, RK4 start": (4, exponential(4, RK4(forms.data())), None),
  "DPM++ 2S": (2, stepping(singlestep.dpm_2s(forms.data())), (SINGLE, {"solver_order": 2})),
  "DPM++ 3S": (3, stepping(singlestep.dpm_3s(forms.data())), (SINGLE, {"solver_order": 3})),
  "Heun": (2, stepping(singlestep.heun(forms.noise())), None),
  "RK3": (3, stepping(RK3(forms.noise())), None),
  "RK4": (4, stepping(RK4(forms.noise())), None),
  "DEIS-2": (2, deis(2), (DEIS, {"solver_order": 2})),
  "DEIS-3": (3, deis(3), (DEIS, {"solver_order": 3})),
  "DEIS-3, RK3 start": (3, deis(3, RK3(forms.noise())), None),
  "LMS-4": (4, lms(), (LMS, {})),
  "LMS-4, RK4 start": (4, lms(RK4(forms.noise())), None),
  **{f"UniPC-{p}": (p + 1, unipc(p), (UNIPC, {"solver_order": p})) for p in (1, 2, 3, 4)},
  "SA p2c2, tau 0": (2, sa(2, 2), (SA, sa_settings(2, 2))),
  "SA p3c4, tau 0": (4, sa(3, 4), (SA, sa_settings(3, 4))),
}


def peers():
  """The harness of the tests that reads coefficients off diffusers."""
  root = str(pathlib.Path(__file__).resolve().parents[1] / "tests")
  if root not in sys.path:
    sys.path.append(root)
  from parity import schedulers

  return schedulers


def peer_view(name: str):
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


def rms(error: np.ndarray) -> float:
  return float(np.sqrt(np.mean(error**2)))


def order_table(num_samples: int) -> None:
  """Errors at 256 steps and the slope from 128 to 256, in lambda from -2 to 3."""
  sizes, target = (32, 64, 128, 256), four_modes()
  x = np.exp(2.0) * np.random.default_rng(0).normal(size=(num_samples, 2))
  truth = reference(target, x, -2.0, 3.0, 1e-12)
  grid = lambda n: np.exp(np.linspace(2.0, -3.0, n + 1))

  def theirs(peer, n):
    schedule = peer_view(peer[0]).schedule
    first, last = schedule.alpha(grid(n)[[0, -1]])
    return replay(peer_on_grid(*peer, grid(n)), schedule, target, first * x) / last

  def cells(sample_of):
    errors = [rms(sample_of(n) - truth) for n in sizes]
    return f"{errors[0]:.2e} | {errors[-1]:.2e} | {math.log2(errors[-2] / errors[-1]):.2f}"

  print("\n| solver | order | error at 32 | at 256 | slope | diffusers: at 32 | at 256 | slope |")
  print("|---|---|---|---|---|---|---|---|")
  for name, (order, make, peer) in ORDERS.items():
    ours = cells(lambda n, make=make: run(make(VE, grid(n)), VE, target, x))
    beside = "| | "
    if peer is not None and _PEERS.value:
      beside = cells(lambda n, peer=peer: theirs(peer, n))
    print(f"| {name} | {order} | {ours} | {beside} |", flush=True)


SOLVERS = {
  "DDIM": stepping(singlestep.euler),
  "2M": multistep.dpmpp_2m,
  "3M": exponential(3),
  "3M lowered": lowered(multistep.exponential, 3),
  "AB4 lowered": lowered(multistep.exponential, 4),
  "UniPC-2": lowered(correctors.unipc, 2),
  "UniPC-3": lowered(correctors.unipc, 3),
  "DEIS-2": deis(2),
  "tAB-DEIS-3": multistep.deis,
  "LMS-4": lms(),
  "iPNDM": multistep.ipndm,
  "SA p3c4": sa(3, 4),
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
  "LMS karras": (LMS, {"use_karras_sigmas": True}),
  "SA tau 0": (SA, sa_settings(2, 2)),
}


@functools.cache
def ours_within(solver: str, grid: str, nfe: int) -> tables.SolverTable:
  """The most steps whose evaluations are within this number."""
  for n in range(nfe, 0, -1):
    table = SOLVERS[solver](CHAIN, GRIDS[grid](n))
    if table.num_rows <= nfe:
      return table
  raise ValueError(f"{solver} takes more than {nfe} evaluations for one step.")


@functools.cache
def theirs_within(name: str, nfe: int) -> tuple[tables.Expansion, schedules.Schedule]:
  harness, (scheduler, settings) = peers(), PEERS[name]
  chain = scheduler.startswith(("ddim", "pndm"))
  view = harness.LATENT_TO_FIRST if chain else peer_view(scheduler)
  settings = settings | LATENT | ({"set_alpha_to_one": False} if chain else {})
  case = harness.Case(scheduler, view, settings)
  n = nfe
  while len(case.build(n).timesteps) > nfe:
    n -= 1
  return harness.expansion(case, n), view.schedule


class Score(NamedTuple):
  """Of samples against the reference's."""

  rms: float
  median: float  # of the samples' own RMS
  moved: float  # share whose nearest mean is another


def score(target: Target, x: np.ndarray, truth: np.ndarray) -> Score:
  if not np.all(np.isfinite(x)):
    return Score(np.inf, np.inf, 1.0)
  nearest = lambda points: np.argmin(distances(points, target.means), axis=1)
  each = np.sqrt(np.mean((x - truth) ** 2, axis=1))
  return Score(rms(x - truth), float(np.median(each)), np.mean(nearest(x) != nearest(truth)))


def scores(target: Target, nfes: list[int], num_samples: int) -> tuple[dict, dict]:
  """{(solver, grid, nfe): Score} of ours, {(scheduler, nfe): Score} of theirs."""
  x = np.random.default_rng(1).normal(size=(num_samples, target.means.shape[1]))
  last = CHAIN.max_time
  first = float(schedules.half_log_snr(CHAIN, last))
  ratio = lambda schedule, t: schedule.alpha(t) / CHAIN.alpha(last)
  tolerance = 1e-8 if len(target.means) > 100 else 1e-10
  truth = reference(target, x / CHAIN.alpha(last), first, 8.0, tolerance)
  truth = denoised(target, truth, 1.0, np.exp(-8.0))
  ours = {
    (solver, grid, nfe): score(
      target, run(ours_within(solver, grid, nfe), CHAIN, target, x), truth
    )
    for solver in SOLVERS
    for grid in GRIDS
    for nfe in nfes
  }
  theirs = {}
  for name in PEERS if _PEERS.value else ():
    for nfe in nfes:
      expansion, schedule = theirs_within(name, nfe)
      # A pipeline starts from the same noise wherever its first time is.
      scale = ratio(schedule, expansion.times[0]) if PEERS[name][0] == LMS else 1.0
      sample = replay(expansion, schedule, target, scale * x)
      theirs[name, nfe] = score(target, sample, truth)
  return ours, theirs
