"""Beams of a batch: rows that do not know each other, frozen rows, caches that follow beams."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.sampling import base, beam

TARGET = targets.tiny_target(num_layers=1)
REQUESTS = {0: (3, 1, 4), 1: (1,), 2: (5, 9, 2, 6, 5, 3, 5), 3: (8, 9, 7, 9), 4: (3, 2)}


@pytest.fixture(scope="module")
def served():
  """A function that starts given requests in given slots, and one that steps them."""
  model, params = TARGET

  def algorithm(params):
    return beam.diverse_beam_search(
      model,
      params,
      num_beams=4,
      num_groups=2,
      diversity=0.7,
      max_length=20,
      max_new_tokens=10,
      stop=(7, 9, 11),
      length_penalty=0.0,
    )

  @jax.jit
  def start(params, keys, prompts):
    return base.start(keys, algorithm(params), prompts)

  @jax.jit
  def step(params, keys, state):
    return algorithm(params).step(base.row_keys_at(keys, state.step), state)

  def begin(requests):
    return start(
      params, targets.keys_of(requests), targets.prompts_of([REQUESTS[r] for r in requests], 8)
    )

  return begin, lambda requests, state: step(params, targets.keys_of(requests), state)


select = jax.jit(base.select_rows)


def row(state, b):
  return jax.tree.map(lambda leaf: np.asarray(leaf[b]), (state.finished, state.step, state.done))


def same(one, other):
  """Integers equal, floats to the rounding of another batch size."""
  for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=0 if np.issubdtype(x.dtype, np.integer) else 1e-5)


def test_a_row_depends_on_its_request_alone(served):
  begin, step = served

  def advance(slots, state, num_steps=10):
    for _ in range(num_steps):
      state, _ = step(slots, state)
    return state

  alone = {r: row(advance([r] * 5, begin([r] * 5)), 0) for r in REQUESTS}
  assert len({finished.tokens.tobytes() for finished, *_ in alone.values()}) == 5
  assert all(done for *_, done in alone.values())
  for slots in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0]):  # in company, and in another slot
    state = advance(slots, begin(slots))
    for b, r in enumerate(slots):
      same(row(state, b), alone[r])
  state = advance([0, 1, 2, 3, 0], begin([0, 1, 2, 3, 0]), 4)
  slots = [0, 4, 2, 3, 0]
  state = advance(slots, select(jnp.arange(5) == 1, begin(slots), state))  # late
  for b, r in enumerate(slots):
    same(row(state, b), alone[r])


def test_done_rows_are_frozen_and_every_leaf_leads_with_the_row(served):
  begin, step = served
  slots, done_at = [0, 1, 2, 3, 4], np.full(5, 99)
  state = begin(slots)
  assert all(leaf.shape[0] == 5 for leaf in jax.tree.leaves(state))
  for n in range(12):
    before = state
    state, info = step(slots, before)
    done_at = np.where(before.done, np.minimum(done_at, n), done_at)
    for b in np.flatnonzero(before.done):
      for x, y in zip(held(before), held(state), strict=True):
        np.testing.assert_array_equal(x[b], y[b])
      assert all(np.all(leaf[b] == 0) for leaf in info)
    length = (state.prompt_length + state.step - 1)[:, None]
    np.testing.assert_array_equal(state.cache.length, np.tile(length, (1, 4)))
  assert np.all(state.done) and len(np.unique(done_at)) > 1


def held(state):
  """The leaves that a frozen row keeps: of the cache, its length."""
  return jax.tree.leaves(state._replace(cache=state.cache.length))


def test_the_cache_follows_its_beam(served):
  """Hypotheses score what one pass over the whole of them scores, and the moves rebuild them."""
  begin, step = served
  model, params = TARGET
  slots, infos = [0, 1, 2, 3, 4], []
  state = begin(slots)
  for _ in range(3):
    state, info = step(slots, state)
    infos.append(jax.tree.map(np.asarray, info))
  running = [(b, k) for b, k in np.ndindex(5, 4) if state.step[b] == 3]
  assert len(running) > 8
  for b, k in running:  # last move to first
    tokens, at = [], k
    for info in reversed(infos):
      tokens.append(info.token[b, at])
      at = info.parent[b, at]
    start = len(REQUESTS[b])
    np.testing.assert_array_equal(state.tokens[b, k, start : start + 3], tokens[::-1])
  for _ in range(7):
    state, info = step(slots, state)
    infos.append(jax.tree.map(np.asarray, info))
  moved = [np.any(info.parent[b] != np.arange(4)) for info in infos[1:] for b in range(5)]
  assert np.sum(moved) > 5
  beams = jax.tree.map(np.asarray, state.finished)
  hidden, _ = targets.apply(model, params, beams.tokens.reshape(20, 20))
  law = targets.softmax(model.readout(params, hidden)).reshape(5, 4, 20, 23)
  for b, k in np.ndindex(5, 4):
    places = np.arange(len(REQUESTS[b]), beams.length[b, k])
    total = np.log(law[b, k, places - 1, beams.tokens[b, k, places]]).sum()
    np.testing.assert_allclose(beams.log_prob[b, k], total, atol=1e-4)
    assert beams.score[b, k] <= beams.log_prob[b, k] + 1e-5  # less what the second group paid
  assert np.any(beams.score[:, 2:] < beams.log_prob[:, 2:] - 0.5)
  np.testing.assert_allclose(beams.score[:, :2], beams.log_prob[:, :2], atol=1e-5)
