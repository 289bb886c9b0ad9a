"""A head that predicts, of a drafted token, the probability that the target accepts it.

Shapes: D draft-model width, W width of the head.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from . import base, layers


class Features(NamedTuple):
  """What a draft is judged by: all of it is at hand when the draft is drawn."""

  hidden: jax.Array  # [..., D], of the draft model, that the draft is drawn from
  embedding: jax.Array  # [..., D], of the draft
  log_prob: jax.Array  # [...], of the draft under its law
  entropy: jax.Array  # [...], of that law, in nats


class Head(NamedTuple):
  """A binary classifier of drafts.

  Attributes:
    init: (key, D) -> params.
    logit: (params, Features [...]) -> [...], float32; the sigmoid is the predicted acceptance.
  """

  init: Callable[[jax.Array, int], base.Params]
  logit: Callable[[base.Params, Features], jax.Array]


def features(
  hidden: jax.Array, token: jax.Array, logits: jax.Array, embed: Callable[[jax.Array], jax.Array]
) -> Features:
  """The features of a draft.

  Args:
    hidden: [..., D].
    token: [...], the draft.
    logits: [..., V] of the law it was drawn from, -inf where filtered.
    embed: tokens [...] -> [..., D], the draft model's.
  """
  log_q = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  possible = log_q > -jnp.inf
  spread = jnp.where(possible, jnp.exp(log_q) * jnp.where(possible, log_q, 0), 0)
  log_prob = jnp.take_along_axis(log_q, token[..., None], axis=-1)[..., 0]
  return Features(hidden, embed(token), log_prob, -jnp.sum(spread, axis=-1))


class ResidualNetwork(nn.Module):
  """A linear map of the normalised features, then x + silu(linear(x)) blocks, then one number."""

  width: int
  num_blocks: int

  @nn.compact
  def __call__(self, of):
    wide = [layers.RMSNorm(name=name)(getattr(of, name)) for name in ("hidden", "embedding")]
    x = jnp.concatenate([*wide, of.log_prob[..., None], of.entropy[..., None]], axis=-1)
    x = nn.Dense(self.width, name="input")(x.astype(jnp.float32))
    for i in range(self.num_blocks):
      x = x + nn.silu(nn.Dense(self.width, name=f"block_{i}")(x))
    return nn.Dense(1, name="output")(x)[..., 0]


def acceptance_head(*, width: int, num_blocks: int = 3) -> Head:
  """The acceptance prediction head: residual blocks on what the draft model knows.

  The paper reads the draft with the draft model first, and judges it by its own hidden state. That
  costs a call of the draft model even for the draft after which a row stops. The hidden state
  before and the draft itself carry the same information, since the one after is a function of them
  (and of the cache); so this head reads those, and the two numbers that say most about acceptance
  at once. The published code gives its blocks one weight between them (a list times a number);
  here each has its own.

  Args:
    width: W, of the blocks.
    num_blocks: the paper's is 3.

  Reference: Huang et al. 2024 (SpecDec++), arXiv 2405.19715.
  """
  network = ResidualNetwork(width, num_blocks)

  def init(key, size):
    wide, number = jnp.zeros((1, size)), jnp.zeros(1)
    return network.init(key, Features(wide, wide, number, number))["params"]

  return Head(init, lambda params, of: network.apply({"params": params}, of))
