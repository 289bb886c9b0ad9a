"""Schroedinger bridges in closed form: light ones, whose potential is a Gaussian mixture.

The bridge from p0 to p1 is the law of paths nearest to sqrt(eps) times a Brownian motion (least
relative entropy) among those with x_0 ~ p0 and x_1 ~ p1. Its ends solve entropic optimal transport,
min E|x_0 - x_1|^2 / 2 + eps KL(pi || p0 x p1), between its ends it is a Brownian bridge, and

  pi(x_1 | x_0) = exp(x_0' x_1 / eps) v(x_1) / c(x_0),    c(x_0) = int exp(x_0' y / eps) v(y) dy

for one function v > 0. A light bridge takes v = sum_k a_k N(r_k, eps S_k). Then everything is in
closed form, whatever p0 is: nothing has to be simulated to train it or to draw from it.

Shapes: B rows, K components, D numbers in a point. eps is an argument and not a parameter, so that
no optimiser moves it.

Reference: Korotin, Gushchin and Burnaev 2023 (LightSB), arXiv 2310.01174.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_EXACT = jax.lax.Precision.HIGHEST


class LightBridge(NamedTuple):
  """v = sum_k a_k N(r_k, eps S_k), S_k = L_k L_k'. Any real numbers are a bridge.

  Means of x_1 given x_0 and k are r_k + S_k x_0, and k has weight a_k given x_0 = 0. Weights are
  held as eps log a_k, as in the authors' code: all exponents are then parameters over eps, and one
  learning rate serves. With log a_k itself, components are left unused where eps is small.
  """

  log_weights: jax.Array  # [K], eps log a_k; adding a number to all changes no law
  means: jax.Array  # [K, D], r_k
  factors: jax.Array  # [K, D, D], L_k below the diagonal and its logarithm on it; above, unread


class Plan(NamedTuple):
  """x_1 given x_0: sum_k weights[b, k] N(means[b, k], covariances[k])."""

  log_weights: jax.Array  # [B, K], of weights that sum to 1
  means: jax.Array  # [B, K, D]
  covariances: jax.Array  # [K, D, D]


def init(key: jax.Array, num_components: int, dim: int, *, slope: float = 0.1) -> LightBridge:
  """Equal weights, means N(0, I) and S_k = slope I; 0.1 is the paper's.

  Components far from all data are slow to move there: with data at hand, put the means at K points
  of p1, `init(...)._replace(means=points)`, as the authors do.
  """
  diagonal = jnp.diag(jnp.full(dim, 0.5 * np.log(slope)))
  means = jax.random.normal(key, (num_components, dim))
  return LightBridge(
    jnp.zeros(num_components), means, jnp.broadcast_to(diagonal[None], (num_components, dim, dim))
  )


def lower(bridge: LightBridge) -> jax.Array:
  """L_k, [K, D, D]."""
  diagonal = jnp.exp(jnp.diagonal(bridge.factors, axis1=1, axis2=2))
  return jnp.tril(bridge.factors, -1) + diagonal[:, :, None] * jnp.eye(diagonal.shape[1])[None]


def log_potential(bridge: LightBridge, x1: jax.Array, eps: float | jax.Array) -> jax.Array:
  """log v(x_1) = log sum_k a_k N(x_1; r_k, eps S_k), [B], of x1 [B, D]."""
  factor = lower(bridge)
  eye = jnp.broadcast_to(jnp.eye(x1.shape[1], dtype=factor.dtype)[None], factor.shape)
  whiten = jax.scipy.linalg.solve_triangular(factor, eye, lower=True)
  residual = x1[:, None] - bridge.means[None]
  white = jnp.einsum("kij,bkj->bki", whiten, residual, precision=_EXACT)
  log_scale = jnp.trace(bridge.factors, axis1=1, axis2=2) + 0.5 * x1.shape[1] * jnp.log(
    2 * np.pi * eps
  )
  square = jnp.sum(jnp.square(white), axis=-1) / (2 * eps)
  return jax.nn.logsumexp((bridge.log_weights / eps - log_scale)[None] - square, axis=-1)


def log_normaliser(bridge: LightBridge, x0: jax.Array, eps: float | jax.Array) -> jax.Array:
  """log c(x_0) = log sum_k a_k exp((x_0' S_k x_0 + 2 r_k' x_0) / (2 eps)), [B], of x0 [B, D]."""
  return jax.nn.logsumexp(_log_masses(bridge, x0, eps), axis=-1)


def _log_masses(bridge, x0, eps):
  """log of a_k int exp(x_0' y / eps) N(y; r_k, eps S_k) dy, [B, K]."""
  turned = jnp.einsum("kji,bj->bki", lower(bridge), x0, precision=_EXACT)
  inner = jnp.matmul(x0, bridge.means.T, precision=_EXACT)
  return (bridge.log_weights[None] + 0.5 * jnp.sum(jnp.square(turned), axis=-1) + inner) / eps


def plan(bridge: LightBridge, x0: jax.Array, eps: float | jax.Array) -> Plan:
  """The law of x_1 given x0 [B, D]: completing the square, component k has

  weight a_k exp((x_0' S_k x_0 + 2 r_k' x_0) / (2 eps)) / c, mean r_k + S_k x_0, covariance eps S_k.
  """
  factor = lower(bridge)
  turned = jnp.einsum("kji,bj->bki", factor, x0, precision=_EXACT)
  return Plan(
    jax.nn.log_softmax(_log_masses(bridge, x0, eps), axis=-1),
    bridge.means[None] + jnp.einsum("kij,bkj->bki", factor, turned, precision=_EXACT),
    eps * jnp.einsum("kij,klj->kil", factor, factor, precision=_EXACT),
  )


def plan_sample(
  key: jax.Array, bridge: LightBridge, x0: jax.Array, eps: float | jax.Array
) -> jax.Array:
  """x_1 [B, D], one draw given each of x0 [B, D], without simulating what is between."""
  component_key, noise_key = jax.random.split(key)
  k = jax.random.categorical(component_key, _log_masses(bridge, x0, eps), mode="high")
  factor = lower(bridge)[k]
  noise = jnp.sqrt(eps) * jax.random.normal(noise_key, x0.shape, x0.dtype)
  turned = jnp.einsum("bji,bj->bi", factor, x0, precision=_EXACT) + noise
  return bridge.means[k] + jnp.einsum("bij,bj->bi", factor, turned, precision=_EXACT)


def drift(
  bridge: LightBridge, eps: float | jax.Array
) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """g of the bridge's equation dx = g(x, t) dt + sqrt(eps) dW, t from 0 to 1.

  g = (E[x_1 | x_t = x] - x) / (1 - t), for between its ends the bridge is a Brownian one. The law
  of x_1 has density v(y) exp(-t |y|^2 / (2 eps (1 - t)) + x' y / (eps (1 - t))) up to a factor: a
  mixture once more, with M_k = (1 - t) I + t S_k of means M_k^-1 ((1 - t) r_k + S_k x), so that

    g(x, t) = sum_k w_k M_k^-1 (r_k + (S_k - I) x),

  which needs neither 1 / (1 - t) nor the inverse of S_k. Up to a common factor, in the principal
  axes of S_k, where s are its eigenvalues, r and x coordinates and m = 1 - t + t s,

    w_k = a_k prod m^-1/2 exp(sum (2 (1 - t) x r + (1 - t^2)(s - 1) x^2 - t (r - x)^2) / (2 eps m)).

  That is h(x, t) exp(-t |x|^2 / (2 eps)) component by component, h the solution of Kolmogorov's
  equation with g = eps grad log h. Since m is at least 1 - t, small s are not amplified.

  Returns:
    (x [B, D], t [] or [B], within 0 and 1) -> g [B, D]. S_k is decomposed when this is called, not
    at every step.

  Reference: LightSB, section 3. With A = t / (eps (1 - t)) I + (eps S_k)^-1 and
    h = x / (eps (1 - t)) + (eps S_k)^-1 r_k as there, a component's integral is that of
    exp(h' y - y' A y / 2), so h' A^-1 h / 2 enters log w_k with a positive sign, as in the authors'
    code, and not as in log N(h; 0, A).
  """
  axes, singular, _ = jnp.linalg.svd(lower(bridge))
  s, r = jnp.square(singular)[None], jnp.einsum("kij,ki->kj", axes, bridge.means, precision=_EXACT)
  r = r[None]

  def field(x, t):
    t = jnp.asarray(t, x.dtype).reshape(-1, 1, 1)
    along = jnp.einsum("kij,bi->bkj", axes, x, precision=_EXACT)
    m = 1 - t + t * s
    square = 2 * (1 - t) * along * r + (1 - t**2) * (s - 1) * along**2 - t * (r - along) ** 2
    log_weight = bridge.log_weights[None] / eps + jnp.sum(
      square / (2 * eps * m) - 0.5 * jnp.log(m), axis=-1
    )
    pull = jnp.einsum("kij,bkj->bki", axes, (r + (s - 1) * along) / m, precision=_EXACT)
    return jnp.sum(jax.nn.softmax(log_weight, axis=-1)[:, :, None] * pull, axis=1)

  return field


class GaussianBridge(NamedTuple):
  """The law of (x_0, x_1), jointly Gaussian, float64."""

  mean0: np.ndarray  # [D]
  mean1: np.ndarray  # [D]
  covariance0: np.ndarray  # [D, D]
  covariance1: np.ndarray  # [D, D]
  cross: np.ndarray  # [D, D], Cov(x_0, x_1)


def gaussian_bridge(
  mean0: np.ndarray, cov0: np.ndarray, mean1: np.ndarray, cov1: np.ndarray, eps: float
) -> GaussianBridge:
  """The ends of the bridge from N(mean0, cov0) to N(mean1, cov1), numpy, float64.

    Cov(x_0, x_1) = (cov0^1/2 D cov0^-1/2 - eps I) / 2,
    D = (4 cov0^1/2 cov1 cov0^1/2 + eps^2 I)^1/2

  With S = cov0^-1 Cov(x_0, x_1), the law of x_1 given x_0 is N(mean1 + S (x_0 - mean0), eps S): the
  second marginal is cov1 because S cov0 S + eps S = cov1. Half the difference of square roots is
  computed as 2 l / (sqrt(4 l + eps^2) + eps), which loses nothing where eps is large.

  Raises:
    ValueError: eps is not above 0; a covariance is not symmetric and positive definite.

  Reference: Janati et al. 2020, arXiv 2006.02572, theorem 1 (sigma^2 there is eps here); Bunne et
    al. 2022, arXiv 2202.05722, for the process.
  """
  mean0, cov0, mean1, cov1 = (np.asarray(a, np.float64) for a in (mean0, cov0, mean1, cov1))
  if not eps > 0:
    raise ValueError(f"eps={eps}: it has to be above 0.")
  for name, cov in (("cov0", cov0), ("cov1", cov1)):
    if not np.allclose(cov, cov.T) or np.linalg.eigvalsh(cov)[0] <= 0:
      raise ValueError(f"{name} has to be symmetric and positive definite.")
  values, vectors = np.linalg.eigh(cov0)
  root, inverse = (vectors * values**power @ vectors.T for power in (0.5, -0.5))
  squares, axes = np.linalg.eigh(root @ cov1 @ root)
  half = 2 * squares / (np.sqrt(4 * squares + eps**2) + eps)
  return GaussianBridge(mean0, mean1, cov0, cov1, root @ (axes * half @ axes.T) @ inverse)


def gaussian_marginal(joint: GaussianBridge, t: float, eps: float) -> tuple[np.ndarray, np.ndarray]:
  """The mean [D] and covariance [D, D] of x_t = (1 - t) x_0 + t x_1 + sqrt(eps t (1 - t)) z."""
  both = t * (1 - t) * (joint.cross + joint.cross.T + eps * np.eye(len(joint.mean0)))
  covariance = (1 - t) ** 2 * joint.covariance0 + t**2 * joint.covariance1 + both
  return (1 - t) * joint.mean0 + t * joint.mean1, covariance


def from_gaussian(joint: GaussianBridge) -> LightBridge:
  """The bridge of one component that has this plan: S = cov0^-1 Cov(x_0, x_1), r = m1 - S m0."""
  slope = np.linalg.solve(joint.covariance0, joint.cross)
  factor = np.linalg.cholesky((slope + slope.T) / 2)
  diagonal = np.diag(np.log(np.diag(factor)))
  return LightBridge(
    jnp.zeros(1),
    jnp.asarray(joint.mean1 - slope @ joint.mean0)[None],
    jnp.asarray(np.tril(factor, -1) + diagonal)[None],
  )
