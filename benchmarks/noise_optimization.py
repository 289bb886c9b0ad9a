"""Noise optimisation: through all steps of the sampler, or through a surrogate of few.

  python -m ancestral.launch.train --config=configs/image_diffusion.py --workdir=runs/dit \\
      --seeds=0,1,2
  python -m ancestral.benchmarks.noise_optimization --run=runs/dit

Of digits whose class is told, one of two things is asked for: the mean brightness of the top half,
or its pixels, each of a real image that the model has not seen. The loss is the squared error; the
noise is optimised by Adam through a solver of 1, 2, 4 or 10 steps, the last being the sampler
itself, and decoded by that of 10; |z| held adds the log density of |z| to the loss. There is no
distilled model: a surrogate of one step is the model's own E[x_0 | x_T] at the noisiest time.
Beside them stand the first noise and the best of n.

Cost is in evaluations: forward, once more where a step is checkpointed, a pullback, which counts as
one, and the decoding. Seconds are to find the
noises of a batch, compiled already.

Reference: Novack et al. 2024, arXiv 2401.12179 (DITTO), 2405.20289 (DITTO-2).
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging

from ancestral.benchmarks import image_runs
from ancestral.launch import images
from ancestral.sampling import base, noise_optimization, noise_search

_IMAGES = flags.DEFINE_integer("per_run", 16, "Images of each seed of training.")
_STEPS = flags.DEFINE_list("steps", "1,2,4,10", "Evaluations of what is differentiated.")
_UPDATES = flags.DEFINE_list("updates", "10,40", "Of the noise.")
_RATE = flags.DEFINE_float("rate", 0.1, "Adam's.")

_HELD = flags.DEFINE_float("held", 1e-3, "Weight of the log density of |z|, in two of the rows.")

DECODE = 10  # evaluations of the sampler


class Row(NamedTuple):
  """What became of a batch."""

  error: np.ndarray  # [B], root mean square, after decoding
  surrogate: np.ndarray  # [B], of the surrogate's output in place of the sample
  found: np.ndarray  # [B] bool, whether a classifier finds the class
  length: np.ndarray  # [B], root mean square of the noise, 1 for N(0, I)
  evaluations: int
  seconds: float


def brightness(x: jax.Array, real: jax.Array) -> jax.Array:
  """Squared error of the mean of the top half, [B]."""
  half = x.shape[1] // 2
  return jnp.square(jnp.mean(x[:, :half] - real[:, :half], axis=(1, 2, 3)))


def pixels(x: jax.Array, real: jax.Array) -> jax.Array:
  """Mean squared error of the pixels of the top half, [B]."""
  half = x.shape[1] // 2
  return jnp.mean(jnp.square(x[:, :half] - real[:, :half]), axis=(1, 2, 3))


TARGETS = {"brightness of the top half": brightness, "pixels of the top half": pixels}


def sample_of(run: image_runs.Run, params, labels, num_steps: int, checkpointed=False):
  """Noise to sample in so many evaluations."""
  classes = run.experiment.examples.num_classes
  denoise = images.denoiser(run.experiment.model, params, labels, classes, 1.0)
  table = image_runs.table(run, "dpmpp_2m", num_steps)
  return noise_search.of_table(denoise, table, checkpointed=checkpointed)


def held(noise: jax.Array) -> jax.Array:
  """-log p(|z|) of z ~ N(0, I), up to a constant, [B]: least where |z|^2 is one less than d."""
  square = jnp.sum(jnp.square(noise), axis=(1, 2, 3))
  return 0.5 * square - 0.5 * (noise[0].size - 1) * jnp.log(square)


def optimizer_of(
  run: image_runs.Run, loss: Callable, num_steps: int, updates: int, weight: float = 0.0
) -> Callable:
  """A jitted (params, keys, labels, real) -> (noise, cost in evaluations [B]).

  Args:
    run: whose model, apart from its params.
    loss: (samples, real images) -> [B].
    num_steps: of what is differentiated.
    updates: of the noise.
    weight: of `held` in the loss.
  """

  @jax.jit
  def call(params, keys, labels, real):
    sample = sample_of(run, params, labels, num_steps, checkpointed=num_steps > 1)
    of = lambda x, noise: loss(x, real) + weight * held(noise)
    algorithm = noise_optimization.optimized(sample, of, optax.adam(_RATE.value))
    state = base.start(keys, algorithm, jnp.zeros_like(real))
    state, _ = base.run(keys, algorithm, state, updates)
    repeated = state.pullbacks if num_steps > 1 else 0
    return state.noise, state.evaluations + state.pullbacks + repeated + DECODE

  return call


def best_of(run: image_runs.Run, loss: Callable, num: int) -> Callable:
  """A jitted (params, keys, labels, real) -> (noise, evaluations [B]), of the best of n."""

  @jax.jit
  def call(params, keys, labels, real):
    sample = sample_of(run, params, labels, DECODE)
    algorithm = noise_search.random_search(sample, lambda x: -loss(x, real))
    state = base.start(keys, algorithm, jnp.zeros_like(real))
    state, _ = base.run(keys, algorithm, state, num - 1)
    return state.noise, state.evaluations

  return call


def decoder(run: image_runs.Run, num_steps: int) -> Callable:
  """A jitted (params, labels, noise) -> samples."""
  return jax.jit(lambda params, labels, noise: sample_of(run, params, labels, num_steps)(noise)[0])


def asked(run: image_runs.Run) -> tuple[jax.Array, jax.Array]:
  """Held-out images and their labels."""
  examples = run.experiment.examples
  return jnp.asarray(examples.test[: _IMAGES.value]), jnp.asarray(
    examples.test_labels[: _IMAGES.value]
  )


def row(run, loss, find, surrogate, decode, warm: bool) -> Row:
  """Finds noises, timed, and decodes them; compiled already unless it is to warm up."""
  real, labels = asked(run)
  keys = base.row_keys(jax.random.key(run.experiment.config.seed), jnp.arange(len(labels)))
  if warm:
    jax.block_until_ready(find(run.params, keys, labels, real))
  began = time.perf_counter()
  noise, cost = jax.block_until_ready(find(run.params, keys, labels, real))
  seconds = time.perf_counter() - began
  x = decode(run.params, labels, noise)
  error, believed = (
    np.sqrt(np.asarray(loss(made, real))) for made in (x, surrogate(run.params, labels, noise))
  )
  found = run.features(np.asarray(x))[1] == np.asarray(labels)
  length = np.sqrt(np.mean(np.square(noise), axis=(1, 2, 3)))
  return Row(error, believed, found, length, int(cost[0]), seconds)


def interval(values: np.ndarray) -> str:
  """Mean and 1.96 standard errors."""
  return f"{np.mean(values):.4f} ± {1.96 * np.std(values, ddof=1) / np.sqrt(len(values)):.4f}"


def show(name: str, rows: list[Row]) -> None:
  """A line of the table, of all runs together."""
  every = lambda field: np.concatenate([getattr(row, field) for row in rows])
  seconds = np.array([row.seconds for row in rows])
  print(
    f"| {name} | {rows[0].evaluations} | {np.mean(seconds):.2f} ± {np.ptp(seconds) / 2:.2f} | "
    f"{interval(every('error'))} | {interval(every('surrogate'))} | "
    f"{np.mean(every('found')):.2f} | {np.mean(every('length')):.2f} |",
    flush=True,
  )


def main(_) -> None:
  """Prints a table for each target."""
  logging.set_verbosity(logging.WARNING)
  runs = image_runs.load()
  decoders = {n: decoder(runs[0], n) for n in {DECODE, *map(int, _STEPS.value)}}
  decode, first = decoders[DECODE], runs[0]
  print(f"{len(runs)} runs, {_IMAGES.value} images each; mean ± 1.96 standard errors; seconds")
  print("± half the range over runs\n")
  for title, loss in TARGETS.items():
    print(
      f"{title}\n\n| noise | evaluations | seconds | error | of the surrogate | found | length |"
    )
    print("|---" * 7 + "|")
    methods = {"the first": (best_of(first, loss, 1), DECODE)}
    for updates in map(int, _UPDATES.value):
      for n in map(int, _STEPS.value):
        find = optimizer_of(first, loss, n, updates)
        methods[f"{updates} through {n}"] = find, n
    for n in (4, DECODE):
      find = optimizer_of(first, loss, n, updates, weight=_HELD.value)
      methods[f"{updates} through {n}, |z| held"] = find, n
    for num in (13, 49, 121):
      methods[f"best of {num}"] = best_of(first, loss, num), DECODE
    for name, (find, n) in methods.items():
      show(name, [row(run, loss, find, decoders[n], decode, run is first) for run in runs])
    print(flush=True)


if __name__ == "__main__":
  app.run(main)
