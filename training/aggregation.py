"""How the losses of tokens become a loss and a weight of each row, for `step.LossFn`.

The step divides summed loss by summed weight, over microbatches and devices. So what a method
divides by is a sum of weights, and is global by construction, but for `local_token_mean`:

    loss, weight = aggregation.token_mean(losses, mask)  # [B, T] -> [B], [B]

                         one row                                 divided by
    token_mean           its sum                                 tokens (DAPO)
    sequence_mean        its mean over tokens                    rows (GRPO, GSPO, SAPO)
    sequence_sum         its sum                                 rows (REINFORCE, LUSPO)
    constant_length      its sum / a constant                    rows (Dr. GRPO)
    prompt_mean          its sum / tokens of its prompt          prompts
    local_token_mean     its sum / mean tokens of microbatch     rows (TRL's "bnpo")

A row without tokens has loss 0 and weight 0, whatever the method: rows that only fill up a batch,
or were struck out, do not dilute the others. verl and OpenRLHF do so too; TRL divides by all rows.
Losses at masked tokens (mask 0) are not read, and may be anything.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# (loss [B, T], mask [B, T]) -> (loss [B], weight [B])
Aggregation = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def token_mean(loss: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The mean over all tokens of the batch: a row weighs as much as it is long.

  Reference: Yu et al. 2025 (DAPO), arXiv 2503.14476.
  """
  return _sums(loss, mask)


def sequence_mean(loss: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The mean over rows of the mean over tokens: a token weighs less the longer its row.

  Reference: Shao et al. 2024 (GRPO), arXiv 2402.03300.
  """
  total, count = _sums(loss, mask)
  return total / jnp.maximum(count, 1), _present(count)


def sequence_sum(loss: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The mean over rows of the sum over tokens: the policy gradient itself."""
  total, count = _sums(loss, mask)
  return total, _present(count)


def constant_length(
  loss: jax.Array, mask: jax.Array, *, max_length: int
) -> tuple[jax.Array, jax.Array]:
  """`sequence_sum` / `max_length`: no bias by length, at the scale of a mean.

  Reference: Liu et al. 2025 (Dr. GRPO), arXiv 2503.20783.
  """
  total, count = _sums(loss, mask)
  return total / max_length, _present(count)


def prompt_mean(
  loss: jax.Array, mask: jax.Array, *, prompt_tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The mean over prompts of the mean over all tokens of a prompt's samples.

  A row weighs the share of its prompt's tokens that it has, so that a prompt weighs 1 in total, in
  one microbatch or spread over several.

  Args:
    loss: [B, T].
    mask: [B, T].
    prompt_tokens: [B], `tokens_of_prompt` of the whole batch.

  Reference: compared by Khatri et al. 2025 (ScaleRL), arXiv 2510.13786.
  """
  total, count = _sums(loss, mask)
  prompt_tokens = jnp.maximum(prompt_tokens.astype(jnp.float32), 1)
  return total / prompt_tokens, count / prompt_tokens


def tokens_of_prompt(mask: jax.Array, prompt: jax.Array) -> jax.Array:
  """How many tokens the samples of each row's prompt have in total, [B], by ids `prompt` [B]."""
  same = prompt[:, None] == prompt[None, :]
  return jnp.sum(jnp.where(same, jnp.sum(mask != 0, axis=-1)[None, :], 0), axis=-1)


def local_token_mean(loss: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The mean over microbatches of the mean over a microbatch's tokens.

  The [B] rows it is given are the microbatch, whose tokens divide their losses, so the gradient
  depends on how rows are spread over microbatches. It is here because others do it; prefer
  `token_mean`. A microbatch weighs its number of rows that have tokens.

  Reference: the loss that TRL calls "bnpo".
  """
  total, count = _sums(loss, mask)
  present = _present(count)
  return total * jnp.sum(present) / jnp.maximum(jnp.sum(count), 1), present


def _sums(loss, mask):
  kept = mask != 0
  total = jnp.sum(jnp.where(kept, loss.astype(jnp.float32), 0), axis=-1)
  return total, jnp.sum(kept, axis=-1).astype(jnp.float32)


def _present(count):
  return (count > 0).astype(jnp.float32)
