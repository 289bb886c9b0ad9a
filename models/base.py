"""The only types that samplers and losses know about a model.

Shapes throughout: B rows, L positions, D model width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

Params = Any


class Cache(Protocol):
  """What a language model remembers of the tokens it has read: any pytree with `length`.

  Only the model that made a cache reads the rest of it. Rewinding is `cache._replace(length=n)`:
  entries beyond `length` are never attended to, and the next write covers them.
  """

  length: jax.Array  # [B] int32, tokens held

  def _replace(self, **fields) -> "Cache": ...

  def moved(self, source: jax.Array, target: jax.Array) -> "Cache":
    """The entries of slots source [B, n] in slots target [B, n] as well; beyond, dropped.

    What a tree of tokens needs, whose accepted path does not lie in neighbouring slots.
    """
    ...


class LanguageModel(NamedTuple):
  """A distribution over token sequences, p(x) = prod_t p(x_t | x_<t), as five pure functions.

  `embed`, `trunk` and `readout` are apart because their callers differ: prefill reads out nothing,
  decoding one position, losses a chunk at a time, and superposed decoding embeds mixtures.

  Attributes:
    init: (key, tokens [B, L]) -> params.
    init_cache: (params, batch_size, max_length) -> Cache holding nothing.
    embed: (params, tokens [...]) -> [..., D].
    trunk: (params, x [B, L, D], cache=None, *, positions=None, mask=None, key=None)
      -> (hidden [B, L, D] after the final norm, cache). `x` continues what the cache holds.
      `positions` [B, L] replaces the default count from the cache's length; `mask` [B, L, S], true
      where a query may attend, narrows the model's own mask (S = L, or the cache's capacity);
      `key` turns on what is random in training (dropout, randomised positions).
    readout: (params, hidden [..., D]) -> logits [..., V], float32.
  """

  init: Callable[..., Params]
  init_cache: Callable[..., Cache]
  embed: Callable[..., jax.Array]
  trunk: Callable[..., tuple[jax.Array, Cache | None]]
  readout: Callable[..., jax.Array]


# x_t [B, ...], t [B] or [] -> E[x_0 | x_t] [B, ...]. A time per row: rows may be at different steps
# of a sampler, and a loss draws each row its own.
Denoiser = Callable[[jax.Array, jax.Array], jax.Array]

# tokens [B, L] with some masked, t [] -> logits [B, L, V] of p(x_0 at each position | tokens)
Predictor = Callable[[jax.Array, jax.Array], jax.Array]


class Condition(NamedTuple):
  """What a diffusion network is told besides a noisy sample and how noisy it is.

  A field that the network does not take is None. To guide without a classifier, the same network is
  called with `unconditional` as well.
  """

  label: jax.Array | None = None  # [B] int32, a class; num_classes, one past the last, is none
  text: jax.Array | None = None  # [B, T, E], embeddings of tokens
  text_mask: jax.Array | None = None  # [B, T] bool, which of them there are; a row of none is none


def without(condition: Condition, num_classes: int | None, rows: jax.Array) -> Condition:
  """The condition taken away from the rows [B] (bool) where `rows` is true.

  Raises:
    ValueError: there are labels and it is not said of how many classes.
  """
  label, text, mask = condition
  if label is not None:
    if num_classes is None:
      raise ValueError("Labels are taken away by the class num_classes, which is None.")
    label = jnp.where(rows, num_classes, label)
  if text is not None:
    mask = jnp.ones(text.shape[:2], bool) if mask is None else mask
    mask = mask & ~rows[:, None]
  return Condition(label, text, mask)


class Network(NamedTuple):
  """What a diffusion model learns, as two pure functions; `precondition` makes a Denoiser of it.

  Attributes:
    init: (key, x [B, ...]) -> params.
    apply: (params, x [B, ...], level [B], condition, *, key=None) -> output [B, ...], float32.
      `level` says how noisy x is, from 0 to about 1000; `key` turns dropout on.
  """

  init: Callable[..., Params]
  apply: Callable[..., jax.Array]


def apply(
  model: LanguageModel, params: Params, tokens: jax.Array, cache: Cache | None = None, **kwargs
) -> tuple[jax.Array, Cache | None]:
  """Hidden states [B, L, D] of tokens [B, L], and the cache that now holds them; see `trunk`."""
  return model.trunk(params, model.embed(params, tokens), cache, **kwargs)


def per_row(values: jax.Array, x: jax.Array) -> jax.Array:
  """Values [B] or [] in a shape that multiplies x [B, ...] row by row."""
  return values.reshape(values.shape + (1,) * (x.ndim - values.ndim))
