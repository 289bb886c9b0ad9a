"""The only types that samplers and losses know about a model.

Shapes throughout: B rows, L positions, D model width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

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


def apply(
  model: LanguageModel, params: Params, tokens: jax.Array, cache: Cache | None = None, **kwargs
) -> tuple[jax.Array, Cache | None]:
  """Hidden states [B, L, D] of tokens [B, L], and the cache that now holds them; see `trunk`."""
  return model.trunk(params, model.embed(params, tokens), cache, **kwargs)


def per_row(values: jax.Array, x: jax.Array) -> jax.Array:
  """Values [B] or [] in a shape that multiplies x [B, ...] row by row."""
  return values.reshape(values.shape + (1,) * (x.ndim - values.ndim))
