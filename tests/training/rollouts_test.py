"""Rollouts of a chain over 0 and 1: their numbering, verdicts, file, and devices."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.evaluation import attempts
from ancestral.models import toy
from ancestral.tasks import base as tasks
from ancestral.tasks import tokenizer as tokenizers
from ancestral.training import rollouts

TOKENIZER = tokenizers.characters("01")  # pad, bos, eos, then 3 and 4
TRANSITION = np.array([[0, 0, 0.3, 0.5, 0.2]] * 4 + [[0, 0, 0.3, 0.1, 0.6]])
NEW, GROUP = 4, 3
KEY = jax.random.key(5)


def verify(problem, response):
  right = response.endswith(problem.answer)
  return tasks.Verification(right, "" if right else "wrong end")


TASK = tasks.Task(problem=None, verify=verify, tokenizer=TOKENIZER)
PROBLEMS = [
  tasks.Problem(text, answer, {"key": text, "level": len(text)})
  for text, answer in [("", "0"), ("0", "1"), ("11", "00"), ("01", "1"), ("1", "0")]
]


def model_and_params():
  return toy.markov(5), jnp.log(jnp.asarray(TRANSITION, jnp.float32))


SAMPLE = rollouts.sampler(
  model_and_params()[0], group_size=GROUP, max_new_tokens=NEW, stop=(TOKENIZER.eos,)
)


def roll_out(problems=PROBLEMS, batch_size=6, sample=SAMPLE, **kwargs):
  return rollouts.roll_out(
    sample,
    model_and_params()[1],
    TASK,
    problems,
    KEY,
    verify_all=attempts.in_process(verify),
    temperature=1.0,
    group_size=GROUP,
    batch_size=batch_size,
    max_length=12,
    max_new_tokens=NEW,
    **kwargs,
  )


def test_samples_do_not_depend_on_the_batch_they_are_drawn_in():
  whole, apart = roll_out(batch_size=15), roll_out(batch_size=1)
  assert [a.responses for a in whole.attempts] == [a.responses for a in apart.attempts]
  for name, rows in whole.rows.items():
    np.testing.assert_array_equal(rows, apart.rows[name])
    assert len(rows) == len(PROBLEMS) * GROUP
  first = roll_out(PROBLEMS[:2])  # shorter prompts: narrower rows
  width = first.rows["tokens"].shape[1]
  np.testing.assert_array_equal(first.rows["tokens"], whole.rows["tokens"][: 2 * GROUP, :width])


def test_rewards_are_the_verifiers_and_rows_are_the_responses():
  made = roll_out()
  rewards = made.rewards()
  assert 0 < rewards.mean() < 1
  for i, problem in enumerate(PROBLEMS):
    for j in range(GROUP):
      row = {name: rows[i * GROUP + j] for name, rows in made.rows.items()}
      drawn = row["targets"][row["mask"] != 0].tolist()
      assert len(drawn) == made.lengths[i, j]
      text = made.attempts[i].responses[j]
      ended = drawn[-1] == TOKENIZER.eos
      assert TOKENIZER.decode(drawn) == text
      assert rewards[i, j] == (ended and text.endswith(problem.answer))
      steps = zip(row["tokens"][row["mask"] != 0], drawn, strict=True)
      expected = sum(np.log(TRANSITION[a, b]) for a, b in steps)
      np.testing.assert_allclose(row["log_prob"].sum(), expected, rtol=1e-5)


def test_groups_follow_the_models_law():
  problems = [PROBLEMS[0]] * 400
  made = roll_out(problems, batch_size=1200)
  found = np.mean(made.lengths == 1)  # the end at once
  assert abs(found - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 1200)


def test_the_file_reads_back_and_a_resumed_run_repeats_no_step(tmp_path):
  path = tmp_path / "rollouts.jsonl"
  made = roll_out()
  log = rollouts.jsonl(path)
  for step in (1, 2, 3):
    log.write(step, made, made.rewards())
  log.close()
  path.write_text(path.read_text() + '{"step": 4, "pro')  # killed while writing
  log = rollouts.jsonl(path, step=2)
  log.write(3, made, 1 - made.rewards())
  log.close()
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  assert [line["step"] for line in lines] == [1] * 5 + [2] * 5 + [3] * 5
  for line, problem, attempt, reward in zip(
    lines[10:], PROBLEMS, made.attempts, 1 - made.rewards(), strict=True
  ):
    assert (line["prompt"], line["key"], line["level"]) == (
      problem.prompt,
      *problem.metadata.values(),
    )
    assert [sample["text"] for sample in line["samples"]] == list(attempt.responses)
    assert [sample["reward"] for sample in line["samples"]] == reward.tolist()
    for sample, verdict in zip(line["samples"], attempt.verdicts, strict=True):
      assert (sample["correct"], sample["reason"]) == verdict


def test_no_recompilation_across_problems_and_temperatures():
  before = SAMPLE._cache_size()
  roll_out(PROBLEMS[:2])
  roll_out(PROBLEMS[2:])
  assert SAMPLE._cache_size() <= before + 1


def test_a_prompt_that_does_not_fit_is_named():
  long = tasks.Problem("01" * 10, "1", {"key": "", "level": 1})
  with pytest.raises(ValueError, match="Prompt 1 has 21 tokens"):
    roll_out([PROBLEMS[0], long])
