"""Orders of convergence, by regression: slope of log error against log steps, in float64."""

import numpy as np
import pytest
import scipy.integrate

from ancestral.models import schedules
from ancestral.sampling import correctors, forms, momentum, multistep, singlestep

WEIGHTS = np.array([0.3, 0.3, 0.2, 0.2])
MEANS = np.array([[1.0, 0.3], [-0.5, 0.9], [-0.7, -0.6], [0.6, -0.9]])
VARIANCES = np.array([0.02, 0.04, 0.03, 0.05])
VE = schedules.variance_exploding()
STEPS = (160, 224, 320)
SINGLE = (96, 128, 192)  # methods without a history have their order sooner
X = np.exp(2) * np.random.default_rng(0).normal(size=(64, 2))


def denoise(x, rho):
  """E[x_0 | x_0 + rho z = x], of the mixture."""
  total = VARIANCES + rho**2
  rest = x[:, None] - MEANS[None]
  score = np.log(WEIGHTS) - np.log(total) - 0.5 * np.square(rest).sum(-1) / total
  share = np.exp(score - score.max(1, keepdims=True))
  share /= share.sum(1, keepdims=True)
  return np.einsum("bk,bkd->bd", share, MEANS[None] + (VARIANCES / total)[None, :, None] * rest)


@pytest.fixture(scope="module")
def reference():
  slope = lambda lam, x: (denoise(x.reshape(-1, 2), np.exp(-lam)) - x.reshape(-1, 2)).ravel()
  out = scipy.integrate.solve_ivp(slope, (-2, 3), X.ravel(), "DOP853", rtol=1e-12, atol=1e-12)
  return out.y[:, -1].reshape(-1, 2)


def run(table, x):
  slots = np.zeros((table.carry.shape[1], *x.shape))
  slots[0] = x
  for i in range(table.num_rows):
    m = denoise(slots[0], table.times[i])
    slots = np.einsum("jl,lbd->jbd", table.carry[i], slots) + table.output[i][:, :, None] * m
  return slots[0]


DATA, NOISE = forms.data(), forms.noise()
PUBLISHED = {"form": DATA, "rule": multistep.published_third_order}
SOLVERS = {
  "ddim": (1, lambda g: singlestep.singlestep(VE, g, singlestep.euler)),
  "2m": (2, lambda g: multistep.dpmpp_2m(VE, g)),
  "2m-exact": (2, lambda g: multistep.dpmpp_2m(VE, g, rule=forms.exact(forms.log_snr))),
  "3m": (3, lambda g: multistep.dpmpp_3m(VE, g, start=singlestep.dpm_3s(DATA))),
  "ab4": (4, lambda g: multistep.exponential(VE, g, 4, start=singlestep.rk4(DATA))),
  "2s": (2, lambda g: singlestep.singlestep(VE, g, singlestep.dpm_2s(DATA))),
  "3s": (3, lambda g: singlestep.singlestep(VE, g, singlestep.dpm_3s(DATA))),
  "heun": (2, lambda g: singlestep.singlestep(VE, g, singlestep.heun(NOISE))),
  "rk3": (3, lambda g: singlestep.singlestep(VE, g, singlestep.rk3(NOISE))),
  "rk4": (4, lambda g: singlestep.singlestep(VE, g, singlestep.rk4(NOISE))),
  **{
    name: (
      order,
      lambda g, tableau=tableau: singlestep.singlestep(
        VE, g, singlestep.runge_kutta(*tableau, NOISE)
      ),
    )
    for name, order, tableau in (
      ("midpoint", 2, singlestep.MIDPOINT),
      ("ralston", 2, singlestep.RALSTON),
      ("heun-3", 3, singlestep.HEUN_3),
      ("ssp-3", 3, singlestep.SSP_3),
    )
  },
  "heun-flow": (2, lambda g: singlestep.singlestep(VE, g, singlestep.heun(forms.flow()))),
  "deis-3": (
    3,
    lambda g: multistep.deis(VE, g, 3, variable=forms.log_snr, start=singlestep.rk3(NOISE)),
  ),
  "heavy-ball": (1, lambda g: momentum.heavy_ball(VE, g, 3)),
  "ghvb-2": (2, lambda g: momentum.ghvb(VE, g, 2)),
  "ghvb-exact-3": (3, lambda g: momentum.exact(VE, g, 3, start=singlestep.rk3(NOISE))),
  "ghvb-exact-4": (4, lambda g: momentum.exact(VE, g, 4, start=singlestep.rk4(NOISE))),
  "unipc-1": (2, lambda g: correctors.unipc(VE, g, 1)),
  "unipc-2": (3, lambda g: correctors.unipc(VE, g, 2)),
  "unipc-3": (4, lambda g: correctors.unipc(VE, g, 3)),
  "unipc-4": (5, lambda g: correctors.unipc(VE, g, 4)),
  "lms-corrected": (4, lambda g: correctors.unic(multistep.lms(VE, g), VE, 4)),
}


SINGLESTEP = (
  "2s",
  "3s",
  "heun",
  "heun-flow",
  "rk3",
  "rk4",
  "midpoint",
  "ralston",
  "heun-3",
  "ssp-3",
)


def slope(make, reference, steps=STEPS):
  errors = []
  for num_steps in steps:
    out = run(make(np.exp(-np.linspace(-2, 3, num_steps + 1))), X)
    errors.append(np.sqrt(np.mean(np.square(out - reference))))
  return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_has_its_order(name, reference):
  order, make = SOLVERS[name]
  steps = SINGLE if name in SINGLESTEP else STEPS
  assert slope(make, reference, steps) >= order - 0.1


def test_published_third_order_is_second(reference):
  make = lambda g: multistep.adams_bashforth(VE, g, 3, start=singlestep.dpm_3s(DATA), **PUBLISHED)
  assert 1.9 < slope(make, reference) < 2.4


def test_a_first_step_of_order_one_caps_the_order(reference):
  assert slope(lambda g: multistep.exponential(VE, g, 4), reference) < 3


def test_heavy_ball_is_of_first_order_and_published_momentum_of_second(reference):
  assert slope(lambda g: momentum.heavy_ball(VE, g, 4, damping=0.5), reference) < 1.2
  for b in (0.8, 0.5):
    assert 1.9 < slope(lambda g, b=b: momentum.ghvb(VE, g, 4, damping=b), reference) < 2.3
  assert slope(lambda g: momentum.exact(VE, g, 4), reference) < 2.5
