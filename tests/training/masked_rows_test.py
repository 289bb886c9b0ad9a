"""Masked diffusion's held-out bound, its memory, and the rows that it learns from."""

import functools

import jax
import jax.numpy as jnp
import masked_cases as cases
import numpy as np
import pytest

import targets
from ancestral.tasks import arithmetic
from ancestral.training import cost, data, masked

V, L = cases.V, cases.L


def test_chunks_and_held_out_draws():
  batch = cases.batch(6)

  def losses(chunk):
    loss_fn = masked.masked_diffusion(cases.MODEL, masked.by_count(), mask=V, chunk=chunk)
    return jax.jit(lambda params: loss_fn(None, params, batch)[0][0])(cases.TABLE)

  for chunk in (1, 3, 256):  # of draws that are the same every time
    np.testing.assert_allclose(losses(chunk), losses(256), rtol=1e-6)


def _sizes(jaxpr):
  for equation in jaxpr.eqns:
    yield from (variable.aval.size for variable in equation.outvars)
    for inner in cost.jaxprs(equation.params.values()):
      yield from _sizes(inner)


def test_all_logits_are_never_made():
  model, params = targets.tiny_target(vocab_size=400, causal=False)
  batch = {"tokens": jnp.zeros((2, 32), jnp.int32), "mask": jnp.ones((2, 32))}

  def largest(chunk):
    loss_fn = masked.masked_diffusion(model, masked.by_count(), mask=399, chunk=chunk)
    slope = jax.grad(lambda params: loss_fn(jax.random.key(0), params, batch)[0][0].sum())
    return max(_sizes(jax.make_jaxpr(slope)(params).jaxpr))

  assert largest(8) < 2 * 32 * 399 <= largest(32)


def test_packed_documents_do_not_see_one_another():
  model, params = targets.tiny_target(vocab_size=V + 1, causal=False, num_layers=1)
  loss_fn = masked.masked_diffusion(
    model, lambda key, learned: masked.Masked(learned, *jnp.ones((2, len(learned)))), mask=V
  )
  one = {"tokens": jnp.array([[2, 1, 0]]), "mask": jnp.array([[0, 1, 1]])}
  two = {"tokens": jnp.array([[1, 1]]), "mask": jnp.array([[0, 1]])}
  both = {name: jnp.concatenate([one[name], two[name]], axis=1) for name in one}
  both |= {"segments": jnp.array([[1, 1, 1, 2, 2]]), "positions": jnp.array([[0, 1, 2, 0, 1]])}
  run = jax.jit(lambda batch: loss_fn(jax.random.key(0), params, batch)[0][0])
  apart, together = run(one) + run(two), run(both)
  np.testing.assert_allclose(together, apart, rtol=1e-5)


def test_a_model_without_a_mask_is_named():
  loss_fn = masked.masked_diffusion(cases.MODEL, masked.by_count(), mask=V - 1)
  with pytest.raises(ValueError, match="mask=2 has to be the last of 4"):
    loss_fn(jax.random.key(0), cases.TABLE, cases.batch(2))


@pytest.mark.parametrize("learned", [cases.ALL, cases.PART], ids=["all", "prompt"])
def test_the_bound_is_unbiased_and_varies_less(learned):
  most, num = int(learned.sum()), 4000
  rows = cases.batch(num, learned)
  estimate = jax.jit(
    functools.partial(masked.bound, cases.PREDICT, cases.SCHEDULES["linear"], mask=V),
    static_argnames="num_times",
  )
  expected = float(cases.enumerated(cases.TABLE, learned))
  once, often = (
    estimate(jax.random.key(i), rows["tokens"], rows["mask"], num_times=n)
    for i, n in ((0, 1), (1, most))
  )
  cases.near(once, expected)
  cases.near(often, expected)
  assert often.var() < once.var() / most  # numbers of masks are spread evenly
  fixed = [estimate(None, rows["tokens"], rows["mask"], num_times=2) for _ in range(2)]
  np.testing.assert_array_equal(*fixed)
  cases.near(fixed[0], expected)


@pytest.mark.parametrize("name", ["square", "geometric"])
def test_the_bound_of_a_predictor_that_looks_at_the_time(name):
  schedule, rows = cases.SCHEDULES[name], cases.batch(20_000)
  estimates = jax.jit(
    functools.partial(masked.bound, cases.told(cases.TABLE), schedule, mask=V, num_times=1)
  )(jax.random.key(6), rows["tokens"], rows["mask"])
  nodes, weights = cases.quadrature()
  sets = cases.subsets(cases.ALL)
  noise = 1 - np.asarray(schedule.alpha(jnp.asarray(nodes, jnp.float32)), np.float64)
  rate = np.asarray(schedule.rate(nodes), np.float64)
  size, cases.costs = sets.sum(axis=1), jax.jit(cases.costs)
  total = 0.0
  for t, w, n, r in zip(nodes, weights, noise, rate, strict=True):
    chance = n**size * (1 - n) ** (L - size)
    total += w * r * np.sum(chance * cases.costs(cases.TABLE, sets, jnp.full(len(sets), t)))
  cases.near(estimates, total)
  assert (
    abs(total - float(cases.enumerated(cases.TABLE, cases.ALL))) > 0.05
  )  # the time does matter here


def test_a_bound_without_anything_to_learn_is_zero():
  rows = cases.batch(2, np.zeros(L))
  found = masked.bound(
    cases.PREDICT, cases.SCHEDULES["linear"], None, *rows.values(), mask=V, num_times=3
  )
  np.testing.assert_array_equal(found, 0)


def test_rows_hold_their_own_tokens():
  task = arithmetic.addition(levels=(1,))
  source = data.task_source(task, 0)
  code = task.tokenizer
  for learned in (False, True):
    rows = masked.pad(10, code.pad, learned=learned)
    made = next(data.batches(source, rows, batch_size=3, shuffle=False))
    for b in range(3):
      example = source[b]
      length = len(example["tokens"])
      np.testing.assert_array_equal(made["tokens"][b, :length], example["tokens"])
      np.testing.assert_array_equal(made["tokens"][b, length:], code.pad)
      np.testing.assert_array_equal(made["mask"][b, :length], example["mask"])
      np.testing.assert_array_equal(made["mask"][b, length:], learned)
      assert made["mask"].dtype == np.float32 and made["tokens"].dtype == np.int32
  with pytest.raises(ValueError, match="example 0 needs a row of"):
    next(data.batches(source, masked.pad(3, 0, learned=True), batch_size=1, shuffle=False))


def test_full_rows_hold_each_token_once():
  texts = ("abcab", "ccba", "bacbacba")
  code = {"a": 3, "b": 4, "c": 5}
  examples = [
    {
      "tokens": np.array([1, *map(code.get, text), 2], np.int32),
      "mask": np.array([False] + [True] * (len(text) + 1)),
      "index": i,
    }
    for i, text in enumerate(texts)
  ]
  source = data.Source(len(texts), examples.__getitem__)
  rows = masked.unshifted(data.concatenate(5, 0))
  made = list(data.batches(source, rows, batch_size=1, shuffle=False, epochs=1))
  tokens = np.concatenate([row["tokens"][0] for row in made])
  kept = np.concatenate([row["mask"][0] for row in made]) > 0
  expected = [token for text in texts for token in (*map(code.get, text), 2)]
  np.testing.assert_array_equal(tokens[kept], expected)
  assert set(made[0]) == {"tokens", "mask", "segments", "positions"}
