"""Laws over short sequences, noised token by token: what discrete diffusion is proved on.

For noise that masks, see `toy.joint_predictor`.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from . import base, mask_schedules

_EXACT = jax.lax.Precision.HIGHEST


def sequences(num_states: int, length: int) -> np.ndarray:
  """All sequences, int32 [num_states^length, length], in the order of `joint.reshape(-1)`."""
  return np.array(list(itertools.product(range(num_states), repeat=length)), np.int32)


def uniform_noised(joint: jax.Array, alpha: float | jax.Array) -> jax.Array:
  """The law of x_t: every token is kept with probability alpha, else uniform; [V] * L as `joint`.

  q(x_t = y | x_0 = x) = alpha 1[y = x] + (1 - alpha) / V, position by position.
  """
  for axis in range(joint.ndim):
    joint = alpha * joint + (1 - alpha) * jnp.mean(joint, axis=axis, keepdims=True)
  return joint


def uniform_predictor(
  joint: jax.Array, schedule: mask_schedules.MaskSchedule, *, given: Sequence[int] = ()
) -> base.Predictor:
  """The exact predictor of uniform-state diffusion, p(x_0 at i | x_t, t) for every i.

  By Bayes over all outcomes: p(x_0 | x_t) ~ p(x_0) prod_i q(x_t at i | x_0 at i). Unlike that of
  masking, it depends on time, and a position's own token is evidence like the others.

  Args:
    joint: probabilities [V] * L, V and L tiny.
    schedule: of the noise.
    given: positions that are known and not noised, for infilling. A predictor that is not told so
      takes what is given for noisy.

  Returns:
    (tokens [B, L], t [] or [B], above 0) -> log-probabilities [B, L, V].
  """
  length, vocab_size = joint.ndim, joint.shape[0]
  outcomes = jnp.asarray(sequences(vocab_size, length))
  own = jax.nn.one_hot(outcomes, vocab_size)  # [V^L, L, V]
  noised = jnp.array([i not in given for i in range(length)])
  log_joint = jnp.log(joint.reshape(-1))

  def predict(tokens, t):
    alpha = jnp.broadcast_to(schedule.alpha(t), tokens.shape[:1])[:, None]
    agrees = tokens[:, None] == outcomes[None]  # [B, V^L, L]
    gain = jnp.log1p(vocab_size * alpha / jnp.maximum(1 - alpha, 1e-30))  # of q where it agrees
    log_weight = log_joint[None] + gain * jnp.sum(agrees & noised[None, None], axis=-1)
    if given:
      possible = jnp.all(agrees | noised[None, None], axis=-1)
      log_weight = jnp.where(possible, log_weight, -jnp.inf)
    posterior = jax.nn.softmax(log_weight, axis=-1)
    return jnp.log(jnp.einsum("bo,olv->blv", posterior, own, precision=_EXACT))

  return predict


def markov_predictor(
  first: jax.Array,
  transition: jax.Array,
  schedule: mask_schedules.MaskSchedule | None = None,
) -> base.Predictor:
  """The exact predictor of a Markov chain, at a cost that does not grow with the number of laws.

  Messages from the left and the right (smoothing), with the likelihood of every position: 1 for a
  mask and else its own token, or q(x_t | x_0) of uniform noise.

  Args:
    first: p(x_1), [V].
    transition: p(x_(i+1) | x_i), [V, V].
    schedule: of uniform noise; None if the noise masks.

  Returns:
    (tokens [B, L], t [] or [B], above 0) -> log-probabilities [B, L, V].
  """
  vocab_size = first.shape[0]

  def likelihood(tokens, t):  # [B, L, V]
    at = jax.nn.one_hot(tokens, vocab_size)
    if schedule is None:
      return jnp.where(tokens[:, :, None] == vocab_size, 1, at)
    alpha = jnp.broadcast_to(schedule.alpha(t), tokens.shape[:1])[:, None, None]
    return alpha * at + jnp.maximum((1 - alpha) / vocab_size, 1e-30)

  def unit(message):
    return message / jnp.sum(message, axis=-1, keepdims=True)

  def predict(tokens, t):
    seen = jnp.swapaxes(likelihood(tokens, t), 0, 1)  # [L, B, V]
    product = lambda a, b: jnp.matmul(a, b, precision=_EXACT)

    def right(before, here):
      return unit(product(before * here, transition)), before

    def left(after, here):
      return unit(product(after * here, transition.T)), after

    start = jnp.broadcast_to(first[None], seen.shape[1:])
    _, before = jax.lax.scan(right, start, seen)
    _, after = jax.lax.scan(left, jnp.ones_like(start), seen, reverse=True)
    return jnp.log(jnp.swapaxes(unit(before * seen * after), 0, 1))

  return predict
