"""Language models: from a configuration to the objects it names, and what is measured of them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..evaluation import attempts
from ..models import base as models
from ..models import partition, pretrained, rotary, transformer
from ..sampling import decode, logits
from ..tasks import arithmetic, expressions, sudoku
from ..tasks import base as tasks
from ..tasks import tokenizer as tokenizers
from ..training import data, likelihood, step
from ..training import state as state_lib
from . import adapters, fields, held_out, markdown, supervised


class Experiment(NamedTuple):
  """What a configuration stands for."""

  config: fields.Config
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
  init_params: Callable[[jax.Array], Any] | None  # (key) -> what is trained; of the rest
  score: Callable[[models.Params], dict[str, Any]] | None  # `scores`, of the rest


def _arithmetic(operation: Callable, config: fields.Config) -> tasks.Task:
  style = fields.choose("task.style", config.style, arithmetic.FORMATS)
  return operation(style=style, levels=config.levels)


def _expressions(config: fields.Config) -> tasks.Task:
  styles = {"derivation": expressions.derivation, "value": expressions.value}
  return expressions.expressions(
    style=fields.choose("task.style", config.style, styles), levels=config.levels
  )


TASKS = {
  name: functools.partial(_arithmetic, operation) for name, operation in arithmetic.TASKS.items()
} | {
  "expressions": _expressions,
  "sudoku": lambda config: sudoku.sudoku(box=config.box, levels=config.levels),
}

TOKENIZERS = {
  "pretrained": lambda config: tokenizers.pretrained(
    fields.existing_path("tokenizer.path", config.path)
  ),
  "bytes": lambda config: tokenizers.bytes_level(),
  "file": lambda config: tokenizers.from_file(fields.existing_path("tokenizer.path", config.path)),
}


def _texts_of(source: data.Source, passage: int | None) -> data.Source:
  if passage is None:
    return source
  fields.require(passage >= 1, f"data.passage is {passage}; it is at least 1")
  return data.passages(source, passage)


# A source of records, and its fields that are read: a text, or a prompt and an answer.
RECORDS = {
  "text": lambda c: _texts_of(data.text_source(c.folder, c.pattern), c.get("passage")),
  "jsonl": lambda c: data.jsonl_source(fields.existing_path("data.path", c.path), c.fields),
  "tfds": lambda c: data.tfds_source(c.name, c.split, c.data_dir or None),
}

ROWS = {"pad": data.pad, "first_fit": data.first_fit, "concatenate": data.concatenate}

# What evaluation may change: all but the network, the tokenizer and the task itself.
FREE_TO_EVALUATE = ("seed", "data", "optimizer", "loss", "train", "evaluation", "task.levels")
FREE_TO_RESUME = ()


def complete(config: fields.Config) -> fields.Config:
  """The configuration with what it takes over from the pretrained model that it starts from.

  Those are all fields of its model but those that the configuration has, and its tokenizer.

  Raises:
    ValueError, FileNotFoundError: there is no such directory, or its model is not supported.
  """
  if "num_layers" in config.model:
    return config
  named = config.get("start") and config.start.get("pretrained")
  fields.require(bool(named), "start is empty; name a pretrained directory")
  folder = fields.existing_path("start.pretrained", config.start.pretrained)
  c = pretrained.read_config(folder)
  taken = {field.name: getattr(c, field.name) for field in dataclasses.fields(c)}
  if c.rotary_scaling is not None:
    taken["rotary_scaling"] = rotary.fields(c.rotary_scaling)
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.model = {**taken, **config.model.to_dict()}
    config.tokenizer = {"name": "pretrained", "path": folder}
  return config.lock()


def task_of(config: fields.Config) -> tasks.Task | None:
  """The task that the configuration names, over all of its problems."""
  if "task" not in config:
    return None
  return fields.choose("task.name", config.task.name, TASKS)(config.task)


def sources(
  config: fields.Config,
  task: tasks.Task | None,
  tokenizer: tokenizers.Tokenizer,
  example_of: Callable[..., data.Example] = data.answered,
) -> tuple[data.Source, data.Source]:
  """Examples to train on, and held-out ones; a task's are made by `example_of`."""
  if task is not None:
    fields.choose("data.source", config.data.source, {"task": None})
    sides = (
      tasks.restrict(task, side, test_percent=config.task.test_percent)
      for side in ("train", "test")
    )
    return tuple(data.task_source(side, config.seed, example_of=example_of) for side in sides)
  records = fields.choose("data.source", config.data.source, RECORDS)(config.data)
  examples = data.tokenize(records, tokenizer, config.data.fields)
  return tuple(
    data.side(examples, side, test_percent=config.data.test_percent) for side in ("train", "test")
  )


def _check(config: fields.Config) -> None:
  """Raises at the first number that its field cannot mean."""
  row_length = config.data.row_length
  fields.require(row_length >= 1, f"data.row_length is {row_length}; it is at least 1")
  fields.check(config, ("model", "loss", "train", "evaluation"))
  fields.choose("model.dtype", config.model.dtype, fields.DTYPES)


def build(config: fields.Config) -> Experiment:
  """All that the configuration names.

  Raises:
    ValueError, FileNotFoundError: in one line, what in it is wrong, and what would be right; also
      where held-out problems or their answers do not fit.
  """
  config = complete(config)
  _check(config)
  task, tokenizer = task_of(config), None
  if config.get("tokenizer"):
    tokenizer = fields.choose("tokenizer.name", config.tokenizer.name, TOKENIZERS)(config.tokenizer)
  if task is not None:
    task = task._replace(tokenizer=tokenizer or task.tokenizer)
    tokenizer = task.tokenizer
  sizes = {"vocab_size": tokenizer.vocab_size, "max_length": config.data.row_length + 1}
  model_config = transformer.TransformerConfig(**{**sizes, **config.model.to_dict()})
  fits = config.data.row_length <= model_config.max_length
  fields.require(fits, f"data.row_length is more than the model's {model_config.max_length}")
  source, held_out = sources(config, task, tokenizer)
  rows = fields.choose("data.rows", config.data.rows, ROWS)(config.data.row_length, tokenizer.pad)
  schedule, optimizer = fields.optimizer_of(config)
  experiment = Experiment(
    config,
    task,
    tokenizer,
    model_config,
    None,
    source,
    held_out,
    rows,
    None,
    schedule,
    optimizer,
    fields.averaging_of(config),
    init_params=None,
    score=None,
  )
  experiment = with_model(experiment, model_config)
  return experiment._replace(score=scores(experiment))


def with_model(experiment: Experiment, c: transformer.TransformerConfig) -> Experiment:
  """The experiment with another network: its model, loss and untrained parameters."""
  model = transformer.transformer(c)
  loss_fn = likelihood.next_token(model, **experiment.config.loss)
  made = experiment._replace(model_config=c, model=model, loss_fn=loss_fn)
  init = functools.partial(init_model, made)
  return made._replace(init_params=adapters.init_params(experiment.config, init))


stepping, share = supervised.stepping, supervised.share


def init_model(experiment: Experiment, key: jax.Array) -> models.Params:
  """Untrained parameters of its model, whether all of them are trained or adapters."""
  return experiment.model.init(key, jnp.zeros((1, 1), jnp.int32))


def frozen_shapes(experiment: Experiment) -> models.Params | None:
  """Shapes of the parameters that adapters change; None where all are trained."""
  if not adapters.used(experiment.config):
    return None
  return jax.eval_shape(functools.partial(init_model, experiment), jax.random.key(0))


def flops(experiment: Experiment, abstract: state_lib.TrainState, shares: int, batch: Any) -> int:
  """See `experiment.Kind` and `supervised.loss_flops`, however attention is computed."""
  del abstract
  c = dataclasses.replace(experiment.model_config, attention="exact")
  loss_fn = with_model(experiment, c).loss_fn
  init = functools.partial(init_model, experiment)
  return supervised.loss_flops(loss_fn, init, shares, batch)


def rules(experiment: Experiment) -> tuple[partition.Rule, ...]:
  """How its parameters are split over devices."""
  return partition.rules(experiment.model_config.resolved().head_dim)


def finished(params: models.Params) -> models.Params:
  """Trained parameters as decoding reads them: unstacked, a layer at a time."""
  return transformer.unstack(params)


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
      stop=experiment.tokenizer.stops,
    )

  return sample


def held_out_problems(
  experiment: Experiment,
  count: int,
  make: Callable[[fields.Config], tasks.Task | None] = task_of,
) -> list[tasks.Problem]:
  """Up to `count` distinct held-out problems of each level: small levels do not have so many.

  Args:
    experiment: whose configuration.
    count: of each level.
    make: the task that a configuration names.
  """
  found = []
  for level in experiment.config.task.levels:
    config = experiment.config.copy_and_resolve_references()
    config.task.levels = (level,)
    side = tasks.restrict(make(config), "test", test_percent=config.task.test_percent)
    distinct = {}
    for index in range(10 * count):
      problem = tasks.problem_at(side, experiment.config.seed + 1, index)
      distinct.setdefault(problem.metadata["key"], problem)
      if len(distinct) == count:
        break
    found += distinct.values()
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


def _texts(experiment: Experiment, num: int = 4, most: int = 128) -> Callable[[Any], str]:
  """A function of params: texts drawn from the model's law, from the beginning, in Markdown."""
  longest = experiment.model_config.max_length - 1
  num_new = min(experiment.config.evaluation.max_new_tokens, most, longest)
  sample = sampler(experiment, max_new_tokens=num_new)

  def write(params):
    (responses,) = attempts.respond(
      functools.partial(sample, params, 1.0),
      experiment.tokenizer,
      [""],
      jax.random.key(experiment.config.seed),
      num_samples=num,
      batch_size=num,
      max_length=experiment.model_config.max_length,
      max_new_tokens=num_new,
    )
    return markdown.quoted([response.text for response in responses])

  return write


def scores(experiment: Experiment) -> Callable[[models.Params], dict[str, Any]]:
  """What is measured now and then while training: a function of the parameters.

  For a task, the share of right answers to held-out problems, one sample each, over all and by
  level, and some of them; for text, the held-out loss, and some texts drawn.

  Raises:
    ValueError: the problems or their answers do not fit.
  """
  if experiment.task is None:
    loss, write = held_out.mean_loss(experiment), _texts(experiment)
    return lambda params: {"held_out_loss": loss(params), "samples": write(params)}
  attempt = verified(experiment, num_samples=1)
  return lambda params: markdown.summary(attempt(params, jax.random.key(experiment.config.seed)))
