"""Minority guidance: towards samples that a diffusion model thinks unlikely.

A sample of a region with few data is changed much when it is noised and denoised: the denoiser
takes it for something more common. That change is its minority score; a classifier of noisy data
into classes of the score then guides sampling, as any classifier does (`guidance.classifier`).

    scores = minority.score(keys, denoise, schedule, examples, t)
    classes = minority.classes(scores, 100)  # train log_prob(x_t, t) -> [B, 100] on them
    rare = lambda x, t: log_prob(x, t)[:, -1]
    guided = guidance.classifier(denoise, rare, schedule, scale)

Reference: Um et al. 2023, arXiv 2301.12334.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ..models import base as models
from ..models import precondition, schedules
from . import base, solvers

# (x [B, ...], y [B, ...]) -> [B]
Distance = Callable[[jax.Array, jax.Array], jax.Array]


def squared(x: jax.Array, y: jax.Array) -> jax.Array:
  """|x - y|^2 of rows, [B]."""
  return jnp.sum(jnp.square(x - y), axis=tuple(range(1, x.ndim)))


def score(
  keys: base.Keys,
  denoise: models.Denoiser,
  schedule: schedules.Schedule,
  x: jax.Array,
  t: float,
  *,
  num_noises: int = 5,
  distance: Distance = squared,
) -> jax.Array:
  """The minority score E[distance(x, E[x_0 | x_t])], x_t = alpha x + sigma z: [B].

  Args:
    keys: [B].
    denoise: E[x_0 | x_t].
    schedule: of x_t.
    x: [B, ...], samples without noise.
    t: how much noise: enough that the denoiser has to guess. The paper has .9 of a chain of 1,000
      steps for CelebA.
    num_noises: of the mean over z, as many evaluations. Five, the paper's, rank small images
      loosely: the fewer entries, the more z.
    distance: the paper's is LPIPS, a network's; of no network, the squared error.

  Reference: Um et al. 2023, arXiv 2301.12334, section 3.
  """
  time = jnp.full(x.shape[:1], t)
  alpha, sigma = precondition.coefficients(schedule, x, time)

  def one(i):
    at = base.row_keys_at(keys, jnp.full(keys.shape, i))
    return distance(x, denoise(alpha * x + sigma * solvers.white(at, None, x), time))

  return jnp.mean(jax.lax.map(one, jnp.arange(num_noises)), axis=0)


def classes(scores: jax.Array, num_classes: int) -> jax.Array:
  """Which of `num_classes` equally frequent classes each score [N] is of, the last the highest.

  Reference: Um et al. 2023, arXiv 2301.12334, section 3.2, which has 100.
  """
  rank = jnp.argsort(jnp.argsort(scores))
  return rank * num_classes // scores.shape[0]
