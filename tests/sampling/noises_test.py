"""Ratios, rates and posteriors of both kinds of noise, against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.models import mask_schedules, toy, toy_discrete
from ancestral.sampling import noises

V, L = 3, 3
SCHEDULE = mask_schedules.cosine()
JOINT = np.random.default_rng(0).dirichlet(np.full(V**L, 0.5)).reshape((V,) * L)
STATES = {"uniform": toy_discrete.sequences(V, L), "masking": toy_discrete.sequences(V + 1, L)}


def forward_kernel(name, kept):
  """q(x_t | x_s) of one position, [M, M], where `kept` = alpha(t) / alpha(s)."""
  if name == "uniform":
    return kept * np.eye(V) + (1 - kept) / V
  out = kept * np.eye(V + 1)
  out[:, V] += 1 - kept
  return out


def law_at(name, t):
  """p_t, [M] * L, float64."""
  alpha = float(SCHEDULE.alpha(t))
  joint = JOINT if name == "uniform" else np.pad(JOINT, ((0, 1),) * L)
  q = forward_kernel(name, alpha)
  return np.einsum("abc,ax,by,cz->xyz", joint, q, q, q)


def problem(name):
  """(noise, exact p at every state and time t)."""
  joint = jnp.asarray(JOINT, jnp.float32)
  if name == "uniform":
    predict = toy_discrete.uniform_predictor(joint, SCHEDULE)
  else:
    predict = toy.joint_predictor(joint)
  tokens = jnp.asarray(STATES[name])
  return getattr(noises, name)(SCHEDULE, V), lambda t: jnp.exp(predict(tokens, t))


def times(name, t):
  return jnp.full(len(STATES[name]), t, jnp.float32)


def neighbours(name, row, i):
  """The states that agree with row but for position i."""
  for y in range(V + (name == "masking")):
    other = row.copy()
    other[i] = y
    yield y, tuple(other)


@pytest.mark.parametrize("name", STATES)
def test_scores_are_the_ratios_of_the_law(name):
  noise, p = problem(name)
  for t in (0.05, 0.5, 0.95):
    law = law_at(name, t)
    found = noise.scores(p(times(name, t)), jnp.asarray(STATES[name]), times(name, t))
    for row, scores in zip(STATES[name], np.asarray(found), strict=True):
      for i in range(L):
        if name == "masking" and row[i] != V:
          assert np.all(scores[i] == 0)
          continue
        expected = np.zeros(noise.num_states)
        for y, other in neighbours(name, row, i):
          expected[y] = law[other] / law[tuple(row)] if y != row[i] else 0
        np.testing.assert_allclose(scores[i], expected, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("name", STATES)
def test_rates_are_the_forward_rates_back_times_the_ratios(name):
  """The rate of the forward chain from y to x is beta / V, or beta from a token to the mask."""
  noise, p = problem(name)
  t = 0.4
  step = 1e-4
  alpha, less = float(SCHEDULE.alpha(t - step)), float(SCHEDULE.alpha(t + step))
  beta = np.log(alpha / less) / (2 * step)
  scale = beta / V if name == "uniform" else beta
  arguments = p(times(name, t)), jnp.asarray(STATES[name]), times(name, t)
  expected = scale * np.asarray(noise.scores(*arguments))
  np.testing.assert_allclose(noise.rates(*arguments), expected, rtol=2e-3)


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("t, s", [(1.0, 0.6), (0.7, 0.3), (0.3, 0.0)])
def test_posterior_equals_the_marginals_of_the_way_back(name, t, s):
  noise, p = problem(name)
  tokens = jnp.asarray(STATES[name])
  found = np.asarray(noise.posterior(p(times(name, t)), tokens, times(name, t), times(name, s)))
  before, now = law_at(name, s), law_at(name, t)
  q = forward_kernel(name, float(SCHEDULE.alpha(t)) / float(SCHEDULE.alpha(s)))
  for row, probs in zip(STATES[name], found, strict=True):
    if now[tuple(row)] < 1e-12:
      continue
    joint = before * np.einsum("a,b,c->abc", q[:, row[0]], q[:, row[1]], q[:, row[2]])
    joint /= joint.sum()
    for i in range(L):
      expected = joint.sum(tuple(j for j in range(L) if j != i))
      np.testing.assert_allclose(probs[i], expected, atol=3e-5)


@pytest.mark.parametrize("name", STATES)
def test_tweedie_is_the_posterior(name):
  """SEDD's step: (ratios by the inverse forward kernel)(y) times the kernel from y to x."""
  noise, p = problem(name)
  t, s = 0.7, 0.3
  tokens = jnp.asarray(STATES[name])
  found = np.asarray(noise.posterior(p(times(name, t)), tokens, times(name, t), times(name, s)))
  law = law_at(name, t)
  q = forward_kernel(name, float(SCHEDULE.alpha(t)) / float(SCHEDULE.alpha(s)))
  for row, probs in zip(STATES[name], found, strict=True):
    for i in range(L):
      if name == "masking" and row[i] != V:
        continue
      ratios = np.array([law[other] / law[tuple(row)] for _, other in neighbours(name, row, i)])
      np.testing.assert_allclose(probs[i], (ratios @ np.linalg.inv(q)) * q[:, row[i]], atol=3e-5)


@pytest.mark.parametrize("name", STATES)
def test_forward_draws_the_kernel(name):
  noise, _ = problem(name)
  s, t, num = 0.2, 0.6, 20_000
  tokens = jnp.broadcast_to(jnp.arange(V)[None], (num, V))
  late = lambda value: jnp.full(num, value, jnp.float32)
  moved = jax.jit(noise.forward)(targets.keys_of(np.arange(num)), tokens, late(s), late(t))
  q = forward_kernel(name, float(SCHEDULE.alpha(t)) / float(SCHEDULE.alpha(s)))
  for v in range(V):
    targets.check_law(np.asarray(moved)[:, v : v + 1], q[v])


def test_prior_fills_what_is_unknown_uniformly():
  noise = noises.uniform(SCHEDULE, V)
  tokens = jnp.broadcast_to(jnp.array([[V, 1, V]]), (9_000, 3))
  filled = np.asarray(noise.prior(targets.keys_of(np.arange(9_000)), tokens))
  assert np.all(filled[:, 1] == 1)
  targets.check_law(filled[:, [0, 2]], np.full((V, V), 1 / V**2))
  masks = noises.masking(SCHEDULE, V).prior(targets.keys_of(np.arange(2)), tokens[:2])
  np.testing.assert_array_equal(masks, tokens[:2])


def test_chances_leave_a_rest_and_are_b_times_the_ratios():
  noise, p = problem("uniform")
  t = times("uniform", 0.3)
  tokens = jnp.asarray(STATES["uniform"])
  alpha = SCHEDULE.alpha(t)
  chances = noises.chances(p(t), tokens, alpha[:, None, None])
  assert np.all(np.asarray(chances.sum(-1)) <= 1 + 1e-6)
  b = (1 - alpha[:, None, None]) / V
  np.testing.assert_allclose(chances, b * noise.scores(p(t), tokens, t), rtol=1e-5)
