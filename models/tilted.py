"""Laws p(x) exp(w(x)) / Z of enumerable and Gaussian toys, exact: what steering is proved on.

In both, v(x_t) = log E[exp(w(x_0)) | x_t] is what a sampler would have to know at every step: with
it, p(x_s | x_t) exp(v(x_s) - v(x_t)) are the transitions of the tilted law. A reward r at
temperature alpha is w = r / alpha, and its soft value alpha v.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from . import precondition, schedules, toy, toy_discrete


def joint_soft_value(joint: jax.Array, log_weight: jax.Array) -> Callable[[jax.Array], jax.Array]:
  """tokens [B, L] -> v = log E[exp(w(x)) | the unmasked tokens] [B], by going through everything.

  Args:
    joint: probabilities [V] * L, V and L tiny, as `toy.joint_predictor`; token V is the mask.
    log_weight: w [V] * L; may be -inf.
  """
  vocab_size = joint.shape[0]
  outcomes = jnp.asarray(toy_discrete.sequences(vocab_size, joint.ndim))
  log_joint, log_weight = jnp.log(joint.reshape(-1)), log_weight.reshape(-1)

  def value(tokens):
    agrees = (tokens[:, None] == vocab_size) | (tokens[:, None] == outcomes[None])
    log_p = jnp.where(agrees.all(-1), log_joint[None], -jnp.inf)  # [B, V^L]
    tilted = jax.nn.logsumexp(log_p + log_weight[None], axis=-1)
    return tilted - jax.nn.logsumexp(log_p, axis=-1)

  return value


def mixture(
  prior: toy.GaussianMixture, linear: jax.Array, quadratic: float | jax.Array = 0.0
) -> tuple[toy.GaussianMixture, jax.Array]:
  """p(x) exp(a . x - b |x|^2 / 2) / Z, a mixture again, and log Z.

  With c_k = 1 + b v_k, component k has variance v_k / c_k, mean (m_k + v_k a) / c_k and, up to Z,

    log w_k + (a . m_k + v_k |a|^2 / 2 - b |m_k|^2 / 2) / c_k - D / 2 log c_k.

  -b |x - y|^2 / 2 is a = b y, up to a constant.

  Args:
    prior: p.
    linear: a [D].
    quadratic: b, such that every c_k is above 0.
  """
  weights, means, variances = prior
  shrink = 1 + quadratic * variances
  inner = jnp.sum(means * linear[None], axis=1) + variances * jnp.sum(linear**2) / 2
  gain = (inner - quadratic * jnp.sum(means**2, axis=1) / 2) / shrink
  log_weights = jnp.log(weights) + gain - means.shape[1] / 2 * jnp.log(shrink)
  moved = (means + variances[:, None] * linear[None]) / shrink[:, None]
  tilted = toy.GaussianMixture(jax.nn.softmax(log_weights), moved, variances / shrink)
  return tilted, jax.nn.logsumexp(log_weights)


def mixture_soft_value(
  prior: toy.GaussianMixture,
  linear: jax.Array,
  quadratic: float | jax.Array,
  schedule: schedules.Schedule,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """(x_t [B, D], t) -> v = log E[exp(a . x_0 - b |x_0|^2 / 2) | x_t] [B].

  By Bayes' rule v = log Z + log q_t(x_t) - log p_t(x_t), of noised tilted law and prior.
  """
  tilted, log_z = mixture(prior, linear, quadratic)

  def value(x, t):
    alpha, sigma = precondition.coefficients(schedule, x, t)
    alpha, sigma = (jnp.broadcast_to(c.reshape(-1), x.shape[:1]) for c in (alpha, sigma))

    def log_ratio(x, alpha, sigma):
      after, before = (
        toy.mixture_log_prob(toy.noised(law, alpha, sigma), x[None])[0] for law in (tilted, prior)
      )
      return after - before

    return log_z + jax.vmap(log_ratio)(x, alpha, sigma)

  return value
