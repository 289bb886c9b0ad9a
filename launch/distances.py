"""Distances between the images (or points) of a diffusion model and real ones, and their floor.

  python -m ancestral.launch.evaluate --workdir=runs/digits --evaluations=10

Images are compared by the features of a small classifier of the same data. It is trained when there
is none yet, in --classifier (by default WORKDIR/classifier), as configs/image_classifier.py says,
and named by a hash of its weights: distances by one classifier compare with one another alone. The
floor is the same distance between two halves of the real images; all sets have as many. Features
are in units of their root mean square over the training images.
"""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
from absl import flags as absl_flags

from ..configs import image_classifier
from ..evaluation import distances
from ..models import precondition, schedules
from ..training import bounds, processes
from . import classifiers, fields, images, pixels, solving, train
from . import experiment as experiment_lib

CLASSIFIER = absl_flags.DEFINE_string(
  "classifier", None, "Workdir of the classifier whose features are compared."
)
FLAGS = (CLASSIFIER, *solving.FLAGS)


class Features(NamedTuple):
  """What images are compared by."""

  classifier: classifiers.classifier_lib.Classifier | None  # None compares coordinates themselves
  params: Any
  name: str  # a hash of the weights
  scale: float = 1.0  # root mean square of the features of training examples

  def __call__(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Features [N, F] of x [N, ...], and the classes found [N]."""
    if self.classifier is None:
      return x.reshape(len(x), -1), None
    vectors, found = classifiers.features(self.classifier, self.params, x)
    return vectors / self.scale, found


def features_of(config: fields.Config, examples: pixels.Examples, workdir: str) -> Features:
  """The classifier in `workdir`, trained there on the data of `config` if there is none."""
  if examples.num_classes is None:
    return Features(None, None, "coordinates")
  if not processes.from_first((pathlib.Path(workdir) / "checkpoints").is_dir()):
    made = image_classifier.get_config()
    with made.unlocked():
      made.data = config.data.copy_and_resolve_references()
    train.train(train.open_run(made, workdir))
  experiment, params, _ = experiment_lib.restore_params(None, workdir)
  raw = Features(experiment.classifier, params, classifiers.name(params))
  vectors, _ = raw(examples.train)
  return raw._replace(scale=float(np.sqrt(np.mean(np.square(vectors)))))


def measured(real: np.ndarray, other: np.ndarray) -> dict[str, float]:
  """Every distance between features [N, F] of real images and of others."""
  precision, recall = distances.precision_recall(real, other)
  return {
    "frechet": float(distances.frechet(real, other)),
    "kernel": float(distances.kernel_distance(real, other)),
    "mmd": float(distances.mmd(real, other)),
    "sliced_wasserstein": float(distances.sliced_wasserstein(jax.random.key(0), real, other)),
    "precision": float(precision),
    "recall": float(recall),
  }


class Halves(NamedTuple):
  """Two disjoint sets of real examples with as many of each class."""

  first: np.ndarray  # [n, ...]
  second: np.ndarray  # [n, ...]
  labels: np.ndarray  # [n], of both


def halves(examples: pixels.Examples, most: int) -> Halves:
  """Halves of the training examples, drawn once and for all, of at most `most` each.

  Samples are asked for with the labels of a half, so the floor may not owe anything to classes that
  are more frequent in one half than in the other.
  """
  rng = np.random.default_rng(0)
  pairs = []
  for label in np.unique(examples.train_labels):
    members = rng.permutation(np.flatnonzero(examples.train_labels == label))
    pairs.append(members[: len(members) // 2 * 2].reshape(-1, 2))
  first, second = rng.permutation(np.concatenate(pairs))[:most].T
  return Halves(examples.train[first], examples.train[second], examples.train_labels[first])


def table(found: Mapping[str, Mapping[str, float]], title: str) -> rich.table.Table:
  """Distances of several sets, a column each."""
  made = rich.table.Table("", *found, title=title)
  first, *_ = found.values()
  for name in first:
    cells = (f"{values[name]:.4g}" if name in values else "" for values in found.values())
    made.add_row(name, *cells)
  return made


def bits_per_dim(experiment: images.Experiment, params: Any) -> float:
  """An upper bound of the mean -log2 p(x) / d of held-out images given their classes.

  Of the model on the linear variance-preserving path, to which every model converts.
  """
  examples, c = experiment.examples, experiment.config.evaluation
  path = schedules.linear()

  @jax.jit
  def bound(key, x, labels):
    own = images.denoiser(experiment.model, params, labels, examples.num_classes, 1.0)
    denoise = precondition.converted(own, experiment.noising, path)
    values = jnp.linspace(-1, 1, examples.levels)
    return bounds.bits_per_dim(
      key, denoise, path, x, values, least=1 / (8 * examples.levels), noisiest=c.noisiest
    )

  num = min(c.num_batches * c.batch_size, len(examples.test))
  x, labels = jnp.asarray(examples.test[:num]), jnp.asarray(examples.test_labels[:num])
  return float(jnp.mean(bound(jax.random.key(0), x, labels)))


def evaluate(
  experiment: images.Experiment, params: Any, workdir: str, console: rich.console.Console
) -> dict[str, Any]:
  """Distances of samples to real examples: printed, and as JSON.

  Args:
    experiment: whose examples.
    params: finished.
    workdir: of the run; the classifier is below it unless --classifier says otherwise.
    console: where the table goes.
  """
  chosen = solving.chosen(experiment.config)
  made = solving.table(experiment.noising, chosen)
  folder = CLASSIFIER.value or f"{workdir}/classifier"
  features = features_of(experiment.config, experiment.examples, folder)
  real = halves(experiment.examples, chosen.num_images)
  x = images.draw(
    images.sampler(experiment, guidance_scale=chosen.guidance),
    params,
    made,
    jax.random.key(experiment.config.seed),
    real.labels,
    chunk=chosen.batch_size,
  )
  (vectors, _), (others, _), (drawn, found) = map(features, (real.first, real.second, x))
  result, floor = measured(vectors, drawn), measured(vectors, others)
  if found is not None:
    result["class_found"] = float(np.mean(found == real.labels))
    _, found = features(real.first)
    floor["class_found"] = float(np.mean(found == real.labels))
  if experiment.examples.levels is not None:
    result["bits_per_dim"] = bits_per_dim(experiment, params)
  title = f"{len(x)} samples of {made.num_rows} evaluations; features of {features.name}"
  console.print(table({"samples": result, "floor": floor}, title))
  return {
    "classifier": features.name,
    "num_images": len(x),
    "solver": chosen.solver,
    "evaluations": made.num_rows,
    "distances": result,
    "floor": floor,
  }
