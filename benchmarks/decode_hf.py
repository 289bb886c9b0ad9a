"""Decoding speed against transformers: same weights, same machine, same run, as ratios.

  python -m ancestral.benchmarks.decode_hf            # 30M parameters, batch 1 and 16
  python -m ancestral.benchmarks.decode_hf --json=out.json

Both draw at temperature 1 from the full vocabulary, from the same prompts, for a fixed number of
new tokens. On CPU the peer is `generate` with its default cache; on a GPU also `generate` with its
static cache, which it compiles. Repetitions alternate between the systems, and the best of each is
reported, so a busy machine slows both. Float32 products are float32 in both (no TF32). The bound is
the time to read every weight and the keys and values held, once a step, at the bandwidth that this
run measures.
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

from ancestral.models import base, pretrained, transformer
from ancestral.sampling import base as sampling
from ancestral.sampling import decode

_NEW_TOKENS = flags.DEFINE_integer("new_tokens", 128, "Tokens drawn per row.")
_PROMPT = flags.DEFINE_integer("prompt_length", 16, "Tokens of each prompt.")
_BATCHES = flags.DEFINE_list("batches", ["1", "16"], "Batch sizes.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed repetitions of each system.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of weights and compute.")
_JSON = flags.DEFINE_string("json", None, "File for the result table.")

CONFIG = {
  "vocab_size": 8192,
  "max_length": 1024,
  "num_layers": 8,
  "width": 512,
  "num_heads": 8,
  "mlp_width": 1376,
}


def ours(config, params, tokens, new_tokens):
  """A function that decodes once, compiled with params as an argument."""
  model = transformer.transformer(config)
  dtype = jnp.dtype(config.dtype)
  params = transformer.unstack(jax.tree.map(lambda leaf: leaf.astype(dtype), params))
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
  model = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      **pretrained.llama_config(config), bos_token_id=None, eos_token_id=None, pad_token_id=0
    )
  )
  state = {k: torch.from_numpy(v) for k, v in pretrained.llama_state_dict(params).items()}
  model.load_state_dict(state)
  model = model.to(device, getattr(torch, config.dtype)).eval()
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


def compare(config, params, batch_size) -> dict:
  """One row of the table."""
  new_tokens = _NEW_TOKENS.value
  rng = np.random.default_rng(0)
  tokens = rng.integers(1, config.vocab_size, (batch_size, _PROMPT.value)).astype(np.int32)
  generate, logits = theirs(config, params, tokens, new_tokens)
  model = transformer.transformer(config)
  hidden, _ = base.apply(model, params, tokens)
  difference = np.abs(model.readout(params, hidden) - logits()).max()
  systems = {"ancestral": ours(config, params, tokens, new_tokens), "transformers": generate}
  if jax.default_backend() == "gpu":
    systems["transformers_static"], _ = theirs(
      config, params, tokens, new_tokens, cache_implementation="static"
    )
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
  }
  return row


def main(_):
  """Prints the table, and writes it."""
  import torch
  import transformers

  jax.config.update("jax_default_matmul_precision", "highest")
  config = transformer.TransformerConfig(**CONFIG, dtype=_DTYPE.value)
  params = transformer.transformer(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  bytes_per_second = bandwidth()
  read = count * jnp.dtype(config.dtype).itemsize
  held = (_PROMPT.value + _NEW_TOKENS.value / 2) * 2 * config.num_layers * config.width
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
  if _JSON.value:
    result = {
      "date": time.strftime("%Y-%m-%d"),
      "machine": processor(),
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
    with open(_JSON.value, "w") as file:
      json.dump(result, file, indent=1)


if __name__ == "__main__":
  app.run(main)
