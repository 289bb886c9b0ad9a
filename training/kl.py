"""Estimators of KL(pi || reference) from log-probabilities of what pi drew, and their gradients.

With d = log pi - log reference at a sample of pi, means over samples are

            value                      gradient of the estimator
    k1      KL(pi || ref)              0
    k2      KL(pi || ref) + O(d^3)     grad KL(pi || ref)
    k3      KL(pi || ref)              grad KL(ref || pi)

because an estimator does not see that pi also decides what is drawn. As a loss take k2, or
`straight_through(k3, k2)` to report the KL as well; off policy `importance_weighted(k3)`. As a part
of the reward take k1 or k3. At masked tokens log-probabilities have to be finite (0, say).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from . import policy

# (log_prob, reference_log_prob), each [..., T] -> [..., T], float32
Estimator = Callable[[jax.Array, jax.Array], jax.Array]


def k1(log_prob: jax.Array, reference_log_prob: jax.Array) -> jax.Array:
  """d: unbiased, of high variance and either sign; as a loss it is noise with mean 0."""
  return log_prob.astype(jnp.float32) - reference_log_prob.astype(jnp.float32)


def k2(log_prob: jax.Array, reference_log_prob: jax.Array) -> jax.Array:
  """d^2 / 2: biased, and its gradient d grad log pi is that of KL(pi || reference), unbiased.

  Reference: Schulman 2020, "Approximating KL divergence".
  """
  return 0.5 * jnp.square(k1(log_prob, reference_log_prob))


def k3(log_prob: jax.Array, reference_log_prob: jax.Array) -> jax.Array:
  """e^-d - 1 + d: unbiased and never negative; its gradient is that of KL(reference || pi).

  -d stops at 20, beyond which the gradient is 0. (verl 0.9.1 also stops the value at 10, and so has
  no gradient from -d = 2.6 on: at tokens that the reference likes 13 times better, or more.)

  Reference: Schulman 2020, "Approximating KL divergence"; the loss of GRPO, arXiv 2402.03300.
  """
  log_ratio = jnp.minimum(-k1(log_prob, reference_log_prob), policy.MAX_LOG_RATIO)
  return jnp.expm1(log_ratio) - log_ratio


def straight_through(value: Estimator, gradient: Estimator) -> Estimator:
  """The value of one estimator with the gradient of another; verl's "k3+" is (k3, k2)."""

  def estimate(log_prob, reference_log_prob):
    slope = gradient(log_prob, reference_log_prob)
    return slope + jax.lax.stop_gradient(value(log_prob, reference_log_prob) - slope)

  return estimate


def importance_weighted(
  estimator: Estimator,
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
  """(log_prob, reference_log_prob, old_log_prob) -> pi / pi_old times the estimator.

  The gradient goes through the ratio, which is how pi decides what is drawn. So for samples of
  pi_old the mean is that of pi and its gradient is the gradient of that mean: of `k1` and `k3`, of
  KL(pi || reference) itself, on and off policy. Ratios stop at e^20.

  Reference: DeepSeek-AI 2025 (V3.2), arXiv 2512.02556; TRL's `use_bias_correction_kl`.
  """

  def estimate(log_prob, reference_log_prob, old_log_prob):
    ratio = jnp.exp(jnp.minimum(k1(log_prob, old_log_prob), policy.MAX_LOG_RATIO))
    return ratio * estimator(log_prob, reference_log_prob)

  return estimate
