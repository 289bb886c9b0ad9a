"""A target and a draft model of text, the heads that help to draft, and decoding by every rule.

  python -m ancestral.launch.speculative --config=configs/speculative.py --workdir=runs/speculative

Variants, as in `--config=configs/speculative.py:jsonl`: the data of configs/text.py, by default the
sources of Python's standard library. Any field of the two models is a flag:
--config.target.data.folder=DIRECTORY --config.target.data.pattern='*.txt' and the same of `draft`.
"""

import ml_collections

from ancestral.configs import text


def get_config(variant: str = "folder") -> ml_collections.ConfigDict:
  """The experiment; see the file's docstring."""
  target, draft = (text.get_config(variant).unlock() for _ in range(2))
  target.model.update(num_layers=6, width=256, num_heads=8)
  draft.model.update(num_layers=1, width=128, num_heads=4)
  for model in (target, draft):
    model.train.batch_size = 16
  config = ml_collections.ConfigDict(
    {
      "target": target,  # two experiments of launch/train.py, of the same data
      "draft": draft,
      "eagle": {"num_layers": 1, "num_steps": 300, "batch_size": 16, "peak": 3e-3},
      "confidence": {
        "num_blocks": 3,
        "reject_weight": 1.0,  # calibrated; the paper's 6 asks for a threshold nearer to 1
        "num_steps": 200,
        "batch_size": 16,
        "peak": 1e-3,
      },
      "decode": {
        "num_drafts": 4,  # of a chain
        "num_most": 8,  # of a chain whose length adapts
        "num_siblings": 3,  # drafts of one position, where there are several
        "exit_layer": 1,  # of the target, where it drafts itself
        "threshold": 0.6,  # of the adaptive length: it stops where a refusal is likelier
        "temperature": 1.0,
        "batch_sizes": (1, 8),
        "prompt_length": 64,
        "num_steps": 24,  # that are timed
      },
    }
  )
  return config.lock()
