"""A class-conditional diffusion model of images.

  python -m ancestral.launch.train    --config=configs/image_diffusion.py --workdir=runs/digits
  python -m ancestral.launch.sample   --workdir=runs/digits --num_images=100 --evaluations=10
  python -m ancestral.launch.evaluate --workdir=runs/digits

Variants, as in `--config=configs/image_diffusion.py:digits_unet`:
  digits        scikit-learn's digits, 8 x 8, by a transformer of 0.33M parameters: the default. 100
                seconds on 2 CPU cores; Frechet distance .10 of ten evaluations, .06 of real images.
  digits_unet   the same by a U-Net of 0.19M parameters: three minutes; .07.
  fashion_dit   Fashion-MNIST, 28 x 28, from data.folder, by a transformer of 15.18M parameters: for
                a GPU; not measured yet.
  fashion_unet  the same by a U-Net of 7.28M parameters; not measured yet.
  tfds          any prepared tensorflow-datasets data set of small images and labels.
  points        two moons, or another of tasks/points.py at data.name, by a residual network of
                0.32M parameters: a minute.
"""

import ml_collections
from ml_collections import config_dict

from ancestral.launch import fields

DIGITS = {"source": "digits", "test_percent": 10}
FASHION = {"source": "fashion_mnist", "folder": ""}
DIT = {
  "network": "dit",
  "patch_size": 2,
  "positions": "sincos",  # or rotary
  "num_registers": 0,
  "qk_norm": False,
  "dropout": 0.0,
  "dtype": "float32",
}
UNET = {"network": "unet", "num_groups": 8, "dropout": 0.0, "dtype": "float32"}
DIGITS_DIT = {**DIT, "num_layers": 4, "width": 64, "num_heads": 4}
DIGITS_UNET = {
  **UNET,
  "channels": 16,
  "multipliers": (1, 2),
  "num_blocks": 1,
  "attention": (1,),
  "head_dim": 16,
}
FASHION_DIT = {**DIT, "num_layers": 8, "width": 320, "num_heads": 8, "dtype": "bfloat16"}
FASHION_UNET = {
  **UNET,
  "channels": 64,
  "multipliers": (1, 2, 2),
  "num_blocks": 2,
  "attention": (1, 2),
  "head_dim": 32,
  "dropout": 0.1,
  "dtype": "bfloat16",
}
TFDS = {"source": "tfds", "name": "mnist", "split": "train", "data_dir": "", "test_percent": 10}
POINTS = {"source": "points", "name": "two_moons", "num_points": 20_000}
MLP = {"network": "mlp", "width": 128, "num_layers": 3, "dropout": 0.0}

# data, model, standard deviation of the data, steps, batch size, peak learning rate
VARIANTS = {
  "digits": (DIGITS, DIGITS_DIT, 0.75, 1200, 128, 3e-3),
  "digits_unet": (DIGITS, DIGITS_UNET, 0.75, 1200, 128, 3e-3),
  "fashion_dit": (FASHION, FASHION_DIT, 0.7, 30_000, 512, 1e-3),
  "fashion_unet": (FASHION, FASHION_UNET, 0.7, 30_000, 512, 1e-3),
  "tfds": (TFDS, FASHION_UNET, 0.6, 30_000, 512, 1e-3),
  "points": (POINTS, MLP, 1.0, 2000, 512, 3e-3),
}


def get_config(variant: str = "digits") -> ml_collections.ConfigDict:
  """The experiment; see the file's docstring."""
  if variant not in VARIANTS:
    raise ValueError(
      f"configs/image_diffusion.py has no variant {variant!r}: it has {', '.join(VARIANTS)}."
    )
  data, model, sigma_data, num_steps, batch_size, peak = VARIANTS[variant]
  config = ml_collections.ConfigDict(
    {
      "kind": "images",
      "seed": 0,
      "data": data,
      "model": model,
      "diffusion": {
        "path": "variance_exploding",  # or rectified_flow, trigonometric, linear, cosine, sigmoid
        "head": "karras",  # or noise, data, velocity, flow
        "weighting": "karras",  # or noise, data, velocity, flow, min_snr, p2
        "learned_weighting": False,  # of noise levels, on top of the weighting
        "times": "log_normal",  # or uniform, log_uniform, logit_normal
        "quantiles": "low_discrepancy",  # or independent
        "sigma_data": sigma_data,
        "drop_condition": 0.1,  # for guidance without a classifier
        "clean_share": 1.0,  # of examples that are not noisy
        "data_noise": 0.0,  # standard deviation of what is added to the others
      },
      "optimizer": {
        "name": "muon",  # or adamw
        "schedule": "warmup_cosine",  # or warmup_stable_decay
        "peak": peak,
        "warmup_fraction": 0.1,  # of the steps
        "weight_decay": 0.0,
        "clip_norm": 1.0,
      },
      "mesh": fields.mesh(),
      "train": {
        "num_steps": num_steps,
        "batch_size": batch_size,
        "num_microbatches": 1,
        # Relative lengths of the averages of the parameters; the first is used. --average_std has
        # any other, made of the checkpoints that are kept. () keeps none.
        "average_stds": (0.10, 0.05),
        "log_every": 10,
        "evaluate_every": max(num_steps // 10, 1),
        "save_every": max(num_steps // 10, 1),
        "keep": 10,
        "spike_factor": config_dict.placeholder(float),  # a leap of the loss stops nothing
      },
      "evaluation": {
        "num_batches": 4,
        "batch_size": 128,
        "num_images": 5000,  # compared with as many real ones, or with half of them
        "solver": "dpmpp_2m",
        "grid": "karras",
        "evaluations": 20,
        "noisiest": 80.0,  # noise over signal, where sampling begins
        "cleanest": 0.01,  # and from where one step leads to the data
        "guidance": 1.0,  # 1 is none
      },
    }
  )
  return config.lock()
