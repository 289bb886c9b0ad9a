"""Continuous refill: the same results as alone, few steps, few programs."""

import functools
import heapq

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.models import toy
from ancestral.sampling import (
  base,
  decode,
  draft_trees,
  logits,
  lookup,
  serve,
  speculative,
  trees,
  truncation,
)

SETTINGS = {"temperature": 1.0, "top_k": 100}
TARGETS = {
  "table": lambda: targets.table_target(vocab_size=23, order=2),
  "transformer": lambda: targets.tiny_target(num_layers=1),
}


def transform(settings):
  return logits.chain(
    logits.temperature(settings["temperature"]), truncation.top_k(settings["top_k"])
  )


def mixed_requests(num, seed=0, max_new_tokens=12):
  """Prompts, lengths and settings of all kinds."""
  rng = np.random.default_rng(seed)
  return [
    serve.Request(
      rng.integers(0, 23, rng.integers(1, 9)).tolist(),
      int(rng.integers(1, max_new_tokens)),
      seed=100 + index,
      settings=[{}, {"temperature": 0.5}, {"top_k": 2}, {"temperature": 2.0, "top_k": 5}][
        index % 4
      ],
    )
    for index in range(num)
  ]


def together(target, requests, stop=()):
  """The requests in one batch without refill: (tokens, log_prob, model_log_prob) of each."""
  model, params = target
  lengths = np.array([len(request.prompt) for request in requests], np.int32)
  tokens = np.zeros((len(requests), lengths.max()), np.int32)
  for row, request in zip(tokens, requests, strict=True):
    row[: len(request.prompt)] = request.prompt
  settings = {
    name: jnp.asarray([{**SETTINGS, **request.settings}[name] for request in requests])
    for name in SETTINGS
  }
  bounds = jnp.asarray([request.max_new_tokens for request in requests])

  @jax.jit
  def sample(params, keys, prompts, settings, bounds):
    algorithm = decode.autoregressive(
      model, params, max_length=24, max_new_tokens=bounds, transform=transform(settings), stop=stop
    )
    algorithm = base.recorded(algorithm, lambda state, info: info, 12)
    state = base.start(keys, algorithm, prompts)
    return base.run_until(keys, algorithm, state, lambda state: state.state.done, 12)

  keys = base.row_keys(jax.random.key(3), jnp.asarray([request.seed for request in requests]))
  final = jax.device_get(sample(params, keys, decode.Prompts(tokens, lengths), settings, bounds))
  drawn = final.record.token, final.record.log_prob, final.record.model_log_prob
  return [tuple(leaf[b, :count] for leaf in drawn) for b, count in enumerate(final.state.step)]


def by_index(results):
  return sorted(results, key=lambda result: result.index)


def decoding(model):
  return functools.partial(decode.autoregressive, model)


@pytest.mark.parametrize("target", TARGETS)
def test_results_are_those_without_refill(target):
  target, requests = TARGETS[target](), mixed_requests(9)
  expected = together(target, requests, stop=(7,))
  assert len({len(tokens) for tokens, *_ in expected}) > 3
  for rows, chunk, bucket in ((4, 3, 8), (1, 5, 24)):
    run = serve.server(
      decoding(target[0]),
      transform,
      settings=SETTINGS,
      rows=rows,
      vocab_size=23,
      max_length=24,
      stop=(7,),
      chunk=chunk,
      bucket=bucket,
      prefill_chunk=3,
    )
    results = by_index(run(target[1], jax.random.key(3), requests))
    assert [result.index for result in results] == list(range(9))
    for result, (tokens, log_prob, model_log_prob) in zip(results, expected, strict=True):
      np.testing.assert_array_equal(result.tokens, tokens)
      np.testing.assert_allclose(result.log_prob, log_prob, atol=2e-5)
      np.testing.assert_allclose(result.model_log_prob, model_log_prob, atol=2e-5)
      assert result.reason == ("stop" if 7 in result.tokens else "length")


@functools.cache
def speculating(drafter_of):
  """A decoder of params {"target", "draft"}; drafter_of: (draft's params, transform) -> Drafter."""

  def decoder(params, *, transform, **kwargs):
    drafter = drafter_of(params["draft"], transform)
    model, _ = targets.table_target(vocab_size=23, order=2)
    return speculative.speculative(model, params["target"], drafter, transform=transform, **kwargs)

  return decoder


SPECULATING = {
  "tree": lambda params, transform: draft_trees.by_model(
    toy.table(23, 2), params, parents=trees.branching((2, 2)), transform=transform
  ),
  "suffix": lambda params, transform: lookup.suffix(23, num_drafts=3),
}


@pytest.mark.parametrize("drafter", ["tree", pytest.param("suffix", marks=pytest.mark.slow)])
def test_speculation_is_served_as_it_is_drawn_alone(drafter):
  _, target = targets.table_target(vocab_size=23, order=2)
  params = {"target": target, "draft": target + 0.5 * jnp.roll(target, 1)}
  greedy = [request._replace(settings={"top_k": 1}) for request in mixed_requests(4)]
  requests = mixed_requests(9) + greedy
  run = lambda rows, chunk, bucket: serve.server(
    speculating(SPECULATING[drafter]),
    transform,
    settings=SETTINGS,
    rows=rows,
    vocab_size=23,
    max_length=24,
    stop=(7,),
    chunk=chunk,
    bucket=bucket,
  )
  results, alone = (
    by_index(run(*how)(params, jax.random.key(3), requests)) for how in ((4, 2, 8), (1, 3, 24))
  )
  for result, one in zip(results, alone, strict=True):
    assert result.tokens == one.tokens and result.num_calls == one.num_calls
    np.testing.assert_allclose(result.log_prob, one.log_prob, atol=2e-5)
    assert result.reason == ("stop" if 7 in result.tokens else "length")
  if drafter != "suffix":
    assert sum(r.num_calls for r in results) < sum(len(r.tokens) for r in results)
  plain = together((toy.table(23, 2), target), greedy, stop=(7,))
  for result, (tokens, *_) in zip(results[9:], plain, strict=True):
    np.testing.assert_array_equal(result.tokens, tokens)


def table_server(**kwargs):
  model, params = targets.table_target(vocab_size=23, order=2)
  kwargs = {
    "settings": SETTINGS,
    "rows": 4,
    "vocab_size": 23,
    "max_length": 64,
    "chunk": 4,
    "bucket": 64,
  } | kwargs
  run = serve.server(decoding(kwargs.pop("model", model)), transform, **kwargs)
  return lambda requests, **watch: list(run(params, jax.random.key(3), requests, **watch))


def test_one_program_for_each_bucket_whatever_the_requests():
  model, _ = targets.table_target(vocab_size=23, order=2)
  traced = []

  def trunk(params, x, cache=None, **kwargs):
    traced.append((x.shape[1], cache.tokens.shape[1]))
    return model.trunk(params, x, cache, **kwargs)

  run = table_server(model=model._replace(trunk=trunk), bucket=16, prefill_chunk=4)
  run([*mixed_requests(20), serve.Request([1] * 20, 15)])
  assert {slots for _, slots in traced} == {16, 32, 64}
  before = len(traced)
  assert before <= 3 * 3  # of each bucket a step, and the prefill's shape and value
  run([*mixed_requests(20, seed=1, max_new_tokens=15), serve.Request([2] * 25, 9)])
  assert len(traced) == before


def test_params_placed_on_a_device_compile_no_more_than_others():
  model, params = targets.table_target(vocab_size=23, order=2)
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
  )
  counts = []
  for given in (params, params, jax.device_put(params, jax.devices()[0])):
    run = serve.server(
      decoding(model), transform, settings=SETTINGS, rows=2, vocab_size=23, max_length=32, bucket=32
    )
    before = len(compiled)
    list(run(given, jax.random.key(3), mixed_requests(4)))
    counts.append(len(compiled) - before)
  assert 2 <= counts[2] <= counts[1]  # the first compiles what is not its own, too


def greedy_schedule(lengths, rows):
  """Steps that a list schedule takes: the next request goes to the row that is free first."""
  free = [0] * rows
  for length in lengths:
    heapq.heapreplace(free, free[0] + length)
  return max(free)


def test_steps_are_those_of_the_greedy_schedule_but_for_the_chunk():
  rows, chunk = 4, 4
  lengths = np.minimum(np.random.default_rng(0).geometric(1 / 12, 50 * rows), 60)
  requests = [serve.Request([1], int(n), seed=i) for i, n in enumerate(lengths)]
  steps = []
  results = table_server(rows=rows, chunk=chunk)(
    requests, on_chunk=lambda progress: steps.append(progress.num_steps)
  )
  assert [len(result.tokens) for result in by_index(results)] == lengths.tolist()
  ideal = greedy_schedule(lengths, rows)
  assert ideal <= steps[-1] <= (1 + chunk / lengths.mean()) * ideal
  waiting_for_all = lengths.reshape(-1, rows).max(axis=1).sum()
  assert steps[-1] < 0.7 * waiting_for_all
  assert steps == [chunk * (i + 1) for i in range(len(steps))]


def test_chunks_are_streamed():
  streamed, requests = {}, mixed_requests(10)

  def watch(progress):
    assert 1 <= progress.num_active <= 4
    started = progress.num_finished + progress.num_waiting
    assert 10 - 4 <= started <= 10
    for index, tokens in progress.drawn.items():
      streamed.setdefault(index, []).append(tokens)

  results = table_server()(requests, on_chunk=watch)
  for result in results:
    assert result.tokens == [token for tokens in streamed[result.index] for token in tokens]
  assert max(len(chunks) for chunks in streamed.values()) > 2


def test_equal_seeds_draw_alike_and_others_do_not():
  requests = [serve.Request([1, 2], 12, seed=seed) for seed in (5, 6, 5, 7)]
  one, two, three, four = [result.tokens for result in by_index(table_server()(requests))]
  assert one == three and one != two and one != four


def letters(tokens):
  """Three letters a token, so that strings cross tokens."""
  return "".join(3 * chr(ord("a") + token) for token in tokens)


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_stop_string_ends_a_request_wherever_tokens_split_it(chunk):
  requests = [serve.Request([1], 40, seed=seed) for seed in range(6)]
  free = by_index(table_server()(requests))
  pairs = [result.tokens[4:6] for result in free]
  strings = [letters(pair)[1:5] for pair in pairs]  # two letters of each of two tokens
  assert len(set(strings)) > 3
  stopped = by_index(
    table_server(chunk=chunk)(
      [
        request._replace(ending=serve.stop_strings(letters, [string, "never"]))
        for request, string in zip(requests, strings, strict=True)
      ]
    )
  )
  for result, whole, string in zip(stopped, free, strings, strict=True):
    count = len(result.tokens)
    assert result.reason == "ending" and result.tokens == whole.tokens[:count]
    assert string in letters(result.tokens) and string not in letters(result.tokens[:-1])
    np.testing.assert_array_equal(result.log_prob, whole.log_prob[:count])


def test_no_requests_are_no_results():
  assert table_server()([]) == []


def test_sequences_end_at_max_length():
  (result,) = table_server()([serve.Request([1] * 60, 40)])
  assert len(result.tokens) == 4 and result.reason == "length"


@pytest.mark.parametrize(
  "request_, message",
  [
    (serve.Request([], 3), "Prompt 1 has 0 tokens; it must have 1 to 63"),
    (serve.Request([1] * 64, 3), "Prompt 1 has 64 tokens"),
    (serve.Request([1, 23], 3), "Prompt 1 has token 23"),
    (serve.Request([1], 0), "max_new_tokens=0"),
    (serve.Request([1], 3, settings={"top_q": 1}), "'top_q'; there is temperature, top_k"),
    (serve.Request([1], 3, settings={"top_k": 2.5}), "whole number"),
    (serve.Request([1], 3, settings={"temperature": -1.0}), r"Request 1: temperature\(-1.0\)"),
  ],
)
def test_bad_requests_are_refused_before_anything_runs(request_, message):
  with pytest.raises(ValueError, match=message):
    table_server()([serve.Request([1], 3), request_])


def test_an_empty_stop_string_is_refused():
  with pytest.raises(ValueError, match="empty"):
    serve.stop_strings(letters, ["a", ""])
