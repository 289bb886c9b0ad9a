"""Ambient training: what noisy images are worth beside few clean ones.

  python -m ancestral.benchmarks.ambient --workdir=runs/ambient

Trains the digits model of configs/image_diffusion.py with a share of clean images, the others known
only under noise of --noise, and once more with the clean ones alone; then samples, and measures
Frechet's distance to real images. Without any clean image nothing is learned below the data's
noise; the second column is of grids that end there, one step from the sample. The same command
resumes.

Reference: Daras et al. 2024, arXiv 2411.02780; 2404.10177.
"""

import numpy as np
from absl import app, flags, logging

from ancestral.benchmarks import image_runs
from ancestral.configs import image_diffusion
from ancestral.launch import distances, train
from ancestral.launch import experiment as experiment_lib
from ancestral.launch import flags as flags_lib

_SHARES = flags.DEFINE_list("shares", "0,0.01,0.1,1", "Shares of clean images.")
_NOISE = flags.DEFINE_float("noise", 0.5, "Standard deviation of the noise of the others.")
_STEPS = flags.DEFINE_integer("num_steps", 600, "Steps of training.")
_REPEATS = flags.DEFINE_integer("repeats", 2, "Seeds of training.")

# Data so noisy that no time of the schedule is above them, which is to leave them out.
LEFT_OUT = 1e4


def trained(share: float, noise: float, seed: int) -> image_runs.Run:
  """The run of a clean share, trained if it is not yet."""
  config = image_diffusion.get_config("digits")
  with config.unlocked():
    config.seed = seed
    config.train.num_steps = _STEPS.value
    config.diffusion.update(clean_share=share, data_noise=noise)
  folder = flags_lib.required(flags_lib.WORKDIR)
  workdir = f"{folder}/share={share:g},noise={noise:g},seed={seed}"
  train.train(train.open_run(config, workdir))
  experiment, params, _ = experiment_lib.restore_params(config, workdir)
  features = distances.features_of(config, experiment.examples, f"{folder}/classifier")
  real = distances.halves(experiment.examples, config.evaluation.num_images)
  return image_runs.Run(experiment, params, real, features)


def distance(run: image_runs.Run, cleanest: float, evaluations: int = 20) -> float:
  """Frechet's, of samples by 2M whose last step is from noise `cleanest` to none."""
  table = image_runs.table(run, "dpmpp_2m", evaluations, cleanest=cleanest)
  return image_runs.frechet(run, image_runs.sampler(run, evaluations)(table))


def row(share: float) -> list[str]:
  """The cells of a clean share: all data down to no noise, down to the data's, clean data alone."""
  cleanest = image_diffusion.get_config("digits").evaluation.cleanest
  ends = (
    (_NOISE.value, cleanest, share > 0),
    (_NOISE.value, _NOISE.value, True),
    (LEFT_OUT, cleanest, 0 < share < 1),
  )
  cells = []
  for noise, end, sensible in ends:
    noise = _NOISE.value if share == 1 else noise
    runs = [trained(share, noise, seed) for seed in range(_REPEATS.value)] if sensible else []
    found = [distance(run, end) for run in runs]
    cells.append(f"{np.mean(found):.3f} ± {np.ptp(found) / 2:.3f}" if found else "")
  return cells


def main(_) -> None:
  """Prints a row for each share."""
  logging.set_verbosity(logging.WARNING)
  print("| clean share | all data | stopping at its noise | clean data alone |\n|---|---|---|---|")
  for text in _SHARES.value:
    print(f"| {float(text):.0%} | " + " | ".join(row(float(text))) + " |", flush=True)
  floor = image_runs.floor(trained(1.0, _NOISE.value, 0))
  print(f"\nfloor {floor:.4f}; noise {_NOISE.value} of data in [-1, 1]")


if __name__ == "__main__":
  app.run(main)
