"""Search over noises and paths: order statistics, laws of proposals, counts, and brute force."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from ancestral.models import base as models
from ancestral.models import schedules, toy
from ancestral.sampling import ancestral, base, grids, multistep, noise_search, solvers, tables

SCHEDULE = schedules.variance_exploding(10.0)
FLOW = schedules.rectified_flow()
MEAN, STD = jnp.array([[1.0, -0.5]]), 0.5


def gaussian(schedule=SCHEDULE):
  mixture = toy.GaussianMixture(jnp.ones(1), MEAN, jnp.array([STD**2]))
  return toy.mixture_denoiser(mixture, schedule)


def keys(num, seed=0):
  return base.row_keys(jax.random.key(seed), jnp.arange(num))


def times(num_steps, schedule=SCHEDULE):
  return grids.to_zero(grids.karras(schedule, num_steps - 1, start=schedule.max_time, end=0.02))


def first_coordinate(x):
  return x[:, 0]


def searched(algorithm, num, rounds, observe=lambda state, info: info):
  x = jnp.zeros((num, 2))
  run = lambda keys: base.run(keys, algorithm, base.start(keys, algorithm, x), rounds, observe)
  return jax.jit(run)(keys(num))


class Counter:
  """Rows that went through a denoiser, counted as they go."""

  def __init__(self, denoise):
    self.rows, self._denoise = 0, denoise

  def _add(self, x):
    self.rows += x.size // 2

  def __call__(self, x, t):
    jax.debug.callback(self._add, x)
    return self._denoise(x, t)


def expected_maximum(n):
  """Of n standard normals."""
  return integrate.quad(
    lambda x: x * n * stats.norm.pdf(x) * stats.norm.cdf(x) ** (n - 1), -9, 9, epsabs=1e-10
  )[0]


@pytest.mark.parametrize("rounds, width", [(7, 1), (3, 5)])
def test_random_search_has_the_mean_of_the_largest_of_n(rounds, width):
  sample = noise_search.of_table(gaussian(), ancestral.ddim(SCHEDULE, times(6)))
  algorithm = noise_search.random_search(sample, first_coordinate, width=width)
  num, n = 4000, 1 + rounds * width
  state, info = searched(algorithm, num, rounds)
  # the sampler is linear: x = b + a z in each coordinate
  b, one = (np.asarray(sample(jnp.full((1, 2), z))[0])[0, 0] for z in (0.0, 1.0))
  floor = (one - b) / np.sqrt(num)  # the largest of n has a smaller deviation than one has
  assert abs(np.mean(state.score) - b - (one - b) * expected_maximum(n)) < 4 * floor
  assert abs(np.mean(info.scores) - b) < 4 * floor / np.sqrt(rounds * width)
  # nothing else is touched: the other coordinate is as it was
  assert stats.kstest(np.asarray(state.noise)[:, 1], "norm").pvalue > 1e-3
  np.testing.assert_allclose(state.x, sample(state.noise)[0], rtol=1e-5, atol=1e-5)


def test_neighbours_of_a_normal_noise_are_normal():
  noise = jax.random.normal(jax.random.key(1), (3000, 2))
  l = 0.6
  near = np.asarray(noise_search.neighbours(l)(keys(3000), noise, 3))
  for candidate in near:
    assert stats.kstest(candidate.ravel(), "norm").pvalue > 1e-3
    found = np.corrcoef(candidate.ravel(), np.asarray(noise).ravel())[0, 1]
    assert abs(found - np.sqrt(1 - l**2)) < 4 / np.sqrt(6000)
  between = np.corrcoef(near[0].ravel(), near[1].ravel())[0, 1]
  assert abs(between - (1 - l**2)) < 4 / np.sqrt(6000)


def test_at_the_ends_neighbours_stay_or_forget():
  noise = jnp.full((3, 2), 5.0)
  stays = noise_search.neighbours(0.0)(keys(3), noise, 2)
  np.testing.assert_array_equal(stays, np.full((2, 3, 2), 5.0))
  forgets = noise_search.neighbours(1.0)(keys(3), noise, 2)
  np.testing.assert_array_equal(forgets, noise_search.independent(keys(3), noise, 2))


def test_zero_order_never_falls_and_climbs_beyond_random_search():
  sample = noise_search.of_table(gaussian(), ancestral.ddim(SCHEDULE, times(4)))
  algorithm = noise_search.zero_order(sample, first_coordinate, width=3, distance=0.5)
  first, _ = searched(algorithm, 200, 0)
  state, scores = searched(algorithm, 200, 12, lambda state, info: state.score)
  assert np.all(np.diff(scores, axis=0) >= 0) and np.all(state.score > first.score)
  np.testing.assert_allclose(state.score, sample(state.noise)[0][:, 0], rtol=1e-5, atol=1e-5)
  independent, _ = searched(noise_search.random_search(sample, first_coordinate, width=3), 200, 12)
  assert np.mean(state.score) > np.mean(independent.score) + 0.1


def test_a_verifier_without_a_preference_leaves_the_first_noise():
  sample = noise_search.of_table(gaussian(), ancestral.ddim(SCHEDULE, times(4)))
  flat = noise_search.zero_order(sample, lambda x: 0 * x[:, 0], width=3, distance=0.5)
  np.testing.assert_array_equal(searched(flat, 5, 4)[0].noise, searched(flat, 5, 0)[0].noise)


def test_a_score_that_is_not_a_number_is_the_worst():
  sample = noise_search.of_table(gaussian(), ancestral.ddim(SCHEDULE, times(4)))
  verifier = lambda x: jnp.where(x[:, 0] > 1, jnp.nan, x[:, 0])
  state, _ = searched(noise_search.random_search(sample, verifier, width=16), 50, 2)
  assert np.all(np.asarray(state.x)[:, 0] <= 1) and np.all(np.isfinite(state.score))


@pytest.mark.parametrize("kind", ["random", "zero order"])
def test_evaluations_are_those_that_go_through_the_denoiser(kind):
  counter = Counter(gaussian())
  sample = noise_search.of_table(counter, multistep.dpmpp_2m(SCHEDULE, times(5)))
  make = {
    "random": lambda: noise_search.random_search(sample, first_coordinate, width=4),
    "zero order": lambda: noise_search.zero_order(sample, first_coordinate, width=4, distance=0.3),
  }[kind]
  state, _ = searched(make(), 3, 2)
  jax.block_until_ready(state)
  jax.effects_barrier()
  np.testing.assert_array_equal(state.evaluations, [(1 + 2 * 4) * 5] * 3)
  np.testing.assert_array_equal(state.verifications, [1 + 2 * 4] * 3)
  assert counter.rows == np.sum(state.evaluations)


def labelled(labels):
  """Class c is at (4 c, 0), nearly a point."""

  def denoise(x, t):
    mean = jnp.stack([4.0 * labels, 0.0 * labels], axis=1)
    s = models.per_row(jnp.square(SCHEDULE.sigma(t)), x)
    return (s * mean + 1e-2 * x) / (s + 1e-2)

  return denoise


def test_a_row_depends_on_its_key_and_its_label_alone():
  table = ancestral.ddim(SCHEDULE, times(4))
  made = three_rounds()

  def run(rows):
    rows = jnp.array(rows)
    denoise = labelled(rows.astype(jnp.float32))
    row_keys, x = base.row_keys(jax.random.key(0), rows), jnp.zeros((len(rows), 2))
    sample = noise_search.of_table(denoise, table)
    algorithm = noise_search.zero_order(sample, first_coordinate, width=3, distance=0.4)
    state, _ = base.run(row_keys, algorithm, base.start(row_keys, algorithm, x), 3)
    paths = noise_search.over_paths(
      row_keys, denoise, made, first_coordinate, x, num_paths=2, num_forks=3
    )
    return state.x, paths.x

  for together, alone in zip(run([0, 1, 2, 3]), run([2]), strict=True):
    np.testing.assert_allclose(together[2:3], alone, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(together[:, 0], 4 * np.arange(4), atol=0.8)
    assert len(np.unique(together[:, 1])) == 4


def three_rounds(up=1.5, solver=ancestral.ddim):
  """Levels 3, 1, .3 and 0, each left upwards by a factor."""
  levels = [3.0, 1.0, 0.3, 0.0]
  rounds = [[up * s, np.sqrt(up * s * max(t, 0.02)), t] for s, t in itertools.pairwise(levels)]
  return noise_search.plan(SCHEDULE, solver, [10.0, 5.0, 3.0], rounds)


def test_one_path_without_noise_is_the_solver():
  levels = [10.0, 5.0, 3.0, 2.0, 1.0, 0.5, 0.3, 0.1, 0.0]
  made = noise_search.plan(
    SCHEDULE, ancestral.ddim, levels[:3], [levels[2:5], levels[4:7], levels[6:]]
  )
  found = noise_search.over_paths(
    keys(6), gaussian(), made, first_coordinate, jnp.zeros((6, 2)), num_paths=1, num_forks=1
  )
  noise = noise_search.independent(
    base.row_keys_at(keys(6), jnp.zeros(6, int)), jnp.zeros((6, 2)), 1
  )
  whole = ancestral.ddim(SCHEDULE, levels)
  x = solvers.sample(keys(6), gaussian(), tables.from_state(whole), 10 * noise[0])
  np.testing.assert_allclose(found.x, x, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(found.evaluations, [8] * 6)


@pytest.mark.parametrize(
  "schedule", [schedules.variance_exploding(), FLOW], ids=["exploding", "flow"]
)
def test_one_path_with_noise_keeps_the_law(schedule):
  at = lambda *ratios: [float(schedule.time(-np.log(r))) for r in ratios]
  dense = lambda high, low: at(*np.geomspace(high, low, 25))
  made = noise_search.plan(
    schedule, multistep.dpmpp_2m, dense(50, 2), [dense(4, 0.7), dense(1.4, 0.02)]
  )
  found = noise_search.over_paths(
    keys(4000),
    gaussian(schedule),
    made,
    first_coordinate,
    jnp.zeros((4000, 2)),
    num_paths=1,
    num_forks=1,
  )
  standard = (np.asarray(found.x) - np.asarray(MEAN)) / STD
  for coordinate in standard.T:
    assert abs(coordinate.mean()) < 4 / np.sqrt(4000) + 0.02
    assert abs(coordinate.std() - 1) < 4 / np.sqrt(8000) + 0.02


@pytest.mark.parametrize("num_paths, num_forks", [(1, 1), (2, 3), (3, 1)])
def test_evaluations_of_paths_are_those_that_go_through_the_denoiser(num_paths, num_forks):
  counter, made = Counter(gaussian()), three_rounds(solver=multistep.dpmpp_2m)
  found = noise_search.over_paths(
    keys(2),
    counter,
    made,
    first_coordinate,
    jnp.zeros((2, 2)),
    num_paths=num_paths,
    num_forks=num_forks,
  )
  jax.block_until_ready(found)
  jax.effects_barrier()
  np.testing.assert_array_equal(found.evaluations, [num_paths * (2 + 3 * num_forks * 2)] * 2)
  np.testing.assert_array_equal(found.verifications, [num_paths * (3 * num_forks + 1)] * 2)
  assert counter.rows == np.sum(found.evaluations)


def test_paths_are_those_of_brute_force():
  """One row, two rounds, every candidate solved by itself in plain numpy."""
  levels, ups = [3.0, 1.0, 0.0], [5.0, 1.5]
  made = noise_search.plan(
    SCHEDULE, ancestral.ddim, [10.0, 3.0], [[5.0, 2.0, 1.0], [1.5, 0.4, 0.0]]
  )
  mean, v = np.asarray(MEAN)[0], STD**2

  def ddim(x, grid):
    for s, t in itertools.pairwise(grid):
      denoised = (s**2 * mean + v * x) / (s**2 + v)
      x = denoised + t / s * (x - denoised)
    return x, denoised

  at = lambda r, n: np.asarray(
    noise_search.independent(base.row_keys_at(keys(1), jnp.full(1, r)), jnp.zeros((1, 2)), n)
  )[:, 0]
  paths = [ddim(10 * z, [10.0, 3.0])[0] for z in at(0, 2)]
  for r, (s, f, grid) in enumerate(
    zip(levels, ups, [[5.0, 2.0, 1.0], [1.5, 0.4, 0.0]], strict=False)
  ):
    forked = [x for x in paths for _ in range(3)]
    ends = [
      ddim(x + np.sqrt(f**2 - s**2) * z, grid) for x, z in zip(forked, at(r + 1, 6), strict=True)
    ]
    ends = sorted(ends, key=lambda end: -end[1][0])[:2]
    paths = [x for x, _ in ends]
  best = max(paths, key=lambda x: x[0])
  found = noise_search.over_paths(
    keys(1), gaussian(), made, first_coordinate, jnp.zeros((1, 2)), num_paths=2, num_forks=3
  )
  np.testing.assert_allclose(found.x[0], best, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(found.score, best[:1], rtol=1e-4, atol=1e-4)


def test_more_forks_find_better_samples():
  run = lambda n, m: np.mean(
    noise_search.over_paths(
      keys(500),
      gaussian(),
      three_rounds(),
      first_coordinate,
      jnp.zeros((500, 2)),
      num_paths=n,
      num_forks=m,
    ).score
  )
  assert run(1, 1) + 0.2 < run(1, 4) < run(4, 4) - 0.05


def test_bad_input_is_said():
  with pytest.raises(ValueError, match="draws noise"):
    noise_search.of_table(gaussian(), ancestral.ddpm(SCHEDULE, times(4)))
  with pytest.raises(ValueError, match="draws noise"):
    three_rounds(solver=ancestral.ddpm)
  with pytest.raises(ValueError, match="below the level"):
    three_rounds(up=0.9)
  with pytest.raises(ValueError, match="as many times"):
    noise_search.plan(SCHEDULE, ancestral.ddim, [10.0, 3.0], [[5.0, 1.0], [1.0, 0.5, 0.0]])
