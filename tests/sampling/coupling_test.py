"""The law of every rule's output, by a sum over all drafts, and of the functions that draw."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

import targets
from ancestral.sampling import acceptance, coupling

REPLACING = {
  "maximal_one": (coupling.maximal_one, 1, acceptance.k_sequential_acceptance),
  "k_sequential 2": (coupling.k_sequential, 2, acceptance.k_sequential_acceptance),
  "k_sequential 3": (coupling.k_sequential, 3, acceptance.k_sequential_acceptance),
  "recursive 2": (coupling.recursive_rejection, 2, acceptance.recursive_rejection_acceptance),
  "recursive 3": (coupling.recursive_rejection, 3, acceptance.recursive_rejection_acceptance),
  "match 3": (coupling.sample_and_match, 3, acceptance.sample_and_match_acceptance),
}


def log(p):
  with np.errstate(divide="ignore"):
    return jnp.asarray(np.log(p), jnp.float32)


def random_law(rng, support, concentration=0.7):
  law = rng.gamma(concentration, size=len(support)) * support + 1e-3 * support
  return law / law.sum()


def pairs():
  """q, p [N, 4] for every pattern of zeros of both (disjoint, one-hot, ...), p = q, and near it."""
  rng = np.random.default_rng(0)
  supports = [np.array(s) for s in itertools.product((0, 1), repeat=4) if any(s)]
  found = [(random_law(rng, a), random_law(rng, b)) for a in supports for b in supports]
  for support in supports:
    law = random_law(rng, support)
    near = law * (1 + 3e-7 * rng.normal(size=4))
    found += [(law, law), (near / near.sum(), law)]
  tiny = np.array([1 - 3e-12, 1e-12, 1e-12, 1e-12])
  even = np.full(4, 0.25)
  found += [(tiny, even), (even, tiny), (tiny, tiny[::-1]), (tiny, tiny), (even, np.eye(4)[1])]
  return np.moveaxis(np.array(found), 1, 0)


def draft_probability(q, drafts, replacement):
  """[N, T] for q [N, V] and drafts [T, n]; anything may follow when q has no token left."""
  probability = np.ones((len(q), len(drafts)))
  for t, row in enumerate(drafts):
    left = q.copy()
    for x in row:
      total = left.sum(axis=1)
      share = left[:, x] / np.where(total > 0, total, 1)
      probability[:, t] *= np.where(total > 0, share, 1 / q.shape[1])
      if not replacement:
        left[:, x] = 0
  return probability


@functools.partial(jax.jit, static_argnums=0)
def judge(rule, drafts, log_q, log_p):
  shape = (len(log_q), len(drafts))
  drafts = jnp.broadcast_to(drafts[None], (*shape, drafts.shape[1]))
  return rule(drafts, *(jnp.repeat(law[:, None], shape[1], axis=1) for law in (log_q, log_p)))


def first_taken(accept):
  """The probability that each draft is the one taken, in float64."""
  accept = np.asarray(accept, np.float64)
  refused = np.cumprod(1 - accept, axis=-1)
  return accept * np.concatenate([np.ones_like(refused[..., :1]), refused[..., :-1]], axis=-1)


def output_law(rule, q, p, n, replacement):
  """The law of the token [N, V], and the probability that it is a draft [N]."""
  drafts = np.array(list(itertools.product(range(q.shape[1]), repeat=n)))
  probability = draft_probability(q, drafts, replacement)
  accept, residual = judge(rule, jnp.asarray(drafts), log(q), log(p))
  accept = np.asarray(accept, np.float64)
  assert (accept >= 0).all() and (accept <= 1 + 1e-6).all()
  taken = first_taken(np.minimum(accept, 1))
  residual = targets.softmax(residual)
  given = residual * (1 - taken.sum(axis=-1, keepdims=True))
  for i in range(n):
    given += taken[..., i, None] * np.eye(q.shape[1])[drafts[:, i]]
  return np.einsum("nt,ntv->nv", probability, given), (probability * taken.sum(-1)).sum(-1)


@pytest.mark.parametrize("name", REPLACING)
def test_the_output_has_the_law_of_the_target_and_the_acceptance_its_closed_form(name):
  rule, n, closed_form = REPLACING[name]
  q, p = pairs()
  law, accepted = output_law(rule, q, p, n, replacement=True)
  np.testing.assert_allclose(law, p, atol=1e-6)
  np.testing.assert_allclose(closed_form(log(q), log(p), n), accepted, atol=1e-6)


@pytest.mark.parametrize(
  "rule, n",
  [
    (coupling.recursive_rejection_without_replacement, 1),
    (coupling.recursive_rejection_without_replacement, 2),
    (coupling.recursive_rejection_without_replacement, 3),
    (coupling.sample_and_match, 2),
  ],
)
def test_without_replacement_the_output_has_the_law_of_the_target(rule, n):
  q, p = pairs()
  law, _ = output_law(rule, q, p, n, replacement=False)
  np.testing.assert_allclose(law, p, atol=1e-6)


@pytest.mark.parametrize("replacement", [True, False])
def test_six_tokens(replacement):
  rng = np.random.default_rng(1)
  q, p = rng.dirichlet(np.full(6, 0.5), size=(2, 30))
  rules = {
    True: (coupling.k_sequential, coupling.recursive_rejection),
    False: (coupling.recursive_rejection_without_replacement,),
  }
  for rule in rules[replacement]:
    np.testing.assert_allclose(output_law(rule, q, p, 3, replacement)[0], p, atol=1e-6)


@pytest.mark.parametrize("replacement", [True, False])
def test_transport_has_the_law_of_the_target_and_the_optimum(replacement):
  q, p = (laws[::7] for laws in pairs())
  rule, optimum = {
    True: (acceptance.optimal_transport, acceptance.optimal_acceptance),
    False: (
      acceptance.optimal_transport_without_replacement,
      acceptance.optimal_acceptance_without_replacement,
    ),
  }[replacement]
  law, accepted = output_law(rule, q, p, 2, replacement)
  np.testing.assert_allclose(law, p, atol=1e-6)
  np.testing.assert_allclose(optimum(log(q), log(p), 2), accepted, atol=1e-6)


def test_transport_under_vmap_and_jit():
  q, p = np.random.default_rng(2).dirichlet(np.ones(3), size=(2, 4))
  drafts = jnp.asarray([[0, 1], [2, 2], [1, 0], [2, 1]])
  whole = acceptance.optimal_transport(drafts, log(q), log(p))
  rows = jax.jit(jax.vmap(acceptance.optimal_transport))(drafts, log(q), log(p))
  jax.tree.map(np.testing.assert_array_equal, whole, rows)


def test_one_draft_is_the_maximal_coupling_by_any_rule():
  q, p = pairs()
  drafts = np.arange(4)[:, None]
  want = judge(coupling.maximal_one, drafts, log(q), log(p))
  law = targets.softmax(want.residual)
  for rule in (
    coupling.k_sequential,
    coupling.recursive_rejection,
    coupling.recursive_rejection_without_replacement,
  ):
    got = judge(rule, drafts, log(q), log(p))
    np.testing.assert_allclose(got.accept, want.accept, atol=1e-6)
    apart = 1 - np.minimum(q, p).sum(axis=1) > 1e-4  # elsewhere the residual is rounding
    np.testing.assert_allclose(targets.softmax(got.residual)[apart], law[apart], atol=1e-5)


@pytest.mark.parametrize("name", [name for name in REPLACING if not name.startswith("match")])
def test_an_equal_draft_is_always_taken(name):
  rule, n, _ = REPLACING[name]
  _, p = pairs()
  drafts = np.array(list(itertools.product(range(4), repeat=n)))
  first = judge(rule, drafts, log(p), log(p)).accept[..., 0]
  np.testing.assert_array_equal(first, p[:, drafts[:, 0]] > 0)


def root(q, p, n):
  """rho of K-SEQ by its defining equation, in float64."""
  mass = lambda rho: np.minimum(q, p / rho).sum()
  return optimize.brentq(lambda rho: 1 - (1 - mass(rho)) ** n - rho * mass(rho), 1, n, xtol=1e-13)


@pytest.mark.parametrize("n", [2, 4, 16])
def test_the_ratio_of_k_sequential_solves_its_equation(n):
  rng = np.random.default_rng(n)
  q, p = rng.dirichlet(np.full(50, 0.5), size=(2, 60))
  q[30:] = 0.8 * p[30:] + 0.2 * q[30:]
  got = np.asarray(jax.jit(coupling.k_sequential_ratio, static_argnums=2)(log(q), log(p), n))
  mass = lambda q, p, rho: np.minimum(p, rho * q).sum()
  for row in zip(q, p, got, strict=True):
    assert abs(mass(*row) - mass(*row[:2], root(*row[:2], n))) < 1e-6
  np.testing.assert_array_equal(coupling.k_sequential_ratio(log(p), log(p), n), 1)


def test_log_minus_keeps_small_differences_and_small_numbers():
  a = np.array([-0.5, -1.0, -60.0, -3.0, -np.inf, -np.inf, -200.0], np.float32)
  b = np.array([-0.5 - 2.0**-20, -1.0, -61.0, -np.inf, -np.inf, -1.0, -200.125], np.float32)
  wide = np.float64(a), np.float64(b)
  with np.errstate(divide="ignore"):
    want = np.log(np.maximum(np.exp(wide[0]) - np.exp(wide[1]), 0))
  got = np.asarray(coupling.log_minus(jnp.asarray(a), jnp.asarray(b)))
  np.testing.assert_allclose(got, want, rtol=1e-6)
  gradient = jax.grad(lambda a: jnp.sum(coupling.log_minus(a, jnp.asarray(b))[:3]))(jnp.asarray(a))
  assert np.isfinite(gradient[:3]).all()


NUM_DRAWS = 20_000  # of five tokens
compiled = functools.cache(lambda rule: jax.jit(coupling.select(rule)))


def selections(rule, drafts, q, p):
  keys = jax.random.split(jax.random.key(4), NUM_DRAWS)
  rows = lambda law: jnp.broadcast_to(log(law), (NUM_DRAWS, 5))
  got = compiled(rule)(keys, jnp.asarray(drafts, jnp.int32), rows(q), rows(p))
  return jax.tree.map(np.asarray, got)


def test_a_coin_of_probability_one_never_fails_and_of_zero_always_does():
  q, p = [0.5, 0.5, 0, 0, 0], [1.0, 0, 0, 0, 0]
  for draft, index in ((0, 0), (1, -1), (2, -1)):
    got = selections(coupling.maximal_one, np.full((NUM_DRAWS, 1), draft), q, p)
    assert (got.index == index).all() and (got.token == 0).all()


SELECTED = {
  "maximal_one": (coupling.maximal_one, 1, True),
  "k_sequential": (coupling.k_sequential, 3, True),
  "recursive without": (coupling.recursive_rejection_without_replacement, 3, False),
}


@pytest.mark.parametrize("name", SELECTED)
def test_what_is_drawn_has_the_law_of_the_target(name):
  rule, n, replacement = SELECTED[name]
  rng = np.random.default_rng(3)
  q, p = np.array([0.4, 0.3, 0.2, 0.1, 0.0]), np.array([0.1, 0.15, 0.0, 0.5, 0.25])
  drafts = np.stack([rng.choice(5, n, replace=replacement, p=q) for _ in range(NUM_DRAWS)])
  got = selections(rule, drafts, q, p)
  targets.check_law(got.token[:, None], p)
  taken = got.index >= 0
  np.testing.assert_array_equal(got.token[taken], drafts[taken, got.index[taken]])
  _, accepted = output_law(rule, q[None], p[None], n, replacement)
  assert abs(taken.mean() - accepted[0]) < 4 * np.sqrt(0.25 / NUM_DRAWS)
  assert abs(got.accept_prob.sum(axis=1).mean() - accepted[0]) < 4 * np.sqrt(0.25 / NUM_DRAWS)


def test_any_leading_dimensions_and_each_row_by_its_own_key():
  rng = np.random.default_rng(5)
  q, p = rng.dirichlet(np.ones(7), size=(2, 2, 3))
  drafts = jnp.asarray(rng.integers(7, size=(2, 3, 2)), jnp.int32)
  keys = jax.random.split(jax.random.key(6), (2, 3))
  select = coupling.select(coupling.recursive_rejection)
  got = jax.jit(select)(keys, drafts, log(q), log(p))
  assert got.token.shape == (2, 3) and got.accept_prob.shape == (2, 3, 2)
  assert got.token.dtype == got.index.dtype == jnp.int32
  alone = jax.jit(jax.vmap(jax.vmap(select)))(jax.random.clone(keys), drafts, log(q), log(p))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), alone, got)


def test_maximal_one_refuses_two_drafts():
  with pytest.raises(ValueError, match="judges 1 draft, not 2"):
    coupling.maximal_one(jnp.array([0, 1]), log(np.ones(3) / 3), log(np.ones(3) / 3))
