"""Self-training: selections by hand and by brute force, and on the real arithmetic tasks."""

import itertools

import numpy as np
import pytest

from ancestral.evaluation import attempts
from ancestral.tasks import arithmetic, expressions
from ancestral.tasks import base as tasks
from ancestral.training import data, self_training


def problem(prompt="p", answer="1"):
  return tasks.Problem(prompt, answer, {"level": 1, "key": prompt})


def attempt(*answers, prompt="p", answer="1", right=("1", "one")):
  """An attempt whose verifier accepts the texts of `right`."""
  verdicts = tuple(
    tasks.Verification(text in right, "" if text in right else "no") for text in answers
  )
  return attempts.Attempt(problem(prompt, answer), answers, verdicts, False)


def texts(samples):
  return [(sample.problem.prompt, sample.response) for sample in samples]


ROUND = [
  attempt("2", "one", "1", "one", prompt="a"),
  attempt("3", "4", "3", prompt="b"),
  attempt("1", prompt="c"),
]


def test_rejection_sampling_keeps_each_right_text_once_in_order():
  assert texts(self_training.rejection_sampled(ROUND)) == [("a", "one"), ("a", "1"), ("c", "1")]
  assert texts(self_training.rejection_sampled(ROUND, at_most=1)) == [("a", "one"), ("c", "1")]
  assert self_training.rejection_sampled([]) == []


def test_right_and_wrong_share_out_the_texts_and_right_wins():
  assert self_training.correct(ROUND[0]) == ["one", "1"]
  assert self_training.wrong(ROUND[0]) == ["2"] and self_training.wrong(ROUND[1]) == ["3", "4"]
  unended = ROUND[2]._replace(
    responses=("1", "1"), verdicts=(tasks.Verification(False, "format"), *ROUND[2].verdicts)
  )
  assert self_training.correct(unended) == ["1"] and self_training.wrong(unended) == []


def test_best_of_takes_the_first_of_the_highest_reward():
  lengths = self_training.best_of(ROUND, lambda problem, text: len(text))
  assert texts(lengths) == [("a", "one"), ("b", "3"), ("c", "1")]
  by_problem = self_training.best_of(
    ROUND, lambda problem, text: (text > "3") * (problem.prompt == "b")
  )
  assert texts(by_problem) == [("a", "2"), ("b", "4"), ("c", "1")]
  with pytest.raises(ValueError, match="NaN for the problem 'a'"):
    self_training.best_of(ROUND, lambda problem, text: float("nan"))


def test_the_best_of_k_draws_has_the_power_of_the_distribution_function():
  rewards = {"x": 0.0, "y": 1.0, "z": 2.0}
  draws = [attempt(*drawn) for drawn in itertools.product(rewards, repeat=4)]
  best = [s.response for s in self_training.best_of(draws, lambda _, text: rewards[text])]
  assert [best.count(text) for text in "xyz"] == [1, 2**4 - 1, 3**4 - 2**4]


def test_records_are_what_the_pipeline_tokenizes():
  task = arithmetic.addition(style=arithmetic.plain_format, levels=(1,))
  asked = arithmetic.ask(arithmetic.ADDITION, arithmetic.plain_format, 3, 9)
  kept = [self_training.Sample(asked, "12")]
  found = data.tokenize(self_training.records(kept), task.tokenizer, ("prompt", "answer"))[0]
  assert task.tokenizer.decode(found["tokens"]) == "3+9=12"
  np.testing.assert_array_equal(found["mask"], [False] * 5 + [True] * 3)


def test_star_keeps_what_help_got_right_under_the_prompt_without_help():
  asked = []

  def again(problems):
    asked.extend(problems)
    return [attempt("1", "one", prompt=one.prompt, answer=one.answer) for one in problems]

  round_ = [*ROUND, attempt("7", prompt="d", answer="9")]
  kept = self_training.star(round_, lambda one: f"{one.prompt} ({one.answer})", again)
  assert [one.prompt for one in asked] == ["b (1)", "d (9)"]
  assert texts(kept) == [("a", "one"), ("b", "1"), ("c", "1"), ("d", "1")]
  assert [sample.problem for sample in kept] == [one.problem for one in round_]


def test_star_drops_what_stays_wrong_and_does_not_ask_for_nothing():
  stays = self_training.star(ROUND, lambda one: one.prompt, lambda ps: [attempt("5")] * len(ps))
  assert texts(stays) == [("a", "one"), ("c", "1")]
  never = lambda problems: pytest.fail("asked again though none failed")
  assert len(self_training.star([ROUND[0], ROUND[2]], str, never, at_most=None)) == 3
  with pytest.raises(ValueError, match="zip"):
    self_training.star(ROUND, lambda one: one.prompt, lambda problems: [])


def test_wanted_by_difficulty_is_in_proportion_and_the_hardest_gets_the_most():
  wanted = self_training.wanted_by_difficulty([0, 2, 5, 10], 10, most=20)
  np.testing.assert_array_equal(wanted, [20, 16, 10, 1])
  # 2, 5 and 8 failures of 10: the hardest has 0.8
  wanted = self_training.wanted_by_difficulty([8, 5, 2], [10, 10, 10], most=8, at_least=0)
  np.testing.assert_array_equal(wanted, [2, 5, 8])
  np.testing.assert_array_equal(
    self_training.wanted_by_difficulty([4, 4], 4, most=9, at_least=0), [0, 0]
  )
  with pytest.raises(ValueError, match="not been tried"):
    self_training.wanted_by_difficulty([0], [0], most=1)


@pytest.mark.parametrize("tried", [3, 7, 10, 49, 1000])
def test_a_whole_share_of_the_most_does_not_round_up(tried):
  correct = np.arange(tried)  # failed tried, ..., 1 times
  wanted = self_training.wanted_by_difficulty(correct, tried, most=3 * tried, at_least=0)
  np.testing.assert_array_equal(wanted, 3 * (tried - correct))


def test_draws_by_hand():
  draw = lambda *args, tries=100: self_training.draws(*args, max_tries=tries).tolist()
  assert draw([4, 5, 1], [4, 5, 8], 4) == [0, 0, 15]  # 3 missing at (1 + 1) / (8 + 2)
  assert draw([0], [0], 4) == [8]  # an even chance before any try
  assert draw([0, 0], [10, 99], 4) == [48, 1]
  assert draw([0, 0], [100, 120], 4) == [0, 0]
  assert draw([1, 1], [2, 2], [1, 3]) == [0, 4]


def test_rounds_of_draws_reach_what_is_wanted_or_the_limit():
  rng = np.random.default_rng(0)
  rate = np.array([1.0, 0.6, 0.2, 0.05, 0.0])
  correct, tried = np.zeros(5, int), np.zeros(5, int)
  rounds = 0
  while (more := self_training.draws(correct, tried, 8, max_tries=400)).any():
    correct, tried = correct + rng.binomial(more, rate), tried + more
    rounds += 1
    assert rounds < 12
  assert np.all((correct >= 8) | (tried == 400)) and tried[-1] == 400 and correct[-1] == 0
  assert tried[0] < 20 and tried[2] < 8 / 0.2 * 3  # and not far more than it takes


def test_what_is_verified_is_whole_lines_of_one_right_answer():
  right = ["a\nb\nc", "a\nx\ny"]
  for response, expected in {
    "a\nb\nd": "a\nb\n",
    "a\nx\nc": "a\nx\n",
    "a\nb": "a\n",  # b may have been cut off
    "a\nb\n": "a\nb\n",
    "a\nb\nc\nd": "a\nb\n",  # a right answer ends at c
    "aa\nb\nc": "",
    "": "",
  }.items():
    assert self_training.verified(response, right) == expected
  assert self_training.verified("a\nb", []) == ""


def test_partly_right_answers_are_their_longest_new_beginnings():
  answer = "a\nb\nc\nd"
  tried = attempt("a\nb\nX", "a\nY", "Z", "a\nb\nW", answer=answer)
  assert texts(self_training.partially_correct([tried])) == [("p", "a\nb\n")]
  assert self_training.partially_correct([tried], at_least=3) == []
  solved = attempt("a\nb\nX", answer, answer=answer, right=(answer,))
  assert self_training.partially_correct([solved]) == []
  # Another right way was drawn: its beginning is right too.
  other = attempt("q\nr", "a\nb\nX", "q\ns", "a\nv", answer=answer, right=("q\nr",))
  assert texts(self_training.partially_correct([other])) == [("p", "a\nb\n")]
  longer = attempt("q\nr\ns", "q\nr\nX", answer="q\nt\nu", right=("q\nr\ns",))
  assert self_training.partially_correct([longer]) == []


REAL = {
  "reversed": arithmetic.addition(levels=(1, 2, 3)),
  "detailed": arithmetic.subtraction(style=arithmetic.detailed_format),
  "derivation": expressions.expressions(levels=(2, 3)),
}


def attempts_at(task, seed, count=40):
  """Right answers, near misses, answers to other problems and answers cut off."""
  rng = np.random.default_rng(seed)
  made = []
  for one in tasks.problems(task, seed, count):
    other = tasks.problem_at(task, seed + 1, len(made)).answer
    i = int(rng.integers(len(one.answer)))
    near = one.answer[:i] + str(rng.integers(10)) + one.answer[i + 1 :]
    answers = [one.answer, near, other, one.answer[:i], near]
    rng.shuffle(answers)
    drawn = [attempts.Response(text, "", 0.0) for text in answers[: rng.integers(1, 6)]]
    made.append(attempts.judge(task, one, drawn))
  return made


@pytest.mark.parametrize("name", REAL)
def test_every_answer_kept_of_a_real_task_verifies(name):
  task = REAL[name]
  tried = attempts_at(task, 3)
  kept = self_training.rejection_sampled(tried)
  assert 10 < len(kept) == sum(one.num_correct > 0 for one in tried) < 40
  assert all(task.verify(*sample).correct for sample in kept)
  again = lambda problems: [
    attempts.judge(task, one, [attempts.Response(one.answer, "", 0.0)]) for one in problems
  ]
  every = self_training.star(tried, lambda one: one.answer, again)
  assert [sample.problem for sample in every] == [one.problem for one in tried]
  assert all(task.verify(*sample).correct for sample in every)
  verdict = lambda one, text: float(task.verify(one, text).correct)
  best = self_training.best_of(tried, verdict)
  assert [task.verify(*sample).correct for sample in best] == [one.num_correct > 0 for one in tried]


@pytest.mark.parametrize("name", ["detailed", "derivation"])
def test_partly_right_answers_to_a_real_task_can_be_finished(name):
  task = REAL[name]
  kept = self_training.partially_correct(attempts_at(task, 5))
  assert kept
  for one, text in kept:
    assert text.endswith("\n") and not task.verify(one, text).correct
    rest = one.answer.split("\n")[text.count("\n") :]
    assert task.verify(one, text + "\n".join(rest)).correct
