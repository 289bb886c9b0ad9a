"""The one interface of every sampler, and the only loops that run it.

A sampler is a pair of pure functions over a batch of rows. A row's randomness depends on its own
request and its own step count, never on its slot, its neighbours or when it was admitted:

    keys = row_keys(run_key, requests)          # [B], one per row
    state = start(keys, algorithm, inputs)
    state = run_until(keys, algorithm, state, is_done, max_steps)
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

Keys = jax.Array  # [B] typed PRNG keys
Info = Any


class State(Protocol):
  """A NamedTuple of arrays, each leading with [B], that counts each row's own steps."""

  step: jax.Array  # [B] int32


class SamplingAlgorithm(NamedTuple):
  """A sampler of B rows.

  Attributes:
    init: (keys [B], inputs) -> State, with `step` 0.
    step: (keys [B], state) -> (State, Info). Each key is used once and never kept.
  """

  init: Callable[[Keys, Any], Any]
  step: Callable[[Keys, Any], tuple[Any, Info]]


# Data of the key that init consumes: no row gets to make so many steps.
_INIT = jnp.iinfo(jnp.uint32).max


def row_keys(key: jax.Array, requests: jax.Array) -> Keys:
  """One key per row, from the key of the run and the rows' request numbers [B]."""
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, requests)


def start(keys: Keys, algorithm: SamplingAlgorithm, inputs: Any) -> Any:
  """The state before the first step."""
  return algorithm.init(row_keys_at(keys, jnp.full(keys.shape, _INIT, jnp.uint32)), inputs)


def row_keys_at(keys: Keys, steps: jax.Array) -> Keys:
  """The key that each row's step number `steps` [B] consumes."""
  return jax.vmap(jax.random.fold_in)(keys, steps)


def run(
  keys: Keys,
  algorithm: SamplingAlgorithm,
  state: Any,
  num_steps: int,
  observe: Callable[[Any, Info], Any] = lambda state, info: None,
) -> tuple[Any, Any]:
  """Makes `num_steps` steps; returns the state and what `observe` saw, stacked [num_steps, ...]."""

  def body(state, _):
    state, info = algorithm.step(row_keys_at(keys, state.step), state)
    return state, observe(state, info)

  return jax.lax.scan(body, state, length=num_steps)


def run_until(
  keys: Keys,
  algorithm: SamplingAlgorithm,
  state: Any,
  is_done: Callable[[Any], jax.Array],
  max_steps: int | jax.Array,
) -> Any:
  """Steps until `is_done(state)` [B] holds for every row, `max_steps` times at most."""

  def unfinished(carry):
    step, state = carry
    return (step < max_steps) & ~jnp.all(is_done(state))

  def body(carry):
    step, state = carry
    state, _ = algorithm.step(row_keys_at(keys, state.step), state)
    return step + 1, state

  return jax.lax.while_loop(unfinished, body, (jnp.int32(0), state))[1]


def split(keys: Keys, num: int = 2) -> tuple[Keys, ...]:
  """`num` keys of each of keys [B], each [B]."""
  return jax.vmap(lambda key: tuple(jax.random.split(key, num)))(keys)


def cond(
  keys: Keys, predicate: jax.Array, draw: Callable[[Keys], Any], skip: Callable[[], Any]
) -> Any:
  """`draw(keys)` if the predicate holds, else `skip()`: `lax.cond` of what takes keys.

  They go in as data: under vmap a condition selects its operands, which the check of keys used
  twice takes for a use.
  """
  data, kind = jax.random.key_data(keys), jax.random.key_impl(keys)
  return jax.lax.cond(predicate, lambda: draw(jax.random.wrap_key_data(data, impl=kind)), skip)


def select_rows(rows: jax.Array, new: Any, old: Any) -> Any:
  """Row by row, `new` where rows [B] is true and `old` elsewhere, for trees of [B, ...] arrays."""

  def select(new, old):
    return jnp.where(rows.reshape(rows.shape + (1,) * (new.ndim - 1)), new, old)

  return jax.tree.map(select, new, old)


def admit(state: Any, fresh: Any, slots: jax.Array) -> Any:
  """Refills slots: row r of `fresh` (its step 0) goes to slots[r], [R]; out of range, nowhere.

  The caller puts the new requests' keys in the same slots; each then draws what it would have
  drawn alone.
  """
  return jax.tree.map(lambda old, new: old.at[slots].set(new, mode="drop"), state, fresh)


def resized(state: Any, shapes: Any) -> Any:
  """The state in arrays of other shapes: cut at their ends, or filled up with zeros.

  Args:
    state: of buffers for some number of tokens.
    shapes: of the same algorithm's state for another, from `jax.eval_shape`.
  """

  def fit(leaf, shape):
    widths = [(0, new - old, 0) for old, new in zip(leaf.shape, shape.shape, strict=True)]
    return jax.lax.pad(leaf, jnp.zeros((), leaf.dtype), widths)

  return jax.tree.map(fit, state, shapes)


class Recorded(NamedTuple):
  """A sampler's state and what was seen at each row's own steps."""

  state: Any
  record: Any  # leaves [B, capacity, ...], zero at steps not made

  @property
  def step(self) -> jax.Array:
    """[B] int32, the inner state's."""
    return self.state.step


def recorded(
  algorithm: SamplingAlgorithm, observe: Callable[[Any, Info], Any], capacity: int
) -> SamplingAlgorithm:
  """The same sampler, remembering `observe(state, info)` [B, ...] of each row's steps.

  `run` stacks by the loop's steps; this stores by the row's own, so it serves `run_until` and rows
  admitted late. A row that does not advance (finished, frozen) records nothing.
  """

  def init(keys, inputs):
    state = algorithm.init(keys, inputs)
    seen = jax.eval_shape(lambda keys, state: observe(*algorithm.step(keys, state)), keys, state)
    record = jax.tree.map(
      lambda leaf: jnp.zeros((leaf.shape[0], capacity, *leaf.shape[1:]), leaf.dtype), seen
    )
    return Recorded(state, record)

  def step(keys, recorded):
    state, info = algorithm.step(keys, recorded.state)
    made = recorded.step
    index = jnp.where(state.step > made, made, capacity)  # capacity is out of bounds: dropped
    rows = jnp.arange(index.shape[0])
    record = jax.tree.map(
      lambda buffer, seen: buffer.at[rows, index].set(seen, mode="drop"),
      recorded.record,
      observe(state, info),
    )
    return Recorded(state, record), info

  return SamplingAlgorithm(init, step)
