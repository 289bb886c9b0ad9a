"""Images of a diffusion model:
  python -m ancestral.launch.sample --workdir=runs/digits --num_images=100 --evaluations=10
  python -m ancestral.launch.sample --workdir=runs/digits --labels=3,5 --trajectory --guidance=2

A grid of images goes to --output, WORKDIR/samples.png by default; named .npz, the images themselves
do, [N, H, W, C] from 0 to 255, with their labels. --trajectory draws, beside each image, what the
network took it for on the way there. Image i depends on --seed, i and its label alone.
"""  # fmt: skip

import contextlib
import functools
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress
from absl import flags as absl_flags

from ..sampling import base, solvers, tables
from ..tasks import images as image_tasks
from . import draws, flags, images, solving
from . import experiment as experiment_lib

_NUM_IMAGES = absl_flags.DEFINE_integer("num_images", 64, "Images to draw.", lower_bound=1)
_LABELS = absl_flags.DEFINE_list(
  "labels", None, "Classes, by number or name, in turn: --labels=3,5. All of them if unset."
)
_TRAJECTORY = absl_flags.DEFINE_bool("trajectory", False, "Draw the way of each image too.")
FLAGS = (_NUM_IMAGES, _LABELS, _TRAJECTORY, draws.SEED, draws.OUTPUT, *solving.FLAGS)


def trajectories(
  experiment: images.Experiment,
  params: Any,
  table: tables.SolverTable,
  key: jax.Array,
  labels: np.ndarray,
  *,
  guidance_scale: float = 1.0,
  num_shown: int = 10,
) -> np.ndarray:
  """What the network took each sample for on the way, and the sample, [N, shown, H, W, C]."""
  shape = experiment.examples.train.shape[1:]

  @jax.jit
  def run(params, table, keys, labels):
    num_classes = experiment.examples.num_classes
    denoise = images.denoiser(experiment.model, params, labels, num_classes, guidance_scale)
    algorithm = solvers.tabulated(denoise, table)
    state = base.start(keys, algorithm, jnp.zeros((labels.shape[0], *shape)))
    observe = lambda state, info: info.denoised
    state, seen = base.run(keys, algorithm, state, table.num_rows, observe)
    return state.slots[:, 0], seen

  keys = base.row_keys(key, jnp.arange(len(labels)))
  samples, seen = run(params, table, keys, jnp.asarray(labels))
  shown = np.unique(np.linspace(0, len(seen) - 1, num_shown - 1).round().astype(int))
  return np.concatenate([np.swapaxes(seen[shown], 0, 1), np.asarray(samples)[:, None]], axis=1)


def labels_of(num: int, num_classes: int | None, wanted: Sequence[str] | None, names) -> np.ndarray:
  """Classes of `num` images, [num], those wanted in turn.

  Raises:
    ValueError: a class that there is not, or classes of data that has none.
  """
  if num_classes is None:
    if wanted is not None:
      raise ValueError("--labels: the data of this run have no classes.")
    return np.zeros(num, np.int32)
  known = {str(i): i for i in range(num_classes)} | {name: i for i, name in enumerate(names)}
  for text in wanted or ():
    if text not in known:
      raise ValueError(f"--labels: no class {text!r}; there are {', '.join(known)}.")
  cycle = [known[text] for text in wanted] if wanted else list(range(num_classes))
  return np.resize(np.asarray(cycle, np.int32), num)


def save(path: pathlib.Path, x: np.ndarray, labels: np.ndarray, columns: int | None = None) -> None:
  """Writes a .npz of images and labels, or a picture of any other name."""
  if path.suffix == ".npz":
    np.savez_compressed(path, images=image_tasks.to_bytes(x), labels=labels)
  else:
    image_tasks.grid(x, columns).save(path)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Any]:
  """A bar of images, where somebody looks at the standard error."""
  console = rich.console.Console(stderr=True)
  columns = (*rich.progress.Progress.get_default_columns(), rich.progress.MofNCompleteColumn())
  with rich.progress.Progress(*columns, console=console, disable=not console.is_terminal) as bar:
    task = bar.add_task("images", total=total)
    yield lambda done: bar.update(task, completed=done)


def _prepare(wanted: dict[str, Any]):
  """The experiment, its params, what the flags chose, the table, labels, and where to."""
  output = draws.output()
  if output and output.exists():
    raise ValueError(f"--output={output} exists: give another name.")
  if output and output.suffix not in (".png", ".npz"):
    raise ValueError(f"--output={output}: images go to a .png, or as arrays to a .npz.")
  experiment, params, _ = experiment_lib.restore_params(**wanted)
  if experiment.examples.levels is None:
    raise ValueError("This run is of points, not of images; see launch.evaluate.")
  chosen = solving.chosen(experiment.config)
  table = solving.table(experiment.noising, chosen)
  names = experiment.examples.class_names
  labels = labels_of(_NUM_IMAGES.value, experiment.examples.num_classes, _LABELS.value, names)
  return experiment, params, chosen, table, labels, output


def run(wanted: dict[str, Any]) -> None:
  """Draws images as the flags say, and writes them."""
  with flags.one_line_errors():
    experiment, params, chosen, table, labels, output = _prepare(wanted)
  path = output or pathlib.Path(wanted["workdir"]) / "samples.png"
  key = jax.random.key(draws.SEED.value)
  columns = None
  if _TRAJECTORY.value:
    way = trajectories(experiment, params, table, key, labels, guidance_scale=chosen.guidance)
    columns, x = way.shape[1], way.reshape(-1, *way.shape[2:])
    labels = np.repeat(labels, columns)
  else:
    sample = images.sampler(experiment, guidance_scale=chosen.guidance)
    make = functools.partial(images.draw, sample, params, table, key, labels)
    with _progress(len(labels)) as on_chunk:
      x = make(chunk=chosen.batch_size, on_chunk=on_chunk)
  save(path, x, labels, columns)
  print(f"{_NUM_IMAGES.value} images, {table.num_rows} evaluations each: {path}", file=sys.stderr)
