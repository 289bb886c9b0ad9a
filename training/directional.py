"""Directional preference alignment: one model for every trade-off between several rewards.

A user's wish is a direction v in the space of rewards, |v| = 1, written into the prompt; the model
learns, by rejection sampling, to answer with what is best in that direction:

  v = directional.unit(directional.angles(key, (B,), low=-jnp.pi / 4, high=0.0))
  best = directional.best_of(rewards, v)             # of K answers each; train on these
  directional.written("{prompt} [right {0}, brief {1}]", prompt, v[0])

Reference: Wang et al. 2024, arXiv 2402.18571.
"""

import jax
import jax.numpy as jnp
import numpy as np


def angles(key: jax.Array, shape: tuple[int, ...], *, low: float, high: float) -> jax.Array:
  """Uniform angles between low and high, in radians: the trade-offs that the model is to know."""
  return jax.random.uniform(key, shape, minval=low, maxval=high)


def unit(angle: jax.Array) -> jax.Array:
  """v = (cos, sin) of an angle, [..., 2]: 0 wants the first reward only, pi / 2 the second only."""
  return jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def reward(rewards: jax.Array, direction: jax.Array) -> jax.Array:
  """v . R, [..., K]: what K answers are worth to whoever wishes for v.

  Args:
    rewards: R [..., K, D], of each answer.
    direction: v [..., D]. Of two rewards, see `unit`.
  """
  return jnp.sum(rewards.astype(jnp.float32) * direction[..., None, :], axis=-1)


def best_of(rewards: jax.Array, direction: jax.Array) -> jax.Array:
  """Which of K answers is best in the direction, [...]; of equals, the first. See `reward`."""
  return jnp.argmax(reward(rewards, direction), axis=-1)


def written(template: str, prompt: str, direction: np.ndarray, *, scale: int = 100) -> str:
  """The prompt with its direction, each component a whole number of 1 / scale.

  The rounded direction is no unit vector any more, but within 1 / scale of one.

  Args:
    template: with {prompt} and a {0}, {1}, ... for each reward.
    prompt: of the task.
    direction: v [D].
    scale: 100 as in the authors' README.
  """
  parts = np.rint(scale * np.asarray(direction, np.float64)).astype(int)
  return template.format(*parts.tolist(), prompt=prompt)
