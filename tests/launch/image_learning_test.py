"""Images learned from a classifier's judgement, by the binaries; what rounds select; refusals."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from ancestral.configs import image_classifier, image_diffusion, image_learning
from ancestral.launch import evaluate, experiment, sample, train, workdirs
from ancestral.launch import image_learning as launch
from ancestral.models import classifier as classifier_lib
from ancestral.training import checkpoint, metrics

START = {
  "model.num_layers": 1,
  "model.width": 16,
  "model.num_heads": 2,
  "train.num_steps": 2,
  "train.batch_size": 8,
  "train.save_every": 2,
  "evaluation.batch_size": 16,
}
TINY = {
  "rollouts.group_size": 3,
  "rollouts.evaluations": 2,
  "rollouts.batch_size": 16,
  "train.num_steps": 2,
  "train.batch_size": 4,
  "train.num_epochs": 2,
  "train.save_every": 1,
  "train.evaluate_every": 2,
  "evaluation.batch_size": 16,
  "evaluation.num_images": 20,
  "evaluation.evaluations": 2,
}


def arguments(module, workdir, settings, variant=None):
  path = pathlib.Path(module.__file__)
  config = f"{path}:{variant}" if variant else path
  return [
    f"--config={config}",
    f"--workdir={workdir}",
    *(f"--config.{name}={value}" for name, value in settings.items()),
  ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("image_learning")


@pytest.fixture
def start(command, folder, monkeypatch):
  """A tiny diffusion model of digits, made once; classifiers are trained for a few steps."""
  recipe = image_classifier.get_config()
  with recipe.unlocked():
    recipe.train.update(num_steps=4, batch_size=16)
  monkeypatch.setattr(image_classifier, "get_config", recipe.copy_and_resolve_references)
  path = folder / "start"
  if not path.exists():
    assert command(train, *arguments(image_diffusion, path, START)).status == 0
  return path


def learning(command, start, workdir, variant, **settings):
  chosen = {"start.workdir": start, **TINY} | {k.replace("__", "."): v for k, v in settings.items()}
  return command(train, *arguments(image_learning, workdir, chosen, variant))


def built(start, variant, **settings):
  config = image_learning.get_config(variant)
  chosen = TINY | {"start.workdir": str(start)}
  with config.unlocked():
    config.update_from_flattened_dict(
      chosen | {k.replace("__", "."): v for k, v in settings.items()}
    )
  return experiment.build(config)


def leaves(workdir, step):
  made = experiment.build(workdirs.saved_config(workdir, step))
  shape = jax.eval_shape(lambda key: experiment.init_state(made, key), jax.random.key(0))
  with checkpoint.open_manager(workdirs.checkpoints(workdir), create=False) as manager:
    state = checkpoint.restore(manager, shape, step).state
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


@pytest.mark.slow
def test_a_run_stops_and_goes_on_as_if_it_had_not(command, start, folder):
  """Of pairs, which read the start after a resumption too."""
  whole, halved = folder / "whole", folder / "halved"
  outcome = learning(command, start, whole, "diffusion_dpo")
  assert outcome.status == 0, outcome.err
  shutil.copytree(whole, halved)
  shutil.rmtree(halved / "checkpoints" / "2")
  resumed = learning(command, start, halved, "diffusion_dpo")
  assert resumed.status == 0 and "from step 1 to 2" in resumed.err
  assert leaves(whole, 2) == leaves(halved, 2)
  assert leaves(whole, 1) != leaves(whole, 2)


def test_what_is_learned_is_scored_sampled_and_measured(command, start, folder):
  run = folder / "raft"
  assert learning(command, start, run, "raft").status == 0
  records = metrics.read_jsonl(run / "metrics.jsonl")
  rounds = [record for record in records if "reward" in record]
  assert [record["step"] for record in rounds] == [1, 2]
  assert all(record["length"] == 2 and record["selected"] == 4 for record in rounds)
  (scores,) = (record for record in records if "verifier_accuracy" in record)
  assert {"accuracy", "log_prob", "frechet", "diversity", "held_out_loss"} <= set(scores)
  folders = [str(start / name) for name in ("verifier", "classifier")]
  assert [workdirs.saved_config(path).model.channels for path in folders] == [8, 16]
  outcome = command(sample, f"--workdir={run}", "--num_images=4", f"--output={run}/four.npz")
  assert outcome.status == 0, outcome.err
  assert np.load(run / "four.npz")["images"].shape == (4, 8, 8, 1)
  outcome = command(evaluate, f"--workdir={run}", f"--classifier={start}/classifier")
  assert outcome.status == 0, outcome.err
  found = json.loads((run / "evaluation.json").read_text())
  assert found["num_images"] == 20 and found["distances"]["frechet"] > 0


def made_of(rewards):
  """Rollouts whose images are their own number, of classes 10, 20, .."""
  count = np.arange(rewards.size, dtype=np.float32)
  x = np.broadcast_to(count[:, None, None, None], (rewards.size, 8, 8, 1))
  label = np.repeat(np.arange(len(rewards)), rewards.shape[1])
  lengths, right = np.full(rewards.shape, 2), (rewards > 0).astype(np.float32)
  return launch.Drawn({"x": x, "label": label}, rewards, right, lengths, {}, np.array([0, 1]))


REWARDS = np.array([[0.0, 3.0, 1.0], [2.0, 2.0, 2.0], [-1.0, -3.0, -2.0]], np.float32)


def numbers(x):
  return x[:, 0, 0, 0].tolist()


def test_raft_selects_the_best_of_each_class_and_as_many_real_images(start):
  made = built(start, "raft", method__real=2)
  found = launch.method_of(made).select(made_of(REWARDS), REWARDS)
  assert numbers(found["x"][:3]) == [1, 3, 6] and found["label"][:3].tolist() == [0, 1, 2]
  np.testing.assert_array_equal(found["weight"], 1)
  real = found["x"][3:]
  assert len(real) == 6
  for image, label in zip(real, found["label"][3:], strict=True):
    at = np.flatnonzero((made.examples.train == image[None]).all((1, 2, 3)))
    assert label in made.examples.train_labels[at]


def test_reward_weighted_selects_all_and_weighs_them(start):
  method = launch.method_of(built(start, "reward_weighted"))
  found = method.select(made_of(REWARDS), REWARDS)
  assert numbers(found["x"]) == list(range(9))
  weight = found["weight"].reshape(3, 3)
  np.testing.assert_allclose(weight[0, 1] / weight[0, 0], np.exp(3), rtol=1e-5)
  np.testing.assert_array_equal(weight[1], 1)


def test_diffusion_dpo_pairs_best_and_worst_and_none_of_equals(start):
  method = launch.method_of(built(start, "diffusion_dpo"))
  found = method.select(made_of(REWARDS), REWARDS)
  assert numbers(found["chosen"]["x"]) == [1, 6] and numbers(found["rejected"]["x"]) == [0, 7]
  assert found["label"].tolist() == [0, 2] and found["weight"].tolist() == [1, 1]


def test_the_verifier_gives_the_log_probability_of_the_class_asked_for():
  logits = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
  logits[2] = logits[2, 0]  # a tie is not held against the image
  stub = classifier_lib.Classifier(None, lambda params, x: (x, params[x[:, 0].astype(int)]))
  features = type("Features", (), {"classifier": stub, "params": jax.numpy.asarray(logits)})
  labels = np.array([0, 1, 2, 3, 0, 1, 2])
  x = np.arange(7, dtype=np.float32)[:, None]
  found, right = launch.judging(features, chunk=3)(x, labels)
  share = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  np.testing.assert_allclose(found, np.log(share[np.arange(7), labels]), rtol=1e-5)
  np.testing.assert_array_equal(right, logits[np.arange(7), labels] == logits.max(-1))
  assert right[2] == 1


def test_spread_is_the_mean_variance_within_classes():
  vectors = np.array([[0.0, 0.0], [2.0, 4.0], [5.0, 5.0], [5.0, 7.0], [9.0, 9.0]])
  labels = np.array([0, 0, 1, 1, 2])  # the last class has one
  assert launch.spread(vectors, labels) == pytest.approx(((2 + 8) + (0 + 2)) / 2)


def test_rounds_ask_for_every_class(start):
  source = built(start, "raft").source
  labels = [int(source[index]["label"]) for index in range(20)]
  assert labels == [*range(10), *range(10)]


@pytest.mark.parametrize(
  "variant, settings, message",
  [
    ("raft", {"start.workdir": ""}, "config.start.workdir is empty"),
    ("raft", {"method.keep": 4}, "config.method.keep is 4; it is from 1 to rollouts.group_size=3"),
    ("raft", {"method.real": -1}, "config.method.real is -1; it is at least 0"),
    ("reward_weighted", {"method.temperature": 0.0}, "config.method.temperature is 0.0"),
    ("diffusion_dpo", {"method.beta": 0.0}, "config.method.beta is 0.0; it is above 0"),
    ("diffusion_dpo", {"method.loss": "dop"}, "config.method.loss is 'dop'; it is one of dpo,"),
    ("diffusion_dpo", {"method.weighting": "no"}, "config.method.weighting is 'no'"),
    ("raft", {"rollouts.reward": "kind"}, "config.rollouts.reward is 'kind'"),
    ("raft", {"rollouts.group_size": 0}, "config.rollouts.group_size is 0; it is at least 1"),
  ],
)
def test_bad_input_is_one_line(command, start, tmp_path, variant, settings, message):
  outcome = learning(command, start, tmp_path / "run", variant, **settings)
  assert outcome.status == 2 and message in outcome.err and len(outcome.err.splitlines()) == 1
  assert not (tmp_path / "run").exists()
