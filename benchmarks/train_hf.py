"""A training step against transformers with torch.compile and SDPA: same weights, batch and update.

  python -m ancestral.benchmarks.train_hf                                    # 4M parameters
  python -m ancestral.benchmarks.train_hf --size=11M --batch_size=16 --parts
  python -m ancestral.benchmarks.train_hf --size=1B --batch_size=8 --remat=products   # for a GPU

A step is the mean cross-entropy of rows of random tokens, its gradient clipped by its norm, and
AdamW. Weights and what AdamW keeps are float32; what is computed is --compute, by default bfloat16
but on a CPU: torch's way there is autocast. The peers are transformers' Llama, whose forward pass
and loss torch.compile has, and the same not compiled. With --remat ours makes layers again in the
backward pass as it says, the peers by gradient checkpointing.

Blocks of steps go round the systems, and the best block of each is reported, so a busy machine
slows all; seconds of the CPU, of all threads, do not count waiting for a core. Losses of the first
steps have to agree, in float32 to 1e-4. Utilisation is of the model's FLOPs, without what is made
again, at --peak_tflops: by default the chip's, and where that is not known, of a large product of
matrices that is timed beside the steps.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import os
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from ancestral.benchmarks import decode_hf
from ancestral.models import base, pretrained, transformer, transformer_config
from ancestral.training import chips, cost, likelihood, optimizer, state, step

SIZES = {
  "4M": {"vocab_size": 4096, "num_layers": 4, "width": 256, "num_heads": 8, "num_kv_heads": 4},
  "11M": {"vocab_size": 256, "num_layers": 6, "width": 384, "num_heads": 6, "mlp_width": 1024},
  "30M": {"vocab_size": 8192, "num_layers": 8, "width": 512, "num_heads": 8, "mlp_width": 1376},
  "1B": {
    "vocab_size": 32_000,
    "num_layers": 16,
    "width": 2048,
    "num_heads": 32,
    "num_kv_heads": 8,
    "mlp_width": 8192,
  },
}
LENGTHS = {"4M": 128, "11M": 128, "30M": 256, "1B": 2048}
PEERS = ("compiled", "eager")

FLAGS = flags.FLAGS  # --repeats and --json are those of decode_hf
_SIZE = flags.DEFINE_enum("size", "4M", list(SIZES), "Of the model, with random weights.")
_BATCH = flags.DEFINE_integer("batch_size", 8, "Rows.", 1)
_LENGTH = flags.DEFINE_integer(
  "length", None, "Tokens of a row; by default what goes with size.", 1
)
_COMPUTE = flags.DEFINE_enum("compute", None, ["float32", "bfloat16"], "Weights are float32.")
_ATTENTION = flags.DEFINE_enum(
  "attention", "exact", ["exact", "xla", "cudnn"], "Of ours: see models.transformer_config."
)
_REMAT = flags.DEFINE_enum("remat", "none", list(transformer_config.REMAT), "Made again backward.")
_CHUNK = flags.DEFINE_integer("chunk", 256, "Positions of ours that are read out at once.", 1)
_PEERS = flags.DEFINE_list("peers", list(PEERS), f"Of {', '.join(PEERS)}.")
_STEPS = flags.DEFINE_integer("steps", 5, "Of a block.", 1)
_PEAK = flags.DEFINE_float("peak_tflops", None, "Of the device, of products of --compute.", 0)
_PARTS = flags.DEFINE_bool("parts", False, "Time the parts of a step too, alone.")

CHECKED = 5  # steps whose losses are compared
ADAM = {"b1": 0.9, "b2": 0.95, "weight_decay": 0.1, "clip_norm": 1.0}
RATE = 1e-3


def compute() -> str:
  """The dtype that is computed in."""
  return _COMPUTE.value or ("float32" if jax.default_backend() == "cpu" else "bfloat16")


def loss_of(model):
  """The package's own, in chunks of positions."""
  return likelihood.next_token(model, chunk=_CHUNK.value)


def ours(config, params, batches):
  """A function of a step's number that makes it and returns its loss, and its parts."""
  model = transformer.transformer(config)
  parts = {"optimizer": optimizer.adamw(RATE, **ADAM), "averaging": state.no_average()}
  made = jax.jit(
    functools.partial(step.train_step, loss_fn=loss_of(model), **parts), donate_argnums=1
  )
  first = lambda key: jax.tree.map(jnp.copy, params)
  held = state.init(jax.random.key(0), first, **parts)
  key, rows = jax.random.key(1), [rows_of(batch) for batch in batches]

  def one(number):
    nonlocal held
    held, metrics = made(key, held, rows[number % len(rows)])
    return metrics["loss"]

  def mean_loss(params, batch):
    (loss, weight), _ = loss_of(model)(None, params, batch)
    return jnp.sum(loss) / jnp.sum(weight)

  forward, gradient = jax.jit(mean_loss), jax.jit(jax.value_and_grad(mean_loss))
  alone = {
    "forward": lambda: jax.block_until_ready(forward(held.params, rows[0])),
    "forward and backward": lambda: jax.block_until_ready(gradient(held.params, rows[0])),
  }
  return one, jax.block_until_ready, alone


def rows_of(batch):
  """Tokens [B, L + 1] as the loss reads them."""
  mask = jnp.ones(batch[:, 1:].shape, jnp.float32)
  return {"tokens": jnp.asarray(batch[:, :-1]), "targets": jnp.asarray(batch[:, 1:]), "mask": mask}


def their_model(config, params, device):
  """The same weights in transformers, with SDPA."""
  import transformers

  with tempfile.TemporaryDirectory() as folder:
    pretrained.write(f"{folder}/model", config, params, family="llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(
      f"{folder}/model", dtype="float32", attn_implementation="sdpa"
    )
  model.config.use_cache = False
  if config.remat != "none":
    model.gradient_checkpointing_enable()
  return model.to(device).train()


def their_optimizer(model, device):
  """AdamW as ours: weight decay for all but the norms' scales."""
  import torch

  named = dict(model.named_parameters())
  norms = [p for name, p in named.items() if "norm" in name]
  rest = [p for name, p in named.items() if "norm" not in name]
  groups = [
    {"params": rest, "weight_decay": ADAM["weight_decay"]},
    {"params": norms, "weight_decay": 0.0},
  ]
  betas = (ADAM["b1"], ADAM["b2"])
  return torch.optim.AdamW(groups, lr=RATE, betas=betas, eps=1e-8, fused=True)


def theirs(config, params, batches, *, compiled):
  """The same of the peer; and its model's configuration."""
  import torch

  device = "cuda" if jax.default_backend() == "gpu" else "cpu"
  model = their_model(config, params, device)
  optimize = their_optimizer(model, device)
  rows = [torch.from_numpy(batch.astype(np.int64)).to(device) for batch in batches]
  autocast = lambda: (
    torch.autocast(device, torch.bfloat16)
    if config.dtype == "bfloat16"
    else contextlib.nullcontext()
  )

  def mean_loss(tokens):
    with autocast():
      logits = model(input_ids=tokens[:, :-1]).logits
    logits = logits.float().flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())

  if compiled:
    mean_loss = torch.compile(mean_loss, dynamic=False)

  def gradient(number=0):
    optimize.zero_grad(set_to_none=True)
    loss = mean_loss(rows[number % len(rows)])
    loss.backward()
    return loss.detach()

  def one(number):
    loss = gradient(number)
    torch.nn.utils.clip_grad_norm_(model.parameters(), ADAM["clip_norm"])
    optimize.step()
    return loss

  def forward():
    with torch.no_grad():
      return mean_loss(rows[0]).item()

  wait = lambda loss: torch.cuda.synchronize() if device == "cuda" else loss
  alone = {"forward": forward, "forward and backward": lambda: gradient().item()}
  return (one, wait, alone), model.config._attn_implementation


def model_flops(config) -> int:
  """Of a step's products, forward and backward, nothing made again."""
  plain = dataclasses.replace(config, remat="none", attention="exact")
  model = transformer.transformer(plain)
  tokens = jax.ShapeDtypeStruct((_BATCH.value, config.max_length), jnp.int32)

  def loss(params, tokens):
    hidden, _ = base.apply(model, params, tokens)
    return jnp.mean(likelihood.cross_entropy(model.readout(params, hidden), tokens))

  params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  return cost.flops(jax.value_and_grad(loss), params, tokens)


def product():
  """A large product of matrices, and its FLOPs."""
  n = 2048 if jax.default_backend() == "cpu" else 8192
  matrix, multiply = jnp.ones((n, n), compute()), jax.jit(jnp.matmul)
  return lambda: jax.block_until_ready(multiply(matrix, matrix)), 2 * n**3


def timed(systems) -> dict[str, dict[str, float]]:
  """Seconds of a step of each system, and of its parts if asked for: the best of all blocks.

  With them, as that of "product", one over the FLOPs a second of a large product of matrices.
  """
  multiply, flops = product()
  multiply()
  found = collections.defaultdict(lambda: collections.defaultdict(list))
  for repeat in range(FLAGS.repeats + 1):
    blocks = {"product": {"flop": multiply}}
    for name, (one, wait, alone) in systems.items():
      block = lambda one=one, wait=wait: wait([one(i) for i in range(_STEPS.value)][-1])
      blocks[name] = {"step": block, **(alone if _PARTS.value else {})}
    for name, parts in blocks.items():
      for part, run in parts.items():
        cpu = time.process_time()
        taken = {part: decode_hf.seconds(run), f"cpu {part}": 0.0}
        taken[f"cpu {part}"] = time.process_time() - cpu
        for key, t in taken.items() if repeat else ():  # the first compiles
          found[name][key].append(t)
  best = {name: {part: min(t) for part, t in parts.items()} for name, parts in found.items()}
  best["product"]["flop"] /= flops
  per = lambda part: _STEPS.value if part.endswith("step") else 1
  return {name: {part: t / per(part) for part, t in parts.items()} for name, parts in best.items()}


def compare(config, params) -> dict:
  """The row of the table.

  Raises:
    ValueError: in float32, losses do not agree.
  """
  size = (4, _BATCH.value, config.max_length + 1)
  batches = np.random.default_rng(0).integers(0, config.vocab_size, size).astype(np.int32)
  systems, kinds = {"ancestral": ours(config, params, batches)}, {"ancestral": config.attention}
  for name in _PEERS.value:
    systems[name], kinds[name] = theirs(config, params, batches, compiled=name == "compiled")
  losses = {
    name: [float(one(number)) for number in range(CHECKED)] for name, (one, _, _) in systems.items()
  }
  off = max(np.abs(np.subtract(losses["ancestral"], found)).max() for found in losses.values())
  if config.dtype == "float32" and off > 1e-4:
    raise ValueError(f"Losses differ by {off:.1e}: {losses}")
  measured = timed(systems)
  product_flops = 1 / measured.pop("product")["flop"]
  seconds = {name: parts.pop("step") for name, parts in measured.items()}
  cpu = {name: parts.pop("cpu step") for name, parts in measured.items()}
  known = chips.peak_flops(jax.devices()[0].device_kind) if config.dtype == "bfloat16" else None
  peak = 1e12 * _PEAK.value if _PEAK.value else known or product_flops
  flops = model_flops(config)
  return {
    "batch_size": _BATCH.value,
    "length": config.max_length,
    "remat": config.remat,
    "attention": kinds,
    "losses": losses,
    "losses_differ_by": float(off),
    "step_seconds": seconds,
    "tokens_per_second": {k: _BATCH.value * config.max_length / t for k, t in seconds.items()},
    "ratio": {k: t / seconds["ancestral"] for k, t in seconds.items() if k != "ancestral"},
    "ratio_of_cpu_seconds": {k: t / cpu["ancestral"] for k, t in cpu.items() if k != "ancestral"},
    "flops": flops,
    "peak_flops": peak,
    "measured_product_flops": product_flops,
    "utilisation": {name: flops / t / peak for name, t in seconds.items()},
    "part_seconds": measured,
    "load": os.getloadavg()[0],
  }


def show(row: dict) -> None:
  """A line for each system."""
  print(
    f"batch {row['batch_size']} x {row['length']}, remat {row['remat']}: {row['flops'] / 1e9:.1f} "
    f"GFLOP a step; peak {row['peak_flops'] / 1e12:.4g} TFLOP/s, a product of matrices reaches "
    f"{row['measured_product_flops'] / 1e12:.4g}; losses differ by up to "
    f"{row['losses_differ_by']:.1e}; load {row['load']:.1f}"
  )
  for name, rate in row["tokens_per_second"].items():
    ratios = [row[key].get(name) for key in ("ratio", "ratio_of_cpu_seconds")]
    ratio = ", ours / its {:.2f}, of CPU seconds {:.2f}".format(*ratios) if all(ratios) else ""
    parts = row["part_seconds"].get(name, {})
    alone = "".join(f", {part} alone {1e3 * t:.1f} ms" for part, t in parts.items())
    print(
      f"{name:10} {rate:.0f} tokens/s, {1e3 * row['step_seconds'][name]:.1f} ms a step{alone}, "
      f"utilisation {100 * row['utilisation'][name]:.1f}%{ratio}; attention by "
      f"{row['attention'][name]}"
    )


def main(_):
  """Prints the row, and writes it."""
  import torch
  import transformers

  if compute() == "float32":
    jax.config.update("jax_default_matmul_precision", "highest")
  length = _LENGTH.value or LENGTHS[_SIZE.value]
  sizes = {**SIZES[_SIZE.value], "max_length": length}
  config = transformer.TransformerConfig(
    **sizes, dtype=compute(), remat=_REMAT.value, attention=_ATTENTION.value
  )
  params = transformer.transformer(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  print(f"{count / 1e6:.1f}M parameters, {config.dtype}; {decode_hf.processor()}")
  row = compare(config, params)
  show(row)
  if decode_hf.JSON.value:
    versions = {"jax": jax.__version__, "torch": torch.__version__}
    result = {
      "date": time.strftime("%Y-%m-%d"),
      "machine": decode_hf.processor(),
      "versions": {**versions, "transformers": transformers.__version__},
      "size": _SIZE.value,
      "parameters": count,
      "compute": config.dtype,
      **row,
    }
    with open(decode_hf.JSON.value, "w") as file:
      json.dump(result, file, indent=1)


if __name__ == "__main__":
  app.run(main)
