"""Heads: networks that turn a transformer's hidden state into the law of a continuous token.

Shapes: D numbers in a token, W hidden width, K components, T transitions of a diffusion.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from . import base, gaussian
from . import transformer as transformer_lib


class Head(NamedTuple):
  """A law of the next token for each hidden state; of one position, so callers vmap.

  Attributes:
    init: (key, hidden [W]) -> params.
    law: (params, hidden [W]) -> gaussian.Density.
    value: (draw) -> token [D].
  """

  init: Callable[[jax.Array, jax.Array], base.Params]
  law: Callable[[base.Params, jax.Array], gaussian.Density]
  value: Callable[[gaussian.Draw], jax.Array]


class MixtureNetwork(nn.Module):
  """The parameters of a Gaussian mixture from a hidden state, by one hidden layer."""

  token_size: int
  num_components: int
  width: int
  min_scale: float

  @nn.compact
  def __call__(self, hidden):
    shape = (self.num_components, self.token_size)
    x = nn.silu(nn.Dense(self.width)(hidden.astype(jnp.float32)))
    # The components begin apart: from equal ones, gradients would keep them together.
    means = nn.Dense(np.prod(shape), bias_init=nn.initializers.normal(1.0))(x).reshape(shape)
    scales = self.min_scale + nn.softplus(nn.Dense(np.prod(shape))(x).reshape(shape))
    return nn.Dense(self.num_components)(x), means, scales


def mixture(token_size: int, num_components: int, *, width: int, min_scale: float = 1e-3) -> Head:
  """A head whose law is a mixture of K diagonal Gaussians; a draw is the token itself.

  Args:
    token_size: D.
    num_components: K; 1 is a Gaussian head.
    width: of the hidden layer.
    min_scale: a standard deviation that none falls below, so that densities are bounded.
  """
  network = MixtureNetwork(token_size, num_components, width, min_scale)
  return Head(
    init=lambda key, hidden: network.init(key, hidden)["params"],
    law=lambda params, hidden: gaussian.mixture(*network.apply({"params": params}, hidden)),
    value=lambda draw: draw,
  )


class NoiseNetwork(nn.Module):
  """eps(x_t, t, hidden): residual blocks of a hidden layer each, on the sum of three embeddings."""

  token_size: int
  num_steps: int
  width: int
  num_blocks: int

  @nn.compact
  def __call__(self, x, t, hidden):
    given = nn.Dense(self.width)(hidden.astype(jnp.float32))
    given += nn.Embed(self.num_steps, self.width)(t)
    y = nn.Dense(self.width)(x) + given
    for _ in range(self.num_blocks):
      y = y + nn.Dense(self.width)(nn.silu(nn.Dense(self.width)(nn.LayerNorm()(y) + given)))
    return nn.Dense(self.token_size)(nn.silu(nn.LayerNorm()(y)))


def diffusion(
  token_size: int, betas: Sequence[float], *, width: int, num_blocks: int = 2
) -> tuple[Head, Callable[..., jax.Array]]:
  """A head that draws the token by a short diffusion; a draw is the whole path [T + 1, D].

  Args:
    token_size: D.
    betas: [T], see `gaussian.denoising_path`; of draft and target the same.
    width: of the network.
    num_blocks: its residual blocks.

  Returns:
    The head, and the network (params, x_t [D], t - 1 [], hidden [W]) -> predicted noise [D], which
    is what training needs.

  Reference: Li et al. 2024, arXiv 2406.11838 (a diffusion head on an autoregressive trunk).
  """
  betas = tuple(betas)
  network = NoiseNetwork(token_size, len(betas), width, num_blocks)

  def predict_noise(params, x, t, hidden):
    return network.apply({"params": params}, x, t, hidden)

  def law(params, hidden):
    return gaussian.denoising_path(
      betas, token_size, lambda x, t: predict_noise(params, x, t, hidden)
    )

  def init(key, hidden):
    return network.init(key, jnp.zeros(token_size), jnp.int32(0), hidden)["params"]

  return Head(init, law, lambda draw: draw[-1]), predict_noise


def transformer(
  config: transformer_lib.TransformerConfig, token_size: int, head: Head
) -> gaussian.ContinuousModel:
  """A transformer over continuous tokens: a linear map, the trunk, a head.

  Args:
    config: its vocabulary is one token, the start.
    token_size: D.
    head: for tokens of that size.

  Raises:
    ValueError: the vocabulary is larger, or the trunk is not causal.
  """
  if config.vocab_size != 1 or not config.causal:
    raise ValueError(
      f"vocab_size={config.vocab_size}, causal={config.causal}: a transformer over continuous "
      "tokens is causal, and has a vocabulary of 1, the start of the sequence."
    )
  language = transformer_lib.transformer(config)

  def init(key, tokens):
    trunk_key, embed_key, head_key = jax.random.split(key, 3)
    kernel = nn.initializers.lecun_normal()(embed_key, (token_size, config.width))
    return {
      "trunk": language.init(trunk_key, jnp.zeros(tokens.shape[:2], jnp.int32)),
      "embed": {"kernel": kernel, "bias": jnp.zeros(config.width)},
      "head": head.init(head_key, jnp.zeros(config.width)),
    }

  def trunk(params, tokens, cache=None):
    kernel, bias = params["embed"]["kernel"], params["embed"]["bias"]
    x = tokens @ kernel + bias[None, None, :]
    start = language.embed(params["trunk"], jnp.zeros(tokens.shape[:2], jnp.int32))
    held = 0 if cache is None else cache.length[:, None]
    slots = held + jnp.arange(tokens.shape[1])[None, :]
    x = jnp.where((slots == 0)[:, :, None], start, x.astype(start.dtype))
    return language.trunk(params["trunk"], x, cache)

  return gaussian.ContinuousModel(
    token_size=token_size,
    init=init,
    init_cache=lambda params, *sizes: language.init_cache(params["trunk"], *sizes),
    trunk=trunk,
    law=lambda params, hidden: head.law(params["head"], hidden),
    value=head.value,
  )
