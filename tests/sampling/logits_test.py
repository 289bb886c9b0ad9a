"""Each transform against its definition by sets, and the law of a draw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import targets
from ancestral.sampling import logits as logits_lib
from ancestral.sampling import truncation

INF = np.inf


def transformed(transform, logits):
  """What a transform without feedback makes of logits [B, V]."""
  assert transform.init(len(logits)) == ()
  return np.asarray(transform.apply(jnp.asarray(logits, jnp.float32), None, ()))


def random_logits(rows=40, vocab_size=9, seed=0):
  """Rounded to halves: many ties."""
  return np.round(2 * np.random.default_rng(seed).normal(size=(rows, vocab_size)) * 2) / 2


def test_no_filter_at_the_ends_of_the_range():
  logits = np.vstack([random_logits(5, 6), [[-0.0, 0.0, 1e38, -3e38, 1e-37, -INF]]])
  logits = logits.astype(np.float32)
  for transform in (
    logits_lib.chain(),
    logits_lib.temperature(1.0),
    logits_lib.dynamic_temperature(1.0, 0.0, 0.5),
  ):
    np.testing.assert_array_equal(transformed(transform, logits), logits)


@pytest.mark.parametrize(
  "make, value, name",
  [
    (logits_lib.temperature, (-0.5,), "temperature"),
    (logits_lib.dynamic_temperature, (-1.0, 0.5), "dynamic_temperature value"),
    (logits_lib.dynamic_temperature, (1.0, -0.5), "dynamic_temperature spread"),
    (logits_lib.dynamic_temperature, (1.0, 0.5, -1.0), "dynamic_temperature exponent"),
  ],
)
def test_a_number_that_means_nothing_is_refused(make, value, name):
  with pytest.raises(ValueError, match=rf"^{name}\(-.* it has to be at least 0"):
    make(*value)


def test_a_tiny_temperature_is_greedy_and_finite():
  logits = np.array([[-80.0, 80.0, 79.99]], np.float32)
  out = transformed(logits_lib.temperature(1e-37), logits)
  np.testing.assert_array_equal(jax.nn.softmax(out), [[0.0, 1.0, 0.0]])


def test_greedy_takes_the_first_of_equals():
  out = transformed(logits_lib.greedy(), [[1.0, 3.0, 3.0], [-INF, -INF, -2.0]])
  np.testing.assert_array_equal(out, [[-INF, 3.0, -INF], [-INF, -INF, -2.0]])


def test_temperature_is_a_power_of_the_law():
  logits = random_logits()
  logits[:, 0] = -INF
  for t in (0.25, 1.7):
    law = targets.softmax(transformed(logits_lib.temperature(t), logits))
    power = targets.softmax(logits) ** (1 / t)
    np.testing.assert_allclose(law, power / power.sum(axis=1, keepdims=True), atol=1e-6)


def test_temperature_zero_is_greedy_and_its_gradient_is_finite():
  logits = random_logits()
  np.testing.assert_array_equal(
    transformed(logits_lib.temperature(0.0), logits), transformed(logits_lib.greedy(), logits)
  )
  total = lambda t: jnp.sum(
    jnp.where(
      jnp.isfinite(
        out := logits_lib.temperature(t).apply(jnp.asarray(logits, jnp.float32), None, ())
      ),
      out,
      0,
    )
  )
  assert np.isfinite(jax.grad(total)(0.0)) and jax.grad(total)(1.0) != 0


@pytest.mark.parametrize(
  "factory, values",
  [
    (logits_lib.temperature, [0.0, 0.5, 1.0, 2.0]),
    (lambda t: logits_lib.dynamic_temperature(t, 0.5), [0.0, 0.4, 1.0, 2.0]),
    (lambda spread: logits_lib.dynamic_temperature(1.0, spread), [0.0, 0.4, 1.0, 2.0]),
  ],
)
def test_settings_per_row_equal_the_rows_apart(factory, values):
  logits = random_logits(rows=4)
  together = jax.jit(lambda values, logits: factory(values).apply(logits, None, ()))(
    jnp.asarray(values), jnp.asarray(logits, jnp.float32)
  )
  for b, value in enumerate(values):
    np.testing.assert_array_equal(together[b], transformed(factory(value), logits[b : b + 1])[0])


def test_dynamic_temperature_goes_with_the_entropy():
  """By hand: of two equal tokens among four finite logits, H / H_max is log 2 / log 4."""
  far = -1e4
  logits = [[0.0, 0.0, far, far, -INF], [3.0, 3.0, 3.0, 3.0, 3.0], [9.0, far, far, far, -INF]]
  for value, spread, exponent in ((1.0, 0.5, 1.0), (0.3, 0.8, 2.0), (1.5, 0.2, 0.0)):
    out = transformed(logits_lib.dynamic_temperature(value, spread, exponent), logits)
    low, high = max(value - spread, 0), value + spread
    shares = [0.5**exponent, 1, 0.0**exponent]
    for row, given, share in zip(out, logits, shares, strict=True):
      t = low + (high - low) * share
      expected = np.array(given) / t if t > 0 else [9.0, *[-INF] * 4]
      np.testing.assert_allclose(row, expected, rtol=1e-5)


def test_dynamic_temperature_without_spread_is_a_temperature():
  logits = random_logits()
  for t in (0.0, 0.7):
    np.testing.assert_array_equal(
      transformed(logits_lib.dynamic_temperature(t, 0.0, 1.3), logits),
      transformed(logits_lib.temperature(t), logits),
    )


def test_entropy_is_that_of_the_law():
  logits = random_logits()
  logits[:, 2] = -INF
  expected = stats.entropy(targets.softmax(logits), axis=1)
  np.testing.assert_allclose(logits_lib.entropy(jnp.asarray(logits))[:, 0], expected, rtol=1e-5)


def test_chain_applies_in_order():
  logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]]))
  hot, nucleus = logits_lib.temperature(3.0), truncation.top_p(0.75)
  assert np.isfinite(transformed(logits_lib.chain(nucleus, hot), logits)).sum() == 2
  assert np.isfinite(transformed(logits_lib.chain(hot, nucleus), logits)).sum() == 3
  np.testing.assert_array_equal(
    transformed(logits_lib.chain(hot, nucleus), logits),
    transformed(nucleus, transformed(hot, logits)),
  )


def test_chain_carries_the_state_of_those_that_feed_back():
  def apply(logits, context, state):
    return logits - state[:, None]

  count = logits_lib.LogitsTransform(
    init=jnp.zeros,
    apply=apply,
    update=lambda model_logits, token, state: state + model_logits[:, 0] + token,
  )
  transform = logits_lib.chain(logits_lib.temperature(2.0), logits_lib.chain(count))
  state = transform.init(2)
  logits, token = jnp.array([[4.0, 2.0], [6.0, 0.0]]), jnp.array([1, 0])
  np.testing.assert_array_equal(transform.apply(logits, None, state), logits / 2)
  state = transform.update(logits, token, state)
  np.testing.assert_array_equal(transform.apply(logits, None, state), [[-3, -4], [-3, -6]])


def keys(num, seed=0):
  return jax.random.split(jax.random.key(seed), num)


@pytest.mark.parametrize("vocab_size", [1, 2, 17, 100])
def test_draw_follows_softmax(vocab_size):
  num, rng = 50_000, np.random.default_rng(vocab_size)
  row = rng.normal(size=vocab_size) * 2
  row[rng.random(vocab_size) < 0.2] = -INF
  row[0] = 1.0
  tokens = jax.jit(logits_lib.draw)(
    keys(num), jnp.broadcast_to(jnp.asarray(row, jnp.float32), (num, vocab_size))
  )
  assert tokens.dtype == jnp.int32
  law = targets.softmax(row)
  targets.check_law(tokens[:, None], law)
  counts = np.bincount(tokens, minlength=vocab_size)
  seen = num * law > 5
  statistic = np.square(counts - num * law)[seen] / (num * law)[seen]
  freedom = max(seen.sum() - 1, 1)
  assert statistic.sum() < stats.chi2.ppf(stats.norm.cdf(4), freedom)


def test_draw_is_wide_on_narrow_logits():
  row = jnp.asarray(np.random.default_rng(0).normal(size=50), jnp.bfloat16)
  draw = jax.jit(logits_lib.draw)
  narrow = draw(keys(64), jnp.broadcast_to(row, (64, 50)))
  wide = draw(keys(64), jnp.broadcast_to(row.astype(jnp.float32), (64, 50)))
  np.testing.assert_array_equal(narrow, wide)
  assert len(np.unique(narrow)) > 10  # each row has its key


def test_draw_keeps_the_tail():
  """2,000 tokens of p = 3e-8 come up with 6e-5 in total; JAX's default Gumbel gives 6.7e-6.

  Of 720,896 draws that is 43 +- 6.6; four standard errors exclude the 4.8 of a truncated tail.
  """
  num, vocab_size, tail = 11 << 16, 2048, 2000
  law = np.full(vocab_size, 3e-8)
  law[:: len(law) // 48][:48] = 0
  heads = np.flatnonzero(law == 0)
  law[heads] = (1 - 3e-8 * (vocab_size - len(heads))) / len(heads)
  row = jnp.asarray(np.log(law), jnp.float32)

  @jax.jit
  def count(key):
    def body(total, key):
      tokens = jax.vmap(lambda key: logits_lib.draw(key[None], row[None])[0])(
        jax.random.split(key, 1 << 14)
      )
      return total + jnp.sum(~jnp.isin(tokens, heads)), None

    return jax.lax.scan(body, jnp.int32(0), jax.random.split(key, num >> 14))[0]

  assert vocab_size - len(heads) == tail
  expected = num * 3e-8 * tail
  drawn = int(count(jax.random.key(0)))
  assert abs(drawn - expected) < 4 * expected**0.5
  assert expected - 4 * expected**0.5 > num * 6.7e-6 + 4 * (num * 6.7e-6) ** 0.5


def test_log_prob_is_the_log_of_softmax():
  logits = random_logits()
  logits[:, 3] = -INF
  token = np.arange(40) % 9
  out = logits_lib.log_prob(jnp.asarray(logits, jnp.float32), jnp.asarray(token))
  law = targets.softmax(logits)[np.arange(40), token]
  np.testing.assert_allclose(np.exp(out), law, atol=1e-6)
  assert np.all(np.isneginf(out[token == 3]))
  only = logits_lib.log_prob(jnp.array([[-INF, 7.3, -INF]]), jnp.array([1]))
  assert float(only[0]) == 0.0
