"""Contrastive search against the same search written naively, without a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.models import base as model_base
from ancestral.sampling import base, contrastive, decode
from ancestral.sampling import logits as logits_lib

ROWS = [[3, 1, 4], [1], [5, 9, 2, 6, 5], [8, 9, 7, 9]]
NEW = 8
MAX = 5 + NEW


def prompts_of(rows):
  return targets.prompts_of(rows, 5)


@functools.partial(
  jax.jit, static_argnames=("model", "max_length", "num_steps", "k", "transform", "stop")
)
def search(params, keys, prompts, alpha, max_new_tokens, *, model, num_steps, **fixed):
  algorithm = contrastive.contrastive(
    model, params, alpha=alpha, max_new_tokens=max_new_tokens, **fixed
  )
  state = base.start(keys, algorithm, prompts)
  return base.run(keys, algorithm, state, num_steps, lambda state, info: info)


def searched(target, rows=ROWS, alpha=0.6, max_new_tokens=NEW, **fixed):
  """The last state, and the Info of all steps [num_steps, B]; compiled once for `fixed`."""
  model, params = target
  fixed = {"max_length": MAX, "num_steps": NEW, "k": 4, "transform": None, "stop": ()} | fixed
  max_new_tokens = jnp.broadcast_to(jnp.asarray(max_new_tokens), len(rows))
  alpha = jnp.broadcast_to(jnp.asarray(alpha, jnp.float32), len(rows))
  prompts = prompts_of(rows)
  return search(
    params, targets.keys_of(range(len(rows))), prompts, alpha, max_new_tokens, model=model, **fixed
  )


@functools.partial(jax.jit, static_argnums=0)
def read(model, params, tokens):
  hidden, _ = model_base.apply(model, params, tokens)
  return hidden, model.readout(params, hidden)


def read_whole(target, sequences):
  """Hidden states and logits of every sequence, each read from its beginning."""
  model, params = target
  tokens = np.zeros((len(sequences), MAX + 1), np.int32)
  for b, sequence in enumerate(sequences):
    tokens[b, : len(sequence)] = sequence
  hidden, logits = read(model, params, tokens)
  return np.asarray(hidden, np.float64), np.asarray(logits, np.float64)


def naive_step(target, sequence, alpha, k, forbidden=()):
  """The token that the definition chooses, by how much it won, and the model's law."""
  place = len(sequence)
  hidden, logits = read_whole(target, [[*sequence, v] for v in range(23)])
  allowed = logits[0, place - 1].copy()
  allowed[list(forbidden)] = -np.inf
  law = targets.softmax(allowed)
  candidates = sorted(range(23), key=lambda v: -law[v])[:k]
  scores = []
  for v in candidates:
    h = hidden[v, place]
    cosines = [h @ other / np.linalg.norm(h) / np.linalg.norm(other) for other in hidden[v, :place]]
    scores.append((1 - alpha) * law[v] - alpha * max(cosines))
  order = np.argsort(scores)[::-1]
  margin = scores[order[0]] - scores[order[1]]
  return candidates[order[0]], margin, targets.softmax(logits[0, place - 1])


@pytest.mark.parametrize(
  "fields", [{}, {"positions": "learned", "max_length": MAX + 1, "num_layers": 1}]
)
def test_equals_the_naive_search(fields):
  target, greedy_steps = targets.tiny_target(**fields), 0
  alphas = [0.8, 1.0, 0.6, 0.3]
  state, info = searched(target, alpha=jnp.array(alphas))
  for b, row in enumerate(ROWS):
    sequence = list(row)
    for n in range(NEW):
      token, margin, law = naive_step(target, sequence, alphas[b], 4)
      assert margin > 1e-4, "a near-tie: another seed"
      assert int(info.token[n, b]) == token
      np.testing.assert_allclose(info.model_log_prob[n, b], np.log(law[token]), atol=1e-4)
      greedy_steps += token == np.argmax(law)
      sequence.append(token)
    np.testing.assert_array_equal(state.tokens[b, : len(sequence)], sequence)
    assert np.all(state.tokens[b, len(sequence) :] == 0)
  assert greedy_steps < 0.8 * NEW * len(ROWS)  # the penalty decided something
  assert np.all(info.log_prob == 0) and info.log_prob.dtype == jnp.float32
  np.testing.assert_array_equal(state.length, [len(row) + NEW for row in ROWS])
  np.testing.assert_array_equal(state.cache.length, state.length - 1)


@functools.partial(jax.jit, static_argnums=0)
def greedy(model, params, keys, prompts):
  return decode.generate(
    model, params, keys, prompts, max_new_tokens=NEW, transform=logits_lib.greedy()
  )


@pytest.mark.parametrize("settings", [{"alpha": 0.0}, {"alpha": 0.9, "k": 1}])
def test_without_a_choice_it_is_greedy(settings):
  model, params = targets.tiny_target(num_layers=1)
  state, info = searched((model, params), **settings)
  samples = greedy(model, params, targets.keys_of(range(4)), prompts_of(ROWS))
  np.testing.assert_array_equal(state.tokens, samples.tokens)
  np.testing.assert_allclose(info.model_log_prob.T, samples.model_log_prob, atol=1e-5)


def test_rows_do_not_know_each_other():
  target = targets.tiny_target(num_layers=1)
  together, _ = searched(target)
  for slots in ([3, 2, 1, 0], [1, 1, 1, 2]):
    state, _ = searched(target, rows=[ROWS[slot] for slot in slots])
    np.testing.assert_array_equal(state.tokens, together.tokens[np.array(slots)])


def forbid(forbidden):
  """A transform that leaves row b no token of forbidden[b], and counts what it is told."""
  return logits_lib.LogitsTransform(
    init=lambda batch_size: jnp.zeros(batch_size, jnp.int32),
    apply=lambda logits, context, state: jnp.where(jnp.array(forbidden), -jnp.inf, logits),
    update=lambda model_logits, token, state: state + token,
  )


def test_a_filtered_token_is_no_candidate():
  target = targets.tiny_target(num_layers=1)
  free, _ = searched(target)
  used = np.unique(np.asarray(free.tokens)[0, 3 : 3 + NEW])[:3].tolist()
  forbidden = np.zeros((4, 23), bool)
  forbidden[0, used] = True
  forbidden[1] = ~np.isin(np.arange(23), [6, 7])  # fewer are left than candidates
  alpha = jnp.array([0.6, 1.0, 0.6, 0.6])
  state, info = searched(target, alpha=alpha, transform=forbid(forbidden))
  assert not np.isin(info.token[:, 0], used).any()
  token, _, law = naive_step(target, ROWS[0], 0.6, 4, used)
  assert int(info.token[0, 0]) == token
  assert np.isin(info.token[:, 1], [6, 7]).all()
  np.testing.assert_array_equal(state.tokens[2:], free.tokens[2:])
  np.testing.assert_array_equal(state.transform, np.sum(info.token, axis=0))
  np.testing.assert_allclose(info.model_log_prob[0, 0], np.log(law[token]), atol=1e-4)


def test_rows_stop_fill_up_and_are_frozen():
  target = targets.tiny_target(num_layers=1)
  free, _ = searched(target)
  stop = int(free.tokens[0, 3 + 2])  # the third token of row 0
  state, info = searched(target, stop=(stop,), max_new_tokens=jnp.array([8, 3, 8, 0]), max_length=9)
  assert int(state.step[0]) == free.tokens[0, 3:6].tolist().index(stop) + 1
  limits = [8, 3, 4, 0]
  for b, row in enumerate(ROWS):
    made = int(state.step[b])
    ended = made > 0 and int(state.tokens[b, len(row) + made - 1]) == stop
    assert made == limits[b] or ended
    length = len(row) + made
    assert int(state.length[b]) == length == int(state.cache.length[b]) + 1
    np.testing.assert_array_equal(state.tokens[b, :length], free.tokens[b, :length])
    assert np.all(state.tokens[b, length:] == 0)
    assert all(not np.any(leaf[made:, b]) for leaf in info)
  np.testing.assert_array_equal(state.done, [True] * 4)
  assert 4 in state.step.tolist()  # a full row


def test_compiles_once_for_all_prompts_params_and_alphas():
  model, params = targets.tiny_target(num_layers=1)
  traces = []

  @jax.jit
  def sample(params, alpha, keys, prompts):
    traces.append(1)
    algorithm = contrastive.contrastive(
      model, params, max_length=MAX, max_new_tokens=NEW, alpha=alpha, k=3
    )
    state = base.start(keys, algorithm, prompts)
    return base.run_until(keys, algorithm, state, lambda state: state.done, NEW).tokens

  first = sample(params, 0.6, targets.keys_of(range(4)), prompts_of(ROWS))
  other = sample(params, 0.1, targets.keys_of(range(4)), prompts_of(ROWS[::-1]))
  negated = jax.tree.map(lambda leaf: -leaf, params)
  third = sample(negated, 0.6, targets.keys_of(range(4)), prompts_of(ROWS))
  assert len(traces) == 1
  assert np.any(first != other) and np.any(first != third)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_for_accelerators(platform):
  model, params = targets.tiny_target(num_layers=1)

  def sample(params, keys, prompts):
    algorithm = contrastive.contrastive(model, params, max_length=MAX, max_new_tokens=NEW)
    return base.run(keys, algorithm, base.start(keys, algorithm, prompts), 2)[0].tokens

  traced = jax.jit(jax.vmap(sample, in_axes=(None, 0, 0))).trace(
    params, targets.keys_of(range(4))[None], jax.tree.map(lambda leaf: leaf[None], prompts_of(ROWS))
  )
  assert "stablehlo" in traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"alpha": 1.5}, r"alpha\(1.5\): it has to be in \[0, 1\]"),
    ({"k": 0}, r"k\(0\): it has to be at least 1"),
    ({"k": 24}, r"k\(24\): it has to be at most 23"),
    ({"max_length": 4}, "5 tokens wide, max_length is 4"),
  ],
)
def test_bad_settings_are_named(settings, message):
  model, params = targets.tiny_target(num_layers=1)
  settings = {"max_length": MAX, "max_new_tokens": NEW, **settings}
  with pytest.raises(ValueError, match=message) as error:
    jax.eval_shape(
      lambda: base.start(
        targets.keys_of(range(4)),
        contrastive.contrastive(model, params, **settings),
        prompts_of(ROWS),
      )
    )
  assert "\n" not in str(error.value)
