"""The EAGLE head: a transformer of a layer or so that predicts a language model's hidden states.

A feature is the hidden state [D] that `LanguageModel.trunk` returns for a token, from which the
next token is read out. Features are easier to foretell than tokens, as soon as it is known which
token was drawn.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from . import base, transformer


class FeatureModel(NamedTuple):
  """Predicts the feature at each token from the feature before it and the token itself.

  Attributes:
    init: (key) -> params.
    init_cache: (params, batch_size, max_length) -> Cache holding nothing; slot t is for the pair
      (feature at token t - 1, token t).
    trunk: (params, features [B, L, D] at the tokens before, embedded [B, L, D], cache=None, *,
      positions=None, mask=None, key=None) -> (predicted features [B, L, D], cache); otherwise as
      `LanguageModel.trunk`.
  """

  init: Callable[[jax.Array], base.Params]
  init_cache: Callable[..., base.Cache]
  trunk: Callable[..., tuple[jax.Array, base.Cache | None]]


def eagle(config: transformer.TransformerConfig, num_layers: int = 1) -> FeatureModel:
  """f'_t = transformer(W [f_{t-1}; embedding(x_t)]), of the pairs up to t.

  The target's readout of f'_t is the draft law of x_{t+1}; where f_t is not known yet, f'_t takes
  its place. Params may be stacked or unstacked (`transformer.unstack`), as a transformer's.

  The layers are the target's kind, norms included. The authors' code leaves out the first norm and
  the last one; here the last one brings predictions to the scale of features, which come after the
  target's own.

  Args:
    config: the target's; what is said of the vocabulary is not used.
    num_layers: of the head; the paper has 1.

  Raises:
    ValueError: the target is not causal.

  Reference: Li et al. 2024, arXiv 2401.15077, section 3.1.
  """
  if not config.causal:
    raise ValueError("causal=False: features of a bidirectional model change as the text grows.")
  config = dataclasses.replace(config, num_layers=num_layers, vocab_size=1, tied_embeddings=True)
  layers = transformer.transformer(config)

  def init(key):
    layers_key, fuse_key = jax.random.split(key)
    params = layers.init(layers_key, jnp.zeros((1, 1), jnp.int32))
    params.pop("embedding")
    kernel = nn.initializers.lecun_normal()(fuse_key, (2 * config.width, config.width))
    return {**params, "fuse": {"kernel": kernel}}

  def trunk(params, features, embedded, cache=None, **kwargs):
    pairs = jnp.concatenate([features, embedded], axis=-1)
    x = jnp.matmul(pairs, params["fuse"]["kernel"].astype(pairs.dtype))
    return layers.trunk(params, x, cache, **kwargs)

  return FeatureModel(init, layers.init_cache, trunk)


def before(features: jax.Array, positions: jax.Array | None = None) -> jax.Array:
  """The feature at the token before each, [B, L, D]: 0 before the first token of a text.

  Args:
    features: [B, L, D].
    positions: [B, L], 0 where a text begins; one text in each row if None.
  """
  shifted = jnp.pad(features, ((0, 0), (1, 0), (0, 0)))[:, :-1]
  return shifted if positions is None else jnp.where(positions[:, :, None] == 0, 0, shifted)
