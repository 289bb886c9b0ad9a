"""Noise optimisation: the initial noise that a loss of the sample likes best, by its gradient.

    surrogate = noise_search.of_table(denoise, few_steps)
    algorithm = noise_optimization.optimized(surrogate, loss, optax.adam(0.1))
    state = base.start(keys, algorithm, jnp.zeros((batch, 28, 28, 1)))
    state, info = base.run(keys, algorithm, state, num_updates)
    x, _ = noise_search.of_table(denoise, many_steps)(state.noise)           # decode

The gradient of loss(sample(z), z) goes through every step of the sampler (DITTO), which costs
memory unless the steps are checkpointed and time in any case; or through a surrogate of one or a
few steps, whose noise is then decoded by many (DITTO-2). The surrogate there is a distilled model.
Without one, one step from pure noise is E[x_0 | x_T], which all but forgets x_T: its gradient says
how to move the mean of the data, not the sample.

Where the optimum lies on a line or a plane, gradient descent takes the point of it that is nearest
to the noise it began with. Nothing holds that point where N(0, I) has its mass: a loss that reads
the noise may, + |z|^2 / (2 c) for a maximum a posteriori.

Counted are `evaluations`, calls of the denoiser on a row, and `pullbacks`, calls of its transposed
derivative, one for each. Of a network whose parameters get no gradient a pullback costs about as
much as an evaluation, and a checkpointed one repeats its evaluation first.

Reference: Novack et al. 2024, DITTO, arXiv 2401.12179; Novack et al. 2024, DITTO-2, arXiv
  2405.20289.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from . import base, solvers
from .noise_search import Sample

# (x [B, ...], noise [B, ...]) -> [B], row by row
Loss = Callable[[jax.Array, jax.Array], jax.Array]


class Optimizer(Protocol):
  """A pair of functions, as optax has them."""

  def init(self, params: Any) -> Any:
    """The state for these parameters."""

  def update(self, updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
    """(what to add to the parameters, the state) of a gradient."""


class State(NamedTuple):
  """The noise, and what the optimiser remembers of each row."""

  step: jax.Array  # [B] int32, updates
  noise: jax.Array  # [B, ...]
  optimizer: Any  # leaves [B, ...]
  evaluations: jax.Array  # [B] int32
  pullbacks: jax.Array  # [B] int32


class Info(NamedTuple):
  """Before the update."""

  loss: jax.Array  # [B]
  gradient_norm: jax.Array  # [B]


def optimized(sample: Sample, loss: Loss, optimizer: Optimizer) -> base.SamplingAlgorithm:
  """Descends loss(sample(z), z) in z, from z ~ N(0, I).

    z <- z + update(grad_z loss(sample(z), z))

  The optimiser is run on each row by itself: norms that it clips are a row's, and a row admitted
  late has its own count. Inputs [B, ...] give shape and dtype alone.

  Args:
    sample: noise to sample, or a surrogate, see `noise_search.of_table`; it is differentiated.
    loss: of samples and noises, row by row.
    optimizer: e.g. of optax, `adam(0.1)`.

  Reference: Novack et al. 2024, arXiv 2405.20289.
  """

  def objective(noise):
    x, evaluations = sample(noise)
    losses = loss(x, noise)
    return jnp.sum(losses), (losses, evaluations)

  def init(keys, x):
    noise = solvers.white(keys, None, jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32)))
    zero = jnp.zeros(noise.shape[:1], jnp.int32)
    return State(zero, noise, jax.vmap(optimizer.init)(noise), zero, zero)

  def step(keys, state):
    del keys
    gradient, (losses, evaluations) = jax.grad(objective, has_aux=True)(state.noise)
    updates, memory = jax.vmap(optimizer.update)(gradient, state.optimizer, state.noise)
    square = jnp.sum(jnp.square(gradient), axis=tuple(range(1, gradient.ndim)))
    state = State(
      state.step + 1,
      state.noise + updates.astype(state.noise.dtype),
      memory,
      state.evaluations + evaluations,
      state.pullbacks + evaluations,
    )
    return state, Info(losses, jnp.sqrt(square))

  return base.SamplingAlgorithm(init, step)
