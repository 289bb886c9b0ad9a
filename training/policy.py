"""Surrogates of the policy gradient: losses of a token whose gradients are, on policy, REINFORCE's.

A `Surrogate` says what one token loses, an aggregation (`aggregation`) how tokens become one number
a row, `advantages` what a sample is worth, `importance` what corrects for another sampler:

    surrogate = functools.partial(policy.dual_clip, high=0.28)  # DAPO's clip-higher
    weight = importance.truncated_tokens(old_log_prob - sampler_log_prob, mask)
    loss, weight = aggregation.token_mean(
      weight * surrogate(log_prob, old_log_prob, advantage[:, None] * mask, mask), mask
    )

At log_prob = old_log_prob the gradient of the sum over a row is -sum_t A_t grad log pi_t for all of
them (for those with one ratio a row, where A is constant along it; for `oreal`, times its factors).
Masked tokens (mask 0) lose 0 and are not read: their log-probabilities may be anything. A ratio
that its method leaves unbounded stops at e^20, its gradient too, as in verl and OpenRLHF.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

# (log_prob, old_log_prob, advantage, mask), each [..., T] -> the loss of a token [..., T], float32
Surrogate = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]

MAX_LOG_RATIO = 20.0


def reinforce(
  log_prob: jax.Array, old_log_prob: jax.Array, advantage: jax.Array, mask: jax.Array
) -> jax.Array:
  """-A log pi. Its gradient is right on policy only; `old_log_prob` is not read.

  Reference: Williams 1992, "Simple statistical gradient-following algorithms".
  """
  del old_log_prob
  log_prob, advantage = _kept(mask, log_prob, advantage)
  return -advantage * log_prob


def ppo_clip(
  log_prob: jax.Array,
  old_log_prob: jax.Array,
  advantage: jax.Array,
  mask: jax.Array,
  *,
  low: float = 0.2,
  high: float = 0.2,
) -> jax.Array:
  """-min(r A, clip(r, 1 - low, 1 + high) A), r = pi / pi_old.

  It is -A min(r, 1 + high) where A > 0 and -A max(r, 1 - low) where A < 0: a token that has moved
  far enough the way its advantage says has no gradient. (EasyDeL 0.3.0 has max for min where A < 0,
  which stops those that have moved the other way.) Clip-higher (DAPO, arXiv 2503.14476) is
  high=0.28.

  Reference: Schulman et al. 2017, arXiv 1707.06347.
  """
  return dual_clip(
    log_prob, old_log_prob, advantage, mask, low=low, high=high, most=math.exp(MAX_LOG_RATIO)
  )


def dual_clip(
  log_prob: jax.Array,
  old_log_prob: jax.Array,
  advantage: jax.Array,
  mask: jax.Array,
  *,
  low: float = 0.2,
  high: float = 0.2,
  most: float = 3.0,
) -> jax.Array:
  """`ppo_clip` whose ratio also stops at `most` (> 1) where A < 0: the loss is at most -A `most`.

  Otherwise one token that has become e^5 times likelier, against its advantage, is all the batch.

  Reference: Ye et al. 2019, arXiv 1912.09729.
  """
  log_prob, old_log_prob, advantage = _kept(mask, log_prob, old_log_prob, advantage)
  return -advantage * _clipped(log_prob - old_log_prob, advantage, low, high, most)


def gspo(
  log_prob: jax.Array,
  old_log_prob: jax.Array,
  advantage: jax.Array,
  mask: jax.Array,
  *,
  low: float = 3e-4,
  high: float = 4e-4,
) -> jax.Array:
  """`ppo_clip` with one ratio a row, s = exp(mean_t log r_t), which each of its tokens loses.

  Its mean over a row (`aggregation.sequence_mean`) is the loss of the paper. The mean of log-ratios
  is 1 / T of the sequence's, hence clipping ranges a thousand times smaller than a token's.

  Reference: Zheng et al. 2025, arXiv 2507.18071.
  """
  log_prob, old_log_prob, advantage = _kept(mask, log_prob, old_log_prob, advantage)
  log_ratio = _row_mean(log_prob - old_log_prob, mask)
  return -advantage * _clipped(log_ratio, advantage, low, high, math.exp(MAX_LOG_RATIO))


def gspo_token(
  log_prob: jax.Array,
  old_log_prob: jax.Array,
  advantage: jax.Array,
  mask: jax.Array,
  *,
  low: float = 3e-4,
  high: float = 4e-4,
) -> jax.Array:
  """`gspo` with the gradient s A grad log pi_t at each token: the value of s, the slope of its own.

  The ratio is stop_gradient(s) pi / stop_gradient(pi). Where A is constant along a row, a row's
  gradient is `gspo`'s; where it is not, this is the one that credits tokens. It is what verl calls
  "gspo".

  Reference: Zheng et al. 2025, arXiv 2507.18071.
  """
  log_prob, old_log_prob, advantage = _kept(mask, log_prob, old_log_prob, advantage)
  log_ratio = jax.lax.stop_gradient(_row_mean(log_prob - old_log_prob, mask))
  log_ratio += log_prob - jax.lax.stop_gradient(log_prob)
  return -advantage * _clipped(log_ratio, advantage, low, high, math.exp(MAX_LOG_RATIO))


def cispo(
  log_prob: jax.Array,
  old_log_prob: jax.Array,
  advantage: jax.Array,
  mask: jax.Array,
  *,
  least: float = 0.0,
  most: float = 5.0,
) -> jax.Array:
  """-stop_gradient(clip(r, least, most)) A log pi: clipped weights, every token keeps a gradient.

  Without the stop_gradient (EasyDeL 0.3.0) the value is the same and the gradient at r = 1 is
  -A (1 + log pi): of the wrong sign wherever pi < 1 / e.

  `least` and `most` bound the ratio itself, as in TRL; verl's are 1 - low and 1 + high.

  Reference: MiniMax 2025, arXiv 2506.13585; most = 5 from Khatri et al. 2025, arXiv 2510.13786.
  """
  log_prob, old_log_prob, advantage = _kept(mask, log_prob, old_log_prob, advantage)
  ratio = jnp.maximum(jnp.exp(jnp.minimum(log_prob - old_log_prob, math.log(most))), least)
  return -jax.lax.stop_gradient(ratio) * advantage * log_prob


def sapo(
  log_prob: jax.Array,
  old_log_prob: jax.Array,
  advantage: jax.Array,
  mask: jax.Array,
  *,
  positive: float = 1.0,
  negative: float = 1.05,
) -> jax.Array:
  """-A (4 / tau) sigmoid(tau (r - 1)): a soft trust region in place of a clip.

  The weight of a token's gradient is 4 s (1 - s) r, s the sigmoid: 1 at r = 1, falling either way.
  tau is `positive` where A > 0 and else `negative`, which is larger, to be quicker to let go.

  Reference: Gao et al. 2025, arXiv 2511.20347.
  """
  log_prob, old_log_prob, advantage = _kept(mask, log_prob, old_log_prob, advantage)
  tau = jnp.where(advantage > 0, positive, negative)
  return -advantage * jax.nn.sigmoid(tau * (_ratio(log_prob - old_log_prob) - 1)) * 4 / tau


def gmpo(
  log_prob: jax.Array,
  old_log_prob: jax.Array,
  advantage: jax.Array,
  mask: jax.Array,
  *,
  low: float = 0.4,
  high: float = 0.4,
) -> jax.Array:
  """-A exp(mean_t log r_t), each log-ratio clipped first; one ratio a row, which each token loses.

  Log-ratios stop at `high` where A > 0 and at -`low` where A < 0: ratios at e^0.4 and e^-0.4. Its
  mean over a row is the loss of the paper, whose A is constant along a row.

  Reference: Zhao et al. 2025, arXiv 2507.20673.
  """
  log_prob, old_log_prob, advantage = _kept(mask, log_prob, old_log_prob, advantage)
  log_ratio = log_prob - old_log_prob
  clipped = jnp.where(advantage < 0, jnp.maximum(log_ratio, -low), jnp.minimum(log_ratio, high))
  return -advantage * _ratio(_row_mean(clipped, mask))


def oreal(
  log_prob: jax.Array,
  old_log_prob: jax.Array,
  advantage: jax.Array,
  mask: jax.Array,
  *,
  positive: float = 1.0,
  negative: float = 0.5,
) -> jax.Array:
  """-`positive` A log pi where A > 0 (cloned), -`negative` A r else (reweighted), unclipped.

  On policy the gradient is REINFORCE's with advantages `positive` A and `negative` A. This follows
  the authors' code, whose advantage is `advantages.leave_one_out`'s; weights of tokens, theirs from
  a reward model of tokens, belong into `advantage` here.

  Reference: Lyu et al. 2025, arXiv 2502.06781.
  """
  log_prob, old_log_prob, advantage = _kept(mask, log_prob, old_log_prob, advantage)
  cloned = positive * advantage * log_prob
  return -jnp.where(advantage > 0, cloned, negative * advantage * _ratio(log_prob - old_log_prob))


def dro(
  log_prob: jax.Array,
  old_log_prob: jax.Array,
  advantage: jax.Array,
  mask: jax.Array,
  *,
  beta: float = 0.1,
) -> jax.Array:
  """-A log pi + beta / 2 (log r)^2: a quadratic penalty in place of a clip.

  It is least at log r = A / beta, the KL-regularised optimum. Log-ratios are not bounded here.

  Reference: Richemond et al. 2024, arXiv 2405.19107.
  """
  log_prob, old_log_prob, advantage = _kept(mask, log_prob, old_log_prob, advantage)
  return -advantage * log_prob + beta / 2 * jnp.square(log_prob - old_log_prob)


def clip_fraction(
  log_prob: jax.Array,
  old_log_prob: jax.Array,
  advantage: jax.Array,
  mask: jax.Array,
  *,
  low: float = 0.2,
  high: float = 0.2,
) -> jax.Array:
  """1 at tokens that `ppo_clip` leaves without a gradient, [..., T]; the mean is the fraction."""
  log_prob, old_log_prob, advantage = _kept(mask, log_prob, old_log_prob, advantage)
  ratio = _ratio(log_prob - old_log_prob)
  clipped = (advantage > 0) & (ratio > 1 + high) | (advantage < 0) & (ratio < 1 - low)
  return clipped.astype(jnp.float32)


def entropy(logits: jax.Array) -> jax.Array:
  """-sum p log p, in nats, [...] of logits [..., V]; a logit of -inf is p = 0, and no gradient."""
  return entropy_of_law(jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1))


def entropy_of_law(log_p: jax.Array) -> jax.Array:
  """The same of log-probabilities [..., V], which are not normalised again."""
  possible = log_p > -jnp.inf
  log_p = jnp.where(possible, log_p, 0)
  return -jnp.sum(jnp.where(possible, jnp.exp(log_p) * log_p, 0), axis=-1)


def top_entropy(entropy: jax.Array, mask: jax.Array, *, share: float = 0.2) -> jax.Array:
  """Which tokens are among the `share` of highest entropy, of all kept tokens of the batch.

  A batch statistic: the quantile (interpolated linearly) is of all leading dimensions together.
  Multiply the loss by it, not the mask that normalises: the other tokens stay in the denominator.

  Returns:
    bool, of the shape of `entropy`; False at masked tokens.

  Reference: Wang et al. 2025, "Beyond the 80/20 rule", arXiv 2506.01939.
  """
  kept = mask != 0
  threshold = jnp.nanquantile(jnp.where(kept, entropy.astype(jnp.float32), jnp.nan), 1 - share)
  return kept & (entropy >= threshold)


def top_covariance(
  log_prob: jax.Array, advantage: jax.Array, mask: jax.Array, *, share: float = 2e-4
) -> jax.Array:
  """Which tokens most lower the entropy: the top `share`, at least one, by centred log pi times A.

  A batch statistic, as `top_entropy`. KL-Cov adds coefficient |log r| to the loss of those tokens
  (where it clips nothing); ties at the threshold are all in.

  Returns:
    bool, [..., T].

  Reference: Cui et al. 2025, arXiv 2505.22617.
  """
  kept = mask != 0
  log_prob, advantage = _kept(mask, log_prob, advantage)
  count = jnp.maximum(jnp.sum(kept), 1)
  centred = [x - jnp.sum(x) / count for x in (log_prob, advantage)]
  covariance = jnp.where(kept, centred[0] * centred[1], -jnp.inf)
  index = jnp.maximum((count * share).astype(jnp.int32), 1) - 1
  return kept & (covariance >= -jnp.sort(-covariance, axis=None)[index])


def _kept(mask, *arrays):
  return [jnp.where(mask != 0, x.astype(jnp.float32), 0) for x in arrays]


def _row_mean(x, mask):
  """The mean over a row's kept tokens, at each of its T; x is 0 at the others."""
  count = jnp.sum(mask != 0, axis=-1, keepdims=True)
  return jnp.broadcast_to(jnp.sum(x, axis=-1, keepdims=True) / jnp.maximum(count, 1), x.shape)


def _ratio(log_ratio):
  return jnp.exp(jnp.minimum(log_ratio, MAX_LOG_RATIO))


def _clipped(log_ratio, advantage, low, high, most):
  """min(r, 1 + high), or where A < 0 min(max(r, 1 - low), most), bounded before the exponential."""
  negative = advantage < 0
  lowest = jnp.where(negative, math.log1p(-low) if low < 1 else -jnp.inf, -jnp.inf)
  return jnp.exp(jnp.clip(log_ratio, lowest, jnp.where(negative, math.log(most), math.log1p(high))))
