"""Diffusion models learn from their own images, judged: from a configuration to a round of it.

The model, its path and the loss of its denoiser are those of the run `config.start.workdir`. A step
of training is a round: classes, a group of images of each, what a classifier says of them, and
updates. A second classifier, which no update reads, judges the result as it goes on.
"""

import contextlib
import functools
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from ..configs import image_classifier
from ..evaluation import distances
from ..models import base as models
from ..training import data, diffusion_learning, learning, preference, processes, sharding, step
from ..training import state as state_lib
from . import fields, images, solving, supervised, workdirs

# What evaluation may change: as of any diffusion model, and all that training alone reads.
FREE_TO_EVALUATE = (
  *images.FREE_TO_EVALUATE,
  *("start", "verifier", "judge", "rollouts", "method"),
)
FREE_TO_RESUME = ()

finished, rules = images.finished, images.rules
share, flops = supervised.everything, None


class Drawn(NamedTuple):
  """Of P classes G images each, and what the verifier says: the rollouts of a `learning.Round`."""

  rows: dict[str, np.ndarray]  # x [P G, H, W, C], label [P G]
  log_prob: np.ndarray  # [P, G], of the class asked for
  right: np.ndarray  # [P, G], 1 where no class is likelier
  lengths: np.ndarray  # [P, G], calls of the network
  seconds: dict[str, float]  # "sampling", "verifying"
  seed: np.ndarray  # of whatever else is drawn in the round

  def rewards(self) -> np.ndarray:
    """1 where the verifier finds the class asked for, else 0; [P, G] float32."""
    return self.right

  def faults(self) -> float:
    """A classifier does not fail."""
    return 0.0


REWARDS = {
  "log_prob": lambda rng, made: made.log_prob,
  "verdict": learning.verified,
  "random": learning.random,
}
PAIR_LOSSES = {"dpo": preference.dpo, "ipo": preference.ipo, "hinge": preference.hinge}


class Method(NamedTuple):
  """How a round's images become updates."""

  select: Callable[[Drawn, np.ndarray], step.Batch]
  rows_per_class: int  # that it selects, at most
  loss: Callable[[models.Params], step.LossFn]  # of a reference
  reference: bool  # whether the loss reads it


def _imitation(
  experiment: images.Experiment, weights: Callable[[np.ndarray], np.ndarray], rows: int
) -> Method:
  """Weighted images, and for each class asked for `config.method.real` training images."""
  num_real, examples = experiment.config.method.real, experiment.examples
  fields.require(num_real >= 0, f"method.real is {num_real}; it is at least 0")

  def select(made, rewards):
    weight = weights(rewards).ravel()
    chosen = np.flatnonzero(weight)
    rng = np.random.default_rng(made.seed)
    real = rng.choice(len(examples.train), len(rewards) * num_real)
    own = {name: values[chosen] for name, values in made.rows.items()} | {"weight": weight[chosen]}
    others = {
      "x": examples.train[real],
      "label": examples.train_labels[real],
      "weight": np.ones(len(real), np.float32),
    }
    return jax.tree.map(lambda *parts: np.concatenate(parts), own, others)

  loss = diffusion_learning.weighted(experiment.loss_fn)
  return Method(select, rows + num_real, lambda reference: loss, reference=False)


def _best(experiment: images.Experiment) -> Method:
  c, group_size = experiment.config.method, experiment.config.rollouts.group_size
  rule = f"method.keep is {c.keep}; it is from 1 to rollouts.group_size={group_size}"
  fields.require(1 <= c.keep <= group_size, rule)
  return _imitation(experiment, functools.partial(diffusion_learning.best, keep=c.keep), c.keep)


def _tilted(experiment: images.Experiment) -> Method:
  temperature = experiment.config.method.temperature
  fields.require(temperature > 0, f"method.temperature is {temperature}; it is above 0")
  weights = functools.partial(diffusion_learning.tilted, temperature=temperature)
  return _imitation(experiment, weights, experiment.config.rollouts.group_size)


def _preference(experiment: images.Experiment) -> Method:
  c, d = experiment.config.method, experiment.config.diffusion
  pair_loss = fields.choose("method.loss", c.loss, PAIR_LOSSES)
  fields.require(c.beta > 0, f"method.beta is {c.beta}; it is above 0")
  weighting = fields.choose("method.weighting", c.weighting, images.WEIGHTINGS)(d.sigma_data)
  times = images.TIMES[d.times](experiment.noising)

  def select(made, rewards):
    high, low, weight = diffusion_learning.extremes(rewards)
    first = np.arange(len(rewards)) * rewards.shape[1]
    x, pairs = made.rows["x"], np.flatnonzero(weight)
    sides = {"chosen": {"x": x[(first + high)[pairs]]}, "rejected": {"x": x[(first + low)[pairs]]}}
    return {**sides, "label": made.rows["label"][first[pairs]], "weight": weight[pairs]}

  def loss(reference):
    return diffusion_learning.preferences(
      experiment.model,
      reference,
      experiment.noising,
      weighting,
      times,
      functools.partial(pair_loss, beta=c.beta),
      quantiles=images.QUANTILES[d.quantiles],
    )

  return Method(select, 1, loss, reference=True)


METHODS: Mapping[str, Callable[[images.Experiment], Method]] = {
  "best": _best,
  "tilted": _tilted,
  "preference": _preference,
}


def method_of(experiment: images.Experiment) -> Method:
  """The method that `config.method` names.

  Raises:
    ValueError: in one line, what in it is wrong, and what would be right.
  """
  return fields.choose("method.name", experiment.config.method.name, METHODS)(experiment)


def complete(config: fields.Config) -> fields.Config:
  """The configuration with what it takes over from the run that it starts from.

  Raises:
    ValueError, FileNotFoundError: that run is not named, not there, or of no diffusion model.
  """
  if "diffusion" in config:
    return config
  config, saved = workdirs.started(config)
  fields.require("diffusion" in saved, f"start.workdir={config.start.workdir!r} has no diffusion")
  with config.unlocked():
    for section in ("model", "data", "diffusion"):
      config[section] = saved[section]
    for section, folder in (("verifier", "verifier"), ("judge", "classifier")):
      config[section].workdir = config[section].workdir or f"{config.start.workdir}/{folder}"
  return config.lock()


def build(config: fields.Config) -> images.Experiment:
  """All that the configuration names; see `complete`.

  Raises:
    ValueError, FileNotFoundError: in one line, what in it is wrong, and what would be right.
  """
  config = complete(config)
  fields.check(config, ("train", "evaluation", "rollouts"))
  fields.choose("rollouts.reward", config.rollouts.reward, REWARDS)
  made = images.build(config)
  num_classes = made.examples.num_classes
  fields.require(
    num_classes is not None, f"start.workdir={config.start.workdir!r} is of data without classes"
  )
  method_of(made)
  updates = config.train.num_minibatches * config.train.num_epochs
  with (whole := config.copy_and_resolve_references()).unlocked():
    whole.train.num_steps = config.train.num_steps * updates
  schedule, optimizer = fields.optimizer_of(whole)
  return made._replace(
    source=data.Source(2**31 - 1, lambda index: {"label": np.int32(index % num_classes)}),
    schedule=lambda done: schedule(done * updates),
    optimizer=optimizer,
    score=_scored(made),
  )


def classifier_of(experiment: images.Experiment, section: str) -> Any:
  """The `distances.Features` of the section `verifier` or `judge`, trained where there are none."""
  from . import distances as compared  # they know every kind of experiment, this one too
  from . import train

  config = experiment.config
  c, recipe = config[section], image_classifier.get_config()
  there = pathlib.Path(workdirs.checkpoints(c.workdir)).is_dir()
  if "channels" in c and not processes.from_first(there):
    with recipe.unlocked():
      recipe.seed, recipe.model.channels = c.seed, c.channels
      recipe.data = config.data.copy_and_resolve_references()
    train.train(train.open_run(recipe, c.workdir))
  return compared.features_of(config, experiment.examples, c.workdir)


def judging(features: Any, *, chunk: int = 512) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
  """(x [N, ...], labels [N]) -> (log p(label | x), 1 where no class is likelier), [N] float32."""

  @jax.jit
  def log_probs(params, x):
    return jax.nn.log_softmax(features.classifier.apply(params, x)[1])

  def judge(x, labels):
    padded = np.concatenate([x, np.zeros((-len(x) % chunk, *x.shape[1:]), x.dtype)])
    parts = np.split(padded, len(padded) // chunk)
    found = np.concatenate([log_probs(features.params, part) for part in parts])[: len(x)]
    own = found[np.arange(len(x)), labels]
    return own, (own == found.max(-1)).astype(np.float32)

  return judge


def spread(vectors: np.ndarray, labels: np.ndarray) -> float:
  """The variance of features [N, F] within a class, summed over features, the mean over classes."""
  groups = [vectors[labels == label] for label in np.unique(labels)]
  return float(np.mean([group.var(axis=0, ddof=1).sum() for group in groups if len(group) > 1]))


def _scored(experiment: images.Experiment) -> Callable[[models.Params], dict[str, float]]:
  """(params) -> what both classifiers say of images of `config.evaluation`, and the held-out loss.

  `accuracy`, `log_prob`, `frechet` and `diversity`, the spread within classes over that of real
  images, are the judge's; `verifier_accuracy` and `verifier_log_prob` the verifier's.
  """
  c = experiment.config.evaluation
  by = functools.cache(functools.partial(classifier_of, experiment))
  judge = functools.cache(lambda section: judging(by(section)))
  sample = images.sampler(experiment, guidance_scale=c.guidance)

  def score(params):
    from . import distances as compared

    real = compared.halves(experiment.examples, c.num_images)
    table = solving.table(experiment.noising, c)
    x = images.draw(sample, params, table, jax.random.key(0), real.labels, chunk=c.batch_size)
    own, verifiers = judge("judge")(x, real.labels), judge("verifier")(x, real.labels)
    (drawn, _), (true, _) = map(by("judge"), (x, real.first))
    return {
      "accuracy": float(own[1].mean()),
      "log_prob": float(own[0].mean()),
      "verifier_accuracy": float(verifiers[1].mean()),
      "verifier_log_prob": float(verifiers[0].mean()),
      "frechet": distances.frechet(true, drawn),
      "diversity": spread(drawn, real.labels) / spread(true, real.labels),
      **experiment.score(params),
    }

  return score


def drawing(
  experiment: images.Experiment, verifier: Any
) -> Callable[[jax.Array, models.Params, np.ndarray], Drawn]:
  """(key, params, labels [P]) -> Drawn, as `config.rollouts` has them."""
  c, r = experiment.config.evaluation, experiment.config.rollouts
  table = solving.table(experiment.noising, c, evaluations=r.evaluations)
  sample = images.sampler(experiment, guidance_scale=c.guidance)
  judge = judging(verifier)

  def draw(key, params, labels):
    start = time.perf_counter()
    every = np.repeat(np.asarray(labels), r.group_size)
    x = images.draw(sample, params, table, key, every, chunk=r.batch_size)
    drawn = time.perf_counter()
    found = [part.reshape(-1, r.group_size) for part in judge(x, every)]
    seconds = {"sampling": drawn - start, "verifying": time.perf_counter() - drawn}
    lengths = np.full(found[0].shape, table.num_rows)
    return Drawn(
      {"x": x, "label": every}, *found, lengths, seconds, np.asarray(jax.random.key_data(key))
    )

  return draw


@contextlib.contextmanager
def stepping(
  experiment: images.Experiment,
  abstract: state_lib.TrainState,
  workdir: pathlib.Path,
  done: int,
  start: Callable[[], models.Params],
) -> Iterator[Callable[..., Any]]:
  """Within it, the (key, state, batch) -> (state, metrics) of a round."""
  del workdir, done
  c, method = experiment.config, method_of(experiment)
  reference = start() if method.reference else None

  placed = sharding.shardings(abstract)

  @functools.partial(jax.jit, donate_argnums=1, out_shardings=(placed, None))
  def update(key, state, batch, reference):
    return step.train_step(
      key,
      state,
      batch,
      loss_fn=method.loss(reference),
      optimizer=experiment.optimizer,
      averaging=experiment.averaging,
      num_microbatches=c.train.num_microbatches,
    )

  unit = c.train.num_minibatches * c.train.num_microbatches
  run = learning.round_step(
    learning.Round(
      drawing(experiment, classifier_of(experiment, "verifier")),
      REWARDS[c.rollouts.reward],
      method.select,
      lambda params, minibatch: minibatch,
      lambda key, state, batch: update(key, state, batch, reference),
      lambda count, made, rewards: None,
    ),
    capacity=-(-c.train.batch_size * method.rows_per_class // unit) * unit,
    num_minibatches=c.train.num_minibatches,
    num_epochs=c.train.num_epochs,
  )
  yield lambda key, state, batch: run(key, state, batch["label"])
