"""Coverage: the chance that one of N samples is right, as a loss; cross-entropy has N = 1.

A loss of log probabilities and, of a model, a `LossFn` of the batches of `likelihood.next_token`:

  coverage.coverage(log_prob, 16)                 # [...], of sequences
  coverage.direct(model, num_samples=16)          # to train on pass@16
"""

import jax
import jax.numpy as jnp

from ..models import base as models
from . import likelihood, step

_RARE = (
  -60.0
)  # p below e^-60 is too small for N p to differ from 1 - (1 - p)^N, and not for float32


def coverage(log_prob: jax.Array, num_samples: float) -> jax.Array:
  """-log(1 - (1 - p)^N), p the chance of the right answer: minus the log of pass@N.

  Its gradient is that of cross-entropy times `confidence_factor`, which stops raising what is
  likely enough to be found among N. N = 1 is cross-entropy. Differentiated by that factor, and not
  through the value, whose chain rule at p = 1 is 0 times infinity.

  Args:
    log_prob: log p [...], of whole answers, at most 0.
    num_samples: N, at least 1.

  Returns:
    [...], float32; finite, as its gradient is, for log p from -1e30 to 0.

  Reference: Chen et al. 2025 (direct coverage optimization), arXiv 2502.07154.
  """

  @jax.custom_jvp
  def loss(log_prob):
    return _loss(log_prob, num_samples)

  loss.defjvps(lambda tangent, _, at: -confidence_factor(at, num_samples) * tangent)
  return loss(log_prob.astype(jnp.float32))


def confidence_factor(log_prob: jax.Array, num_samples: float) -> jax.Array:
  """N p (1 - p)^(N - 1) / (1 - (1 - p)^N): what `coverage` scales the gradient of log p by.

  It falls from 1 at p = 0 to 0 at p = 1 (N > 1), and is small from p of a few times 1 / N.

  Args:
    log_prob: log p [...].
    num_samples: N, at least 1.

  Reference: Chen et al. 2025, arXiv 2502.07154, the overconfidence regularization factor.
  """
  log_prob = log_prob.astype(jnp.float32)
  others = num_samples - 1
  sure = log_prob >= 0
  fail = _log1mexp(jnp.where(sure, -1.0, log_prob))
  missed = jnp.where(sure, jnp.where(others > 0, -jnp.inf, 0.0), others * fail)
  return jnp.exp(missed + (log_prob + jnp.log(num_samples)) + _loss(log_prob, num_samples))


def direct(model: models.LanguageModel, *, num_samples: float, chunk: int = 256) -> step.LossFn:
  """The loss `coverage` of each row's answer, the targets of its mask.

  The batch has `tokens`, `targets` and `mask`, [B, L], one answer a row: of packed rows the product
  of several answers would be one. A row's weight is 1, or 0 without targets. Metrics: `coverage`,
  1 - (1 - p)^N, and `confidence_factor`.

  Args:
    model: the policy.
    num_samples: N.
    chunk: see `likelihood.chunked_cross_entropy`.

  Raises:
    ValueError: (the loss) on a batch with `segments`.
  """

  def loss(key, params, batch):
    if "segments" in batch:
      raise ValueError("coverage is of one answer a row, and the batch is packed: use data.pad")
    hidden, _ = models.apply(model, params, batch["tokens"], key=key)
    weights = batch["mask"].astype(jnp.float32)
    readout = lambda hidden: model.readout(params, hidden)
    nats, _ = likelihood.chunked_cross_entropy(
      readout, hidden, batch["targets"], weights, chunk=chunk
    )
    present = jnp.any(weights > 0, axis=-1).astype(jnp.float32)
    losses = present * coverage(-nats, num_samples)
    metrics = {
      "coverage": present * jnp.exp(-losses),
      "confidence_factor": present * confidence_factor(-nats, num_samples),
    }
    return (losses, present), metrics

  return loss


def _loss(log_prob, num_samples):
  rare, sure = log_prob < _RARE, log_prob >= 0
  fail = _log1mexp(jnp.where(rare | sure, -1.0, log_prob))
  found = _log1mexp(num_samples * fail)
  return jnp.where(sure, 0.0, -jnp.where(rare, log_prob + jnp.log(num_samples), found))


def _log1mexp(x):
  """log(1 - e^x) for x < 0: of the two forms the one that keeps its digits (Maechler 2012)."""
  near = x > -jnp.log(2.0)
  return jnp.where(
    near,
    jnp.log(-jnp.expm1(jnp.where(near, x, -1.0))),
    jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))),
  )
