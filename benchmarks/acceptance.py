"""How often each rule of `sampling.coupling` takes a draft, beside the optimum, in markdown.

  python -m ancestral.benchmarks.acceptance                    # V = 50,000; n = 2, 4, 8; a minute
  python -m ancestral.benchmarks.acceptance --vocab_size=150000 --draws=200

The target's law is Zipf's (the exponent is the first column), with noise; the draft's logits are
the target's with noise of standard deviation 1. All are closed forms but recursive rejection
without replacement, the mean over `draws` of drafts, whose standard error is printed after it.
Below are the lossy rules of one draft, over 2,000 tokens: what they accept, and how far from the
target the law is of what they put out.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from ancestral.sampling import acceptance, coupling, lossy

_VOCAB = flags.DEFINE_integer("vocab_size", 50_000, "Vocabulary size.")
_DRAWS = flags.DEFINE_integer("draws", 1000, "Draws of the drafts without replacement.")

COLUMNS = ("Zipf", "n", "1 - TV", "match", "RRS", "K-SEQ", "optimum", "K-SEQ / optimum")
COLUMNS += ("RRS w/o", "optimum w/o", "RRS w/o / optimum w/o")


def laws(exponent: float, vocab_size: int) -> tuple[jax.Array, jax.Array]:
  """log q and log p [V]."""
  rng = np.random.default_rng(0)
  target = -exponent * np.log1p(rng.permutation(vocab_size)) + 0.3 * rng.normal(size=vocab_size)
  draft = target + rng.normal(size=vocab_size)
  return tuple(coupling.log_law(jnp.asarray(logits, jnp.float32)) for logits in (draft, target))


@functools.partial(jax.jit, static_argnums=2)
def closed_forms(log_q, log_p, n):
  """The columns that are functions of the laws."""
  return {
    "1 - TV": acceptance.maximal_acceptance(log_q, log_p),
    "match": acceptance.sample_and_match_acceptance(log_q, log_p, n),
    "RRS": acceptance.recursive_rejection_acceptance(log_q, log_p, n),
    "K-SEQ": acceptance.k_sequential_acceptance(log_q, log_p, n),
    "optimum": acceptance.optimal_acceptance(log_q, log_p, n),
    "optimum w/o": acceptance.optimal_acceptance_without_replacement(log_q, log_p, n),
  }


@functools.partial(jax.jit, static_argnums=3)
def without_replacement(keys, log_q, log_p, n):
  """The probability that recursive rejection takes one of n drafts, for each draw of them."""

  def given(key):
    drafts = jax.lax.top_k(log_q + jax.random.gumbel(key, log_q.shape, mode="high"), n)[1]
    rule = coupling.recursive_rejection_without_replacement
    return acceptance.acceptance_given(rule(drafts, log_q, log_p))

  return jax.lax.map(given, keys)


LOSSY = {
  "maximal coupling": coupling.maximal_one,
  "ensemble, w = 0.8": lossy.ensemble(0.8),
  "ensemble, w = 0.5": lossy.ensemble(0.5),
  "typical, 0.3 and 0.09": lossy.typical(0.3, 0.09),
}


@functools.partial(jax.jit, static_argnums=0)
def given_up(rule, log_q, log_p):
  """(acceptance, total variation to the target) of a rule of one draft."""
  accept = lambda x: acceptance.acceptance_given(rule(x[None], log_q, log_p))
  accepted = jnp.sum(jnp.exp(log_q) * jax.lax.map(accept, jnp.arange(log_q.size)))
  return accepted, lossy.departure(rule, log_q, log_p)


def print_lossy():
  """The table of lossy rules."""
  print("\n| Zipf | rule | accepted | total variation |\n|---|---|---|---|")
  for exponent in (0.6, 1.0, 1.5):
    log_q, log_p = laws(exponent, 2000)
    for name, rule in LOSSY.items():
      accepted, apart = given_up(rule, log_q, log_p)
      print(f"| {exponent} | {name} | {accepted:.3f} | {apart:.3f} |", flush=True)


def main(_):
  """Prints the tables."""
  print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
  for exponent in (0.6, 1.0, 1.5):
    log_q, log_p = laws(exponent, _VOCAB.value)
    for n in (2, 4, 8):
      row = {name: float(value) for name, value in closed_forms(log_q, log_p, n).items()}
      keys = jax.random.split(jax.random.key(n), _DRAWS.value)
      draws = np.asarray(without_replacement(keys, log_q, log_p, n), np.float64)
      error = draws.std() / len(draws) ** 0.5
      row = {name: f"{value:.3f}" for name, value in row.items()} | {
        "Zipf": str(exponent),
        "n": str(n),
        "K-SEQ / optimum": f"{row['K-SEQ'] / row['optimum']:.3f}",
        "RRS w/o": f"{draws.mean():.3f} ± {error:.3f}",
        "RRS w/o / optimum w/o": f"{draws.mean() / row['optimum w/o']:.3f}",
      }
      print("| " + " | ".join(row[name] for name in COLUMNS) + " |", flush=True)
  print_lossy()


if __name__ == "__main__":
  app.run(main)
