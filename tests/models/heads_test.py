"""Densities and heads against scipy, quadrature and explicit joint Gaussians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ancestral.models import gaussian, heads, transformer

NUM = 20_000
BETAS = (0.1, 0.3, 0.6)


def draws(density, num=NUM, seed=0):
  keys = jax.random.split(jax.random.key(seed), num)
  return np.asarray(jax.jit(jax.vmap(density.sample))(keys), np.float64)


def test_a_mixtures_density_is_scipys_and_its_draws_follow_it():
  rng = np.random.default_rng(0)
  weights, means = np.array([0.2, 0.5, 0.3]), rng.normal(size=(3, 2))
  scales = rng.uniform(0.2, 1.5, size=(3, 2))
  unnormalised = jnp.asarray(np.log(weights) + 3, jnp.float32)
  law = gaussian.mixture(
    unnormalised, jnp.asarray(means, jnp.float32), jnp.asarray(scales, jnp.float32)
  )
  points = rng.normal(size=(50, 2)) * 2
  expected = sum(
    w * stats.multivariate_normal(m, np.diag(s**2)).pdf(points)
    for w, m, s in zip(weights, means, scales, strict=True)
  )
  actual = jax.vmap(law.log_prob)(jnp.asarray(points, jnp.float32))
  np.testing.assert_allclose(actual, np.log(expected), atol=1e-4)
  samples = draws(law)
  for d in range(2):
    cdf = lambda x, d=d: sum(
      w * stats.norm.cdf(x, m[d], s[d]) for w, m, s in zip(weights, means, scales, strict=True)
    )
    assert stats.kstest(samples[:, d], cdf).statistic < 1.95 / NUM**0.5  # once in a thousand
  mean = weights @ means
  covariance = np.einsum("k,ki,kj->ij", weights, means - mean, means - mean)
  covariance += np.diag(weights @ scales**2)
  np.testing.assert_allclose(np.cov(samples.T), covariance, atol=0.06)


def linear_noise(seed):
  """eps(x, t) = C_t x + e_t, as a function and as arrays [T, 2, 2] and [T, 2]."""
  rng = np.random.default_rng(seed)
  matrices, shifts = rng.normal(size=(3, 2, 2)) * 0.5, rng.normal(size=(3, 2))
  c, e = (jnp.asarray(leaf, jnp.float32) for leaf in (matrices, shifts))
  return lambda x, t: c[t] @ x + e[t], matrices, shifts


def joint_path(matrices, shifts):
  """Mean [8] and covariance [8, 8] of the path x_3, x_2, x_1, x_0 as one linear map of noise."""
  mean, root = np.zeros((4, 2)), np.zeros((4, 2, 4, 2))  # x_i = mean_i + sum_j root_ij z_j
  root[0, :, 0] = np.eye(2)
  kept = np.cumprod(1 - np.array(BETAS))
  for i, t in enumerate((2, 1, 0)):
    matrix = np.eye(2) - BETAS[t] / np.sqrt(1 - kept[t]) * matrices[t]
    matrix /= np.sqrt(1 - BETAS[t])
    shift = -BETAS[t] / np.sqrt(1 - kept[t]) * shifts[t] / np.sqrt(1 - BETAS[t])
    mean[i + 1] = matrix @ mean[i] + shift
    root[i + 1] = np.einsum("ab,bjc->ajc", matrix, root[i])
    root[i + 1, :, i + 1] += np.sqrt(BETAS[t]) * np.eye(2)
  flat = root.reshape(8, 8)
  return mean.reshape(8), flat @ flat.T


def test_a_denoising_path_is_the_joint_gaussian_of_its_transitions():
  noise, matrices, shifts = linear_noise(0)
  law = gaussian.denoising_path(BETAS, 2, noise)
  mean, covariance = joint_path(matrices, shifts)
  samples = draws(law).reshape(NUM, 8)
  error = np.sqrt(np.diag(covariance) / NUM)
  assert np.max(np.abs(samples.mean(axis=0) - mean) / error) <= 4
  products = (samples - mean)[:, :, None] * (samples - mean)[:, None, :]
  off = np.abs(products.mean(axis=0) - covariance) / (products.std(axis=0) / NUM**0.5)
  assert off.max() <= 4
  paths = samples[:100].reshape(100, 4, 2)
  actual = jax.vmap(law.log_prob)(jnp.asarray(paths, jnp.float32))
  expected = stats.multivariate_normal(mean, covariance).logpdf(samples[:100])
  np.testing.assert_allclose(actual, expected, atol=1e-3)


def test_the_true_noise_of_a_normal_law_denoises_to_it():
  """Of x_0 ~ N(0, 1), E[eps | x_t] = sqrt(1 - abar_t) x_t, and x_0 comes out N(0, 1)."""
  kept = np.cumprod(1 - np.array(BETAS))
  slope = jnp.asarray(np.sqrt(1 - kept), jnp.float32)
  samples = draws(gaussian.denoising_path(BETAS, 1, lambda x, t: slope[t] * x))
  assert stats.kstest(samples[:, -1, 0], stats.norm.cdf).statistic < 1.95 / NUM**0.5


def test_betas_outside_their_range_are_refused():
  for betas in ((0.1, 0.0), (1.0, 0.2)):
    with pytest.raises(ValueError, match="above 0 and below 1"):
      gaussian.denoising_path(betas, 2, lambda x, t: x)


def test_the_moments_of_a_chain_solve_its_linear_system():
  rng = np.random.default_rng(3)
  weights, a = np.array([0.25, 0.75]), rng.normal(size=(3, 3)) * 0.5
  offsets, scales = rng.normal(size=(2, 3)), rng.uniform(0.5, 1, size=(2, 3))
  params = gaussian.Chain(np.log(weights) - 1, a, offsets, scales)
  mean, covariance = gaussian.chain_moments(params, 4)
  # (I - S) x = u, with S the transition below the diagonal and u independent of token to token.
  inverse = np.linalg.inv(np.eye(12) - np.kron(np.eye(4, k=-1), a))
  second = sum(
    w * (np.diag(s**2) + np.outer(b, b)) for w, b, s in zip(weights, offsets, scales, strict=True)
  )
  centre = weights @ offsets
  noise = np.kron(np.eye(4), second - np.outer(centre, centre))
  np.testing.assert_allclose(mean.reshape(12), inverse @ np.tile(centre, 4))
  np.testing.assert_allclose(covariance.reshape(12, 12), inverse @ noise @ inverse.T)


def test_a_chain_of_its_own_init_has_those_moments():
  model = gaussian.chain(2, 2)
  params = model.init(jax.random.key(0), jnp.zeros((1, 1, 2)))
  mean, covariance = gaussian.chain_moments(params, 1)
  hidden, _ = model.trunk(params, jnp.zeros((1, 1, 2)))
  samples = draws(model.law(params, hidden[0, 0]))
  error = np.sqrt(np.diag(covariance[0, :, 0]) / NUM)
  assert np.max(np.abs(samples.mean(axis=0) - mean[0]) / error) <= 4


def test_a_mixture_head_is_a_law_of_its_hidden_state():
  head = heads.mixture(1, 3, width=8, min_scale=0.1)
  hidden = jax.random.normal(jax.random.key(0), (2, 5))
  params = jax.jit(head.init)(jax.random.key(1), hidden[0])
  laws = [head.law(params, row) for row in hidden]
  x = jnp.linspace(-30, 30, 20_001)[:, None]
  for law in laws:
    density = np.exp(np.asarray(jax.jit(jax.vmap(law.log_prob))(x), np.float64))
    assert np.trapezoid(density, dx=60 / 20_000) == pytest.approx(1, abs=1e-4)
    cumulative = np.cumsum(density) * 60 / 20_000
    samples = draws(law, 4000)[:, 0]
    cdf = lambda value, cumulative=cumulative: np.interp(value, np.asarray(x[:, 0]), cumulative)
    assert stats.kstest(samples, cdf).statistic < 1.95 / 4000**0.5
  assert not np.allclose(laws[0].log_prob(x[0]), laws[1].log_prob(x[0]))
  np.testing.assert_array_equal(head.value(x[0]), x[0])


def test_a_mixture_heads_scales_stay_above_their_bound():
  head = heads.mixture(2, 3, width=8, min_scale=0.1)
  params = jax.jit(head.init)(jax.random.key(0), jnp.zeros(4))
  network = heads.MixtureNetwork(2, 3, 8, 0.1)
  smaller = jax.tree.map(lambda leaf: leaf - 100, params)
  assert np.all(network.apply({"params": smaller}, jnp.ones(4))[2] >= 0.1)


def test_a_diffusion_head_draws_paths_of_the_transitions_it_is_judged_by():
  head, predict_noise = heads.diffusion(2, BETAS, width=8)
  hidden = jnp.arange(4.0)
  params = jax.jit(head.init)(jax.random.key(0), hidden)
  log_prob = jax.jit(lambda hidden, path: head.law(params, hidden).log_prob(path))
  path = jax.jit(head.law(params, hidden).sample)(jax.random.key(1))
  assert path.shape == (4, 2)
  np.testing.assert_array_equal(head.value(path), path[3])
  expected = stats.norm.logpdf(path[0]).sum()
  kept = np.cumprod(1 - np.array(BETAS))
  predict_noise = jax.jit(predict_noise)
  for i, t in enumerate((2, 1, 0)):
    noise = predict_noise(params, path[i], jnp.int32(t), hidden)
    mean = (path[i] - BETAS[t] / np.sqrt(1 - kept[t]) * noise) / np.sqrt(1 - BETAS[t])
    expected += stats.norm.logpdf(path[i + 1], mean, BETAS[t] ** 0.5).sum()
  assert log_prob(hidden, path) == pytest.approx(expected, abs=1e-4)
  assert abs(float(log_prob(hidden + 1, path)) - expected) > 1e-3


def tiny(**fields):
  config = transformer.TransformerConfig(
    **{"vocab_size": 1, "max_length": 8, "num_layers": 1, "width": 16, "num_heads": 2, **fields}
  )
  return heads.transformer(config, 3, heads.mixture(3, 2, width=8))


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_a_transformer_reads_tokens_in_parts_as_at_once(positions):
  model = tiny(positions=positions)
  tokens = jax.random.normal(jax.random.key(0), (2, 6, 3))
  params = jax.jit(model.init)(jax.random.key(1), tokens)
  trunk = jax.jit(model.trunk)
  whole, _ = trunk(params, tokens)
  cache = model.init_cache(params, 2, 6)
  parts = []
  for part in (tokens[:, :3], tokens[:, 3:]):
    hidden, cache = trunk(params, part, cache)
    parts.append(hidden)
  np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=1e-5)
  np.testing.assert_array_equal(cache.length, [6, 6])


def test_a_transformer_looks_back_alone_and_not_at_the_start_slot():
  model = tiny()
  tokens = jax.random.normal(jax.random.key(0), (1, 5, 3))
  params = jax.jit(model.init)(jax.random.key(1), tokens)
  trunk = jax.jit(model.trunk)
  before, _ = trunk(params, tokens)
  for slot in range(5):
    after, _ = trunk(params, tokens.at[0, slot].add(1.0))
    changed = np.any(np.asarray(after != before), axis=(0, 2))
    expected = np.arange(5) >= slot if slot else np.zeros(5, bool)
    np.testing.assert_array_equal(changed, expected)


@pytest.mark.parametrize("fields", [{"vocab_size": 2}, {"causal": False}])
def test_a_transformer_of_another_kind_is_refused(fields):
  with pytest.raises(ValueError, match="vocabulary of 1"):
    tiny(**fields)
