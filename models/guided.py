"""Classifier-free guidance for text: a language model made of two readings of another one.

The conditional reading is prompt and continuation, the negative one a negative prompt and the same
continuation. What both predict is one law again, so every sampler takes it:

    steered = guided.guided(model, 1.5, prompts.length)
    decode.generate(steered, params, keys, prompts, max_new_tokens=64)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from . import base


class Cache(NamedTuple):
  """Both readings of each row, as the model's own cache of twice the rows.

  `length` alone says how much of either is held, so rewinding it rewinds both.
  """

  length: jax.Array  # [B] int32, tokens of prompt and continuation
  start: jax.Array  # [B] int32, the prompt's last slot, from which on the readings share tokens
  negative_length: jax.Array  # [B] int32
  last: jax.Array | None  # [B] int32, the negative prompt's last token; None if it is the prompt's
  pair: base.Cache  # leaves [B, 2, ...]: conditional, negative


def guided(
  model: base.LanguageModel,
  weight: float | jax.Array,
  prompt_length: int | jax.Array,
  negative: tuple[jax.Array, jax.Array] | None = None,
) -> base.LanguageModel:
  """The language model with p(x_t | x_<t) = p_c^w p_n^(1 - w) / Z, which favours p_c / p_n.

    log p = log p_n + w (log p_c - log p_n) - log Z

  with p_c = model(x_t | prompt, x_<t) and p_n = model(x_t | negative prompt, x_<t). Within the
  prompt, where nothing corresponds to it, the law is the model's own. One call of the model on 2 B
  rows makes a step, so weights are read once. Hidden states are [B, L, 2 D].

  The negative reading counts its own positions from 0. It takes slots too: a model that bounds its
  positions has N - 1 fewer for the sequence, N the width of `negative`.

  Args:
    model: the model; its cache's leaves lead with [B].
    weight: w >= 0, scalar or [R]; 1 is the conditional reading's law, 0 the negative one's.
    prompt_length: scalar or [R], at least 1.
    negative: negative prompts, tokens [R, N] and length [R] of at least 1 (`decode.Prompts` is such
      a pair). None is the prompt's last token alone, which is "no prompt" for a model that has no
      token to begin with.

  A batch of B is R rows, or each of them B / R times over, next to each other.

  Raises:
    ValueError: a negative number for `weight`; a batch that is no multiple of R; a call with
      positions or a mask, which would be those of one reading only.

  Reference: Sanchez et al. 2023, arXiv 2306.17806, after Ho and Salimans 2022,
  arXiv 2207.12598.
  """
  if isinstance(weight, int | float) and weight < 0:
    raise ValueError(f"guided({weight}): the weight has to be at least 0.")

  def init_cache(params, batch_size, max_length):
    start = _rows(prompt_length, batch_size) - 1
    if negative is None:
      pair = [model.init_cache(params, batch_size, max_length)] * 2
      return Cache(jnp.zeros_like(start), start, jnp.ones_like(start), None, _side_by_side(pair))
    tokens, length = (_rows(leaf, batch_size) for leaf in negative)
    last = jnp.take_along_axis(tokens, length[:, None] - 1, axis=1)[:, 0]
    empty = model.init_cache(params, batch_size, max_length + tokens.shape[1] - 1)
    held = base.apply(model, params, tokens[:, :-1], empty)[1] if tokens.shape[1] > 1 else empty
    return Cache(jnp.zeros_like(start), start, length, last, _side_by_side([empty, held]))

  def trunk(params, x, cache=None, *, positions=None, mask=None, key=None):
    if positions is not None or mask is not None:
      raise ValueError(
        "A guided model places its two readings itself: call it without positions and mask."
      )
    held = init_cache(params, *x.shape[:2]) if cache is None else cache
    hidden, pair = _read_both(model, params, x, held, key)
    return hidden, None if cache is None else held._replace(
      length=held.length + x.shape[1], pair=pair
    )

  def readout(params, hidden):
    both = model.readout(params, jnp.stack(jnp.split(hidden, 2, axis=-1)))
    conditional, other = jax.nn.log_softmax(both, axis=-1)
    w = jnp.asarray(weight, jnp.float32)
    if w.ndim > 0:
      w = _rows(w, hidden.shape[0]).reshape(-1, *(1,) * (hidden.ndim - 1))
    return extrapolate(conditional, other, w)

  return base.LanguageModel(model.init, init_cache, model.embed, trunk, readout)


def extrapolate(conditional: jax.Array, other: jax.Array, weight: jax.Array) -> jax.Array:
  """other + w (conditional - other) of log-probabilities [..., V], with a rule for each -inf.

  Where a probability is 0, the law is the limit from above: a factor of 0 to a power above 0
  excludes the token, to the power 0 is 1, and below 0 takes all the mass (a token that the
  conditional allows and the other excludes, at w > 1; they share it as the rest of the product
  says). A token that both exclude stays out. Laws without a token in common leave none, 0 < w < 1.
  """
  powers = weight, 1 - weight
  impossible = [jnp.isneginf(law) for law in (conditional, other)]
  finite = sum(
    power * jnp.where(zero, 0, law)
    for power, zero, law in zip(powers, impossible, (conditional, other), strict=True)
  )
  excluded = impossible[0] & impossible[1]
  endless = jnp.zeros_like(excluded)
  for power, zero in zip(powers, impossible, strict=True):
    excluded |= zero & (power > 0)
    endless |= zero & (power < 0)
  endless &= ~excluded
  kept = jnp.where(jnp.any(endless, axis=-1, keepdims=True), endless, ~excluded)
  return jnp.where(kept, finite, -jnp.inf)


def _rows(value: int | jax.Array, batch_size: int) -> jax.Array:
  """A value for each of R rows (or for all) as [B, ...], each B / R times, next to each other."""
  value = jnp.atleast_1d(jnp.asarray(value))
  if batch_size % value.shape[0]:
    raise ValueError(
      f"guided: it was made for {value.shape[0]} rows, the batch has {batch_size}: give weight, "
      "prompt_length and negative one entry per prompt."
    )
  return jnp.repeat(value, batch_size // value.shape[0], axis=0)


def _side_by_side(caches):
  """Two caches [B, ...] as one [B, 2, ...]."""
  return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *caches)


def _read_both(model, params, x, held, key):
  """Hidden states [B, L, 2 D] and the pair of caches after x [B, L, D].

  The first `ahead` entries of x belong to the prompt alone, so the negative reading takes x that
  much further left. What that leaves at the right end is padding: it is beyond the length that the
  next call derives, which writes over it.
  """
  batch_size, length = x.shape[:2]
  ahead = jnp.maximum(held.start - held.length, 0)[:, None]
  places = jnp.arange(length)[None, :]
  source = jnp.minimum(places + ahead, length - 1)
  shifted = jnp.take_along_axis(x, source[:, :, None], axis=1)
  if held.last is not None:
    is_last = held.length[:, None] + source == held.start[:, None]
    last = model.embed(params, held.last)[:, None, :]
    shifted = jnp.where(is_last[:, :, None], last, shifted)

  read = held.negative_length - 1 + jnp.maximum(held.length - held.start, 0)
  merge = lambda leaf: leaf.reshape(2 * batch_size, *leaf.shape[2:])
  part = lambda leaf: leaf.reshape(batch_size, 2, *leaf.shape[1:])
  pair = jax.tree.map(merge, held.pair)._replace(
    length=merge(jnp.stack([held.length, read], axis=1))
  )
  hidden, pair = model.trunk(params, merge(jnp.stack([x, shifted], axis=1)), pair, key=key)
  conditional, other = jnp.moveaxis(part(hidden), 1, 0)
  back = jnp.take_along_axis(other, jnp.maximum(places - ahead, 0)[:, :, None], axis=1)
  other = jnp.where((places >= ahead)[:, :, None], back, conditional)
  return jnp.concatenate([conditional, other], axis=-1), jax.tree.map(part, pair)
