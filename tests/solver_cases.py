"""Every named solver as a function of a schedule and times, for the tests of all of them."""

from ancestral.sampling import ancestral, correctors, forms, momentum, multistep, singlestep


def steps(step):
  return lambda schedule, times: singlestep.singlestep(schedule, times, step)


def of(make, *args, **kwargs):
  return lambda schedule, times: make(schedule, times, *args, **kwargs)


DATA, NOISE, FLOW = forms.data(), forms.noise(), forms.flow()
START_3, START_4 = singlestep.dpm_3s(DATA), singlestep.rk4(DATA)

DETERMINISTIC = {
  "ddim": of(ancestral.ddim),
  "euler": steps(singlestep.euler),
  "heun": steps(singlestep.heun(NOISE)),
  "heun-flow": steps(singlestep.heun(FLOW)),
  "rk3": steps(singlestep.rk3(NOISE)),
  "rk4": steps(singlestep.rk4(NOISE)),
  "rk4-flow": steps(singlestep.rk4(FLOW)),
  "dpm2": steps(singlestep.dpm_2s(NOISE)),
  "2s": steps(singlestep.dpm_2s(DATA)),
  "dpm3": steps(singlestep.dpm_3s(NOISE)),
  "3s": steps(singlestep.dpm_3s(DATA)),
  "2m": of(multistep.dpmpp_2m),
  "3m": of(multistep.dpmpp_3m),
  "3m-start": of(multistep.dpmpp_3m, start=START_3),
  "exponential-4": of(multistep.exponential, 4, start=START_4),
  "dpm-2m": of(multistep.adams_bashforth, 2, form=NOISE, rule=forms.midpoint),
  "lms": of(multistep.lms),
  "deis-3": of(multistep.deis, 3, variable=forms.log_snr),
  "tab-deis-3": of(multistep.deis, 3),
  "ipndm": of(multistep.ipndm),
  "plms": of(multistep.plms),
  "pndm": of(multistep.pndm),
  "heavy-ball": of(momentum.heavy_ball),
  "ghvb-3": of(momentum.ghvb, 3),
  "ghvb-exact": of(momentum.exact, 3),
  "unipc-1": of(correctors.unipc, 1),
  "unipc-2": of(correctors.unipc, 2),
  "unipc-3": of(correctors.unipc, 3),
  "unipc-3-bh1": of(correctors.unipc, 3, rule=correctors.bh1),
  "unipc-4": of(correctors.unipc, 4),
  "sa-ode": of(correctors.sa_solver, tau=lambda t: 0.0),
}

STOCHASTIC = {
  "ddim-half": of(ancestral.ddim, 0.5),
  "ddpm": of(ancestral.ddpm),
  "euler-ancestral": steps(ancestral.renoised(singlestep.euler)),
  "dpm2-ancestral": steps(ancestral.renoised(singlestep.dpm_2s(NOISE))),
  "2s-ancestral": steps(ancestral.renoised(singlestep.dpm_2s(DATA))),
  "sde": steps(ancestral.dpmpp_sde()),
  "sde-2m": of(multistep.dpmpp_2m, eta=1.0),
  "sde-3m": of(multistep.dpmpp_3m, eta=1.0),
  "churn": steps(ancestral.churned(singlestep.heun(NOISE), 0.3)),
  "sa-solver": of(correctors.sa_solver),
  "consistency": of(ancestral.consistency),
  "trajectory-consistency": of(ancestral.trajectory_consistency),
}

ALL = DETERMINISTIC | STOCHASTIC
