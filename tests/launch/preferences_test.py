"""Learning from pairs of a file by the binaries: accuracy, resuming, starts, errors of the file."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from ancestral.configs import preference
from ancestral.launch import evaluate, experiment, fields, preferences, sample, train, workdirs
from ancestral.models import base as models
from ancestral.models import partition
from ancestral.tasks import arithmetic
from ancestral.tasks import base as tasks
from ancestral.training import checkpoint, metrics, selection

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def write(path, records):
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  return path


@pytest.fixture(scope="session")
def sums(tmp_path_factory):
  """Right digits, each preferred to every wrong one."""
  problems = [
    arithmetic.ask(arithmetic.ADDITION, arithmetic.reversed_format, a, b)
    for a, b in np.ndindex(5, 5)
  ]
  records = [
    {"prompt": problem.prompt, "chosen": problem.answer, "rejected": digit}
    for problem in problems
    for digit in "0123456789".replace(problem.answer, "")
  ]
  return write(tmp_path_factory.mktemp("pairs") / "sums.jsonl", records)


def arguments(start, path, config="preference.py:file", **changed):
  settings = {
    "start.workdir": start,
    "data.path": path,
    "optimizer.peak": 0.02,
    "train.num_steps": 4,
    "train.batch_size": 8,
    "train.log_every": 1,
    "train.evaluate_every": 2,
    "train.save_every": 2,
    "evaluation.num_problems": 3,
    "evaluation.num_samples": 2,
    "evaluation.batch_size": 8,
    **{name.replace("__", "."): value for name, value in changed.items()},
  }
  return [f"--config={CONFIGS / config}", *(f"--config.{k}={v}" for k, v in settings.items())]


def params_of(workdir):
  return experiment.restore_params(None, str(workdir))[1]


def scored(workdir):
  return [r for r in metrics.read_jsonl(workdir / "metrics.jsonl") if "accuracy" in r]


@pytest.fixture(scope="session")
def learned_folder(tmp_path_factory):
  return tmp_path_factory.mktemp("learned") / "run"


FULL = {"train__average_decay": 0.9, "train__num_microbatches": 2, "method__likelihood_weight": 0.5}


@pytest.fixture
def learned(command, trained, sums, learned_folder):
  """A run of 4 steps with checkpoints at 2 and 4, made once."""
  if not learned_folder.exists():
    run = arguments(trained, sums, **FULL)
    assert command(train, f"--workdir={learned_folder}", *run).status == 0
  return learned_folder


@pytest.mark.parametrize("variant", ["file", "file_simpo"])
def test_held_out_pairs_are_told_apart(command, trained, sums, tmp_path, variant):
  workdir = tmp_path / "run"
  run = arguments(
    trained,
    sums,
    f"preference.py:{variant}",
    train__num_steps=60,
    train__batch_size=32,
    train__evaluate_every=20,
    train__save_every=20,
  )
  assert command(train, f"--workdir={workdir}", *run).status == 0
  last = scored(workdir)[-1]
  assert last["step"] == 60 and last["accuracy"] > 0.85
  assert last["held_out_loss"] < np.log(2) / 2  # half of what DPO begins with
  with checkpoint.open_manager(workdirs.checkpoints(workdir), create=False) as manager:
    best = checkpoint.best_step(manager, workdirs.quality)
  accuracies = {record["step"]: record["accuracy"] for record in scored(workdir)}
  assert accuracies[best] == max(accuracies.values())


def test_before_training_log_ratios_are_0(trained, sums):
  config = preference.get_config("file")
  with config.unlocked():
    config.start.workdir, config.data.path = str(trained), str(sums)
  made = experiment.build(config)
  found = made.score(experiment.start_params(made.config))
  assert found["held_out_loss"] == pytest.approx(np.log(2), abs=1e-6)


def by_hand(experiment_, params, reference, pair):
  """The margin of log-ratios of a pair, and the chosen one's log-probability per token."""
  model, tokenizer, ratios, means = experiment_.model, experiment_.tokenizer, [], []
  for name in ("chosen", "rejected"):
    head = [tokenizer.bos, *tokenizer.encode(pair["prompt"])]
    tokens = np.array([[*head, *tokenizer.encode(pair[name]), tokenizer.eos]])
    values = []
    for weights in (params, reference):
      hidden = models.apply(model, weights, tokens[:, :-1])[0]
      law = jax.nn.log_softmax(model.readout(weights, hidden))
      picked = np.take_along_axis(np.asarray(law), tokens[:, 1:, None], -1)
      values.append(picked[0, len(head) - 1 :])
    ratios.append(np.sum(values[0] - values[1]))
    means.append(np.mean(values[0]))
  return ratios[0] - ratios[1], means[0]


def test_scores_are_of_the_pairs_held_out_against_the_start(learned, trained, sums):
  lines = [json.loads(line) for line in sums.read_text().splitlines()]
  held_out = [x for i, x in enumerate(lines) if tasks.split_of(str(i), test_percent=10) == "test"]
  built, params, _ = experiment.restore_params(None, str(learned))
  reference = params_of(trained)
  margins = np.array([by_hand(built, params, reference, pair) for pair in held_out])
  last = scored(learned)[-1]
  assert last["accuracy"] == pytest.approx(np.mean(margins[:, 0] > 0))
  losses = np.log1p(np.exp(-0.1 * margins[:, 0])) - 0.5 * margins[:, 1]
  assert last["held_out_loss"] == pytest.approx(losses.mean(), rel=1e-4)
  with (config := built.config.copy_and_resolve_references()).unlocked():
    config.evaluation.num_pairs = 3
  few = experiment.build(config).score(params)
  assert few["held_out_loss"] == pytest.approx(losses[:3].mean(), rel=1e-4)


def test_a_stopped_run_goes_on_bit_by_bit(command, learned, trained, sums, tmp_path):
  broken = tmp_path / "broken"
  shutil.copytree(learned, broken)
  with checkpoint.open_manager(workdirs.checkpoints(broken), create=False) as manager:
    manager.delete(4)
  outcome = command(train, f"--workdir={broken}", *arguments(trained, sums, **FULL))
  assert outcome.status == 0 and "from step 2 to 4" in outcome.err
  jax.tree.map(np.testing.assert_array_equal, params_of(broken), params_of(learned))
  assert scored(broken) == scored(learned)


def test_it_is_evaluated_and_sampled_as_a_language_model(command, learned):
  outcome = command(evaluate, f"--workdir={learned}")
  assert outcome.status == 0 and "told apart" in outcome.out and "pass@1" in outcome.out
  record = json.loads((learned / "evaluation.json").read_text())
  assert record["accuracy"] == pytest.approx(scored(learned)[-1]["accuracy"])
  assert len(record["attempts"]) == 9  # 3 of each of the start's levels
  outcome = command(sample, f"--workdir={learned}", "--prompt=1+2=")
  assert outcome.status == 0 and outcome.out


def test_a_start_of_text_has_its_pairs_scored(command, tiny, tmp_path):
  texts = write(tmp_path / "texts.jsonl", [{"text": "ab" * n} for n in range(1, 60)])
  settings = {"data__path": texts, "data__row_length": 16, "evaluation__max_new_tokens": 4}
  start = tmp_path / "start"
  assert command(train, f"--workdir={start}", *tiny("text.py:jsonl", **settings)).status == 0
  pairs = [{"prompt": "ab" * n, "chosen": "ba", "rejected": "bb"} for n in range(1, 6)] * 10
  path, workdir = write(tmp_path / "pairs.jsonl", pairs), tmp_path / "run"
  run = arguments(start, path, train__num_steps=8)
  assert command(train, f"--workdir={workdir}", *run).status == 0
  assert scored(workdir)[-1]["accuracy"] == 1
  assert command(evaluate, f"--workdir={workdir}").status == 0
  assert set(json.loads((workdir / "evaluation.json").read_text())) == {
    "step",
    "accuracy",
    "held_out_loss",
  }
  outcome = command(sample, f"--workdir={workdir}", "--prompt=ab")
  assert outcome.status == 0 and outcome.out


@pytest.mark.parametrize("loss", preference.METHODS)
def test_every_loss_of_pairs_can_be_named(trained, sums, loss):
  config = preference.get_config(f"file_{loss}")
  with config.unlocked():
    config.start.workdir, config.data.path = str(trained), str(sums)
  made = experiment.build(config)
  batch = jax.tree.map(lambda *x: np.stack(x), made.source[0], made.source[1])
  side = {"reference_log_prob": np.zeros_like(batch["chosen"]["mask"])}
  batch |= {name: {**batch[name], **side} for name in ("chosen", "rejected")}
  params = jax.eval_shape(made.init_params, jax.random.key(0))
  (losses, weight), _ = jax.eval_shape(made.loss_fn, None, params, batch)
  assert losses.shape == weight.shape == (2,)


def test_a_row_is_a_response_and_its_weights_lie_on_it(tmp_path):
  path = write(tmp_path / "p.jsonl", [{"prompt": "7", "chosen": "12", "rejected": "134"}])
  tokenizer = arithmetic.addition().tokenizer
  pairs = preferences.pairs_of(path, tokenizer, selection.first_difference, row_length=7)
  one, two, three, four, seven = (tokenizer.encode(x)[0] for x in "12347")
  bos, eos, pad = tokenizer.bos, tokenizer.eos, tokenizer.pad
  chosen, rejected = pairs[0]["chosen"], pairs[0]["rejected"]
  np.testing.assert_array_equal(chosen["tokens"], [bos, seven, one, two, pad, pad, pad])
  np.testing.assert_array_equal(chosen["targets"], [seven, one, two, eos, pad, pad, pad])
  np.testing.assert_array_equal(chosen["mask"], [0, 1, 1, 1, 0, 0, 0])
  np.testing.assert_array_equal(chosen["weight"], [0, 0, 1, 0, 0, 0, 0])
  np.testing.assert_array_equal(rejected["targets"], [seven, one, three, four, eos, pad, pad])
  np.testing.assert_array_equal(rejected["mask"], [0, 1, 1, 1, 1, 0, 0])
  np.testing.assert_array_equal(rejected["weight"], [0, 0, 1, 0, 0, 0, 0])
  assert len(pairs) == 1 and pairs[0]["weight"] == 1


PAIR = '{"prompt": "1+1=", "chosen": "2", "rejected": "3"}\n'


@pytest.mark.parametrize(
  "text, message",
  [
    (PAIR + "{1}\n", "bad.jsonl:2 is not JSON"),
    (PAIR + '\n{"prompt": "1+1=", "chosen": "2"}\n', "bad.jsonl:3 lacks string fields"),
    ("\n" + PAIR * 9 + PAIR.replace("3", "3" * 20), "bad.jsonl:11: a row of 25 tokens is needed"),
    (PAIR + PAIR.replace("3", "\u00e9"), "bad.jsonl:2: "),
    ("", "has no lines"),
    (PAIR, "none of 1 items is on the test side"),
    (None, "config.data.path is "),
  ],
)
def test_what_a_file_cannot_have_is_one_line(command, trained, tmp_path, text, message):
  path = tmp_path / "bad.jsonl"
  if text is not None:
    path.write_text(text)
  outcome = command(train, f"--workdir={tmp_path / 'run'}", *arguments(trained, path))
  assert outcome.status == 2 and message in outcome.err, outcome.err
  assert outcome.err.count("\n") == 1 and not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
  "changed, message",
  [
    ({"start.workdir": ""}, "config.start.workdir is empty; give a trained run's"),
    ({"start.workdir": "nowhere"}, "nowhere"),
    ({"data.path": "."}, "config.data.path is '.', a folder; give a file"),
    ({"method.loss": "dpoo"}, "config.method.loss is 'dpoo'; it is one of"),
    ({"evaluation.num_pairs": 0}, "config.evaluation.num_pairs is 0; it is at least 1"),
  ],
)
def test_what_cannot_be_is_one_line(command, trained, sums, tmp_path, changed, message):
  run = [
    *arguments(trained, sums),
    *(f"--config.{name}={value}" for name, value in changed.items()),
  ]
  outcome = command(train, f"--workdir={tmp_path / 'run'}", *run)
  assert outcome.status == 2 and message in outcome.err
  assert outcome.err.count("\n") == 1 and not (tmp_path / "run" / "checkpoints").exists()


def test_a_start_of_another_kind_is_refused(monkeypatch):
  config = preference.get_config("file")
  saved = fields.Config({"kind": "images"})
  monkeypatch.setattr(workdirs, "saved_config", lambda workdir, step: saved)
  with config.unlocked():
    config.start.workdir, config.start.step = "pictures", 1
  with pytest.raises(ValueError, match="'pictures' is of kind images; give a language model's"):
    preferences.complete(config)


def test_a_start_of_another_model_is_refused(learned):
  with (config := workdirs.saved_config(str(learned))).unlocked():
    config.model.width = 32
  with pytest.raises(ValueError, match="is of a model of other shapes"):
    made = experiment.build(config)
    abstract = experiment.abstract_state(made, partition.make_mesh())
    experiment.first_state(made, jax.random.key(0), abstract)
