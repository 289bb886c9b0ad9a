"""Losses of rows and of pairs, on a Markov chain whose log-probabilities are its parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.models import toy
from ancestral.training import (
  aggregation,
  kl,
  objectives,
  policy,
  preference,
  reference_free,
  scoring,
  unpaired,
)

VOCAB, B, L = 5, 4, 6
MODEL = toy.markov(VOCAB)
RNG = np.random.default_rng(0)
PARAMS = jnp.asarray(RNG.normal(size=(VOCAB, VOCAB)), jnp.float32)
REFERENCE = jnp.asarray(RNG.normal(size=(VOCAB, VOCAB)), jnp.float32)


def rows(seed):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(VOCAB, size=(B, L + 1))
  first, last = rng.integers(0, 2, B), rng.integers(3, L + 1, B)
  at = np.arange(L)[None, :]
  mask = (at >= first[:, None]) & (at < last[:, None])
  mask[-1] = False  # a row that is only filling
  made = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "mask": mask.astype(np.float32)}
  return jax.tree.map(jnp.asarray, made)


def scored(params, rows):
  return scoring.scores(MODEL, params, rows).log_prob


def policy_batch():
  made = rows(0)
  old = scored(PARAMS, made)
  advantage = jnp.asarray(RNG.normal(size=(B, 1)), jnp.float32) * made["mask"]
  return made | {
    "log_prob": old,
    "old_log_prob": old,
    "advantage": advantage,
    "reference_log_prob": scored(REFERENCE, made),
  }


def total(loss_fn, params, batch):
  (loss, weight), _ = loss_fn(None, params, batch)
  return jnp.sum(loss) / jnp.sum(weight)


@pytest.mark.parametrize(
  "surrogate", [policy.reinforce, policy.ppo_clip, policy.cispo, policy.gspo, policy.oreal]
)
def test_the_first_gradient_after_sampling_is_that_of_reinforce(surrogate):
  batch = policy_batch()
  loss_fn = objectives.of_tokens(
    MODEL, [objectives.surrogate(surrogate)], aggregation.token_mean, chunk=4
  )
  factor = jnp.where(batch["advantage"] < 0, 0.5, 1) if surrogate is policy.oreal else 1
  weights = factor * batch["advantage"]
  if surrogate is policy.gspo:  # the ratio of a sequence: its gradient is spread over its tokens
    weights = batch["advantage"]

  def by_hand(params):
    return -jnp.sum(weights * scored(params, batch)) / jnp.sum(batch["mask"])

  found = jax.grad(lambda params: total(loss_fn, params, batch))(PARAMS)
  np.testing.assert_allclose(found, jax.grad(by_hand)(PARAMS), atol=1e-6)


def test_terms_add_up_and_correction_weighs_the_surrogate_alone():
  batch = policy_batch()
  correction = jnp.asarray(RNG.uniform(0.5, 2, (B, L)), jnp.float32)
  terms = [
    objectives.surrogate(policy.reinforce),
    objectives.divergence(kl.k3, 0.3),
    objectives.entropy(0.2),
  ]
  loss = lambda terms, batch: total(
    objectives.of_tokens(MODEL, terms, aggregation.sequence_sum), PARAMS, batch
  )
  apart = [loss([term], batch) for term in terms]
  np.testing.assert_allclose(loss(terms, batch), sum(apart), rtol=1e-5)
  corrected = loss(terms, batch | {"correction": correction})
  by_hand = -jnp.sum(correction * batch["advantage"] * batch["old_log_prob"]) / (B - 1)
  np.testing.assert_allclose(corrected, by_hand + apart[1] + apart[2], rtol=1e-5)


def test_metrics_are_means_over_tokens():
  batch = policy_batch()
  loss_fn = objectives.of_tokens(
    MODEL, [objectives.surrogate(policy.reinforce)], aggregation.token_mean
  )
  shifted = batch | {"log_prob": batch["log_prob"] - jnp.log(2.0) * batch["mask"]}
  (_, weight), metrics = loss_fn(None, PARAMS, shifted)
  mean = {name: float(jnp.sum(value) / jnp.sum(weight)) for name, value in metrics.items()}
  mask = np.asarray(batch["mask"])
  d = np.asarray(batch["reference_log_prob"] - batch["log_prob"], np.float64)
  expected = np.sum((np.exp(d) - 1 - d) * mask) / mask.sum()
  np.testing.assert_allclose(mean["ratio"], 2, rtol=1e-5)
  np.testing.assert_allclose(mean["divergence"], expected, rtol=1e-4)


def pair_batch():
  sides = {}
  for seed, name in enumerate(("chosen", "rejected"), 1):
    made = rows(seed)
    weight = jnp.asarray(RNG.uniform(size=(B, L)), jnp.float32)
    sides[name] = made | {"weight": weight, "reference_log_prob": scored(REFERENCE, made)}
  return sides | {"weight": jnp.array([1.0, 1.0, 1.0, 0.0])}


def sums(batch, params, of_means=False):
  found = []
  for name in ("chosen", "rejected"):
    side = batch[name]
    weight = side["weight"] * side["mask"]
    ratio = scored(params, side) - (0 if of_means else side["reference_log_prob"])
    value = jnp.sum(weight * ratio, axis=-1)
    found.append(value / jnp.maximum(jnp.sum(weight, axis=-1), 1e-6) if of_means else value)
  return found


@pytest.mark.parametrize(
  "pairwise, by_hand",
  [
    (
      objectives.log_ratios(preference.dpo),
      lambda batch, p: preference.dpo(*sums(batch, p)),
    ),
    (
      objectives.mean_log_probs(reference_free.simpo),
      lambda batch, p: reference_free.simpo(*sums(batch, p, of_means=True)),
    ),
    (
      objectives.with_likelihood(objectives.log_ratios(preference.dpo), 0.5),
      lambda batch, p: preference.dpo(*sums(batch, p)) - 0.5 * sums(batch, p, of_means=True)[0],
    ),
    (
      objectives.margins(preference.aot),
      lambda batch, p: preference.aot(*_margins(batch, p)),
    ),
  ],
)
def test_pairs_are_read_by_weighted_sums_of_their_tokens(pairwise, by_hand):
  batch = pair_batch()
  loss_fn = objectives.of_pairs(MODEL, pairwise, chunk=4)
  expected = lambda params: jnp.sum(by_hand(batch, params)[:3]) / 3
  found = jax.value_and_grad(lambda params: total(loss_fn, params, batch))(PARAMS)
  wanted = jax.value_and_grad(expected)(PARAMS)
  np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
  np.testing.assert_allclose(found[1], wanted[1], atol=1e-6)


def _margins(batch, params):
  policy_margin = sum(
    sign * jnp.sum(batch[name]["weight"] * batch[name]["mask"] * scored(params, batch[name]), -1)
    for sign, name in ((1, "chosen"), (-1, "rejected"))
  )
  chosen, rejected = sums(batch, params)
  return policy_margin, policy_margin - (chosen - rejected)


def test_a_batch_of_filling_alone_has_loss_and_gradient_0():
  batch = jax.tree.map(jnp.zeros_like, pair_batch())
  loss_fn = objectives.of_pairs(MODEL, objectives.log_ratios(preference.dpo))
  summed = lambda params: jnp.sum(loss_fn(None, params, batch)[0][0])
  value, gradient = jax.value_and_grad(summed)(PARAMS)
  assert value == 0 and not np.any(gradient)


DESIRABLE = np.array([True, False, True, False])


def singles_batch():
  sides = {}
  for seed, name in enumerate(("sample", "mismatched"), 3):
    made = rows(seed)
    sides[name] = made | {"reference_log_prob": scored(REFERENCE, made)}
  weight = jnp.array([1.0, 1.0, 1.0, 0.0])
  return sides | {"desirable": jnp.asarray(DESIRABLE), "weight": weight}


def log_ratios(rows):
  """Of each row, and its gradient [V, V], by going through its tokens; float64."""
  law = lambda p: np.asarray(p) - np.log(np.exp(np.asarray(p, np.float64)).sum(-1, keepdims=True))
  log_p, log_q = law(PARAMS), law(REFERENCE)
  values, gradients = np.zeros(B), np.zeros((B, VOCAB, VOCAB))
  for row, t in zip(*np.nonzero(np.asarray(rows["mask"])), strict=True):
    a, b = int(rows["tokens"][row, t]), int(rows["targets"][row, t])
    values[row] += log_p[a, b] - log_q[a, b]
    gradients[row, a] += np.eye(VOCAB)[b] - np.exp(log_p[a])
  return values, gradients


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def kto_by_hand(x, mismatched):
  weights, point = np.where(DESIRABLE, 1.0, 3.0), max(mismatched[:3].mean(), 0)
  inner = np.where(DESIRABLE, 1, -1) * 0.5 * (x - point)
  slope = -weights * np.where(DESIRABLE, 1, -1) * 0.5 * sigmoid(inner) * sigmoid(-inner)
  return weights * sigmoid(-inner), slope


def apo_zero_by_hand(x, mismatched):
  inner = np.where(DESIRABLE, 1, -1) * 0.1 * x
  return sigmoid(-inner), -np.where(DESIRABLE, 1, -1) * 0.1 * sigmoid(inner) * sigmoid(-inner)


def bco_by_hand(x, mismatched):
  midpoint = ((x[0] + x[2]) / 2 + x[1]) / 2  # the last row is filling
  inner = np.where(DESIRABLE, 1, -1) * 0.5 * (x - midpoint)
  return -np.log(sigmoid(inner)), -np.where(DESIRABLE, 1, -1) * 0.5 * sigmoid(-inner)


@pytest.mark.parametrize(
  "loss, by_hand",
  [
    (
      objectives.around_divergence(
        functools.partial(unpaired.kto, beta=0.5, undesirable_weight=3.0)
      ),
      kto_by_hand,
    ),
    (objectives.around_zero(unpaired.apo_zero), apo_zero_by_hand),
    (objectives.around_midpoint(functools.partial(unpaired.bco, beta=0.5)), bco_by_hand),
  ],
)
@pytest.mark.parametrize("shift", [-2.0, 2.0])  # the divergence is above 0, and it is clamped
def test_singles_are_read_by_their_log_ratios_around_a_constant(loss, by_hand, shift):
  batch = singles_batch()
  others = batch["mismatched"]
  others["reference_log_prob"] += shift * others["mask"]
  x, gradients = log_ratios(batch["sample"])
  mismatched = log_ratios(others)[0] - shift * np.asarray(others["mask"]).sum(-1)
  assert (mismatched[:3].mean() > 0) == (shift < 0)
  losses, slopes = by_hand(x, mismatched)
  loss_fn = objectives.of_singles(MODEL, loss, chunk=4)
  value, gradient = jax.value_and_grad(lambda params: total(loss_fn, params, batch))(PARAMS)
  np.testing.assert_allclose(value, losses[:3].mean(), rtol=1e-5)
  expected = np.einsum("b,bij->ij", slopes[:3], gradients[:3]) / 3
  np.testing.assert_allclose(gradient, expected, atol=1e-6)
  (_, weight), metrics = loss_fn(None, PARAMS, batch)
  np.testing.assert_array_equal(metrics["desirable"], [1, 0, 1, 0])
  np.testing.assert_allclose(metrics["log_ratio"][:3], x[:3], rtol=1e-5)
  np.testing.assert_array_equal(metrics["preferred"], ((x > 0) == DESIRABLE) * np.asarray(weight))


@pytest.mark.parametrize(
  "loss",
  [
    objectives.around_divergence(unpaired.kto),
    objectives.around_zero(unpaired.apo_zero),
    objectives.around_midpoint(unpaired.bco),
  ],
)
def test_singles_that_are_filling_alone_have_loss_and_gradient_0(loss):
  batch = jax.tree.map(jnp.zeros_like, singles_batch())
  loss_fn = objectives.of_singles(MODEL, loss)
  summed = lambda params: jnp.sum(loss_fn(None, params, batch)[0][0])
  value, gradient = jax.value_and_grad(summed)(PARAMS)
  assert value == 0 and not np.any(gradient)


def test_dropout_is_off():
  """What drew the samples had none, nor has the reference: the first ratio is 1."""
  model, params = targets.tiny_target(num_layers=1, dropout=0.5)
  made = rows(0)
  score = lambda params: scoring.scores(model, params, made).log_prob
  batch = made | {
    "log_prob": score(params),
    "old_log_prob": score(params),
    "advantage": made["mask"],
  }
  loss_fn = objectives.of_tokens(
    model, [objectives.surrogate(policy.ppo_clip)], aggregation.token_mean
  )
  (_, weight), metrics = loss_fn(jax.random.key(0), params, batch)
  assert float(jnp.sum(metrics["ratio"]) / jnp.sum(weight)) == pytest.approx(1, abs=1e-5)
  side = made | {"weight": made["mask"], "reference_log_prob": score(params)}
  pair = {"chosen": side, "rejected": side, "weight": jnp.ones(B)}
  loss_fn = objectives.of_pairs(model, objectives.log_ratios(preference.dpo))
  (losses, _), _ = loss_fn(jax.random.key(0), params, pair)
  np.testing.assert_allclose(losses, np.log(2), rtol=1e-6)
