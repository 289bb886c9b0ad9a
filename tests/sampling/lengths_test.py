"""Draft lengths: closed forms, policies enumerated, simulated, carried out; a scan of batches."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.models import base
from ancestral.models import confidence as heads
from ancestral.sampling import drafting, lengths, logits

COST = 1 + 0.05 * np.arange(4)  # of verifying, K = 3
STAIRS = np.array([1, 1.5, 1.5, 1.5])  # where a first draft pays for those after it
TWO = (np.array([0.97, 0.45]), np.array([0.6, 0.4]))


def test_expected_tokens_by_hand_and_at_the_limits():
  assert lengths.expected_tokens(0.5, 2) == 1.75
  assert lengths.expected_tokens(0.0, 7) == 1 and lengths.expected_tokens(1.0, 7) == 8
  near = 1 - 1e-9
  np.testing.assert_allclose(lengths.expected_tokens(near, 7), 8 - 28e-9, rtol=1e-12)
  np.testing.assert_allclose(lengths.expected_tokens(0.9, 30), (1 - 0.9**31) / 0.1, rtol=1e-12)
  assert lengths.speed_up(0.5, 2, 0.1, COST) == pytest.approx(1.75 / (1.1 + 0.2))


def test_best_fixed_goes_from_none_to_all():
  free = np.ones(9)
  assert lengths.best_fixed(0.0, 0.1, free) == 0
  assert lengths.best_fixed(0.1, 0.1, free) == 0  # E / (1 + c) = 1: of equals, the least
  assert lengths.best_fixed(1.0, 0.1, free) == 8
  rates = [(1 - 0.8 ** (k + 1)) / 0.2 / (1 + 0.1 * k) for k in range(9)]
  assert lengths.best_fixed(0.8, 0.1, free) == int(np.argmax(rates)) > 1


def enumerated(values, weights, draft_cost, verify_cost):
  """The best rate of every policy: for each history of acceptances, whether to go on."""
  most = len(verify_cost) - 1
  histories = [h for k in range(most) for h in itertools.product(range(len(values)), repeat=k)]
  best = 0.0
  for choice in itertools.product([False, True], repeat=len(histories)):
    goes_on = dict(zip(histories, choice, strict=True))
    tokens = cost = 0.0
    for path in itertools.product(range(len(values)), repeat=most):
      weight = np.prod(weights[list(path)])
      made = 0
      while made < most and goes_on[path[:made]]:
        made += 1
      tokens += weight * (1 + np.cumprod(values[list(path[:made])]).sum())
      cost += weight * (verify_cost[made] + draft_cost * made)
    best = max(best, tokens / cost)
  return best


@pytest.mark.parametrize("draft_cost", [0.02, 0.15, 0.4, 0.9])
@pytest.mark.parametrize("verify", [COST, STAIRS], ids=["line", "stairs"])
@pytest.mark.parametrize("law", [TWO, (np.array([1.0, 0.0]), np.array([0.7, 0.3]))])
def test_the_optimal_policy_is_the_best_of_all(law, verify, draft_cost):
  best = enumerated(*law, draft_cost, verify)
  policy = lengths.optimal_stopping(*law, draft_cost, verify)
  np.testing.assert_allclose(policy.rate, best, rtol=2e-6)
  # Its thresholds, carried out on every path, have this rate.
  paths = np.array(list(itertools.product(range(2), repeat=3)))
  accept, weight = law[0][paths], np.prod(law[1][paths], axis=1)
  made = lengths.num_drafted(np.cumprod(accept, axis=1), policy.thresholds)
  tokens, cost = lengths.outcome(accept, made, draft_cost, verify)
  np.testing.assert_allclose((weight @ tokens) / (weight @ cost), best, rtol=1e-12)
  fixed = lengths.best_fixed(law[0] @ law[1], draft_cost, verify)
  assert best >= lengths.speed_up(law[0] @ law[1], fixed, draft_cost, verify)


def test_the_enumeration_can_tell_policies_apart():
  adaptive = enumerated(*TWO, 0.4, COST)
  mean = TWO[0] @ TWO[1]
  fixed = lengths.speed_up(mean, lengths.best_fixed(mean, 0.4, COST), 0.4, COST)
  assert adaptive > 1.02 * fixed


@pytest.mark.parametrize("accept", [0.0, 0.3, 0.8, 0.95, 1.0])
def test_a_law_of_one_value_leaves_a_fixed_length(accept):
  verify = 1 + 0.02 * np.arange(17)
  policy = lengths.optimal_stopping([accept], [1.0], 0.1, verify)
  fixed = lengths.best_fixed(accept, 0.1, verify)
  expected = lengths.speed_up(accept, fixed, 0.1, verify)
  np.testing.assert_allclose(policy.rate, expected, rtol=1e-6)
  survival = accept ** np.arange(1, 17, dtype=float)
  assert lengths.num_drafted(survival, policy.thresholds) == fixed


def test_the_rate_is_what_rounds_make_and_not_below_any_fixed_length():
  rng, verify = np.random.default_rng(0), 1 + 0.02 * np.arange(13)
  values = rng.beta(2, 0.6, 50)
  policy = lengths.optimal_stopping(values, np.full(50, 0.02), 0.2, verify)
  accept = rng.choice(values, (200_000, 12))
  made = lengths.num_drafted(np.cumprod(accept, axis=1), policy.thresholds)
  tokens, cost = lengths.outcome(accept, made, 0.2, verify)
  rate = tokens.sum() / cost.sum()
  error = np.std(tokens - rate * cost) / cost.mean() / len(cost) ** 0.5
  assert abs(rate - policy.rate) < 4 * error and error < 3e-3
  fixed = max(lengths.speed_up(values.mean(), k, 0.2, verify) for k in range(13))
  assert policy.rate > 1.01 * fixed
  # Costs are convex, so looking one draft ahead is optimal.
  myopic = 1 - policy.rate * (0.2 + 0.02) / values.mean()
  np.testing.assert_allclose(policy.thresholds, myopic, atol=1e-6)


def test_where_costs_are_not_convex_one_draft_ahead_is_not_enough():
  policy = lengths.optimal_stopping(*TWO, 0.02, STAIRS)
  assert policy.thresholds[0] >= 0 > 1 - policy.rate * 0.52 / (TWO[0] @ TWO[1])


def test_a_law_that_is_none_is_refused():
  with pytest.raises(ValueError, match=r"in \[0, 1\]"):
    lengths.optimal_stopping([1.2], [1.0], 0.1, COST)
  with pytest.raises(ValueError, match="sum to"):
    lengths.optimal_stopping([0.2, 0.3], [0.5, 0.4], 0.1, COST)


def test_hindsight_and_the_best_threshold_are_the_best_of_all():
  accept = np.random.default_rng(0).choice([0.2, 0.9], (6, 3))
  best = max(
    lengths.rate(accept, np.array(made), 0.3, COST)
    for made in itertools.product(range(4), repeat=6)
  )
  made = lengths.hindsight(accept, 0.3, COST)
  np.testing.assert_allclose(lengths.rate(accept, made, 0.3, COST), best, rtol=1e-12)
  survival = np.cumprod(accept, axis=1)
  rate = lambda h: lengths.rate(accept, lengths.num_drafted(survival, h), 0.3, COST)
  found = lengths.best_threshold(survival, accept, 0.3, COST)
  assert rate(found) == max(rate(h) for h in np.linspace(0, 1, 1001)) < best
  assert rate(found) > max(rate(0.0), rate(1.0))


def test_outcome_by_hand():
  accept = np.array([[0.5, 0.5, 1.0], [1.0, 0.0, 1.0]])
  tokens, cost = lengths.outcome(accept, np.array([2, 3]), 0.1, COST)
  np.testing.assert_allclose(tokens, [1.75, 2.0])
  np.testing.assert_allclose(cost, [1.1 + 0.2, 1.15 + 0.3])
  survival = np.cumprod(accept, axis=1)
  np.testing.assert_array_equal(lengths.num_drafted(survival, 0.6), [2, 2])
  np.testing.assert_array_equal(lengths.num_drafted(survival, [-1, 1, 1]), [0, 0])


def test_the_drafter_stops_where_the_policy_says():
  model, params = targets.tiny_target(num_layers=1, seed=1)
  head = heads.acceptance_head(width=8)
  head_params = jax.jit(head.init, static_argnums=1)(jax.random.key(3), 32)
  head_params["output"]["kernel"] *= 4  # opinions
  embed = lambda tokens: model.embed(params, tokens)
  accepted = lengths.confidence(head, head_params, embed)
  threshold = 0.8
  drafter = drafting.by_model(model, params, num_drafts=6, confidence=accepted, threshold=threshold)
  length, num = 3, 40
  prompts = np.random.default_rng(0).integers(0, 23, (num, length))
  prompts = targets.prompts_of(prompts.tolist())

  @jax.jit
  def draft(keys, prompts):
    tokens = jnp.pad(prompts.tokens, ((0, 0), (0, 8)))
    context = logits.Context(tokens, prompts.length, prompts.length)
    return drafter.draft(keys, context, drafter.init(prompts, 12))[0]

  drafts = draft(targets.keys_of(np.arange(num)), prompts)
  made = np.any(np.asarray(drafts.logits) > -np.inf, axis=2).sum(axis=1)

  @jax.jit
  def survival(drafts):  # of the drafts read at once; beyond the last they are zeros
    whole = jnp.concatenate([prompts.tokens, drafts.tokens], axis=1)
    hidden = base.apply(model, params, whole)[0][:, length - 1 : -1]
    return jnp.cumprod(accepted(hidden, drafts.tokens, model.readout(params, hidden)), axis=1)

  np.testing.assert_array_equal(lengths.num_drafted(survival(drafts), threshold), made)
  assert len(set(made)) > 3


MACHINE = {"num_parameters": 7e9, "weight_bytes": 14e9, "flops": 9e14, "bandwidth": 3e12}


@pytest.mark.parametrize("cache_bytes", [0.0, 2e6, 3e8])
@pytest.mark.parametrize("accept, num_drafts", [(0.8, 4), (0.55, 2), (0.95, 8), (0.3, 1)])
def test_crossover_against_a_scan(accept, num_drafts, cache_bytes):
  roofline = lengths.Roofline(**MACHINE, cache_bytes=cache_bytes)

  def pays(batch_size):
    verify = roofline.verify_cost(num_drafts, batch_size)
    return lengths.expected_tokens(accept, num_drafts) > verify + num_drafts * 0.07

  scan = next((size for size in range(1, 3000) if not pays(size)), math.inf)
  assert lengths.crossover(accept, num_drafts, 0.07, roofline) == scan
  assert (scan == math.inf) == (cache_bytes == 3e8)  # reading its cache idles the arithmetic


def test_crossover_of_drafts_that_never_pay():
  roofline = lengths.Roofline(**MACHINE)
  assert lengths.crossover(0.1, 3, 0.5, roofline) == 1
  with pytest.raises(ValueError, match="num_drafts=0"):
    lengths.crossover(0.5, 0, 0.1, roofline)


def test_own_probability_is_that_of_the_draft():
  logits = jnp.log(jnp.array([[0.1, 0.2, 0.7], [0.5, 0.5, 0.0]]))
  found = lengths.own_probability(jnp.zeros((2, 4)), jnp.array([1, 0]), logits)
  np.testing.assert_allclose(found, [0.2, 0.5], rtol=1e-6)
