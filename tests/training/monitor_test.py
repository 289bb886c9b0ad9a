"""Speeds by a clock of the test's, memory of made-up devices, and traces that are read back."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging as absl_logging

from ancestral.training import loop, monitor, state

BATCH = {"tokens": np.zeros((4, 8), np.int32), "mask": np.zeros((4, 8), np.float32)}


class Clock:
  """Seconds that pass only when told."""

  now = 100.0

  def __call__(self):
    return self.now

  def passing(self, seconds, result=None):
    self.now += seconds
    return result


def device(kind, **stats):
  return types.SimpleNamespace(device_kind=kind, memory_stats=lambda: stats or None)


def waited_for(clock, seconds, batch=None):
  while True:
    yield clock.passing(seconds, BATCH if batch is None else batch)


def windows(watch, clock, num_steps, period, compiling=1000.0, save=None, evaluate=None):
  """Rates of the loop's windows, of steps that take 2 seconds and the first also to compile."""
  found = {}

  def step(held, batch):
    del batch
    clock.passing(2.0 + (compiling if int(held.step) == 0 else 0))
    return held._replace(step=held.step + 1), {"loss": jnp.float32(1), "weight": jnp.float32(7)}

  never = loop.Every(10**6, lambda *_: None)
  loop.fit(
    state.TrainState(jnp.int32(0), {}, (), ()),
    watch.batches(waited_for(clock, 0.5)),
    step,
    num_steps=num_steps,
    write=loop.Every(period, lambda done, scalars: found.update({done: watch.rates(scalars)})),
    evaluate=evaluate or never,
    save=save or never,
  )
  return found


def test_speeds_are_of_the_wall_between_writes():
  clock = Clock()
  found = windows(monitor.Stopwatch(clock=clock), clock, 9, 3)
  assert list(found) == [3, 6, 9]
  for done in (6, 9):  # 3 steps in 7.5 seconds, of which 1.5 waiting
    assert found[done] == pytest.approx(
      {
        "speed/steps_per_second": 3 / 7.5,
        "speed/examples_per_second": 3 * 4 / 7.5,
        "speed/tokens_per_second": 3 * 32 / 7.5,
        "speed/weight_per_second": 3 * 7 / 7.5,
        "speed/data_wait": 1.5 / 7.5,
      }
    )


def test_compilation_is_in_no_window():
  clock = Clock()
  found = windows(monitor.Stopwatch(clock=clock), clock, 4, 1)
  assert found[1] == {}
  assert all(found[done]["speed/steps_per_second"] == 1 / 2.5 for done in (2, 3, 4))
  # By this clock work is done where it is dispatched, so step 2 is too when the window opens.
  found = windows(monitor.Stopwatch(clock=clock), clock, 5, 5)
  assert found[5]["speed/steps_per_second"] == 4 / (3 * 2.5)


def test_evaluation_and_saving_are_in_no_window():
  clock = Clock()
  watch = monitor.Stopwatch(clock=clock)
  save = loop.Every(1, watch.aside(lambda *_: clock.passing(50.0)))
  evaluate = loop.Every(3, watch.aside(lambda *_: clock.passing(900.0)))
  found = windows(watch, clock, 8, 2, save=save, evaluate=evaluate)
  assert all(found[done]["speed/steps_per_second"] == 2 / 5.0 for done in (4, 6, 8))
  assert all(found[done]["speed/data_wait"] == 1 / 5.0 for done in (4, 6, 8))


def test_an_action_aside_returns_and_raises_as_it_did():
  watch = monitor.Stopwatch(clock=Clock())
  assert watch.aside(lambda a, b: a + b)(2, 3) == 5

  def fail():
    raise RuntimeError("full disk")

  with pytest.raises(RuntimeError, match="full disk"):
    watch.aside(fail)()


def test_utilisation_is_of_all_devices_peak():
  clock, asked = Clock(), []

  def flops(batch):
    asked.append(batch)
    return 989e12  # what one of the devices can do in a second

  watch = monitor.Stopwatch(flops=flops, devices=[device("NVIDIA H200")] * 4, clock=clock)
  found = windows(watch, clock, 6, 3)
  assert found[6]["speed/mfu"] == pytest.approx(0.4 / 4)  # of 4 devices, at 0.4 steps a second
  assert len(asked) == 1 and asked[0] is BATCH


@pytest.mark.parametrize(
  "settings",
  [
    {"flops": lambda batch: pytest.fail("asked"), "devices": [device("cpu")]},
    {"devices": [device("NVIDIA H200")]},
  ],
)
def test_utilisation_is_left_out_where_it_is_not_known(settings):
  clock = Clock()
  found = windows(monitor.Stopwatch(clock=clock, **settings), clock, 6, 3)
  assert all("speed/mfu" not in rates for rates in found.values()) and len(found[6]) == 5


def test_batches_pass_unchanged_to_their_end():
  batches = [{"image": np.ones((2, 3))}, {"image": np.zeros((2, 3))}]
  watch = monitor.Stopwatch()
  passed = zip(watch.batches(batches), batches, strict=True)
  assert [batch is made for batch, made in passed] == [True, True]
  assert list(watch.batches([])) == []


@pytest.mark.parametrize(
  "batch, examples, tokens",
  [
    ({"image": np.zeros((5, 4, 4, 1))}, 5, None),
    ({"chosen": {"tokens": np.zeros((3, 8))}, "rejected": {"tokens": np.zeros((3, 9))}}, 3, 51),
    ({"tokens": jnp.zeros((3, 8))}, 3, 24),
  ],
)
def test_what_is_in_a_batch(batch, examples, tokens):
  clock = Clock()
  watch = monitor.Stopwatch(clock=clock)
  batches = watch.batches(waited_for(clock, 0.25, batch))
  watch.rates()
  for _ in range(4):
    next(batches)
  found = watch.rates()
  assert found["speed/examples_per_second"] == 4 * examples and found["speed/data_wait"] == 1
  assert found.get("speed/tokens_per_second") == (tokens and 4 * tokens)


def test_processes_have_a_share_each_of_numpy_batches(monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 8)
  for shares, expected in ((None, 8 * 32), (2, 2 * 32), (1, 32)):
    clock = Clock()
    watch = monitor.Stopwatch(clock=clock, shares=shares)
    batches = watch.batches(waited_for(clock, 1.0))
    watch.rates()
    next(batches)
    assert watch.rates()["speed/tokens_per_second"] == expected


def test_memory_is_the_fullest_devices():
  first = device("NVIDIA H200", bytes_in_use=5, peak_bytes_in_use=9, bytes_limit=20)
  second = device("NVIDIA H200", bytes_in_use=7, peak_bytes_in_use=8, bytes_limit=20)
  assert monitor.memory([first, second]) == {"memory/in_use": 7.0, "memory/peak": 9.0}
  assert monitor.memory([device("cpu")]) == {}
  assert monitor.memory() == {}  # of this CPU


def traced_steps(directory):
  """Numbers of the steps annotated in a trace, and the names of all its events."""
  (path,) = directory.rglob("*.xplane.pb")
  planes = jax.profiler.ProfileData.from_file(str(path)).planes
  events = [event for plane in planes for line in plane.lines for event in line.events]
  steps = sorted(dict(event.stats)["step_num"] for event in events if event.name == "train")
  return steps, {event.name for event in events}


def counting(seen):
  @jax.jit
  def work(x):
    return jnp.tanh(x @ x)

  def step(x):
    seen.append(x)
    return work(x)

  return step


def test_a_trace_has_the_steps_that_were_asked_for(tmp_path):
  seen, x = [], jnp.ones((64, 64)) / 64
  directory = tmp_path / "profile"
  with monitor.profiled(counting(seen), directory, first=3, last=5, done=100) as step:
    for count in range(1, 9):
      x = step(x)
      assert directory.exists() == (count >= 5)  # written when the last is done
  steps, names = traced_steps(directory)
  assert steps == [103, 104, 105] and len(seen) == 8
  assert any("work" in name for name in names)  # the jitted function ran in it
  assert list(directory.rglob("*.trace.json.gz"))  # what Perfetto reads


def test_a_trace_ends_with_a_run_that_ends_in_it(tmp_path):
  with pytest.raises(RuntimeError, match="diverged"):
    with monitor.profiled(counting([]), tmp_path, first=2, last=9) as step:
      step(step(jnp.ones((8, 8))))
      raise RuntimeError("diverged")
  assert traced_steps(tmp_path)[0] == [2]


def test_a_run_without_the_steps_says_so(tmp_path, monkeypatch):
  lines = []
  monkeypatch.setattr(absl_logging, "warning", lambda text, *args: lines.append(text % args))
  with monitor.profiled(counting([]), tmp_path / "profile", first=4, last=5) as step:
    step(step(jnp.ones((8, 8))))
  assert lines == ["no profile: the run ended after 2 steps, before step 4"]
  assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize("first, last", [(0, 3), (4, 3)])
def test_steps_that_do_not_follow_are_refused(tmp_path, first, last):
  with pytest.raises(ValueError, match="give 1 <= first <= last"):
    with monitor.profiled(counting([]), tmp_path, first=first, last=last):
      pass
