"""Learning from one's own samples, verified: from a configuration to a round of it.

The model is a trained language model's, that of the run `config.start.workdir`; its task says what
is asked and what is right. A step of training is a round: problems, a group of samples of each,
their verdicts, and updates. Every sample is written down, with its verdict and reward, in
WORKDIR/rollouts.jsonl: `python -m ancestral.launch.rollouts` makes a page of it.
"""

import contextlib
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from ..models import base as models
from ..models import transformer
from ..sampling import logits, sharded, truncation
from ..tasks import base as tasks
from ..tasks import workers
from ..training import data, learning, processes, rollouts
from ..training import state as state_lib
from . import adapters, fields, language, methods, supervised, workdirs

# What evaluation may change: as of a language model, and all that training alone reads.
FREE_TO_EVALUATE = (*language.FREE_TO_EVALUATE, "start", "rollouts", "method")
# What a resumed run may change: what verifying may take of the machine, and where the reference is.
FREE_TO_RESUME = ("rollouts.num_workers", "rollouts.timeout", "rollouts.reference")

REWARDS = {
  "verifier": learning.verified,
  "inverted": learning.inverted,
  "random": learning.random,
}

# Filters by the field that has their setting; None turns one off.
FILTERS = {
  "top_k": truncation.top_k,
  "top_p": truncation.top_p,
  "min_p": truncation.min_p,
}

finished, rules = language.finished, language.rules
share, flops = supervised.everything, None


def complete(config: fields.Config) -> fields.Config:
  """The configuration with what it takes over from the run that it starts from: model and task.

  Raises:
    ValueError, FileNotFoundError: that run is not named, not there, or has no task.
  """
  if "model" in config:
    return config
  config, saved = workdirs.started(config)
  fields.require("task" in saved, f"start.workdir={config.start.workdir!r} has no verifier")
  with config.unlocked():
    for section in ("model", "data", "loss", "task"):
      config[section] = saved[section]
    if saved.get("tokenizer"):
      config.tokenizer = saved.tokenizer
    if config.levels is not None:
      config.task.levels = config.levels
    r, evaluation = config.rollouts, config.evaluation
    if r.max_new_tokens is None:
      r.max_new_tokens = saved.evaluation.max_new_tokens
    if evaluation.max_new_tokens is None:
      evaluation.max_new_tokens = r.max_new_tokens
  return config.lock()


def build(config: fields.Config) -> language.Experiment:
  """All that the configuration names; see `complete`.

  Raises:
    ValueError, FileNotFoundError: in one line, what in it is wrong, and what would be right.
  """
  config = complete(config)
  _check(config)
  made = language.build(config)
  method = methods.build(made.model, config)
  c = config.train
  updates = c.num_minibatches * c.num_epochs
  with (whole := config.copy_and_resolve_references()).unlocked():
    whole.train.num_steps = c.num_steps * updates
  schedule, optimizer = fields.optimizer_of(whole)
  return made._replace(
    source=data.Source(2**31 - 1, lambda index: {"index": np.int64(index)}),
    rows=lambda dataset: dataset,
    loss_fn=method.loss_fn,
    schedule=lambda done: schedule(done * updates),
    optimizer=optimizer,
  )


def _check(config: fields.Config) -> None:
  r = config.rollouts
  fields.check(config, ("rollouts",))
  fields.require(r.temperature > 0, f"rollouts.temperature is {r.temperature}; it is above 0")
  fields.require(r.timeout > 0, f"rollouts.timeout is {r.timeout}; it is above 0")
  fields.choose("rollouts.reward", r.reward, REWARDS)
  fields.choose("rollouts.policy", r.policy, {"current": None, "start": None})
  fields.choose("rollouts.reference", r.reference, {"device": None, "host": None})
  filters_of(r)


def filters_of(r: fields.Config) -> list[logits.LogitsTransform]:
  """Those of `config.rollouts` that are on.

  Raises:
    ValueError: a setting is none.
  """
  return [FILTERS[name](r[name]) for name in FILTERS if r.get(name) is not None]


def problems_of(experiment: language.Experiment) -> Callable[[Any], list[tasks.Problem]]:
  """Of a batch's `index`, the problems of the task's training side.

  They are a stream of their own: not those whose answers the start learned from.
  """
  c = experiment.config
  side = tasks.restrict(experiment.task, "train", test_percent=c.task.test_percent)
  own = np.random.SeedSequence(c.seed, spawn_key=(1,)).generate_state(1)[0]
  return lambda batch: [tasks.problem_at(side, int(own), int(i)) for i in batch["index"]]


def sampling(
  experiment: language.Experiment,
  verify_all: workers.VerifyAll,
  merge: adapters.Merge = lambda params: params,
) -> Callable[..., rollouts.Rollouts]:
  """(key, params as trained, problems) -> Rollouts, as `config.rollouts` has them.

  Args:
    experiment: whose model and task.
    verify_all: of all responses.
    merge: the model's parameters of those that are trained.
  """
  r, model = experiment.config.rollouts, experiment.model
  sample = rollouts.sampler(
    model,
    group_size=r.group_size,
    max_new_tokens=r.max_new_tokens,
    stop=experiment.tokenizer.stops,
    filters=filters_of(r),
  )
  unstacked = jax.jit(transformer.unstack)

  def roll_out(key, params, problems):
    return rollouts.roll_out(
      sample,
      unstacked(merge(params)),
      experiment.task,
      problems,
      key,
      verify_all=verify_all,
      temperature=r.temperature,
      group_size=r.group_size,
      batch_size=r.batch_size,
      max_length=experiment.model_config.max_length,
      max_new_tokens=r.max_new_tokens,
    )

  return roll_out


def completion(
  model: models.LanguageModel,
  method: methods.Method,
  reference: models.Params,
  temperature: float,
  merge: adapters.Merge = lambda params: params,
) -> Callable[[models.Params, Any], Any]:
  """Adds to a minibatch what its loss reads of the reference, and of the policy before updates.

  Args:
    model: the model.
    method: says what is read.
    reference: parameters; on the host they are moved for each minibatch and take no device memory.
    temperature: of the rollouts. Pairs and singles are scored at 1.
    merge: the model's parameters of those that are trained.
  """
  as_drawn, compared = learning.scorer(model, temperature=temperature), referred(model, reference)

  def complete(params, minibatch):
    if "mask" not in minibatch:  # rows are in it, by name
      return compared(minibatch) if method.reference else minibatch
    if method.reference:
      minibatch = minibatch | {"reference_log_prob": as_drawn(reference, minibatch)}
    if method.correction is not None:
      before = as_drawn(merge(params), minibatch)
      weights = method.correction(before - minibatch["log_prob"], minibatch["mask"])
      minibatch = minibatch | {"old_log_prob": before, "correction": weights}
    return minibatch

  return complete


def referred(model: models.LanguageModel, reference: models.Params) -> Callable[[Any], Any]:
  """Adds `reference_log_prob`, at temperature 1, to each of the rows in a batch of several."""
  score = learning.scorer(model)

  def with_reference(rows):
    unfiltered = {name: x for name, x in rows.items() if name != "kept"}
    return {**rows, "reference_log_prob": score(reference, unfiltered)}

  def complete(batch):
    return {name: with_reference(x) if isinstance(x, dict) else x for name, x in batch.items()}

  return complete


@contextlib.contextmanager
def stepping(
  experiment: language.Experiment,
  abstract: state_lib.TrainState,
  workdir: pathlib.Path,
  done: int,
  start: Callable[[], models.Params],
) -> Iterator[Callable[..., Any]]:
  """Within it, the (key, state, batch) -> (state, metrics) of a round."""
  config = experiment.config
  r, method = config.rollouts, methods.build(experiment.model, config)
  offline = r.policy == "start"
  frozen = start() if adapters.used(config) else None
  merge = adapters.merging(config, frozen)
  reference = start() if offline or method.reference else None
  if reference is not None and r.reference == "host":
    reference = sharded.to_host(reference)
  problems = problems_of(experiment)
  log = rollouts.no_log()
  if jax.process_index() == 0:
    log = rollouts.jsonl(workdir / "rollouts.jsonl", step=done)
  with (
    contextlib.closing(log),
    workers.workers(
      experiment.task.verify, num_workers=r.num_workers, timeout=r.timeout
    ) as verify_all,
  ):
    verify_all = _agreed(verify_all)
    current = sampling(experiment, verify_all, merge)
    from_start = sampling(experiment, verify_all)
    run = learning.round_step(
      learning.Round(
        (lambda key, params, problems: from_start(key, reference, problems))
        if offline
        else current,
        REWARDS[r.reward],
        method.select,
        completion(experiment.model, method, reference, r.temperature, merge),
        supervised.jitted_step(experiment, abstract, frozen),
        log.write,
      ),
      capacity=capacity(config, method),
      num_minibatches=config.train.num_minibatches,
      num_epochs=config.train.num_epochs,
    )
    yield lambda key, state, batch: run(key, state, problems(batch))


def _agreed(verify_all: workers.VerifyAll) -> workers.VerifyAll:
  """The first process's verdicts, on all: a verifier that takes too long may not part them."""

  def verify(pairs):
    mine = verify_all(pairs) if jax.process_index() == 0 else []
    verdicts = processes.from_first([verdict._asdict() for verdict in mine])
    return [tasks.Verification(**verdict) for verdict in verdicts]

  return verify if jax.process_count() > 1 else verify_all


def capacity(config: fields.Config, method: methods.Method) -> int:
  """Rows of a round, rounded up to minibatches of one size that divide into microbatches."""
  unit = config.train.num_minibatches * config.train.num_microbatches
  return -(-config.train.batch_size * method.rows_per_prompt // unit) * unit
