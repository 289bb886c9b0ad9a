"""Speculative decoding on the clock: realised speed-up beside E / (v + gamma c), by batch size.

  python -m ancestral.benchmarks.speculative                                   # CPU, 110M target
  python -m ancestral.benchmarks.speculative --target=1.5B --compute=bfloat16 --steps=100
  python -m ancestral.benchmarks.speculative --workdir=runs/speculative        # a trained pair too

Weights are random, so acceptance is forced: every draft is taken with the same probability, by a
rule that is not lossless but does all the work of one. The draft is a tenth of the target. v and c
are measured in the same run, at that batch and gamma. The crossover is the batch beyond which
speculation loses, as the roofline predicts it from this machine's bandwidth and FLOP/s, both
measured here, and as the measured speed-ups have it (interpolated in log batch).

With --workdir, the pair that `ancestral.launch.speculative` trained decodes as well, beside
transformers' assisted generation with the same weights at batch 1, which is all it takes.
"""

import dataclasses
import json
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from ancestral.benchmarks import decode_hf
from ancestral.evaluation import speed
from ancestral.launch import experiment as experiment_lib
from ancestral.models import pretrained, transformer
from ancestral.sampling import base, coupling, decode, drafting, lengths, logits, speculative

_GAMMA = flags.DEFINE_integer("gamma", 4, "Drafts of a round.")
_RATES = flags.DEFINE_list("rates", ["0.6", "0.8", "0.9"], "Forced acceptance.")
_STEPS = flags.DEFINE_integer("steps", 24, "Steps that are timed.")
_BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["1", "8", "32"], "Rows.")
_SHAPE = flags.DEFINE_string("target", "110M", "110M (CPU) or 1.5B (GPU), random weights.")
_COMPUTE = flags.DEFINE_string("compute", "float32", "Of weights and computation.")
_PAIR = flags.DEFINE_string("workdir", None, "Of a trained pair.")

PROMPT = 64
TARGETS = {
  "110M": {
    "vocab_size": 8192,
    "max_length": 4096,
    "num_layers": 12,
    "width": 832,
    "num_heads": 13,
    "mlp_width": 2240,
  },
  "1.5B": decode_hf.MODELS["1.5B"],
}
DRAFTS = {
  "110M": {"num_layers": 2, "width": 512, "num_heads": 8, "mlp_width": 1376},
  "1.5B": {"num_layers": 6, "width": 640, "num_heads": 10, "num_kv_heads": 2, "mlp_width": 3584},
}


def forced(rate: float) -> coupling.Verify:
  """Takes every draft with that probability: lossy, for timing alone."""

  def rule(drafts, log_q, log_p):
    return coupling.Judgement(jnp.full(drafts.shape, rate, log_p.dtype), log_p)

  return coupling.chain(rule)


def random_model(fields):
  """A model and weights, unstacked."""
  config = transformer.TransformerConfig(**fields, dtype=_COMPUTE.value)
  model = transformer.transformer(config)
  params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  params = jax.tree.map(lambda leaf: leaf.astype(_COMPUTE.value), params)
  return model, transformer.unstack(params)


def size(params) -> int:
  """The number of parameters."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def flops() -> float:
  """Floating-point operations per second of a matrix product, in the run's precision."""
  n = 8192 if jax.default_backend() == "gpu" else 2048
  matrix = jnp.ones((n, n), _COMPUTE.value)
  multiply = jax.jit(jnp.matmul)
  return 2 * n**3 / speed.seconds(lambda: multiply(matrix, matrix), 5)


def crossing(batches, gains) -> float | None:
  """The batch at which the gain falls through 1, interpolated in log batch; None if it does not."""
  logs = np.log2(batches)
  for (x0, y0), (x1, y1) in zip(
    zip(logs, gains, strict=True), list(zip(logs, gains, strict=True))[1:], strict=False
  ):
    if y0 > 1 >= y1:
      return float(2 ** (x0 + (x1 - x0) * (y0 - 1) / (y0 - y1)))
  return None


def random_pair(rows):
  """The table of forced acceptance."""
  fields = TARGETS[_SHAPE.value]
  model, params = random_model(fields)
  draft, draft_params = random_model({**fields, "num_kv_heads": None, **DRAFTS[_SHAPE.value]})
  both = {"target": params, "draft": draft_params}
  print(f"target {size(params) / 1e6:.0f}M, draft {size(draft_params) / 1e6:.1f}M parameters")
  batches = list(map(int, _BATCH_SIZES.value))
  for rate in map(float, _RATES.value):
    for batch_size in batches:
      rng = np.random.default_rng(0)
      tokens = rng.integers(1, fields["vocab_size"], (batch_size, PROMPT))
      costs = speed.compare(
        model,
        both,
        lambda params: drafting.by_model(draft, params["draft"], num_drafts=_GAMMA.value),
        base.row_keys(jax.random.key(0), jnp.arange(batch_size)),
        decode.Prompts(jnp.asarray(tokens, jnp.int32), jnp.full(batch_size, PROMPT, jnp.int32)),
        num_steps=_STEPS.value,
        verify=forced(rate),
      )
      rows.append(row(f"forced {rate}", batch_size, costs))
  crossovers(rows, batches, params)


def crossovers(rows, batches, params):
  """Where speculation begins to lose: predicted and measured, for each forced rate."""
  width = jnp.dtype(_COMPUTE.value).itemsize
  bytes_per_second, flops_per_second = decode_hf.bandwidth(), flops()
  print(f"memory {bytes_per_second / 1e9:.1f} GB/s, {flops_per_second / 1e9:.0f} GFLOP/s")
  roofline = lengths.Roofline(
    size(params), size(params) * width, flops_per_second, bytes_per_second
  )
  for rate in map(float, _RATES.value):
    of_rate = [row for row in rows if row["setting"] == f"forced {rate}"]
    # A draft that is a tenth of the target meets the roofline as the target does: c stays.
    draft_cost = of_rate[0]["draft"] / _GAMMA.value
    predicted = lengths.crossover(rate, _GAMMA.value, draft_cost, roofline)
    measured = crossing(batches, [row["realised"] for row in of_rate])
    print(f"acceptance {rate}: crossover at batch {predicted} by the roofline, {measured} measured")
    rows.append({"setting": f"crossover {rate}", "predicted": predicted, "measured": measured})


def row(setting, batch_size, costs) -> dict:
  """Prints a line of the table, and returns it."""
  ratio = costs.realised / costs.predicted
  print(
    f"| {setting} | {batch_size} | {costs.tokens:.2f} | {costs.verify:.2f} | {costs.draft:.2f} | "
    f"{costs.predicted:.2f} | {costs.realised:.2f} | {ratio:.2f} |",
    flush=True,
  )
  return {
    "setting": setting,
    "batch": batch_size,
    **costs._asdict(),
    **{name: getattr(costs, name) for name in ("verify", "draft", "predicted", "realised")},
  }


def trained_pair(workdir, rows):
  """The same of a trained pair, and transformers at batch 1."""
  (built, params), (small, draft_params) = (
    experiment_lib.restore_params(None, f"{workdir}/{name}")[:2] for name in ("target", "draft")
  )
  both = {"target": params, "draft": draft_params}
  text = np.concatenate([built.held_out[i]["tokens"] for i in range(len(built.held_out))])
  for batch_size in map(int, _BATCH_SIZES.value):
    tokens = text[: batch_size * PROMPT].reshape(batch_size, PROMPT)
    costs = speed.compare(
      built.model,
      both,
      lambda params: drafting.by_model(small.model, params["draft"], num_drafts=_GAMMA.value),
      base.row_keys(jax.random.key(0), jnp.arange(batch_size)),
      decode.Prompts(jnp.asarray(tokens, jnp.int32), jnp.full(batch_size, PROMPT, jnp.int32)),
      num_steps=_STEPS.value,
    )
    rows.append(row("trained", batch_size, costs))
  rows += assisted(built, params, small, draft_params, text[:PROMPT])
  for dtype in ("float32", "bfloat16"):
    rows.append(agreement(built, params, small, draft_params, text, dtype))


def agreement(built, params, small, draft_params, text, dtype):
  """Greedy speculation against greedy decoding, 16 rows of 96 tokens: how far they are the same.

  Both read the same tokens in other shapes, so sums round differently, and a near-tie can turn.
  """
  model, draft = (
    transformer.transformer(dataclasses.replace(one.model_config, dtype=dtype))
    for one in (built, small)
  )
  tokens = jnp.asarray(text[: 16 * PROMPT].reshape(16, PROMPT), jnp.int32)
  prompts = decode.Prompts(tokens, jnp.full(16, PROMPT, jnp.int32))
  settings = {"max_new_tokens": 96, "transform": logits.greedy()}
  keys = base.row_keys(jax.random.key(0), jnp.arange(16))

  @jax.jit
  def sample(params, draft_params):
    greedy = {"num_drafts": _GAMMA.value, "transform": logits.greedy()}
    drafter = drafting.by_model(draft, draft_params, **greedy)
    plain = decode.generate(model, params, keys, prompts, **settings)
    return plain, speculative.generate(model, params, drafter, keys, prompts, **settings)

  plain, drawn = jax.device_get(sample(params, draft_params))
  same = np.cumprod(plain.tokens == drawn.tokens, axis=1)[:, PROMPT:]
  print(
    f"greedy, {dtype}: {same.all(axis=1).sum()} of 16 rows are the same throughout, "
    f"{100 * same.mean():.1f}% of tokens come before a first difference"
  )
  return {"setting": f"greedy, {dtype}", "rows": int(same.all(axis=1).sum()), "of": 16}


def assisted(built, params, small, draft_params, prompt):
  """transformers' speed-up by the same pair, batch 1."""
  import torch
  import transformers

  device = "cuda" if jax.default_backend() == "gpu" else "cpu"

  def exported(built, params):
    with tempfile.TemporaryDirectory() as folder:
      ids = {"pad_token_id": 0}
      pretrained.write(f"{folder}/model", built.model_config, params, token_ids=ids)
      model = transformers.LlamaForCausalLM.from_pretrained(f"{folder}/model", dtype="float32")
    return model.to(device).eval()

  target, draft = exported(built, params), exported(small, draft_params)
  draft.generation_config.num_assistant_tokens = _GAMMA.value
  draft.generation_config.num_assistant_tokens_schedule = "constant"
  draft.generation_config.assistant_confidence_threshold = 0.0
  inputs = torch.from_numpy(prompt[None].astype(np.int64)).to(device)
  new_tokens = 128

  def generate(**kwargs):
    with torch.inference_mode():
      return target.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        do_sample=True,
        top_k=0,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        **kwargs,
      )

  plain, helped = (
    min(decode_hf.seconds(lambda kwargs=kwargs: generate(**kwargs)) for _ in range(4))
    for kwargs in ({}, {"assistant_model": draft})
  )
  rates = {"plain": new_tokens / plain, "assisted": new_tokens / helped}
  print(
    f"transformers, batch 1: {rates['plain']:.0f} tokens/s plain, {rates['assisted']:.0f} "
    f"assisted: {plain / helped:.2f}"
  )
  return [{"setting": "transformers", "batch": 1, **rates, "realised": plain / helped}]


def main(_):
  """Prints the table, and writes it."""
  logging.set_verbosity(logging.ERROR)  # of checkpoints
  rows = []
  print(f"{decode_hf.processor()}, jax {jax.__version__}, gamma {_GAMMA.value}")
  print("| acceptance | batch | E | v | gamma c | E / (v + gamma c) | realised | ratio |")
  print("|---|---|---|---|---|---|---|---|")
  random_pair(rows)
  if _PAIR.value:
    trained_pair(_PAIR.value, rows)
  if decode_hf.JSON.value:
    result = {
      "date": time.strftime("%Y-%m-%d"),
      "machine": decode_hf.processor(),
      "jax": jax.__version__,
      "target": _SHAPE.value,
      "gamma": _GAMMA.value,
      "rows": rows,
    }
    with open(decode_hf.JSON.value, "w") as file:
      json.dump(result, file, indent=1)


if __name__ == "__main__":
  app.run(main)
