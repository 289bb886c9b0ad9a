"""Continuous refill against waiting for all rows, on requests of geometric lengths.

  python -m ancestral.benchmarks.serve                         # 30M parameters, 8 rows
  python -m ancestral.benchmarks.serve --figure=serve.png --json=serve.json

The same requests, model and rows, in one run: `serve` replaces a finished row between chunks;
the other loop starts the next batch when every row of the last one is done. Device steps are
counted, and stand beside the greedy list schedule of the same lengths, which no order of arrival
lets a scheduler beat by more than its last request. Lengths are set by `max_new_tokens`.
"""

import functools
import heapq
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from ancestral.benchmarks import decode_hf
from ancestral.models import transformer
from ancestral.sampling import base, decode, logits, serve

_ROWS = flags.DEFINE_integer("rows", 8, "Requests in flight.")
_PER_ROW = flags.DEFINE_integer("requests_per_row", 50, "Requests, for each row.")
_MEAN = flags.DEFINE_integer("mean_length", 40, "Mean of the geometric lengths, in tokens.")
_CHUNK = flags.DEFINE_integer("chunk", 8, "Steps between two looks of the host.")
_FIGURE = flags.DEFINE_string("figure", None, "File for the picture.")

LONGEST = 400
PROMPT = 16


def list_schedule(lengths, rows) -> int:
  """Steps of the greedy schedule: the next request goes to the row that is free first."""
  free = [0] * rows
  for length in lengths:
    heapq.heapreplace(free, free[0] + int(length))
  return max(free)


def refilled(model, params, prompts, lengths):
  """(seconds, steps, rows busy in each chunk) of serving all requests, compiled before."""
  run = serve.server(
    functools.partial(decode.autoregressive, model),
    lambda settings: logits.temperature(settings["temperature"]),
    settings={"temperature": 1.0},
    rows=_ROWS.value,
    vocab_size=decode_hf.MODELS["30M"]["vocab_size"],
    max_length=PROMPT + LONGEST,
    chunk=_CHUNK.value,
    prefill_chunk=PROMPT,
  )
  key = jax.random.key(0)
  warm = [serve.Request(prompts[0], LONGEST)]
  list(run(params, key, warm))  # compiles every bucket
  requests = [
    serve.Request(prompt, int(length), seed)
    for seed, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
  ]
  busy = []
  start = time.perf_counter()
  results = list(run(params, key, requests, lambda progress: busy.append(progress.num_active)))
  elapsed = time.perf_counter() - start
  assert sum(len(result.tokens) for result in results) == lengths.sum()
  return elapsed, _CHUNK.value * len(busy), busy


def waiting_for_all(model, params, prompts, lengths):
  """(seconds, steps) of one batch after the other, compiled before."""
  rows = _ROWS.value

  @jax.jit
  def sample(params, keys, prompts, max_new_tokens):
    algorithm = decode.autoregressive(
      model, params, max_length=PROMPT + LONGEST, max_new_tokens=max_new_tokens
    )
    state = base.start(keys, algorithm, prompts)
    return base.run_until(keys, algorithm, state, lambda state: state.done, LONGEST).length

  def batch(first):
    places = np.arange(first, first + rows)
    given = decode.Prompts(jnp.asarray(prompts[places]), jnp.full(rows, PROMPT))
    keys = base.row_keys(jax.random.key(0), jnp.asarray(places))
    return sample(params, keys, given, jnp.asarray(lengths[places])).block_until_ready()

  batch(0)
  start = time.perf_counter()
  for first in range(0, len(lengths), rows):
    batch(first)
  return time.perf_counter() - start, int(lengths.reshape(-1, rows).max(axis=1).sum())


def draw_figure(path, busy, lengths) -> None:
  """Rows that are busy, by device step, in both loops."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  rows = _ROWS.value
  waiting = [
    (batch > step).sum()
    for batch in lengths.reshape(-1, rows)
    for step in range(0, batch.max(), _CHUNK.value)
  ]
  figure, axes = plt.subplots(figsize=(7, 2.6), constrained_layout=True)
  for counts, name, colour in (
    (waiting, "wait for all rows", "#d08770"),
    (busy, "continuous refill", "#2e6f95"),
  ):
    axes.step(np.arange(len(counts)) * _CHUNK.value, counts, label=name, color=colour, lw=0.9)
  axes.set(xlabel="device steps", ylabel="busy rows", ylim=(0, rows + 0.5))
  axes.legend(frameon=False, loc="lower right")
  figure.savefig(path, dpi=110)


def main(_):
  """Prints the comparison, and writes it."""
  config = transformer.TransformerConfig(**decode_hf.MODELS["30M"])
  model = transformer.transformer(config)
  params = transformer.unstack(model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
  rows, rng = _ROWS.value, np.random.default_rng(0)
  lengths = rng.geometric(1 / _MEAN.value, rows * _PER_ROW.value)
  lengths = np.minimum(lengths, LONGEST).astype(np.int32)
  prompts = rng.integers(1, config.vocab_size, (len(lengths), PROMPT)).astype(np.int32)
  ideal = list_schedule(lengths, rows)
  wait_seconds, wait_steps = waiting_for_all(model, params, prompts, lengths)
  seconds, steps, busy = refilled(model, params, prompts, lengths)
  drawn = int(lengths.sum())
  result = {
    "date": time.strftime("%Y-%m-%d"),
    "machine": decode_hf.processor(),
    "jax": jax.__version__,
    "requests": len(lengths),
    "rows": rows,
    "chunk": _CHUNK.value,
    "mean_length": float(lengths.mean()),
    "steps": {"list_schedule": ideal, "serve": steps, "wait_for_all": wait_steps},
    "steps_over_list_schedule": steps / ideal,
    "bound": 1 + _CHUNK.value / lengths.mean(),
    "tokens_per_second": {"serve": drawn / seconds, "wait_for_all": drawn / wait_seconds},
    "ratio": wait_seconds / seconds,
  }
  print(json.dumps(result, indent=1))
  if decode_hf.JSON.value:
    with open(decode_hf.JSON.value, "w") as file:
      json.dump(result, file, indent=1)
  if _FIGURE.value:
    draw_figure(_FIGURE.value, busy, lengths)


if __name__ == "__main__":
  app.run(main)
