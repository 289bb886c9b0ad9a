"""The schedulers of diffusers, and our tables for them.

Each table is given the schedule and the times that the scheduler itself has chosen.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ancestral.models import schedules
from ancestral.sampling import ancestral, correctors, forms, multistep, singlestep, tables
from parity import schedulers


class Pair(NamedTuple):
  """A scheduler and our table for it.

  Attributes:
    case: the scheduler.
    table: (schedule, times of all its calls of the model and of its sample) -> our table.
    num_steps: to try.
    atol: of samples, theirs being in float32.
  """

  case: schedulers.Case
  table: Callable[..., tables.SolverTable]
  num_steps: tuple[int, ...] = (1, 2, 5, 10, 16)
  atol: float = 1e-4


EXACT = forms.exact(forms.log_snr)
FORMS = {
  "dpmsolver++": forms.data(),
  "sde-dpmsolver++": forms.data(1.0),
  "dpmsolver": forms.noise(),
  "sde-dpmsolver": forms.noise(1.0),
}
RULES = {"midpoint": forms.midpoint, "heun": EXACT}


def adams_bashforth(order, form, rule):
  """With diffusers' orders at the end: lowered where there are fewer than 15 steps."""

  def table(schedule, times):
    n = len(times) - 1
    orders = multistep.lowered_at_the_end(order, n) if n < 15 else order
    return multistep.adams_bashforth(schedule, times, orders, form=form, rule=rule)

  return table


def of_steps(method, ends=lambda times: np.unique(times)[::-1]):
  """A table of the grid that the steps of a scheduler are between."""
  return lambda schedule, times: method(schedule, ends(times))


def every_second(times):
  return np.append(times[:-1:2], times[-1])


def dpm(algorithm, order, solver, final, rule):
  settings = {
    "algorithm_type": algorithm,
    "solver_order": order,
    "solver_type": solver,
    "final_sigmas_type": final,
  }
  name = "dpmsolver_multistep.DPMSolverMultistepScheduler"
  case = schedulers.Case(name, schedulers.PRESERVING, settings)
  return Pair(case, adams_bashforth(order, FORMS[algorithm], rule))


MULTISTEP = {
  f"{algorithm} {order} {solver} to {final}": dpm(algorithm, order, solver, final, RULES[solver])
  for algorithm in FORMS
  for order, solver in ((1, "midpoint"), (2, "midpoint"), (2, "heun"))
  for final in ("zero", "sigma_min")
  if not (algorithm.endswith("dpmsolver") and final == "zero")  # which it refuses
}
PUBLISHED = {
  f"{algorithm} 3 to sigma_min": dpm(
    algorithm, 3, "midpoint", "sigma_min", multistep.published_third_order
  )
  for algorithm in ("dpmsolver", "dpmsolver++")
}
DEIS = {
  f"DEIS {order}": Pair(
    schedulers.Case(
      "deis_multistep.DEISMultistepScheduler", schedulers.PRESERVING, {"solver_order": order}
    ),
    adams_bashforth(order, forms.noise(), EXACT),
    atol=1e-3,  # see test_deis_cancels_in_float32
  )
  for order in (1, 2, 3)
}


def two_stages(form, rule):
  return lambda shares: singlestep.dpm_2s(form, share=shares[0], rule=rule)


def three_stages(form, rule):
  return lambda shares: singlestep.dpm_3s(form, shares=shares, rule=rule)


def three_slopes(form, rule):
  """As `dpm_3s`, but the step integrates the parabola through all three slopes: their "heun"."""

  def of_shares(shares):
    def step(path, x, s, t):
      seen = [singlestep.evaluated(path, x, s)]
      for share in shares:
        time = singlestep.between(path.schedule, s, t, share)
        point = forms.advance(path, form, rule, x, s, time, seen)
        seen.append(singlestep.evaluated(path, point, time))
      return forms.advance(path, form, EXACT, x, s, t, seen), seen[0]

    return step

  return of_shares


def in_blocks(form, *steps):
  """Steps between every p-th point of a grid, with stages at the others.

  What is left at the end goes in a shorter block, and the step to no noise in one of its own.

  Args:
    form: of a step without stages.
    *steps: for one stage, for two: the shares of the step at which they are -> Step.
  """
  order = len(steps) + 1

  def step(schedule, times):
    lam = schedules.half_log_snr(schedule, times)
    shares = tuple((lam[1:-1] - lam[0]) / (lam[-1] - lam[0]))
    return steps[len(shares) - 1](shares) if shares else singlestep.runge_kutta((), (1.0,), form)

  def table(schedule, times):
    n = len(times) - 1
    inner = n - (times[-1] == 0)
    ends = np.unique([*range(0, inner, order), inner, n])
    made = [step(schedule, times[i : j + 1]) for i, j in itertools.pairwise(ends)]
    return singlestep.singlestep(schedule, times[ends], made)

  return table


def single(algorithm, order, solver, final):
  settings = {
    "algorithm_type": algorithm,
    "solver_order": order,
    "solver_type": solver,
    "final_sigmas_type": final,
  }
  name = "dpmsolver_singlestep.DPMSolverSinglestepScheduler"
  case = schedulers.Case(name, schedulers.PRESERVING, settings)
  form, rule = FORMS[algorithm], RULES[solver]
  last = {"midpoint": three_stages, "heun": three_slopes}[solver]
  table = in_blocks(form, *[two_stages(form, rule), last(form, rule)][: order - 1])
  return Pair(case, table, num_steps=(1, 2, 5, 6, 16))


SINGLESTEP = {
  f"singlestep {algorithm} {order} {solver} to {final}": single(algorithm, order, solver, final)
  for algorithm in ("dpmsolver++", "sde-dpmsolver++", "dpmsolver")
  for order in (1, 2, 3)
  for solver in ("midpoint", "heun")
  for final in ("zero", "sigma_min")
  if not (algorithm == "dpmsolver" and final == "zero")
  and (order, solver) != (1, "heun")
  and (algorithm, order, solver) != ("sde-dpmsolver++", 3, "heun")  # see the defects
}


def unipc(order, solver, final, form, predicts_data):
  settings = {
    "solver_order": order,
    "solver_type": solver,
    "final_sigmas_type": final,
    "predict_x0": predicts_data,
  }
  name = "unipc_multistep.UniPCMultistepScheduler"
  case = schedulers.Case(name, schedulers.PRESERVING, settings)
  rule = {"bh1": correctors.bh1, "bh2": correctors.bh2}[solver]

  def table(schedule, times):
    orders = multistep.lowered_at_the_end(order, len(times) - 1)
    return correctors.unipc(schedule, times, orders, form=form, rule=rule)

  return Pair(case, table)


UNIPC = {
  f"UniPC-{order} {solver} of {kind} to {final}": unipc(order, solver, final, form, kind == "data")
  for order in (1, 2, 3)
  for solver in ("bh1", "bh2")
  for kind, form in (("data", forms.data()), ("noise", forms.noise()))
  for final in ("zero", "sigma_min")
  if final == "sigma_min" or (solver, kind) == ("bh2", "data")  # the others are NaN
}


def sa_solver(predictor, corrector, tau, algorithm="data_prediction"):
  settings = {
    "algorithm_type": algorithm,
    "predictor_order": predictor,
    "corrector_order": corrector,
    "tau_func": lambda t: 0 * t + tau,
  }
  name = "sasolver.SASolverScheduler"
  case = schedulers.Case(name, schedulers.PRESERVING, settings)
  form = {"data_prediction": forms.data, "noise_prediction": forms.noise}[algorithm](tau**2)
  rule = correctors.bh1 if algorithm == "data_prediction" else EXACT

  def table(schedule, times):
    orders, corrector_orders = (
      multistep.lowered_at_the_end(order, len(times) - 1) for order in (predictor, corrector - 1)
    )
    return correctors.predictor_corrector(
      schedule, times, orders, corrector_orders, form=form, rule=rule
    )

  return Pair(case, table)


SA_SOLVER = {
  f"SA-Solver p{p} c{c} tau {tau}": sa_solver(p, c, tau)
  for p, c in ((2, 2), (1, 2), (3, 3), (3, 4))
  for tau in (0.0, 0.6, 1.0)
} | {"SA-Solver of noise": sa_solver(3, 4, 0.6, "noise_prediction")}
NAMED = {
  "Euler": Pair(
    schedulers.Case("euler_discrete.EulerDiscreteScheduler", schedulers.EXPLODING),
    lambda schedule, times: singlestep.singlestep(schedule, times, singlestep.euler),
  ),
  "EDM Euler": Pair(
    schedulers.Case("edm_euler.EDMEulerScheduler", schedulers.KARRAS),
    lambda schedule, times: singlestep.singlestep(schedule, times, singlestep.euler),
  ),
  "flow Euler": Pair(
    schedulers.Case(
      "flow_match_euler_discrete.FlowMatchEulerDiscreteScheduler", schedulers.STRAIGHT
    ),
    lambda schedule, times: singlestep.singlestep(schedule, times, singlestep.euler),
  ),
  "Heun": Pair(
    schedulers.Case("heun_discrete.HeunDiscreteScheduler", schedulers.EXPLODING),
    of_steps(lambda s, t: singlestep.singlestep(s, t, singlestep.heun(forms.noise()))),
  ),
  "flow Heun": Pair(
    schedulers.Case("flow_match_heun_discrete.FlowMatchHeunDiscreteScheduler", schedulers.STRAIGHT),
    of_steps(lambda s, t: singlestep.singlestep(s, t, singlestep.heun(forms.flow()))),
  ),
  "DPM2": Pair(
    schedulers.Case("k_dpm_2_discrete.KDPM2DiscreteScheduler", schedulers.GEOMETRIC),
    of_steps(
      lambda s, t: singlestep.singlestep(s, t, singlestep.dpm_2s(forms.noise())), every_second
    ),
  ),
  "LMS": Pair(
    schedulers.Case("lms_discrete.LMSDiscreteScheduler", schedulers.EXPLODING), multistep.lms
  ),
  "EDM DPM++ 2M": Pair(
    schedulers.Case("edm_dpmsolver_multistep.EDMDPMSolverMultistepScheduler", schedulers.KARRAS),
    multistep.dpmpp_2m,
  ),
  "inverse DPM++ 2M": Pair(
    schedulers.Case(
      "dpmsolver_multistep_inverse.DPMSolverMultistepInverseScheduler", schedulers.PRESERVING
    ),
    adams_bashforth(2, forms.data(), forms.midpoint),
  ),
  # Theirs tells the network the time that the step ends at; the coefficients are these.
  "inverse DDIM": Pair(
    schedulers.Case(
      "ddim_inverse.DDIMInverseScheduler",
      schedulers.LINEAR_FROM_FIRST,
      {"clip_sample": False, "set_alpha_to_one": False},
    ),
    ancestral.ddim,
  ),
  "PLMS": Pair(
    schedulers.Case(
      "pndm.PNDMScheduler", schedulers.LINEAR_TO_FIRST, {"skip_prk_steps": True, "steps_offset": 1}
    ),
    of_steps(multistep.plms),
    (2, 5, 10, 16),
  ),
  "PNDM": Pair(
    schedulers.Case("pndm.PNDMScheduler", schedulers.LINEAR_TO_FIRST, {"steps_offset": 1}),
    of_steps(multistep.pndm, lambda times: np.append(times[:12:4], times[12:])),
    (4, 5, 10, 20),
  ),
}


def ddim(spacing, eta):
  settings = {"clip_sample": False, "timestep_spacing": spacing}
  case = schedulers.Case("ddim.DDIMScheduler", schedulers.LINEAR, settings, {"eta": eta})
  num_steps = (1, 2, 5, 10)  # theirs goes wrong where 1000 / n is no whole number
  return Pair(case, lambda s, t: ancestral.ddim(s, t, eta), num_steps)


def ddpm(variance, scale, spacing="leading"):
  settings = {"clip_sample": False, "variance_type": variance, "timestep_spacing": spacing}
  case = schedulers.Case("ddpm.DDPMScheduler", schedulers.LINEAR, settings)
  return Pair(case, lambda s, t: ancestral.ddpm(s, t, scale=scale))


# diffusers takes the whole part of (1 - gamma) t, of steps that count from 0: so does this chain.
WHOLE_STEPS = schedulers.LATENT.schedule._replace(
  alpha=lambda t: schedulers.LATENT.schedule.alpha((t + 1e-6) // 1 + 1),
  sigma=lambda t: schedulers.LATENT.schedule.sigma((t + 1e-6) // 1 + 1),
)


def tcd(gamma):
  times = lambda scheduler: schedulers.labels(1.0)(scheduler) - 1
  view = schedulers.LATENT._replace(schedule=WHOLE_STEPS, times=times)
  case = schedulers.Case("tcd.TCDScheduler", view, step={"eta": gamma})
  return Pair(case, lambda s, t: ancestral.trajectory_consistency(s, t, gamma))


small, large = lambda small, large: small, lambda small, large: large
NOISY = {
  **{
    f"DDIM {sp} {eta}": ddim(sp, eta) for sp in ("leading", "trailing") for eta in (0.0, 0.5, 1.0)
  },
  "DDPM fixed_small": ddpm("fixed_small", small),
  "DDPM fixed_small_log": ddpm("fixed_small_log", small, "linspace"),
  "DDPM fixed_large": ddpm("fixed_large", large),
  **{f"TCD {gamma}": tcd(gamma) for gamma in (0.0, 0.3, 1.0)},
  "LCM": Pair(
    schedulers.Case("lcm.LCMScheduler", schedulers.LATENT),
    lambda s, t: ancestral.consistency(s, t, ancestral.latent_boundary()),
  ),
  "flow LCM": Pair(
    schedulers.Case("flow_match_lcm.FlowMatchLCMScheduler", schedulers.STRAIGHT),
    ancestral.consistency,
  ),
  "flow Euler, stochastic": Pair(
    schedulers.Case(
      "flow_match_euler_discrete.FlowMatchEulerDiscreteScheduler",
      schedulers.STRAIGHT,
      {"stochastic_sampling": True},
    ),
    ancestral.consistency,
  ),
  "Euler ancestral": Pair(
    schedulers.Case(
      "euler_ancestral_discrete.EulerAncestralDiscreteScheduler", schedulers.EXPLODING
    ),
    lambda s, t: singlestep.singlestep(s, t, ancestral.renoised(singlestep.euler)),
  ),
  "DPM2 ancestral": Pair(
    schedulers.Case(
      "k_dpm_2_ancestral_discrete.KDPM2AncestralDiscreteScheduler", schedulers.ALL_THE_WAY
    ),
    of_steps(
      lambda s, t: singlestep.singlestep(
        s, t, ancestral.renoised(singlestep.dpm_2s(forms.noise()))
      ),
      every_second,
    ),
  ),
  "DPM++ SDE": Pair(
    schedulers.Case("dpmsolver_sde.DPMSolverSDEScheduler", schedulers.GEOMETRIC),
    of_steps(
      lambda s, t: singlestep.singlestep(s, t, ancestral.dpmpp_sde()),
      every_second,
    ),
  ),
}
PAIRS = MULTISTEP | SINGLESTEP | PUBLISHED | DEIS | UNIPC | SA_SOLVER | NAMED | NOISY
