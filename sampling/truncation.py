"""Truncations: transforms that keep the likeliest tokens, by one rule or another."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from . import logits as logits_lib


def top_k(k: int | jax.Array) -> logits_lib.LogitsTransform:
  """Keeps the tokens at least as likely as the k-th most likely one.

  Ties with the k-th are all kept (as transformers and vLLM do), so more than k may be left. A k of
  V or more keeps everything.

  Args:
    k: at least 1, scalar or [B].
  """
  logits_lib.require("top_k", k, lambda k: k >= 1, "at least 1; to keep everything, leave it out")

  def apply(logits):
    least = jnp.clip(logits_lib.per_row(k), 1, logits.shape[-1])
    return _keep_largest(logits, lambda kept: jnp.sum(kept, axis=-1, keepdims=True) >= least)

  return logits_lib.stateless(apply)


def top_p(p: float | jax.Array) -> logits_lib.LogitsTransform:
  """Nucleus sampling: keeps the fewest most likely tokens whose probability reaches p.

  The token that crosses p is kept, so at least one always is; equally likely tokens stand or fall
  together.

  Args:
    p: in (0, 1], scalar or [B].

  Reference: Holtzman et al. 2019, arXiv 1904.09751, equations 2 and 3.
  """
  logits_lib.require("top_p", p, lambda p: 0 < p <= 1, "in (0, 1]")

  def apply(logits):
    probabilities = jax.nn.softmax(logits, axis=-1)
    least = jnp.maximum(logits_lib.per_row(p).astype(logits.dtype), jnp.finfo(logits.dtype).tiny)

    def reaches(kept):
      return jnp.sum(jnp.where(kept, probabilities, 0), axis=-1, keepdims=True) >= least

    return jnp.where(logits_lib.per_row(p) >= 1, logits, _keep_largest(logits, reaches))

  return logits_lib.stateless(apply)


def _keep_largest(logits: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
  """Keeps {v : logits[v] >= c} for the largest c whose set is `enough`, without a sort.

  Bisection over the bit patterns of float32, which in the right order are the order of the floats:
  32 reads of the logits find c exactly. `enough` takes [B, V] bool to [B, 1] bool, is monotone in
  the set, and holds for the whole vocabulary.
  """
  logits = jnp.where(logits == 0, 0, logits.astype(jnp.float32))  # -0.0 ties with 0.0
  bits = jax.lax.bitcast_convert_type(logits, jnp.uint32)
  sign = jnp.uint32(1 << 31)
  ordered = jnp.where(bits >= sign, ~bits, bits | sign)

  def set_bit(i, threshold):
    candidate = threshold | (sign >> i.astype(jnp.uint32))
    return jnp.where(enough(ordered >= candidate), candidate, threshold)

  threshold = jax.lax.fori_loop(0, 32, set_bit, jnp.zeros((logits.shape[0], 1), jnp.uint32))
  return jnp.where(ordered >= threshold, logits, -jnp.inf)
