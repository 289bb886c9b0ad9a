"""A round of learning on a Markov chain: its updates, its numbers, its repetition, and devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import targets
from ancestral.evaluation import attempts
from ancestral.models import toy
from ancestral.sampling import truncation
from ancestral.tasks import base as tasks
from ancestral.tasks import tokenizer as tokenizers
from ancestral.tasks import workers
from ancestral.training import (
  advantages,
  aggregation,
  learning,
  objectives,
  policy,
  rollouts,
  selection,
  step,
)
from ancestral.training import state as state_lib

TOKENIZER = tokenizers.characters("01")  # pad, bos, eos, then 3 and 4
MODEL = toy.markov(5)
LAW = np.array([[0, 0, 0.3, 0.5, 0.2]] * 4 + [[0, 0, 0.3, 0.1, 0.6]])
NEW, GROUP, KEY = 3, 4, jax.random.key(1)


def verify(problem, response):
  return tasks.Verification(response == problem.answer, "")


TASK = tasks.Task(problem=None, verify=verify, tokenizer=TOKENIZER)
PROBLEMS = [tasks.Problem(text, "1", {"key": text, "level": 1}) for text in ("0", "00", "10")]
SAMPLES = len(PROBLEMS) * GROUP
RATE = 2.0
OPTIMIZER = optax.sgd(RATE)


def update_of(loss_fn, num_microbatches=1):
  return jax.jit(
    functools.partial(
      step.train_step,
      loss_fn=loss_fn,
      optimizer=OPTIMIZER,
      averaging=state_lib.no_average(),
      num_microbatches=num_microbatches,
    )
  )


def policy_loss(surrogate=policy.reinforce, temperature=1.0):
  return objectives.of_tokens(
    MODEL, [objectives.surrogate(surrogate)], aggregation.sequence_sum, temperature=temperature
  )


def centred(rewards, lengths):
  return np.asarray(advantages.group_centred(rewards))


IN_PROCESS = attempts.in_process(verify)


def sampling(filters=(), temperature=1.0, verify_all=IN_PROCESS, **kwargs):
  sample = rollouts.sampler(
    MODEL, group_size=GROUP, max_new_tokens=NEW, stop=(TOKENIZER.eos,), filters=filters
  )
  return lambda key, params, problems: rollouts.roll_out(
    sample,
    params,
    TASK,
    problems,
    key,
    verify_all=verify_all,
    temperature=temperature,
    group_size=GROUP,
    batch_size=32,
    max_length=8,
    max_new_tokens=NEW,
    **kwargs,
  )


def parts(**changed):
  made = learning.Round(
    roll_out=sampling(),
    reward=learning.verified,
    select=selection.all_samples(centred),
    complete=lambda params, minibatch: minibatch,
    update=update_of(policy_loss()),
    record=lambda count, made, rewards: None,
  )
  return made._replace(**changed)


def start():
  params = jnp.log(jnp.asarray(LAW + 1e-3, jnp.float32))
  return state_lib.init(KEY, lambda key: params, OPTIMIZER, state_lib.no_average())


def run(num_rounds, state=None, num_minibatches=1, num_epochs=1, capacity=SAMPLES, **changed):
  make = learning.round_step(
    parts(**changed), capacity=capacity, num_minibatches=num_minibatches, num_epochs=num_epochs
  )
  state, seen = start() if state is None else state, []
  for _ in range(num_rounds):
    state, metrics = make(KEY, state, PROBLEMS)
    seen.append(metrics)
  return state, seen


def test_a_round_is_a_gradient_step_on_its_own_samples():
  kept = []
  state, (metrics,) = run(1, record=lambda count, made, rewards: kept.append((made, rewards)))
  ((made, rewards),) = kept
  advantage = centred(rewards, None).ravel()

  def by_hand(params):
    law = jax.nn.log_softmax(params)
    log_prob = law[made.rows["tokens"], made.rows["targets"]] * made.rows["mask"]
    return -jnp.sum(advantage * jnp.sum(log_prob, axis=-1)) / rewards.size

  expected = start().params - RATE * jax.grad(by_hand)(start().params)
  np.testing.assert_allclose(state.params, expected, atol=1e-5)
  assert metrics["reward"] == metrics["correct"] == rewards.mean() and metrics["ratio"] == 1
  assert metrics["length"] == made.lengths.mean() and metrics["selected"] == rewards.size
  assert int(state.step) == 1


def test_rewards_rise_with_the_verifiers_and_fall_with_inverted_ones():
  _, right = run(40)
  _, inverted = run(40, reward=learning.inverted)
  mean = lambda seen: np.mean([metrics["correct"] for metrics in seen[-10:]])
  assert mean(right) > 0.6 and mean(inverted) < 0.1  # of 0.15 at the start


def test_random_rewards_are_coins_of_the_round():
  made = sampling()(KEY, start().params, PROBLEMS)
  rewards = learning.random(np.random.default_rng(0), made)
  again = learning.random(np.random.default_rng(0), made)
  np.testing.assert_array_equal(rewards, again)
  assert rewards.shape == (len(PROBLEMS), GROUP) and set(rewards.ravel()) == {0, 1}
  np.testing.assert_array_equal(learning.inverted(None, made), 1 - made.rewards())


def test_a_run_that_was_stopped_goes_on_with_the_same_rollouts():
  seen = []
  record = lambda count, made, rewards: seen.append((count, made.rows["targets"]))
  whole, _ = run(4, num_minibatches=2, num_epochs=2, record=record)
  half, _ = run(2, num_minibatches=2, num_epochs=2)
  del seen[:2]
  rest = list(seen)
  seen.clear()
  resumed, _ = run(2, state=half, num_minibatches=2, num_epochs=2, record=record)
  np.testing.assert_array_equal(whole.params, resumed.params)
  for (count, drawn), (again, others) in zip(rest, seen, strict=True):
    assert count == again
    np.testing.assert_array_equal(drawn, others)


def test_minibatches_split_the_rows_and_filling_adds_none():
  batches = []

  def update(key, state, minibatch):
    batches.append(minibatch)
    rows = float(np.sum(minibatch["rows"] > 0))
    return state, {"loss": float(minibatch["rows"].max()), "weight": rows}

  _, (metrics,) = run(
    1,
    num_minibatches=3,
    num_epochs=2,
    capacity=18,
    select=lambda made, rewards: {"rows": np.arange(1, 8)},
    update=update,
  )
  first = [batch["rows"].tolist() for batch in batches[:3]]
  assert [len(rows) for rows in first] == [6] * 3
  assert sorted(row for rows in first for row in rows) == [0] * 11 + list(range(1, 8))
  assert sorted(sum(row > 0 for row in rows) for rows in first) == [2, 2, 3]
  assert [batch["rows"].tolist() for batch in batches[3:]] == first
  assert metrics["loss"] == sum(max(rows) * sum(row > 0 for row in rows) for rows in first) / 7
  assert metrics["weight"] == 7 / 3 and metrics["selected"] == 7
  with pytest.raises(ValueError, match="capacity=7 rows do not divide into num_minibatches=2"):
    run(1, capacity=7, num_minibatches=2)


def test_there_are_no_more_updates_than_rows():
  """A minibatch of filling alone would move parameters by the optimizer's momentum."""
  calls = []

  def update(key, state, minibatch):
    calls.append(minibatch)
    return state, {"loss": 1.0, "weight": 1.0}

  select = lambda made, rewards: {"rows": np.arange(2)}
  run(1, num_minibatches=4, num_epochs=3, select=select, update=update)
  assert [len(call["rows"]) for call in calls] == [3] * 6


def test_a_verifier_that_fails_is_a_fault_and_no_reward():
  broken = lambda pairs: [tasks.Verification(False, workers.FAULT + "died")] * len(pairs)
  _, (metrics,) = run(1, roll_out=sampling(verify_all=broken))
  assert metrics["faults"] >= 0.5 and metrics["correct"] == 0


def test_a_round_that_selects_nothing_changes_nothing_but_the_count():
  nothing = lambda made, rewards: jax.tree.map(lambda x: x[:0], made.rows)
  state, (metrics,) = run(1, select=nothing)
  np.testing.assert_array_equal(state.params, start().params)
  assert int(state.step) == 1 and metrics["selected"] == 0 and "loss" not in metrics


@pytest.mark.parametrize("temperature", [0.8, 1.2])
def test_the_first_ratio_is_1_with_filters_and_temperature_on(temperature):
  filters = (truncation.top_k(3), truncation.top_p(0.9))
  _, seen = run(
    3,
    roll_out=sampling(filters, temperature),
    update=update_of(policy_loss(policy.ppo_clip, temperature)),
  )
  assert all(abs(metrics["ratio"] - 1) < 1e-5 for metrics in seen)


def eight_devices():
  """Prompts and rows over eight devices, parameters on all: the same draws, the same updates."""
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  split, copied = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
  place = lambda tree: jax.device_put(tree, split)
  problems = [PROBLEMS[i % 3] for i in range(8)]
  drawn = []
  record = lambda count, made, rewards: drawn.append(made.rows["targets"])

  def after(state, **changed):
    make = learning.round_step(parts(record=record, **changed), capacity=32, num_minibatches=2)
    for _ in range(2):
      state, _ = make(KEY, state, problems)
    return state.params

  one = after(start(), roll_out=sampling())
  spread = after(
    jax.device_put(start(), copied),
    roll_out=sampling(place=place),
    complete=lambda params, minibatch: place(minibatch),
  )
  assert len(spread.sharding.device_set) == 8
  np.testing.assert_allclose(spread, one, atol=1e-6)
  for a, b in zip(drawn[:2], drawn[2:], strict=True):
    np.testing.assert_array_equal(a, b)


def test_on_eight_devices():
  assert "1 passed" in targets.run_on_eight_devices(__file__)
