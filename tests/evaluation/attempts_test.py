"""Attempts: numbering of requests, ends, verdicts and their summary, on a chain over 0 and 1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.evaluation import attempts, coverage
from ancestral.models import toy
from ancestral.sampling import base as sampling
from ancestral.sampling import decode
from ancestral.tasks import base as tasks
from ancestral.tasks import tokenizer as tokenizers

TOKENIZER = tokenizers.characters("01")  # pad, bos, eos, then 3 and 4
PAD, BOS, EOS = range(3)
# Nothing leads to pad or bos; a continuation ends with probability 0.3.
TRANSITION = np.array([[0, 0, 0.3, 0.5, 0.2]] * 4 + [[0, 0, 0.3, 0.1, 0.6]])
NEW = 4
TEXTS = ["", "0", "11", "0101"]


@jax.jit
def draw(keys, prompts):
  params = jnp.log(jnp.asarray(TRANSITION, jnp.float32))
  return decode.generate(toy.markov(5), params, keys, prompts, max_new_tokens=NEW, stop=[EOS])


def respond(texts, batch_size, sample=draw, num_samples=3, seed=0):
  return attempts.respond(
    sample,
    TOKENIZER,
    texts,
    jax.random.key(seed),
    num_samples=num_samples,
    batch_size=batch_size,
    max_length=16,
    max_new_tokens=NEW,
  )


def test_responses_do_not_depend_on_the_batch_size():
  expected = respond(TEXTS, 12)
  assert [len(row) for row in expected] == [3] * 4
  assert len({response.text for row in expected for response in row}) > 5
  for batch_size in (1, 5):
    assert respond(TEXTS, batch_size) == expected


def test_responses_do_not_depend_on_texts_of_the_same_bucket():
  assert respond(TEXTS, 4)[:3] == respond([*TEXTS[:3], "1010", "1"], 4)[:3]


def test_responses_depend_on_the_key():
  assert respond(TEXTS, 12) != respond(TEXTS, 12, seed=1)


def test_sample_j_of_text_i_is_request_i_n_plus_j():
  calls = []

  def spy(keys, prompts):
    calls.append((jax.random.key_data(keys), jax.device_get(prompts)))
    return draw(keys, prompts)

  respond(TEXTS, 5, spy)
  assert len(calls) == 3  # 12 requests, five at a time, the last call filled up
  shapes = {(keys.shape, prompts.tokens.shape) for keys, prompts in calls}
  assert len(shapes) == 1 and calls[0][1].tokens.shape == (5, 8)
  keys = np.concatenate([call[0] for call in calls])
  for request in range(12):
    one = jax.random.fold_in(jax.random.key(0), request)
    np.testing.assert_array_equal(keys[request], jax.random.key_data(one))
  rows = [
    tuple(tokens[:length]) for _, prompts in calls for tokens, length in zip(*prompts, strict=True)
  ]
  encoded = [(BOS,), (BOS, 3), (BOS, 4, 4), (BOS, 3, 4, 3, 4)]
  assert rows[:12] == [prompt for prompt in encoded for _ in range(3)]


def test_a_response_is_what_its_request_draws_alone():
  responses = respond(TEXTS, 5)
  for text in (1, 3):
    for j in range(3):
      tokens = [BOS, *TOKENIZER.encode(TEXTS[text])]
      prompts = decode.pad_prompts([tokens], vocab_size=5, max_length=16)
      keys = sampling.row_keys(jax.random.key(0), jnp.array([3 * text + j]))
      samples = draw(keys, prompts)
      drawn = samples.tokens[0, len(tokens) : samples.length[0]].tolist()
      assert responses[text][j].text == TOKENIZER.decode(drawn)
      assert (not responses[text][j].fault) == (EOS in drawn)


def test_ends_and_log_probs_are_of_the_chain():
  responses = [
    (text, response)
    for text, row in zip(TEXTS, respond(TEXTS, 12, num_samples=8), strict=True)
    for response in row
  ]
  assert {response.fault for _, response in responses} == {"", f"did not end within {NEW} tokens"}
  for text, response in responses:
    drawn = TOKENIZER.encode(response.text) + [EOS] * (not response.fault)
    assert len(drawn) == NEW if response.fault else len(drawn) <= NEW
    path = [BOS, *TOKENIZER.encode(text), *drawn]
    expected = sum(
      np.log(TRANSITION[path[i - 1], path[i]]) for i in range(len(path) - len(drawn), len(path))
    )
    assert response.log_prob == pytest.approx(expected, rel=1e-5)


def test_responses_follow_the_law():
  responses = respond([""], 1000, num_samples=4000)[0]
  law = toy.markov_law(TRANSITION, BOS, 2)
  counts = np.zeros((5, 5))
  for response in responses:
    tokens = [*TOKENIZER.encode(response.text), EOS]
    if len(tokens) > 1:
      counts[tuple(tokens[:2])] += 1
  rates, expected = counts[3:] / 4000, law[3:]  # those that do not end at once
  error = 4 * np.sqrt(expected * (1 - expected) / 4000)
  assert np.all(np.abs(rates - expected) <= error)


def test_prompts_without_room_are_refused():
  with pytest.raises(ValueError, match="Prompt 0 has 14 tokens"):
    respond(["0" * 13], 1)


def scripted(*continuations):
  """A sampler that answers request r with continuations[r], whatever its key: one call only."""

  def sample(keys, prompts):
    tokens = np.zeros((len(continuations), prompts.tokens.shape[1] + NEW), np.int32)
    length = np.array(prompts.length)
    for row, drawn in enumerate(continuations):
      tokens[row, : length[row]] = prompts.tokens[row, : length[row]]
      tokens[row, length[row] : length[row] + len(drawn)] = drawn
    total = length + np.array([len(drawn) for drawn in continuations])
    nothing = np.zeros((len(continuations), NEW), np.float32)
    return decode.Samples(tokens, total, length, nothing, nothing)

  return sample


def verify(problem, text):
  return tasks.Verification(text == problem.answer, "" if text == problem.answer else "digit")


def problem(prompt, answer, level=1):
  return tasks.Problem(prompt, answer, {"level": level, "key": prompt})


TASK = tasks.Task(lambda rng: None, verify, TOKENIZER)


def attempt(sample, problems, num_samples):
  return attempts.attempt(
    sample,
    TASK,
    problems,
    jax.random.key(0),
    num_samples=num_samples,
    batch_size=num_samples * len(problems),
    max_length=16,
    max_new_tokens=NEW,
  )


def test_an_answer_that_has_not_ended_is_wrong():
  zero, one = 3, 4
  problems = [problem("0", "0101"), problem("00", "1")]
  found = attempt(
    scripted(
      [zero, one, zero, one],
      [zero, one, zero, EOS],  # unended, wrong
      [one, EOS],
      [one],
    ),
    problems,
    2,
  )  # right, unended
  assert [one.problem for one in found] == problems
  assert [one.responses for one in found] == [("0101", "010"), ("1", "1")]
  assert [[v.correct for v in one.verdicts] for one in found] == [[False, False], [True, False]]
  assert [one.num_correct for one in found] == [0, 1]
  reasons = [v.reason for one in found for v in one.verdicts]
  assert reasons == [
    "format: did not end within 4 tokens",
    "digit",
    "",
    "format: did not end within 1 tokens",
  ]


def test_a_special_token_inside_an_answer_is_not_passed_over():
  found = attempt(scripted([3, 0, EOS]), [problem("0", "0")], 1)[0]  # 0 is the padding
  assert found.responses == ("0",)
  assert found.verdicts[0].reason == "format: holds a padding or beginning-of-sequence token"


def test_any_of_a_models_ends_ends_an_answer():
  """Padding may be one of them, as Qwen has it."""
  code = TOKENIZER._replace(other_stops=(4, TOKENIZER.pad))
  for ends in (EOS, 4, TOKENIZER.pad):
    assert not attempts.response(code, [3, ends], 0.0).fault
  assert "did not end" in attempts.response(code, [3, 3], 0.0).fault
  assert "did not end" in attempts.response(TOKENIZER, [3, 4], 0.0).fault


def test_an_answer_that_ends_at_once_is_empty_and_ended():
  found = attempt(scripted([EOS]), [problem("0", "")], 1)[0]
  assert found.responses == ("",) and found.num_correct == 1


def made(level, answer, *responses):
  one = problem("0", answer, level)
  return attempts.judge(TASK, one, [attempts.Response(text, "", 0.0) for text in responses])


@pytest.mark.parametrize(
  "responses, right",
  [
    (("1", "0", "0"), False),
    (("0", "1", "1"), True),
    (("1", "0"), True),
    (("0", "1"), False),
    (("00", "0", "1", "1"), True),
  ],
)
def test_majority_of_answers(responses, right):
  assert made(1, "1", *responses).majority_correct == right


def test_what_has_not_ended_does_not_vote():
  ballots = [("2", "did not end"), ("2", ""), ("2", ""), ("3", ""), ("3", "did not end")]
  responses = [attempts.Response(text, fault, 0.0) for text, fault in ballots]
  found = attempts.judge(TASK, problem("0", "2"), responses)
  assert found.majority_correct and found.num_correct == 2
  assert not attempts.judge(TASK, problem("0", "2"), responses[:1]).majority_correct


def test_the_majority_is_of_results_whatever_their_working():
  found = made(1, "a\n1", "b\n1", "c\n1", "d\n0", "d\n0", "e\n1")
  assert found.majority_correct and found.num_correct == 0


def test_summary_by_hand():
  summary = attempts.summarise(
    [
      made(2, "1", "1", "0", "0", "0"),  # one of four right, outvoted
      made(1, "1", "1", "1", "1", "1"),
      made(2, "1", "0", "00", "11", "000"),  # all wrong
      made(2, "1", "1", "1", "0", "00"),  # two right: the largest party
    ]
  )
  assert list(summary) == ["pass@1", "majority@4", "pass@4"]
  expected = {"pass@1": [1, 0.25], "majority@4": [1, 1 / 3], "pass@4": [1, 2 / 3]}
  for name, rows in summary.items():
    assert [(row.level, row.count) for row in rows] == [(1, 1), (2, 3)]
    assert [row.mean for row in rows] == pytest.approx(expected[name])
    assert (rows[1].low, rows[1].high) == pytest.approx(
      coverage.wilson_interval(3 * expected[name][1], 3)
    )
