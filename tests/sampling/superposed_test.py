"""Superposed decoding against the same in Python, and against mixtures where it is exact."""

import collections
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.models import base as model_base
from ancestral.sampling import base, decode, ngram, superposed
from ancestral.sampling import logits as logits_lib

ROWS = [[3, 1, 4], [1], [5, 0, 2, 6, 5], [6, 2, 0, 2]]
NEW = 6
MAX = 5 + NEW
V = 7
WEIGHTS = (0.01, 0.04, 0.15, 0.18, 0.12)
RNG = np.random.default_rng(0)
CORPUS = [RNG.choice(V, size=60, p=RNG.dirichlet(np.ones(V))).tolist() for _ in range(2)]
TABLE = ngram.build(CORPUS, 6)


class Counted(NamedTuple):
  length: jax.Array


def linear(vocab_size):
  """A Markov chain whose hidden states are its probabilities: linear in the embeddings."""

  def trunk(params, x, cache=None, **kwargs):
    assert not kwargs
    hidden = x @ params  # one-hot times the transition matrix
    return hidden, None if cache is None else Counted(cache.length + x.shape[1])

  return model_base.LanguageModel(
    init=lambda key, tokens: jnp.eye(vocab_size),
    init_cache=lambda params, batch_size, max_length: Counted(jnp.zeros(batch_size, jnp.int32)),
    embed=lambda params, tokens: jax.nn.one_hot(tokens, vocab_size),
    trunk=trunk,
    readout=lambda params, hidden: jnp.log(hidden),
  )


TRANSITION = np.random.default_rng(3).dirichlet(0.6 * np.ones(V), size=V)
LINEAR = linear(V), jnp.asarray(TRANSITION, jnp.float32)


def transformer_target():
  return targets.tiny_target(num_layers=1, vocab_size=V)


def prompts_of(rows):
  return targets.prompts_of(rows, 5)


FIXED = ("model", "max_length", "num_steps", "num_drafts", "num_candidates", "counted", "stop")


@functools.partial(jax.jit, static_argnames=FIXED)
def search(params, keys, prompts, settings, *, model, num_steps, counted, **fixed):
  scoring = superposed.interpolated(TABLE, alpha=settings["alpha"]) if counted else None
  algorithm = superposed.superposed(
    model,
    params,
    max_new_tokens=settings["max_new_tokens"],
    temperature=settings["temperature"],
    scoring=scoring,
    **fixed,
  )
  state = base.start(keys, algorithm, prompts)
  return base.run(keys, algorithm, state, num_steps, lambda state, info: (state, info))


def searched(target, rows=ROWS, alpha=None, temperature=1.0, max_new_tokens=NEW, **fixed):
  """(last state, (states, Info) of all steps); without `alpha` nothing is interpolated."""
  model, params = target
  defaults = {"max_length": MAX, "num_steps": NEW, "num_drafts": 3, "num_candidates": 4, "stop": ()}
  settings = {
    "alpha": jnp.broadcast_to(jnp.asarray(0 if alpha is None else alpha, jnp.float32), len(rows)),
    "temperature": jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), len(rows)),
    "max_new_tokens": jnp.broadcast_to(jnp.asarray(max_new_tokens), len(rows)),
  }
  return search(
    params,
    targets.keys_of(range(len(rows))),
    prompts_of(rows),
    settings,
    model=model,
    counted=alpha is not None,
    **(defaults | fixed),
  )


@functools.cache
def counter(size):
  return collections.Counter(
    tuple(row[i : i + size]) for row in CORPUS for i in range(len(row) - size + 1)
  )


def counted_law(draft, candidate):
  """The interpolated n-gram probability, by counting."""
  total = 0.0
  for n, weight in enumerate(WEIGHTS, start=2):
    context = tuple(draft[-(n - 1) :])
    whole = sum(counter(n)[*context, v] for v in range(V)) if len(draft) >= n - 1 else 0
    total += weight * counter(n)[*context, candidate] / whole if whole else 0
  return total


def gains(draft, candidates, log_prob, alpha):
  """What each candidate adds to a draft's score."""
  if alpha is None:
    return [log_prob[v] for v in candidates]
  with np.errstate(divide="ignore"):
    mixed = [(1 - alpha) * log_prob[v] + alpha * np.log(counted_law(draft, v)) for v in candidates]
  if np.all(np.isneginf(mixed)):
    return [(1 - alpha) * log_prob[v] - 200 for v in candidates]
  return mixed


@functools.partial(jax.jit, static_argnums=0)
def last_logits(model, params, x, length):
  hidden, _ = model.trunk(params, x)
  return model.readout(params, hidden[:, length - 1])


def reference(target, prompt, alpha, temperature, stop=(), num_drafts=3, num_candidates=4):
  """[(tokens, score)] of the drafts, the best first: no cache, no batch, no arrays."""
  model, params = target
  embedding = np.asarray(model.embed(params, jnp.arange(V)), np.float64)
  x = [embedding[token] for token in prompt[:-1]]
  drafts = [(list(prompt), 0.0, False)]
  for _ in range(NEW):
    live = [draft for draft in drafts if not draft[2]]
    if not live:
      break
    weights = targets.softmax([score for _, score, _ in live])
    x.append(
      sum(w * embedding[tokens[-1]] for w, (tokens, _, _) in zip(weights, live, strict=True))
    )
    padded = np.zeros((1, MAX, len(x[0])), np.float32)
    padded[0, : len(x)] = x
    logits = np.asarray(last_logits(model, params, padded, len(x))[0], np.float64)
    log_prob = np.log(targets.softmax(logits / temperature))
    candidates = np.argsort(-log_prob)[:num_candidates].tolist()
    pool = [draft for draft in drafts if draft[2]]
    for tokens, score, _ in live:
      for v, gain in zip(candidates, gains(tokens, candidates, log_prob, alpha), strict=True):
        pool.append(([*tokens, v], score + gain, v in stop))
    drafts = sorted(pool, key=lambda draft: -draft[1])[:num_drafts]
  return [(tokens, score) for tokens, score, _ in drafts if score > -np.inf]


@pytest.mark.parametrize(
  "target, alpha, temperature, stop",
  [
    (lambda: LINEAR, None, 1.0, ()),
    (lambda: LINEAR, 0.54, 0.5, (3,)),
    (transformer_target, None, 0.5, ()),
    (transformer_target, 0.54, 1.0, ()),
    (transformer_target, 1.0, 1.0, ()),
  ],
  ids=["linear", "linear-counts-stop", "transformer", "transformer-counts", "counts-alone"],
)
def test_equals_the_search_in_python(target, alpha, temperature, stop):
  target, stopped = target(), 0
  state, _ = searched(target, alpha=alpha, temperature=temperature, stop=stop)
  for b, row in enumerate(ROWS):
    expected = reference(target, row, alpha, temperature, stop)
    assert len(expected) == 3
    for i, (tokens, score) in enumerate(expected):
      assert int(state.length[b, i]) == len(tokens)
      np.testing.assert_array_equal(state.tokens[b, i, : len(tokens)], tokens)
      assert np.all(state.tokens[b, i, len(tokens) :] == 0)
      np.testing.assert_allclose(state.score[b, i], score, rtol=1e-5, atol=2e-4)
      assert bool(state.stopped[b, i]) == (tokens[-1] in stop)
      stopped += bool(state.stopped[b, i])
  assert (stopped > 0) == bool(stop)


def test_one_draft_is_greedy():
  model, params = transformer_target()
  state, (_, info) = searched((model, params), num_drafts=1)
  samples = jax.jit(
    lambda params, keys, prompts: decode.generate(
      model, params, keys, prompts, max_new_tokens=NEW, transform=logits_lib.greedy()
    )
  )(params, targets.keys_of(range(4)), prompts_of(ROWS))
  np.testing.assert_array_equal(state.tokens[:, 0], samples.tokens)
  np.testing.assert_allclose(state.score[:, 0], samples.model_log_prob.sum(axis=1), atol=1e-5)
  np.testing.assert_array_equal(state.cache.length + 1, samples.length)
  assert np.all(info.parent == 0)


def test_on_a_linear_model_the_superposed_law_is_the_mixture():
  model, params = LINEAR
  _, (states, _) = searched(LINEAR, temperature=0.7)
  mixed = 0
  for n in range(NEW):
    state = jax.tree.map(lambda leaf, n=n: leaf[n], states)
    hidden, _ = model.trunk(params, superposed.superposition(model, params, state))
    law = np.exp(model.readout(params, hidden[:, 0]))
    for b in range(4):
      last = [int(state.tokens[b, i, state.length[b, i] - 1]) for i in range(3)]
      mixture = targets.softmax(state.score[b]) @ TRANSITION[last]
      np.testing.assert_allclose(law[b], mixture, atol=1e-6)
      mixed += len(set(last)) > 1
  assert mixed > NEW * 2


def test_alpha_zero_is_the_likelihood_exactly():
  one, _ = searched(transformer_target())
  other, _ = searched(transformer_target(), alpha=0.0)
  jax.tree.map(np.testing.assert_array_equal, one, other)


def test_the_parents_lead_to_the_drafts():
  state, (_, info) = searched(transformer_target(), alpha=0.3)
  parent, token = np.asarray(info.parent), np.asarray(info.token)
  for b, row in enumerate(ROWS):
    for i in range(3):
      draft, written = i, []
      for n in reversed(range(NEW)):
        written.insert(0, token[n, b, draft])
        draft = parent[n, b, draft]
      np.testing.assert_array_equal(state.tokens[b, i, len(row) : len(row) + NEW], written)
  np.testing.assert_array_equal(info.score[-1], state.score)
  assert np.any(parent[1:] != np.arange(3)) and np.all(np.diff(state.score, axis=1) <= 0)
  assert all(len(np.unique(drafts, axis=0)) == 3 for drafts in np.asarray(state.tokens))


def test_settings_per_row_equal_the_rows_apart():
  target = transformer_target()
  alphas, temperatures = jnp.array([0.0, 0.54, 1.0, 0.2]), jnp.array([1.0, 0.5, 2.0, 0.1])
  together, _ = searched(target, alpha=alphas, temperature=temperatures)
  for b in range(4):
    alone, _ = searched(target, alpha=alphas[b], temperature=temperatures[b])
    np.testing.assert_array_equal(together.tokens[b], alone.tokens[b])
    np.testing.assert_allclose(together.score[b], alone.score[b], atol=1e-4)


def test_rows_do_not_know_each_other():
  target = transformer_target()
  together, _ = searched(target, alpha=0.54)
  for slots in ([3, 2, 1, 0], [1, 1, 1, 2]):
    state, _ = searched(target, rows=[ROWS[slot] for slot in slots], alpha=0.54)
    np.testing.assert_array_equal(state.tokens, together.tokens[np.array(slots)])
    np.testing.assert_allclose(state.score, together.score[np.array(slots)], atol=1e-4)


def test_rows_end_by_their_own_bounds_and_are_frozen():
  target = transformer_target()
  free, (states, _) = searched(target, alpha=0.54)
  state, (_, info) = searched(
    target, alpha=0.54, max_new_tokens=jnp.array([0, 2, 6, 9]), max_length=9
  )
  made = [0, 2, 4, 5]
  np.testing.assert_array_equal(state.step, made)
  np.testing.assert_array_equal(state.done, [True] * 4)
  for b, row in enumerate(ROWS):
    before = states.tokens[made[b] - 1, b] if made[b] else np.asarray(free.tokens[b])
    width = len(row) + made[b]
    np.testing.assert_array_equal(state.tokens[b, :, :width], before[:, :width])
    assert np.all(state.tokens[b, :, width:] == 0)
    np.testing.assert_array_equal(state.length[b], [width] * 3)
    assert int(state.cache.length[b]) == width - 1
    assert all(np.all(leaf[made[b] :, b] == 0) for leaf in info)


def test_stopped_drafts_weigh_nothing_and_end_the_row():
  state, (states, info) = searched(LINEAR, stop=(0, 1, 2))
  assert np.any(states.stopped) and np.any(state.done)
  for n in range(NEW):
    at = jax.tree.map(lambda leaf, n=n: leaf[n], states)
    weights = np.asarray(superposed.weights(at))
    assert np.all(weights[np.asarray(at.stopped)] == 0)
    live = ~np.all(at.stopped, axis=1)
    np.testing.assert_allclose(weights.sum(axis=1), live, atol=1e-6)
  parents_stopped = np.take_along_axis(
    np.asarray(states.stopped)[:-1], np.asarray(info.parent)[1:], axis=2
  )
  assert np.all(np.asarray(info.token)[1:][parents_stopped] == 0)


def test_too_few_candidates_leave_drafts_empty():
  state, _ = searched(LINEAR, num_candidates=1)
  for b, row in enumerate(ROWS):
    greedy = list(row)
    for _ in range(NEW):
      greedy.append(int(np.argmax(TRANSITION[greedy[-1]])))
    np.testing.assert_array_equal(state.tokens[b, 0, : len(greedy)], greedy)
  np.testing.assert_array_equal(np.isneginf(state.score), [[False, True, True]] * 4)


def test_a_draft_without_counts_is_continued_only_for_want_of_others():
  table = ngram.build([[0, 1, 2, 3]], 3)
  scoring = superposed.interpolated(table, alpha=0.5, weights=(0.5, 0.5), penalty=30.0)
  tokens = jnp.array([[[0, 1, 0], [0, 6, 0]]], jnp.int32)
  log_prob = jnp.log(jnp.array([[0.5, 0.2, 0.0]]))
  out = jax.jit(scoring)(tokens, jnp.array([[2, 2]]), jnp.array([[2, 3, 1]]), log_prob)
  known = 0.5 * np.log(0.5)  # 1 is always followed by 2, in both orders
  np.testing.assert_allclose(out[0, 0], [known, -np.inf, -np.inf], atol=1e-6)
  unknown = [0.5 * np.log(0.5) - 30, 0.5 * np.log(0.2) - 30, -np.inf]
  np.testing.assert_allclose(out[0, 1], unknown, rtol=1e-6)


def test_compiles_once_for_all_prompts_params_settings_and_counts():
  model, params = transformer_target()
  traces = []

  @jax.jit
  def sample(params, table, alpha, keys, prompts):
    traces.append(1)
    scoring = superposed.interpolated(table, alpha=alpha)
    algorithm = superposed.superposed(
      model, params, max_length=MAX, max_new_tokens=NEW, num_candidates=5, scoring=scoring
    )
    state = base.start(keys, algorithm, prompts)
    return base.run_until(keys, algorithm, state, lambda state: state.done, NEW).tokens

  first = sample(params, TABLE, 0.5, targets.keys_of(range(4)), prompts_of(ROWS))
  negated = jax.tree.map(lambda leaf: -leaf, params)
  other = sample(negated, TABLE, 0.1, targets.keys_of([3, 1, 2, 0]), prompts_of(ROWS[::-1]))
  swapped = TABLE._replace(grams=TABLE.grams[:, ::-1])
  sample(params, swapped, 0.1, targets.keys_of(range(4)), prompts_of(ROWS))
  assert len(traces) == 1 and np.any(first != other)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_for_accelerators_under_vmap(platform):
  model, params = transformer_target()

  def sample(params, keys, prompts):
    algorithm = superposed.superposed(
      model,
      params,
      max_length=MAX,
      max_new_tokens=NEW,
      num_candidates=5,
      scoring=superposed.interpolated(TABLE),
    )
    return base.run(keys, algorithm, base.start(keys, algorithm, prompts), 2)[0].tokens

  traced = jax.jit(jax.vmap(sample, in_axes=(None, 0, 0))).trace(
    params, targets.keys_of(range(4))[None], jax.tree.map(lambda leaf: leaf[None], prompts_of(ROWS))
  )
  assert "stablehlo" in traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"num_drafts": 0}, r"num_drafts\(0\): it has to be at least 1"),
    ({"num_candidates": 0}, r"num_candidates\(0\): it has to be at least 1"),
    ({"num_candidates": 8}, r"num_candidates\(8\): it has to be at most 7"),
    ({"temperature": 0.0}, r"temperature\(0.0\): it has to be above 0"),
  ],
)
def test_bad_settings_are_named(settings, message):
  settings = {"max_length": MAX, "max_new_tokens": NEW, "num_candidates": 4, **settings}

  def sample():
    algorithm = superposed.superposed(*LINEAR, **settings)
    state = base.start(targets.keys_of(range(4)), algorithm, prompts_of(ROWS))
    return algorithm.step(base.row_keys_at(targets.keys_of(range(4)), state.step), state)[0]

  with pytest.raises(ValueError, match=message) as error:
    jax.eval_shape(sample)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, value", [("alpha", -0.1), ("alpha", 1.1), ("penalty", -1.0)])
def test_bad_constants_of_the_scoring_are_named(name, value):
  with pytest.raises(ValueError, match=rf"{name}\({value}\): it has to be"):
    superposed.interpolated(TABLE, **{name: value})
