"""Losses by hand, what fits find, and the best steps, on a chain of 9 or 27 sequences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from ancestral.evaluation import exact_laws
from ancestral.models import mask_schedules, toy, toy_discrete
from ancestral.sampling import jumps, noises
from ancestral.training import sampler_distillation as distillation

V, L = 3, 3
SCHEDULE = mask_schedules.linear()
TRANSITION = np.random.default_rng(0).dirichlet(np.ones(V), size=V)
LAW = jnp.asarray(toy.markov_law(TRANSITION, 0, L), jnp.float32)
NOISE = noises.uniform(SCHEDULE, V)
PREDICT = toy_discrete.markov_predictor(
  *(jnp.asarray(a, jnp.float32) for a in (TRANSITION[0], TRANSITION)), SCHEDULE
)
EVEN = jumps.Steps(jnp.linspace(1, 0, 4), jnp.ones(3))
SETTING = distillation.Setting(
  L, batch_size=32, num_updates=80, teacher_steps=4, learning_rate=0.05
)


def kl(steps, law=jumps.euler_law):
  made = exact_laws.sampler_law(PREDICT, NOISE, law(NOISE), steps, L)
  return float(exact_laws.kl(made, LAW))


def scores(seed, num_steps=3):
  return np.random.default_rng(seed).uniform(0.1, 3, size=(num_steps, 5, L, V)).astype(np.float32)


def test_score_loss_by_hand_and_its_minimum_is_a_slope():
  student, teacher, phi = scores(0), scores(1), np.array([0.5, 1.0, 2.0], np.float32)
  expected = sum(
    np.mean((teacher[k] - phi[k] * student[k]) ** 2) / np.mean(teacher[k] ** 2) for k in range(3)
  )
  found = distillation.score_loss(*map(jnp.asarray, (phi, student, teacher)))
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  slope = [np.vdot(teacher[k], student[k]) / np.vdot(student[k], student[k]) for k in range(3)]
  grad = jax.grad(distillation.score_loss)(
    jnp.asarray(slope, jnp.float32), jnp.asarray(student), jnp.asarray(teacher)
  )
  np.testing.assert_allclose(grad, 0, atol=1e-5)


def test_width_loss_is_of_ratios_and_least_where_the_transitions_agree():
  student = jnp.asarray(scores(0))
  widths = jnp.array([0.2, 0.5, 0.3])
  teacher = student * (3 * widths)[:, None, None, None]
  np.testing.assert_allclose(distillation.width_loss(widths, student, teacher), 0, atol=1e-10)
  one, scaled = (distillation.width_loss(c * widths, student, student) for c in (1, 7))
  np.testing.assert_allclose(one, scaled, rtol=1e-5)
  assert one > 0


def test_times_of_widths():
  times = distillation.times_of(
    jnp.log(jnp.array([1.0, 2.0, 5.0])), jnp.array([0.9, 0.4, 0.3, 0.1])
  )
  np.testing.assert_allclose(times, [0.9, 0.8, 0.6, 0.1], rtol=1e-6)


def test_refined_times_hold_the_given():
  times = jnp.array([1.0, 0.4, 0.0])
  found = distillation.refined(times, 3)
  np.testing.assert_allclose(found, [1, 0.8, 0.6, 0.4, 0.4 - 0.4 / 3, 0.4 / 3, 0], atol=1e-6)


def test_perturbed_starts_are_so_far_from_the_teachers():
  for name, noise in (("uniform", NOISE), ("masking", noises.masking(SCHEDULE, V))):
    for num in (0, 1, 2):
      student, teacher = distillation._paths(
        jax.random.key(0), noise, SETTING._replace(perturbed=num)
      )
      assert np.all(np.sum(np.asarray(student[1] != teacher[1]), axis=1) == num), name
      assert np.all(np.asarray(student[1]) < noise.num_states)
    # `num` of 2 tokens are others, any of them alike
    counts = np.bincount(np.asarray(student[1]).reshape(-1), minlength=noise.num_states)[:V]
    np.testing.assert_allclose(counts / counts.sum(), np.full(V, 1 / V), atol=0.05)


def test_coefficients_are_the_slopes_of_their_own_paths():
  """At the fit, fresh paths regress to what was found; below 1, since paths part."""
  law = jumps.euler_law(NOISE)
  steps = distillation.fit_coefficients(jax.random.key(1), PREDICT, NOISE, law, EVEN.times, SETTING)

  @jax.jit
  def slopes(key):
    student, teacher = distillation._paths(key, NOISE, SETTING._replace(batch_size=4_000))
    seen = distillation._scores(*student, PREDICT, NOISE, law, steps.times, steps.coefficients)
    fine = distillation.refined(steps.times, SETTING.teacher_steps)
    aim = distillation._scores(*teacher, PREDICT, NOISE, law, fine)[:: SETTING.teacher_steps]
    axes = (1, 2, 3)
    return jnp.sum(aim * seen, axis=axes) / jnp.sum(seen**2, axis=axes)

  np.testing.assert_allclose(steps.coefficients, slopes(jax.random.key(2)), atol=0.08)
  assert np.all(np.asarray(steps.coefficients[1:]) < 0.95)


def test_the_likeliest_moves_unmask_as_often_as_the_teacher():
  """Tau-leaping unmasks with probability l exp(-l), l = Phi (t - s) / t; it should the teacher's u.

  The teacher's small steps are of tau-leaping too. Where u > exp(-1), l = 1 is as near as it gets.
  """
  noise = noises.masking(SCHEDULE, V)
  predict = toy_discrete.markov_predictor(
    *(jnp.asarray(a, jnp.float32) for a in (TRANSITION[0], TRANSITION))
  )
  setting = SETTING._replace(batch_size=256, num_updates=80)
  fit = lambda law: distillation.fit_moves(
    jax.random.key(0), predict, noise, law(noise), jnp.linspace(1, 0, 5), setting
  )
  found = np.asarray(fit(jumps.tau_leaping_law).coefficients)[:3] * [1 / 4, 1 / 3, 1 / 2]
  small = lambda t: np.array([1 / 16 / (t - j / 16) for j in range(4)])
  masked = [np.prod(1 - small(t) * np.exp(-small(t))) for t in (1, 0.75)]
  expected = [optimize.brentq(lambda x, m=m: x * np.exp(-x) - 1 + m, 0, 1) for m in masked]
  np.testing.assert_allclose(found, [*expected, 1], atol=0.06)


def test_learned_times_are_better_than_even_ones():
  times = distillation.fit_times(
    jax.random.key(0), PREDICT, NOISE, jumps.euler_law(NOISE), EVEN.times, SETTING
  )
  assert np.all(np.diff(times) < 0) and times[0] == 1 and times[-1] == 0
  assert kl(EVEN._replace(times=times)) < 0.8 * kl(EVEN)


@pytest.mark.parametrize("free", ["coefficients", "times", "both"])
def test_best_steps_are_better_and_move_only_what_may(free):
  steps = distillation.best_steps(
    PREDICT,
    NOISE,
    jumps.euler_law(NOISE),
    EVEN,
    LAW,
    learn_coefficients=free != "times",
    learn_times=free != "coefficients",
    max_iterations=15,
  )
  assert kl(steps) < kl(EVEN)
  np.testing.assert_allclose(steps.times[[0, -1]], [1, 0], atol=1e-6)
  if free == "coefficients":
    np.testing.assert_array_equal(steps.times, EVEN.times)
  if free == "times":
    np.testing.assert_array_equal(steps.coefficients, EVEN.coefficients)


def test_the_gradient_of_the_exact_law_equals_differences():
  @jax.jit
  def loss(scales):
    made = exact_laws.sampler_law(
      PREDICT, NOISE, jumps.euler_law(NOISE), jumps.Steps(EVEN.times, scales), L
    )
    return exact_laws.kl(made, LAW)

  at = jnp.array([1.0, 0.5, 0.4])
  found = jax.jit(jax.grad(loss))(at)
  for k in range(3):
    step = 2e-3 * np.eye(3, dtype=np.float32)[k]
    expected = (loss(at + step) - loss(at - step)) / 4e-3
    np.testing.assert_allclose(found[k], expected, rtol=0.02, atol=2e-3)
