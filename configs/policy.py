"""A language model learns from its own verified samples, by policy gradients or by imitation.

  python -m ancestral.launch.train --config=configs/policy.py:grpo --workdir=runs/grpo \\
      --config.start.workdir=runs/sums

The model, its tokenizer and its task are those of the run it starts from. Each of 40 rounds draws
16 answers to each of 32 problems; no right answer is read but the model's own. On 2 CPU cores a
round of `configs/arithmetic.py` takes a second.

Variants:
  grpo      group-normalised advantages, clipped ratios, mean over each sequence (2402.03300)
  dr_grpo   centred advantages, sums over a constant length: unbiased (2503.20783)
  dapo      GRPO with a higher upper clip and the mean over all tokens (2503.14476)
  rloo      leave-one-out advantages, REINFORCE, sums over sequences (2402.14740)
  reinforce_pp  advantages whitened over the batch, clipped ratios
  opo       length-weighted baseline (2505.23585), REINFORCE
  pass_at_k what a sample adds to the best of 4
  gspo, cispo, sapo, gmpo  their surrogates on GRPO's advantages
  oreal     right answers cloned, wrong ones by their ratio, near the start (2502.06781)
  raft      imitation of a right answer to each problem (2304.06767)
  expert_iteration  imitation of up to 4 different right answers to each
"""

import ml_collections
from ml_collections import config_dict

from ancestral.launch import adapters, fields, methods

_POLICY = {
  "name": "policy",
  "advantage": "group_normalised",  # a function of training/advantages.py
  "advantage_options": {},
  "surrogate": "ppo_clip",  # of training/policy.py
  "options": {},  # of the surrogate: its constants
  "aggregation": "sequence_mean",  # of training/aggregation.py
  "divergence": "k3",  # from the start, of training/kl.py
  "divergence_weight": 0.0,
  "entropy_weight": 0.0,
  "correction": "none",  # of stale rollouts: a function of training/importance.py
}


def _variant(**changed) -> dict:
  """A policy gradient, its surrogate's constants among its options."""
  method = _POLICY | changed
  constants = methods.constants(methods.SURROGATES[method["surrogate"]])
  return method | {"options": constants | method["options"]}


# REINFORCE is right on policy only: one update of a round.
_ON_POLICY = {"surrogate": "reinforce", "aggregation": "sequence_sum"}

METHODS = {
  "grpo": _variant(),
  "dr_grpo": _variant(advantage="group_centred", aggregation="constant_length"),
  "dapo": _variant(options={"high": 0.28}, aggregation="token_mean"),
  "rloo": _variant(advantage="leave_one_out", **_ON_POLICY),
  "reinforce_pp": _variant(advantage="batch_whitened", aggregation="token_mean"),
  "opo": _variant(advantage="optimal_baseline", **_ON_POLICY),
  "pass_at_k": _variant(advantage="pass_at_k", advantage_options={"k": 4}, **_ON_POLICY),
  "gspo": _variant(surrogate="gspo"),
  "cispo": _variant(surrogate="cispo", aggregation="token_mean"),
  "sapo": _variant(surrogate="sapo"),
  "gmpo": _variant(surrogate="gmpo"),
  "oreal": _variant(advantage="leave_one_out", surrogate="oreal", divergence_weight=0.01),
  "raft": {"name": "imitation", "samples": 1},
  "expert_iteration": {"name": "imitation", "samples": 4},
}


def learning(method: dict) -> ml_collections.ConfigDict:
  """An experiment that learns by a method from its own samples."""
  return ml_collections.ConfigDict(
    {
      "kind": "learning",
      "seed": 0,
      "start": {
        "workdir": "",  # of the trained run
        "step": config_dict.placeholder(int),  # its latest checkpoint
        "best": False,
      },
      "levels": config_dict.placeholder(tuple),  # of the task; those of the start
      "rollouts": {
        "group_size": 16,
        "temperature": 1.0,
        "top_k": config_dict.placeholder(int),  # filters, off
        "top_p": config_dict.placeholder(float),
        "min_p": config_dict.placeholder(float),
        "max_new_tokens": config_dict.placeholder(int),  # as the start is evaluated
        "batch_size": 512,  # samples drawn at once
        "policy": "current",  # or start: offline
        "reward": "verifier",  # or random, inverted: controls
        "reference": "device",  # or host, where it takes no device memory
        "num_workers": 2,  # processes of the verifier
        "timeout": 5.0,  # seconds for one answer
      },
      "method": method,
      "lora": adapters.section(),
      "optimizer": {
        "name": "adamw",
        "schedule": "warmup_cosine",
        "peak": 3e-4,
        "warmup_fraction": 0.1,
        "weight_decay": 0.0,
        "clip_norm": 1.0,
      },
      "mesh": fields.mesh(),
      "train": {
        "num_steps": 40,  # rounds
        "batch_size": 32,  # problems of a round
        "num_minibatches": 2,  # updates of a round, each with a share of its samples
        "num_epochs": 1,  # how often each sample is used
        "num_microbatches": 1,
        "average_decay": 0.0,
        "log_every": 1,
        "evaluate_every": 10,
        "save_every": 10,
        "keep": 2,
        "spike_factor": config_dict.placeholder(float),  # a leap of the loss stops nothing
      },
      "evaluation": {
        "num_problems": 100,
        "num_samples": 16,
        "temperature": 1.0,
        "max_new_tokens": config_dict.placeholder(int),  # of the rollouts
        "batch_size": 256,
      },
    }
  )


def get_config(variant: str = "grpo") -> ml_collections.ConfigDict:
  """The experiment; see the file's docstring."""
  if variant not in METHODS:
    raise ValueError(f"configs/policy.py has no variant {variant!r}: it has {', '.join(METHODS)}.")
  config = learning(METHODS[variant])
  if METHODS[variant].get("surrogate") == "reinforce":
    config.train.num_minibatches = 1
  return config.lock()
