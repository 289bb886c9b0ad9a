"""Block diffusion's loss: the likelihood of blocks given those before, each by masked diffusion.

    -log p(x) = sum_b -log p(x_b | x_1 .. x_(b-1)) <= sum_b (the bound of masked diffusion of x_b)

One pass over [x_t, x_0] has all blocks at once: a noisy block sees itself and the clean blocks
before it, a clean block sees itself and those before, which is what `sampling.blocks` caches. Every
block has its own time. Blocks of one token are an autoregressive model, with the exact likelihood;
one block of all tokens is `masked.masked_diffusion`.

Reference: Arriola et al. 2025 (BD3-LM), arXiv 2503.09573, section 3.
"""

import jax
import jax.numpy as jnp

from ..models import base as models
from ..sampling import blocks
from . import likelihood, masked, step


def two_stream_mask(length: int, block_length: int) -> jax.Array:
  """[2L, 2L] bool, what each position of [x_t, x_0] attends to."""
  up_to = blocks.block_mask(length, block_length)
  own = up_to & up_to.T
  return jnp.block([[own, up_to & ~own], [jnp.zeros_like(own), up_to]])


def block_diffusion(
  model: models.LanguageModel,
  masking: masked.Masking,
  block_length: int,
  *,
  mask: int,
  chunk: int = 256,
) -> step.LossFn:
  """The bound of blocks, in nats; a row's weight is its number of learned tokens.

  The batch is that of `masked.masked_diffusion`, without segments. The last block may be short.

  Args:
    model: bidirectional, of V + 1 tokens, the last of them the mask.
    masking: what is masked of each block, of which it is told as of a row.
    block_length: tokens in a block.
    mask: V.
    chunk: positions read out at once.

  Raises:
    ValueError: the block length is not above 0, or rows are packed.

  Metrics: `accuracy`.
  """
  if block_length < 1:
    raise ValueError(f"block_length={block_length}: a block has a token at least.")

  def loss(key, params, batch):
    if "segments" in batch:
      raise ValueError("Blocks do not fit documents packed into rows: pad rows, or cut them full.")
    masking_key, model_key = masked.keys_of(key, batch["tokens"])
    tokens, learned = batch["tokens"], batch["mask"] != 0
    is_masked, weights = _by_block(masking, masking_key, learned, block_length)
    both = jnp.concatenate([jnp.where(is_masked, mask, tokens), tokens], axis=1)
    length = tokens.shape[1]
    seen = two_stream_mask(length, block_length)[None]
    hidden, _ = models.apply(
      model,
      params,
      both,
      positions=jnp.broadcast_to(jnp.tile(jnp.arange(length), 2)[None], both.shape),
      mask=jnp.broadcast_to(seen, (len(tokens), *seen.shape[1:])),
      key=model_key,
    )
    losses, right = likelihood.chunked_cross_entropy(
      masked.readout(model, params, mask), hidden[:, :length], tokens, weights, chunk=chunk
    )
    return (losses, jnp.sum(learned, axis=1).astype(jnp.float32)), {"accuracy": right}

  return loss


def _by_block(masking, key, learned, block_length):
  """What is masked, [B, L] bool, and the weights of tokens, [B, L]; a draw for every block."""
  batch_size, length = learned.shape
  whole = jnp.pad(learned, ((0, 0), (0, -length % block_length)))
  is_masked, _, weight = masking(key, whole.reshape(-1, block_length))
  cut = lambda cells: cells.reshape(batch_size, -1)[:, :length]
  return cut(is_masked), cut(weight[:, None] * is_masked)
