"""A transformer learns arithmetic from scratch, in the formats of arXiv 2307.03381.

  python -m ancestral.launch.train --config=configs/arithmetic.py --workdir=runs/arithmetic

Variants, as in `--config=configs/arithmetic.py:small`:
  tiny   4 layers, width 128, 0.8M parameters, sums to 3 digits: about two minutes on 2 CPU cores,
         pass@1 above 0.99 on held-out 3-digit sums. The default.
  small  6 layers, width 256, 4.8M parameters, sums to 6 digits: for a GPU.
  paper  6 layers, 6 heads, width 384, 10.6M parameters, dropout 0.2, batch 256, 5,000 steps at
         learning rate 1e-3, sums to 3 digits: the setting of the paper, with our blocks.
"""

import ml_collections
from ml_collections import config_dict

from ancestral.launch import fields

VARIANTS = {
  "tiny": {
    "num_layers": 4,
    "width": 128,
    "num_heads": 4,
    "levels": (1, 2, 3),
    "num_steps": 400,
    "optimizer": "muon",
    "peak": 1e-2,
    "dropout": 0.0,
  },
  "small": {
    "num_layers": 6,
    "width": 256,
    "num_heads": 8,
    "levels": (1, 2, 3, 4, 5, 6),
    "num_steps": 3000,
    "optimizer": "muon",
    "peak": 5e-3,
    "dropout": 0.0,
  },
  "paper": {
    "num_layers": 6,
    "width": 384,
    "num_heads": 6,
    "levels": (1, 2, 3),
    "num_steps": 5000,
    "optimizer": "adamw",
    "peak": 1e-3,
    "dropout": 0.2,
  },
}


def get_config(variant: str = "tiny") -> ml_collections.ConfigDict:
  """The experiment; see the file's docstring."""
  if variant not in VARIANTS:
    raise ValueError(
      f"configs/arithmetic.py has no variant {variant!r}: it has {', '.join(VARIANTS)}."
    )
  v = VARIANTS[variant]
  config = ml_collections.ConfigDict(
    {
      "seed": 0,
      "task": {
        "name": "addition",  # or subtraction, multiplication
        "style": "reversed",  # or plain, simplified, detailed
        "levels": v["levels"],  # digits of the longer operand
        "test_percent": 10,
      },
      "data": {
        "source": "task",
        "rows": "pad",  # or first_fit: several problems in a row
        "row_length": 3 * max(v["levels"]) + 4,  # beginning, a + b = c, end; others need more
      },
      "model": {
        "num_layers": v["num_layers"],
        "width": v["width"],
        "num_heads": v["num_heads"],
        "num_kv_heads": config_dict.placeholder(int),  # num_heads
        "window": config_dict.placeholder(int),  # no sliding window
        "position_range": config_dict.placeholder(int),  # not randomised
        "qk_norm": False,
        "positions": "learned",  # rotary takes about twice the steps on sums; none
        "dropout": v["dropout"],
        "dtype": "float32",
        "attention": "exact",  # or xla, cudnn: the library's
        "remat": "none",  # or full, products: made again backward, for less memory
      },
      "optimizer": {
        "name": v["optimizer"],  # muon or adamw
        "schedule": "warmup_cosine",  # or warmup_stable_decay
        "peak": v["peak"],
        "warmup_fraction": 0.1,  # of the steps
        "weight_decay": 0.1,
        "clip_norm": 1.0,
      },
      "loss": {"z_loss": 0.0, "chunk": 256},
      "mesh": fields.mesh(),
      "train": {
        "num_steps": v["num_steps"],
        "batch_size": 256,
        "num_microbatches": 1,
        "average_decay": 0.0,  # of the parameters' exponential average; 0 keeps none
        "log_every": 10,
        "evaluate_every": 50,
        "save_every": 100,
        "keep": 2,
        "spike_factor": config_dict.placeholder(float),  # a leap of the loss stops nothing
      },
      "evaluation": {
        "num_problems": 100,  # of each level, held out
        "num_samples": 16,
        "temperature": 1.0,
        "max_new_tokens": max(v["levels"]) + 2,  # a scratchpad needs more
        "batch_size": 256,
      },
    }
  )
  return config.lock()
