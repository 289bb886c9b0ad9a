"""Toy models: their closed forms against the models themselves, quadrature and brute force."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import targets
from ancestral.models import base, schedules, toy


def law_by_model(model, params, prompt, vocab_size, num_tokens):
  """p(x_1 .. x_n | prompt), from one full pass over every continuation."""
  continuations = list(itertools.product(range(vocab_size), repeat=num_tokens))
  tokens = np.array([(*prompt, *continuation) for continuation in continuations])
  hidden, _ = base.apply(model, params, jnp.asarray(tokens))
  conditional = targets.softmax(model.readout(params, hidden))
  law = np.zeros((vocab_size,) * num_tokens)
  for row, continuation in zip(conditional, continuations, strict=True):
    law[continuation] = np.prod(
      [row[len(prompt) - 1 + i, token] for i, token in enumerate(continuation)]
    )
  return law


@pytest.mark.parametrize(
  "order, prompt", [(0, (1,)), (1, (2,)), (2, (1,)), (2, (2, 0, 1)), (3, (1, 2))]
)
def test_table_law_is_the_models(order, prompt):
  model, params = targets.table_target(vocab_size=3, order=order)
  law = toy.table_law(targets.softmax(params), prompt, 3)
  assert law.sum() == pytest.approx(1, abs=1e-12)
  np.testing.assert_allclose(law, law_by_model(model, params, prompt, 3, 3), rtol=1e-5)


def test_markov_law_is_the_models():
  model, params = targets.markov_target(vocab_size=3)
  law = toy.markov_law(np.exp(params), 2, 3)
  assert law.sum() == pytest.approx(1, abs=1e-6)
  np.testing.assert_allclose(law, law_by_model(model, params, (0, 2), 3, 3), rtol=1e-5)


def test_markov_init_is_a_transition_matrix_of_its_size():
  params = toy.markov(4).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  assert params.shape == (4, 4)
  np.testing.assert_allclose(np.exp(params).sum(axis=1), 1, rtol=1e-6)


def test_cache_of_a_toy_equals_the_full_pass():
  model, params = targets.table_target(vocab_size=4, order=3)
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 4, (2, 8)))
  expected, _ = targets.apply(model, params, tokens)
  _, cache = targets.apply(model, params, tokens[:, :5], model.init_cache(params, 2, 8))
  cache = cache._replace(length=jnp.array([2, 5]))
  for i in range(3):
    at = cache.length[:, None]
    hidden, cache = targets.apply(model, params, jnp.take_along_axis(tokens, at, 1), cache)
    np.testing.assert_array_equal(hidden[0, 0], expected[0, 2 + i])
    np.testing.assert_array_equal(hidden[1, 0], expected[1, 5 + i])


def test_a_masked_toy_reads_what_it_may_attend_to_in_the_order_of_slots():
  model, params = targets.table_target(vocab_size=4, order=3)
  tokens = jnp.array([[3, 1, 2, 0, 1]])
  mask = np.tril(np.ones((1, 5, 5), bool))
  mask[:, 3, [1, 2]] = False  # 3, 0
  mask[:, 4, 3] = False  # 3, 1, 2, 1
  hidden, _ = targets.apply(model, params, tokens, mask=jnp.asarray(mask))
  for i, seen in enumerate(([3], [3, 1], [3, 1, 2], [3, 0], [3, 1, 2, 1])):
    expected, _ = targets.apply(model, params, jnp.array([seen]))
    np.testing.assert_array_equal(hidden[0, i], expected[0, -1])


SCHEDULE = schedules.trigonometric()
COMPUTE = pytest.mark.parametrize("dtype, atol", [("float32", 3e-5), ("float64", 1e-12)])


def random_mixture(num=4, size=2, dtype="float64", seed=0):
  """Components of different weights, near enough to overlap."""
  rng = np.random.default_rng(seed)
  weights = rng.dirichlet(np.full(num, 5.0))
  parts = weights, rng.normal(size=(num, size)), rng.uniform(0.1, 0.9, num)
  return toy.GaussianMixture(*(jnp.asarray(part, dtype) for part in parts))


def component_densities(mixture, x, alpha=1.0, sigma=0.0):
  """weights[k] N(x; alpha m_k, (alpha^2 v_k + sigma^2) I), [B, K], by scipy in float64."""
  weights, means, variances = (np.asarray(part, np.float64) for part in mixture)
  columns = [
    w * np.atleast_1d(scipy.stats.multivariate_normal(alpha * m, alpha**2 * v + sigma**2).pdf(x))
    for w, m, v in zip(weights, means, variances, strict=True)
  ]
  return np.stack(columns, axis=-1)


def plane(low=-7.0, high=7.0, num=401):
  """A grid over R^2, [num^2, 2], and the area of its cells."""
  line = np.linspace(low, high, num)
  return np.stack(np.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2), (
    line[1] - line[0]
  ) ** 2


def means_by_grid(clean, density, x, alpha, sigma):
  """E[x_0 | x_t] [B, 2] from a density on a grid of x_0."""
  squares = ((x[:, None] - alpha * clean[None]) ** 2).sum(-1)
  weight = density[None] * np.exp(-(squares - squares.min(axis=1, keepdims=True)) / 2 / sigma**2)
  return weight @ clean / weight.sum(axis=1, keepdims=True)


log_prob = jax.jit(toy.mixture_log_prob)


@COMPUTE
def test_mixture_denoiser_equals_quadrature(dtype, atol):
  with jax.enable_x64(dtype == "float64"):
    mixture = random_mixture(dtype=dtype)
    denoise = jax.jit(toy.mixture_denoiser(mixture, SCHEDULE))
    clean, _ = plane()
    density = component_densities(mixture, clean).sum(-1)
    x = np.random.default_rng(1).normal(size=(3, 2))
    times = np.array([0.15, 0.5, 0.95])
    for t in times:
      a, s = np.cos(np.pi * t / 2), np.sin(np.pi * t / 2)
      out = denoise(jnp.asarray(x, dtype), jnp.asarray(t, dtype))
      assert out.dtype == dtype
      np.testing.assert_allclose(out, means_by_grid(clean, density, x, a, s), atol=max(atol, 1e-9))
    together = denoise(jnp.asarray(x, dtype), jnp.asarray(times, dtype))
    apart = [
      denoise(jnp.asarray(x[i : i + 1], dtype), jnp.asarray(t, dtype))[0]
      for i, t in enumerate(times)
    ]
    np.testing.assert_allclose(together, np.stack(apart), atol=atol)


def test_mixture_denoiser_obeys_tweedie():
  with jax.enable_x64(True):
    mixture = random_mixture(5, 3)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(6, 3)))
    for t in (0.2, 0.7):
      a, s = np.cos(np.pi * t / 2), np.sin(np.pi * t / 2)
      total = lambda x, a=a, s=s: log_prob(toy.noised(mixture, a, s), x).sum()
      out = jax.jit(toy.mixture_denoiser(mixture, SCHEDULE))(x, jnp.asarray(t))
      np.testing.assert_allclose(out, (x + s**2 * jax.jit(jax.grad(total))(x)) / a, atol=1e-12)


def test_mixture_denoiser_at_the_ends_of_time():
  mixture = random_mixture(dtype="float32")
  x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 2)), jnp.float32)
  out = jax.jit(toy.mixture_denoiser(mixture, SCHEDULE))(x, jnp.array([0.0, 1.0]))
  np.testing.assert_allclose(out[0], x[0], rtol=1e-6)
  np.testing.assert_allclose(out[1], mixture.weights @ mixture.means, rtol=1e-6)


@COMPUTE
def test_densities_are_scipys(dtype, atol):
  with jax.enable_x64(dtype == "float64"):
    mixture = random_mixture(dtype=dtype)
    x = np.random.default_rng(1).normal(size=(5, 2))
    expected = np.log(component_densities(mixture, x).sum(-1))
    np.testing.assert_allclose(log_prob(mixture, jnp.asarray(x, dtype)), expected, atol=atol)
    noised = toy.noised(mixture, 0.6, 0.7)
    expected = np.log(component_densities(mixture, x, 0.6, 0.7).sum(-1))
    np.testing.assert_allclose(log_prob(noised, jnp.asarray(x, dtype)), expected, atol=atol)


def test_a_kernel_densitys_denoiser_weighs_the_points():
  rng = np.random.default_rng(0)
  points, std, t = rng.normal(size=(300, 16)), 0.3, 0.4
  a, s = np.cos(np.pi * t / 2), np.sin(np.pi * t / 2)
  x = a * points[:20] + s * rng.normal(size=(20, 16))
  with jax.enable_x64(True):
    mixture = toy.kernel_density(points, std)
    out = jax.jit(toy.mixture_denoiser(mixture, SCHEDULE))(jnp.asarray(x), jnp.asarray(t))
  total = (a * std) ** 2 + s**2
  squares = ((x[:, None] - a * points[None]) ** 2).sum(-1)
  share = np.exp(-(squares - squares.min(1, keepdims=True)) / 2 / total)
  nearest = share @ points / share.sum(1, keepdims=True)
  expected = nearest + a * std**2 / total * (x - a * nearest)
  np.testing.assert_allclose(out, expected, atol=1e-12)
  single = jax.jit(toy.mixture_denoiser(toy.kernel_density(np.float32(points), std), SCHEDULE))(
    jnp.asarray(x, jnp.float32), jnp.float32(t)
  )
  np.testing.assert_allclose(single, expected, atol=1e-4)


def test_no_array_of_a_mixture_denoiser_is_rows_by_components_by_size():
  mixture = toy.kernel_density(jnp.zeros((1800, 64)), 0.1)
  denoise = toy.mixture_denoiser(mixture, SCHEDULE)
  shapes = jax.ShapeDtypeStruct((512, 64), jnp.float32), jax.ShapeDtypeStruct((512,), jnp.float32)
  jaxpr = jax.make_jaxpr(denoise)(*shapes)
  sizes = [var.aval.size for eqn in jaxpr.eqns for var in eqn.outvars]
  assert 512 * 1800 <= max(sizes) < 512 * 1800 * 2


def test_draws_of_a_mixture_follow_it():
  mixture = toy.GaussianMixture(
    jnp.array([0.7, 0.0, 0.3]),
    jnp.array([[-20.0, 0.0], [0.0, 9.0], [20.0, 0.0]]),
    jnp.array([4.0, 1.0, 0.25]),
  )
  num = 20_000
  x = np.asarray(toy.mixture_sample(jax.random.key(0), mixture, num))
  left = x[:, 0] < 0
  assert abs(left.mean() - 0.7) < 4 * np.sqrt(0.21 / num)
  assert np.all(np.abs(x[:, 0]) > 5)  # none of the second component
  for mine, mean, variance in ((x[left], [-20, 0], 4.0), (x[~left], [20, 0], 0.25)):
    error = np.sqrt(variance / len(mine))
    np.testing.assert_allclose(mine.mean(axis=0), mean, atol=4 * error)
    covariance = np.cov(mine.T)
    np.testing.assert_allclose(
      covariance, variance * np.eye(2), atol=4 * error * np.sqrt(2 * variance)
    )


LABELS = np.array([0, 2, 0, 2])  # of four components; class 1 has none


def test_class_log_prob_is_bayes_rule():
  with jax.enable_x64(True):
    mixture = random_mixture()
    x, t = np.random.default_rng(1).normal(size=(5, 2)), np.linspace(0.1, 1, 5)
    out = jax.jit(toy.class_log_prob(mixture, LABELS, 3, SCHEDULE))(jnp.asarray(x), jnp.asarray(t))
    for b in range(5):
      a, s = np.cos(np.pi * t[b] / 2), np.sin(np.pi * t[b] / 2)
      parts = component_densities(mixture, x[b : b + 1], a, s)[0]
      expected = np.array([parts[LABELS == c].sum() for c in range(3)]) / parts.sum()
      np.testing.assert_allclose(np.exp(out[b]), expected, atol=1e-12)
    prior = np.log([np.sum(np.asarray(mixture.weights)[LABELS == c]) for c in (0, 2)])
    np.testing.assert_allclose(out[-1, [0, 2]], prior, atol=1e-12)  # no signal is left
    assert np.all(np.isneginf(out[:, 1]))


def test_a_class_is_the_law_given_the_class():
  with jax.enable_x64(True):
    mixture, x = random_mixture(), np.random.default_rng(1).normal(size=(5, 2))
    parts = component_densities(mixture, x)
    weights = np.asarray(mixture.weights)
    for c in (0, 2):
      given = toy.of_class(mixture, LABELS, c)
      expected = parts[:, LABELS == c].sum(-1) / weights[LABELS == c].sum()
      np.testing.assert_allclose(np.exp(log_prob(given, jnp.asarray(x))), expected, rtol=1e-12)
      np.testing.assert_array_equal(given.weights > 0, LABELS == c)
    np.testing.assert_allclose(toy.only(mixture, LABELS >= 0).weights, weights, rtol=1e-12)


def test_components_of_no_weight_leave_gradients_finite():
  mixture = random_mixture(dtype="float32")
  x, t = jnp.ones((3, 2)), jnp.array([0.3, 0.6, 0.9])

  def outputs(weights, x):
    given = toy.of_class(mixture._replace(weights=weights), LABELS, 2)
    log_probs = toy.class_log_prob(given, LABELS, 3, SCHEDULE)(x, t)
    return (
      toy.mixture_log_prob(given, x).sum() + toy.mixture_denoiser(given, SCHEDULE)(x, t).sum(),
      log_probs[:, 0].sum() + log_probs[:, 1].sum(),
      log_probs[:, 2].sum(),
    )

  for gradient in jax.tree.leaves(jax.jit(jax.jacrev(outputs, argnums=(0, 1)))(mixture.weights, x)):
    assert np.all(np.isfinite(gradient))


OPERATOR, NOISE_STD = np.array([[1.0, 0.5]]), 0.4


def test_a_posterior_equals_quadrature():
  with jax.enable_x64(True):
    mixture, y = random_mixture(), np.array([0.8])
    full = jax.jit(toy.posterior)(mixture, jnp.asarray(OPERATOR), jnp.asarray(y), NOISE_STD)
    clean, area = plane()
    likelihood = np.exp(-((y - clean @ OPERATOR[0]) ** 2) / 2 / NOISE_STD**2)
    parts = component_densities(mixture, clean) * likelihood[:, None]  # [N, K]
    masses = parts.sum(0) * area
    np.testing.assert_allclose(full.weights, masses / masses.sum(), atol=1e-9)
    means = (parts.T @ clean) * area / masses[:, None]
    np.testing.assert_allclose(full.means, means, atol=1e-9)
    for k in range(4):
      centred = clean - means[k]
      covariance = (parts[:, k, None] * centred).T @ centred * area / masses[k]
      np.testing.assert_allclose(full.covariances[k], covariance, atol=1e-9)
    x = np.random.default_rng(2).normal(size=(3, 2))
    times = np.array([0.2, 0.5, 0.9])
    out = jax.jit(toy.full_mixture_denoiser(full, SCHEDULE))(jnp.asarray(x), jnp.asarray(times))
    for b, t in enumerate(times):
      a, s = np.cos(np.pi * t / 2), np.sin(np.pi * t / 2)
      expected = means_by_grid(clean, parts.sum(-1), x[b : b + 1], a, s)[0]
      np.testing.assert_allclose(out[b], expected, atol=1e-9)


def test_the_posterior_of_a_gaussian_is_that_of_linear_regression():
  """By the precision matrix; with the denoiser's and the draws' moments in every direction."""
  rng, v, s, num = np.random.default_rng(0), 0.7, 0.8, 20_000
  operator, y, mean = rng.normal(size=(3, 5)), rng.normal(size=3), rng.normal(size=5)
  covariance = np.linalg.inv(np.eye(5) / v + operator.T @ operator / s**2)
  mean_given_y = covariance @ (mean / v + operator.T @ y / s**2)
  x, t = rng.normal(size=(4, 5)), 0.4
  with jax.enable_x64(True):
    prior = toy.GaussianMixture(jnp.ones(1), jnp.asarray(mean)[None], jnp.full(1, v))
    full = jax.jit(toy.posterior)(prior, jnp.asarray(operator), jnp.asarray(y), s)
    out = jax.jit(toy.full_mixture_denoiser(full, SCHEDULE))(jnp.asarray(x), jnp.asarray(t))
    draws = np.asarray(toy.full_mixture_sample(jax.random.key(0), full, num))
  np.testing.assert_allclose(full.covariances[0], covariance, atol=1e-12)
  np.testing.assert_allclose(full.means[0], mean_given_y, atol=1e-12)
  a, b = np.cos(np.pi * t / 2), np.sin(np.pi * t / 2)
  gain = a * covariance @ np.linalg.inv(a**2 * covariance + b**2 * np.eye(5))
  expected = mean_given_y + (x - a * mean_given_y) @ gain.T
  np.testing.assert_allclose(out, expected, atol=1e-12)
  variances = np.diag(covariance)
  error = np.sqrt((np.outer(variances, variances) + covariance**2) / num)
  np.testing.assert_array_less(np.abs(np.cov(draws.T) - covariance), 4 * error)


def test_draws_of_a_posterior_without_noise_satisfy_the_measurement():
  mixture, y, num = random_mixture(dtype="float32"), np.float32([0.8]), 20_000
  full = jax.jit(toy.posterior)(mixture, jnp.asarray(OPERATOR, jnp.float32), jnp.asarray(y), 0.0)
  x = np.asarray(toy.full_mixture_sample(jax.random.key(0), full, num))
  np.testing.assert_allclose(x @ OPERATOR[0], y[0], atol=1e-3)
  weights, means, covariances = (np.asarray(part, np.float64) for part in full)
  mean = weights @ means
  covariance = np.einsum("k,kij->ij", weights, covariances) + (
    weights[:, None] * (means - mean)
  ).T @ (means - mean)
  spread = np.sqrt(np.diag(covariance))
  np.testing.assert_allclose((x.mean(axis=0) - mean) / spread, 0, atol=4 / np.sqrt(num))
  fourth = np.mean(((x - mean) / spread) ** 4, axis=0)
  deviation = x.var(axis=0) / spread**2 - 1
  assert np.all(np.abs(deviation) < 4 * np.sqrt((fourth - 1) / num))


def test_joint_predictor_equals_enumeration():
  vocab_size, length = 3, 3
  joint = np.random.default_rng(0).dirichlet(np.full(27, 0.5)).reshape((3,) * 3)
  joint[1, :, 2] = 0
  joint /= joint.sum()
  tokens = np.array(list(itertools.product(range(4), repeat=length)))
  possible = np.array(
    [joint[tuple(slice(None) if v == 3 else v for v in row)].sum() > 0 for row in tokens]
  )
  tokens = tokens[possible]
  out = toy.joint_predictor(jnp.asarray(joint, jnp.float32))(jnp.asarray(tokens), jnp.float32(0.3))
  for row, log_probs in zip(tokens, out, strict=True):
    expected = np.zeros((length, vocab_size))
    for outcome in itertools.product(range(vocab_size), repeat=length):
      if all(token in (3, value) for token, value in zip(row, outcome, strict=True)):
        for i, value in enumerate(outcome):
          expected[i, value] += joint[outcome]
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.exp(log_probs), expected, atol=1e-5)
    assert np.all(np.isneginf(log_probs[expected == 0]))


def test_joint_predictor_says_nan_where_the_tokens_are_impossible():
  joint = jnp.array([[0.5, 0.0], [0.25, 0.25]])
  out = toy.joint_predictor(joint)(jnp.array([[0, 1], [0, 2]]), jnp.float32(0.5))
  assert np.all(np.isnan(out[0])) and not np.any(np.isnan(out[1]))
