"""Every head and weighting, trained on a mixture whose denoiser is exact: how far from it each is.

  python -m ancestral.benchmarks.denoising_heads --figure=docs/figures/denoising_heads.png

The same residual network and number of steps for all, on a variance-preserving path; the error is
the root mean square of D(x_t) - E[x_0 | x_t] by noise ratio, over that of x_0 - E[x_0 | x_t], which
no denoiser can do without. Minutes of CPU.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from ancestral.models import mlp, precondition, schedules, toy
from ancestral.training import denoising, optimizer, state, step, weightings

_STEPS = flags.DEFINE_integer("steps", 3000, "Steps of training.")
_BATCH = flags.DEFINE_integer("batch_size", 512, "Examples in a step.")
_FIGURE = flags.DEFINE_string("figure", None, "File for the figure.")

PATH = schedules.cosine()
HEADS = {
  "noise": precondition.NOISE,
  "data": precondition.DATA,
  "velocity": precondition.VELOCITY,
  "flow": precondition.FLOW,
  "karras": precondition.karras(1.0),
}
WEIGHTINGS = {
  "noise": weightings.noise,
  "data": weightings.data,
  "velocity": weightings.velocity,
  "flow": weightings.flow,
  "karras": weightings.karras(1.0),
  "min_snr": weightings.min_snr(),
  "p2": weightings.p2(),
  "learned": weightings.velocity,
}
RATIOS = np.geomspace(0.02, 20, 13)


def mixture() -> toy.GaussianMixture:
  """Four modes on a circle, of unit variance in all."""
  angles = np.pi / 4 + np.pi / 2 * np.arange(4)
  means = 1.36 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
  weights = np.array([0.1, 0.2, 0.3, 0.4])
  return toy.GaussianMixture(*map(jnp.float32, (weights, means, np.full(4, 0.02))))


def loss_of(model, index: jax.Array) -> step.LossFn:
  """The loss of weighting number `index`, which may be traced: one program trains them all."""

  def weight(alpha, sigma):
    return jnp.stack([weighting(alpha, sigma) for weighting in WEIGHTINGS.values()])[index]

  def log_variance(params, t):
    features = jnp.stack([jnp.ones_like(t), t, t**2, jnp.log(t + 1e-3)], axis=1)
    return jnp.where(index == [*WEIGHTINGS].index("learned"), features @ params["level"], 0)

  times = weightings.log_uniform(PATH, 0.01, 50.0)
  return denoising.denoising(model, PATH, weight, times, log_variance=log_variance)


def trained(model, network, index: jax.Array):
  """Averaged params of the model after training with weighting number `index`."""
  schedule = optimizer.warmup_cosine(2e-3, num_steps=_STEPS.value, warmup_steps=_STEPS.value // 20)
  chosen = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))
  averaging = state.exponential_average(0.99)
  init = lambda key: {"network": network.init(key, jnp.zeros((1, 2))), "level": jnp.zeros(4)}
  init_key, step_key, data_key = jax.random.split(jax.random.key(0), 3)

  def body(held, key):
    batch = {"x": toy.mixture_sample(key, mixture(), _BATCH.value)}
    held, _ = step.train_step(
      step_key,
      held,
      batch,
      loss_fn=loss_of(model, index),
      optimizer=chosen,
      averaging=averaging,
    )
    return held, None

  first = state.init(init_key, init, chosen, averaging)
  return jax.lax.scan(body, first, jax.random.split(data_key, _STEPS.value))[0].average


def errors(model, params) -> jax.Array:
  """Relative error by noise ratio."""
  data = mixture()
  exact = toy.mixture_denoiser(data, PATH)
  clean = toy.mixture_sample(jax.random.key(1), data, 4096)
  noise = jax.random.normal(jax.random.key(2), clean.shape)

  def at(t):
    x = PATH.alpha(t) * clean + PATH.sigma(t) * noise
    best = exact(x, t)
    error = jnp.mean((model(params, x, t) - best) ** 2)
    return jnp.sqrt(error / jnp.mean((clean - best) ** 2))

  return jax.lax.map(at, jnp.asarray(PATH.time(-np.log(RATIOS)), jnp.float32))


def row(head: precondition.Head) -> np.ndarray:
  """Relative errors of every weighting, [weightings, ratios]."""
  network = mlp.mlp(mlp.MLPConfig(dim=2, width=96, num_layers=2))
  inner = denoising.network_denoiser(network, PATH, head, 1.0)
  model = lambda params, *args: inner(params["network"], *args)
  run = jax.jit(lambda index: errors(model, trained(model, network, index)))
  return np.stack([run(jnp.int32(i)) for i in range(len(WEIGHTINGS))])


def plot(path, found) -> None:
  """A panel a head, a line a weighting."""
  from matplotlib import figure

  made = figure.Figure(figsize=(14, 3.4))
  for axes, head in zip(made.subplots(1, len(HEADS), sharey=True), HEADS, strict=True):
    for weighting in WEIGHTINGS:
      axes.plot(RATIOS, found[head, weighting], label=weighting)
    axes.set(xscale="log", yscale="log", title=f"head: {head}", xlabel="noise ratio")
    axes.grid(alpha=0.3)
  made.axes[0].set_ylabel("error / least possible")
  made.axes[-1].legend(fontsize=7)
  made.savefig(path, dpi=110, bbox_inches="tight")


def main(_) -> None:
  """Trains all, prints the root mean square over noise ratios."""
  found = {}
  print("| head | " + " | ".join(WEIGHTINGS) + " |\n|---" + "|---" * len(WEIGHTINGS) + "|")
  for head, form in HEADS.items():
    for name, values in zip(WEIGHTINGS, row(form), strict=True):
      found[head, name] = values
    cells = [f"{np.sqrt(np.mean(found[head, name] ** 2)):.3f}" for name in WEIGHTINGS]
    print(f"| {head} | " + " | ".join(cells) + " |", flush=True)
  if _FIGURE.value:
    plot(_FIGURE.value, found)


if __name__ == "__main__":
  app.run(main)
