"""Every transform that llama.cpp has, on 1,000 vectors each, against llama-cpp-python.

llama.cpp computes in float32 and adds probabilities up one by one, which may be off by V 2^-24: the
precision that boundaries are judged at. `make test-llamacpp PYTEST_FLAGS=-rP` prints the counts.
"""

import contextlib
import ctypes
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.sampling import feedback, history, truncation
from ancestral.sampling import logits as logits_lib
from parity import boundaries, llamacpp, vectors

INF = np.inf
pytestmark = pytest.mark.llamacpp


class Filter(NamedTuple):
  """A truncation, its peer, the values that both are tried with, and its boundary."""

  make: Callable
  peer: Callable  # (llama_cpp, value) -> sampler
  values: Callable  # (rng, rows, V) -> [rows]
  undecided: Callable
  tie: Callable | None = None


def numbers(low, high):
  return lambda rng, rows, size: rng.uniform(low, high, rows).astype(np.float32)


FILTERS = {
  "exact_top_k": Filter(
    truncation.exact_top_k,
    lambda peer, value: peer.llama_sampler_init_top_k(value),
    lambda rng, rows, size: rng.integers(1, min(size, 300) + 2, rows),
    boundaries.never,
  ),
  "top_p": Filter(
    truncation.top_p,
    lambda peer, value: peer.llama_sampler_init_top_p(value, 1),
    numbers(0.01, 0.99),
    boundaries.top_p,
  ),
  "min_p": Filter(
    truncation.min_p,
    lambda peer, value: peer.llama_sampler_init_min_p(value, 1),
    numbers(0, 1),
    boundaries.min_p,
  ),
  "typical": Filter(
    truncation.typical,
    lambda peer, value: peer.llama_sampler_init_typical(value, 1),
    numbers(0.01, 0.99),
    boundaries.typical,
    boundaries.typicality,
  ),
  "top_n_sigma": Filter(
    truncation.top_n_sigma,
    lambda peer, value: peer.llama_sampler_init_top_n_sigma(value),
    numbers(0.1, 4),
    boundaries.top_n_sigma,
  ),
  "xtc, always": Filter(
    lambda value: truncation.xtc(jnp.ones(value.shape), value),
    lambda peer, value: peer.llama_sampler_init_xtc(1.0, value, 1, 0),
    numbers(0.001, 0.7),
    boundaries.xtc,
  ),
}


def underflows(row):
  """Whether the entropy is NaN in llama.cpp, which adds up p log p where p is 0 in float32."""
  finite = row[row > -INF]
  return bool(np.any(np.exp(finite - finite.max()) == 0))


@pytest.mark.parametrize("name", FILTERS)
def test_filters_keep_what_the_peer_keeps(peer, name):
  case, verdicts = FILTERS[name], []
  ours = vectors.compiled(case.make)
  for rng, logits in vectors.batches():
    values = case.values(rng, *logits.shape)
    outs = ours(logits, None, values)
    for row, out, value in zip(logits, outs, values.tolist(), strict=True):
      with llamacpp.sampler(peer, case.peer(peer, value)) as sampler:
        theirs, _ = llamacpp.apply(peer, sampler, row)
      if name == "typical" and underflows(row):
        verdicts.append("undefined")
        continue
      undecided = functools.partial(case.undecided, value, 1e-6 + row.size * 2**-24)
      out = np.where(out > -INF, row, -INF)
      verdicts.append(vectors.judge(row, out, theirs, undecided, case.tie))
  counts = vectors.report(name, verdicts)
  assert counts["rounding"] <= 30
  assert (counts["ties"] > 0) == (counts["undefined"] > 0) == (name == "typical")


class Edit(NamedTuple):
  """A transform that changes logits, its peer, the values of both, and the precision."""

  make: Callable  # (values [B] ..) -> transform
  peer: Callable  # (llama_cpp, V, value ..) -> sampler
  values: tuple[Callable, ...]  # each (rng, rows, V) -> [rows]
  precision: float = 1e-6


def integers(low, high):
  return lambda rng, rows, size: rng.integers(low, high, rows)


def penalties(n, repeat, frequency, presence):
  recent = history.last(n)
  return logits_lib.chain(
    history.repetition_penalty(repeat, recent),
    history.frequency_penalty(frequency, recent),
    history.presence_penalty(presence, recent),
  )


EDITS = {
  "temperature": Edit(
    logits_lib.temperature,
    lambda peer, size, value: peer.llama_sampler_init_temp(value),
    (lambda rng, rows, size: numbers(0, 3)(rng, rows, size) * (rng.random(rows) < 0.8),),
  ),
  "dynamic_temperature": Edit(
    logits_lib.dynamic_temperature,
    lambda peer, size, *values: peer.llama_sampler_init_temp_ext(*values),
    (numbers(1, 2), numbers(0, 0.9), numbers(1, 3)),
    2e-3,  # of entropy: llama.cpp's sum of 50,257 terms
  ),
  "penalties": Edit(
    penalties,
    lambda peer, size, *values: peer.llama_sampler_init_penalties(size, *values),
    (integers(1, 30), numbers(0.8, 2), numbers(-1, 2), numbers(-1, 2)),
  ),
  "dry": Edit(
    lambda n, multiplier, base, allowed: history.dry(multiplier, base, allowed, history.last(n)),
    lambda peer, size, n, *values: peer.llama_sampler_init_dry(None, *values, n, None, 0),
    (integers(1, 30), numbers(0, 2), numbers(1, 3), integers(1, 5)),
    1e-5,
  ),
}


def edited(peer, case, logits, context, values):
  """What the peer makes of logits [B, V], with values [B] ..."""
  out = []
  for b, row in enumerate(logits):
    made = case.peer(peer, row.size, *(value[b].item() for value in values))
    with llamacpp.sampler(peer, made, vectors.text(context, b)) as sampler:
      out.append(llamacpp.apply(peer, sampler, row)[0])
  return np.stack(out)


@pytest.mark.parametrize("name", EDITS)
def test_edits_equal_the_peers(peer, name):
  case, verdicts = EDITS[name], []
  ours = vectors.compiled(case.make)
  for rng, logits in vectors.batches():
    context = vectors.histories(rng, *logits.shape)
    values = tuple(draw(rng, *logits.shape) for draw in case.values)
    outs = ours(logits, context, *values)
    if name == "dynamic_temperature":  # llama.cpp leaves a single candidate as it is; so does a law
      outs = np.where(np.sum(logits > -INF, axis=1, keepdims=True) == 1, logits, outs)
    theirs = edited(peer, case, logits, context, values)
    np.testing.assert_allclose(outs, theirs, rtol=case.precision, atol=5e-6)
    vectors.same_law(outs, theirs, max(case.precision, 1e-4))
    verdicts += ["equal"] * len(logits)
  vectors.report(name, verdicts)


def test_dry_breakers_equal_the_peers(peer, tmp_path):
  """Tokens a to h and two longer ones; a breaker is any way to write the string."""
  llamacpp.write_vocabulary(tmp_path / "vocabulary.gguf", [*"abcdefgh", "xc", "bd"])
  a, b, c, d, xc, bd = 3, 4, 5, 6, 11, 12
  strings, breakers = ["c", "da", "efg"], [[c], [xc], [d, a], [bd, a], [7, 8, 9]]
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(1000, 13)).astype(np.float32)
  context = vectors.histories(rng, 1000, 13, room=40)
  alphabet = np.array([[a, b, d, c], [a, b, bd, a], [7, 8, 9, a], [a, b, xc, d]])
  tokens = alphabet[rng.integers(4, size=1000)[:, None], context.tokens % 4].astype(np.int32)
  context = context._replace(tokens=tokens)
  ours = vectors.compiled(lambda: history.dry(1.5, 1.25, 1, breakers=breakers))(logits, context)
  free = vectors.compiled(lambda: history.dry(1.5, 1.25, 1))(logits, context)
  encoded = (ctypes.c_char_p * 3)(*(string.encode() for string in strings))
  theirs = []
  with llamacpp.vocabulary(peer, tmp_path / "vocabulary.gguf") as vocabulary:
    for b, row in enumerate(logits):
      made = peer.llama_sampler_init_dry(vocabulary, 1.5, 1.25, 1, 64, encoded, 3)
      with llamacpp.sampler(peer, made, vectors.text(context, b)) as sampler:
        theirs.append(llamacpp.apply(peer, sampler, row)[0])
  np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=5e-6)
  assert np.mean(np.any(np.abs(ours - free) > 0.1, axis=1)) > 0.3  # breakers matter
  vectors.report("dry, breakers", ["equal"] * 1000)


def test_xtc_is_the_law_of_the_peers_coin(peer):
  ours, verdicts = vectors.compiled(truncation.xtc), []
  for rng, logits in vectors.batches():
    probability = rng.choice([0.0, 0.25, 0.7, 1.0], len(logits)).astype(np.float32)
    threshold = numbers(0.01, 0.6)(rng, *logits.shape)
    outs = targets.softmax(np.float64(ours(logits, None, probability, threshold)))
    for row, law, coin, least in zip(logits, outs, probability, threshold.tolist(), strict=True):
      with llamacpp.sampler(peer, peer.llama_sampler_init_xtc(1.0, least, 1, 0)) as sampler:
        excluded = targets.softmax(np.float64(llamacpp.apply(peer, sampler, row)[0]))
      mixture = (1 - coin) * targets.softmax(np.float64(row)) + coin * excluded
      if np.allclose(np.sort(law), np.sort(mixture), rtol=1e-4, atol=1e-6):
        verdicts.append("equal")
      else:
        assert boundaries.xtc(least, 1e-6 + row.size * 2**-24, row).any()
        verdicts.append("rounding")
  assert vectors.report("xtc, as a law", verdicts)["rounding"] <= 5


def test_xtc_coin_falls_as_often_as_its_probability(peer):
  row = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
  with llamacpp.sampler(peer, peer.llama_sampler_init_xtc(0.3, 0.15, 1, 7)) as sampler:
    left = [np.sum(llamacpp.apply(peer, sampler, row)[0] > -INF) for _ in range(4000)]
  assert set(left) == {2, 4}
  assert abs(np.mean(np.array(left) == 2) - 0.3) < 4 * (0.3 * 0.7 / 4000) ** 0.5


MIROSTATS = {
  "mirostat_truncated": (
    feedback.mirostat_truncated,
    lambda peer, size, seed, tau, eta: peer.llama_sampler_init_mirostat(size, seed, tau, eta, 100),
    boundaries.mirostat,
  ),
  "mirostat_v2_truncated": (
    feedback.mirostat_v2_truncated,
    lambda peer, size, seed, tau, eta: peer.llama_sampler_init_mirostat_v2(seed, tau, eta),
    boundaries.mirostat_v2,
  ),
}


def failure(mu, row, left):
  """Why llama.cpp keeps one token where it fails: its last rank is NaN, or beyond int32."""
  if np.sum(left > -INF) > 1:
    return None
  if underflows(row):
    return "undefined"
  return "overflow" if boundaries.zipf(mu, row)[1] >= 2**31 else None


SMOOTH = ("normal", "wide", "zipf", "bf16", "ties")  # nothing filtered


@contextlib.contextmanager
def samplers(peer, make, size, tau, eta):
  """A sampler per row, each with a seed of its own."""
  with contextlib.ExitStack() as stack:
    yield [
      stack.enter_context(llamacpp.sampler(peer, make(peer, size, seed, *row)))
      for seed, row in enumerate(zip(tau.tolist(), eta.tolist(), strict=True))
    ]


@pytest.mark.parametrize("name", MIROSTATS)
def test_mirostat_keeps_what_the_peer_keeps_from_token_to_token(peer, name):
  """25 texts of 40 tokens: the peer draws, and both are told."""
  make, theirs, boundary = MIROSTATS[name]
  verdicts = []
  for size, rows in {7: 10, 50: 10, 1000: 4, 32_000: 1}.items():
    rng = np.random.default_rng(size)
    tau = numbers(0.5, 6)(rng, rows, size)
    eta = rng.choice([0.1, 0.5, 1.0], rows).astype(np.float32)
    transform = make(tau, eta)
    apply = jax.jit(lambda logits, mu, transform=transform: transform.apply(logits, None, mu))
    update, mu = jax.jit(transform.update), transform.init(rows)
    with samplers(peer, theirs, size, tau, eta) as peers:
      for _ in range(40):
        logits = np.stack([vectors.row(rng.choice(SMOOTH), rng, size) for _ in range(rows)])
        outs, tokens, new = np.asarray(apply(logits, mu)), np.zeros(rows, int), np.zeros(rows, bool)
        for b, (row, out) in enumerate(zip(logits, outs, strict=True)):
          left, drawn = llamacpp.apply(peer, peers[b], row)
          failed = name == "mirostat_truncated" and failure(float(mu[b]), row, left)
          undecided = functools.partial(boundary, float(mu[b]), 1e-5)
          verdicts.append(failed or vectors.judge(row, out, left, undecided))
          new[b] = verdicts[-1] != "equal"  # from here on their mu differ: another text
          if new[b]:
            peer.llama_sampler_reset(peers[b])
          else:
            tokens[b] = np.flatnonzero(out == row[drawn])[0]  # of equals, one that is kept here
        mu = jnp.where(new, transform.init(rows), update(logits, tokens, mu))
  counts = vectors.report(name, verdicts)
  assert counts["rounding"] <= 20
  assert (counts["overflow"] > 0) == (name == "mirostat_truncated")
