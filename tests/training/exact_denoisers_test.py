"""Training reaches the exact denoiser: every head, and every weighting under every head."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ancestral.models import mlp, precondition, schedules, toy
from ancestral.training import denoising, state, step, weightings

# Three blobs of different widths, of standard deviation about 1 a coordinate.
DATA = toy.GaussianMixture(
  jnp.array([0.5, 0.3, 0.2]),
  jnp.array([[1.2, 0.3], [-1.0, 0.8], [-0.4, -1.3]]),
  jnp.array([0.05, 0.1, 0.02]),
)
SCHEDULE = schedules.linear()
LOW, HIGH = 0.05, 3.0  # of sigma / alpha
HEADS = {
  "noise": precondition.NOISE,
  "data": precondition.DATA,
  "velocity": precondition.VELOCITY,
  "flow": precondition.FLOW,
  "karras": precondition.karras(0.7),
}
WEIGHTINGS = {
  "noise": weightings.noise,
  "data": weightings.data,
  "velocity": weightings.velocity,
  "flow": weightings.flow,
  "karras": weightings.karras(0.7),
  "min_snr": weightings.min_snr(),
  "p2": weightings.p2(),
}


def one_of(choices, index):
  """The function of `choices` whose place is `index`, traced, so that one program trains all."""
  return lambda *given: jnp.stack([choice(*given) for choice in choices])[index]


NETWORK = mlp.mlp(mlp.MLPConfig(dim=2, width=64, num_layers=1))
TIMES = weightings.log_uniform(SCHEDULE, LOW, HIGH)


def model_of(head):
  chosen = precondition.Head(
    one_of([each.to_denoised for each in HEADS.values()], head),
    one_of([each.from_denoised for each in HEADS.values()], head),
  )
  return denoising.network_denoiser(NETWORK, SCHEDULE, chosen, 1.0)


def trained(params, head, weighting, *, num_steps):
  weight = one_of([*WEIGHTINGS.values()], weighting)
  loss_fn = denoising.denoising(model_of(head), SCHEDULE, weight, TIMES)
  optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, num_steps))
  averaging = state.no_average()
  step_key, data_key = jax.random.split(jax.random.key(1))

  def body(held, key):
    batch = {"x": toy.mixture_sample(key, DATA, 256)}
    held, _ = step.train_step(
      step_key, held, batch, loss_fn=loss_fn, optimizer=optimizer, averaging=averaging
    )
    return held, None

  first = state.init(jax.random.key(2), lambda key: params, optimizer, averaging)
  return jax.lax.scan(body, first, jax.random.split(data_key, num_steps))[0].params


def error(params, head):
  """RMS of D - D* by that of D* - x_0, over all noise levels."""
  data_key, noise_key, time_key = jax.random.split(jax.random.key(3), 3)
  clean = toy.mixture_sample(data_key, DATA, 4096)
  t = TIMES(weightings.low_discrepancy(time_key, 4096))
  noise = jax.random.normal(noise_key, clean.shape)
  x = SCHEDULE.alpha(t)[:, None] * clean + SCHEDULE.sigma(t)[:, None] * noise
  exact = toy.mixture_denoiser(DATA, SCHEDULE)(x, t)
  apart = jnp.square(model_of(head)(params, x, t) - exact)
  return jnp.sqrt(jnp.mean(apart) / jnp.mean(jnp.square(exact - clean)))


def errors(heads, weights, num_steps):
  """Before training and after; all runs are one program."""
  heads, weights = jnp.asarray(heads), jnp.asarray(weights)
  params = jax.jit(NETWORK.init)(jax.random.key(0), jnp.zeros((1, 2)))
  first = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(heads)), params)
  train = jax.jit(jax.vmap(functools.partial(trained, num_steps=num_steps)))
  measure = jax.jit(jax.vmap(error))
  return [np.asarray(measure(p, heads)) for p in (first, train(first, heads, weights))]


def test_every_head_reaches_the_exact_denoiser():
  """With the weighting of each head's own squared error."""
  own = np.array([[*WEIGHTINGS].index(name) for name in HEADS])
  before, after = errors(np.arange(len(HEADS)), own, 400)
  assert np.all(after < 0.2) and np.all(after < before / 3.5), (before, after)


@pytest.mark.slow
def test_every_head_does_with_every_weighting():
  heads, weights = np.divmod(np.arange(len(HEADS) * len(WEIGHTINGS)), len(WEIGHTINGS))
  before, after = errors(heads, weights, 1000)
  assert np.all(after < 0.15) and np.all(after < before / 5), (before, after)
