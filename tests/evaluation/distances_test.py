import functools
import itertools
import math

import jax
import numpy as np
import pytest
import scipy.linalg
import scipy.spatial.distance
import scipy.stats

from ancestral.evaluation import distances


def sets(seed, n, m, num_features, shift=0.0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(n, num_features)), shift + rng.normal(size=(m, num_features))


def assert_mean(values, expected):
  """The mean of independent values, within four of its standard errors."""
  error = np.std(values, ddof=1) / math.sqrt(len(values))
  assert abs(np.mean(values) - expected) <= 4 * error, (np.mean(values), expected, error)


def test_frechet_of_commuting_covariances():
  # In a basis of common eigenvectors: |mu1 - mu2|^2 + sum (sqrt(a) - sqrt(b))^2, zeros included.
  rng = np.random.default_rng(0)
  basis = np.linalg.qr(rng.normal(size=(6, 6)))[0]
  a, b = np.array([4.0, 1, 0, 9, 0, 1e-8]), np.array([1.0, 1, 16, 0, 0, 4e-8])
  mu1, mu2 = rng.normal(size=(2, 6))
  expected = np.square(mu1 - mu2).sum() + 1 + 0 + 16 + 9 + 0 + 1e-8
  s1, s2 = ((basis * values[None]) @ basis.T for values in (a, b))
  found = distances.frechet_gaussian(mu1, s1, mu2, s2)
  np.testing.assert_allclose(found, expected, rtol=1e-11)
  np.testing.assert_allclose(distances.frechet_gaussian(mu2, s2, mu1, s1), expected, rtol=1e-11)
  assert distances.frechet_gaussian(mu1, s1, mu1, s1) <= 1e-13
  one = distances.frechet_gaussian([1.0], [[4.0]], [-1.0], [[9.0]])
  np.testing.assert_allclose(one, 4 + 1)


def test_frechet_against_scipy_sqrtm():
  rng = np.random.default_rng(1)
  x, y = rng.normal(size=(200, 5)) @ rng.normal(size=(5, 5)), rng.gamma(2, size=(150, 5))
  moments = [(z.mean(axis=0), np.cov(z, rowvar=False)) for z in (x, y)]
  (mu1, s1), (mu2, s2) = moments
  root = scipy.linalg.sqrtm(s1 @ s2)
  expected = np.square(mu1 - mu2).sum() + np.trace(s1 + s2 - 2 * root.real)
  np.testing.assert_allclose(distances.frechet(x, y), expected, rtol=1e-10)
  np.testing.assert_allclose(distances.frechet_gaussian(mu1, s1, mu2, s2), expected, rtol=1e-10)


def test_frechet_with_fewer_rows_than_features():
  # 2 and 3 points along orthogonal axes: nothing of one covariance is seen by the other, so the
  # distance is the sum of the traces. And a set against itself is 0, however singular.
  x, y = np.zeros((2, 50)), np.zeros((3, 50))
  x[:, 0], y[:, 1] = [3, 5], [-1, 0, 1]
  np.testing.assert_allclose(distances.frechet(x, y), 4**2 + 2 + 1, rtol=1e-14)
  z = np.random.default_rng(2).normal(size=(20, 300)) * 1e3 + 1e5
  assert distances.frechet(z, z) <= 1e-14 * np.square(z - z.mean(axis=0, keepdims=True)).sum()
  # S -> 4 S adds tr(S) (sqrt(4) - 1)^2, the mean does not move.
  wide = 2 * z - z.mean(axis=0, keepdims=True)
  trace = np.var(z, axis=0, ddof=1).sum()
  np.testing.assert_allclose(distances.frechet(z, wide), trace, rtol=1e-10)
  s = np.cov(z, rowvar=False)
  np.testing.assert_allclose(distances.frechet_gaussian(z[0], s, z[0], 4 * s), trace, rtol=1e-9)
  assert distances.frechet_gaussian(z[0], s, z[0], s) <= 1e-12 * trace


def test_frechet_is_biased_upwards():
  num_features, means = 3, {}
  for n in (25, 100, 400):
    found = [distances.frechet(*sets((n, i), n, n, num_features)) for i in range(300)]
    first_order = 2 * num_features / n + num_features * (num_features + 1) / (2 * n)
    error = np.std(found) / math.sqrt(300)
    assert abs(np.mean(found) - first_order) <= 4 * error + 5 * first_order / n
    means[n] = np.mean(found)
  assert means[25] > 3 * means[100] > 9 * means[400] > 0


def brute_force(kernel, x, y):
  n, m = len(x), len(y)
  within = sum(kernel(x[i], x[j]) for i, j in itertools.permutations(range(n), 2)) / (n * (n - 1))
  within += sum(kernel(y[i], y[j]) for i, j in itertools.permutations(range(m), 2)) / (m * (m - 1))
  return within - 2 * sum(kernel(a, b) for a in x for b in y) / (n * m)


def cubic(a, b):
  return (sum(s * t for s, t in zip(a, b, strict=True)) / len(a) + 1) ** 3


def gaussians(a, b, widths):
  squared = sum((s - t) ** 2 for s, t in zip(a, b, strict=True))
  return sum(math.exp(-squared / (2 * w * w)) for w in widths)


@pytest.mark.parametrize("chunk", [2, 500])
def test_kernel_distances_by_double_loops(monkeypatch, chunk):
  monkeypatch.setattr(distances, "_CHUNK", chunk)
  x, y = sets(3, 7, 4, 3, shift=0.5)
  found = distances.kernel_distance(x, y)
  np.testing.assert_allclose(found, brute_force(cubic, x, y), rtol=1e-12)
  for widths in ([0.7], [0.1, 1, 30]):
    expected = brute_force(functools.partial(gaussians, widths=widths), x, y)
    np.testing.assert_allclose(distances.mmd(x, y, widths), expected, rtol=1e-11)
  # The median over all pairs of both sets, by scipy.
  width = np.median(scipy.spatial.distance.pdist(np.concatenate([x, y])))
  np.testing.assert_allclose(distances.mmd(x, y), distances.mmd(x, y, [width]), rtol=1e-12)


def test_the_median_of_many_points():
  x, y = sets(4, 3000, 3000, 2)
  # |x - y|^2 / 2 of normal points is chi squared with two degrees of freedom.
  width = math.sqrt(2 * scipy.stats.chi2.median(2))
  np.testing.assert_allclose(distances._median_distance(x, y), width, rtol=0.05)


def test_distances_do_not_feel_an_offset():
  x, y = sets(5, 40, 30, 4, shift=0.3)
  np.testing.assert_allclose(
    distances.mmd(x + 1e6, y + 1e6, [1]), distances.mmd(x, y, [1]), rtol=1e-6
  )
  assert distances.precision_recall(x + 1e6, y + 1e6) == distances.precision_recall(x, y)


def test_kernel_distances_are_unbiased_for_equal_laws():
  pairs = [sets((6, i), 12, 8, 3) for i in range(1500)]
  for distance in (distances.kernel_distance, lambda x, y: distances.mmd(x, y, [1.0])):
    found = np.array([distance(x, y) for x, y in pairs])
    assert_mean(found, 0)
    assert 0.3 < np.mean(found < 0) < 0.8


def test_mmd_of_two_gaussians_in_closed_form():
  # E k(x, y) = (b^2 / v)^{F/2} exp(-|d|^2 / (2 v)) with v = b^2 + s^2 + t^2, d between the means.
  num_features, b, s, t, d = 2, 0.8, 1.0, 1.5, np.array([[0.6, -0.4]])

  def mean(first, second, squared):
    v = b**2 + first**2 + second**2
    return (b**2 / v) ** (num_features / 2) * math.exp(-squared / (2 * v))

  expected = mean(s, s, 0) + mean(t, t, 0) - 2 * mean(s, t, np.square(d).sum())
  rng = np.random.default_rng(7)
  found = [
    distances.mmd(s * rng.normal(size=(20, 2)), d + t * rng.normal(size=(30, 2)), [b])
    for _ in range(1000)
  ]
  assert_mean(found, expected)
  assert expected > 10 * np.std(found) / math.sqrt(1000)  # which could have told it from 0


def test_kernel_distance_of_two_laws_in_closed_form():
  # In one dimension (x y + 1)^3 is an inner product of the moments, with binomial weights.
  shift, rng = 0.7, np.random.default_rng(8)
  moments = np.array([0, 1, 0]), np.array([shift, shift**2 + 1, shift**3 + 3 * shift])
  expected = np.array([3, 3, 1]) @ np.square(moments[0] - moments[1])
  found = [
    distances.kernel_distance(rng.normal(size=(25, 1)), shift + rng.normal(size=(20, 1)))
    for _ in range(2000)
  ]
  assert_mean(found, expected)


def test_the_standard_error_is_the_spread_over_data_sets():
  # Laws that differ: both are the same to first order. Equal laws: U-statistics fall as 1 / N, so
  # ten subsets are 10 times as far apart and their mean 10 / sqrt(10) = 3.2 times.
  for shift, low, high in ((1.5, 0.85, 1.2), (0.0, 2, 5)):
    pairs = [sets((9, i), 240, 200, 2, shift) for i in range(200)]
    spread = np.std([distances.kernel_distance(x, y) for x, y in pairs])
    errors = [
      distances.standard_error(np.random.default_rng(i), x, y) for i, (x, y) in enumerate(pairs)
    ]
    assert low < np.sqrt(np.mean(np.square(errors))) / spread < high


def test_the_standard_error_uses_disjoint_subsets():
  seen = []

  def distance(x, y):
    seen.append((x, y))
    return float(len(seen))

  x, y = sets(10, 23, 31, 2)
  found = distances.standard_error(np.random.default_rng(0), x, y, distance, num_subsets=5)
  np.testing.assert_allclose(found, math.sqrt(2.5 / 5))  # the variance of 1, ..., 5 is 2.5
  for side, whole, size in ((0, x, 4), (1, y, 6)):
    rows = np.concatenate([pair[side] for pair in seen])
    assert [len(pair[side]) for pair in seen] == [size] * 5
    assert len({tuple(row) for row in rows}) == len(rows)
    assert {tuple(row) for row in rows} <= {tuple(row) for row in whole}


def test_precision_and_recall_of_constructed_sets():
  rng = np.random.default_rng(11)
  real = rng.normal(size=(200, 2))
  assert distances.precision_recall(real, real + 100) == (0, 0)
  assert distances.precision_recall(real, real.copy()) == (1, 1)
  assert distances.precision_recall(real, rng.permutation(real)) == (1, 1)
  modes = np.concatenate([real, 0.5 * real + 100, 0.7 * real - 100, real + np.array([[100, 0]])])
  dropped = distances.precision_recall(modes, rng.normal(size=(800, 2)))  # one mode of four
  assert dropped.precision > 0.9 and 0.2 < dropped.recall <= 0.25
  invented = distances.precision_recall(rng.normal(size=(800, 2)), modes)
  assert 0.2 < invented.precision <= 0.25 and invented.recall > 0.9
  # Coinciding points have balls of radius 0, which hold the points that coincide with them.
  twins = np.repeat(rng.normal(size=(40, 300)), 4, axis=0) * 1e3
  same = np.kron(np.eye(40), np.ones((4, 4)))  # exactly, though computed as |x|^2 + |y|^2 - 2 x.y
  np.testing.assert_array_equal(distances._squared_distances(twins, twins) == 0, same)
  assert distances.precision_recall(twins, twins, k=3) == (1, 1)
  assert distances.precision_recall(twins, twins + 1, k=3) == (0, 0)


@pytest.mark.parametrize("k, chunk", [(1, 3), (3, 8), (5, 500)])
def test_precision_and_recall_by_double_loops(monkeypatch, k, chunk):
  monkeypatch.setattr(distances, "_CHUNK", chunk)
  real, fake = sets(12, 31, 24, 3, shift=0.8)

  def share(centres, others):
    inside = 0
    for point in others:
      for i, centre in enumerate(centres):
        reach = sorted(math.dist(centre, c) for j, c in enumerate(centres) if j != i)[k - 1]
        if math.dist(point, centre) <= reach:
          inside += 1
          break
    return inside / len(others)

  expected = share(real, fake), share(fake, real)
  np.testing.assert_allclose(distances.precision_recall(real, fake, k), expected)
  assert 0 < min(expected) and expected[0] != expected[1]


def sliced(seed, x, y, num_projections=500):
  return distances.sliced_wasserstein(jax.random.key(seed), x, y, num_projections)


def test_sliced_wasserstein_of_a_set_and_itself_is_nothing():
  for n, num_features in ((2, 1), (333, 7), (50, 200)):
    x, _ = sets(13, n, 2, num_features)
    assert sliced(0, x, x) == 0.0 and sliced(0, x.astype(np.float32), x.astype(np.float32)) == 0.0


def test_sliced_wasserstein_of_a_translation():
  # (t . d)^2 has mean |d|^2 / F and variance |d|^4 (2 F - 2) / (F^2 (F + 2)) for t on the sphere.
  num_features, num_projections = 5, 2000
  x, _ = sets(14, 40, 2, num_features)
  d = np.random.default_rng(0).normal(size=(1, num_features))
  squared = np.square(d).sum()
  variance = squared**2 * (2 * num_features - 2) / (num_features**2 * (num_features + 2))
  found = sliced(1, x, x + d, num_projections)
  error = math.sqrt(variance / num_projections)
  assert abs(found - squared / num_features) <= 4 * error
  np.testing.assert_allclose(sliced(2, x[:, :1], x[:, :1] + 3), 9, rtol=1e-12)  # in one dimension


def test_sliced_wasserstein_in_one_dimension_by_matching():
  # Equal sizes: the best of all matchings. Unequal: of copies that make the sizes equal.
  x, y = sets(15, 5, 5, 1, shift=0.4)
  best = min(np.mean(np.square(x - y[list(p)])) for p in itertools.permutations(range(5)))
  np.testing.assert_allclose(sliced(0, x, y, 3), best, rtol=1e-12)
  for n, m in ((2, 3), (4, 6), (7, 5), (12, 4), (2, 9)):
    x, y = sets((16, n), n, m, 1)
    many_x, many_y = np.sort(np.repeat(x, m)), np.sort(np.repeat(y, n))
    expected = np.mean(np.square(many_x - many_y))
    np.testing.assert_allclose(sliced(3, x, y, 7), expected, rtol=1e-12)
    mass, rows_x, rows_y = distances._matching(n, m)  # its mean of |x - y| is scipy's distance
    first = mass @ np.abs(np.sort(x[:, 0])[rows_x] - np.sort(y[:, 0])[rows_y])
    peer = scipy.stats.wasserstein_distance(x[:, 0], y[:, 0])
    np.testing.assert_allclose(first, peer, rtol=1e-12)


def test_sliced_wasserstein_of_two_gaussians():
  # Projections are N(0, 1) and N(0, 4): W2^2 is 1, plus what 2,000 draws are from their law.
  x, y = sets(17, 2000, 2000, 3)
  np.testing.assert_allclose(sliced(0, x, 2 * y), 1, rtol=0.05)
  assert sliced(0, x, y) < 0.01
  assert sliced(0, x, 2 * y) == sliced(0, x, 2 * y) != sliced(1, x, 2 * y)


def test_halves_are_disjoint():
  x = np.arange(22).reshape(11, 2)
  first, second = distances.halves(np.random.default_rng(0), x)
  assert first.shape == second.shape == (5, 2) and first.dtype == x.dtype
  rows = np.concatenate([first, second])[:, 0].tolist()
  assert len(set(rows)) == 10 and set(rows) <= set(x[:, 0].tolist()) and rows != sorted(rows)
  again = distances.halves(np.random.default_rng(0), x)
  np.testing.assert_array_equal(np.stack(again), np.stack([first, second]))
  # Each row is in the first half 5 times of 11.
  counts = np.zeros(11)
  for seed in range(1000):
    counts[distances.halves(np.random.default_rng(seed), x)[0][:, 0] // 2] += 1
  assert np.abs(counts - 5000 / 11).max() < 5 * math.sqrt(1000 * 5 / 11 * 6 / 11)
  with pytest.raises(ValueError, match="3 rows; halves need 2 rows each, so give at least 4"):
    distances.halves(np.random.default_rng(0), x[:3])


EVERY = {
  "frechet": distances.frechet,
  "kernel_distance": distances.kernel_distance,
  "mmd": distances.mmd,
  "precision_recall": functools.partial(distances.precision_recall, k=1),
  "sliced_wasserstein": functools.partial(sliced, 0),
  "standard_error": functools.partial(
    distances.standard_error, np.random.default_rng(0), num_subsets=2
  ),
}


@pytest.mark.parametrize("name", EVERY)
def test_bad_sets_are_named(name):
  distance, first, second = (
    EVERY[name],
    *(("real", "fake") if name == "precision_recall" else ("x", "y")),
  )
  x, y = sets(18, 10, 8, 3)
  for bad, value in ((4, np.nan), (2, np.inf)):
    broken = y.copy()
    broken[bad:6, 1] = value
    with pytest.raises(
      ValueError, match=f"{6 - bad} of 8 rows of {second} are not finite, the first is row {bad}"
    ):
      distance(x, broken)
  with pytest.raises(ValueError, match=rf"{first} has shape \(1, 3\); give features .* at least 2"):
    distance(x[:1], y)
  with pytest.raises(ValueError, match=rf"{second} has shape \(8, 3, 1\); give features"):
    distance(x, y[..., None])
  with pytest.raises(ValueError, match=f"{first} has 3 features and {second} 2; compute the same"):
    distance(x, y[:, :2])


@pytest.mark.parametrize("name", EVERY)
def test_other_real_dtypes_and_jax_arrays(name):
  x, y = (np.rint(4 * z) for z in sets(19, 10, 8, 3))
  distance = EVERY[name]
  if name == "standard_error":  # the same cut every time
    distance = lambda a, b: EVERY[name].func(np.random.default_rng(0), a, b, num_subsets=2)
  expected = distance(x, y)
  for dtype in (np.int32, np.float32, jax.numpy.bfloat16):
    np.testing.assert_allclose(distance(x.astype(dtype), jax.numpy.asarray(y, dtype)), expected)


def test_bad_settings_are_named():
  x, y = sets(20, 10, 8, 3)
  for k in (0, 8):
    with pytest.raises(ValueError, match=f"k is {k} with 10 and 8 points; 1 to one less"):
      distances.precision_recall(x, y, k)
  for widths in ([], [0.0], [1, -2], [math.nan], [math.inf]):
    with pytest.raises(ValueError, match=r"bandwidths are .*; give at least one, all positive"):
      distances.mmd(x, y, widths)
  with pytest.raises(ValueError, match="the median is 0; give bandwidths"):
    distances.mmd(x * 0, y * 0)
  with pytest.raises(ValueError, match="num_projections is 0; give a positive number"):
    sliced(0, x, y, 0)
  for num_subsets, size in ((0, 8), (1, 8), (5, 1)):
    with pytest.raises(ValueError, match=f"{num_subsets} subsets of .* and {size} rows; give at"):
      distances.standard_error(np.random.default_rng(0), x, y, num_subsets=num_subsets)


def test_bad_gaussians_are_named():
  mean, eye = np.zeros(3), np.eye(3)
  for mu1, s1, mu2, s2, message in (
    (mean, eye[:2], mean, eye, r"first mean is \(3,\) and its covariance \(2, 3\); give"),
    (mean, eye, mean[None], eye, r"second mean is \(1, 3\)"),
    (mean, eye, mean + np.nan, eye, "second mean or covariance has NaN or infinity"),
    (mean, eye, mean, eye + np.eye(3, k=1), "second covariance is not symmetric and positive"),
    (mean, eye - 2, mean, eye, "first covariance is not symmetric .* smallest eigenvalue is -5"),
    (mean, eye, mean[:2], eye[:2, :2], "the Gaussians have 3 and 2 features; give the same"),
  ):
    with pytest.raises(ValueError, match=message):
      distances.frechet_gaussian(mu1, s1, mu2, s2)
  assert distances.frechet_gaussian(mean, 0 * eye, mean + 1, 0 * eye) == 3  # two points
