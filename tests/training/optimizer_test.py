"""Optimisers and schedules: knots by hand, what decays, Muon layer by layer, clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import targets
from ancestral.models import transformer
from ancestral.training import optimizer


@pytest.mark.parametrize(
  "step, expected", [(0, 0.0), (5, 1.5), (10, 3.0), (60, 3.0 * 0.55), (110, 0.3), (500, 0.3)]
)
def test_warmup_cosine_at_its_knots(step, expected):
  schedule = optimizer.warmup_cosine(3.0, num_steps=110, warmup_steps=10)
  assert schedule(step) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
  "step, expected",
  [(0, 0.0), (5, 2.0), (10, 4.0), (50, 4.0), (80, 4.0), (90, 2.5), (100, 1.0), (500, 1.0)],
)
def test_warmup_stable_decay_at_its_knots(step, expected):
  schedule = optimizer.warmup_stable_decay(
    4.0, num_steps=100, warmup_steps=10, decay_fraction=0.2, final_fraction=0.25
  )
  assert schedule(step) == pytest.approx(expected, rel=1e-5)


def test_the_stable_part_does_not_know_how_long_the_run_is():
  short, long = (
    optimizer.warmup_stable_decay(1.0, num_steps=n, warmup_steps=10) for n in (100, 300)
  )
  assert [short(step) for step in range(0, 91, 9)] == [long(step) for step in range(0, 91, 9)]
  assert 0 < short(99) < 0.11 and long(270) == 1 and long(300) == 0


@pytest.mark.parametrize("schedule", [optimizer.warmup_cosine, optimizer.warmup_stable_decay])
def test_schedules_without_warmup_start_at_the_peak(schedule):
  assert schedule(2.0, num_steps=10, warmup_steps=0)(0) == 2


@pytest.mark.parametrize("schedule", [optimizer.warmup_cosine, optimizer.warmup_stable_decay])
def test_schedules_refuse_a_warmup_as_long_as_the_run(schedule):
  with pytest.raises(ValueError, match=r"warmup_steps=10.*num_steps=10") as error:
    schedule(1.0, num_steps=10, warmup_steps=10)
  assert "\n" not in str(error.value)


FIELDS = {"use_bias": True, "qk_norm": True, "positions": "learned", "tied_embeddings": False}


def names(tree):
  """Of the leaves that are true."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/") for path, leaf in leaves if leaf}


def layer_names(prefix):
  projections = [f"attention/{name}" for name in ("query", "key", "value", "output")] + [
    f"mlp/{name}" for name in ("gate", "up", "down")
  ]
  return {f"{prefix}/{name}/kernel" for name in projections}


@pytest.mark.parametrize(
  "scan_layers, prefixes", [(True, ["layers"]), (False, ["layers/0", "layers/1"])]
)
def test_matrices_decay_and_norms_and_biases_do_not(scan_layers, prefixes):
  _, params = targets.tiny_target(**FIELDS, scan_layers=scan_layers)
  expected = {"embedding", "positions", "readout"}.union(*map(layer_names, prefixes))
  assert names(optimizer.decays(params)) == expected


def test_params_without_names_decay():
  assert optimizer.decays(jnp.ones(3)) is True
  assert optimizer.decays((jnp.ones(3), [jnp.ones(2)])) == (True, [True])


def random_like(tree, seed, scale=1.0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda leaf: jnp.asarray(scale * rng.normal(size=leaf.shape), jnp.float32), tree
  )


def updates_of(made, params, gradients):
  """The update of each gradient in turn; params stay as they are."""
  update, state, seen = jax.jit(made.update), made.init(params), []
  for gradient in gradients:
    updates, state = update(gradient, state, params)
    seen.append(updates)
  return seen


def test_first_adamw_update_by_hand():
  params = {"kernel": jnp.array([[2.0, -4.0]]), "bias": jnp.array([3.0])}
  gradient = {"kernel": jnp.array([[0.3, -0.1]]), "bias": jnp.array([0.2])}
  made = optimizer.adamw(optax.constant_schedule(0.01), weight_decay=0.5)
  update = updates_of(made, params, [gradient])[0]  # -lr (sign(g) + decay * param)
  np.testing.assert_allclose(update["kernel"], [[-0.02, 0.03]], rtol=1e-5)
  np.testing.assert_allclose(update["bias"], [-0.01], rtol=1e-5)


@pytest.mark.parametrize("make", [optimizer.adamw, optimizer.muon])
def test_gradients_are_clipped_by_their_global_norm(make):
  params = {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}
  raw = [random_like(params, 0, 10.0), random_like(params, 1, 0.05)]
  norms = [np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(g))) for g in raw]
  assert norms[1] < 2 < norms[0]
  by_hand = [jax.tree.map(lambda leaf: leaf * np.float32(2 / norms[0]), raw[0]), raw[1]]
  schedule = optax.constant_schedule(0.1)
  clipped = updates_of(make(schedule, clip_norm=2.0), params, raw)
  expected = updates_of(make(schedule, clip_norm=1e9), params, by_hand)
  unclipped = updates_of(make(schedule, clip_norm=1e9), params, raw)
  for name in params:
    np.testing.assert_allclose(clipped[1][name], expected[1][name], rtol=1e-3, atol=1e-6)
    assert np.abs(clipped[1][name] - unclipped[1][name]).max() > 1e-3


@pytest.mark.parametrize("make", [optimizer.adamw, optimizer.muon])
def test_stacked_and_unstacked_params_get_the_same_updates(make):
  _, params = targets.tiny_target()
  gradients = [random_like(params, seed, 0.1) for seed in range(3)]
  made = make(optimizer.warmup_cosine(0.1, num_steps=9, warmup_steps=1))
  stacked = updates_of(made, params, gradients)
  apart = updates_of(made, transformer.unstack(params), [transformer.unstack(g) for g in gradients])
  for one, other in zip(stacked[1:], apart[1:], strict=True):
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(one)) > 0.01
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
      one,
      transformer.stack(other),
    )


PARAMS = {
  "layers": {
    "up": {"kernel": jnp.ones((3, 8, 5)), "bias": jnp.ones((3, 5))},
    "norm": {"scale": jnp.ones((3, 8))},
  },
  "embedding": jnp.ones((11, 8)),
  "readout": jnp.ones((8, 11)),
}
GRADIENTS = [random_like(PARAMS, seed) for seed in range(3)]
SCHEDULE = optax.linear_schedule(0.1, 0.05, 3)


def test_weight_decay_alone_shrinks_what_decays():
  params, zeros = random_like(PARAMS, 9), jax.tree.map(jnp.zeros_like, PARAMS)
  adamw = optimizer.adamw(optax.constant_schedule(0.5), weight_decay=0.2)
  muon = optimizer.muon(optax.constant_schedule(0.5), weight_decay=0.2)
  for made, decayed in ((adamw, {"kernel", "embedding", "readout"}), (muon, {"kernel"})):
    updates = updates_of(made, params, [zeros])[0]
    for (path, update), param in zip(
      jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(params), strict=True
    ):
      factor = -0.1 if path[-1].key in decayed else 0.0
      np.testing.assert_allclose(update, factor * param, rtol=1e-5, atol=1e-8)


def test_muon_orthogonalises_each_layers_kernel():
  updates = updates_of(
    optimizer.muon(optax.constant_schedule(0.1), weight_decay=0.0), PARAMS, GRADIENTS
  )
  for update, gradient in zip(updates, GRADIENTS, strict=True):
    kernel = update["layers"]["up"]["kernel"]
    given = np.linalg.svd(gradient["layers"]["up"]["kernel"], compute_uv=False)
    # Newton and Schulz's five steps bring singular values to 1 within about a third.
    made = np.linalg.svd(kernel / (0.1 * 0.2 * 8**0.5), compute_uv=False)
    assert np.all((0.6 < made) & (made < 1.3)), made
    assert np.all(given.max(axis=-1) / given.min(axis=-1) > 2.2)
    # All singular values 1 make the root mean square sqrt(5 / (8 * 5)), so Adam's 0.2 times the lr
    assert np.sqrt(np.mean(np.square(kernel))) == pytest.approx(0.1 * 0.2, rel=0.3)


def test_the_first_muon_update_keeps_the_gradients_singular_vectors():
  updates = updates_of(
    optimizer.muon(optax.constant_schedule(0.1), weight_decay=0.0), PARAMS, GRADIENTS
  )
  gradient = np.asarray(GRADIENTS[0]["layers"]["up"]["kernel"], np.float64)
  left, _, right = np.linalg.svd(gradient, full_matrices=False)
  turned = np.einsum("nik,nio,njo->nkj", left, updates[0]["layers"]["up"]["kernel"], right)
  diagonal = np.einsum("nkk->nk", turned)
  assert np.all(diagonal < 0)
  off = turned - diagonal[:, :, None] * np.eye(5)
  assert np.abs(off).max() < 1e-2 * np.abs(diagonal).min()


def test_muon_on_a_stack_equals_optax_on_each_kernel_alone():
  made = optimizer.muon(SCHEDULE, weight_decay=0.3, momentum=0.9, clip_norm=1e9)
  updates = updates_of(made, PARAMS, GRADIENTS)
  for layer in range(3):
    peer = optax.contrib.muon(SCHEDULE, beta=0.9, weight_decay=0.3, consistent_rms=0.2)
    alone = updates_of(
      peer, jnp.ones((8, 5)), [gradient["layers"]["up"]["kernel"][layer] for gradient in GRADIENTS]
    )
    for update, expected in zip(updates, alone, strict=True):
      np.testing.assert_allclose(
        update["layers"]["up"]["kernel"][layer], expected, rtol=1e-3, atol=1e-5
      )


def test_what_muon_leaves_out_is_nesterov_adams():
  made = optimizer.muon(SCHEDULE, b1=0.8, b2=0.9, weight_decay=0.3, clip_norm=1e9)
  rest = lambda tree: {
    "bias": tree["layers"]["up"]["bias"],
    "embedding": tree["embedding"],
    "scale": tree["layers"]["norm"]["scale"],
    "readout": tree["readout"],
  }
  expected = updates_of(
    optax.nadam(SCHEDULE, b1=0.8, b2=0.9), rest(PARAMS), [rest(gradient) for gradient in GRADIENTS]
  )
  for update, one in zip(updates_of(made, PARAMS, GRADIENTS), expected, strict=True):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), rest(update), one)
