"""What masked samplers draw against what they should, on a chain whose law is known.

  python -m ancestral.benchmarks.masked_laws

A Markov chain of 4 states and 6 tokens, 4,096 sequences, with its exact conditionals. Of every
sampler 600,000 sequences are drawn; total variation from the law beside that of as many honest
draws, and calls of the network a sequence. The law of ancestral sampling is also computed exactly.
Then the tail of float32's Gumbel noise, measured beside its closed form. Writes
docs/figures/masked_laws.png.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import rich.console
import rich.table
from absl import app, flags

from ancestral.evaluation import unmasking_laws
from ancestral.models import mask_schedules, toy
from ancestral.sampling import base, masked, remasking, unmasking

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_DRAWS = flags.DEFINE_integer("draws", 600_000, "Sequences of each sampler.", lower_bound=1000)
_FIGURE = flags.DEFINE_string("figure", "docs/figures/masked_laws.png", "Where the picture goes.")

V, L, CHUNK = 4, 6, 20_000
LINEAR = mask_schedules.linear()
STEPS = (1, 2, 4, 8, 16, 64, 256)


class Row(NamedTuple):
  """A sampler's line."""

  family: str
  name: str
  calls: float
  distance: float
  exact: float | None = None  # the distance of its own law


def chain() -> np.ndarray:
  """The law of 6 tokens of a chain that is stationary, [4] * 6."""
  transition = np.random.default_rng(33).dirichlet(np.full(V, 0.6), size=V)
  values, vectors = np.linalg.eig(transition.T)
  first = np.real(vectors[:, np.argmax(np.real(values))])
  law = first / first.sum()
  for _ in range(L - 1):
    law = law[..., None] * transition
  return law


def looked_up(law: np.ndarray):
  """`toy.joint_predictor` of the law as a table of all partly masked sequences: a fast network."""
  states = jnp.array(list(itertools.product(range(V + 1), repeat=L)), jnp.int32)
  predict = jax.jit(toy.joint_predictor(jnp.asarray(law, jnp.float32)))
  table = jnp.concatenate([predict(part, jnp.float32(0)) for part in jnp.split(states, 25)])
  weights = jnp.array([(V + 1) ** (L - 1 - i) for i in range(L)], jnp.int32)
  return lambda tokens, t: table[jnp.sum(tokens * weights[None], axis=1)]


def measured(algorithm, law: np.ndarray, num_steps: int | None = None) -> tuple[float, float]:
  """(calls a sequence, total variation from the law) of a sampler, made inside jit."""

  @jax.jit
  def run(keys):
    made = algorithm()
    state = base.start(keys, made, jnp.full((CHUNK, L), V, jnp.int32))
    if num_steps is None:
      done = lambda state: ~jnp.any(state.tokens == V, axis=1)
      state = base.run_until(keys, made, state, done, L)
    else:
      state = base.run(keys, made, state, num_steps)[0]
    return state.tokens, jnp.mean(state.calls)

  counts, calls = np.zeros(law.size), []
  for first in range(0, _DRAWS.value, CHUNK):
    keys = base.row_keys(jax.random.key(0), jnp.arange(first, first + CHUNK))
    tokens, called = run(keys)
    index = np.ravel_multi_index(np.asarray(tokens).T, law.shape)
    counts += np.bincount(index, minlength=law.size)
    calls.append(float(called))
  return float(np.mean(calls)), total_variation(counts / counts.sum(), law.ravel())


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
  """Half the L1 distance."""
  return 0.5 * float(np.abs(p - q).sum())


def floor(law: np.ndarray, num: int = 200) -> tuple[float, float]:
  """Mean and standard deviation of the total variation of honest draws."""
  rng, flat = np.random.default_rng(0), law.ravel() / law.sum()
  seen = [
    total_variation(rng.multinomial(_DRAWS.value, flat) / _DRAWS.value, flat) for _ in range(num)
  ]
  return float(np.mean(seen)), float(np.std(seen))


def samplers(predict) -> list[tuple[str, str, object, int | None]]:
  """(family, name, sampler, number of steps of its grid)."""
  how = {"mask": V}
  ordered = lambda rule: lambda: masked.unmask(predict, rule, **how)
  scores = {
    "random": unmasking.random_order,
    "left to right": unmasking.left_to_right,
    "max probability": unmasking.max_probability,
    "margin": unmasking.margin,
    "entropy": unmasking.negative_entropy,
  }
  rows = [("exact", "first hitting", lambda: masked.first_hitting(predict, LINEAR, **how), None)]
  rows += [("exact", name, ordered(unmasking.top(score)), None) for name, score in scores.items()]
  biased = unmasking.sampled_probability
  for num in (1, 2, 3):
    rows.append(("sampled token", f"{num} a step", ordered(unmasking.top(biased, num)), None))
  del scores["left to right"]
  for name, score in scores.items():
    for num in (2, 3):
      rows.append((name, f"{num} a step", ordered(unmasking.top(score, num)), None))
  for bound in (0.3, 0.6, 1.0, 2.0):
    rows.append(("entropy bound", f"{bound}", ordered(unmasking.entropy_bound(bound)), None))
  for least in (0.95, 0.8, 0.6):
    rule = unmasking.threshold(unmasking.max_probability, least)
    rows.append(("threshold", f"{least}", ordered(rule), None))
  for most in (0.5, 1.0):
    rows.append(("factor", f"{most}", ordered(unmasking.factor(most)), None))
  return rows + _gridded(predict)


def _gridded(predict):
  how, rows = {"mask": V}, []
  for steps in STEPS:
    times = np.linspace(1, 0, steps + 1)
    make = lambda times=times: masked.ancestral(predict, LINEAR, times, **how)
    rows.append(("ancestral", f"T = {steps}", make, steps))
  for within in (0, 10, 40):
    times = np.asarray(remasking.loop_times(LINEAR, 2, within, 2))
    remask = remasking.in_loop(remasking.cap(0.1))
    make = lambda times=times, remask=remask: remasking.remasking(
      predict, LINEAR, times, remask, **how
    )
    rows.append(("remasking", f"2 + {within} + 2 steps", make, len(times) - 1))
  for num in (1, 4):
    make = lambda num=num: remasking.corrected(
      masked.ancestral(predict, LINEAR, np.linspace(1, 0, 3), **how),
      remasking.gibbs(predict, **how),
      mask=V,
      num=num,
    )
    rows.append(("Gibbs", f"T = 2, {num} a step", make, 2))
  return rows


def exact_distance(name: str, law: np.ndarray) -> float:
  """Of the law of ancestral sampling in `T = n` equal steps."""
  steps = int(name.removeprefix("T = "))
  return total_variation(unmasking_laws.ancestral_law(law, 1 / np.arange(steps, 0, -1)), law)


def tail(console: rich.console.Console, num_tokens: int = 2000, draws: int = 1_000_000) -> None:
  """2,000 tokens of probability p, beside one that has the rest: how often one of them is drawn."""
  table = rich.table.Table(
    "p", "true", "default mode", "closed form", "ours", title=f"Of {draws:,} draws, a rare token"
  )
  d = 2.0**-23  # the least uniform number of the default mode
  for p in (1e-7, 3e-8, 1e-8):
    log_p = jnp.log(jnp.append(jnp.full(num_tokens, p), 1 - num_tokens * p))
    rows = jnp.repeat(log_p[None], 2000, axis=0)
    seen = np.sum([_hits(jax.random.key(i), rows) for i in range(draws // 2000)], axis=0) / draws
    closed = num_tokens * d * np.exp(-d / p) / -np.expm1(-d / p)
    table.add_row(f"{p:.0e}", *(f"{x:.1e}" for x in (num_tokens * p, seen[0], closed, seen[1])))
  console.print(table)


@jax.jit
def _hits(key, rows):
  """How many of a draw of each row are not the last token: (by JAX's default, by ours)."""
  one, other = jax.random.split(key)
  default = jax.random.categorical(one, rows, mode="low")
  ours = masked.draw_each(jax.random.split(other, len(rows)), rows[:, None])
  last = rows.shape[1] - 1
  return jnp.sum(default < last), jnp.sum(ours < last)


def picture(rows: Sequence[Row], noise: float) -> None:
  """Total variation against calls."""
  figure, axes = plt.subplots(figsize=(7, 4.5))
  for family in dict.fromkeys(row.family for row in rows):
    some = sorted((row.calls, row.distance) for row in rows if row.family == family)
    axes.plot(*zip(*some, strict=True), "o-", label=family, markersize=4)
  axes.axhline(noise, color="black", linewidth=0.8, linestyle=":", label="honest draws")
  axes.set(xlabel="calls of the network a sequence", ylabel="total variation", yscale="log")
  axes.legend(fontsize=7, ncols=2)
  figure.savefig(_FIGURE.value, dpi=120, bbox_inches="tight")


def main(_: Sequence[str]) -> None:
  """Prints the tables and draws the picture."""
  console, law = rich.console.Console(), chain()
  predict = looked_up(law)
  mean, deviation = floor(law)
  console.print(f"{_DRAWS.value:,} draws: honest ones are at {mean:.4f} +- {deviation:.4f}")
  table = rich.table.Table(
    "family", "sampler", "calls", "TV", "its law's TV", "(TV - floor) / s.d."
  )
  rows = []
  for family, name, algorithm, steps in samplers(predict):
    calls, distance = measured(algorithm, law, steps)
    exact = exact_distance(name, law) if family == "ancestral" else None
    rows.append(Row(family, name, calls, distance, exact))
    shown = "" if exact is None else f"{exact:.4f}"
    above = f"{(distance - mean) / deviation:+.1f}"
    table.add_row(family, name, f"{calls:.2f}", f"{distance:.4f}", shown, above)
  console.print(table)
  picture(rows, mean)
  tail(console)


if __name__ == "__main__":
  app.run(main)
