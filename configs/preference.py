"""A language model learns from pairs of a better and a worse answer: its own, or those of a file.

  python -m ancestral.launch.train --config=configs/preference.py:dpo --workdir=runs/dpo \\
      --config.start.workdir=runs/sums

Pairs are made anew in each round (online, iterated); --config.rollouts.policy=start draws them from
the model that it starts from instead (offline). All else is as in configs/policy.py.

  python -m ancestral.launch.train --config=configs/preference.py:file --workdir=runs/file \\
      --config.start.workdir=runs/sums --config.data.path=pairs.jsonl

learns from a file: a line is {"prompt": "12+7=", "chosen": "91", "rejected": "92"}. The run that it
starts from need not have a task. What is scored is how often held-out pairs are told apart.

Variants:
  dpo        (2305.18290); also conservative, robust, hinge, ipo, exo, nca, bco, sppo, apo_zero,
             apo_down, discopop
  step_dpo   DPO of the first step that differs (2406.18629): a token, where each digit is a step
  tree_dpo   DPO from the first difference on, as MCTS-DPO scores pairs (2405.00451)
  rpo        DPO and the likelihood of the right one
  redi       no reference, wrong ones weigh .8 (2505.24850); also simpo, alphapo, cpo, orpo
  kto        no pairs: right and wrong samples around the divergence from the start (2402.01306)
  apo_zero_unpaired, bco_unpaired  the same around 0 (2408.06266) and around halfway between right
             and wrong (2404.04656)
  file       DPO of the pairs of data.path; file_simpo and the like: each of the others but the
             unpaired ones
"""

import ml_collections

from ancestral.configs import policy
from ancestral.launch import methods

_PREFERENCE = {
  "name": "preference",
  "loss": "dpo",  # of training/preference.py or training/reference_free.py
  "options": {},  # the loss's constants
  "likelihood_weight": 0.0,  # of the right sample's, added
  "weights": "whole",  # what is compared: or after_divergence, first_difference
  "pairs": 4,  # of each problem, at most
}


def _variant(loss: str, **changed) -> dict:
  """A loss of pairs, its constants among its options."""
  method = _PREFERENCE | {"loss": loss} | changed
  options = methods.constants(methods.PAIRWISE[loss].loss)
  return method | {"options": options | method["options"]}


METHODS = {
  **{name: _variant(name) for name in methods.PAIRWISE},
  "step_dpo": _variant("dpo", weights="first_difference", options={"beta": 0.4}),
  "tree_dpo": _variant("dpo", weights="after_divergence"),
  "rpo": _variant("dpo", likelihood_weight=1.0),
}

# KTO's two weights balance kinds, where one of them is rare.
UNPAIRED = {
  variant: {
    "name": "unpaired",
    "loss": loss,
    "options": methods.constants(methods.UNPAIRED[loss].loss),
  }
  for variant, loss in (("kto", "kto"), ("apo_zero_unpaired", "apo_zero"), ("bco_unpaired", "bco"))
}

FILES = {"file": METHODS["dpo"]} | {f"file_{name}": method for name, method in METHODS.items()}


def _from_file(method: dict) -> ml_collections.ConfigDict:
  """An experiment that learns from the pairs of a file: nothing is drawn."""
  config = policy.learning({name: method[name] for name in method if name not in ("name", "pairs")})
  for section, names in (
    (config, ("levels", "rollouts")),
    (config.train, ("num_minibatches", "num_epochs")),
  ):
    for name in names:
      del section[name]
  config.kind = "preferences"
  config.data = {"path": "", "test_percent": 10}  # of its pairs are held out
  config.train.update(num_steps=200, batch_size=64, log_every=10, evaluate_every=50, save_every=50)
  config.evaluation.num_pairs = 512  # held-out ones that are scored, at most
  return config


def get_config(variant: str = "dpo") -> ml_collections.ConfigDict:
  """The experiment; see the file's docstring."""
  if variant in FILES:
    return _from_file(FILES[variant]).lock()
  drawn = METHODS | UNPAIRED
  if variant not in drawn:
    raise ValueError(
      f"configs/preference.py has no variant {variant!r}: it has {', '.join(drawn | FILES)}."
    )
  return policy.learning(drawn[variant]).lock()
