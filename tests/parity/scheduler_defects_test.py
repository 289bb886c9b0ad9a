"""What the schedulers of diffusers get wrong at 0.42.1 and our tables get right, by closed forms.

A test that fails because theirs is right says that diffusers has been mended: take it out, and put
the scheduler among the `scheduler_pairs`.
"""

import numpy as np
import pytest

from ancestral.models import schedules
from ancestral.sampling import ancestral, correctors, forms, grids, multistep, singlestep, tables
from parity import scheduler_pairs, schedulers

pytestmark = pytest.mark.peers

EXACT = scheduler_pairs.EXACT
TO_MIN = {"final_sigmas_type": "sigma_min"}


def dpm(**settings):
  name = "dpmsolver_multistep.DPMSolverMultistepScheduler"
  return schedulers.Case(name, schedulers.PRESERVING, settings)


def edm(**settings):
  name = "edm_dpmsolver_multistep.EDMDPMSolverMultistepScheduler"
  return schedulers.Case(name, schedulers.KARRAS, settings)


def deis(**settings):
  return schedulers.Case("deis_multistep.DEISMultistepScheduler", schedulers.PRESERVING, settings)


def both(case, num_steps, table):
  """The expansions of a scheduler and of our table at its times."""
  theirs = schedulers.expansion(case, num_steps)
  return theirs, tables.expand(table(case.view.schedule, theirs.times))


# Forms, with the antiderivative of lambda^2 on their clocks.
DATA = (forms.data(), lambda lam: np.exp(lam) * (lam**2 - 2 * lam + 2))
NOISE = (forms.noise(), lambda lam: np.exp(-lam) * (lam**2 + 2 * lam + 2))
STOCHASTIC = (forms.data(1.0), lambda lam: np.exp(2 * lam) * (lam**2 - lam + 0.5))


def errors_on_a_parabola(solver, schedule, form, antiderivative):
  """Relative errors of a solver's steps [n] where its slope is lambda^2, whatever the point.

  Solvers of order three take a parabola for it, and are exact.
  """

  def denoise(x, t):
    lam = schedules.half_log_snr(schedule, t)
    if form is NOISE[0]:
      return (x - schedule.sigma(t) * lam**2) / schedule.alpha(t)
    return np.full_like(x, lam**2)

  x = schedulers.replayed(solver, denoise, np.zeros(1), np.ones(1))[:, 0]
  times = solver.times
  increments = np.diff(x / form.base(schedule.alpha(times), schedule.sigma(times)))
  exact = np.diff(antiderivative(schedules.half_log_snr(schedule, times)))
  return np.abs(increments / exact - 1)


@pytest.mark.parametrize(
  "case, form",
  [
    (dpm(solver_order=3, **TO_MIN), DATA),
    (dpm(solver_order=3, algorithm_type="dpmsolver", **TO_MIN), NOISE),
    (edm(solver_order=3, **TO_MIN), DATA),
    (dpm(solver_order=3, algorithm_type="sde-dpmsolver++", **TO_MIN), STOCHASTIC),
  ],
  ids=["DPM-Solver++", "DPM-Solver", "EDM", "SDE-DPM-Solver++"],
)
def test_third_order_is_exact_on_parabolas(case, form):
  """Theirs halves the quadratic term, and in SDE-DPM-Solver++ has the sign of its 1/2 wrong."""
  rule = lambda schedule, times: multistep.adams_bashforth(
    schedule, times, 3, form=form[0], rule=EXACT
  )
  theirs, ours = (
    errors_on_a_parabola(e, case.view.schedule, *form)[2:-1] for e in both(case, 16, rule)
  )
  assert np.max(theirs) > 3e-3
  assert np.max(ours) < 1e-9


def test_three_stochastic_stages_are_exact_on_parabolas():
  """The same sign in their singlestep solver."""
  settings = {"solver_order": 3, "solver_type": "heun", "algorithm_type": "sde-dpmsolver++"}
  name = "dpmsolver_singlestep.DPMSolverSinglestepScheduler"
  case = schedulers.Case(name, schedulers.PRESERVING, settings | TO_MIN)
  form, stage = forms.data(1.0), scheduler_pairs.two_stages(forms.data(1.0), EXACT)
  blocks = scheduler_pairs.in_blocks(form, stage, scheduler_pairs.three_slopes(form, EXACT))
  theirs, ours = (steps_of_three(expansion) for expansion in both(case, 15, blocks))
  assert np.max(theirs) > 0.1
  assert np.max(ours) < 1e-9


def steps_of_three(solver):
  """Relative errors of every third point's way from the one before, where D = lambda^2."""
  x = schedulers.replayed(solver, lambda x, t: np.full(1, np.log(t) ** 2), np.zeros(1), np.ones(1))
  rho = solver.times[::3]
  increments = np.diff(x[::3, 0] / (schedulers.RATIO.sigma(rho) * rho))
  return np.abs(increments / np.diff(STOCHASTIC[1](-np.log(rho))) - 1)


@pytest.mark.parametrize(
  "case, form",
  [
    (dpm(solver_order=3, algorithm_type="sde-dpmsolver", **TO_MIN), forms.noise(1.0)),
    (edm(solver_order=3, algorithm_type="sde-dpmsolver++"), forms.data(1.0)),
  ],
  ids=["SDE-DPM-Solver", "EDM"],
)
def test_stochastic_third_order_runs(case, form):
  with pytest.raises(UnboundLocalError):
    schedulers.expansion(case, 5)
  times = case.view.times(case.build(5))
  tables.check(multistep.adams_bashforth(case.view.schedule, times, 3, form=form, rule=EXACT))


@pytest.mark.parametrize("solver", ["bh1", "bh2"])
@pytest.mark.parametrize("predicts_data, form", [(True, forms.data()), (False, forms.noise())])
def test_unipc_goes_to_no_noise(solver, predicts_data, form):
  """Their default end is none; bh2 of data is right there."""
  settings = {"solver_type": solver, "predict_x0": predicts_data}
  case = schedulers.Case("unipc_multistep.UniPCMultistepScheduler", schedulers.PRESERVING, settings)
  rule = getattr(correctors, solver)
  unipc = lambda s, t: correctors.unipc(s, t, 2, form=form, rule=rule)
  theirs, ours = both(case, 5, unipc)
  assert np.all(np.isnan(theirs.inputs[-1])) == ((solver, predicts_data) != ("bh2", True))
  np.testing.assert_allclose(np.sum(ours.outputs[-1]) + ours.inputs[-1, 0], 1.0, rtol=1e-9)


def off_a_point_mass(solver, schedule):
  """How far points [n + 1] are from alpha c + sigma z where all data is c, per unit of c and z.

  There E[x_0 | x] = c, so the mean of a point is the sum of its coefficients of data, its
  standard deviation the norm of those of noise.
  """
  alpha, sigma = schedule.alpha(solver.times), schedule.sigma(solver.times)
  mean = solver.inputs[:, 0] + np.sum(solver.outputs, axis=(1, 2))
  std = np.sqrt(solver.inputs[:, 1] ** 2 + np.sum(solver.noises**2, axis=1))
  return np.maximum(np.abs(mean - alpha), np.abs(std - sigma))


@pytest.mark.parametrize(
  "spacing, num_steps, least", [("linspace", 10, 0.05), ("trailing", 16, 0.005)]
)
def test_ddim_steps_from_time_to_time_of_its_grid(spacing, num_steps, least):
  """Theirs steps by 1000 // n whatever the grid, and tells the network another time."""
  settings = {"clip_sample": False, "timestep_spacing": spacing}
  case = schedulers.Case("ddim.DDIMScheduler", schedulers.LINEAR, settings)
  theirs, ours = both(case, num_steps, ancestral.ddim)
  assert np.max(off_a_point_mass(theirs, case.view.schedule)) > least
  assert np.max(off_a_point_mass(ours, case.view.schedule)) < 1e-9


def test_ipndm_uses_its_first_evaluation():
  """Theirs starts where no signal is left and takes D = 0 there, wherever the data is."""
  case = schedulers.Case("ipndm.IPNDMScheduler", schedulers.QUARTER_CIRCLE)
  theirs, ours = both(case, 10, multistep.ipndm)
  assert not np.any(theirs.outputs[:, 0])
  assert off_a_point_mass(theirs, case.view.schedule)[-1] > 0.25
  assert np.max(off_a_point_mass(ours, case.view.schedule)) < 1e-9
  np.testing.assert_allclose(ours.inputs, theirs.inputs, atol=1e-9)  # and otherwise they agree
  np.testing.assert_allclose(ours.outputs[:, 1:], theirs.outputs[:, 1:], atol=1e-9)


def test_churn_is_seen_by_the_model():
  """Theirs adds the noise after the model is evaluated, and takes it for the model's error."""
  churn = {"s_churn": 1.0}
  case = schedulers.Case("euler_discrete.EulerDiscreteScheduler", schedulers.EXPLODING, {}, churn)
  n = 5
  step = ancestral.churned(singlestep.euler, min(1.0 / n, 2**0.5 - 1))
  theirs, ours = both(case, n, lambda s, t: singlestep.singlestep(s, t, step))
  assert off_a_point_mass(theirs, case.view.schedule)[-1] > 0.1
  schedule = case.view.schedule
  assert np.max(off_a_point_mass(ours, schedule)) < 1e-9
  np.testing.assert_allclose(ours.times[1:-1], theirs.times[1:-1] * (1 + 1.0 / n))


REPEATED = {
  "beta": {"use_beta_sigmas": True, "beta_schedule": "scaled_linear", "beta_end": 0.012}
  | {"beta_start": 0.00085},
  "Karras": {"use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2"},
}


@pytest.mark.parametrize(
  "settings, betas, grid",
  [
    (REPEATED["beta"], schedules.scaled_linear_betas(), grids.beta),
    (REPEATED["Karras"], schedules.cosine_betas(), grids.karras),
  ],
  ids=REPEATED,
)
@pytest.mark.parametrize(
  "scheduler, error",
  [
    ("dpmsolver_multistep.DPMSolverMultistepScheduler", IndexError),
    ("dpmsolver_singlestep.DPMSolverSinglestepScheduler", IndexError),
    ("deis_multistep.DEISMultistepScheduler", IndexError),
    ("unipc_multistep.UniPCMultistepScheduler", AssertionError),
    ("sasolver.SASolverScheduler", AssertionError),
  ],
)
def test_close_times_are_told_apart(scheduler, error, settings, betas, grid):
  """Theirs rounds times to whole numbers, and starts from the second of equal ones."""
  case = schedulers.Case(scheduler, schedulers.PRESERVING, settings)
  zeros = lambda *_: np.zeros(2)
  with pytest.raises(error):
    schedulers.points(case, case.build(50), zeros, np.ones(2), zeros)
  schedule = schedules.from_betas(betas)
  times = grid(schedule, 49, start=999.0, end=1.0)
  assert np.all(np.diff(times) < 0)
  table = multistep.dpmpp_2m(schedule, grids.to_zero(times))
  assert np.max(off_a_point_mass(tables.expand(table), schedule)) < 1e-9


@pytest.mark.parametrize(
  "scheduler",
  [
    "flow_match_euler_discrete.FlowMatchEulerDiscreteScheduler",
    "flow_match_heun_discrete.FlowMatchHeunDiscreteScheduler",
    "flow_match_lcm.FlowMatchLCMScheduler",
  ],
)
def test_a_shift_is_applied_once(scheduler):
  """Theirs shifts the times between ends that are shifted already."""
  case = schedulers.Case(scheduler, schedulers.STRAIGHT, {"shift": 3.0})
  plain = case._replace(settings={"shift": 1.0})
  theirs, unshifted = (np.unique(schedulers.sigmas(c.build(4)))[::-1] for c in (case, plain))
  once = lambda t: 3 * t / (1 + 2 * t)
  np.testing.assert_allclose(theirs[-2], once(once(0.001)), rtol=1e-5)
  flow = schedules.rectified_flow()
  np.testing.assert_allclose(grids.shifted(flow, unshifted, 3.0), once(unshifted), rtol=1e-5)


@pytest.mark.parametrize("spacing", ["karras", "exponential", "beta", "flow"])
@pytest.mark.parametrize(
  "scheduler", ["deis_multistep.DEISMultistepScheduler", "sasolver.SASolverScheduler"]
)
def test_the_last_step_has_a_length(scheduler, spacing):
  """Theirs repeats the last noise level, so that the last evaluation is for nothing."""
  case = schedulers.Case(scheduler, schedulers.PRESERVING, {f"use_{spacing}_sigmas": True})
  times = case.view.times(case.build(5))
  assert times[-1] == times[-2] > 0
  with pytest.raises(ValueError, match="fall"):
    grids.given(schedulers.RATIO, times)


def test_pndm_ends_where_a_step_of_its_grid_does():
  """By default theirs evaluates where it ends; `steps_offset=1` mends it."""
  case = schedulers.Case("pndm.PNDMScheduler", schedulers.LINEAR_TO_FIRST, {"skip_prk_steps": True})
  theirs = schedulers.expansion(case, 10)
  np.testing.assert_allclose(theirs.inputs[-1], theirs.inputs[-2], rtol=1e-9)
  np.testing.assert_allclose(theirs.outputs[-1], theirs.outputs[-2], rtol=1e-9, atol=1e-12)


def test_longer_runs_are_as_accurate():
  """On N(0, I) the flow of a variance-preserving schedule stands still, so the error is the way.

  Theirs stops lowering the order of the last steps at 15 steps, where it is still needed.
  """
  lowered = lambda schedule, times: multistep.adams_bashforth(
    schedule,
    times,
    multistep.lowered_at_the_end(2, len(times) - 1),
    form=forms.data(),
    rule=forms.midpoint,
  )
  alpha = schedulers.RATIO.alpha

  def error(solver):
    x = schedulers.replayed(solver, lambda x, t: alpha(t) * x, np.zeros(1), np.ones(1))
    return abs(x[-1, 0] / x[0, 0] - 1)

  pairs = [both(dpm(**TO_MIN), n, lowered) for n in range(12, 19)]
  theirs, ours = ([error(pair[i]) for pair in pairs] for i in (0, 1))
  np.testing.assert_allclose(theirs[:3], ours[:3], rtol=1e-6)
  assert theirs[3] > 3 * theirs[2]
  assert np.all(np.diff(ours) < 0)


def test_samples_of_ddpm_have_no_noise():
  """Theirs leaves out the noise at time step 0, which is not the last of every grid."""
  settings = {"clip_sample": False, "variance_type": "fixed_large", "timestep_spacing": "trailing"}
  case = schedulers.Case("ddpm.DDPMScheduler", schedulers.LINEAR, settings)
  fixed_large = lambda s, t: ancestral.ddpm(s, t, scale=lambda small, large: large)
  theirs, ours = both(case, 5, fixed_large)
  assert np.linalg.norm(theirs.noises[-1]) > 0.5
  assert not np.any(ours.noises[-1])
  np.testing.assert_allclose(ours.noises[:-1], theirs.noises[:-1], atol=1e-9)
  np.testing.assert_allclose(ours.outputs, theirs.outputs, atol=1e-9)


def test_the_logarithm_of_ddpms_large_variance_is_no_variance():
  """Theirs takes the square root of the logarithm."""
  settings = {"clip_sample": False, "variance_type": "fixed_large_log"}
  case = schedulers.Case("ddpm.DDPMScheduler", schedulers.LINEAR, settings)
  assert np.all(np.isnan(schedulers.expansion(case, 5).noises[1:]))


def test_deis_of_order_three_in_float32():
  """Theirs computes its weights in float32, as differences that cancel where steps are short.

  On N(0, I) as above. Ours are computed in float64; that they are rounded to float32 then, and
  so is all that they multiply, does not matter.
  """
  case, alpha = deis(solver_order=3), schedulers.RATIO.alpha
  scheduler = case.build(500)
  denoise = lambda i, x, t: np.float32(alpha(t)) * x
  theirs = schedulers.points(case, scheduler, denoise, np.ones(1), None)
  times = case.view.times(scheduler)
  table = multistep.deis(schedulers.RATIO, times, 3, variable=forms.log_snr)
  carry, output = np.float32(table.carry), np.float32(table.output[:, :, 0])
  slots = np.float32([1, *np.zeros(carry.shape[1] - 1)])
  for i in range(table.num_rows):
    slots = carry[i] @ slots + output[i] * denoise(i, slots[0], times[i])
  assert abs(theirs[-1, 0] - 1) > 0.03
  assert abs(slots[0] - 1) < 1e-4
