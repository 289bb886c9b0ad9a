"""Steering by a reward at equal network calls, against laws that are known: what each method draws.

  python -m ancestral.benchmarks.particles --figure=docs/figures/particles.png

The target is p(x) exp(r(x) / alpha) / Z. First a Markov chain of 4 tokens and 6 places, sampled as
masked diffusion with exact conditionals, where every sequence can be counted; then a mixture in the
plane by a table with noise, counted in cells whose masses are known. KL is that of the counts from
the target, beside what as many draws from the target itself show. Last, a proxy of the reward that
was learned from samples of p, and the true reward of what the proxy chooses.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from scipy import stats

from ancestral.models import mask_schedules, schedules, tilted, toy
from ancestral.sampling import (
  ancestral,
  base,
  grids,
  masked,
  particles,
  soft_values,
  solvers,
)

_SEEDS = flags.DEFINE_integer("num_seeds", 3, "Seeds; spreads are over them.")
_ROWS = flags.DEFINE_integer("num_rows", 3000, "Samples of each method and seed.")
_FIGURE = flags.DEFINE_string("figure", None, "File for the figure.")

V, L = 4, 6
ALPHA = 0.25
FLOW = schedules.rectified_flow()
STEPS = 32
PRIOR = toy.GaussianMixture(
  jnp.array([0.55, 0.3, 0.15]),
  jnp.array([[-1.2, 0.0], [0.8, 1.0], [1.0, -1.0]]),
  jnp.array([0.1, 0.1, 0.1]),
)
LINEAR, QUADRATIC = jnp.array([4.0, -1.0]), 0.5
EDGES = np.array([-np.inf, -1.5, -1.1, -0.7, 0.2, 0.6, 0.9, 1.2, 1.6, np.inf])


class Toy(NamedTuple):
  """What is sampled, and how its samples are judged."""

  algorithm: base.SamplingAlgorithm
  num_steps: int
  inputs: Callable[[int], jax.Array]  # rows -> what init takes
  sample: Callable  # state -> what was drawn
  reward: Callable  # sample -> [B]
  values: dict[str, soft_values.Value]
  is_done: Callable
  counts: Callable[[np.ndarray], np.ndarray]  # samples -> counts of outcomes
  target: np.ndarray  # probabilities of outcomes
  calls: Callable  # state -> network calls


class Result(NamedTuple):
  """What a method made, seed by seed."""

  method: str
  calls: float
  rewards: np.ndarray  # [seeds]
  counts: np.ndarray  # [seeds, outcomes]


class Row(NamedTuple):
  """What is shown of it."""

  method: str
  calls: float
  reward: float
  kl: float


def chain_law() -> np.ndarray:
  """p [V] * L: 1 is rare, and seldom followed by 2."""
  transition = np.array([[5, 1, 2, 2], [4, 2, 1, 3], [3, 1, 4, 2], [2, 1, 3, 4]]) / 10
  return toy.markov_law(transition, 0, L)


def motif(tokens: jax.Array) -> jax.Array:
  """How often 1 is followed by 2."""
  return jnp.sum((tokens[:, :-1] == 1) & (tokens[:, 1:] == 2), axis=1).astype(jnp.float32)


def looked_up(table: np.ndarray) -> Callable[[jax.Array], jax.Array]:
  """tokens [B, L] of V + 1 kinds -> rows of a table of all of them."""
  places = (V + 1) ** jnp.arange(L - 1, -1, -1)
  table = jnp.asarray(table)
  return lambda tokens: table[jnp.sum(tokens * places[None], axis=1)]


def of_all_states(function: Callable) -> np.ndarray:
  """A function of tokens [B, L], for all (V + 1)^L of them."""
  states = np.array(list(itertools.product(range(V + 1), repeat=L)), np.int32)
  call = jax.jit(function)
  return np.concatenate([np.asarray(call(part)) for part in np.split(states, 25)])


def chain(reward: Callable, alpha: float) -> Toy:
  """Masked diffusion of the chain towards a reward of tokens."""
  law = chain_law()
  outcomes = np.array(list(itertools.product(range(V), repeat=L)))
  weight = np.asarray(reward(jnp.asarray(outcomes)), np.float64).reshape(law.shape) / alpha
  target = law * np.exp(weight)
  joint = jnp.asarray(law, jnp.float32)
  logits = looked_up(of_all_states(lambda tokens: toy.joint_predictor(joint)(tokens, 0.0)))
  soft = tilted.joint_soft_value(joint, jnp.asarray(weight, jnp.float32))
  exact = looked_up(of_all_states(soft))
  predict, read = lambda tokens, t: logits(tokens), soft_values.held_predicted(V)

  def known(keys, state, info):  # counted as if a network had said it
    return alpha * exact(state.state.tokens), read(state, info)[2]

  return Toy(
    algorithm=soft_values.held(
      lambda predict: masked.first_hitting(predict, mask_schedules.linear(), mask=V),
      predict,
      soft_values.tokens_point(V),
    ),
    num_steps=L,
    inputs=lambda rows: jnp.full((rows, L), V, jnp.int32),
    sample=lambda state: state.state.tokens,
    reward=reward,
    values={
      "exact v": known,
      "mode": soft_values.mode(reward, read, mask=V),
      "completions": soft_values.completions(reward, read, mask=V, num_draws=4, temperature=alpha),
    },
    is_done=lambda state: ~jnp.any(state.state.tokens == V, axis=1),
    counts=lambda x: np.bincount(x @ V ** np.arange(L - 1, -1, -1), minlength=V**L),
    target=(target / target.sum()).ravel(),
    calls=soft_values.one_at_first,
  )


def cells(mixture: toy.GaussianMixture) -> np.ndarray:
  """Masses of the cells between EDGES."""
  weights, means, variances = (np.asarray(leaf, np.float64) for leaf in mixture)
  cdf = stats.norm.cdf((EDGES[:, None, None] - means[None]) / np.sqrt(variances)[None, :, None])
  inside = np.diff(cdf, axis=0)
  return np.einsum("k,ik,jk->ij", weights / weights.sum(), inside[..., 0], inside[..., 1]).ravel()


def mixture() -> Toy:
  """Diffusion of the mixture towards alpha (a . x - b |x|^2 / 2)."""
  times = grids.to_zero(np.array(FLOW.time(np.linspace(-4, 3.5, STEPS))))
  table = ancestral.ddpm(FLOW, times, scale=lambda small, large: large)
  denoise = toy.mixture_denoiser(PRIOR, FLOW)
  reward = lambda x: ALPHA * (x @ LINEAR - QUADRATIC * jnp.sum(x**2, axis=1) / 2)

  def counts(x):
    at = [np.searchsorted(EDGES[1:-1], x[:, i]) for i in range(2)]
    return np.bincount(at[0] * (len(EDGES) - 1) + at[1], minlength=(len(EDGES) - 1) ** 2)

  return Toy(
    algorithm=soft_values.held(
      lambda denoise: solvers.tabulated(denoise, table), denoise, soft_values.table_point(table)
    ),
    num_steps=table.num_rows,
    inputs=lambda rows: jnp.zeros((rows, 2)),
    sample=lambda state: state.state.slots[:, 0],
    reward=reward,
    values={"mean": soft_values.posterior_mean(reward, soft_values.held_denoised(table))},
    is_done=lambda state: state.step == table.num_rows,
    counts=counts,
    target=cells(tilted.mixture(PRIOR, LINEAR, QUADRATIC)[0]),
    calls=soft_values.one_at_first,
  )


def draws(of: Toy, algorithm: base.SamplingAlgorithm, pick: Callable, method: str) -> Result:
  """Runs a method for every seed; pick: (keys, state) -> the state that is its sample."""

  @jax.jit
  def go(keys, inputs):
    state, _ = base.run(keys, algorithm, base.start(keys, algorithm, inputs), of.num_steps)
    x = of.sample(pick(base.row_keys_at(keys, state.step), state))
    return x, of.reward(x), state.calls

  rewards, counts, parts = [], [], 4
  for seed in range(_SEEDS.value):
    keys = base.row_keys(jax.random.key(seed), jnp.arange(_ROWS.value))
    made = [go(part, of.inputs(_ROWS.value // parts)) for part in jnp.split(keys, parts)]
    x, reward, calls = (np.concatenate(leaves) for leaves in zip(*made, strict=True))
    rewards.append(reward.mean())
    counts.append(of.counts(x))
  return Result(method, float(calls.mean()), np.array(rewards), np.array(counts))


def svdd(of: Toy, value: str, num: int, alpha: float) -> Result:
  """SVDD at a temperature; 0 is the best candidate."""
  algorithm = particles.svdd(
    of.algorithm, of.values[value], num_candidates=num, temperature=alpha, calls=of.calls
  )
  name = "SVDD" if alpha else "SVDD argmax"
  return draws(of, algorithm, lambda keys, state: state.state, f"{name}, {value}")


def smc(of: Toy, value: str, num: int, alpha: float, potentials: str = "DIFFERENCES") -> Result:
  """SMC with the potentials of that name."""
  algorithm = particles.smc(
    of.algorithm,
    of.values[value],
    num_particles=num,
    temperature=alpha,
    potentials=getattr(particles, potentials),
    calls=of.calls,
  )
  name = "SMC" if potentials == "DIFFERENCES" else f"FK {potentials.lower()}"
  return draws(of, algorithm, particles.drawn, f"{name}, {value}")


def of_n(of: Toy, num: int, alpha: float, best: bool) -> Result:
  """Best of n, or importance sampling from n."""
  reward = lambda state: of.reward(of.sample(state))
  algorithm = particles.best_of_n(of.algorithm, reward, of.is_done, num=num, temperature=alpha)
  pick = (lambda keys, state: particles.best(state)) if best else particles.drawn
  return draws(of, algorithm, pick, "best of n" if best else "importance")


def kl(counts: np.ndarray, target: np.ndarray) -> float:
  """KL of frequencies from the target."""
  p, some = counts / counts.sum(), counts > 0
  return float(np.sum(p[some] * np.log(p[some] / target[some])))


def floor(target: np.ndarray, num: int) -> float:
  """What `kl` is on average of `num` draws of the target itself."""
  rng = np.random.default_rng(0)
  return float(np.mean([kl(rng.multinomial(num, target), target) for _ in range(20)]))


def show(results: Iterator[Result], of: Toy, title: str) -> list[Row]:
  """A table of rewards and KLs, as they come; and its rows."""
  shown = []
  num = _ROWS.value * _SEEDS.value
  print(f"\n{title}; KL of {num} draws of the target itself: {floor(of.target, num):.3f}\n")
  print("| method | calls | reward | KL from the target |\n|---|---|---|---|")
  for r in results:
    each = [kl(counts, of.target) for counts in r.counts]
    row = Row(r.method, r.calls, r.rewards.mean(), kl(r.counts.sum(axis=0), of.target))
    print(
      f"| {row.method} | {row.calls:.0f} | {row.reward:.3f} ± {r.rewards.std(ddof=1):.3f} | "
      f"{row.kl:.3f} ± {np.std(each, ddof=1):.3f} |",
      flush=True,
    )
    shown.append(row)
  return shown


def chain_results(of: Toy) -> Iterator[Result]:
  """Every method at about the same calls: 6 a sample or particle, 1 + 5 M of SVDD."""
  for n in (4, 16, 64):
    yield of_n(of, n, ALPHA, True)
    yield of_n(of, n, ALPHA, False)
    for value, alpha in (("mode", 0.0), ("completions", 0.0), ("completions", ALPHA)):
      yield svdd(of, value, (6 * n - 1) // 5, alpha)
    for potentials in ("DIFFERENCES", "MAXIMA", "SUMS"):
      yield smc(of, "completions", n, ALPHA, potentials)


def exact_results(of: Toy) -> Iterator[Result]:
  """Those that know the exact value."""
  for num in (4, 16):
    yield svdd(of, "exact v", num, ALPHA)
    yield smc(of, "exact v", num, ALPHA)


def mixture_results(of: Toy) -> Iterator[Result]:
  """Every method at about the same calls: 32 a sample or particle, 1 + 31 M of SVDD."""
  for n in (4, 16, 64):
    yield of_n(of, n, ALPHA, True)
    yield of_n(of, n, ALPHA, False)
    yield svdd(of, "mean", n, 0.0)
    yield svdd(of, "mean", n, ALPHA)
    for potentials in ("DIFFERENCES", "MAXIMA", "SUMS"):
      yield smc(of, "mean", n, ALPHA, potentials)


TRUE = np.array([0.0, 1.0, 1.6, 1.2, 0.0, -2.0, -4.0])  # of how many tokens are 1


def true_reward(tokens: jax.Array) -> jax.Array:
  """Two or three of token 1 are good, more are worse and worse."""
  return jnp.asarray(TRUE, jnp.float32)[jnp.sum(tokens == 1, axis=1)]


def proxy(num: int = 300, noise: float = 0.3) -> Callable[[jax.Array], jax.Array]:
  """Ridge regression of noisy rewards of `num` samples of p on which token is where."""
  rng = np.random.default_rng(0)
  x = np.array(np.unravel_index(rng.choice(V**L, num, p=chain_law().ravel()), (V,) * L)).T
  features = np.eye(V)[x].reshape(num, -1)
  y = np.asarray(true_reward(jnp.asarray(x))) + noise * rng.normal(size=num)
  weights = np.linalg.solve(features.T @ features + np.eye(V * L), features.T @ (y - y.mean()))
  table = jnp.asarray(weights.reshape(L, V), jnp.float32)
  score = lambda tokens: jnp.sum(jax.nn.one_hot(tokens, V) * table[None], axis=(1, 2)) + y.mean()
  return lambda tokens: score(tokens).astype(jnp.float32)


def hacking() -> list[tuple]:
  """(method, its strength, calls, proxy, true reward) of samples that the proxy chose."""
  judged, rows = proxy(), []
  outcomes = np.array(list(itertools.product(range(V), repeat=L)))
  truth = np.asarray(true_reward(jnp.asarray(outcomes)), np.float64)

  def row(name, strength, r):
    share = r.counts.sum(axis=0) / r.counts.sum()
    rows.append((name, strength, r.calls, r.rewards.mean(), share @ truth))

  for n in (1, 4, 16, 64, 256):
    row("best of n", f"n = {n}", of_n(chain(judged, 1.0), n, 1.0, True))
  for alpha in (1.0, 0.5, 0.2, 0.1, 0.05):
    of = chain(judged, alpha)
    scored = np.asarray(judged(jnp.asarray(outcomes)), np.float64)
    rows.append(("target, exact", f"alpha = {alpha}", 0, of.target @ scored, of.target @ truth))
    row("SMC, 16", f"alpha = {alpha}", smc(of, "completions", 16, alpha))
  for num in (2, 8, 32):
    row("SVDD argmax", f"M = {num}", svdd(chain(judged, 1.0), "mode", num, 0.0))
  return rows


def show_hacking(rows: list[tuple]) -> None:
  """A table of the proxy and the true reward."""
  print("\n| method | strength | calls | proxy | true reward |\n|---|---|---|---|---|")
  for name, strength, calls, by_proxy, true in sorted(rows, key=lambda row: row[0]):
    print(f"| {name} | {strength} | {calls:.0f} | {by_proxy:.3f} | {true:.3f} |", flush=True)


def plot(path: str, found: dict[str, tuple[list[Row], float]], hacked: list[tuple]) -> None:
  """KL and reward against calls, and the true reward against the proxy."""
  from matplotlib import figure

  made = figure.Figure(figsize=(13, 8))
  axes = made.subplots(2, 3)
  for panels, (title, (rows, least)) in zip(axes, found.items(), strict=True):
    for name in dict.fromkeys(row.method for row in rows):
      shown = [row for row in rows if row.method == name]
      calls = [row.calls for row in shown]
      panels[0].plot(calls, [row.kl for row in shown], ".-", label=name)
      panels[1].plot(calls, [row.reward for row in shown], ".-", label=name)
    panels[0].axhline(least, color="grey", ls=":")
    panels[0].set(yscale="log", ylabel="KL from the target")
    panels[1].set(ylabel="reward")
    ticks = sorted({round(row.calls) for row in rows if row.method == "best of n"})
    for panel in panels[:2]:
      panel.set(xscale="log", xlabel="calls", title=title)
      panel.set_xticks(ticks, [str(n) for n in ticks])
      panel.set_xticks([], minor=True)
    panels[1].legend(fontsize=7)
  for name in dict.fromkeys(row[0] for row in hacked):
    shown = [row for row in hacked if row[0] == name]
    axes[0, 2].plot([row[3] for row in shown], [row[4] for row in shown], ".-", label=name)
  axes[0, 2].set(xlabel="proxy", ylabel="true reward", title="a learned proxy, chain")
  axes[0, 2].legend(fontsize=7)
  axes[1, 2].axis("off")
  made.tight_layout()
  made.savefig(path, dpi=110)


def main(_) -> None:
  """Prints the tables."""
  found = {}
  of = chain(motif, ALPHA)
  law = chain_law().ravel()
  print(f"chain: KL of the target from p {kl(of.target, law):.2f}")
  num = _ROWS.value * _SEEDS.value
  found["chain"] = show(chain_results(of), of, "Chain"), floor(of.target, num)
  show(exact_results(of), of, "Chain, exact value")
  of = mixture()
  print(f"mixture: KL of the target from p, on cells {kl(of.target, cells(PRIOR)):.2f}")
  found["mixture"] = show(mixture_results(of), of, "Mixture"), floor(of.target, num)
  hacked = hacking()
  show_hacking(hacked)
  if _FIGURE.value:
    plot(_FIGURE.value, found, hacked)


if __name__ == "__main__":
  app.run(main)
