"""Momentum in solvers: regions of stability, and guidance at scales where other solvers diverge.

    python -m ancestral.benchmarks.momentum --figure=docs/figures/stability.png

First how far along the negative real axis errors die out, of x' = lambda x with steps of z =
lambda h in rho. Then the guided mixture of `guided_solvers`: RMS distance from the guided ODE's
solution and the share of samples further than one from theirs, by guidance scale, at 5, 10 and 15
evaluations on a grid uniform in log-SNR. Both denoisers are exact.
"""

import functools
import pathlib

import numpy as np
from absl import app, flags

from ancestral.benchmarks import exact_targets, guided_solvers
from ancestral.sampling import forms, grids, momentum, multistep

_FIGURE = flags.DEFINE_string("figure", None, "File for the regions of stability.")
_SAMPLES = flags.DEFINE_integer("samples", 1024, "Guided samples.")

ORDERS, DAMPINGS, EVALUATIONS = (1, 2, 3, 4), (1.0, 0.9, 0.8, 0.5, 0.2), (5, 10, 15)
TOPS = ((1.4, 1.4, 1.7, 1.2), (1.4, 1.2, 0.9, 0.7))  # of the figure's panels
_DEIS = functools.partial(multistep.deis, variable=forms.log_snr)


def extents() -> None:
  """Prints where each region of stability ends on the negative real axis."""
  print("| method | " + " | ".join(f"b = {b:g}" for b in DAMPINGS) + " |")
  print("|---" * (len(DAMPINGS) + 1) + "|")
  for name, mix in (("HB", lambda k, b: momentum.weights(k)), ("GHVB", momentum.weights)):
    for k in ORDERS:
      found = (f"{momentum.real_extent(mix(k, b), b):.3f}" for b in DAMPINGS)
      print(f"| {name}, k = {k} | " + " | ".join(found) + " |")


def areas() -> None:
  """Prints the regions' areas over Adams-Bashforth's, and what share of that one is not in them."""
  print("\n| area (share lost) | " + " | ".join(f"b = {b:g}" for b in DAMPINGS[1:]) + " |")
  print("|---" * len(DAMPINGS) + "|")
  for name, mix in (("HB", lambda k, b: momentum.weights(k)), ("GHVB", momentum.weights)):
    for k in ORDERS:
      plain, cells = momentum.real_extent(momentum.weights(k), 1.0), []
      for b in DAMPINGS[1:]:
        end = momentum.real_extent(mix(k, b), b)
        stable = lambda z, b=b, k=k, mix=mix: momentum.amplification(mix(k, b), b, z) < 1
        inside = momentum.amplification(momentum.weights(k), 1.0, _cells(plain)) < 1
        area = np.mean(stable(_cells(end))) * end**2 / (np.mean(inside) * plain**2)
        cells.append(f"{area:.2f} ({np.mean(~stable(_cells(plain))[inside]):.0%})")
      print(f"| {name}, k = {k} | " + " | ".join(cells) + " |")


def _cells(end: float) -> np.ndarray:
  """Complex z around a region that ends at `end`: to 1.1 end and -0.4 end, 1.5 |end| high."""
  return end * (np.linspace(-0.4, 1.1, 250)[None] - 1j * np.linspace(0, 1.5, 250)[:, None])


def solvers() -> dict:
  """name -> (schedule, times) -> table."""
  of = functools.partial
  made = {f"iPNDM-{k}": of(multistep.ipndm, order=k) for k in ORDERS}
  made |= {"PLMS": multistep.plms}
  for b in (0.8, 0.5):
    made |= {f"HB {k - 1 + b:g}": of(momentum.heavy_ball, order=k, damping=b) for k in (2, 4)}
    made |= {f"GHVB {k - 1 + b:g}": of(momentum.ghvb, order=k, damping=b) for k in ORDERS}
  made |= {"DEIS-3": of(_DEIS, order=3), "DPM++ 2M": multistep.dpmpp_2m}
  made |= {
    f"exact {k - 1 + b:g}": of(momentum.exact, order=k, damping=b)
    for b in (0.8, 0.5)
    for k in (2, 3, 4)
  }
  return made


def guided(num_samples: int) -> None:
  """Prints errors and shares of diverged samples, a table for each number of evaluations."""
  scales, schedule = guided_solvers.SCALES, guided_solvers.SCHEDULE
  x = guided_solvers.FIRST * np.random.default_rng(0).normal(size=(num_samples, 2))
  truth = {scale: guided_solvers.solution(x, scale) for scale in scales}
  for evaluations in EVALUATIONS:
    print(f"\nRMS error (share diverged) at {evaluations} evaluations, by guidance scale")
    print("| solver |" + "".join(f" {scale:g} |" for scale in scales))
    print("|---|" + "---|" * len(scales))
    ends = {"start": guided_solvers.FIRST, "end": guided_solvers.LAST}
    for name, make in solvers().items():
      steps = evaluations - (make is multistep.plms)  # whose first step takes two
      times = grids.log_snr(schedule, steps, **ends)
      table, cells = make(schedule, times), []
      for scale in scales:
        denoise = functools.partial(guided_solvers.guided, scale=scale)
        distance = exact_targets.applied(table, denoise, x) - truth[scale]
        distance = np.linalg.norm(distance, axis=1)
        share = f" ({np.mean(distance > 1):.1%})" if np.any(distance > 1) else ""
        cells.append(f" {np.sqrt(np.mean(distance**2) / 2):.3f}{share} |")
      print(f"| {name} |" + "".join(cells))


def draw(file: str) -> None:
  """The regions where errors die out, one panel for each order."""
  from matplotlib import figure as figures  # no global state, so no pyplot
  from matplotlib.backends import backend_agg

  figure = figures.Figure(figsize=(11, 5.2), layout="constrained")
  backend_agg.FigureCanvasAgg(figure)
  axes = figure.subplots(2, 4)
  for row, (name, mix) in enumerate(
    (("heavy ball", lambda k, b: momentum.weights(k)), ("GHVB", momentum.weights))
  ):
    for k, axis in zip(ORDERS, axes[row], strict=True):
      left = momentum.real_extent(mix(k, 0.5), 0.5) * 1.1
      top = TOPS[row][k - 1]
      real, imaginary = np.linspace(left, -left / 6, 201), np.linspace(-top, top, 201)
      z = real[None] + 1j * imaginary[:, None]
      for place, b in enumerate((1.0, 0.8, 0.5)):
        modulus = momentum.amplification(mix(k, b), b, z)
        drawn = axis.contour(real, imaginary, modulus, [1.0], colors=f"C{place}")
        axis.plot([], [], color=f"C{place}", label=f"b = {b:g}") if drawn else None
      axis.axhline(0, color="0.8", lw=0.5, zorder=0)
      axis.axvline(0, color="0.8", lw=0.5, zorder=0)
      axis.set_title(f"{name}, k = {k}", fontsize=9)
      axis.tick_params(labelsize=7)
  axes[0, 0].legend(fontsize=7, loc="lower right")
  figure.supxlabel("Re z", fontsize=9)
  figure.supylabel("Im z", fontsize=9)
  pathlib.Path(file).parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(file, dpi=110)


def main(_) -> None:
  """Prints tables; draws the figure where a file is named."""
  extents()
  areas()
  guided(_SAMPLES.value)
  if _FIGURE.value:
    draw(_FIGURE.value)


if __name__ == "__main__":
  app.run(main)
