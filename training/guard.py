"""What stops a run that has gone wrong: judges of every step, and the batch kept for a look."""

import collections
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from . import metrics as metrics_lib

# {name: value} of a step -> what is wrong with it, or None. Called once for each step, in order.
Judge = Callable[[Mapping[str, float]], str | None]

WATCHED = ("loss", "gradient_norm")
"""What is looked at after every step; the rest only when it is written or something is saved."""


class Bad(Protocol):
  """A step that was judged bad; see `loop.Diverged`."""

  step: int
  batch: Any
  metrics: Mapping[str, float]


def finite(scalars: Mapping[str, float]) -> str | None:
  """Every value has to be finite: a finite loss can have an infinite gradient."""
  for name, value in scalars.items():
    if not math.isfinite(value):
      return f"{name} is {value}"
  return None


def spikes(factor: float, *, window: int = 128) -> Judge:
  """The loss may not lie far above those of the last `window` steps.

  Bad is a step whose modified z-score is above the factor,

    0.6745 (loss - median) / MAD > factor,    MAD = median_i |loss_i - median|,

  over the losses of the `window` steps before it. For normal losses MAD / 0.6745 is the standard
  deviation, and unlike that it is not moved by the outliers it is to find. Nothing is judged before
  there are so many steps, in a resumed run counted anew, nor where MAD is 0.

  Args:
    factor: the source calls 3.5 an outlier; a run of a million steps should bear rarer ones.
    window: steps.

  Raises:
    ValueError: the factor is not positive, or the window has less than 2 steps.

  Reference: Iglewicz and Hoaglin 1993, How to Detect and Handle Outliers, section 3.
  """
  if not factor > 0 or window < 2:
    raise ValueError(f"{factor=} and {window=}: the factor is positive, the window 2 or more.")
  losses: collections.deque[float] = collections.deque(maxlen=window)

  def judge(scalars):
    if "loss" not in scalars:  # a round that found nothing to learn from
      return None
    loss, held = scalars["loss"], np.asarray(losses)
    losses.append(loss)
    if len(held) < window:
      return None
    median = float(np.median(held))
    deviation = float(np.median(np.abs(held - median))) / 0.6745
    if not loss - median > factor * deviation > 0:
      return None
    score = (loss - median) / deviation
    return f"loss is {loss:.6g}, {score:.3g} deviations above {median:.6g}, its recent median,"

  return judge


def first_of(*judges: Judge) -> Judge:
  """What the first judge finds that finds something; the judges after it do not see the step."""
  return lambda scalars: next((why for judge in judges if (why := judge(scalars))), None)


def save(directory: str | os.PathLike, bad: Bad) -> pathlib.Path:
  """Writes a bad step to DIRECTORY/step_N, for `numpy.load`; returns that folder.

  batch_P.npz has the leaves of process P's share of the batch by their paths, as "chosen/tokens".
  Of an array that other processes hold a part of, every shard here is an entry of its own whose
  name says which slice it is, as "tokens[0:4,0:128]". metrics.json has the step's metrics; see
  `metrics.jsonl` on those that are not finite. What an earlier run left there is replaced.
  """
  folder = pathlib.Path(directory) / f"step_{bad.step}"
  folder.mkdir(parents=True, exist_ok=True)
  arrays = {}
  for path, leaf in jax.tree.leaves_with_path(bad.batch):
    arrays |= _arrays(jax.tree_util.keystr(path, simple=True, separator="/") or "batch", leaf)
  np.savez(folder / f"batch_{jax.process_index()}.npz", **arrays)
  if jax.process_index() == 0:
    (folder / "metrics.json").unlink(missing_ok=True)
    writer = metrics_lib.jsonl(folder / "metrics.json")
    writer.write(bad.step, bad.metrics)
    writer.close()
  return folder


def _arrays(name: str, leaf: Any) -> dict[str, np.ndarray]:
  """A leaf as arrays that npz files hold, those of this process."""
  if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
    shards = {_slice(shard.index, leaf.shape): shard.data for shard in leaf.addressable_shards}
    return {f"{name}[{where}]": _plain(data) for where, data in shards.items()}
  return {name: _plain(leaf)}


def _slice(index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
  bounds = (part.indices(size) for part, size in zip(index, shape, strict=True))
  return ",".join(f"{start}:{stop}" for start, stop, _ in bounds)


def _plain(leaf: Any) -> np.ndarray:
  array = np.asarray(leaf)
  return array.astype(np.float32) if array.dtype.kind == "V" else array  # numpy lacks bfloat16
