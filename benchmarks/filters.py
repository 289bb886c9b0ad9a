"""What a step's filters cost, beside a full sort, lax.top_k and transformers' warpers, in one run.

  python -m ancestral.benchmarks.filters                   # V = 32,000 and 152,064; batch 1, 16
  python -m ancestral.benchmarks.filters --law=flat --json=out.json

Each entry is a function of logits [B, V], compiled on its own and called with the logits on the
device. Rounds alternate between the entries. `ms` is the best wall clock of a round's mean; `busy`
is the processor time of that mean over all cores, which a shared machine disturbs less (on a GPU it
is the host's). Kept is the mean number of tokens left. Logits are Zipf's, with noise: `peaked`
(exponent 2), `natural` (1.2) or `flat` (0.5).
"""

import json
import os
import pathlib
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from ancestral.sampling import logits, truncation

_VOCAB = flags.DEFINE_list("vocab_sizes", ["32000", "152064"], "Vocabulary sizes.")
_BATCHES = flags.DEFINE_list("batches", ["1", "16"], "Batch sizes.")
_LAW = flags.DEFINE_enum("law", "natural", ["peaked", "natural", "flat"], "Of the logits.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed rounds; each calls an entry `calls` times.")
_CALLS = flags.DEFINE_integer("calls", 3, "Calls of an entry in a round.")
_JSON = flags.DEFINE_string("json", None, "File for the result table.")

EXPONENT = {"peaked": 2.0, "natural": 1.2, "flat": 0.5}

FILTERS = {
  "top_k(50)": truncation.top_k(50),
  "exact_top_k(50)": truncation.exact_top_k(50),
  "top_p(0.5)": truncation.top_p(0.5),
  "top_p(0.95)": truncation.top_p(0.95),
  "min_p(0.05)": truncation.min_p(0.05),
  "typical(0.5)": truncation.typical(0.5),
  "epsilon(1e-3)": truncation.epsilon(1e-3),
  "eta(1e-3)": truncation.eta(1e-3),
  "top_h(0.4)": truncation.top_h(0.4),
  "top_h_partial(0.4)": truncation.top_h_partial(0.4),
  "top_n_sigma(1)": truncation.top_n_sigma(1.0),
  "xtc(0.5, 0.1)": truncation.xtc(0.5, 0.1),
  "dynamic_temperature(1, 0.5)": logits.dynamic_temperature(1.0, 0.5),
  "chain: T, top_k, top_p": logits.chain(
    logits.temperature(0.8), truncation.top_k(50), truncation.top_p(0.95)
  ),
  "chain: T, min_p, top_k, top_p": logits.chain(
    logits.temperature(0.8), truncation.min_p(0.05), truncation.top_k(50), truncation.top_p(0.95)
  ),
  "chain: top_k, typical, top_p, min_p, T": logits.chain(
    truncation.top_k(40),
    truncation.typical(0.95),
    truncation.top_p(0.95),
    truncation.min_p(0.05),
    logits.temperature(0.8),
  ),
}

WARPERS = {
  "transformers top_k(50)": [("TopKLogitsWarper", 50)],
  "transformers top_p(0.95)": [("TopPLogitsWarper", 0.95)],
  "transformers typical(0.5)": [("TypicalLogitsWarper", 0.5)],
  "transformers min_p(0.05)": [("MinPLogitsWarper", 0.05)],
  "transformers top_h(0.4)": [("TopHLogitsWarper", 0.4)],
  "transformers chain: T, top_k, top_p": [
    ("TemperatureLogitsWarper", 0.8),
    ("TopKLogitsWarper", 50),
    ("TopPLogitsWarper", 0.95),
  ],
}


def vectors(batch_size: int, vocab_size: int) -> np.ndarray:
  """Logits [B, V] of Zipf's law in a random order, with noise."""
  rng = np.random.default_rng(0)
  ranks = np.stack([rng.permutation(vocab_size) for _ in range(batch_size)])
  noise = 0.3 * rng.normal(size=ranks.shape)
  return (noise - EXPONENT[_LAW.value] * np.log(1.0 + ranks)).astype(np.float32)


def ours(values: np.ndarray) -> dict:
  """The filters and the yardsticks, as functions without arguments."""
  values = jnp.asarray(values)

  def bind(function):
    compiled = jax.jit(function)
    return lambda: jax.block_until_ready(compiled(values))

  entries = {
    "lax.top_k(64)": bind(lambda values: jax.lax.top_k(values, 64)),
    "sort": bind(lambda values: jnp.sort(values, axis=-1)),
    "softmax": bind(lambda values: jax.nn.softmax(values, axis=-1)),
  }
  for name, transform in FILTERS.items():
    entries[name] = bind(lambda values, t=transform: t.apply(values, None, t.init(len(values))))
  return entries


def theirs(values: np.ndarray) -> dict:
  """transformers' warpers on the same machine, if it is installed."""
  try:
    import torch
    from transformers.generation import logits_process
  except ImportError:
    return {}
  device = "cuda" if jax.default_backend() == "gpu" else "cpu"
  if device == "cuda" and not torch.cuda.is_available():
    return {}
  scores = torch.from_numpy(values).to(device)

  def bind(warpers):
    def run():
      out = scores
      with torch.inference_mode():
        for warper in warpers:
          out = warper(None, out)
      if device == "cuda":
        torch.cuda.synchronize()
      return out

    return run

  return {
    name: bind([getattr(logits_process, warper)(value) for warper, value in warpers])
    for name, warpers in WARPERS.items()
  }


def machine() -> str:
  """What computes: the accelerator, or the CPU's model and how many cores there are."""
  if jax.default_backend() != "cpu":
    return jax.devices()[0].device_kind
  info = pathlib.Path("/proc/cpuinfo")
  lines = info.read_text().splitlines() if info.exists() else []
  names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
  return f"{os.cpu_count()} cores, {(names or [platform.machine()])[0]}"


def measure(entries: dict) -> dict:
  """{name: (wall, busy)} in milliseconds, the best of the rounds."""
  best = {name: (np.inf, np.inf) for name in entries}
  for run in entries.values():
    run()
  for _ in range(_ROUNDS.value):
    for name, run in entries.items():
      busy, wall = time.process_time(), time.perf_counter()
      for _ in range(_CALLS.value):
        run()
      wall, busy = time.perf_counter() - wall, time.process_time() - busy
      pair = (1e3 * wall / _CALLS.value, 1e3 * busy / _CALLS.value)
      best[name] = tuple(min(old, new) for old, new in zip(best[name], pair, strict=True))
  return best


def compare(batch_size: int, vocab_size: int) -> list[dict]:
  """The rows of the table for one shape, printed."""
  values = vectors(batch_size, vocab_size)
  entries = {**ours(values), **theirs(values)}
  kept = {name: float(np.isfinite(np.asarray(entries[name]())).sum(-1).mean()) for name in FILTERS}
  print(f"B = {batch_size}, V = {vocab_size}\n{'':44}{'ms':>9}{'busy ms':>9}{'kept':>9}")
  rows = []
  for name, (wall, busy) in measure(entries).items():
    print(f"{name:44}{wall:9.2f}{busy:9.2f}" + (f"{kept[name]:9.0f}" if name in kept else ""))
    row = {"batch": batch_size, "vocab_size": vocab_size, "name": name}
    rows.append({**row, "ms": wall, "busy_ms": busy, "kept": kept.get(name)})
  return rows


def main(_):
  """Prints the tables, and writes them."""
  print(f"{machine()}, jax {jax.__version__}, law {_LAW.value}")
  rows = [
    row
    for vocab_size in map(int, _VOCAB.value)
    for batch_size in map(int, _BATCHES.value)
    for row in compare(batch_size, vocab_size)
  ]
  if _JSON.value:
    result = {
      "date": time.strftime("%Y-%m-%d"),
      "machine": machine(),
      "jax": jax.__version__,
      "law": _LAW.value,
      "rows": rows,
    }
    with open(_JSON.value, "w") as file:
      json.dump(result, file, indent=1)


if __name__ == "__main__":
  app.run(main)
