"""What trains a language model on samples: losses of tokens, pairs, singles, as `step.LossFn`s.

    loss_fn = objectives.of_tokens(
      model,
      [objectives.surrogate(policy.ppo_clip), objectives.divergence(kl.k3, 0.01)],
      aggregation.token_mean,
      temperature=1.0,
    )
    loss_fn = objectives.of_pairs(model, objectives.log_ratios(preference.dpo))
    loss_fn = objectives.of_singles(model, objectives.around_divergence(unpaired.kto))

A loss of tokens is a sum of terms, each of a token, reduced over a row by an `Aggregation`. A loss
of pairs is of two rows, one of singles of a row that is marked good or bad. None reduces over
examples: `step.train_step` does.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..models import base as models
from . import aggregation, kl, policy, reference_free, scoring, step, stepwise, unpaired

# (scores, batch) -> loss of each token [B, L]
Term = Callable[[scoring.Scores, step.Batch], jax.Array]


def surrogate(loss: policy.Surrogate) -> Term:
  """A policy-gradient loss of `advantage` [B, L], from `old_log_prob`, times `correction` if there.

  Where the policy that drew is the one before the update, `old_log_prob` is the `log_prob` of the
  rollouts. Where it is not (stale parameters, other numerics), `old_log_prob` is scored anew and
  `correction` [B, L] is a weight of `importance`.
  """

  def term(scores, batch):
    made = loss(scores.log_prob, batch["old_log_prob"], batch["advantage"], batch["mask"])
    return made * batch["correction"] if "correction" in batch else made

  return term


def divergence(estimator: kl.Estimator, weight: float) -> Term:
  """weight KL(pi, reference), from `reference_log_prob` [B, L]."""
  return lambda scores, batch: weight * estimator(scores.log_prob, batch["reference_log_prob"])


def entropy(weight: float) -> Term:
  """-weight H(pi): a bonus for the exact entropy of each token's law."""
  return lambda scores, batch: -weight * scores.entropy


def of_tokens(
  model: models.LanguageModel,
  terms: Sequence[Term],
  aggregate: aggregation.Aggregation,
  *,
  temperature: float = 1.0,
  chunk: int = 256,
) -> step.LossFn:
  """The loss of rows that were drawn: the terms' sum, aggregated.

  The batch has what `scoring.scores` reads, `log_prob` [B, L] of the sampler, and what the terms
  read.

  Metrics, means over a row's tokens: `ratio`, of the probability now to the sampler's, which is 1
  in the first update after sampling and says whether trainer and sampler agree; `entropy`; and
  `divergence`, k3, where there is `reference_log_prob`.
  """

  def loss(key, params, batch):
    del key  # no dropout: the sampler had none, nor has the reference
    scores = scoring.scores(model, params, batch, temperature=temperature, chunk=chunk)
    mask = batch["mask"]
    losses, weight = aggregate(sum(term(scores, batch) for term in terms), mask)
    seen = {"ratio": jnp.exp(scores.log_prob - batch["log_prob"]), "entropy": scores.entropy}
    if "reference_log_prob" in batch:
      seen["divergence"] = kl.k3(scores.log_prob, batch["reference_log_prob"])
    count = jnp.maximum(jnp.sum(mask, axis=-1), 1)
    seen = {name: weight * jnp.sum(x * mask, axis=-1) / count for name, x in seen.items()}
    return (losses, weight), jax.lax.stop_gradient(seen)

  return loss


class Side(NamedTuple):
  """One response of a pair, token by token."""

  log_prob: jax.Array  # [B, L]
  reference: jax.Array | None  # [B, L], log-probability under the reference model
  weight: jax.Array  # [B, L]; 0 where nothing was drawn, or what was is not to be compared

  def total(self) -> jax.Array:
    """sum w log p, [B]."""
    return stepwise.weighted_ratio(self.log_prob, self.weight)

  def mean(self) -> jax.Array:
    """sum w log p / sum w, [B]; 0 where the weights are."""
    return reference_free.length_mean(self.log_prob, self.weight)

  def log_ratio(self) -> jax.Array:
    """sum w (log p - log reference), [B]."""
    return stepwise.weighted_ratio(self.log_prob - self.reference, self.weight)

  def mean_log_ratio(self) -> jax.Array:
    """The same over sum w, [B]."""
    return reference_free.length_mean(self.log_prob - self.reference, self.weight)


# (chosen, rejected) -> loss [B]
Pairwise = Callable[[Side, Side], jax.Array]


def log_ratios(loss: Callable[[jax.Array, jax.Array], jax.Array]) -> Pairwise:
  """A loss of `preference`, of summed log-ratios; by the weights it is of steps or of tokens."""
  return lambda chosen, rejected: loss(chosen.log_ratio(), rejected.log_ratio())


def mean_log_ratios(loss: Callable[[jax.Array, jax.Array], jax.Array]) -> Pairwise:
  """A loss of log-ratios per token, such as IPO's."""
  return lambda chosen, rejected: loss(chosen.mean_log_ratio(), rejected.mean_log_ratio())


def mean_log_probs(loss: Callable[[jax.Array, jax.Array], jax.Array]) -> Pairwise:
  """A loss of `reference_free`, of log-probabilities per token."""
  return lambda chosen, rejected: loss(chosen.mean(), rejected.mean())


def log_probs(loss: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]) -> Pairwise:
  """A loss of summed log-probabilities and the chosen response's negative mean, such as CPO's."""
  return lambda chosen, rejected: loss(chosen.total(), rejected.total(), -chosen.mean())


def margins(loss: Callable[[jax.Array, jax.Array], jax.Array]) -> Pairwise:
  """A loss of the margins of both models, log p(chosen) - log p(rejected), such as AOT's."""

  def pairwise(chosen, rejected):
    margin = chosen.total() - rejected.total()
    return loss(margin, margin - (chosen.log_ratio() - rejected.log_ratio()))

  return pairwise


def with_likelihood(pairwise: Pairwise, weight: float) -> Pairwise:
  """The loss, and weight times the chosen response's negative log-likelihood per token (RPO)."""
  return lambda chosen, rejected: pairwise(chosen, rejected) - weight * chosen.mean()


def of_pairs(model: models.LanguageModel, loss: Pairwise, *, chunk: int = 256) -> step.LossFn:
  """The loss of pairs under the model's own law, at temperature 1.

  The batch has `chosen` and `rejected`, rows as `scoring.scores` reads them with `weight` [B, L],
  and `reference_log_prob` [B, L] if the loss asks for it; and `weight` [B], 0 where there is no
  pair.

  Metrics: `chosen` and `rejected`, log-probabilities per token; `preferred`, how often the margin
  of log-ratios (without a reference, of these means) is above 0.
  """

  def loss_fn(key, params, batch):
    del key  # no dropout: the reference has none
    pair = batch["chosen"], batch["rejected"]
    both = {
      name: jnp.concatenate([side[name] for side in pair]) for name in pair[0] if name != "kept"
    }
    log_prob = scoring.scores(model, params, both, chunk=chunk).log_prob
    made = Side(log_prob, both.get("reference_log_prob"), both["weight"] * both["mask"])
    sides = [Side(*parts) for parts in zip(*map(_halves, made), strict=True)]
    weight = batch["weight"].astype(jnp.float32)
    losses = jnp.where(weight > 0, loss(*sides), 0) * weight
    chosen, rejected = (side.mean() for side in sides)
    margin = chosen - rejected
    if made.reference is not None:
      margin = sides[0].log_ratio() - sides[1].log_ratio()
    seen = {"chosen": chosen, "rejected": rejected, "preferred": (margin > 0).astype(jnp.float32)}
    seen = {name: weight * value for name, value in seen.items()}
    return (losses, weight), jax.lax.stop_gradient(seen)

  return loss_fn


def _halves(x):
  return (None, None) if x is None else jnp.split(x, 2)


class Singles(NamedTuple):
  """Responses that are marked good or bad, by their summed log-ratios."""

  log_ratio: jax.Array  # [B]
  desirable: jax.Array  # [B] bool
  weight: jax.Array  # [B], 0 where there is no response
  mismatched: jax.Array | None  # [B], log-ratios of responses to other prompts; no gradient


# Singles -> loss [B]
Unpaired = Callable[[Singles], jax.Array]


def around_divergence(loss: Callable[..., jax.Array]) -> Unpaired:
  """A loss of `unpaired` around the divergence from the reference, such as KTO's."""
  return lambda x: loss(x.log_ratio, x.desirable, unpaired.kto_kl(x.mismatched, x.weight))


def around_zero(loss: Callable[..., jax.Array]) -> Unpaired:
  """A loss of log-ratios as they are, such as `unpaired.apo_zero`."""
  return lambda x: loss(x.log_ratio, x.desirable)


def around_midpoint(loss: Callable[..., jax.Array]) -> Unpaired:
  """A loss around halfway between the batch's good and bad log-ratios, such as BCO's.

  The paper's shift is a running mean over batches; here it is the batch's own, so that a step reads
  nothing but its batch.
  """

  def single(x):
    midpoint = unpaired.bco_shift(x.log_ratio, x.desirable, x.weight, beta=1.0)
    return loss(x.log_ratio - midpoint, x.desirable, 0.0)  # beta x - beta midpoint

  return single


def of_singles(model: models.LanguageModel, loss: Unpaired, *, chunk: int = 256) -> step.LossFn:
  """The loss of single responses under the model's own law, at temperature 1.

  The batch has `sample`, rows as `scoring.scores` reads them with `reference_log_prob` [B, L];
  `desirable` [B]; `weight` [B], 0 where there is no response; and `mismatched`, rows like those of
  `sample`, if the loss asks for it. What the loss reads of the whole batch is of a microbatch where
  there are several.

  Mismatched rows are scored forward only: they estimate a constant.

  Metrics: `desirable`, the share of good ones; `log_ratio`; and `preferred`, how often its sign
  says which they are.
  """

  def log_ratio(params, rows):
    rows = {name: x for name, x in rows.items() if name != "kept"}
    log_prob = scoring.scores(model, params, rows, chunk=chunk).log_prob
    return Side(log_prob, rows["reference_log_prob"], rows["mask"]).log_ratio()

  def loss_fn(key, params, batch):
    del key  # no dropout: the reference has none
    ratio, mismatched = log_ratio(params, batch["sample"]), None
    if "mismatched" in batch:
      mismatched = log_ratio(jax.lax.stop_gradient(params), batch["mismatched"])
    desirable, weight = batch["desirable"] != 0, batch["weight"].astype(jnp.float32)
    losses = loss(Singles(ratio, desirable, weight, mismatched))
    seen = {"desirable": desirable, "log_ratio": ratio, "preferred": (ratio > 0) == desirable}
    seen = {name: weight * value for name, value in seen.items()}
    return (jnp.where(weight > 0, losses, 0) * weight, weight), jax.lax.stop_gradient(seen)

  return loss_fn
