"""A step of GRPO against TRL's GRPOTrainer: same weights, prompts, batch and reward, in one run.

  python -m ancestral.benchmarks.grpo_trl                                      # 11M, 8 x 8 samples
  python -m ancestral.benchmarks.grpo_trl --peers=default,tuned,static,compiled
  python -m ancestral.benchmarks.grpo_trl --shape=1B --compute=bfloat16 --answer_length=512   # a GPU

A step is a group of samples of each prompt, a reward in Python of every text, advantages, and one
clipped update by AdamW: no reference model, no second use of a sample. Ours is the round of
`configs/policy.py:grpo`. Text is bytes on both sides, by one tokenizer file. The token that ends a
text is outside the model's vocabulary, so all samples are of one length. The peer's settings:

  default   as TRL has them; activations are computed again in the backward pass
  tuned     without that
  static    tuned, and a static cache, which TRL does not compile
  compiled  tuned, and torch.compile of the model that trains
  paged     tuned, and transformers' continuous batching

After each step of the peer one of ours is made, so a busy machine slows both; the ratio is the
median over such pairs. Seconds of the CPU are given beside the wall clock's: they are of all
threads, and waiting for a core is not in them (OMP_WAIT_POLICY=passive has torch's threads sleep
while they wait for each other). Before, our gradient's norm on the peer's first samples is compared
with the one that it reports. The bound has the arithmetic at the speed of a large matrix product,
each prompt read once and the weights read once a token; attention's own products are left out.
"""

import collections
import contextlib
import functools
import json
import os
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from ancestral.benchmarks import decode_hf
from ancestral.configs import policy
from ancestral.evaluation import attempts, speed
from ancestral.launch import methods
from ancestral.models import pretrained, transformer
from ancestral.tasks import base as tasks
from ancestral.tasks import tokenizer as tokenizers
from ancestral.training import learning, optimizer, rollouts, state, step

SHAPES = {
  "11M": {"num_layers": 6, "width": 384, "num_heads": 6, "mlp_width": 1024},
  "1B": {"num_layers": 16, "width": 2048, "num_heads": 32, "num_kv_heads": 8, "mlp_width": 8192},
}
PEERS = {
  "default": {},
  "tuned": {"gradient_checkpointing": False},
  "static": {"gradient_checkpointing": False, "cache_implementation": "static"},
  "compiled": {"gradient_checkpointing": False, "torch_compile": True},
  "paged": {"gradient_checkpointing": False, "use_transformers_continuous_batching": True},
}
_SHAPE = flags.DEFINE_enum("shape", "11M", list(SHAPES), "Of the model, with random weights.")
_COMPUTE = flags.DEFINE_enum("compute", "float32", ["float32", "bfloat16"], "Weights are float32.")
_PEERS = flags.DEFINE_list("peers", ["default", "tuned", "static"], f"Of {', '.join(PEERS)}.")
_PROMPTS = flags.DEFINE_integer("prompts", 8, "Of a step.")
_GROUP = flags.DEFINE_integer("group", 8, "Samples of a prompt.")
_QUESTION = flags.DEFINE_integer("question_length", 32, "Tokens of a prompt.")
_ANSWER = flags.DEFINE_integer("answer_length", 64, "Tokens of a sample.")
_STEPS = flags.DEFINE_integer("steps", 7, "Timed, of each system.", 1)
_WARM_UP = flags.DEFINE_integer("warm_up", 2, "Steps before.", 1)

PHASES = ("sampling", "verifying", "updating")
_RATE = 1e-6


def reward(text: str) -> float:
  """The share of a text that is letters."""
  return sum(map(str.isalpha, text)) / max(len(text), 1)


def write_tokenizer(path: str) -> None:
  """Bytes, after <pad> and <s>; </s> comes last, and the model cannot write it."""
  import tokenizers as library

  alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
  names = ["<pad>", "<s>", *alphabet, "</s>"]
  made = library.Tokenizer(library.models.BPE({name: i for i, name in enumerate(names)}, []))
  made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  made.decoder = library.decoders.ByteLevel()
  made.post_processor = library.processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", 1)]
  )
  made.add_special_tokens(["<pad>", "<s>", "</s>"])
  made.save(path)


def timed(found: dict[str, float], name: str, function):
  """The same function; its seconds are added to `found[name]`."""

  @functools.wraps(function)
  def run(*args, **kwargs):
    start = time.perf_counter()
    result = function(*args, **kwargs)
    found[name] += time.perf_counter() - start
    return result

  return run


@contextlib.contextmanager
def watched(found: dict[str, float], made: list[dict[str, float]]):
  """Appends to `made` what a step took: the phases that `found` has, and the rest, as updating."""
  found.clear()
  start, cpu = time.perf_counter(), time.process_time()
  yield
  seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
  made.append({**found, "updating": seconds - sum(found.values()), "seconds": seconds, "cpu": cpu})


def config_of_method():
  """`configs/policy.py:grpo` with the sizes of this run."""
  with (config := policy.get_config("grpo")).unlocked():
    config.rollouts.group_size = _GROUP.value
    config.rollouts.max_new_tokens = _ANSWER.value
  return config


def ours(config, params, path, problems, made):
  """A function of a step's number that makes it, and `made` gets what it took."""
  tokenizer = tokenizers.from_file(path)
  task = tasks.Task(None, lambda problem, text: tasks.Verification(False, "none is right"), tokenizer)
  model = transformer.transformer(config)
  method = methods.build(model, config_of_method())
  sample = rollouts.sampler(
    model, group_size=_GROUP.value, max_new_tokens=_ANSWER.value, stop=(tokenizer.eos,)
  )
  unstacked, found = jax.jit(transformer.unstack), collections.defaultdict(float)

  def roll_out(key, params, problems):
    return rollouts.roll_out(
      sample,
      unstacked(params),
      task,
      problems,
      key,
      verify_all=attempts.in_process(task.verify),
      temperature=1.0,
      group_size=_GROUP.value,
      batch_size=_PROMPTS.value * _GROUP.value,
      max_length=config.max_length,
      max_new_tokens=_ANSWER.value,
    )

  def rewards(rng, rolled):
    assert (rolled.lengths == _ANSWER.value).all(), rolled.lengths
    return np.array([[reward(text) for text in a.responses] for a in rolled.attempts], np.float32)

  optimize = optimizer.adamw(_RATE, weight_decay=0.0)
  averaging = state.no_average()
  update = functools.partial(
    step.train_step, loss_fn=method.loss_fn, optimizer=optimize, averaging=averaging
  )
  run = learning.round_step(
    learning.Round(
      timed(found, "sampling", roll_out),
      timed(found, "verifying", rewards),
      method.select,
      lambda params, minibatch: minibatch,
      jax.jit(update, donate_argnums=1),
      lambda count, rolled, rewards: None,
    ),
    capacity=_PROMPTS.value * _GROUP.value,
  )
  held = state.init(jax.random.key(0), lambda key: jax.tree.map(jnp.copy, params), optimize, averaging)

  def one(number):
    nonlocal held
    with watched(found, made):
      held, _ = run(jax.random.key(1), held, problems[number])
      jax.block_until_ready(held.params)

  return one


def gradient_norm(config, params, seen) -> float:
  """Of our loss, on the peer's samples and advantages."""
  model = transformer.transformer(config)
  tokens = np.concatenate([seen["prompt_ids"], seen["completion_ids"]], axis=1).astype(np.int32)
  mask = np.zeros(tokens[:, 1:].shape, np.float32)
  mask[:, seen["prompt_ids"].shape[1] - 1 :] = seen["completion_mask"]
  rows = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "mask": mask}
  rows["log_prob"] = rows["old_log_prob"] = learning.scorer(model)(params, rows)
  rows["advantage"] = seen["advantages"][:, None] * mask
  update = functools.partial(
    step.train_step,
    loss_fn=methods.build(model, config_of_method()).loss_fn,
    optimizer=optimizer.adamw(_RATE, weight_decay=0.0),
    averaging=state.no_average(),
  )
  before = state.init(
    jax.random.key(0), lambda key: params, optimizer.adamw(_RATE, weight_decay=0.0),
    state.no_average(),
  )
  return float(jax.jit(update)(jax.random.key(0), before, rows)[1]["gradient_norm"])


def their_model(config, params):
  """The same weights in transformers."""
  import torch
  import transformers

  special = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
  model = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(**pretrained.llama_config(config), **special)
  )
  weights = pretrained.llama_state_dict(params)
  model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
  return model


def their_config(folder, steps, **settings):
  """The peer's configuration: the same step, and nothing else in it."""
  import trl

  return trl.GRPOConfig(
    output_dir=folder,
    max_steps=steps,
    per_device_train_batch_size=_PROMPTS.value * _GROUP.value,
    num_generations=_GROUP.value,
    max_completion_length=_ANSWER.value,
    loss_type="grpo",
    beta=0.0,
    temperature=1.0,
    shuffle_dataset=False,
    learning_rate=_RATE,
    lr_scheduler_type="constant",
    max_grad_norm=1.0,
    bf16=_COMPUTE.value == "bfloat16",
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    **settings,
  )


def theirs(config, params, path, problems, between, **settings):
  """Trains the peer, with `between(step)` after each step; what each took, and its first batch."""
  import datasets
  import torch
  import transformers
  import trl

  special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
  tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=path, **special)
  found, made, first = collections.defaultdict(float), [], {}
  synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
  watching = contextlib.ExitStack()

  class Watch(transformers.TrainerCallback):
    def on_step_begin(self, *args, **kwargs):
      watching.enter_context(watched(found, made))

    def on_step_end(self, args, state, control, **kwargs):
      synchronize()
      watching.close()
      between(state.global_step - 1)

  with tempfile.TemporaryDirectory() as folder:
    trainer = trl.GRPOTrainer(
      their_model(config, params),
      lambda completions, **kwargs: [reward(text) for text in completions],
      args=their_config(folder, len(problems), **settings),
      train_dataset=datasets.Dataset.from_dict(
        {"prompt": [problem.prompt for step in problems for problem in step]}
      ),
      processing_class=tokenizer,
      callbacks=[Watch()],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer._generate = timed(found, "sampling", trainer._generate)
    trainer._calculate_rewards = timed(found, "verifying", trainer._calculate_rewards)
    loss = trainer._compute_loss

    def kept(model, inputs):
      if not first:
        first.update({k: v.cpu().numpy() for k, v in inputs.items() if torch.is_tensor(v)})
      assert inputs["completion_mask"].sum() == inputs["completion_mask"].numel()
      assert inputs["completion_ids"].shape[1] == _ANSWER.value
      return loss(model, inputs)

    trainer._compute_loss = kept
    trainer.train()
  return made, first, trainer.state.log_history[0]["grad_norm"]


def compare(name, config, params, path, problems) -> dict:
  """One setting of the peer, beside ours."""
  mine = []
  between = ours(config, params, path, problems, mine)
  made, first, norm = theirs(config, params, path, problems, between, **PEERS[name])
  load = os.getloadavg()[0]
  mine, made = mine[_WARM_UP.value :], made[_WARM_UP.value :]
  drawn = _PROMPTS.value * _GROUP.value * _ANSWER.value
  median = lambda rows: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
  pairs = list(zip(made, mine, strict=True))
  ratios = {key: [a[key] / b[key] for a, b in pairs] for key in ("seconds", "cpu", *PHASES)}
  return {
    "peer": name,
    "ancestral": {**median(mine), "tokens_per_second": drawn / median(mine)["seconds"]},
    "trl": {**median(made), "tokens_per_second": drawn / median(made)["seconds"]},
    "ratio": {key: statistics.median(values) for key, values in ratios.items()},
    "ratio_range": [min(ratios["seconds"]), max(ratios["seconds"])],
    "gradient_norms": [gradient_norm(config, params, first), norm],
    "load": load,
  }


def bound(count: int) -> dict[str, float]:
  """The least seconds of each phase, of a model of `count` weights, on this machine."""
  n = 8192 if jax.default_backend() == "gpu" else 2048
  matrix = jnp.ones((n, n), _COMPUTE.value)
  multiply = jax.jit(jnp.matmul)
  flops = 2 * n**3 / speed.seconds(lambda: multiply(matrix, matrix), 5)
  bandwidth = decode_hf.bandwidth()
  rows, size = _PROMPTS.value * _GROUP.value, jnp.dtype(_COMPUTE.value).itemsize
  read = 2 * count * _PROMPTS.value * _QUESTION.value / flops
  token = max(2 * count * rows / flops, count * size / bandwidth)
  return {
    "flops": flops,
    "bytes_per_second": bandwidth,
    "sampling": read + (_ANSWER.value - 1) * token,
    "updating": 6 * count * rows * (_QUESTION.value + _ANSWER.value - 1) / flops,
  }


def show(row: dict) -> None:
  """Two lines."""
  for name in ("trl", "ancestral"):
    r = row[name]
    phases = ", ".join(f"{phase} {100 * r[phase] / r['seconds']:.1f}%" for phase in PHASES)
    print(
      f"  {row['peer'] if name == 'trl' else '':8} {name:9} {r['tokens_per_second']:6.0f} tokens/s,"
      f" {r['seconds']:.2f} s a step ({phases}), {r['cpu']:.2f} s of CPU"
    )
  low, high = row["ratio_range"]
  parts = ", ".join(f"{key} {row['ratio'][key]:.2f}" for key in ("cpu", "sampling", "updating"))
  print(
    f"  {'':8} ratio {row['ratio']['seconds']:.2f} ({low:.2f} to {high:.2f}); {parts}; gradient "
    "norms {:.6f}, {:.6f}".format(*row["gradient_norms"]) + f"; load {row['load']:.1f}"
  )


def main(_):
  """Prints the table, and writes it."""
  import torch
  import transformers
  import trl

  jax.config.update("jax_default_matmul_precision", "highest")
  config = transformer.TransformerConfig(
    vocab_size=258,
    max_length=_QUESTION.value + _ANSWER.value,
    dtype=_COMPUTE.value,
    **SHAPES[_SHAPE.value],
  )
  params = transformer.transformer(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  rng = np.random.default_rng(0)
  text = lambda: "".join(map(chr, rng.integers(97, 123, _QUESTION.value - 1)))  # and <s>
  problems = [
    [tasks.Problem(text(), "", {}) for _ in range(_PROMPTS.value)]
    for _ in range(_WARM_UP.value + _STEPS.value)
  ]
  least = bound(count)
  seconds = least["sampling"] + least["updating"]
  print(
    f"{count / 1e6:.1f}M parameters, {config.dtype}; {decode_hf.processor()}: "
    f"{least['flops'] / 1e9:.0f} GFLOP/s, {least['bytes_per_second'] / 1e9:.1f} GB/s; bound "
    f"{seconds:.2f} s a step, sampling {least['sampling']:.2f}"
  )
  rows = []
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "tokenizer.json")
    write_tokenizer(path)
    for name in _PEERS.value:
      rows.append(compare(name, config, params, path, problems))
      show(rows[-1])
  if decode_hf.JSON.value:
    result = {
      "date": time.strftime("%Y-%m-%d"),
      "machine": decode_hf.processor(),
      "shape": _SHAPE.value,
      "compute": _COMPUTE.value,
      "parameters": count,
      "bound": least,
      "versions": {m.__name__: m.__version__ for m in (jax, torch, transformers, trl)},
      "rows": rows,
    }
    with open(decode_hf.JSON.value, "w") as file:
      json.dump(result, file, indent=1)


if __name__ == "__main__":
  app.run(main)
