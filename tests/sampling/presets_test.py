"""Presets: against the libraries themselves, where they are installed, and by hand."""

import collections
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.sampling import feedback, presets
from ancestral.sampling import logits as logits_lib

INF = np.inf


def contexts(rows, width=12, vocab_size=8, seed=0):
  """Ragged rows; beyond their length, anything at all."""
  rng = np.random.default_rng(seed)
  length = rng.integers(2, width + 1, rows)
  prompt = rng.integers(1, length)
  garbage = rng.integers(-9, 3 * vocab_size, (rows, width))
  inside = np.arange(width) < length[:, None]
  tokens = np.where(inside, rng.integers(0, vocab_size, (rows, width)), garbage)
  return logits_lib.Context(*(jnp.asarray(x, jnp.int32) for x in (tokens, length, prompt)))


def random_logits(rows, vocab_size=20, seed=1):
  return (3 * np.random.default_rng(seed).normal(size=(rows, vocab_size))).astype(np.float32)


def transformed(transform, logits, context):
  logits = jnp.asarray(logits)
  return np.asarray(jax.jit(transform.apply)(logits, context, transform.init(len(logits))))


def assert_equal_but_at_edges(out, expected, most):
  """Equal logits, but for a token in at most so many rows, where float32 cut a sum elsewhere."""
  agree = np.isneginf(out) == np.isneginf(expected)
  wrong = ~agree.all(axis=1)
  assert wrong.sum() <= most and np.all((~agree).sum(axis=1) <= 1)
  np.testing.assert_allclose(out[~wrong], expected[~wrong], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("preset", [presets.transformers, presets.vllm, presets.llamacpp])
def test_nothing_set_is_nothing_done(preset):
  logits = random_logits(5)
  out = transformed(preset(), logits, contexts(5))
  np.testing.assert_array_equal(out.view(np.uint32), logits.view(np.uint32))


def test_what_a_library_calls_off_is_off_bit_by_bit():
  logits, context = random_logits(5), contexts(5)
  off = [
    presets.transformers(
      repetition_penalty=1.0,
      no_repeat_ngram_size=0,
      min_length=0,
      min_new_tokens=0,
      temperature=1.0,
      top_k=0,
      top_p=1.0,
      min_p=0.0,
      typical_p=1.0,
      epsilon_cutoff=0.0,
      eta_cutoff=0.0,
    ),
    presets.vllm(
      min_tokens=0,
      repetition_penalty=1.0,
      frequency_penalty=0.0,
      presence_penalty=0.0,
      min_p=0.0,
      top_k=-1,
      top_p=1.0,
    ),
    presets.llamacpp(
      penalty_last_n=0,
      penalty_repeat=2.0,
      dry_multiplier=0.0,
      top_n_sigma=-1.0,
      top_k=0,
      typ_p=1.0,
      top_p=1.0,
      min_p=0.0,
      xtc_probability=0.0,
      temp=1.0,
    ),
    presets.llamacpp(xtc_probability=1.0, xtc_threshold=0.6, top_n_sigma=0),
    presets.vllm(top_k=jnp.array([0, -1, 20, 99, 0])),
  ]
  for transform in off:
    out = transformed(transform, logits, context)
    np.testing.assert_array_equal(out.view(np.uint32), logits.view(np.uint32))


def vllm_row(row, tokens, prompt, s):
  """The steps that vLLM's Sampler documents, in float64."""
  row, written = row.astype(np.float64), collections.Counter(tokens[prompt:])
  row[[v for v in range(row.size) if v not in s["allowed_token_ids"]]] = -INF
  for word in s["bad_words"]:
    if len(word) == 1 or tuple(tokens[prompt:][1 - len(word) :]) == tuple(word[:-1]):
      row[word[-1]] = -INF
  if len(tokens) - prompt < s["min_tokens"]:
    row[list(s["stop_token_ids"])] = -INF
  for token, value in s["logit_bias"].items():
    row[token] += value
  for token in set(tokens):
    row[token] *= s["repetition_penalty"] if row[token] < 0 else 1 / s["repetition_penalty"]
  for token, count in written.items():
    row[token] -= s["frequency_penalty"] * count + s["presence_penalty"]
  row /= s["temperature"]
  law = targets.softmax(row)
  row[law < s["min_p"] * law.max()] = -INF
  row = targets.filtered(row[None], lambda row: targets.top_k_set(row, s["top_k"] or row.size))[0]
  return targets.filtered(row[None], lambda row: targets.top_p_set(row, s["top_p"]))[0]


def test_vllm_by_its_documented_steps():
  rng, rows = np.random.default_rng(0), 400
  fixed = {
    "allowed_token_ids": [v for v in range(20) if v not in (3, 11)],
    "bad_words": [[7], [1, 2], [4, 4], [0, 5, 6]],
    "logit_bias": {0: 2.0, 5: -1.5, 19: 4.0},
    "stop_token_ids": (2, 19),
  }
  numbers = {
    "min_tokens": rng.integers(0, 6, rows),
    "repetition_penalty": rng.choice([1.0, 1.3, 0.8], rows),
    "frequency_penalty": rng.choice([0.0, 0.4, -0.4], rows),
    "presence_penalty": rng.choice([0.0, 0.7], rows),
    "temperature": rng.choice([0.5, 1.0, 3.0], rows),
    "min_p": rng.choice([0.0, 0.02], rows),
    "top_k": rng.choice([0, 3, 8], rows),
    "top_p": rng.choice([1.0, 0.9, 0.6], rows),
  }
  logits, context = random_logits(rows), contexts(rows)
  out = transformed(
    presets.vllm(**fixed, **{name: jnp.asarray(value) for name, value in numbers.items()}),
    logits,
    context,
  )
  expected = np.stack(
    [
      vllm_row(
        logits[b],
        np.asarray(context.tokens)[b, : int(context.length[b])].tolist(),
        int(context.prompt_length[b]),
        {**fixed, **{name: value[b] for name, value in numbers.items()}},
      )
      for b in range(rows)
    ]
  )
  assert_equal_but_at_edges(out, expected, most=0)


def test_a_tiny_temperature_of_vllm_is_greedy():
  logits = np.array([[1.0, 1.00001, 0.0]] * 2, np.float32)
  out = transformed(presets.vllm(temperature=jnp.array([9e-6, 1e-4]), top_k=2), logits, contexts(2))
  np.testing.assert_array_equal(np.isfinite(out), [[0, 1, 0], [1, 1, 0]])


def test_temperature_comes_first_in_transformers_and_vllm_and_last_in_llamacpp():
  """Of (0.6, 0.3, 0.1), top_p 0.8 keeps two; at T = 3, (0.42, 0.34, 0.23), three."""
  logits, context = np.log([[0.6, 0.3, 0.1]]).astype(np.float32), contexts(1)
  kept = lambda transform: int(np.isfinite(transformed(transform, logits, context)).sum())
  assert kept(presets.transformers(temperature=3.0, top_p=0.8)) == 3
  assert kept(presets.vllm(temperature=3.0, top_p=0.8)) == 3
  assert kept(presets.llamacpp(temp=3.0, top_p=0.8)) == 2


def test_xtc_of_llamacpp_tosses_its_coin_before_the_temperature():
  logits = np.log([[0.6, 0.3, 0.1]]).astype(np.float32)
  transform = presets.llamacpp(xtc_probability=0.5, xtc_threshold=0.2, temp=0.5)
  law = targets.softmax(transformed(transform, logits, contexts(1)))[0]
  with_all = np.array([0.36, 0.09, 0.01]) / 0.46
  without_top = np.array([0, 0.09, 0.01]) / 0.10
  np.testing.assert_allclose(law, (with_all + without_top) / 2, rtol=1e-5)


@pytest.mark.parametrize(
  "version, controlled", [(1, feedback.mirostat_truncated), (2, feedback.mirostat_v2_truncated)]
)
def test_mirostat_of_llamacpp_uses_the_bias_and_temperature_alone(version, controlled):
  logits, context = random_logits(6), contexts(6)
  ignored = {"top_k": 1, "penalty_repeat": 5.0, "top_n_sigma": 0.1, "xtc_probability": 1.0}
  transform = presets.llamacpp(
    mirostat=version, mirostat_tau=2.0, temp=0.5, logit_bias={3: -INF}, **ignored
  )
  biased = logits.copy()
  biased[:, 3] = -INF
  alone = controlled(2.0, 0.1, temperature=0.5)
  np.testing.assert_array_equal(
    transformed(transform, logits, context), transformed(alone, biased, context)
  )
  assert np.isfinite(transformed(transform, logits, context)).sum() > 6  # not the top_k of 1
  assert jax.tree.leaves(transform.init(6))


@pytest.mark.parametrize(
  "make, error, message",
  [
    (lambda: presets.transformers(topk=3), TypeError, "no setting topk: did you mean top_k"),
    (lambda: presets.vllm(repeat_penalty=1.1), TypeError, "did you mean repetition_penalty"),
    (lambda: presets.llamacpp(penalty_repeats=1.1), TypeError, "did you mean penalty_repeat"),
    (lambda: presets.vllm(q=1), TypeError, "vllm has no setting q: it has allowed_token_ids, bad"),
    (lambda: presets.llamacpp(mirostat=3), ValueError, "mirostat is 3: it has to be 0"),
    (lambda: presets.transformers(top_p=1.5), ValueError, r"top_p\(1.5\)"),
  ],
)
def test_a_misspelt_setting_is_named(make, error, message):
  with pytest.raises(error, match=message):
    make()


def test_signatures_tell_the_settings():
  assert list(inspect.signature(presets.vllm).parameters)[-1] == "stop_token_ids"
  for preset in (presets.transformers, presets.vllm, presets.llamacpp):
    assert preset.__doc__
    assert {p.kind for p in inspect.signature(preset).parameters.values()} == {
      inspect.Parameter.KEYWORD_ONLY
    }
