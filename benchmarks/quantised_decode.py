"""Decoding with weights of 8 bits: tokens per second, bytes, the memory's bound, and what it costs.

  python -m ancestral.benchmarks.quantised_decode                            # 30M, batch 1, 8, 64
  python -m ancestral.benchmarks.quantised_decode --model=1.5B               # for a GPU
  python -m ancestral.benchmarks.quantised_decode --quality                  # bits lost, 3 minutes

Each system is its weights and the dtype that they are computed in. All draw at temperature 1 from
the same prompts. Repetitions go round the systems, and the best of each is reported, so a busy
machine slows all. Products of float32 are float32 (no TF32). The bound is the time to read every
weight as it is stored, and the keys and values held, once a step, at the bandwidth that this run
measures. Temporary memory is what the compiled program says; wide copies of the weights would show.

--quality trains a small model of bytes on this package's source, and compares its predictions on
files that it has not seen.
"""

import functools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from ancestral.benchmarks import decode_hf
from ancestral.models import quantised, transformer
from ancestral.sampling import base as sampling
from ancestral.sampling import decode
from ancestral.training import likelihood, optimizer, state, step

_QUALITY = flags.DEFINE_bool("quality", False, "Measure what is lost instead of the speed.")
_STEPS = flags.DEFINE_integer("steps", 400, "Of training, for --quality.")
FLAGS = flags.FLAGS  # those of decode_hf

# Weights, and what they are computed in.
SYSTEMS = (
  ("float32", "float32"),
  ("bfloat16", "bfloat16"),
  ("int8", "float32"),
  ("int8", "bfloat16"),
  ("float8_e4m3fn", "float32"),
  ("float8_e4m3fn", "bfloat16"),
)
SMALL = {"vocab_size": 256, "max_length": 128, "num_layers": 4, "width": 256, "num_heads": 4}


def stored(params, weights):
  """The params as a system holds them."""
  if weights in quantised.DTYPES:
    return quantised.quantise(params, weights)
  return jax.tree.map(lambda leaf: leaf.astype(weights), params)


def num_bytes(params) -> int:
  """Of all leaves."""
  return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def compiled(config, params, batch_size):
  """A function that decodes once, and the bytes that it takes besides its arguments."""
  model = quantised.quantised(transformer.transformer(config))
  rng = np.random.default_rng(0)
  tokens = rng.integers(1, config.vocab_size, (batch_size, FLAGS.prompt_length)).astype(np.int32)
  prompts = decode.Prompts(jnp.asarray(tokens), jnp.full(batch_size, FLAGS.prompt_length))
  keys = sampling.row_keys(jax.random.key(0), jnp.arange(batch_size))

  def sample(params, keys, prompts):
    return decode.generate(model, params, keys, prompts, max_new_tokens=FLAGS.new_tokens).tokens

  program = jax.jit(sample).lower(params, keys, prompts).compile()
  run = lambda: program(params, keys, prompts).block_until_ready()
  return run, program.memory_analysis().temp_size_in_bytes


def speed(shape, batch_size, bytes_per_second) -> list[dict]:
  """A row for each system."""
  init = transformer.transformer(transformer.TransformerConfig(**shape)).init
  params = transformer.unstack(init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
  runs, rows = [], []
  for weights, dtype in SYSTEMS:
    config = transformer.TransformerConfig(**shape, dtype=dtype).resolved()
    held = stored(params, weights)
    run, temporary = compiled(config, held, batch_size)
    run()
    cache = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    cache *= (FLAGS.prompt_length + FLAGS.new_tokens / 2) * jnp.dtype(dtype).itemsize
    read = num_bytes(held) + batch_size * cache
    runs.append(run)
    rows.append(
      {
        "weights": weights,
        "computed_in": dtype,
        "batch_size": batch_size,
        "weight_bytes": num_bytes(held),
        "temporary_bytes": temporary,
        "bound_tokens_per_second": batch_size * bytes_per_second / read,
      }
    )
  timed = [[decode_hf.seconds(run) for run in runs] for _ in range(FLAGS.repeats)]
  for row, times in zip(rows, zip(*timed, strict=True), strict=True):
    row["tokens_per_second"] = batch_size * FLAGS.new_tokens / min(times)
  return rows


def trained(seed=0):
  """A small model of this package's source, and rows [n, 129] of files that it has not seen."""
  files = sorted(pathlib.Path(__file__).resolve().parents[1].glob("[mst]*/*.py"))
  sides = [[], []]
  for i, file in enumerate(files):
    sides[i % 10 == 0].append(np.frombuffer(file.read_bytes(), np.uint8))
  train, test = (np.concatenate(side).astype(np.int32) for side in sides)
  model = transformer.transformer(transformer.TransformerConfig(**SMALL))
  made = optimizer.adamw(optimizer.warmup_cosine(2e-3, num_steps=_STEPS.value, warmup_steps=20))
  averaging = state.no_average()
  init = lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32))
  held = state.init(jax.random.key(seed), init, made, averaging)
  update = jax.jit(
    functools.partial(
      step.train_step, loss_fn=likelihood.next_token(model), optimizer=made, averaging=averaging
    ),
    donate_argnums=1,
  )
  rng = np.random.default_rng(seed)
  cut = lambda text, starts: np.stack([text[start : start + 129] for start in starts])
  for _ in range(_STEPS.value):
    rows = cut(train, rng.integers(0, len(train) - 129, 16))
    batch = {"tokens": rows[:, :-1], "targets": rows[:, 1:], "mask": np.ones((16, 128), bool)}
    held, metrics = update(jax.random.key(seed), held, batch)
  print(f"trained: {float(metrics['loss']):.3f} nats a byte")
  return transformer.unstack(held.params), cut(test, range(0, len(test) - 129, 129)[:256])


def quality() -> list[dict]:
  """Held-out loss of each system, its divergence from float32, and how often they agree."""
  params, rows = trained()
  tokens, targets = jnp.asarray(rows[:, :-1]), rows[:, 1:]
  table, reference = [], None
  for weights, dtype in SYSTEMS:
    model = transformer.transformer(transformer.TransformerConfig(**SMALL, dtype=dtype))
    model = quantised.quantised(model)

    @jax.jit
    def log_probs(params, tokens, model=model):
      hidden, _ = model.trunk(params, model.embed(params, tokens))
      return jax.nn.log_softmax(model.readout(params, hidden))

    held = stored(params, weights)
    log_p = np.concatenate([log_probs(held, part) for part in jnp.split(tokens, 8)])
    reference = log_p if reference is None else reference
    loss = -np.take_along_axis(log_p, targets[..., None], axis=-1)
    table.append(
      {
        "weights": weights,
        "computed_in": dtype,
        "loss_nats": float(loss.mean()),
        "kl_nats": float((np.exp(reference) * (reference - log_p)).sum(-1).mean()),
        "same_argmax": float((log_p.argmax(-1) == reference.argmax(-1)).mean()),
        "weight_bytes": num_bytes(held),
      }
    )
  return table


def main(_):
  """Prints the table, and writes it."""
  jax.config.update("jax_default_matmul_precision", "highest")
  result = {"date": time.strftime("%Y-%m-%d"), "machine": decode_hf.processor()}
  result |= {"jax": jax.__version__}
  if _QUALITY.value:
    result["rows"] = quality()
  else:
    result |= {"bytes_per_second": decode_hf.bandwidth(), "model": FLAGS.model}
    print(f"{result['machine']}, memory {result['bytes_per_second'] / 1e9:.1f} GB/s")
    result["rows"] = []
    for batch_size in map(int, FLAGS.batches):
      result["rows"] += speed(decode_hf.MODELS[FLAGS.model], batch_size, result["bytes_per_second"])
  for row in result["rows"]:
    print(", ".join(f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
  if decode_hf.JSON.value:
    pathlib.Path(decode_hf.JSON.value).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
  app.run(main)
