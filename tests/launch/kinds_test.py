"""A kind of experiment beside language models goes through the same binaries."""

import json
import types
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags as absl_flags

from ancestral.launch import (
  draws,
  evaluate,
  experiment,
  fields,
  language,
  sample,
  supervised,
  train,
  workdirs,
)
from ancestral.models import partition
from ancestral.training import data, metrics

POINTS = np.random.default_rng(0).normal(3, 0.1, size=(64, 2)).astype(np.float32)
CONFIG = """
import ml_collections

def get_config():
  return ml_collections.ConfigDict({
    "kind": "mean",
    "seed": 0,
    "task": {"name": "points"},
    "optimizer": {"name": "adamw", "schedule": "warmup_cosine", "peak": 0.3,
                  "warmup_fraction": 0.1, "weight_decay": 0.0, "clip_norm": 1.0},
    "train": {"num_steps": 20, "batch_size": 8, "num_microbatches": 1, "average_decay": 0.5,
              "log_every": 5, "evaluate_every": 5, "save_every": 5, "keep": 2},
  }).lock()
"""
NUM_POINTS = absl_flags.DEFINE_integer("num_points", None, "Points to draw.")


class Experiment(NamedTuple):
  """The mean of points, by gradient descent."""

  config: object
  source: data.Source
  held_out: data.Source
  rows: object
  loss_fn: object
  schedule: object
  optimizer: object
  averaging: object
  init_params: object
  score: object


def build(config):
  fields.check(config, ("train",))
  fields.choose("task.name", config.task.name, {"points": None})
  schedule, optimizer = fields.optimizer_of(config)

  def loss_fn(key, params, batch):
    return (jnp.sum((batch["x"] - params["mean"][None]) ** 2, -1), jnp.ones(8)), {}

  return Experiment(
    config,
    data.Source(48, lambda i: {"x": POINTS[i]}),
    data.Source(16, lambda i: {"x": POINTS[48 + i]}),
    lambda items: items,
    loss_fn,
    schedule,
    optimizer,
    fields.averaging_of(config),
    lambda key: {"mean": jnp.zeros(2)},
    lambda mean: {"accuracy": float(np.mean(np.abs(POINTS[48:] - np.asarray(mean)) < 1))},
  )


def show(experiment, params, workdir, console):
  console.print("the mean", float(params[0]))
  return {"mean": np.asarray(params).tolist()}


def draw(wanted):
  _, params, step = experiment.restore_params(**wanted)
  print(f"{NUM_POINTS.value} points around {params[0]:.3f}, seed {draws.SEED.value}, step {step}")


@pytest.fixture
def mean_kind(monkeypatch):
  """The three tables that a kind is entered in."""
  module = types.SimpleNamespace(
    FREE_TO_EVALUATE=("train",),
    FREE_TO_RESUME=(),
    build=build,
    stepping=supervised.stepping,
    share=supervised.share,
    flops=supervised.flops,
    rules=lambda experiment: partition.rules(),
    finished=lambda params: params["mean"],
  )
  monkeypatch.setitem(experiment.KINDS, "mean", module)
  monkeypatch.setitem(evaluate.KINDS, "mean", types.SimpleNamespace(FLAGS=(), evaluate=show))
  monkeypatch.setitem(
    sample.KINDS, "mean", types.SimpleNamespace(FLAGS=(NUM_POINTS, draws.SEED), run=draw)
  )


@pytest.fixture
def workdir(command, mean_kind, tmp_path):
  """A run of that kind."""
  (tmp_path / "mean.py").write_text(CONFIG)
  path = tmp_path / "run"
  assert command(train, f"--workdir={path}", f"--config={tmp_path / 'mean.py'}").status == 0
  return path


def test_it_is_trained_and_scored_and_goes_on(command, workdir, tmp_path):
  records = metrics.read_jsonl(workdir / "metrics.jsonl")
  scored = {record["step"]: record["accuracy"] for record in records if "accuracy" in record}
  assert sorted(scored) == [5, 10, 15, 20] and scored[5] == 0 and scored[20] == 1
  again = [f"--workdir={workdir}", f"--config={tmp_path / 'mean.py'}"]
  assert "from step 20 to 20" in command(train, *again).err
  outcome = command(train, *again, "--config.train.batch_size=0")
  assert outcome.status == 2 and "config.train.batch_size is 0" in outcome.err


def test_it_is_evaluated(command, workdir):
  outcome = command(evaluate, f"--workdir={workdir}")
  assert outcome.status == 0 and "the mean" in outcome.out and "Step 20" in outcome.out
  result = json.loads((workdir / "evaluation.json").read_text())
  np.testing.assert_allclose(result["mean"], POINTS[:48].mean(0), atol=0.2)
  assert result["step"] == 20
  outcome = command(evaluate, f"--workdir={workdir}", "--best", "--last")
  assert outcome.status == 0, outcome.err


def test_it_is_sampled_with_its_own_flags(command, workdir, trained):
  outcome = command(sample, f"--workdir={workdir}", "--num_points=4", "--seed=3")
  assert outcome.status == 0 and outcome.out.startswith("4 points around 3")
  assert outcome.out.endswith(", seed 3, step 20\n")
  for run, flag in [(workdir, "--prompt=a"), (workdir, "--top_k=3"), (trained, "--num_points=4")]:
    outcome = command(sample, f"--workdir={run}", flag)
    name = flag.partition("=")[0]
    assert (outcome.status, outcome.err) == (
      2,
      f"error: {name} means nothing here: leave it out.\n",
    )


def test_an_unknown_kind(mean_kind):
  config = fields.Config({"kind": "meen"})
  with pytest.raises(
    ValueError,
    match=r"'meen'; it is one of classifier, .*, learning, masked, mean, preferences\.",
  ):
    experiment.build(config)


def test_an_experiment_has_what_the_protocol_says():
  for made in (Experiment, language.Experiment):
    assert set(experiment.Experiment.__annotations__) <= set(made._fields)


@pytest.mark.parametrize(
  "scalars, expected",
  [
    ({"pass@1": 0.5, "pass@1/level_1": 0.75}, 0.5),
    ({"accuracy": 0.25, "held_out_loss": 2.0}, 0.25),
    ({"held_out_loss": 2.0}, -2.0),
  ],
)
def test_the_quality_of_a_checkpoint(scalars, expected):
  assert workdirs.quality(scalars) == expected
