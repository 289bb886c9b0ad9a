"""Every transform that transformers has, on 1,000 vectors each.

transformers is given float64, so that only our rounding is in play; what its own float32 changes is
counted beside it. Its sort is unstable: of equal tokens it keeps arbitrary ones, so results are
compared as multisets of kept logits. `pytest -m peers -rP tests/parity` prints the counts.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.sampling import constraints, history, truncation
from ancestral.sampling import logits as logits_lib
from parity import boundaries, vectors

INF = np.inf
pytestmark = pytest.mark.peers


def called(peers, processor, row, tokens=None, dtype="float64"):
  """What a processor of transformers makes of one row of logits [V]."""
  torch = peers[0]
  ids = None if tokens is None else torch.from_numpy(tokens.astype(np.int64))[None]
  out = processor(ids, torch.from_numpy(row[None]).to(getattr(torch, dtype)))
  return out[0].numpy()


class Filter(NamedTuple):
  """The peer of a truncation, the values that both are tried with, and the boundary."""

  peer: str
  values: Callable  # (rng, rows, V) -> [rows]
  undecided: Callable


def shares(*round_numbers, low=0.0, high=1.0):
  """Half of the values round, as people choose them, and half anywhere between."""

  def values(rng, rows, size):
    anywhere = rng.uniform(low, high, rows)
    return np.where(rng.random(rows) < 0.5, rng.choice(round_numbers, rows), anywhere)

  return values


def small(rng, rows, size):
  """Cutoffs from 1e-6 to 0.5."""
  return np.exp(rng.uniform(np.log(1e-6), np.log(0.5), rows))


FILTERS = {
  "top_k": Filter(
    "TopKLogitsWarper",
    lambda rng, rows, size: rng.integers(1, min(size, 60) + 2, rows),
    boundaries.never,
  ),
  "top_p": Filter("TopPLogitsWarper", shares(0.1, 0.5, 0.9, 0.95, 1.0), boundaries.top_p),
  "min_p": Filter("MinPLogitsWarper", shares(0.0, 0.05, 0.1, 0.5, 1.0), boundaries.min_p),
  "typical": Filter(
    "TypicalLogitsWarper",
    shares(0.2, 0.5, 0.9, 0.95, high=0.999),
    boundaries.typical,
  ),
  "epsilon": Filter("EpsilonLogitsWarper", small, boundaries.epsilon),
  "eta": Filter("EtaLogitsWarper", small, boundaries.eta),
  "top_h_partial": Filter("TopHLogitsWarper", shares(0.2, 0.4, 0.7, high=0.999), boundaries.top_h),
}


def float32(values):
  """Numbers that float32 has, so that both sides are given the same."""
  return values if values.dtype.kind == "i" else values.astype(np.float32)


@pytest.mark.parametrize("name", FILTERS)
def test_filters_keep_what_the_peers_keep(peers, name):
  case = FILTERS[name]
  ours = vectors.compiled(getattr(truncation, name))
  exact, narrow = [], []
  for rng, logits in vectors.batches():
    values = float32(case.values(rng, *logits.shape))
    outs, laws = ours(logits, None, values), []
    for row, out, value in zip(logits, outs, values.tolist(), strict=True):
      processor = getattr(peers[2], case.peer)(value)
      undecided = functools.partial(case.undecided, value, 1e-6)
      laws.append(called(peers, processor, row))
      exact.append(vectors.judge(row, out, laws[-1], undecided))
      theirs = called(peers, processor, row, dtype="float32")
      undecided = functools.partial(case.undecided, value, 1e-6 + 6e-8 * row.size)
      narrow.append(vectors.judge(row, out, theirs, undecided))
    equal = [verdict == "equal" for verdict in exact[-len(logits) :]]
    vectors.same_law(outs[equal], np.stack(laws)[equal])
  counts = vectors.report(name, exact)
  vectors.report(f"{name}, float32", narrow)
  assert counts["rounding"] <= 20
  assert counts["underflow"] <= 40 * (name == "top_h_partial")


class Edit(NamedTuple):
  """A transform of the text so far, its peer, and the values that both are tried with."""

  make: Callable  # (V) -> (value [B]) -> transform
  peer: Callable  # (logits_process, V, value, prompt length) -> processor
  values: Callable = lambda rng, rows, size: np.zeros(rows, int)  # (rng, rows, V) -> [rows]
  rtol: float = 3e-7


def stops(size):
  """Two tokens that stop, or one of two."""
  return sorted({0, size // 2})[: size - 1]


def words(size):
  """Bad words of one to three tokens, of the few tokens that histories are made of."""
  return [[1], [0, 1], [1, 0], [0, 0, 0], [min(2, size - 1), 0]][: 5 if size > 2 else 3]


def bias(size):
  rng = np.random.default_rng(size)
  return {int(token): float(np.float32(rng.normal())) for token in rng.permutation(size)[:100]}


EDITS = {
  "temperature": Edit(
    lambda size: logits_lib.temperature,
    lambda process, size, value, prompt: process.TemperatureLogitsWarper(value),
    shares(0.1, 0.7, 1.0, low=0.05, high=5),
  ),
  "repetition_penalty": Edit(
    lambda size: history.repetition_penalty,
    lambda process, size, value, prompt: process.RepetitionPenaltyLogitsProcessor(value),
    shares(1.0, 1.1, 1.3, low=0.5, high=3),
  ),
  "no_repeat_ngram": Edit(
    lambda size: history.no_repeat_ngram,
    lambda process, size, value, prompt: process.NoRepeatNGramLogitsProcessor(value),
    lambda rng, rows, size: rng.integers(1, 5, rows),
  ),
  "logit_bias": Edit(
    lambda size: lambda value: constraints.logit_bias(bias(size)),
    lambda process, size, value, prompt: process.SequenceBiasLogitsProcessor(
      {(token,): value for token, value in bias(size).items()}
    ),
  ),
  "suppress": Edit(
    lambda size: lambda value: constraints.suppress(stops(size)),
    lambda process, size, value, prompt: process.SuppressTokensLogitsProcessor(stops(size)),
  ),
  "bad_words": Edit(
    lambda size: lambda value: constraints.bad_words(words(size)),
    lambda process, size, value, prompt: process.NoBadWordsLogitsProcessor(words(size)),
  ),
  "min_new_tokens": Edit(
    lambda size: lambda value: constraints.min_new_tokens(value, stops(size)),
    lambda process, size, value, prompt: process.MinNewTokensLengthLogitsProcessor(
      prompt, value, stops(size)
    ),
    lambda rng, rows, size: rng.integers(0, 12, rows),
  ),
  "min_length": Edit(
    lambda size: lambda value: constraints.min_length(value, stops(size)),
    lambda process, size, value, prompt: process.MinLengthLogitsProcessor(value, stops(size)),
    lambda rng, rows, size: rng.integers(0, 20, rows),
  ),
  "exponential_length_decay": Edit(
    lambda size: lambda value: constraints.exponential_length_decay(value, 1.25, stops(size)),
    lambda process, size, value, prompt: process.ExponentialDecayLengthPenalty(
      (value, 1.25), stops(size), prompt
    ),
    lambda rng, rows, size: rng.integers(0, 8, rows),
    rtol=5e-6,  # of z + |z| g, which cancels
  ),
}
LEAVES_NOTHING = {"no_repeat_ngram", "suppress", "bad_words", "min_new_tokens", "min_length"}


@pytest.mark.parametrize("name", EDITS)
def test_edits_equal_the_peers(peers, name):
  case, verdicts = EDITS[name], []
  for rng, logits in vectors.batches():
    rows, size = logits.shape
    context = vectors.histories(rng, rows, size)
    values = float32(case.values(rng, rows, size))
    outs = vectors.compiled(case.make(size))(logits, context, values)
    theirs = np.stack(
      [
        called(
          peers,
          case.peer(peers[2], size, value, int(context.prompt_length[b])),
          logits[b],
          vectors.text(context, b),
        )
        for b, value in enumerate(values.tolist())
      ]
    )
    nothing = ~np.any(theirs > -INF, axis=1)
    theirs = np.where(nothing[:, None], logits, theirs)
    np.testing.assert_allclose(outs, theirs, rtol=case.rtol)
    verdicts += ["nothing left" if none else "equal" for none in nothing]
  counts = vectors.report(name, verdicts)
  assert (counts["nothing left"] > 0) == (name in LEAVES_NOTHING)


def test_log_prob_is_their_normalised_logit(peers):
  for rng, logits in vectors.batches():
    theirs = np.stack([called(peers, peers[2].LogitNormalization(), row) for row in logits])
    token = rng.integers(logits.shape[1], size=len(logits))
    ours = jax.jit(logits_lib.log_prob)(jnp.asarray(logits), jnp.asarray(token))
    theirs = np.take_along_axis(theirs, token[:, None], axis=1)[:, 0]
    np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=2e-6)
