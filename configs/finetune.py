"""Maximum likelihood from a pretrained directory: all parameters, or adapters of low rank.

  python -m ancestral.launch.train --config=configs/finetune.py:pairs --workdir=runs/tuned \\
      --config.start.pretrained=DIR --config.data.path=pairs.jsonl --config.lora.rank=16

DIR is a directory that transformers saves: config.json, safetensors, tokenizer.json. What is made
of it goes back by `launch.export`. Variants:
  pairs  lines {"prompt": ..., "answer": ...}; only the answer is learned. The default.
  texts  lines {"text": ...}, end to end.
  sums   addition in the pretrained tokens, with its verifier: a start for configs/policy.py.
"""

import ml_collections
from ml_collections import config_dict

from ancestral.launch import adapters, fields

_JSONL = {"source": "jsonl", "path": "", "test_percent": 10, "row_length": 512}
VARIANTS = {
  "pairs": {"data": {**_JSONL, "fields": ("prompt", "answer"), "rows": "first_fit"}},
  "texts": {"data": {**_JSONL, "fields": ("text",), "rows": "concatenate"}},
  "sums": {
    "task": {"name": "addition", "style": "plain", "levels": (1, 2, 3), "test_percent": 10},
    "data": {"source": "task", "rows": "pad", "row_length": 24},
  },
}


def get_config(variant: str = "pairs") -> ml_collections.ConfigDict:
  """The experiment; see the file's docstring."""
  if variant not in VARIANTS:
    raise ValueError(
      f"configs/finetune.py has no variant {variant!r}: it has {', '.join(VARIANTS)}."
    )
  evaluation = {"num_batches": 8, "max_new_tokens": 100, "batch_size": 32}
  if variant == "sums":
    evaluation = {"num_problems": 50, "num_samples": 4, "temperature": 1.0, "max_new_tokens": 12}
    evaluation["batch_size"] = 64
  return ml_collections.ConfigDict(
    {
      "seed": 0,
      **VARIANTS[variant],
      "start": {"pretrained": ""},
      "model": {  # the rest is the pretrained model's
        "dropout": 0.0,
        "dtype": "bfloat16",  # of the computation; parameters are float32
        "attention": "exact",  # or xla, cudnn: the library's
        "remat": "full",
      },
      "lora": adapters.section(),
      "optimizer": {
        "name": "adamw",
        "schedule": "warmup_cosine",
        "peak": 2e-4,
        "warmup_fraction": 0.03,
        "weight_decay": 0.0,
        "clip_norm": 1.0,
      },
      "loss": {"z_loss": 0.0, "chunk": 256},
      "mesh": fields.mesh(),
      "train": {
        "num_steps": 200,
        "batch_size": 32,
        "num_microbatches": 1,
        "average_decay": 0.0,
        "log_every": 10,
        "evaluate_every": 50,
        "save_every": 50,
        "keep": 2,
        "spike_factor": config_dict.placeholder(float),  # a leap of the loss stops nothing
      },
      "evaluation": evaluation,
    }
  ).lock()
