"""The acceptance loss: where it is least, on which drafts, and what a trained head then says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import targets
from ancestral.models import confidence as heads
from ancestral.sampling import logits
from ancestral.training import confidence, state, step

V = 5


@pytest.mark.parametrize("weights", [{}, {"accept_weight": 2.0, "reject_weight": 0.5}])
def test_the_weighted_loss_is_least_at_the_derived_confidence(weights):
  w_acc, w_rej = weights.get("accept_weight", 1.0), weights.get("reject_weight", 6.0)
  labels = np.array([0.2, 0.9, 1.0, 0.7])  # of one set of features
  mean = labels.mean()
  f = w_acc * mean / (w_acc * mean + w_rej * (1 - mean))

  def loss(logit):
    every = confidence.weighted_cross_entropy(jnp.full(4, logit), jnp.asarray(labels), **weights)
    return every.mean()

  best = np.log(f / (1 - f))
  assert abs(jax.grad(loss)(jnp.float32(best))) < 1e-6
  assert loss(best) < min(loss(best - 0.1), loss(best + 0.1))
  np.testing.assert_allclose(
    confidence.unweighted(best, **weights), np.log(mean / (1 - mean)), rtol=1e-6
  )
  by_hand = -(w_acc * labels * np.log(f) + w_rej * (1 - labels) * np.log(1 - f)).mean()
  np.testing.assert_allclose(loss(best), by_hand, rtol=1e-5)


def test_large_logits_are_finite():
  logit = jnp.array([300.0, -300.0])
  losses = confidence.weighted_cross_entropy(logit, jnp.array([0.5, 0.5]))
  np.testing.assert_allclose(losses, [900, 150], rtol=1e-6)


def pair():
  """Two Markov chains: logits, and probabilities [V, V]."""
  target, target_params = targets.markov_target(V, seed=1)
  draft, draft_params = targets.markov_target(V, seed=2)
  return (target, target_params, draft, draft_params)


def head_of_the_state():
  """Its logit is a table over (last token, draft), of which the first is told by its law."""

  def logit(params, of):
    last = jnp.argmin(
      jnp.sum(jnp.square(of.hidden[..., None, :] - pair()[3][None, None]), axis=-1), axis=-1
    )
    return params[last, jnp.argmax(of.embedding, axis=-1)]

  return heads.Head(lambda key, size: jnp.zeros((V, V)), logit)


def batch_of(tokens, **fields):
  return {"tokens": tokens, "targets": tokens, "mask": jnp.ones(tokens.shape), **fields}


@pytest.mark.parametrize("reject_weight", [1.0, 6.0])
def test_a_trained_table_holds_what_the_weights_make_of_min_1_p_over_q(reject_weight):
  models, head = pair(), head_of_the_state()
  loss_fn = confidence.acceptance(head, *models, reject_weight=reject_weight)
  optimizer = optax.adam(0.3)
  update = jax.jit(
    functools.partial(
      step.train_step, loss_fn=loss_fn, optimizer=optimizer, averaging=state.no_average()
    )
  )
  made = state.init(jax.random.key(0), lambda key: jnp.zeros((V, V)), optimizer, state.no_average())
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, V, (32, 16)), jnp.int32)
  for _ in range(100):
    made, metrics = update(jax.random.key(1), made, batch_of(tokens))
  p, q = (targets.softmax(models[i]) for i in (1, 3))
  accept = np.minimum(1, p / q)
  found = jax.nn.sigmoid(confidence.unweighted(made.params, reject_weight=reject_weight))
  sure = (q > 0.05) & (accept < 1)
  np.testing.assert_allclose(np.asarray(found)[sure], accept[sure], atol=0.01)
  assert np.all(np.asarray(found)[(q > 0.05) & (accept == 1)] > 0.97)
  if reject_weight == 1:
    assert abs(metrics["accept"] - metrics["confidence"]) < 0.02
  else:
    assert metrics["accept"] - metrics["confidence"] > 0.1


def rows(key, loss_fn, params, batch):
  return jax.jit(loss_fn)(key, params, batch)


def test_the_label_is_the_mean_acceptance_over_drafts():
  """With no mixing, E_y min(1, p / q) at each position is 1 - TV of the two laws there."""
  models = pair()
  loss_fn = confidence.acceptance(head_of_the_state(), *models, mixing=0.0)
  tokens = jnp.broadcast_to(jnp.array([2, 4, 0, 1]), (5000, 4))
  (_, weight), metrics = rows(jax.random.key(0), loss_fn, jnp.zeros((V, V)), batch_of(tokens))
  p, q = (targets.softmax(models[i])[[2, 4, 0, 1]] for i in (1, 3))
  per_row = np.asarray(metrics["accept"])
  np.testing.assert_array_equal(weight, 4)
  error = per_row.std() / len(per_row) ** 0.5
  assert abs(per_row.mean() - np.minimum(p, q).sum()) < 4 * error


def test_mixing_changes_contexts_by_drafts_within_a_document():
  """At mixing 1 a token's law of context is the draft model's; the first of a document stays."""
  models = pair()
  loss_fn = confidence.acceptance(head_of_the_state(), *models, mixing=1.0)
  tokens = jnp.broadcast_to(jnp.array([2, 4, 0]), (10_000, 3))
  mask = jnp.broadcast_to(jnp.array([0.0, 1.0, 0.0]), tokens.shape)
  p, q = (targets.softmax(models[i]) for i in (1, 3))
  overlap = np.minimum(p, q).sum(axis=1)
  for segments, expected in (([1, 1, 1], q[2] @ overlap), ([1, 2, 2], overlap[4])):
    segments = jnp.broadcast_to(jnp.array(segments), tokens.shape)
    batch = batch_of(tokens, segments=segments, positions=jnp.zeros_like(tokens)) | {"mask": mask}
    # A Markov chain has no segments of its own: its law depends on the last token alone.
    _, metrics = rows(jax.random.key(1), loss_fn, jnp.zeros((V, V)), batch)
    per_row = np.asarray(metrics["accept"])
    assert abs(per_row.mean() - expected) < 4 * per_row.std() / len(per_row) ** 0.5
  assert abs(q[2] @ overlap - overlap[4]) > 0.02


def test_both_laws_are_transformed():
  models = pair()
  loss_fn = confidence.acceptance(
    head_of_the_state(), *models, transform=logits.greedy(), mixing=0.0
  )
  tokens = jnp.arange(V)[None, :]
  _, metrics = rows(jax.random.key(0), loss_fn, jnp.zeros((V, V)), batch_of(tokens))
  agree = [np.argmax(models[1][v]) == np.argmax(models[3][v]) for v in range(V)]
  assert metrics["accept"][0] == sum(agree)


def test_only_the_head_has_gradients_and_masked_positions_none():
  target, target_params = targets.tiny_target(seed=0)
  draft, draft_params = targets.tiny_target(num_layers=1, seed=1)
  head = heads.acceptance_head(width=8)
  params = jax.jit(head.init, static_argnums=1)(jax.random.key(0), 32)
  rng = np.random.default_rng(0)
  tokens = jnp.asarray(rng.integers(0, 23, (3, 12)), jnp.int32)
  segments = jnp.broadcast_to(jnp.arange(12)[None, :] // 6 + 1, (3, 12))
  fields = {"segments": segments, "positions": jnp.broadcast_to(jnp.arange(12) % 6, (3, 12))}
  batch = batch_of(tokens, **fields) | {"mask": jnp.ones((3, 12)).at[1].set(0).at[:, 6:].set(0)}
  loss_fn = confidence.acceptance(head, target, target_params, draft, draft_params)

  @jax.jit
  def gradient(params, batch):
    def total(params):
      (loss, weight), metrics = loss_fn(jax.random.key(0), params, batch)
      return jnp.sum(loss), (loss, weight, metrics)

    return jax.grad(total, has_aux=True)(params)

  made, (loss, weight, metrics) = gradient(params, batch)
  assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(made))
  np.testing.assert_array_equal(weight, [6, 0, 6])
  assert loss[1] == 0 and metrics["accept"][1] == 0 and loss[0] > 0
  # The second document is masked out, and the first does not see it.
  other = batch | {"tokens": tokens.at[:, 6:].set(3)}
  np.testing.assert_allclose(gradient(params, other)[1][0], loss, rtol=1e-6)
