"""Guidance of masked diffusion: predictors made of predictors.

Without a classifier, two readings of one network are extrapolated; with one, Bayes' rule is applied
to each position's law. Samplers take the result as they take any predictor.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ..models import base as models
from ..models import guided


def classifier_free(
  conditional: models.Predictor, unconditional: models.Predictor, weight: float | jax.Array
) -> models.Predictor:
  """log p = log p_u + w (log p_c - log p_u) - log Z, at every position.

  w = 1 is the conditional law, 0 the unconditional one. LLaDA's scale is w - 1.

  Args:
    conditional: of p_c.
    unconditional: of p_u, such as `without_prompt`.
    weight: w, scalar or [B].

  Reference: Schiff et al. 2024 (D-CFG), arXiv 2412.10193, section 3.1; Nie et al. 2025 (LLaDA),
    arXiv 2502.09992, appendix A.2.
  """

  def predict(tokens, t):
    w = jnp.asarray(weight, jnp.float32).reshape(-1, 1, 1)
    laws = [
      jax.nn.log_softmax(p(tokens, t).astype(jnp.float32)) for p in (conditional, unconditional)
    ]
    return guided.extrapolate(*laws, w)

  return predict


def without_prompt(predict: models.Predictor, prompt: jax.Array, *, mask: int) -> models.Predictor:
  """The predictor of the same tokens with those of `prompt` [B, L] (bool) masked."""
  return lambda tokens, t: predict(jnp.where(prompt, mask, tokens), t)


def classifier(
  predict: models.Predictor,
  log_prob: Callable[[jax.Array, jax.Array], jax.Array],
  weight: float | jax.Array = 1.0,
) -> models.Predictor:
  """p(x_i = v | x) p(y | x with v at i)^w / Z, the classifier called L V times on the batch.

  With the exact classifier of partly masked sequences and w = 1 it is p(x_i | x, y): samplers that
  are exact for p(x) then are for p(x | y).

  Args:
    predict: (tokens, t) -> logits.
    log_prob: (tokens [N, L], partly masked, t [N] or []) -> log p(y | tokens) [N].
    weight: w, scalar or [B].

  Reference: Schiff et al. 2024 (D-CBG), arXiv 2412.10193, section 3.2.
  """

  def guide(tokens, t):
    logits = jax.nn.log_softmax(predict(tokens, t).astype(jnp.float32))
    batch_size, length, vocab_size = logits.shape
    times = jnp.broadcast_to(t, batch_size)

    def at(place):  # [B, V]
      tried = jnp.repeat(tokens[:, None], vocab_size, axis=1)
      tried = tried.at[:, :, place].set(jnp.arange(vocab_size, dtype=tokens.dtype)[None])
      rows = log_prob(tried.reshape(-1, length), jnp.repeat(times, vocab_size))
      return rows.reshape(batch_size, vocab_size)

    evidence = jnp.moveaxis(jax.lax.map(at, jnp.arange(length)), 0, 1)
    return _tilted(logits, evidence, weight)

  return guide


def classifier_by_gradient(
  predict: models.Predictor,
  log_prob: Callable[[jax.Array, jax.Array], jax.Array],
  weight: float | jax.Array = 1.0,
) -> models.Predictor:
  """As `classifier`, to first order in the change of a token, by one gradient.

  log p(y | x with v at i) - log p(y | x) is taken to be (e_v - x_i) . grad_i log p(y | x), which is
  exact for classifiers whose logarithm is linear in each token.

  Args:
    predict: (tokens, t) -> logits.
    log_prob: (one-hot tokens [N, L, V + 1], the mask last, t [N] or []) -> log p(y | tokens) [N].
    weight: w, scalar or [B].

  Reference: Schiff et al. 2024, arXiv 2412.10193, section 3.2; Nisonoff et al. 2024, arXiv
    2406.01572.
  """

  def guide(tokens, t):
    logits = jax.nn.log_softmax(predict(tokens, t).astype(jnp.float32))
    own = jax.nn.one_hot(tokens, logits.shape[-1] + 1)
    gradient = jax.grad(lambda x: jnp.sum(log_prob(x, t)))(own)
    here = jnp.sum(own * gradient, axis=-1, keepdims=True)
    return _tilted(logits, gradient[..., :-1] - here, weight)

  return guide


def _tilted(logits, evidence, weight):
  """logits + w evidence; what is impossible stays so, whatever the classifier says of it.

  Where it rules out every possible token of a position, it says nothing there.
  """
  w = jnp.asarray(weight, jnp.float32).reshape(-1, 1, 1)
  tilt = jnp.where(w == 0, 0, w * jnp.where(w == 0, 0, evidence))  # 0 inf is NaN
  tilted = jnp.where(logits > -jnp.inf, logits + tilt, -jnp.inf)
  some = jnp.any(tilted > -jnp.inf, axis=-1, keepdims=True)
  return jnp.where(some, tilted, logits)
