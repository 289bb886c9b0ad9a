"""Remasking and correctors: marginals that stay, laws that stay, and what was given."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.models import mask_schedules, toy
from ancestral.sampling import base, logits, masked, remasking

V, L, DRAWS = 3, 3, 20_000
JOINT = np.random.default_rng(0).dirichlet(np.full(V**L, 0.4)).reshape((V,) * L)
PREDICT = toy.joint_predictor(jnp.asarray(JOINT, jnp.float32))
LINEAR = mask_schedules.linear()


def blank(num=DRAWS):
  return jnp.full((num, L), V, jnp.int32)


def run_remasking(remask, times, tokens=None, num_steps=None, **kwargs):
  tokens = blank() if tokens is None else tokens

  @jax.jit
  def run(keys, tokens):
    algorithm = remasking.remasking(PREDICT, LINEAR, times, remask, mask=V, **kwargs)
    state = base.start(keys, algorithm, tokens)
    steps = len(times) - 1 if num_steps is None else num_steps
    return base.run(keys, algorithm, state, steps, lambda state, info: state.tokens)

  return run(targets.keys_of(np.arange(len(tokens))), tokens)


REMASKS = {
  "cap": remasking.cap(0.3),
  "rescale": remasking.rescale(0.7),
  "most": remasking.rescale(1.0),
  "in_loop": remasking.in_loop(remasking.cap(0.4)),
}


@pytest.mark.parametrize("name", REMASKS)
def test_the_share_of_masks_is_the_schedules(name):
  """1 - alpha at every time, positions apart, whatever is masked again."""
  times = remasking.loop_times(LINEAR, 3, 3, 2, alpha=0.6)
  _, seen = run_remasking(REMASKS[name], times)
  share = np.asarray(seen == V).mean(axis=1)  # [T, L]
  expected = np.asarray(times)[1:, None]
  error = 4 * np.sqrt(expected * (1 - expected) / DRAWS) + 1e-6
  assert np.all(np.abs(share - expected) <= error)


def test_marginals_are_the_training_ones_and_remasking_mends_the_joint():
  """Many small steps with remasking draw the law; few with a loop come closer than without it."""
  fine = np.linspace(1, 0, 129)
  some = blank(8_000)
  state, _ = run_remasking(remasking.cap(0.02), fine, some)
  targets.check_law(state.tokens, JOINT)
  distance = {}
  for within in (0, 60):
    times = remasking.loop_times(LINEAR, 2, within, 2, alpha=0.9)
    state, _ = run_remasking(remasking.in_loop(remasking.cap(0.05)), times, some)
    counts = np.zeros(JOINT.shape)
    np.add.at(counts, tuple(np.asarray(state.tokens).T), 1)
    distance[within] = targets.total_variation(counts, JOINT)
  assert distance[60] < 0.6 * distance[0]


def test_without_remasking_it_is_ancestral():
  times = jnp.linspace(1, 0, 5)
  state, _ = run_remasking(remasking.rescale(0.0), times)

  @jax.jit
  def run(keys):
    algorithm = masked.ancestral(PREDICT, LINEAR, times, mask=V)
    return base.run(keys, algorithm, base.start(keys, algorithm, blank()), 4)[0]

  np.testing.assert_array_equal(state.tokens, run(targets.keys_of(np.arange(DRAWS))).tokens)


def test_what_is_given_is_never_masked():
  tokens = blank(500).at[:, 1].set(2)
  for remask in (*REMASKS.values(), remasking.confident(remasking.rescale(1.0))):
    _, seen = run_remasking(remask, np.linspace(1, 0, 7), tokens)
    assert np.all(np.asarray(seen)[:, :, 1] == 2)


def test_no_more_is_masked_than_the_next_time_allows():
  """By hand: (alpha_t, alpha_s, most)."""
  for alpha_t, alpha_s, most in (
    (0.0, 0.1, 1.0),
    (0.8, 0.9, 0.125),
    (0.5, 0.5, 1.0),
    (0.8, 1.0, 0),
  ):
    moment = remasking.Moment(
      jnp.array([[alpha_t]]), jnp.array([[alpha_s]]), jnp.ones((1, L)), jnp.ones((1, L), bool)
    )
    sigma = lambda remask, moment=moment: float(remask(moment)[0, 0])
    np.testing.assert_allclose(sigma(remasking.most), most, atol=1e-6)
    np.testing.assert_allclose(sigma(remasking.rescale(0.5)), most / 2, atol=1e-6)
    np.testing.assert_allclose(sigma(remasking.cap(0.1)), 0.1 if most else 0, atol=1e-6)


def test_confidence_takes_back_what_was_unlikely():
  moment = remasking.Moment(
    jnp.array([[0.5]]),
    jnp.array([[0.5]]),
    jnp.array([[0.9, 0.1, 0.4]]),
    jnp.array([[True, True, False]]),
  )
  sigma = np.asarray(remasking.confident(remasking.cap(0.3))(moment))[0]
  # 1 / (1 + e^.8) and 1 / (1 + e^-.8) of .3, and nothing of what is masked
  np.testing.assert_allclose(sigma, [0.0930077, 0.2069923, 0], rtol=1e-5)
  # A row of the sampler remembers the probability that each token was written with.
  state, _ = run_remasking(remasking.confident(remasking.cap(0.3)), np.linspace(1, 0, 5))
  assert np.all((np.asarray(state.confidence) > 0) & (np.asarray(state.confidence) <= 1 + 1e-6))


def test_confidence_is_the_predictor_s_own_at_temperature_0():
  state = run_remasking(
    remasking.cap(0.3), np.linspace(1, 0, 6), blank(50), transform=logits.temperature(0.0)
  )[0]
  confidence = np.asarray(state.confidence)
  assert confidence.min() > 0 and np.mean(confidence < 0.99) > 0.5


def test_parameters_of_rows():
  """A cap of each row: one that is 0 never masks again, and one of 1 does."""
  moment = remasking.Moment(*(jnp.full((2, 1), alpha) for alpha in (0.5, 0.5)), None, None)
  for remask in (remasking.cap, remasking.rescale):
    np.testing.assert_allclose(remask(jnp.array([0.0, 0.2]))(moment), [[0], [0.2]])


def test_confident_remasking_masks_more_than_the_schedule_says():
  times = np.linspace(1, 0, 6)
  _, seen = run_remasking(remasking.confident(remasking.rescale(1.0)), times)
  share = np.asarray(seen == V).mean(axis=(1, 2))
  assert np.all(share[1:-1] > times[2:-1] + 0.02) and share[-1] == 0


def test_numbers_out_of_range_are_refused():
  with pytest.raises(ValueError, match=r"rescale\(1.5\)"):
    remasking.rescale(1.5)
  with pytest.raises(ValueError, match=r"cap\(-0.1\)"):
    remasking.cap(-0.1)
  with pytest.raises(ValueError, match=r"back\(0.0\)"):
    remasking.forward_backward(PREDICT, LINEAR, jnp.linspace(1, 0, 3), 0.0, mask=V)
  hitting = masked.first_hitting(PREDICT, LINEAR, mask=V)
  algorithm = remasking.corrected(hitting, remasking.gibbs(PREDICT, mask=V), mask=V)
  with pytest.raises(ValueError, match=r"masked\.State"):
    base.start(targets.keys_of([0]), algorithm, blank(1))


def law_at(noise):
  """p(x_s) over [V + 1] * L: each token masked apart from the others."""
  law = np.zeros((V + 1,) * L)
  for kept in itertools.product([True, False], repeat=L):
    weight = np.prod([1 - noise if k else noise for k in kept])
    axes = tuple(i for i in range(L) if not kept[i])
    index = tuple(slice(0, V) if k else V for k in kept)
    law[index] += weight * JOINT.sum(axis=axes)
  return law


def corrected_law(correct, noise, step):
  """What a corrector makes of draws of the exact law at that noise."""
  law = law_at(noise)
  rng = np.random.default_rng(5)
  flat = rng.choice(law.size, DRAWS, p=law.ravel() / law.sum())
  tokens = jnp.asarray(np.stack(np.unravel_index(flat, law.shape), axis=1), jnp.int32)
  state = remasking.State(
    jnp.full(DRAWS, step, jnp.int32),
    tokens,
    jnp.zeros(DRAWS, jnp.int32),
    jnp.ones((DRAWS, L), bool),
    jnp.zeros((DRAWS, L)),
  )
  after = jax.jit(correct)(targets.keys_of(np.arange(DRAWS)), state)
  moved = np.any(np.asarray(after.tokens) != np.asarray(tokens), axis=1).mean()
  return after, law, moved


def test_gibbs_leaves_the_law_as_it_is():
  for noise in (0.0, 0.4):
    correct = remasking.gibbs(PREDICT, mask=V)
    after, law, moved = corrected_law(correct, noise, 0)
    assert moved > 0.1
    targets.check_law(after.tokens, law)
    if noise == 0:
      np.testing.assert_array_equal(after.calls, 1)


def test_gibbs_changes_one_written_token_at_most():
  tokens = jnp.array([[0, V, 2], [V, V, V]])
  state = remasking.start(tokens, V)._replace(free=jnp.array([[True, True, False], [True] * 3]))
  keys = targets.keys_of([0, 1])
  for step in range(10):
    key = jax.vmap(jax.random.fold_in)(keys, jnp.full(2, step))
    state = jax.jit(remasking.gibbs(PREDICT, mask=V))(key, state)
  out = np.asarray(state.tokens)
  assert out[0, 1] == V and out[0, 2] == 2 and np.all(out[1] == V)
  np.testing.assert_array_equal(state.calls, [10, 0])


def test_forward_backward_leaves_the_law_as_it_is_if_it_does_not_go_far():
  times = jnp.array([1.0, 0.4, 0.0])
  near = remasking.forward_backward(PREDICT, LINEAR, times, 0.05, mask=V)
  after, law, moved = corrected_law(near, 0.4, 1)
  assert moved > 0.02
  targets.check_law(after.tokens, law)
  far = remasking.forward_backward(PREDICT, LINEAR, times, 0.6, mask=V)  # all masked, at once
  after, law, _ = corrected_law(far, 0.4, 1)
  counts = np.zeros(law.shape)
  np.add.at(counts, tuple(np.asarray(after.tokens).T), 1)
  assert targets.total_variation(counts, law) > targets.noise_floor(law, DRAWS)
  share = np.asarray(after.tokens == V).mean()
  assert abs(share - 0.4) < 4 * 0.5 / (DRAWS * L) ** 0.5


def test_correctors_bring_a_coarse_sampler_closer():
  times = jnp.linspace(1, 0, 3)

  def distance(num):
    @jax.jit
    def run(keys):
      coarse = masked.ancestral(PREDICT, LINEAR, times, mask=V)
      correct = remasking.gibbs(PREDICT, mask=V)
      algorithm = remasking.corrected(coarse, correct, mask=V, num=num)
      state = base.start(keys, algorithm, blank())
      return base.run(keys, algorithm, state, 4)[0]

    state = run(targets.keys_of(np.arange(DRAWS)))
    counts = np.zeros(JOINT.shape)
    np.add.at(counts, tuple(np.asarray(state.tokens).T), 1)
    np.testing.assert_array_equal(state.step, 2)  # no step beyond the last, and no correction
    return targets.total_variation(counts, JOINT)

  assert distance(6) < 0.6 * distance(0)
