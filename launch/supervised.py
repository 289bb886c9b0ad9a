"""The step of experiments that learn from given examples."""

import contextlib
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

from ..training import step


@contextlib.contextmanager
def stepping(
  experiment: Any, workdir: pathlib.Path, done: int, start: Callable[[], Any]
) -> Iterator[Callable[..., Any]]:
  """Within it, the jitted (key, state, batch) -> (state, metrics) of the experiment's loss."""
  del workdir, done, start
  yield jitted_step(experiment)


def jitted_step(experiment: Any) -> Callable[..., Any]:
  """`step.train_step` of the experiment, jitted; the state is donated."""
  return jax.jit(
    functools.partial(
      step.train_step,
      loss_fn=experiment.loss_fn,
      optimizer=experiment.optimizer,
      averaging=experiment.averaging,
      num_microbatches=experiment.config.train.num_microbatches,
    ),
    donate_argnums=1,
  )
