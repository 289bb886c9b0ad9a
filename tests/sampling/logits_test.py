"""Each transform against its definition by sets, and the law of a draw."""

import warnings

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


AWKWARD = np.array(
  [
    [0.0, -0.0, 0.0, -0.0, 1.0, -1.0],
    [-0.0, 0.0, -1.0, -1.0, -INF, -INF],
    [1e38, -1e38, 3e38, -3e38, 1e-37, -1e-37],
    [2.0, 2.0, 2.0, 2.0, 2.0, 2.0],
    [-INF, -INF, 5.0, -INF, -INF, -INF],
    [-1e-30, -2e-30, -1e30, 1e-30, 2e-30, 1e30],
    [
      1.0,
      np.nextafter(np.float32(1), np.float32(2)),
      np.nextafter(np.float32(1), np.float32(0)),
      -1.0,
      np.nextafter(np.float32(-1), np.float32(0)),
      -INF,
    ],
  ],
  np.float32,
)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 6, 100])
@pytest.mark.parametrize("logits", [random_logits(), AWKWARD], ids=["ties", "awkward"])
def test_top_k_by_definition(logits, k):
  out = transformed(truncation.top_k(k), logits)
  expected = targets.filtered(logits, lambda row: targets.top_k_set(row, k))
  np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.77, 0.999, 1.0])
def test_top_p_by_definition(p):
  logits = random_logits()
  out = transformed(truncation.top_p(p), logits)
  expected = targets.filtered(logits, lambda row: targets.top_p_set(row, p))
  np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("p", [1e-6, 0.6, 0.97])
def test_top_p_of_awkward_floats(p):
  out = transformed(truncation.top_p(p), AWKWARD)
  expected = targets.filtered(AWKWARD, lambda row: targets.top_p_set(row, p))
  np.testing.assert_array_equal(out, expected)


def test_top_p_keeps_the_token_that_crosses_and_ties_stand_together():
  logits = np.log([[0.5, 0.3, 0.2], [0.4, 0.3, 0.3]])
  np.testing.assert_array_equal(
    np.isfinite(transformed(truncation.top_p(0.6), logits)), [[1, 1, 0], [1, 1, 1]]
  )


@pytest.mark.parametrize("p", [1e-45, 1e-38])
def test_top_p_towards_zero_is_greedy(p):
  logits = np.random.default_rng(0).normal(size=(5, 30))
  out = transformed(truncation.top_p(p), logits)
  np.testing.assert_array_equal(out, transformed(logits_lib.greedy(), logits))


def test_no_filter_at_the_ends_of_the_range():
  logits = np.vstack([AWKWARD, random_logits(5, 6)]).astype(np.float32)
  for transform in (
    truncation.top_k(6),
    truncation.top_p(1.0),
    logits_lib.chain(),
    logits_lib.temperature(1.0),
  ):
    np.testing.assert_array_equal(transformed(transform, logits), logits)


@pytest.mark.parametrize(
  "make, value", [("temperature", -0.5), ("top_k", 0), ("top_p", 0.0), ("top_p", 1.5)]
)
def test_a_number_that_means_nothing_is_refused(make, value):
  with pytest.raises(ValueError, match=rf"{make}\({value}\)"):
    getattr(logits_lib if make == "temperature" else truncation, make)(value)


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
    (truncation.top_k, [1, 2, 4, 50]),
    (truncation.top_p, [1e-6, 0.4, 0.9, 1.0]),
  ],
)
def test_settings_per_row_equal_the_rows_apart(factory, values):
  logits = random_logits(rows=4)
  together = jax.jit(lambda values, logits: factory(values).apply(logits, None, ()))(
    jnp.asarray(values), jnp.asarray(logits, jnp.float32)
  )
  for b, value in enumerate(values):
    np.testing.assert_array_equal(together[b], transformed(factory(value), logits[b : b + 1])[0])


def test_bisection_finds_every_threshold_among_extreme_floats():
  rng = np.random.default_rng(0)
  bits = rng.integers(0, 2**32, (64, 33), dtype=np.uint64).astype(np.uint32)
  floats = bits.view(np.float32)
  normal = np.isfinite(floats) & (np.abs(floats) >= np.finfo(np.float32).tiny)
  floats = np.where(normal, floats, np.float32(-INF))
  ks = jnp.asarray(rng.integers(1, 34, 64))
  out = np.asarray(truncation.top_k(ks).apply(jnp.asarray(floats), None, ()))
  for row, result, k in zip(floats, out, ks, strict=True):
    kept = np.sort(row)[::-1][: int(k)]
    np.testing.assert_array_equal(np.sort(result)[::-1][: int(k)], kept)
    assert np.all(result[row < kept[-1]] == -INF)


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


@pytest.fixture(scope="module")
def peers():
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of what torch and transformers import
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.generation import logits_process
  return torch, logits_process


@pytest.mark.peers
@pytest.mark.parametrize("k", [1, 3, 8])
def test_top_k_equals_the_peers(peers, k):
  torch, process = peers
  logits = random_logits(200).astype(np.float32)
  expected = process.TopKLogitsWarper(k)(None, torch.from_numpy(logits)).numpy()
  np.testing.assert_array_equal(transformed(truncation.top_k(k), logits), expected)


@pytest.mark.peers
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.99])
def test_top_p_equals_the_peers(peers, p):
  """On logits without ties; of equals, transformers keeps only as many as it takes."""
  torch, process = peers
  logits = np.random.default_rng(0).normal(size=(200, 50)).astype(np.float32) * 3
  expected = process.TopPLogitsWarper(p)(None, torch.from_numpy(logits)).numpy()
  np.testing.assert_array_equal(transformed(truncation.top_p(p), logits), expected)


@pytest.mark.peers
def test_top_p_of_ties_contains_the_peers(peers):
  torch, process = peers
  logits = random_logits(200).astype(np.float32)
  theirs = np.isfinite(process.TopPLogitsWarper(0.8)(None, torch.from_numpy(logits)).numpy())
  ours = np.isfinite(transformed(truncation.top_p(0.8), logits))
  least = np.where(theirs, logits, INF).min(axis=1, keepdims=True)
  np.testing.assert_array_equal(ours, logits >= least)  # theirs, and what ties with its last
  assert np.any(ours != theirs)
