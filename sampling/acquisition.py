"""Active Diffusion Subsampling: what to measure next, by where samples of the posterior differ.

Particles are samples of the posterior given what is measured so far. What a candidate measurement
would give is, by them, a mixture of Gaussians of the measurement's noise about each particle's; the
candidate whose mixture has the most entropy is measured next.

Reference: Nolan et al. 2024, arXiv 2406.14388.
"""

import jax
import jax.numpy as jnp


def entropy(particles: jax.Array, std: float | jax.Array) -> jax.Array:
  """The entropy of each candidate's mixture, but for a constant: [C].

    H_c = -(1 / P) sum_i log (1 / P) sum_j exp(-|y_ic - y_jc|^2 / (2 s^2))

  in log-sum-exp form, so that no distance overflows and particles far from all others count as
  log P. The authors' code sums exp(+|y_i - y_j|^2 / (2 s^2)): it grows with the distances too, and
  so often chooses the same, but is no entropy and overflows.

  Args:
    particles: [P, C] or [P, C, M], what each particle has for each candidate of M numbers.
    std: s, of the measurement: how far apart particles are told apart.

  Raises:
    ValueError: a shape without candidates.

  Reference: Nolan et al. 2024, arXiv 2406.14388, eq. 9, after Hershey and Olsen 2007.
  """
  if particles.ndim not in (2, 3):
    raise ValueError(f"particles have shape {particles.shape}: it is [P, C] or [P, C, M].")
  y = particles.reshape(*particles.shape[:2], -1)
  square = jnp.sum(jnp.square(y[:, None] - y[None]), axis=-1)  # [P, P, C]
  log_density = jax.nn.logsumexp(-square / (2 * jnp.square(std)), axis=1)
  return jnp.log(y.shape[0]) - jnp.mean(log_density, axis=0)


def variance(particles: jax.Array) -> jax.Array:
  """The particles' total variance of each candidate, [C]: the rule of a Gaussian posterior."""
  y = particles.reshape(*particles.shape[:2], -1)
  return jnp.sum(jnp.var(y, axis=0), axis=-1)


def choose(values: jax.Array, measured: jax.Array) -> jax.Array:
  """The candidate of the highest value [C] that is not measured yet [C] bool: [] int32."""
  return jnp.argmax(jnp.where(measured, -jnp.inf, values)).astype(jnp.int32)
