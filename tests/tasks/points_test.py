import os
import pathlib

import numpy as np
import pytest
import scipy.spatial

from ancestral.tasks import points

DATA = os.environ.get("ANCESTRAL_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="ANCESTRAL_DATA names no folder of data sets")
NUM = 100_000


def drawn(name, num=NUM):
  return points.POINTS[name](np.random.default_rng(0), num).astype(np.float64)


def assert_mean(values, expected):
  """The mean of draws, within four of its standard errors."""
  error = np.std(values) / np.sqrt(len(values))
  assert abs(np.mean(values) - expected) <= 4 * error, (np.mean(values), expected, error)


@pytest.mark.parametrize("name", points.POINTS)
def test_the_law_is_standardised(name):
  draws = drawn(name)
  for axis in (0, 1):
    assert_mean(draws[:, axis], 0)
  assert_mean(np.square(draws).mean(axis=1), 1)


@pytest.mark.parametrize("name", points.POINTS)
def test_draws_are_float32_seeded_and_independent(name):
  found = points.POINTS[name](np.random.default_rng(3), 1001)
  assert found.shape == (1001, 2) and found.dtype == np.float32
  np.testing.assert_array_equal(found, points.POINTS[name](np.random.default_rng(3), 1001))
  assert np.any(found != points.POINTS[name](np.random.default_rng(4), 1001))
  assert points.POINTS[name](np.random.default_rng(3), 0).shape == (0, 2)
  draws = drawn(name)  # in no order: consecutive draws do not correlate
  assert_mean(draws[1:, 0] * draws[:-1, 0], 0)


GRID = (np.arange(500) + 0.5) / 500  # of a parameter in [0, 1], for curves


def circle(centre, radius, share):
  return centre + radius * np.exp(2j * np.pi * share)


# The curve under the noise, with points spaced as the law is, and the noise.
TURNS = np.pi * (1.5 + 3 * np.repeat(GRID, 4))
CURVES = {
  "two_moons": ([circle(0, 1, GRID / 2), circle(1 + 0.5j, 1, (GRID + 1) / 2)], 0.05),
  "swiss_roll": ([TURNS * np.exp(1j * TURNS)], 0.3),
  "rings": ([circle(0, radius, GRID) for radius in (0.25, 0.5, 0.75, 1)], 0.02),
}


@pytest.mark.parametrize("name", CURVES)
def test_a_curve_with_noise(name):
  arcs, noise = CURVES[name]
  curve = np.concatenate(arcs)
  curve = np.stack([curve.real, curve.imag], axis=1)
  # By quadrature: the mean over the curve, and the mean variance of a coordinate.
  scale = np.sqrt(curve.var(axis=0).mean() + noise**2)
  draws = drawn(name)[:20_000] * scale + curve.mean(axis=0, keepdims=True)
  distance, nearest = scipy.spatial.KDTree(curve).query(draws)
  # Across the curve the noise has one dimension; the ends, the bends and the grid add a little.
  assert 0.97 < np.mean(np.square(distance)) / noise**2 < 1.06
  counts = np.bincount(nearest * 8 // len(curve), minlength=8)
  assert np.abs(counts - 2500).max() < 5 * np.sqrt(2500 * 7 / 8)


def test_pinwheel_has_five_arms_that_turn():
  draws = drawn("pinwheel") * np.sqrt((1 + 0.09 + 0.01) / 2)
  z = draws[:, 0] + 1j * draws[:, 1]
  for power in range(1, 5):  # a turn by 2 pi / 5 leaves the law as it is, so these are 0
    assert_mean((z**power).real, 0)
    assert_mean((z**power).imag, 0)
  nodes, weights = np.polynomial.hermite_e.hermegauss(40)
  a, b = 1 + 0.3 * nodes[:, None], 0.1 * nodes[None]
  fifth = (a + 1j * b) ** 5 * np.exp(5j * np.exp(a) / 4)
  expected = np.einsum("ij,i,j", fifth, weights, weights) / weights.sum() ** 2
  assert abs(expected) > 0.8  # so an arm is seen
  assert_mean((z**5).real, expected.real)
  assert_mean((z**5).imag, expected.imag)


def test_checkerboard_is_uniform_on_one_colour():
  draws = drawn("checkerboard") * np.sqrt(4 / 3)
  cells = np.clip(np.floor(draws), -2, 1).astype(int)
  assert np.abs(draws).max() < 2 + 1e-6
  edge = np.abs(draws - np.rint(draws)).min(axis=1) < 1e-6  # where float32 may round across
  assert np.all(cells[~edge].sum(axis=1) % 2 == 0)
  counts = np.bincount((cells + 2) @ np.array([4, 1]), minlength=16)
  counts = counts[counts > 100]
  assert len(counts) == 8 and np.abs(counts - NUM / 8).max() < 5 * np.sqrt(NUM * 7) / 8
  inside = draws - np.floor(draws)
  for axis in (0, 1):
    assert_mean(inside[:, axis], 1 / 2)
    assert_mean(np.square(inside[:, axis]), 1 / 3)
  assert_mean(inside.prod(axis=1), 1 / 4)


def test_eight_gaussians_stand_on_a_circle():
  draws = drawn("eight_gaussians") * np.sqrt((16 + 0.5) / 2)
  z = draws[:, 0] + 1j * draws[:, 1]
  which = np.rint(np.angle(z) / (np.pi / 4)).astype(int) % 8
  counts = np.bincount(which)
  assert len(counts) == 8 and np.abs(counts - NUM / 8).max() < 5 * np.sqrt(NUM * 7) / 8
  residual = z - 4 * np.exp(1j * np.pi / 4 * which)
  # Midway to the next is 3.06 deviations away, so few are given to the wrong one.
  assert 0.97 < np.mean(np.abs(residual) ** 2) / 0.5 < 1.01


@needs_data
def test_the_datasaurus_sets_have_the_same_statistics():
  folder = pathlib.Path(DATA, "datasaurus")
  with pytest.raises(ValueError, match=r"'cat' is not in .*; it has away, bullseye, circle, dino,"):
    points.datasaurus(folder, "cat")
  found = {name: points.datasaurus(folder, name) for name in ("dino", "star", "x_shape")}
  for draws in found.values():
    assert draws.shape == (142, 2) and draws.dtype == np.float32
    np.testing.assert_allclose(draws.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(draws.std(axis=0), 1, atol=1e-6)
    # The correlation of all sets is -0.06 to two places (Matejka and Fitzmaurice, figure 1).
    assert abs(np.mean(draws[:, 0] * draws[:, 1]) + 0.065) < 0.006
  assert np.abs(found["dino"] - found["star"]).max() > 1


def test_a_datasaurus_file_by_hand(tmp_path):
  with pytest.raises(
    FileNotFoundError, match=r"DatasaurusDozen\.tsv is not a file; give the folder"
  ):
    points.datasaurus(tmp_path, "dino")
  path = tmp_path / "DatasaurusDozen.tsv"
  path.write_text("dataset\tx\ty\na\t1\t10\nb\t7\t7\na\t3\t30\n")
  np.testing.assert_allclose(points.datasaurus(tmp_path, "a"), [[-1, -1], [1, 1]], atol=1e-6)
  for line in ("a\t1", "a\t1\tx", "", "a\t1\t2\t3"):
    path.write_text(f"dataset\tx\ty\na\t1\t10\n{line}\n")
    with pytest.raises(ValueError, match=r"tsv:3 is .*; give a name, x and y between tabs"):
      points.datasaurus(tmp_path, "a")
