"""A small classifier of images, whose features compare samples with data.

  python -m ancestral.launch.train --config=configs/image_classifier.py --workdir=runs/classifier

Variants, as in `--config=configs/image_classifier.py:fashion`:
  digits   scikit-learn's digits, the default: about half a minute on 2 CPU cores.
  fashion  Fashion-MNIST from data.folder, which has to be given.
"""

import ml_collections
from ml_collections import config_dict

from ancestral.launch import fields

VARIANTS = {
  "digits": {"source": "digits", "test_percent": 10},
  "fashion": {"source": "fashion_mnist", "folder": ""},
}


def get_config(variant: str = "digits") -> ml_collections.ConfigDict:
  """The experiment; see the file's docstring."""
  if variant not in VARIANTS:
    raise ValueError(
      f"configs/image_classifier.py has no variant {variant!r}: it has {', '.join(VARIANTS)}."
    )
  config = ml_collections.ConfigDict(
    {
      "kind": "classifier",
      "seed": 0,
      "data": VARIANTS[variant],
      "model": {"channels": 16, "num_halvings": 2, "num_features": 64, "dropout": 0.2},
      "optimizer": {
        "name": "adamw",  # or muon
        "schedule": "warmup_cosine",  # or warmup_stable_decay
        "peak": 3e-3,
        "warmup_fraction": 0.1,  # of the steps
        "weight_decay": 0.1,
        "clip_norm": 1.0,
      },
      "mesh": fields.mesh(),
      "train": {
        "num_steps": 400,
        "batch_size": 128,
        "num_microbatches": 1,
        "average_decay": 0.0,  # of the parameters' exponential average; 0 keeps none
        "log_every": 10,
        "evaluate_every": 200,
        "save_every": 400,
        "keep": 1,
        "spike_factor": config_dict.placeholder(float),  # a leap of the loss stops nothing
      },
      "evaluation": {"batch_size": 128},
    }
  )
  return config.lock()
