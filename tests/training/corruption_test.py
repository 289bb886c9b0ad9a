"""Corruption: what is changed is wrong and where it says, what is read is not learned."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import targets
from ancestral.tasks import arithmetic, expressions
from ancestral.tasks import base as tasks
from ancestral.tasks import tokenizer as tokenizers
from ancestral.training import corruption, data, likelihood

REAL = {
  "plain": arithmetic.addition(style=arithmetic.plain_format),
  "detailed": arithmetic.subtraction(style=arithmetic.detailed_format),
  "derivation": expressions.expressions(levels=(2, 3)),
}
ONE = tasks.Problem("p", "a1\nb23", {"level": 1, "key": "p"})
ALPHABET = tokenizers.characters("0123456789abcxyz-\n=+")


def exact(problem, text):
  return tasks.Verification(text == problem.answer, "" if text == problem.answer else "other")


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("num_errors", [1, 2])
def test_every_injected_error_is_wrong_and_where_it_says(name, num_errors):
  task, rng = REAL[name], np.random.default_rng(0)
  changed = 0
  for one in tasks.problems(task, 1, 60):
    if sum(character.isdigit() for character in one.answer) < num_errors:
      continue
    text, positions = corruption.inject_errors(
      rng, task.verify, one, one.answer, num_errors=num_errors
    )
    assert not task.verify(one, text).correct
    assert len(text) == len(one.answer) and len(positions) == num_errors
    differ = [i for i, pair in enumerate(zip(one.answer, text, strict=True)) if len(set(pair)) > 1]
    assert list(positions) == differ
    assert all(one.answer[i].isdigit() and text[i].isdigit() for i in positions)
    changed += 1
  assert changed > 30


def test_errors_are_uniform_over_places_and_digits():
  rng = np.random.default_rng(1)
  drawn = [corruption.inject_errors(rng, exact, ONE, ONE.answer) for _ in range(5400)]
  counts = [
    sum(one.text == ONE.answer[:i] + digit + ONE.answer[i + 1 :] for one in drawn)
    for i in (1, 4, 5)
    for digit in "0123456789"
    if digit != ONE.answer[i]
  ]
  assert sum(counts) == 5400 and len(counts) == 27
  assert stats.chisquare(counts).pvalue > 1e-4


def test_errors_that_leave_an_answer_right_are_drawn_again():
  # Any last digit is right: only the other two places can be wrong.
  lenient = lambda problem, text: exact(problem, text[:5] + "3")
  rng = np.random.default_rng(2)
  places = {corruption.inject_errors(rng, lenient, ONE, ONE.answer).positions for _ in range(60)}
  assert places == {(1,), (4,)}


def test_errors_that_do_not_fit_are_refused():
  rng = np.random.default_rng(0)
  always = lambda problem, text: tasks.Verification(True, "")
  with pytest.raises(ValueError, match="wrong already"):
    corruption.inject_errors(rng, exact, ONE, "a2\nb23")
  with pytest.raises(ValueError, match="still right"):
    corruption.inject_errors(rng, always, ONE, ONE.answer)
  with pytest.raises(ValueError, match="4 errors do not fit the 3 digits"):
    corruption.inject_errors(rng, exact, ONE, ONE.answer, num_errors=4)


def test_a_correction_by_hand():
  pieces = corruption.self_correction("a\nb\nc", "a\nx\ny", marker="no\n")
  assert pieces == (("a\n", True), ("x\n", False), ("no\nb\nc", True))
  first = corruption.self_correction("a\nb", "z", marker="no\n")
  assert first == (("z\n", False), ("no\na\nb", True))
  last = corruption.self_correction("a\nb", "a\nbb", marker="-\n")
  assert last == (("a\n", True), ("bb\n", False), ("-\nb", True))


@pytest.mark.parametrize(
  "wrong, message",
  [
    ("a\nb\nc", "no wrong line"),
    ("a\nb\nc\nd", "no wrong line"),
    ("a\nb", "no wrong line"),
    ("a\n", "not yet wrong"),
    ("", "not yet wrong"),
  ],
)
def test_a_correction_needs_a_wrong_line(wrong, message):
  with pytest.raises(ValueError, match=message):
    corruption.self_correction("a\nb\nc", wrong, marker="no\n")


@pytest.mark.parametrize("name", ["detailed", "derivation"])
def test_corrections_of_injected_errors_come_to_the_right_answer(name):
  task, rng = REAL[name], np.random.default_rng(3)
  for one in tasks.problems(task, 2, 40):
    error = corruption.inject_errors(rng, task.verify, one, one.answer)
    pieces = corruption.self_correction(one.answer, error.text, marker="=\n")
    text = "".join(piece.text for piece in pieces)
    assert not task.verify(one, text).correct
    assert task.verify(one, corruption.corrected(text, marker="=\n")).correct
    (unlearned,) = [piece.text for piece in pieces if not piece.learn]
    line = one.answer[: error.positions[0]].count("\n")
    assert unlearned == error.text.split("\n")[line] + "\n"


def test_corrected_reads_past_every_marker_and_nothing_else():
  corrected = lambda text: corruption.corrected(text, marker="no\n")
  assert corrected("a\nx\nno\nb\ny\nz\nno\nc") == "a\nb\ny\nc"
  assert corrected("x\nno\na") == "a"
  assert corrected("x\nz\nno\nno\na") == "a"  # the line before is taken back, and then that one
  assert corrected("know\nnot\nb") == "know\nnot\nb"


def test_an_example_learns_its_pieces_and_an_end_after_the_last():
  pieces = [corruption.Piece("12", True), corruption.Piece("3", False), corruption.Piece("4", True)]
  found = corruption.example(ALPHABET, "a", pieces, index=7)
  assert found["tokens"].tolist() == [1, *ALPHABET.encode("a1234"), 2] and found["index"] == 7
  np.testing.assert_array_equal(found["mask"], [0, 0, 1, 1, 0, 1, 1])
  goes_on = corruption.example(
    ALPHABET, "a", [corruption.Piece("12", True), corruption.Piece("", False)]
  )
  np.testing.assert_array_equal(goes_on["mask"], [0, 0, 1, 1, 0])


def test_an_example_of_one_piece_is_the_pipelines_own():
  own = data.tokenize([{"prompt": "a=", "answer": "12"}], ALPHABET, ("prompt", "answer"))[0]
  found = corruption.example(ALPHABET, "a=", [corruption.Piece("12", True)])
  for name in ("tokens", "mask"):
    np.testing.assert_array_equal(found[name], own[name])
    assert found[name].dtype == own[name].dtype


def test_wrong_tokens_have_no_gradient_and_their_readers_do():
  model, params = targets.table_target(vocab_size=ALPHABET.vocab_size, order=1)
  pieces = corruption.self_correction("1\n2", "x\n2", marker="-\n")
  row = corruption.example(ALPHABET, "=", pieces)
  batch = {
    "tokens": jnp.asarray(row["tokens"][None, :-1]),
    "targets": jnp.asarray(row["tokens"][None, 1:]),
    "mask": jnp.asarray(row["mask"][None, 1:]),
  }
  loss = lambda params: likelihood.next_token(model)(None, params, batch)[0][0].sum()
  moved = np.any(np.asarray(jax.grad(loss)(params)), axis=-1)  # [V]: of what follows each token
  follows = dict(zip("=x\n-12", [ALPHABET.encode(c)[0] for c in "=x\n-12"], strict=True))
  learned = {character for character, token in follows.items() if moved[token]}
  assert learned == {"\n", "-", "1", "2"}  # not that = is followed by x, nor x by a newline
  assert moved.sum() == 4


def test_masked_tokens_are_a_share_of_where():
  tokens = jnp.arange(4000).reshape(4, 1000) + 1
  where = jnp.arange(4000).reshape(4, 1000) % 2 == 0
  found = corruption.mask_tokens(jax.random.key(0), tokens, where, rate=0.3, mask_token=0)
  masked = np.asarray(found == 0)
  assert not masked[~where].any() and np.array_equal(found[~masked], tokens[~masked])
  assert abs(masked.sum() - 600) < 4 * np.sqrt(2000 * 0.3 * 0.7)
  for rate, expected in ((0.0, 0), (1.0, 2000)):
    whole = corruption.mask_tokens(jax.random.key(1), tokens, where, rate=rate, mask_token=0)
    assert (whole == 0).sum() == expected
  assert found.dtype == tokens.dtype


def seen(batch, **kwargs):
  """The batch that a loss is given within `masked_thought`."""
  given = {}

  def loss_fn(key, params, batch):
    given.update(batch, key=key)

  corruption.masked_thought(loss_fn, mask_token=9, **kwargs)(jax.random.key(0), None, batch)
  return given


def test_only_the_answers_tokens_are_hidden_and_targets_stay():
  # bos p p 5 6 eos, then padding: the answer's inputs are 5 and 6
  batch = {
    "tokens": jnp.array([[1, 3, 3, 5, 6, 0, 0]]),
    "targets": jnp.array([[3, 3, 5, 6, 2, 0, 0]]),
    "mask": jnp.array([[0.0, 0, 1, 1, 1, 0, 0]]),
  }
  given = seen(batch, rate=1.0)
  # The end would be an input only were it in the row: its place is padding, which nobody reads.
  np.testing.assert_array_equal(given["tokens"], [[1, 3, 3, 9, 9, 9, 0]])
  for name in ("targets", "mask"):
    np.testing.assert_array_equal(given[name], batch[name])
  nothing = {**batch, "mask": jnp.zeros((1, 7))}
  np.testing.assert_array_equal(seen(nothing, rate=1.0)["tokens"], batch["tokens"])


def test_the_next_document_of_a_packed_row_keeps_its_beginning():
  batch = {
    "tokens": jnp.array([[1, 5, 6, 1, 3, 7]]),
    "mask": jnp.array([[1.0, 1, 1, 0, 1, 1]]),
    "segments": jnp.array([[1, 1, 1, 2, 2, 2]]),
  }
  np.testing.assert_array_equal(seen(batch, rate=1.0)["tokens"], [[1, 9, 9, 1, 3, 9]])


def test_the_masked_loss_is_the_mean_over_masks_of_the_likelihood():
  model, params = targets.table_target(vocab_size=4, order=2)
  batch = {
    "tokens": jnp.array([[1, 2, 1]]),
    "targets": jnp.array([[2, 1, 3]]),
    "mask": jnp.ones((1, 3)),
  }
  loss_fn = likelihood.next_token(model)
  masked = corruption.masked_thought(loss_fn, mask_token=0, rate=0.25)
  keys = jax.random.split(jax.random.key(0), 4000)
  losses = jax.jit(jax.vmap(lambda key: masked(key, params, batch)[0][0][0]))(keys)
  expected, second = 0.0, 0.0
  for hidden in itertools.product((False, True), repeat=2):
    tokens = jnp.where(jnp.array([[False, *hidden]]), 0, batch["tokens"])
    weight = np.prod([0.25 if one else 0.75 for one in hidden])
    loss = float(loss_fn(None, params, {**batch, "tokens": tokens})[0][0][0])
    expected, second = expected + weight * loss, second + weight * loss**2
  assert abs(losses.mean() - expected) < 4 * np.sqrt((second - expected**2) / 4000)
  plain = loss_fn(None, params, batch)[0][0]
  np.testing.assert_array_equal(masked(None, params, batch)[0][0], plain)
