"""Masked (absorbing) diffusion's bound of the likelihood, as losses and as a metric.

    -log p(x) <= int_0^1 rate(t) E [ sum_(i masked) -log p(x_i | x_t) ] dt

where x_t has each token masked, apart from the others, with probability 1 - alpha(t) and
rate = -alpha' / (1 - alpha). The integral depends on the schedule only through a predictor that
looks at the time. Some tokens may be kept, such as a prompt: the bound is then of the rest given
these. Its estimates are a weight times the cross-entropy of what is masked, and differ in how both
are drawn (`Masking`): all have the same expectation, but for `by_step`, which is a looser bound.

Of what is masked, the weighted share has the expectation 1 for every token, so `accuracy` is that
of a token when its turn comes in a random order.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..models import base as models
from ..models import mask_schedules
from . import data, likelihood, step, weightings


class Masked(NamedTuple):
  """What is masked of each row, and how much its cross-entropy counts."""

  masked: jax.Array  # [B, L] bool
  t: jax.Array  # [B], the time
  weight: jax.Array  # [B]


# (key, learned [B, L] bool, the tokens that may be masked) -> Masked
Masking = Callable[[jax.Array, jax.Array], Masked]


def by_time(
  schedule: mask_schedules.MaskSchedule,
  *,
  quantiles: weightings.Quantiles = weightings.low_discrepancy,
) -> Masking:
  """A time for each row, t ~ U(0, 1); each token is masked with probability 1 - alpha(t).

  The weight is rate(t).

  Reference: Sahoo et al. 2024 (MDLM), arXiv 2406.07524, section 3; Shi et al. 2024 (MD4), arXiv
    2406.04329, eq. 5.
  """

  def draw(key, learned):
    time_key, mask_key = jax.random.split(key)
    t = quantiles(time_key, learned.shape[0])
    masked = _coins(mask_key, 1 - schedule.alpha(t), learned)
    return Masked(masked, t, jnp.maximum(schedule.rate(t), 0))

  return draw


def by_count(
  schedule: mask_schedules.MaskSchedule | None = None,
  *,
  quantiles: weightings.Quantiles = weightings.low_discrepancy,
) -> Masking:
  """A number for each row, n ~ U{1 .. N} of its N learned tokens; any n of them are masked.

  The weight is N / n: given n, the time has the density rate(t) P(n masked at t), whose integral is
  1 / n whatever the schedule. Weights are N at most, and not 1 / t as by time, so the estimate
  varies less. The time is drawn given n, which only a predictor that looks at it can tell:
  1 - alpha is then the n-th smallest of N uniform numbers.

  Args:
    schedule: of the time; linear if None.
    quantiles: how numbers are drawn.

  Reference: Zheng et al. 2024, arXiv 2409.02908, section 3; Ou et al. 2024, arXiv 2406.03736;
    Hoogeboom et al. 2021, arXiv 2110.02037, section 3.
  """
  schedule = mask_schedules.linear() if schedule is None else schedule

  def draw(key, learned):
    count_key, order_key = jax.random.split(key)
    most = jnp.sum(learned, axis=1)
    count = 1 + jnp.floor(quantiles(count_key, learned.shape[0]) * most).astype(jnp.int32)
    count = jnp.minimum(count, jnp.maximum(most, 1))  # a product may round up to N
    noise = jnp.where(learned, jax.random.uniform(order_key, learned.shape), jnp.inf)
    rank = jnp.argsort(jnp.argsort(noise, axis=1), axis=1)
    masked = (rank < count[:, None]) & learned
    last = jnp.max(jnp.where(masked, noise, 0), axis=1)
    return Masked(masked, schedule.time(1 - last), most / count)

  return draw


def by_step(
  schedule: mask_schedules.MaskSchedule,
  times: jax.Array,
  *,
  quantiles: weightings.Quantiles = weightings.low_discrepancy,
) -> Masking:
  """One of T steps for each row, from t down to s; the weight is T `unmask_prob`(t, s).

  The bound of the chain of T steps, which unmasks tokens of one step apart from one another; it
  falls to the continuous one as the steps get short.

  Args:
    schedule: alpha.
    times: [T + 1], falling, the first 1 and the last 0.
    quantiles: how steps are drawn.

  Reference: Austin et al. 2021 (D3PM), arXiv 2107.03006, eq. 1, with the absorbing state.
  """
  times = jnp.asarray(times, jnp.float32)
  num_steps = times.shape[0] - 1

  def draw(key, learned):
    step_key, mask_key = jax.random.split(key)
    at = jnp.floor(quantiles(step_key, learned.shape[0]) * num_steps).astype(jnp.int32)
    at = jnp.minimum(at, num_steps - 1)
    t, s = times[at], times[at + 1]
    masked = _coins(mask_key, 1 - schedule.alpha(t), learned)
    return Masked(masked, t, num_steps * mask_schedules.unmask_prob(schedule, t, s))

  return draw


def _coins(key, prob, learned):
  return jax.random.bernoulli(key, prob[:, None], learned.shape, mode="high") & learned


def masked_diffusion(
  model: models.LanguageModel,
  masking: Masking,
  *,
  mask: int,
  chunk: int = 256,
  unconditional: float = 0.0,
) -> step.LossFn:
  """The bound of a bidirectional model of V + 1 tokens, in nats; a row's weight is its N.

  The batch has `tokens` [B, L] and `mask` [B, L], not 0 where a token is learned; what is not is
  kept and seen, and has no loss. With `segments` and `positions` [B, L], as packed rows have, a
  token attends to its own document only. Logits are made `chunk` positions at a time.

  Args:
    model: its last token is the mask, which is never predicted.
    masking: what is masked, and the weight.
    mask: V.
    chunk: positions read out at once.
    unconditional: share of rows in which what is kept is masked too, without loss: there the model
      learns the law that `masked_guidance.without_prompt` asks for.

  Raises:
    ValueError: the model has not V + 1 tokens.

  Metrics: `accuracy`.
  """

  def loss(key, params, batch):
    masking_key, model_key = keys_of(key, batch["tokens"])
    tokens, learned = batch["tokens"], batch["mask"] != 0
    dropped = False
    if unconditional:
      masking_key, row_key = jax.random.split(masking_key)
      rows = jax.random.bernoulli(row_key, unconditional, tokens.shape[:1])
      dropped = rows[:, None] & ~learned
    masked, _, weight = masking(masking_key, learned)
    noisy = {**batch, "tokens": jnp.where(masked | dropped, mask, tokens)}
    hidden = likelihood.hidden_states(model, params, noisy, model_key)
    losses, right = likelihood.chunked_cross_entropy(
      readout(model, params, mask), hidden, tokens, weight[:, None] * masked, chunk=chunk
    )
    return (losses, jnp.sum(learned, axis=1).astype(jnp.float32)), {"accuracy": right}

  return loss


def readout(
  model: models.LanguageModel, params: models.Params, mask: int
) -> Callable[[jax.Array], jax.Array]:
  """hidden [..., D] -> logits [..., V], of all tokens but the mask.

  Raises (when called): ValueError, the mask is not the last of the model's tokens.
  """

  def read(hidden):
    logits = model.readout(params, hidden)
    if logits.shape[-1] != mask + 1:
      raise ValueError(f"mask={mask} has to be the last of {logits.shape[-1]} tokens of the model.")
    return logits[..., :-1]

  return read


def keys_of(key: jax.Array | None, tokens: jax.Array) -> tuple[jax.Array, jax.Array | None]:
  """Keys of what is masked and of dropout; without a key, that of the tokens, and no dropout.

  So a held-out loss is one of the same draws at every evaluation, and of others in every batch.
  """
  if key is not None:
    return tuple(jax.random.split(key))
  places = jnp.arange(tokens.size, dtype=jnp.uint32).reshape(tokens.shape)
  digest = jnp.sum((tokens.astype(jnp.uint32) + 1) * (2 * places + 1) * jnp.uint32(2654435761))
  return jax.random.fold_in(jax.random.key(0), digest), None


def bound(
  predict: models.Predictor,
  schedule: mask_schedules.MaskSchedule,
  key: jax.Array | None,
  tokens: jax.Array,
  learned: jax.Array,
  *,
  mask: int,
  num_times: int,
) -> jax.Array:
  """The bound of -log p(learned tokens | the others) of each row, in nats, [B]: an estimate.

  The mean of `num_times` estimates `by_count`, their numbers spread evenly over 1 .. N: with N of
  them, each number comes once. Unbiased.

  Args:
    predict: (tokens [B, L], t [B]) -> logits [B, L, V].
    schedule: of the times, if the predictor looks at them.
    key: of the draws; None has the same ones every time.
    tokens: [B, L].
    learned: [B, L], 0 where a token is kept.
    mask: V.
    num_times: calls of the predictor.
  """
  learned = learned != 0
  key = jax.random.key(0) if key is None else key

  def one(place):
    index, key = place
    even = lambda key, num: (index + jax.random.uniform(key, (num,))) / num_times
    masked, t, weight = by_count(schedule, quantiles=even)(key, learned)
    logits = predict(jnp.where(masked, mask, tokens), t)
    losses = likelihood.cross_entropy(logits, jnp.where(masked, tokens, 0))
    return weight * jnp.sum(jnp.where(masked, losses, 0), axis=1)

  places = (jnp.arange(num_times), jax.random.split(key, num_times))
  return jnp.mean(jax.lax.map(one, places), axis=0)


def pad(length: int, pad_id: int, *, learned: bool) -> data.Rows:
  """Rows of one example each: `tokens` [L] with its own first, and `mask`, what is learned of them.

  Args:
    length: L.
    pad_id: fills a row up on the right.
    learned: whether that is learned too, so that a model which fills rows in decides on the length
      of an answer; else it is in sight, and so is the length.

  Raises (when read): ValueError naming an example that is longer than a row.
  """

  def row(example):
    tokens, mask = example["tokens"], example["mask"]
    if len(tokens) > length:
      raise ValueError(
        f"example {example['index']} needs a row of {len(tokens)} tokens but rows have {length}: "
        "raise the row length or filter the source"
      )
    after = (0, length - len(tokens))
    return {
      "tokens": np.pad(tokens, after, constant_values=pad_id),
      "mask": np.pad(mask.astype(np.float32), after, constant_values=float(learned)),
    }

  return lambda dataset: dataset.map(row)


def unshifted(rows: data.Rows) -> data.Rows:
  """Rows whose tokens are the targets of those given: each once, without what begins a text.

  Of `data.concatenate` and `data.first_fit`, whose `segments` and `positions` stay.
  """

  def row(made):
    kept = {name: made[name] for name in ("mask", "segments", "positions") if name in made}
    return {"tokens": made["targets"], **kept}

  return lambda dataset: rows(dataset).map(row)
