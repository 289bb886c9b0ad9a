"""What top-H's prefix of the likeliest tokens loses against the best set under its entropy bound.

  python -m ancestral.benchmarks.top_h          # a Markdown table, in seconds

The bound is H(q) <= alpha H(p), q the law p restricted to the set; the best set has the most mass,
and is found among all subsets.
"""

import numpy as np
from absl import app, flags

_LAWS = flags.DEFINE_integer("laws", 400, "Random laws for each row of the table.")

LAWS = {
  "Dirichlet(1)": lambda rng, size: rng.dirichlet(np.ones(size)),
  "Dirichlet(0.3)": lambda rng, size: rng.dirichlet(np.full(size, 0.3)) + 1e-12,
  "softmax of N(0, 4)": lambda rng, size: np.exp(2 * rng.normal(size=size)),
}


def entropies(mass, weighted):
  """H of a restriction of total mass P and sum of p log p S: log P - S / P."""
  return np.log(mass) - weighted / mass


def masses(law, alpha) -> tuple[float, float]:
  """(the prefix's mass, the best set's)."""
  weighted = law * np.log(law)
  bound = -alpha * weighted.sum() * (1 + 1e-9)
  subsets = (np.arange(1, 2**law.size)[:, None] >> np.arange(law.size)) & 1
  mass = subsets @ law
  best = mass[entropies(mass, subsets @ weighted) <= bound].max()
  order = np.argsort(-law)
  prefix = np.cumsum(law[order])
  fits = entropies(prefix, np.cumsum(weighted[order])) <= bound
  return prefix[fits.sum() - 1], best


def main(_):
  """Prints the table."""
  rng = np.random.default_rng(0)
  print(
    "| laws | V | alpha | prefix below the best | mean loss | worst |\n|---|---|---|---|---|---|"
  )
  for name, make in LAWS.items():
    for size in (4, 8, 12):
      for alpha in (0.2, 0.4, 0.6, 0.8):
        losses = []
        for _ in range(_LAWS.value):
          law = make(rng, size)
          prefix, best = masses(law / law.sum(), alpha)
          losses.append(1 - prefix / best)
        share = np.mean(np.array(losses) > 1e-9)
        mean, worst = np.mean(losses), np.max(losses)
        print(f"| {name} | {size} | {alpha} | {share:.1%} | {mean:.1%} | {worst:.1%} |")


if __name__ == "__main__":
  app.run(main)
