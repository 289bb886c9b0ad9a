"""Losses of denoisers: closed forms on Gaussian data, noisy data, extremes, conditions, keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ancestral.models import base, precondition, schedules
from ancestral.training import denoising, state, step, weightings

MEAN, VARIANCE = np.array([1.5, -0.5]), 0.7  # of Gaussian data N(MEAN, VARIANCE I)
NUM = 20_000
SCHEDULES = {
  "linear": schedules.linear(),
  "cosine": schedules.cosine(),
  "rectified flow": schedules.rectified_flow(),
  "variance exploding": schedules.variance_exploding(),
}
ON_EVERY_SCHEDULE = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
HEADS = {
  "noise": precondition.NOISE,
  "score": precondition.SCORE,
  "data": precondition.DATA,
  "velocity": precondition.VELOCITY,
  "flow": precondition.FLOW,
  "karras": precondition.karras(),
}
WEIGHTINGS = (
  weightings.noise,
  weightings.data,
  weightings.velocity,
  weightings.flow,
  weightings.karras(),
  weightings.min_snr(),
  weightings.p2(),
)
SMALLEST = 2.0**-24


def linear(params, x, t=None, condition=None, key=None):
  """a x + b: exact for Gaussian data, with the right a and b."""
  a, b = params
  return a * x + b[None]


def best(alpha, sigma):
  """a and b of E[x_0 | x_t]."""
  a = alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2)
  return jnp.float32(a), jnp.asarray((1 - alpha * a) * MEAN, jnp.float32)


def gaussian(key, num=NUM):
  return jnp.asarray(MEAN, jnp.float32)[None] + VARIANCE**0.5 * jax.random.normal(key, (num, 2))


def at(t, schedule, model=linear, weighting=weightings.data, **fields):
  """The loss at one time: params, batch -> [B]."""
  times = lambda quantiles: jnp.full(quantiles.shape, t)
  loss = denoising.denoising(model, schedule, weighting, times, **fields)
  return lambda params, batch: loss(jax.random.key(7), params, batch)[0][0]


def with_gradient(loss):
  """Jitted (params, batch) -> losses [B], and of each its gradient."""
  return jax.jit(lambda *given: (loss(*given), jax.jacfwd(loss)(*given)))


def within(found, expected):
  """Means over the first axis are `expected` up to 4 standard errors."""
  found = np.asarray(found, np.float64)
  error = found.std(axis=0) / len(found) ** 0.5
  np.testing.assert_array_less(np.abs(found.mean(axis=0) - expected), 4 * error)


@pytest.mark.parametrize("schedule, t", [("linear", 0.3), ("rectified flow", 0.8)])
def test_loss_and_gradient_of_a_linear_denoiser_of_gaussian_data(schedule, t):
  """(w / d) E|(a alpha - 1) x_0 + a sigma z + b|^2, with w = SNR."""
  schedule = SCHEDULES[schedule]
  alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
  a, b, w = 0.8, np.array([0.3, -0.4]), (alpha / sigma) ** 2
  off = (a * alpha - 1) * MEAN + b
  value = w * ((a * alpha - 1) ** 2 * VARIANCE + np.mean(off**2) + (a * sigma) ** 2)
  by_a = 2 * w * (alpha * (a * alpha - 1) * VARIANCE + alpha * np.mean(MEAN * off) + a * sigma**2)
  loss, batch = at(t, schedule, weighting=weightings.noise), {"x": gaussian(jax.random.key(0))}
  params = jnp.float32(a), jnp.asarray(b, jnp.float32)
  losses, gradient = with_gradient(loss)(params, batch)
  within(losses, value)
  within(gradient[0], by_a)
  within(gradient[1], w * off)  # 2 w off / d


@pytest.mark.parametrize("schedule, t", [("linear", 0.3), ("variance exploding", 2.0)])
def test_the_posterior_mean_is_the_minimum(schedule, t):
  """w v sigma^2 / (alpha^2 v + sigma^2)."""
  schedule = SCHEDULES[schedule]
  alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
  loss, batch = at(t, schedule, weighting=weightings.flow), {"x": gaussian(jax.random.key(1))}
  params, w = best(alpha, sigma), (1 + alpha / sigma) ** 2
  losses, gradient = with_gradient(loss)(params, batch)
  within(losses, w * VARIANCE * sigma**2 / (alpha**2 * VARIANCE + sigma**2))
  within(gradient[0], 0)
  within(gradient[1], 0)


def test_squared_error_by_hand():
  denoised = jnp.array([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]], jnp.bfloat16)
  clean = jnp.array([[[1.0, 0.0], [3.0, 1.0]], [[1.0, 1.0], [1.0, -1.0]]])
  found = denoising.squared_error(denoised, clean, jnp.array([2.0, 3.0]))
  np.testing.assert_array_equal(found, [2 * 13 / 4, 3])
  assert found.dtype == jnp.float32


def test_flow_matching_is_the_squared_error_weighted_by_flow():
  schedule = schedules.rectified_flow()
  clean, noise, velocity = np.random.default_rng(0).normal(size=(3, 5, 2, 3))
  with jax.enable_x64(True):
    t = jnp.array([1e-3, 0.2, 0.5, 0.9, 1.0])
    alpha, sigma = (f(t)[:, None, None] for f in (schedule.alpha, schedule.sigma))
    denoised = precondition.FLOW.to_denoised(alpha * clean + sigma * noise, velocity, alpha, sigma)
    weight = weightings.flow(schedule.alpha(t), schedule.sigma(t))
    found = denoising.flow_matching(*(jnp.asarray(x) for x in (velocity, clean, noise)))
    expected = denoising.squared_error(denoised, jnp.asarray(clean), weight)
  np.testing.assert_allclose(found[1:], expected[1:], rtol=1e-5)
  np.testing.assert_allclose(found[0], expected[0], rtol=1e-3)  # of D, 1e-3 of its error
  np.testing.assert_allclose(found, np.square(velocity - noise + clean).mean((1, 2)), rtol=1e-6)


def test_an_uncertain_loss_is_least_at_its_logarithm():
  """There its gradient in u is 0, its value 1 + log E loss, its network's that of log E loss."""
  losses = jnp.asarray(np.random.default_rng(0).exponential(size=50), jnp.float32)
  total = lambda u, scale: jnp.mean(denoising.uncertain(scale * losses, jnp.full(50, u)))
  mean = float(np.mean(losses))
  value, (by_u, by_scale) = jax.value_and_grad(total, argnums=(0, 1))(np.log(mean), 1.0)
  np.testing.assert_allclose([value, by_u, by_scale], [1 + np.log(mean), 0, 1], atol=1e-5)
  np.testing.assert_allclose(jax.grad(total)(0.3, 1.0), 1 - mean * np.exp(-0.3), rtol=1e-5)


def test_a_learned_weighting_goes_over_the_fixed_one():
  schedule, batch = SCHEDULES["linear"], {"x": gaussian(jax.random.key(0), 64)}
  times = weightings.uniform(schedule)
  u = lambda params, t: 2 * t - params[0]
  plain, learned = (
    denoising.denoising(linear, schedule, weightings.noise, times, log_variance=of)
    for of in (None, u)
  )
  params = best(0.5, 0.5)
  ((loss, _), metrics), ((changed, weight), same) = jax.jit(
    lambda: tuple(of(jax.random.key(3), params, batch) for of in (plain, learned))
  )()
  t = told(jax.random.key(3), batch)[1]
  expected = loss * np.exp(params[0] - 2 * t) + 2 * t - params[0]
  np.testing.assert_allclose(changed, expected, rtol=1e-5)
  np.testing.assert_array_equal(metrics["error"], same["error"])
  np.testing.assert_array_equal(weight, 1)


def noisy(key, held, num=NUM):
  data_key, noise_key = jax.random.split(key)
  x = gaussian(data_key, num) + held * jax.random.normal(noise_key, (num, 2))
  return {"x": x, "noise": jnp.full(num, held)}


def test_data_without_noise_have_the_squared_error():
  params, x = best(0.6, 0.9), gaussian(jax.random.key(0), 64)

  @jax.jit
  def run(t, batch):
    loss = at(t, SCHEDULES["linear"], weighting=weightings.velocity)
    return loss(params, batch), jax.jacfwd(loss)(params, batch)

  for t in (1e-3, 0.4, 1.0):
    plain, zero = run(t, {"x": x}), run(t, {"x": x, "noise": jnp.zeros(64)})
    jax.tree.map(np.testing.assert_array_equal, plain, zero)


@pytest.mark.parametrize("schedule", ["linear", "variance exploding"])
@pytest.mark.parametrize("log_variance", [None, lambda params, t: params[0] + t])
def test_below_its_own_noise_an_example_says_nothing(schedule, log_variance):
  held, schedule, batch = 0.5, SCHEDULES[schedule], noisy(jax.random.key(0), 0.5, 2)
  t = jnp.asarray(schedule.time(-np.log([0.6 * held, 1.4 * held])), jnp.float32)
  times = lambda quantiles: t
  loss = denoising.denoising(linear, schedule, weightings.data, times, log_variance=log_variance)

  @jax.jit
  def run(params):
    (losses, weight), metrics = loss(jax.random.key(1), params, batch)
    gradient = jax.jacrev(lambda params: loss(jax.random.key(1), params, batch)[0][0])(params)
    return losses, weight, metrics["error"], *gradient

  for found in run(best(1.0, 1.0)):
    assert np.all(found[0] == 0) and np.all(found[1] != 0) and np.all(np.isfinite(found))


@pytest.mark.parametrize(
  "schedule, ratio", [("linear", 0.6), ("linear", 3.0), ("rectified flow", 1.0)]
)
def test_noisy_data_teach_the_clean_posterior_mean(schedule, ratio):
  """The minimiser in a and b by least squares (its loss is quadratic), and its standard errors."""
  schedule, held = SCHEDULES[schedule], 0.5
  t = jnp.float32(schedule.time(-np.log(ratio)))
  alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
  batch, loss = noisy(jax.random.key(2), held), at(t, schedule)
  gradient = jax.jit(jax.jacfwd(lambda params: loss((params[0], params[1:]), batch)))
  points = np.concatenate([np.zeros((1, 3)), np.eye(3)]).astype(np.float32)
  slope, *moved = (np.asarray(gradient(point), np.float64) for point in points)
  curve = np.stack(moved, axis=-1) - slope[..., None]
  inverse = np.linalg.inv(curve.mean(axis=0))
  found = -inverse @ slope.mean(axis=0)
  scores = (slope + curve @ found) @ inverse  # of each example at the minimum
  error = scores.std(axis=0) / NUM**0.5
  expected = np.concatenate([np.atleast_1d(part) for part in best(alpha, sigma)])
  np.testing.assert_array_less(np.abs(found - expected), 4 * error)
  # That it tells the clean from the noisy mean, E[x_n | x_t], which a plain loss would find.
  pull = alpha * held**2 / sigma**2
  assert np.abs((1 - alpha * pull) * expected[0] + pull - expected[0]) > 8 * error[0]


@functools.cache
def teller(num_classes):
  schedule, seen = SCHEDULES["linear"], []

  def spy(params, x, t, condition, key):
    seen.append((t, condition, key))
    return params * x

  def run(key, batch, share):
    loss = denoising.denoising(
      spy,
      schedule,
      weightings.data,
      weightings.uniform(schedule),
      num_classes=num_classes,
      drop_condition=share,
    )
    return loss(key, 1.0, batch)[0][0], *seen.pop()

  return jax.jit(run)


def told(key, batch, num_classes=None, share=0.0):
  """What a model is told: the loss, and time, condition and key."""
  return teller(num_classes)(key, batch, share)


def test_without_a_key_draws_are_the_same_and_dropout_is_off():
  batch = {"x": gaussian(jax.random.key(0), 16)}
  keys = (None, None, jax.random.key(1), jax.random.key(2))
  losses, _, conditions, given = zip(*(told(key, batch) for key in keys), strict=True)
  np.testing.assert_array_equal(losses[0], losses[1])
  for i, j in ((0, 2), (0, 3), (2, 3)):
    assert not np.array_equal(losses[i], losses[j])
  assert [key is None for key in given] == [True, True, False, False]
  assert conditions == (base.Condition(),) * 4


@pytest.mark.parametrize("masked", [True, False])
def test_conditions_are_dropped_at_their_rate(masked):
  num = 4000
  batch = {"x": jnp.zeros((num, 2)), "label": jnp.arange(num) % 3, "text": jnp.ones((num, 2, 4))}
  mask = np.tile([True, not masked], (num, 1))
  if masked:
    batch["text_mask"] = jnp.asarray(mask)
  for share in (0.0, 0.2, 1.0):
    _, _, condition, _ = told(jax.random.key(0), batch, 3, share)
    dropped = condition.label == 3
    np.testing.assert_array_equal(condition.label, np.where(dropped, 3, batch["label"]))
    np.testing.assert_array_equal(condition.text_mask, np.where(dropped[:, None], False, mask))
    assert abs(np.mean(dropped) - share) <= 4 * (share * (1 - share) / num) ** 0.5
    assert condition.text.shape == (num, 2, 4)


def test_dropped_rows_do_not_depend_on_their_time_nor_times_on_their_row():
  """Low discrepancy orders times at random."""
  num = 4000
  batch = {"x": jnp.zeros((num, 1)), "label": jnp.zeros(num, jnp.int32)}
  _, t, condition, _ = told(jax.random.key(5), batch, 1, 0.5)
  for other in (condition.label, np.arange(num)):
    assert abs(np.corrcoef(t, other)[0, 1]) < 4 / num**0.5


def test_labels_without_a_number_of_classes_are_refused():
  with pytest.raises(ValueError, match="num_classes, which is None"):
    told(jax.random.key(0), {"x": jnp.zeros((2, 1)), "label": jnp.zeros(2, jnp.int32)})


@ON_EVERY_SCHEDULE
def test_extreme_times_are_finite_for_every_head_and_weighting(schedule):
  """A head and a law of times a row; weightings are positive: their sum is finite if each is."""
  network = base.Network(
    init=None,
    apply=lambda params, x, level, condition, *, key: params * jnp.tanh(x + level[:, None] / 1000),
  )
  models = [denoising.network_denoiser(network, schedule, head, 0.5) for head in HEADS.values()]
  laws = [
    law(schedule) for law in (weightings.uniform, weightings.log_normal, weightings.log_uniform)
  ]
  edges = jnp.array([SMALLEST, 1e-3, 1 - 1e-3, 1 - SMALLEST])
  shape = (len(models), len(laws), len(edges))

  def model(params, x, t, condition, key):
    rows = zip(models, jnp.split(x, shape[0]), jnp.split(t, shape[0]), strict=True)
    return jnp.concatenate([of(params, x, t) for of, x, t in rows])

  loss = denoising.denoising(
    model,
    schedule,
    lambda alpha, sigma: sum(weighting(alpha, sigma) for weighting in WEIGHTINGS),
    lambda quantiles: jnp.tile(jnp.concatenate([law(quantiles) for law in laws]), shape[0]),
    quantiles=lambda key, num: edges,
  )
  batch = {"x": gaussian(jax.random.key(0), np.prod(shape))}
  run = lambda params: loss(jax.random.key(1), params, batch)[0][0].reshape(shape)
  losses, gradient = jax.jit(lambda params: (run(params), jax.jacrev(run)(params)))(0.3)
  for i, head in enumerate(HEADS):
    assert np.all(np.isfinite(losses[i])) and np.all(np.isfinite(gradient[i])), head
    # Where sigma is 6e-8, x_t may be x_0 in float32, and then so is D.
    assert np.all(losses[i] >= 0) and np.all(losses[i][:, 1:] > 0), head


def test_a_network_reads_inputs_of_variance_one_and_its_level():
  """Of data of standard deviation 0.5, at noise ratios rho = 0.1 and 4."""
  seen = []

  def apply(params, x, level, condition, *, key):
    seen.append((x, level, condition, key))
    return params * x

  schedule, x = schedules.variance_exploding(), jnp.ones((2, 3))
  model = denoising.network_denoiser(base.Network(None, apply), schedule, HEADS["data"], 0.5)
  found = model(2.0, x, jnp.array([0.1, 4.0]), "condition", "key")
  scale = 1 / np.sqrt([0.26, 16.25])
  np.testing.assert_allclose(seen[0][0], scale[:, None] * np.ones((2, 3)), rtol=1e-6)
  np.testing.assert_allclose(seen[0][1], [1000 / (1 + 10**0.5), 2000 / 3], rtol=1e-5)
  assert seen[0][2:] == ("condition", "key")
  np.testing.assert_allclose(found, 2 * seen[0][0], rtol=1e-6)
  model(2.0, x, jnp.float32(4.0))  # a scalar time, as samplers have
  np.testing.assert_allclose(seen[1][1], [2000 / 3] * 2, rtol=1e-5)
  assert seen[1][2:] == (None, None)


def test_one_microbatch_and_two_make_the_same_step():
  """Of a loss whose noise is in the batch; one example weighs nothing."""
  schedule, rng = SCHEDULES["cosine"], np.random.default_rng(0)
  batch = {name: jnp.asarray(rng.normal(size=(6, 2)), jnp.float32) for name in ("x", "z")}
  batch["t"] = jnp.asarray(rng.uniform(size=6), jnp.float32)
  weight = jnp.array([1.0, 1, 0, 1, 1, 1])

  def loss(key, params, batch):
    alpha, sigma = (f(batch["t"])[:, None] for f in (schedule.alpha, schedule.sigma))
    denoised = linear(params, alpha * batch["x"] + sigma * batch["z"])
    losses = denoising.squared_error(denoised, batch["x"], batch["weight"])
    return (losses, batch["weight"]), {}

  optimizer, averaging = optax.sgd(0.1), state.no_average()

  def made(num):
    first = state.init(jax.random.key(0), lambda key: best(0.5, 0.5), optimizer, averaging)
    return step.train_step(
      jax.random.key(0),
      first,
      batch | {"weight": weight},
      loss_fn=loss,
      optimizer=optimizer,
      averaging=averaging,
      num_microbatches=num,
    )

  (one, metrics), (two, same) = made(1), made(2)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), one.params, two.params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), metrics, same)
  assert metrics["weight"] == 5 and np.abs(one.params[0] - best(0.5, 0.5)[0]) > 1e-3
