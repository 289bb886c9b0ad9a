"""Models whose laws have closed forms: what samplers are proved on."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import base


class TokenCache(NamedTuple):
  """The tokens themselves."""

  length: jax.Array  # [B] int32
  tokens: jax.Array  # [B, S] int32

  def moved(self, source: jax.Array, target: jax.Array) -> "TokenCache":
    """See `base.Cache`."""
    rows = jnp.arange(source.shape[0])[:, None]
    tokens = self.tokens.at[rows, target].set(self.tokens[rows, source], mode="drop")
    return self._replace(tokens=tokens)


def from_conditionals(
  init: Callable[[jax.Array], base.Params],
  vocab_size: int,
  next_logits: Callable[[base.Params, jax.Array, jax.Array], jax.Array],
) -> base.LanguageModel:
  """The language model with log p(x_t | x_<t) = next_logits(params, tokens [S], t) up to Z.

  `next_logits` sees one row; entries of `tokens` at t and beyond are not to be read. Hidden states
  are the logits themselves, and embeddings are one-hot. Given a mask, a token's prefix is what it
  may attend to, in the order of slots; its length is the position, whatever `positions` say.
  """

  def init_cache(params, batch_size, max_length):
    del params
    return TokenCache(
      jnp.zeros(batch_size, jnp.int32), jnp.zeros((batch_size, max_length), jnp.int32)
    )

  def trunk(params, x, cache=None, *, positions=None, mask=None, key=None):
    del positions, key
    new = jnp.argmax(x, axis=-1).astype(jnp.int32)
    batch_size, length = new.shape
    held = init_cache(params, batch_size, length) if cache is None else cache
    slots = held.length[:, None] + jnp.arange(length)[None, :]
    rows = jnp.arange(batch_size)[:, None]
    tokens = held.tokens.at[rows, slots].set(new, mode="drop")
    if mask is None:
      per_position = jax.vmap(next_logits, in_axes=(None, None, 0))
      hidden = jax.vmap(per_position, in_axes=(None, 0, 0))(params, tokens, slots + 1)
    else:
      mask &= jnp.arange(tokens.shape[1])[None, None, :] <= slots[:, :, None]
      per_position = jax.vmap(_seen_logits(next_logits), in_axes=(None, None, 0))
      hidden = jax.vmap(per_position, in_axes=(None, 0, 0))(params, tokens, mask)
    return hidden, None if cache is None else TokenCache(held.length + length, tokens)

  return base.LanguageModel(
    init=lambda key, tokens: init(key),
    init_cache=init_cache,
    embed=lambda params, tokens: jax.nn.one_hot(tokens, vocab_size),
    trunk=trunk,
    readout=lambda params, hidden: hidden.astype(jnp.float32),
  )


def _seen_logits(next_logits):
  def of_seen(params, tokens, seen):
    first = jnp.argsort(~seen, stable=True)
    return next_logits(params, tokens[first], jnp.sum(seen))

  return of_seen


def table(vocab_size: int, order: int) -> base.LanguageModel:
  """p(x_t | x_<t) = softmax(params[x_(t-order), .., x_(t-1)]); tokens before the first count as 0.

  Params are logits [V] * order + [V]. With `order` at least the sequence length, it is any law.
  """

  def next_logits(params, tokens, t):
    places = t - order + jnp.arange(order)
    recent = jnp.where(places >= 0, tokens[jnp.maximum(places, 0)], 0)
    return params[tuple(recent)]

  return from_conditionals(
    lambda key: jax.random.normal(key, (vocab_size,) * (order + 1)), vocab_size, next_logits
  )


def markov(vocab_size: int) -> base.LanguageModel:
  """A Markov chain; params are log transition probabilities [V, V], from row to column."""

  def init(key):
    return jax.nn.log_softmax(jax.random.normal(key, (vocab_size, vocab_size)))

  return from_conditionals(init, vocab_size, lambda params, tokens, t: params[tokens[t - 1]])


def markov_law(transition: np.ndarray, first: int, num_tokens: int) -> np.ndarray:
  """p(x_1 .. x_n | x_0 = first) = prod_t transition[x_(t-1), x_t], [V] * n, float64."""
  law = np.asarray(transition, np.float64)[first]
  for _ in range(num_tokens - 1):
    law = law[..., None] * np.asarray(transition, np.float64)
  return law


def table_law(conditional: np.ndarray, prompt: tuple[int, ...], num_tokens: int) -> np.ndarray:
  """p(x_1 .. x_n | prompt) of a table model, by going through every continuation.

  Args:
    conditional: probabilities [V] * order + [V].
    prompt: the tokens before.
    num_tokens: n.

  Returns:
    [V] * n, float64.
  """
  order, vocab_size = conditional.ndim - 1, conditional.shape[-1]
  law = np.ones((vocab_size,) * num_tokens)
  for tokens in itertools.product(range(vocab_size), repeat=num_tokens):
    sequence = (0,) * order + tuple(prompt) + tokens
    for t in range(len(sequence) - num_tokens, len(sequence)):
      law[tokens] *= conditional[sequence[t - order : t]][sequence[t]]
  return law


class GaussianMixture(NamedTuple):
  """sum_k weights[k] N(means[k], variances[k] I) over R^D."""

  weights: jax.Array  # [K], sums to 1
  means: jax.Array  # [K, D]
  variances: jax.Array  # [K]


def mixture_denoiser(
  mixture: GaussianMixture,
  alpha: Callable[[jax.Array], jax.Array],
  sigma: Callable[[jax.Array], jax.Array],
) -> base.Denoiser:
  """E[x_0 | x_t] for x_0 from the mixture and x_t = alpha(t) x_0 + sigma(t) z, z ~ N(0, I).

  Given component k, x_t ~ N(alpha m_k, (alpha^2 v_k + sigma^2) I), so the posterior weights are
  those of a mixture and the conditional mean is linear in x_t:

    E[x_0 | x_t, k] = m_k + alpha v_k / (alpha^2 v_k + sigma^2) (x_t - alpha m_k).
  """
  weights, means, variances = mixture

  def denoise(x, t):  # [B, D], [] -> [B, D]
    a, s = alpha(t), sigma(t)
    total = jnp.square(a) * variances + jnp.square(s)  # [K]
    residual = x[:, None, :] - (a * means)[None]  # [B, K, D]
    log_weight = (jnp.log(weights) - 0.5 * means.shape[1] * jnp.log(total))[None, :]
    posterior = jax.nn.softmax(
      log_weight - 0.5 * jnp.sum(jnp.square(residual), -1) / total[None, :], axis=-1
    )
    mean = means[None] + (a * variances / total)[None, :, None] * residual
    return jnp.sum(posterior[:, :, None] * mean, axis=1)

  return denoise


def joint_predictor(joint: jax.Array) -> base.Predictor:
  """The exact predictor of a law over sequences, p(x_i | the unmasked tokens), for every i.

  Args:
    joint: probabilities [V] * L, V and L tiny; token V is the mask.

  Returns:
    (tokens [B, L], t) -> log-probabilities [B, L, V], whatever t: that the conditionals do not
    depend on time is a property of masking. At an unmasked position, its own token has them all.
    Tokens of probability zero give NaN.
  """
  length, vocab_size = joint.ndim, joint.shape[0]
  outcomes = jnp.array(list(itertools.product(range(vocab_size), repeat=length)))  # [V^L, L]
  log_joint = jnp.log(joint.reshape(-1))
  own = jax.nn.one_hot(outcomes, vocab_size)  # [V^L, L, V]

  def predict(tokens, t):
    del t
    agrees = (tokens[:, None] == vocab_size) | (tokens[:, None] == outcomes[None])
    log_weight = jnp.where(agrees.all(-1), log_joint[None], -jnp.inf)  # [B, V^L]
    posterior = jax.nn.softmax(log_weight, axis=-1)
    return jnp.log(jnp.einsum("bo,olv->blv", posterior, own))

  return predict
