"""Guidance by pairs: on mixtures, where the guided densities are known, and against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.models import precondition, schedules, toy
from ancestral.sampling import base, guidance, solvers, tables

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
COMBINES = {
  "classifier free": guidance.classifier_free,
  "rescaled": lambda scale: guidance.rescaled(guidance.classifier_free(scale), 0.7),
  "projected": lambda scale: guidance.adaptive_projected(scale, 0.3, 0.8),
  "projected, whole": guidance.adaptive_projected,
  "zero star": guidance.zero_star,
}
OF_EVERY_COMBINE = pytest.mark.parametrize("combine", COMBINES.values(), ids=COMBINES)


def mixture():
  rng = np.random.default_rng(0)
  parts = rng.dirichlet(np.full(6, 5.0)), rng.normal(size=(6, 3)), rng.uniform(0.1, 0.9, 6)
  return toy.GaussianMixture(*map(jnp.asarray, parts))


def points(shape=(4, 3), seed=1):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def times(schedule):
  return jnp.asarray(schedule.max_time * np.array([0.05, 0.3, 0.6, 0.95]))


def class_pair(schedule=TRIGONOMETRIC, c=0):
  conditional = toy.mixture_denoiser(toy.of_class(mixture(), LABELS, c), schedule)
  return conditional, toy.mixture_denoiser(mixture(), schedule)


def images(seed=0):
  """Positive and negative of four rows [2, 3], at different scales, one pair of zeros."""
  positive, negative = np.random.default_rng(seed).normal(size=(2, 4, 2, 3))
  size = np.array([1.0, 3.0, 0.2, 0.0])[:, None, None]
  return jnp.asarray(positive * size), jnp.asarray(negative * size)


@ON_EVERY_SCHEDULE
def test_classifier_free_guidance_is_of_the_sharpened_density(schedule):
  """Tweedie's formula of p(x_t) p(c | x_t)^w, at a scale for each row."""
  scales, x, t = np.array([0.0, 0.5, 1.0, 4.0]), points(), times(schedule)
  denoise = guidance.guided(
    guidance.both(*class_pair(schedule)), guidance.classifier_free(jnp.asarray(scales))
  )
  out = jax.jit(denoise)(x, t)

  @jax.jit
  def gradient(x, alpha, sigma, scale):
    def log_density(x):
      of = lambda law: toy.mixture_log_prob(toy.noised(law, alpha, sigma), x)[0]
      prior = of(mixture())
      return prior + scale * (of(toy.of_class(mixture(), LABELS, 0)) - prior)

    return jax.grad(log_density)(x)

  for b in range(4):
    a, s = float(schedule.alpha(t)[b]), float(schedule.sigma(t)[b])
    tweedie = (x[b] + s**2 * gradient(x[b : b + 1], a, s, scales[b])[0]) / a
    np.testing.assert_allclose(out[b], tweedie, atol=1e-10)


@OF_EVERY_COMBINE
def test_without_a_difference_the_positive_is_left(combine):
  positive, _ = images()
  for scale in (0.0, 7.5):
    np.testing.assert_array_equal(combine(scale)(positive, positive), positive)
  gradients = jax.jit(jax.grad(lambda p, n: combine(3.0)(p, n).sum(), (0, 1)))(positive, positive)
  assert all(np.all(np.isfinite(gradient)) for gradient in gradients)


def test_what_is_guided_does_not_depend_on_the_networks_head():
  heads = {name: getattr(precondition, name) for name in ("NOISE", "SCORE", "VELOCITY", "FLOW")}
  heads["karras"] = precondition.karras()

  @jax.jit
  def every(x, t):
    pairs = {"DATA": guidance.both(*class_pair())}
    for name, head in heads.items():
      networks = [precondition.predictor(d, TRIGONOMETRIC, head) for d in class_pair()]
      pairs[name] = guidance.both(
        *(precondition.denoiser(n, TRIGONOMETRIC, head) for n in networks)
      )
    return {
      name: [guidance.guided(pair, combine(3.0))(x, t) for combine in COMBINES.values()]
      for name, pair in pairs.items()
    }

  outs = every(points(), times(TRIGONOMETRIC))
  for name in heads:
    np.testing.assert_allclose(outs[name], outs["DATA"], atol=1e-11, err_msg=name)


@OF_EVERY_COMBINE
def test_a_scale_is_of_its_row(combine):
  positive, negative = images()
  scales = np.array([0.0, 1.0, 2.5, 9.0])
  together = jax.jit(lambda s, p, n: combine(s)(p, n))(scales, positive, negative)
  for b, scale in enumerate(scales):
    alone = combine(scale)(positive[b : b + 1], negative[b : b + 1])[0]
    np.testing.assert_allclose(together[b], alone, rtol=1e-13)


def test_another_scale_is_the_same_program():
  pair = guidance.both(*class_pair())
  compiled = jax.jit(
    lambda x, t, s, r, e, phi: guidance.guided(
      pair, guidance.rescaled(guidance.adaptive_projected(s, e, r), phi)
    )(x, t)
  )
  outs = [
    compiled(points(), times(TRIGONOMETRIC), s, 0.5, e, 0.3) for s in (2.0, 3.0) for e in (0.0, 0.5)
  ]
  assert compiled._cache_size() == 1
  assert len({float(out[0, 0]) for out in outs}) == 4


def test_rescaling_gives_the_positives_spread():
  positive, negative = images()
  plain = guidance.classifier_free(4.0)
  spread = lambda x: np.asarray(x).std(axis=(1, 2))
  out = {share: guidance.rescaled(plain, share)(positive, negative) for share in (0.0, 0.25, 1.0)}
  np.testing.assert_array_equal(out[0.0], plain(positive, negative))
  np.testing.assert_allclose(spread(out[1.0]), spread(positive), rtol=1e-12)
  between = 0.75 * out[0.0] + 0.25 * out[1.0]
  np.testing.assert_allclose(out[0.25], between, rtol=1e-12)


def test_projected_guidance_by_its_parts():
  positive, negative = images()
  rows = [np.asarray(a).reshape(4, -1) for a in (positive, negative)]
  length = np.linalg.norm(rows[0] - rows[1], axis=1)
  scale, parallel, radius = 4.0, 0.25, length * [0.5, 1.01, 0.9, 1]  # two are cut
  out = guidance.adaptive_projected(scale, parallel, radius)(positive, negative)
  for b in range(3):
    p, n = rows[0][b], rows[1][b]
    difference = (p - n) * [0.5, 1, 0.9][b]
    axes = np.linalg.qr(np.column_stack([p, np.eye(6)[:, :5]]))[0].T  # the first along p
    inside = axes @ difference * np.array([parallel, 1, 1, 1, 1, 1])
    np.testing.assert_allclose(np.ravel(out[b]), p + (scale - 1) * axes.T @ inside, atol=1e-12)
  whole = guidance.adaptive_projected(scale, 1.0)(positive, negative)
  expected = guidance.classifier_free(scale)(positive, negative)
  np.testing.assert_allclose(whole, expected, atol=1e-13)


def test_zero_star_starts_from_the_nearest_multiple():
  positive, negative = images()
  out = guidance.zero_star(3.0)(positive, negative)
  for b in range(3):
    p, n = np.asarray(positive[b]).ravel(), np.asarray(negative[b]).ravel()
    nearest = n * np.linalg.lstsq(n[:, None], p, rcond=None)[0][0]
    np.testing.assert_allclose(np.ravel(out[b]), nearest + 3 * (p - nearest), atol=1e-12)


def test_combined_as_a_flow_it_is_the_velocities_that_are_combined():
  schedule = schedules.rectified_flow()
  pair, x, t = guidance.both(*class_pair(schedule)), points(), times(schedule)
  as_flow = lambda combine: jax.jit(guidance.guided_as(pair, combine, schedule, precondition.FLOW))
  towards, away = (np.asarray(part) for part in pair(x, t))
  plain = guidance.classifier_free(3.0)
  np.testing.assert_allclose(as_flow(plain)(x, t), plain(towards, away), atol=1e-12)
  out = as_flow(guidance.zero_star(3.0))(x, t)
  for b in range(4):
    time = float(t[b])
    u, v = ((np.asarray(x[b]) - d) / time for d in (away[b], towards[b]))  # dx/dt
    star = (v @ u) / (u @ u)
    velocity = star * u + 3 * (v - star * u)
    np.testing.assert_allclose(out[b], np.asarray(x[b]) - time * velocity, atol=1e-12)


@ON_EVERY_SCHEDULE
def test_guidance_is_limited_to_its_noise_levels(schedule):
  """Where the negative must not matter it is NaN; rho at 2, in (2, 3], at 3, above."""
  levels = np.array([2.0, 2.5, 3.0, 3.1])
  t = jnp.asarray(schedule.time(-np.log(levels)))
  nudge = np.array([-1e-9, 0, -1e-9, 0])  # boundaries, approached from below
  t = t * (1 + nudge)
  inside = np.array([False, True, True, False])
  positive = lambda x, t: 0.5 * x
  negative = lambda x, t: jnp.where(jnp.asarray(inside)[:, None], 0.25 * x, jnp.nan)
  x = points()
  towards, away = guidance.limited(positive, negative, schedule, 2.0, 3.0)(x, t)
  np.testing.assert_array_equal(towards, 0.5 * x)
  np.testing.assert_allclose(away, np.where(inside[:, None], 0.25, 0.5) * x)


def test_the_bounds_of_the_noise_level():
  """(low, high]; infinity is a level, the last of a schedule that ends without signal."""
  halved = lambda x, t: 0.5 * x
  same = lambda x, t: x
  exploding, flow = SCHEDULES["variance exploding"], SCHEDULES["rectified flow"]
  for schedule, t, low, high, expected in (
    (exploding, [0.0, 1.0, 2.0, 2.1], 1.0, 2.0, [1, 1, 0.5, 1]),
    (flow, [0.0, 0.5, 0.7, 1.0], 0.0, np.inf, [1, 0.5, 0.5, 0.5]),
    (flow, [0.0, 0.5, 0.7, 1.0], 0.0, 1e9, [1, 0.5, 0.5, 1]),
  ):
    pair = guidance.limited(same, halved, schedule, low, high)
    _, away = pair(jnp.ones((4, 1)), jnp.array(t))
    np.testing.assert_array_equal(away[:, 0], expected)
    np.testing.assert_array_equal(pair(jnp.ones((2, 1)), jnp.asarray(t[1]))[1], expected[1])


def test_the_negative_runs_only_where_a_row_is_inside():
  calls = []

  def negative(x, t):
    jax.debug.callback(lambda t: calls.append(np.asarray(t)), t)
    return x

  pair = jax.jit(
    guidance.limited(lambda x, t: 0.5 * x, negative, SCHEDULES["variance exploding"], 1, 2)
  )
  for t in ([0.5, 0.9], [0.5, 1.5], [2.5, 3.0], [1.2, 1.2]):
    pair(jnp.ones((2, 3)), jnp.array(t))
  jax.effects_barrier()
  np.testing.assert_array_equal(calls, [[0.5, 1.5], [1.2, 1.2]])


def test_plus_plus_takes_the_noise_from_the_negative():
  conditional, unconditional = class_pair()
  outputs = guidance.plus_plus(
    guidance.both(conditional, unconditional), guidance.classifier_free(0.6)
  )
  s, t = 0.8, 0.3
  carry = TRIGONOMETRIC.sigma(t) / TRIGONOMETRIC.sigma(s)
  output = [TRIGONOMETRIC.alpha(t), -carry * TRIGONOMETRIC.alpha(s)]
  table = tables.SolverTable(
    np.array([1.0, 0]), np.array([s, t]), np.full((1, 1, 1), carry), np.array([[output]]), None
  )
  start = points()
  out = solvers.sample(base.row_keys(jax.random.key(0), jnp.arange(4)), outputs, table, start)
  c, u = (np.asarray(d(start, jnp.full(4, s))) for d in (conditional, unconditional))
  noise = (start - np.cos(0.4 * np.pi) * u) / np.sin(0.4 * np.pi)
  expected = np.cos(0.15 * np.pi) * (0.4 * u + 0.6 * c) + np.sin(0.15 * np.pi) * noise
  np.testing.assert_allclose(out, expected, atol=1e-6)


def test_thresholds_are_numpys():
  denoised = (
    np.random.default_rng(0).normal(size=(4, 5, 7)) * np.array([0.1, 1, 3, 9])[:, None, None]
  )
  denoise, t = lambda x, t: jnp.asarray(denoised), jnp.float32(0.5)
  x = jnp.zeros(denoised.shape)
  out = guidance.clipped(denoise, -0.5, 0.25)(x, t)
  np.testing.assert_array_equal(out, np.clip(denoised, -0.5, 0.25))
  out = jax.jit(guidance.dynamic_threshold(denoise, 0.9, 2.0))(x, t)
  for row, clean in zip(out, denoised, strict=True):
    s = max(2.0, np.quantile(np.abs(clean), 0.9))
    np.testing.assert_allclose(row, np.clip(clean, -s, s) * 2 / s, rtol=1e-12)
  np.testing.assert_array_equal(out[0], denoised[0])
  assert np.abs(out[3]).max() <= 2 * (1 + 1e-12)
