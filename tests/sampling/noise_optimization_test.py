"""Noise optimisation: closed forms on linear samplers, gradients against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ancestral.models import schedules, toy
from ancestral.sampling import ancestral, base, multistep, noise_optimization, noise_search

pytestmark = pytest.mark.usefixtures("double")


@pytest.fixture
def double():
  with jax.enable_x64(True):
    yield


SCHEDULE = schedules.variance_exploding(5.0)
TIMES = [5.0, 2.0, 0.8, 0.2, 0.0]
TARGET = jnp.array([[0.3, -1.2, 0.8]], jnp.float32)


def gaussian():
  mixture = toy.GaussianMixture(jnp.ones(1), jnp.array([[1.0, -0.5, 0.0]]), jnp.array([0.6]))
  return toy.mixture_denoiser(mixture, SCHEDULE)


def mixture():
  rng = np.random.default_rng(0)
  parts = rng.dirichlet(np.full(4, 5.0)), rng.normal(size=(4, 3)), rng.uniform(0.1, 0.9, 4)
  return toy.GaussianMixture(*map(jnp.asarray, parts))


def closeness(x, noise):
  del noise
  return 0.5 * jnp.sum(jnp.square(x - TARGET), axis=1)


def keys(num):
  return base.row_keys(jax.random.key(0), jnp.arange(num))


def optimized(sample, loss, optimizer, num_updates, num=3):
  algorithm = noise_optimization.optimized(sample, loss, optimizer)
  first = base.start(keys(num), algorithm, jnp.zeros((num, 3), jnp.float64))
  state, info = jax.jit(
    lambda first: base.run(keys(num), algorithm, first, num_updates, lambda state, info: info)
  )(first)
  return np.asarray(first.noise), state, info


def linear_map(sample):
  """x = offset + scale z, of a sampler of one Gaussian."""
  offset, one = (np.asarray(sample(jnp.full((1, 3), z, jnp.float64))[0]) for z in (0.0, 1.0))
  return offset, one - offset


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_quadratic_loss_of_a_linear_sampler_reaches_its_optimum(checkpointed):
  sample = noise_search.of_table(
    gaussian(), multistep.dpmpp_2m(SCHEDULE, TIMES), checkpointed=checkpointed
  )
  offset, scale = linear_map(sample)
  _, state, info = optimized(sample, closeness, optax.sgd(1.0), 200)
  np.testing.assert_allclose(state.noise, np.tile((TARGET - offset) / scale, (3, 1)), atol=1e-6)
  assert np.all(np.diff(info.loss, axis=0) <= 1e-12)
  np.testing.assert_allclose(sample(state.noise)[0], np.tile(TARGET, (3, 1)), atol=1e-6)


def test_what_the_loss_does_not_see_stays_as_it_began():
  sample = noise_search.of_table(gaussian(), ancestral.ddim(SCHEDULE, TIMES))
  offset, scale = linear_map(sample)
  loss = lambda x, noise: 0.5 * jnp.square(x[:, 0] - 2.0)
  first, state, _ = optimized(sample, loss, optax.sgd(1.0), 200)
  np.testing.assert_array_equal(state.noise[:, 1:], first[:, 1:])
  np.testing.assert_allclose(
    state.noise[:, 0], (2.0 - offset[0, 0]) / scale[0, 0] * np.ones(3), atol=1e-6
  )


def test_a_loss_with_the_prior_has_the_mode_of_the_posterior():
  sample = noise_search.of_table(gaussian(), ancestral.ddim(SCHEDULE, TIMES))
  offset, scale = linear_map(sample)
  variance = 0.3
  loss = lambda x, noise: closeness(x, noise) / variance + 0.5 * jnp.sum(noise**2, axis=1)
  _, state, _ = optimized(sample, loss, optax.sgd(0.2), 300)
  mode = scale * (TARGET - offset) / (scale**2 + variance)
  np.testing.assert_allclose(state.noise, np.tile(mode, (3, 1)), atol=1e-6)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_are_finite_differences(checkpointed):
  table = multistep.dpmpp_2m(SCHEDULE, TIMES)
  denoise = toy.mixture_denoiser(mixture(), SCHEDULE)
  sample = noise_search.of_table(denoise, table, checkpointed=checkpointed)
  first, state, info = optimized(sample, closeness, optax.sgd(1.0), 1)
  gradient, e = first - np.asarray(state.noise), 1e-5
  for i in range(3):
    shift = e * np.eye(3)[i][None]
    up, down = (closeness(sample(jnp.asarray(first + s))[0], None) for s in (shift, -shift))
    np.testing.assert_allclose(gradient[:, i], (up - down) / (2 * e), rtol=1e-6, atol=1e-8)
  np.testing.assert_allclose(info.gradient_norm[0], np.linalg.norm(gradient, axis=1), rtol=1e-9)
  np.testing.assert_allclose(info.loss[0], closeness(sample(jnp.asarray(first))[0], None))


def test_one_step_to_no_noise_is_the_denoiser():
  """The one-step surrogate by hand: x = D(sigma z), gradient sigma J^T (x - y)."""
  denoise = toy.mixture_denoiser(mixture(), SCHEDULE)
  sample = noise_search.of_table(denoise, ancestral.ddim(SCHEDULE, [5.0, 0.0]))
  first, state, _ = optimized(sample, closeness, optax.sgd(1.0), 1)
  for row, after in zip(first, np.asarray(state.noise), strict=True):
    single = lambda x: denoise(x[None], jnp.float64(5.0))[0]
    jacobian = np.asarray(jax.jacobian(single)(jnp.asarray(5.0 * row)))
    residual = np.asarray(single(jnp.asarray(5.0 * row)) - TARGET[0])
    np.testing.assert_allclose(row - after, 5.0 * jacobian.T @ residual, rtol=1e-9)


def test_the_surrogate_is_the_sampler_where_that_has_one_step():
  denoise = toy.mixture_denoiser(mixture(), SCHEDULE)
  surrogate = noise_search.of_table(denoise, ancestral.ddim(SCHEDULE, [5.0, 0.0]))
  true = noise_search.of_table(denoise, multistep.dpmpp_2m(SCHEDULE, [5.0, 0.0]))
  found = [optimized(s, closeness, optax.adam(0.1), 5)[1].noise for s in (surrogate, true)]
  np.testing.assert_allclose(*found, rtol=1e-9)
  many = noise_search.of_table(denoise, ancestral.ddim(SCHEDULE, TIMES))
  assert not np.allclose(found[0], optimized(many, closeness, optax.adam(0.1), 5)[1].noise)


def test_evaluations_and_pullbacks_are_counted():
  rows, denoise = [], gaussian()

  def counted(x, t):
    jax.debug.callback(lambda x: rows.append(x.shape[0]), x)
    return denoise(x, t)

  sample = noise_search.of_table(counted, ancestral.ddim(SCHEDULE, TIMES))
  _, state, _ = optimized(sample, closeness, optax.sgd(1.0), 6)
  jax.effects_barrier()
  np.testing.assert_array_equal(state.evaluations, [4 * 6] * 3)
  np.testing.assert_array_equal(state.pullbacks, [4 * 6] * 3)
  assert sum(rows) == np.sum(state.evaluations)


def test_an_optimiser_sees_a_row_at_a_time():
  sample = noise_search.of_table(gaussian(), ancestral.ddim(SCHEDULE, TIMES))
  steep = jnp.array([1e6, 1.0, 1.0])
  loss = lambda x, noise: steep[: x.shape[0]] * closeness(x, noise)
  chain = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(1.0))
  first, state, _ = optimized(sample, loss, chain, 1)
  moved = np.linalg.norm(np.asarray(state.noise) - first, axis=1)
  np.testing.assert_allclose(moved, 0.1, rtol=1e-6)
  alone = optimized(sample, loss, chain, 3, num=1)[1].noise
  np.testing.assert_allclose(optimized(sample, loss, chain, 3)[1].noise[:1], alone, rtol=1e-9)
