"""Masked diffusion language models: from a configuration to the objects that it names.

A run is of a task's answers, of a task's texts with blanks in them, or of texts. What is asked of a
model is a `fillings.Query`: tokens, with masks where it is to write.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..evaluation import attempts, fillings
from ..models import base as models
from ..models import mask_schedules, partition, transformer
from ..sampling import logits
from ..tasks import arithmetic, blanks
from ..tasks import base as tasks
from ..tasks import tokenizer as tokenizers
from ..training import block_diffusion, data, step
from ..training import masked as losses
from ..training import state as state_lib
from . import fields, held_out, language, markdown, supervised, unmasking


class Experiment(NamedTuple):
  """What a configuration stands for."""

  config: fields.Config
  task: tasks.Task | None  # with blanks, if it has some; None where the data are text
  tokenizer: tokenizers.Tokenizer
  model_config: transformer.TransformerConfig
  model: models.LanguageModel  # of the tokenizer's V tokens and the mask
  mask_schedule: mask_schedules.MaskSchedule
  source: data.Source  # examples to train on
  held_out: data.Source
  rows: data.Rows
  loss_fn: step.LossFn
  schedule: optax.Schedule
  optimizer: optax.GradientTransformation
  averaging: state_lib.Averaging
  init_params: Callable[[jax.Array], models.Params]
  score: Callable[[models.Params], dict[str, Any]] | None

  @property
  def mask(self) -> int:
    """V, the token that is the mask."""
    return self.tokenizer.vocab_size


MASKINGS = {"time": losses.by_time, "count": losses.by_count}
FREE_TO_EVALUATE = (*language.FREE_TO_EVALUATE, "task.blanks")
FREE_TO_RESUME = ()


def task_of(config: fields.Config) -> tasks.Task | None:
  """The task that the configuration names, with blanks of the patterns that it names."""
  task = language.task_of(config)
  if task is None or not config.task.get("blanks"):
    return task
  operation = fields.choose("task.name", config.task.name, arithmetic.OPERATIONS)
  style = fields.choose("task.style", config.task.style, arithmetic.FORMATS)
  patterns = [fields.choose("task.blanks", name, blanks.PATTERNS)() for name in config.task.blanks]
  return blanks.blanks(task, blanks.equations(operation, style), patterns=patterns)


def _example(tokenizer: tokenizers.Tokenizer, problem: tasks.Problem, index: int) -> data.Example:
  """An answer is learned, or what is blank."""
  if blanks.BLANK not in problem.prompt:
    return data.answered(tokenizer, problem, index)
  whole = data.example(tokenizer, "", problem.answer, index)
  blank = np.zeros(len(whole["tokens"]), bool)
  start = int(tokenizer.adds_bos)
  blank[start : start + len(problem.prompt)] = blanks.pattern(problem.prompt)
  return {**whole, "mask": blank}


def _rows(config, task, tokenizer) -> data.Rows:
  """Padding is learned with answers, whose length is not given, and in sight with blanks."""
  length = config.data.row_length
  if task is not None:
    fields.choose("data.rows", config.data.rows, {"pad": None})
    return losses.pad(length, tokenizer.pad, learned=not config.task.get("blanks"))
  rows = fields.choose("data.rows", config.data.rows, {"concatenate": data.concatenate})
  made = losses.unshifted(rows(length, tokenizer.pad))
  if config.loss.block_length is None:
    return made
  bare = lambda row: {name: row[name] for name in ("tokens", "mask")}  # blocks know no documents
  return lambda dataset: made(dataset).map(bare)


def _loss(config, model, mask, schedule) -> step.LossFn:
  c = config.loss
  masking = fields.choose("loss.masking", c.masking, MASKINGS)(schedule)
  if c.block_length is None:
    how = {"mask": mask, "chunk": c.chunk, "unconditional": c.unconditional}
    return losses.masked_diffusion(model, masking, **how)
  return block_diffusion.block_diffusion(model, masking, c.block_length, mask=mask, chunk=c.chunk)


def _check(config: fields.Config) -> None:
  """Raises at the first field that says nothing, or what another contradicts."""
  fields.check(config, ("model", "loss", "train", "evaluation"))
  fields.choose("model.dtype", config.model.dtype, fields.DTYPES)
  trained, length = config.loss.block_length, config.data.row_length
  unmasking.check(config.evaluation.unmasking, config)
  share = config.loss.unconditional
  fields.require(0 <= share < 1, f"loss.unconditional is {share}; it is from 0 to less than 1")
  apart = "task" in config and trained is None
  fields.require(apart or not share, "loss.unconditional is of tasks' prompts, and not in blocks")
  fields.require(length >= 1, f"data.row_length is {length}; it is at least 1")
  whole = trained is None or length % trained == 0
  fields.require(whole, f"data.row_length={length} is no multiple of loss.block_length={trained}")


def build(config: fields.Config) -> Experiment:
  """All that the configuration names.

  Raises:
    ValueError, FileNotFoundError: in one line, what in it is wrong, and what would be right.
  """
  _check(config)
  task, tokenizer = task_of(config), None
  if task is None:
    make = fields.choose("tokenizer.name", config.tokenizer.name, language.TOKENIZERS)
    tokenizer = make(config.tokenizer)
  else:
    tokenizer = task.tokenizer
  model_config = transformer.TransformerConfig(
    vocab_size=tokenizer.vocab_size + 1,  # and the mask
    max_length=config.data.row_length,
    causal=False,
    **config.model,
  )
  mask_schedule = fields.choose("loss.schedule", config.loss.schedule, unmasking.SCHEDULES)()
  schedule, optimizer = fields.optimizer_of(config)
  experiment = Experiment(
    config,
    task,
    tokenizer,
    model_config,
    None,
    mask_schedule,
    *language.sources(config, task, tokenizer, _example),
    _rows(config, task, tokenizer),
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
  return experiment._replace(
    model_config=c,
    model=model,
    loss_fn=_loss(experiment.config, model, c.vocab_size - 1, experiment.mask_schedule),
    init_params=lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32)),
  )


stepping, share = supervised.stepping, supervised.share


def flops(experiment: Experiment, abstract: state_lib.TrainState, shares: int, batch: Any) -> int:
  """See `experiment.Kind` and `supervised.loss_flops`, however attention is computed."""
  del abstract
  c = dataclasses.replace(experiment.model_config, attention="exact")
  loss_fn = with_model(experiment, c).loss_fn
  return supervised.loss_flops(loss_fn, experiment.init_params, shares, batch)


def rules(experiment: Experiment) -> tuple[partition.Rule, ...]:
  """How its parameters are split over devices."""
  return partition.rules(experiment.model_config.resolved().head_dim)


def finished(params: models.Params) -> models.Params:
  """Trained parameters as samplers read them: unstacked, a layer at a time."""
  return transformer.unstack(params)


def query(experiment: Experiment, prompt: str, length: int | None = None) -> fillings.Query:
  """What is asked by a prompt: to go on from it, or, where it has blanks, to fill these in.

  Args:
    experiment: whose tokens, and rows.
    prompt: a text; `blanks.BLANK` is a blank where the task has blanks.
    length: of the whole sequence; None is a row of the data.

  Raises:
    ValueError: the prompt has no room.
  """
  tokenizer, row_length = experiment.tokenizer, experiment.config.data.row_length
  length = row_length if length is None else length
  if experiment.task is not None and experiment.config.task.get("blanks"):
    return infilling(experiment, prompt)
  _check_length(experiment, length)
  begun = tokenizer.encode(prompt) if experiment.task is None else tokenizer.opened(prompt)
  if len(begun) >= length:
    raise ValueError(f"The prompt takes {len(begun)} tokens of {length}: shorten it.")
  tokens = np.full(length, experiment.mask, np.int32)
  tokens[: len(begun)] = begun
  return fillings.Query(tokens, len(begun))


def _check_length(experiment: Experiment, length: int) -> None:
  """Raises ValueError for sequences that the model does not have; rotary positions go further."""
  c, block = experiment.model_config, experiment.config.loss.block_length
  if c.positions == "learned" and length > c.max_length:
    raise ValueError(f"A sequence of {length} tokens is longer than the model's {c.max_length}.")
  if block is not None and length % block:
    raise ValueError(f"The model has blocks of {block} tokens, and {length} are not whole blocks.")


def infilling(experiment: Experiment, prompt: str, blank: str = blanks.BLANK) -> fillings.Query:
  """A text whose blanks are to be filled in, a token each, in rows as the task's model learned.

  Args:
    experiment: whose tokens, and rows.
    prompt: a text.
    blank: what stands for a blank in it.

  Raises:
    ValueError: it has no blank, or no room.
  """
  tokenizer, length = experiment.tokenizer, experiment.config.data.row_length
  if blank not in prompt:
    raise ValueError(f"The prompt {prompt!r} has no blank ({blank}) to be filled in.")
  shown = blanks.tokens(tokenizer, prompt, blank)
  if experiment.task is None:  # texts do not begin and end with a row
    shown = shown[tokenizer.adds_bos :]
    _check_length(experiment, len(shown))
    return fillings.Query(np.asarray(shown, np.int32), 0)
  tokens = np.full(length, tokenizer.pad, np.int32)
  if len(shown) >= length:
    raise ValueError(f"The text takes {len(shown)} tokens and its end, of {length}: shorten it.")
  tokens[: len(shown) + 1] = [*shown, tokenizer.eos]
  return fillings.Query(tokens, int(tokenizer.adds_bos))


def filler(
  experiment: Experiment, transform: Callable[[Any], logits.LogitsTransform], c: fields.Config
) -> Callable[..., fillings.Filled]:
  """A jitted (params, settings, keys [B], tokens [B, L]) -> Filled.

  Args:
    experiment: whose model.
    transform: of the law of each token, of the settings.
    c: how masks are filled in, `config.evaluation.unmasking`.
  """
  fill = unmasking.filler(
    c,
    experiment.model,
    experiment.mask_schedule,
    mask=experiment.mask,
    blockwise=experiment.config.loss.block_length is not None,
  )

  @jax.jit
  def filled(params, settings, keys, tokens):
    state = fill(params, transform(settings), keys, tokens)
    return fillings.Filled(state.tokens, state.calls)

  return filled


def held_out_problems(experiment: Experiment, count: int) -> list[tasks.Problem]:
  """Up to `count` distinct held-out problems of each level."""
  return language.held_out_problems(experiment, count, task_of)


def _check_room(experiment: Experiment, problems: Sequence[tasks.Problem]) -> None:
  """Raises ValueError where a row does not hold a prompt, its answer and the end."""
  encode, length = experiment.tokenizer.encode, experiment.config.data.row_length
  opened = experiment.tokenizer.opened
  texts = [(problem.prompt, problem.answer) for problem in problems]
  if experiment.config.task.get("blanks"):
    texts = [("", answer) for _, answer in texts]
  needed = max(len(opened(prompt)) + len(encode(answer)) + 1 for prompt, answer in texts)
  fields.require(needed <= length, f"data.row_length is {length}: problems take up to {needed}")


def verified(
  experiment: Experiment,
  fill: Callable[..., fillings.Filled],
  *,
  num_samples: int,
):
  """A function of (params, key): `num_samples` answers to each held-out problem, as Attempts.

  Args:
    experiment: whose problems.
    fill: `filler` of temperatures.
    num_samples: of each.

  Raises:
    ValueError: the problems do not fit.
  """
  c = experiment.config.evaluation
  problems = held_out_problems(experiment, c.num_problems)
  _check_room(experiment, problems)
  queries = [query(experiment, problem.prompt) for problem in problems]

  def attempt(params, key):
    responses = fillings.respond(
      functools.partial(fill, params, c.temperature),
      experiment.tokenizer,
      queries,
      key,
      num_samples=num_samples,
      batch_size=c.batch_size,
    )
    verify_all = attempts.in_process(experiment.task.verify)
    return attempts.judge_all(experiment.task, problems, responses, verify_all)

  return attempt


def _texts(experiment: Experiment, num: int = 4, most: int = 128) -> Callable[[Any], str]:
  """A function of params: texts drawn from nothing, as Markdown."""
  c = experiment.config
  block = c.loss.block_length or 1
  length = max(min(c.data.row_length, most) // block, 1) * block
  tokens = jnp.full((num, length), experiment.mask, jnp.int32)
  fill = filler(experiment, logits.temperature, c.evaluation.unmasking)

  def write(params):
    keys = jax.random.split(jax.random.key(c.seed), num)
    filled = fill(params, 1.0, keys, tokens)
    texts = [experiment.tokenizer.decode(row.tolist()) for row in np.asarray(filled.tokens)]
    return markdown.quoted(texts)

  return write


def scores(experiment: Experiment) -> Callable[[models.Params], dict[str, Any]]:
  """What is measured now and then while training; see `language.scores`.

  Raises:
    ValueError: the problems do not fit.
  """
  if experiment.task is None:
    loss, write = held_out.mean_loss(experiment), _texts(experiment)
    return lambda params: {"held_out_loss": loss(params), "samples": write(params)}
  fill = filler(experiment, logits.temperature, experiment.config.evaluation.unmasking)
  attempt = verified(experiment, fill, num_samples=1)
  return lambda params: markdown.summary(attempt(params, jax.random.key(experiment.config.seed)))
