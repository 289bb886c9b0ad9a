"""Learning from samples by the binaries: every method, resuming, controls, files, errors."""

import json
import pathlib
import shutil
import signal

import jax
import numpy as np
import pytest

from ancestral.configs import policy, preference
from ancestral.launch import (
  evaluate,
  experiment,
  fields,
  language,
  learning,
  rollouts,
  sample,
  train,
  workdirs,
)
from ancestral.training import checkpoint, metrics

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
VARIANTS = [("policy", name) for name in policy.METHODS]
VARIANTS += [("preference", name) for name in preference.METHODS | preference.UNPAIRED]


@pytest.fixture(scope="session")
def start_folder(tmp_path_factory):
  return tmp_path_factory.mktemp("start") / "run"


@pytest.fixture
def start(command, tiny, start_folder):
  """A run that answers some one-digit sums."""
  if not start_folder.exists():
    arguments = tiny(
      task__levels="(1,)",
      model__width=32,
      train__num_steps=40,
      train__batch_size=64,
      train__save_every=40,
      train__evaluate_every=40,
      optimizer__peak=0.02,
      evaluation__num_problems=5,
    )
    assert command(train, f"--workdir={start_folder}", *arguments).status == 0
  return start_folder


def arguments(start, config="policy.py:grpo", **changed):
  settings = {
    "start.workdir": start,
    "rollouts.group_size": 4,
    "rollouts.batch_size": 32,
    "rollouts.num_workers": 1,
    "train.num_steps": 2,
    "train.batch_size": 8,
    "train.evaluate_every": 2,
    "train.save_every": 1,
    "evaluation.num_problems": 4,
    "evaluation.num_samples": 2,
    "evaluation.batch_size": 8,
    **{name.replace("__", "."): value for name, value in changed.items()},
  }
  return [f"--config={CONFIGS / config}", *(f"--config.{k}={v}" for k, v in settings.items())]


def params_of(workdir, step=None):
  return experiment.restore_params(None, str(workdir), step=step)[1]


def seen(workdir):
  return [r for r in metrics.read_jsonl(workdir / "metrics.jsonl") if "reward" in r]


def test_a_run_begins_with_the_start_and_leaves_it_alone(command, start, tmp_path, snapshot):
  before = snapshot(start)
  outcome = command(train, f"--workdir={tmp_path / 'run'}", *arguments(start))
  assert outcome.status == 0 and snapshot(start) == before
  first, second = seen(tmp_path / "run")
  assert abs(first["ratio"] - 1) < 1e-5 and abs(second["ratio"] - 1) < 1e-5
  config = workdirs.saved_config(str(tmp_path / "run"))
  saved = workdirs.saved_config(str(start))
  assert config.model == saved.model and config.task == saved.task


def test_it_is_evaluated_and_sampled_as_a_language_model(command, start, tmp_path):
  workdir = tmp_path / "run"
  assert command(train, f"--workdir={workdir}", *arguments(start)).status == 0
  assert command(evaluate, f"--workdir={workdir}").status == 0
  record = json.loads((workdir / "evaluation.json").read_text())
  assert record["step"] == 2 and len(record["attempts"]) == 4
  outcome = command(sample, f"--workdir={workdir}", "--prompt=1+2=")
  assert outcome.status == 0 and outcome.out


def test_rollouts_are_written_to_read(command, start, tmp_path):
  workdir = tmp_path / "run"
  assert command(train, f"--workdir={workdir}", *arguments(start)).status == 0
  groups = [json.loads(line) for line in (workdir / "rollouts.jsonl").read_text().splitlines()]
  assert [group["step"] for group in groups] == [1] * 8 + [2] * 8
  for record in seen(workdir):
    rewards = [
      sample["reward"]
      for group in groups
      if group["step"] == record["step"]
      for sample in group["samples"]
    ]
    assert np.mean(rewards) == pytest.approx(record["reward"]) and len(rewards) == 32
  assert all(s["reason"] or s["correct"] for group in groups for s in group["samples"])
  assert command(rollouts, f"--workdir={workdir}", "--last_steps=1").status == 0
  page = (workdir / "rollouts.html").read_text()
  data = page.split('<script type="application/json" id="data">')[1].split("</script>")[0]
  assert json.loads(data) == groups[8:]
  outcome = command(rollouts, f"--workdir={tmp_path}")
  assert outcome.status == 2 and "rollouts.jsonl is not there" in outcome.err


def test_a_page_escapes_what_a_model_writes():
  text = "</script><script>alert(1)</script>"
  made = rollouts.page("<t>", [{"step": 1, "prompt": text, "samples": []}])
  assert "alert(1)</script>" not in made and "<title>&lt;t&gt;" in made


@pytest.mark.parametrize("config, variant", VARIANTS)
@pytest.mark.slow
def test_every_method_trains(command, start, tmp_path, config, variant):
  run = arguments(start, f"{config}.py:{variant}", optimizer__warmup_fraction=0.0)
  assert command(train, f"--workdir={tmp_path / 'run'}", *run).status == 0
  changed = jax.tree.map(
    lambda a, b: bool(np.any(a != b)), params_of(tmp_path / "run"), params_of(start)
  )
  assert any(jax.tree.leaves(changed))
  assert all(np.isfinite(record.get("loss", 0)) for record in seen(tmp_path / "run"))


def test_unpaired_samples_are_all_of_a_round_and_begin_at_the_start(command, start, tmp_path):
  workdir = tmp_path / "run"
  run = arguments(
    start,
    "preference.py:kto",
    rollouts__top_k=5,
    train__num_minibatches=1,
    method__options__undesirable_weight=0.5,
  )
  assert command(train, f"--workdir={workdir}", *run).status == 0
  first, second = seen(workdir)
  assert first["selected"] == 32 and first["desirable"] == pytest.approx(first["reward"])
  # The policy is the reference: no log-ratio, no divergence, half of each weight.
  assert first["loss"] == pytest.approx(0.5 * (0.5 + 0.5 * first["reward"]), abs=1e-5)
  assert abs(first["log_ratio"]) < 1e-5 < abs(second["log_ratio"])


def test_samples_are_as_long_as_the_start_is_evaluated(start):
  with (config := policy.get_config()).unlocked():
    config.start.workdir = str(start)
    limits = lambda config: (config.rollouts.max_new_tokens, config.evaluation.max_new_tokens)
    saved = workdirs.saved_config(str(start)).evaluation.max_new_tokens
    assert limits(learning.complete(config)) == (saved, saved)
    config.rollouts.max_new_tokens = saved + 1
    assert limits(learning.complete(config)) == (saved + 1, saved + 1)
    config.evaluation.max_new_tokens = saved + 2
    assert limits(learning.complete(config)) == (saved + 1, saved + 2)


FULL = {
  "config": "policy.py:dapo",
  "train__num_steps": 4,
  "train__num_epochs": 2,
  "train__average_decay": 0.9,
  "method__divergence_weight": 0.1,
  "method__entropy_weight": 0.01,
  "method__correction": "truncated_sequence",
  "rollouts__top_k": 5,
  "rollouts__temperature": 0.9,
  "rollouts__reference": "host",
}


def test_a_stopped_run_goes_on_with_the_same_rollouts(command, start, tmp_path):
  whole, broken = tmp_path / "whole", tmp_path / "broken"
  assert command(train, f"--workdir={whole}", *arguments(start, **FULL)).status == 0
  part = arguments(start, **{**FULL, "train__num_steps": 4})
  # Killed after its second checkpoint, with a third round's rollouts on their way to the file.
  assert command(train, f"--workdir={broken}", *part).status == 0
  for step in (3, 4):
    with checkpoint.open_manager(workdirs.checkpoints(broken), create=False) as manager:
      manager.delete(step)
  with (broken / "rollouts.jsonl").open("a") as file:
    file.write('{"step": 3, "prompt": "1+')
  elsewhere = {
    "rollouts__num_workers": 2,
    "rollouts__timeout": 9.0,
    "rollouts__reference": "device",
  }
  assert command(train, f"--workdir={broken}", *arguments(start, **FULL | elsewhere)).status == 0
  assert (broken / "rollouts.jsonl").read_text() == (whole / "rollouts.jsonl").read_text()
  jax.tree.map(np.testing.assert_array_equal, params_of(broken), params_of(whole))


@pytest.mark.parametrize("reward", ["random", "inverted"])
def test_controls_reward_what_they_say(command, start, tmp_path, reward):
  workdir = tmp_path / reward
  run = arguments(start, rollouts__reward=reward, train__num_steps=1)
  assert command(train, f"--workdir={workdir}", *run).status == 0
  groups = [json.loads(line) for line in (workdir / "rollouts.jsonl").read_text().splitlines()]
  pairs = [(s["reward"], s["correct"]) for group in groups for s in group["samples"]]
  if reward == "inverted":
    assert all(given == 1 - correct for given, correct in pairs)
  else:
    assert len(set(pairs)) > 2


def test_offline_rollouts_are_of_the_start_in_every_round(command, start, tmp_path):
  run = arguments(
    start, rollouts__policy="start", optimizer__peak=0.05, optimizer__warmup_fraction=0.0
  )
  assert command(train, f"--workdir={tmp_path / 'run'}", *run).status == 0
  first, second = seen(tmp_path / "run")
  assert abs(first["ratio"] - 1) < 1e-5 < 1e-2 < abs(second["ratio"] - 1)


@pytest.mark.parametrize(
  "changed, message",
  [
    ({"start.workdir": ""}, "config.start.workdir is empty; give a trained run's"),
    ({"start.workdir": "nowhere"}, "nowhere"),
    ({"rollouts.temperature": 0.0}, "config.rollouts.temperature is 0.0; it is above 0"),
    ({"rollouts.group_size": 0}, "config.rollouts.group_size is 0; it is at least 1"),
    ({"rollouts.reward": "prize"}, "config.rollouts.reward is 'prize'; it is one of"),
    ({"rollouts.policy": "old"}, "config.rollouts.policy is 'old'; it is one of current, start"),
    ({"method.surrogate": "ppo"}, "config.method.surrogate is 'ppo'; it is one of"),
    ({"method.advantage": "luck"}, "config.method.advantage is 'luck'; it is one of"),
    ({"method.correction": "all"}, "config.method.correction is 'all'; it is one of masked"),
    ({"train.num_minibatches": 0}, "config.train.num_minibatches is 0; it is at least 1"),
    ({"rollouts.top_k": 0}, "top_k"),
    ({"rollouts.top_p": 5.0}, "top_p(5.0)"),
    ({"method.divergence_weight": -1.0}, "config.method.divergence_weight is -1.0; it is at least"),
    ({"method.advantage": "leave_one_out", "rollouts.group_size": 1}, "A group needs two samples"),
    ({"method.surrogate": "reinforce"}, "options of reinforce has 'high'; it may have none"),
    ({"start.best": True, "start.step": 40}, "config.start has a step and best: give one of them"),
  ],
)
def test_what_cannot_be_is_one_line(command, start, tmp_path, changed, message):
  run = [*arguments(start), *(f"--config.{name}={value}" for name, value in changed.items())]
  outcome = command(train, f"--workdir={tmp_path / 'run'}", *run)
  assert outcome.status == 2 and message in outcome.err
  assert outcome.err.count("\n") == 1 and not (tmp_path / "run" / "checkpoints").exists()


def test_constants_that_a_loss_does_not_have_are_named(start):
  config = policy.get_config("grpo")
  with config.unlocked():
    config.start.workdir, config.method.options.hight = str(start), 0.3
  message = "method.options of ppo_clip has 'hight'; it may have low, high"
  with pytest.raises(ValueError, match=message):
    learning.build(config.lock())


def test_a_loss_of_mismatched_samples_takes_two_problems(start):
  with (config := preference.get_config("kto")).unlocked():
    config.start.workdir, config.train.batch_size = str(start), 1
  with pytest.raises(ValueError, match=r"train\.batch_size is 1; kto takes 2 problems at least"):
    learning.build(config.lock())


def test_a_start_of_text_has_no_verifier():
  saved = fields.Config({"model": {}, "data": {}, "loss": {}})
  config = policy.get_config("grpo")
  with pytest.MonkeyPatch.context() as patch, config.unlocked():
    config.start.workdir, config.start.step = "text", 1
    patch.setattr(workdirs, "saved_config", lambda workdir, step: saved)
    with pytest.raises(ValueError, match=r"start\.workdir='text' has no verifier"):
      learning.complete(config)


def test_a_signal_saves_the_round(command, start, tmp_path, monkeypatch):
  workdir = tmp_path / "run"
  judged = learning.REWARDS["verifier"]

  def stop(rng, made):
    signal.raise_signal(signal.SIGTERM)
    return judged(rng, made)

  monkeypatch.setitem(learning.REWARDS, "verifier", stop)
  run = arguments(start, train__num_steps=3, train__save_every=3)
  assert command(train, f"--workdir={workdir}", *run).status == 128 + signal.SIGTERM
  assert len(seen(workdir)) == 1
  monkeypatch.setitem(learning.REWARDS, "verifier", judged)
  assert command(train, f"--workdir={workdir}", *run).status == 0
  assert [record["step"] for record in seen(workdir)] == [1, 2, 3]


def test_a_constant_of_a_loss_is_a_flag(command, start, tmp_path):
  run = arguments(start, "preference.py:dpo", method__options__beta=0.05, train__num_steps=1)
  assert command(train, f"--workdir={tmp_path / 'run'}", *run).status == 0
  assert workdirs.saved_config(str(tmp_path / "run")).method.options.beta == 0.05


def test_problems_are_not_those_that_the_start_was_trained_on(start):
  config = policy.get_config("grpo")
  with config.unlocked():
    config.start.workdir = str(start)
  made = learning.build(config.lock())
  drawn = learning.problems_of(made)({"index": np.arange(20)})
  trained = language.build(workdirs.saved_config(str(start)))
  first = [made.tokenizer.decode(trained.source[i]["tokens"]) for i in range(20)]
  same = [text.startswith(problem.prompt) for text, problem in zip(first, drawn, strict=True)]
  assert sum(same) < 5  # of one-digit sums some are alike


def test_a_run_does_not_change_with_the_run_it_began_with(command, start, tmp_path):
  """The start goes on after the first round; "the latest" is still the one of that moment."""
  moving, whole, broken = tmp_path / "moving", tmp_path / "whole", tmp_path / "broken"
  shutil.copytree(start, moving)
  run = arguments(moving, "policy.py:oreal", train__num_steps=2)
  assert command(train, f"--workdir={whole}", *run).status == 0
  one = arguments(moving, "policy.py:oreal", train__num_steps=2)
  assert command(train, f"--workdir={broken}", *one).status == 0
  with checkpoint.open_manager(workdirs.checkpoints(broken), create=False) as manager:
    manager.delete(2)
  config = json.loads((moving / "config.json").read_text())
  step = config["train"]["num_steps"]
  on = [f"--config={CONFIGS / 'arithmetic.py'}", *_flags(config, train__num_steps=step + 5)]
  assert command(train, f"--workdir={moving}", *on).status == 0
  assert workdirs.saved_config(str(moving)).train.num_steps == step + 5
  assert command(train, f"--workdir={broken}", *run).status == 0
  assert workdirs.saved_config(str(broken)).start.step == step
  jax.tree.map(np.testing.assert_array_equal, params_of(broken), params_of(whole))


def _flags(config, **changed):
  """Every field of a saved configuration as a flag."""
  flat = {
    f"{section}.{name}": value
    for section, values in config.items()
    if isinstance(values, dict)
    for name, value in values.items()
    if value is not None
  }
  flat |= {name.replace("__", "."): value for name, value in changed.items()}
  tuples = {name: tuple(v) if isinstance(v, list) else v for name, v in flat.items()}
  return [f"--config.{name}={value}" for name, value in tuples.items()]
