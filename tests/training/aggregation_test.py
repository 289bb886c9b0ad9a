"""Aggregations: by hand, rows without tokens, padding, and microbatches of a real step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ancestral.training import aggregation, policy, state, step

LOSS = jnp.array([[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0], [5.0, 6.0, 7.0, 8.0]])
MASK = jnp.array([[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]])
PROMPT = jnp.array([7, 7, 7])
CONSTANT = functools.partial(aggregation.constant_length, max_length=10)
ONE_PROMPT = functools.partial(
  aggregation.prompt_mean, prompt_tokens=aggregation.tokens_of_prompt(MASK, PROMPT)
)


def mean(aggregate, loss=LOSS, mask=MASK):
  losses, weights = aggregate(loss, mask)
  return float(jnp.sum(losses) / jnp.sum(weights))


@pytest.mark.parametrize(
  "aggregate, losses, weights",
  [
    (aggregation.token_mean, [7, 0, 6], [3, 0, 1]),
    (aggregation.sequence_mean, [7 / 3, 0, 6], [1, 0, 1]),
    (aggregation.sequence_sum, [7, 0, 6], [1, 0, 1]),
    (CONSTANT, [0.7, 0, 0.6], [1, 0, 1]),
    (ONE_PROMPT, [7 / 4, 0, 6 / 4], [3 / 4, 0, 1 / 4]),
    (aggregation.local_token_mean, [7 * 2 / 4, 0, 6 * 2 / 4], [1, 0, 1]),
  ],
)
def test_aggregations_worked_by_hand(aggregate, losses, weights):
  found = aggregate(LOSS, MASK)
  np.testing.assert_allclose(found[0], losses, rtol=1e-6)
  np.testing.assert_allclose(found[1], weights, rtol=1e-6)


def test_prompts_weigh_the_same_whatever_they_hold():
  prompt = jnp.array([3, 3, -1])  # of 3 tokens, and of 1
  tokens = aggregation.tokens_of_prompt(MASK, prompt)
  np.testing.assert_array_equal(tokens, [3, 3, 1])
  aggregate = functools.partial(aggregation.prompt_mean, prompt_tokens=tokens)
  assert mean(aggregate) == pytest.approx((7 / 3 + 6) / 2, rel=1e-6)


ALL = [
  aggregation.token_mean,
  aggregation.sequence_mean,
  aggregation.sequence_sum,
  aggregation.local_token_mean,
  CONSTANT,
  ONE_PROMPT,
]


@pytest.mark.parametrize("aggregate", ALL)
def test_losses_at_masked_tokens_are_not_read(aggregate):
  junk = jnp.where(MASK != 0, LOSS, jnp.nan)
  value, gradient = jax.value_and_grad(lambda loss: aggregate(loss, MASK)[0].sum())(junk)
  assert value == aggregate(LOSS, MASK)[0].sum()
  assert np.all(np.isfinite(gradient)) and not np.any(np.asarray(gradient)[np.asarray(MASK) == 0])


@pytest.mark.parametrize("aggregate", ALL)
def test_a_batch_without_tokens_has_neither_loss_nor_weight(aggregate):
  empty = jnp.zeros((3, 4))
  (losses, weights), pull = jax.vjp(lambda loss: aggregate(loss, empty), LOSS)
  assert not np.any(losses) and np.all(np.asarray(weights) >= 0)
  assert not np.any(pull((jnp.ones(3), jnp.zeros(3)))[0])
  assert aggregate is ONE_PROMPT or not np.any(weights)


@pytest.mark.parametrize("aggregate", ALL)
def test_padding_on_either_side_changes_nothing(aggregate):
  for sides in ((2, 0), (0, 3)):
    wide, mask = (jnp.pad(x, ((0, 0), sides), constant_values=c) for x, c in ((LOSS, 9), (MASK, 0)))
    found = aggregate(wide, mask)
    jax.tree.map(np.testing.assert_array_equal, found, aggregate(LOSS, MASK))


B, T, V = 8, 6, 4
RNG = np.random.default_rng(0)
LENGTHS = np.array([6, 0, 1, 5, 2, 6, 1, 4])
ROLLOUT = {
  "tokens": jnp.asarray(RNG.integers(0, V, (B, T)), jnp.int32),
  "mask": jnp.asarray(np.arange(T) < LENGTHS[:, None]),
  "advantage": jnp.asarray(RNG.normal(size=(B, 1)) * np.ones((1, T)), jnp.float32),
}
ROLLOUT["prompt_tokens"] = aggregation.tokens_of_prompt(
  ROLLOUT["mask"], jnp.array([0, 0, 1, 1, 2, 2, 2, 2])
)
TABLE = jnp.asarray(RNG.normal(size=(T, V)), jnp.float32)


def gradient_of_step(aggregate, num_microbatches):
  """What one step of plain gradient descent subtracts."""

  def loss_fn(key, params, batch):
    table = jax.nn.log_softmax(params)
    log_prob = table[jnp.arange(T)[None, :], batch["tokens"]]
    old = jax.lax.stop_gradient(log_prob) + 0.05
    losses = policy.ppo_clip(log_prob, old, batch["advantage"], batch["mask"])
    return aggregate(losses, batch), {}

  optimizer, averaging = optax.sgd(1.0), state.no_average()
  held = state.init(jax.random.key(0), lambda key: jnp.copy(TABLE), optimizer, averaging)
  held, _ = step.train_step(
    jax.random.key(1),
    held,
    ROLLOUT,
    loss_fn=loss_fn,
    optimizer=optimizer,
    averaging=averaging,
    num_microbatches=num_microbatches,
  )
  return np.asarray(TABLE - held.params)


GLOBAL = [
  lambda loss, batch: aggregation.token_mean(loss, batch["mask"]),
  lambda loss, batch: aggregation.sequence_mean(loss, batch["mask"]),
  lambda loss, batch: aggregation.sequence_sum(loss, batch["mask"]),
  lambda loss, batch: aggregation.constant_length(loss, batch["mask"], max_length=T),
  lambda loss, batch: aggregation.prompt_mean(
    loss, batch["mask"], prompt_tokens=batch["prompt_tokens"]
  ),
]


@pytest.mark.parametrize("aggregate", GLOBAL)
def test_microbatches_do_not_change_the_gradient(aggregate):
  whole = gradient_of_step(aggregate, 1)
  for num_microbatches in (2, 4):
    found = gradient_of_step(aggregate, num_microbatches)
    np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-6)
  assert np.abs(whole).max() > 0.01


def test_microbatches_change_the_gradient_of_the_local_mean():
  aggregate = lambda loss, batch: aggregation.local_token_mean(loss, batch["mask"])
  whole = gradient_of_step(aggregate, 1)
  np.testing.assert_allclose(whole, gradient_of_step(GLOBAL[0], 1), rtol=1e-4, atol=1e-6)
  for num_microbatches in (2, 4):
    found = gradient_of_step(aggregate, num_microbatches)
    assert np.abs(found - whole).max() > 0.1 * np.abs(whole).max()
