"""A language model learns from pairs of its own samples, a right one and a wrong one.

  python -m ancestral.launch.train --config=configs/preference.py:dpo --workdir=runs/dpo \\
      --config.start.workdir=runs/sums

Pairs are made anew in each round (online, iterated); --config.rollouts.policy=start draws them from
the model that it starts from instead (offline). All else is as in configs/policy.py.

Variants:
  dpo        (2305.18290); also conservative, robust, hinge, ipo, exo, nca, bco, sppo, apo_zero,
             apo_down, discopop
  step_dpo   DPO of the first step that differs (2406.18629): a token, where each digit is a step
  tree_dpo   DPO from the first difference on, as MCTS-DPO scores pairs (2405.00451)
  rpo        DPO and the likelihood of the right one
  redi       no reference, wrong ones weigh .8 (2505.24850); also simpo, alphapo, cpo, orpo
"""

import ml_collections

from ancestral.configs import policy

_PREFERENCE = {
  "name": "preference",
  "loss": "dpo",  # of training/preference.py or training/reference_free.py
  "options": {},  # the loss's constants
  "likelihood_weight": 0.0,  # of the right sample's, added
  "weights": "whole",  # what is compared: or after_divergence, first_difference
  "pairs": 4,  # of each problem, at most
}

_NAMED = (
  *("dpo", "conservative", "robust", "hinge", "ipo", "exo", "nca", "bco", "sppo"),
  *("apo_zero", "apo_down", "discopop", "simpo", "alphapo", "cpo", "orpo", "redi"),
)

METHODS = {
  **{name: _PREFERENCE | {"loss": name} for name in _NAMED},
  "robust": _PREFERENCE | {"loss": "robust", "options": {"label_smoothing": 0.1}},
  "conservative": _PREFERENCE | {"loss": "conservative", "options": {"label_smoothing": 0.1}},
  "step_dpo": _PREFERENCE | {"weights": "first_difference", "options": {"beta": 0.4}},
  "tree_dpo": _PREFERENCE | {"weights": "after_divergence"},
  "rpo": _PREFERENCE | {"likelihood_weight": 1.0},
}


def get_config(variant: str = "dpo") -> ml_collections.ConfigDict:
  """The experiment; see the file's docstring."""
  if variant not in METHODS:
    raise ValueError(
      f"configs/preference.py has no variant {variant!r}: it has {', '.join(METHODS)}."
    )
  return policy.learning(METHODS[variant]).lock()
