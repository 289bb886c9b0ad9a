"""The loop: what happens after which step, signals, and losses that are not finite."""

import itertools
import os
import signal

import jax.numpy as jnp
import pytest

from ancestral.training import guard, loop, state


def start(step=0):
  return state.TrainState(jnp.int32(step), {}, (), ())


class Record(list):
  """What the loop did, in order, and what is done as a side effect of that."""

  def __init__(self, side_effects=None):
    super().__init__()
    self.side_effects = side_effects or {}

  def note(self, *event):
    self.append(event)
    for effect in self.side_effects.get(event[:2], ()):
      effect()


def run(
  record, num_steps, first=0, write=1000, evaluate=1000, save=1000, losses=None, judge=guard.finite
):
  """Fits a step that only counts; the loss of the step to n is losses.get(n, n)."""
  losses = losses or {}

  def step(held, batch):
    record.note("step", batch)
    done = held.step + 1
    metrics = {"loss": jnp.float32(losses.get(int(done), int(done))), "weight": jnp.float32(2)}
    return held._replace(step=done), metrics

  return loop.fit(
    start(first),
    (f"batch {n}" for n in itertools.count(first + 1)),
    step,
    num_steps=num_steps,
    write=loop.Every(write, lambda done, metrics: record.note("write", done, metrics)),
    evaluate=loop.Every(evaluate, lambda done, held: record.note("evaluate", done, int(held.step))),
    save=loop.Every(save, lambda done, held: record.note("save", done, int(held.step))),
    progress=lambda done: record.note("progress", done),
    judge=judge,
  )


def metrics(step):
  return {"loss": float(step), "weight": 2.0}


def test_every_event_of_a_short_run_in_order():
  record = Record()
  final = run(record, 5, write=2, evaluate=3, save=2)
  assert int(final.step) == 5
  assert record == [
    ("step", "batch 1"),
    ("progress", 1),
    ("step", "batch 2"),
    ("progress", 2),
    ("write", 2, metrics(2)),
    ("save", 2, 2),
    ("step", "batch 3"),
    ("progress", 3),
    ("evaluate", 3, 3),
    ("step", "batch 4"),
    ("progress", 4),
    ("write", 4, metrics(4)),
    ("save", 4, 4),
    ("step", "batch 5"),
    ("progress", 5),
    ("write", 5, metrics(5)),
    ("evaluate", 5, 5),
    ("save", 5, 5),
  ]
  assert all(
    type(value) is float for event in record if event[0] == "write" for value in event[2].values()
  )


def test_the_last_step_does_all_whatever_the_periods():
  record = Record()
  run(record, 3)
  assert record[-3:] == [("write", 3, metrics(3)), ("evaluate", 3, 3), ("save", 3, 3)]
  assert [event[0] for event in record[:-3]] == ["step", "progress"] * 3


def test_a_run_goes_on_from_the_states_step_with_the_same_periods():
  whole, resumed = Record(), Record()
  run(whole, 7, write=2, evaluate=3, save=2)
  final = run(resumed, 7, first=4, write=2, evaluate=3, save=2)
  assert int(final.step) == 7
  assert resumed == whole[whole.index(("step", "batch 5")) :]


@pytest.mark.parametrize("first", [3, 5])
def test_a_finished_run_does_nothing(first):
  record = Record()
  assert int(run(record, 3, first=first).step) == first and record == []


@pytest.fixture
def handlers():
  """Handlers of our own, to be found again after the loop."""
  mine = {
    number: (lambda *_: pytest.fail("not the loop's handler"))
    for number in (signal.SIGTERM, signal.SIGINT)
  }
  before = {number: signal.signal(number, handler) for number, handler in mine.items()}
  yield mine
  found = {number: signal.getsignal(number) for number in mine}
  for number, handler in before.items():
    signal.signal(number, handler)
  assert found == mine


def send(number):
  return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("during", [("step", "batch 3"), ("progress", 3)])
def test_a_signal_lets_the_step_finish_then_saves_and_raises(handlers, number, during):
  record = Record({during: [send(number)]})
  with pytest.raises(loop.Interrupted, match=f"{number.name} after step 3 of 9"):
    run(record, 9)
  assert record[-3:] == [("step", "batch 3"), ("progress", 3), ("save", 3, 3)]


def test_a_signal_during_evaluation_waits_for_the_next_step(handlers):
  record = Record({("evaluate", 2): [send(signal.SIGTERM)]})
  with pytest.raises(loop.Interrupted, match="SIGTERM after step 3 of 9"):
    run(record, 9, evaluate=2, save=2)
  assert record[2:] == [
    ("step", "batch 2"),
    ("progress", 2),
    ("evaluate", 2, 2),
    ("save", 2, 2),
    ("step", "batch 3"),
    ("progress", 3),
    ("save", 3, 3),
  ]


def test_a_signal_where_all_is_due_skips_the_costly_evaluation(handlers):
  record = Record({("step", "batch 2"): [send(signal.SIGINT)]})
  with pytest.raises(loop.Interrupted):
    run(record, 9, write=2, evaluate=2, save=2)
  assert record[-3:] == [("progress", 2), ("write", 2, metrics(2)), ("save", 2, 2)]


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_does_not_wait(handlers, second):
  record = Record({("step", "batch 2"): [send(signal.SIGTERM), send(second)]})
  with pytest.raises(KeyboardInterrupt):
    run(record, 9, save=1)
  assert record[-1] == ("step", "batch 2")


def test_handlers_come_back_after_a_run(handlers):
  inside = []
  run(Record({("progress", 1): [lambda: inside.append(signal.getsignal(signal.SIGINT))]}), 1)
  assert inside[0] is not handlers[signal.SIGINT]


def test_handlers_come_back_after_an_error(handlers):
  def fail():
    raise RuntimeError("full disk")

  with pytest.raises(RuntimeError, match="full disk"):
    run(Record({("save", 2): [fail]}), 9, save=2)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
@pytest.mark.parametrize("periods", [{"write": 3}, {"save": 3}])
def test_a_loss_that_is_not_finite_is_not_saved(handlers, loss, periods):
  record = Record()
  with pytest.raises(FloatingPointError, match=f"loss is {loss} at step 3") as error:
    run(record, 9, losses={3: loss}, **periods)
  assert record[-1] == ("progress", 3) and "\n" not in str(error.value)


def test_nor_is_it_saved_by_a_signal(handlers):
  record = Record({("step", "batch 2"): [send(signal.SIGTERM)]})
  with pytest.raises(FloatingPointError):
    run(record, 9, losses={2: float("nan")})
  assert record[-1] == ("progress", 2)


def test_every_step_is_judged_once_in_order_when_the_next_is_dispatched():
  record = Record()

  run(record, 5, write=3, judge=lambda scalars: record.append(("judge", scalars)))
  assert [event for event in record if event[0] in ("step", "judge", "write")] == [
    ("step", "batch 1"),
    ("step", "batch 2"),
    ("judge", {"loss": 1.0}),
    ("step", "batch 3"),
    ("judge", {"loss": 2.0}),
    ("judge", metrics(3)),  # all of them, before they are written
    ("write", 3, metrics(3)),
    ("step", "batch 4"),
    ("step", "batch 5"),
    ("judge", {"loss": 4.0}),
    ("judge", metrics(5)),
    ("write", 5, metrics(5)),
  ]


@pytest.mark.parametrize("bad", range(1, 7))
@pytest.mark.parametrize("period", [1, 2, 3, 1000])
def test_a_bad_step_ends_the_run_with_its_own_batch_and_saves_nothing_of_it(bad, period):
  record = Record()
  losses = dict.fromkeys(range(bad, 9), float("nan"))  # as do the steps after it
  with pytest.raises(loop.Diverged, match=f"loss is nan at step {bad},") as error:
    run(record, 6, write=period, save=period, losses=losses)
  assert error.value.step == bad and error.value.batch == f"batch {bad}"
  assert str(error.value.metrics) == str({"loss": float("nan"), "weight": 2.0})
  assert max((event[1] for event in record if event[0] in ("write", "save")), default=0) < bad
  assert [event for event in record if event[0] == "step"][bad + 1 :] == []  # found one late


def test_what_the_judge_says_is_what_the_error_says():
  judge = lambda scalars: "loss is too good" if scalars["loss"] == 4 else None
  with pytest.raises(FloatingPointError, match="The loss is too good at step 4, and nothing"):
    run(Record(), 9, judge=judge)


@pytest.mark.parametrize("during", ["evaluate", "save"])
def test_a_signal_in_what_follows_the_last_step_is_told(handlers, during):
  """All is done and saved, but other runs of a sweep are not to begin."""
  record = Record({(during, 2): [send(signal.SIGTERM)]})
  with pytest.raises(loop.Interrupted, match="SIGTERM after step 2 of 2"):
    run(record, 2)
  assert [event[0] for event in record][-3:] == ["write", "evaluate", "save"]


def test_a_step_of_numbers_is_judged_at_once():
  """As a round's are: the next would draw samples, and write them down."""
  rounds = []

  def step(held, batch):
    rounds.append(batch)
    return held._replace(step=held.step + 1), {"loss": float("nan") if batch == 2 else 1.0}

  never = loop.Every(1000, lambda *args: None)
  with pytest.raises(loop.Diverged, match="step 2"):
    loop.fit(
      start(), itertools.count(1), step, num_steps=9, write=never, evaluate=never, save=never
    )
  assert rounds == [1, 2]
