"""What the schedulers of diffusers compute, as tables.

A scheduler without clipping is linear in its state, in the model's outputs and in its noise. Run
on unit vectors it gives away its coefficients: `expansion` is the `tables.Expansion` of a
scheduler, to be compared with that of our table at the scheduler's own times, so that grids and
coefficients are compared apart. diffusers rounds to float32 at many places; `in_double` has its
modules take float64 for float32, which leaves the formulas.
"""

import contextlib
import functools
import importlib
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest

from ancestral.models import precondition, schedules
from ancestral.sampling import tables


@functools.cache
def scheduler_module(name: str) -> types.ModuleType:
  """The module of diffusers with a scheduler, if diffusers is installed."""
  with _quiet(Warning):  # of what it imports
    pytest.importorskip("torch")
    pytest.importorskip("diffusers").logging.set_verbosity_error()
    # One scheduler draws its noise with torchsde. It is given ours, see `points`.
    absent = types.ModuleType("torchsde")
    sys.modules.setdefault("torchsde", absent)
    try:
      return importlib.import_module(f"diffusers.schedulers.scheduling_{name}")
    finally:
      if sys.modules["torchsde"] is absent:
        del sys.modules["torchsde"]


@contextlib.contextmanager
def _quiet(category: type[Warning]):
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", category)
    yield


# Variance preserving, time being rho = sigma / alpha, as in the `sigmas` of most schedulers.
RATIO = schedules.Schedule(
  alpha=lambda t: 1 / (1 + t**2) ** 0.5,
  sigma=lambda t: t / (1 + t**2) ** 0.5,
  time=lambda half_log_snr: np.exp(-half_log_snr),
  max_time=np.inf,
)


class View(NamedTuple):
  """How a scheduler's state and its model are to be read.

  Attributes:
    schedule: the state at time t is alpha(t) x_0 + sigma(t) z.
    times: (scheduler) -> [n + 1], the times of its n calls of the model and of its sample.
    output: (x, E[x_0 | x], alpha, sigma) -> what the scheduler wants of its model.
  """

  schedule: schedules.Schedule
  times: Callable[[Any], np.ndarray]
  output: Callable[..., Any]


def preconditioned(x, denoised, alpha, sigma, sigma_data=0.5):
  """F in E[x_0 | x] = c_skip x + c_out F; Karras et al. 2022, arXiv 2206.00364, table 1."""
  del alpha
  total = sigma**2 + sigma_data**2
  return (denoised - sigma_data**2 / total * x) / (sigma * sigma_data / total**0.5)


def _array(tensor) -> np.ndarray:
  return tensor.detach().numpy().astype(np.float64)


def sigmas(scheduler) -> np.ndarray:
  """The times of schedulers that keep a list of them."""
  return _array(scheduler.sigmas)


def labels(end: float) -> Callable[[Any], np.ndarray]:
  """The times of schedulers of a chain, which count its steps from 0, and then `end`."""
  return lambda scheduler: np.append(_array(scheduler.timesteps) + 1, end)


def below_labels(scheduler) -> np.ndarray:
  """Where DDIM's inversion starts its steps from, each a step below its label."""
  ends = _array(scheduler.timesteps) + 1
  return np.append(np.maximum(ends - np.floor(1000 / len(ends)), 1), ends[-1])


def in_pairs(middle: Callable) -> Callable[[Any], np.ndarray]:
  """s_0, middle(s_0, s_1), s_1, .., s_{N-1}, 0: N steps, the last of which has no middle."""

  def times(scheduler):
    ends = np.unique(_array(scheduler.sigmas))[::-1]  # N + 1, of which they repeat some
    inner = middle(ends[:-2], ends[1:-1])
    return np.append(np.stack([ends[:-2], inner], axis=1).ravel(), ends[-2:])

  return times


PRESERVING = View(RATIO, sigmas, precondition.NOISE.from_denoised)
EXPLODING = View(schedules.variance_exploding(np.inf), sigmas, precondition.NOISE.from_denoised)
GEOMETRIC = EXPLODING._replace(times=in_pairs(lambda s, t: np.sqrt(s * t)))
ALL_THE_WAY = EXPLODING._replace(times=in_pairs(lambda s, t: t))
KARRAS = EXPLODING._replace(output=preconditioned)
STRAIGHT = View(schedules.rectified_flow(), sigmas, precondition.FLOW.from_denoised)
QUARTER_CIRCLE = View(
  schedules.trigonometric(),
  lambda scheduler: np.append(_array(scheduler.timesteps), 0.0),
  precondition.VELOCITY.from_denoised,
)


def chain(betas: np.ndarray, times: Callable[[Any], np.ndarray]) -> View:
  return View(schedules.from_betas(betas), times, precondition.NOISE.from_denoised)


LINEAR = chain(schedules.linear_betas(), labels(0.0))
LINEAR_TO_FIRST = LINEAR._replace(times=labels(1.0))
LINEAR_FROM_FIRST = LINEAR._replace(times=below_labels)
LATENT = chain(schedules.scaled_linear_betas(), labels(0.0))
LATENT_TO_FIRST = LATENT._replace(times=labels(1.0))


class Case(NamedTuple):
  """A scheduler, how to read it, and settings that make it linear.

  Attributes:
    scheduler: module.Class, without what all modules' names begin with.
    settings: of its constructor.
    step: of its `step`.
  """

  scheduler: str
  view: View
  settings: dict = {}  # noqa: RUF012  (not changed)
  step: dict = {}  # noqa: RUF012

  def module(self) -> types.ModuleType:
    return scheduler_module(self.scheduler.partition(".")[0])

  def build(self, num_steps: int):
    module = self.module()
    # Noise prediction is deprecated there; numpy deprecates how it reads tensors.
    with _quiet(FutureWarning), _quiet(DeprecationWarning):
      scheduler = getattr(module, self.scheduler.partition(".")[2])(**self.settings)
      scheduler.set_timesteps(num_steps)
    return scheduler


class _Float64For32:
  """A module of arrays that says float64 where float32 is asked for."""

  def __init__(self, module):
    self._module = module
    self.float32 = module.float64

  def __getattr__(self, name):
    return getattr(self._module, name)


@contextlib.contextmanager
def in_double(case: Case):
  """diffusers' float32 is float64 inside, in the module of this scheduler."""
  module = case.module()
  import torch

  dtype = torch.get_default_dtype()
  arrays = {"torch": _Float64For32(torch), "np": _Float64For32(np)}
  torch.set_default_dtype(torch.float64)
  try:
    with mock.patch.multiple(module, create=True, **arrays):
      yield
  finally:
    torch.set_default_dtype(dtype)


def points(case: Case, scheduler, denoise: Callable, x: np.ndarray, noise: Callable) -> np.ndarray:
  """Where a scheduler calls its model, and its sample, [n + 1, width].

  Args:
    case: what the scheduler is of.
    scheduler: with its steps set.
    denoise: (i, x [width], time) -> E[x_0 | x] at call i.
    x: the first point [width].
    noise: (i) -> z [width], drawn after call i.
  """
  import torch

  times = case.view.times(scheduler)
  alpha, sigma = case.view.schedule.alpha(times), case.view.schedule.sigma(times)
  dtype = torch.get_default_dtype()
  tensor = lambda v: torch.from_numpy(np.array(v)).to(dtype).reshape(1, 1, 1, -1)
  flat = lambda v: v.reshape(-1).numpy()
  x, visited = tensor(x), []
  for i, label in enumerate(scheduler.timesteps):
    visited.append(flat(x))
    if hasattr(scheduler, "scale_model_input"):
      scheduler.scale_model_input(x, label)
    denoised = tensor(denoise(i, flat(x), times[i]))
    output = case.view.output(x, denoised, float(alpha[i]), float(sigma[i]))
    draw = lambda *_, i=i, **__: tensor(noise(i))
    if hasattr(scheduler, "noise_sampler"):
      scheduler.noise_sampler = draw  # instead of a Brownian path
    patched = mock.patch.object(case.module(), "randn_tensor", draw, create=True)
    with patched, _quiet(DeprecationWarning):
      x = scheduler.step(output, label, x, **case.step, return_dict=False)[0]
  return np.stack([*visited, flat(x)])


def expansion(case: Case, num_steps: int) -> tables.Expansion:
  """The scheduler's points in terms of the input, the outputs and the noise; see `tables`."""
  with in_double(case):
    scheduler = case.build(num_steps)
    n, times = len(scheduler.timesteps), case.view.times(scheduler)
    units = np.eye(2 + 2 * n)
    alpha, sigma = case.view.schedule.alpha(times[0]), case.view.schedule.sigma(times[0])
    visited = points(
      case,
      scheduler,
      denoise=lambda i, x, t: units[2 + i],
      x=alpha * units[0] + sigma * units[1],
      noise=lambda i: units[2 + n + i],
    )
  outputs = visited[:, 2 : 2 + n].reshape(n + 1, n, 1)
  return tables.Expansion(times, visited[:, :2], outputs, visited[:, 2 + n :])


def replayed(solver: tables.Expansion, denoise: Callable, x: np.ndarray, z: np.ndarray):
  """The points [n + 1, width] of a solver without noise in it, from x and z [width].

  Args:
    solver: an expansion, whoever's.
    denoise: (x [width], time) -> E[x_0 | x].
    x: the clean input.
    z: the noise that it starts with.
  """
  visited, outputs = [], np.zeros((0, len(x)))
  for i, time in enumerate(solver.times):
    visited.append(solver.inputs[i] @ [x, z] + solver.outputs[i, : len(outputs), 0] @ outputs)
    if i < len(solver.times) - 1:
      outputs = np.append(outputs, denoise(visited[-1], time)[None], axis=0)
  return np.stack(visited)
