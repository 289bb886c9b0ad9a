"""Training of the head that predicts whether a draft is accepted; see `models.confidence`."""

import jax
import jax.numpy as jnp
import numpy as np

from ..models import base as models
from ..models import confidence as heads
from ..sampling import base, coupling, drafting
from ..sampling import logits as logits_lib
from . import step


def weighted_cross_entropy(
  logit: jax.Array,
  accept: jax.Array,
  *,
  accept_weight: float = 1.0,
  reject_weight: float = 6.0,
) -> jax.Array:
  """-(w_acc a log f + w_rej (1 - a) log(1 - f)), f = sigmoid(logit), [...].

  Where a has mean m given the features, it is least at w_acc m / f = w_rej (1 - m) / (1 - f), so

    f = w_acc m / (w_acc m + w_rej (1 - m)),  logit f = logit m - log(w_rej / w_acc).

  Equal weights make f calibrated. The paper's 1 and 6 divide the odds of acceptance by 6: m = 0.9
  is reported as 0.6, so the same threshold stops far earlier, and most of all where the draft is
  good but not certain. `unweighted` undoes it.

  Args:
    logit: [...].
    accept: [...] in [0, 1], the probability that the draft is accepted, a soft label.
    accept_weight: w_acc.
    reject_weight: w_rej.

  Reference: Huang et al. 2024 (SpecDec++), arXiv 2405.19715.
  """
  refused = accept_weight * accept * jax.nn.softplus(-logit)
  return refused + reject_weight * (1 - accept) * jax.nn.softplus(logit)


def unweighted(
  logit: jax.Array, *, accept_weight: float = 1.0, reject_weight: float = 6.0
) -> jax.Array:
  """The logit of m from that of f, at the optimum of `weighted_cross_entropy`."""
  return logit + np.log(reject_weight / accept_weight)


def acceptance(
  head: heads.Head,
  target: models.LanguageModel,
  target_params: models.Params,
  draft: models.LanguageModel,
  draft_params: models.Params,
  *,
  transform: logits_lib.LogitsTransform | None = None,
  mixing: float = 0.15,
  accept_weight: float = 1.0,
  reject_weight: float = 6.0,
) -> step.LossFn:
  """The loss of predicting min(1, p(y) / q(y)) of drafts y ~ q along texts, over head params alone.

  A draft in deployment may follow other drafts, so contexts are made to hold some: each token of
  the text is replaced, with probability `mixing`, by one that the draft model draws in its place.
  p, q and y are those of the mixed text. (The paper takes p of the text itself, and one draw for
  both; its published code replaces all but the share r = 0.15.)

  The batch is as of `likelihood.next_token`, its weights too. Metrics are means over drafts: of the
  label (`accept`), of the prediction (`confidence`) and of their squared difference
  (`brier_score`); the first two agree where the head is calibrated on average.

  Args:
    head: what is trained.
    target: p; frozen, as its params.
    target_params: of the target.
    draft: q; frozen, as its params.
    draft_params: of the draft model.
    transform: of both laws, without feedback.
    mixing: the paper's r.
    accept_weight: see `weighted_cross_entropy`.
    reject_weight: see `weighted_cross_entropy`.

  Reference: Huang et al. 2024 (SpecDec++), arXiv 2405.19715, section 3.
  """
  transform = drafting.without_feedback(transform)

  def read(model, params, tokens, batch):
    """Hidden states [B, L, D] and logits [B, L, V] of the transformed law."""
    segments = batch.get("segments")
    mask = None if segments is None else segments[:, :, None] == segments[:, None, :]
    hidden, _ = models.apply(model, params, tokens, positions=batch.get("positions"), mask=mask)
    return hidden, _laws(transform, model.readout(params, hidden), tokens)

  def loss(key, params, batch):
    mix_key, coin_key, draw_key = jax.random.split(key, 3)
    tokens = batch["tokens"]
    _, logits = read(draft, draft_params, tokens, batch)
    proposed = jnp.roll(_draw(mix_key, logits), 1, axis=1)
    inside = jnp.arange(tokens.shape[1])[None, :] > 0
    if "segments" in batch:  # a document's first token stays
      inside &= batch["segments"] == jnp.roll(batch["segments"], 1, axis=1)
    replaced = inside & jax.random.bernoulli(coin_key, mixing, tokens.shape)
    mixed = jnp.where(replaced, proposed, tokens)

    hidden, log_q = read(draft, draft_params, mixed, batch)
    log_q = coupling.log_law(log_q)
    log_p = coupling.log_law(read(target, target_params, mixed, batch)[1])
    drawn = _draw(draw_key, log_q)
    accept = coupling.maximal_one(drawn[..., None], log_q, log_p).accept[..., 0]
    embed = lambda token: draft.embed(draft_params, token)
    of = jax.lax.stop_gradient(heads.features(hidden, drawn, log_q, embed))
    logit = head.logit(params, of)
    losses = weighted_cross_entropy(
      logit, accept, accept_weight=accept_weight, reject_weight=reject_weight
    )
    weights = batch["mask"].astype(jnp.float32)
    total = lambda x: jnp.sum(weights * x, axis=1)
    f = jax.nn.sigmoid(logit)
    metrics = {"accept": accept, "confidence": f, "brier_score": jnp.square(f - accept)}
    return (total(losses), jnp.sum(weights, axis=1)), jax.tree.map(total, metrics)

  return loss


def _laws(transform, logits, tokens):
  """The transform of logits [B, L, V], each in the context of the tokens up to its own."""
  batch_size, length = tokens.shape

  def at(logits, position):
    lengths = jnp.full(batch_size, position + 1, jnp.int32)
    context = logits_lib.Context(tokens, lengths, jnp.ones(batch_size, jnp.int32))
    return transform.apply(logits, context, ())

  return jax.vmap(at, in_axes=(1, 0), out_axes=1)(logits, jnp.arange(length))


def _draw(key, logits):
  """A token [B, L] of each law [B, L, V]."""
  flat = logits.reshape(-1, logits.shape[-1])
  keys = base.row_keys(key, jnp.arange(flat.shape[0]))
  return logits_lib.draw(keys, flat).reshape(logits.shape[:-1])
