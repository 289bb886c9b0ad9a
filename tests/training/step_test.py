"""The step: accumulation, keys, devices, platforms, and that it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import targets
from ancestral.training import likelihood, optimizer, state, step

RNG = np.random.default_rng(0)
WEIGHT = np.array([100, 0, 0, 1e-3, 3, 0, 7, 0.5])  # very uneven; microbatches may weigh nothing
REGRESSION = {
  "x": jnp.asarray(RNG.normal(size=(8, 3)), jnp.float32),
  "y": jnp.asarray(RNG.normal(size=8), jnp.float32),
  "weight": jnp.asarray(WEIGHT, jnp.float32),
}
PARAMS = {"kernel": jnp.array([[0.5], [-1.0], [2.0]])}


def regression(key, params, batch):
  """Weighted squares, and a metric that tells keys apart."""
  residual = jnp.matmul(batch["x"], params["kernel"])[:, 0] - batch["y"]
  noise = jax.random.uniform(key, residual.shape)
  return (batch["weight"] * jnp.square(residual), batch["weight"]), {"noise": noise}


def start(made, params=PARAMS, averaging=None):
  averaging = averaging or state.no_average()
  return state.init(jax.random.key(0), lambda key: jax.tree.map(jnp.copy, params), made, averaging)


def stepper(made, loss_fn=regression, averaging=None, num_microbatches=1, seed=1):
  averaging = averaging or state.no_average()
  return lambda held, batch: step.train_step(
    jax.random.key(seed),
    held,
    batch,
    loss_fn=loss_fn,
    optimizer=made,
    averaging=averaging,
    num_microbatches=num_microbatches,
  )


def normal_equations(params, batch=REGRESSION):
  """Loss and gradient of the weighted mean of squares, in float64."""
  x, y, w = (np.asarray(batch[name], np.float64) for name in ("x", "y", "weight"))
  residual = x @ np.asarray(params["kernel"], np.float64)[:, 0] - y
  gradient = 2 * x.T @ (w * residual) / w.sum()
  return (w * residual**2).sum() / w.sum(), {"kernel": jnp.asarray(gradient[:, None], jnp.float32)}


@pytest.mark.parametrize("num_microbatches", [1, 2, 4, 8])
def test_steps_equal_optax_steps_on_the_gradient_by_hand(num_microbatches):
  made = optimizer.adamw(optax.constant_schedule(0.1), clip_norm=3.0)
  run = jax.jit(stepper(made, num_microbatches=num_microbatches))
  held, params, optimizer_state = start(made), PARAMS, made.init(PARAMS)
  for number in range(3):
    held, metrics = run(held, REGRESSION)
    loss, gradient = normal_equations(params)
    updates, optimizer_state = made.update(gradient, optimizer_state, params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(held.params["kernel"], params["kernel"], rtol=1e-4)
    assert held.step == number + 1
    assert metrics["loss"] == pytest.approx(loss, rel=1e-4)
    assert metrics["weight"] == pytest.approx(WEIGHT.sum(), rel=1e-6)
    norm = np.linalg.norm(gradient["kernel"])  # before clipping
    assert metrics["gradient_norm"] == pytest.approx(norm, rel=1e-4)


def test_metrics_are_of_the_whole_batch():
  made = optax.sgd(0.1)
  _, metrics = stepper(
    made,
    lambda key, params, batch: (
      (0 * params["kernel"][0] * batch["x"][:, 0], batch["weight"]),
      {"count": batch["weight"] > 1},
    ),
    num_microbatches=2,
  )(start(made), REGRESSION)
  assert metrics["count"] == pytest.approx(3 / WEIGHT.sum(), rel=1e-6)
  assert set(metrics) == {"loss", "gradient_norm", "weight", "count"}


def test_a_batch_without_weight_moves_nothing():
  made = optax.sgd(0.1)
  batch = {**REGRESSION, "weight": jnp.zeros(8)}
  held, metrics = stepper(made, num_microbatches=2)(start(made), batch)
  np.testing.assert_array_equal(held.params["kernel"], PARAMS["kernel"])
  assert metrics["loss"] == 0 and metrics["gradient_norm"] == 0 and metrics["weight"] == 0


def test_a_microbatch_is_every_nth_example():
  seen = []

  def loss_fn(key, params, batch):
    jax.debug.callback(lambda x: seen.append(x.tolist()), batch, ordered=True)
    return (params["kernel"][0] * batch, jnp.ones(batch.shape)), {}

  made = optax.sgd(0.1)
  stepper(made, loss_fn, num_microbatches=3)(start(made), jnp.arange(6.0))
  jax.effects_barrier()
  assert seen == [[0, 3], [1, 4], [2, 5]]


def token_batch(seed, batch_size=8, length=12):
  rng = np.random.default_rng(seed)
  tokens = jnp.asarray(rng.integers(0, 23, (batch_size, length + 1)), jnp.int32)
  kept = rng.integers(0, length + 1, (batch_size, 1)) > np.arange(length)
  return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "mask": jnp.asarray(kept)}


def close(tree, other, atol=1e-5):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=atol), tree, other)


def test_microbatches_do_not_change_a_transformers_step():
  model, params = targets.tiny_target(num_layers=1)
  made, averaging = optax.sgd(1.0), state.exponential_average(0.9)
  batch = token_batch(0)
  held = start(made, params, averaging)
  runs = [
    jax.jit(stepper(made, likelihood.next_token(model, chunk=5), averaging, n))(held, batch)
    for n in (1, 4)
  ]  # 2 and 8 too in the regression above
  for other, metrics in runs[1:]:
    close(other, runs[0][0])
    close(metrics, runs[0][1])
  assert np.abs(runs[0][0].params["embedding"] - params["embedding"]).max() > 0.01


def test_keys_depend_on_the_run_and_the_step_only():
  made = optax.sgd(0.1)
  run = jax.jit(stepper(made))
  held = start(made)
  noise = []
  for _ in range(3):
    held, metrics = run(held, REGRESSION)
    noise.append(float(metrics["noise"]))
  assert len(set(noise)) == 3
  resumed = start(made)._replace(step=jnp.int32(2))  # other params, same step
  assert float(run(resumed, REGRESSION)[1]["noise"]) == noise[2]
  assert float(jax.jit(stepper(made, seed=2))(resumed, REGRESSION)[1]["noise"]) != noise[2]


def test_microbatches_draw_apart():
  seen = []

  def loss_fn(key, params, batch):
    jax.debug.callback(lambda x: seen.append(float(x)), jax.random.uniform(key), ordered=True)
    return (params["kernel"][0] * batch, jnp.ones(batch.shape)), {}

  made = optax.sgd(0.1)
  stepper(made, loss_fn, num_microbatches=4)(start(made), jnp.arange(4.0))
  jax.effects_barrier()
  assert len(set(seen)) == 4


def test_the_average_follows_the_new_params():
  made, averaging = optax.sgd(0.1), state.exponential_average(0.9)
  held, _ = stepper(made, averaging=averaging)(start(made, averaging=averaging), REGRESSION)
  expected = 0.1 * PARAMS["kernel"] + 0.9 * held.params["kernel"]  # (1 + 0) / (10 + 0) of the old
  np.testing.assert_allclose(held.average["kernel"], expected, rtol=1e-5)


def test_a_donated_state_trains_the_same_and_compiles_once():
  traces = []

  def counted(key, params, batch):
    traces.append(None)
    return regression(key, params, batch)

  made = optimizer.muon(optimizer.warmup_cosine(0.1, num_steps=9, warmup_steps=2))
  averaging = state.exponential_average(0.9)
  plain = jax.jit(stepper(made, averaging=averaging))
  donating = jax.jit(stepper(made, counted, averaging), donate_argnums=0)
  kept, donated = start(made, averaging=averaging), start(made, averaging=averaging)
  traced = []
  for _ in range(3):
    before = donated
    kept, _ = plain(kept, REGRESSION)
    donated, _ = donating(donated, REGRESSION)
    traced.append(len(traces))
    assert before.params["kernel"].is_deleted()
  assert traced[0] == traced[2] > 0
  close(donated, kept, atol=1e-7)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("make", [optimizer.adamw, optimizer.muon])
def test_the_step_lowers_for_accelerators(platform, make):
  model, _ = targets.tiny_target(dropout=0.1, dtype="bfloat16")
  made = make(optimizer.warmup_stable_decay(1e-3, num_steps=10, warmup_steps=2))
  averaging = state.exponential_average(0.99)
  batch = jax.eval_shape(lambda: token_batch(0))
  held = jax.eval_shape(
    lambda key: state.init(
      key, lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32)), made, averaging
    ),
    jax.random.key(0),
  )
  run = stepper(made, likelihood.next_token(model, chunk=5), averaging, num_microbatches=2)
  lowered = jax.jit(run, donate_argnums=0).trace(held, batch).lower(lowering_platforms=(platform,))
  assert "stablehlo.while" in lowered.as_text()


def stationary(transition):
  """The law that the chain keeps: a left eigenvector."""
  values, vectors = np.linalg.eig(transition.T)
  vector = np.real(vectors[:, np.argmin(np.abs(values - 1))])
  return vector / vector.sum()


def walk(rng, transition, first, length):
  """[B, length + 1] steps of the chain from each of `first` [B]."""
  cumulative, columns = transition.cumsum(axis=1), [first]
  for _ in range(length):
    draws = rng.uniform(size=(len(first), 1))
    columns.append(np.minimum((draws > cumulative[columns[-1]]).sum(axis=1), len(transition) - 1))
  return np.stack(columns, axis=1)


@pytest.mark.parametrize("make, peak", [(optimizer.adamw, 0.02), (optimizer.muon, 0.02)])
def test_training_approaches_the_entropy_rate(make, peak):
  transition = np.exp(np.asarray(targets.markov_target(vocab_size=5)[1], np.float64))
  law = stationary(transition)
  entropy_rate = -(law[:, None] * transition * np.log(transition)).sum()
  model, _ = targets.tiny_target(vocab_size=5, num_layers=1, width=16, num_heads=2, num_kv_heads=1)
  num_steps, rng = 150, np.random.default_rng(3)
  made = make(optimizer.warmup_cosine(peak, num_steps=num_steps, warmup_steps=10))
  averaging = state.exponential_average(0.9)
  loss_fn = likelihood.next_token(model)

  def batch(batch_size):
    chain = walk(rng, transition, rng.choice(5, p=law, size=batch_size), 16)
    return {"tokens": chain[:, :-1], "targets": chain[:, 1:], "mask": np.ones((batch_size, 16))}

  init = lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32))
  held = jax.jit(lambda key: state.init(key, init, made, averaging))(jax.random.key(0))
  run = jax.jit(stepper(made, loss_fn, averaging), donate_argnums=0)
  losses = []
  for _ in range(num_steps):
    held, metrics = run(held, batch(32))
    losses.append(float(metrics["loss"]))
  (per_row, weights), _ = jax.jit(loss_fn)(None, held.average, batch(512))
  per_row = np.asarray(per_row / weights)
  error = 4 * per_row.std() / 512**0.5
  assert losses[0] > entropy_rate + 0.3
  # A twentieth of a nat for what 150 steps leave to learn, and the sample's own error.
  assert entropy_rate - error < per_row.mean() < entropy_rate + 0.05 + error
  assert error < 0.06
