"""The loss of examples that training does not see."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..training import data


def mean_loss(experiment: Any) -> Callable[[Any], float]:
  """A function of params: the mean loss of held-out examples, of an `experiment.Experiment`.

  Of the first `config.evaluation.num_batches` batches of `config.evaluation.batch_size`; what is
  random in a loss is the same at every call.
  """
  c = experiment.config.evaluation

  @jax.jit
  def sums(params, batch):
    (loss, weight), _ = experiment.loss_fn(None, params, batch)
    return jnp.sum(loss), jnp.sum(weight)

  def loss(params):
    batches = data.batches(
      experiment.held_out,
      experiment.rows,
      batch_size=c.batch_size,
      shuffle=False,
      process_index=0,  # every process has the whole batch
      process_count=1,
    )
    pairs = [sums(params, batch) for batch in itertools.islice(batches, c.num_batches)]
    total, weight = np.sum(jax.device_get(pairs), axis=0)
    return float(total / weight)

  return loss
