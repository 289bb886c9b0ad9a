"""What may be drawn, against definitions on Python tuples, and the languages that are kept."""

import itertools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.sampling import automata, base, constraints, decode, history, truncation
from ancestral.sampling import logits as logits_lib

INF = np.inf


def contexts(rows=60, width=10, vocab_size=4, seed=0):
  """Ragged rows over few tokens; beyond their length, anything at all."""
  rng = np.random.default_rng(seed)
  length = rng.integers(1, width + 1, rows)
  prompt = rng.integers(1, length + 1)
  garbage = rng.integers(-9, 3 * vocab_size, (rows, width))
  inside = np.arange(width) < length[:, None]
  tokens = np.where(inside, rng.integers(0, vocab_size, (rows, width)), garbage)
  return logits_lib.Context(*(jnp.asarray(x, jnp.int32) for x in (tokens, length, prompt)))


def random_logits(rows=60, vocab_size=6, seed=1):
  logits = np.random.default_rng(seed).normal(size=(rows, vocab_size)).astype(np.float32)
  logits[::3, 2] = -INF
  return logits


def transformed(transform, logits, context=None):
  assert transform.init(len(logits)) == ()
  return np.asarray(jax.jit(transform.apply)(jnp.asarray(logits), context, ()))


def forbidden_by(forbids, logits, context):
  """-inf where forbids(tokens, prompt length) of a row, a set, says so, unless nothing is left."""
  out = np.asarray(logits).copy()
  for row, tokens, length, prompt in zip(out, *map(np.asarray, context), strict=True):
    tokens = forbids(tuple(tokens[:length].tolist()), int(prompt))
    if set(np.flatnonzero(row > -INF)) - tokens:
      row[sorted(tokens)] = -INF
  return out


@pytest.mark.parametrize(
  "bias",
  [
    np.array([0.5, 0, -1, 0, -INF, 2], np.float32),
    np.tile(np.array([0.5, 0, -1, 0, -INF, 2], np.float32), (60, 1)),
    {0: 0.5, 5: 2.0, 2: -1.0, 4: -INF},
  ],
)
def test_logit_bias_is_added(bias):
  out = transformed(constraints.logit_bias(bias), random_logits())
  with np.errstate(invalid="ignore"):
    expected = random_logits() + np.array([0.5, 0, -1, 0, -INF, 2])
  np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_suppress_and_allow_are_complements():
  logits = random_logits()
  out = transformed(constraints.suppress([1, 4]), logits)
  np.testing.assert_array_equal(out[:, [1, 4]], np.full((60, 2), -INF))
  np.testing.assert_array_equal(out[:, [0, 2, 3, 5]], logits[:, [0, 2, 3, 5]])
  np.testing.assert_array_equal(transformed(constraints.allow([0, 2, 3, 5]), logits), out)


@pytest.mark.parametrize("counted, first", [(history.whole, 0), (history.output, None)])
def test_bad_words_by_definition(counted, first):
  words = [[3], [0, 1], [1, 0], [2, 2, 2], [1, 0, 5], [0, 0, 0, 0, 4]]

  def forbids(tokens, prompt):
    text = tokens[prompt if first is None else first :]
    return {w[-1] for w in words if len(w) == 1 or text[1 - len(w) :] == tuple(w[:-1])}

  logits, context = random_logits(), contexts(vocab_size=3)
  expected = forbidden_by(forbids, logits, context)
  np.testing.assert_array_equal(
    transformed(constraints.bad_words(words, counted), logits, context), expected
  )
  assert all(np.any(expected[:, v] != logits[:, v]) for v in (0, 1, 2, 3, 5))


@pytest.mark.parametrize(
  "make, count",
  [
    (constraints.min_new_tokens, lambda length, prompt: length - prompt),
    (constraints.min_length, lambda length, prompt: length),
  ],
)
def test_stop_tokens_wait(make, count):
  logits, context = random_logits(), contexts()
  n = np.arange(60) % 7
  out = transformed(make(jnp.asarray(n), [0, 4]), logits, context)
  early = count(np.asarray(context.length), np.asarray(context.prompt_length)) < n
  assert 10 < early.sum() < 50
  np.testing.assert_array_equal(out[:, [0, 4]] == -INF, np.tile(early[:, None], 2))
  np.testing.assert_array_equal(out[~early], logits[~early])
  np.testing.assert_array_equal(out[:, [1, 2, 3, 5]], logits[:, [1, 2, 3, 5]])


def test_exponential_length_decay_by_definition():
  logits, context = random_logits(), contexts()
  start, factor = np.arange(60) % 5, np.array([1.3, 1.0, 0.7])[np.arange(60) % 3]
  transform = constraints.exponential_length_decay(jnp.asarray(start), jnp.asarray(factor), [0, 2])
  expected = logits.astype(np.float64)
  for b in range(60):
    over = int(context.length[b]) - int(context.prompt_length[b]) - int(start[b])
    for v in (0, 2):
      if over > 0 and expected[b, v] > -INF:
        expected[b, v] += abs(expected[b, v]) * (factor[b] ** over - 1)
  np.testing.assert_allclose(transformed(transform, logits, context), expected, rtol=1e-5)
  assert np.sum(expected != logits) > 20


def test_a_long_decay_stays_finite():
  context = logits_lib.Context(jnp.zeros((1, 3), int), jnp.array([3]), jnp.array([1]))
  context = context._replace(length=jnp.array([100_000]))
  transform = constraints.exponential_length_decay(0, 1.5, [1])
  out = transformed(transform, np.array([[3.0, -2.0, -INF]], np.float32), context)
  np.testing.assert_array_equal(jax.nn.softmax(out), [[0, 1, 0]])


def test_where_nothing_would_be_left_nothing_is_forbidden():
  logits = np.array([[1.0, -INF, 2.0], [1.0, 3.0, 2.0]], np.float32)
  context = logits_lib.Context(jnp.zeros((2, 1), int), jnp.ones(2, int), jnp.ones(2, int))
  transforms = [
    constraints.suppress([0, 2]),
    constraints.allow([1]),
    constraints.bad_words([[0], [2]]),
    constraints.min_new_tokens(1, [0, 2]),
    constraints.logit_bias({0: -INF, 2: -INF}),
  ]
  outs = jax.jit(lambda logits: [each.apply(logits, context, ()) for each in transforms])(logits)
  for out in outs:
    np.testing.assert_array_equal(out, [[1, -INF, 2], [-INF, 3, -INF]])


def test_off_is_off_bit_by_bit():
  logits = random_logits()
  logits[:, 1] = -0.0
  off = [
    constraints.logit_bias({}),
    constraints.logit_bias(np.zeros(6)),
    constraints.suppress([]),
    constraints.allow(range(6)),
    constraints.bad_words([]),
    constraints.min_new_tokens(0, [1]),
    constraints.min_length(0, [1]),
    constraints.exponential_length_decay(2, 1.0, [1]),
    constraints.constrain(automata.anything(6), stop=[0]),
  ]
  context = contexts()
  outs = jax.jit(
    lambda logits: [transform.apply(logits, context, transform.init(60)) for transform in off]
  )(jnp.asarray(logits))
  for out in outs:
    np.testing.assert_array_equal(np.asarray(out).view(np.uint32), logits.view(np.uint32))


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: constraints.bad_words([[1], []]), "empty sequence"),
    (lambda: constraints.min_new_tokens(-1, [0]), r"min_new_tokens\(-1\)"),
    (lambda: constraints.min_length(-1, [0]), r"min_length\(-1\)"),
    (lambda: constraints.exponential_length_decay(-1, 1.1, [0]), r"start\(-1\)"),
    (lambda: constraints.exponential_length_decay(1, 0.0, [0]), r"factor\(0.0\)"),
    (lambda: transformed(constraints.suppress([6]), random_logits()), "token 6.*vocabulary of 6"),
    (lambda: transformed(constraints.logit_bias({-1: 1.0}), random_logits()), "token -1"),
    (lambda: constraints.constrain(SUMS), "Nothing may follow state 2.*stop tokens"),
    (lambda: constraints.constrain(SUMS, (6,), 1), "max_new_tokens is 1.*shortest word takes 2"),
    (lambda: constraints.constrain(SUMS, (7,)), "Stop token 7 is outside the vocabulary of 7"),
    (lambda: constraints.constrain(SUMS, (3,)), "language is empty"),
  ],
)
def test_what_cannot_be_is_refused(make, message):
  with pytest.raises(ValueError, match=message) as error:
    make()
  assert "\n" not in str(error.value)


# Digits, then a plus, in tokens that are no digits and pluses: the last one stops.
TEXTS = ["1", "2", "12", "+", "2+", "1a", ""]
COLUMNS = {**dict.fromkeys("0123456789", 0), "+": 1}
STOP = 6
SUMS = automata.lift(automata.automaton([[1, -1], [1, 2], [-1, -1]], [2]), COLUMNS, TEXTS)
# Without "+" alone, it takes a digit to end; and only 3 makes SUMS need it.
SUMS = SUMS._replace(transitions=np.where(np.arange(7) == 4, -1, SUMS.transitions))
LANGUAGE = re.compile(r"[0-9]+\+")


def text_of(tokens):
  return "".join(TEXTS[token] for token in tokens)


class Rows(NamedTuple):
  """Some rows of one batch, all continuing (0, 4) by 4 tokens of their own automata."""

  num: int
  automaton: int  # of ANYTHING, SUMS and TWO
  budget: int
  top_k: int


ROWS = {
  "law": Rows(20_000, 1, 4, 7),
  "short": Rows(2000, 1, 3, 7),
  "endless": Rows(2000, 1, 2**31 - 1, 7),
  "truncated": Rows(2000, 1, 4, 1),
  "free": Rows(2000, 0, 4, 7),
  "two": Rows(2000, 2, 4, 7),
  "late": Rows(500, 1, 1, 7),  # too small a budget for any word
}


@pytest.fixture(scope="module")
def generated():
  """What rows drew [num, 4], filled up with stops; its log-probabilities; the model's law."""
  model, params = targets.table_target(vocab_size=7, order=1, seed=3)
  two = automata.from_sequences([[5, 5], [0]], 7)
  automaton = automata.ended(automata.disjoint_union([automata.anything(7), SUMS, two]), [STOP])
  num = sum(rows.num for rows in ROWS.values())
  which, budget, k = (
    jnp.asarray(np.concatenate([np.full(rows.num, rows[i]) for rows in ROWS.values()]))
    for i in (1, 2, 3)
  )
  prompts = decode.Prompts(jnp.tile(jnp.array([0, 4, 9]), (num, 1)), jnp.full(num, 2))
  keys = base.row_keys(jax.random.key(0), jnp.arange(num))

  @jax.jit
  def sample(params, start):
    transform = logits_lib.chain(
      truncation.top_k(k), constraints.constrain(automaton._replace(start=start), (), budget)
    )
    return decode.generate(
      model, params, keys, prompts, max_new_tokens=4, transform=transform, stop=(STOP,)
    )

  samples = sample(params, jnp.asarray(automaton.start)[which])
  inside = np.arange(4) < (np.asarray(samples.length) - 2)[:, None]
  drawn = np.where(inside, np.asarray(samples.tokens)[:, 2:6], STOP)
  log_prob = np.where(inside, samples.log_prob, 0).sum(axis=1)
  ends = np.cumsum([0, *(rows.num for rows in ROWS.values())])
  parts = {name: slice(*ends[i : i + 2]) for i, name in enumerate(ROWS)}
  return (
    {name: drawn[part] for name, part in parts.items()},
    {name: log_prob[part] for name, part in parts.items()},
    targets.softmax(params),
  )


def words(max_tokens):
  """The words of at most so many tokens, by trying every text."""
  return {
    tokens
    for n in range(1, max_tokens + 1)
    for tokens in itertools.product((0, 1, 2, 3, 5), repeat=n)
    if LANGUAGE.fullmatch(text_of(tokens))
  }


def local_law(conditional, allowed, before, new):
  """[V] * new: the model's law over the allowed tokens, renormalised one by one; then stops."""
  law = np.zeros((7,) * new)

  def go_on(tokens, probability):
    if len(tokens) == new or (tokens and tokens[-1] == STOP):
      law[tokens + (STOP,) * (new - len(tokens))] += probability
      return
    some = sorted(allowed(tokens))
    row = conditional[tokens[-1] if tokens else before][some]
    for token, share in zip(some, row / row.sum(), strict=True):
      go_on((*tokens, token), probability * share)

  go_on((), 1.0)
  return law


def test_every_sample_is_a_word_and_its_law_the_models_over_what_is_allowed(generated):
  """With a budget of 4 tokens: texts of up to 4, of which the last may end the word or stop it."""
  all_words = words(4)
  begun = {word[:n] for word in all_words for n in range(len(word) + 1)}

  def allowed(tokens):
    ends = {STOP} if tokens in all_words else set()
    return ends | {token for token in range(7) if (*tokens, token) in begun}

  drawn, log_prob, conditional = generated
  texts = {text_of(row) for row in drawn["law"].tolist()}
  assert all(LANGUAGE.fullmatch(text) for text in texts) and len(texts) > 20
  law = local_law(conditional, allowed, before=4, new=4)
  targets.check_law(drawn["law"], law)
  np.testing.assert_allclose(np.exp(log_prob["law"]), law[tuple(drawn["law"].T)], rtol=1e-4)


def test_without_a_budget_texts_begin_words_and_stop_only_after_one(generated):
  open_ended = re.compile(r"[0-9]+\+?")
  for name in ("endless", "late"):
    rows = {tuple(row) for row in generated[0][name].tolist()}
    for row in rows:
      assert (LANGUAGE if STOP in row else open_ended).fullmatch(text_of(row))
    assert any(STOP not in row and text_of(row)[-1] != "+" for row in rows)


def test_rows_have_their_own_budgets(generated):
  """Budgeted to 3 tokens, a word has ended by then, and what follows stops."""
  rows = generated[0]["short"].tolist()
  assert all(LANGUAGE.fullmatch(text_of(row)) and row[3] == STOP for row in rows)
  assert any(row[2] != STOP for row in rows)


def test_the_language_is_kept_after_a_truncation_that_knows_nothing_of_it(generated):
  texts = {text_of(row) for row in generated[0]["truncated"].tolist()}
  assert all(LANGUAGE.fullmatch(text) for text in texts) and len(texts) > 1


def test_rows_follow_their_own_automata(generated):
  drawn, _, conditional = generated
  targets.check_law(drawn["free"][:, :1], conditional[4])
  two = {tuple(row) for row in drawn["two"].tolist()}
  assert two == {(5, 5, STOP, STOP), (0, STOP, STOP, STOP)}


def test_what_no_row_has_a_chance_of_is_drawn_evenly():
  transform = constraints.constrain(SUMS, [STOP])
  logits = jnp.array([[-INF, -INF, -INF, 1.0, 1.0, 1.0, 1.0]])
  context = logits_lib.Context(jnp.zeros((1, 2), int), jnp.array([1]), jnp.array([1]))
  out = transform.apply(logits, context, transform.init(1))
  np.testing.assert_array_equal(out, [[0, 0, 0, -INF, -INF, -INF, -INF]])


def test_an_automaton_may_be_an_argument_of_jit():
  traces = []
  first = automata.ended(SUMS, [STOP])
  second = automata.ended(first._replace(start=1), [STOP])
  second = jax.tree.map(lambda leaf: leaf[:4] if np.ndim(leaf) else leaf, second)
  context = logits_lib.Context(jnp.zeros((2, 2), int), jnp.ones(2, int), jnp.ones(2, int))

  @jax.jit
  def allowed(automaton):
    traces.append(1)
    transform = constraints.constrain(automaton, max_new_tokens=2)
    return transform.apply(jnp.zeros((2, 7)), context, transform.init(2)) > -INF

  np.testing.assert_array_equal(allowed(first), [[1, 1, 1, 0, 0, 0, 0]] * 2)
  np.testing.assert_array_equal(allowed(second), [[1, 1, 1, 1, 0, 0, 0]] * 2)
  assert len(traces) == 1
  with pytest.raises(ValueError, match="argument of jit: give it stop tokens before"):
    jax.jit(lambda automaton: constraints.constrain(automaton, [STOP]).init(1))(SUMS)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_for_accelerators_under_vmap(platform):
  transform = logits_lib.chain(
    constraints.logit_bias({1: 2.0}),
    constraints.suppress([1]),
    constraints.bad_words([[0], [2, 3]]),
    constraints.min_new_tokens(2, [0]),
    constraints.exponential_length_decay(1, 1.1, [0]),
    constraints.constrain(SUMS, [STOP], 5),
  )

  def apply(logits, context):
    state = transform.init(30)
    out = transform.apply(logits, context, state)
    return out, transform.update(logits, jnp.argmax(out, axis=-1), state)

  split = lambda tree: jax.tree.map(lambda leaf: leaf.reshape(2, 30, *leaf.shape[1:]), tree)
  args = split(jnp.asarray(random_logits(vocab_size=7))), split(contexts())
  traced = jax.jit(jax.vmap(apply)).trace(*args)
  assert "stablehlo" in traced.lower(lowering_platforms=(platform,)).as_text()
