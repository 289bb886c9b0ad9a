"""Few-step samplers of discrete diffusion, fixed, distilled (LSD, LSD+) and best, by exact laws.

  python -m ancestral.benchmarks.learned_samplers --figure=docs/figures/learned_samplers.png

Data are a Markov chain of 4 tokens, 6 long, whose predictor is exact, so that all error is the
sampler's. KL(samples || data), in nats, is computed and not sampled. The student is Euler's, and
where it says so tau-leaping's.
"""  # fmt: skip

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from ancestral.evaluation import exact_laws
from ancestral.models import mask_schedules, toy, toy_discrete
from ancestral.sampling import jumps, noises
from ancestral.training import sampler_distillation as distillation

_STEPS = flags.DEFINE_list("steps", "4,8,16", "Numbers of steps.")
_NOISES = flags.DEFINE_list("noises", "uniform,masking", "Of uniform, masking.")
_SCHEDULE = flags.DEFINE_enum("schedule", "linear", ["linear", "cosine"], "Of the noise.")
_UPDATES = flags.DEFINE_integer("updates", 100, "Of a distillation.")
_BATCH = flags.DEFINE_integer("batch", 64, "Paths an update.")
_ITERATIONS = flags.DEFINE_integer("iterations", 40, "Of the search for the best steps.")
_FIGURE = flags.DEFINE_string("figure", None, "Where to draw.")

VOCAB_SIZE, LENGTH = 4, 6


def chain(seed: int, length: int = LENGTH):
  """(law [V] * L, p(x_1), transition) of a Markov chain drawn at random."""
  transition = np.random.default_rng(seed).dirichlet(np.ones(VOCAB_SIZE), size=VOCAB_SIZE)
  law = toy.markov_law(transition, 0, length)
  return tuple(jnp.asarray(a, jnp.float32) for a in (law, transition[0], transition))


def problem(name: str, seed: int, length: int = LENGTH):
  """(predictor, noise, data's law)."""
  schedule = getattr(mask_schedules, _SCHEDULE.value)()
  law, first, transition = chain(seed, length)
  if name == "uniform":
    predict = toy_discrete.markov_predictor(first, transition, schedule)
    return predict, noises.uniform(schedule, VOCAB_SIZE), law
  predict = toy_discrete.markov_predictor(first, transition)
  return predict, noises.masking(schedule, VOCAB_SIZE), law


def methods(name: str, num_steps: int):
  """name -> (law, () -> steps)."""
  predict, noise, target = problem(name, 1)
  euler, tau = jumps.euler_law(noise), jumps.tau_leaping_law(noise)
  even = jumps.Steps(jnp.linspace(1, 0, num_steps + 1), jnp.ones(num_steps))
  setting = distillation.Setting(
    LENGTH, _BATCH.value, _UPDATES.value, teacher_steps=8, learning_rate=0.05
  )
  fit = lambda method, law, times, **fields: method(
    jax.random.key(0), predict, noise, law, times, setting._replace(**fields)
  )
  scale = functools.partial(fit, distillation.fit_coefficients, euler)
  best = functools.partial(
    distillation.best_steps, predict, noise, euler, max_iterations=_ITERATIONS.value
  )
  timed = functools.cache(lambda: fit(distillation.fit_times, euler, even.times))
  return {
    "tau-leaping": (tau, lambda: even),
    "ancestral": (jumps.posterior_law(noise), lambda: even),
    "Euler": (euler, lambda: even),
    "LSD": (euler, lambda: scale(even.times)),
    "LSD, relaxed": (euler, lambda: scale(even.times, perturbed=1)),
    "LSD+, times alone": (euler, lambda: even._replace(times=timed())),
    "LSD+": (euler, lambda: scale(timed())),
    "likeliest moves": (euler, lambda: fit(distillation.fit_moves, euler, even.times)),
    "likeliest moves of tau-leaping": (tau, lambda: fit(distillation.fit_moves, tau, even.times)),
    "best coefficients": (euler, lambda: best(even, target, learn_times=False)),
    "best times": (euler, lambda: best(even, target, learn_coefficients=False)),
    "best": (euler, lambda: best(even, target)),
    "best of another chain": (euler, lambda: elsewhere(name, even)),
  }


def measured(name: str, num_steps: int):
  """Yields (sampler, KL, total variation, steps, seconds)."""
  predict, noise, target = problem(name, 1)
  for method, (law, make) in methods(name, num_steps).items():
    began = time.perf_counter()
    steps = jax.tree.map(jnp.asarray, make())
    seconds = time.perf_counter() - began
    law_of = functools.partial(exact_laws.sampler_law, predict, noise, law, length=LENGTH)
    found = jax.jit(law_of)(steps)
    distances = (f(found, target) for f in (exact_laws.kl, exact_laws.total_variation))
    yield method, *map(float, distances), steps, seconds


def elsewhere(name: str, even: jumps.Steps) -> jumps.Steps:
  """The best steps on another chain, of 4 tokens, which is small enough to enumerate."""
  predict, noise, target = problem(name, 2, 4)
  return distillation.best_steps(
    predict, noise, jumps.euler_law(noise), even, target, max_iterations=_ITERATIONS.value
  )


def plot(path: str, found: list[tuple]) -> None:
  """KL by steps, a panel a kind of noise."""
  from matplotlib import colormaps, figure

  names = list(dict.fromkeys(row[0] for row in found))
  made = figure.Figure(figsize=(5.2 * len(names), 4), dpi=110)
  for panel, name in zip(np.ravel(made.subplots(1, len(names))), names, strict=True):
    panel.set_prop_cycle(color=colormaps["tab20"].colors)
    for method in dict.fromkeys(row[2] for row in found if row[0] == name):
      rows = [(row[1], row[3]) for row in found if (row[0], row[2]) == (name, method)]
      dashed = "--" if method.startswith("best") else "-"
      panel.plot(*zip(*rows, strict=True), dashed, marker="o", markersize=4, label=method)
    panel.set(xscale="log", yscale="log", title=name, xlabel="steps")
    panel.set_ylabel("KL(samples || data), nats")
    ticks = sorted({row[1] for row in found})
    panel.set_xticks(ticks, [str(tick) for tick in ticks])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
  made.axes[-1].legend(fontsize=7, bbox_to_anchor=(1.02, 1), loc="upper left")
  made.savefig(path, bbox_inches="tight")


def main(_) -> None:
  """Measures, prints, draws."""
  found = []
  for name in _NOISES.value:
    print(f"\n### {name}, {_SCHEDULE.value}\n")
    print(
      "| steps | sampler | KL | total variation | s | coefficients | times |\n" + "|---" * 7 + "|"
    )
    for num_steps in map(int, _STEPS.value):
      for method, kl, distance, steps, seconds in measured(name, num_steps):
        scales, times = (
          " ".join(f"{v:.2f}" for v in np.asarray(a)) if num_steps <= 4 else ""
          for a in (steps.coefficients, steps.times)
        )
        print(
          f"| {num_steps} | {method} | {kl:.4f} | {distance:.4f} | {seconds:.0f} "
          f"| {scales} | {times} |",
          flush=True,
        )
        found.append((name, num_steps, method, kl))
  if _FIGURE.value:
    plot(_FIGURE.value, found)


if __name__ == "__main__":
  app.run(main)
