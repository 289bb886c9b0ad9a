"""Optimisers as optax chains, and schedules of their learning rate."""

from typing import Any

import jax
import optax


def warmup_cosine(
  peak: float, *, num_steps: int, warmup_steps: int, final_fraction: float = 0.1
) -> optax.Schedule:
  """Linear from 0 to `peak`, then half a cosine to `final_fraction * peak` at `num_steps`."""
  _check_fits(num_steps, warmup_steps, 1)
  return optax.warmup_cosine_decay_schedule(
    0.0, peak, warmup_steps, num_steps, final_fraction * peak
  )


def warmup_stable_decay(
  peak: float,
  *,
  num_steps: int,
  warmup_steps: int,
  decay_fraction: float = 0.1,
  final_fraction: float = 0.0,
) -> optax.Schedule:
  """Linear from 0 to `peak`, constant, then linear down over the last `decay_fraction` of steps.

  A run can be prolonged from any point of the constant part. The paper's decay is exponential; a
  linear one ends at 0.

  Reference: Hu et al. 2024, arXiv 2404.06395, section 4.
  """
  decay_steps = max(1, round(decay_fraction * num_steps))
  _check_fits(num_steps, warmup_steps, decay_steps)
  return optax.join_schedules(
    [
      optax.linear_schedule(0.0, peak, warmup_steps),
      optax.constant_schedule(peak),
      optax.linear_schedule(peak, final_fraction * peak, decay_steps),
    ],
    [warmup_steps, num_steps - decay_steps],
  )


def _check_fits(num_steps: int, warmup_steps: int, decay_steps: int) -> None:
  if warmup_steps + decay_steps > num_steps:
    raise ValueError(
      f"warmup_steps={warmup_steps} and {decay_steps} steps of decay are more than "
      f"num_steps={num_steps}: lower warmup_steps or raise num_steps."
    )


def _name(path) -> str:
  return jax.tree_util.keystr(path[-1:], simple=True)  # "" of a bare array


def decays(params: Any) -> Any:
  """A tree of bool: weight decay pulls at all parameters but norms' scales and biases."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: _name(path) not in ("scale", "bias"), params
  )


def _muon_axes(params):
  """Orthogonalise kernels [..., in, out], a layer at a time; the rest is Adam's."""
  axes = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: axes if _name(path) == "kernel" else None, params
  )


def adamw(
  schedule: optax.Schedule,
  *,
  b1: float = 0.9,
  b2: float = 0.95,
  weight_decay: float = 0.1,
  clip_norm: float = 1.0,
) -> optax.GradientTransformation:
  """AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101) after clipping by the global norm."""
  return optax.chain(
    optax.clip_by_global_norm(clip_norm),
    optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=decays),
  )


def muon(
  schedule: optax.Schedule,
  *,
  b1: float = 0.9,
  b2: float = 0.95,
  momentum: float = 0.95,
  weight_decay: float = 0.1,
  clip_norm: float = 1.0,
) -> optax.GradientTransformation:
  """Muon for the layers' kernels and Nesterov's Adam for the rest, after clipping as `adamw` does.

  Updates of a kernel are scaled to the root mean square of Adam's, 0.2 (Liu et al. 2025, arXiv
  2502.16982, equation 4), so both share one schedule. Weight decay pulls at the kernels only.
  """
  return optax.chain(
    optax.clip_by_global_norm(clip_norm),
    optax.contrib.muon(
      schedule,
      beta=momentum,
      weight_decay=weight_decay,
      adam_b1=b1,
      adam_b2=b2,
      consistent_rms=0.2,
      muon_weight_dimension_numbers=_muon_axes,
    ),
  )
