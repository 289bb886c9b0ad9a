"""Cloning the best of n answers, right or wrong: which KL-regularised optimum it is, exactly.

  python -m ancestral.benchmarks.best_of_n_cloning --figure=docs/figures/best_of_n_cloning.png

Half a minute. For a reward of 0 or 1, a policy pi that is right with probability p, and the best of
n draws,

  q_n(y) = pi(y) [1 - (1 - p)^n] / p    where y is right,    pi(y) (1 - p)^(n - 1)  where it is not,

which is pi(y) exp(r(y) / beta) / Z, the optimum of E[r] - beta KL(. || pi), at

  1 / beta = log[1 - (1 - p)^n] - log p - (n - 1) log(1 - p).

Right answers alone have the law pi(y | right) for every n: the optimum at beta -> 0. So for one
prompt best of n is a KL-regularised optimum at a temperature of its own. It differs between
prompts: 1 / beta is log n where p is small and grows without bound as p goes to 1. The tables say
how far one beta for all prompts is from it, and what dropping duplicates does to the law.

Reference: Lyu et al. 2025 (OREAL), arXiv 2502.06781, which clones right answers of best of n.
"""

import numpy as np
import scipy.optimize
import scipy.special
import scipy.stats
from absl import app, flags

_FIGURE = flags.DEFINE_string("figure", None, "File for the figure.")
_DRAWS = flags.DEFINE_integer("draws", 20_000, "Times n answers are drawn.")

ANSWERS, RIGHT = 40, 8
SIZES = 2, 4, 16
RATES = 0.02, 0.1, 0.3, 0.6, 0.9  # p


def inverse_beta(p, n):
  """1 / beta at which best of n is the optimum, of p in (0, 1)."""
  return np.log(-np.expm1(n * np.log1p(-p))) - np.log(p) - (n - 1) * np.log1p(-p)


def best_of_law(law: np.ndarray, right: np.ndarray, n: int) -> np.ndarray:
  """q_n [K], of pi [K] and which answers are right [K]."""
  p = law[right].sum()
  return law * np.where(right, -np.expm1(n * np.log1p(-p)) / p, (1 - p) ** (n - 1))


def optimum(law: np.ndarray, right: np.ndarray, inverse: float) -> np.ndarray:
  """pi(y) exp(r(y) / beta) / Z, [K]."""
  log = np.log(law) + inverse * (right - 1.0)
  return np.exp(log - np.logaddexp.reduce(log))


def tilted_rate(p, inverse):
  """How often that optimum is right."""
  return p / (p + (1 - p) * np.exp(-inverse))


def problem(rng: np.random.Generator, p: float) -> tuple[np.ndarray, np.ndarray]:
  """A policy over ANSWERS, RIGHT of them right and with mass p in all, unevenly."""
  right = np.arange(ANSWERS) < RIGHT
  law = rng.dirichlet(np.full(ANSWERS, 0.5))
  return np.where(right, p * law / law[right].sum(), (1 - p) * law / law[~right].sum()), right


def best_of_draws(rng, law, right, n, draws) -> tuple[np.ndarray, np.ndarray]:
  """Counts [K] of the first best of n; and of right answers when each group keeps them all once."""
  drawn = rng.choice(ANSWERS, p=law, size=(draws, n))
  first = np.argmax(right[drawn], axis=1)
  best = np.bincount(drawn[np.arange(draws), first], minlength=ANSWERS)
  met = np.zeros((draws, ANSWERS), bool)
  np.put_along_axis(met, drawn, True, axis=1)
  return best, (met & right).sum(0)


def fit(counts: np.ndarray, law: np.ndarray) -> tuple[float, float, float]:
  """The p-value of chi-square; total variation of counts to the law, and of draws of the law."""
  total = counts.sum()
  expected = law * total
  few = expected < 5  # pooled, as the test wants
  pool = lambda x: np.append(x[~few], x[few].sum()) if few.any() else x
  observed, wanted = pool(counts), pool(expected)
  inside = wanted > 0
  p_value = scipy.stats.chisquare(observed[inside], wanted[inside]).pvalue
  floor = np.sum(np.sqrt(2 * law * (1 - law) / (np.pi * total))) / 2  # E|x| of the normal limit
  return p_value, 0.5 * np.abs(counts / total - law).sum(), floor


def simulated() -> None:
  """Prints how simulated laws fit the closed forms, and the law of distinct right answers."""
  rng = np.random.default_rng(0)
  heads = "p | n | 1 / beta | law less optimum | best of n, TV (floor) | p-value"
  print(f"| {heads} | right ones cloned, TV (floor) | p-value | distinct right ones, TV |")
  print("|---" * 9 + "|")
  for p in RATES:
    for n in SIZES:
      law, right = problem(rng, p)
      q, best = best_of_law(law, right, n), optimum(law, right, inverse_beta(p, n))
      counts, distinct = best_of_draws(rng, law, right, n, _DRAWS.value)
      cloned = np.where(right, law / p, 0)
      whole, only = fit(counts, best), fit(np.where(right, counts, 0), cloned)
      unique = 0.5 * np.abs(distinct / distinct.sum() - cloned).sum()
      print(
        f"| {p} | {n} | {inverse_beta(p, n):.3f} | {np.abs(q - best).max():.0e} |"
        f" {whole[1]:.4f} ({whole[2]:.4f}) | {whole[0]:.2f} |"
        f" {only[1]:.4f} ({only[2]:.4f}) | {only[0]:.2f} | {unique:.3f} |"
      )


def one_beta_for_all(n: int, rates: np.ndarray) -> tuple[float, float, float]:
  """The one 1 / beta nearest to best of n over prompts; how far, on average and at most, from it.

  Nearest in the mean KL(q_n || optimum), which is of two events, right and wrong: given either the
  laws are the same. How far is in the probability of being right.
  """
  log_right, log_wrong = np.log(-np.expm1(n * np.log1p(-rates))), n * np.log1p(-rates)

  def divergence(inverse):
    odds = np.log(rates) - np.log1p(-rates) + inverse
    right, wrong = scipy.special.log_expit(odds), scipy.special.log_expit(-odds)
    each = np.exp(log_right) * (log_right - right) + np.exp(log_wrong) * (log_wrong - wrong)
    return each.mean()

  inverse = scipy.optimize.minimize_scalar(divergence, bounds=(0, 50), method="bounded").x
  difference = tilted_rate(rates, inverse) - np.exp(log_right)
  return inverse, np.abs(difference).mean(), difference[np.abs(difference).argmax()]


def prompts() -> None:
  """Prints one temperature for prompts of many success rates, and whom cloning hears."""
  rates = np.linspace(0.01, 0.99, 99)
  heads = "n | log n | 1 / beta at p = .02, .5, .98 | nearest for all | mean difference"
  print(f"\n| {heads} | greatest | prompts cloned at p = .02, .5 |")
  print("|---" * 7 + "|")
  for n in (2, 4, 16, 64):
    each = ", ".join(f"{inverse_beta(p, n):.2f}" for p in (0.02, 0.5, 0.98))
    nearest, mean, greatest = one_beta_for_all(n, rates)
    heard = ", ".join(f"{1 - (1 - p) ** n:.3f}" for p in (0.02, 0.5))
    print(f"| {n} | {np.log(n):.2f} | {each} | {nearest:.2f} | {mean:.3f} | {greatest:+.3f}"
          f" | {heard} |")  # fmt: skip


def draw_figure(path: str) -> None:
  """1 / beta by success rate, and how often each law is right."""
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(1, 2, figsize=(9, 3.3))
  p = np.linspace(0.005, 0.97, 200)
  for i, n in enumerate((2, 4, 16, 64)):
    axes[0].plot(p, inverse_beta(p, n), color=f"C{i}", label=f"n = {n}")
    axes[0].axhline(np.log(n), color=f"C{i}", ls=":", lw=1)
    axes[1].plot(p, -np.expm1(n * np.log1p(-p)), color=f"C{i}", label=f"best of {n}")
    nearest = one_beta_for_all(n, np.linspace(0.01, 0.99, 99))[0]
    axes[1].plot(p, tilted_rate(p, nearest), color=f"C{i}", ls="--", lw=1)
  axes[0].set(xlabel="p, how often the policy is right", ylabel="1 / beta", ylim=(0, 12))
  axes[1].set(xlabel="p", ylabel="right", title="dashed: one beta for all prompts")
  axes[0].set_title("best of n as an optimum; dotted: log n")
  axes[0].legend(fontsize=7)
  axes[1].legend(fontsize=7)
  figure.tight_layout()
  figure.savefig(path, dpi=130)


def main(_) -> None:
  """Prints the tables."""
  simulated()
  prompts()
  if _FIGURE.value:
    draw_figure(_FIGURE.value)


if __name__ == "__main__":
  app.run(main)
