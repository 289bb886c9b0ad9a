"""What a sample is worth beside its peers, or a token beside what was expected.

Of a group: rewards [..., G] of G samples of one prompt -> [..., G]. A surrogate's loss takes it at
each token, `advantage[..., None] * mask`, and averages over the G samples:

    advantage = advantages.leave_one_out(rewards)  # [P, G]

Of tokens: rewards [..., T], with values or without -> [..., T]. None of these are differentiated.
Rewards are taken relative to the group's first, so that a group of equal rewards has advantages of
exactly 0: a mean of equal floats may round, and a standard deviation of 0 enlarges the rest.
"""

import math

import jax
import jax.numpy as jnp


def group_centred(rewards: jax.Array) -> jax.Array:
  """r - mean(r), [..., G]: (G - 1) / G of `leave_one_out`, so unbiased up to that factor.

  Reference: Liu et al. 2025 (Dr. GRPO), arXiv 2503.20783.
  """
  return _about(rewards, jnp.ones(rewards.shape))


def group_normalised(rewards: jax.Array, *, ddof: int = 1, epsilon: float = 1e-4) -> jax.Array:
  """(r - mean(r)) / (std(r) + epsilon), [..., G]; 0 in a group of one.

  The division makes a prompt count for more the less its samples differ: not a policy gradient of
  the mean reward.

  Args:
    rewards: [..., G].
    ddof: the variance is sum of squares / (G - ddof).
    epsilon: 1e-4 in TRL, 1e-6 in verl and Tunix, all with ddof 1; 1e-8 in OREAL's code.

  Reference: Shao et al. 2024 (GRPO), arXiv 2402.03300.
  """
  centred = _about(rewards, jnp.ones(rewards.shape))
  variance = jnp.sum(jnp.square(centred), axis=-1, keepdims=True)
  return centred / (jnp.sqrt(variance / max(rewards.shape[-1] - ddof, 1)) + epsilon)


def leave_one_out(rewards: jax.Array) -> jax.Array:
  """r_i - mean of the other r_j, [..., G]. Unbiased: the baseline does not depend on sample i.

  Raises:
    ValueError: a group of one has no others.

  Reference: Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!"; Ahmadian et al.
    2024, arXiv 2402.14740.
  """
  group = rewards.shape[-1]
  if group < 2:
    raise ValueError(f"A group needs two samples or more, not {group}.")
  return _about(rewards, jnp.ones(rewards.shape)) * (group / (group - 1))


def failures_leave_one_out(rewards: jax.Array, failed: jax.Array) -> jax.Array:
  """r_i - mean of r_j over the other samples j that failed, [..., G]; r_i where no other did.

  Unbiased, as `leave_one_out` is. A success keeps its whole margin over failures however many
  succeed, so successes are cloned with one weight, and failures are compared with failures: with
  `policy.oreal`. Where every failure has one reward, their advantage is 0 (but for a lone one's);
  it is meant for graded failures, of format or of partial credit.

  Args:
    rewards: [..., G].
    failed: bool [..., G].
  """
  rewards = rewards.astype(jnp.float32)
  base = rewards[..., :1]
  rewards -= base  # exact for equal rewards
  failed = failed.astype(jnp.float32)
  others = jnp.sum(failed, axis=-1, keepdims=True) - failed
  total = jnp.sum(failed * rewards, axis=-1, keepdims=True) - failed * rewards
  return jnp.where(others > 0, rewards - total / jnp.maximum(others, 1), rewards + base)


def greedy_baseline(rewards: jax.Array, greedy_reward: jax.Array) -> jax.Array:
  """r - r(greedy), [..., G] of `greedy_reward` [...]: the reward of decoding without sampling.

  Reference: Li et al. 2023 (ReMax), arXiv 2310.10505.
  """
  return rewards.astype(jnp.float32) - greedy_reward.astype(jnp.float32)[..., None]


def optimal_baseline(rewards: jax.Array, squared_norm: jax.Array) -> jax.Array:
  """r - sum(w r) / sum(w), [..., G], w = `squared_norm` of each sample's grad log pi.

  b = E[w r] / E[w] minimises the variance E[w (r - b)^2] of the gradient. OPO takes w to be the
  length [..., G], which it is in proportion where tokens' gradients are orthogonal and alike. The
  baseline contains sample i, so it is biased by O(1 / G).

  Reference: Hao et al. 2025 (OPO), arXiv 2505.23585.
  """
  return _about(rewards, squared_norm.astype(jnp.float32))


def pass_at_k(rewards: jax.Array, *, k: int) -> jax.Array:
  """What sample i adds to the best of k, [..., G]: the policy gradient of E[max of k rewards].

    A_i = k E_J [max(r_i, max_J r) - max_J r],   J: k - 1 of the other G - 1, each set alike.

  The mean over samples of A_i grad log pi_i is unbiased, since max_J does not depend on sample i.
  Of rewards 0 and 1, with f failures among the others, A_i = r_i k C(f, k - 1) / C(G - 1, k - 1): a
  success counts k times the (leave-one-out) chance that k - 1 others fail. At k = G only the best
  has any, G (r_1st - r_2nd), which is verl's "grpo_passk" (arXiv 2503.19595) times G.

  In order of rewards, the set J has its maximum at rank m (from 0) with probability
  C(m, k - 2) / C(G - 1, k - 1), for every m below sample i.

  Raises:
    ValueError: k is not within 2 .. G.

  Reference: Walder and Karkhanis 2025 (PKPO), arXiv 2505.15201, the estimator whose baseline leaves
    one out of each set of k.
  """
  group = rewards.shape[-1]
  if not 2 <= k <= group:
    raise ValueError(f"{k=} is not within 2 .. {group}, the number of samples.")
  rewards = rewards.astype(jnp.float32)
  sets = math.comb(group - 1, k - 1)
  share = jnp.asarray([k * math.comb(m, k - 2) / sets for m in range(group)], jnp.float32)
  rank = jnp.argsort(jnp.argsort(rewards, axis=-1), axis=-1)
  margin = jnp.maximum(rewards[..., :, None] - rewards[..., None, :], 0)
  return jnp.sum(margin * share[rank][..., None, :], axis=-1)


def soft_value(rewards: jax.Array, *, beta: float) -> jax.Array:
  """V = beta log mean exp(r / beta), [...] of [..., G]: the value of the KL-regularised optimum.

  With samples of the reference, A*-PO regresses beta_2 log(pi / reference) on r - V.

  Reference: Brantley et al. 2025 (A*-PO), arXiv 2505.20686.
  """
  scaled = rewards.astype(jnp.float32) / beta
  return beta * (jax.nn.logsumexp(scaled, axis=-1) - math.log(rewards.shape[-1]))


def batch_whitened(values: jax.Array, mask: jax.Array, *, epsilon: float = 1e-8) -> jax.Array:
  """(x - mean) / sqrt(variance + epsilon) over everything kept, in all dimensions; else 0.

  A batch statistic: take it of the whole batch of rollouts, before it is split. The variance has
  ddof 1, as verl's. Of equal values, or one, it is 0.

  Args:
    values: [...].
    mask: [...], 0 where values are not read.
    epsilon: verl's.
  """
  kept = mask != 0
  values = jnp.where(kept, values.astype(jnp.float32), 0)
  count = jnp.sum(kept)
  first = values.reshape(-1)[jnp.argmax(kept.reshape(-1))]
  values = jnp.where(kept, values - first, 0)
  values = jnp.where(kept, values - jnp.sum(values) / jnp.maximum(count, 1), 0)
  variance = jnp.sum(jnp.square(values)) / jnp.maximum(count - 1, 1)
  return values * jax.lax.rsqrt(variance + epsilon)


def reinforce_plus_plus(
  rewards: jax.Array, mask: jax.Array, *, gamma: float = 1.0, epsilon: float = 1e-8
) -> jax.Array:
  """Returns to go of each token, whitened over the whole batch, [B, T]. A batch statistic.

  A KL penalty belongs into the rewards of tokens, -beta `kl.k1`.

  Args:
    rewards: [B, T].
    mask: [B, T]; masked tokens are stepped over, their rewards not read.
    gamma: discount.
    epsilon: see `batch_whitened`.

  Reference: Hu et al. 2025 (REINFORCE++), arXiv 2501.03262.
  """
  values = jnp.zeros((*rewards.shape[:-1], rewards.shape[-1] + 1))
  returns = gae(rewards, values, mask, gamma=gamma, lam=1.0)
  return batch_whitened(returns, mask, epsilon=epsilon)


def gae(
  rewards: jax.Array,
  values: jax.Array,
  mask: jax.Array,
  *,
  gamma: float = 1.0,
  lam: float = 0.95,
) -> jax.Array:
  """Generalised advantage estimation, [..., T].

    A_t = delta_t + gamma lam A_(t+1),   delta_t = r_t + gamma V_(t+1) - V_t.

  Masked tokens (an environment's, or padding on either side) are stepped over: t + 1 is the next
  kept one, no discount passes, and they get 0.

  Args:
    rewards: [..., T].
    values: V [..., T + 1]; the last is of what follows, 0 where the episode has ended.
    mask: [..., T]; where 0, rewards and values are not read.
    gamma: discount.
    lam: 0 is the one-step error, 1 the return less the value.

  Reference: Schulman et al. 2015, arXiv 1506.02438.
  """
  kept = mask != 0
  rewards = jnp.where(kept, rewards.astype(jnp.float32), 0)
  last = values[..., -1].astype(jnp.float32)
  values = jnp.where(kept, values[..., :-1].astype(jnp.float32), 0)

  def backwards(carry, now):
    reward, value, kept = now
    next_value, next_advantage = carry
    advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
    carry = jnp.where(kept, value, next_value), jnp.where(kept, advantage, next_advantage)
    return carry, jnp.where(kept, advantage, 0)

  times = [jnp.moveaxis(x, -1, 0) for x in (rewards, values, kept)]
  _, advantages = jax.lax.scan(backwards, (last, jnp.zeros_like(last)), times, reverse=True)
  return jnp.moveaxis(advantages, 0, -1)


def lambda_returns(
  rewards: jax.Array,
  values: jax.Array,
  mask: jax.Array,
  *,
  gamma: float = 1.0,
  lam: float = 0.95,
) -> jax.Array:
  """What values are trained towards, [..., T]: n-step returns, weighing (1 - lam) lam^(n-1) each.

  It is V_t + `gae`; arguments are the same, and masked tokens get 0.
  """
  kept = mask != 0
  advantages = gae(rewards, values, mask, gamma=gamma, lam=lam)
  return jnp.where(kept, values[..., :-1].astype(jnp.float32), 0) + advantages


def _about(rewards, weight):
  """r less its weighted mean over the group, exactly 0 where all are equal."""
  rewards = rewards.astype(jnp.float32)
  rewards -= rewards[..., :1]
  total = jnp.sum(weight, axis=-1, keepdims=True)
  mean = jnp.sum(weight * rewards, axis=-1, keepdims=True) / jnp.where(total > 0, total, 1)
  return rewards - mean
