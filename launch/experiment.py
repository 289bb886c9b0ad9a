"""From a configuration to the objects it names: the one place where names become functions."""

import functools
import itertools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from ..evaluation import attempts
from ..models import base as models
from ..models import transformer
from ..sampling import decode, logits
from ..tasks import arithmetic, expressions
from ..tasks import base as tasks
from ..tasks import tokenizer as tokenizers
from ..training import checkpoint, data, likelihood, optimizer, step
from ..training import state as state_lib

Config = ml_collections.ConfigDict


class Experiment(NamedTuple):
  """What a configuration stands for."""

  config: Config
  task: tasks.Task | None  # None where the data are text
  tokenizer: tokenizers.Tokenizer
  model_config: transformer.TransformerConfig
  model: models.LanguageModel
  source: data.Source  # examples to train on
  held_out: data.Source
  rows: data.Rows
  loss_fn: step.LossFn
  schedule: optax.Schedule
  optimizer: optax.GradientTransformation
  averaging: state_lib.Averaging


def choose(field: str, name: str, choices: Mapping[str, Any]) -> Any:
  """The choice of that name.

  Raises:
    ValueError: there is none; says what there is.
  """
  if name not in choices:
    raise ValueError(f"config.{field} is {name!r}; it is one of {', '.join(sorted(choices))}.")
  return choices[name]


def _arithmetic(operation: Callable, config: Config) -> tasks.Task:
  style = choose("task.style", config.style, arithmetic.FORMATS)
  return operation(style=style, levels=config.levels)


def _expressions(config: Config) -> tasks.Task:
  styles = {"derivation": expressions.derivation, "value": expressions.value}
  return expressions.expressions(
    style=choose("task.style", config.style, styles), levels=config.levels
  )


def _path(field: str, path: str) -> str:
  if not path or not pathlib.Path(path).exists():
    raise FileNotFoundError(f"config.{field} is {path!r}, which does not exist: give one.")
  return path


TASKS = {
  name: functools.partial(_arithmetic, operation)
  for name, operation in arithmetic.OPERATIONS.items()
} | {"expressions": _expressions}

TOKENIZERS = {
  "bytes": lambda config: tokenizers.bytes_level(),
  "file": lambda config: tokenizers.from_file(_path("tokenizer.path", config.path)),
}

# A source of records, and its fields that are read: a text, or a prompt and an answer.
RECORDS = {
  "text": lambda c: data.text_source(c.folder, c.pattern),
  "jsonl": lambda c: data.jsonl_source(_path("data.path", c.path), c.fields),
  "tfds": lambda c: data.tfds_source(c.name, c.split, c.data_dir or None),
}

ROWS = {"pad": data.pad, "first_fit": data.first_fit, "concatenate": data.concatenate}

SCHEDULES = {
  "warmup_cosine": optimizer.warmup_cosine,
  "warmup_stable_decay": optimizer.warmup_stable_decay,
}

OPTIMIZERS = {"adamw": optimizer.adamw, "muon": optimizer.muon}


DTYPES = {name: name for name in ("float32", "bfloat16", "float16")}

# What evaluation may change: all but the network, the tokenizer and the task itself.
FREE_TO_EVALUATE = ("seed", "data", "optimizer", "loss", "train", "evaluation", "task.levels")


def task_of(config: Config) -> tasks.Task | None:
  """The task that the configuration names, over all of its problems."""
  if "task" not in config:
    return None
  return choose("task.name", config.task.name, TASKS)(config.task)


def _sources(config: Config, task: tasks.Task | None, tokenizer) -> tuple[data.Source, data.Source]:
  """Examples to train on, and held-out ones."""
  if task is not None:
    choose("data.source", config.data.source, {"task": None})
    sides = (
      tasks.restrict(task, side, test_percent=config.task.test_percent)
      for side in ("train", "test")
    )
    return tuple(data.task_source(side, config.seed) for side in sides)
  records = choose("data.source", config.data.source, RECORDS)(config.data)
  examples = data.tokenize(records, tokenizer, config.data.fields)
  return tuple(
    data.side(examples, side, test_percent=config.data.test_percent) for side in ("train", "test")
  )


def _optimizer(config: Config) -> tuple[optax.Schedule, optax.GradientTransformation]:
  c = config.optimizer
  schedule = choose("optimizer.schedule", c.schedule, SCHEDULES)(
    c.peak,
    num_steps=config.train.num_steps,
    warmup_steps=round(c.warmup_fraction * config.train.num_steps),
  )
  make = choose("optimizer.name", c.name, OPTIMIZERS)
  return schedule, make(schedule, weight_decay=c.weight_decay, clip_norm=c.clip_norm)


def _check(config: Config) -> None:
  """Raises at the first number that its field cannot mean."""
  c = to_json(config)
  fields = [
    (section, name) for section in ("model", "loss", "train", "evaluation") for name in c[section]
  ]
  for section, name in [("data", "row_length"), *fields]:
    value = c[section][name]
    _require(type(value) is not int or value >= 1, f"{section}.{name} is {value}; it is at least 1")
  choose("model.dtype", c["model"]["dtype"], DTYPES)
  batch_size, num_microbatches = c["train"]["batch_size"], c["train"]["num_microbatches"]
  decay, peak = c["train"]["average_decay"], c["optimizer"]["peak"]
  temperature = c["evaluation"].get("temperature", 1.0)
  divides = batch_size % num_microbatches == 0
  rule = f"is not a multiple of config.train.num_microbatches={num_microbatches}"
  _require(divides, f"train.batch_size={batch_size} {rule}")
  _require(c["seed"] >= 0, f"seed is {c['seed']}; it is at least 0")
  _require(0 <= decay < 1, f"train.average_decay is {decay}; it is in [0, 1)")
  warmup = c["optimizer"]["warmup_fraction"]
  _require(peak > 0, f"optimizer.peak is {peak}; it is above 0")
  _require(0 <= warmup < 1, f"optimizer.warmup_fraction is {warmup}; it is in [0, 1)")
  _require(temperature >= 0, f"evaluation.temperature is {temperature}; it is at least 0")


def _require(holds: bool, rule: str) -> None:
  if not holds:
    raise ValueError(f"config.{rule}.")


def build(config: Config) -> Experiment:
  """All that the configuration names.

  Raises:
    ValueError, FileNotFoundError: in one line, what in it is wrong, and what would be right.
  """
  _check(config)
  task = task_of(config)
  tokenizer = (
    task.tokenizer
    if task is not None
    else choose("tokenizer.name", config.tokenizer.name, TOKENIZERS)(config.tokenizer)
  )
  model_config = transformer.TransformerConfig(
    vocab_size=tokenizer.vocab_size,
    max_length=config.data.row_length + 1,  # and the last target
    **config.model,
  )
  model = transformer.transformer(model_config)
  source, held_out = _sources(config, task, tokenizer)
  rows = choose("data.rows", config.data.rows, ROWS)(config.data.row_length, tokenizer.pad)
  schedule, optimizer_ = _optimizer(config)
  decay = config.train.average_decay
  return Experiment(
    config,
    task,
    tokenizer,
    model_config,
    model,
    source,
    held_out,
    rows,
    likelihood.next_token(model, **config.loss),
    schedule,
    optimizer_,
    state_lib.exponential_average(decay) if decay else state_lib.no_average(),
  )


def init_state(experiment: Experiment, key: jax.Array) -> state_lib.TrainState:
  """The state before training."""
  tokens = jnp.zeros((1, 1), jnp.int32)
  return state_lib.init(
    key, lambda key: experiment.model.init(key, tokens), experiment.optimizer, experiment.averaging
  )


def quality(scalars: Mapping[str, float]) -> float:
  """Which checkpoint is best: that of most right answers, or of least held-out loss."""
  return scalars["pass@1"] if "pass@1" in scalars else -scalars["held_out_loss"]


def restore_params(
  config: Config | None,
  workdir: str,
  *,
  last: bool = False,
  step: int | None = None,
  best: bool = False,
) -> tuple[Experiment, models.Params, int]:
  """The experiment, its trained parameters unstacked for decoding, and the step they are from.

  Args:
    config: the experiment; None is the one that was saved.
    workdir: of the run.
    last: the parameters themselves, even where their running average is kept.
    step: the checkpoint; None is the latest.
    best: the checkpoint of the best evaluation instead.

  Raises:
    FileNotFoundError: the workdir has no such checkpoint.
    ValueError: the checkpoint is corrupt, or of another model or task; or both step and best.
  """
  if best and step is not None:
    raise ValueError(f"--best and --step={step} may be two checkpoints: give one of them.")
  if best:
    with checkpoint.open_manager(checkpoints(workdir), create=False) as manager:
      step = checkpoint.best_step(manager, quality)
  saved = checkpoint.load_config(checkpoints(workdir), step)
  config = config or ml_collections.ConfigDict(saved).lock()
  checkpoint.check_config(saved, to_json(config), ignore=FREE_TO_EVALUATE)
  experiment = build(config)
  name = "params" if last or not saved["train"]["average_decay"] else "average"
  tokens = jnp.zeros((1, 1), jnp.int32)
  params = jax.eval_shape(experiment.model.init, jax.random.key(0), tokens)
  with checkpoint.open_manager(checkpoints(workdir), create=False) as manager:
    restored = checkpoint.restore_part(manager, params, name, step)
  return experiment, transformer.unstack(restored.state), restored.step


def checkpoints(workdir: str) -> str:
  """Where a run keeps its checkpoints."""
  return f"{workdir}/checkpoints"


def to_json(config: Config) -> dict[str, Any]:
  """The configuration as plain JSON, as a checkpoint keeps it."""
  return json.loads(config.to_json())


def check_new_tokens(experiment: Experiment, max_new_tokens: int) -> None:
  """Raises where that many drawn tokens leave no room for a prompt."""
  max_length = experiment.model_config.max_length
  if max_new_tokens >= max_length:
    raise ValueError(
      f"max_new_tokens={max_new_tokens} leaves no room for a prompt in a sequence "
      f"of {max_length} tokens (config.data.row_length): lower it."
    )


def sampler(experiment: Experiment, *, max_new_tokens: int):
  """A jitted (params, temperature, keys, prompts) -> Samples.

  Args:
    experiment: whose model and end-of-sequence token.
    max_new_tokens: the most drawn.

  Raises:
    ValueError: that many tokens leave no room for a prompt.
  """
  check_new_tokens(experiment, max_new_tokens)

  @jax.jit
  def sample(params, temperature, keys, prompts):
    return decode.generate(
      experiment.model,
      params,
      keys,
      prompts,
      max_new_tokens=max_new_tokens,
      transform=logits.temperature(temperature),
      stop=(experiment.tokenizer.eos,),
    )

  return sample


def held_out_problems(experiment: Experiment, count: int) -> list[tasks.Problem]:
  """Up to `count` distinct held-out problems of each level: small levels do not have so many."""
  found = []
  for level in experiment.config.task.levels:
    config = experiment.config.task.copy_and_resolve_references()
    config.levels = (level,)
    side = tasks.restrict(
      choose("task.name", config.name, TASKS)(config), "test", test_percent=config.test_percent
    )
    drawn = tasks.problems(side, experiment.config.seed + 1, 10 * count)
    found += list({problem.metadata["key"]: problem for problem in drawn}.values())[:count]
  return found


def _check_room(experiment: Experiment, problems: list[tasks.Problem]) -> None:
  """Raises where a problem does not fit a row, or its answer what may be drawn."""
  row_length = experiment.config.data.row_length
  max_new_tokens = experiment.config.evaluation.max_new_tokens
  encode = experiment.tokenizer.encode
  answer = max(len(encode(problem.answer)) + 1 for problem in problems)  # and the end
  prompt = max(len(encode(problem.prompt)) for problem in problems)
  needed = prompt + max(answer, max_new_tokens)  # the beginning, but not the last token
  if answer > max_new_tokens or needed > row_length:
    raise ValueError(
      f"Prompts take up to {prompt} tokens and answers {answer}, but config.evaluation."
      f"max_new_tokens is {max_new_tokens} and config.data.row_length is {row_length}: raise "
      f"them to {max(answer, max_new_tokens)} and {needed} at least."
    )


def verified(experiment: Experiment, *, num_samples: int):
  """A function of (params, key): `num_samples` answers to each held-out problem, as Attempts.

  Raises:
    ValueError: the problems or their answers do not fit.
  """
  c = experiment.config.evaluation
  problems = held_out_problems(experiment, c.num_problems)
  _check_room(experiment, problems)
  sample = sampler(experiment, max_new_tokens=c.max_new_tokens)

  def attempt(params, key):
    return attempts.attempt(
      functools.partial(sample, params, c.temperature),
      experiment.task,
      problems,
      key,
      num_samples=num_samples,
      batch_size=c.batch_size,
      max_length=experiment.model_config.max_length,
      max_new_tokens=c.max_new_tokens,
    )

  return attempt


def held_out_loss(experiment: Experiment) -> Callable[[models.Params], float]:
  """A function of params: the mean loss, in nats per token, of the held-out examples."""
  c = experiment.config

  @jax.jit
  def sums(params, batch):
    (loss, weight), _ = experiment.loss_fn(None, params, batch)
    return jnp.sum(loss), jnp.sum(weight)

  def loss(params):
    batches = data.batches(
      experiment.held_out, experiment.rows, batch_size=c.evaluation.batch_size, shuffle=False
    )
    pairs = [sums(params, batch) for batch in itertools.islice(batches, c.evaluation.num_batches)]
    total, weight = np.sum(jax.device_get(pairs), axis=0)
    return float(total / weight)

  return loss
