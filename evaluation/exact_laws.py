"""The law of a discrete diffusion sampler's samples, computed and not sampled, on tiny problems.

Given x_t, positions move apart from one another, so the chance of going from x to y is a product
over positions, and a law over all M^L sequences goes a step further by one matrix product.
"""

import jax
import jax.numpy as jnp

from ..models import base as models
from ..models import toy_discrete
from ..sampling import jumps, noises


def sampler_law(
  predict: models.Predictor, noise: noises.Noise, law: jumps.Law, steps: jumps.Steps, length: int
) -> jax.Array:
  """The law of what `jumps.factorised` draws where nothing is given, [V] * L.

  Differentiable in `steps`. A step takes M^(2 L) multiplications and holds M^(3 L / 2) numbers.

  Args:
    predict: (tokens [N, L], t [N]) -> logits [N, L, V]; asked at all N = M^L sequences.
    noise: the kind of noise.
    law: how a position moves.
    steps: K steps.
    length: L.
  """
  states = jnp.asarray(toy_discrete.sequences(noise.num_states, length))
  times, scales = (jnp.asarray(a, jnp.float32) for a in steps)
  ones = jnp.ones(states.shape[0])

  @jax.checkpoint
  def step(weights, at):
    t, s, scale, is_last = at
    p = jax.nn.softmax(predict(states, t * ones), axis=-1)
    to = jumps.moved(noise, law, p, states, (t * ones, s * ones, scale * ones), is_last * ones > 0)
    return pushed(weights, to), None

  is_last = jnp.arange(scales.shape[0]) == scales.shape[0] - 1
  at = times[:-1], times[1:], scales, is_last
  weights = jax.lax.scan(step, prior_law(noise, length), at)[0]
  joint = weights.reshape((noise.num_states,) * length)
  return joint[(slice(noise.vocab_size),) * length]


def prior_law(noise: noises.Noise, length: int) -> jax.Array:
  """The law of x_1 where nothing is given, [M^L]: all masks, or all sequences alike."""
  total = noise.num_states**length
  if noise.num_states == noise.vocab_size:
    return jnp.full(total, 1 / total)
  return jnp.zeros(total).at[-1].set(1)


def pushed(weights: jax.Array, to: jax.Array) -> jax.Array:
  """sum_x weights[x] prod_i to[x, i, y_i], [M^L], from weights [M^L] and to [M^L, L, M]."""
  total, length, _ = to.shape

  def product(factors):  # [N, l, M] -> [N, M^l]
    out = jnp.ones((total, 1))
    for i in range(factors.shape[1]):
      out = (out[:, :, None] * factors[:, None, i]).reshape(total, -1)
    return out

  half = length // 2
  left = weights[:, None] * product(to[:, :half])
  return jnp.matmul(left.T, product(to[:, half:]), precision="highest").reshape(-1)


def kl(law: jax.Array, target: jax.Array) -> jax.Array:
  """KL(law || target), in nats, of arrays of one shape; inf where target excludes what law has."""
  some = law > 0
  log_ratio = jnp.log(jnp.where(some, law, 1)) - jnp.log(jnp.where(some, target, 1))
  return jnp.sum(jnp.where(some, law * log_ratio, 0))


def total_variation(law: jax.Array, target: jax.Array) -> jax.Array:
  """Half the L1 distance of two laws of one shape."""
  return jnp.sum(jnp.abs(law - target)) / 2
