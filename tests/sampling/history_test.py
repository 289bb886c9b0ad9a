"""What looks back, against its definition on Python tuples; padding is full of garbage."""

import collections
import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.sampling import history
from ancestral.sampling import logits as logits_lib

INF = np.inf
COUNTED = {
  "whole": (history.whole, lambda length, prompt: range(length)),
  "output": (history.output, lambda length, prompt: range(prompt, length)),
  "last": (history.last(4), lambda length, prompt: range(max(length - 4, 0), length)),
}


def contexts(rows=60, width=14, vocab_size=4, seed=0):
  """Ragged rows over few tokens, so that they repeat; beyond their length, anything at all."""
  rng = np.random.default_rng(seed)
  length = rng.integers(1, width + 1, rows)
  prompt = rng.integers(1, length + 1)
  garbage = rng.integers(-9, 3 * vocab_size, (rows, width))
  inside = np.arange(width) < length[:, None]
  tokens = np.where(inside, rng.integers(0, vocab_size, (rows, width)), garbage)
  return logits_lib.Context(*(jnp.asarray(x, jnp.int32) for x in (tokens, length, prompt)))


def random_logits(rows=60, vocab_size=6, seed=1):
  """With zeros of both signs, and tokens filtered already."""
  rng = np.random.default_rng(seed)
  special = rng.choice([0.0, -0.0, -INF, 1.0], (rows, vocab_size))
  logits = np.where(rng.random((rows, vocab_size)) < 0.3, special, rng.normal(size=special.shape))
  logits[:, -1] = 0.5
  return logits.astype(np.float32)


def transformed(transform, logits, context):
  assert transform.init(len(logits)) == ()
  return np.asarray(jax.jit(transform.apply)(jnp.asarray(logits), context, ()))


def brute(change, logits, context, counted, settings):
  """change(row, tokens, counts, setting) of rows in float64: a tuple, and the places counted."""
  out = np.asarray(logits, np.float64).copy()
  for b, (tokens, length, prompt) in enumerate(zip(*map(np.asarray, context), strict=True)):
    places = set(counted(int(length), int(prompt)))
    change(out[b], tuple(tokens[:length].tolist()), places, settings[b])
  return out


# Settings differ from row to row: 60 rows, and 4, 5 or 3 values.
VALUES = np.tile(np.array([1.7, 1.0, 0.6, 2.5], np.float32), 15)


@pytest.mark.parametrize(
  "make, change, counted",
  [
    (history.repetition_penalty, lambda z, c, v: z * v if z < 0 else z / v, "whole"),
    (history.repetition_penalty, lambda z, c, v: z * v if z < 0 else z / v, "last"),
    (history.frequency_penalty, lambda z, c, v: z - v * c, "output"),
    (history.presence_penalty, lambda z, c, v: z - v, "last"),
  ],
)
def test_penalties_by_definition(make, change, counted):
  function, places = COUNTED[counted]

  def change_row(row, tokens, counts, value):
    for token, c in collections.Counter(tokens[p] for p in counts).items():
      row[token] = change(row[token], c, value)

  logits, context = random_logits(), contexts()
  out = transformed(make(jnp.asarray(VALUES), function), logits, context)
  expected = brute(change_row, logits, context, places, VALUES)
  assert np.any(expected != logits)
  np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("counted", COUNTED)
def test_no_repeat_ngram_by_definition(counted):
  function, places = COUNTED[counted]
  changed = set()

  def change_row(row, tokens, counts, n):
    grams = [range(p, p + n) for p in range(len(tokens) - n + 1)] if n else []
    written = {tuple(tokens[p] for p in gram) for gram in grams if counts.issuperset(gram)}
    tail = range(len(tokens) - n + 1, len(tokens))
    forbidden = set()
    if counts.issuperset(tail):
      start = tuple(tokens[p] for p in tail)
      forbidden = {v for v in range(len(row)) if (*start, v) in written}
    if set(np.flatnonzero(row > -INF)) - forbidden:
      row[sorted(forbidden)] = -INF
    changed.update({n} if forbidden else ())

  logits, context, n = random_logits(), contexts(), np.arange(60) % 5
  out = transformed(history.no_repeat_ngram(jnp.asarray(n), function), logits, context)
  expected = brute(change_row, logits, context, places, n)
  np.testing.assert_array_equal(out, expected)
  assert changed >= {1, 2, 3} and 0 not in changed


def dry_row(row, tokens, counts, setting, breakers):
  """Koboldcpp's and llama.cpp's definition, by looking at every place."""
  multiplier, growth, allowed = setting
  longest = collections.defaultdict(int)
  end = len(tokens)
  broken = max(
    (
      p + len(breaker)
      for breaker in breakers
      for p in range(end - len(breaker) + 1)
      if tokens[p : p + len(breaker)] == breaker and counts.issuperset(range(p, p + len(breaker)))
    ),
    default=0,
  )
  for p in counts:
    m = 0
    while (
      p - 1 - m >= 0
      and end - 1 - m >= broken
      and {p - 1 - m, end - 1 - m} <= counts
      and tokens[p - 1 - m] == tokens[end - 1 - m]
    ):
      m += 1
    longest[tokens[p]] = max(longest[tokens[p]], m)
  for token, m in longest.items():
    if m >= allowed and (token,) not in breakers:
      row[token] -= multiplier * growth ** (m - allowed)


def assert_several_penalties(logits, out):
  finite = out > -INF
  assert len(set(np.round(logits[finite] - out[finite], 3))) >= 4


DRY = [(0.8, 1.75, 1), (1.5, 1.2, 2), (0.3, 3.0, 2), (2.0, 1.0, 3)]


def dry_of_rows(num_rows, counted, breakers):
  """The transform with the four settings in turn, and the settings."""
  settings = [DRY[b % 4] for b in range(num_rows)]
  multiplier, growth, allowed = (jnp.array(x) for x in zip(*settings, strict=True))
  return history.dry(multiplier, growth, allowed, counted, breakers), settings


@pytest.mark.parametrize(
  "breakers, counted",
  [
    ((), "whole"),
    (((2,),), "output"),
    (((1, 0), (2,)), "whole"),
    (((0, 1, 1), (2, 2)), "last"),
  ],
)
def test_dry_by_definition(breakers, counted):
  function, places = COUNTED[counted]
  logits, context = random_logits(), contexts(width=24, vocab_size=3)
  transform, settings = dry_of_rows(60, function, breakers)
  expected = brute(lambda *row: dry_row(*row, breakers), logits, context, places, settings)
  assert_several_penalties(logits, expected)
  out = transformed(transform, logits, context)
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_dry_equals_the_vectors_of_llamacpp():
  """Those of its tests/test-sampling.cpp, from a uniform law; no other text has the breaker."""
  texts = [[0, 1], [0, 1, 2, 0, 1], [0, 1, 3, 4, 0, 1], [0, 1, 2, 0, 1], [0, 1, 2, 3, 4, 0, 1]]
  expected = np.array(
    [
      [0.25, 0.25, 0.25, 0.25, 0],
      [0.296923, 0.296923, 0.109232, 0.296923, 0],
      [0.2, 0.2, 0.2, 0.2, 0.2],
      [0.241818, 0.241818, 0.032727, 0.241818, 0.241818],
      [0.2, 0.2, 0.2, 0.2, 0.2],
    ]
  )
  length = jnp.array([len(text) for text in texts])
  tokens = jnp.array([text + [2] * (7 - len(text)) for text in texts])
  multiplier, allowed = jnp.array([1, 1, 1, 2, 1]), jnp.array([2, 2, 2, 2, 4])
  transform = history.dry(multiplier, 1.1, allowed, history.last(length), ((3,),))
  logits = np.where(expected > 0, 0, -INF).astype(np.float32)
  out = transformed(transform, logits, logits_lib.Context(tokens, length, length))
  np.testing.assert_allclose(jax.nn.softmax(out), expected, atol=1e-6)


def test_dry_of_an_endless_repeat_leaves_a_law():
  context = logits_lib.Context(jnp.full((8, 400), 3), jnp.full(8, 400), jnp.full(8, 1))
  logits = np.tile([[-INF, -INF, -INF, 2.0], [0.0, 0.0, 0.0, 9.0]], (4, 1)).astype(np.float32)
  transform = history.dry(1e9, jnp.repeat(jnp.array([1.0, 1.001, 1.75, 50.0]), 2))
  law = jax.nn.softmax(transformed(transform, logits, context))
  expected = np.tile([[0, 0, 0, 1], [1 / 3, 1 / 3, 1 / 3, 0]], (4, 1))
  np.testing.assert_allclose(law, expected, atol=1e-6)


TRANSFORMS = {
  "repetition": history.repetition_penalty(1.3),
  "frequency": history.frequency_penalty(0.4),
  "presence": history.presence_penalty(0.4),
  "everything": history.presence_penalty(0.4, lambda context: jnp.ones(context.tokens.shape, bool)),
  "ngram": history.no_repeat_ngram(2),
  "dry": history.dry(0.8, breakers=((1,), (2, 3))),
}


@jax.jit
def transformed_by_all(logits, context):
  return {name: make.apply(logits, context, ()) for name, make in TRANSFORMS.items()}


def test_padding_never_counts():
  logits, context = jnp.asarray(random_logits()), contexts()
  inside = np.arange(14)[None, :] < np.asarray(context.length)[:, None]
  cleared = context._replace(tokens=jnp.where(inside, context.tokens, 0))
  wider = context._replace(tokens=jnp.pad(context.tokens, ((0, 0), (0, 5)), constant_values=2))
  outs = [transformed_by_all(logits, text) for text in (context, cleared, wider)]
  for name in TRANSFORMS:
    assert np.any(outs[0][name] != logits)
    np.testing.assert_array_equal(outs[0][name], outs[1][name], err_msg=name)
    np.testing.assert_array_equal(outs[0][name], outs[2][name], err_msg=name)


def test_off_is_off_bit_by_bit():
  off = [
    history.repetition_penalty(1),
    history.frequency_penalty(0),
    history.presence_penalty(0.0),
    history.no_repeat_ngram(0),
    history.dry(0.0),
    history.dry(0.0, 1e9, 1),
    history.presence_penalty(3.0, history.last(0)),
  ]
  logits, context = jnp.asarray(random_logits()), contexts()
  outs = jax.jit(lambda logits: [transform.apply(logits, context, ()) for transform in off])(logits)
  for out in outs:
    np.testing.assert_array_equal(
      np.asarray(out).view(np.uint32), np.asarray(logits).view(np.uint32)
    )


def test_what_would_forbid_everything_forbids_nothing():
  context = logits_lib.Context(jnp.array([[0, 1, 2], [0, 1, 1]]), jnp.full(2, 3), jnp.ones(2, int))
  logits = np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]], np.float32)
  out = transformed(history.no_repeat_ngram(1), logits, context)
  np.testing.assert_array_equal(out, [[1, 2, 3], [-INF, -INF, 3]])


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: history.repetition_penalty(0.0), r"repetition_penalty\(0.0\).*above 0; 1 is off"),
    (lambda: history.no_repeat_ngram(-1), r"no_repeat_ngram\(-1\)"),
    (lambda: history.last(-2), r"last\(-2\)"),
    (lambda: history.dry(-1.0), r"dry\(-1.0\)"),
    (lambda: history.dry(1.0, 0.5), r"dry base\(0.5\): it has to be at least 1"),
    (lambda: history.dry(1.0, allowed_length=0), r"dry allowed_length\(0\)"),
  ],
)
def test_a_number_that_means_nothing_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def sizes(jaxpr):
  """The sizes of all intermediate arrays, those of inner loops included."""
  for equation in jaxpr.eqns:
    yield from (math.prod(var.aval.shape) for var in equation.outvars)
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      yield from sizes(inner)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_memory_is_linear(name):
  context = contexts(rows=2, width=300)
  jaxpr = jax.make_jaxpr(lambda z: TRANSFORMS[name].apply(z, context, ()))(jnp.zeros((2, 500)))
  assert max(sizes(jaxpr.jaxpr)) <= 2 * 2 * 500  # a square would have 2 * 300 * 300


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_for_accelerators(platform):
  traced = transformed_by_all.trace(jnp.asarray(random_logits()), contexts())
  assert "stablehlo" in traced.lower(lowering_platforms=(platform,)).as_text()


def test_vmap_over_an_outer_axis_equals_the_parts():
  logits, context = jnp.asarray(random_logits()), contexts()
  split = lambda tree: jax.tree.map(lambda leaf: leaf.reshape(2, 30, *leaf.shape[1:]), tree)
  outs = jax.vmap(transformed_by_all)(split(logits), split(context))
  for name, out in transformed_by_all(logits, context).items():
    np.testing.assert_allclose(outs[name].reshape(60, 6), out, rtol=1e-5, atol=1e-6)
