"""The bounds against linear programs and sums over all drafts, and the order of the rules."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.sampling import acceptance, coupling


def log(p, dtype=jnp.float32):
  with np.errstate(divide="ignore"):
    return jnp.asarray(np.log(p), dtype)


def pairs(vocab_size, num_pairs, seed=0):
  """q, p [N, V]: of all concentrations, one in two near each other, one in four with zeros."""
  rng = np.random.default_rng(seed)
  laws = rng.gamma(
    rng.choice([0.1, 0.3, 1, 5], size=(2, num_pairs, 1)), size=(2, num_pairs, vocab_size)
  )
  laws[:, ::4] *= rng.random(laws[:, ::4].shape) < 0.6
  laws += 1e-9 * (laws.sum(axis=-1, keepdims=True) == 0)
  q, p = laws / laws.sum(axis=-1, keepdims=True)
  share = rng.random((num_pairs, 1)) * (rng.random((num_pairs, 1)) < 0.5)
  return share * p + (1 - share) * q, p


def optima(q, p, n, replacement, **options):
  """The bound in float64."""
  bound = {
    True: acceptance.optimal_acceptance,
    False: acceptance.optimal_acceptance_without_replacement,
  }[replacement]
  with jax.enable_x64(True):
    laws = log(q, jnp.float64), log(p, jnp.float64)
    return np.asarray(jax.jit(lambda *laws: bound(*laws, n, **options))(*laws))


@pytest.mark.parametrize("vocab_size, n", [(3, 2), (4, 3), (8, 2), (8, 3), (5, 4)])
@pytest.mark.parametrize("replacement", [True, False])
def test_the_bound_is_the_value_of_the_linear_program(vocab_size, n, replacement):
  q, p = pairs(vocab_size, 12, seed=n)
  options = {} if replacement else {"num_nodes": 256}
  got = optima(q, p, n, replacement, **options)
  want = [
    acceptance.transport_plan(*laws, n, replacement=replacement)[1]
    for laws in zip(q, p, strict=True)
  ]
  np.testing.assert_allclose(got, want, atol=1e-9)


def test_the_law_of_the_drafts():
  q = np.array([0.5, 0.3, 0.2])
  with_, without = (acceptance.draft_law(q, 2, replacement=r) for r in (True, False))
  np.testing.assert_allclose(with_, np.outer(q, q))
  np.testing.assert_allclose(without[1], [0.3 * 0.5 / 0.7, 0, 0.3 * 0.2 / 0.7])
  np.testing.assert_allclose(acceptance.draft_law([1.0, 0.0], 3, replacement=False), [1, 0])


def test_without_replacement_the_integral_is_the_sum_over_drafts():
  rng = np.random.default_rng(1)
  q, p = rng.dirichlet(np.full(14, 0.6), size=2)
  law = acceptance.draft_law(q, 4, replacement=False)
  order = np.argsort(-q / p)
  inside = [law[np.ix_(*[order[:size]] * 4)].sum() for size in range(15)]
  want = 1 + min(p[order[:size]].sum() - inside[size] for size in range(15))
  got = optima(q[None], p[None], 4, False, num_nodes=128)[0]
  np.testing.assert_allclose(got, want, atol=1e-12)
  np.testing.assert_allclose(
    acceptance.optimal_acceptance_without_replacement(log(q), log(p), 4), want, atol=1e-6
  )


def test_a_draft_law_of_one_likely_token_and_a_far_tail():
  q = np.array([1 - 6e-9, 3e-9, 2e-9, 1e-9])
  p = np.array([0.1, 0.2, 0.3, 0.4])
  for n in (2, 3):
    want = acceptance.transport_plan(q, p, n, replacement=False)[1]
    got = acceptance.optimal_acceptance_without_replacement(log(q), log(p), n)
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_when_the_draft_law_has_few_tokens_all_of_them_are_drafts(n):
  q = np.array([[0.7, 0.3, 0, 0], [0, 1, 0, 0], [0.2, 0.3, 0.5, 0]])
  p = np.array([0.4, 0.3, 0.2, 0.1])
  got = acceptance.optimal_acceptance_without_replacement(log(q), log(np.tile(p, (3, 1))), n)
  want = [acceptance.transport_plan(law, p, n, replacement=False)[1] for law in q]
  np.testing.assert_allclose(got, want, atol=1e-6)
  few = (q > 0).sum(axis=1) <= n
  np.testing.assert_allclose(got[few], ((q > 0) @ p)[few], atol=1e-6)


def test_float32_at_a_large_vocabulary():
  rng = np.random.default_rng(2)
  logits = -1.2 * np.log1p(rng.permutation(5000)) + rng.normal(size=(2, 5000))
  q, p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  for n, replacement in itertools.product((2, 4), (True, False)):
    bound = {
      True: acceptance.optimal_acceptance,
      False: acceptance.optimal_acceptance_without_replacement,
    }[replacement]
    got = jax.jit(bound, static_argnums=2)(log(q), log(p), n)
    np.testing.assert_allclose(got, optima(q[None], p[None], n, replacement)[0], atol=1e-6)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_order_of_the_rules_on_a_thousand_pairs(n):
  with jax.enable_x64(True):
    q, p = pairs(12, 1000, seed=n)

    @jax.jit
    def ladder(log_q, log_p):
      return (
        acceptance.maximal_acceptance(log_q, log_p),
        acceptance.recursive_rejection_acceptance(log_q, log_p, n),
        acceptance.k_sequential_acceptance(log_q, log_p, n),
        acceptance.optimal_acceptance(log_q, log_p, n),
      )

    rungs = np.array(ladder(log(q, jnp.float64), log(p, jnp.float64)))
  assert (np.diff(rungs, axis=0) > -1e-9).all()
  assert (np.diff(rungs, axis=0).mean(axis=1) > 1e-3).all()
  assert (rungs[2] >= (1 - np.exp(-1)) * rungs[3] - 1e-9).all()


@pytest.mark.parametrize("n", [2, 3])
def test_recursive_rejection_without_replacement_stays_under_its_bound(n):
  q, p = pairs(5, 1000, seed=n)
  drafts = np.array(list(itertools.product(range(5), repeat=n)))
  shape = (len(q), len(drafts))
  rows = lambda law: jnp.repeat(log(law)[:, None], len(drafts), axis=1)
  judge = jax.jit(coupling.recursive_rejection_without_replacement)
  judged = judge(jnp.broadcast_to(jnp.asarray(drafts)[None], (*shape, n)), rows(q), rows(p))
  given = np.asarray(acceptance.acceptance_given(judged))
  full = (q > 0).sum(axis=1) >= n
  laws = [acceptance.draft_law(law, n, replacement=False).reshape(-1) for law in q[full]]
  got = np.einsum("nt,nt->n", np.array(laws), given[full])
  with_ = optima(q, p, n, True)[full]
  without = optima(q, p, n, False, num_nodes=256)[full]
  assert (got <= without + 1e-6).all() and (with_ <= without + 1e-9).all()
  assert (without - got).mean() > 1e-3 and (got > with_).any()


def test_one_draft_and_many():
  q, p = pairs(6, 50)
  one = [optima(q, p, 1, replacement) for replacement in (True, False)]
  np.testing.assert_allclose(one, np.tile(np.minimum(q, p).sum(axis=1), (2, 1)), atol=1e-12)
  growing = [optima(q, p, n, True) for n in (1, 2, 4, 4000)]
  assert (np.diff(growing, axis=0) > -1e-12).all()
  reachable = np.where(q > 1e-2, p, 0).sum(axis=1)
  assert (growing[-1] >= reachable - 1e-9).all()


def test_the_example_of_two_tokens_by_hand():
  # q = (2/3, 1/3), p = (1/3, 2/3), n = 2: over H = {0}, 1 + 1/3 - 4/9 = 8/9.
  q, p = log(np.array([2, 1]) / 3), log(np.array([1, 2]) / 3)
  np.testing.assert_allclose(acceptance.maximal_acceptance(q, p), 2 / 3, rtol=1e-6)
  np.testing.assert_allclose(acceptance.optimal_acceptance(q, p, 2), 8 / 9, rtol=1e-6)
  np.testing.assert_allclose(
    acceptance.optimal_acceptance_without_replacement(q, p, 2), 1, rtol=1e-6
  )
  # Of the first draft 2/3; then p_2 is all on token 1, which the second is with probability 1/3.
  np.testing.assert_allclose(
    acceptance.recursive_rejection_acceptance(q, p, 2), 1 - (1 / 3) * (2 / 3), rtol=1e-6
  )
