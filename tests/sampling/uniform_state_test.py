"""Exact simulation and correctors of uniform-state diffusion, by enumeration where possible."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.evaluation import exact_laws
from ancestral.models import mask_schedules, toy, toy_discrete
from ancestral.sampling import base, jumps, noises, uniform_state

V, L = 3, 3
SCHEDULE = mask_schedules.linear()
LAW = np.random.default_rng(4).dirichlet(np.full(V**L, 0.4)).reshape((V,) * L)
JOINT = jnp.asarray(LAW, jnp.float32)
NOISE = noises.uniform(SCHEDULE, V)
STATES = jnp.asarray(toy_discrete.sequences(V, L))


def predict(tokens, t):
  return toy_discrete.uniform_predictor(JOINT, SCHEDULE)(tokens, t)


def probs(t):
  return jnp.exp(predict(STATES, t)), jnp.full(V**L, t, jnp.float32)


def law_at(t):
  """p_t, [V^L]."""
  return np.asarray(toy_discrete.uniform_noised(LAW, float(SCHEDULE.alpha(t)))).reshape(-1)


def one_position(to, i):
  """The transition matrix [V^L, V^L] of a redraw of position i by to [V^L, L, V]."""
  matrix = np.zeros((V**L, V**L))
  for n, row in enumerate(np.asarray(STATES)):
    for y in range(V):
      other = row.copy()
      other[i] = y
      matrix[n, np.ravel_multi_index(other, (V,) * L)] += to[n, i, y]
  return matrix


@pytest.mark.parametrize("t", [0.02, 0.3, 0.9])
def test_gibbs_leaves_the_law_exactly(t):
  p, times = probs(t)
  to = np.asarray(uniform_state.gibbs_law(NOISE, p, STATES, times), np.float64)
  law = law_at(t)
  for i in range(L):
    np.testing.assert_allclose(law @ one_position(to, i), law, atol=2e-6)


def test_gibbs_keeps_tokens_where_alpha_rounds_to_one():
  """What the predictor is sure of is kept; of one that is not quite, the law is still a law."""
  noise = noises.uniform(mask_schedules.geometric(), V)
  t = jnp.full(V**L, 1e-4)
  assert float(noise.schedule.alpha(t[0])) == 1
  exact = np.asarray(jax.nn.one_hot(STATES, V))
  for p in (exact, 0.99999 * exact + 0.00001 / V):
    to = np.asarray(uniform_state.gibbs_law(noise, jnp.asarray(p, jnp.float32), STATES, t))
    np.testing.assert_allclose(to.sum(axis=-1), 1, rtol=1e-5)
    if p is exact:
      assert np.all(np.sum(to * exact, axis=-1) > 0.999)


def test_gibbs_law_is_leave_one_out_then_noise():
  """The other formula: log(1 + V alpha / (1 - alpha)) off the own token's logit, then noise."""
  p, times = probs(0.3)
  alpha = float(SCHEDULE.alpha(0.3))
  left = np.log(np.asarray(p, np.float64))
  left -= np.eye(V)[np.asarray(STATES)] * np.log1p(V * alpha / (1 - alpha))
  left = targets.softmax(left)
  found = uniform_state.gibbs_law(NOISE, p, STATES, times)
  np.testing.assert_allclose(found, alpha * left + (1 - alpha) / V, atol=1e-5)


def test_choosing_by_margin_or_several_at_once_moves_the_law():
  """Every draw is a conditional, and yet; so `gibbs` draws one position, without looking."""
  t = 0.3
  p, times = probs(t)
  to = np.asarray(uniform_state.gibbs_law(NOISE, p, STATES, times), np.float64)
  law = law_at(t)
  ranked = np.sort(to, axis=-1)
  least = np.argmin(ranked[..., -1] - ranked[..., -2], axis=1)
  matrices = np.stack([one_position(to, i) for i in range(L)])
  by_margin = matrices[least, np.arange(V**L)]
  assert np.abs(law @ by_margin - law).sum() / 2 > 0.005
  together = exact_laws.pushed(jnp.asarray(law, jnp.float32), jnp.asarray(to, jnp.float32))
  assert np.abs(np.asarray(together) - law).sum() / 2 > 0.005


def test_forward_backward_leaves_the_law_to_second_order():
  """By the transition matrix: noise to t + h position by position, then the posterior's step."""
  t = 0.3
  law = jumps.posterior_law(NOISE)
  off = []
  for h in (0.02, 0.01, 0.005):
    p, later = probs(t + h)
    back = law(p, STATES, later, jnp.full_like(later, t), jnp.ones_like(later))
    made = exact_laws.pushed(jnp.asarray(law_at(t + h), jnp.float32), back)
    off.append(float(exact_laws.total_variation(made, jnp.asarray(law_at(t), jnp.float32))))
  assert off[0] < 0.01
  assert np.all(np.log2(np.array(off[:-1]) / off[1:]) > 1.7), off


def corrected_once(corrector, t, num):
  """States after the corrector, from states of the law at t."""
  rows = np.random.default_rng(0).choice(V**L, size=num, p=law_at(t) / law_at(t).sum())
  none = jnp.zeros(num, jnp.int32)
  state = jumps.State(none, STATES[rows], none, jnp.ones((num, L), bool))
  times = jnp.full(num, t, jnp.float32)
  return jax.jit(corrector)(targets.keys_of(np.arange(num)), state, times)


@pytest.mark.parametrize("name", ["gibbs", "forward_backward"])
def test_correctors_draw_what_they_say(name):
  num, t = 30_000, 0.3
  if name == "gibbs":
    corrector = uniform_state.gibbs(predict, NOISE)
  else:
    corrector = uniform_state.forward_backward(
      predict, NOISE, jumps.posterior_law(NOISE), ahead=0.05
    )
  state = corrected_once(corrector, t, num)
  targets.check_law(np.asarray(state.tokens), law_at(t).reshape((V,) * L))
  assert np.all(np.asarray(state.calls) == 1)


@pytest.mark.parametrize("kind", ["uniform", "masking"])
def test_forward_backward_redraws_what_is_not_given(kind):
  """From p_t, of either noise, with the first token given: the conditional law stays."""
  t, num = 0.3, 30_000
  given = LAW[1] / LAW[1].sum()
  rng = np.random.default_rng(1)
  clean = np.stack(np.unravel_index(rng.choice(V * V, size=num, p=given.reshape(-1)), (V, V)), 1)
  redrawn = rng.uniform(size=clean.shape) < t
  if kind == "uniform":
    noise = NOISE
    noised = np.where(redrawn, rng.integers(0, V, clean.shape), clean)
    told = lambda tokens, t: jnp.pad(
      toy_discrete.uniform_predictor(jnp.asarray(given, jnp.float32), SCHEDULE)(tokens[:, 1:], t),
      ((0, 0), (1, 0), (0, 0)),
    )
    law = np.asarray(toy_discrete.uniform_noised(given, 1 - t))
  else:
    noise = noises.masking(SCHEDULE, V)
    noised = np.where(redrawn, V, clean)
    told = toy.joint_predictor(JOINT)
    law = np.zeros((V + 1, V + 1))
    law[:V, :V] = (1 - t) ** 2 * given
    law[:V, V], law[V, :V] = (t * (1 - t) * given.sum(axis=axis) for axis in (1, 0))
    law[V, V] = t**2
  tokens = jnp.asarray(np.pad(noised, ((0, 0), (1, 0)), constant_values=1), jnp.int32)
  free = jnp.broadcast_to(jnp.arange(L)[None] > 0, tokens.shape)
  none = jnp.zeros(num, jnp.int32)
  correct = uniform_state.forward_backward(told, noise, jumps.posterior_law(noise), ahead=0.02)
  state = jumps.State(none, tokens, none, free)
  times = jnp.full(num, t, jnp.float32)
  moved = np.asarray(jax.jit(correct)(targets.keys_of(np.arange(num)), state, times).tokens)
  assert np.all(moved[:, 0] == 1) and np.any(moved != np.asarray(tokens))
  targets.check_law(moved[:, 1:], law)


def test_gibbs_after_every_step_brings_ancestral_nearer():
  """Three steps, with eight redraws after each but the last; 20,000 samples of each."""
  times, num = jnp.linspace(1, 0, 4), 20_000
  gibbs = uniform_state.gibbs(predict, NOISE)

  def several(keys, state, t):
    for each in base.split(keys, 8):
      state = gibbs(each, state, t)
    return state

  def distance(algorithm):
    @jax.jit
    def sample(keys, tokens):
      state = base.start(keys, algorithm, tokens)
      return base.run(keys, algorithm, state, 3)[0]

    state = sample(targets.keys_of(np.arange(num)), jnp.full((num, L), V))
    counts = np.zeros((V,) * L)
    np.add.at(counts, tuple(np.asarray(state.tokens).T), 1)
    return targets.total_variation(counts, LAW), np.unique(state.calls)

  plain = jumps.ancestral(predict, NOISE, times)
  before, calls = distance(plain)
  assert calls == [3]
  after, calls = distance(jumps.corrected(plain, several, times))
  assert calls == [3 + 2 * 8]
  assert after < before - targets.noise_floor(LAW, num), (before, after)


def simulated(num, tokens, predict=predict, **kwargs):
  @jax.jit
  def sample(keys, tokens):
    algorithm = uniform_state.gillespie(predict, NOISE, **kwargs)
    state = base.start(keys, algorithm, tokens)
    return base.run_until(keys, algorithm, state, uniform_state.is_done, 1000)

  return sample(targets.keys_of(np.arange(num)), jnp.broadcast_to(tokens, (num, L)))


def test_gillespie_is_exact_and_counts_its_calls():
  num, first, last = 20_000, 1e-3, 1 - 1e-3
  state = simulated(num, jnp.full(L, V))
  assert np.all(np.asarray(uniform_state.is_done(state)))
  targets.check_law(np.asarray(state.tokens), LAW)
  calls = np.asarray(state.calls, np.float64)
  np.testing.assert_array_equal(state.calls, np.asarray(state.step) + 1)
  events = L * 2 * np.log(last / first)  # logit(last) - logit(first), as 1 - last = first
  assert abs(calls.mean() - events - 2) < 4 * np.sqrt(events / num)
  assert abs(calls.var() / events - 1) < 4 * np.sqrt(2 / num) * 1.1


def test_gillespie_stops_early_as_far_off_as_bounded():
  """With a wide last step it is off, by less than the bound; a sampler on a grid of so few is."""
  num, last = 20_000, 0.8
  state = simulated(num, jnp.full(L, V), last=last)
  counts = np.zeros((V,) * L)
  np.add.at(counts, tuple(np.asarray(state.tokens).T), 1)
  distance = targets.total_variation(counts, LAW)
  assert targets.noise_floor(LAW, num) < distance < L * (1 - last)


def test_infilling_is_exact_for_a_predictor_that_knows_what_is_given():
  num, given = 15_000, jnp.array([V, 1, V])
  knows = toy_discrete.uniform_predictor(JOINT, SCHEDULE, given=(1,))
  state = simulated(num, given, knows)
  tokens = np.asarray(state.tokens)
  assert np.all(tokens[:, 1] == 1)
  conditional = LAW[:, 1] / LAW[:, 1].sum()
  targets.check_law(tokens[:, [0, 2]], conditional)
  blind = np.asarray(simulated(num, given).tokens)
  counts = np.zeros((V, V))
  np.add.at(counts, (blind[:, 0], blind[:, 2]), 1)
  assert targets.total_variation(counts, conditional) > targets.noise_floor(conditional, num)


def test_nothing_to_fill_in_is_left_as_it_is():
  state = simulated(4, jnp.array([0, 1, 2]))
  np.testing.assert_array_equal(state.tokens, np.tile([0, 1, 2], (4, 1)))
  assert np.all(np.asarray(state.step) == 1)


@pytest.mark.parametrize(
  "make, match",
  [
    (lambda: uniform_state.gillespie(predict, NOISE, first=0.5, last=0.2), "first=0.5, last=0.2"),
    (lambda: uniform_state.gillespie(predict, NOISE, last=1 - 1e-9), "last=0.999999999"),
    (lambda: uniform_state.gillespie(predict, noises.masking(SCHEDULE, V)), "noises.uniform"),
    (lambda: uniform_state.gibbs(predict, noises.masking(SCHEDULE, V)), "noises.uniform"),
    (
      lambda: uniform_state.forward_backward(predict, NOISE, jumps.euler_law(NOISE), 0.0),
      "ahead=0.0",
    ),
    (lambda: jumps.euler(predict, NOISE, np.array([0.0, 1.0])), "not to rise"),
  ],
)
def test_bad_input_is_refused(make, match):
  with pytest.raises(ValueError, match=match):
    make()
