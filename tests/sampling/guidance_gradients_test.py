"""Guidance by gradients and measurements: on mixtures and Gaussians, where it has closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.models import schedules, toy
from ancestral.sampling import guidance

pytestmark = pytest.mark.usefixtures("double")


@pytest.fixture
def double():
  with jax.enable_x64(True):
    yield


TRIGONOMETRIC = schedules.trigonometric()
SCHEDULES = {
  "variance exploding": schedules.variance_exploding(4.0),
  "rectified flow": schedules.rectified_flow(),
  "trigonometric": TRIGONOMETRIC,
}
ON_EVERY_SCHEDULE = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
LABELS = np.array([0, 1, 0, 1, 2, 2])


def mixture():
  rng = np.random.default_rng(0)
  parts = rng.dirichlet(np.full(6, 5.0)), rng.normal(size=(6, 3)), rng.uniform(0.1, 0.9, 6)
  return toy.GaussianMixture(*map(jnp.asarray, parts))


def gaussian(mean, std):
  return toy.GaussianMixture(
    jnp.ones(1), jnp.asarray(mean, jnp.float64)[None], jnp.full(1, float(std) ** 2)
  )


def points(shape=(4, 3), seed=1):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def times(schedule):
  return jnp.asarray(schedule.max_time * np.array([0.05, 0.3, 0.6, 0.95]))


def class_pair(schedule=TRIGONOMETRIC, c=0):
  conditional = toy.mixture_denoiser(toy.of_class(mixture(), LABELS, c), schedule)
  return conditional, toy.mixture_denoiser(mixture(), schedule)


@ON_EVERY_SCHEDULE
def test_an_exact_classifier_makes_the_denoiser_conditional(schedule):
  conditional, unconditional = class_pair(schedule)
  log_prob = toy.class_log_prob(mixture(), LABELS, 3, schedule)
  out = guidance.classifier(unconditional, lambda x, t: log_prob(x, t)[:, 0], schedule)
  x = points()
  expected = jax.jit(conditional)(x, times(schedule))
  np.testing.assert_allclose(jax.jit(out)(x, times(schedule)), expected, atol=1e-10)


def test_a_linear_reward_of_a_gaussian_tilts_it():
  """N(m, v I) exp(w c.x) is N(m + w v c, v I), and nothing is approximated."""
  m, c, w, std = np.array([0.5, -1, 2]), np.array([1.0, 0.3, -0.7]), 1.7, 0.8
  denoise = toy.mixture_denoiser(gaussian(m, std), TRIGONOMETRIC)
  tilted = toy.mixture_denoiser(gaussian(m + w * std**2 * c, std), TRIGONOMETRIC)
  out = guidance.reward(denoise, lambda d: d @ jnp.asarray(c), TRIGONOMETRIC, w)
  x, t = points(), times(TRIGONOMETRIC)
  np.testing.assert_allclose(jax.jit(out)(x, t), jax.jit(tilted)(x, t), atol=1e-12)


def through(denoise, x, t, objective, size=1e-6):
  """The gradient of objective(D(x)) [B] by central differences, a coordinate at a time."""
  gradient = np.zeros(x.shape)
  for i in range(x.shape[1]):
    step = size * np.eye(x.shape[1])[None, i]
    high, low = (np.asarray(denoise(x + sign * step, t)) for sign in (1, -1))
    gradient[:, i] = (objective(high) - objective(low)) / (2 * size)
  return gradient


OPERATOR = np.array([[1.0, 0.5, -1.0], [0.0, 2.0, 0.5]])
Y = np.array([[0.7, -0.4]])


def test_rewards_and_dps_move_along_gradients_through_the_denoiser():
  t, x = times(TRIGONOMETRIC), points()
  denoise = jax.jit(class_pair()[1])
  residual = lambda d: Y - np.asarray(d) @ OPERATOR.T
  scale = (np.sin(np.pi * t / 2) ** 2 / np.cos(np.pi * t / 2))[:, None]
  clean = np.asarray(denoise(x, t))

  squares = lambda d: (residual(d) ** 2).sum(-1)
  operator = lambda d: d @ jnp.asarray(OPERATOR).T
  out = jax.jit(guidance.dps(denoise, operator, jnp.asarray(Y), TRIGONOMETRIC, 0.3))(x, t)
  step = 0.3 / np.sqrt(squares(clean))[:, None]
  expected = clean - scale * step * through(denoise, x, t, squares)
  np.testing.assert_allclose(out, expected, atol=1e-8)

  sines = lambda xp: lambda d: xp.sum(xp.sin(d), axis=-1)
  out = jax.jit(guidance.reward(denoise, sines(jnp), TRIGONOMETRIC, 0.3))(x, t)
  expected = clean + 0.3 * scale * through(denoise, x, t, sines(np))
  np.testing.assert_allclose(out, expected, atol=1e-8)


def test_dps_leaves_what_fits_the_measurement():
  denoise = toy.mixture_denoiser(gaussian(np.zeros(3), 1.0), TRIGONOMETRIC)
  x, t = points(), times(TRIGONOMETRIC)
  clean = denoise(x, t)
  out = guidance.dps(denoise, lambda d: d[:, :2], clean[:, :2], TRIGONOMETRIC)(x, t)
  np.testing.assert_array_equal(out, clean)


@ON_EVERY_SCHEDULE
def test_pigdm_is_exact_for_a_gaussian(schedule):
  """Of measurements without noise that contradict each other, it takes the nearest that do not."""
  operator, y = jnp.asarray(OPERATOR), jnp.asarray(Y)
  twice = operator[jnp.array([0, 1, 0])], y[:, jnp.array([0, 1, 0])] + jnp.array([[0.1, 0, -0.1]])

  def both_ways(std, noise_std, measured, x, t):
    prior = gaussian([0.5, -1, 2], std)
    denoise = toy.mixture_denoiser(prior, schedule)
    ours = guidance.pigdm(denoise, *measured, noise_std, schedule, data_std=std)
    given = toy.posterior(prior, operator, y[0], noise_std)
    return ours(x, t), toy.full_mixture_denoiser(given, schedule)(x, t)

  plain = operator, y
  cases = (1.0, 0.3, plain), (0.6, 0.3, plain), (0.6, 0.0, plain), (1.0, 0.0, twice)
  every = jax.jit(lambda x, t: [both_ways(*case, x, t) for case in cases])
  for case, (out, expected) in zip(cases, every(points(), times(schedule)), strict=True):
    np.testing.assert_allclose(out, expected, atol=1e-9, err_msg=str(case))


def test_pigdm_reads_images_in_order():
  rng = np.random.default_rng(0)
  operator, y, x = rng.normal(size=(5, 12)), rng.normal(size=(3, 5)), points((3, 2, 3, 2))
  cube = lambda x, t: x - 0.1 * x**3
  t = jnp.array([0.2, 0.5, 0.9])
  guide = jax.jit(guidance.pigdm(cube, jnp.asarray(operator), jnp.asarray(y), 0.2, TRIGONOMETRIC))
  flat = guide(x.reshape(3, 12), t)
  np.testing.assert_allclose(guide(x, t).reshape(3, 12), flat, rtol=1e-12)
  alone = guidance.pigdm(cube, jnp.asarray(operator), jnp.asarray(y[1:2]), 0.2, TRIGONOMETRIC)
  np.testing.assert_allclose(alone(x[1:2], t[1:2])[0], guide(x, t)[1], rtol=1e-12)


def test_what_is_known_is_filled_in():
  x, t = points(), times(TRIGONOMETRIC)
  denoise = class_pair()[0]
  mask, known = np.array([True, False, False]), np.array([7.0, 8.0, 9.0])
  out = guidance.infilled(denoise, mask, known)(x, t)
  np.testing.assert_array_equal(out[:, 0], 7)
  np.testing.assert_array_equal(out[:, 1:], denoise(x, t)[:, 1:])


def every_decorator(schedule):
  """Denoisers of the mixture, guided in every way that looks at x_t."""
  conditional, denoise = class_pair(schedule)
  log_prob = toy.class_log_prob(mixture(), LABELS, 3, schedule)
  matrix, y = jnp.asarray(OPERATOR), jnp.asarray(Y)
  pair = guidance.limited(conditional, denoise, schedule, 0.1, 3.0)
  return {
    "classifier": guidance.classifier(denoise, lambda x, t: log_prob(x, t)[:, 0], schedule, 2.0),
    "reward": guidance.reward(denoise, lambda d: -jnp.sum(d**2, axis=-1), schedule),
    "dps": guidance.dps(denoise, lambda d: d @ matrix.T, y, schedule),
    "pigdm": guidance.pigdm(denoise, matrix, y, 0.1, schedule),
    "limited": guidance.guided(pair, guidance.adaptive_projected(3.0, 0.2, 0.5)),
    "threshold": guidance.dynamic_threshold(denoise, 0.5, 0.2),
  }


def test_a_row_does_not_depend_on_the_others():
  x, t = points(), times(TRIGONOMETRIC)
  many = every_decorator(TRIGONOMETRIC)
  guided = lambda x, t: {name: denoise(x, t) for name, denoise in many.items()}
  together, alone, scalar = jax.jit(
    lambda x, t: (guided(x, t), guided(x[2:3], t[2:3]), guided(x, t[2]))
  )(x, t)
  for name, out in together.items():
    np.testing.assert_allclose(out[2], alone[name][0], rtol=1e-10, err_msg=name)
    np.testing.assert_allclose(out[2], scalar[name][2], rtol=1e-10, err_msg=name)


def test_without_signal_a_row_keeps_what_is_denoised():
  """At time 0 as well: there is nothing left to guide."""
  schedule = schedules.rectified_flow()
  x, t = points((3, 3)), jnp.array([0.0, 0.5, 1.0])
  many = {
    name: every_decorator(schedule)[name] for name in ("classifier", "reward", "dps", "pigdm")
  }
  guided = lambda x, t: {name: denoise(x, t) for name, denoise in many.items()}
  outs, clean = jax.jit(lambda x, t: (guided(x, t), class_pair(schedule)[1](x, t)))(x, t)
  clean = np.asarray(clean)
  for name, out in outs.items():
    out = np.asarray(out)
    np.testing.assert_allclose(out[[0, 2]], clean[[0, 2]], rtol=1e-14, err_msg=name)
    assert np.all(np.isfinite(out)) and np.all(np.abs(out[1] - clean[1]) > 1e-6)


def test_a_gradient_that_is_not_finite_without_signal_does_not_matter():
  schedule = schedules.rectified_flow()
  log_prob = lambda x, t: jnp.sum(jnp.log(1 - t)[:, None] * x, axis=-1)
  out = guidance.classifier(lambda x, t: 0.5 * x, log_prob, schedule)(points((1, 3)), jnp.ones(1))
  np.testing.assert_array_equal(out, 0.5 * points((1, 3)))
