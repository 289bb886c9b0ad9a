"""Searches against brute force and against where they began."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.models import schedules, toy
from ancestral.sampling import correctors, forms, grids, multistep, tables
from ancestral.training import solver_learning, solver_search

SCHEDULE = schedules.variance_exploding(10.0)
FINE = grids.to_zero(grids.karras(SCHEDULE, 11, end=0.02))
MIXTURE = toy.GaussianMixture(
  jnp.array([0.6, 0.4]), jnp.array([[1.0, 0.3], [-0.5, -0.4]]), jnp.array([0.05, 0.1])
)


@pytest.fixture(scope="module")
def loss():
  model = lambda mixture, x, t: toy.mixture_denoiser(mixture, SCHEDULE)(x, t)
  fine = correctors.unipc(SCHEDULE, grids.to_zero(grids.karras(SCHEDULE, 100, end=0.01)), 3)
  z = jax.random.normal(jax.random.key(0), (64, 2))
  return functools.partial(solver_learning.error, solver_learning.teacher(model, MIXTURE, z, fine))


def test_time_steps_are_those_of_brute_force(loss):
  make = lambda places: multistep.dpmpp_2m(SCHEDULE, FINE[[0, *places, len(FINE) - 1]])
  every = itertools.combinations(range(1, len(FINE) - 1), 2)
  best = min(every, key=lambda places: loss(make(places)))
  found = solver_search.time_steps(
    np.random.default_rng(0),
    loss,
    SCHEDULE,
    FINE,
    3,
    multistep.dpmpp_2m,
    evolution=solver_search.Evolution(population=10, parents=4, mutations=5, generations=5),
  )
  assert tuple(found.genes) == best
  assert found.num_runs <= 50  # of 55, none of them twice
  assert np.all(np.diff(found.history) <= 0)


def test_strategies_are_better_than_the_solvers_they_began_with(loss):
  places = solver_search.nearest_places(FINE, FINE[[0, 3, 6, 9, 12]])
  seeds = [solver_search.genes_of(places, order, form) for order in (1, 2) for form in (0, 1)]
  fixed = min(
    loss(solver_search.unified.solver(SCHEDULE, FINE[0], solver_search.moves(FINE, g)))
    for g in seeds
  )
  found = solver_search.strategies(
    np.random.default_rng(1),
    loss,
    SCHEDULE,
    FINE,
    4,
    evolution=solver_search.Evolution(20, 6, 10, 6, 0.25, 3),
    seeds=seeds,
  )
  assert found.loss < 0.5 * fixed, (found.loss, fixed)
  assert found.loss == loss(found.table)


def test_genes_of_a_fixed_solver_are_that_solver():
  places = np.array([2, 5, 9])
  table = solver_search.unified.solver(
    SCHEDULE, FINE[0], solver_search.moves(FINE, solver_search.genes_of(places, 3, 1))
  )
  expected = multistep.deis(SCHEDULE, FINE[[0, 2, 5, 9, 12]], 3, variable=forms.log_snr)
  np.testing.assert_allclose(
    tables.expand(table).outputs, tables.expand(expected).outputs, atol=1e-9
  )


def test_places_are_kept_apart():
  rng = np.random.default_rng(0)
  np.testing.assert_array_equal(
    solver_search.nearest_places(FINE, np.array([10, 9.99, 9.98, 0.0])), [1, 2]
  )
  for _ in range(50):
    moved = solver_search._moved(rng, np.array([1, 2, 3, 4]), 5, 1.0)
    assert np.all(np.diff(moved) > 0) and moved[0] >= 1 and moved[-1] <= 5


def test_more_steps_than_times_are_refused(loss):
  with pytest.raises(ValueError, match="num_steps=13: from 1 to 12"):
    solver_search.time_steps(np.random.default_rng(0), loss, SCHEDULE, FINE, 13, multistep.dpmpp_2m)
