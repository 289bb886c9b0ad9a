"""A step of GRPO against TRL's GRPOTrainer: same weights, prompts, batch and reward, in one run.

  python -m ancestral.benchmarks.grpo_trl                                      # 11M, 8 x 8 samples
  python -m ancestral.benchmarks.grpo_trl --peers=default,tuned,static,compiled
  python -m ancestral.benchmarks.grpo_trl --shape=1B --compute=bfloat16     # for a GPU

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
while they wait for each other). Our gradient's norm on the peer's first samples is printed beside
the one that it reports. The bound has the arithmetic at the speed of a large matrix product,
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
from ancestral.evaluation import speed
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
SHOWN = ("sampling", "updating", "cpu/step", "cpu/sampling", "cpu/updating")
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


class Clock:
  """Seconds that a step takes, by phase: of the wall's clock, and of all threads on the CPU."""

  def __init__(self):
    self.steps: list[dict[str, float]] = []
    self._found = collections.Counter()

  @contextlib.contextmanager
  def _adding(self, name: str):
    start, cpu = time.perf_counter(), time.process_time()
    yield
    self._found[name] += time.perf_counter() - start
    self._found[f"cpu/{name}"] += time.process_time() - cpu

  def timed(self, phase: str, function):
    """The same function, as a phase."""

    @functools.wraps(function)
    def run(*args, **kwargs):
      with self._adding(phase):
        return function(*args, **kwargs)

    return run

  @contextlib.contextmanager
  def step(self):
    """A step: what is in none of the other phases is updating."""
    self._found.clear()
    with self._adding("step"):
      yield
    for prefix in ("", "cpu/"):
      others = self._found[f"{prefix}sampling"] + self._found[f"{prefix}verifying"]
      self._found[f"{prefix}updating"] = self._found[f"{prefix}step"] - others
    self.steps.append(dict(self._found))


def method_of(model) -> methods.Method:
  """That of `configs/policy.py:grpo`, with the sizes of this run."""
  with (config := policy.get_config("grpo")).unlocked():
    config.rollouts.update(group_size=_GROUP.value, max_new_tokens=_ANSWER.value)
  return methods.build(model, config)


def updating(model):
  """An update, which takes its state over, and a function of parameters: the first state."""
  optimize, averaging = optimizer.adamw(_RATE, weight_decay=0.0), state.no_average()
  parts = {"optimizer": optimize, "averaging": averaging, "loss_fn": method_of(model).loss_fn}
  update = functools.partial(step.train_step, **parts)
  begin = lambda params: state.init(
    jax.random.key(0), lambda key: jax.tree.map(jnp.copy, params), optimize, averaging
  )
  return jax.jit(update, donate_argnums=1), begin


def rolling(config, tokenizer):
  """(key, params, problems) -> Rollouts."""
  model = transformer.transformer(config)
  sizes = {"group_size": _GROUP.value, "max_new_tokens": _ANSWER.value}
  sample = rollouts.sampler(model, stop=(tokenizer.eos,), **sizes)
  unstacked = jax.jit(transformer.unstack)
  task = tasks.Task(None, None, tokenizer)
  return lambda key, params, problems: rollouts.roll_out(
    sample,
    unstacked(params),
    task,
    problems,
    key,
    verify_all=lambda asked: [tasks.Verification(False, "it has no answer") for _ in asked],
    temperature=1.0,
    batch_size=_PROMPTS.value * _GROUP.value,
    max_length=config.max_length,
    **sizes,
  )


def ours(config, params, path, problems, clock):
  """A function of a step's number that makes it; `clock` gets what it took."""
  model = transformer.transformer(config)
  update, begin = updating(model)

  def rewards(rng, made):
    assert (made.lengths == _ANSWER.value).all(), made.lengths
    return np.array([[reward(text) for text in a.responses] for a in made.attempts], np.float32)

  run = learning.round_step(
    learning.Round(
      clock.timed("sampling", rolling(config, tokenizers.from_file(path))),
      clock.timed("verifying", rewards),
      method_of(model).select,
      lambda params, minibatch: minibatch,
      update,
      lambda count, made, rewards: None,
    ),
    capacity=_PROMPTS.value * _GROUP.value,
  )
  held = begin(params)

  def one(number):
    nonlocal held
    with clock.step():
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
  update, begin = updating(model)
  return float(update(jax.random.key(0), begin(params), rows)[1]["gradient_norm"])


def their_model(config, params):
  """The same weights in transformers."""
  import transformers

  with tempfile.TemporaryDirectory() as folder:
    ids = {"bos_token_id": 1, "pad_token_id": 0}
    pretrained.write(f"{folder}/model", config, params, token_ids=ids)
    return transformers.LlamaForCausalLM.from_pretrained(f"{folder}/model", dtype="float32")


def their_config(folder, steps, **settings):
  """The same step; temperature 1, no divergence and the gradient's clipping are its defaults."""
  import trl

  return trl.GRPOConfig(
    output_dir=folder,
    max_steps=steps,
    per_device_train_batch_size=_PROMPTS.value * _GROUP.value,
    num_generations=_GROUP.value,
    max_completion_length=_ANSWER.value,
    loss_type="grpo",
    shuffle_dataset=False,
    learning_rate=_RATE,
    lr_scheduler_type="constant",
    bf16=_COMPUTE.value == "bfloat16",
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    **settings,
  )


class Peer:
  """A trainer that is watched: what its steps took, and its first batch."""

  def __init__(self, trainer):
    self.trainer, self.clock, self.first = trainer, Clock(), {}
    trainer._generate = self.clock.timed("sampling", trainer._generate)
    trainer._calculate_rewards = self.clock.timed("verifying", trainer._calculate_rewards)
    self._loss, trainer._compute_loss = trainer._compute_loss, self._kept

  def _kept(self, model, inputs):
    self.first = self.first or {k: v.cpu().numpy() for k, v in inputs.items() if hasattr(v, "cpu")}
    assert inputs["completion_mask"].sum() == inputs["completion_mask"].numel()
    assert inputs["completion_ids"].shape[1] == _ANSWER.value
    return self._loss(model, inputs)

  def train(self, between):
    """With `between(step)` after each step; the gradient's norm at the first."""
    import torch
    import transformers

    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    watching, clock = contextlib.ExitStack(), self.clock

    class Watch(transformers.TrainerCallback):
      def on_step_begin(self, *args, **kwargs):
        watching.enter_context(clock.step())

      def on_step_end(self, args, state, control, **kwargs):
        synchronize()
        watching.close()
        between(state.global_step - 1)

    self.trainer.add_callback(Watch())
    self.trainer.remove_callback(transformers.PrinterCallback)
    self.trainer.train()
    return self.trainer.state.log_history[0]["grad_norm"]


def theirs(config, params, path, problems, folder, **settings) -> Peer:
  """The peer, with the same weights, tokenizer, prompts and reward."""
  import datasets
  import transformers
  import trl

  special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
  prompts = [problem.prompt for several in problems for problem in several]
  return Peer(
    trl.GRPOTrainer(
      their_model(config, params),
      lambda completions, **kwargs: [reward(text) for text in completions],
      args=their_config(folder, len(problems), **settings),
      train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
      processing_class=transformers.PreTrainedTokenizerFast(tokenizer_file=path, **special),
    )
  )


def compare(name, config, params, folder, problems) -> dict:
  """One setting of the peer, beside ours."""
  path, clock = f"{folder}/tokenizer.json", Clock()
  between = ours(config, params, path, problems, clock)
  peer = theirs(config, params, path, problems, folder, **PEERS[name])
  norm = peer.train(between)
  mine, made = clock.steps[_WARM_UP.value :], peer.clock.steps[_WARM_UP.value :]
  drawn = _PROMPTS.value * _GROUP.value * _ANSWER.value
  median = lambda rows: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
  rated = lambda found: {**found, "tokens_per_second": drawn / found["step"]}
  ratios = {key: [a[key] / b[key] for a, b in zip(made, mine, strict=True)] for key in made[0]}
  return {
    "peer": name,
    "ancestral": rated(median(mine)),
    "trl": rated(median(made)),
    "ratio": {key: statistics.median(values) for key, values in ratios.items()},
    "range": [min(ratios["step"]), max(ratios["step"])],
    "gradient_norms": [gradient_norm(config, params, peer.first), norm],
    "load": os.getloadavg()[0],
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
  """What was measured, in a few lines."""
  for name in ("trl", "ancestral"):
    r = row[name]
    phases = ", ".join(f"{phase} {100 * r[phase] / r['step']:.1f}%" for phase in PHASES)
    print(
      f"{row['peer']:8} {name:9} {r['tokens_per_second']:.0f} tokens/s, {r['step']:.2f} s a step "
      f"({phases}); of CPU {r['cpu/step']:.2f} s"
    )
  parts = ", ".join(f"{key} {row['ratio'][key]:.2f}" for key in SHOWN)
  norms, around = ("{:.5g} and {:.5g}".format(*row[key]) for key in ("gradient_norms", "range"))
  print(
    f"{row['peer']:8} ratio {row['ratio']['step']:.2f} (between {around}); {parts}; gradient norms "
    f"{norms}; load {row['load']:.1f}"
  )


def drawn_problems() -> list[list[tasks.Problem]]:
  """Those of each step: letters, and the token that begins a text before them."""
  size = _WARM_UP.value + _STEPS.value, _PROMPTS.value, _QUESTION.value - 1
  letters = np.random.default_rng(0).integers(97, 123, size)
  return [[tasks.Problem("".join(map(chr, row)), "", {}) for row in rows] for rows in letters]


def main(_):
  """Prints the table, and writes it."""
  jax.config.update("jax_default_matmul_precision", "highest")
  config = transformer.TransformerConfig(
    vocab_size=258,
    max_length=_QUESTION.value + _ANSWER.value,
    dtype=_COMPUTE.value,
    **SHAPES[_SHAPE.value],
  )
  params = transformer.transformer(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  least = bound(count)
  print(
    f"{count / 1e6:.1f}M parameters, {config.dtype}; {decode_hf.processor()}: "
    f"{least['flops'] / 1e9:.0f} GFLOP/s, {least['bytes_per_second'] / 1e9:.1f} GB/s; bound "
    f"{least['sampling'] + least['updating']:.2f} s a step, sampling {least['sampling']:.2f}"
  )
  rows = []
  with tempfile.TemporaryDirectory() as folder:
    write_tokenizer(f"{folder}/tokenizer.json")
    for name in _PEERS.value:
      rows.append(compare(name, config, params, folder, drawn_problems()))
      show(rows[-1])
  if decode_hf.JSON.value:
    with open(decode_hf.JSON.value, "w") as file:
      json.dump({"parameters": count, "bound": least, "rows": rows}, file, indent=1)


if __name__ == "__main__":
  app.run(main)
