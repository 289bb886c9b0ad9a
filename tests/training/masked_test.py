"""Masked diffusion's losses: their expectations, enumerated, and what they never touch."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import masked_cases as cases
import numpy as np
import pytest

import targets
from ancestral.evaluation import any_order
from ancestral.training import masked, weightings

V, L = cases.V, cases.L

MASKINGS = {
  "linear": functools.partial(masked.by_time, cases.SCHEDULES["linear"]),
  "cosine": functools.partial(masked.by_time, cases.SCHEDULES["cosine"]),
  "count": masked.by_count,
  "step": functools.partial(masked.by_step, cases.SCHEDULES["cosine"], jnp.linspace(1, 0, 4)),
}


def _step_bound(schedule, times, learned):
  """D3PM's: sum over steps of E KL(q(x_s | x_t, x_0) || p(x_s | x_t)), pattern by pattern."""
  places, total, predict = np.flatnonzero(learned), 0.0, jax.jit(cases.PREDICT)
  kept = np.asarray(schedule.alpha(jnp.asarray(times)), np.float64)
  masks = cases.subsets(learned)
  laws = jax.nn.log_softmax(predict(jnp.where(masks, V, cases.ROW[None]), 0.0), axis=-1)
  log_p = {tuple(np.flatnonzero(s)): law for s, law in zip(masks, np.asarray(laws), strict=True)}
  row = np.asarray(cases.ROW)
  for here, there in itertools.pairwise(kept):
    stay = (1 - there) / (1 - here)
    for s in masks:
      hidden = tuple(np.flatnonzero(s))
      chance = (1 - here) ** len(hidden) * here ** (len(places) - len(hidden))
      for shown in itertools.product((False, True), repeat=len(hidden)):
        truth = math.prod(1 - stay if show else stay for show in shown)
        if truth > 0:
          model = math.prod(
            (1 - stay) * math.exp(log_p[hidden][i, row[i]]) if show else stay
            for i, show in zip(hidden, shown, strict=True)
          )
          total += chance * truth * math.log(truth / model)
  return total


def test_the_enumerated_bound_is_that_of_all_orders():
  expected = -any_order.elbo(cases.PREDICT, cases.ROW[None], mask=V)[0]
  np.testing.assert_allclose(cases.enumerated(cases.TABLE, cases.ALL), expected, rtol=1e-6)


@pytest.mark.parametrize("learned", [cases.ALL, cases.PART], ids=["all", "prompt"])
@pytest.mark.parametrize("name", cases.SCHEDULES)
def test_the_integral_over_times_is_the_enumerated_bound(name, learned):
  """Value and gradient, with the times that are given and all sets of masks."""
  nodes, weights = cases.quadrature()
  sets = cases.subsets(learned)
  schedule = cases.SCHEDULES[name]
  masking = masked.by_time(schedule, quantiles=lambda key, num: jnp.asarray(nodes, jnp.float32))
  rows = jnp.broadcast_to(jnp.asarray(learned)[None], (len(nodes), L))
  drawn = masking(jax.random.key(0), rows)
  np.testing.assert_allclose(drawn.t, nodes, rtol=1e-6)
  noise = 1 - np.asarray(schedule.alpha(drawn.t), np.float64)
  size, most = sets.sum(axis=1), int(learned.sum())
  chance = noise[:, None] ** size * (1 - noise[:, None]) ** (most - size)
  share = np.sum((weights * np.asarray(drawn.weight, np.float64))[:, None] * chance, axis=0)
  # The weight of each set of masks, which holds for every predictor, and so its gradient.
  np.testing.assert_allclose(share, [1 / (m * math.comb(most, m)) for m in size], rtol=2e-4)
  estimate = lambda params: jnp.sum(jnp.asarray(share, jnp.float32) * cases.costs(params, sets))
  values = [
    jax.value_and_grad(f)(cases.TABLE) for f in (estimate, lambda p: cases.enumerated(p, learned))
  ]
  np.testing.assert_allclose(values[0][0], values[1][0], rtol=1e-4)
  np.testing.assert_allclose(values[0][1], values[1][1], atol=1e-4)


@pytest.mark.parametrize("learned", [cases.ALL, cases.PART], ids=["all", "prompt"])
def test_numbers_of_masks_give_the_enumerated_bound(learned):
  most = int(learned.sum())
  places = (jnp.arange(most) + 0.5) / most
  masking = masked.by_count(quantiles=lambda key, num: places)
  rows = jnp.broadcast_to(jnp.asarray(learned)[None], (most, L))
  drawn = masking(jax.random.key(0), rows)
  np.testing.assert_array_equal(drawn.masked.sum(axis=1), np.arange(1, most + 1))
  np.testing.assert_allclose(drawn.weight, most / np.arange(1, most + 1))
  sets = cases.subsets(learned)
  size = sets.sum(axis=1)
  share = [float(drawn.weight[m - 1]) / most / math.comb(most, m) for m in size]
  total = jnp.sum(jnp.asarray(share) * cases.costs(cases.TABLE, sets))
  np.testing.assert_allclose(total, cases.enumerated(cases.TABLE, learned), rtol=1e-6)


def test_any_set_of_n_masks_is_alike_likely_and_comes_at_its_time():
  num, count = 20_000, 2
  schedule = cases.SCHEDULES["square"]
  masking = masked.by_count(schedule, quantiles=lambda key, num: jnp.full(num, 0.4))
  drawn = masking(jax.random.key(1), jnp.ones((num, L), bool))
  patterns = np.asarray(drawn.masked) @ 2 ** np.arange(L)
  counts = np.bincount(patterns, minlength=2**L)
  chosen = np.array([bin(n).count("1") == count for n in range(2**L)])
  assert counts[~chosen].sum() == 0
  p = 1 / math.comb(L, count)
  assert np.all(np.abs(counts[chosen] / num - p) <= 4 * math.sqrt(p * (1 - p) / num))
  # 1 - alpha is Beta(n, N - n + 1)
  noise = 1 - np.asarray(schedule.alpha(drawn.t), np.float64)
  cases.near(noise, count / (L + 1))
  cases.near(noise**2, count * (count + 1) / ((L + 1) * (L + 2)))


@pytest.mark.parametrize("name", ["time", "step"])
def test_each_token_is_masked_apart_from_the_others(name):
  num, schedule = 20_000, cases.SCHEDULES["cosine"]
  times, at = jnp.array([1.0, 0.6, 0.3, 0.0]), lambda key, num: jnp.full(num, 0.4)
  make = {
    "time": lambda: masked.by_time(schedule, quantiles=at),
    "step": lambda: masked.by_step(schedule, times, quantiles=at),
  }
  learned = jnp.broadcast_to(jnp.asarray(cases.PART)[None], (num, L))
  drawn = make[name]()(jax.random.key(2), learned)
  t = {"time": 0.4, "step": 0.6}[name]  # of three steps, 0.4 is in the second
  np.testing.assert_allclose(drawn.t, t)
  noise = math.sin(math.pi / 2 * t)
  counts = np.bincount(np.asarray(drawn.masked) @ 2 ** np.arange(L), minlength=2**L)
  for n in range(2**L):
    size = bin(n).count("1")
    p = 0.0 if n & 1 else noise**size * (1 - noise) ** (3 - size)
    assert abs(counts[n] / num - p) <= 4 * math.sqrt(p * (1 - p) / num)


def test_steps_give_the_bound_of_their_chain():
  """The weights give D3PM's sum of divergences, which falls to the continuous bound."""
  schedule, bounds = cases.SCHEDULES["linear"], []
  for num_steps in (2, 3, 128, 512):
    times = jnp.linspace(1, 0, num_steps + 1)
    places = (jnp.arange(num_steps) + 0.5) / num_steps
    masking = masked.by_step(schedule, times, quantiles=lambda key, num, p=places: p)
    drawn = masking(jax.random.key(0), jnp.ones((num_steps, L), bool))
    np.testing.assert_allclose(drawn.t, times[:-1])
    noise = 1 - np.asarray(schedule.alpha(drawn.t), np.float64)
    sets = cases.subsets(cases.ALL)
    size = sets.sum(axis=1)
    chance = noise[:, None] ** size * (1 - noise[:, None]) ** (L - size)
    share = np.mean(np.asarray(drawn.weight)[:, None] * chance, axis=0)
    bounds.append(float(np.sum(share * np.asarray(cases.costs(cases.TABLE, sets)))))
    if num_steps <= 3:
      expected = _step_bound(schedule, np.asarray(times), cases.ALL)
      np.testing.assert_allclose(bounds[-1], expected, rtol=1e-5)
  limit = float(cases.enumerated(cases.TABLE, cases.ALL))
  gaps = np.array(bounds) - limit
  np.testing.assert_allclose(gaps[-1] / gaps[-2], 1 / 4, rtol=0.05)  # first order


@pytest.mark.parametrize("learned", [cases.ALL, cases.PART], ids=["all", "prompt"])
@pytest.mark.parametrize("name", MASKINGS)
def test_the_loss_and_its_gradient_have_that_expectation(name, learned):
  masking = MASKINGS[name](quantiles=weightings.independent)
  loss_fn = masked.masked_diffusion(cases.MODEL, masking, mask=V, chunk=3)
  batch = cases.batch(20_000, learned)
  direction = jnp.asarray(np.random.default_rng(1).normal(size=cases.TABLE.shape), jnp.float32)

  @jax.jit
  def sampled(params):
    losses = lambda params: loss_fn(jax.random.key(3), params, batch)[0]
    return jax.jvp(losses, (params,), (direction,))

  (losses, weight), (slopes, _) = sampled(cases.TABLE)
  np.testing.assert_array_equal(weight, learned.sum())
  if name == "step":
    expected = _step_bound(cases.SCHEDULES["cosine"], np.linspace(1, 0, 4), learned)
    cases.near(losses, expected)
  else:
    expected, slope = jax.jvp(lambda p: cases.enumerated(p, learned), (cases.TABLE,), (direction,))
    cases.near(losses, float(expected))
    cases.near(slopes, float(slope))


@pytest.mark.parametrize("name", MASKINGS)
def test_the_weighted_accuracy_is_that_of_a_token_at_its_turn(name):
  masking = MASKINGS[name](quantiles=weightings.independent)
  sure = 50 * jax.nn.one_hot(cases.ROW, V + 1)[None] * jnp.ones_like(cases.TABLE)
  right = sure.at[:, 1:3].multiply(-1)  # two of four are never predicted
  _, metrics = jax.jit(masked.masked_diffusion(cases.MODEL, masking, mask=V))(
    jax.random.key(4), right, cases.batch(20_000)
  )
  cases.near(metrics["accuracy"], 2.0)


@pytest.mark.parametrize("name", MASKINGS)
def test_a_prompt_is_never_masked_and_has_no_loss(name):
  loss_fn = masked.masked_diffusion(cases.MODEL, MASKINGS[name](), mask=V)
  total = lambda params: loss_fn(jax.random.key(5), params, cases.batch(64, cases.PART))[0][0].sum()
  slope = np.asarray(jax.grad(total)(cases.TABLE))
  assert np.abs(slope).max() > 0 and np.abs(slope[:, 0]).max() == 0
  first = np.arange(len(slope)) % (V + 1)
  assert (
    np.abs(slope[first != int(cases.ROW[0])]).max() == 0
  )  # no other first token was seen, nor a mask


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_share_of_rows_learns_without_the_prompt(share):
  masking = masked.by_count(quantiles=weightings.independent)
  loss_fn = masked.masked_diffusion(cases.MODEL, masking, mask=V, unconditional=share)
  losses, _ = jax.jit(loss_fn)(jax.random.key(6), cases.TABLE, cases.batch(20_000, cases.PART))[0]
  pattern = np.arange(len(cases.TABLE))
  blind = cases.TABLE[pattern - pattern % (V + 1) + V]  # takes the first token for masked
  seeing, not_seeing = (float(cases.enumerated(t, cases.PART)) for t in (cases.TABLE, blind))
  assert abs(seeing - not_seeing) > 0.1
  cases.near(losses, (1 - share) * seeing + share * not_seeing)


@pytest.mark.parametrize("name", ["linear", "count"])
def test_a_row_with_nothing_to_learn_is_nothing(name):
  model, params = targets.tiny_target(vocab_size=V + 1, causal=False, num_layers=1)
  batch = cases.batch(2)
  batch["mask"] = batch["mask"].at[1].set(0)
  loss_fn = masked.masked_diffusion(model, MASKINGS[name](), mask=V)

  @jax.jit
  def run(params):
    of = lambda params: loss_fn(jax.random.key(0), params, batch)
    last = lambda params: (of(params)[0][0][1], of(params))
    return jax.value_and_grad(last, has_aux=True)(params)

  (_, ((losses, weight), metrics)), slope = run(params)
  assert losses[1] == weight[1] == metrics["accuracy"][1] == 0
  assert losses[0] > 0 and weight[0] == L
  assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(slope))


def test_rows_of_a_batch_share_out_the_numbers_of_masks():
  masking = masked.by_count()
  drawn = masking(jax.random.key(0), jnp.ones((12 * L, L), bool))
  counts = np.bincount(np.asarray(drawn.masked.sum(axis=1)), minlength=L + 1)
  np.testing.assert_array_equal(counts[1:], 12)
