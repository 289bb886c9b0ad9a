"""Whole chains against the library whose settings they take."""

import jax
import numpy as np
import pytest

import targets
from ancestral.sampling import logits as logits_lib
from ancestral.sampling import presets
from parity import llamacpp, vectors

INF = np.inf
STOP = (3, 7)
STATIC = {"bad_words_ids": [[1], [2, 4], [3]], "suppress_tokens": [5], "begin_suppress_tokens": [6]}


def settings(rng):
  """Every setting of `generate`, each on or off at random, where off is a number too."""

  def either(off, on):
    return on if rng.random() < 0.6 else off

  return {
    "repetition_penalty": either(1.0, rng.uniform(1.05, 2)),
    "no_repeat_ngram_size": either(0, int(rng.integers(1, 4))),
    "min_new_tokens": either(0, int(rng.integers(1, 12))),
    "exponential_decay_length_penalty": (int(rng.integers(0, 6)), either(1.0, 1.3)),
    "temperature": either(1.0, rng.uniform(0.3, 2.5)),
    "top_h": either(1.0, rng.uniform(0.4, 0.9)),
    "top_k": either(0, int(rng.integers(5, 40))),
    "top_p": either(1.0, rng.uniform(0.6, 0.99)),
    "min_p": either(0.0, rng.uniform(0.001, 0.05)),
    "typical_p": either(1.0, rng.uniform(0.6, 0.99)),
    "epsilon_cutoff": either(0.0, rng.uniform(1e-4, 0.01)),
    "eta_cutoff": either(0.0, rng.uniform(1e-4, 0.01)),
  }


@pytest.mark.peers
def test_transformers_scores_are_those_of_generate(peers):
  """Each token's logits, before and after, from 26 calls of `generate` with random settings."""
  torch, transformers, _ = peers
  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=60,
      hidden_size=32,
      intermediate_size=32,
      num_hidden_layers=1,
      num_attention_heads=2,
      bos_token_id=None,
      pad_token_id=0,
      initializer_range=0.5,
    )
  ).eval()
  ours = jax.jit(
    lambda logits, context, settings: presets.transformers(
      **settings, **STATIC, eos_token_id=STOP
    ).apply(logits, context, ())
  )
  rng, equal, total = np.random.default_rng(0), 0, 0
  for _ in range(26):
    given = settings(rng)
    top_h = {"top_h": given["top_h"]} if given["top_h"] < 1 else {"top_h": None}
    out = model.generate(
      torch.from_numpy(rng.integers(0, 60, (4, 5))),
      attention_mask=torch.ones((4, 5), dtype=torch.long),
      **{**given, **STATIC, **top_h},
      eos_token_id=list(STOP),
      do_sample=True,
      max_new_tokens=16,
      output_logits=True,
      output_scores=True,
      return_dict_in_generate=True,
    )
    tokens = np.zeros((4, 24), np.int32)
    tokens[:, : out.sequences.shape[1]] = out.sequences.numpy()
    for step, (before, after) in enumerate(zip(out.logits, out.scores, strict=True)):
      context = logits_lib.Context(tokens, np.full(4, 5 + step), np.full(4, 5))
      result = np.asarray(ours(before.numpy(), context, given))
      running = ~np.any(np.isin(tokens[:, 5 : 5 + step], STOP), axis=1)
      for row, expected in zip(result[running], after.numpy()[running], strict=True):
        same = np.array_equal(row > -INF, expected > -INF)
        equal += same and np.allclose(row, expected, rtol=1e-5)
        total += 1
  print(f"parity | presets.transformers | equal {equal} of {total}")
  assert total > 1000 and equal >= 0.995 * total


def stages(peer, size, given):
  """The samplers that llama.cpp's common_sampler_init chains by default, in its order."""
  last_n = given["penalty_last_n"]
  return [
    peer.llama_sampler_init_penalties(
      size, last_n, given["penalty_repeat"], given["penalty_freq"], given["penalty_present"]
    ),
    peer.llama_sampler_init_dry(None, given["dry_multiplier"], 1.75, 2, last_n, None, 0),
    peer.llama_sampler_init_top_n_sigma(given["top_n_sigma"]),
    peer.llama_sampler_init_top_k(given["top_k"]),
    peer.llama_sampler_init_typical(given["typ_p"], 1),
    peer.llama_sampler_init_top_p(given["top_p"], 1),
    peer.llama_sampler_init_min_p(given["min_p"], 1),
    peer.llama_sampler_init_xtc(given["xtc_probability"], given["xtc_threshold"], 1, 0),
    peer.llama_sampler_init_temp_ext(given["temp"], given["dynatemp_range"], 1.0),
  ]


@pytest.mark.llamacpp
def test_llamacpp_chain_is_that_of_its_samplers(peer):
  """500 rows of 50 and of 1,000 tokens, each setting on or off in each row.

  llama.cpp's top-n-sigma leaves candidates of -inf, which no other of its samplers does: typical
  then computes an entropy of NaN, and the dynamic temperature takes them for possible.
  """
  ours = jax.jit(
    lambda logits, context, given: presets.llamacpp(
      **given, dry_penalty_last_n=given["penalty_last_n"]
    ).apply(logits, context, ())
  )
  verdicts, rng, rows = [], np.random.default_rng(0), 500
  for size in (50, 1000):

    def either(off, on):
      return np.where(rng.random(rows) < 0.6, on, off).astype(np.asarray(on).dtype)

    def number(low, high):
      return rng.uniform(low, high, rows).astype(np.float32)

    given = {
      "penalty_last_n": rng.integers(1, 30, rows),
      "penalty_repeat": either(1, number(1, 2)),
      "penalty_freq": either(0, number(0, 1)),
      "penalty_present": either(0, number(0, 1)),
      "dry_multiplier": either(0, number(0, 2)),
      "top_n_sigma": either(-1, number(0.5, 3)),
      "top_k": either(0, rng.integers(2, 40, rows)),
      "typ_p": either(1, number(0.5, 0.99)),
      "top_p": either(1, number(0.5, 0.99)),
      "min_p": either(0, number(0.01, 0.2)),
      "xtc_probability": either(0, np.ones(rows, np.float32)),
      "xtc_threshold": number(0.02, 0.3),
      "temp": number(0.5, 2),
      "dynatemp_range": either(0, number(0, 0.4)),
    }
    kinds = ("normal", "zipf")  # without ties
    logits = np.stack([vectors.row(kinds[b % 2], rng, size) for b in range(rows)])
    context = vectors.histories(rng, rows, size)
    outs = np.asarray(ours(logits, context, given))
    for b, (row, out) in enumerate(zip(logits, outs, strict=True)):
      made = stages(peer, size, {name: value[b].item() for name, value in given.items()})
      text = vectors.text(context, b)
      with llamacpp.sampler(peer, llamacpp.chain(peer, made), text) as sampler:
        theirs, _ = llamacpp.apply(peer, sampler, row)
      law, expected = (np.sort(targets.softmax(np.float64(z))) for z in (out, theirs))
      if np.allclose(law, expected, rtol=1e-3, atol=1e-6):
        verdicts.append("equal")
      else:
        miscounts = given["typ_p"][b] < 1 or given["dynatemp_range"][b] > 0
        assert given["top_n_sigma"][b] > 0 and miscounts, (out, theirs)
        verdicts.append("filtered counted")
  counts = vectors.report("presets.llamacpp", verdicts)
  assert counts["equal"] >= 900
