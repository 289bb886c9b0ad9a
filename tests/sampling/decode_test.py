"""Decoding: its law, its log-probs, its rows, its boundaries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.models import toy
from ancestral.sampling import base, decode, truncation
from ancestral.sampling import logits as logits_lib

NUM = 200_000
PROMPT = (2, 1)
NEW = 3

TRANSFORMS = {
  "plain": (lambda: None, lambda row: range(len(row)), 1.0),
  "top_k": (lambda: truncation.top_k(2), lambda row: targets.top_k_set(row, 2), 1.0),
  "top_p": (lambda: truncation.top_p(0.7), lambda row: targets.top_p_set(row, 0.7), 1.0),
  "warm_top_p": (
    lambda: logits_lib.chain(logits_lib.temperature(2.0), truncation.top_p(0.7)),
    lambda row: targets.top_p_set(row, 0.7),
    2.0,
  ),
}


@pytest.fixture(scope="module", params=TRANSFORMS)
def drawn(request):
  """Many continuations of one prompt by a table model, and the laws they come from."""
  model, params = targets.table_target(vocab_size=4, order=2)
  transform, keep, temperature = TRANSFORMS[request.param]
  prompts = decode.Prompts(jnp.broadcast_to(jnp.array(PROMPT), (NUM, 2)), jnp.full(NUM, 2))
  samples = jax.jit(
    lambda params, keys, prompts: decode.generate(
      model, params, keys, prompts, max_new_tokens=NEW, transform=transform()
    )
  )(params, targets.keys_of(np.arange(NUM)), prompts)
  conditional = targets.softmax(targets.filtered(np.asarray(params) / temperature, keep))
  return jax.tree.map(np.asarray, samples), conditional, targets.softmax(params)


def test_law_of_generate_is_the_closed_form(drawn):
  samples, conditional, _ = drawn
  targets.check_law(samples.tokens[:, 2:], toy.table_law(conditional, PROMPT, NEW))


def test_log_probs_are_those_of_the_laws(drawn):
  samples, conditional, model_conditional = drawn
  assert samples.log_prob.shape == samples.model_log_prob.shape == (NUM, NEW)
  for reported, law in (
    (samples.log_prob, conditional),
    (samples.model_log_prob, model_conditional),
  ):
    for n in range(NEW):
      marginal = toy.table_law(law, PROMPT, n + 1)
      drawn_so_far = samples.tokens[:, 2 : 3 + n]
      total = reported[:, : n + 1].sum(axis=1)
      np.testing.assert_allclose(np.exp(total), marginal[tuple(drawn_so_far.T)], rtol=1e-5)


def test_law_on_a_markov_chain_of_ragged_prompts():
  model, params = targets.markov_target()
  rows = [[1], [4, 0, 3], [0, 2]]
  length = np.tile([len(row) for row in rows], NUM // 2 // 3)
  tokens = np.tile([row + [0] * (4 - len(row)) for row in rows], (NUM // 2 // 3, 1))
  prompts = decode.Prompts(jnp.asarray(tokens, jnp.int32), jnp.asarray(length, jnp.int32))
  samples = jax.jit(
    lambda params, keys, prompts: decode.generate(model, params, keys, prompts, max_new_tokens=2)
  )(params, targets.keys_of(np.arange(len(length))), prompts)
  new = np.take_along_axis(np.asarray(samples.tokens), length[:, None] + np.arange(2), axis=1)
  transition = targets.softmax(params)
  for start, row in enumerate(rows):
    targets.check_law(new[start::3], toy.markov_law(transition, row[-1], 2))
    np.testing.assert_array_equal(
      samples.tokens[start::3, : len(row)], np.tile(row, (len(new) // 3, 1))
    )


def test_stop_tokens_end_rows_and_freeze_them():
  model, params = targets.markov_target()
  rows, new = [[1], [2, 4, 0], [3, 1]] * 8, 4
  samples = jax.jit(
    lambda params, keys, prompts: decode.generate(
      model, params, keys, prompts, max_new_tokens=new, stop=(2, 4)
    )
  )(params, targets.keys_of(np.arange(24)), targets.prompts_of(rows))
  stopped = 0
  for b, row in enumerate(rows):
    tokens, length = np.asarray(samples.tokens[b]), int(samples.length[b])
    drawn = tokens[len(row) : length]
    assert int(samples.prompt_length[b]) == len(row)
    assert np.all(tokens[: len(row)] == row) and np.all(tokens[length:] == 0)
    assert not np.isin(drawn[:-1], (2, 4)).any()
    assert np.isin(drawn[-1], (2, 4)) or len(drawn) == new
    stopped += len(drawn) < new
    for log_prob in (samples.log_prob[b], samples.model_log_prob[b]):
      expected = [float(params[i, j]) for i, j in zip(tokens[len(row) - 1 :], drawn, strict=False)]
      np.testing.assert_allclose(log_prob[: len(drawn)], expected, atol=1e-5)
      assert np.all(log_prob[len(drawn) :] == 0)
  assert 0 < stopped < 24


def test_generate_stops_stepping_when_every_row_is_done():
  model, params = targets.markov_target()
  calls = []

  def counted(params, x, cache=None, **kwargs):
    jax.debug.callback(lambda: calls.append(1))
    return model.trunk(params, x, cache, **kwargs)

  certain = jnp.where(jnp.eye(5, k=1, dtype=bool), 0.0, -jnp.inf).at[4].set(params[4])  # i -> i + 1
  samples = decode.generate(
    model._replace(trunk=counted),
    certain,
    targets.keys_of([0, 1]),
    targets.prompts_of([[1], [2]]),
    max_new_tokens=50,
    stop=(4,),
  )
  jax.effects_barrier()
  np.testing.assert_array_equal(samples.tokens[:, :5], [[1, 2, 3, 4, 0], [2, 3, 4, 0, 0]])
  assert len(calls) == 3


@pytest.mark.parametrize(
  "transform",
  [logits_lib.greedy(), truncation.top_k(1), logits_lib.temperature(0.0)],
  ids=["greedy", "k1", "cold"],
)
def test_greedy_follows_the_argmax_with_log_prob_zero(transform):
  model, params = targets.table_target(vocab_size=5, order=1)
  samples = decode.generate(
    model,
    params,
    targets.keys_of([0, 1]),
    targets.prompts_of([[3], [0, 4]]),
    max_new_tokens=4,
    transform=transform,
  )
  law = targets.softmax(params)
  for b, prompt in enumerate(([3], [0, 4])):
    token = prompt[-1]
    for n in range(4):
      best = int(np.argmax(law[token]))
      assert int(samples.tokens[b, len(prompt) + n]) == best
      assert float(samples.log_prob[b, n]) == 0
      np.testing.assert_allclose(samples.model_log_prob[b, n], np.log(law[token, best]), atol=1e-5)
      token = best


def test_no_new_tokens_returns_the_prompts():
  model, params = targets.markov_target()
  samples = decode.generate(
    model, params, targets.keys_of([0, 1]), targets.prompts_of([[1], [2, 3]]), max_new_tokens=0
  )
  np.testing.assert_array_equal(samples.tokens, [[1, 0], [2, 3]])
  assert samples.log_prob.shape == (2, 0)


def sampler(model, params, **kwargs):
  return decode.autoregressive(model, params, max_length=24, stop=(7,), **kwargs)


TARGETS = {
  "table": lambda: targets.table_target(vocab_size=23, order=2),
  "transformer": lambda: targets.tiny_target(num_layers=1),
}
REQUESTS = {0: [3, 1, 4], 1: [1], 2: [5, 9, 2, 6, 5, 3, 5], 3: [8, 9, 7, 9], 4: [3, 2]}


@pytest.fixture(scope="module", params=TARGETS)
def served(request):
  """A function that starts given requests in given slots, and one that steps them."""
  model, params = TARGETS[request.param]()

  @jax.jit
  def start(params, keys, prompts):
    return base.start(keys, sampler(model, params, max_new_tokens=10), prompts)

  @jax.jit
  def advance(params, keys, state, num_steps):
    algorithm = sampler(model, params, max_new_tokens=10)
    return base.run_until(keys, algorithm, state, lambda state: state.done, num_steps)

  def begin(requests):
    return start(
      params, targets.keys_of(requests), targets.prompts_of([REQUESTS[r] for r in requests], 8)
    )

  return begin, lambda requests, state, n: advance(params, targets.keys_of(requests), state, n)


def row(state, b):
  return np.asarray(state.tokens[b]), int(state.length[b]), int(state.step[b]), bool(state.done[b])


def same(one, other):
  return np.array_equal(one[0], other[0]) and one[1:] == other[1:]


def test_a_row_depends_on_its_request_alone(served):
  begin, advance = served
  alone = {r: row(advance([r], begin([r]), 99), 0) for r in REQUESTS}
  assert len({tuple(tokens) for tokens, *_ in alone.values()}) == 5
  for slots in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0]):  # in company, and in another slot
    state = advance(slots, begin(slots), 99)
    assert all(same(row(state, b), alone[r]) for b, r in enumerate(slots))
  state = advance([0, 1, 2, 3, 0], begin([0, 1, 2, 3, 0]), 4)
  slots = [0, 4, 2, 3, 0]
  state = advance(slots, base.admit(state, begin([4, 2]), jnp.array([1, 5])), 99)  # late
  assert all(same(row(state, b), alone[r]) for b, r in enumerate(slots))


def test_different_requests_and_runs_differ(served):
  begin, advance = served
  state = advance([0, 1, 2, 3, 4], begin([0, 0, 0, 0, 0]), 99)  # one prompt, five keys
  assert len({tuple(tokens) for tokens in np.asarray(state.tokens)}) > 2


def test_rows_may_have_their_own_bounds_and_are_done_when_full():
  model, params = targets.table_target(vocab_size=23, order=1)
  prompts = targets.prompts_of([[3], [3, 1], [4] * 6])
  algorithm = decode.autoregressive(
    model, params, max_length=6, max_new_tokens=jnp.array([2, 9, 9])
  )
  state = base.start(targets.keys_of([0, 1, 2]), algorithm, prompts)
  np.testing.assert_array_equal(state.done, [False, False, True])
  state, infos = base.run(targets.keys_of([0, 1, 2]), algorithm, state, 8, lambda state, info: info)
  np.testing.assert_array_equal(state.length, [3, 6, 6])
  np.testing.assert_array_equal(state.cache.length, [2, 5, 5])
  np.testing.assert_array_equal(state.tokens[2], [4] * 6)
  for leaf in infos:  # frozen rows report 0
    made = np.arange(8)[:, None] < np.array([2, 4, 0])
    assert np.all(leaf[~made] == 0)
  assert np.all(infos.log_prob[:2, 0] != 0)


def test_feedback_is_of_the_models_logits_and_stops_with_the_row():
  def apply(logits, context, state):
    # forbid the tokens drawn so far, and look at the context
    assert context.tokens.shape == (2, 8)
    return jnp.where(state["seen"], -jnp.inf, logits)

  def update(model_logits, token, state):
    drawn = jax.nn.one_hot(token, 5, dtype=bool)
    return {
      "seen": state["seen"] | drawn,
      "count": state["count"] + 1,
      "finite": state["finite"] & jnp.isfinite(model_logits).all(axis=1),
    }

  once = logits_lib.LogitsTransform(
    lambda batch_size: {
      "seen": jnp.zeros((batch_size, 5), bool),
      "count": jnp.zeros(batch_size, jnp.int32),
      "finite": jnp.ones(batch_size, bool),
    },
    apply,
    update,
  )
  model, params = targets.markov_target()
  algorithm = decode.autoregressive(
    model, params, max_length=8, max_new_tokens=jnp.array([3, 5]), transform=once
  )
  keys = targets.keys_of([0, 1])
  state = base.start(keys, algorithm, targets.prompts_of([[1], [2, 0]]))
  state, _ = base.run(keys, algorithm, state, 7)
  np.testing.assert_array_equal(state.transform["count"], [3, 5])
  assert sorted(np.asarray(state.tokens[1, 2:7])) == [0, 1, 2, 3, 4]
  assert np.all(state.transform["finite"])


def test_one_bucket_compiles_once_whatever_prompts_params_and_settings():
  model, params = targets.table_target(vocab_size=6, order=1)
  traces = []

  @jax.jit
  def sample(params, settings, keys, prompts):
    traces.append(1)
    transform = logits_lib.chain(
      logits_lib.temperature(settings["temperature"]), truncation.top_k(settings["k"])
    )
    return decode.generate(model, params, keys, prompts, max_new_tokens=3, transform=transform)

  def pad(rows):
    return decode.pad_prompts(rows, vocab_size=6, max_length=16, max_new_tokens=3)

  settings = {"temperature": jnp.float32(1.0), "k": jnp.int32(3)}
  first = sample(params, settings, targets.keys_of([0, 1]), pad([[1, 2, 3], [4]]))
  second = sample(params, settings, targets.keys_of([0, 1]), pad([[5, 5, 5, 5], [2, 1]]))
  third = sample(-params, settings, targets.keys_of([0, 1]), pad([[1, 2, 3], [4]]))
  sample(
    params,
    {"temperature": jnp.float32(0.5), "k": jnp.int32(1)},
    targets.keys_of([0, 1]),
    pad([[1, 2, 3], [4]]),
  )
  assert len(traces) == 1
  assert np.any(first.tokens != second.tokens) and np.any(first.tokens != third.tokens)
  sample(params, settings, targets.keys_of([0, 1]), pad([[1] * 5, [4]]))
  assert len(traces) == 2  # the next bucket


@pytest.mark.parametrize("longest, bucket", [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8), (9, 12)])
def test_pad_prompts_rounds_up_to_a_bucket(longest, bucket):
  prompts = decode.pad_prompts([[3], [4] * longest], vocab_size=5, max_length=15, max_new_tokens=3)
  assert prompts.tokens.shape == (2, bucket) and prompts.tokens.dtype == jnp.int32
  np.testing.assert_array_equal(prompts.length, [1, longest])
  np.testing.assert_array_equal(prompts.tokens[0], [3] + [0] * (bucket - 1))
  np.testing.assert_array_equal(prompts.tokens[1, :longest], [4] * longest)


def test_pad_prompts_takes_an_array():
  prompts = decode.pad_prompts(np.array([[1, 2], [3, 4]]), vocab_size=5, max_length=4)
  np.testing.assert_array_equal(prompts.tokens, [[1, 2], [3, 4]])


@pytest.mark.parametrize(
  "rows, message",
  [
    ([], "no prompts"),
    ([[1], []], "Prompt 1 has 0 tokens; it must have 1 to 5"),
    ([[1] * 6], "Prompt 0 has 6 tokens; it must have 1 to 5.* at most 8, of which 3"),
    ([[1], [2, 5]], r"Prompt 1 has token 5, outside the vocabulary of 5 \(0 to 4\)"),
    ([[-1]], "Prompt 0 has token -1"),
  ],
)
def test_bad_prompts_are_named(rows, message):
  with pytest.raises(ValueError, match=message) as error:
    decode.pad_prompts(rows, vocab_size=5, max_length=8, max_new_tokens=3)
  assert "\n" not in str(error.value)
