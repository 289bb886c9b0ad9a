"""A diffusion model of images learns from its own samples, as a classifier judges them.

  python -m ancestral.launch.train --config=configs/image_learning.py:raft \\
      --workdir=runs/digits_raft --config.start.workdir=runs/digits

The model, its data and the loss of its denoiser are those of the run it starts from, which has
classes. Each of 40 rounds draws 8 images for each of 32 classes asked for; no real image is read,
unless `method.real` asks imitation for some. The classifier that rewards is in START/verifier;
another of other width and seed, in START/classifier, judges, and no update reads it: what both say
of the result tells what was learned from what was exploited. They are trained when there are none.

Variants:
  raft             imitation of the best of each group (2304.06767)
  raft_real        and of as many training images, which keep it near the data
  reward_weighted  imitation of all, weights softmax(r / temperature) in each group
  diffusion_dpo    the best of each group against the worst, beside the start (2311.12908)
"""

import ml_collections
from ml_collections import config_dict

from ancestral.launch import fields

METHODS = {
  # real: training images beside what is imitated, for each class asked for
  "raft": {"name": "best", "keep": 1, "real": 0},
  "raft_real": {"name": "best", "keep": 1, "real": 1},
  "reward_weighted": {"name": "tilted", "temperature": 1.0, "real": 0},
  "diffusion_dpo": {
    "name": "preference",
    "loss": "dpo",  # or ipo, hinge
    "beta": 0.1,
    "weighting": "noise",  # of the error of D, or as diffusion.weighting
  },
}


def get_config(variant: str = "raft") -> ml_collections.ConfigDict:
  """The experiment; see the file's docstring."""
  if variant not in METHODS:
    raise ValueError(
      f"configs/image_learning.py has no variant {variant!r}: it has {', '.join(METHODS)}."
    )
  config = ml_collections.ConfigDict(
    {
      "kind": "image_learning",
      "seed": 0,
      "start": {
        "workdir": "",  # of the trained run
        "step": config_dict.placeholder(int),  # its latest checkpoint
        "best": False,
      },
      "verifier": {  # beside configs/image_classifier.py, where none is in `workdir` yet
        "workdir": "",  # START/verifier
        "seed": 1,
        "channels": 8,
      },
      "judge": {"workdir": ""},  # START/classifier, as of launch.evaluate
      "rollouts": {
        "group_size": 8,
        "evaluations": 10,  # calls of the network for an image, by evaluation.solver
        "batch_size": 256,  # images at once
        "reward": "log_prob",  # of the class asked for; or verdict, random
      },
      "method": METHODS[variant],
      "optimizer": {
        "name": "adamw",
        "schedule": "warmup_cosine",
        "peak": 1e-4 if variant == "diffusion_dpo" else 3e-4,
        "warmup_fraction": 0.1,
        "weight_decay": 0.0,
        "clip_norm": 1.0,
      },
      "mesh": fields.mesh(),
      "train": {
        "num_steps": 40,  # rounds
        "batch_size": 32,  # classes asked for in a round, a group of images each
        "num_minibatches": 1,  # updates of a round, each with a share of what it selects
        "num_epochs": 4,  # how often each image is used, at new times and noises
        "num_microbatches": 1,
        "average_decay": 0.0,
        "log_every": 1,
        "evaluate_every": 10,
        "save_every": 10,
        "keep": 2,
        "spike_factor": config_dict.placeholder(float),  # a leap of the loss stops nothing
      },
      "evaluation": {
        "num_batches": 4,
        "batch_size": 256,
        "num_images": 500,  # compared with as many real ones
        "solver": "dpmpp_2m",
        "grid": "karras",
        "evaluations": 10,
        "noisiest": 80.0,
        "cleanest": 0.2,  # of the rounds too; less keeps noise, and more takes contrast away
        "guidance": 1.0,
      },
    }
  )
  return config.lock()
