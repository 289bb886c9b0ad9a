"""Speculative decoding of continuous tokens: exact where laws have densities.

A draft x ~ q is accepted with probability min(1, p(x) / q(x)). If it is refused, the token is drawn
from the residual max(p - q, 0) / TV, TV = int max(p - q, 0), by rejection: y ~ p is taken with
probability max(0, 1 - q(y) / p(y)), until one is. What is taken has density proportional to
max(p - q, 0), so the token has density

  q min(1, p / q) + TV max(p - q, 0) / TV = min(p, q) + max(p - q, 0) = p.

A refusal has probability TV and a proposal is taken with probability TV, so a refusal costs 1 / TV
proposals on average, and a position one at most, whatever the laws. The mean hides the tail: a rare
refusal is a long one, and a batch waits for its longest row.

Nothing here knows what a draw is. Of a diffusion model it is the whole path to x_0: the coupling is
of the laws of paths, and the token x_0 then has the target's law because the path has. Paths differ
more than their ends, so fewer drafts are accepted than the laws of x_0 would allow.

Reference: Wang et al. 2024, arXiv 2411.11925. Their code accepts by densities at an inner
temperature of 42, (p / q)^(1 / 42^2), judges positions independently of those before them, and puts
out zeros after 100 refused proposals: three departures from the target's law, none of them here.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..models import base as models
from ..models import gaussian
from . import base

_MAX_PROPOSALS = 100_000


class Residual(NamedTuple):
  """A draw of max(p - q, 0) / TV."""

  draw: gaussian.Draw
  num_proposals: jax.Array  # [] int32, draws of p that it took


class Coupled(NamedTuple):
  """A draw of law p."""

  draw: gaussian.Draw
  accepted: jax.Array  # [] bool, whether it is the draft
  accept_prob: jax.Array  # []
  num_proposals: jax.Array  # [] int32, draws of p; 0 if the draft is accepted


def acceptance(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
  """min(1, p / q) of log densities; no rule keeps the law of p and accepts more than 1 - TV."""
  return jnp.exp(jnp.minimum(log_p - log_q, 0))


def residual(
  key: jax.Array,
  p: gaussian.Density,
  log_q: Callable[[gaussian.Draw], jax.Array],
  wanted: jax.Array | bool = True,
  *,
  max_proposals: int = _MAX_PROPOSALS,
) -> Residual:
  """Draws from max(p - q, 0), normalised, by proposals of p; where q = 0, the first is taken.

  The loop ends after n = `max_proposals` with the last proposal, lest densities that differ by
  rounding alone keep it for ever. A position comes to that with probability TV (1 - TV)^n, less
  than 1 / (e n) whatever the laws: 4e-6 for the default.

  Args:
    key: one key.
    p: the target's law.
    log_q: the draft's log density, -inf where it has none.
    wanted: [] bool; otherwise no proposal is made and the draw means nothing.
    max_proposals: n.
  """

  def propose(key):
    draw_key, coin_key = jax.random.split(key)
    draw = p.sample(draw_key)
    leave = acceptance(log_q(draw), p.log_prob(draw))  # min(1, q / p); of NaN, no coin comes up
    return draw, ~jax.random.bernoulli(coin_key, leave, mode="high")

  def unfinished(carry):
    count, taken, _ = carry
    return ~taken & (count < max_proposals)

  def body(carry):
    count, _, _ = carry
    draw, taken = propose(jax.random.fold_in(key, count))
    return count + 1, taken, draw

  shape = jax.eval_shape(p.sample, key)
  empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shape)
  start = jnp.int32(0), ~jnp.asarray(wanted), empty
  count, _, draw = jax.lax.while_loop(unfinished, body, start)
  return Residual(draw, count)


def couple(
  key: jax.Array, p: gaussian.Density, q: gaussian.Density, draft: gaussian.Draw
) -> Coupled:
  """Turns a draft of law q into a draw of law p, which is the draft with probability 1 - TV.

  Of one position: vmap it for more.
  """
  coin_key, residual_key = jax.random.split(key)
  accept_prob = acceptance(p.log_prob(draft), q.log_prob(draft))
  accepted = jax.random.bernoulli(coin_key, accept_prob, mode="high")
  other, num_proposals = residual(residual_key, p, q.log_prob, ~accepted)
  draw = jax.tree.map(lambda draft, other: jnp.where(accepted, draft, other), draft, other)
  return Coupled(draw, accepted, accept_prob, num_proposals)


class ContinuousState(NamedTuple):
  """Where decoding stands. The cache holds every token of a row but the last."""

  step: jax.Array  # [B] int32, calls of the target
  tokens: jax.Array  # [B, N + 1, D]: the start (zeros), the tokens drawn, then zeros
  length: jax.Array  # [B] int32, the start and drawn tokens
  cache: models.Cache
  draft: models.Cache | tuple[()]  # the draft model's, rewound when it is read

  @property
  def done(self) -> jax.Array:
    """[B] bool; such a row is frozen."""
    return self.length >= self.tokens.shape[1]


class ContinuousInfo(NamedTuple):
  """What a step did: K drafts judged, up to K + 1 tokens written. A frozen row's entries are 0."""

  token: jax.Array  # [B, K + 1, D], then zeros
  count: jax.Array  # [B] int32, tokens written
  num_accepted: jax.Array  # [B] int32, drafts that stood and were written
  accept_prob: jax.Array  # [B, K], of each draft, if those before it stand
  num_proposals: jax.Array  # [B] int32, draws of the target for the last token written


class Proposal(NamedTuple):
  """K tokens of the draft model."""

  draws: gaussian.Draw  # leaves [B, K, ...]
  tokens: jax.Array  # [B, K, D], their values
  hidden: jax.Array  # [B, K, W], of whose law each draw is
  cache: models.Cache


def _begin(model, params, num_tokens, batch_size):
  """The state's tokens, lengths and cache before the first token."""
  if num_tokens < 1:
    raise ValueError(f"num_tokens={num_tokens}: a sequence has at least 1.")
  tokens = jnp.zeros((batch_size, num_tokens + 1, model.token_size))
  length = jnp.ones(batch_size, jnp.int32)
  return tokens, length, model.init_cache(params, batch_size, num_tokens)


def _draw(model, params, keys, hidden):
  """One draw of each row's law, leaves [B, ...], and its value [B, D]."""
  draws = jax.vmap(lambda key, hidden: model.law(params, hidden).sample(key))(keys, hidden)
  return draws, jax.vmap(model.value)(draws)


def autoregressive(
  model: gaussian.ContinuousModel, params: models.Params, *, num_tokens: int
) -> base.SamplingAlgorithm:
  """Draws x_t ~ p(. | x_<t), one token a step. The inputs of `init` are not read: give None.

  Args:
    model: the model.
    params: its parameters, a transformer's unstacked.
    num_tokens: N, of every sequence.

  Raises:
    ValueError: num_tokens is less than 1.
  """

  def init(keys, inputs):
    del inputs
    tokens, length, cache = _begin(model, params, num_tokens, keys.shape[0])
    return ContinuousState(jnp.zeros_like(length), tokens, length, cache, ())

  def step(keys, state):
    active = ~state.done
    last = jnp.take_along_axis(state.tokens, state.length[:, None, None] - 1, axis=1)
    hidden, cache = model.trunk(params, last, state.cache)
    _, token = _draw(model, params, keys, hidden[:, 0])
    count = active.astype(jnp.int32)
    state, token = _write(state, token[:, None], count, cache, ())
    none = jnp.zeros_like(count)
    return state, ContinuousInfo(token, count, none, jnp.zeros((count.size, 0)), count)

  return base.SamplingAlgorithm(init, step)


def propose(
  model: gaussian.ContinuousModel,
  params: models.Params,
  keys: base.Keys,
  state: ContinuousState,
  num_drafts: int,
) -> Proposal:
  """Draws K tokens x_t ~ q(. | x_<t) that continue the state's, in K calls of the draft model.

  The first call reads the last two tokens: after a step that accepted every draft, the cache lacks
  the one before the last.
  """
  first = jnp.maximum(state.length - 2, 0)
  pair = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, 2))(state.tokens, first)
  hidden, cache = model.trunk(params, pair, state.draft._replace(length=first))
  last = (state.length - 1 - first)[:, None, None]
  hidden = jnp.take_along_axis(hidden, last, axis=1)[:, 0]
  cache = cache._replace(length=state.length)

  def draw(i, hidden):
    return _draw(model, params, base.row_keys_at(keys, jnp.full(keys.shape, i)), hidden)

  def body(carry, i):
    hidden, cache = carry
    drawn, token = draw(i, hidden)
    following, cache = model.trunk(params, token[:, None], cache)
    return (following[:, 0], cache), (drawn, token, hidden)

  (hidden, cache), many = jax.lax.scan(body, (hidden, cache), jnp.arange(num_drafts - 1))
  one = (*draw(num_drafts - 1, hidden), hidden)  # nothing reads the last draft
  joined = jax.tree.map(
    lambda many, one: jnp.concatenate([jnp.swapaxes(many, 0, 1), one[:, None]], axis=1), many, one
  )
  return Proposal(*joined, cache)


def speculative(
  model: gaussian.ContinuousModel,
  params: models.Params,
  draft_model: gaussian.ContinuousModel,
  draft_params: models.Params,
  *,
  num_tokens: int,
  num_drafts: int,
) -> base.SamplingAlgorithm:
  """Draws from the law of `autoregressive`, one call of the target for up to K + 1 tokens.

  The draft model proposes K tokens, one call of the target gives the laws of all of them and of the
  one after, and each is accepted as in `couple` up to the first that is refused: what comes after
  it was drafted after a token that is none. The residual follows the accepted drafts, or, after all
  K of them, the target's own law. Rows accept different numbers of drafts; both caches are rewound
  to what stands. The inputs of `init` are not read: give None.

  Args:
    model: the target.
    params: its parameters, a transformer's unstacked.
    draft_model: over draws of the same space: of diffusion models, T and the betas are the same.
    draft_params: its parameters.
    num_tokens: N, of every sequence.
    num_drafts: K.

  Raises:
    ValueError: a number is less than 1, or the models' draws have different shapes.

  Reference: Leviathan et al. 2022, arXiv 2211.17192, for tokens of a vocabulary; Wang et al. 2024,
  arXiv 2411.11925, whose acceptance is not exact (see above).
  """
  if num_drafts < 1:
    raise ValueError(f"num_drafts={num_drafts}: a draft model drafts at least 1.")
  sizes = model.token_size, draft_model.token_size
  if sizes[0] != sizes[1]:
    raise ValueError(f"Tokens of {sizes[1]} numbers are no drafts of tokens of {sizes[0]}.")

  def init(keys, inputs):
    del inputs
    tokens, length, cache = _begin(model, params, num_tokens, keys.shape[0])
    draft = draft_model.init_cache(draft_params, keys.shape[0], num_tokens)
    return ContinuousState(jnp.zeros_like(length), tokens, length, cache, draft)

  def step(keys, state):
    draft_keys, judge_keys = base.split(keys)
    drafts = propose(draft_model, draft_params, draft_keys, state, num_drafts)
    last = jnp.take_along_axis(state.tokens, state.length[:, None, None] - 1, axis=1)
    read = jnp.concatenate([last, drafts.tokens], axis=1)
    hidden, cache = model.trunk(params, read, state.cache)
    _check_draws(drafts.draws, model, params, hidden)
    judge = _judge(lambda h: model.law(params, h), lambda h: draft_model.law(draft_params, h))
    room = state.tokens.shape[1] - state.length
    num_accepted, other, accept_prob = jax.vmap(judge)(judge_keys, hidden, drafts, room)
    token = jnp.pad(drafts.tokens, ((0, 0), (0, 1), (0, 0)))
    here = jnp.arange(num_drafts + 1)[None, :] == num_accepted[:, None]
    token = jnp.where(here[:, :, None], jax.vmap(model.value)(other.draw)[:, None], token)
    count = jnp.minimum(num_accepted + 1, room)
    inside = jnp.arange(num_drafts)[None, :] < room[:, None]
    accept_prob = jnp.where(inside, accept_prob, 0)
    state, token = _write(state, token, count, cache, drafts.cache)
    return state, ContinuousInfo(token, count, num_accepted, accept_prob, other.num_proposals)

  return base.SamplingAlgorithm(init, step)


def _check_draws(draws, model, params, hidden):
  """Refuses drafts that are no draws of the target's law: paths of another number of steps."""
  one = lambda hidden: model.law(params, hidden).sample(jax.random.key(0))
  target = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(one, hidden[0, 0]))]
  draft = [leaf.shape[2:] for leaf in jax.tree.leaves(draws)]
  if draft != target:
    raise ValueError(
      f"The draft model draws {draft}, the target {target}: diffusion models need the same number "
      "of steps, and best the same betas."
    )


def _judge(target_law, draft_law):
  """(key, hidden [K + 1, W], Proposal of one row, room []) -> accepted, Residual, accept_prob [K].

  At most `room` drafts are accepted; after so many, there is nothing to draw.
  """

  def judge(key, hidden, drafts, room):
    coin_key, residual_key = jax.random.split(key)
    num_drafts = drafts.hidden.shape[0]
    log_prob = lambda law: jax.vmap(lambda hidden, draw: law(hidden).log_prob(draw))
    log_q = log_prob(draft_law)(drafts.hidden, drafts.draws)
    log_p = log_prob(target_law)(hidden[:-1], drafts.draws)
    accept_prob = acceptance(log_p, log_q)
    coins = jax.random.bernoulli(coin_key, accept_prob, mode="high")
    num_accepted = jnp.minimum(jnp.sum(jnp.cumprod(coins), dtype=jnp.int32), room)
    p, q = target_law(hidden[num_accepted]), draft_law(drafts.hidden[num_accepted % num_drafts])
    # After the last draft there is no draft to make up for: q = 0, and p itself is drawn.
    log_q = lambda draw: jnp.where(num_accepted < num_drafts, q.log_prob(draw), -jnp.inf)
    return num_accepted, residual(residual_key, p, log_q, num_accepted < room), accept_prob

  return judge


def _write(state, token, count, cache, draft):
  """The state after `count` [B] of the tokens [B, n, D], and these tokens, then zeros."""
  places = jnp.arange(token.shape[1])[None, :]
  written = places < count[:, None]
  token = jnp.where(written[:, :, None], token, 0)
  slots = jnp.where(written, state.length[:, None] + places, state.tokens.shape[1])  # out: dropped
  length = state.length + count
  state = ContinuousState(
    step=state.step + (count > 0),
    tokens=state.tokens.at[jnp.arange(count.size)[:, None], slots].set(token, mode="drop"),
    length=length,
    cache=cache._replace(length=length - 1),
    draft=draft,
  )
  return state, token


def generate(keys: base.Keys, algorithm: base.SamplingAlgorithm, num_tokens: int) -> jax.Array:
  """Whole sequences [B, N, D], each a function of its own key; call it inside jit.

  Args:
    keys: [B].
    algorithm: `autoregressive` or `speculative`, for `num_tokens`.
    num_tokens: N.
  """
  state = base.start(keys, algorithm, None)
  state = base.run_until(keys, algorithm, state, lambda state: state.done, num_tokens)
  return state.tokens[:, 1:]
