"""Solvers under classifier-free guidance: how far each is from the guided ODE, by scale.

    python -m ancestral.benchmarks.guided_solvers

The data are four modes in 2-D, two of them the class that is asked for; both denoisers are exact,
so what differs from the guided ODE's solution (DOP853) is the solver alone. Diverged is a sample
that ends further than one from its solution, about the distance between modes.
"""

import numpy as np
import scipy.integrate
from absl import app, flags

from ancestral.benchmarks import exact_targets
from ancestral.models import schedules
from ancestral.sampling import correctors, forms, grids, multistep, singlestep

_NFE = flags.DEFINE_integer("nfe", 10, "Evaluations.")
_ROWS = flags.DEFINE_integer("rows", 256, "Samples.")

SCHEDULE = schedules.variance_exploding()
FIRST, LAST = 10.0, 0.02
SCALES = (1.0, 2.0, 4.0, 7.5, 10.0, 15.0)
NOISE, DATA = forms.noise(), forms.data()

# name -> evaluations a step, (schedule, times) -> table
SOLVERS = {
  "DDIM": (1, lambda s, t: singlestep.singlestep(s, t, singlestep.euler)),
  "DPM++ 2M": (1, multistep.dpmpp_2m),
  "DPM++ 3M": (1, multistep.dpmpp_3m),
  "DPM 2M (noise)": (
    1,
    lambda s, t: multistep.adams_bashforth(s, t, 2, form=NOISE, rule=forms.midpoint),
  ),
  "DEIS-3": (1, lambda s, t: multistep.deis(s, t, 3, variable=forms.log_snr)),
  "LMS-4": (1, multistep.lms),
  "iPNDM": (1, multistep.ipndm),
  "UniPC-2": (1, lambda s, t: correctors.unipc(s, t, 2)),
  "UniPC-3": (1, lambda s, t: correctors.unipc(s, t, 3)),
  "Heun": (2, lambda s, t: singlestep.singlestep(s, t, singlestep.heun(NOISE))),
  "DPM++ 2S": (2, lambda s, t: singlestep.singlestep(s, t, singlestep.dpm_2s(DATA))),
}


def guided(x: np.ndarray, sigma: float, scale: float) -> np.ndarray:
  """D + scale (D_class - D), of the first two modes and of all."""
  everything = exact_targets.four_modes()
  weights = everything.weights * [1, 1, 0, 0]
  with np.errstate(divide="ignore"):
    of_class = everything._replace(weights=weights / weights.sum())
    positive = exact_targets.denoised(of_class, x, 1.0, sigma)
  negative = exact_targets.denoised(everything, x, 1.0, sigma)
  return negative + scale * (positive - negative)


def solution(x: np.ndarray, scale: float) -> np.ndarray:
  """The guided ODE's, dx / d lambda = D - x."""

  def slope(half_log_snr, flat):
    point = flat.reshape(x.shape)
    return (guided(point, np.exp(-half_log_snr), scale) - point).ravel()

  ends = (-np.log(FIRST), -np.log(LAST))
  out = scipy.integrate.solve_ivp(slope, ends, x.ravel(), "DOP853", rtol=1e-9, atol=1e-9)
  return out.y[:, -1].reshape(x.shape)


def main(_):
  """Prints the table."""
  x = FIRST * np.random.default_rng(0).normal(size=(_ROWS.value, 2))
  truth = {scale: solution(x, scale) for scale in SCALES}
  print(f"RMS error (share diverged) at {_NFE.value} evaluations, uniform in log-SNR")
  print("| solver |" + "".join(f" {scale:g} |" for scale in SCALES))
  print("|---|" + "---|" * len(SCALES))
  for name, (evaluations, make) in SOLVERS.items():
    times = grids.log_snr(SCHEDULE, _NFE.value // evaluations, start=FIRST, end=LAST)
    table, cells = make(SCHEDULE, times), []
    for scale in SCALES:
      denoise = lambda x, sigma, scale=scale: guided(x, sigma, scale)
      out = exact_targets.applied(table, denoise, x)
      distance = np.linalg.norm(out - truth[scale], axis=1)
      cells.append(f" {np.sqrt(np.mean(distance**2) / 2):.3f} ({np.mean(distance > 1):.0%}) |")
    print(f"| {name} |" + "".join(cells))


if __name__ == "__main__":
  app.run(main)
