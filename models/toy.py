"""Models whose laws have closed forms: what samplers are proved on."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import base, precondition, schedules

_EXACT = jax.lax.Precision.HIGHEST


class TokenCache(NamedTuple):
  """The tokens themselves."""

  length: jax.Array  # [B] int32
  tokens: jax.Array  # [B, S] int32

  def moved(self, source: jax.Array, target: jax.Array) -> "TokenCache":
    """See `base.Cache`."""
    rows = jnp.arange(source.shape[0])[:, None]
    tokens = self.tokens.at[rows, target].set(self.tokens[rows, source], mode="drop")
    return self._replace(tokens=tokens)


def from_conditionals(
  init: Callable[[jax.Array], base.Params],
  vocab_size: int,
  next_logits: Callable[[base.Params, jax.Array, jax.Array], jax.Array],
) -> base.LanguageModel:
  """The language model with log p(x_t | x_<t) = next_logits(params, tokens [S], t) up to Z.

  `next_logits` sees one row; entries of `tokens` at t and beyond are not to be read. Hidden states
  are the logits themselves, and embeddings are one-hot. Given a mask, a token's prefix is what it
  may attend to, in the order of slots; its length is the position, whatever `positions` say.
  """

  def init_cache(params, batch_size, max_length):
    del params
    return TokenCache(
      jnp.zeros(batch_size, jnp.int32), jnp.zeros((batch_size, max_length), jnp.int32)
    )

  def trunk(params, x, cache=None, *, positions=None, mask=None, key=None):
    del positions, key
    new = jnp.argmax(x, axis=-1).astype(jnp.int32)
    batch_size, length = new.shape
    held = init_cache(params, batch_size, length) if cache is None else cache
    slots = held.length[:, None] + jnp.arange(length)[None, :]
    rows = jnp.arange(batch_size)[:, None]
    tokens = held.tokens.at[rows, slots].set(new, mode="drop")
    if mask is None:
      per_position = jax.vmap(next_logits, in_axes=(None, None, 0))
      hidden = jax.vmap(per_position, in_axes=(None, 0, 0))(params, tokens, slots + 1)
    else:
      mask &= jnp.arange(tokens.shape[1])[None, None, :] <= slots[:, :, None]
      per_position = jax.vmap(_seen_logits(next_logits), in_axes=(None, None, 0))
      hidden = jax.vmap(per_position, in_axes=(None, 0, 0))(params, tokens, mask)
    return hidden, None if cache is None else TokenCache(held.length + length, tokens)

  return base.LanguageModel(
    init=lambda key, tokens: init(key),
    init_cache=init_cache,
    embed=lambda params, tokens: jax.nn.one_hot(tokens, vocab_size),
    trunk=trunk,
    readout=lambda params, hidden: hidden.astype(jnp.float32),
  )


def _seen_logits(next_logits):
  def of_seen(params, tokens, seen):
    first = jnp.argsort(~seen, stable=True)
    return next_logits(params, tokens[first], jnp.sum(seen))

  return of_seen


def table(vocab_size: int, order: int) -> base.LanguageModel:
  """p(x_t | x_<t) = softmax(params[x_(t-order), .., x_(t-1)]); tokens before the first count as 0.

  Params are logits [V] * order + [V]. With `order` at least the sequence length, it is any law.
  """

  def next_logits(params, tokens, t):
    places = t - order + jnp.arange(order)
    recent = jnp.where(places >= 0, tokens[jnp.maximum(places, 0)], 0)
    return params[tuple(recent)]

  return from_conditionals(
    lambda key: jax.random.normal(key, (vocab_size,) * (order + 1)), vocab_size, next_logits
  )


def markov(vocab_size: int) -> base.LanguageModel:
  """A Markov chain; params are log transition probabilities [V, V], from row to column."""

  def init(key):
    return jax.nn.log_softmax(jax.random.normal(key, (vocab_size, vocab_size)))

  return from_conditionals(init, vocab_size, lambda params, tokens, t: params[tokens[t - 1]])


def markov_law(transition: np.ndarray, first: int, num_tokens: int) -> np.ndarray:
  """p(x_1 .. x_n | x_0 = first) = prod_t transition[x_(t-1), x_t], [V] * n, float64."""
  law = np.asarray(transition, np.float64)[first]
  for _ in range(num_tokens - 1):
    law = law[..., None] * np.asarray(transition, np.float64)
  return law


def table_law(conditional: np.ndarray, prompt: tuple[int, ...], num_tokens: int) -> np.ndarray:
  """p(x_1 .. x_n | prompt) of a table model, by going through every continuation.

  Args:
    conditional: probabilities [V] * order + [V].
    prompt: the tokens before.
    num_tokens: n.

  Returns:
    [V] * n, float64.
  """
  order, vocab_size = conditional.ndim - 1, conditional.shape[-1]
  law = np.ones((vocab_size,) * num_tokens)
  for tokens in itertools.product(range(vocab_size), repeat=num_tokens):
    sequence = (0,) * order + tuple(prompt) + tokens
    for t in range(len(sequence) - num_tokens, len(sequence)):
      law[tokens] *= conditional[sequence[t - order : t]][sequence[t]]
  return law


class GaussianMixture(NamedTuple):
  """sum_k weights[k] N(means[k], variances[k] I) over R^D."""

  weights: jax.Array  # [K], sums to 1
  means: jax.Array  # [K, D]
  variances: jax.Array  # [K]


def kernel_density(points: jax.Array, std: float) -> GaussianMixture:
  """(1 / N) sum_n N(points[n], std^2 I) of points [N, D]: data whose law is known."""
  num = points.shape[0]
  points = jnp.asarray(points)
  full = lambda value: jnp.full(num, value, points.dtype)
  return GaussianMixture(full(1 / num), points, full(std**2))


def noised(mixture: GaussianMixture, alpha: float, sigma: float) -> GaussianMixture:
  """The law of alpha x + sigma z for x from the mixture and z ~ N(0, I)."""
  weights, means, variances = mixture
  return GaussianMixture(weights, alpha * means, alpha**2 * variances + sigma**2)


def only(mixture: GaussianMixture, kept: jax.Array) -> GaussianMixture:
  """The law of x given that its component is one of kept [K], bool; they cannot weigh 0 together.

  All K components stay, some with weight 0, so one program serves every selection.
  """
  weights = jnp.where(kept, mixture.weights, 0)
  return mixture._replace(weights=weights / jnp.sum(weights))


def of_class(mixture: GaussianMixture, labels: jax.Array, c: int | jax.Array) -> GaussianMixture:
  """The law of x given class c, where components have the classes labels [K]."""
  return only(mixture, jnp.asarray(labels) == c)


def mixture_sample(key: jax.Array, mixture: GaussianMixture, num: int) -> jax.Array:
  """Draws of the mixture, [num, D]."""
  component_key, noise_key = jax.random.split(key)
  k = jax.random.categorical(component_key, _log(mixture.weights), shape=(num,), mode="high")
  means, std = mixture.means[k], jnp.sqrt(mixture.variances[k])
  return means + std[:, None] * jax.random.normal(noise_key, means.shape, means.dtype)


def mixture_log_prob(mixture: GaussianMixture, x: jax.Array) -> jax.Array:
  """log p(x) [B] of x [B, D]."""
  one, zero = jnp.ones((1, 1), x.dtype), jnp.zeros((1, 1), x.dtype)
  return jax.nn.logsumexp(_log_joint(mixture, x, one, zero), axis=-1)


def mixture_denoiser(mixture: GaussianMixture, schedule: schedules.Schedule) -> base.Denoiser:
  """E[x_0 | x_t] for x_0 from the mixture and x_t = alpha(t) x_0 + sigma(t) z, z ~ N(0, I).

  Given component k, x_t ~ N(alpha m_k, T_k I) with T_k = alpha^2 v_k + sigma^2, so the posterior
  weights are those of a mixture and the conditional mean is linear in x_t:

    E[x_0 | x_t, k] = m_k + alpha v_k / T_k (x_t - alpha m_k) = (sigma^2 m_k + alpha v_k x_t) / T_k.

  Computed in x_t's precision. Distances come from inner products, [B, K] of them, so the exponents
  are off by some eps (|x_t|^2 + alpha^2 |m_k|^2) / T_k: where T_k is tiny, give x_t in float64.
  """

  def denoise(x, t):  # [B, D], [] or [B] -> [B, D]
    alpha, sigma = precondition.coefficients(schedule, x, t)
    _, means, variances = _as(x.dtype, mixture)
    posterior = jax.nn.softmax(_log_joint(mixture, x, alpha, sigma), axis=-1)  # [B, K]
    share = posterior / (alpha**2 * variances[None] + sigma**2)
    slope = jnp.sum(share * variances[None], axis=-1, keepdims=True)
    return sigma**2 * jnp.matmul(share, means, precision=_EXACT) + alpha * slope * x

  return denoise


def class_log_prob(
  mixture: GaussianMixture, labels: jax.Array, num_classes: int, schedule: schedules.Schedule
) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """The exact classifier of noisy data: (x_t [B, D], t) -> log p(c | x_t) [B, C].

  A class of weight 0 has log-probability -inf and gradient 0.

  Args:
    mixture: the law of x_0.
    labels: [K], the class of each component.
    num_classes: C.
    schedule: of x_t.
  """
  member = jnp.asarray(labels)[None, :] == jnp.arange(num_classes)[:, None]  # [C, K]
  member &= jnp.asarray(mixture.weights)[None, :] > 0

  def log_prob(x, t):
    joint = _log_joint(mixture, x, *precondition.coefficients(schedule, x, t))
    log_posterior = jax.nn.log_softmax(joint, axis=-1)
    within = jnp.where(member[None], log_posterior[:, None, :], -jnp.inf)
    return jax.nn.logsumexp(within, axis=-1)

  return log_prob


class FullMixture(NamedTuple):
  """sum_k weights[k] N(means[k], covariances[k]) over R^D."""

  weights: jax.Array  # [K], sums to 1
  means: jax.Array  # [K, D]
  covariances: jax.Array  # [K, D, D]


def posterior(
  mixture: GaussianMixture, operator: jax.Array, y: jax.Array, noise_std: float
) -> FullMixture:
  """The law of x given y = A x + s n, n ~ N(0, I), for x from the mixture.

  With S_k = v_k A A^T + s^2 I, component k has evidence N(y; A m_k, S_k), mean
  m_k + v_k A^T S_k^-1 (y - A m_k) and covariance v_k I - v_k^2 A^T S_k^-1 A.

  Args:
    mixture: the prior.
    operator: A [M, D].
    y: [M].
    noise_std: s; may be 0 if A has full row rank and no v_k is 0.
  """
  weights, means, variances = mixture
  gram, vectors = jnp.linalg.eigh(jnp.matmul(operator, operator.T, precision=_EXACT))
  rows = jnp.matmul(vectors.T, operator, precision=_EXACT)  # orthogonal, of squared length gram
  total = variances[:, None] * gram[None] + noise_std**2  # [K, M]: S_k in the basis of vectors
  residual = jnp.matmul(vectors.T, y, precision=_EXACT)[None]
  residual = residual - jnp.matmul(means, rows.T, precision=_EXACT)
  evidence = -0.5 * jnp.sum(jnp.square(residual) / total + jnp.log(total), axis=-1)
  gain = variances[:, None] * residual / total
  shrunk = jnp.einsum("md,km,me->kde", rows, 1 / total, rows, precision=_EXACT)
  v = variances[:, None, None]
  return FullMixture(
    jax.nn.softmax(_log(weights) + evidence),
    means + jnp.matmul(gain, rows, precision=_EXACT),
    v * jnp.eye(means.shape[1])[None] - v**2 * shrunk,
  )


def full_mixture_sample(key: jax.Array, full: FullMixture, num: int) -> jax.Array:
  """Draws of the mixture, [num, D]; covariances may be singular."""
  component_key, noise_key = jax.random.split(key)
  k = jax.random.categorical(component_key, _log(full.weights), shape=(num,), mode="high")
  variances, vectors = _principal(full)
  noise = jax.random.normal(noise_key, (num, full.means.shape[1]), full.means.dtype)
  scaled = jnp.sqrt(variances[k]) * noise
  return full.means[k] + jnp.einsum("nij,nj->ni", vectors[k], scaled, precision=_EXACT)


def full_mixture_denoiser(full: FullMixture, schedule: schedules.Schedule) -> base.Denoiser:
  """E[x_0 | x_t] for x_0 from the mixture; of a `posterior`, the exact E[x_0 | x_t, y].

  As `mixture_denoiser`, in the principal axes of each component; it makes arrays [B, K, D].
  """
  variances, vectors = _principal(full)

  def denoise(x, t):  # [B, D], [] or [B] -> [B, D]
    weights, means, v, axes = _as(x.dtype, (full.weights, full.means, variances, vectors))
    alpha, sigma = (c[..., None] for c in precondition.coefficients(schedule, x, t))
    total = alpha**2 * v[None] + sigma**2  # [B or 1, K, D]
    residual = jnp.einsum("kij,bki->bkj", axes, x[:, None] - alpha * means[None], precision=_EXACT)
    log_joint = _log(weights)[None] - 0.5 * jnp.sum(residual**2 / total + jnp.log(total), axis=-1)
    gain = jnp.einsum("kij,bkj->bki", axes, alpha * v[None] / total * residual, precision=_EXACT)
    share = jax.nn.softmax(log_joint, axis=-1)
    return jnp.sum(share[:, :, None] * (means[None] + gain), axis=1)

  return denoise


def _log_joint(mixture, x, alpha, sigma):
  """log of weights[k] N(x; alpha m_k, (alpha^2 v_k + sigma^2) I), [B, K]; alpha, sigma [B|1, 1]."""
  weights, means, variances = _as(x.dtype, mixture)
  total = alpha**2 * variances[None] + sigma**2
  inner = jnp.matmul(x, means.T, precision=_EXACT)
  square = jnp.sum(x**2, axis=-1)[:, None] + alpha**2 * jnp.sum(means**2, axis=-1)[None]
  square = square - 2 * alpha * inner
  log_scale = x.shape[1] * jnp.log(2 * np.pi * total)
  return _log(weights)[None] - 0.5 * (square / total + log_scale)


def _log(weights):
  """Logarithms, -inf of 0, with gradients that are not NaN."""
  some = weights > 0
  return jnp.where(some, jnp.log(jnp.where(some, weights, 1)), -jnp.inf)


def _principal(full):
  """Variances [K, D] along the principal axes [K, D, D] of each component."""
  variances, vectors = jnp.linalg.eigh(full.covariances)
  return jnp.maximum(variances, 0), vectors


def _as(dtype, arrays):
  return jax.tree.map(lambda a: jnp.asarray(a, dtype), arrays)


def joint_predictor(joint: jax.Array) -> base.Predictor:
  """The exact predictor of a law over sequences, p(x_i | the unmasked tokens), for every i.

  Args:
    joint: probabilities [V] * L, V and L tiny; token V is the mask.

  Returns:
    (tokens [B, L], t) -> log-probabilities [B, L, V], whatever t: that the conditionals do not
    depend on time is a property of masking. At an unmasked position, its own token has them all.
    Tokens of probability zero give NaN.
  """
  length, vocab_size = joint.ndim, joint.shape[0]
  outcomes = jnp.array(list(itertools.product(range(vocab_size), repeat=length)))  # [V^L, L]
  log_joint = jnp.log(joint.reshape(-1))
  own = jax.nn.one_hot(outcomes, vocab_size)  # [V^L, L, V]

  def predict(tokens, t):
    del t
    agrees = (tokens[:, None] == vocab_size) | (tokens[:, None] == outcomes[None])
    log_weight = jnp.where(agrees.all(-1), log_joint[None], -jnp.inf)  # [B, V^L]
    posterior = jax.nn.softmax(log_weight, axis=-1)
    return jnp.log(jnp.einsum("bo,olv->blv", posterior, own))

  return predict
