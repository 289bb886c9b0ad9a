"""Losses that train what drafts for speculative decoding: heads, exits, and models on their own.

The target is frozen where its params are an argument of a factory; call that inside jit, or they
are baked into the program. A key of None is for evaluation: no noise, no dropout.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ..models import base as models
from ..models import eagle
from ..sampling import acceptance
from . import likelihood, step


def divergence(target_logits: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
  """KL(p || q) in nats, and the acceptance sum_v min(p, q) of one draft of q; of logits [..., V].

  The gradient by the draft's logits is q - p, that of the cross entropy to p.
  """
  log_p = jax.nn.log_softmax(target_logits.astype(jnp.float32), axis=-1)
  log_q = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  gap = jnp.where(log_p > -jnp.inf, log_p - log_q, 0)
  return jnp.sum(jnp.exp(log_p) * gap, axis=-1), acceptance.maximal_acceptance(log_q, log_p)


def smooth_l1(error: jax.Array) -> jax.Array:
  """z^2 / 2 for |z| < 1, |z| - 1/2 beyond, of each number."""
  size = jnp.abs(error)
  return jnp.where(size < 1, jnp.square(error) / 2, size - 0.5)


def chunked_divergence(
  target_readout: Callable[[jax.Array], jax.Array],
  readout: Callable[[jax.Array], jax.Array],
  target_hidden: jax.Array,
  hidden: jax.Array,
  mask: jax.Array,
  *,
  chunk: int,
) -> tuple[jax.Array, jax.Array]:
  """Per row, `divergence` and acceptance summed, [B] each, weighted by the mask.

  Logits are made for `chunk` positions at a time, forward and again backward.

  Args:
    target_readout: target_hidden [..., D] -> logits [..., V].
    readout: hidden [..., D'] -> logits [..., V].
    target_hidden: [B, L, D].
    hidden: [B, L, D'].
    mask: [B, L], weight of each position.
    chunk: positions read out at once.
  """
  batch_size, length = mask.shape
  chunk = min(chunk, length)

  def chunks(x):  # [B, L, ...] -> [L / chunk, B, chunk, ...]
    padding = ((0, 0), (0, -length % chunk)) + ((0, 0),) * (x.ndim - 2)
    return jnp.swapaxes(jnp.pad(x, padding).reshape(batch_size, -1, chunk, *x.shape[2:]), 0, 1)

  @jax.checkpoint
  def one(arrays):
    target_hidden, hidden, mask = arrays
    both = divergence(target_readout(target_hidden), readout(hidden))
    return tuple(jnp.sum(jnp.where(mask != 0, part, 0) * mask, axis=-1) for part in both)

  parts = jax.lax.map(one, (chunks(target_hidden), chunks(hidden), chunks(mask)))
  return tuple(jnp.sum(part, axis=0) for part in parts)


def _places(batch):
  """What several documents in a row tell a trunk; see `likelihood.next_token`."""
  segments = batch.get("segments")
  mask = None if segments is None else segments[:, :, None] == segments[:, None, :]
  return {"positions": batch.get("positions"), "mask": mask}


def _two(key):
  """Two keys; of none, for evaluation, none."""
  return (None, None) if key is None else jax.random.split(key)


def feature_prediction(
  model: models.LanguageModel,
  model_params: models.Params,
  head: eagle.FeatureModel,
  *,
  feature_weight: float = 1.0,
  law_weight: float = 0.1,
  noise: float = 0.1,
  chunk: int = 256,
) -> step.LossFn:
  """The EAGLE loss of a head's params: its features are the target's, and so are its laws.

    w_f mean_d smooth_L1(f'_t - f_t) + w_l KL(readout(f_t) || readout(f'_t)),

  at every token, from the true features before it plus noise of U(-noise, noise), since drafting
  will have but predicted ones. The paper has the cross entropy, which is more by the target's
  entropy and has the same gradient. The authors' code scales the noise by 512 / L; this follows the
  paper.

  Batch, weights and documents that share rows are as in `likelihood.next_token`, but what counts is
  the target's law at each position and not the token that follows. Metrics: `feature`, the first
  term, `divergence`, the second without its weight, and `acceptance`, of a first draft.

  Args:
    model: the target, frozen.
    model_params: its parameters.
    head: whose params are trained.
    feature_weight: w_f.
    law_weight: w_l; the paper's w_cls.
    noise: half the width of the noise.
    chunk: positions read out at once.

  Reference: Li et al. 2024, arXiv 2401.15077, section 3.2.
  """

  frozen = jax.lax.stop_gradient(model_params)

  def loss(key, params, batch):
    noise_key, head_key = _two(key)
    places = _places(batch)
    embedded = model.embed(frozen, batch["tokens"])
    features, _ = model.trunk(frozen, embedded, **places)
    known = features
    if noise_key is not None:
      known += jax.random.uniform(noise_key, known.shape, known.dtype, -noise, noise)
    known = eagle.before(known, places["positions"])
    predicted, _ = head.trunk(params, known, embedded, key=head_key, **places)
    weights = batch["mask"].astype(jnp.float32)
    apart = predicted.astype(jnp.float32) - features.astype(jnp.float32)
    error = jnp.sum(jnp.mean(smooth_l1(apart), axis=-1) * weights, axis=-1)
    readout = lambda hidden: model.readout(frozen, hidden)
    wrong, accepted = chunked_divergence(
      readout, readout, features, predicted, weights, chunk=chunk
    )
    metrics = {"feature": error, "divergence": wrong, "acceptance": accepted}
    total = feature_weight * error + law_weight * wrong
    return (total, jnp.sum(weights, axis=-1)), metrics

  return loss


def distillation(
  model: models.LanguageModel,
  model_params: models.Params,
  draft: models.LanguageModel,
  *,
  chunk: int = 256,
) -> step.LossFn:
  """KL(target || draft) of the next token at every position, for the params of a draft model.

  Batch, weights and documents that share rows are as in `likelihood.next_token`, but what counts is
  the target's law at each position and not the token that follows. The metric is `acceptance`, of
  one draft: 1 - TV >= 1 - sqrt(KL / 2).

  Args:
    model: the target, frozen.
    model_params: its parameters.
    draft: of the same vocabulary; its params are trained.
    chunk: positions read out at once.

  Reference: Zhou et al. 2023 (DistillSpec), arXiv 2310.08461.
  """

  frozen = jax.lax.stop_gradient(model_params)

  def loss(key, params, batch):
    places = _places(batch)
    target_hidden, _ = models.apply(model, frozen, batch["tokens"], **places)
    hidden, _ = models.apply(draft, params, batch["tokens"], key=key, **places)
    weights = batch["mask"].astype(jnp.float32)
    apart, accepted = chunked_divergence(
      lambda hidden: model.readout(frozen, hidden),
      lambda hidden: draft.readout(params, hidden),
      target_hidden,
      hidden,
      weights,
      chunk=chunk,
    )
    return (apart, jnp.sum(weights, axis=-1)), {"acceptance": accepted}

  return loss


def early_exit(
  model: models.LanguageModel,
  exit_model: models.LanguageModel,
  *,
  weight: float = 0.2,
  chunk: int = 256,
  z_loss: float = 0.0,
) -> step.LossFn:
  """-log p(target) - weight log p_n(target), of a model and of an exit, over the same params.

  Both are `likelihood.next_token`; the first layers are read twice, with dropout of their own.
  Metrics: `accuracy` and `exit_accuracy`, of greedy tokens.

  Args:
    model: the whole model.
    exit_model: `models.early_exit` of it.
    weight: of the exit.
    chunk: positions read out at once.
    z_loss: see `likelihood.cross_entropy`.

  Reference: Elhoushi et al. 2024 (LayerSkip), arXiv 2404.16710, which sums over all exits with
  weights on a curriculum, and drops layers.
  """
  whole = likelihood.next_token(model, chunk=chunk, z_loss=z_loss)
  leaving = likelihood.next_token(exit_model, chunk=chunk, z_loss=z_loss)

  def loss(key, params, batch):
    whole_key, exit_key = _two(key)
    (losses, weights), metrics = whole(whole_key, params, batch)
    (exit_losses, _), exit_metrics = leaving(exit_key, params, batch)
    metrics = {**metrics, "exit_accuracy": exit_metrics["accuracy"]}
    return (losses + weight * exit_losses, weights), metrics

  return loss
