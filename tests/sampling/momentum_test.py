"""Momentum: its limits, its weights and its regions of stability; the orders are in orders_test."""

import numpy as np
import pytest

from ancestral.models import schedules
from ancestral.sampling import forms, momentum, multistep, tables

GRIDS = {
  "linear": (schedules.linear(), np.linspace(0.9, 0.05, 9)),
  "flow": (schedules.rectified_flow(), np.linspace(1, 0, 8)),
  "ve": (schedules.variance_exploding(), np.geomspace(80, 0.01, 12)),
}
DAMPINGS = (1.0, 0.8, 0.5, 0.2)


def assert_one_solver(one, other, atol=1e-9):
  for a, b in zip(tables.expand(one), tables.expand(other), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=atol * max(1, np.abs(b).max()))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_without_damping_both_are_ipndm(grid, order):
  schedule, times = GRIDS[grid]
  for make in (momentum.heavy_ball, momentum.ghvb):
    plain = multistep.ipndm(schedule, times, order)
    assert_one_solver(make(schedule, times, order, damping=1.0), plain)
    with pytest.raises(AssertionError):
      assert_one_solver(make(schedule, times, order, damping=0.9), plain)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("variable", [forms.log_snr, forms.noise_ratio])
def test_without_damping_the_exact_one_is_deis(grid, variable):
  schedule, times = GRIDS[grid]
  for order in (1, 2, 3):
    assert_one_solver(
      momentum.exact(schedule, times, order, damping=1.0, variable=variable),
      multistep.deis(schedule, times, order, variable=variable),
      atol=1e-7,
    )


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_weights_integrate_polynomials_below_their_order(order, damping):
  """By running the velocity over two hundred steps of e = (j / 4)^m and integrating the last."""
  mix = momentum.weights(order, damping)
  steps = np.arange(-200, 1)
  for degree in range(order + 1):
    velocity = momentum.averaged((steps / 4.0) ** degree, damping)
    slope = mix @ velocity[::-1][:order]
    error = abs(slope - 0.25**degree / (degree + 1))
    assert error < 1e-8 if degree < order else error > 1e-4


def test_the_velocities_by_hand():
  """Two steps even in rho: e_0, then u_1 of b = 1/2, k = 2."""
  schedule, times = schedules.variance_exploding(), [3.0, 2.0, 1.0]
  slopes = {momentum.heavy_ball: [0.25, 0.75], momentum.ghvb: [-0.25, 1.25]}
  for make, (first, second) in slopes.items():
    points = tables.expand(make(schedule, times, 2, damping=0.5))
    # x_2 = x - e_0 - first e_0 - second e_1, e_i = (x_i - m_i) / sigma_i, x_1 = x - e_0
    np.testing.assert_allclose(points.outputs[2, 1, 0], second / 2, rtol=1e-9)
    e_0 = 1 + first - second / 2
    np.testing.assert_allclose(points.outputs[2, 0, 0], e_0 / 3, rtol=1e-9)


def test_closed_form_of_second_order():
  """((2 + b) v_i - (2 - b) v_{i-1}) / 2 b, from matching e and its first difference by hand."""
  for b in DAMPINGS:
    np.testing.assert_allclose(momentum.weights(2, b), [(2 + b) / 2 / b, (b - 2) / 2 / b])


def iterated(mix, damping, z, num_steps=4000):
  """|x_n| after many steps of the recurrence for e = z x (h = 1), from a generic past."""
  past = list(np.random.default_rng(0).normal(size=len(mix)))
  velocity = x = 1.0
  for _ in range(num_steps):
    velocity = (1 - damping) * velocity + damping * (mix @ past)
    x = x + velocity
    past = [z * x, *past[:-1]]
    if abs(x) > 1e6:
      break
  return abs(x)


def cases():
  for order in (1, 2, 3, 4):
    for damping in DAMPINGS:
      yield momentum.weights(order, damping), damping
      yield momentum.weights(order), damping


def test_iterating_the_recurrence_finds_the_boundary():
  """The mixed velocity obeys v_i = (1 - b) v_{i-1} + b e_i, mixing and averaging commute."""
  for mix, damping in cases():
    end = momentum.real_extent(mix, damping)
    assert iterated(mix, damping, 0.95 * end) < 1e-3
    assert iterated(mix, damping, 1.05 * end) > 1e6
    inside, outside = momentum.amplification(mix, damping, np.array([0.999, 1.001]) * end)
    assert inside < 1 < outside


def test_the_stable_part_of_the_axis_has_no_gap():
  for mix, damping in cases():
    z = momentum.real_extent(mix, damping) * np.linspace(0.001, 0.999, 400)
    assert np.all(momentum.amplification(mix, damping, z) < 1)


def test_amplification_of_complex_z_is_that_of_the_iteration():
  mix, rng = momentum.weights(3, 0.6), np.random.default_rng(1)
  for z in rng.uniform(-0.6, 0, 6) + 1j * rng.uniform(0, 0.6, 6):
    factor = momentum.amplification(mix, 0.6, z)
    growth = iterated(mix, 0.6, z, 500) / iterated(mix, 0.6, z, 300)
    assert abs(np.log(growth) / 200 - np.log(factor)) < 0.02


def test_damping_enlarges_the_stable_part_of_the_axis_and_order_shrinks_it():
  for order in (1, 2, 3, 4):
    extent = lambda b, order=order: -momentum.real_extent(momentum.weights(order, b), b)
    assert np.all(np.diff([extent(b) for b in DAMPINGS]) > 0)
    if order > 1:  # between the plain methods of this order and of the one before
      before = -momentum.real_extent(momentum.weights(order - 1), 1.0)
      assert extent(1.0) < extent(0.01) < before
    for b in DAMPINGS:  # heavy ball's, in closed form
      far = -momentum.real_extent(momentum.weights(order), b)
      np.testing.assert_allclose(far, extent(1.0) * (2 - b) / b)


def test_regions_grow_and_only_that_of_fourth_order_keeps_the_plain_one():
  """Of the points stable by a margin without damping, which are unstable with it."""
  z = np.linspace(-2, 0.2, 111)[None] + 1j * np.linspace(0, 1.2, 61)[:, None]
  for order in (1, 2, 3, 4):
    plain = momentum.amplification(momentum.weights(order), 1.0, z) < 1 - 1e-3
    for b in DAMPINGS[1:]:
      damped = momentum.amplification(momentum.weights(order, b), b, z) < 1
      assert order == 1 or damped.sum() > plain.sum()  # of the first, most lies left of here
      assert np.any(plain & ~damped) == (order < 4)
      heavy = momentum.amplification(momentum.weights(order), b, z) < 1
      assert np.any(plain & ~heavy)


def test_refused():
  schedule, times = GRIDS["ve"]
  for make in (momentum.heavy_ball, momentum.ghvb, momentum.exact):
    with pytest.raises(ValueError, match="damping=0"):
      make(schedule, times, 2, damping=0)
    with pytest.raises(ValueError, match="order=0"):
      make(schedule, times, 0)
