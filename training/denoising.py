"""Losses of diffusion models, one number an example, and what trains a network on them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ..models import base as models
from ..models import precondition, schedules
from . import step, weightings

# (params, x_t [B, ...], t [B], condition, key) -> E[x_0 | x_t] [B, ...]; a key turns dropout on
Model = Callable[..., jax.Array]


def squared_error(denoised: jax.Array, clean: jax.Array, weight: jax.Array) -> jax.Array:
  """weight |D - x_0|^2 / d, the mean over the d coordinates of an example.

  The minimum over all functions D of x_t is at E[x_0 | x_t], whatever the (positive) weights.

  Args:
    denoised: D [B, ...].
    clean: x_0 [B, ...].
    weight: [B].

  Returns:
    [B], float32.
  """
  error = jnp.square(denoised.astype(jnp.float32) - clean.astype(jnp.float32))
  return weight * jnp.mean(error.reshape(error.shape[0], -1), axis=-1)


def flow_matching(velocity: jax.Array, clean: jax.Array, noise: jax.Array) -> jax.Array:
  """|u - (z - x_0)|^2 / d: the velocity of a straight line from data to noise, [B].

  It is `squared_error` of D = x_t - t u with the weight `weightings.flow` on `rectified_flow`.

  Args:
    velocity: u(x_t, t) [B, ...], of x_t = (1 - t) x_0 + t z.
    clean: x_0 [B, ...].
    noise: z [B, ...].

  Reference: Lipman et al. 2022, arXiv 2210.02747, eq. 9 (time the other way); Liu et al. 2022,
    arXiv 2209.03003, eq. 1.
  """
  return squared_error(velocity, noise - clean, jnp.ones(clean.shape[:1]))


def uncertain(loss: jax.Array, log_variance: jax.Array) -> jax.Array:
  """loss / exp(u) + u, the learned weighting of noise levels.

  Where u(t) is free its best is log E[loss | t], so that levels contribute equally: the network's
  gradient is that of log E[loss | t].

  Args:
    loss: [B].
    log_variance: u [B], of the noise level alone.

  Reference: Karras et al. 2023 (EDM2), arXiv 2312.02696, eq. 14; Kendall et al. 2017, 1705.07115.
  """
  return loss * jnp.exp(-log_variance) + log_variance


def ambient(
  denoised: jax.Array,
  noisy: jax.Array,
  x: jax.Array,
  weight: jax.Array,
  *,
  alpha: jax.Array,
  sigma: jax.Array,
  data_noise: jax.Array,
) -> jax.Array:
  """The loss of an example that was never seen clean, at noise above its own, [B].

  Of x_n = x_0 + s z, s the data's own noise, and x_t = alpha x_n + sqrt(sigma^2 - alpha^2 s^2) z',

    E[x_n | x_t] = a E[x_0 | x_t] + alpha s^2 / sigma^2 x_t,    a = 1 - alpha^2 s^2 / sigma^2,

  so weight |a D + alpha s^2 / sigma^2 x_t - x_n|^2 / d is least at D = E[x_0 | x_t], although x_0
  is not in it. At s = 0 it is `squared_error`. Below its own noise, sigma <= alpha s, an example
  says nothing: the loss is 0.

  Args:
    denoised: D(x_t) [B, ...].
    noisy: x_n [B, ...], the data.
    x: x_t [B, ...].
    weight: [B].
    alpha: [B].
    sigma: [B].
    data_noise: s [B].

  Reference: Daras et al. 2024, arXiv 2404.10177 (the identity); Daras et al. 2024, "How much is a
    noisy image worth?", arXiv 2411.02780 (its use with some clean data).
  """
  seen = sigma > alpha * data_noise
  pull = jnp.where(seen, alpha * jnp.square(data_noise / jnp.where(seen, sigma, 1)), 0)
  guess = models.per_row(1 - alpha * pull, x) * denoised + models.per_row(pull, x) * x
  return jnp.where(seen, squared_error(guess, noisy, weight), 0)


def network_denoiser(
  network: models.Network,
  schedule: schedules.Schedule,
  head: precondition.Head,
  sigma_data: float,
) -> Model:
  """(params, x_t, t, condition, key=None) -> E[x_0 | x_t], for training and for sampling.

  The network reads `precondition.scaled` inputs and puts out what `head` says.
  """

  def denoise(params, x, t, condition=None, key=None):
    apply = lambda x, level: network.apply(
      params, x, jnp.broadcast_to(level, x.shape[:1]), condition, key=key
    )
    scaled = precondition.scaled(apply, schedule, sigma_data)
    return precondition.denoiser(scaled, schedule, head)(x, t)

  return denoise


def denoising(
  model: Model,
  schedule: schedules.Schedule,
  weighting: weightings.Weighting,
  times: weightings.Times,
  *,
  quantiles: weightings.Quantiles = weightings.low_discrepancy,
  num_classes: int | None = None,
  drop_condition: float = 0.0,
  log_variance: Callable[[models.Params, jax.Array], jax.Array] | None = None,
) -> step.LossFn:
  """The loss of a denoiser at random times, [B]; an example's weight is 1, or 0 below its noise.

  The batch has `x` [B, ...], and where the network takes them `label` [B], `text` [B, T, E],
  `text_mask` [B, T]. With `noise` [B], an example is x_0 + noise z and not x_0: `ambient`.

  Args:
    model: see `network_denoiser`.
    schedule: of x_t.
    weighting: of the squared error.
    times: of quantiles.
    quantiles: how they are drawn.
    num_classes: of labels, where there are.
    drop_condition: how often a row is shown without its condition, for guidance without a
      classifier (Ho and Salimans 2022, arXiv 2207.12598).
    log_variance: (params, t [B]) -> u [B]; makes the weighting `uncertain`. None has it fixed.

  Metrics: `error`, the squared error of D, unweighted.
  """

  def loss(key, params, batch):
    time_key, noise_key, drop_key, model_key = _keys(key)
    clean = batch["x"].astype(jnp.float32)
    t = times(quantiles(time_key, clean.shape[0]))
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    held = batch.get("noise", jnp.zeros(t.shape))
    added = jnp.sqrt(jnp.maximum(jnp.square(sigma) - jnp.square(alpha * held), 0))
    z = jax.random.normal(noise_key, clean.shape)
    x = models.per_row(alpha, z) * clean + models.per_row(added, z) * z
    condition = models.Condition(*(batch.get(name) for name in models.Condition._fields))
    dropped = jax.random.uniform(drop_key, t.shape) < drop_condition
    condition = models.without(condition, num_classes, dropped)
    denoised = model(params, x, t, condition, model_key)
    losses = ambient(
      denoised, clean, x, weighting(alpha, sigma), alpha=alpha, sigma=sigma, data_noise=held
    )
    seen = sigma > alpha * held
    if log_variance is not None:
      losses = jnp.where(seen, uncertain(losses, log_variance(params, t)), 0)
    error = squared_error(denoised, clean, seen.astype(jnp.float32))
    return (losses, seen.astype(jnp.float32)), {"error": error}

  return loss


def _keys(key):
  """Keys of times, noise, dropped conditions and dropout; without a key, the same ones every time.

  So a held-out loss is one of the same draws at every evaluation, and the network's dropout is off.
  """
  if key is None:
    return *jax.random.split(jax.random.key(0), 3), None
  return jax.random.split(key, 4)
