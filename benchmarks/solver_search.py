"""Learned and searched solvers on exact denoisers, beside diffusers' best and tuned grids.

  python -m ancestral.benchmarks.solver_search --figure=docs/figures/solver_search.png

Two targets: four modes in 2-D, and a kernel density of digits in 64-D. Tables are fitted on
--trajectories of one seed; every error shown is of --rows others, which no method has seen, and the
best of the fixed solvers (ours, and diffusers') is picked on the trajectories too. Then transfer:
tables fitted to the 2-D target, or to eight random mixtures, on eight mixtures that are new.
"""  # fmt: skip

import csv
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from ancestral.benchmarks import exact_targets
from ancestral.benchmarks import solvers as fixed
from ancestral.models import toy
from ancestral.sampling import grids, multistep, tables
from ancestral.training import solver_learning, solver_search

_TRAJECTORIES = flags.DEFINE_integer("trajectories", 256, "To fit to.")
_STEPS = flags.DEFINE_integer("steps", 40, "Of a fit.")
_GENERATIONS = flags.DEFINE_integer("generations", 12, "Of a search.")
_METHODS = flags.DEFINE_list("methods", None, "Beginnings of the methods' names; all if unset.")
_TARGETS = flags.DEFINE_list("targets", "modes,digits", "Of modes, digits, transfer.")

CHAIN = fixed.CHAIN
FIRST = float(CHAIN.sigma(CHAIN.max_time)), float(CHAIN.alpha(CHAIN.max_time))


def mixture_of(target: exact_targets.Target) -> toy.GaussianMixture:
  """The target as a model has it."""
  return toy.GaussianMixture(*map(jnp.asarray, target[1:]))


def denoise(mixture: toy.GaussianMixture, x: jax.Array, t: jax.Array) -> jax.Array:
  """E[x_0 | x_t]."""
  return toy.mixture_denoiser(mixture, CHAIN)(x, t)


def of_pool(mixtures: toy.GaussianMixture, x: jax.Array, t: jax.Array) -> jax.Array:
  """The same of several mixtures [P], each of as many rows x [P B, D]."""
  num = mixtures.weights.shape[0]
  rows = x.reshape(num, -1, x.shape[1])
  return jax.vmap(denoise)(mixtures, rows, t.reshape(num, -1)).reshape(x.shape)


def teacher(target: exact_targets.Target, seed: int, num: int) -> solver_learning.Teacher:
  """The target's exact trajectories."""
  z = np.random.default_rng(seed).normal(size=(num, target.means.shape[1]))
  truth = exact_targets.solution(target, CHAIN, FIRST[0] * z)
  return solver_learning.Teacher(denoise, mixture_of(target), jnp.asarray(z), jnp.asarray(truth))


def score(
  target: exact_targets.Target, held_out: solver_learning.Teacher, table: tables.SolverTable
) -> exact_targets.Score:
  """RMS, median and share in another mode, of noise that was not fitted to."""
  made = np.asarray(solver_learning.trajectory(held_out, table).sample)
  return exact_targets.score(target, made, np.asarray(held_out.samples))


def best_fixed(trained: solver_learning.Teacher, n: int) -> list[tuple[float, str, str]]:
  """(error, solver, grid) of ours with n evaluations, the best first."""
  found = []
  for solver in fixed.SOLVERS:
    for grid in fixed.GRIDS:
      table = fixed.ours_within(solver, grid, n)
      if table.num_rows == n:
        found.append((solver_learning.error(trained, table), solver, grid))
  return sorted(found)


def best_peer(target, trained, held_out, n) -> tuple[str, exact_targets.Score] | None:
  """Diffusers' best on the fitted trajectories, and its score on the others."""
  if not fixed._PEERS.value:
    return None

  def sample(name, of):
    expansion, schedule = fixed.theirs_within(name, n)
    scale = FIRST[1] if fixed.PEERS[name][0] == fixed.LMS else 1.0
    return exact_targets.replay(
      expansion, schedule, target, FIRST[0] * np.asarray(of.noise) / scale
    )

  off = lambda name: exact_targets.rms(sample(name, trained) - np.asarray(trained.samples))
  name = min(fixed.PEERS, key=off)
  return name, exact_targets.score(target, sample(name, held_out), np.asarray(held_out.samples))


def methods(trained: solver_learning.Teacher, n: int):
  """name -> () -> table."""
  ranked = best_fixed(trained, n)
  _, solver, grid = ranked[0]
  make, times = fixed.SOLVERS[solver], fixed.GRIDS[grid](n)
  one_each = [(s, g) for _, s, g in ranked if s not in ("Heun", "2S", "3S")]
  starts = [fixed.ours_within(*one_each[i], n) for i in (0, 1)]
  starts.append(multistep.ipndm(CHAIN, fixed.GRIDS["uniform, jump"](n)))
  loss = functools.partial(solver_learning.error, trained)
  fine = grids.to_zero(grids.power(CHAIN, 60, end=1.0))
  rng = np.random.default_rng(0)
  sizes = solver_search.SCREENED._replace(generations=_GENERATIONS.value)
  seeds = [
    solver_search.genes_of(solver_search.nearest_places(fine, fixed.GRIDS[g](n)), p, form)
    for g in ("quadratic, jump", "log_snr, jump", "uniform, jump")
    for p in (2, 3)
    for form in (0, 1)
  ]

  def learn():
    fit = functools.partial(solver_learning.learned, trained, CHAIN, max_steps=_STEPS.value)
    return min((fit(start) for start in starts), key=lambda found: found.after).table

  return {
    f"best fixed ({solver}, {grid})": lambda: fixed.ours_within(solver, grid, n),
    "its grid tuned": lambda: solver_learning.tuned_grid(trained, CHAIN, make, times).table,
    "DC-Solver": lambda: solver_learning.compensated(trained, CHAIN, times).table,
    "time steps (AutoDiffusion)": lambda: (
      solver_search.time_steps(
        rng,
        loss,
        CHAIN,
        fine,
        n,
        multistep.dpmpp_2m,
        evolution=sizes._replace(candidates=1),
        seeds=[seeds[0][: n - 1]],
      ).table
    ),
    "strategies (S^3)": lambda: (
      solver_search.strategies(rng, loss, CHAIN, fine, n, evolution=sizes, seeds=seeds).table
    ),
    "learned": learn,
  }


HEADER = "| evaluations | solver | RMS | median | another mode | s |\n" + "|---" * 6 + "|"


def line(n: int, name: str, at: exact_targets.Score, seconds: float | None = None) -> None:
  """A row of the table."""
  took = "" if seconds is None else f"{seconds:.0f}"
  print(f"| {n} | {name} | {at.rms:.4f} | {at.median:.5f} | {at.moved:.1%} | {took} |", flush=True)


def compare(target: exact_targets.Target, nfes: list[int]) -> list[tuple]:
  """Fits every method to one target; (target, evaluations, method, score)."""
  trained, held_out = teacher(target, 7, _TRAJECTORIES.value), teacher(target, 1, fixed._ROWS.value)
  print(f"\n### {target.name}\n\n{HEADER}")
  found = []
  for n in nfes:
    if peer := best_peer(target, trained, held_out, n):
      line(n, f"diffusers' best ({peer[0]})", peer[1])
      found.append((target.name, n, "diffusers' best", peer[1]))
    for name, make in methods(trained, n).items():
      if _METHODS.value and not name.startswith(tuple(_METHODS.value)):
        continue
      began = time.perf_counter()
      table = make()
      at = score(target, held_out, table)
      line(n, name, at, time.perf_counter() - began)
      found.append((target.name, n, name.split(" (")[0], at))
  return found


def random_mixture(rng: np.random.Generator) -> exact_targets.Target:
  """Four modes at random, as wide and as far apart as those of `four_modes`."""
  means = rng.normal(size=(4, 2)) * 0.75
  return exact_targets.Target(
    "random", rng.dirichlet(np.full(4, 5.0)), means, rng.uniform(0.02, 0.05, 4)
  )


def pooled(targets: list[exact_targets.Target], seed: int, num: int) -> solver_learning.Teacher:
  """Trajectories of several mixtures at once."""
  each = [teacher(target, seed + i, num) for i, target in enumerate(targets)]
  context = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(of.context for of in each))
  join = lambda name: jnp.concatenate([getattr(of, name) for of in each])
  return solver_learning.Teacher(of_pool, context, join("noise"), join("samples"))


def transfer(nfes: list[int]) -> list[tuple]:
  """Tables of one mixture, and of eight, on eight new ones."""
  rng = np.random.default_rng(3)
  pool = pooled([random_mixture(rng) for _ in range(8)], 100, 128)
  single = teacher(exact_targets.four_modes(), 7, 1024)
  new = [random_mixture(rng) for _ in range(8)]
  held_out = [teacher(target, 200 + i, 256) for i, target in enumerate(new)]
  print("\n### new mixtures\n\nRMS: mean over eight, with its standard error.\n")
  print(
    "| evaluations | best fixed | grid tuned on 8 | learned on 1 | learned on 8 |\n"
    + "|---" * 5
    + "|"
  )
  found = []
  for n in nfes:
    _, solver, grid = best_fixed(pool, n)[0]
    start = fixed.ours_within(solver, grid, n)
    make, times = fixed.SOLVERS[solver], fixed.GRIDS[grid](n)
    made = {
      "best fixed": start,
      "grid tuned on 8": solver_learning.tuned_grid(pool, CHAIN, make, times).table,
      **{
        name: solver_learning.learned(of, CHAIN, start, max_steps=_STEPS.value).table
        for name, of in (("learned on 1", single), ("learned on 8", pool))
      },
    }
    errors = {k: [solver_learning.error(of, v) for of in held_out] for k, v in made.items()}
    cells = [f"{np.mean(v):.4f} ± {np.std(v, ddof=1) / len(v) ** 0.5:.4f}" for v in errors.values()]
    print(f"| {n} | " + " | ".join(cells) + " |", flush=True)
    found += [
      ("new mixtures", n, k, exact_targets.Score(float(np.mean(v)), np.median(v), np.nan))
      for k, v in errors.items()
    ]
  return found


def plot(path: str, found: list[tuple]) -> None:
  """RMS by evaluations, a panel a target."""
  from matplotlib import figure

  targets = list(dict.fromkeys(row[0] for row in found))
  made = figure.Figure(figsize=(4.5 * len(targets), 3.8), dpi=110)
  for panel, target in zip(np.ravel(made.subplots(1, len(targets))), targets, strict=True):
    for name in dict.fromkeys(row[2] for row in found if row[0] == target):
      rows = [(n, at.rms) for whose, n, method, at in found if (whose, method) == (target, name)]
      panel.plot(*zip(*rows, strict=True), marker="o", label=name)
    panel.set(yscale="log", title=target, xlabel="evaluations", ylabel="RMS error, held out")
    panel.legend(fontsize=7)
    panel.grid(alpha=0.3)
  made.savefig(path, bbox_inches="tight")


def main(_) -> None:
  """Compares, prints, draws."""
  jax.config.update("jax_enable_x64", True)
  nfes = [int(n) for n in fixed._NFE.value] if flags.FLAGS["nfe"].present else [5, 8, 10]
  found = []
  for name, make in (("modes", exact_targets.four_modes), ("digits", exact_targets.digits)):
    if name in _TARGETS.value:
      found += compare(make(), nfes)
  if "transfer" in _TARGETS.value:
    found += transfer(nfes)
  if fixed._CSV.value:
    with open(fixed._CSV.value, "w", newline="") as file:
      writer = csv.writer(file)
      writer.writerow(["target", "evaluations", "method", "rms", "median", "moved"])
      writer.writerows([*row[:3], *row[3]] for row in found)
  if fixed._FIGURE.value:
    plot(fixed._FIGURE.value, found)


if __name__ == "__main__":
  app.run(main)
