"""Beams against exhaustive search, and against a search over dictionaries."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.sampling import beam
from ancestral.sampling import logits as logits_lib

PENALTIES = (0.0, 0.5, 1.0, 2.0, -0.7)
PROMPTS = ((3,), (1, 2), (0, 3, 1), (2, 2), (1,))


def search_of(algorithm):
  """(params, rows, *settings) -> the beams of `algorithm(params, *settings)`, compiled once."""

  @jax.jit
  def run(params, keys, prompts, settings):
    return beam.search(keys, algorithm(params, *settings), prompts)

  return lambda params, rows, *settings: jax.tree.map(
    np.asarray, run(params, targets.keys_of(range(len(rows))), targets.prompts_of(rows), settings)
  )


def table_law(params):
  """tokens -> probabilities of the next, of a table model."""
  conditional = targets.softmax(params)
  order = conditional.ndim - 1
  return lambda tokens: conditional[((0,) * order + tuple(tokens))[len(tokens) :]]


def reference(law, prompt, width, room, stop, penalty, taken=lambda n, v: 0.0, trail=None):
  """Beam search over dictionaries, in float64, that goes on to the end of the room.

  `law` maps a sequence to probabilities, `taken` a step and a token to what the token costs;
  `trail` gathers the tokens by which beams ran on. Returns (score, continuation,
  log-probability) of each.
  """
  running, pool = {(): (0.0, 0.0)}, []
  for n in range(1, room + 1):
    candidates = {}
    for y, (priority, log_prob) in running.items():
      for v, p in enumerate(law(prompt + y)):
        if p > 0:
          candidates[(*y, v)] = (priority + math.log(p) - taken(n, v), log_prob + math.log(p))
    ranked = sorted(candidates, key=lambda y: -candidates[y][0])
    for y in ranked[:width]:
      if y[-1] in stop or n == room:
        pool.append((candidates[y][0] / n**penalty, y, candidates[y][1]))
    running = {y: candidates[y] for y in [y for y in ranked if y[-1] not in stop][:width]}
    if trail is not None:
      trail.extend((n, y[-1]) for y in running)
    pool = sorted(pool, reverse=True)[:width]
  return pool


def check_row(beams, b, prompt, expected, atol=1e-4):
  """Row b holds `expected`, in its order, and then nothing."""
  width = beams.score.shape[1]
  assert np.all(np.isneginf(beams.score[b, len(expected) :]))
  assert np.all(np.isneginf(beams.log_prob[b, len(expected) :]))
  for k, (score, y, log_prob) in enumerate(expected[:width]):
    whole = (*prompt, *y)
    assert beams.length[b, k] == len(whole), (b, k)
    np.testing.assert_array_equal(beams.tokens[b, k, : len(whole)], whole)
    assert np.all(beams.tokens[b, k, len(whole) :] == 0)
    np.testing.assert_allclose(beams.score[b, k], score, atol=atol)
    np.testing.assert_allclose(beams.log_prob[b, k], log_prob, atol=atol)


# What has to be wide enough is the step at which most candidates end: all of the last.
@pytest.mark.parametrize(
  "stop, room, width", [((2,), 5, 324), ((1, 3), 6, 128)], ids=["one", "two"]
)
def test_wide_enough_beams_are_exhaustive(stop, room, width):
  everything = [
    y
    for n in range(1, room + 1)
    for y in itertools.product(range(4), repeat=n)
    if not set(y[:-1]) & set(stop) and (y[-1] in stop or n == room)
  ]
  model, _ = targets.table_target(4, order=6)
  settings = {"num_beams": width, "max_length": room + 1, "max_new_tokens": room, "stop": stop}
  penalties, lengths = PENALTIES[:4], set()
  run = search_of(
    lambda params, penalty: beam.beam_search(model, params, length_penalty=penalty, **settings)
  )
  for seed in range(3):
    params = 1.5 * targets.table_target(4, order=6, seed=seed)[1]
    law = table_law(params)
    total = {y: sum(math.log(law((3, *y[:t]))[v]) for t, v in enumerate(y)) for y in everything}
    beams = run(params, [(3,)] * 4, jnp.array(penalties))
    for b, penalty in enumerate(penalties):
      ranked = sorted(((total[y] / len(y) ** penalty, y) for y in everything), reverse=True)
      scores = [score for score, _ in ranked[:width]]
      np.testing.assert_allclose(beams.score[b, : len(scores)], scores, atol=2e-5)
      best = ranked[0][1]
      check_row(jax.tree.map(lambda leaf: leaf[:, :1], beams), b, (3,), [(*ranked[0], total[best])])
      lengths.add(len(best))
  assert len(lengths) > 1  # stop tokens and penalties matter


@pytest.mark.parametrize("width, stop", [(1, (2,)), (4, (1, 3))])
def test_equals_a_search_over_dictionaries(width, stop):
  """Which never stops early, so it shows that stopping early costs nothing."""
  model, _ = targets.table_target(5, order=2)
  traces = []

  def algorithm(params, length_penalty, room):
    traces.append(1)
    settings = {"max_new_tokens": room, "stop": stop, "length_penalty": length_penalty}
    return beam.beam_search(model, params, num_beams=width, max_length=9, **settings)

  run = search_of(algorithm)
  for seed in range(4):
    params = 1.5 * targets.table_target(5, order=2, seed=seed)[1]
    for room in (6, (6, 1, 4, 9, 3)):
      beams = run(
        params, PROMPTS, jnp.array(PENALTIES), jnp.asarray(np.broadcast_to(room, 5), jnp.int32)
      )
      for b, prompt in enumerate(PROMPTS):
        most = min(np.broadcast_to(room, 5)[b], 9 - len(prompt))
        expected = reference(table_law(params), prompt, width, most, stop, PENALTIES[b])
        assert len(expected) == width or most == 1
        check_row(beams, b, prompt, expected)
  assert len(traces) == 1  # one program for all prompts, params and settings


def test_one_beam_is_greedy_decoding():
  model, params = targets.table_target(6, order=2, seed=3)
  law, lengths = targets.softmax(params), set()
  prompts = list(itertools.product(range(6), repeat=2))

  def greedy(prompt):
    tokens, total = prompt, 0.0
    while len(tokens) < 10 and (len(tokens) == 2 or tokens[-1] != 2):
      best = int(np.argmax(law[tokens[-2:]]))
      tokens, total = (*tokens, best), total + math.log(law[tokens[-2:]][best])
    return tokens, total

  settings = {"num_beams": 1, "max_length": 10, "max_new_tokens": 8, "stop": (2,)}
  run = search_of(
    lambda params, penalty: beam.beam_search(model, params, length_penalty=penalty, **settings)
  )
  for penalty in (0.0, -1.0):
    beams = run(params, prompts, jnp.float32(penalty))
    for b, prompt in enumerate(prompts):
      tokens, total = greedy(prompt)
      score = total / (len(tokens) - 2) ** penalty
      check_row(beams, b, prompt, [(score, tokens[2:], total)])
      lengths.add(len(tokens))
  assert len(lengths) > 3


def test_one_beam_goes_on_past_greedys_stop_where_that_pays():
  """From token 1: stop with 0.6, or go on to token 2 with 0.4, where the stop is certain."""
  model, _ = targets.table_target(3, order=1)
  law = np.array([[1, 0, 0], [0.6, 0, 0.4], [1, 0, 0]])
  with np.errstate(divide="ignore"):
    params = jnp.asarray(np.log(law), jnp.float32)
  run = search_of(
    lambda params, penalty: beam.beam_search(
      model,
      params,
      num_beams=1,
      max_length=9,
      max_new_tokens=5,
      stop=(0,),
      length_penalty=penalty,
    )
  )
  beams = run(params, [(1,)] * 3, jnp.array([0.0, 1.0, 0.8]))
  np.testing.assert_array_equal(beams.length[:, 0], [2, 3, 2])  # 2^0.8 < log 0.4 / log 0.6 < 2
  np.testing.assert_allclose(
    beams.score[:, 0], [np.log(0.6), np.log(0.4) / 2, np.log(0.6)], rtol=1e-5
  )


def once():
  """Forbids the tokens drawn so far, which it knows by feedback alone."""
  return logits_lib.LogitsTransform(
    lambda batch_size: jnp.zeros((batch_size, 5), bool),
    lambda logits, context, seen: jnp.where(seen, -jnp.inf, logits),
    lambda model_logits, token, seen: seen | jax.nn.one_hot(token, 5, dtype=bool),
  )


def test_feedback_follows_its_beam_and_parameters_may_be_per_row():
  model, params = targets.table_target(5, order=2, seed=2)
  temperatures = np.array([0.5, 1.0, 2.0, 1.0, 0.7])
  run = search_of(
    lambda params, temperature: beam.beam_search(
      model,
      params,
      num_beams=3,
      max_length=8,
      max_new_tokens=4,
      stop=(1,),
      transform=logits_lib.chain(logits_lib.temperature(temperature), once()),
    )
  )
  beams = run(params, PROMPTS, jnp.asarray(temperatures, jnp.float32))
  for b, prompt in enumerate(PROMPTS):
    warm = table_law(np.asarray(params) / temperatures[b])

    def law(tokens, warm=warm, prompt=prompt):
      left = warm(tokens) * ~np.isin(np.arange(5), tokens[len(prompt) :])
      return left / left.sum()

    check_row(beams, b, prompt, reference(law, prompt, 3, 4, (1,), 1.0))


def test_beams_that_are_left_no_token_are_dropped():
  """Of five tokens that may be used once, 65 sequences end in token 0, and one of them must."""
  model, params = targets.table_target(5, order=1)
  run = search_of(
    lambda params: beam.beam_search(
      model, params, num_beams=70, max_length=9, max_new_tokens=7, stop=(0,), transform=once()
    )
  )
  beams = run(params, [(1,), (2, 3)])
  for b, prompt_length in enumerate((1, 2)):
    assert np.sum(beams.score[b] > -np.inf) == np.sum(beams.log_prob[b] > -np.inf) == 65
    np.testing.assert_allclose(np.exp(beams.log_prob[b, :65]).sum(), 1, rtol=1e-5)
    for k in range(65):
      y = beams.tokens[b, k, prompt_length : beams.length[b, k]]
      assert y[-1] == 0 and len(set(y)) == len(y)


def test_equals_rank_by_index_and_rows_without_room_hold_their_prompt():
  model, params = targets.table_target(4, order=1)
  run = search_of(
    lambda params, room: beam.beam_search(
      model, params, num_beams=5, max_length=3, max_new_tokens=room
    )
  )
  beams = run(jnp.zeros_like(params), [(1,), (3, 2, 1), (2,)], jnp.array([0, 5, 2]))
  np.testing.assert_array_equal(beams.length[:, :4].T, [[1, 3, 3]] * 4)
  np.testing.assert_array_equal(beams.tokens[:2, 0], [[1, 0, 0], [3, 2, 1]])
  np.testing.assert_array_equal(beams.score[:2, :2], [[0, -np.inf], [0, -np.inf]])
  np.testing.assert_array_equal(beams.tokens[2, :, 1:], [[0, 0], [0, 1], [0, 2], [0, 3], [1, 0]])


@pytest.mark.parametrize("groups, size, stop", [(2, 2, (1, 3)), (3, 1, ())])
def test_diverse_beams_equal_a_search_over_dictionaries(groups, size, stop):
  model, params = targets.table_target(5, order=2, seed=5)
  diversities, penalties = (0.0, 0.3, 0.9, 2.5, 0.6), (1.0, 1.0, 0.0, 0.5, 2.0)
  run = search_of(
    lambda params, diversity, penalty: beam.diverse_beam_search(
      model,
      params,
      num_beams=groups * size,
      num_groups=groups,
      diversity=diversity,
      max_length=9,
      max_new_tokens=6,
      stop=stop,
      length_penalty=penalty,
    )
  )
  beams = run(params, PROMPTS, jnp.array(diversities), jnp.array(penalties))
  distinct = []
  for b, prompt in enumerate(PROMPTS):
    trail, expected = [], []
    for _ in range(groups):
      own = []
      cost = lambda n, v, before=tuple(trail), rate=diversities[b]: rate * before.count((n, v))
      expected += reference(table_law(params), prompt, size, 6, stop, penalties[b], cost, own)
      trail += own
    expected = sorted(expected, key=lambda hypothesis: -hypothesis[0])
    if diversities[b] > 0:  # without a penalty, groups repeat each other, and every score is tied
      check_row(beams, b, prompt, expected)
    distinct.append(len({y for _, y, _ in expected}))
  assert distinct[0] == size < max(distinct)
  np.testing.assert_allclose(beams.score[0, ::groups], beams.score[0, groups - 1 :: groups])


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"num_beams": 0}, "num_beams=0 is not a multiple of num_groups=1"),
    ({"num_beams": 4, "num_groups": 3}, "num_beams=4 is not a multiple of num_groups=3"),
    ({"num_beams": 4, "num_groups": 2, "diversity": -1.0}, r"diversity\(-1.0\)"),
  ],
)
def test_bad_settings_are_named(settings, message):
  model, params = targets.table_target()
  settings = {"num_groups": 1, "diversity": 0.5, "max_length": 4, "max_new_tokens": 2, **settings}
  with pytest.raises(ValueError, match=message):
    beam.diverse_beam_search(model, params, **settings)
