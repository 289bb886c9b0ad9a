"""Laws of points in the plane that are easy to see and hard to fit.

Each is `(rng, num) -> points [num, 2]` float32: independent draws, moved and scaled by constants so
that the law (not the sample) has mean 0 and a mean variance of 1 over its two coordinates, its
shape unchanged.
"""

import math
import pathlib

import numpy as np

_DATASAURUS = "DatasaurusDozen.tsv"


def _standard(points: np.ndarray, mean: tuple[float, float], second: float) -> np.ndarray:
  """Moves by `mean` and scales; `second` is E|point|^2 before, noise included."""
  variance = (second - mean[0] ** 2 - mean[1] ** 2) / 2
  return ((points - np.asarray(mean)) / math.sqrt(variance)).astype(np.float32)


def _polar(radius: np.ndarray, angle: np.ndarray) -> np.ndarray:
  return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)


def two_moons(rng: np.random.Generator, num: int) -> np.ndarray:
  """Two interleaved half circles, (cos t, sin t) and (1 - cos t, 1/2 - sin t), with noise 0.05.

  Reference: scikit-learn, make_moons.
  """
  lower, noise = rng.integers(2, size=num)[:, None], 0.05
  arc = _polar(np.ones(num), rng.uniform(0, math.pi, num))
  points = np.where(lower, np.array([[1, 0.5]]) - arc, arc) + noise * rng.normal(size=(num, 2))
  # Of the lower one, E|point|^2 = E (1 - cos t)^2 + E (1/2 - sin t)^2 = 9/4 - 2/pi.
  return _standard(points, (0.5, 0.25), (1 + 2.25 - 2 / math.pi) / 2 + 2 * noise**2)


def swiss_roll(rng: np.random.Generator, num: int) -> np.ndarray:
  """A spiral, t (cos t, sin t) with t uniform in [3 pi / 2, 9 pi / 2], with noise 0.3.

  Reference: scikit-learn, make_swiss_roll, without its third axis.
  """
  t, noise = rng.uniform(1.5 * math.pi, 4.5 * math.pi, num), 0.3
  points = _polar(t, t) + noise * rng.normal(size=(num, 2))
  # The integrals of t cos t, t sin t and t^2 over [a, b] = [3 pi / 2, 9 pi / 2], divided by b - a.
  return _standard(points, (2, 2 / (3 * math.pi)), 9.75 * math.pi**2 + 2 * noise**2)


def pinwheel(rng: np.random.Generator, num: int) -> np.ndarray:
  """Five arms: a Gaussian at (1, 0) of deviations 0.3 and 0.1, turned five ways and twisted.

  A point (a, b) turns by its arm's angle and by exp(a) / 4.

  Reference: Johnson, Duvenaud, Wiltschko, Datta and Adams 2016, arXiv 1603.06277, figure 1 and
  their code.
  """
  arm = rng.integers(5, size=num)
  along, across = 1 + 0.3 * rng.normal(size=num), 0.1 * rng.normal(size=num)
  angle = 2 * math.pi * arm / 5 + 0.25 * np.exp(along)
  points = _polar(along, angle) + _polar(across, angle + math.pi / 2)
  return _standard(points, (0, 0), 1 + 0.3**2 + 0.1**2)


def checkerboard(rng: np.random.Generator, num: int) -> np.ndarray:
  """Uniform on the eight unit squares of one colour of a board over [-2, 2]^2.

  Reference: Grathwohl, Chen, Bettencourt, Sutskever and Duvenaud 2018, arXiv 1810.01367, figure 2.
  """
  column, pair = rng.integers(4, size=num), rng.integers(2, size=num)
  corner = np.stack([column, 2 * pair + column % 2], axis=-1) - 2
  return _standard(corner + rng.random((num, 2)), (0, 0), 2 * 4 / 3)


def rings(rng: np.random.Generator, num: int) -> np.ndarray:
  """Four circles of radii 1/4, 1/2, 3/4 and 1, equally likely, with noise 0.02.

  Reference: Grathwohl et al. 2018, arXiv 1810.01367, their code.
  """
  noise = 0.02
  points = _polar(rng.integers(1, 5, size=num) / 4, rng.uniform(0, 2 * math.pi, num))
  points += noise * rng.normal(size=(num, 2))
  return _standard(points, (0, 0), (1 + 4 + 9 + 16) / 16 / 4 + 2 * noise**2)


def eight_gaussians(rng: np.random.Generator, num: int) -> np.ndarray:
  """Eight Gaussians of deviation 0.5, equally likely, their means on a circle of radius 4.

  Reference: Grathwohl et al. 2018, arXiv 1810.01367, figure 2 and their code.
  """
  angle = rng.integers(8, size=num) * (math.pi / 4)
  points = _polar(np.full(num, 4.0), angle) + 0.5 * rng.normal(size=(num, 2))
  return _standard(points, (0, 0), 16 + 2 * 0.5**2)


POINTS = {
  "two_moons": two_moons,
  "swiss_roll": swiss_roll,
  "pinwheel": pinwheel,
  "checkerboard": checkerboard,
  "rings": rings,
  "eight_gaussians": eight_gaussians,
}


def datasaurus(folder: str | pathlib.Path, name: str) -> np.ndarray:
  """One of the thirteen sets of 142 points that have the same mean, variance and correlation.

  Args:
    folder: holds DatasaurusDozen.tsv, with the columns dataset, x and y.
    name: of the set, such as "dino", "star" or "bullseye".

  Returns:
    points [142, 2] float32, each coordinate with mean 0 and variance 1.

  Raises:
    FileNotFoundError: the folder or the file is not there.
    ValueError: no set has this name, or a line is not a name and two numbers.

  Reference: Matejka and Fitzmaurice 2017, "Same Stats, Different Graphs", CHI.
  """
  path = pathlib.Path(folder) / _DATASAURUS
  if not path.is_file():
    raise FileNotFoundError(f"{path} is not a file; give the folder that holds {_DATASAURUS}")
  sets: dict[str, list[tuple[float, float]]] = {}
  for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()[1:], 2):
    try:
      kind, x, y = line.split("\t")
      sets.setdefault(kind, []).append((float(x), float(y)))
    except ValueError as e:
      raise ValueError(f"{path}:{number} is {line!r}; give a name, x and y between tabs") from e
  if name not in sets:
    raise ValueError(f"{name!r} is not in {path}; it has {', '.join(sorted(sets))}")
  points = np.array(sets[name])
  return ((points - points.mean(axis=0)) / points.std(axis=0)).astype(np.float32)
