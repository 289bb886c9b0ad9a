"""Rules of which positions are written, against brute force over laws of one row."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.models import mask_schedules, toy
from ancestral.sampling import base, masked, unmasking

V, L = 4, 6
RNG = np.random.default_rng(3)
LAWS = RNG.dirichlet(np.full(V, 0.5), size=L)
MASKED = np.array([True, True, False, True, True, True])


def view(laws=LAWS, masks=MASKED, step=0):
  return masked.View(
    jnp.log(jnp.asarray(laws, jnp.float32)),
    jnp.zeros(len(laws), jnp.int32),
    jnp.asarray(masks),
    jnp.int32(step),
  )


def chosen(rule, seen=None):
  """The masked positions that a rule takes."""
  seen = view() if seen is None else seen
  return set(np.flatnonzero(np.asarray(rule(jax.random.key(0), seen)) & np.asarray(seen.masked)))


def entropy(law):
  return targets.entropy(law)


NUMPY_SCORES = {
  unmasking.max_probability: lambda law: law.max(),
  unmasking.margin: lambda law: np.sort(law)[-1] - np.sort(law)[-2],
  unmasking.negative_entropy: lambda law: -entropy(law),
  unmasking.sampled_probability: lambda law: law[0],
}


@pytest.mark.parametrize("score", NUMPY_SCORES, ids=lambda score: score.__name__)
def test_top_takes_the_best_masked_positions(score):
  values = {i: NUMPY_SCORES[score](LAWS[i]) for i in np.flatnonzero(MASKED)}
  best = sorted(values, key=lambda i: -values[i])
  for num in range(1, 6):
    assert chosen(unmasking.top(score, num)) == set(best[:num])
  assert chosen(unmasking.top(score, 0)) == set(best[:1])
  assert chosen(unmasking.top(score, 99)) == set(best)


def test_random_order_takes_each_masked_position_alike():
  rule = unmasking.top(unmasking.random_order, 1)
  taken = jax.vmap(rule, in_axes=(0, None))(jax.random.split(jax.random.key(0), 20_000), view())
  share = (np.asarray(taken) & MASKED).mean(axis=0)
  np.testing.assert_allclose(share, MASKED / MASKED.sum(), atol=4 * 0.4 / 20_000**0.5)


def test_threshold_takes_all_above_and_at_least_one():
  score = unmasking.max_probability
  above = {i for i in np.flatnonzero(MASKED) if LAWS[i].max() >= 0.55}
  assert above
  assert chosen(unmasking.threshold(score, 0.55)) == above
  assert chosen(unmasking.threshold(score, 2.0)) == chosen(unmasking.top(score, 1))


@pytest.mark.parametrize("bound", [0.0, 0.3, 0.6, 1.0, 2.0, 10.0])
def test_entropy_bound_takes_the_longest_prefix(bound):
  order = sorted(np.flatnonzero(MASKED), key=lambda i: entropy(LAWS[i]))
  fits = []
  for k in range(1, len(order) + 1):
    taken = [entropy(LAWS[i]) for i in order[:k]]
    if sum(taken) - max(taken) <= bound:
      fits.append(k)
  assert chosen(unmasking.entropy_bound(bound)) == set(order[: max(fits)])


def test_entropy_bound_below_zero_is_refused():
  with pytest.raises(ValueError, match="at least 0"):
    unmasking.entropy_bound(-1.0)


def test_entropy_bound_writes_all_that_is_certain():
  laws = LAWS.copy()
  laws[[0, 3, 5]] = np.eye(V)[[1, 2, 0]]
  assert {0, 3, 5} <= chosen(unmasking.entropy_bound(0.0), view(laws))


@pytest.mark.parametrize("most", [0.2, 0.5, 1.0, 2.0, 5.0])
def test_factor_takes_the_largest_number_that_fits(most):
  order = sorted(np.flatnonzero(MASKED), key=lambda i: -LAWS[i].max())
  fits = [n for n in range(1, 6) if (n + 1) * (1 - LAWS[order[n - 1]].max()) < most]
  assert chosen(unmasking.factor(most)) == set(order[: max(fits, default=1)])


def test_factor_of_one_keeps_the_likeliest_sequence():
  """Its theorem: where (n + 1) (1 - p) <= 1, the joint's mode is the product of the modes."""
  rng = np.random.default_rng(0)
  tried = 0
  for _ in range(300):
    joint = rng.dirichlet(np.full(9, 0.15)).reshape(3, 3)
    laws = np.stack([joint.sum(axis=1), joint.sum(axis=0)])
    if len(chosen(unmasking.factor(1.0), view(laws, np.array([True, True])))) == 2:
      tried += 1
      mode = np.unravel_index(joint.argmax(), joint.shape)
      assert mode == tuple(laws.argmax(axis=1))
  assert tried > 20


def test_semi_autoregressive_stays_in_the_leftmost_unfinished_block():
  score = unmasking.max_probability
  for masks in itertools.product([True, False], repeat=L):
    masks = np.array(masks)
    if not masks.any():
      continue
    for length in (1, 2, 4):
      got = chosen(unmasking.semi_autoregressive(unmasking.top(score), length), view(masks=masks))
      first = np.flatnonzero(masks)[0] // length
      within = [i for i in np.flatnonzero(masks) if i // length == first]
      assert got == {max(within, key=lambda i: LAWS[i].max())}
  one = unmasking.semi_autoregressive(unmasking.top(unmasking.random_order, 9), 1)
  assert chosen(one) == chosen(unmasking.top(unmasking.left_to_right))


def test_a_block_of_no_length_is_refused():
  with pytest.raises(ValueError, match="block_length=0"):
    unmasking.semi_autoregressive(unmasking.top(unmasking.margin), 0)


@pytest.mark.parametrize("length, num_steps", [(10, 5), (3000, 100), (6000, 3), (6000, 250)])
def test_expected_number_is_the_same_in_every_linear_step(length, num_steps):
  number = unmasking.expected_number(mask_schedules.linear(), jnp.linspace(1, 0, num_steps + 1))
  each = length // num_steps
  for step in range(num_steps):
    left = np.arange(length) < length - step * each
    assert int(number(view(np.full((length, V), 1 / V), left, step))) == each


def test_expected_number_follows_the_schedule():
  """Of 10 masks in 5 steps by the cosine schedule: few at first."""
  times = jnp.linspace(1, 0, 6)
  number = unmasking.expected_number(mask_schedules.cosine(), times)
  left, taken = 10, []
  for step in range(5):
    seen = view(np.full((10, V), 1 / V), np.arange(10) < left, step)
    taken.append(int(number(seen)))
    left -= taken[-1]
  assert left == 0 and taken[0] == 1 and taken[-1] >= 2


def test_parallel_rules_trade_calls_for_the_law():
  """Fewer calls, further from the law: on a chain, with exact conditionals."""
  transition = np.random.default_rng(1).dirichlet(np.full(3, 0.5), size=3)
  joint = toy.markov_law(transition, 0, 4)
  predict = toy.joint_predictor(jnp.asarray(joint, jnp.float32))
  tokens, distances = jnp.full((20_000, 4), 3, jnp.int32), []
  for num in (1, 2, 4):

    @jax.jit
    def run(keys, num=num):
      rule = unmasking.top(unmasking.random_order, num)
      algorithm = masked.unmask(predict, rule, mask=3)
      state = base.start(keys, algorithm, tokens)
      return base.run(keys, algorithm, state, 4)[0]

    state = run(targets.keys_of(np.arange(20_000)))
    np.testing.assert_array_equal(state.calls, 4 // num)
    counts = np.zeros(joint.shape)
    np.add.at(counts, tuple(np.asarray(state.tokens).T), 1)
    distances.append(targets.total_variation(counts, joint))
  assert distances[0] <= targets.noise_floor(joint, 20_000)
  assert distances[0] < distances[1] < distances[2]
