"""What a variance-preserving diffusion model says of discrete data: bits per dimension."""

import math

import jax
import jax.numpy as jnp

from ..models import base as models
from ..models import schedules
from . import weightings


def diffusion_term(
  denoised: jax.Array, clean: jax.Array, half_log_snr: jax.Array, span: float
) -> jax.Array:
  """An estimate of 1/2 int |x_0 - D|^2 dSNR, in nats, [B].

  With lambda = 1/2 log SNR uniform over an interval of length `span`, dSNR = 2 SNR dlambda, so it
  is span SNR |x_0 - D(x_t)|^2. Its expectation is KL(q(path) || p(path)) between the ends.

  Args:
    denoised: D(x_t) [B, ...].
    clean: x_0 [B, ...].
    half_log_snr: lambda [B].
    span: of lambda.

  Reference: Kingma et al. 2021 (VDM), arXiv 2107.00630, eq. 17 and 18.
  """
  error = jnp.square(denoised - clean).reshape(clean.shape[0], -1)
  return span * jnp.exp(2 * half_log_snr) * jnp.sum(error, axis=-1)


def prior_term(clean: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
  """KL(N(alpha x_0, sigma^2 I) || N(0, I)) in nats, [B]: what is left of the data in the noise."""
  square = jnp.square(alpha * clean) + sigma**2 - 1 - 2 * jnp.log(sigma)
  return 0.5 * jnp.sum(square.reshape(clean.shape[0], -1), axis=-1)


def reconstruction_term(
  x: jax.Array, clean: jax.Array, values: jax.Array, alpha: jax.Array, sigma: jax.Array
) -> jax.Array:
  """-log p(x_0 | x_t) in nats, [B], p(v | x) proportional to N(x; alpha v, sigma^2) over v.

  Args:
    x: x_t [B, ...] at the least noise.
    clean: x_0 [B, ...], of `values`.
    values: [V], all that a coordinate can be.
    alpha: [].
    sigma: [].

  Reference: Kingma et al. 2021 (VDM), arXiv 2107.00630, section 3.3.
  """
  logits = -0.5 * jnp.square((x[..., None] - alpha * values.reshape((1,) * x.ndim + (-1,))) / sigma)
  own = -0.5 * jnp.square((x - alpha * clean) / sigma)
  nats = jax.nn.logsumexp(logits, axis=-1) - own
  return jnp.sum(nats.reshape(x.shape[0], -1), axis=-1)


def bits_per_dim(
  key: jax.Array,
  denoise: models.Denoiser,
  schedule: schedules.Schedule,
  clean: jax.Array,
  values: jax.Array,
  *,
  least: float = 1e-3,
  noisiest: float | None = None,
  num_times: int = 16,
) -> jax.Array:
  """An upper bound of -log2 p(x_0) / d of each example, [B], estimated without bias.

  The sum of `prior_term` at the noisiest time, `diffusion_term` between, and `reconstruction_term`
  at the least noise. Times are in low discrepancy over the batch.

  Args:
    key: of noise and times.
    denoise: E[x_0 | x_t].
    schedule: variance-preserving.
    clean: x_0 [B, ...], each coordinate one of `values`.
    values: [V], what a coordinate can be.
    least: the noise sigma / alpha of the reconstruction. Far below the gap between values it is
      exact; the integral is longer.
    noisiest: sigma / alpha at which the prior takes over; None is that of the schedule's last time
      if there is signal left, else 200.
    num_times: draws of the integrand for each example.

  Raises:
    ValueError: alpha^2 + sigma^2 is not 1.
  """
  half = schedule.max_time / 2
  if not math.isclose(float(schedule.alpha(half)) ** 2 + float(schedule.sigma(half)) ** 2, 1.0):
    raise ValueError("bits_per_dim is of variance-preserving schedules: alpha^2 + sigma^2 = 1.")
  if noisiest is None:
    last = float(schedules.half_log_snr(schedule, schedule.max_time))
    noisiest = math.exp(-last) if math.isfinite(last) else 200.0
  num, noise_key, time_key, least_key = clean.shape[0], *jax.random.split(key, 3)
  top, span = -math.log(least), math.log(noisiest / least)

  def at(half_log_snr, z):
    t = jnp.asarray(schedule.time(half_log_snr), jnp.float32)
    alpha, sigma = (
      models.per_row(schedule.alpha(t), clean),
      models.per_row(schedule.sigma(t), clean),
    )
    return alpha * clean + sigma * z, t, alpha, sigma

  def draw(total, inputs):
    quantiles, key = inputs
    half_log_snr = top - span * quantiles
    x, t, _, _ = at(half_log_snr, jax.random.normal(key, clean.shape))
    return total + diffusion_term(denoise(x, t), clean, half_log_snr, span), None

  quantiles = weightings.low_discrepancy(time_key, num_times * num).reshape(num_times, num)
  inputs = (quantiles, jax.random.split(noise_key, num_times))
  integral, _ = jax.lax.scan(draw, jnp.zeros(num), inputs)
  x, _, alpha, sigma = at(jnp.full(1, top), jax.random.normal(least_key, clean.shape))
  _, _, alpha_last, sigma_last = at(jnp.full(1, top - span), jnp.zeros_like(clean))
  nats = (
    prior_term(clean, alpha_last, sigma_last)
    + integral / num_times
    + reconstruction_term(x, clean, values, alpha.reshape(()), sigma.reshape(()))
  )
  return nats / (math.log(2) * math.prod(clean.shape[1:]))
