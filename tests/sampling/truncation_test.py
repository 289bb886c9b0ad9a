"""Each truncation against its definition by sets, its ties, and its bounds."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.sampling import logits as logits_lib
from ancestral.sampling import truncation

INF = np.inf


def transformed(transform, logits):
  """What a transform without feedback makes of logits [B, V]."""
  assert transform.init(len(logits)) == ()
  return np.asarray(
    jax.jit(lambda logits: transform.apply(logits, None, ()))(jnp.asarray(logits, jnp.float32))
  )


@functools.cache
def compiled(make):
  return jax.jit(lambda value, logits: make(value).apply(logits, None, ()))


def applied(make, value, logits):
  """make(value) of logits [B, V], compiled once for all values of one shape."""
  return np.asarray(compiled(make)(jnp.asarray(value), jnp.asarray(logits, jnp.float32)))


def random_logits(rows=40, vocab_size=9, seed=0):
  """Rounded to halves: many ties."""
  return np.round(2 * np.random.default_rng(seed).normal(size=(rows, vocab_size)) * 2) / 2


def hard_cases():
  """Ties, filtered tokens, one token, uniform laws, bfloat16: [60, 9]."""
  rng = np.random.default_rng(3)
  filtered = random_logits(20, seed=1)
  filtered[rng.random(filtered.shape) < 0.3] = -INF
  filtered[:, 4] = 1.0
  one = np.full((2, 9), -INF)
  one[0, 3] = one[1, 0] = 7.0
  rounded = np.asarray(jnp.asarray(4 * rng.normal(size=(20, 9)), jnp.bfloat16), np.float64)
  sharp = np.array([[50.0, *range(8)], [-40.0, *[-40.0] * 7, 40.0]])
  return np.vstack([random_logits(16), filtered, one, rounded, np.zeros((1, 9)), sharp])


AWKWARD = np.array(
  [
    [0.0, -0.0, 0.0, -0.0, 1.0, -1.0],
    [-0.0, 0.0, -1.0, -1.0, -INF, -INF],
    [1e38, -1e38, 3e38, -3e38, 1e-37, -1e-37],
    [2.0, 2.0, 2.0, 2.0, 2.0, 2.0],
    [-INF, -INF, 5.0, -INF, -INF, -INF],
    [-1e-30, -2e-30, -1e30, 1e-30, 2e-30, 1e30],
    [1.0, 1 + 2.0**-23, 1 - 2.0**-24, -1.0, -1 + 2.0**-24, -INF],  # neighbouring floats
  ],
  np.float32,
)


def likely_set(row, cutoff):
  p = targets.softmax(row)
  return {i for i in range(len(row)) if p[i] >= cutoff or row[i] == max(row)}


def eta_set(row, c):
  return likely_set(row, min(c, c**0.5 * np.exp(-targets.entropy(targets.softmax(row)))))


def typical_set(row, mass):
  p = targets.softmax(row)
  with np.errstate(divide="ignore"):
    distance = np.abs(-np.log(p) - targets.entropy(p))
  return {i for i in range(len(row)) if p[distance < distance[i]].sum() < mass and p[i] > 0}


def top_h_partial_set(row, alpha, top_n=100):
  order = targets.descending(row)[:top_n]
  p = targets.softmax(row[order])
  within = [n for n in range(2, sum(p > 0) + 1) if _share(p[:n]) <= alpha * _share(p)]
  return set(order[: max(within, default=1)])


def _share(p):
  return -np.sum(p[p > 0] * np.log(p[p > 0]))


def top_n_sigma_set(row, n):
  return {i for i in range(len(row)) if row[i] >= max(row) - n * np.std(row[np.isfinite(row)])}


DEFINITIONS = {
  "top_k": (truncation.top_k, targets.top_k_set, [1, 2, 3, 5, 6, 100]),
  "exact_top_k": (
    truncation.exact_top_k,
    lambda row, k: set(targets.descending(row)[:k]),
    [1, 2, 3, 5, 6, 100],
  ),
  "top_p": (truncation.top_p, targets.top_p_set, [1e-6, 0.31, 0.6, 0.77, 0.97, 0.999, 1.0]),
  "min_p": (
    truncation.min_p,
    lambda row, m: {i for i, p in enumerate(targets.softmax(row - max(row))) if p >= m * _top(row)},
    [0.0, 1e-6, 0.11, 0.5, 1.0],
  ),
  "typical": (truncation.typical, typical_set, [1e-6, 0.21, 0.52, 0.9]),
  "epsilon": (truncation.epsilon, likely_set, [0.0, 1e-3, 0.07, 0.3, 0.9]),
  "eta": (truncation.eta, eta_set, [0.0, 1e-3, 0.07, 0.3, 0.9]),
  "top_h": (truncation.top_h, targets.top_h_set, [0.01, 0.23, 0.41, 0.77, 0.95]),
  "top_h_partial": (truncation.top_h_partial, top_h_partial_set, [0.01, 0.23, 0.41, 0.77, 0.95]),
  "top_h_partial_5": (
    lambda alpha: truncation.top_h_partial(alpha, 5),
    lambda row, alpha: top_h_partial_set(row, alpha, 5),
    [0.23, 0.77],
  ),
  "top_n_sigma": (truncation.top_n_sigma, top_n_sigma_set, [0.0, 0.51, 1.01, 2.03]),
}


def _top(row):
  return targets.softmax(row - max(row)).max()


@pytest.mark.parametrize("name", DEFINITIONS)
def test_by_definition(name):
  make, definition, values = DEFINITIONS[name]
  logits = hard_cases()
  for value in values:
    out = applied(make, value, logits)
    expected = targets.filtered(logits, lambda row, value=value: definition(row, value))
    np.testing.assert_array_equal(out, expected, err_msg=f"{value}")
    assert np.all(np.isfinite(out).any(axis=1))


@pytest.mark.parametrize("name", [name for name in DEFINITIONS if name != "top_n_sigma"])
def test_awkward_floats_by_definition(name):
  make, definition, values = DEFINITIONS[name]
  for value in values[1:3]:
    out = applied(make, value, AWKWARD)
    expected = targets.filtered(AWKWARD, lambda row, value=value: definition(row, value))
    np.testing.assert_array_equal(out, expected, err_msg=f"{value}")


OFF = {
  "top_k": truncation.top_k(9),
  "exact_top_k": truncation.exact_top_k(9),
  "top_p": truncation.top_p(1.0),
  "min_p": truncation.min_p(0.0),
  "typical": truncation.typical(1.0),
  "epsilon": truncation.epsilon(0.0),
  "eta": truncation.eta(0.0),
  "top_h": truncation.top_h(1.0),
  "top_h_partial": truncation.top_h_partial(1.0),
  "top_n_sigma": truncation.top_n_sigma(INF),
  "xtc": truncation.xtc(0.0),
}


@pytest.mark.parametrize("name", OFF)
def test_off_leaves_every_bit(name):
  rng = np.random.default_rng(0)
  logits = np.vstack([hard_cases(), 30 * rng.normal(size=(20, 9)), -0.0 * np.ones((1, 9))])
  logits = np.vstack([logits, np.full((1, 9), -INF)]).astype(np.float32)
  out = transformed(OFF[name], logits)
  np.testing.assert_array_equal(out.view(np.uint32), logits.view(np.uint32))


PER_ROW = {
  "top_k": [1, 2, 4, 50],
  "exact_top_k": [1, 2, 4, 50],
  "top_p": [1e-6, 0.4, 0.9, 1.0],
  "min_p": [0.0, 0.1, 0.4, 1.0],
  "typical": [0.1, 0.5, 0.9, 1.0],
  "epsilon": [0.0, 0.01, 0.2, 0.5],
  "eta": [0.0, 0.01, 0.2, 0.5],
  "top_h": [0.1, 0.4, 0.8, 1.0],
  "top_h_partial": [0.1, 0.4, 0.8, 1.0],
  "top_n_sigma": [0.0, 0.5, 2.0, INF],
  "xtc": [0.0, 0.3, 0.5, 1.0],
}


@pytest.mark.parametrize("name", PER_ROW)
def test_settings_per_row_equal_the_rows_apart(name):
  logits, make = random_logits(rows=4), getattr(truncation, name)
  together = applied(make, PER_ROW[name], logits)
  for b, value in enumerate(PER_ROW[name]):
    np.testing.assert_array_equal(together[b], applied(make, value, logits[b : b + 1])[0])


@pytest.mark.parametrize(
  "name, value",
  list(
    zip(
      "top_k exact_top_k top_p top_p min_p typical epsilon eta top_h top_n_sigma xtc".split(),
      [0, 0, 0.0, 1.5, -0.1, 0, 1.0, -1, 1.1, -1.0, 1.5],
      strict=True,
    )
  ),
)
def test_a_number_that_means_nothing_is_refused(name, value):
  with pytest.raises(ValueError, match=rf"^{name}\({value}\)"):
    getattr(truncation, name)(value)


@pytest.mark.parametrize("p", [1e-45, 1e-38])
def test_top_p_towards_zero_is_greedy(p):
  logits = np.random.default_rng(0).normal(size=(5, 30))
  out = transformed(truncation.top_p(p), logits)
  np.testing.assert_array_equal(out, transformed(logits_lib.greedy(), logits))


def test_bisection_finds_every_threshold_among_extreme_floats():
  rng = np.random.default_rng(0)
  bits = rng.integers(0, 2**32, (64, 33), dtype=np.uint64).astype(np.uint32)
  floats = bits.view(np.float32)
  normal = np.isfinite(floats) & (np.abs(floats) >= np.finfo(np.float32).tiny)
  floats = np.where(normal, floats, np.float32(-INF))
  ks = rng.integers(1, 34, 64)
  out = applied(truncation.top_k, ks, floats)
  for row, result, k in zip(floats, out, ks, strict=True):
    kept = np.sort(row)[::-1][: int(k)]
    np.testing.assert_array_equal(np.sort(result)[::-1][: int(k)], kept)
    assert np.all(result[row < kept[-1]] == -INF)


def test_uniform_laws_are_cut_at_the_lowest_indices():
  """ceil(0.9 V) tokens reach 0.9; k tokens have entropy log k: sqrt(V) for half of log V."""
  kept = np.isfinite(applied(truncation.top_p, 0.9, np.zeros(LARGE)))
  np.testing.assert_array_equal(kept, np.arange(LARGE[1])[None] < np.full((6, 1), 45_232))
  kept = np.isfinite(applied(truncation.top_h, 0.5, np.zeros((60, 9))))
  np.testing.assert_array_equal(kept, np.arange(9)[None] < np.full((60, 1), 3))
  kept = np.isfinite(applied(truncation.top_h, 0.4, np.zeros(LARGE)))
  np.testing.assert_array_equal(kept.sum(axis=1), int(LARGE[1] ** 0.4))


LARGE = (6, 50_257)


def large_logits():
  """Zipf's law in a random order, from peaked to flat, and rounded to bfloat16."""
  rng = np.random.default_rng(0)
  zipf = -np.log(1.0 + np.stack([rng.permutation(LARGE[1]) for _ in range(3)]))
  logits = np.float32(zipf * np.array([[2.5], [1.2], [0.3]]))
  return np.vstack([logits, jnp.asarray(logits, jnp.bfloat16)]).astype(np.float64)


def large_mask(logits, scores, enough_before):
  """Tokens in descending order of scores, until enough; by a sort and a sum in float64."""
  kept = np.zeros(logits.shape, bool)
  for row, score, mask in zip(targets.softmax(logits), scores, kept, strict=True):
    order = np.lexsort((np.arange(len(row)), -score))
    mask[order[~enough_before(row[order])]] = True
  return kept


def test_top_p_of_a_large_vocabulary():
  """Some rows are settled in the best blocks and some are not; a row's neighbours do not matter."""
  logits = large_logits()
  for p in (0.2, 0.7, 0.95):
    out = applied(truncation.top_p, p, logits)
    expected = large_mask(logits, logits, lambda row, p=p: np.cumsum(row) - row >= p)
    np.testing.assert_array_equal(np.isfinite(out), expected)
    for b in (0, 5):
      alone = applied(truncation.top_p, p, logits[[b] * 6])
      np.testing.assert_array_equal(alone[1], out[b])


def test_top_k_of_a_large_vocabulary():
  logits, k = large_logits(), np.array([1, 50, 300, 700, 20_000, 60_000])
  out = applied(truncation.exact_top_k, k, logits)
  expected = [
    np.isin(np.arange(LARGE[1]), np.argsort(-row, stable=True)[:n])
    for row, n in zip(logits, k, strict=True)
  ]
  np.testing.assert_array_equal(np.isfinite(out), expected)
  least = np.where(expected, logits, INF).min(axis=1, keepdims=True)
  out = applied(truncation.top_k, k, logits)
  np.testing.assert_array_equal(np.isfinite(out), logits >= least)
  few = np.where(np.arange(LARGE[1])[None] % 1009 == 5, logits, -INF)
  np.testing.assert_array_equal(applied(truncation.exact_top_k, np.full(6, 99), few), few)


def test_typical_and_top_h_of_a_large_vocabulary():
  logits = large_logits()
  p = targets.softmax(logits)
  for mass in (0.1, 0.6):
    distance = np.abs(-np.log(p) + (p * np.log(p)).sum(axis=1, keepdims=True))
    kept = large_mask(logits, -distance, lambda row, mass=mass: np.cumsum(row) - row >= mass)
    cut = np.where(kept, distance, 0).max(axis=1, keepdims=True)
    out = applied(truncation.typical, mass, logits)
    np.testing.assert_array_equal(np.isfinite(out), distance <= cut * (1 + 1e-9))

  def exceeds(row):
    total = np.cumsum(row)
    entropies = np.log(total) - np.cumsum(row * np.log(row)) / total
    return entropies > 0.6 * entropies[-1]

  out = applied(truncation.top_h, 0.6, logits)
  np.testing.assert_array_equal(np.isfinite(out), large_mask(logits, logits, exceeds))


def test_under_vmap_and_lowered_for_accelerators():
  logits = jnp.asarray(large_logits(), jnp.float32)
  apply = lambda logits: truncation.top_p(0.7).apply(logits, None, ())
  out = jax.jit(jax.vmap(apply))(logits.reshape(3, 2, -1))
  np.testing.assert_array_equal(out.reshape(LARGE), applied(truncation.top_p, 0.7, logits))
  for platform in ("tpu", "cuda"):
    lowered = jax.jit(apply).trace(logits).lower(lowering_platforms=(platform,))
    assert "stablehlo" in lowered.as_text()


def test_the_log_probability_of_a_kept_token_has_the_gradient_of_its_law():
  """d log q(v) / dz = one-hot - q, the set held fixed; filtered tokens get nothing."""
  row = jnp.asarray(random_logits(1)[0], jnp.float32)
  law = lambda z: truncation.top_p(0.8).apply(z[None], None, ())
  log_prob = lambda z: logits_lib.log_prob(law(z), jnp.argmax(z)[None])[0]
  q = targets.softmax(transformed(truncation.top_p(0.8), row[None]))[0]
  assert 1 < np.sum(q > 0) < 9
  gradient = jax.jit(jax.grad(log_prob))(row)
  np.testing.assert_allclose(gradient, np.eye(9)[int(np.argmax(row))] - q, atol=1e-6)


def best_mass(p, bound):
  """The most mass of any subset whose renormalised entropy keeps to the bound."""
  subsets = np.array(list(itertools.product([0, 1], repeat=len(p))))[1:]
  mass = subsets @ p
  entropies = np.log(mass) - subsets @ (p * np.log(p)) / mass
  return mass[entropies <= bound + 1e-9].max()


def test_top_h_against_every_subset():
  """Never above the best subset, equal to it where the best is a prefix, and often below it."""
  rng, optimal, below = np.random.default_rng(0), 0, 0
  alphas = np.tile([0.25, 0.5, 0.75, 0.9], 8)
  for vocab_size in (2, 4, 8, 12):
    law = rng.dirichlet(np.ones(vocab_size), size=len(alphas))
    out = applied(truncation.top_h, alphas, np.log(law))
    for alpha, p, result in zip(alphas, law, out, strict=True):
      mass = p[np.isfinite(result)].sum()
      best = best_mass(p, alpha * targets.entropy(p))
      assert mass <= best + 1e-6
      if np.min(np.abs(np.cumsum(-np.sort(-p)) - best)) < 1e-9:
        np.testing.assert_allclose(mass, best, rtol=1e-5)
        optimal += 1
      else:
        below += 1
  assert optimal > 25 and below > 25


def llamacpp_xtc(rng, p, probability, threshold):
  """One draw by llama.cpp's procedure: a coin, then a sort, then a cut."""
  if probability > 0 and threshold <= 0.5 and len(p) >= 2 and rng.random() <= probability:
    order = targets.descending(p)
    above = [i for i in order if p[i] >= threshold]
    order = order[max(len(above) - 1, 0) :]
    p = np.where(np.isin(np.arange(len(p)), order), p, 0)
  return rng.choice(len(p), p=p / p.sum())


def test_xtc_is_the_law_of_llamacpps_draws():
  p = np.array([0.3, 0.05, 0.25, 0.25, 0.1, 0.05])
  for probability, threshold in ((0.5, 0.2), (0.8, 0.08), (1.0, 0.2), (0.5, 0.28), (0.7, 0.6)):
    out = transformed(truncation.xtc(probability, threshold), np.log(p)[None])
    law = targets.softmax(out)[0]
    rng = np.random.default_rng(1)
    draws = [llamacpp_xtc(rng, p, probability, threshold) for _ in range(2000)]
    targets.check_law(np.array(draws)[:, None], law)


def test_xtc_by_hand():
  """Of 0.4, 0.3, 0.3 above the threshold the last is kept: q = (0, 0, 0.3, 0) / 0.3 or with 0."""
  law = [[0.4, 0.3, 0.3, 0.0], [0.9, 0.1, 0.0, 0.0], [0.5, 0.25, 0.15, 0.1]]
  with np.errstate(divide="ignore"):
    out = transformed(truncation.xtc(0.5, 0.2), np.log(law) + 3)
  expected = [[0.2, 0.15, 0.65, 0], [0.9, 0.1, 0, 0], [0.25, 0.375, 0.225, 0.15]]
  np.testing.assert_allclose(targets.softmax(out), expected, atol=1e-6)
  token = jnp.arange(3)
  reported = logits_lib.log_prob(jnp.asarray(out), token)
  np.testing.assert_allclose(reported, np.log(np.diag(expected)[:3]), atol=1e-6)
  out = transformed(truncation.xtc(1.0, 0.0), [[3.0, 1.0, 2.0, -INF]])
  np.testing.assert_array_equal(targets.softmax(out), [[0, 1, 0, 0]])


def test_what_follows_xtc_follows_the_coin():
  """T = 1/2 squares each law apart: (25, 9, 4) / 38 and (0, 9, 4) / 13."""
  logits = np.log([[0.5, 0.3, 0.2]])
  out = transformed(truncation.xtc(0.4, 0.25, logits_lib.temperature(0.5)), logits)
  expected = 0.6 * np.array([25, 9, 4]) / 38 + 0.4 * np.array([0, 9, 4]) / 13
  np.testing.assert_allclose(targets.softmax(out)[0], expected, atol=1e-6)
