"""Optimal boundary conditions: one initial noise for every image of a conditional diffusion ODE.

Solved as an ODE, conditional sampling (super-resolution, say) is a function of the noise x_T it
starts from and the condition. Some x_T are better than others whatever the condition; the best of
some is found on a few known pairs and then used for all.

Reference: Ma et al. 2023, arXiv 2305.15357.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

# (x_T [B, ...], condition [B, ...]) -> x_0 [B, ...], deterministic
Solve = Callable[[jax.Array, jax.Array], jax.Array]


class Boundary(NamedTuple):
  """The noise chosen, and what each candidate's error was."""

  noise: jax.Array  # [...]
  errors: jax.Array  # [N], means over the pairs


def search(
  solve: Solve, candidates: jax.Array, conditions: jax.Array, targets: jax.Array
) -> Boundary:
  """The candidate x_T of the least mean squared error over R known pairs.

    x_T* = argmin_n (1 / R) sum_r |solve(candidate_n, condition_r) - target_r|^2 / size

  It costs N R runs of the sampler, once.

  Args:
    solve: the sampler, a batch at a time.
    candidates: [N, ...]; the paper takes 1,000 for its 200 references, hundreds do.
    conditions: [R, ...].
    targets: [R, ...], what the sampler should give.

  Raises:
    ValueError: conditions and targets are not as many.

  Reference: Ma et al. 2023, arXiv 2305.15357, eq. 12.
  """
  if conditions.shape[0] != targets.shape[0]:
    raise ValueError(f"{conditions.shape[0]} conditions for {targets.shape[0]} targets.")

  def error(noise):
    made = solve(repeated(noise, conditions.shape[0]), conditions)
    return jnp.mean(jnp.square(made - targets))

  errors = jax.lax.map(error, candidates)
  return Boundary(candidates[jnp.argmin(errors)], errors)


def repeated(noise: jax.Array, num: int) -> jax.Array:
  """The same noise for every row, [num, ...]."""
  return jnp.broadcast_to(noise[None], (num, *noise.shape))
