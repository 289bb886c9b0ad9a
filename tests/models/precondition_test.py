"""Heads: against the noise and the data that they are of, against each other, at both ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.models import precondition, schedules, toy

SCHEDULES = {
  "variance exploding": schedules.variance_exploding(),
  "rectified flow": schedules.rectified_flow(),
  "trigonometric": schedules.trigonometric(),
  "linear": schedules.linear(),
  "cosine": schedules.cosine(),
  "sigmoid": schedules.sigmoid(),
  "shifted": schedules.shifted(schedules.rectified_flow(), 3.0),
  "chain": schedules.from_betas(schedules.linear_betas(100, last=0.2)),
  "chain without signal": schedules.from_betas(
    schedules.zero_terminal_snr(schedules.scaled_linear_betas(100))
  ),
}
HEADS = {
  "noise": precondition.NOISE,
  "score": precondition.SCORE,
  "data": precondition.DATA,
  "velocity": precondition.VELOCITY,
  "flow": precondition.FLOW,
  "karras": precondition.karras(0.7),
}
ON_EVERY_SCHEDULE = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
KINDS = (
  "variance exploding",
  "rectified flow",
  "linear",
)  # alpha = 1, neither, alpha^2 + sigma^2 = 1
ON_EVERY_KIND = pytest.mark.parametrize("schedule", [SCHEDULES[name] for name in KINDS], ids=KINDS)


def pairs(alpha, sigma, seed=0):
  """x_0 and z, and x_t of them, float64 [B, 2, 3]."""
  data, noise = np.random.default_rng(seed).normal(size=(2, len(alpha), 2, 3))
  return data, noise, alpha[:, None, None] * data + sigma[:, None, None] * noise


def outputs(data, noise, alpha, sigma):
  """What each head puts out when it knows x_0 and z, as its paper writes it."""
  return {
    "noise": noise,
    "score": -noise / sigma,
    "data": data,
    "velocity": alpha * noise - sigma * data,
    "flow": noise - data,
  }


@ON_EVERY_KIND
def test_heads_are_the_combinations_of_noise_and_data_that_they_say(schedule):
  times = schedule.max_time * np.array([0.05, 0.3, 0.8])
  alpha, sigma = schedule.alpha(times), schedule.sigma(times)
  data, noise, x = pairs(alpha, sigma)
  expected = outputs(data, noise, alpha[:, None, None], sigma[:, None, None])

  @jax.jit
  def every(x, t, data, expected):
    known = lambda value: lambda x, t: value
    return {
      name: (
        precondition.predictor(known(data), schedule, HEADS[name])(x, t),
        precondition.denoiser(known(output), schedule, HEADS[name])(x, t),
      )
      for name, output in expected.items()
    }

  with jax.enable_x64(True):
    for name, (output, denoised) in every(x, times, data, expected).items():
      np.testing.assert_allclose(output, expected[name], rtol=1e-9, atol=1e-9, err_msg=name)
      np.testing.assert_allclose(denoised, data, rtol=1e-9, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("dtype, error", [("float32", 1e-6), ("float64", 1e-12)])
@ON_EVERY_SCHEDULE
def test_there_and_back(schedule, dtype, error):
  """Of noise and score the way back divides by alpha, which magnifies rounding by 1 / alpha."""
  with jax.enable_x64(dtype == "float64"):
    times = jnp.asarray(schedule.max_time * np.array([0.03, 0.4, 0.9]), dtype)
    alpha = np.asarray(schedule.alpha(times), np.float64)
    data, _, x = pairs(alpha, np.asarray(schedule.sigma(times), np.float64))
    x = jnp.asarray(x, dtype)

    def there_and_back(head):
      predict = precondition.predictor(lambda x, t: jnp.asarray(data, dtype), schedule, head)
      return precondition.denoiser(predict, schedule, head)

    every = lambda x, t: {name: there_and_back(head)(x, t) for name, head in HEADS.items()}
    size = 1 + np.abs(np.asarray(x, np.float64)).max(axis=(1, 2)) / alpha
    for name, out in every(x, times).items():
      assert out.dtype == dtype
      worst = np.abs(out - data).max(axis=(1, 2))
      np.testing.assert_array_less(worst, error * size, err_msg=name)


def test_a_scalar_time_is_the_time_of_every_row():
  schedule, x = schedules.linear(), jnp.asarray(pairs(np.ones(3), np.ones(3))[2], jnp.float32)
  for head in HEADS.values():
    denoise = precondition.denoiser(lambda x, t: 0.3 * x, schedule, head)
    out = denoise(x, jnp.full(3, 0.4))
    np.testing.assert_allclose(denoise(x, jnp.float32(0.4)), out, rtol=1e-6)
    np.testing.assert_allclose(denoise(x, 0.4), out, rtol=1e-6)


@ON_EVERY_SCHEDULE
def test_at_both_ends_the_denoised_is_finite_where_it_is_said_to_be(schedule):
  t = jnp.array([0.0, schedule.max_time], jnp.float32)
  x = jnp.ones((2, 3))
  no_signal = schedule.alpha(t)[1] == 0
  denoisers = {
    name: precondition.denoiser(lambda x, t: 0.5 * x, schedule, head)
    for name, head in HEADS.items()
  }
  every = lambda x, t: {name: denoise(x, t) for name, denoise in denoisers.items()}
  for name, out in every(x, t).items():
    if name != "data":
      np.testing.assert_allclose(out[0], x[0], rtol=1e-6)  # at time 0, x_t is the data
    assert np.all(np.isfinite(out[1])) == (not no_signal or name not in ("noise", "score"))


def test_without_signal_velocity_and_flow_give_the_data_to_the_last_step():
  """At alpha = 0 and sigma = 1, v = -D and u = z - D."""
  schedule, one = schedules.rectified_flow(), jnp.float32(1)
  noise, data = jnp.array([[1.5, -2.0]]), jnp.array([[0.25, 0.5]])
  by_velocity = precondition.denoiser(lambda x, t: -data, schedule, precondition.VELOCITY)
  by_flow = precondition.denoiser(lambda x, t: noise - data, schedule, precondition.FLOW)
  np.testing.assert_array_equal(by_velocity(noise, one), data)
  np.testing.assert_array_equal(by_flow(noise, one), data)


def test_a_network_is_told_its_label():
  seen = []
  schedule = SCHEDULES["chain"]
  network = lambda x, label: (seen.append(label), x)[1]
  denoise = precondition.denoiser(network, schedule, precondition.NOISE, label=lambda t: t - 1)
  denoise(jnp.ones((2, 3)), jnp.array([1.0, 50.0]))
  denoise(jnp.ones((2, 3)), jnp.float32(7))
  np.testing.assert_array_equal(seen[0], [0, 49])
  np.testing.assert_array_equal(seen[1], 6)


@ON_EVERY_KIND
def test_gaussian_data_leave_nothing_for_an_edm_network_to_do(schedule):
  """The exact denoiser of N(0, s^2 I) is the network that puts out 0."""
  s = 0.5
  with jax.enable_x64(True):
    data = toy.GaussianMixture(jnp.ones(1), jnp.zeros((1, 3)), jnp.full(1, s**2))
    exact = toy.mixture_denoiser(data, schedule)
    t = jnp.asarray(schedule.max_time * np.array([0.01, 0.5, 0.99]))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3)))
    silent = precondition.edm(lambda x, label: jnp.zeros_like(x), schedule, s)
    np.testing.assert_allclose(jax.jit(silent)(x, t), jax.jit(exact)(x, t), rtol=1e-12)
    output = jax.jit(precondition.predictor(exact, schedule, precondition.karras(s)))(x, t)
    np.testing.assert_allclose(output, 0, atol=1e-11)


def test_edm_has_the_papers_coefficients_where_alpha_is_one():
  """Table 1 of the paper, by numbers: sigma = 2, sigma_data = 0.5."""
  seen = {}

  def network(x, label):
    seen.update(x=x, label=label)
    return jnp.full_like(x, 3.0)

  out = precondition.edm(network, schedules.variance_exploding())(jnp.full((1, 2), 4.0), 2.0)
  np.testing.assert_allclose(seen["x"], 4 / np.sqrt(4.25), rtol=1e-6)
  np.testing.assert_allclose(seen["label"], np.log(2) / 4, rtol=1e-6)
  np.testing.assert_allclose(out, 0.25 / 4.25 * 4 + 2 * 0.5 / np.sqrt(4.25) * 3, rtol=1e-6)


@ON_EVERY_KIND
def test_edm_is_of_the_noise_ratio_alone(schedule):
  """A network of x / alpha at noise level sigma / alpha is the same network on any schedule."""
  network = lambda x, label: jnp.tanh(x) + label.reshape(-1, 1)
  with jax.enable_x64(True):
    t = jnp.asarray(schedule.max_time * np.array([0.1, 0.6]))
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)))
    out = jax.jit(precondition.edm(network, schedule))(x, t)
    exploding = jax.jit(precondition.edm(network, schedules.variance_exploding()))
    expected = exploding(x / alpha[:, None], sigma / alpha)
    np.testing.assert_allclose(out, expected, rtol=1e-12)


def test_edm_takes_a_label_where_the_papers_is_infinite():
  seen = []
  network = lambda x, label: (seen.append(label), x)[1]
  schedule = schedules.rectified_flow()
  out = precondition.edm(network, schedule, label=lambda t: t)(
    jnp.ones((2, 3)), jnp.array([0.0, 1.0])
  )
  assert np.all(np.isfinite(out)) and np.all(np.isfinite(seen[0]))
  precondition.edm(network, schedule)(jnp.ones((2, 3)), jnp.array([0.0, 1.0]))
  np.testing.assert_array_equal(seen[1], [-np.inf, np.inf])


def test_a_karras_head_of_unit_data_is_velocity_the_other_way():
  schedule = schedules.trigonometric()
  x, denoised = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 3)), jnp.float32)
  t = jnp.array([0.1, 0.4, 0.7, 1.0])
  by = lambda head: precondition.predictor(lambda x, t: denoised, schedule, head)(x, t)
  np.testing.assert_allclose(by(precondition.karras(1.0)), -by(precondition.VELOCITY), atol=1e-5)


def test_half_precision_inputs_keep_their_times():
  """0.997 is 1 in bfloat16, where no signal would be left."""
  denoise = precondition.denoiser(
    lambda x, t: jnp.zeros_like(x), schedules.rectified_flow(), precondition.NOISE
  )
  out = denoise(jnp.ones((1, 2), jnp.bfloat16), jnp.float32(0.997))
  np.testing.assert_allclose(np.float32(out), 1 / 0.003, rtol=1e-2)


@pytest.mark.parametrize("source, target", [(0, 2), (1, 0), (2, 1)])
def test_a_converted_denoiser_is_the_exact_one_of_the_other_schedule(source, target):
  own, other = (SCHEDULES[KINDS[i]] for i in (source, target))
  mixture = toy.GaussianMixture(
    jnp.array([0.3, 0.7]), jnp.array([[1.0, -1.0], [-0.5, 2.0]]), jnp.array([0.1, 0.4])
  )
  x = 2 * jax.random.normal(jax.random.key(0), (6, 2))
  t = jnp.array([0.05, 0.2, 0.4, 0.6, 0.8, 0.95]) * min(other.max_time, 1.0)
  denoise = precondition.converted(toy.mixture_denoiser(mixture, own), own, other)
  expected = toy.mixture_denoiser(mixture, other)(x, t)
  np.testing.assert_allclose(denoise(x, t), expected, atol=2e-5)


def test_a_scaled_network_reads_unit_variance_and_a_level_of_the_noise_ratio():
  seen = {}

  def network(x, level):
    seen.update(x=x, level=level)
    return x

  z = jax.random.normal(jax.random.key(0), (2, 50_000, 2))
  for name in KINDS:
    schedule = SCHEDULES[name]
    t = jnp.asarray(schedule.time(-np.log(np.array([0.1, 3.0]))), jnp.float32)
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    precondition.scaled(network, schedule, 0.7)(alpha * 0.7 * z[..., 0] + sigma * z[..., 1], t)
    # 1 / sqrt(2 n) is the standard error of a standard deviation.
    np.testing.assert_allclose(np.std(seen["x"], axis=1), 1, atol=4 / np.sqrt(1e5))
    root = np.sqrt([0.1, 3.0])
    np.testing.assert_allclose(seen["level"], 1000 * root / (1 + root), rtol=1e-4)
  ends = precondition.noise_level(schedules.rectified_flow())(jnp.array([0.0, 1.0]))
  np.testing.assert_array_equal(ends, [0, 1000])
