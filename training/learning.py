"""A round of learning from samples: roll out, reward, select, update.

    parts = learning.Round(roll_out, reward, select, complete, update, record)
    step = learning.round_step(parts, capacity=..., num_minibatches=4, num_epochs=1)
    state, metrics = step(key, state, problems)

The parameters that sample are those before the round's first update (or a fixed policy's, as
`roll_out` decides); later updates of the round are off-policy by the updates before them. Nothing
is carried between rounds but the state, so a run that was stopped goes on with the same rollouts.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..models import base as models
from ..tasks import base as tasks
from . import rollouts, scoring, selection, step
from . import state as state_lib


class Round(NamedTuple):
  """What a round of learning consists of."""

  roll_out: Callable[[jax.Array, models.Params, Sequence[tasks.Problem]], rollouts.Rollouts]
  reward: Callable[[np.random.Generator, rollouts.Rollouts], np.ndarray]  # [P, G]
  select: selection.Select
  complete: Callable[[models.Params, step.Batch], step.Batch]  # of a minibatch, jitted
  update: Callable[..., tuple[state_lib.TrainState, step.Metrics]]  # of (key, state, minibatch)
  record: Callable[[int, rollouts.Rollouts, np.ndarray], None]  # of the step that is made


def verified(rng: np.random.Generator, made: rollouts.Rollouts) -> np.ndarray:
  """The verifier's reward."""
  del rng
  return made.rewards()


def inverted(rng: np.random.Generator, made: rollouts.Rollouts) -> np.ndarray:
  """1 where the verifier says wrong: a control (arXiv 2507.10532)."""
  del rng
  return 1 - made.rewards()


def random(rng: np.random.Generator, made: rollouts.Rollouts) -> np.ndarray:
  """A coin's reward: a control (arXiv 2507.10532)."""
  return rng.integers(2, size=made.lengths.shape).astype(np.float32)


def scorer(
  model: models.LanguageModel, *, temperature: float = 1.0, chunk: int = 256
) -> Callable[[models.Params, rollouts.Rows], jax.Array]:
  """A jitted (params, rows) -> log-probabilities [N, L] of what was drawn."""

  @jax.jit
  def score(params, rows):
    return scoring.scores(model, params, rows, temperature=temperature, chunk=chunk).log_prob

  return score


def round_step(
  parts: Round, *, capacity: int, num_minibatches: int = 1, num_epochs: int = 1
) -> Callable[..., tuple[state_lib.TrainState, dict[str, Any]]]:
  """A function of (key, state, problems): the state after a round, and its metrics.

  What `select` finds is spread over the minibatches at random, each filled up to its share of
  `capacity`, and used `num_epochs` times: shapes never change. A minibatch without any row makes no
  update, nor does a round that finds nothing. `state.step` counts rounds; the optimizer counts
  updates.

  Metrics: `reward` and `correct`, means over samples; `faults`, the share of samples whose verifier
  failed (`workers.FAULT`); `length`, tokens; `selected`, rows; the loss's own, means over rows of
  all updates, but `ratio` of the first; and `seconds/sampling`, `/verifying`, `/updating`.
  """
  size, left = divmod(capacity, num_minibatches)
  if left:
    raise ValueError(f"{capacity=} rows do not divide into {num_minibatches=}.")

  def run(key, state, problems):
    count = int(state.step)
    sample_key, update_key = jax.random.split(jax.random.fold_in(key, count))
    rng = np.random.default_rng(np.asarray(jax.random.key_data(update_key)))
    made = parts.roll_out(sample_key, state.params, problems)
    rewards = parts.reward(rng, made)
    parts.record(count + 1, made, rewards)
    batch = parts.select(made, rewards)
    selected = len(jax.tree.leaves(batch)[0])
    start = time.perf_counter()
    if selected:
      rows = np.array_split(rng.permutation(selected), min(num_minibatches, selected))
      minibatches = [selection.filled(_taken(batch, part), size) for part in rows]
      minibatches = [parts.complete(state.params, minibatch) for minibatch in minibatches]
      state, seen = _updates(parts.update, update_key, state, minibatches * num_epochs)
    else:
      seen = {}
    metrics = {
      "reward": rewards.mean(),
      "correct": made.rewards().mean(),
      "faults": made.faults(),
      "length": made.lengths.mean(),
      "selected": selected,
      **seen,
      **{f"seconds/{phase}": seconds for phase, seconds in made.seconds.items()},
      "seconds/updating": time.perf_counter() - start,
    }
    return state._replace(step=jnp.int32(count + 1)), metrics

  return run


def _taken(batch, rows):
  return jax.tree.map(lambda x: x[rows], batch)


def _updates(update, key, state, minibatches):
  found = []
  for number, minibatch in enumerate(minibatches):
    state, metrics = update(jax.random.fold_in(key, number), state, minibatch)
    found.append(metrics)
  found = jax.device_get(found)
  weights = [metrics["weight"] for metrics in found]
  plain = ("weight", "gradient_norm")  # of an update, not of rows
  mean = lambda name: np.average(
    [metrics[name] for metrics in found], weights=None if name in plain else weights
  )
  seen = {name: float(mean(name)) for name in found[0]}
  if "ratio" in seen:
    seen["ratio"] = float(found[0]["ratio"])
  return state, seen
