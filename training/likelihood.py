"""Maximum likelihood of token sequences."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..models import base as models
from . import step


def cross_entropy(logits: jax.Array, targets: jax.Array, *, z_loss: float = 0.0) -> jax.Array:
  """-log p(target) + z_loss (log Z)^2, in nats, with p = exp(logits) / Z.

  The second term keeps logits from drifting (Chowdhery et al. 2022, arXiv 2204.02311, section 5).

  Args:
    logits: [..., V].
    targets: [...].
    z_loss: weight of the second term; PaLM's is 1e-4.

  Returns:
    [...], float32.
  """
  logits = logits.astype(jnp.float32)
  log_normaliser = jax.nn.logsumexp(logits, axis=-1)
  chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return log_normaliser - chosen + z_loss * jnp.square(log_normaliser)


def chunked_cross_entropy(
  readout: Callable[[jax.Array], jax.Array],
  hidden: jax.Array,
  targets: jax.Array,
  mask: jax.Array,
  *,
  chunk: int,
  z_loss: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
  """Per row, the summed `cross_entropy` and number of tokens that greedy decoding would get right.

  Logits are made for `chunk` positions at a time, forward and again backward, so the largest array
  is [B, chunk, V] and not [B, L, V].

  Args:
    readout: hidden [..., D] -> logits [..., V].
    hidden: [B, L, D].
    targets: [B, L].
    mask: [B, L], weight of each target.
    chunk: positions read out at once.
    z_loss: see `cross_entropy`.

  Returns:
    Two arrays [B], weighted by the mask.
  """

  def one(hidden, targets, mask):
    logits = readout(hidden)
    right = jnp.argmax(logits, axis=-1) == targets
    losses = cross_entropy(logits, targets, z_loss=z_loss)
    losses = jnp.where(mask != 0, losses, 0)  # a masked target may be impossible: 0 inf is NaN
    return jnp.sum(losses * mask, axis=-1), jnp.sum(right * mask, axis=-1)

  losses, right = in_chunks(one, (hidden, targets, mask), chunk)
  return jnp.sum(losses, axis=0), jnp.sum(right, axis=0)


def in_chunks(f: Callable[..., Any], arrays: Any, chunk: int) -> Any:
  """What f makes of arrays [B, L, ...] cut along L, a chunk at a time, stacked [L / chunk, ...].

  The last chunk is filled up with zeros. What f makes on the way is made again backward.
  """
  batch_size, length = jax.tree.leaves(arrays)[0].shape[:2]
  chunk = min(chunk, length)

  def cut(x):  # [B, L, ...] -> [L / chunk, B, chunk, ...]
    padding = ((0, 0), (0, -length % chunk)) + ((0, 0),) * (x.ndim - 2)
    return jnp.swapaxes(jnp.pad(x, padding).reshape(batch_size, -1, chunk, *x.shape[2:]), 0, 1)

  return jax.lax.map(lambda parts: jax.checkpoint(f)(*parts), jax.tree.map(cut, arrays))


def hidden_states(
  model: models.LanguageModel, params: models.Params, batch: step.Batch, key: jax.Array | None
) -> jax.Array:
  """What the model makes of a batch's `tokens` [B, L], [B, L, D]; see `next_token`."""
  segments = batch.get("segments")
  mask = None if segments is None else segments[:, :, None] == segments[:, None, :]
  return models.apply(
    model, params, batch["tokens"], positions=batch.get("positions"), mask=mask, key=key
  )[0]


def next_token(
  model: models.LanguageModel, *, chunk: int = 256, z_loss: float = 0.0
) -> step.LossFn:
  """The loss of predicting each target from the tokens before it.

  The batch has `tokens`, `targets` and `mask`, [B, L], and when several documents share a row
  `segments` and `positions`, [B, L]: a token then attends to its own document only. A row's weight
  is its number of targets, so the mean is per token; the metric is `accuracy`, of greedy tokens.
  """

  def loss(key, params, batch):
    hidden = hidden_states(model, params, batch, key)
    weights = batch["mask"].astype(jnp.float32)
    readout = lambda hidden: model.readout(params, hidden)
    losses, right = chunked_cross_entropy(
      readout, hidden, batch["targets"], weights, chunk=chunk, z_loss=z_loss
    )
    return (losses, jnp.sum(weights, axis=-1)), {"accuracy": right}

  return loss
