"""Finite automata over tokens: languages that decoding is held to, and strings it looks for.

An automaton reads one token at a time; a text is a word if it ends in an accepting state. They are
built on the host in numpy, first over whatever symbols describe the language best, and `lift`ed to
the tokens of a vocabulary:

    sums = automaton([[1, -1], [1, 2], [-1, -1]], accepting=[2])  # digits, then "+"
    columns = {**dict.fromkeys("0123456789", 0), "+": 1}
    language = lift(sums, columns, texts)  # texts[v] is what token v says
    transform = constraints.constrain(language, stop=(eos,))
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

NEVER = np.iinfo(np.int32).max  # the distance of a state from which no word can be completed


class Automaton(NamedTuple):
  """A deterministic automaton of Q states over V symbols. Make it by `automaton`, which prunes it.

  A pytree: it may be an argument of jit.
  """

  transitions: jax.Array  # [Q, V] int32: the next state, or -1: no word goes on like this
  distance: jax.Array  # [Q] int32: the fewest symbols to an accepting state; 0: it is one
  start: jax.Array | int  # [] or [B] int32, one per row


def automaton(
  transitions: np.ndarray, accepting: Sequence[int], start: int | np.ndarray = 0
) -> Automaton:
  """Prunes an automaton: states that lead to no word are not entered any more.

  Args:
    transitions: [Q, V] integers: the next state, or -1 for none.
    accepting: the states in which a word may end.
    start: the state before the first symbol, or one per row, [B].

  Raises:
    ValueError: a state that does not exist, or an empty language.
  """
  transitions = np.asarray(transitions, np.int32)
  if transitions.ndim != 2:
    raise ValueError(f"transitions have to be [states, symbols], not {transitions.shape}.")
  num_states, start = len(transitions), np.asarray(start, np.int32)
  for states, least in ((transitions, -1), (np.asarray(accepting), 0), (start, 0)):
    wrong = states[(states < least) | (states >= num_states)]
    if wrong.size:
      raise ValueError(f"State {wrong.flat[0]} does not exist: there are 0 to {num_states - 1}.")
  distance = _distance(transitions, accepting)
  if np.any(distance[start] == NEVER):
    raise ValueError("The language is empty: no accepting state can be reached from the start.")
  lost = (transitions < 0) | (distance[transitions] == NEVER)
  return Automaton(np.where(lost, -1, transitions).astype(np.int32), distance, start)


def _distance(transitions, accepting):
  """[Q], the fewest symbols to an accepting state: breadth first, one round per symbol."""
  distance = np.full(len(transitions), NEVER, np.int32)
  distance[np.asarray(accepting, np.int64)] = 0
  successors = [np.flatnonzero(np.bincount(row[row >= 0])) for row in transitions]
  for steps in range(1, len(transitions)):
    reached = [
      state
      for state, following in enumerate(successors)
      if distance[state] == NEVER and np.any(distance[following] == steps - 1)
    ]
    if not reached:
      break
    distance[reached] = steps
  return distance


def run(language: Automaton, symbols: Iterable[int]) -> int:
  """The state after reading symbols from the start, on the host; -1 where no word goes on so."""
  state = int(language.start)
  for symbol in symbols:
    state = int(language.transitions[state, symbol]) if state >= 0 else -1
  return state


def accepts(language: Automaton, symbols: Iterable[int]) -> bool:
  """Whether symbols are a word, on the host."""
  state = run(language, symbols)
  return state >= 0 and bool(language.distance[state] == 0)


def advance(language: Automaton, state: jax.Array, token: jax.Array) -> jax.Array:
  """The states [B] after tokens [B], inside jit; a token that is not allowed changes nothing."""
  following = jnp.asarray(language.transitions)[state, token]
  return jnp.where(following >= 0, following, state)


def anything(vocab_size: int) -> Automaton:
  """All texts: what a row without a constraint follows."""
  return automaton(np.zeros((1, vocab_size)), [0])


def from_sequences(sequences: Sequence[Sequence[int]], vocab_size: int) -> Automaton:
  """The language of the given sequences: a trie.

  Raises:
    ValueError: no sequence.
  """
  children, ends = _trie(sequences)
  return automaton(_table(children, vocab_size), ends)


def containing(sequences: Sequence[Sequence[int]], vocab_size: int) -> Automaton:
  """The language of all texts that contain one of the sequences: Aho and Corasick's automaton.

  A state is the longest end of the text that begins a sequence; where one is complete, it stays.

  Raises:
    ValueError: no sequence.

  Reference: Aho and Corasick 1975, doi 10.1145/360825.360855.
  """
  children, ends = _trie(sequences)
  table, ends = _table(children, vocab_size), set(ends)
  table[0] = np.maximum(table[0], 0)
  queue = [(child, 0) for child in children[0].values()]  # a state, and its longest proper end
  for state, fallback in queue:  # which grows: breadth first
    queue += [(child, int(table[fallback, symbol])) for symbol, child in children[state].items()]
    ends |= {state} if fallback in ends else set()
    table[state] = np.where(table[state] >= 0, table[state], table[fallback])
  found = sorted(ends)
  table[found] = np.array(found)[:, None]
  return automaton(table, found)


def _trie(sequences):
  """Children {symbol: state} of each state, breadth not ordered, and where the sequences end."""
  children, ends = [{}], []
  for sequence in sequences:
    state = 0
    for symbol in sequence:
      if symbol not in children[state]:
        children[state][symbol] = len(children)
        children.append({})
      state = children[state][symbol]
    ends.append(state)
  return children, ends


def _table(children, vocab_size):
  table = np.full((len(children), vocab_size), -1, np.int32)
  for state, following in enumerate(children):
    table[state, list(following)] = list(following.values())
  return table


def lift(
  language: Automaton,
  columns: Mapping[Hashable, int],
  texts: Sequence[Sequence[Hashable]],
  other: int | None = None,
) -> Automaton:
  """The same language over tokens: every way of cutting its words into tokens.

  Args:
    language: an automaton over symbols.
    columns: the column of each character (or byte; classes of characters share one).
    texts: what each token says, a str (or bytes) each; a token that says nothing, such as a special
      one, is not allowed.
    other: the column of characters that are not in `columns`; None allows no such character.

  Raises:
    ValueError: no word can be cut into these tokens.
  """
  # A last row and column stand for no state and for a character that is not allowed.
  table = np.pad(np.asarray(language.transitions), ((0, 1), (0, 1)), constant_values=-1)
  unknown = table.shape[1] - 1 if other is None else other
  lengths = np.array([len(text) for text in texts])
  symbols = np.full((len(texts), lengths.max(initial=0)), unknown)
  for token, text in enumerate(texts):
    symbols[token, : len(text)] = [columns.get(character, unknown) for character in text]
  states = np.repeat(np.arange(len(table) - 1)[:, None], len(texts), axis=1)
  for place in range(symbols.shape[1]):
    longer = np.flatnonzero(lengths > place)
    states[:, longer] = table[states[:, longer], symbols[longer, place][None, :]]
  states[:, lengths == 0] = -1
  return automaton(states, np.flatnonzero(language.distance == 0), language.start)


def stop_strings(strings: Sequence[str], texts: Sequence[str]) -> Automaton:
  """Looks for strings in what tokens say, also across their boundaries: accepting means seen.

  Follow it by `advance` from `start`; a row has seen one of the strings where `distance` is 0, and
  from then on. Tokens that say nothing leave the state as it is.

  Args:
    strings: str or bytes, as texts.
    texts: what each token says.

  Raises:
    ValueError: an empty string, or none that these tokens can spell.
  """
  if not all(strings):
    raise ValueError("A stop string is empty, so every text contains it: leave it out.")
  columns = {character: i for i, character in enumerate(sorted(set().union(*strings)))}
  sequences = [[columns[character] for character in string] for string in strings]
  language = containing(sequences, len(columns) + 1)
  return lift(language, columns, texts, other=len(columns))


def ended(language: Automaton, stop: Sequence[int]) -> Automaton:
  """The words of a language, each alone or followed by stop tokens, which it does not use itself.

  Raises:
    ValueError: a stop token outside the vocabulary, or a language that needs it in its words.
  """
  if isinstance(language.transitions, jax.core.Tracer):
    raise ValueError("The automaton is an argument of jit: give it stop tokens before, by `ended`.")
  transitions = np.pad(np.asarray(language.transitions), ((0, 1), (0, 0)), constant_values=-1)
  vocab_size, end = transitions.shape[1], len(transitions) - 1
  outside = [token for token in stop if not 0 <= token < vocab_size]
  if outside:
    raise ValueError(f"Stop token {outside[0]} is outside the vocabulary of {vocab_size}.")
  accepting = [*np.flatnonzero(np.asarray(language.distance) == 0), end]
  transitions[:, list(stop)] = -1
  transitions[np.ix_(accepting, list(stop))] = end
  return automaton(transitions, accepting, language.start)


def disjoint_union(languages: Sequence[Automaton]) -> Automaton:
  """The automata side by side, `start` [N] their starts: rows pick theirs.

  both = disjoint_union([anything(vocab_size), language])
  constrain(both._replace(start=both.start[jnp.array([0, 1, 1])]), ...)   # three rows
  """
  offsets = np.cumsum([0, *(len(language.distance) for language in languages[:-1])])
  transitions = [
    np.where(language.transitions >= 0, language.transitions + offset, -1)
    for language, offset in zip(languages, offsets, strict=True)
  ]
  return Automaton(
    np.concatenate(transitions).astype(np.int32),
    np.concatenate([language.distance for language in languages]),
    np.array([language.start for language in languages], np.int32) + offsets.astype(np.int32),
  )
