"""Mirostat: its recursion, its rank, its law, and whether it holds what it says it holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.models import toy
from ancestral.sampling import base, decode, feedback, truncation
from ancestral.sampling import logits as logits_lib

INF = np.inf
FACTORIES = {
  "mirostat": feedback.mirostat,
  "mirostat_v2": feedback.mirostat_v2,
  "mirostat_truncated": feedback.mirostat_truncated,
  "mirostat_v2_truncated": feedback.mirostat_v2_truncated,
}


def compiled(transform):
  """Its apply, without a context, and its update."""
  return jax.jit(lambda logits, mu: transform.apply(logits, None, mu)), jax.jit(transform.update)


def zipf(exponent, vocab_size):
  return -exponent * np.log(np.arange(1, vocab_size + 1))


# An independent version: float64, one row, tokens sorted, sums by loop.


def sorted_tokens(row):
  return sorted((i for i in range(len(row)) if row[i] > -INF), key=lambda i: (-row[i], i))


def rank_by_hand(row, mu, m=100):
  """How many of the sorted tokens version 1 keeps, from the density x^-s by quadrature."""
  ranked = row[sorted_tokens(row)]
  if len(ranked) == 1:
    return 1
  pairs = range(1, min(m, len(ranked)))
  t = [np.log((i + 1) / i) for i in pairs]
  b = [ranked[i - 1] - ranked[i] for i in pairs]
  s = np.dot(t, b) / np.dot(t, t)
  log_x = np.linspace(0, np.log(len(ranked)), 2001)
  log_mass = np.log(np.trapezoid(np.exp((1 - s) * log_x), log_x))
  surprise = [(s * np.log(k) + log_mass) / np.log(2) for k in range(1, len(ranked) + 1)]
  return max(sum(bits <= mu for bits in surprise), 1)


def kept_by_hand(version, row, mu):
  """The tokens left of a row."""
  ranked = sorted_tokens(row)
  if version == 1:
    return ranked[: rank_by_hand(row, mu)]
  law = targets.softmax(row)
  return [i for i in ranked if -np.log2(law[i]) <= mu] or ranked[:1]


def sequence(rows=120, vocab_size=150, seed=0):
  """Logits [rows, V] of Zipf laws in shuffled order, some tokens impossible."""
  rng = np.random.default_rng(seed)
  out = np.stack(
    [rng.uniform(0.7, 2) * zipf(-1, vocab_size)[rng.permutation(vocab_size)] for _ in range(rows)]
  )
  out += 0.1 * rng.normal(size=out.shape)
  out[rng.random(out.shape) < 0.1] = -INF
  return out.astype(np.float32).astype(np.float64)


@pytest.mark.parametrize("version, factory", [(1, feedback.mirostat), (2, feedback.mirostat_v2)])
@pytest.mark.parametrize("tau, eta, heat", [(3.0, 1.0, 1.0), (5.0, 0.1, 1.0), (4.0, 0.5, 1.5)])
def test_the_recursion_step_by_step(version, factory, tau, eta, heat):
  """The same tokens drive both; the surprise is the model's, also behind a temperature."""
  transform = logits_lib.chain(logits_lib.temperature(heat), factory(tau, eta))
  apply, update = compiled(transform)
  rng, state, mu, differ = np.random.default_rng(1), transform.init(1), 2 * tau, 0
  for row in sequence():
    logits = jnp.asarray(row[None], jnp.float32)
    np.testing.assert_allclose(state[1], [mu], atol=1e-3)
    ours = np.flatnonzero(np.isfinite(apply(logits, state)[0]))
    expected = kept_by_hand(version, row / heat, mu)
    differ += set(ours) != set(expected)  # a token whose surprise is mu to six digits
    token = rng.choice(expected, p=targets.softmax(row[expected] / heat))
    state = update(logits, jnp.array([token]), state)
    mu -= eta * (-np.log2(targets.softmax(row)[token]) - tau)
  assert differ <= 1


@pytest.mark.parametrize(
  "version, factory", [(1, feedback.mirostat_truncated), (2, feedback.mirostat_v2_truncated)]
)
def test_the_recursion_of_the_truncated_surprise(version, factory):
  tau, eta, heat = 3.0, 0.3, 0.8
  bias = np.linspace(-1, 1, 150)
  before = logits_lib.stateless(lambda logits: logits + jnp.asarray(bias, jnp.float32)[None])
  transform = factory(tau, eta, heat, before=before)
  apply, update = compiled(transform)
  rng, state, mu, differ = np.random.default_rng(1), transform.init(1), 2 * tau, 0
  for row in sequence(100):
    logits = jnp.asarray(row[None], jnp.float32)
    np.testing.assert_allclose(state, [mu], atol=1e-3)
    out = apply(logits, state)[0]
    expected = kept_by_hand(version, (row + bias) / heat, mu)
    law = targets.softmax((row + bias)[expected] / heat)
    differ += set(np.flatnonzero(np.isfinite(out))) != set(expected)
    chosen = rng.choice(len(expected), p=law)
    state = update(logits, jnp.array([expected[chosen]]), state)
    mu -= eta * (-np.log2(law[chosen]) - tau)
  assert differ <= 1


RANK = jax.jit(feedback.zipf_rank)


@pytest.mark.parametrize("exponent", [0.0, 0.3, 0.999999, 1.0, 1.000001, 1.4, 3.0, 20.0])
@pytest.mark.parametrize("size", [2, 30, 50_257])
def test_rank_is_where_a_zipf_density_reaches_the_surprise(exponent, size):
  """Against quadrature: k is kept and k + 1 is not, to the rounding of float32."""
  mu = np.linspace(-3, 24, 28)
  k = np.asarray(RANK(jnp.asarray(mu, jnp.float32), jnp.float32(exponent), jnp.int32(size)))
  log_x = np.linspace(0, np.log(size), 100_001)
  log_mass = np.log(np.trapezoid(np.exp((1 - exponent) * log_x), log_x))
  bits = lambda rank: (exponent * np.log(rank) + log_mass) / np.log(2)
  assert k.dtype == np.int32 and k.min() >= 1 and k.max() <= size
  assert np.all((bits(k) <= mu + 1e-4) | (k == 1))
  assert np.all((bits(k + 1) >= mu - 1e-4) | (k == size))


def test_exponent_of_an_exact_zipf_law():
  exponents = np.array([0.4, 1.0, 1.7, 6.0])
  logits = np.stack([zipf(s, 300) for s in exponents])[:, np.random.default_rng(0).permutation(300)]
  estimate = jax.jit(feedback.zipf_exponent, static_argnums=1)
  for m in (2, 100, 1000):
    found = estimate(jnp.asarray(logits, jnp.float32), m)
    np.testing.assert_allclose(found[:, 0], exponents, rtol=1e-4)


def test_exponent_is_least_squares_of_the_drops():
  row = np.random.default_rng(0).normal(size=500) * 3
  drops = -np.diff(np.sort(row)[::-1][:100])
  slope = np.linalg.lstsq(np.diff(np.log(np.arange(1, 101)))[:, None], drops, rcond=None)[0]
  found = jax.jit(feedback.zipf_exponent)(jnp.asarray(row[None], jnp.float32))
  np.testing.assert_allclose(found[0], slope, rtol=1e-5)


AWKWARD = np.array(
  [
    [5.0, -INF, -INF, -INF, -INF, -INF],
    [3.0, 3.0, 3.0, 3.0, 3.0, 3.0],
    [4.0, -INF, 5.0, -INF, -INF, -INF],
    [3e38, -3e38, 0.0, 0.0, 0.0, 0.0],
    [0.0, -40.0, -80.0, -120.0, -160.0, -1000.0],
    [0.0, -1e-30, 1e-30, 0.0, -0.0, 0.0],
  ]
)


@pytest.mark.parametrize("name", FACTORIES)
def test_awkward_laws(name):
  """At least one token and none that was impossible, whatever mu; all at infinity."""
  apply, possible = compiled(FACTORIES[name](3.0))[0], np.isfinite(AWKWARD)
  kept = lambda mu: np.isfinite(apply(jnp.asarray(AWKWARD, jnp.float32), jnp.full(6, mu)))
  for mu in (-1e30, -5.0, 0.0, 1.0, 3.0, 200.0, 1e30):
    out = kept(mu)
    assert np.all(out.sum(axis=1) >= 1) and np.all(possible | ~out)
    np.testing.assert_array_equal(np.any(out & (AWKWARD == AWKWARD.max(1, keepdims=True)), 1), True)
    if mu <= 0:
      np.testing.assert_array_equal(out.sum(axis=1), 1)
  np.testing.assert_array_equal(kept(INF), possible)


@pytest.mark.parametrize("name", FACTORIES)
def test_an_infinite_target_is_off(name):
  transform = FACTORIES[name](jnp.array([INF, 3.0]))
  logits = jnp.asarray(AWKWARD[[4, 4]], jnp.float32)
  state, (apply, update) = transform.init(2), compiled(transform)
  for _ in range(3):
    np.testing.assert_array_equal(apply(logits, state)[0], logits[0])
    state = update(logits, jnp.array([1, 0]), state)
  np.testing.assert_array_equal(state[0], INF)
  assert 6 < float(state[1]) < 20


@pytest.mark.parametrize("name", FACTORIES)
def test_updates_of_one_token(name):
  """A sure one (S = 0) raises mu by eta tau, an impossible one leaves it, and so does eta = 0."""
  logits = jnp.asarray(AWKWARD[[0, 0, 4]], jnp.float32)
  transform = FACTORIES[name](2.0, jnp.array([0.5, 0.5, 0.0]))
  state = compiled(transform)[1](logits, jnp.array([0, 3, 1]), transform.init(3))
  np.testing.assert_allclose(state, [5.0, 4.0, 4.0], atol=1e-6)


def test_bad_numbers_are_refused():
  for name, factory in FACTORIES.items():
    with pytest.raises(ValueError, match=rf"{name}\(-1\)"):
      factory(-1)
    with pytest.raises(ValueError, match="eta"):
      factory(3.0, -0.1)
  with pytest.raises(ValueError, match="at least 2"):
    feedback.mirostat(3.0, m=1)
  with pytest.raises(ValueError, match="feeds back"):
    feedback.mirostat_v2_truncated(3.0, before=feedback.mirostat_v2(3.0))


def prompts_of(tokens):
  return decode.Prompts(jnp.asarray(tokens, jnp.int32)[:, None], jnp.ones(len(tokens), jnp.int32))


@pytest.mark.parametrize("name", ["mirostat", "mirostat_v2_truncated"])
def test_log_prob_and_law_are_those_of_the_truncated_table(name):
  """Every continuation of a tiny model, mu followed along it by hand."""
  vocab_size, new, num = 4, 3, 20_000
  model, params = targets.table_target(vocab_size, order=1)
  samples = jax.jit(
    lambda params, keys, prompts: decode.generate(
      model, params, keys, prompts, max_new_tokens=new, transform=FACTORIES[name](1.4, 0.5)
    )
  )(params, targets.keys_of(np.arange(num)), prompts_of(np.full(num, 2)))
  table, version = np.asarray(params, np.float64), 2 if "v2" in name else 1
  law = np.zeros((vocab_size,) * new)

  def follow(prefix, probability, mu):
    if len(prefix) == new + 1:
      law[prefix[1:]] = probability
      return
    row = table[prefix[-1]]
    left = kept_by_hand(version, row, mu)
    for token, p in zip(left, targets.softmax(row[left]), strict=True):
      scored = p if "truncated" in name else targets.softmax(row)[token]
      follow((*prefix, token), probability * p, mu - 0.5 * (-np.log2(scored) - 1.4))

  follow((2,), 1.0, 2.8)
  assert 0 < (law == 0).sum() < law.size - 4
  tokens = np.asarray(samples.tokens[:, 1:])
  targets.check_law(tokens, law)
  total = np.asarray(samples.log_prob).sum(axis=1)
  np.testing.assert_allclose(np.exp(total), law[tuple(tokens.T)], rtol=1e-4)


VOCAB, NEW, WINDOW = 400, 700, 200


def wandering():
  """A Zipf law, a quarter of it moved to the likeliest token, whose exponent wanders."""

  def next_logits(log_rank, tokens, t):
    exponent = 0.8 + 0.15 * jnp.sin(2 * jnp.pi * t / 500)
    law = jax.nn.log_softmax(-exponent * log_rank) + jnp.log(0.75)
    return law.at[0].set(jnp.logaddexp(law[0], jnp.log(0.25)))

  log_rank = jnp.asarray(-zipf(1, VOCAB), jnp.float32)
  return toy.from_conditionals(lambda key: log_rank, VOCAB, next_logits), log_rank


def surprise_of(make, settings, rows):
  """Bits per drawn token after 100, under the model and the law drawn from, [rows, NEW - 100]."""
  model, params = wandering()
  samples = jax.jit(
    lambda params, settings, keys, prompts: decode.generate(
      model, params, keys, prompts, max_new_tokens=NEW, transform=make(settings)
    )
  )(params, settings, targets.keys_of(np.arange(rows)), prompts_of(np.zeros(rows)))
  return (
    -np.asarray(samples.model_log_prob, np.float64)[:, 100:] / np.log(2),
    -np.asarray(samples.log_prob, np.float64)[:, 100:] / np.log(2),
  )


def windows(bits):
  return bits.reshape(len(bits), -1, WINDOW).mean(axis=-1)


TAUS = np.array([2.0, 3.0, 4.0, 5.0], np.float32)


def behind(factory):
  before = (logits_lib.temperature(1.3), truncation.top_k(300))
  return lambda tau: logits_lib.chain(*before, factory(tau))


@pytest.mark.parametrize(
  "make",
  [behind(feedback.mirostat), feedback.mirostat_v2],
  ids=["mirostat behind a chain", "mirostat_v2"],
)
def test_windows_keep_the_target(make):
  """Windows of 200 tokens are within 0.25 bits of tau: mu's range, some 50 bits, over 200.

  Untruncated, their means go from 5.5 to 6.7 bits; the likeliest token has 1.9.
  """
  model_bits, _ = surprise_of(make, jnp.asarray(TAUS), len(TAUS))
  assert np.abs(windows(model_bits) - TAUS[:, None]).max() < 0.25
  np.testing.assert_allclose(model_bits.mean(axis=1), TAUS, atol=0.1)


def test_the_truncated_variant_holds_the_truncated_surprise_and_not_the_models():
  model_bits, drawn_bits = surprise_of(
    lambda tau: feedback.mirostat_v2_truncated(tau, 1.0), jnp.asarray(TAUS[:3]), 3
  )
  assert np.abs(windows(drawn_bits) - TAUS[:3, None]).max() < 0.25
  assert np.all(model_bits.mean(axis=1) - TAUS[:3] > 0.3)


@pytest.mark.parametrize("name", FACTORIES)
def test_settings_per_row_equal_the_rows_apart(name):
  tau, eta = jnp.array([1.0, 3.0, 4.0, INF]), jnp.array([1.0, 0.1, 0.0, 1.0])

  @jax.jit
  def follow(tau, eta, logits, token):
    """The kept logits of five steps, and the last mu."""
    transform = FACTORIES[name](tau, eta)

    def step(mu, inputs):
      return transform.update(*inputs, mu), transform.apply(inputs[0], None, mu)

    return jax.lax.scan(step, transform.init(logits.shape[1]), (logits, token))

  logits = jnp.asarray(sequence(20), jnp.float32).reshape(5, 4, -1)
  token = jnp.argsort(logits, axis=-1)[:, :, -3]
  mu, out = follow(tau, eta, logits, token)
  assert len(np.unique(mu)) == 4
  for b in range(4):
    alone, row = follow(tau[b], eta[b], logits[:, b : b + 1], token[:, b : b + 1])
    np.testing.assert_allclose(mu[b], alone[0], rtol=1e-6)
    np.testing.assert_array_equal(out[:, b], row[:, 0])


def test_frozen_rows_keep_their_mu():
  """After the stop token, and from then on whatever the other rows do."""
  model, params = targets.markov_target()
  algorithm = decode.autoregressive(
    model, params, max_length=20, max_new_tokens=15, transform=feedback.mirostat_v2(1.5), stop=(2,)
  )
  keys = targets.keys_of(np.arange(8))
  state = base.start(keys, algorithm, prompts_of([1] * 8))
  step = jax.jit(algorithm.step)
  frozen = moved = 0
  for _ in range(15):
    before = state
    state, _ = step(base.row_keys_at(keys, state.step), state)
    same = np.asarray(state.transform == before.transform)
    assert np.all(same[np.asarray(before.done)])
    frozen, moved = frozen + np.sum(before.done), moved + np.sum(~same)
  assert frozen > 20 and moved > 10


def test_the_mean_is_the_target_up_to_the_way_of_mu():
  """sum S = n tau + (mu_0 - mu_n) / eta, whatever is drawn."""
  eta, transform = 0.3, feedback.mirostat(2.0, 0.3)
  rows, state, total = sequence(50), transform.init(1), 0.0
  rng, (_, update) = np.random.default_rng(0), compiled(transform)
  for row in rows:
    token = rng.choice(sorted_tokens(row))
    total += -np.log2(targets.softmax(row)[token])
    state = update(jnp.asarray(row[None], jnp.float32), jnp.array([token]), state)
  np.testing.assert_allclose(total / 50, 2 + (4 - float(state[0])) / (eta * 50), rtol=1e-4)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", FACTORIES)
def test_lowers_and_maps(name, platform):
  transform = FACTORIES[name](3.0)

  def both(logits, token, mu):
    return transform.apply(logits, None, mu), transform.update(logits, token, mu)

  logits, token, mu = jnp.zeros((2, 3, 9)), jnp.zeros((2, 3), jnp.int32), jnp.ones((2, 3))
  lowered = jax.jit(jax.vmap(both)).trace(logits, token, mu).lower(lowering_platforms=(platform,))
  assert "stablehlo" in lowered.as_text()
