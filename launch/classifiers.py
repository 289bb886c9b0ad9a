"""Classifiers of images: from a configuration to the objects that it names.

Their features compare sets of images, see `distances`. A classifier is named by a hash of its
weights, which its configuration reproduces on the same kind of machine.
"""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..models import base as models
from ..models import classifier as classifier_lib
from ..models import partition
from ..sampling import sharded
from ..training import classification, data, step
from ..training import state as state_lib
from . import fields, pixels, supervised

FREE_TO_EVALUATE = ("seed", "data", "optimizer", "train", "evaluation")
FREE_TO_RESUME = ()


class Experiment(NamedTuple):
  """What a configuration stands for."""

  config: fields.Config
  classifier: classifier_lib.Classifier
  source: data.Source  # examples to train on
  held_out: data.Source
  rows: data.Rows
  loss_fn: step.LossFn
  schedule: optax.Schedule
  optimizer: optax.GradientTransformation
  averaging: state_lib.Averaging
  init_params: Callable[[jax.Array], models.Params]  # of a key
  score: Callable[[models.Params], dict[str, float]]


def build(config: fields.Config) -> Experiment:
  """All that the configuration names.

  Raises:
    ValueError, FileNotFoundError: in one line, what in it is wrong, and what would be right.
  """
  fields.check(config, ("model", "train", "evaluation"))
  examples = pixels.examples(config)
  fields.require(examples.num_classes is not None, "data.source has no classes; give images")
  shape = examples.train.shape[1:]
  classifier = classifier_lib.classifier(
    classifier_lib.ClassifierConfig(
      image_shape=shape, num_classes=examples.num_classes, **config.model
    )
  )
  loss_fn = classification.classification(classifier)
  schedule, optimizer = fields.optimizer_of(config)
  return Experiment(
    config,
    classifier,
    pixels.source(examples.train, examples.train_labels),
    pixels.source(examples.test, examples.test_labels),
    lambda dataset: dataset,
    loss_fn,
    schedule,
    optimizer,
    fields.averaging_of(config),
    lambda key: classifier.init(key, jnp.zeros((1, *shape))),
    lambda params: {"accuracy": accuracy(classifier, params, examples)},
  )


def features(
  classifier: classifier_lib.Classifier, params: models.Params, x: np.ndarray, *, chunk: int = 512
) -> tuple[np.ndarray, np.ndarray]:
  """(features [N, F], classes found [N]) of images x [N, H, W, C], `chunk` at a time."""
  apply = jax.jit(classifier.apply)
  padded = np.concatenate([x, np.zeros((-len(x) % chunk, *x.shape[1:]), x.dtype)])
  found = [sharded.to_host(apply(params, part)) for part in np.split(padded, len(padded) // chunk)]
  vectors, logits = (np.concatenate(parts)[: len(x)] for parts in zip(*found, strict=True))
  return vectors, np.argmax(logits, axis=-1)


def accuracy(classifier, params: models.Params, examples: pixels.Examples) -> float:
  """The share of held-out images whose class is found."""
  _, found = features(classifier, params, examples.test)
  return float(np.mean(found == examples.test_labels))


def name(params: models.Params) -> str:
  """Eight digits of the SHA-256 of all weights, in the order of their paths."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree.leaves_with_path(params):
    digest.update(jax.tree_util.keystr(path).encode())
    digest.update(np.asarray(leaf).tobytes())
  return digest.hexdigest()[:8]


stepping, share, flops = supervised.stepping, supervised.share, supervised.flops


def rules(experiment: Experiment) -> tuple[partition.Rule, ...]:
  """How its parameters are split over devices."""
  del experiment
  return partition.rules()


def finished(params: models.Params) -> models.Params:
  """Trained parameters are laid out for use as they are."""
  return params
