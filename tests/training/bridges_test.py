"""The loss of light bridges: a relative entropy, in value and gradient; its minimum, reached."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ancestral.models import bridges as models
from ancestral.training import bridges, state, step

D = 2
MEANS = np.array([[0.3, -0.8], [-0.5, 1.1]])
COVARIANCES = np.array([[[1.0, 0.4], [0.4, 0.7]], [[0.5, -0.3], [-0.3, 1.4]]])


def cubature(mean, covariance):
  """2 D points of exactly this mean and covariance: of one component, the loss sees no more."""
  factor = np.sqrt(len(mean)) * np.linalg.cholesky(covariance).T
  return np.concatenate([mean + factor, mean - factor])


def batch(dtype):
  points = zip(("start", "end"), map(cubature, MEANS, COVARIANCES), strict=True)
  return {name: jnp.asarray(rows, dtype) for name, rows in points}


def optimum(eps):
  joint = models.gaussian_bridge(MEANS[0], COVARIANCES[0], MEANS[1], COVARIANCES[1], eps)
  return joint, models.from_gaussian(joint)


def mean_loss(params, points, eps):
  (losses, weight), metrics = bridges.light_bridge_loss(eps)(jax.random.key(0), params, points)
  assert losses.shape == weight.shape == points["start"].shape[:1] and metrics == {}
  return jnp.sum(losses) / jnp.sum(weight)


def relative_entropy(params, joint, eps):
  """KL of the joint Gaussians of (x_0, x_1), 2 D of them, numpy."""
  _, means, factors = (np.asarray(part, np.float64) for part in params)
  lower = np.tril(factors[0], -1) + np.diag(np.exp(np.diag(factors[0])))
  slope, m0, v0 = lower @ lower.T, joint.mean0, joint.covariance0
  model = np.block([[v0, v0 @ slope], [slope @ v0, slope @ v0 @ slope + eps * slope]])
  true = np.block([[v0, joint.cross], [joint.cross.T, joint.covariance1]])
  apart = np.concatenate([m0, means[0] + slope @ m0]) - np.concatenate([m0, joint.mean1])
  inverse = np.linalg.inv(model)
  log_dets = np.linalg.slogdet(model)[1] - np.linalg.slogdet(true)[1]
  return 0.5 * (np.trace(inverse @ true) - 2 * D + apart @ inverse @ apart + log_dets)


def random_params(seed=0, num=1, dtype="float64"):
  rng = np.random.default_rng(seed)
  shapes = (num,), (num, D), (num, D, D)
  return models.LightBridge(*(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes))


def test_loss_worked_by_hand():
  """v = N(1, 2), eps = 1: log c(3) = (2 9 + 2 3) / 2 and log v(2) = -log(4 pi) / 2 - 1 / 4."""
  with jax.enable_x64(True):
    params = models.LightBridge(
      jnp.zeros(1), jnp.ones((1, 1)), jnp.full((1, 1, 1), 0.5 * np.log(2))
    )
    points = {"start": jnp.full((1, 1), 3.0), "end": jnp.full((1, 1), 2.0)}
    out = mean_loss(params, points, 1.0)
  np.testing.assert_allclose(out, 12 + 0.5 * np.log(4 * np.pi) + 0.25, rtol=1e-12)
  np.testing.assert_array_equal(
    bridges.unpaired(jnp.array([2.0, 1.0]), jnp.array([0.5, 3.0])), [1.5, -2.0]
  )


@pytest.mark.parametrize("eps", [0.1, 1.0, 10.0])
def test_excess_of_the_loss_is_the_relative_entropy(eps):
  with jax.enable_x64(True):
    points, (joint, best) = batch("float64"), optimum(eps)
    value = jax.jit(lambda params: mean_loss(params, points, eps))
    for seed in range(3):
      excess = value(random_params(seed)) - value(best)
      np.testing.assert_allclose(
        excess, relative_entropy(random_params(seed), joint, eps), rtol=1e-9
      )


@pytest.mark.parametrize("eps", [0.1, 1.0, 10.0])
def test_gradient_of_the_loss_is_that_of_the_relative_entropy(eps):
  with jax.enable_x64(True):
    points, (joint, best) = batch("float64"), optimum(eps)
    params = random_params()
    gradient = jax.jit(jax.grad(lambda params: mean_loss(params, points, eps)))
    for leaf in jax.tree.leaves(gradient(best)):
      np.testing.assert_allclose(leaf, 0, atol=1e-9)
    out = gradient(params)
  for i, leaf in enumerate(params):
    for index in np.ndindex(leaf.shape):
      sides = [
        params._replace(**{params._fields[i]: np.asarray(leaf) + d * one_at(index, leaf.shape)})
        for d in (1e-5, -1e-5)
      ]
      slope = np.subtract(*(relative_entropy(side, joint, eps) for side in sides)) / 2e-5
      np.testing.assert_allclose(out[i][index], slope, rtol=1e-6, atol=1e-6)


def one_at(index, shape):
  out = np.zeros(shape)
  out[index] = 1
  return out


@pytest.mark.parametrize("eps", [0.1, 1.0, 10.0])
def test_training_reaches_the_gaussian_bridge(eps):
  """Adam, 1500 steps in float32, from the initialisation: KL < 1e-9, plan within 1 part in 1e4."""
  num_steps, points = 1500, batch("float32")
  optimizer = optax.adam(optax.cosine_decay_schedule(0.03, num_steps), b2=0.99)
  held = state.init(
    jax.random.key(0), lambda key: models.init(key, 1, D), optimizer, state.no_average()
  )

  def one(held, _):
    return step.train_step(
      jax.random.key(1),
      held,
      points,
      loss_fn=bridges.light_bridge_loss(eps),
      optimizer=optimizer,
      averaging=state.no_average(),
    )

  held, metrics = jax.jit(lambda held: jax.lax.scan(one, held, length=num_steps))(held)
  assert metrics["loss"][-1] < metrics["loss"][0]
  joint, best = optimum(eps)
  assert relative_entropy(held.params, joint, eps) < 1e-9
  x0 = points["start"]
  out, expected = models.plan(held.params, x0, eps), models.plan(best, x0, eps)
  spread = np.sqrt(np.trace(COVARIANCES[1]))
  np.testing.assert_allclose(out.means / spread, expected.means / spread, atol=1e-4)
  size = np.linalg.norm(expected.covariances)
  np.testing.assert_allclose(out.covariances / size, expected.covariances / size, atol=1e-4)


def test_the_true_mixture_has_no_gradient():
  """Of pushed points, E grad = 0 at the bridge that pushed them; another bridge has some."""
  eps, num = 0.5, 40_000
  true = random_params(3, num=3, dtype="float32")
  start_key, end_key = jax.random.split(jax.random.key(0))
  start = jax.random.uniform(start_key, (num, D), minval=-1.5, maxval=1.5)
  end = jax.jit(models.plan_sample)(end_key, true, start, eps)

  @jax.jit
  def gradients(params):
    one = lambda p, x0, x1: mean_loss(p, {"start": x0[None], "end": x1[None]}, eps)
    return jax.vmap(jax.grad(one), (None, 0, 0))(params, start, end)

  def scores(params):
    rows = [np.asarray(leaf).reshape(num, -1) for leaf in gradients(params)]
    rows = np.concatenate(rows, axis=1)
    rows = rows[:, rows.std(axis=0) > 0]  # without those above the diagonal
    return rows.mean(axis=0) / (rows.std(axis=0) / np.sqrt(num))

  found = scores(true)
  assert found.shape == (18,) and np.abs(found).max() < 4
  other = true._replace(means=true.means + 0.1)
  assert np.abs(scores(other)).max() > 10


@pytest.mark.parametrize("eps", [1e-3, 1e3])
def test_gradients_are_finite_whatever_the_noise(eps):
  rng = np.random.default_rng(0)
  points = {name: jnp.asarray(rng.normal(size=(16, 4)), jnp.float32) for name in ("start", "end")}
  params = models.init(jax.random.key(0), 6, 4)
  value, gradient = jax.jit(jax.value_and_grad(lambda p: mean_loss(p, points, eps)))(params)
  assert np.isfinite(value)
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
  assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(gradient))


def test_no_noise_is_refused():
  with pytest.raises(ValueError, match="above 0"):
    bridges.light_bridge_loss(0.0)
