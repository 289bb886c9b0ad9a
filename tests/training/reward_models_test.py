"""Reward models: losses by hand and at extremes, where scores are read, what is learned."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special

import targets
from ancestral.evaluation import calibration
from ancestral.tasks import arithmetic
from ancestral.tasks import base as tasks
from ancestral.tasks import tokenizer as tokenizers
from ancestral.training import data, reward_models, state, step

EXTREME = jnp.array([-1e3, -30.0, 0.0, 30.0, 1e3])


def gradients(loss, *args):
  return jax.grad(lambda *args: loss(*args).sum(), argnums=tuple(range(len(args))))(*args)


def test_bradley_terry_is_the_log_likelihood_of_the_choice():
  chosen, rejected = jnp.log(jnp.array([3.0, 1.0, 2.0])), jnp.log(jnp.array([1.0, 3.0, 2.0]))
  losses = reward_models.bradley_terry(chosen, rejected)  # strengths 3 and 1: chosen 3 times in 4
  np.testing.assert_allclose(losses, -np.log([0.75, 0.25, 0.5]), rtol=1e-6)
  won, lost = gradients(reward_models.bradley_terry, chosen, rejected)
  np.testing.assert_allclose(won, [-0.25, -0.75, -0.5], rtol=1e-6)
  np.testing.assert_allclose(lost, -won, rtol=1e-6)


def test_a_margin_is_a_handicap():
  chosen, rejected = jnp.array([1.0, -2.0]), jnp.array([0.5, 0.0])
  found = reward_models.bradley_terry(chosen, rejected, margin=jnp.array([0.5, 1.0]))
  np.testing.assert_allclose(found, [np.log(2), np.log1p(np.exp(3))], rtol=1e-6)


def test_losses_are_finite_at_extremes_and_their_gradients_bounded():
  losses = reward_models.bradley_terry(EXTREME, jnp.zeros(5))
  np.testing.assert_allclose(losses, [1e3, 30, np.log(2), np.exp(-30), 0], rtol=1e-5)
  won, _ = gradients(reward_models.bradley_terry, EXTREME, jnp.zeros(5))
  np.testing.assert_allclose(won, [-1, -1, -0.5, -np.exp(-30), 0], rtol=1e-5)
  for label in (0.0, 0.3, 1.0):
    target = jnp.full(5, label)
    losses = reward_models.regression(EXTREME, target)
    expected = [1e3 * label, 30 * label, np.log(2), 30 * (1 - label), 1e3 * (1 - label)]
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-12)
    gradient = gradients(reward_models.regression, EXTREME, target)[0]
    np.testing.assert_allclose(gradient, special.expit(np.float64(EXTREME)) - label, atol=1e-6)


def test_regression_equals_optax_and_is_least_at_the_share():
  score, target = jnp.linspace(-4, 4, 9), jnp.linspace(0, 1, 9)
  expected = optax.sigmoid_binary_cross_entropy(score, target)
  np.testing.assert_allclose(reward_models.regression(score, target), expected, rtol=1e-5)
  at_share = gradients(reward_models.regression, jnp.log(jnp.array([3.0])), jnp.array([0.75]))
  assert abs(at_share[0][0]) < 1e-7


def test_centring_pulls_the_sum_to_zero():
  chosen, rejected = jnp.array([2.0, 1.0]), jnp.array([1.0, -1.0])
  np.testing.assert_allclose(reward_models.centring(chosen, rejected), [9, 0])
  np.testing.assert_allclose(gradients(reward_models.centring, chosen, rejected)[0], [6, 0])


def test_step_level_reads_ends_of_steps_alone():
  score = jnp.array([[0.0, np.log(3.0), 5.0, -np.log(3.0)], [jnp.nan, jnp.inf, 1e3, -1e3]])
  target = jnp.array([[1.0, 1, jnp.nan, 1], [1, 1, 1, 1]])
  ends = jnp.array([[True, True, False, True], [False] * 4])
  losses = reward_models.step_level(score, target, ends)
  np.testing.assert_allclose(losses, [np.log(2) + np.log(4 / 3) + np.log(4), 0], rtol=1e-6)
  gradient = gradients(lambda score: reward_models.step_level(score, target, ends), score)[0]
  np.testing.assert_allclose(gradient, [[-0.5, -0.25, 0, -0.75], [0] * 4], rtol=1e-6)


def test_scores_are_read_after_the_prompt_and_before_the_end():
  mask = jnp.array([[0, 0, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0] * 6])
  np.testing.assert_array_equal(reward_models.at_prompt(mask), [2, 1, 0, 0])
  np.testing.assert_array_equal(reward_models.at_end(mask)[:3], [4, 1, 5])
  assert 0 <= reward_models.at_end(mask)[3] < 6  # anywhere, its weight is 0


@pytest.mark.parametrize("head", [reward_models.linear(), reward_models.mlp(7)])
def test_a_head_scores_each_state_by_itself_and_all_its_params_matter(head):
  params = head.init(jax.random.key(0), 5)
  hidden = jax.random.normal(jax.random.key(1), (2, 3, 5))
  found = head.apply(params, hidden)
  assert found.shape == (2, 3) and found.dtype == jnp.float32
  np.testing.assert_allclose(found[1, 2], head.apply(params, hidden[1, 2]), rtol=1e-5)
  gradient = jax.grad(lambda params: head.apply(params, hidden).sum())(params)
  assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient))
  assert head.apply(params, hidden.astype(jnp.bfloat16)).dtype == jnp.float32


def test_a_linear_head_begins_with_scores_of_variance_about_one():
  kernels = jax.vmap(lambda key: reward_models.linear().init(key, 15)["kernel"])(
    jax.random.split(jax.random.key(0), 2000)
  )
  assert np.asarray(kernels).var() == pytest.approx(1 / 16, rel=0.05)


@functools.cache
def trunk():
  """A Markov chain, whose hidden state is a row of its table, with a head; and fixed params."""
  model, table = targets.table_target(vocab_size=23, order=1)
  head = reward_models.linear()
  return model, head, {"model": table, "head": head.init(jax.random.key(3), 23)}


BATCH = {
  "tokens": jnp.asarray(np.random.default_rng(0).integers(0, 23, (4, 6))),
  "mask": jnp.array([[0, 0, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0] * 6]),
  "label": jnp.array([1.0, 0.25, 0.0, 1.0]),
}


def score_after(row, length):
  """The score of the state after so many tokens, by numpy."""
  params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), trunk()[2])
  return params["model"][BATCH["tokens"][row, length - 1]] @ params["head"]["kernel"]


@pytest.mark.parametrize(
  "where, lengths", [(reward_models.at_end, (5, 2, 6)), (reward_models.at_prompt, (3, 2, 1))]
)
def test_an_outcome_is_of_the_state_at_its_place_and_an_empty_row_is_nothing(where, lengths):
  model, head, params = trunk()
  loss_fn = jax.jit(reward_models.scored(model, head, where))
  (losses, weights), metrics = loss_fn(None, params, BATCH)
  score = np.array([score_after(row, length) for row, length in enumerate(lengths)])
  f, label = special.expit(score), np.asarray(BATCH["label"][:3])
  expected = -label * np.log(f) - (1 - label) * np.log(1 - f)
  np.testing.assert_allclose(losses, [*expected, 0], rtol=1e-3)
  np.testing.assert_array_equal(weights, [1, 1, 1, 0])
  np.testing.assert_allclose(metrics["brier_score"], [*np.square(f - label), 0], rtol=2e-3)
  np.testing.assert_allclose(metrics["predicted"], [*f, 0], rtol=1e-3)
  np.testing.assert_allclose(metrics["label"], [*label, 0])


def gradient_of(loss_fn, params, batch):
  return jax.jit(jax.grad(lambda params: loss_fn(None, params, batch)[0][0].sum()))(params)


def test_a_frozen_trunk_has_no_gradient_and_the_head_the_same():
  model, head, params = trunk()
  loss_fn = reward_models.scored(model, head, reward_models.at_end)
  free = gradient_of(loss_fn, params, BATCH)
  held = gradient_of(reward_models.frozen(loss_fn), params, BATCH)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(held["model"]))
  assert any(np.any(leaf) for leaf in jax.tree.leaves(free["model"]))
  np.testing.assert_allclose(held["head"]["kernel"], free["head"]["kernel"], rtol=1e-4)
  nothing = gradient_of(loss_fn, params, jax.tree.map(lambda leaf: leaf[3:], BATCH))
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(nothing))


def test_a_comparison_is_of_the_ends_of_two_answers():
  model, head, params = trunk()
  loss_fn = reward_models.compared(model, head, centring_weight=0.1)
  part = lambda rows: {name: BATCH[name][jnp.array(rows)] for name in ("tokens", "mask")}
  batch = {"chosen": part([0, 1, 0, 2]), "rejected": part([1, 2, 3, 2])}
  batch["margin"] = jnp.array([0.0, 0.5, 0.0, 0.0])
  (losses, weights), metrics = jax.jit(loss_fn)(None, params, batch)
  s = [score_after(row, length) for row, length in enumerate((5, 2, 6))]
  expected = [
    np.log1p(np.exp(s[1] - s[0])) + 0.1 * (s[0] + s[1]) ** 2,
    np.log1p(np.exp(s[2] - s[1] + 0.5)) + 0.1 * (s[1] + s[2]) ** 2,
    0,  # nothing was rejected
    np.log(2) + 0.1 * (2 * s[2]) ** 2,
  ]
  np.testing.assert_allclose(losses, expected, rtol=2e-3, atol=1e-4)
  np.testing.assert_array_equal(weights, [1, 1, 0, 1])
  np.testing.assert_array_equal(metrics["accuracy"], [s[0] > s[1], s[1] > s[2], 0, 0.5])
  np.testing.assert_allclose(metrics["lead"], [s[0] - s[1], s[1] - s[2], 0, 0], atol=1e-3)


def test_steps_are_scored_where_their_rows_say():
  model, head, params = trunk()
  tokenizer = tokenizers.characters("0123456789+=\n,.abcde")  # 23 with specials
  row = reward_models.step_row(tokenizer, "1+2=", ["a,", "bcd,"], [1, 0], length=14)
  np.testing.assert_array_equal(np.flatnonzero(row["step_end"]), [6, 10])
  assert tokenizer.decode(row["tokens"][[6, 10]]) == ",,"
  assert tokenizer.decode(row["tokens"]) == "1+2=a,bcd," and row["tokens"][0] == tokenizer.bos
  np.testing.assert_array_equal(row["label"][[6, 10]], [1, 0])
  batch = jax.tree.map(lambda a, b: jnp.stack([a, b]), row, jax.tree.map(np.zeros_like, row))
  loss_fn = jax.jit(reward_models.step_scored(model, head))
  (losses, weights), metrics = loss_fn(None, params, batch)
  table, kernel = params["model"], params["head"]["kernel"]
  score = np.asarray(table)[tokenizer.encode(",")] @ np.asarray(kernel) * np.ones(2)  # of a comma
  expected = np.log1p(np.exp(-score[0])) + np.log1p(np.exp(score[1]))
  np.testing.assert_allclose(losses, [expected, 0], rtol=1e-4)
  np.testing.assert_array_equal(weights, [2, 0])
  np.testing.assert_array_equal(metrics["accuracy"], [int(score[0] > 0) + int(score[1] <= 0), 0])


def test_a_row_of_steps_that_does_not_fit_is_refused():
  tokenizer = tokenizers.characters("ab")
  with pytest.raises(ValueError, match="no tokens"):
    reward_models.step_row(tokenizer, "a", ["b", ""], [1, 1], length=9)
  with pytest.raises(ValueError, match="raise length"):
    reward_models.step_row(tokenizer, "a", ["bb"], [1], length=3)


def test_the_question_shows_the_answer_and_the_others():
  problem = tasks.Problem("2+2=", "4", {"level": 1, "key": "2+2"})
  text = reward_models.ask_whether_true(problem, "{5}")
  assert "2+2=" in text and "{5}" in text and text.index("2+2=") < text.index("{5}")
  among = reward_models.ask_whether_true(
    problem, "5", others=["4", "3"], template=reward_models.ASK_AMONG
  )
  assert "4\n3" in among and among.endswith(text.replace("{5}", "5").partition("\n")[2])
  short = reward_models.ask_whether_true(problem, "5", template="{prompt}{response}?")
  assert short == "2+2=5?"
  with pytest.raises(ValueError, match="ASK_AMONG"):
    reward_models.ask_whether_true(problem, "5", others=["4"])


def test_the_log_odds_are_of_two_tokens_among_themselves():
  p = np.array([[0.6, 0.3, 0.1], [0.2, 0.4, 0.4]])
  found = reward_models.log_odds(jnp.log(jnp.asarray(p, jnp.float32)), 1, 2)
  np.testing.assert_allclose(special.expit(found), [0.75, 0.5], rtol=1e-6)
  removed = reward_models.log_odds(jnp.array([0.0, 800.0, -800.0]), 1, 2)
  assert removed == 1600


def test_truth_is_of_the_models_law_after_the_prompt():
  model, table = targets.table_target(vocab_size=4, order=1)
  batch = {
    "tokens": jnp.array([[1, 2, 3], [3, 0, 0], [1, 1, 1]]),
    "mask": jnp.array([[0, 1, 0], [1, 0, 0], [0, 0, 0]]),
    "label": jnp.array([0.3, 1.0, 1.0]),
  }
  loss_fn = jax.jit(reward_models.truth(model, 2, 0))
  (losses, weights), metrics = loss_fn(None, table, batch)
  law = targets.softmax(table)[np.array([2, 3])][:, [2, 0]]
  f, label = law[:, 0] / law.sum(axis=1), np.array([0.3, 1])
  np.testing.assert_allclose(metrics["predicted"], [*f, 0], rtol=1e-5)
  expected = -label * np.log(f) - (1 - label) * np.log(1 - f)
  np.testing.assert_allclose(losses, [*expected, 0], rtol=1e-5)
  np.testing.assert_array_equal(weights, [1, 1, 0])
  gradient = gradient_of(loss_fn, table, batch)
  moved = np.argwhere(np.asarray(gradient))
  np.testing.assert_array_equal(moved, [[2, 0], [2, 2], [3, 0], [3, 2]])


def test_choices_between_items_have_their_strengths_as_the_likeliest_scores():
  scores = np.array([1.0, -0.5, 0.2])
  win = special.expit(scores[:, None] - scores)  # how often i is chosen over j

  def loss(s):
    pairs = reward_models.bradley_terry(
      jnp.broadcast_to(s[:, None], (3, 3)), jnp.broadcast_to(s[None], (3, 3))
    )
    return jnp.sum(jnp.asarray(win) * pairs)

  np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(scores + 7.0)), 0, atol=1e-6)
  assert loss(jnp.asarray(scores)) < loss(jnp.asarray(1.1 * scores))


RATE = {1: 0.97, 2: 0.8, 3: 0.4, 4: 0.1}  # how often sums of a level are answered right
TOKENIZER = arithmetic.addition().tokenizer
TRIES = 10


def asked(rng, count):
  """Sums of two numbers of as many digits as the level says, their rates, and rows of prompts."""
  levels = rng.integers(1, 5, count)
  operands = [rng.integers(10 ** (n - 1), 10**n, 2).tolist() for n in levels]
  asks = [arithmetic.ask(arithmetic.ADDITION, arithmetic.plain_format, *pair) for pair in operands]
  records = [{"prompt": problem.prompt, "answer": ""} for problem in asks]
  source = data.tokenize(records, TOKENIZER, ("prompt", "answer"))
  batches = data.batches(
    source, data.pad(11, TOKENIZER.pad), batch_size=count, shuffle=False, epochs=1
  )
  return np.array([RATE[n] for n in levels]), next(iter(batches))


def test_a_head_on_a_frozen_random_trunk_comes_to_know_what_is_known():
  rng = np.random.default_rng(0)
  model, params = targets.tiny_target(
    vocab_size=TOKENIZER.vocab_size, num_layers=1, positions="learned"
  )
  head = reward_models.mlp(16)
  loss_fn = reward_models.frozen(reward_models.scored(model, head, reward_models.at_prompt))
  optimizer = optax.adam(0.02)
  init = lambda key: {"model": params, "head": head.init(key, 32)}
  rate, rows = asked(rng, 2000)
  rows["label"] = rng.binomial(TRIES, rate) / np.float32(TRIES)

  @jax.jit
  def train(start, rows):
    def one(now, _):
      picked = jax.random.randint(jax.random.fold_in(jax.random.key(2), now.step), (128,), 0, 2000)
      batch = jax.tree.map(lambda leaf: leaf[picked], rows)
      return step.train_step(
        jax.random.key(1), now, batch, loss_fn=loss_fn, optimizer=optimizer, averaging=none
      )

    return jax.lax.scan(one, start, None, 150)

  none = state.no_average()
  trained, metrics = train(state.init(jax.random.key(0), init, optimizer, none), rows)
  jax.tree.map(np.testing.assert_array_equal, trained.params["model"], params)

  truth, held_out = asked(rng, 2000)
  held_out["label"] = truth.astype(np.float32)
  (_, weight), found = jax.jit(loss_fn)(None, trained.params, held_out)
  known = np.asarray(found["predicted"], np.float64)
  assert weight.sum() == 2000 and metrics["brier_score"][-1] < metrics["brier_score"][0]
  assert np.abs(known - truth).mean() < 0.03
  outcome = rng.random(2000) < truth
  error = calibration.expected_calibration_error(known, outcome)
  floor = calibration.error_of_the_calibrated(rng, known, num_resamples=200)
  guess = np.full(2000, 0.9)
  assert error < 1.5 * floor < 0.1 < calibration.expected_calibration_error(guess, outcome)
  ranking = calibration.area_under_curve(known, outcome)
  assert ranking > calibration.area_under_curve(truth, outcome) - 0.02 > 0.8
  surest = calibration.selective_accuracy(known, outcome)
  assert surest[499] > 0.9 > 0.6 > surest[-1]
