"""The driver: which key a step gets, how loops end, refilling, recording."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.sampling import base


class WalkState(NamedTuple):
  step: jax.Array  # [B]
  start: jax.Array  # [B] drawn at init
  bits: jax.Array  # [B] drawn at the last step
  limit: jax.Array  # [B]


def bits(keys):
  return jax.vmap(jax.random.bits)(keys)


def walk():
  """Draws a number a step; a row at its limit is frozen."""

  def init(keys, limit):
    return WalkState(jnp.zeros_like(limit), bits(keys), jnp.zeros(limit.shape, jnp.uint32), limit)

  def step(keys, state):
    active = state.step < state.limit
    drawn = jnp.where(active, bits(keys), state.bits)
    state = state._replace(step=state.step + active, bits=drawn)
    return state, jnp.where(active, drawn, 0)

  return base.SamplingAlgorithm(init, step)


def is_done(state):
  return state.step >= state.limit


def expected_bits(seed, request, step):
  """By the driver's rule, one scalar key at a time."""
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), request), step)
  return int(jax.random.bits(key))


REQUESTS = jnp.array([7, 0, 2])


def row_keys(requests=REQUESTS):
  return base.row_keys(jax.random.key(5), requests)


def test_keys_follow_the_rule_and_none_repeats():
  keys, algorithm = row_keys(), walk()
  state = base.start(keys, algorithm, jnp.array([4, 4, 2]))
  final, seen = base.run(keys, algorithm, state, 4, lambda state, info: info)
  expected = np.array(
    [[expected_bits(5, request, step) for request in (7, 0, 2)] for step in range(4)]
  )
  expected[2:, 2] = 0  # frozen at its limit
  np.testing.assert_array_equal(seen, expected)
  np.testing.assert_array_equal(final.step, [4, 4, 2])
  init = [expected_bits(5, request, 2**32 - 1) for request in (7, 0, 2)]
  np.testing.assert_array_equal(state.start, init)
  drawn = [*init, *expected[expected > 0]]
  assert len(set(drawn)) == len(drawn) == 13


def test_run_stacks_only_what_is_observed():
  keys, algorithm = row_keys(), walk()
  state = base.start(keys, algorithm, jnp.array([9, 9, 9]))
  final, nothing = base.run(keys, algorithm, state, 3)
  assert nothing is None
  _, steps = base.run(keys, algorithm, state, 3, lambda state, info: state.step[0])
  np.testing.assert_array_equal(steps, [1, 2, 3])  # the state after the step
  again, _ = base.run(keys, algorithm, base.run(keys, algorithm, state, 1)[0], 2)
  jax.tree.map(np.testing.assert_array_equal, final, again)


def test_run_until_stops_when_all_are_done_or_at_a_traced_bound():
  calls = []

  @jax.jit
  def steps(limit, max_steps):
    calls.append(1)
    state = base.start(row_keys(), walk(), limit)
    return base.run_until(row_keys(), walk(), state, is_done, max_steps)

  limit = jnp.array([1, 5, 3])
  for max_steps, expected in ((10, [1, 5, 3]), (2, [1, 2, 2]), (0, [0, 0, 0])):
    np.testing.assert_array_equal(steps(limit, max_steps).step, expected)
  assert len(calls) == 1
  assert int(steps(limit, 10).bits[1]) == expected_bits(5, 0, 4)


def test_run_until_does_not_step_past_the_end():
  limit = jnp.array([2, 3, 1])
  made = []

  def step(keys, state):
    jax.debug.callback(lambda: made.append(1))
    return walk().step(keys, state)

  counted = base.SamplingAlgorithm(walk().init, step)
  state = base.start(row_keys(), counted, limit)
  jax.block_until_ready(base.run_until(row_keys(), counted, state, is_done, 100))
  jax.effects_barrier()
  assert len(made) == 3


def test_admitted_rows_draw_what_they_would_alone():
  keys, algorithm = row_keys(), walk()
  state = base.start(keys, algorithm, jnp.array([2, 6, 6]))
  state, _ = base.run(keys, algorithm, state, 3)
  keys = row_keys(jnp.array([40, 0, 2]))
  fresh = base.start(row_keys(jnp.array([41, 40])), algorithm, jnp.array([1, 2]))
  state = base.admit(state, fresh, jnp.array([3, 0]))  # there is no slot 3
  np.testing.assert_array_equal(state.step, [0, 3, 3])
  np.testing.assert_array_equal(state.limit, [2, 6, 6])
  assert int(state.start[0]) == expected_bits(5, 40, 2**32 - 1)
  _, seen = base.run(keys, algorithm, state, 2, lambda state, info: info)
  np.testing.assert_array_equal(
    seen,
    [
      [expected_bits(5, 40, 0), expected_bits(5, 0, 3), expected_bits(5, 2, 3)],
      [expected_bits(5, 40, 1), expected_bits(5, 0, 4), expected_bits(5, 2, 4)],
    ],
  )


def test_select_rows_broadcasts_over_any_rank():
  rows = jnp.array([True, False])
  new = (jnp.ones(2), jnp.ones((2, 3)), jnp.ones((2, 1, 4), jnp.int32))
  old = jax.tree.map(lambda leaf: 0 * leaf, new)
  for leaf in base.select_rows(rows, new, old):
    assert np.all(leaf[0] == 1) and np.all(leaf[1] == 0)


def test_recorded_files_by_the_rows_own_steps():
  algorithm = base.recorded(walk(), lambda state, info: {"bits": info, "step": state.step}, 4)
  keys, limit = row_keys(), jnp.array([2, 6, 3])
  state = base.start(keys, algorithm, limit)
  assert np.all(state.record["bits"] == 0) and state.record["bits"].dtype == jnp.uint32
  state, _ = base.run(keys, algorithm, state, 3)
  keys = row_keys(jnp.array([40, 0, 2]))
  state = base.admit(state, base.start(keys[:1], algorithm, limit[:1]), jnp.array([0]))
  final = base.run_until(keys, algorithm, state, lambda s: is_done(s.state), 10)
  expected = [
    [expected_bits(5, 40, i) for i in range(2)] + [0, 0],
    [expected_bits(5, 0, i) for i in range(4)],  # two more did not fit
    [expected_bits(5, 2, i) for i in range(3)] + [0],
  ]
  np.testing.assert_array_equal(final.record["bits"], expected)
  np.testing.assert_array_equal(final.record["step"], [[1, 2, 0, 0], [1, 2, 3, 4], [1, 2, 3, 0]])
  np.testing.assert_array_equal(final.step, [2, 6, 3])


def test_recording_changes_nothing():
  keys, limit = row_keys(), jnp.array([2, 6, 3])
  plain = base.run(keys, walk(), base.start(keys, walk(), limit), 5)[0]
  algorithm = base.recorded(walk(), lambda state, info: info, 5)
  final, _ = base.run(keys, algorithm, base.start(keys, algorithm, limit), 5)
  jax.tree.map(np.testing.assert_array_equal, final.state, plain)


@pytest.mark.parametrize("requests", [[0, 1], [1, 0], [1, 5, 6, 0]])
def test_row_keys_depend_on_the_request_alone(requests):
  drawn = bits(base.row_keys(jax.random.key(5), jnp.array(requests)))
  for request, value in zip(requests, drawn, strict=True):
    alone = jax.random.bits(jax.random.fold_in(jax.random.key(5), request))
    assert int(value) == int(alone)
