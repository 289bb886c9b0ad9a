"""A weak digits model learns from a classifier's judgement; another classifier judges the result.

  python -m ancestral.launch.train --config=configs/image_diffusion.py --workdir=runs/weak \\
      --seeds=0,1,2 --config.train.num_steps=300
  python -m ancestral.benchmarks.image_learning --run=runs/weak \\
      --figure=docs/figures/image_learning.png

Every method draws as many images: --rounds of 32 classes, 8 of each, by the evaluations of
configs/image_learning.py. `random` is RAFT on a coin's rewards: what retraining on one's own
samples does without a judge. Plus-minus is half of the range over seeds of the start. A row more,
`paired`, is the mean of the judge's accuracy less the start's, with a t interval of 95%.
"""

import os
import pathlib
import tempfile

import jax
import numpy as np
import scipy.stats
from absl import app, flags, logging

from ancestral.configs import image_learning as configs
from ancestral.launch import experiment as experiment_lib
from ancestral.launch import flags as launch_flags
from ancestral.launch import image_learning, images, solving
from ancestral.models import partition
from ancestral.training import data

_RUN = flags.DEFINE_string("run", None, "Workdir of `launch.train --seeds` to start from.")
_ROUNDS = flags.DEFINE_integer("rounds", 20, "Rounds of each method.", lower_bound=1)
_METHODS = flags.DEFINE_list("methods", None, "Some of METHODS; all of them if unset.")
_FIGURE = flags.DEFINE_string("figure", None, "File for the figure.")

METHODS = {
  "random": ("raft", {"rollouts.reward": "random"}),
  "raft": ("raft", {}),
  "raft_real": ("raft_real", {}),
  "reward_weighted": ("reward_weighted", {}),
  "diffusion_dpo": ("diffusion_dpo", {}),
}
COLUMNS = {
  "verifier_accuracy": "verifier finds the class",
  "accuracy": "judge finds it",
  "verifier_log_prob": "verifier's log p",
  "log_prob": "judge's log p",
  "frechet": "Frechet distance",
  "diversity": "spread in a class",
}
SHOWN = 2  # samples of each class in the figure


def built(seed: str, name: str) -> images.Experiment:
  """The experiment of a method from the start of a seed."""
  variant, settings = METHODS[name]
  config = configs.get_config(variant)
  settings = {
    "start.workdir": f"{_RUN.value}/seed={seed}",
    "verifier.workdir": f"{_RUN.value}/verifier",  # one for all seeds
    "judge.workdir": f"{_RUN.value}/judge",
    "train.num_steps": _ROUNDS.value,
    **settings,
  }
  with config.unlocked():
    config.update_from_flattened_dict(settings)
  return experiment_lib.build(config)


def learned(experiment: images.Experiment) -> images.models.Params:
  """Parameters after all rounds."""
  config = experiment.config
  init_key, key = jax.random.split(jax.random.key(config.seed))
  abstract = experiment_lib.abstract_state(experiment, partition.make_mesh())
  state = experiment_lib.first_state(experiment, init_key, abstract)
  start = lambda: experiment_lib.start_params(config)
  batches = data.batches(
    experiment.source, experiment.rows, batch_size=config.train.batch_size, seed=config.seed
  )
  with image_learning.stepping(experiment, abstract, pathlib.Path(), 0, start) as step:
    for _ in range(config.train.num_steps):
      state, _ = step(key, state, next(batches))
  batches.close()
  return state.params


def drawn(experiment: images.Experiment, params: images.models.Params) -> np.ndarray:
  """Samples of each class from the same noises, [SHOWN * classes, H, W, C]."""
  labels = np.tile(np.arange(experiment.examples.num_classes), SHOWN)
  c = experiment.config.evaluation
  table = solving.table(experiment.noising, c)
  key = jax.random.key(1)
  return images.draw(images.sampler(experiment), params, table, key, labels, chunk=c.batch_size)


def draw_figure(rows: dict[str, np.ndarray], path: str) -> None:
  """A row of samples of each method."""
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(len(rows), 1, figsize=(8, 0.55 * len(rows)))
  for axis, (name, x) in zip(axes, rows.items(), strict=True):
    axis.imshow(np.concatenate(list(x[..., 0]), axis=1), cmap="gray_r", vmin=-1, vmax=1)
    axis.set_ylabel(name.replace("_", " "), rotation=0, ha="right", va="center", fontsize=8)
    axis.set_xticks([])
    axis.set_yticks([])
  figure.tight_layout(pad=0.3)
  figure.savefig(path, dpi=130)


def over_seeds(values) -> str:
  """Mean, and half of the range."""
  return f"{np.mean(values):.3f} ± {np.ptp(values) / 2:.3f}"


def paired(gains) -> str:
  """The mean gain over seeds and its t interval."""
  if len(gains) < 2:
    return f"{np.mean(gains):.3f}"
  half = scipy.stats.t.ppf(0.975, len(gains) - 1) * np.std(gains, ddof=1) / len(gains) ** 0.5
  return f"{np.mean(gains):.3f} ({np.mean(gains) - half:.3f} to {np.mean(gains) + half:.3f})"


def main(_) -> None:
  """Prints the table."""
  logging.set_verbosity(logging.WARNING)
  folder = os.path.join(tempfile.gettempdir(), "ancestral_compiled")
  jax.config.update("jax_compilation_cache_dir", folder)  # a method is one program for all seeds
  seeds = launch_flags.SEEDS.value or ("0", "1", "2")
  names = _METHODS.value or list(METHODS)
  scores, pictures = {}, {}

  def note(name, experiment, params):
    scores.setdefault(name, []).append(experiment.score(params))
    pictures.setdefault(name, drawn(experiment, params))

  print("| | " + " | ".join(COLUMNS.values()) + " | judge, less the start |")
  print("|---" * (len(COLUMNS) + 2) + "|")
  for name in ("start", *names):
    for seed in seeds:
      experiment = built(seed, names[0] if name == "start" else name)
      make = experiment_lib.start_params
      note(name, experiment, make(experiment.config) if name == "start" else learned(experiment))
    gains = [
      b["accuracy"] - a["accuracy"] for a, b in zip(scores["start"], scores[name], strict=True)
    ]
    cells = [over_seeds([score[column] for score in scores[name]]) for column in COLUMNS]
    print(f"| {name} | " + " | ".join(cells) + f" | {paired(gains)} |", flush=True)
  if _FIGURE.value:
    draw_figure(pictures, _FIGURE.value)


if __name__ == "__main__":
  app.run(main)
