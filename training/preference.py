"""Losses of preference pairs, one number a pair: the family of DPO.

A pair is two log-ratios, of the chosen and of the rejected response,

  c = log pi(y_w | x) - log pi_ref(y_w | x),    r likewise of y_l,

so a loss knows neither models nor tokens. What is summed into c and r, and what is done to them, is
composed: `stepwise.weighted_ratio` sums some tokens, weights mask / length give means (IPO, DPO per
token), the links of `divergences` change the penalty, `mixed` adds losses up:

  preference.dpo(c, r, beta=0.1)
  preference.ipo(stepwise.weighted_ratio(ratios, mask / length), ...)
  preference.dpo(divergences.jensen_shannon(c), divergences.jensen_shannon(r))

Online DPO (Guo et al. 2024, arXiv 2402.04792) is `dpo` on two fresh samples, the better first.

Losses are finite with their gradients for |c|, |r| up to 1e3. A response without tokens has the
ratio 0 and no gradient, but dpo(0, 0) is log 2: multiply such a pair's loss by its weight 0.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

PairLoss = Callable[[jax.Array, jax.Array], jax.Array]  # (chosen [...], rejected [...]) -> [...]


def _margin(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
  return chosen.astype(jnp.float32) - rejected.astype(jnp.float32)


def dpo(chosen: jax.Array, rejected: jax.Array, *, beta: float = 0.1) -> jax.Array:
  """-log sigmoid(beta (c - r)), [...]: the Bradley-Terry likelihood of the rewards beta c, beta r.

  Reference: Rafailov et al. 2023, arXiv 2305.18290, eq. 7. Of ratios per token it is what TRL 1.16
    calls sigmoid_norm.
  """
  return -jax.nn.log_sigmoid(beta * _margin(chosen, rejected))


def conservative(
  chosen: jax.Array,
  rejected: jax.Array,
  *,
  beta: float = 0.1,
  label_smoothing: jax.Array | float = 0.1,
) -> jax.Array:
  """(1 - e) dpo(c, r) + e dpo(r, c), [...]: cross-entropy with labels that are wrong with rate e.

  It is least at sigmoid(beta (c - r)) = 1 - e and not at infinity.

  Args:
    chosen: c [...].
    rejected: r [...].
    beta: of `dpo`.
    label_smoothing: e, one number or [...], such as `stepwise.visit_smoothing`.

  Reference: Mitchell 2023, "A note on DPO with noisy preferences", eq. 3.
  """
  right, wrong = dpo(chosen, rejected, beta=beta), dpo(rejected, chosen, beta=beta)
  return (1 - label_smoothing) * right + label_smoothing * wrong


def robust(
  chosen: jax.Array,
  rejected: jax.Array,
  *,
  beta: float = 0.1,
  label_smoothing: float = 0.1,
) -> jax.Array:
  """[(1 - e) dpo(c, r) - e dpo(r, c)] / (1 - 2 e), [...]: unbiased under flipped labels.

  Its mean over labels that flip at rate e < 1/2 is `dpo` of the right one. Not bounded from below.

  Reference: Chowdhury et al. 2024, arXiv 2403.00409.
  """
  right, wrong = dpo(chosen, rejected, beta=beta), dpo(rejected, chosen, beta=beta)
  return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)


def hinge(chosen: jax.Array, rejected: jax.Array, *, beta: float = 0.1) -> jax.Array:
  """max(0, 1 - beta (c - r)), [...].

  Reference: Zhao et al. 2023 (SLiC-HF), arXiv 2305.10425, whose margin is of log-probabilities.
  """
  return jax.nn.relu(1 - beta * _margin(chosen, rejected))


def ipo(chosen: jax.Array, rejected: jax.Array, *, beta: float = 0.1) -> jax.Array:
  """(c - r - 1 / (2 beta))^2, [...]: a margin to reach and not to pass.

  With c and r summed over tokens the target is for whole responses, as the paper writes and as
  OpenRLHF 0.11 computes. TRL takes means over tokens, which its source says the authors confirmed:
  give ratios of weights mask / length for that.

  Reference: Azar et al. 2023, arXiv 2310.12036, eq. 17 (beta is its tau).
  """
  return jnp.square(_margin(chosen, rejected) - 0.5 / beta)


def exo(
  chosen: jax.Array,
  rejected: jax.Array,
  *,
  beta: float = 0.1,
  label_smoothing: float = 1e-3,
) -> jax.Array:
  """KL(p || (1 - e, e)) of p = softmax(beta (c, r)), [...]: DPO's divergence the other way round.

  Mode-seeking: past the label's log-odds log((1 - e) / e) it pulls back, and as beta (c - r) goes
  to -infinity its gradient vanishes. e = 0 has no finite value: TRL 0.24 puts 1e-3 there, 1.16
  raises; here it is the caller's.

  Reference: Ji et al. 2024, arXiv 2402.00856, eq. 16.
  """
  margin = beta * _margin(chosen, rejected)
  log_p, log_q = jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)
  first = jax.nn.sigmoid(margin) * (log_p - jnp.log1p(-label_smoothing))
  return first + jax.nn.sigmoid(-margin) * (log_q - jnp.log(label_smoothing))


def nca(chosen: jax.Array, rejected: jax.Array, *, beta: float = 0.1) -> jax.Array:
  """-log sigmoid(beta c) - [log sigmoid(-beta c) + log sigmoid(-beta r)] / 2, [...].

  Noise contrast of each response with the reference's own, so that the chosen one's likelihood is
  held up in itself and not only above the other's.

  Reference: Chen et al. 2024, arXiv 2402.05369.
  """
  chosen, rejected = beta * chosen.astype(jnp.float32), beta * rejected.astype(jnp.float32)
  noise = jax.nn.softplus(chosen) + jax.nn.softplus(rejected)
  return jax.nn.softplus(-chosen) + 0.5 * noise


def bco(
  chosen: jax.Array, rejected: jax.Array, shift: jax.Array | float, *, beta: float = 0.1
) -> jax.Array:
  """-log sigmoid(beta c - shift) - log sigmoid(shift - beta r), [...]: a classifier of single ones.

  Args:
    chosen: c [...].
    rejected: r [...].
    shift: of the rewards beta c and beta r, [] or [...]: a running mean of `unpaired.bco_shift`, as
      the paper and TRL 0.24 have it. TRL 1.16 has no shift, which is 0.
    beta: of `dpo`.

  Reference: Jung et al. 2024, arXiv 2404.04656.
  """
  chosen, rejected = beta * chosen.astype(jnp.float32), beta * rejected.astype(jnp.float32)
  return jax.nn.softplus(shift - chosen) + jax.nn.softplus(rejected - shift)


def sppo(
  chosen: jax.Array,
  rejected: jax.Array,
  *,
  beta: float = 1e-3,
  win_rate: jax.Array | float = 1.0,
) -> jax.Array:
  """(c - (p - 1/2) / beta)^2 + (r + (p - 1/2) / beta)^2, [...]: each ratio has a target of its own.

  Args:
    chosen: c [...].
    rejected: r [...].
    beta: 1 / eta of the paper; TRL's default is 0.1.
    win_rate: p, how often the chosen response is preferred to the other, [] or [...]; 1 is TRL's
      sppo_hard.

  Reference: Wu et al. 2024, arXiv 2405.00675, eq. 4.7.
  """
  target = (win_rate - 0.5) / beta
  chosen, rejected = chosen.astype(jnp.float32), rejected.astype(jnp.float32)
  return jnp.square(chosen - target) + jnp.square(rejected + target)


def aot(
  policy_margin: jax.Array, reference_margin: jax.Array, *, loss: PairLoss = dpo
) -> jax.Array:
  """The loss of sorted margins, [B, ...]: the policy's law of margins dominates the reference's.

  With m = log p(y_w | x) - log p(y_l | x) of either model and m_(i) the i-th smallest of the batch,
  loss(m_(i), m_ref(i)): quantile against quantile instead of pair against pair. Row i of the result
  is of quantile i, not of pair i.

  Args:
    policy_margin: m [B, ...].
    reference_margin: m_ref [B, ...].
    loss: of a quantile; partial(conservative, ...) smooths labels.

  Reference: Melnyk et al. 2024, arXiv 2406.05882, the paired variant, which TRL calls aot. TRL
    0.24's aot_pair is `unpaired.aot`, and so named aot_unpaired in 1.16.
  """
  return loss(jnp.sort(policy_margin, axis=0), jnp.sort(reference_margin, axis=0))


def apo_zero(chosen: jax.Array, rejected: jax.Array, *, beta: float = 0.1) -> jax.Array:
  """sigmoid(-beta c) + sigmoid(beta r), [...]: chosen up and rejected down, each by itself.

  For pairs whose chosen response is better than what the model says.

  Reference: D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7.
  """
  chosen, rejected = chosen.astype(jnp.float32), rejected.astype(jnp.float32)
  return jax.nn.sigmoid(-beta * chosen) + jax.nn.sigmoid(beta * rejected)


def apo_down(chosen: jax.Array, rejected: jax.Array, *, beta: float = 0.1) -> jax.Array:
  """sigmoid(beta c) + sigmoid(-beta (c - r)), [...]: both down, the rejected one further.

  For pairs whose chosen response is worse than what the model says.

  Reference: D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 8.
  """
  margin = _margin(chosen, rejected)
  return jax.nn.sigmoid(beta * chosen.astype(jnp.float32)) + jax.nn.sigmoid(-beta * margin)


def discopop(
  chosen: jax.Array, rejected: jax.Array, *, beta: float = 0.1, tau: float = 0.05
) -> jax.Array:
  """(1 - g) log(1 + e^-z) + g e^-z, z = beta (c - r), g = sigmoid(z / tau), [...].

  A loss that a language model found: logistic where the pair is wrong, exponential where it is
  right, and around a tie increasing, with the slope (1 - log 2) / (4 tau) - 3/4 in z. The product
  g e^-z is one exponential here; written as a product, as in TRL, it is 0 inf = NaN below z = -89.
  tau is at most 1, or the product itself is unbounded.

  Reference: Lu et al. 2024, arXiv 2406.08414, eq. 5.
  """
  z = beta * _margin(chosen, rejected)
  logistic = jax.nn.sigmoid(-z / tau) * jax.nn.softplus(-z)
  return logistic + jnp.exp(jax.nn.log_sigmoid(z / tau) - z)


def mixed(losses: Sequence[PairLoss], weights: Sequence[float]) -> PairLoss:
  """The weighted sum of losses of the same pair.

  MPO is 0.8 `dpo` + 0.2 `bco` and, once more, the mean negative log-likelihood of the chosen one
  (-`reference_free.length_mean`), which the caller adds: it is no function of the two ratios.

  Raises:
    ValueError: there are not as many weights as losses.

  Reference: Wang et al. 2024 (MPO), arXiv 2411.10442.
  """
  if len(losses) != len(weights):
    raise ValueError(f"{len(losses)} losses have {len(weights)} weights.")

  def loss(chosen, rejected):
    return sum(w * one(chosen, rejected) for w, one in zip(weights, losses, strict=True))

  return loss


def length_desensitised(
  log_prob: jax.Array, mask: jax.Array, other_length: jax.Array, *, alpha: float = 0.5
) -> jax.Array:
  """sum over t <= n of l_t + alpha sum over t > n of l_t, n the shorter length of the pair, [...].

  What a response says beyond the other's length counts less, so that length itself moves the margin
  less: alpha = 1 is the plain sum, alpha = 0 compares prefixes of equal length. Linear, so it may
  take log-probabilities or log-ratios; the policy's and the reference's are both treated so.

  Args:
    log_prob: l [..., T].
    mask: [..., T], 1 at tokens of the response, whichever side is padded.
    other_length: number of tokens of the pair's other response, [...].
    alpha: 0 to 1.

  Reference: Liu et al. 2024 (LD-DPO), arXiv 2409.06411. TRL 0.24 counts positions from the start of
    the row, so that a prompt pushes the response out of the sum, and leaves the reference's whole;
    1.16 counts as here.
  """
  mask = mask != 0
  shared = jnp.cumsum(mask, axis=-1) <= other_length[..., None]
  weight = jnp.where(shared, 1.0, alpha)
  return jnp.sum(jnp.where(mask, log_prob.astype(jnp.float32), 0) * weight, axis=-1)


def log_collision(logits: jax.Array) -> jax.Array:
  """log sum_v p(v)^2, [...], of p = softmax(logits [..., V]); -log V where p is flat."""
  logits = logits.astype(jnp.float32)
  return jax.nn.logsumexp(2 * logits, axis=-1) - 2 * jax.nn.logsumexp(logits, axis=-1)


def wpo_weight(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
  """min(1, e^(a_w + a_l)), [...], without gradient: how much a pair is the policy's own.

  a is the mean over a response's tokens of log p(y_t) - log sum_v p(v)^2, that is
  `reference_free.length_mean` of log-probabilities less `log_collision`: 0 at every token of a flat
  law, whatever its width. The loss of the pair is multiplied by the weight.

  Args:
    chosen: a_w [...].
    rejected: a_l [...].

  Reference: Zhou et al. 2024, arXiv 2406.11827, eq. 2, and its code for the limit 1, without which
    greedy responses weigh more than 1, as in TRL 1.16. TRL 0.24 has the limit, but takes the two
    logarithms of neighbouring tokens.
  """
  total = chosen.astype(jnp.float32) + rejected.astype(jnp.float32)
  return jax.lax.stop_gradient(jnp.exp(jnp.minimum(total, 0)))


def reference_sync(
  reference: Any, params: Any, step: jax.Array, *, alpha: float = 0.6, every: int = 512
) -> Any:
  """alpha params + (1 - alpha) reference at multiples of `every`, else the reference as it was.

  alpha = 1 replaces it.

  Args:
    reference: a tree of arrays.
    params: the policy's, the same tree.
    step: steps done so far, [].
    alpha: the policy's share.
    every: steps.

  Reference: Gorbatovski et al. 2024 (TR-DPO), arXiv 2404.09656.
  """
  now = (step > 0) & (step % every == 0)
  return jax.tree.map(
    lambda old, new: jnp.where(now, (alpha * new + (1 - alpha) * old).astype(old.dtype), old),
    reference,
    params,
  )
