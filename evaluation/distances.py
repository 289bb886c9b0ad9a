"""How far two sets of feature vectors are apart: Frechet, kernels, neighbours, and sorted slices.

All take x [N, F] and y [M, F], any real dtype, compute in float64 on the host, and raise ValueError
where a set has fewer than two rows, the numbers of features differ, or a value is not finite.

Two finite sets of one law are not at distance 0, and how far depends on their sizes. So a table of
distances uses sets of one size, and shows the distance of two `halves` of the data: its floor.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike

_CHUNK = 500
"""Rows of x whose distances to all y are held at once: 40 MB at M = 10,000."""

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]  # [n, F], [m, F] -> [n, m]


def _rows(name: str, values: ArrayLike) -> np.ndarray:
  values = np.asarray(values, dtype=np.float64)
  if values.ndim != 2 or len(values) < 2 or not values.shape[1]:
    raise ValueError(f"{name} has shape {values.shape}; give features [N, F] with at least 2 rows")
  bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
  if len(bad):
    raise ValueError(
      f"{len(bad)} of {len(values)} rows of {name} are not finite, the first is row {bad[0]}; "
      "leave them out, or mend what computes them"
    )
  return values


def _pair(x: ArrayLike, y: ArrayLike, names: tuple[str, str] = ("x", "y")) -> tuple:
  x, y = _rows(names[0], x), _rows(names[1], y)
  if x.shape[1] != y.shape[1]:
    raise ValueError(
      f"{names[0]} has {x.shape[1]} features and {names[1]} {y.shape[1]}; "
      "compute the same features of both"
    )
  return x, y


def halves(rng: np.random.Generator, x: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
  """Two disjoint random halves of the rows; of an odd number one row is left out.

  Their distance is what two sets of one law and this size are apart: the floor of a table.

  Raises:
    ValueError: x has fewer than 4 rows.
  """
  x = np.asarray(x)
  if len(x) < 4:
    raise ValueError(f"{len(x)} rows; halves need 2 rows each, so give at least 4")
  half = len(x) // 2
  order = rng.permutation(len(x))
  return x[order[:half]], x[order[half : 2 * half]]


def frechet(x: ArrayLike, y: ArrayLike) -> float:
  r"""The squared 2-Wasserstein distance between the Gaussians of the sets' means and covariances.

      |mu_x - mu_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^{1/2})

  The covariances divide by N - 1. They may be singular: with S = R^T R (of a QR decomposition, so
  that S itself is not formed), tr (S_x S_y)^{1/2} is the sum of the singular values of R_x R_y^T,
  whose squares are the eigenvalues of S_x^{1/2} S_y S_x^{1/2}; a zero among them costs an error of
  epsilon, not its square root.

  It is called FID only with the features of Inception v3, which nothing here has. Its bias is
  upwards and falls as 1 / N, so that only numbers of equal N and M compare; with both sets from
  N(0, I) it is 2 F / N + F (F + 1) / (2 N) to first order.

  Args:
    x: features [N, F].
    y: features [M, F].

  Returns:
    The distance, in squared units of the features, at least 0.

  Raises:
    ValueError: see the top of the file.

  Reference: Dowson and Landau 1982, J. Multivariate Analysis 12, 450-455; Heusel, Ramsauer,
  Unterthiner, Nessler and Hochreiter 2017, arXiv 1706.08500, equation 6.
  """
  x, y = _pair(x, y)
  (mean_x, root_x), (mean_y, root_y) = _moments(x), _moments(y)
  return _gaussian_distance(mean_x, root_x, mean_y, root_y)


def _moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The mean [F], and R [min(N, F), F] with R^T R the covariance."""
  mean = x.mean(axis=0)
  return mean, np.linalg.qr((x - mean[None]) / math.sqrt(len(x) - 1), mode="r")


def frechet_gaussian(mu1: ArrayLike, s1: ArrayLike, mu2: ArrayLike, s2: ArrayLike) -> float:
  """`frechet` of two Gaussians of means [F] and covariances [F, F], which may be singular.

  Raises:
    ValueError: shapes do not fit, a value is not finite, or a covariance is not symmetric and
      positive semidefinite.
  """
  mean1, root1 = _gaussian("first", mu1, s1)
  mean2, root2 = _gaussian("second", mu2, s2)
  if mean1.shape != mean2.shape:
    raise ValueError(f"the Gaussians have {len(mean1)} and {len(mean2)} features; give the same")
  return _gaussian_distance(mean1, root1, mean2, root2)


def _gaussian(name: str, mean: ArrayLike, covariance: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
  """The mean, and R with R^T R the covariance; eigenvalues within rounding of 0 are 0."""
  mean, covariance = (np.asarray(value, dtype=np.float64) for value in (mean, covariance))
  if mean.ndim != 1 or covariance.shape != 2 * mean.shape:
    raise ValueError(
      f"the {name} mean is {mean.shape} and its covariance {covariance.shape}; give [F] and [F, F]"
    )
  if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
    raise ValueError(f"the {name} mean or covariance has NaN or infinity; give finite values")
  scale = np.abs(covariance).max()
  values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
  if np.abs(covariance - covariance.T).max() > 1e-5 * scale or values[0] < -1e-5 * scale:
    raise ValueError(
      f"the {name} covariance is not symmetric and positive semidefinite (its smallest eigenvalue "
      f"is {values[0]:.2g}); give a covariance, such as np.cov makes"
    )
  rounding = len(values) * np.finfo(np.float64).eps * values[-1]
  root = np.sqrt(np.where(values > rounding, values, 0))
  return mean, root[:, None] * vectors.T


def _gaussian_distance(
  mean1: np.ndarray, root1: np.ndarray, mean2: np.ndarray, root2: np.ndarray
) -> float:
  cross = np.linalg.svd(root1 @ root2.T, compute_uv=False).sum()
  spread = np.square(root1).sum() + np.square(root2).sum() - 2 * cross
  return float(np.square(mean1 - mean2).sum() + max(spread, 0.0))


def _total(kernel: Kernel, x: np.ndarray, y: np.ndarray) -> float:
  return sum(float(kernel(x[i : i + _CHUNK], y).sum()) for i in range(0, len(x), _CHUNK))


def _mean_off_diagonal(kernel: Kernel, x: np.ndarray) -> float:
  """The mean of kernel(x_i, x_j) over i != j."""
  total = 0.0
  for first in range(0, len(x), _CHUNK):
    block = kernel(x[first : first + _CHUNK], x)
    total += float(block.sum() - np.trace(block, offset=first))
  return total / (len(x) * (len(x) - 1))


def _unbiased(kernel: Kernel, x: np.ndarray, y: np.ndarray) -> float:
  between = _total(kernel, x, y) / (len(x) * len(y))
  return _mean_off_diagonal(kernel, x) + _mean_off_diagonal(kernel, y) - 2 * between


def kernel_distance(x: ArrayLike, y: ArrayLike) -> float:
  """The unbiased squared maximum mean discrepancy with a cubic kernel.

      mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j),
      k(x, y) = (x . y / F + 1)^3

  It sees differences of the moments up to the third and no others. It has no bias at any size, so
  for equal laws it is as often negative as positive, about. With features of Inception it is KID.
  `standard_error` says how far to believe it.

  Args:
    x: features [N, F].
    y: features [M, F].

  Raises:
    ValueError: see the top of the file.

  Reference: Binkowski, Sutherland, Arbel and Gretton 2018, arXiv 1801.01401, section 4.
  """
  x, y = _pair(x, y)
  return _unbiased(lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3, x, y)


def mmd(x: ArrayLike, y: ArrayLike, bandwidths: Sequence[float] | None = None) -> float:
  """The unbiased squared maximum mean discrepancy with a sum of Gaussian kernels.

      as `kernel_distance`, with k(x, y) = sum_b exp(-|x - y|^2 / (2 b^2))

  It sees every difference of the laws, those of the size of a bandwidth best.

  Args:
    x: features [N, F].
    y: features [M, F].
    bandwidths: in the units of the features; by default one, the median distance between two of
      the points of both sets together (of 1,000 of them, evenly spaced, where there are more).
      That one depends on the sets: to compare distances, give the bandwidth that real data have.

  Raises:
    ValueError: a bandwidth is not positive and finite, or the median is 0; and as at the top.

  Reference: Gretton, Borgwardt, Rasch, Schoelkopf and Smola 2012, JMLR 13, 723-773, equation 3;
  section 8 for the median.
  """
  x, y = _pair(x, y)
  bandwidths = [_median_distance(x, y)] if bandwidths is None else list(map(float, bandwidths))
  if not bandwidths or not all(0 < b < math.inf for b in bandwidths):
    raise ValueError(f"bandwidths are {bandwidths}; give at least one, all positive")

  def kernel(a, b):
    squared = _squared_distances(a, b)
    return sum(np.exp(squared * (-0.5 / width**2)) for width in bandwidths)

  return _unbiased(kernel, x, y)


def _median_distance(x: np.ndarray, y: np.ndarray) -> float:
  points = np.concatenate([x, y])
  points = points[np.linspace(0, len(points) - 1, min(len(points), 1000)).astype(int)]
  squared = _squared_distances(points, points)
  median = math.sqrt(np.median(squared[np.triu_indices(len(points), 1)]))
  if not median:
    raise ValueError("half of the pairs of points coincide, so the median is 0; give bandwidths")
  return median


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """|x_i - y_j|^2 [N, M]; what rounding leaves of equal points is 0."""
  centre = y.mean(axis=0)[None]  # offsets cancel before they are squared
  x, y = x - centre, y - centre
  norms = np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1)[None]
  squared = norms - 2 * (x @ y.T)
  return np.where(squared > 1e-13 * norms, squared, 0)


def standard_error(
  rng: np.random.Generator,
  x: ArrayLike,
  y: ArrayLike,
  distance: Callable[[np.ndarray, np.ndarray], float] = kernel_distance,
  *,
  num_subsets: int = 10,
) -> float:
  """The standard error of an unbiased distance, from disjoint random subsets.

      std_s distance(x_s, y_s) / sqrt(num_subsets)

  The subsets are disjoint, so their distances are independent and this is the standard error of
  their mean. That of `distance(x, y)` is at most as large: it is the average of that mean over all
  ways to cut x and y (Rao-Blackwell). They are equal to first order unless the laws are equal.

  Args:
    rng: the generator that cuts.
    x: features [N, F].
    y: features [M, F].
    distance: `kernel_distance`, or `mmd` with its bandwidths bound. Not `frechet`, whose bias
      depends on the size.
    num_subsets: into how many subsets each set is cut; rows that are left over go unused.

  Raises:
    ValueError: fewer than 2 subsets, or fewer than 2 rows in one; and as at the top.
  """
  x, y = _pair(x, y)
  sizes = len(x) // max(num_subsets, 1), len(y) // max(num_subsets, 1)
  if num_subsets < 2 or min(sizes) < 2:
    raise ValueError(
      f"{num_subsets} subsets of {sizes[0]} and {sizes[1]} rows; give at least 2, of 2 rows each"
    )
  orders = rng.permutation(len(x)), rng.permutation(len(y))
  cuts = [
    order[: size * num_subsets].reshape(num_subsets, size)
    for order, size in zip(orders, sizes, strict=True)
  ]
  found = [distance(x[i], y[j]) for i, j in zip(*cuts, strict=True)]
  return float(np.std(found, ddof=1) / math.sqrt(num_subsets))


class PrecisionRecall(NamedTuple):
  """Shares in [0, 1]."""

  precision: float  # of fake points that lie within the real ones' manifold
  recall: float  # of real points that lie within the fake ones' manifold


def precision_recall(real: ArrayLike, fake: ArrayLike, k: int = 3) -> PrecisionRecall:
  """The share of fake points that could be real, and of real points that could be fake.

  A set's manifold is the union of balls, one around each point, that reach to the k-th nearest of
  the other points. Precision falls with bad samples, recall with missing modes. Both depend on the
  number of points and on k, and one outlier makes a large ball.

  Args:
    real: features [N, F].
    fake: features [M, F].
    k: which neighbour a ball reaches to.

  Raises:
    ValueError: k is not from 1 to the number of points less one; and as at the top.

  Reference: Kynkaanniemi, Karras, Laine, Lehtinen and Aila 2019, arXiv 1904.06991, equations 1, 2.
  """
  real, fake = _pair(real, fake, ("real", "fake"))
  if not 1 <= k < min(len(real), len(fake)):
    raise ValueError(f"k is {k} with {len(real)} and {len(fake)} points; 1 to one less than those")
  centre = real.mean(axis=0)[None]
  real, fake = real - centre, fake - centre
  radii_real, radii_fake = _squared_radii(real, k), _squared_radii(fake, k)
  fake_inside, real_inside = np.zeros(len(fake), bool), np.zeros(len(real), bool)
  for first in range(0, len(real), _CHUNK):
    rows = slice(first, first + _CHUNK)
    squared = _squared_distances(real[rows], fake)
    fake_inside |= (squared <= radii_real[rows, None]).any(axis=0)
    real_inside[rows] = (squared <= radii_fake[None]).any(axis=1)
  return PrecisionRecall(float(fake_inside.mean()), float(real_inside.mean()))


def _squared_radii(x: np.ndarray, k: int) -> np.ndarray:
  """The squared distance of each point to the k-th nearest other one, [N]."""
  radii = []
  for first in range(0, len(x), _CHUNK):
    squared = _squared_distances(x[first : first + _CHUNK], x)
    rows = np.arange(len(squared))
    squared[rows, first + rows] = np.inf
    radii.append(np.partition(squared, k - 1, axis=1)[:, k - 1])
  return np.concatenate(radii)


def sliced_wasserstein(
  key: jax.Array, x: ArrayLike, y: ArrayLike, num_projections: int = 500
) -> float:
  """The squared 2-Wasserstein distance of projections on a line, averaged over directions.

      mean_t integral_0^1 (Q_{x . t}(u) - Q_{y . t}(u))^2 du,   t uniform on the unit sphere

  Q is the quantile function of the projected points, a step function, and the integral is exact for
  sets of any sizes. Where y is x moved by d, the mean over directions is |d|^2 / F. It is 0 if y is
  x, exactly, and above 0 for two sets of one law, the more the fewer rows they have.

  Args:
    key: a key for the directions; the same for all distances that are compared.
    x: features [N, F].
    y: features [M, F].
    num_projections: how many directions.

  Returns:
    The distance, in squared units of the features.

  Raises:
    ValueError: num_projections is not positive; and as at the top.

  Reference: Bonneel, Rabin, Peyre and Pfister 2015, J. Math. Imaging and Vision 51, 22-45.
  """
  x, y = _pair(x, y)
  if num_projections < 1:
    raise ValueError(f"num_projections is {num_projections}; give a positive number")
  normal = jax.random.normal(key, (x.shape[1], num_projections))
  directions = np.asarray(normal, dtype=np.float64)
  directions /= np.linalg.norm(directions, axis=0, keepdims=True)
  weights, rows_x, rows_y = _matching(len(x), len(y))
  total = 0.0
  for first in range(0, num_projections, 100):  # a hundred projections at once bound the memory
    slices = directions[:, first : first + 100]
    sorted_x, sorted_y = np.sort(x @ slices, axis=0), np.sort(y @ slices, axis=0)
    total += float((weights @ np.square(sorted_x[rows_x] - sorted_y[rows_y])).sum())
  return total / num_projections


def _matching(n: int, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The monotone coupling of n and m equal masses: mass, row of n and row of m, each [<= n + m]."""
  ends = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)  # of pieces, in 1 / (n m)
  mass = np.diff(ends, prepend=0) / (n * m)
  return mass, (ends - 1) // m, (ends - 1) // n
