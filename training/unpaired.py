"""Losses of single responses that are marked good or bad, without pairs.

An example is its log-ratio x = log pi(y | x) - log pi_ref(y | x) and whether it is `desirable`:

  kl = unpaired.kto_kl(mismatched_ratios, weight)    # of the whole batch, no gradient
  unpaired.kto(ratios, desirable, kl)

What the batch decides (`kto_kl`, `bco_shift`) is an argument, made by a function of the batch [B].
"""

import jax
import jax.numpy as jnp

from . import preference


def kto(
  log_ratio: jax.Array,
  desirable: jax.Array,
  kl: jax.Array | float,
  *,
  beta: float = 0.1,
  desirable_weight: float = 1.0,
  undesirable_weight: float = 1.0,
) -> jax.Array:
  """sigmoid(-beta (x - kl)) of a good response, sigmoid(beta (x - kl)) of a bad one, [...].

  A value function around the reference point kl: examples far from it on either side weigh little.

  Args:
    log_ratio: x [...].
    desirable: [...], bool.
    kl: the reference point, [] or [...]: `kto_kl`.
    beta: slope.
    desirable_weight: of good responses.
    undesirable_weight: of bad ones; to be balanced where one kind is rarer.

  Reference: Ethayarajh et al. 2024, arXiv 2402.01306, eq. 7.
  """
  above = beta * (log_ratio.astype(jnp.float32) - kl)
  good, bad = desirable_weight * jax.nn.sigmoid(-above), undesirable_weight * jax.nn.sigmoid(above)
  return jnp.where(desirable, good, bad)


def kto_kl(log_ratio: jax.Array, weight: jax.Array) -> jax.Array:
  """max(0, mean log-ratio), [], without gradient: an estimate of KL(pi || pi_ref).

  The ratios are of responses put to prompts they do not answer (a batch's shifted by one), which is
  cheap and biased; below 0 it could not be a divergence.

  Args:
    log_ratio: [B], of mismatched prompts and responses.
    weight: [B], 0 where there is none.

  Reference: Ethayarajh et al. 2024, arXiv 2402.01306.
  """
  return jax.lax.stop_gradient(jnp.maximum(_mean(log_ratio, weight), 0))


def apo_zero(log_ratio: jax.Array, desirable: jax.Array, *, beta: float = 0.1) -> jax.Array:
  """`kto` around 0, [...]: both parts of `preference.apo_zero`, one at a time.

  Reference: D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7; TRL's apo_zero_unpaired.
  """
  return kto(log_ratio, desirable, 0.0, beta=beta)


def bco(
  log_ratio: jax.Array, desirable: jax.Array, shift: jax.Array | float, *, beta: float = 0.1
) -> jax.Array:
  """-log sigmoid(z) of a good response, -log sigmoid(-z) of a bad one, z = beta x - shift, [...].

  The logit of a classifier that tells good from bad is a reward. Where prompts of the two kinds
  differ, the paper weighs bad ones by the density ratio of their prompts: multiply the loss by it.

  Args:
    log_ratio: x [...].
    desirable: [...], bool.
    shift: [] or [...], a running mean of `bco_shift`.
    beta: of the reward beta x.

  Reference: Jung et al. 2024, arXiv 2404.04656.
  """
  above = beta * log_ratio.astype(jnp.float32) - shift
  return jax.nn.softplus(jnp.where(desirable, -above, above))


def bco_shift(
  log_ratio: jax.Array, desirable: jax.Array, weight: jax.Array, *, beta: float = 0.1
) -> jax.Array:
  """beta times the mean of the mean log-ratios of good and of bad responses, [], without gradient.

  Halfway between the two kinds, however many there are of each; the mean of the one kind where a
  batch has one only. TRL 0.24 averages all responses, which is the same for as many of each.

  Args:
    log_ratio: [B].
    desirable: [B], bool.
    weight: [B], 0 where there is none.

  Reference: Jung et al. 2024, arXiv 2404.04656.
  """
  kinds = (jnp.where(desirable, weight, 0), jnp.where(desirable, 0, weight))
  means = jnp.stack([_mean(log_ratio, kind) for kind in kinds])
  present = jnp.stack([jnp.sum(kind) > 0 for kind in kinds])
  return jax.lax.stop_gradient(beta * _mean(means, present))


def aot(
  chosen: jax.Array, rejected: jax.Array, *, loss: preference.PairLoss = preference.dpo
) -> jax.Array:
  """The loss of quantile against quantile of good and bad responses, [max(N, M)].

  Good responses' law of log-ratios is to dominate the bad ones'. With as many of each, the i-th
  smallest meets the i-th smallest; otherwise both quantile functions, linear between the levels
  (i - 1/2) / N, are read at the longer one's levels.

  Args:
    chosen: ratios of good responses [N].
    rejected: of bad ones [M].
    loss: of a quantile.

  Reference: Melnyk et al. 2024, arXiv 2406.05882, the unpaired variant: TRL 1.16's aot_unpaired,
    which 0.24 calls aot_pair. Theirs takes N = M only.
  """
  levels = _levels(max(chosen.shape[0], rejected.shape[0]))
  quantile = lambda x: jnp.interp(levels, _levels(x.shape[0]), jnp.sort(x.astype(jnp.float32)))
  return loss(quantile(chosen), quantile(rejected))


def _levels(count: int) -> jax.Array:
  return (jnp.arange(count) + 0.5) / count


def _mean(values: jax.Array, weight: jax.Array) -> jax.Array:
  weight = weight.astype(jnp.float32)
  total = jnp.sum(jnp.where(weight != 0, values.astype(jnp.float32), 0) * weight)
  count = jnp.sum(weight)
  return total / jnp.where(count != 0, count, 1)
