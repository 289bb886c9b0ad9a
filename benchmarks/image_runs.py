"""Trained image models to compare samplers on: their samples, and distances to real images."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging

from ancestral.evaluation import distances
from ancestral.launch import distances as launch_distances
from ancestral.launch import experiment as experiment_lib
from ancestral.launch import flags as launch_flags
from ancestral.launch import images, solving
from ancestral.sampling import solvers, tables

_RUN = flags.DEFINE_string("run", None, "Workdir of `launch.train --seeds`.")
_NUM_IMAGES = flags.DEFINE_integer("num_images", 5000, "Samples, at most half of the real images.")


class Run(NamedTuple):
  """A trained model, real images, and what they are compared by."""

  experiment: images.Experiment
  params: Any
  real: launch_distances.Halves
  features: launch_distances.Features


def load() -> list[Run]:
  """The run of each of --seeds (0,1,2) in --run; a classifier is trained where there is none."""
  logging.set_verbosity(logging.WARNING)
  runs, classifier = [], launch_distances.CLASSIFIER.value or f"{_RUN.value}/classifier"
  for seed in launch_flags.SEEDS.value or ("0", "1", "2"):
    workdir = f"{_RUN.value}/seed={seed}"
    experiment, params, _ = experiment_lib.restore_params(None, workdir)
    examples = experiment.examples
    features = launch_distances.features_of(experiment.config, examples, classifier)
    real = launch_distances.halves(examples, _NUM_IMAGES.value)
    runs.append(Run(experiment, params, real, features))
  return runs


def floor(run: Run) -> float:
  """The Frechet distance between the halves of the real images."""
  return distances.frechet(run.features(run.real.first)[0], run.features(run.real.second)[0])


def frechet(run: Run, samples: np.ndarray) -> float:
  """The Frechet distance of samples to the first half of the real images."""
  return distances.frechet(run.features(run.real.first)[0], run.features(samples)[0])


def table(run: Run, solver: str, evaluations: int, **instead: Any) -> tables.SolverTable:
  """The solver's table for so many evaluations, as `launch.sample` would make it."""
  return solving.table(
    run.experiment.noising,
    run.experiment.config.evaluation,
    solver=solver,
    evaluations=evaluations,
    **instead,
  )


def sampler(run: Run, max_rows: int) -> Callable[..., np.ndarray]:
  """(table, model=None) -> samples with the labels of the real images, one program a table's width.

  Args:
    run: whose model.
    max_rows: to which tables are padded, so that their length is no part of the program.
  """
  experiment, labels = run.experiment, run.real.labels
  shape = experiment.examples.train.shape[1:]

  @functools.partial(jax.jit, static_argnames=("make_model",))
  def sample(params, table, num_rows, keys, labels, setting, make_model):
    model = make_model(setting)
    denoise = images.denoiser(model, params, labels, experiment.examples.num_classes, 1.0)
    x = jnp.zeros((labels.shape[0], *shape))
    return solvers.sample(keys, denoise, table, x, num_rows=num_rows)

  own = lambda setting: experiment.model

  def draw(made: tables.SolverTable, setting=None, make_model=own) -> np.ndarray:
    call = lambda params, table, keys, labels: sample(
      params, table, made.num_rows, keys, labels, setting, make_model
    )
    padded = tables.padded(made, max(max_rows, made.num_rows))
    key = jax.random.key(experiment.config.seed)
    return images.draw(
      call, run.params, padded, key, labels, chunk=experiment.config.evaluation.batch_size
    )

  return draw
