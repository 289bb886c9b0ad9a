"""Losses of drafters: values by numpy, gradients in closed form and by differences, masks."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.models import base, eagle, early_exit, transformer
from ancestral.training import drafters

SMALL = {"num_layers": 1, "vocab_size": 7, "width": 16}
RNG = np.random.default_rng(0)
BATCH = {
  "tokens": jnp.asarray(RNG.integers(0, 7, (3, 6)), jnp.int32),
  "targets": jnp.asarray(RNG.integers(0, 7, (3, 6)), jnp.int32),
  "mask": jnp.asarray(RNG.uniform(size=(3, 6)) < 0.7).at[1].set(False),  # row 1 has no target
}
MASK = np.asarray(BATCH["mask"], np.float64)
KEY = 3


@pytest.fixture(autouse=True)
def exact_matmuls():
  with jax.default_matmul_precision("highest"):
    yield


@functools.cache
def target():
  model = transformer.transformer(targets.tiny_config(**SMALL))
  return model, targets.fixed_params(model)


@functools.cache
def head():
  head = eagle.eagle(targets.tiny_config(**SMALL))
  shim = types.SimpleNamespace(init=lambda key, tokens: head.init(key))
  return head, targets.fixed_params(shim, 1)


@functools.cache
def draft():
  model = transformer.transformer(targets.tiny_config(**{**SMALL, "width": 8}))
  return model, targets.fixed_params(model, 2)


def run(loss_fn, params, batch):
  """The loss, its summed gradient, weights and metrics."""

  def summed(params):
    (losses, weights), metrics = loss_fn(jax.random.key(KEY), params, batch)
    return losses.sum(), (losses, weights, metrics)

  gradient, (losses, weights, metrics) = jax.jit(jax.grad(summed, has_aux=True))(params)
  return losses, gradient, weights, metrics


def laws(logits):
  """p, and log p, in float64."""
  p = targets.softmax(logits)
  return p, np.log(p)


def divergences(target_logits, logits):
  """KL(p || q) and sum_v min(p, q), [..., V] -> [...]."""
  (p, log_p), (q, log_q) = laws(target_logits), laws(logits)
  return (p * (log_p - log_q)).sum(axis=-1), np.minimum(p, q).sum(axis=-1)


def check_slope(loss_fn, params, batch, gradient, size=0.01):
  """Along the gradient and a random direction at once, by differences of fourth order."""
  unit = lambda leaves: [leaf / np.sqrt(sum(np.vdot(x, x) for x in leaves)) for leaf in leaves]
  rng, leaves = np.random.default_rng(5), jax.tree.leaves(gradient)
  noise = unit([rng.normal(size=leaf.shape) for leaf in leaves])
  direction = [jnp.asarray(a + b, jnp.float32) for a, b in zip(unit(leaves), noise, strict=True)]
  step = jax.tree.unflatten(jax.tree.structure(gradient), direction)
  total = jax.jit(lambda params: loss_fn(jax.random.key(KEY), params, batch)[0][0].sum())
  at = lambda t: float(total(jax.tree.map(lambda leaf, move: leaf + t * move, params, step)))
  near, far = at(size) - at(-size), at(2 * size) - at(-2 * size)
  found = sum(np.vdot(a, b) for a, b in zip(leaves, direction, strict=True))
  assert found > 0.1
  assert found == pytest.approx((8 * near - far) / (12 * size), rel=2e-3)


def test_divergence_of_laws_worked_by_hand():
  p, q = np.array([[0.5, 0.25, 0.25], [1, 0, 0]]), np.array([[0.25, 0.25, 0.5], [0.5, 0.5, 0]])
  with np.errstate(divide="ignore"):
    apart, accepted = drafters.divergence(jnp.log(jnp.asarray(p)) + 3, jnp.log(jnp.asarray(q)) - 2)
  np.testing.assert_allclose(apart, [0.25 * np.log(2), np.log(2)], rtol=1e-5)
  np.testing.assert_allclose(accepted, [0.75, 0.5], rtol=1e-6)
  same, all_of_it = drafters.divergence(jnp.log(jnp.asarray(p)), jnp.log(jnp.asarray(p)))
  np.testing.assert_allclose(same, 0, atol=1e-6)
  np.testing.assert_allclose(all_of_it, 1, rtol=1e-6)


def test_gradient_of_divergence_is_q_minus_p():
  rng = np.random.default_rng(1)
  target_logits, logits = jnp.asarray(2 * rng.normal(size=(2, 5, 7)), jnp.float32)
  gradient = jax.grad(lambda logits: drafters.divergence(target_logits, logits)[0].sum())(logits)
  expected = targets.softmax(logits) - targets.softmax(target_logits)
  np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_smooth_l1_is_a_parabola_and_then_lines():
  error = jnp.array([-3.0, -1.0, -0.5, 0.0, 0.2, 1.0, 4.0])
  expected = [2.5, 0.5, 0.125, 0, 0.02, 0.5, 3.5]
  np.testing.assert_allclose(drafters.smooth_l1(error), expected, rtol=1e-6)
  slopes = jax.vmap(jax.grad(drafters.smooth_l1))(error)
  np.testing.assert_allclose(slopes, np.clip(error, -1, 1), rtol=1e-6)


@pytest.mark.parametrize("chunk", [4, 256])
def test_chunks_equal_the_whole(chunk):
  rng = np.random.default_rng(2)
  one, other = (jnp.asarray(rng.normal(size=(3, 6, d)), jnp.float32) for d in (4, 5))
  kernels = [jnp.asarray(rng.normal(size=(d, 7)), jnp.float32) for d in (4, 5)]
  weights = jnp.asarray(rng.uniform(size=(3, 6)), jnp.float32).at[2, 3].set(0)

  def sums(kernel, other):
    return drafters.chunked_divergence(
      lambda x: jnp.matmul(x, kernels[0]),
      lambda x: jnp.matmul(x, kernel),
      one,
      other,
      weights,
      chunk=chunk,
    )

  logits = [
    np.asarray(x, np.float64) @ np.asarray(k, np.float64)
    for x, k in zip((one, other), kernels, strict=True)
  ]
  for found, expected in zip(sums(kernels[1], other), divergences(*logits), strict=True):
    np.testing.assert_allclose(found, (expected * weights).sum(axis=1), rtol=1e-5)
  by_kernel, by_hidden = jax.grad(lambda *args: sums(*args)[0].sum(), argnums=(0, 1))(
    kernels[1], other
  )
  by_logits = (targets.softmax(logits[1]) - targets.softmax(logits[0])) * weights[..., None]
  np.testing.assert_allclose(by_kernel, np.einsum("bld,blv->dv", other, by_logits), atol=1e-5)
  np.testing.assert_allclose(by_hidden, by_logits @ np.asarray(kernels[1]).T, atol=1e-5)


def test_what_is_masked_may_be_impossible():
  logits = jnp.array([[[0.0, -jnp.inf], [0.0, 0.0]]])
  mask = jnp.array([[0.0, 1.0]])
  sums = lambda logits: drafters.chunked_divergence(
    lambda x: x,
    lambda x: x,
    jnp.log(jnp.array([[[0.5, 0.5], [0.75, 0.25]]])),
    logits,
    mask,
    chunk=1,
  )
  apart, gradient = jax.value_and_grad(lambda logits: sums(logits)[0][0])(logits)
  assert apart == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5), rel=1e-5)
  np.testing.assert_allclose(gradient, [[[0, 0], [-0.25, 0.25]]], atol=1e-6)


@pytest.mark.slow
def test_feature_prediction_by_hand():
  (model, params), (feature_model, head_params) = target(), head()
  weights = {"feature_weight": 0.7, "law_weight": 0.3, "noise": 0.0}
  loss_fn = drafters.feature_prediction(model, params, feature_model, chunk=4, **weights)
  losses, gradient, counts, metrics = run(loss_fn, head_params, BATCH)
  true, _ = targets.apply(model, params, BATCH["tokens"])
  known = jnp.asarray(np.concatenate([np.zeros((3, 1, 16)), true[:, :-1]], axis=1), jnp.float32)
  embedded = model.embed(params, BATCH["tokens"])
  predicted, _ = jax.jit(feature_model.trunk)(head_params, known, embedded)
  error = np.abs(np.asarray(predicted - true, np.float64))
  assert (error < 1).any() and (error > 1).any()
  feature = np.where(error < 1, error**2 / 2, error - 0.5).mean(axis=-1)
  apart, accepted = divergences(model.readout(params, true), model.readout(params, predicted))
  of_row = lambda terms: (terms * MASK).sum(axis=1)
  np.testing.assert_allclose(losses, of_row(0.7 * feature + 0.3 * apart), rtol=1e-4)
  np.testing.assert_allclose(metrics["feature"], of_row(feature), rtol=1e-4)
  np.testing.assert_allclose(metrics["divergence"], of_row(apart), rtol=1e-4)
  np.testing.assert_allclose(metrics["acceptance"], of_row(accepted), rtol=1e-4)
  np.testing.assert_array_equal(counts, MASK.sum(axis=1))
  assert losses[1] == 0 and losses[0] > 0.5
  check_slope(loss_fn, head_params, BATCH, gradient)


def test_noise_is_uniform_on_the_features_that_the_head_reads():
  seen = []

  def trunk(params, features, embedded, cache=None, *, key=None, **places):
    seen.append(features)
    return features * params, cache

  spy = eagle.FeatureModel(None, None, trunk)
  one_hot = base.LanguageModel(
    init=None,
    init_cache=None,
    embed=lambda params, tokens: jax.nn.one_hot(tokens, 16),
    trunk=lambda params, x, **places: (x, None),
    readout=lambda params, hidden: hidden,
  )
  tokens = jnp.asarray(np.random.default_rng(6).integers(0, 16, (64, 9)))
  loss_fn = drafters.feature_prediction(one_hot, (), spy, noise=0.1)
  batch = {"tokens": tokens, "mask": jnp.ones((64, 9), bool)}
  for key in (None, jax.random.key(KEY)):
    loss_fn(key, jnp.ones(()), batch)
  known = np.concatenate([np.zeros((64, 1, 16)), np.eye(16)[tokens[:, :-1]]], axis=1)
  clean, noisy = np.asarray(seen, np.float64)
  np.testing.assert_array_equal(clean, known)  # without a key, as for evaluation
  np.testing.assert_array_equal(noisy[:, 0], 0)  # no feature is before the first token
  noise = (noisy - known)[:, 1:].ravel()
  assert np.abs(noise).max() <= 0.1 + 1e-6 and np.abs(noise.mean()) < 0.003
  np.testing.assert_allclose(noise.var(), 0.2**2 / 12, rtol=0.05)


def packed(rows, length):
  """Texts end to end in rows, as data.py has them."""
  names = ("tokens", "targets", "mask", "segments", "positions")
  batch = {name: np.zeros((len(rows), length), np.int32) for name in names}
  for b, texts in enumerate(rows):
    start = 0
    for number, text in enumerate(texts):
      here = slice(start, start + len(text) - 1)
      batch["tokens"][b, here], batch["targets"][b, here] = text[:-1], text[1:]
      batch["mask"][b, here], batch["segments"][b, here] = 1, number + 1
      batch["positions"][b, here] = np.arange(len(text) - 1)
      start += len(text) - 1
  return {name: jnp.asarray(array) for name, array in batch.items()}


LOSSES = {
  "feature_prediction": lambda: (
    drafters.feature_prediction(*target(), head()[0], noise=0.0),
    head()[1],
  ),
  "distillation": lambda: (drafters.distillation(*target(), draft()[0]), draft()[1]),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_packed_batch_equals_its_documents_apart(name):
  loss_fn, params = LOSSES[name]()
  rng = np.random.default_rng(4)
  texts = [rng.integers(0, 7, size).tolist() for size in (5, 4, 8)]

  @jax.jit
  def gradient_and_losses(params, batch):
    def summed(params):
      losses, weights = loss_fn(jax.random.key(KEY), params, batch)[0]
      return losses.sum(), (losses, weights)

    return jax.grad(summed, has_aux=True)(params)

  together = gradient_and_losses(params, packed([texts[:2], texts[2:], []], 8))
  apart = gradient_and_losses(params, packed([[text] for text in texts], 8))
  (gradient, (losses, weights)), (expected, (alone, counts)) = together, apart
  np.testing.assert_allclose(losses, [alone[0] + alone[1], alone[2], 0], rtol=1e-4)
  np.testing.assert_array_equal(weights, [counts[0] + counts[1], counts[2], 0])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), gradient, expected)


def test_distillation_by_hand():
  (model, params), (small, small_params) = target(), draft()
  loss_fn = drafters.distillation(model, params, small, chunk=4)
  losses, gradient, weights, metrics = run(loss_fn, small_params, BATCH)
  logits = [
    of.readout(p, targets.apply(of, p, BATCH["tokens"])[0])
    for of, p in ((model, params), (small, small_params))
  ]
  apart, accepted = divergences(*logits)
  np.testing.assert_allclose(losses, (apart * MASK).sum(axis=1), rtol=1e-4)
  np.testing.assert_allclose(metrics["acceptance"], (accepted * MASK).sum(axis=1), rtol=1e-4)
  np.testing.assert_array_equal(weights, MASK.sum(axis=1))
  assert losses[1] == 0 and losses[0] > 0.1
  check_slope(loss_fn, small_params, BATCH, gradient)


def test_a_target_is_its_own_best_draft():
  model, params = target()
  losses, gradient, weights, metrics = run(
    drafters.distillation(model, params, model), params, BATCH
  )
  np.testing.assert_allclose(losses, 0, atol=1e-4)
  np.testing.assert_allclose(metrics["acceptance"], weights, rtol=1e-5)
  jax.tree.map(lambda leaf: np.testing.assert_allclose(leaf, 0, atol=1e-4), gradient)


def test_the_target_is_frozen():
  model, params = target()
  feature_model, head_params = head()

  def of_target(params):
    parts = [
      drafters.feature_prediction(model, params, feature_model)(
        jax.random.key(KEY), head_params, BATCH
      ),
      drafters.distillation(model, params, draft()[0])(jax.random.key(KEY), draft()[1], BATCH),
    ]
    return sum(losses.sum() for (losses, _), _ in parts)

  gradient = jax.jit(jax.grad(of_target))(params)
  jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0), gradient)


def test_early_exit_is_the_sum_of_two_losses_over_the_same_params():
  config = targets.tiny_config(**{**SMALL, "num_layers": 2})
  model = transformer.transformer(config)
  params, leaving = targets.fixed_params(model), early_exit.early_exit(config, 1)
  loss_fn = drafters.early_exit(model, leaving, weight=0.3, z_loss=0.01)
  losses, gradient, weights, metrics = run(loss_fn, params, BATCH)
  chosen = np.asarray(BATCH["targets"])
  expected, right = [], []
  for of in (model, leaving):
    logits = np.asarray(
      of.readout(params, targets.apply(of, params, BATCH["tokens"])[0]), np.float64
    )
    log_z = np.log(np.exp(logits).sum(axis=-1))
    picked = np.take_along_axis(logits, chosen[..., None], axis=-1)[..., 0]
    expected.append(((log_z - picked + 0.01 * log_z**2) * MASK).sum(axis=1))
    right.append(((logits.argmax(axis=-1) == chosen) * MASK).sum(axis=1))
  np.testing.assert_allclose(losses, expected[0] + 0.3 * expected[1], rtol=1e-4)
  np.testing.assert_array_equal(metrics["accuracy"], right[0])
  np.testing.assert_array_equal(metrics["exit_accuracy"], right[1])
  np.testing.assert_array_equal(weights, MASK.sum(axis=1))
  assert losses[1] == 0
  check_slope(loss_fn, params, BATCH, gradient)
