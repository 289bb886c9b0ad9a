"""Masked samplers: their laws on enumerable targets, their calls, and infilling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.evaluation import unmasking_laws
from ancestral.models import mask_schedules, toy
from ancestral.models import masked as masked_models
from ancestral.sampling import (
  base,
  feedback,
  history,
  logits,
  masked,
  remasking,
  truncation,
  unmasking,
)

V, L, DRAWS = 3, 4, 20_000
JOINT = np.random.default_rng(0).dirichlet(np.full(V**L, 0.4)).reshape((V,) * L)
PREDICT = toy.joint_predictor(jnp.asarray(JOINT, jnp.float32))
LINEAR = mask_schedules.linear()
SCHEDULES = {
  "linear": LINEAR,
  "polynomial": mask_schedules.polynomial(2.0),
  "cosine": mask_schedules.cosine(),
  "geometric": mask_schedules.geometric(),
}


def blank(num=DRAWS, length=L):
  return jnp.full((num, length), V, jnp.int32)


def draw(algorithm, tokens=None, num_steps=None):
  """(the last state, what each step told) of DRAWS rows; algorithm is made inside jit."""
  tokens = blank() if tokens is None else tokens

  @jax.jit
  def run(keys, tokens):
    made = algorithm()
    state = base.start(keys, made, tokens)
    steps = tokens.shape[1] if num_steps is None else num_steps
    return base.run(keys, made, state, steps, lambda state, info: info)

  return run(targets.keys_of(np.arange(len(tokens))), tokens)


def unmasked_one_by_one(score, **kwargs):
  return draw(lambda: masked.unmask(PREDICT, unmasking.top(score), mask=V, **kwargs))


@pytest.mark.parametrize("name", SCHEDULES)
def test_first_hitting_draws_the_law_in_as_many_calls_as_tokens(name):
  state, _ = draw(lambda: masked.first_hitting(PREDICT, SCHEDULES[name], mask=V))
  targets.check_law(state.tokens, JOINT)
  np.testing.assert_array_equal(state.calls, L)


def test_first_hitting_times_are_order_statistics():
  """The k-th unmasking of L comes at the k-th largest of L uniform values of 1 - alpha."""

  @jax.jit
  def noises(keys):
    algorithm = masked.first_hitting(PREDICT, LINEAR, mask=V)
    state = base.start(keys, algorithm, blank())
    return base.run(keys, algorithm, state, L, lambda state, info: state.noise)[1]

  seen = np.asarray(noises(targets.keys_of(np.arange(DRAWS))))  # [L, B]
  k = np.arange(1, L + 1)
  mean, deviation = (L + 1 - k) / (L + 1), np.sqrt(k * (L + 1 - k) / ((L + 1) ** 2 * (L + 2)))
  assert np.all(np.abs(seen.mean(axis=1) - mean) < 4 * deviation / DRAWS**0.5)
  np.testing.assert_allclose(seen.std(axis=1), deviation, rtol=0.03)


def test_the_predictor_is_asked_at_the_time_of_the_token():
  """A predictor that depends on time: at one token, p(v) is its mean over the hitting time."""

  def predict(tokens, t):
    rise = jnp.broadcast_to(t, tokens.shape[:1])[:, None, None] * jnp.array([[[2.0, 0.0, -1.0]]])
    return jnp.broadcast_to(rise, (*tokens.shape, V))

  for schedule in SCHEDULES.values():
    state, _ = draw(lambda s=schedule: masked.first_hitting(predict, s, mask=V), blank(length=1))
    noise = (np.arange(4000) + 0.5) / 4000  # 1 - alpha at the time is uniform
    times = np.asarray(schedule.time(jnp.asarray(1 - noise, jnp.float32)))
    law = targets.softmax(times[:, None] * np.array([2.0, 0.0, -1.0])).mean(axis=0)
    targets.check_law(state.tokens, law)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_steps", [1, 3])
def test_ancestral_draws_its_own_exact_law(name, num_steps):
  schedule, times = SCHEDULES[name], jnp.linspace(1, 0, num_steps + 1)
  state, _ = draw(lambda: masked.ancestral(PREDICT, schedule, times, mask=V), num_steps=num_steps)
  alpha = np.asarray(schedule.alpha(times), np.float64)
  probs = np.append(((alpha[1:] - alpha[:-1]) / (1 - alpha[:-1]))[:-1], 1.0)
  law = unmasking_laws.ancestral_law(JOINT, probs)
  targets.check_law(state.tokens, law)
  # and that is not the data's law: the check above can tell
  assert targets.total_variation(law, JOINT) > 2 * targets.noise_floor(law, DRAWS)


def test_ancestral_tends_to_the_law():
  distances = []
  for num_steps in (1, 2, 4, 8, 16, 32, 64):
    probs = 1 / np.arange(num_steps, 0, -1)
    law = unmasking_laws.ancestral_law(JOINT, probs)
    distances.append(targets.total_variation(law, JOINT))
  halved = np.array(distances[3:-1]) / np.array(distances[4:])
  np.testing.assert_allclose(halved, 2, atol=0.25)  # an error of first order


def test_ancestral_calls_the_network_when_something_is_unmasked():
  """T (1 - (1 - 1/T)^L) of T steps on average, and none of the others."""
  num_steps, called = 16, []

  def predict(tokens, t):
    jax.debug.callback(lambda t: called.append(t), t)
    return PREDICT(tokens, t)

  times = jnp.linspace(1, 0, num_steps + 1)
  alone, info = draw(lambda: masked.ancestral(predict, LINEAR, times, mask=V), blank(1), num_steps)
  jax.effects_barrier()
  assert len(called) == int(alone.calls[0]) == int(np.sum(np.any(info.written, axis=(1, 2))))
  state, _ = draw(lambda: masked.ancestral(PREDICT, LINEAR, times, mask=V), None, num_steps)
  mean = num_steps * (1 - (1 - 1 / num_steps) ** L)
  assert abs(np.mean(state.calls) - mean) < 4 * np.std(state.calls) / DRAWS**0.5


POSITION_FIRST = [
  unmasking.random_order,
  unmasking.left_to_right,
  unmasking.max_probability,
  unmasking.margin,
  unmasking.negative_entropy,
]


@pytest.mark.parametrize("score", POSITION_FIRST, ids=lambda score: score.__name__)
def test_position_first_is_exact_whatever_the_order(score):
  state, _ = unmasked_one_by_one(score)
  targets.check_law(state.tokens, JOINT)


def test_ranking_by_the_sampled_token_is_biased_and_its_law_is_this():
  """Two positions: the pair is drawn, and the likelier of the two tokens is kept."""
  joint = np.array([[0.5, 0.1], [0.1, 0.3]])
  predict = toy.joint_predictor(jnp.asarray(joint, jnp.float32))
  algorithm = lambda: masked.unmask(predict, unmasking.top(unmasking.sampled_probability), mask=2)
  state, _ = draw(algorithm, jnp.full((DRAWS, 2), 2, jnp.int32))
  first, second = joint.sum(axis=1), joint.sum(axis=0)
  law = np.zeros((2, 2))
  for a in range(2):
    for b in range(2):
      pair = first[a] * second[b]
      if first[a] >= second[b]:  # the left one stays, the other is drawn anew
        law[a] += pair * joint[a] / first[a]
      else:
        law[:, b] += pair * joint[:, b] / second[b]
  targets.check_law(state.tokens, law)
  assert targets.total_variation(law, joint) > 0.1


def test_log_prob_adds_up_to_that_of_the_sequence():
  """With exact conditionals, in any order."""
  for score in (unmasking.random_order, unmasking.margin):
    state, info = unmasked_one_by_one(score)
    total = np.asarray(info.log_prob).sum(axis=(0, 2))
    np.testing.assert_allclose(total, np.log(JOINT[tuple(np.asarray(state.tokens).T)]), atol=2e-4)


INFILLING = [
  lambda: masked.first_hitting(PREDICT, LINEAR, mask=V),
  lambda: masked.unmask(PREDICT, unmasking.top(unmasking.margin), mask=V),
  lambda: masked.ancestral(PREDICT, LINEAR, jnp.linspace(1, 0, 129), mask=V),
]


@pytest.mark.parametrize("algorithm", INFILLING)
def test_infilling_draws_the_conditional_and_keeps_what_is_given(algorithm):
  given = np.array([V, 1, V, 2])
  num_steps, num = (128, 5_000) if algorithm is INFILLING[2] else (None, DRAWS)
  tokens = jnp.asarray(np.tile(given, (num, 1)), jnp.int32)
  state, _ = draw(algorithm, tokens, num_steps)
  out = np.asarray(state.tokens)
  assert np.all(out[:, [1, 3]] == given[[1, 3]])
  law = JOINT[:, 1, :, 2] / JOINT[:, 1, :, 2].sum()
  targets.check_law(out[:, [0, 2]], law)


def test_nothing_to_write_needs_no_call():
  full = jnp.zeros((2, L), jnp.int32)
  for algorithm in INFILLING:
    state, info = draw(algorithm, full, 4)
    np.testing.assert_array_equal(state.tokens, full)
    assert not np.any(state.calls) and not np.any(info.written)


def test_transforms_apply_to_each_position():
  """top_k(1) leaves one token at every position: the sequence does not depend on keys."""
  greedy = logits.chain(logits.temperature(0.7), truncation.top_k(1))
  state, info = unmasked_one_by_one(unmasking.left_to_right, transform=greedy)
  expected, joint = [], JOINT
  for _ in range(L):
    expected.append(int(np.argmax(joint.reshape(V, -1).sum(axis=1))))
    joint = joint[expected[-1]]
  np.testing.assert_array_equal(state.tokens, np.tile(expected, (DRAWS, 1)))
  np.testing.assert_allclose(info.log_prob, 0, atol=1e-6)


@pytest.mark.parametrize(
  "transform, narrow, wide",
  [(logits.temperature, 0.0, 1.0), (truncation.top_k, 1, V), (truncation.top_p, 1e-6, 1.0)],
  ids=["temperature", "top_k", "top_p"],
)
def test_parameters_of_rows_differ(transform, narrow, wide):
  """Rows of the likeliest token and of the whole law in one batch."""
  of_rows = jnp.where(jnp.arange(DRAWS) % 2, wide, narrow)
  state, _ = unmasked_one_by_one(unmasking.left_to_right, transform=transform(of_rows))
  tokens = np.asarray(state.tokens)
  assert np.all(tokens[::2] == tokens[0])
  targets.check_law(tokens[1::2], JOINT)


def test_a_transform_that_feeds_back_is_refused():
  with pytest.raises(ValueError, match="no order of tokens"):
    draw(
      lambda: masked.first_hitting(
        PREDICT, LINEAR, mask=V, transform=logits.chain(feedback.mirostat(2.0))
      ),
      blank(2),
    )


def test_a_transform_that_looks_at_tokens_is_refused():
  banned = history.no_repeat_ngram(2)
  with pytest.raises(ValueError, match="written before"):
    masked.check_transform(logits.chain(logits.temperature(0.5), banned), V)
  masked.check_transform(logits.chain(logits.temperature(0.5), truncation.top_p(0.9)), V)


@pytest.mark.parametrize("score", POSITION_FIRST[2:], ids=lambda score: score.__name__)
def test_orders_do_not_depend_on_the_temperature_of_tokens(score):
  """At temperature 0 all tempered laws are certain; the order is still by the predictor's own."""
  rows = blank(200)

  def first_places(temperature):
    transform = logits.temperature(temperature)
    algorithm = lambda: masked.unmask(PREDICT, unmasking.top(score), mask=V, transform=transform)
    return np.asarray(draw(algorithm, rows, 1)[1].written[0])

  np.testing.assert_array_equal(first_places(0.0), first_places(1.0))
  assert first_places(0.0)[0].sum() == 1


@pytest.mark.parametrize("name", ["ancestral", "first_hitting", "remasking", "unmask"])
def test_log_prob_is_of_the_law_drawn_from_and_the_model_s_own_beside_it(name):
  cold = logits.temperature(0.5)
  times, how = jnp.linspace(1, 0, 6), {"mask": V, "transform": cold}
  algorithm = {
    "ancestral": lambda: masked.ancestral(PREDICT, LINEAR, times, **how),
    "first_hitting": lambda: masked.first_hitting(PREDICT, LINEAR, **how),
    "remasking": lambda: remasking.remasking(PREDICT, LINEAR, times, remasking.cap(0.5), **how),
    "unmask": lambda: masked.unmask(PREDICT, unmasking.top(unmasking.margin, 2), **how),
  }[name]()
  keys, tokens = targets.keys_of(np.arange(40)), blank(40)
  tokens = tokens.at[::2, 1].set(2)
  state, num_written = base.start(keys, algorithm, tokens), 0
  for _ in range(5):
    before = state.tokens
    law = np.asarray(jax.nn.log_softmax(PREDICT(before, 0.0)), np.float64)
    drawn_from = np.asarray(jax.nn.log_softmax(jnp.asarray(law / 0.5, jnp.float32)))
    state, info = jax.jit(algorithm.step)(base.row_keys_at(keys, state.step), state)
    written, token = np.asarray(info.written), np.asarray(state.tokens)
    np.testing.assert_array_equal(written, (token != V) & (np.asarray(before) == V))
    place = np.minimum(token, V - 1)[..., None]
    for found, p in ((info.log_prob, drawn_from), (info.model_log_prob, law)):
      own = np.take_along_axis(p, place, axis=2)[..., 0]
      np.testing.assert_allclose(found, np.where(written, own, 0), atol=2e-5)
    num_written += written.sum()
  assert num_written > 100


def test_grids_end_at_nothing_masked():
  for times in ([1.0, 0.5], [1.0, 0.2, 0.4, 0.0], [0.0]):
    with pytest.raises(ValueError, match="times: they have to"):
      masked.ancestral(PREDICT, LINEAR, np.array(times), mask=V)


def test_sample_stops_when_nothing_is_masked():
  @jax.jit
  def run(keys):
    algorithm = masked.first_hitting(PREDICT, LINEAR, mask=V)
    return masked.sample(keys, algorithm, blank(), mask=V)

  targets.check_law(run(targets.keys_of(np.arange(DRAWS))), JOINT)


def test_rare_tokens_come_up_as_often_as_they_should():
  """Of 2,000 tokens of p = 3e-8 each, 6.0e-5 are drawn, not 6.7e-6 as by float32's usual Gumbel.

  Its smallest uniform number is d = 2^-23, so -log(-log u) is at most about log(1/d), and a token
  of p << d wins with d e^(-d / p) / (1 - e^(-d / p)) instead of p.
  """
  rare, num = 3e-8, 240_000
  p = np.append(np.full(2000, rare), 1 - 2000 * rare)
  log_p = jnp.asarray(np.log(p), jnp.float32)

  @jax.jit
  def count(key):
    keys = jax.random.split(key, 8000)
    ours = masked.draw_each(keys, jnp.broadcast_to(log_p, (8000, 1, 2001)))
    return jnp.sum(ours < 2000)

  hits = sum(int(count(jax.random.key(i))) for i in range(num // 8000))
  mean = num * 2000 * rare
  assert abs(hits - mean) < 4 * mean**0.5
  d = 2.0**-23
  lost = num * 2000 * d * np.exp(-d / rare) / -np.expm1(-d / rare)
  assert hits > lost + 4 * lost**0.5  # the truncated law is far below


def test_a_transformer_is_a_predictor():
  """It predicts no mask, and does not read the tokens that are masked but for their place."""
  model, params = targets.tiny_target(causal=False)
  predict = masked_models.predictor(model, params)
  vocab_size = targets.TINY["vocab_size"] - 1
  tokens = jnp.full((2, 6), vocab_size).at[:, 2].set(jnp.array([1, 2]))
  out = predict(tokens, jnp.float32(0.5))
  assert out.shape == (2, 6, vocab_size)
  assert np.all(np.any(np.abs(out[0] - out[1]) > 1e-3, axis=-1))  # every position sees the third
