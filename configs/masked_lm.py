"""Masked diffusion learns texts, sums with blanks anywhere, and Sudoku.

  python -m ancestral.launch.train --config=configs/masked_lm.py:arithmetic --workdir=runs/blanks
  python -m ancestral.launch.sample --workdir=runs/blanks --prompt=1_+3_=94

Variants:
  text        bytes of the files that match data.pattern in data.folder, the standard library's
              sources unless said. One file, such as tiny Shakespeare's, is cut into passages:
              --config.data.folder=DIR --config.data.pattern=*.txt --config.data.passage=2000.
              The default.
  blocks      the same in blocks of 16 from left to right, with a cache when sampling.
  arithmetic  sums to 3 digits, reversed, with blanks anywhere, a hidden operand or a hidden result:
              .99 of held-out operands and more, about 20 minutes on 2 busy CPU cores.
  sudoku4     4 by 4, with 4 to 10 blanks: .995 of held-out puzzles in the order of the margin, .96
              in a random one, 6 minutes.
  sudoku9     9 by 9, with 20 to 40 blanks: for a GPU.

Each has a twin such as `sudoku4-autoregressive`: a causal model of the same size on the same
tokens, from left to right, prompts first.
"""

from typing import Any

import ml_collections
from ml_collections import config_dict

from ancestral.configs import text
from ancestral.launch import fields, unmasking

_TEXT = {"num_steps": 1000, "batch_size": 32, "width": 128, "num_layers": 4}
_SUDOKU = {"name": "sudoku", "test_percent": 10}


def _texts() -> dict[str, Any]:
  return {
    "tokenizer": {"name": "bytes", "path": ""},
    "data": {**text.DATA["folder"](), "rows": "concatenate", "row_length": 256, "test_percent": 10},
  }


def _task(row_length: int, **task: Any) -> dict[str, Any]:
  return {"task": task, "data": {"source": "task", "rows": "pad", "row_length": row_length}}


VARIANTS = {
  "text": _TEXT,
  "blocks": {**_TEXT, "block_length": 16},
  "arithmetic": {
    **_task(
      14,  # beginning, 999+999=8991, end
      **{"name": "addition", "style": "reversed", "levels": (1, 2, 3), "test_percent": 10},
      blanks=("anywhere", "operand", "result"),
    ),
    **{"num_steps": 2000, "batch_size": 256, "width": 128, "num_layers": 4},
  },
  "sudoku4": {
    **_task(35, **_SUDOKU, box=2, levels=(4, 6, 8, 10)),
    **{"num_steps": 400, "batch_size": 128, "width": 128, "num_layers": 4},
  },
  "sudoku9": {
    **_task(165, **_SUDOKU, box=3, levels=(20, 30, 40)),
    **{"num_steps": 20_000, "batch_size": 256, "width": 384, "num_layers": 6},
  },
}
_TWIN = "-autoregressive"
_PROBLEMS = {
  "num_problems": 100,  # of each level, held out
  "num_samples": 4,
  "temperature": 1.0,
}


def get_config(variant: str = "text") -> ml_collections.ConfigDict:
  """The experiment; see the file's docstring."""
  name = variant.removesuffix(_TWIN)
  if name not in VARIANTS:
    raise ValueError(
      f"configs/masked_lm.py has no variant {variant!r}: it has {', '.join(VARIANTS)}, each also "
      f"with {_TWIN}."
    )
  v = VARIANTS[name]
  sections = {key: dict(v[key]) for key in ("task", "data")} if "task" in v else _texts()
  block_length = v.get("block_length")
  config = {
    "kind": "masked",
    "seed": 0,
    **sections,
    "model": {
      "num_layers": v["num_layers"],
      "width": v["width"],
      "num_heads": v["width"] // 32,
      "num_kv_heads": config_dict.placeholder(int),  # num_heads
      "qk_norm": False,
      "positions": "learned" if "task" in v else "rotary",  # or none
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
    "loss": {
      "masking": "count",  # how many are masked is drawn; or time, and each with its probability
      "schedule": "linear",  # or cosine, quadratic, geometric
      "block_length": _placeholder(block_length),  # one block of all
      "unconditional": 0.0,  # share of rows whose prompt is masked too, for guidance
      "chunk": 256,
    },
    "mesh": fields.mesh(),
    "train": {
      "num_steps": v["num_steps"],
      "batch_size": v["batch_size"],
      "num_microbatches": 1,
      "average_decay": 0.99,  # of the parameters' exponential average; 0 keeps none
      "log_every": 10,
      "evaluate_every": 100,
      "save_every": 200,
      "keep": 2,
      "spike_factor": config_dict.placeholder(float),  # a leap of the loss stops nothing
    },
    "evaluation": {
      **(_PROBLEMS if "task" in v else {"num_batches": 8}),
      "batch_size": 64,
      "unmasking": {**unmasking.section(), "block": _placeholder(block_length)},
    },
  }
  config = ml_collections.ConfigDict(config)
  return (_autoregressive(config) if variant.endswith(_TWIN) else config).lock()


def _placeholder(value: int | None) -> Any:
  return config_dict.placeholder(int) if value is None else value


def _autoregressive(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """A language model of the same size on the same tokens."""
  config.kind = "language"
  del config.evaluation.unmasking
  config.loss = {"z_loss": 0.0, "chunk": config.loss.chunk}
  config.model.window = config_dict.placeholder(int)
  config.model.position_range = config_dict.placeholder(int)
  config.evaluation.max_new_tokens = 100
  if "task" in config:
    if "blanks" in config.task:
      del config.task.blanks
    config.evaluation.max_new_tokens = config.task.box**4 + 1 if "box" in config.task else 5
  return config
