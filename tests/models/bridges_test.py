"""Light bridges: quadrature, optimality of the Gaussian one, the drift as gradient and as mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from ancestral.models import bridges


def random_bridge(num=3, dim=2, seed=0, dtype="float64"):
  rng = np.random.default_rng(seed)
  parts = rng.normal(size=num), rng.normal(size=(num, dim)), 0.5 * rng.normal(size=(num, dim, dim))
  return bridges.LightBridge(*(jnp.asarray(part, dtype) for part in parts))


def by_hand(bridge, eps):
  """a [K], r [K, D] and S [K, D, D], numpy."""
  scaled, r, factors = (np.asarray(part) for part in bridge)
  lower = [np.tril(f, -1) + np.diag(np.exp(np.diag(f))) for f in factors]
  return np.exp(scaled / eps), r, np.stack([f @ f.T for f in lower])


def potential(bridge, y, eps):
  """v(y) by scipy, [N]."""
  parts = zip(*by_hand(bridge, eps), strict=True)
  return sum(a * scipy.stats.multivariate_normal(r, eps * s).pdf(y) for a, r, s in parts)


def random_gaussians(dim, seed=0):
  rng = np.random.default_rng(seed)
  factors = rng.normal(size=(2, dim, dim + 2)) / np.sqrt(dim)
  means = rng.normal(size=(2, dim))
  return means[0], factors[0] @ factors[0].T, means[1], factors[1] @ factors[1].T


LINE = np.linspace(-25, 25, 40_001)
CELL = LINE[1] - LINE[0]


@pytest.mark.parametrize("eps", [0.1, 1.0, 5.0])
def test_potential_is_the_mixture_of_scipy(eps):
  y = np.random.default_rng(1).normal(size=(5, 2))
  with jax.enable_x64(True):
    out = jax.jit(bridges.log_potential)(random_bridge(), jnp.asarray(y), eps)
    np.testing.assert_allclose(np.exp(out), potential(random_bridge(), y, eps), rtol=1e-10)


@pytest.mark.parametrize("eps", [0.3, 1.0, 3.0])
def test_plan_and_normaliser_equal_quadrature_on_a_line(eps):
  x0 = np.array([-1.5, 0.0, 0.7])
  with jax.enable_x64(True):
    bridge = random_bridge(dim=1)
    density = np.exp(x0[:, None] * LINE[None] / eps) * potential(bridge, LINE[:, None], eps)
    mass = density.sum(1) * CELL
    out = jax.jit(bridges.log_normaliser)(bridge, jnp.asarray(x0)[:, None], eps)
    np.testing.assert_allclose(np.exp(out), mass, rtol=1e-9)
    log_weights, means, covariances = jax.jit(bridges.plan)(bridge, jnp.asarray(x0)[:, None], eps)
  for b in range(3):
    law = sum(
      np.exp(log_weights[b, k])
      * scipy.stats.norm(means[b, k, 0], np.sqrt(covariances[k, 0, 0])).pdf(LINE)
      for k in range(3)
    )
    np.testing.assert_allclose(law, density[b] / mass[b], atol=1e-9)


def test_plan_is_the_tilted_potential_in_the_plane():
  """pi(y | x) c(x) = exp(x' y / eps) v(y), at points."""
  rng, eps = np.random.default_rng(2), 0.4
  x0, y = rng.normal(size=(4, 2)), rng.normal(size=(6, 2))
  with jax.enable_x64(True):
    bridge = random_bridge()
    log_c = jax.jit(bridges.log_normaliser)(bridge, jnp.asarray(x0), eps)
    plan = jax.jit(bridges.plan)(bridge, jnp.asarray(x0), eps)
  log_c, log_weights, means, covariances = jax.tree.map(np.asarray, (log_c, *plan))
  for b in range(4):
    law = sum(
      np.exp(log_weights[b, k])
      * scipy.stats.multivariate_normal(means[b, k], covariances[k]).pdf(y)
      for k in range(3)
    )
    expected = np.exp(y @ x0[b] / eps - log_c[b]) * potential(bridge, y, eps)
    np.testing.assert_allclose(law, expected, rtol=1e-9)


def test_draws_of_the_plan_follow_it():
  eps, num = 0.5, 20_000
  bridge, x0 = random_bridge(dtype="float32"), np.float32([[0.8, -0.5]])
  x1 = jax.jit(bridges.plan_sample)(jax.random.key(0), bridge, jnp.tile(x0, (num, 1)), eps)
  check_moments(np.asarray(x1), jax.jit(bridges.plan)(bridge, jnp.asarray(x0), eps))


def check_moments(x1, plan):
  """Mean, and mean of products about it, within four standard errors of the plan's, of row 0."""
  log_weights, means, covariances = (np.asarray(part, np.float64) for part in plan)
  weights, means = np.exp(log_weights[0]), means[0]
  mean = weights @ means
  apart = means - mean
  covariance = np.einsum("k,kij->ij", weights, covariances + apart[:, :, None] * apart[:, None])
  products = (x1 - mean)[:, :, None] * (x1 - mean)[:, None]
  for values, expected in ((x1, mean), (products, covariance)):
    error = values.std(axis=0) / np.sqrt(len(x1))
    np.testing.assert_array_less(np.abs(values.mean(axis=0) - expected), 4 * error)


@pytest.mark.parametrize("eps", [0.01, 1.0, 100.0])
def test_the_gaussian_bridge_is_the_only_law_that_can_be_one(eps):
  """Its marginals are given, and log pi holds x_0 and x_1 together in x_0' x_1 / eps alone."""
  mean0, cov0, mean1, cov1 = random_gaussians(4)
  joint = bridges.gaussian_bridge(mean0, cov0, mean1, cov1, eps)
  precision = np.linalg.inv(np.block([[cov0, joint.cross], [joint.cross.T, cov1]]))
  np.testing.assert_allclose(precision[:4, 4:], -np.eye(4) / eps, atol=1e-8 / eps)
  np.testing.assert_array_equal(joint.covariance1, cov1)


def test_the_gaussian_bridge_is_what_sinkhorn_finds_on_a_grid():
  eps, line = 0.7, np.linspace(-9, 9, 601)
  p0, p1 = (scipy.stats.norm(m, s).pdf(line) for m, s in ((0.4, 0.9), (-0.6, 1.3)))
  kernel, v = np.exp(-((line[:, None] - line[None]) ** 2) / 2 / eps), np.ones(601)
  for _ in range(200):
    u = p0 / (kernel @ v)
    v = p1 / (kernel.T @ u)
  plan = u[:, None] * kernel * v[None]
  plan /= plan.sum()
  covariance = line @ plan @ line - (plan.sum(1) @ line) * (plan.sum(0) @ line)
  joint = bridges.gaussian_bridge([0.4], [[0.81]], [-0.6], [[1.69]], eps)
  np.testing.assert_allclose(joint.cross, covariance, atol=1e-9)


def test_limits_of_the_gaussian_bridge():
  """Little noise: the optimal map, of Bures' covariance. Much: hardly any covariance."""
  gaussians = random_gaussians(3)
  cov0, cov1 = gaussians[1], gaussians[3]
  joint = bridges.gaussian_bridge(*gaussians, 1e-9)
  root = np.real(scipy.linalg.sqrtm(cov0))
  bures = np.trace(scipy.linalg.sqrtm(root @ cov1 @ root)).real
  np.testing.assert_allclose(np.trace(joint.cross), bures, rtol=1e-6)
  joint = bridges.gaussian_bridge(*gaussians, 1e9)
  np.testing.assert_allclose(joint.cross, cov0 @ cov1 / 1e9, rtol=1e-6, atol=1e-16)


@pytest.mark.parametrize("eps", [0.1, 1.0, 10.0])
def test_one_component_realises_the_gaussian_bridge(eps):
  mean0, cov0, mean1, cov1 = random_gaussians(3)
  joint = bridges.gaussian_bridge(mean0, cov0, mean1, cov1, eps)
  x0 = np.random.default_rng(3).normal(size=(2, 3))
  with jax.enable_x64(True):
    plan = jax.jit(bridges.plan)(bridges.from_gaussian(joint), jnp.asarray(x0), eps)
  gain = joint.cross.T @ np.linalg.inv(cov0)  # the regression of x_1 on x_0
  np.testing.assert_allclose(plan.means[:, 0], mean1 + (x0 - mean0) @ gain.T, atol=1e-10)
  np.testing.assert_allclose(plan.covariances[0], cov1 - gain @ joint.cross, atol=1e-10)


def test_gaussian_marginals_are_those_of_the_moments_equations():
  """dm/dt = E g and dV/dt = J V + V J' + eps I, the drift being linear with Jacobian J."""
  eps, step = 0.6, 1e-5
  joint = bridges.gaussian_bridge(*random_gaussians(3), eps)
  for t in (0.1, 0.5, 0.9):
    (mean, covariance), before, after = (
      bridges.gaussian_marginal(joint, t + d, eps) for d in (0, -step, step)
    )
    with jax.enable_x64(True):
      g = bridges.drift(bridges.from_gaussian(joint), eps)
      at_mean = jax.jit(g)(jnp.asarray(mean)[None], t)[0]
      jacobian = jax.jit(jax.jacfwd(lambda x, g=g, t=t: g(x[None], t)[0]))(jnp.asarray(mean))
    jacobian = np.asarray(jacobian)
    np.testing.assert_allclose((after[0] - before[0]) / 2 / step, at_mean, atol=1e-8)
    expected = jacobian @ covariance + covariance @ jacobian.T + eps * np.eye(3)
    np.testing.assert_allclose((after[1] - before[1]) / 2 / step, expected, atol=1e-8)


def log_h(bridge, x, t, eps):
  """log int N(y; x, eps (1 - t) I) exp(|y|^2 / (2 eps)) v(y) dy of x [D], by the paper's A, h."""
  scaled, r, _ = bridge
  covariance = eps * jnp.einsum("kij,klj->kil", bridges.lower(bridge), bridges.lower(bridge))
  inverse, eye = jnp.linalg.inv(covariance), jnp.eye(len(x))
  a = t / (eps * (1 - t)) * eye[None] + inverse
  h = x[None] / (eps * (1 - t)) + jnp.einsum("kij,kj->ki", inverse, r)
  exponent = jnp.einsum("ki,kij,kj->k", h, jnp.linalg.inv(a), h)
  exponent -= jnp.einsum("ki,kij,kj->k", r, inverse, r)
  log_det = jnp.linalg.slogdet(a)[1] + jnp.linalg.slogdet(covariance)[1]
  total = jax.nn.logsumexp(scaled / eps + (exponent - log_det) / 2)
  return total - jnp.sum(x**2) / (2 * eps * (1 - t))


@pytest.mark.parametrize("eps", [0.2, 1.0, 4.0])
def test_drift_is_the_gradient_of_the_log_density(eps):
  x = jnp.asarray(np.random.default_rng(4).normal(size=(5, 2)))
  with jax.enable_x64(True):
    bridge, times = random_bridge(), np.array([0.0, 0.1, 0.5, 0.9, 0.99])
    out = jax.jit(lambda bridge, x, t: bridges.drift(bridge, eps)(x, t))(
      bridge, jnp.asarray(x, "float64"), times
    )
    gradient = jax.jit(jax.vmap(jax.grad(log_h, argnums=1), in_axes=(None, 0, 0, None)))
    expected = eps * gradient(bridge, jnp.asarray(x, "float64"), times, eps)
    np.testing.assert_allclose(out, expected, rtol=1e-9, atol=1e-9)
    one = jax.jit(lambda x: bridges.drift(bridge, eps)(x, 0.5))(jnp.asarray(x, "float64"))
    np.testing.assert_allclose(one[2], out[2], rtol=1e-12)


@pytest.mark.parametrize("t", [0.0, 0.4, 0.95])
def test_drift_is_towards_the_mean_end_of_a_brownian_bridge(t):
  """x_1 given x_t = x has density N(y; x, eps (1 - t)) exp(y^2 / (2 eps)) v(y), up to a factor."""
  eps, x = 0.5, np.array([-1.2, 0.1, 0.9])
  with jax.enable_x64(True):
    bridge = random_bridge(dim=1, seed=1)
    out = jax.jit(bridges.drift(bridge, eps))(jnp.asarray(x)[:, None], t)[:, 0]
    log_v = np.log(potential(bridge, LINE[:, None], eps) + 1e-300)
  exponent = -((LINE[None] - x[:, None]) ** 2) / (1 - t) + LINE[None] ** 2
  density = np.exp(exponent / 2 / eps + log_v[None])
  mean = density @ LINE / density.sum(1)
  np.testing.assert_allclose(out, (mean - x) / (1 - t), atol=1e-8)


def test_drift_at_the_end_is_the_score_of_the_potential():
  """g(x, 1) = x + eps grad log v(x); and at time 0, the plan's mean less x."""
  eps, x = 0.3, jnp.asarray(np.random.default_rng(5).normal(size=(4, 2)))
  with jax.enable_x64(True):
    bridge, x = random_bridge(), jnp.asarray(x, "float64")
    g = jax.jit(bridges.drift(bridge, eps))
    score = jax.jit(jax.grad(lambda x: bridges.log_potential(bridge, x, eps).sum()))(x)
    np.testing.assert_allclose(g(x, 1.0), x + eps * score, atol=1e-10)
    log_weights, means, _ = jax.jit(bridges.plan)(bridge, x, eps)
    mean = np.einsum("bk,bki->bi", np.exp(log_weights), means)
    np.testing.assert_allclose(g(x, 0.0), mean - x, atol=1e-10)


@pytest.mark.parametrize("eps", [1e-3, 1.0, 1e3])
def test_single_precision_keeps_to_double(eps):
  """At the worst of times and with S_k far from I: errors of the drift relative to its size."""
  bridge = random_bridge(5, 4, dtype="float32")
  bridge = bridge._replace(factors=bridge.factors - 1.5 * jnp.eye(4)[None])
  x = np.random.default_rng(6).normal(size=(7, 4)).astype(np.float32)
  times = np.float32([0, 0.01, 0.3, 0.6, 0.9, 0.999, 1])
  field = jax.jit(lambda bridge, x, t: bridges.drift(bridge, eps)(x, t))
  single = field(bridge, jnp.asarray(x), times)
  with jax.enable_x64(True):
    double = field(
      jax.tree.map(lambda leaf: jnp.asarray(leaf, "float64"), bridge),
      jnp.asarray(x, "float64"),
      jnp.asarray(times, "float64"),
    )
  assert single.dtype == jnp.float32
  single, double = np.asarray(single), np.asarray(double)
  scale = np.abs(double).max(axis=1, keepdims=True)
  np.testing.assert_array_less(np.abs(single - double) / scale, 2e-3)


def test_numbers_above_the_diagonal_are_not_read():
  bridge, x = random_bridge(dtype="float32"), jnp.ones((3, 2))
  other = bridge._replace(factors=bridge.factors + jnp.triu(jnp.ones((2, 2)), 1)[None])
  for function in map(jax.jit, (bridges.log_potential, bridges.log_normaliser)):
    np.testing.assert_array_equal(function(bridge, x, 0.5), function(other, x, 0.5))


def test_init_is_what_it_says():
  bridge = bridges.init(jax.random.key(0), 5, 3, slope=0.2)
  plan = jax.jit(bridges.plan)(bridge, jnp.zeros((1, 3)), 2.0)
  np.testing.assert_allclose(np.exp(plan.log_weights), 0.2, rtol=1e-6)
  np.testing.assert_allclose(plan.covariances[4], 0.4 * np.eye(3), rtol=1e-6)
  assert bridge.means.shape == (5, 3) and len(np.unique(bridge.means)) == 15


@pytest.mark.parametrize(
  "eps, cov, message",
  [
    (0.0, np.eye(2), "above 0"),
    (1.0, np.diag([1.0, 0.0]), "cov1"),
    (1.0, np.array([[1.0, 0.5], [0.0, 1.0]]), "symmetric"),
  ],
)
def test_gaussians_without_a_bridge_are_refused(eps, cov, message):
  with pytest.raises(ValueError, match=message):
    bridges.gaussian_bridge(np.zeros(2), np.eye(2), np.zeros(2), cov, eps)
