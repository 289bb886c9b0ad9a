"""Guided models: against two separate passes, as laws, and through decoding."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.models import base, guided
from ancestral.sampling import base as sampling
from ancestral.sampling import decode
from ancestral.sampling import logits as logits_lib

INF = np.inf
PROMPTS = [[3, 1, 4, 1], [2], [0, 4, 2]]
NEGATIVES = [[2, 2], [1, 0, 3, 4, 1], [4]]
CONTINUATIONS = [[4, 0, 2, 1], [1, 1, 3, 0], [2, 4, 0, 3]]
WEIGHTS = [1.7, 0.4, 3.0]


@pytest.fixture(autouse=True)
def exact_matmuls():
  with jax.default_matmul_precision("highest"):
    yield


def padded(rows, width=None):
  tokens = np.zeros((len(rows), width or max(map(len, rows))), np.int32)
  for b, row in enumerate(rows):
    tokens[b, : len(row)] = row
  return decode.Prompts(jnp.asarray(tokens), jnp.array([len(row) for row in rows], jnp.int32))


@functools.partial(jax.jit, static_argnums=0)
def every_logits(model, params, tokens):
  return model.readout(params, base.apply(model, params, tokens)[0])


def logits_after(model, params, context):
  """The model's next-token logits [V] after a list of tokens, by a full pass of its own."""
  logits = every_logits(model, params, padded([context], 12).tokens)  # one width, one compilation
  return np.asarray(logits[0, len(context) - 1], np.float64)


def law_after(model, params, weight, prompt, negative, drawn):
  """[V]: the law by two separate passes and a product of powers."""
  readings = [[*prompt, *drawn], [*(prompt[-1:] if negative is None else negative), *drawn]]
  one, other = (targets.softmax(logits_after(model, params, reading)) for reading in readings)
  product = one**weight * other ** (1 - weight)
  return product / product.sum()


TARGETS = {
  "table": lambda: targets.table_target(vocab_size=5, order=3),
  "transformer": lambda: targets.tiny_target(vocab_size=5, num_layers=1),
  "window": lambda: targets.tiny_target(vocab_size=5, num_layers=1, window=3, positions="learned"),
}


def scorer(target, negatives, weight=WEIGHTS):
  """(prompts, continuation tokens [B, n]) -> logits before each of them and after [B, n + 1, V].

  With the cache in ragged pieces: prefill, two tokens at once, a wrong turn, a rewind, the rest.
  """
  model, params = target

  @jax.jit
  def score(params, prompts, tokens, negative):
    steered = guided.guided(model, jnp.array(weight), prompts.length, negative)
    cache = decode.prefill(steered, params, prompts, 12)
    last = jnp.take_along_axis(prompts.tokens, prompts.length[:, None] - 1, axis=1)
    x = jnp.concatenate([last, tokens], axis=1)
    hidden, cache = base.apply(steered, params, x[:, :2], cache)
    _, wrong = base.apply(steered, params, (x[:, 2:] + 1) % 5, cache)
    cache = wrong._replace(length=wrong.length - x.shape[1] + 2)
    rest, cache = base.apply(steered, params, x[:, 2:], cache)
    return steered.readout(params, jnp.concatenate([hidden, rest], axis=1)), cache.length

  negative = None if negatives is None else padded(negatives)
  return lambda prompts, tokens: score(params, prompts, tokens, negative)


@pytest.mark.parametrize(
  "name, negatives",
  [("table", None), ("table", NEGATIVES), ("transformer", None), ("window", NEGATIVES)],
)
def test_a_cache_in_pieces_equals_two_full_passes(name, negatives):
  target = TARGETS[name]()
  logits, length = scorer(target, negatives)(padded(PROMPTS), jnp.array(CONTINUATIONS))
  np.testing.assert_array_equal(length, [len(prompt) + 4 for prompt in PROMPTS])
  for b, prompt in enumerate(PROMPTS):
    for n in range(5):
      negative = None if negatives is None else negatives[b]
      expected = law_after(*target, WEIGHTS[b], prompt, negative, CONTINUATIONS[b][:n])
      np.testing.assert_allclose(targets.softmax(logits[b, n]), expected, atol=2e-5)


@pytest.mark.parametrize(
  "name, negatives, pieces",
  [
    ("table", None, (8,)),
    ("table", NEGATIVES, (8,)),
    ("table", None, (2, 1, 5)),
    ("table", NEGATIVES, (2, 1, 5)),
    ("transformer", NEGATIVES, (2, 1, 5)),
    ("window", None, (8,)),
  ],
)
def test_passes_that_cross_the_prompts_end(name, negatives, pieces):
  """Prompt and continuation in one tensor; within the prompt the law is the model's own."""
  model, params = TARGETS[name]()
  rows = [prompt + new for prompt, new in zip(PROMPTS, CONTINUATIONS, strict=True)]
  tokens, _ = padded(rows)
  length = jnp.array([len(prompt) for prompt in PROMPTS])
  negative = None if negatives is None else padded(negatives)

  @jax.jit
  def score(params, tokens):
    steered = guided.guided(model, jnp.array(WEIGHTS), length, negative)
    if len(pieces) == 1:  # without a cache
      return steered.readout(params, base.apply(steered, params, tokens)[0])
    cache, hidden = steered.init_cache(params, 3, 8), []
    for part in jnp.split(tokens, np.cumsum(pieces)[:-1], axis=1):
      out, cache = base.apply(steered, params, part, cache)
      hidden.append(out)
    return steered.readout(params, jnp.concatenate(hidden, axis=1))

  logits = score(params, tokens)
  for b, (prompt, row) in enumerate(zip(PROMPTS, rows, strict=True)):
    for t in range(len(row)):
      if t < len(prompt) - 1:
        expected = targets.softmax(logits_after(model, params, row[: t + 1]))
      else:
        drawn = row[len(prompt) : t + 1]
        context = None if negatives is None else negatives[b]
        expected = law_after(model, params, WEIGHTS[b], prompt, context, drawn)
      np.testing.assert_allclose(targets.softmax(logits[b, t]), expected, atol=2e-5)


def test_weight_one_is_the_model_and_weight_zero_the_negative():
  model, params = targets.table_target(vocab_size=5, order=3)
  prompts, new = padded(PROMPTS), jnp.array(CONTINUATIONS)
  score = scorer((model, params), NEGATIVES, weight=[1.0, 0.0, 1.0])
  logits = np.asarray(score(prompts, new)[0])
  contexts = [PROMPTS[0], NEGATIVES[1], PROMPTS[2]]
  for b, context in enumerate(contexts):
    alone = logits_after(model, params, [*context, *CONTINUATIONS[b]])
    np.testing.assert_allclose(targets.softmax(logits[b, -1]), targets.softmax(alone), atol=1e-6)


def enumerated(conditional, weight, prompt, negative, num_tokens):
  """[V] * n: the law of a table model's guided continuations, by going through all of them."""
  order, vocab_size = conditional.ndim - 1, conditional.shape[-1]
  law = np.ones((vocab_size,) * num_tokens)
  at = lambda context: conditional[tuple([0] * order + context)[-order:]]
  for tokens in itertools.product(range(vocab_size), repeat=num_tokens):
    for n in range(num_tokens):
      drawn = list(tokens[:n])
      product = at(prompt + drawn) ** weight * at(negative + drawn) ** (1 - weight)
      law[tokens] *= product[tokens[n]] / product.sum()
  return law


NUM, NEW = 60_000, 3


@pytest.mark.parametrize("weight", [0.5, 2.5])
def test_generate_draws_the_guided_law_and_reports_it(weight):
  model, params = targets.table_target(vocab_size=4, order=2)
  rows, negatives = [[2, 1], [3]], [[0], [1, 3, 3]]
  repeat = lambda prompts: jax.tree.map(lambda leaf: jnp.tile(leaf.T, NUM // 2).T, prompts)

  @jax.jit
  def sample(params, keys, prompts, negative):
    steered = guided.guided(model, weight, prompts.length, negative)
    return decode.generate(steered, params, keys, prompts, max_new_tokens=NEW)

  keys = sampling.row_keys(jax.random.key(0), jnp.arange(NUM))
  samples = sample(params, keys, repeat(padded(rows)), repeat(padded(negatives)))
  for start, (prompt, negative) in enumerate(zip(rows, negatives, strict=True)):
    law = enumerated(targets.softmax(params), weight, prompt, negative, NEW)
    drawn = np.asarray(samples.tokens)[start::2, len(prompt) :][:, :NEW]
    targets.check_law(drawn, law)
    reported = np.exp(np.asarray(samples.log_prob)[start::2].sum(axis=1))
    np.testing.assert_allclose(reported, law[tuple(drawn.T)], rtol=1e-4)


def test_samples_of_one_prompt_share_a_prefill_and_grow_the_cache():
  model, params = targets.tiny_target(vocab_size=5, num_layers=1)

  @jax.jit
  def sample(params, keys, prompts, negative):
    weight = jnp.array(WEIGHTS)
    steered = guided.guided(model, weight, prompts.length, negative)
    return decode.generate(
      steered, params, keys, prompts, max_new_tokens=6, num_samples=2, bucket=4
    )

  keys = sampling.row_keys(jax.random.key(0), jnp.arange(6))
  samples = sample(params, keys, padded(PROMPTS), padded(NEGATIVES))
  assert np.any(samples.tokens[::2] != samples.tokens[1::2])
  for row in range(6):
    prompt, negative = PROMPTS[row // 2], NEGATIVES[row // 2]
    new = np.asarray(samples.tokens[row, len(prompt) :][:6]).tolist()
    for n in (0, 2, 5):
      law = law_after(model, params, WEIGHTS[row // 2], prompt, negative, new[:n])
      np.testing.assert_allclose(samples.log_prob[row, n], np.log(law[new[n]]), atol=2e-4)


def test_one_negative_prompt_may_serve_all_rows():
  model, params = targets.table_target(vocab_size=5, order=3)
  tokens = jnp.array(CONTINUATIONS)
  score = jax.jit(
    lambda negative: base.apply(guided.guided(model, 2.0, 2, negative), params, tokens)[0]
  )
  np.testing.assert_array_equal(score(padded([[1, 3]] * 3)), score(padded([[1, 3]])))


def test_half_precision_and_gradients():
  model, params = targets.tiny_target(vocab_size=5, num_layers=1, dtype="bfloat16")
  steered = guided.guided(model, 2.0, 2)

  def score(params):
    hidden, _ = base.apply(steered, params, jnp.array(CONTINUATIONS))
    logits = steered.readout(params, hidden)
    assert hidden.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    return jnp.sum(jnp.square(logits))

  gradient = jax.jit(jax.grad(score))(params)
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
  assert np.any(gradient["embedding"] != 0)


@pytest.mark.parametrize(
  "weight, expected",
  [
    (0.0, [0.5, 0.5, 0, 0]),
    (0.5, [np.sqrt(0.25 * 0.5), 0, 0, 0]),
    (1.0, [0.25, 0, 0.75, 0]),
    (2.0, [0, 0, 1, 0]),
  ],
)
def test_impossible_tokens_follow_the_limit(weight, expected):
  one, other = [0.25, 0, 0.75, 0], [0.5, 0.5, 0, 0]
  with np.errstate(divide="ignore"):
    logs = [jnp.asarray(np.log([law]), jnp.float32) for law in (one, other)]
  law = targets.softmax(guided.extrapolate(*logs, jnp.float32(weight)))[0]
  np.testing.assert_allclose(law, np.array(expected) / np.sum(expected), atol=1e-6)
  near = [np.maximum(np.array(law), 1e-30) for law in (one, other)]  # the limit, numerically
  product = near[0] ** weight * near[1] ** (1 - weight)
  np.testing.assert_allclose(law, product / product.sum(), atol=1e-6)


def test_what_makes_no_sense_is_refused():
  model, params = targets.markov_target()
  with pytest.raises(ValueError, match=r"guided\(-1\): the weight has to be at least 0"):
    guided.guided(model, -1, 1)
  with pytest.raises(ValueError, match="made for 2 rows, the batch has 3"):
    guided.guided(model, 1.0, jnp.array([1, 2])).init_cache(params, 3, 4)
  steered = guided.guided(model, 1.0, 1)
  with pytest.raises(ValueError, match="without positions and mask"):
    base.apply(steered, params, jnp.ones((1, 2), jnp.int32), mask=jnp.ones((1, 2, 2), bool))
  short, short_params = targets.tiny_target(positions="learned", max_length=6)
  with pytest.raises(ValueError, match="beyond max_length=6"):  # 6 for the sequence, 1 on top
    base.apply(
      guided.guided(short, 1.0, 2, padded([[1, 2]])), short_params, jnp.ones((1, 6), jnp.int32)
    )


def test_a_step_runs_the_model_once():
  """One trunk and one readout for both readings, so the weights are read once."""
  model, params = targets.tiny_target(num_layers=1, scan_layers=False)
  calls = []
  counted = model._replace(
    trunk=lambda params, x, *args, **kwargs: (
      calls.append(x.shape) or model.trunk(params, x, *args, **kwargs)
    ),
    readout=lambda params, hidden: calls.append(hidden.shape) or model.readout(params, hidden),
  )
  steered = guided.guided(counted, 1.5, jnp.array([2, 3]))

  def step(params):
    cache = steered.init_cache(params, 2, 8)
    hidden, _ = base.apply(steered, params, jnp.ones((2, 1), jnp.int32), cache)
    return steered.readout(params, hidden[:, 0])

  assert jax.eval_shape(step, params).shape == (2, 23)
  assert calls == [(4, 1, 32), (2, 2, 32)]


@pytest.mark.peers
@pytest.mark.parametrize("negatives", [None, NEGATIVES], ids=["none", "negative"])
@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_transformers_processor_agrees(weight, negatives):
  torch = pytest.importorskip("torch")
  from transformers.generation import logits_process

  model, params = targets.table_target(vocab_size=5, order=3)

  class Output(dict):
    logits = property(lambda self: self["logits"])

  def peer_model(ids, **kwargs):
    row = logits_after(model, params, ids[0].tolist())
    return Output(logits=torch.tensor(row)[None, None])

  score = scorer((model, params), negatives, [weight] * 3)
  ours = score(padded(PROMPTS), jnp.array(CONTINUATIONS))[0]
  for b, prompt in enumerate(PROMPTS):
    processor = logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor(
      weight,
      peer_model,
      None if negatives is None else torch.tensor([negatives[b]]),
      use_cache=False,
    )
    for n in range(5):
      context = prompt + CONTINUATIONS[b][:n]
      scores = torch.tensor(logits_after(model, params, context))[None]
      theirs = processor(torch.tensor([context]), scores).numpy()[0]
      np.testing.assert_allclose(
        targets.softmax(ours[b, n]), targets.softmax(theirs), atol=1e-5, err_msg=str((b, n))
      )


def test_greedy_guidance_moves_away_from_the_negative_prompt():
  """At a large weight, the token whose odds the prompt raises most is drawn."""
  model, params = targets.markov_target()
  ratio = np.asarray(params)[1] - np.asarray(params)[3]
  samples = decode.generate(
    guided.guided(model, 1e4, 1, padded([[3]])),
    params,
    sampling.row_keys(jax.random.key(0), jnp.arange(1)),
    padded([[1]]),
    max_new_tokens=1,
    transform=logits_lib.greedy(),
  )
  assert int(samples.tokens[0, 1]) == int(np.argmax(ratio))


def test_lowers_for_accelerators():
  model, params = targets.tiny_target(vocab_size=5, num_layers=1)

  def sample(params, keys, prompts, negative):
    steered = guided.guided(model, 1.5, prompts.length, negative)
    return decode.generate(steered, params, keys, prompts, max_new_tokens=3)

  keys = sampling.row_keys(jax.random.key(0), jnp.arange(3))
  traced = jax.jit(sample).trace(params, keys, padded(PROMPTS), padded(NEGATIVES))
  for platform in ("tpu", "cuda"):
    assert "stablehlo" in traced.lower(lowering_platforms=(platform,)).as_text()
