"""Diffusion models that learn from judged samples: which weigh how much, and losses of pairs.

A sample's likelihood is not known, its denoising errors are. Imitation weights them; preferences
compare them with those of a fixed reference at the same noise: an estimate of log p / p_ref that
every loss of `preference` takes.

  weights = diffusion_learning.best(rewards, keep=1)                   # RAFT, [P, G]
  weights = diffusion_learning.tilted(rewards, temperature=0.5)        # reward-weighted
  loss_fn = diffusion_learning.weighted(denoising.denoising(...))      # reads `weight`
  loss_fn = diffusion_learning.preferences(                            # Diffusion-DPO
    model, reference, schedule, weighting, times, functools.partial(preference.dpo, beta=0.1))

Groups are the last axis of rewards: samples of one condition, the only ones that are compared.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ..models import base as models
from ..models import schedules
from . import denoising, preference, step, weightings


def best(rewards: np.ndarray, *, keep: int = 1) -> np.ndarray:
  """Weights [P, G]: 1 for the `keep` best of each group, of equals the first drawn, 0 for others.

  With keep = 1 the law that is imitated has the density G F(r)^(G-1) p(x), F the distribution
  function of rewards under p: a group moves to its upper tail, however small differences are.

  Raises:
    ValueError: groups do not have so many.

  Reference: Dong et al. 2023 (RAFT), arXiv 2304.06767.
  """
  if not 1 <= keep <= rewards.shape[-1]:
    raise ValueError(f"{keep=} of groups of {rewards.shape[-1]}.")
  weights = np.zeros(rewards.shape, np.float32)
  order = np.argsort(-rewards, axis=-1, kind="stable")
  np.put_along_axis(weights, order[..., :keep], 1, axis=-1)
  return weights


def tilted(rewards: np.ndarray, *, temperature: float = 1.0) -> np.ndarray:
  """softmax(r / temperature) in each group, times G: weights [P, G] whose mean is 1.

  As G grows the law that is imitated is p exp(r / temperature) / Z, the optimum of
  E[r] - temperature KL(. || p); as the temperature falls it is `best` of G. At temperature 1 it is
  in expectation the choice of one of G by Bradley and Terry's (Luce's) rule.

  Reference: Peters and Schaal 2007 (reward-weighted regression), ICML; Lee et al. 2023, arXiv
    2302.12192 (of diffusion models); Ferbach et al. 2024, arXiv 2407.09499 (choices among G).
  """
  logits = np.asarray(rewards, np.float64) / temperature
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  return (weights / weights.mean(-1, keepdims=True)).astype(np.float32)


def extremes(rewards: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Indices of the first best and the first worst of each group, [P], and 1 where they differ."""
  high, low = rewards.argmax(-1), rewards.argmin(-1)
  gap = rewards.max(-1) > rewards.min(-1)
  return high, low, gap.astype(np.float32)


def weighted(loss_fn: step.LossFn) -> step.LossFn:
  """The loss with every example counted `weight` [B] times; the step divides by their sum.

  Its minimum is that of the law with density in proportion to E[weight | x] p(x).
  """

  def loss(key, params, batch):
    (losses, seen), metrics = loss_fn(key, params, batch)
    times = lambda value: batch["weight"] * value
    return (times(losses), times(seen)), jax.tree.map(times, metrics)

  return loss


def log_ratio(
  denoised: jax.Array, reference: jax.Array, clean: jax.Array, weight: jax.Array
) -> jax.Array:
  """w / 2 (|D_ref - x_0|^2 - |D - x_0|^2), [B]: how much better D is, summed over coordinates.

  With lambda = log SNR the evidence bound of a diffusion model is, up to terms without parameters,

    -E[SNR |x_0 - D|^2 / (2 q(lambda))],    lambda drawn with density q,

  so with w = SNR / q(lambda) the mean over times and noise is the difference of two bounds: an
  estimate of log p(x_0) / p_ref(x_0) in nats. SNR |x_0 - D|^2 is |z - eps|^2. At the same x_t much
  of the noise cancels; it is computed as (D_ref - D) (D_ref + D - 2 x_0), in which it does so
  before rounding, and D = D_ref gives 0 exactly.

  Args:
    denoised: D(x_t) [B, ...].
    reference: D_ref(x_t) [B, ...].
    clean: x_0 [B, ...].
    weight: w [B].

  Returns:
    [B], float32.

  Reference: Kingma et al. 2021 (VDM), arXiv 2107.00630 (the bound); Wallace et al. 2023,
    arXiv 2311.12908 (as a log-ratio).
  """
  d, other, x = (a.astype(jnp.float32) for a in (denoised, reference, clean))
  gain = (other - d) * (other + d - 2 * x)
  return weight / 2 * jnp.sum(gain.reshape(gain.shape[0], -1), axis=-1)


def preferences(
  model: denoising.Model,
  reference: models.Params,
  schedule: schedules.Schedule,
  weighting: weightings.Weighting,
  times: weightings.Times,
  pair_loss: preference.PairLoss,
  *,
  quantiles: weightings.Quantiles = weightings.low_discrepancy,
) -> step.LossFn:
  """A loss of pairs on `log_ratio` of both at one time and one noise; with `dpo`, Diffusion-DPO.

    -log sigmoid(beta (c - r)),    c, r = w(t) / 2 (|z - eps_ref|^2 - |z - eps|^2) of x_t and y_t,

  x_t = alpha x_0 + sigma z for the better x_0, y_t with the same t and z for the worse y_0. By
  Jensen it bounds the loss of the means over t and z, as -log sigmoid is convex. The network's
  dropout is off, so that at the reference's parameters c = r = 0.

  Where w = SNR / q(lambda), see `log_ratio`, beta is DPO's, of nats. The paper has the factor
  beta T w(t) and takes w constant. Its code takes means over d coordinates times beta_dpo / 2, with
  beta_dpo = 5000 for Stable Diffusion, d = 16,384: that is beta = beta_dpo / d and
  `weightings.noise` here.

  The batch has `chosen` and `rejected` {`x` [B, ...]}, `label` [B] where there are classes, and
  `weight` [B].

  Args:
    model: see `denoising.network_denoiser`.
    reference: parameters that stay; an argument of the jitted step, so that they are not baked in.
    schedule: of x_t.
    weighting: of the squared error of D; with `weightings.noise` of that of eps.
    times: of quantiles.
    pair_loss: of c and r, such as `preference.dpo`.
    quantiles: how they are drawn.

  Metrics: `chosen` and `rejected`, c and r; `accuracy`, how often c > r. Both falling is the known
    failure: the margin grows while the better sample, too, becomes less likely.

  Reference: Wallace et al. 2023 (Diffusion-DPO), arXiv 2311.12908.
  """

  def loss(key, params, batch):
    time_key, noise_key = jax.random.split(jax.random.key(0) if key is None else key)
    clean = [batch[side]["x"].astype(jnp.float32) for side in ("chosen", "rejected")]
    t = times(quantiles(time_key, clean[0].shape[0]))
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    z = jax.random.normal(noise_key, clean[0].shape)
    noisy = lambda x: models.per_row(alpha, x) * x + models.per_row(sigma, z) * z
    x, twice = jnp.concatenate([noisy(x) for x in clean]), lambda a: jnp.concatenate([a, a])
    label = batch.get("label")
    condition = models.Condition(None if label is None else twice(label))
    denoise = lambda params: model(params, x, twice(t), condition)
    fixed = jax.lax.stop_gradient(denoise(reference))
    weight = twice(weighting(alpha, sigma))
    ratios = log_ratio(denoise(params), fixed, jnp.concatenate(clean), weight)
    chosen, rejected = jnp.split(ratios, 2)
    count = batch["weight"]
    metrics = {"chosen": chosen, "rejected": rejected, "accuracy": chosen > rejected}
    metrics = {name: count * value for name, value in metrics.items()}
    return (count * pair_loss(chosen, rejected), count), metrics

  return loss
