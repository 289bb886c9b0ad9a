"""Averages of the parameters whose length is chosen after training (EDM2).

The average over steps 1 .. T of profile gamma weighs step i by (i / T)^(gamma + 1) - ((i - 1) /
T)^(gamma + 1): a power of training time, so its length is a share of the run however long that is.
`power_average` keeps a few; from their snapshots, `posthoc_weights` finds any other.

    averaging = power_average((0.05, 0.10))                      # in training; snapshots are saved
    weights = posthoc_weights(stds, steps, 0.15, num_steps)      # afterwards
    params = combined(zip(weights, snapshots))

Reference: Karras et al. 2023, arXiv 2312.02696, section 3 and appendix C.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import state as state_lib

# Profiles are compared on at most so many intervals of training time; fewer steps are each one.
_MAX_INTERVALS = 4096


def exponent(relative_std: float) -> float:
  """gamma of the profile whose standard deviation is `relative_std` of the training time.

  relative_std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)); the largest real root.

  Raises:
    ValueError: not above 0 and below 0.28, near where gamma would be 0: an average of all steps.

  Reference: arXiv 2312.02696, appendix C, eq. 123 and algorithm 2.
  """
  if not 0 < relative_std < 0.28:
    raise ValueError(f"relative_std={relative_std}: it is above 0 and below 0.28.")
  inverse = relative_std**-2
  return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def power_average(relative_stds: Sequence[float]) -> state_lib.Averaging:
  """A tuple of running averages, one for each relative standard deviation.

  average <- b average + (1 - b) params, b = (1 - 1 / t)^(gamma + 1) at step t = 1, 2, ..: which is
  the profile above, exactly, at every t.
  """
  exponents = [exponent(std) for std in relative_stds]

  def update(averages, params, step):
    # 1 - b: late in training b itself is too near 1 for float32.
    gains = [-jnp.expm1((gamma + 1) * jnp.log1p(-1 / (step + 1))) for gamma in exponents]
    return tuple(
      jax.tree.map(lambda old, new, g=g: old + g.astype(old.dtype) * (new - old), a, params)
      for a, g in zip(averages, gains, strict=True)
    )

  return state_lib.Averaging(
    init=lambda params: tuple(jax.tree.map(jnp.copy, params) for _ in exponents), update=update
  )


def profile(relative_std: float, num_steps: int, edges: np.ndarray) -> np.ndarray:
  """Weight of the steps between edges [n + 1], in the average at step `num_steps`; [n], sum 1."""
  shares = np.minimum(np.asarray(edges, np.float64) / num_steps, 1.0)
  return np.diff(shares ** (exponent(relative_std) + 1))


def posthoc_weights(
  relative_stds: Sequence[float], steps: Sequence[int], relative_std: float, step: int
) -> np.ndarray:
  """Weights [n] of n snapshots whose sum is nearest to the average of another profile.

  Least squares between profiles as functions of the training step, with weights that sum to 1.

  Args:
    relative_stds: of each snapshot's average.
    steps: at which each was taken.
    relative_std: of the average wanted.
    step: at which it is wanted.

  Raises:
    ValueError: no snapshots, or none at `step` or later: what came after the last is not known.
  """
  if not len(steps) or max(steps) < step:
    raise ValueError(f"No snapshot at step {step} or later: there are {sorted(set(steps))}.")
  last = max(steps)
  edges = np.unique(np.round(np.linspace(0, last, min(last, _MAX_INTERVALS) + 1)))
  scale = np.diff(edges) ** -0.5  # of a density that is constant within an interval
  pairs = zip(relative_stds, steps, strict=True)
  basis = np.stack([profile(std, at, edges) * scale for std, at in pairs], axis=1)
  target = profile(relative_std, step, edges) * scale
  # Of weights that sum to 1: the first is what the others leave.
  rest = np.linalg.lstsq(basis[:, 1:] - basis[:, :1], target - basis[:, 0], rcond=None)[0]
  return np.concatenate([[1 - rest.sum()], rest])


def combined(weighted: Iterable[tuple[float, state_lib.Params]]) -> state_lib.Params:
  """sum_i w_i params_i, one snapshot in memory at a time, summed in float64 where each part is."""
  total: Any = None
  for weight, params in weighted:
    leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, params))
    parts = [[weight * np.asarray(x.data, np.float64) for x in _local(leaf)] for leaf in leaves]
    total = parts if total is None else jax.tree.map(np.add, total, parts)

  def placed(leaf, parts):
    pairs = zip(parts, _local(leaf), strict=True)
    arrays = [jax.device_put(part.astype(leaf.dtype), shard.device) for part, shard in pairs]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, arrays)

  return structure.unflatten(map(placed, leaves, total))


def _local(leaf: jax.Array) -> list[Any]:
  return leaf.addressable_shards


def used(state: state_lib.TrainState) -> state_lib.Params:
  """The parameters to use: their average, the first if there are several, or they themselves."""
  average = state.average
  if not jax.tree.leaves(average):
    return state.params
  of_params = jax.tree.structure(average) == jax.tree.structure(state.params)
  return average if of_params else average[0]
