"""How good texts of a masked model are, against calls of the network and against time.

  T="python -m ancestral.launch.train"; C=configs/masked_lm.py
  $T --config=$C:text --workdir=runs/masked; $T --config=$C:blocks --workdir=runs/blocks
  $T --config=$C:text-autoregressive --workdir=runs/causal
  $T --config=$C:text-autoregressive --workdir=runs/reference --config.seed=1
  python -m ancestral.benchmarks.masked_text --masked=runs/masked --blocks=runs/blocks \\
      --causal=runs/causal --reference=runs/reference

Held-out bits a token first: exact for the causal models, a bound for the others. Then, for every
way to sample: calls of the network a sequence, seconds a batch, bits a token under the reference
model, that is, another causal model; entropy of a sequence's own letters; and repetition, the share
of its runs of 4 tokens that it has had before. A text may be likely because it is dull: the first
number means something beside those of held-out texts only. Writes docs/figures/masked_text.png.
"""

import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import ml_collections
import numpy as np
import rich.console
import rich.table
from absl import app, flags

from ancestral.launch import experiment as experiment_lib
from ancestral.launch import held_out, language, masked, unmasking
from ancestral.models import base as models
from ancestral.sampling import base, decode, logits
from ancestral.training import data, likelihood

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_RUNS = {
  name: flags.DEFINE_string(name, None, f"Workdir of the {name} run.", required=True)
  for name in ("masked", "blocks", "causal", "reference")
}
_NUM = flags.DEFINE_integer("num", 256, "Sequences of each sampler.")
_BATCH = flags.DEFINE_integer("batch_size", 32, "Sequences at once.")
_FIGURE = flags.DEFINE_string("figure", "docs/figures/masked_text.png", "Where the picture goes.")

# Of each family of lines, settings of `config.evaluation.unmasking`.
SETTINGS = {
  "first hitting": [{"sampler": "first_hitting"}],
  "ancestral": [{"sampler": "ancestral", "steps": n} for n in (8, 16, 32, 64, 128, 512)],
  "random": [{"sampler": "ordered", "per_step": n} for n in (2, 4, 8)],
  "margin": [{"sampler": "ordered", "order": "margin", "per_step": n} for n in (1, 2, 4, 8)],
  "max probability": [
    {"sampler": "ordered", "order": "max_probability", "per_step": n} for n in (1, 4)
  ],
  "left to right": [{"sampler": "ordered", "order": "left_to_right"}],
  "sampled token": [
    {"sampler": "ordered", "order": "sampled_probability", "per_step": n} for n in (1, 4)
  ],
  "entropy bound": [{"sampler": "ordered", "entropy_bound": g} for g in (0.1, 0.5, 1.0, 2.0)],
  "threshold": [
    {"sampler": "ordered", "order": "max_probability", "threshold": p} for p in (0.9, 0.6)
  ],
  "remasking": [{"sampler": "remasking", "steps": n, "remask": 0.05} for n in (64, 256)],
  "blocks of 16, in order": [{"sampler": "first_hitting", "block": 16}],
}


class Line(NamedTuple):
  """A way to sample, and what came of it."""

  family: str
  name: str
  calls: float
  seconds: float
  bits: float
  entropy: float
  repetition: float


def restored(name: str) -> tuple[Any, Any]:
  """(experiment, params) of a run; the evaluation looks at more batches than in training."""
  experiment, params, _ = experiment_lib.restore_params(None, _RUNS[name].value)
  config = experiment.config.copy_and_resolve_references()
  config.evaluation.num_batches = 64
  return experiment._replace(config=config), params


def sampled(fill: Callable, num_new: int) -> tuple[np.ndarray, float, float]:
  """(tokens [N, L], calls a sequence, seconds a batch) of fill(keys) -> (tokens, calls)."""
  jax.block_until_ready(fill(base.row_keys(jax.random.key(1), jnp.arange(_BATCH.value))))
  drawn, took = [], []
  for first in range(0, _NUM.value, _BATCH.value):
    keys = base.row_keys(jax.random.key(0), jnp.arange(first, first + _BATCH.value))
    begin = time.perf_counter()
    drawn.append(jax.block_until_ready(fill(keys)))
    took.append(time.perf_counter() - begin)
  tokens, calls = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
  return tokens[:, :num_new], float(np.mean(calls)), float(np.median(took))


def causal_filler(experiment: language.Experiment, params, num_new: int) -> Callable:
  """Decoding with a cache, from the beginning."""
  prompts = decode.Prompts(
    jnp.full((_BATCH.value, 1), experiment.tokenizer.bos), jnp.ones(_BATCH.value, jnp.int32)
  )

  @jax.jit
  def fill(params, keys):
    made = decode.generate(
      *(experiment.model, params, keys, prompts),
      max_new_tokens=num_new,
      transform=logits.chain(),
      stop=(),
    )
    return made.tokens[:, 1:], jnp.full(_BATCH.value, num_new)

  return functools.partial(fill, params)


def masked_filler(experiment: masked.Experiment, params, num_new: int, **settings) -> Callable:
  """Filling in from nothing."""
  chosen = ml_collections.ConfigDict({**unmasking.section(), **settings})
  unmasking.check(chosen)
  fill = masked.filler(experiment, lambda settings: logits.chain(), chosen)
  tokens = jnp.full((_BATCH.value, num_new), experiment.mask, jnp.int32)
  return lambda keys: fill(params, {}, keys, tokens)


def reference_bits(experiment: language.Experiment, params) -> Callable[[np.ndarray], float]:
  """A function of tokens [N, L]: bits a token under a causal model."""

  @jax.jit
  def nats(tokens):
    first = jnp.full((len(tokens), 1), experiment.tokenizer.bos)
    before = jnp.concatenate([first, tokens[:, :-1]], axis=1)
    hidden, _ = models.apply(experiment.model, params, before)
    return jnp.mean(likelihood.cross_entropy(experiment.model.readout(params, hidden), tokens))

  def bits(tokens):
    parts = [tokens[i : i + 32] for i in range(0, len(tokens), 32)]
    return float(np.average([nats(part) for part in parts], weights=list(map(len, parts))))

  return lambda tokens: bits(tokens) / math.log(2)


def entropy_of(tokens: np.ndarray) -> float:
  """Bits of the frequencies of a sequence's own tokens, the mean over sequences."""
  found = []
  for row in tokens:
    p = np.bincount(row) / len(row)
    found.append(-np.sum(p[p > 0] * np.log2(p[p > 0])))
  return float(np.mean(found))


def repetition_of(tokens: np.ndarray, n: int = 4) -> float:
  """The share of runs of n tokens that come a second time or more in their sequence."""
  found = []
  for row in tokens:
    runs = Counter(tuple(row[i : i + n]) for i in range(len(row) - n + 1))
    found.append(1 - len(runs) / sum(runs.values()))
  return float(np.mean(found))


def held_out_tokens(experiment: masked.Experiment) -> np.ndarray:
  """Rows of held-out text, [N, L]."""
  batches = data.batches(
    experiment.held_out, experiment.rows, batch_size=_BATCH.value, shuffle=False
  )
  return np.concatenate([next(batches)["tokens"] for _ in range(_NUM.value // _BATCH.value)])


def lines(runs: dict[str, tuple[Any, Any]]) -> list[Line]:
  """All ways to sample."""
  num_new = runs["masked"][0].config.data.row_length
  bits = reference_bits(*runs["reference"])

  def line(family, name, tokens, calls, took):
    return Line(family, name, calls, took, bits(tokens), entropy_of(tokens), repetition_of(tokens))

  found = [line("held out", "", held_out_tokens(runs["masked"][0]), 0, 0)]
  fill = causal_filler(*runs["causal"], num_new)
  found.append(line("causal", "one token a call", *sampled(fill, num_new)))
  for family, many in SETTINGS.items():
    for settings in many:
      fill = masked_filler(*runs["masked"], num_new, **settings)
      name = ", ".join(f"{k}={v}" for k, v in settings.items() if k not in ("sampler", "order"))
      found.append(line(family, name, *sampled(fill, num_new)))
  size = runs["blocks"][0].config.loss.block_length
  for n in (1, 2, 4):
    settings = {"sampler": "ordered", "per_step": n, "block": size}
    fill = masked_filler(*runs["blocks"], num_new, **settings)
    found.append(line(f"trained in blocks of {size}", f"per_step={n}", *sampled(fill, num_new)))
  return found


def picture(found: Sequence[Line]) -> None:
  """Bits under the reference against calls, and against seconds."""
  figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
  for axes, field in zip(panels, ("calls", "seconds"), strict=True):
    for family in dict.fromkeys(line.family for line in found[1:]):
      some = sorted((getattr(x, field), x.bits) for x in found if x.family == family)
      axes.plot(*zip(*some, strict=True), "o-", label=family, markersize=4)
    axes.axhline(found[0].bits, color="black", linestyle=":", linewidth=0.8, label="held-out text")
    axes.set(
      xscale="log", xlabel={"calls": "calls a sequence", "seconds": "seconds a batch"}[field]
    )
  panels[0].set(ylabel="bits a token under the reference")
  panels[1].legend(fontsize=7)
  figure.savefig(_FIGURE.value, dpi=120, bbox_inches="tight")


def main(_: Sequence[str]) -> None:
  """Prints the tables and draws the picture."""
  console = rich.console.Console(width=110)
  runs = {name: restored(name) for name in _RUNS}
  for name, (experiment, params) in runs.items():
    bits = held_out.mean_loss(experiment)(params) / math.log(2)
    size = sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6
    sign = "=" if experiment.config.kind == "language" else "<="
    console.print(f"{name}: {size:.2f}M parameters, held-out bits a token {sign} {bits:.3f}")
  table = rich.table.Table(
    *("sampler", "", "calls", f"s for {_BATCH.value}", "bits", "entropy", "repetition")
  )
  found = lines(runs)
  for x in found:
    numbers = (f"{x.calls:.1f}", f"{x.seconds:.3f}", f"{x.bits:.3f}", f"{x.entropy:.2f}")
    table.add_row(x.family, x.name, *numbers, f"{x.repetition:.3f}")
  console.print(table)
  picture(found)


if __name__ == "__main__":
  app.run(main)
