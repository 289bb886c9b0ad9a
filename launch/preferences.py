"""Learning from pairs that a file has: from a configuration to a loss of them, and their scores.

A line of `config.data.path` is {"prompt": ..., "chosen": ..., "rejected": ...}. The model and its
tokenizer are those of the run `config.start.workdir`, which is also the reference of the losses
that have one. Nothing is drawn. A share of the pairs is held out, and what is measured of them is
how often the chosen response is told from the rejected one, and the loss.
"""

import contextlib
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console

from ..models import base as models
from ..sampling import sharded
from ..tasks import tokenizer as tokenizers
from ..training import data, selection, sharding, step
from ..training import state as state_lib
from . import adapters, answers, fields, language, learning, methods, supervised, workdirs

# What evaluation may change: as of a language model, and all that training alone reads.
FREE_TO_EVALUATE = (*language.FREE_TO_EVALUATE, "start", "method")
FREE_TO_RESUME = ()
FLAGS = ()

finished, rules, share = language.finished, language.rules, language.share
flops = None  # a step is two programs: the reference's, and the update


def complete(config: fields.Config) -> fields.Config:
  """The configuration with what it takes over from the run that it starts from: the model.

  Raises:
    ValueError, FileNotFoundError: that run is not named, not there, or of no language model.
  """
  if "model" in config:
    return config
  config, saved = workdirs.started(config)
  kind = saved.get("kind", "language")
  fields.require(
    kind in ("language", "learning", "preferences"),
    f"start.workdir={config.start.workdir!r} is of kind {kind}; give a language model's",
  )
  with config.unlocked():
    for section in ("model", "loss", "task", "tokenizer"):
      if section in saved:
        config[section] = saved[section]
    # What `language.build` makes of these is replaced: a task's problems, or half of the pairs.
    source = "task" if "task" in saved else "jsonl"
    config.data.update(source=source, fields=("prompt", "chosen"), rows="pad")
    config.data.row_length = saved.data.row_length
    if config.evaluation.max_new_tokens is None:
      config.evaluation.max_new_tokens = saved.evaluation.max_new_tokens
  return config.lock()


def build(config: fields.Config) -> language.Experiment:
  """All that the configuration names; see `complete`.

  Raises:
    ValueError, FileNotFoundError: in one line, what in it or in the file is wrong.
  """
  config = complete(config)
  path = pathlib.Path(fields.existing_path("data.path", config.data.path))
  fields.require(path.is_file(), f"data.path is {str(path)!r}, a folder; give a file")
  made = language.build(config)
  method = methods.comparison(made.model, config.method)
  pairs = pairs_of(path, made.tokenizer, method.weights, row_length=config.data.row_length)
  train, test = (
    data.side(pairs, side, test_percent=config.data.test_percent) for side in ("train", "test")
  )
  made = made._replace(
    source=train, held_out=test, rows=lambda dataset: dataset, loss_fn=method.loss_fn
  )
  return made._replace(score=scores(made, method))


def pairs_of(
  path: pathlib.Path,
  tokenizer: tokenizers.Tokenizer,
  weights: selection.PairWeights,
  *,
  row_length: int,
) -> data.Source:
  """The pairs of a file, each as `objectives.of_pairs` reads it, without the leading dimension.

  Raises:
    ValueError: a line is not a pair, or does not fit a row; names the line.
  """
  records = data.jsonl_source(path, ("prompt", "chosen", "rejected"))
  sides = [data.tokenize(records, tokenizer, ("prompt", name)) for name in ("chosen", "rejected")]

  def examples(index):
    records[index]  # what is wrong with the line as such, it says itself
    try:
      found = [side[index] for side in sides]
      for example in found:
        _check_fits(example, row_length)
    except ValueError as error:
      raise ValueError(f"{path}:{_line_number(path, index)}: {error}") from None
    return found

  pairs = [examples(index) for index in range(len(records))]
  return data.Source(
    len(pairs), lambda index: _pair(pairs[index], tokenizer.pad, weights, row_length)
  )


def _check_fits(example: data.Example, row_length: int) -> None:
  needed = len(example["tokens"]) - 1
  if needed > row_length:
    raise ValueError(
      f"a row of {needed} tokens is needed and those of the start have {row_length}: shorten the "
      "line or remove it"
    )


def _line_number(path: pathlib.Path, index: int) -> int:
  lines = path.read_bytes().split(b"\n")
  return [number for number, line in enumerate(lines, 1) if line.strip()][index]


def _pair(examples, pad_id, weights, row_length) -> step.Batch:
  rows = [data.padded(example, row_length, pad_id) for example in examples]
  drawn = [example["tokens"][example["mask"]].tolist() for example in examples]
  for row, weight in zip(rows, weights(*drawn), strict=True):
    row["weight"] = np.zeros_like(row["mask"])
    row["weight"][row["mask"] != 0] = weight
  return {"chosen": rows[0], "rejected": rows[1], "weight": np.float32(1)}


def scores(
  experiment: language.Experiment, method: methods.Comparison
) -> Callable[[models.Params], dict[str, float]]:
  """A function of params: `accuracy` and `held_out_loss` of held-out pairs.

  `accuracy` is the share of pairs where the margin of the log-ratios, or of the log-probabilities
  per token where the loss has no reference, favours the chosen response. At the start log-ratios
  are 0 but for rounding, and so their accuracy means nothing.
  """
  c = experiment.config.evaluation

  @functools.cache  # the reference is read once, and let go of
  def batches(mesh):
    count = min(c.num_pairs, len(experiment.held_out))
    pairs = [experiment.held_out[index] for index in range(count)]
    made = [
      selection.filled(
        jax.tree.map(lambda *x: np.stack(x), *pairs[first : first + c.batch_size]), c.batch_size
      )
      for first in range(0, count, c.batch_size)
    ]
    complete = _completion(experiment, method, lambda: _start_params(experiment.config, mesh))
    return [complete(batch) for batch in made]

  @jax.jit
  def sums(params, batch):
    (loss, weight), seen = experiment.loss_fn(None, params, batch)
    return jnp.stack([seen["preferred"].sum(), loss.sum(), weight.sum()])

  def score(params):
    at = jax.tree.leaves(params)[0].sharding
    mesh = at.mesh if isinstance(at, jax.sharding.NamedSharding) else None
    found = [sharded.to_host(sums(params, batch)) for batch in batches(mesh)]
    preferred, loss, weight = np.sum(found, axis=0)
    return {"accuracy": float(preferred / weight), "held_out_loss": float(loss / weight)}

  return score


def _start_params(config: fields.Config, mesh: jax.sharding.Mesh | None) -> models.Params:
  from . import experiment  # which has this kind in its table

  return experiment.start_params(config, mesh)


def _completion(experiment, method, start) -> Callable[[Any], Any]:
  """Adds to a batch what its loss reads of the reference, which is read if it does."""
  return learning.referred(experiment.model, start()) if method.reference else lambda batch: batch


@contextlib.contextmanager
def stepping(
  experiment: language.Experiment,
  abstract: state_lib.TrainState,
  workdir: pathlib.Path,
  done: int,
  start: Callable[[], models.Params],
) -> Iterator[Callable[..., Any]]:
  """Within it, the (key, state, batch) -> (state, metrics) of a step."""
  del workdir, done
  method = methods.comparison(experiment.model, experiment.config.method)
  complete = _completion(experiment, method, start)
  frozen = start() if adapters.used(experiment.config) else None
  update, mesh = supervised.jitted_step(experiment, abstract, frozen), sharding.mesh_of(abstract)
  yield lambda key, state, batch: update(key, state, complete(sharding.rows(batch, mesh)))


def evaluate(
  experiment: language.Experiment,
  params: models.Params,
  workdir: str,
  console: rich.console.Console,
) -> dict[str, Any]:
  """Scores of held-out pairs and, where there is a task, verified answers: printed, and as JSON.

  Args:
    experiment: whose pairs and task.
    params: finished.
    workdir: of the run, where nothing is written here.
    console: where the table goes.
  """
  found = experiment.score(params)
  console.print(
    f"Held-out pairs: {found['accuracy']:.1%} told apart, loss {found['held_out_loss']:.4f}."
  )
  if experiment.task is None:
    return found
  return {**found, **answers.evaluate(experiment, params, workdir, console)}
