"""Decoding speed against transformers: same weights, same machine, same run, as ratios.

  python -m ancestral.benchmarks.decode_hf                                   # 30M, batch 1, 8, 64
  python -m ancestral.benchmarks.decode_hf --model=1.5B --dtype=bfloat16     # for a GPU
  python -m ancestral.benchmarks.decode_hf --json=out.json

Both draw at temperature 1 from the full vocabulary, from the same prompts, for a fixed number of
new tokens. The peer is `generate` with its default (dynamic) cache, and with its static cache,
which it compiles where it can. Repetitions alternate between the systems, and the best of each is
reported, so a busy machine slows all. Float32 products are float32 in all (no TF32). The bound is
the time to read every weight and the keys and values held, once a step, at the bandwidth that this
run measures. The parts of a step are timed apart, each in a compiled loop: trunk, readout, draw,
and a chain of filters (temperature, top-k, top-p), which the compared runs do not have.
"""

import json
import os
import pathlib
import platform
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from ancestral.models import base, pretrained, transformer
from ancestral.sampling import base as sampling
from ancestral.sampling import decode, logits, truncation

_NEW_TOKENS = flags.DEFINE_integer("new_tokens", 128, "Tokens drawn per row.")
_PROMPT = flags.DEFINE_integer("prompt_length", 16, "Tokens of each prompt.")
_BATCHES = flags.DEFINE_list("batches", ["1", "8", "64"], "Batch sizes.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed repetitions of each system.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of weights and compute.")
JSON = flags.DEFINE_string("json", None, "File for the result table.")

MODELS = {
  "30M": {
    "vocab_size": 8192,
    "max_length": 1024,
    "num_layers": 8,
    "width": 512,
    "num_heads": 8,
    "mlp_width": 1376,
  },
  "1.5B": {
    "vocab_size": 151_936,
    "max_length": 4096,
    "num_layers": 28,
    "width": 1536,
    "num_heads": 12,
    "num_kv_heads": 2,
    "mlp_width": 8960,
  },
}
_MODEL = flags.DEFINE_enum("model", "30M", list(MODELS), "Shape, with random weights.")


def ours(config, params, tokens, new_tokens):
  """A function that decodes once, compiled with params as an argument."""
  model = transformer.transformer(config)
  lengths = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)
  prompts = decode.Prompts(jnp.asarray(tokens), lengths)
  keys = sampling.row_keys(jax.random.key(0), jnp.arange(tokens.shape[0]))

  @jax.jit
  def sample(params, keys, prompts):
    return decode.generate(model, params, keys, prompts, max_new_tokens=new_tokens).tokens

  return lambda: sample(params, keys, prompts).block_until_ready()


def theirs(config, params, tokens, new_tokens, **kwargs):
  """The same with transformers' generate, and the model, for a check of its logits."""
  import torch
  import transformers

  device = "cuda" if jax.default_backend() == "gpu" else "cpu"
  with tempfile.TemporaryDirectory() as folder:
    pretrained.write(f"{folder}/model", config, params, token_ids={"pad_token_id": 0})
    model = transformers.LlamaForCausalLM.from_pretrained(f"{folder}/model", dtype=config.dtype)
  model = model.to(device).eval()
  inputs = torch.from_numpy(tokens.astype(np.int64)).to(device)

  def sample():
    with torch.inference_mode():
      out = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        do_sample=True,
        top_k=0,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        **kwargs,
      )
    return out.cpu()

  return sample, lambda: model(inputs).logits.detach().float().cpu().numpy()


def everywhere_compiled():
  """The peer's compilation of a static cache, which by itself happens on accelerators alone."""
  import transformers

  compile_config = transformers.CompileConfig()
  compile_config._compile_all_devices = True
  return compile_config


def bandwidth() -> float:
  """Bytes per second at which this machine reads a matrix, through its product with a vector."""
  rows = 1 << (19 if jax.default_backend() == "gpu" else 14)  # 8 GiB or 256 MiB
  matrix, x = jnp.ones((rows, 1 << 12), jnp.float32), jnp.ones(1 << 12, jnp.float32)
  multiply = jax.jit(jnp.matmul)
  multiply(matrix, x).block_until_ready()
  times = [seconds(lambda: multiply(matrix, x).block_until_ready()) for _ in range(10)]
  return matrix.nbytes / min(times)


def processor() -> str:
  """What computes: the accelerator, or the CPU's model and how many cores there are."""
  if jax.default_backend() != "cpu":
    return jax.devices()[0].device_kind
  info = pathlib.Path("/proc/cpuinfo")
  lines = info.read_text().splitlines() if info.exists() else []
  names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
  return f"{os.cpu_count()} cores, {(names or [platform.machine()])[0]}"


def seconds(function) -> float:
  """Wall clock of one call."""
  start = time.perf_counter()
  function()
  return time.perf_counter() - start


def parts(config, params, batch_size) -> dict[str, float]:
  """Seconds that each part of a step takes, half-way through the new tokens."""
  model = transformer.transformer(config)
  num_steps = 50
  length = _PROMPT.value + _NEW_TOKENS.value
  cache = model.init_cache(params, batch_size, length)
  cache = cache._replace(length=jnp.full(batch_size, length - _NEW_TOKENS.value // 2, jnp.int32))
  x = model.embed(params, jnp.ones((batch_size, 1), jnp.int32))
  rows = model.readout(params, x[:, 0])
  chain = logits.chain(logits.temperature(0.8), truncation.top_k(50), truncation.top_p(0.95))

  def trunk(params, carry):
    x, cache = carry
    hidden, written = model.trunk(params, x, cache)
    return hidden, written._replace(length=cache.length)

  def readout(params, hidden):
    largest = jnp.max(model.readout(params, hidden), axis=-1, keepdims=True)
    return hidden + (1e-9 * largest).astype(hidden.dtype)

  def draw(params, carry):
    row_keys, rows = carry
    token = logits.draw(row_keys, rows)
    return jax.vmap(jax.random.fold_in)(row_keys, token), rows

  def filters(params, rows):
    return jnp.maximum(chain.apply(rows, None, ()), rows)

  def per_step(part, carry):
    loop = jax.jit(
      lambda params, carry: jax.lax.fori_loop(0, num_steps, lambda i, c: part(params, c), carry)
    )
    run = lambda: jax.block_until_ready(loop(params, carry))
    run()
    return min(seconds(run) for _ in range(_REPEATS.value)) / num_steps

  keys = sampling.row_keys(jax.random.key(0), jnp.arange(batch_size))
  return {
    "trunk": per_step(trunk, (x, cache)),
    "readout": per_step(readout, x[:, 0]),
    "draw": per_step(draw, (keys, rows)),
    "filters": per_step(filters, rows),
  }


def compare(config, params, batch_size) -> dict:
  """One row of the table."""
  new_tokens = _NEW_TOKENS.value
  rng = np.random.default_rng(0)
  tokens = rng.integers(1, config.vocab_size, (batch_size, _PROMPT.value)).astype(np.int32)
  generate, theirs_logits = theirs(config, params, tokens, new_tokens)
  model = transformer.transformer(config)
  hidden, _ = base.apply(model, params, tokens)
  difference = np.abs(model.readout(params, hidden) - theirs_logits()).max()
  static, _ = theirs(
    config,
    params,
    tokens,
    new_tokens,
    cache_implementation="static",
    compile_config=everywhere_compiled(),
  )
  systems = {
    "ancestral": ours(config, params, tokens, new_tokens),
    "transformers": generate,
    "transformers_static": static,
  }
  first = {name: seconds(run) for name, run in systems.items()}
  timed = {name: [] for name in systems}
  for _ in range(_REPEATS.value):
    for name, run in systems.items():
      timed[name].append(seconds(run))
  drawn = batch_size * new_tokens
  rates = {name: drawn / min(times) for name, times in timed.items()}
  row = {
    "batch": batch_size,
    "logits_max_abs_difference": float(difference),
    "tokens_per_second": rates,
    "first_call_seconds": first,
    "ratio": {
      name: rates["ancestral"] / rate for name, rate in rates.items() if name != "ancestral"
    },
    "step_seconds": min(timed["ancestral"]) / new_tokens,
    "part_seconds": parts(config, params, batch_size),
  }
  return row


def main(_):
  """Prints the table, and writes it."""
  import torch
  import transformers

  jax.config.update("jax_default_matmul_precision", "highest")
  config = transformer.TransformerConfig(**MODELS[_MODEL.value], dtype=_DTYPE.value)
  params = transformer.transformer(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  dtype = jnp.dtype(config.dtype)
  params = transformer.unstack(jax.tree.map(lambda leaf: leaf.astype(dtype), params))
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  bytes_per_second = bandwidth()
  read = count * jnp.dtype(config.dtype).itemsize
  held = (_PROMPT.value + _NEW_TOKENS.value / 2) * 2 * config.num_layers
  held *= config.resolved().num_kv_heads * config.resolved().head_dim
  held *= jnp.dtype(config.dtype).itemsize  # bytes of a row's cache, half-way through
  print(
    f"{count / 1e6:.1f}M parameters, {config.dtype}; memory {bytes_per_second / 1e9:.1f} GB/s: "
    f"at most {bytes_per_second / read:.0f} steps/s"
  )
  rows = []
  for batch_size in map(int, _BATCHES.value):
    row = compare(config, params, batch_size)
    bound = bytes_per_second / (read + batch_size * held) * batch_size
    row["bandwidth_bound_tokens_per_second"] = bound
    rows.append(row)
    rates = ", ".join(f"{name} {rate:.0f}" for name, rate in row["tokens_per_second"].items())
    ratios = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in row["ratio"].items())
    print(
      f"batch {batch_size}: {rates} tokens/s; {ratios}; bound {bound:.0f}; logits differ by up to "
      f"{row['logits_max_abs_difference']:.1e}"
    )
    ms = ", ".join(f"{name} {1e3 * t:.2f}" for name, t in row["part_seconds"].items())
    print(f"  a step takes {1e3 * row['step_seconds']:.2f} ms; alone, {ms}")
  if JSON.value:
    result = {
      "date": time.strftime("%Y-%m-%d"),
      "machine": processor(),
      "model": _MODEL.value,
      "dtype": config.dtype,
      "parameters": count,
      "new_tokens": _NEW_TOKENS.value,
      "bytes_per_second": bytes_per_second,
      "versions": {
        "jax": jax.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
      },
      "rows": rows,
    }
    with open(JSON.value, "w") as file:
      json.dump(result, file, indent=1)


if __name__ == "__main__":
  app.run(main)
