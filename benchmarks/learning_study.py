"""One start, many ways to learn from its own samples, at equal samples: which gain, at what price.

  make study-learning                       # or, with its flags:
  python -m ancestral.benchmarks.learning_study --folder=runs/study [--methods=GRPO,RAFT] [--runs=3]

Trains a 0.1M-parameter transformer on sums until it answers about half of held-out 3-digit ones,
then lets every method have the same number of its samples, verified: policy gradients, pairs and
imitation; and two controls whose rewards say nothing, or the opposite (arXiv 2507.10532). No right
answer is read but the model's own. Measured on held-out problems: pass@1, pass@16, and
KL(model, start) in nats per answer, with 95% intervals (Student's t) over seeds. Runs that are done
are not repeated. Half an hour on 2 CPU cores.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import rich.console
import rich.table
import scipy.stats
from absl import app, flags, logging

from ancestral.configs import arithmetic, policy, preference
from ancestral.evaluation import attempts as attempts_lib
from ancestral.evaluation import coverage
from ancestral.launch import experiment as experiment_lib
from ancestral.launch import fields, language, train
from ancestral.models import transformer
from ancestral.training import learning as rounds
from ancestral.training import rollouts

_FOLDER = flags.DEFINE_string("folder", "runs/study", "Where the runs and results are kept.")
_METHODS = flags.DEFINE_list("methods", None, "Those of METHODS to run; all.")
_RUNS = flags.DEFINE_integer("runs", 3, "Runs of each.")
_ROUNDS = flags.DEFINE_integer("rounds", 60, "Rounds of 128 problems and 8 samples of each.")
_PROBLEMS = flags.DEFINE_integer("problems", 400, "Held-out problems, 16 samples of each.")

LEVEL, SAMPLES = 3, 16


class Method(NamedTuple):
  """A variant of a config, and what the study sets in it."""

  config: Any  # a module of configs/
  variant: str
  peak: float = 3e-4  # learning rate
  overrides: Mapping[str, Any] = {}


OFFLINE = {"rollouts.policy": "start"}
METHODS: Mapping[str, Method] = {
  "RAFT": Method(policy, "raft"),
  "offline DPO": Method(preference, "dpo", overrides=OFFLINE),
  "DPO": Method(preference, "dpo"),
  "Step-DPO": Method(preference, "step_dpo"),
  "offline REDI": Method(preference, "redi", overrides=OFFLINE),
  "REDI": Method(preference, "redi"),
  "GRPO": Method(policy, "grpo"),
  "Dr. GRPO": Method(policy, "dr_grpo"),
  "RLOO": Method(policy, "rloo"),
  "OREAL": Method(policy, "oreal"),
  "GRPO of random rewards": Method(policy, "grpo", overrides={"rollouts.reward": "random"}),
  "GRPO of inverted rewards": Method(policy, "grpo", overrides={"rollouts.reward": "inverted"}),
}


class Measured(NamedTuple):
  """Of held-out problems."""

  pass_1: float
  pass_16: float
  divergence: float  # from the start, nats per answer


def start_config() -> fields.Config:
  """Sums, by a small model, stopped early."""
  config = arithmetic.get_config("tiny")
  with config.unlocked():
    config.model.update(num_layers=2, width=64)
    config.train.update(num_steps=325, evaluate_every=325, save_every=325)
  return config


def config_of(method: Method, start: str, seed: int, num_rounds: int) -> fields.Config:
  """The method's run: rounds of 128 problems of the level, 8 samples of each."""
  config = method.config.get_config(method.variant)
  with config.unlocked():
    config.seed, config.start.workdir, config.levels = seed, start, (LEVEL,)
    config.rollouts.update(group_size=8, batch_size=1024)
    config.optimizer.update(peak=method.peak, schedule="warmup_stable_decay")
    config.train.update(num_steps=num_rounds, batch_size=128, evaluate_every=num_rounds)
    config.train.update(save_every=num_rounds)
    config.update_from_flattened_dict(method.overrides)
  return config.lock()


def trained(config: fields.Config, workdir: str) -> tuple[language.Experiment, Any]:
  """The experiment and its parameters as trained; does what is left of the run."""
  run = train.open_run(config, workdir)
  state = train.train(run)
  return run.experiment, state.params


def measure(experiment: language.Experiment, start_params: Any, num_problems: int):
  """A function of params: what is `Measured` of its answers."""
  c = experiment.config
  with (config := c.copy_and_resolve_references()).unlocked():
    config.task.levels = (LEVEL,)
  problems = language.held_out_problems(experiment._replace(config=config.lock()), num_problems)
  sample = rollouts.sampler(
    experiment.model,
    group_size=SAMPLES,
    max_new_tokens=c.evaluation.max_new_tokens,
    stop=(experiment.tokenizer.eos,),
  )
  score = rounds.scorer(experiment.model)

  def measured(params) -> Measured:
    made = rollouts.roll_out(
      sample,
      transformer.unstack(params),
      experiment.task,
      problems,
      jax.random.key(1),
      verify_all=attempts_lib.in_process(experiment.task.verify),
      temperature=1.0,
      group_size=SAMPLES,
      batch_size=len(problems) * SAMPLES,
      max_length=experiment.model_config.max_length,
      max_new_tokens=c.evaluation.max_new_tokens,
    )
    correct = made.rewards().sum(axis=1).astype(int)
    log_ratio = made.rows["log_prob"] - np.asarray(score(start_params, made.rows))
    return Measured(
      float(np.mean(coverage.pass_at_k(SAMPLES, correct, 1))),
      float(np.mean(coverage.pass_at_k(SAMPLES, correct, SAMPLES))),
      float(np.mean(log_ratio.sum(axis=1))),
    )

  return measured


def interval(values: Sequence[float]) -> str:
  """Mean and half the 95% interval of Student's t."""
  mean, count = np.mean(values), len(values)
  if count < 2:
    return f"{mean:.3f}"
  half = scipy.stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / np.sqrt(count)
  return f"{mean:.3f} ± {half:.3f}"


def table(
  start: Measured, found: Mapping[str, Sequence[Measured]], samples: int
) -> rich.table.Table:
  """One row a method."""
  made = rich.table.Table(
    "method", "pass@1", "pass@16", "KL to the start", "samples", title="Held-out 3-digit sums"
  )
  made.add_row("the start", *(f"{x:.3f}" for x in start[:2]), "0", "0")
  for name, runs in found.items():
    made.add_row(name, *map(interval, zip(*runs, strict=True)), f"{samples:,}")
  return made


def wanted() -> list[str]:
  """The methods of the flag.

  Raises:
    ValueError: there is none of a name.
  """
  names = _METHODS.value or list(METHODS)
  for name in names:
    if name not in METHODS:
      raise ValueError(f"--methods has {name!r}; it may have {', '.join(METHODS)}.")
  return names


def main(_: Sequence[str]) -> None:
  """Runs what is missing, and prints the table."""
  logging.set_verbosity(logging.WARNING)
  names, folder = wanted(), pathlib.Path(_FOLDER.value)
  jax.config.update("jax_compilation_cache_dir", str((folder / "compiled").absolute()))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  start, _ = trained(start_config(), f"{folder}/start")
  start_params = experiment_lib.restore_params(None, f"{folder}/start")[1]
  measured = measure(start, start_params, _PROBLEMS.value)
  at_start = measured(start_params)
  print(f"start: {at_start}", flush=True)
  found: dict[str, list[Measured]] = {}
  for name in names:
    for seed in range(_RUNS.value):
      config = config_of(METHODS[name], f"{folder}/start", seed, _ROUNDS.value)
      slug = name.lower().replace(" ", "_")
      _, params = trained(config, f"{folder}/{slug}/{seed}")
      found.setdefault(name, []).append(measured(params))
      print(f"{name}, seed {seed}: {found[name][-1]}", flush=True)
  samples = _ROUNDS.value * 128 * 8
  rich.console.Console().print(table(at_start, found, samples))


if __name__ == "__main__":
  app.run(main)
