"""Experiments of every kind: what training reads of them, and their trained parameters."""

import contextlib
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ..models import partition, pretrained, transformer
from ..training import averaging, checkpoint, data, sharding, step
from ..training import state as state_lib
from . import (
  adapters,
  classifiers,
  fields,
  image_learning,
  images,
  language,
  learning,
  masked,
  preferences,
  workdirs,
)


class Experiment(Protocol):
  """What training reads of an experiment, whatever its kind.

  Attributes:
    config: that it stands for.
    source: examples to train on.
    held_out: examples that training does not see.
    rows: how examples become rows of a batch.
    loss_fn: of a batch.
    schedule: of the learning rate.
    optimizer: that follows it.
    averaging: of the parameters.
    init_params: (key) -> params, untrained: their shapes, wherever training begins.
    score: (params, as the kind's `finished` leaves them) -> what is measured now and then while
      training, by name; by `workdirs.quality` the best checkpoint is found. Samples to look at are
      beside the numbers: texts in Markdown, images as uint8 [H, W, C].
  """

  config: fields.Config
  source: data.Source
  held_out: data.Source
  rows: data.Rows
  loss_fn: step.LossFn
  schedule: optax.Schedule
  optimizer: optax.GradientTransformation
  averaging: state_lib.Averaging
  init_params: Callable[[jax.Array], state_lib.Params]
  score: Callable[[state_lib.Params], dict[str, Any]]


class Kind(Protocol):
  """A kind of experiment: what its module has."""

  FREE_TO_EVALUATE: Sequence[str]  # fields that evaluation may change, or their parents
  FREE_TO_RESUME: Sequence[str]  # of its own, those that a resumed run may change

  def build(self, config: fields.Config) -> Experiment:
    """All that the configuration names; ValueError, FileNotFoundError where it is wrong."""

  def stepping(
    self,
    experiment: Experiment,
    abstract: state_lib.TrainState,
    workdir: pathlib.Path,
    done: int,
    start: Callable[[], state_lib.Params],
  ) -> contextlib.AbstractContextManager[Callable[..., Any]]:
    """A context that yields (key, state, batch) -> (state, metrics).

    Args:
      experiment: of this kind.
      abstract: shapes of its state that say where its arrays are.
      workdir: of the run, for what it writes beside metrics.
      done: the step that it goes on from.
      start: reads the parameters that `config.start` names.
    """

  # (experiment, abstract state, shares, batch) -> FLOPs of a step, of which the batch is one of the
  # shares; None where a step is not one program. What is made again backward does not count.
  flops: Callable[[Experiment, state_lib.TrainState, int, Any], int] | None

  def share(self, config: fields.Config, mesh: Mesh) -> tuple[int, int]:
    """(index, count): the part of a batch that this process reads; ValueError if it has none."""

  def rules(self, experiment: Experiment) -> Sequence[partition.Rule]:
    """How its parameters are split over devices."""

  def with_model(self, experiment: Experiment, c: transformer.TransformerConfig) -> Experiment:
    """The experiment with another network, of kinds whose experiments have a `model_config`."""

  def finished(self, params: state_lib.Params) -> state_lib.Params:
    """Trained parameters, laid out for use."""


KINDS: Mapping[str, Kind] = {
  "language": language,
  "images": images,
  "classifier": classifiers,
  "learning": learning,
  "image_learning": image_learning,
  "masked": masked,
  "preferences": preferences,
}


# Fields that say how something is computed, or where something is, and not what. That adapters are
# of the same start is found by its digest.
HOW = (
  "mesh",
  "model.attention",
  "model.remat",
  "start.pretrained",
  "tokenizer.path",
  "lora.start_digest",
)


def kind_of(config: fields.Config, kinds: Mapping[str, Any] = KINDS) -> Any:
  """What `kinds` has for experiments such as the configuration's, whose field is `kind`.

  Raises:
    ValueError: nothing; says what kinds there are.
  """
  return fields.choose("kind", config.get("kind", "language"), kinds)


def build(config: fields.Config) -> Experiment:
  """All that the configuration names.

  Raises:
    ValueError, FileNotFoundError: in one line, what in it is wrong, and what would be right.
  """
  return kind_of(config).build(config)


def init_state(experiment: Experiment, key: jax.Array) -> state_lib.TrainState:
  """An untrained state."""
  return state_lib.init(key, experiment.init_params, experiment.optimizer, experiment.averaging)


def abstract_state(experiment: Experiment, mesh: Mesh) -> state_lib.TrainState:
  """The shapes of the experiment's state, that say where on the mesh its arrays are."""
  return sharding.of_state(
    jax.eval_shape(functools.partial(init_state, experiment), jax.random.key(0)),
    mesh,
    kind_of(experiment.config).rules(experiment),
    over_data=bool(experiment.config.get("mesh") and experiment.config.mesh.optimizer_over_data),
  )


def first_state(
  experiment: Experiment, key: jax.Array, abstract: state_lib.TrainState
) -> state_lib.TrainState:
  """The state that training begins with: from the run that `config.start` names, or untrained.

  Args:
    experiment: whose state.
    key: of untrained parameters.
    abstract: see `abstract_state`; each device makes its own part of the arrays.

  Raises:
    FileNotFoundError, ValueError: there is no such run, or it is of another model.
  """
  c, placed = experiment.config, sharding.shardings(abstract)
  if not c.get("start") or adapters.used(c):
    return jax.jit(functools.partial(init_state, experiment), out_shardings=placed)(key)
  params = start_params(c, sharding.mesh_of(abstract))
  if jax.tree.map(jnp.shape, params) != jax.tree.map(jnp.shape, abstract.params):
    raise ValueError(f"config.start={_name(c.start)!r} is of a model of other shapes.")
  begin = lambda params: init_state(experiment._replace(init_params=lambda key: params), key)
  return jax.jit(begin, out_shardings=placed, donate_argnums=0)(params)


def start_params(config: fields.Config, mesh: Mesh | None = None) -> state_lib.Params:
  """The parameters that `config.start` names, laid out for training, on the mesh.

  Raises:
    FileNotFoundError, ValueError: there is no such run or pretrained directory, or it is corrupt.
  """
  c = config.start
  mesh = partition.make_mesh() if mesh is None else mesh
  if c.get("pretrained"):
    return _pretrained(c.pretrained, mesh)
  experiment, trained, _ = restore_trained(None, c.workdir, mesh=mesh, step=c.step, best=c.best)
  return _merged(experiment.config, mesh, trained)


def _name(start: fields.Config) -> str:
  return start.get("pretrained") or start.workdir


def _pretrained(folder, mesh):
  head_dim = pretrained.read_config(folder).resolved().head_dim
  place = partition.placing(mesh, partition.rules(head_dim))
  return pretrained.read(folder, place=place, dtype="float32", stacked=True)[1]


def _merged(config, mesh, trained):
  frozen = start_params(config, mesh) if adapters.used(config) else None
  return adapters.merging(adapters.identified(config, frozen), frozen)(trained)


def restore_params(
  config: fields.Config | None, workdir: str, *, mesh: Mesh | None = None, **wanted: Any
) -> tuple[Experiment, state_lib.Params, int]:
  """As `restore_trained`, but the whole model's parameters, laid out for use."""
  mesh = partition.make_mesh() if mesh is None else mesh
  experiment, trained, step = restore_trained(config, workdir, mesh=mesh, **wanted)
  params = _merged(experiment.config, mesh, trained)
  return experiment, kind_of(experiment.config).finished(params), step


def restore_trained(
  config: fields.Config | None,
  workdir: str,
  *,
  last: bool = False,
  step: int | None = None,
  best: bool = False,
  average_std: float | None = None,
  mesh: Mesh | None = None,
) -> tuple[Experiment, Any, int]:
  """The experiment, what it trained (parameters or adapters), and the step that is from.

  Args:
    config: the experiment; None is the one that was saved.
    workdir: of the run.
    last: the parameters themselves, even where their running average is kept.
    step: the checkpoint; None is the latest.
    best: the checkpoint of the best evaluation instead.
    average_std: the average of this relative length, of all checkpoints up to `step`; see
      `averaging.posthoc_weights`.
    mesh: where the parameters go, by the rules of their kind; None is all devices, along "data".

  Raises:
    FileNotFoundError: the workdir has no such checkpoint.
    ValueError: the checkpoint is corrupt, or of another experiment; step and best, or last and
      average_std, together; an average of a run that kept none of this kind.
  """
  if best and step is not None:
    raise ValueError(f"--best and --step={step} may be two checkpoints: give one of them.")
  if last and average_std is not None:
    raise ValueError(f"--last and --average_std={average_std}: give one of them.")
  if best:
    with checkpoint.open_manager(workdirs.checkpoints(workdir), create=False) as manager:
      step = checkpoint.best_step(manager, workdirs.quality)
  saved = workdirs.saved_config(workdir, step)
  kind = kind_of(saved)
  experiment = kind.build(saved if config is None else workdirs.resumed(config, workdir))
  free = [*kind.FREE_TO_EVALUATE, *HOW]
  if adapters.used(saved):
    experiment = experiment._replace(config=_of_adapters(experiment.config, saved))
    free = ["start.workdir" if name == "start" else name for name in free]
  checkpoint.check_config(
    adapters.compared(fields.to_json(saved)),
    adapters.compared(fields.to_json(experiment.config)),
    ignore=free,
  )
  shapes = jax.eval_shape(experiment.init_params, jax.random.key(0))
  mesh = partition.make_mesh() if mesh is None else mesh
  abstract = sharding.located(shapes, partition.shardings(shapes, mesh, kind.rules(experiment)))
  with checkpoint.open_manager(workdirs.checkpoints(workdir), create=False) as manager:
    if average_std is not None:
      params, step = _posthoc(manager, abstract, saved, average_std, step)
    else:
      name = "params" if last else _averages(saved)[0][0]
      restored = checkpoint.restore_part(manager, abstract, name, step)
      params, step = restored.state, restored.step
  return experiment, params, step


def _of_adapters(config, saved):
  """The configuration, with the digest of what the saved run's adapters change."""
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.lora.start_digest = saved.lora.start_digest
  return config.lock()


def _averages(config: fields.Config) -> list[tuple[str, float | None]]:
  """Where a checkpoint has its averages, the one to be used first, and their relative lengths."""
  if config.train.get("average_stds"):
    return [(f"average/{i}", std) for i, std in enumerate(config.train.average_stds)]
  return [("average" if config.train.get("average_decay") else "params", None)]


def _posthoc(manager, abstract, config, average_std, step):
  """Params of an average that was not kept, from the averages that were, and its step."""
  names = [(name, std) for name, std in _averages(config) if std is not None]
  if not names:
    raise ValueError("--average_std is for runs with train.average_stds; this one has none.")
  step = max(manager.all_steps(), default=0) if step is None else step
  snapshots = [(name, std, at) for at in sorted(manager.all_steps()) for name, std in names]
  _, stds, steps = zip(*snapshots, strict=True)
  weights = averaging.posthoc_weights(stds, steps, average_std, step)
  read = lambda name, at: checkpoint.restore_part(manager, abstract, name, at).state
  parts = zip(weights, snapshots, strict=True)
  return averaging.combined((w, read(name, at)) for w, (name, _, at) in parts), step
