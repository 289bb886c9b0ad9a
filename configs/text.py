"""A byte-level language model of text; by default the sources of Python's standard library.

  python -m ancestral.launch.train --config=configs/text.py --workdir=runs/text

Variants, as in `--config=configs/text.py:tfds`:
  folder  every file that matches data.pattern in data.folder. The default: the standard library,
          which every machine has; 4 layers, width 128: 2.14 bits per byte of held-out files after
          300 steps, in under ten minutes on 2 busy CPU cores.
  jsonl   the `text` of every line of data.path, which has to be given; with
          data.fields=("prompt", "answer") only answers are learned.
  tfds    any prepared tensorflow-datasets data set with a text feature.
"""

import sysconfig

import ml_collections
from ml_collections import config_dict

from ancestral.launch import fields

DATA = {  # made anew for every configuration: those that share a placeholder share its value
  "folder": lambda: {
    "source": "text",
    "folder": sysconfig.get_path("stdlib"),
    "pattern": "*.py",
    "passage": config_dict.placeholder(int),  # files are not cut; else into so many characters
    "fields": ("text",),
  },
  "jsonl": lambda: {"source": "jsonl", "path": "", "fields": ("text",)},
  "tfds": lambda: {
    "source": "tfds",
    "name": "wiki40b/en",
    "split": "train",
    "data_dir": "",
    "fields": ("text",),
  },
}


def get_config(variant: str = "folder") -> ml_collections.ConfigDict:
  """The experiment; see the file's docstring."""
  if variant not in DATA:
    raise ValueError(f"configs/text.py has no variant {variant!r}: it has {', '.join(DATA)}.")
  config = ml_collections.ConfigDict(
    {
      "seed": 0,
      "tokenizer": {"name": "bytes", "path": ""},  # or file: a tokenizers JSON file at path
      "data": {
        **DATA[variant](),
        "rows": "concatenate",  # or pad, first_fit: documents are not cut
        "row_length": 256,
        "test_percent": 10,
      },
      "model": {
        "num_layers": 4,
        "width": 128,
        "num_heads": 4,
        "num_kv_heads": config_dict.placeholder(int),  # num_heads
        "window": config_dict.placeholder(int),  # no sliding window
        "position_range": config_dict.placeholder(int),  # not randomised
        "qk_norm": False,
        "positions": "rotary",  # or learned, none
        "dropout": 0.0,
        "dtype": "float32",
        "attention": "exact",  # or xla, cudnn: the library's
        "remat": "none",  # or full, products: made again backward, for less memory
      },
      "optimizer": {
        "name": "muon",  # or adamw
        "schedule": "warmup_cosine",  # or warmup_stable_decay
        "peak": 1e-2,
        "warmup_fraction": 0.1,  # of the steps
        "weight_decay": 0.1,
        "clip_norm": 1.0,
      },
      "loss": {"z_loss": 0.0, "chunk": 256},
      "mesh": fields.mesh(),
      "train": {
        "num_steps": 300,
        "batch_size": 32,
        "num_microbatches": 1,
        "average_decay": 0.0,  # of the parameters' exponential average; 0 keeps none
        "log_every": 10,
        "evaluate_every": 100,
        "save_every": 100,
        "keep": 2,
        "spike_factor": config_dict.placeholder(float),  # a leap of the loss stops nothing
      },
      "evaluation": {
        "num_batches": 8,
        "max_new_tokens": 100,
        "batch_size": 32,
      },
    }
  )
  return config.lock()
