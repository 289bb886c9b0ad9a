"""Sampling by beams: the law of the draw, by going through every sequence."""

import collections
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.models import toy
from ancestral.sampling import base, beam, decode, stochastic_beam, truncation

NUM = 60_000
PROMPT = (1, 0)
VOCABULARY, ROOM, STOP = 3, 3, 2


def sequences():
  """Those that end in the stop token, or have all the tokens there is room for: 15."""
  every = [y for n in (1, 2, 3) for y in itertools.product(range(VOCABULARY), repeat=n)]
  return [y for y in every if STOP not in y[:-1] and (y[-1] == STOP or len(y) == ROOM)]


def law_of(conditional):
  """Of each of `sequences`."""
  context = lambda y, t: (*PROMPT, *y)[t : t + 2]
  return np.array(
    [math.prod(conditional[context(y, t)][v] for t, v in enumerate(y)) for y in sequences()]
  )


def drawn(factory, num_beams, num=NUM, stop=(STOP,), **settings):
  """The beams of `num` rows of one prompt, and the table model's law of a token."""
  model, params = targets.table_target(VOCABULARY, order=2, seed=4)

  @jax.jit
  def run(params, keys, prompts):
    algorithm = factory(
      model,
      params,
      num_beams=num_beams,
      max_length=2 + ROOM,
      max_new_tokens=ROOM,
      stop=stop,
      **settings,
    )
    return beam.search(keys, algorithm, prompts)

  prompts = decode.Prompts(jnp.tile(jnp.array([PROMPT]), (num, 1)), jnp.full(num, 2))
  beams = run(params, base.row_keys(jax.random.key(1), jnp.arange(num)), prompts)
  return jax.tree.map(np.asarray, beams), targets.softmax(params)


def index_of(beams):
  """Which of `sequences` each hypothesis is, [B, K]; -1 for none."""
  place = np.full((VOCABULARY + 1,) * ROOM, -1)
  for i, y in enumerate(sequences()):
    place[(*y, *[VOCABULARY] * (ROOM - len(y)))] = i
  beyond = np.arange(2, 2 + ROOM) >= beams.length[:, :, None]
  new = np.where(beyond, VOCABULARY, beams.tokens[:, :, 2:])
  assert np.all(beams.tokens[:, :, 2:][beyond] == 0)
  return np.where(np.isfinite(beams.score), place[tuple(np.moveaxis(new, 2, 0))], -1)


@pytest.fixture(scope="module")
def three():
  return drawn(stochastic_beam.stochastic_beam_search, 3)


def test_draws_are_without_replacement(three):
  """Plackett-Luce: p(a) p(b) / (1 - p(a)) p(c) / (1 - p(a) - p(b)), in the order of the scores."""
  beams, conditional = three
  p = law_of(conditional)
  law = np.zeros((15, 15, 15))
  for a, b, c in itertools.permutations(range(15), 3):
    law[a, b, c] = p[a] * p[b] / (1 - p[a]) * p[c] / (1 - p[a] - p[b])
  index = index_of(beams)
  targets.check_law(index, law)
  targets.check_law(index[:, :2], law.sum(axis=2))
  targets.check_law(index[:, 1:2], law.sum(axis=(0, 2)))
  targets.check_law(index[:, 2:], law.sum(axis=(0, 1)))
  included = np.array([law[i].sum() + law[:, i].sum() + law[:, :, i].sum() for i in range(15)])
  targets.check_law(index.reshape(-1, 1), included / 3)
  np.testing.assert_allclose(beams.log_prob, np.log(p)[index], atol=1e-5)
  assert np.all(np.diff(beams.score, axis=1) <= 0)


def test_weighted_draws_are_unbiased(three):
  """The mean of sum_k w_k 1[y_k = y] is p(y), for every y: to four standard errors."""
  beams, conditional = three
  weights = np.exp(stochastic_beam.log_weights(beams))
  index, p = index_of(beams)[:, :2], law_of(conditional)
  for i in range(15):
    estimates = np.sum(weights * (index == i), axis=1)
    assert abs(estimates.mean() - p[i]) < 4 * estimates.std() / NUM**0.5, i
  total = weights.sum(axis=1)
  assert 0.1 < total.std() < 10 and abs(total.mean() - 1) < 4 * total.std() / NUM**0.5


def test_all_sequences_are_drawn_where_they_are_few():
  beams, conditional = drawn(stochastic_beam.stochastic_beam_search, 20, num=4)
  p = law_of(conditional)
  for b in range(4):
    index = index_of(beams)[b]
    assert sorted(index[:15]) == list(range(15)) and np.all(index[15:] == -1)
    weights = np.exp(stochastic_beam.log_weights(beams))[b]
    np.testing.assert_allclose(weights, [*p[index[:15]], 0, 0, 0, 0], rtol=1e-4)
  assert len({tuple(row) for row in index_of(beams)}) == 4  # each in an order of its own


def test_one_beam_samples_from_the_transformed_law():
  beams, conditional = drawn(
    stochastic_beam.stochastic_beam_search, 1, stop=(), transform=truncation.top_k(2)
  )
  kept = np.where(conditional >= np.sort(conditional)[..., -2:-1], conditional, 0)
  kept /= kept.sum(axis=-1, keepdims=True)
  targets.check_law(beams.tokens[:, 0, 2:], toy.table_law(kept, PROMPT, ROOM))


def test_rare_and_impossible_sequences_keep_their_order():
  """Conditioning on the maximum keeps Gumbels' order and their law, far out in the tails too."""
  rng = np.random.default_rng(0)
  values = rng.gumbel(size=(200, 7)) + rng.normal(size=(200, 7)) * 20
  values[:, 2] = -np.inf
  values[0] = -np.inf
  maximum = rng.gumbel(size=(200, 1)) + np.log(np.sum(np.exp(values), axis=1, keepdims=True) + 1e-9)
  moved = stochastic_beam._given_maximum(
    jnp.asarray(values, jnp.float32), jnp.asarray(maximum, jnp.float32)
  )
  moved = np.asarray(moved)
  assert np.all(moved[0] == -np.inf) and np.all(moved[:, 2] == -np.inf)
  np.testing.assert_allclose(moved[1:].max(axis=1), maximum[1:, 0], rtol=1e-6)
  ordered = np.take_along_axis(moved, np.argsort(values, axis=1), axis=1)[1:, 1:]
  assert np.all(np.isfinite(ordered)) and np.all(np.diff(ordered, axis=1) >= 0)
  # Truncated Gumbels by their quantiles: exp(-exp(-x)) is uniform, and is scaled to the maximum.
  x, largest, top = (
    np.asarray(v, np.longdouble) for v in (values, values.max(1, keepdims=True), maximum)
  )
  with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
    expected = -np.log(np.exp(-top) - np.exp(-largest) + np.exp(-x))
  fine = np.isfinite(expected) & (np.abs(expected) < 30) & (np.abs(x) < 30)
  assert fine.sum() > 300
  np.testing.assert_allclose(moved[fine], expected[fine].astype(float), atol=2e-3)


def orders(weights, count):
  """Ordered draws without replacement of `count` of {item: weight}: (items, probability)."""
  if count == 0 or not weights:
    yield (), 1.0
    return
  total = sum(weights.values())
  for item, weight in weights.items():
    rest = {other: w for other, w in weights.items() if other != item}
    for items, probability in orders(rest, count - 1):
      yield (item, *items), weight / total * probability


def test_beam_sample_draws_candidates_as_transformers_does():
  """The law of the two best, by going through every order of four candidates, twice."""
  beams, conditional = drawn(stochastic_beam.beam_sample, 2, length_penalty=0.5)
  p = dict(zip(sequences(), law_of(conditional), strict=True))
  score = lambda y: math.log(p[y]) / len(y) ** 0.5
  states = {(((),), ()): 1.0}  # (running beams, finished) -> probability
  for n in range(1, ROOM + 1):
    following = collections.Counter()
    for (running, finished), reached in states.items():
      mass = lambda y: math.prod(conditional[(*PROMPT, *y)[t : t + 2]][v] for t, v in enumerate(y))
      weights = {(*y, v): mass((*y, v)) for y in running for v in range(VOCABULARY)}
      for items, probability in orders(weights, 4 if n < ROOM else 2):
        pool = finished + tuple(y for y in items[:2] if y[-1] == STOP or n == ROOM)
        pool = tuple(sorted(pool, key=score, reverse=True)[:2])
        on = sorted((y for y in items if y[-1] != STOP), key=lambda y: -weights[y])[:2]
        following[tuple(sorted(on)), pool] += reached * probability
    states = following
  law = np.zeros((15, 15))
  for (_, pool), probability in states.items():
    law[tuple(sequences().index(y) for y in pool)] += probability
  targets.check_law(index_of(beams), law)
