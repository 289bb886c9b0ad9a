"""Laws of continuous tokens with densities made of Gaussians, and models of sequences of them.

What is drawn may hold more than the token: a diffusion model draws the whole path x_T, .., x_0 and
the token is x_0, because the path has a density in closed form and x_0 has not. Whoever keeps the
law of the path keeps the law of the token, its marginal.

Shapes: B rows, L positions, D numbers in a token, W hidden width, K components, T transitions.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import base

Draw = Any  # a pytree of float32 arrays


class Density(NamedTuple):
  """A law that can be drawn from and evaluated.

  Attributes:
    sample: (key) -> draw.
    log_prob: (draw) -> [], the log density at the draw.
  """

  sample: Callable[[jax.Array], Draw]
  log_prob: Callable[[Draw], jax.Array]


class ContinuousModel(NamedTuple):
  """A density over sequences of tokens in R^D, p(x) = prod_t p(x_t | x_<t).

  Slot 0 of a sequence is its start: zeros, which the model may read as it likes. The hidden state
  of a slot is what the law of the next slot's token depends on.

  Attributes:
    token_size: D.
    init: (key, tokens [B, L, D]) -> params.
    init_cache: (params, batch_size, max_length) -> base.Cache holding nothing.
    trunk: (params, tokens [B, L, D], cache=None) -> (hidden [B, L, W], cache); the tokens continue
      what the cache holds.
    law: (params, hidden [W]) -> Density, of one position.
    value: (draw) -> token [D].
  """

  token_size: int
  init: Callable[..., base.Params]
  init_cache: Callable[..., base.Cache]
  trunk: Callable[..., tuple[jax.Array, base.Cache | None]]
  law: Callable[[base.Params, jax.Array], Density]
  value: Callable[[Draw], jax.Array]


def normal_log_prob(x: jax.Array, mean: jax.Array, scale: jax.Array) -> jax.Array:
  """log N(x; mean, diag(scale^2)), summed over the last axis, whose arrays have one shape."""
  standard = (x - mean) / scale
  return -jnp.sum(0.5 * jnp.square(standard) + jnp.log(scale) + 0.5 * np.log(2 * np.pi), axis=-1)


def mixture(log_weights: jax.Array, means: jax.Array, scales: jax.Array) -> Density:
  """sum_k w_k N(x; means[k], diag(scales[k]^2)).

  Args:
    log_weights: [K], up to a constant.
    means: [K, D].
    scales: [K, D], above 0.
  """

  def sample(key):
    component_key, noise_key = jax.random.split(key)
    component = jax.random.categorical(component_key, log_weights, mode="high")
    noise = jax.random.normal(noise_key, means.shape[1:], means.dtype)
    return means[component] + scales[component] * noise

  def log_prob(x):
    of_each = normal_log_prob(jnp.broadcast_to(x[None], means.shape), means, scales)
    return jax.nn.logsumexp(jax.nn.log_softmax(log_weights) + of_each)

  return Density(sample, log_prob)


def denoising_path(
  betas: Sequence[float],
  token_size: int,
  predict_noise: Callable[[jax.Array, jax.Array], jax.Array],
) -> Density:
  """The path x_T, .., x_0 of a diffusion model's ancestral sampling, [T + 1, D].

  x_T ~ N(0, I) and x_{t-1} ~ N((x_t - beta_t / sqrt(1 - abar_t) eps(x_t, t)) / sqrt(1 - beta_t),
  beta_t I), abar_t = prod_{s <= t} (1 - beta_s). The log density is the sum over the path of the
  transitions' Gaussian log densities, from T predictions at once. The last transition is noisy
  too: without noise there would be no density. Two paths have comparable densities if their T and
  betas are the same: then the logarithm of their ratio is that of means alone.

  Args:
    betas: of t = 1, .., T, in (0, 1).
    token_size: D.
    predict_noise: (x_t [D], t - 1 []) -> [D].

  Raises:
    ValueError: a beta is outside (0, 1).

  Reference: Ho et al. 2020, arXiv 2006.11239, algorithm 2 with sigma_t^2 = beta_t.
  """
  betas = np.asarray(betas, np.float64)
  if not np.all((betas > 0) & (betas < 1)):
    raise ValueError(f"betas={betas.tolist()}: each has to be above 0 and below 1.")
  num_steps = len(betas)
  noise_share = jnp.asarray(betas / np.sqrt(1 - np.cumprod(1 - betas)), jnp.float32)
  shrinkage = jnp.asarray(np.sqrt(1 - betas), jnp.float32)
  scale = jnp.asarray(np.sqrt(betas), jnp.float32)

  def mean(x, t):
    return (x - noise_share[t] * predict_noise(x, t)) / shrinkage[t]

  def sample(key):
    start_key, path_key = jax.random.split(key)
    start = jax.random.normal(start_key, (token_size,))

    def transition(x, step):
      t, z = step
      x = mean(x, t) + scale[t] * z
      return x, x

    noise = jax.random.normal(path_key, (num_steps, token_size))
    _, path = jax.lax.scan(transition, start, (jnp.arange(num_steps), noise), reverse=True)
    return jnp.concatenate([start[None], path[::-1]])

  def log_prob(path):
    steps = jnp.arange(num_steps)[::-1]
    means = jax.vmap(mean)(path[:-1], steps)
    scales = jnp.broadcast_to(scale[steps][:, None], means.shape)
    transitions = jnp.sum(normal_log_prob(path[1:], means, scales))
    return normal_log_prob(path[0], jnp.zeros(token_size), jnp.ones(token_size)) + transitions

  return Density(sample, log_prob)


class Chain(NamedTuple):
  """x_t ~ sum_k w_k N(A x_{t-1} + b_k, diag(s_k^2)), from x_0 = 0."""

  log_weights: jax.Array  # [K], up to a constant
  transition: jax.Array  # [D, D], A
  offsets: jax.Array  # [K, D], b_k
  scales: jax.Array  # [K, D], s_k


class LengthCache(NamedTuple):
  """A chain has no memory but of its last token, which it is always given."""

  length: jax.Array  # [B] int32


def chain(token_size: int, num_components: int = 1) -> ContinuousModel:
  """A chain, its params a `Chain`; linear and Gaussian if there is one component."""

  def init(key, tokens):
    del tokens
    transition_key, offset_key = jax.random.split(key)
    shape = (num_components, token_size)
    transition = 0.5 * jax.random.normal(transition_key, (token_size, token_size))
    offsets = jax.random.normal(offset_key, shape)
    return Chain(jnp.zeros(num_components), transition, offsets, jnp.ones(shape))

  def trunk(params, tokens, cache=None):
    del params
    if cache is not None:
      cache = LengthCache(cache.length + tokens.shape[1])
    return tokens, cache

  def law(params, hidden):
    means = (params.transition @ hidden)[None, :] + params.offsets
    return mixture(params.log_weights, means, params.scales)

  return ContinuousModel(
    token_size=token_size,
    init=init,
    init_cache=lambda params, batch_size, max_length: LengthCache(jnp.zeros(batch_size, jnp.int32)),
    trunk=trunk,
    law=law,
    value=lambda draw: draw,
  )


def chain_moments(params: Chain, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
  """The mean [N, D] and the covariance [N, D, N, D] of x_1, .., x_N, float64.

  With b and C the mean and covariance of the mixture about A x: m_t = A m_{t-1} + b,
  V_t = A V_{t-1} A^T + C, and Cov(x_t, x_s) = A^(t-s) V_s for t >= s.
  """
  log_weights, a, offsets, scales = (np.asarray(leaf, np.float64) for leaf in params)
  weights = np.exp(log_weights) / np.exp(log_weights).sum()
  b = weights @ offsets
  noise = np.diag(weights @ scales**2) + (offsets - b).T @ (weights[:, None] * (offsets - b))
  size = len(a)
  mean, variance = np.zeros((num_tokens, size)), np.zeros((num_tokens, size, num_tokens, size))
  last_mean, last_variance = np.zeros(size), np.zeros((size, size))
  for s in range(num_tokens):
    mean[s] = last_mean = a @ last_mean + b
    variance[s, :, s] = last_variance = a @ last_variance @ a.T + noise
    for t in range(s + 1, num_tokens):
      variance[t, :, s] = a @ variance[t - 1, :, s]
      variance[s, :, t] = variance[t, :, s].T
  return mean, variance
