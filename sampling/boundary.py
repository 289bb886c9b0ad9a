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

# (x_0 [B, ...], target [B, ...]) -> [B]
Distance = Callable[[jax.Array, jax.Array], jax.Array]


class Boundary(NamedTuple):
  """The noise chosen, and what each candidate's errors were."""

  noise: jax.Array  # [...], the candidate of the least mean over the pairs
  errors: jax.Array  # [N, R]


def mean_squared(x: jax.Array, y: jax.Array) -> jax.Array:
  """|x - y|^2 / size of rows, [B]."""
  return jnp.mean(jnp.square(x - y), axis=tuple(range(1, x.ndim)))


def search(
  solve: Solve,
  candidates: jax.Array,
  conditions: jax.Array,
  targets: jax.Array,
  *,
  distance: Distance = mean_squared,
  batch_size: int = 1,
) -> Boundary:
  """The candidate x_T of the least mean distance over R known pairs.

    x_T* = argmin_n (1 / R) sum_r distance(solve(candidate_n, condition_r), target_r)

  It costs N R runs of the sampler, once.

  Args:
    solve: the sampler, a batch at a time.
    candidates: [N, ...], of what the sampler starts from.
    conditions: [R, ...].
    targets: [R, ...], what the sampler should give.
    distance: the paper's is LPIPS, a network's. The mean square rewards noises that lead near the
      posterior's mean, so to smooth samples.
    batch_size: candidates at once, R rows each.

  Raises:
    ValueError: conditions and targets are not as many.

  Reference: Ma et al. 2023, arXiv 2305.15357, section 3.3.
  """
  if conditions.shape[0] != targets.shape[0]:
    raise ValueError(f"{conditions.shape[0]} conditions for {targets.shape[0]} targets.")

  def error(noise):
    return distance(solve(repeated(noise, conditions.shape[0]), conditions), targets)

  errors = jax.lax.map(error, candidates, batch_size=batch_size)
  return Boundary(candidates[jnp.argmin(jnp.mean(errors, axis=1))], errors)


def repeated(noise: jax.Array, num: int) -> jax.Array:
  """The same noise for every row, [num, ...]."""
  return jnp.broadcast_to(noise[None], (num, *noise.shape))
