"""Ways to learn from one's own samples: from `config.method` to what is selected and its loss.

A method is imitation of right samples, a loss of pairs, or a policy gradient; each is put together
from functions of `training/`, by their names.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from ..models import base as models
from ..training import (
  advantages,
  aggregation,
  importance,
  kl,
  objectives,
  policy,
  preference,
  reference_free,
  selection,
  step,
  stepwise,
)
from . import fields


class Method(NamedTuple):
  """How a round's rollouts become updates."""

  select: selection.Select
  rows_per_prompt: int  # that it selects, at most
  loss_fn: step.LossFn
  reference: bool  # whether the loss reads `reference_log_prob`
  correction: Callable[..., jax.Array] | None  # (log_ratio, mask) -> weights, of stale rollouts


def _of_rewards(name: str) -> Callable[..., selection.Advantage]:
  """An advantage that reads rewards alone."""

  def make(**options):
    made = functools.partial(getattr(advantages, name), **options)
    return lambda rewards, lengths: np.asarray(made(rewards))

  return make


def _opo(rewards: np.ndarray, lengths: np.ndarray) -> np.ndarray:
  return np.asarray(advantages.optimal_baseline(rewards, lengths))


def _whitened(rewards: np.ndarray, lengths: np.ndarray) -> np.ndarray:
  """Outcome rewards whitened over the tokens of the whole batch: REINFORCE++ at gamma 1."""
  width = int(lengths.max())
  mask = (np.arange(width) < lengths[..., None]).astype(np.float32)
  values = np.broadcast_to(rewards[..., None], mask.shape)
  return np.asarray(advantages.batch_whitened(values, mask))[..., 0]


# Each a function of options that returns a `selection.Advantage`.
ADVANTAGES: Mapping[str, Callable[..., selection.Advantage]] = {
  "reward": lambda: lambda rewards, lengths: rewards,
  "group_normalised": _of_rewards("group_normalised"),
  "group_centred": _of_rewards("group_centred"),
  "leave_one_out": _of_rewards("leave_one_out"),
  "pass_at_k": _of_rewards("pass_at_k"),
  "optimal_baseline": lambda: _opo,
  "batch_whitened": lambda: _whitened,
}

SURROGATES: Mapping[str, policy.Surrogate] = {
  "reinforce": policy.reinforce,
  "ppo_clip": policy.ppo_clip,
  "dual_clip": policy.dual_clip,
  "gspo": policy.gspo,
  "gspo_token": policy.gspo_token,
  "cispo": policy.cispo,
  "sapo": policy.sapo,
  "gmpo": policy.gmpo,
  "oreal": policy.oreal,
}

# Of the longest that a sample can be.
AGGREGATIONS: Mapping[str, Callable[[int], aggregation.Aggregation]] = {
  "sequence_mean": lambda length: aggregation.sequence_mean,
  "sequence_sum": lambda length: aggregation.sequence_sum,
  "token_mean": lambda length: aggregation.token_mean,
  "local_token_mean": lambda length: aggregation.local_token_mean,
  "constant_length": lambda length: functools.partial(
    aggregation.constant_length, max_length=length
  ),
}

DIVERGENCES: Mapping[str, kl.Estimator] = {"k1": kl.k1, "k2": kl.k2, "k3": kl.k3}

CORRECTIONS = {
  "truncated_tokens": importance.truncated_tokens,
  "masked_tokens": importance.masked_tokens,
  "truncated_sequence": importance.truncated_sequence,
  "masked_sequence": importance.masked_sequence,
}


class Pairwise(NamedTuple):
  """A loss of pairs."""

  loss: Callable[..., jax.Array]
  read: Callable[[Callable], objectives.Pairwise] = objectives.log_ratios  # what it is given
  reference: bool = True


# AOT is not here: it sorts a batch, which the rows that fill up a round would disturb.
PAIRWISE: Mapping[str, Pairwise] = {
  "dpo": Pairwise(preference.dpo),
  "conservative": Pairwise(preference.conservative),
  "robust": Pairwise(preference.robust),
  "hinge": Pairwise(preference.hinge),
  "ipo": Pairwise(preference.ipo, objectives.mean_log_ratios),
  "exo": Pairwise(preference.exo),
  "nca": Pairwise(preference.nca),
  "bco": Pairwise(functools.partial(preference.bco, shift=0.0)),
  "sppo": Pairwise(preference.sppo),
  "apo_zero": Pairwise(preference.apo_zero),
  "apo_down": Pairwise(preference.apo_down),
  "discopop": Pairwise(preference.discopop),
  "simpo": Pairwise(reference_free.simpo, objectives.mean_log_probs, reference=False),
  "alphapo": Pairwise(reference_free.alphapo, objectives.mean_log_probs, reference=False),
  "cpo": Pairwise(reference_free.cpo, objectives.log_probs, reference=False),
  "orpo": Pairwise(reference_free.orpo, objectives.mean_log_probs, reference=False),
  "redi": Pairwise(reference_free.redi, objectives.mean_log_probs, reference=False),
}

# What of a pair is compared: the responses, what follows where they part, or the step there, which
# is a token where the answer's digits are the steps.
PAIR_WEIGHTS: Mapping[str, selection.PairWeights] = {
  "whole": selection.whole,
  "after_divergence": stepwise.after_divergence,
  "first_difference": selection.first_difference,
}


def _bound(field: str, function: Callable, options: Mapping[str, Any]) -> Callable:
  """The function with its constants given.

  Raises:
    ValueError: it has none of such a name; says which it has.
  """
  known = [
    name
    for name, parameter in inspect.signature(function).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
  ]
  for name in options:
    fields.require(name in known, f"{field} has {name!r}; it may have {', '.join(known)}")
  return functools.partial(function, **options)


def _imitation(model: models.LanguageModel, c: fields.Config, rollouts: fields.Config) -> Method:
  """Maximum likelihood of right samples: RAFT, rejection sampling, expert iteration."""
  fields.require(c.samples >= 1, f"method.samples is {c.samples}; it is at least 1")
  terms = [objectives.surrogate(policy.reinforce)]
  loss_fn = objectives.of_tokens(
    model, terms, aggregation.token_mean, temperature=rollouts.temperature
  )
  return Method(selection.right_samples(c.samples), c.samples, loss_fn, False, None)


def _preference(model: models.LanguageModel, c: fields.Config, rollouts: fields.Config) -> Method:
  """A loss of pairs of a better and a worse sample."""
  del rollouts
  fields.require(c.pairs >= 1, f"method.pairs is {c.pairs}; it is at least 1")
  named = fields.choose("method.loss", c.loss, PAIRWISE)
  weights = fields.choose("method.weights", c.weights, PAIR_WEIGHTS)
  pairwise = named.read(_bound(f"method.options of {c.loss}", named.loss, c.options))
  if c.likelihood_weight:
    pairwise = objectives.with_likelihood(pairwise, c.likelihood_weight)
  loss_fn = objectives.of_pairs(model, pairwise)
  return Method(selection.pairs(c.pairs, weights), c.pairs, loss_fn, named.reference, None)


def _policy(model: models.LanguageModel, c: fields.Config, rollouts: fields.Config) -> Method:
  """A policy gradient."""
  advantage = fields.choose("method.advantage", c.advantage, ADVANTAGES)(**c.advantage_options)
  loss = fields.choose("method.surrogate", c.surrogate, SURROGATES)
  aggregate = fields.choose("method.aggregation", c.aggregation, AGGREGATIONS)
  estimator = fields.choose("method.divergence", c.divergence, DIVERGENCES)
  correction = fields.choose("method.correction", c.correction, {"none": None, **CORRECTIONS})
  loss = _bound(f"method.options of {c.surrogate}", loss, c.options)
  terms = [objectives.surrogate(loss)]
  terms += [objectives.divergence(estimator, c.divergence_weight)] if c.divergence_weight else []
  terms += [objectives.entropy(c.entropy_weight)] if c.entropy_weight else []
  loss_fn = objectives.of_tokens(
    model, terms, aggregate(rollouts.max_new_tokens), temperature=rollouts.temperature
  )
  select = selection.all_samples(advantage)
  return Method(select, rollouts.group_size, loss_fn, c.divergence_weight > 0, correction)


METHODS = {"imitation": _imitation, "preference": _preference, "policy": _policy}


def build(model: models.LanguageModel, config: fields.Config) -> Method:
  """The method that `config.method` names, for rollouts as `config.rollouts` has them.

  Raises:
    ValueError: in one line, what in it is wrong, and what would be right.
  """
  make = fields.choose("method.name", config.method.name, METHODS)
  return make(model, config.method, config.rollouts)
