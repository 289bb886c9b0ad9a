"""How likely a model finds tokens that were drawn: what preference and policy losses are made of.

A token counts under the law that it was drawn from, temperature and filters included. A filter is
not computed again: rollouts carry the set that it left (`kept`), and scores are renormalised over
that set. So where parameters have not changed, trainer and sampler agree, and as they change no
token that was drawn becomes impossible.

Sampling with a filter and scoring by the whole softmax is a bias of exactly the kept mass: .8 of
the ratio at top_p(0.8).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..models import base as models
from . import likelihood, policy, step


class Scores(NamedTuple):
  """Of each target of a batch; 0 where nothing was drawn."""

  log_prob: jax.Array  # [B, L] float32
  entropy: jax.Array  # [B, L] float32, of the law that the target is from, in nats


def pack(kept: jax.Array) -> jax.Array:
  """A set of tokens [..., V] bool as bits, [..., ceil(V / 8)] uint8."""
  return jnp.packbits(kept, axis=-1, bitorder="little")


def unpack(bits: jax.Array, vocab_size: int) -> jax.Array:
  """The set [..., V] bool of `pack`."""
  return jnp.unpackbits(bits, axis=-1, count=vocab_size, bitorder="little").astype(bool)


def sampled_law(
  logits: jax.Array, temperature: jax.Array, kept: jax.Array | None = None
) -> jax.Array:
  """log softmax(logits / T) over the tokens kept, [..., V]; -inf elsewhere.

  Args:
    logits: [..., V], of the model.
    temperature: T > 0, [].
    kept: bits [..., ceil(V / 8)], see `pack`; None keeps all.
  """
  logits = logits.astype(jnp.float32) / temperature
  if kept is not None:
    logits = jnp.where(unpack(kept, logits.shape[-1]), logits, -jnp.inf)
  return jax.nn.log_softmax(logits, axis=-1)


def scores(
  model: models.LanguageModel,
  params: models.Params,
  batch: step.Batch,
  *,
  temperature: float | jax.Array = 1.0,
  chunk: int = 256,
) -> Scores:
  """log p(target | tokens before it) under the law that targets were drawn from, and its entropy.

  Laws are made for `chunk` positions at a time, forward and again backward, so the largest array is
  [B, chunk, V] and not [B, L, V].

  Args:
    model: the model.
    params: its parameters.
    batch: `tokens`, `targets` [B, L] int32 and `mask` [B, L], 0 where nothing was drawn; where a
      filter was on, `kept` [B, L, ceil(V / 8)]; for rows padded on the left `segments` and
      `positions`, see `likelihood.next_token`.
    temperature: that targets were drawn with, above 0.
    chunk: positions read out at once.
  """
  hidden = likelihood.hidden_states(model, params, batch, None)  # no dropout
  drawn = {name: batch[name] for name in ("targets", "mask", "kept") if name in batch}

  def one(hidden, drawn):
    inside = drawn["mask"] != 0
    kept = drawn.get("kept")
    if kept is not None:  # where nothing was drawn nothing is kept: a law of no token is NaN
      kept = jnp.where(inside[..., None], kept, jnp.uint8(255))
    law = sampled_law(model.readout(params, hidden), temperature, kept)
    chosen = jnp.take_along_axis(law, drawn["targets"][..., None], axis=-1)[..., 0]
    return Scores(jnp.where(inside, chosen, 0), jnp.where(inside, policy.entropy_of_law(law), 0))

  made = likelihood.in_chunks(one, (hidden, drawn), chunk)  # [L / chunk, B, chunk]
  batch_size, length = batch["targets"].shape
  return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(batch_size, -1)[:, :length], made)
