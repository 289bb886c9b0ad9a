"""Preference losses without a reference model, of a pair's log-probabilities themselves.

Most take means over tokens, `length_mean` of log pi(y_t | x, y_<t), so that length is no reward:

  chosen, rejected = (reference_free.length_mean(l, mask) for l, mask in pair)
  reference_free.simpo(chosen, rejected)

All are [...], [...] -> [...] with float32 inside, and finite with their gradients.
"""

import jax
import jax.numpy as jnp

from . import divergences, preference


def length_mean(log_prob: jax.Array, mask: jax.Array) -> jax.Array:
  """sum_t m_t l_t / sum_t m_t, [...]; 0, with gradient 0, where there is no token.

  Args:
    log_prob: l [..., T]; may be -inf or NaN where masked.
    mask: m [..., T], 0 or 1, or weights.
  """
  mask = mask.astype(jnp.float32)
  count = jnp.sum(mask, axis=-1)
  total = jnp.sum(jnp.where(mask != 0, log_prob.astype(jnp.float32), 0) * mask, axis=-1)
  return total / jnp.where(count != 0, count, 1)


def simpo(
  chosen: jax.Array, rejected: jax.Array, *, beta: float = 2.0, gamma: float = 0.5
) -> jax.Array:
  """-log sigmoid(beta (w - l) - gamma), [...], of means per token w and l.

  Args:
    chosen: w [...].
    rejected: l [...].
    beta: 2 or more in the paper; TRL's default, 0.1, is `preference.dpo`'s scale.
    gamma: the margin asked for, in units of beta (w - l), which is TRL's simpo_gamma.

  Reference: Meng et al. 2024, arXiv 2405.14734.
  """
  chosen = chosen.astype(jnp.float32) - gamma / beta
  return preference.dpo(chosen, rejected, beta=beta)


def alphapo(
  chosen: jax.Array,
  rejected: jax.Array,
  *,
  alpha: float = 0.25,
  beta: float = 2.0,
  gamma: float = 0.5,
) -> jax.Array:
  """`simpo` of the rewards (1 - p^-alpha) / alpha, p = e^(mean log-probability), [...].

  alpha > 0 is steeper for unlikely responses and alpha < 0 for likely ones; it is the link
  `divergences.alpha` of another argument, and SimPO is its limit at 0.

  Reference: Gupta et al. 2025, arXiv 2501.03884; the form of the reward is TRL's.
  """
  link = lambda mean: divergences.alpha(mean, order=alpha)
  return simpo(link(chosen), link(rejected), beta=beta, gamma=gamma)


def cpo(
  chosen: jax.Array,
  rejected: jax.Array,
  nll: jax.Array,
  *,
  beta: float = 0.1,
  nll_weight: float = 1.0,
) -> jax.Array:
  """-log sigmoid(beta (w - l)) + nll_weight nll, [...]: DPO with a uniform reference, anchored.

  Args:
    chosen: w [...], log pi(y_w | x), summed over tokens.
    rejected: l [...], summed.
    nll: of the chosen response [...]: -w in the paper, its mean per token (-`length_mean`) in TRL.
    beta: of `preference.dpo`.
    nll_weight: 0 leaves the anchor out.

  Reference: Xu et al. 2024, arXiv 2401.08417, eq. 3 (the first term).
  """
  return preference.dpo(chosen, rejected, beta=beta) + nll_weight * nll.astype(jnp.float32)


def orpo(chosen: jax.Array, rejected: jax.Array, *, weight: float = 0.1) -> jax.Array:
  """-w - weight log sigmoid(log odds(w) - log odds(l)), odds = e^w / (1 - e^w), [...].

  Args:
    chosen: w [...], mean log-probability per token, which is also the likelihood learned. TRL's has
      the prompt's tokens too.
    rejected: l [...].
    weight: lambda.

  Reference: Hong et al. 2024, arXiv 2403.07691, eq. 4 and 7.
  """
  log_odds = _log_odds(chosen) - _log_odds(rejected)
  return -chosen.astype(jnp.float32) - weight * jax.nn.log_sigmoid(log_odds)


def _log_odds(log_prob: jax.Array) -> jax.Array:
  """log(p / (1 - p)), p at most 1 - 1.2e-7, which is as near 1 as float32 tells."""
  log_prob = jnp.minimum(log_prob.astype(jnp.float32), -jnp.finfo(jnp.float32).eps)
  near = log_prob > -0.6931472  # p > 1/2: 1 - p by expm1; each branch sees only what it is good for
  by_expm1 = jnp.log(-jnp.expm1(jnp.where(near, log_prob, -1.0)))
  by_log1p = jnp.log1p(-jnp.exp(jnp.where(near, -1.0, log_prob)))
  return log_prob - jnp.where(near, by_expm1, by_log1p)


def redi(chosen: jax.Array, rejected: jax.Array, *, alpha: float = 0.8) -> jax.Array:
  """-w + alpha l, [...], of means per token: learn right traces, unlearn wrong ones a little less.

  alpha = 0 learns right ones only; at 1 it is unbounded in the sum of both and tends to collapse.

  Args:
    chosen: w [...].
    rejected: l [...].
    alpha: weight of wrong traces.

  Reference: Xu et al. 2025, arXiv 2505.24850.
  """
  return alpha * rejected.astype(jnp.float32) - chosen.astype(jnp.float32)
