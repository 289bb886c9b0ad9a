"""Other libraries' settings, under their names, in their order and with their meaning.

    transform = presets.vllm(repetition_penalty=1.1, temperature=0.7, top_p=0.9)

A setting that is not given is absent: the libraries' own defaults are not applied, except of
numbers that only say how another setting works. Every number may be a scalar or [B], and what a
library calls off (a top_k of 0, say) is off here, in a row or in all.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from . import constraints, feedback, history, truncation
from . import logits as logits_lib

Number = float | jax.Array
Sequences = Sequence[Sequence[int]]


def _preset(order: Callable[..., list]) -> Callable[..., logits_lib.LogitsTransform]:
  """The chain of what `order` lists, Nones left out; names the setting that was meant."""
  known = list(inspect.signature(order).parameters)

  @functools.wraps(order)
  def preset(**settings):
    for name in sorted(settings.keys() - set(known)):
      meant = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
      hint = f"did you mean {meant[0]}?" if meant else f"it has {', '.join(known)}."
      raise TypeError(f"{order.__name__} has no setting {name}: {hint}")
    return logits_lib.chain(*(stage for stage in order(**settings) if stage is not None))

  return preset


def _given(make: Callable, value, *args):
  """make(value, ...), or None where the value is."""
  return None if value is None else make(value, *args)


def _positive(make: Callable, value, otherwise, *args):
  """make(value, ...), with `otherwise` in place of values that are not above 0."""
  return None if value is None else make(jnp.where(jnp.asarray(value) > 0, value, otherwise), *args)


_ALL = jnp.iinfo(jnp.int32).max  # a top_k that keeps everything


@_preset
def transformers(
  *,
  repetition_penalty: Number | None = None,
  no_repeat_ngram_size: Number | None = None,
  bad_words_ids: Sequences | None = None,
  min_length: Number | None = None,
  min_new_tokens: Number | None = None,
  exponential_decay_length_penalty: tuple[Number, Number] | None = None,
  suppress_tokens: Sequence[int] | None = None,
  begin_suppress_tokens: Sequence[int] | None = None,
  temperature: Number | None = None,
  top_h: Number | None = None,
  top_k: Number | None = None,
  top_p: Number | None = None,
  min_p: Number | None = None,
  typical_p: Number | None = None,
  epsilon_cutoff: Number | None = None,
  eta_cutoff: Number | None = None,
  eos_token_id: Sequence[int] = (),
):
  """The chain of transformers' `generate(do_sample=True)`, in the order of its version 5.23.

  Its own top_k is 50 unless it is set, 0 for none; here it is none. Of tokens that tie at the edge
  of top_p or top_h, transformers keeps some (its sort is unstable), this those of lowest index. A
  temperature of 0, which it refuses, is greedy. Left out: its sequence_bias, forced tokens,
  watermark and encoder penalties (`models.guided` is its guidance_scale, `constraints.constrain`
  its prefix_allowed_tokens_fn).

  Args:
    eos_token_id: the stop tokens that min_length, min_new_tokens and
      exponential_decay_length_penalty (start, factor) are about.
  """
  decay = exponential_decay_length_penalty
  return [
    _given(history.repetition_penalty, repetition_penalty),
    _given(history.no_repeat_ngram, no_repeat_ngram_size),
    # transformers lets a stop token be drawn even if it is a bad word.
    _given(constraints.bad_words, _without(bad_words_ids, eos_token_id)),
    _given(constraints.min_length, min_length, eos_token_id),
    _given(constraints.min_new_tokens, min_new_tokens, eos_token_id),
    None if decay is None else constraints.exponential_length_decay(*decay, eos_token_id),
    _given(constraints.suppress, suppress_tokens),
    _given(lambda tokens: constraints.min_new_tokens(1, tokens), begin_suppress_tokens),
    _given(logits_lib.temperature, temperature),
    _given(truncation.top_h_partial, top_h),
    _positive(truncation.top_k, top_k, _ALL),
    _given(truncation.top_p, top_p),
    _given(truncation.min_p, min_p),
    _given(truncation.typical, typical_p),
    _given(truncation.epsilon, epsilon_cutoff),
    _given(truncation.eta, eta_cutoff),
  ]


def _without(sequences, tokens):
  if sequences is None:
    return None
  return [sequence for sequence in sequences if list(sequence) not in [[token] for token in tokens]]


@_preset
def vllm(
  *,
  allowed_token_ids: Sequence[int] | None = None,
  bad_words: Sequences | None = None,
  min_tokens: Number | None = None,
  logit_bias: Mapping[int, float] | jax.Array | None = None,
  repetition_penalty: Number | None = None,
  frequency_penalty: Number | None = None,
  presence_penalty: Number | None = None,
  temperature: Number | None = None,
  min_p: Number | None = None,
  top_k: Number | None = None,
  top_p: Number | None = None,
  stop_token_ids: Sequence[int] = (),
):
  """The chain of vLLM's SamplingParams, in the order of its version 0.33.

  A temperature below 1e-5 is greedy; a top_k of 0 or -1 keeps everything. Repetition counts prompt
  and output, frequency, presence and bad words the output.

  Args:
    bad_words: token sequences; vLLM takes strings, and tokenises each with and without a space.
    stop_token_ids: the stop tokens that min_tokens is about.
  """
  return [
    _given(constraints.allow, allowed_token_ids),
    _given(constraints.bad_words, bad_words, history.output),
    _given(constraints.min_new_tokens, min_tokens, stop_token_ids),
    _given(constraints.logit_bias, logit_bias),
    _given(history.repetition_penalty, repetition_penalty),
    _given(history.frequency_penalty, frequency_penalty),
    _given(history.presence_penalty, presence_penalty),
    _given(lambda t: logits_lib.temperature(jnp.where(jnp.asarray(t) < 1e-5, 0, t)), temperature),
    _given(truncation.min_p, min_p),
    _positive(truncation.top_k, top_k, _ALL),
    _given(truncation.top_p, top_p),
  ]


@_preset
def llamacpp(
  *,
  logit_bias: Mapping[int, float] | jax.Array | None = None,
  penalty_last_n: Number = 64,
  penalty_repeat: Number | None = None,
  penalty_freq: Number | None = None,
  penalty_present: Number | None = None,
  dry_multiplier: Number | None = None,
  dry_base: Number = 1.75,
  dry_allowed_length: Number = 2,
  dry_penalty_last_n: Number = 64,
  dry_sequence_breakers: Sequences = (),
  top_n_sigma: Number | None = None,
  top_k: Number | None = None,
  typ_p: Number | None = None,
  top_p: Number | None = None,
  min_p: Number | None = None,
  xtc_probability: Number | None = None,
  xtc_threshold: Number = 0.1,
  temp: Number | None = None,
  dynatemp_range: Number | None = None,
  dynatemp_exponent: Number = 1.0,
  mirostat: int = 0,
  mirostat_tau: Number = 5.0,
  mirostat_eta: Number = 0.1,
):
  """The default chain of llama.cpp's common_sampler (of August 2026; llama-cpp-python 0.3.36).

  Temperature comes last. All penalties count the last n tokens of prompt and output. With mirostat
  1 or 2, only logit_bias and temp are used besides, and everything else is ignored, as there; the
  controlled surprise is llama.cpp's too (`feedback` has the paper's). Its top_k 40, top_p 0.95,
  min_p 0.05 and temp 0.8 apply there unless they are set; here they do not. XTC is its exact law
  instead of a coin. A dynatemp_range right after top_n_sigma is narrower there, where the tokens
  that top_n_sigma filtered still count in H_max. Left out: adaptive-p, infill, grammars
  (`constraints.constrain`).

  Args:
    dry_sequence_breakers: token sequences; llama.cpp takes strings, a newline, a colon, a quotation
      mark and an asterisk by default.
  """
  bias = _given(constraints.logit_bias, logit_bias)
  temp = _given(lambda t: jnp.maximum(jnp.asarray(t, jnp.float32), 0), temp)
  if mirostat not in (0, 1, 2):
    raise ValueError(f"mirostat is {mirostat}: it has to be 0 (none), 1 or 2.")
  if mirostat:
    controlled = (feedback.mirostat_truncated, feedback.mirostat_v2_truncated)[mirostat - 1]
    tempered = 1.0 if temp is None else temp
    return [controlled(mirostat_tau, mirostat_eta, temperature=tempered, before=bias)]
  recent = history.last(penalty_last_n)
  tempered = _tempered(temp, dynatemp_range, dynatemp_exponent)
  return [
    bias,
    _given(history.repetition_penalty, penalty_repeat, recent),
    _given(history.frequency_penalty, penalty_freq, recent),
    _given(history.presence_penalty, penalty_present, recent),
    _given(
      history.dry,
      dry_multiplier,
      dry_base,
      dry_allowed_length,
      history.last(dry_penalty_last_n),
      dry_sequence_breakers,
    ),
    _positive(truncation.top_n_sigma, top_n_sigma, jnp.inf),
    _positive(truncation.exact_top_k, top_k, _ALL),
    _given(truncation.typical, typ_p),
    _given(truncation.top_p, top_p),
    _given(truncation.min_p, min_p),
    # The coin comes before the temperature, so the mixture is of two tempered laws.
    tempered
    if xtc_probability is None
    else truncation.xtc(xtc_probability, xtc_threshold, tempered),
  ]


def _tempered(temp, spread, exponent):
  if spread is None:
    return _given(logits_lib.temperature, temp)
  return logits_lib.dynamic_temperature(1.0 if temp is None else temp, spread, exponent)
