"""Automata against regular expressions, substrings and sets, over every short text."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.sampling import automata

TEXTS = ["1", "02", "+", "2+", "+1", "a", "1a2", ""]
COLUMNS = {**dict.fromkeys("0123456789", 0), "+": 1}
SUMS = automata.automaton([[1, -1], [1, 2], [-1, -1]], [2])  # digits, then a plus


def every_text(vocab_size, longest):
  return [
    tokens for n in range(longest + 1) for tokens in itertools.product(range(vocab_size), repeat=n)
  ]


def test_lifted_automata_accept_what_the_expression_matches():
  language = automata.lift(SUMS, COLUMNS, TEXTS)
  lengths = {}
  for tokens in every_text(8, 4):
    text = "".join(TEXTS[token] for token in tokens)
    says_nothing = 7 in tokens
    matches = bool(re.fullmatch(r"[0-9]+\+", text)) and not says_nothing
    assert automata.accepts(language, tokens) == matches, text
    begins = bool(re.fullmatch(r"[0-9]*|[0-9]+\+", text)) and not says_nothing
    state = automata.run(language, tokens)
    assert (state >= 0) == begins, text
    if matches:
      lengths.setdefault(automata.run(language, tokens[:0]), len(tokens))
  assert lengths == {0: 1} and int(language.distance[0]) == 1  # "2+"


def test_bytes_across_tokens():
  """A token may hold half a character."""
  euro = "€".encode()
  texts = [euro[:1], euro[1:], b"1", euro]
  columns = {byte: i for i, byte in enumerate(sorted({*euro, *b"1"}))}
  word = automata.from_sequences([[columns[byte] for byte in b"1" + euro]], len(columns))
  language = automata.lift(word, columns, texts)
  accepted = {tokens for tokens in every_text(4, 4) if automata.accepts(language, tokens)}
  assert accepted == {(2, 3), (2, 0, 1)}


@pytest.mark.parametrize("sequences", [[(0, 1), (0, 1, 2), (2,)], [()], [(1, 1, 1)], [(), (0,)]])
def test_a_trie_accepts_its_sequences(sequences):
  language = automata.from_sequences(sequences, 3)
  accepted = {tokens for tokens in every_text(3, 4) if automata.accepts(language, tokens)}
  assert accepted == set(sequences)
  assert language.distance[0] == min(map(len, sequences))


@pytest.mark.parametrize(
  "sequences",
  [[(0, 1, 0)], [(0, 0, 1), (0, 1, 0, 1)], [(0, 1, 1, 0), (1, 1), (2,)], [(1, 0, 1, 1), (0, 1, 2)]],
)
def test_containing_is_containing(sequences):
  language = automata.containing(sequences, 3)
  strings = ["".join(map(str, sequence)) for sequence in sequences]
  for tokens in every_text(3, 6):
    text = "".join(map(str, tokens))
    assert automata.accepts(language, tokens) == any(string in text for string in strings), text
  assert language.distance[0] == min(map(len, strings))


def test_stop_strings_are_seen_across_tokens():
  texts = ["", "a", "b", "ab", "ba", "\n", "x\n\n", "c"]
  strings = ["aba", "\n\n", "bb"]
  language = automata.stop_strings(strings, texts)
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 8, (300, 7))
  state = jnp.full(300, int(language.start))
  follow = jax.jit(automata.advance)
  for place in range(7):
    state = follow(language, state, jnp.asarray(tokens[:, place]))
    seen = np.asarray(language.distance)[np.asarray(state)] == 0
    written = ["".join(texts[token] for token in row[: place + 1]) for row in tokens]
    expected = [any(string in text for string in strings) for text in written]
    np.testing.assert_array_equal(seen, expected)
  assert 50 < sum(expected) < 299


def test_states_that_lead_nowhere_are_not_entered():
  table = np.array([[1, 2, 3, -1], [1, -1, -1, 4], [2, 2, 2, 2], [-1, -1, -1, -1], [-1] * 4])
  language = automata.automaton(table, [4])
  np.testing.assert_array_equal(
    language.transitions, [[1, -1, -1, -1], [1, -1, -1, 4], [-1] * 4, [-1] * 4, [-1] * 4]
  )
  np.testing.assert_array_equal(language.distance, [2, 1, automata.NEVER, automata.NEVER, 0])


def test_distance_is_the_shortest_way():
  rng = np.random.default_rng(0)
  for _ in range(20):
    table = np.where(rng.random((9, 4)) < 0.45, rng.integers(0, 9, (9, 4)), -1)
    accepting = rng.choice(9, 2, replace=False)
    language = automata.automaton(table, accepting, int(accepting[0]))
    power, reached = np.eye(9, dtype=bool), np.full(9, automata.NEVER)
    step = np.array([[target in row for target in range(9)] for row in table])
    for n in range(9):
      reached = np.where(power[:, accepting].any(axis=1), np.minimum(reached, n), reached)
      power = (power.astype(int) @ step.astype(int)) > 0
    np.testing.assert_array_equal(language.distance, reached)


def test_ended_words_may_be_followed_by_stops():
  language = automata.ended(automata.from_sequences([(0, 1), (0,)], 4), [3, 2])
  accepted = {tokens for tokens in every_text(4, 3) if automata.accepts(language, tokens)}
  words, stops = [(0, 1), (0,)], [(), (2,), (3,), (2, 2), (2, 3), (3, 2), (3, 3)]
  assert accepted == {(*word, *stop) for word in words for stop in stops if len(word + stop) < 4}


def test_a_disjoint_union_keeps_its_automata_apart():
  parts = [
    automata.anything(3),
    automata.from_sequences([(0, 1), (2,)], 3),
    automata.containing([(1, 1)], 3),
  ]
  union = automata.disjoint_union(parts)
  for start, part in zip(union.start, parts, strict=True):
    for tokens in every_text(3, 4):
      one = union._replace(start=start)
      assert automata.accepts(one, tokens) == automata.accepts(part, tokens)
  again = automata.disjoint_union([union._replace(start=union.start[2]), parts[1]])
  assert automata.accepts(again._replace(start=again.start[0]), (0, 1, 1))


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: automata.automaton([[0, 2]], [0]), "State 2 does not exist: there are 0 to 0"),
    (lambda: automata.automaton([[0, -2]], [0]), "State -2 does not exist"),
    (lambda: automata.automaton([[0]], [1]), "State 1 does not exist"),
    (lambda: automata.automaton([[0]], [0], 5), "State 5 does not exist"),
    (lambda: automata.automaton([0, 1], [0]), r"\[states, symbols\], not \(2,\)"),
    (lambda: automata.automaton([[0], [1]], [1]), "language is empty"),
    (lambda: automata.from_sequences([], 3), "language is empty"),
    (lambda: automata.lift(SUMS, COLUMNS, ["1", "a"]), "language is empty"),
    (lambda: automata.stop_strings(["ab", ""], ["a"]), "empty, so every text contains it"),
    (lambda: automata.stop_strings(["ab"], ["a", "c"]), "language is empty"),
    (lambda: automata.ended(automata.anything(3), [3]), "Stop token 3 is outside"),
  ],
)
def test_what_cannot_be_is_refused(make, message):
  with pytest.raises(ValueError, match=message) as error:
    make()
  assert "\n" not in str(error.value)
