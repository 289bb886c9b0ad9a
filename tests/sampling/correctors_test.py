"""Correctors: around a table, or written with the predictor; the orders are in orders_test."""

import numpy as np
import pytest

from ancestral.models import schedules
from ancestral.sampling import ancestral, correctors, forms, multistep, tables

SCHEDULE = schedules.linear()
TIMES = np.linspace(0.9, 0.05, 9)


def assert_one_solver(one, other):
  for a, b in zip(tables.expand(one), tables.expand(other), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)


def test_around_the_table_of_its_predictor_it_is_unipc():
  assert_one_solver(
    correctors.unic(multistep.dpmpp_2m(SCHEDULE, TIMES), SCHEDULE, 2),
    correctors.unipc(SCHEDULE, TIMES, 2),
  )
  assert_one_solver(
    correctors.unic(correctors.unip(SCHEDULE, TIMES, 3), SCHEDULE, 3),
    correctors.unipc(SCHEDULE, TIMES, 3),
  )


def test_first_corrected_point_by_hand():
  """DDIM to t_1, and again with the mean of D_0 and D_1: what B(h) = e^h - 1 makes of order one."""
  s, t, u = TIMES[:3]
  points = tables.expand(correctors.unipc(SCHEDULE, TIMES[:3], 1))
  alpha, sigma = SCHEDULE.alpha, SCHEDULE.sigma
  ratio = sigma(t) / sigma(s)
  weight = (alpha(t) - ratio * alpha(s)) / 2  # of each output in the corrected x_t
  last = sigma(u) / sigma(t)
  expected = [last * weight, last * weight + alpha(u) - last * alpha(t)]
  np.testing.assert_allclose(points.outputs[2, :, 0], expected, rtol=1e-12)


def test_in_the_limit_of_no_noise_it_is_the_ode():
  ode = correctors.sa_solver(SCHEDULE, TIMES, tau=lambda t: 0.0)
  assert ode.noise is None
  almost = correctors.sa_solver(SCHEDULE, TIMES, tau=lambda t: 1e-6)
  for a, b in zip(tables.expand(ode)[:3], tables.expand(almost)[:3], strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-8)
  parts = correctors.sa_solver(SCHEDULE, TIMES, tau=lambda t: float(t > 0.5))
  drawn = np.abs(tables.expand(parts).noises).sum(0) > 0
  assert drawn.tolist() == [t > 0.5 for t in TIMES[:-1]]


def test_noise_and_missing_inputs_are_refused():
  with pytest.raises(ValueError, match="noise"):
    correctors.unic(ancestral.ddpm(SCHEDULE, TIMES), SCHEDULE, 2)
  form = forms.data()
  with pytest.raises(ValueError, match="order"):
    correctors.predictor_corrector(SCHEDULE, TIMES, 2, 0, form=form, rule=correctors.bh2)
