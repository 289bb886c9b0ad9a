"""Ways to learn from one's own samples: from `config.method` to what is selected and its loss.

A method is imitation of right samples, a loss of pairs or of single samples, or a policy gradient;
each is put together from functions of `training/`, by their names.
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
  unpaired,
)
from . import fields


class Method(NamedTuple):
  """How a round's rollouts become updates."""

  select: selection.Select
  rows_per_prompt: int  # that it selects, at most
  loss_fn: step.LossFn
  reference: bool  # whether the loss reads `reference_log_prob`
  correction: Callable[..., jax.Array] | None  # (log_ratio, mask) -> weights, of stale rollouts


class Advantage(NamedTuple):
  """A function of rewards [P, G], or of them and the lengths [P, G] of samples."""

  function: Callable[..., Any]
  reads_lengths: bool = False

  def bound(self, options: Mapping[str, Any], group_size: int) -> selection.Advantage:
    """With its constants; tried on a group of that size.

    Raises:
      ValueError: it has no such constants, or they do not go with the group.
    """
    made = _bound("method.advantage_options", self.function, options)
    advantage = lambda rewards, lengths: np.asarray(
      made(rewards, lengths) if self.reads_lengths else made(rewards)
    )
    advantage(np.zeros((1, group_size), np.float32), np.ones((1, group_size), np.int32))
    return advantage


def reward(rewards: np.ndarray) -> np.ndarray:
  """No baseline."""
  return rewards


def batch_whitened(rewards: np.ndarray, lengths: np.ndarray) -> np.ndarray:
  """Outcome rewards whitened over the tokens of the whole round: REINFORCE++ at gamma 1."""
  width = 1 << int(lengths.max()).bit_length()  # few widths: each is compiled
  mask = (np.arange(width) < lengths[..., None]).astype(np.float32)
  values = np.broadcast_to(rewards[..., None], mask.shape)
  return np.asarray(advantages.batch_whitened(values, mask))[..., 0]


ADVANTAGES: Mapping[str, Advantage] = {
  "reward": Advantage(reward),
  "group_normalised": Advantage(advantages.group_normalised),
  "group_centred": Advantage(advantages.group_centred),
  "leave_one_out": Advantage(advantages.leave_one_out),
  "pass_at_k": Advantage(advantages.pass_at_k),
  "optimal_baseline": Advantage(advantages.optimal_baseline, reads_lengths=True),
  "batch_whitened": Advantage(batch_whitened, reads_lengths=True),
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


class Unpaired(NamedTuple):
  """A loss of samples that are good or bad."""

  loss: Callable[..., jax.Array]
  read: Callable[[Callable], objectives.Unpaired]  # what it is given
  select: selection.Select = selection.judged


UNPAIRED: Mapping[str, Unpaired] = {
  "kto": Unpaired(unpaired.kto, objectives.around_divergence, selection.judged_and_mismatched),
  "apo_zero": Unpaired(unpaired.apo_zero, objectives.around_zero),
  "bco": Unpaired(unpaired.bco, objectives.around_midpoint),
}

# What of a pair is compared: the responses, what follows where they part, or the step there, which
# is a token where the answer's digits are the steps.
PAIR_WEIGHTS: Mapping[str, selection.PairWeights] = {
  "whole": selection.whole,
  "after_divergence": stepwise.after_divergence,
  "first_difference": selection.first_difference,
}


def constants(function: Callable) -> dict[str, Any]:
  """A function's constants and their values, as its signature has them; None has no default."""
  empty = inspect.Parameter.empty
  return {
    name: None if parameter.default is empty else parameter.default
    for name, parameter in inspect.signature(function).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
  }


def _bound(field: str, function: Callable, options: Mapping[str, Any]) -> Callable:
  """The function with its constants given.

  Raises:
    ValueError: it has none of such a name; says which it has.
  """
  known = constants(function)
  for name in options:
    rule = f"{field} has {name!r}; it may have {', '.join(known) or 'none'}"
    fields.require(name in known, rule)
  return functools.partial(function, **options)


def _imitation(model: models.LanguageModel, config: fields.Config) -> Method:
  """Maximum likelihood of right samples: RAFT, rejection sampling, expert iteration."""
  c = config.method
  fields.require(c.samples >= 1, f"method.samples is {c.samples}; it is at least 1")
  terms = [objectives.surrogate(policy.reinforce)]
  loss_fn = objectives.of_tokens(
    model, terms, aggregation.token_mean, temperature=config.rollouts.temperature
  )
  return Method(selection.right_samples(c.samples), c.samples, loss_fn, False, None)


class Comparison(NamedTuple):
  """How pairs become updates, wherever they are from."""

  weights: selection.PairWeights
  loss_fn: step.LossFn
  reference: bool  # whether the loss reads `reference_log_prob`


def comparison(model: models.LanguageModel, c: fields.Config) -> Comparison:
  """The loss of pairs that `config.method` names.

  Raises:
    ValueError: in one line, what in it is wrong, and what would be right.
  """
  named = fields.choose("method.loss", c.loss, PAIRWISE)
  weights = fields.choose("method.weights", c.weights, PAIR_WEIGHTS)
  pairwise = named.read(_bound(f"method.options of {c.loss}", named.loss, c.options))
  weight = c.likelihood_weight
  fields.require(weight >= 0, f"method.likelihood_weight is {weight}; it is at least 0")
  if weight:
    pairwise = objectives.with_likelihood(pairwise, weight)
  return Comparison(weights, objectives.of_pairs(model, pairwise), named.reference)


def _preference(model: models.LanguageModel, config: fields.Config) -> Method:
  """A loss of pairs of a better and a worse sample."""
  limit = config.method.pairs
  fields.require(limit >= 1, f"method.pairs is {limit}; it is at least 1")
  made = comparison(model, config.method)
  return Method(selection.pairs(limit, made.weights), limit, made.loss_fn, made.reference, None)


def _unpaired(model: models.LanguageModel, config: fields.Config) -> Method:
  """A loss of all samples, right ones good and wrong ones bad."""
  c, count = config.method, config.train.batch_size
  named = fields.choose("method.loss", c.loss, UNPAIRED)
  others = named.select is not selection.judged_and_mismatched or count >= 2
  fields.require(others, f"train.batch_size is {count}; {c.loss} takes 2 problems at least")
  single = named.read(_bound(f"method.options of {c.loss}", named.loss, c.options))
  loss_fn = objectives.of_singles(model, single)
  return Method(named.select, config.rollouts.group_size, loss_fn, True, None)


def _policy(model: models.LanguageModel, config: fields.Config) -> Method:
  """A policy gradient."""
  c, rollouts = config.method, config.rollouts
  named = fields.choose("method.advantage", c.advantage, ADVANTAGES)
  advantage = named.bound(c.advantage_options, rollouts.group_size)
  loss = fields.choose("method.surrogate", c.surrogate, SURROGATES)
  aggregate = fields.choose("method.aggregation", c.aggregation, AGGREGATIONS)
  estimator = fields.choose("method.divergence", c.divergence, DIVERGENCES)
  correction = fields.choose("method.correction", c.correction, {"none": None, **CORRECTIONS})
  loss = _bound(f"method.options of {c.surrogate}", loss, c.options)
  weight = c.divergence_weight
  fields.require(weight >= 0, f"method.divergence_weight is {weight}; it is at least 0")
  terms = [objectives.surrogate(loss)]
  terms += [objectives.divergence(estimator, weight)] if weight else []
  terms += [objectives.entropy(c.entropy_weight)] if c.entropy_weight else []
  loss_fn = objectives.of_tokens(
    model, terms, aggregate(rollouts.max_new_tokens), temperature=rollouts.temperature
  )
  select = selection.all_samples(advantage)
  return Method(select, rollouts.group_size, loss_fn, weight > 0, correction)


METHODS = {
  "imitation": _imitation,
  "preference": _preference,
  "unpaired": _unpaired,
  "policy": _policy,
}


def build(model: models.LanguageModel, config: fields.Config) -> Method:
  """The method that `config.method` names, for rollouts as `config.rollouts` has them.

  Raises:
    ValueError: in one line, what in it is wrong, and what would be right.
  """
  make = fields.choose("method.name", config.method.name, METHODS)
  return make(model, config)
