"""Speculative decoding: several tokens of the target's law for each of its calls.

A drafter proposes K tokens, a chain or a tree, one call of the target scores all of them, and a
coupling says which stand and what comes next. The law of the text is the target's exactly, whatever
the drafter.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..models import base as models
from . import base, coupling, decode, drafting, trees
from . import logits as logits_lib


class SpeculativeState(NamedTuple):
  """Where decoding stands. The cache holds every token of a row but the last."""

  step: jax.Array  # [B] int32, calls of the target
  tokens: jax.Array  # [B, S] int32: the prompt, the tokens drawn, then zeros
  length: jax.Array  # [B] int32, prompt and drawn tokens
  prompt_length: jax.Array  # [B] int32
  done: jax.Array  # [B] bool; such a row is frozen
  cache: models.Cache
  draft: Any  # the drafter's


class SpeculativeInfo(NamedTuple):
  """What a step did: K drafts judged, D of them one after the other in the deepest path.

  `log_prob` is of the law drawn from if the rule is lossless. `optimum` is of rules that judge
  position by position: block verification may accept more. A frozen row's entries are 0.
  """

  token: jax.Array  # [B, D + 1] int32, then zeros
  count: jax.Array  # [B] int32, tokens written
  log_prob: jax.Array  # [B, D + 1], of the target's transformed law; 0 under greedy
  model_log_prob: jax.Array  # [B, D + 1], of the target's own law
  num_drafted: jax.Array  # [B] int32
  num_accepted: jax.Array  # [B] int32, drafts that stood, those after a stop token included
  accept_prob: jax.Array  # [B, K], of each draft, if its parent stands
  optimum: jax.Array  # [B], the best acceptance of its drafts, summed over positions judged


class Samples(NamedTuple):
  """As `decode.Samples`, and what they cost."""

  tokens: jax.Array  # [B, P + N] int32: the prompt, the tokens drawn, then zeros
  length: jax.Array  # [B] int32, a stop token that was drawn included
  prompt_length: jax.Array  # [B] int32
  log_prob: jax.Array  # [B, N] of the n-th drawn token, under the law it was drawn from
  model_log_prob: jax.Array  # [B, N], under the target's own law
  num_calls: jax.Array  # [B] int32, of the target
  num_drafted: jax.Array  # [B] int32
  num_accepted: jax.Array  # [B] int32, drafts that stood, those after a stop token included
  optimum: jax.Array  # [B], see `SpeculativeInfo`


def speculative(
  model: models.LanguageModel,
  params: models.Params,
  drafter: drafting.Drafter,
  *,
  max_length: int,
  max_new_tokens: int | jax.Array,
  transform: logits_lib.LogitsTransform | None = None,
  stop: Sequence[int] = (),
  verify: coupling.Verify | None = None,
  widths: Sequence[int] = (),
  capacity: int | None = None,
  prefill_chunk: int = 512,
) -> base.SamplingAlgorithm:
  """Draws from the law of `decode.autoregressive`, one call of the target for up to D + 1 tokens.

  Rows accept different numbers of drafts; both caches are rewound to what stands. A stop token
  among the accepted ends the row there.

  Args:
    model: the target; for trees, one that takes positions and a mask.
    params: its parameters, unstacked.
    drafter: for the most acceptance its law has the same transform.
    max_length: the longest sequence, static.
    max_new_tokens: scalar or [B].
    transform: of the target's logits, without feedback.
    stop: tokens that end a row, kept as its last.
    verify: of the drafter's tree; its own if None, which for chains is block verification, that no
      chain of couplings beats.
    widths: numbers of drafts that a call may verify, besides all K: where rows draft less, the
      least that is enough is taken. Of chains only; each compiles the target once more.
    capacity: S, the slots to begin with, `max_length` if None; see `decode.autoregressive`.
    prefill_chunk: tokens of the prompts that go through the model at once.

  Raises:
    ValueError: the transform feeds back; widths that are none, or of a tree.

  Reference: Leviathan et al. 2022, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318; Sun et
  al. 2024, arXiv 2403.10444; Miao et al. 2023, arXiv 2305.09781, for trees.
  """
  transform = drafting.without_feedback(transform)
  parents = drafter.parents
  widths, depth = _checked_widths(widths, parents), int(trees.depths(parents).max())
  verify = drafter.verify if verify is None else verify
  stop = jnp.array(stop, jnp.int32)
  capacity, spare = max_length if capacity is None else capacity, trees.spare(parents)
  slots = capacity + spare

  def room(state_length, prompt_length):
    return jnp.minimum(max_length - state_length, prompt_length + max_new_tokens - state_length)

  def init(keys, prompts):
    del keys
    cache = decode.prefill(model, params, prompts, capacity, chunk=prefill_chunk, spare=spare)
    return SpeculativeState(
      step=jnp.zeros_like(prompts.length),
      tokens=decode.buffer(prompts, slots),
      length=prompts.length,
      prompt_length=prompts.length,
      done=room(prompts.length, prompts.length) <= 0,
      cache=cache,
      draft=drafter.init(prompts, slots),
    )

  def step(keys, state):
    draft_keys, verify_keys = base.split(keys)
    context = logits_lib.Context(state.tokens, state.length, state.prompt_length)
    drafts, draft_state = drafter.draft(draft_keys, context, state.draft, ~state.done)
    drafted = jnp.any(drafts.logits > -jnp.inf, axis=2) & ~state.done[:, None]
    score = functools.partial(_score, model, params, transform, parents, drafts, context)
    scores, cache = _narrowest(score, widths, drafted, state.cache)
    verdict = verify(verify_keys, drafts.tokens, drafts.logits, scores.laws)
    if verdict.path.shape[1] != depth:
      raise ValueError(
        f"verify judges drafts {verdict.path.shape[1]} deep, the drafter's are {depth}: for a "
        "tree, give coupling.tree(rule, the drafter's parents)."
      )
    left = jnp.where(state.done, 0, room(state.length, state.prompt_length))
    token, count = _written(drafts.tokens, verdict, stop, left)
    last = jnp.take_along_axis(token, jnp.maximum(count - 1, 0)[:, None], axis=1)
    stopped = (count > 0) & jnp.any(last == stop[None, :], axis=1)
    length = state.length + count
    info = _info(drafter, drafts, drafted, scores, verdict, token, count)
    state = SpeculativeState(
      step=state.step + ~state.done,
      tokens=_append(state.tokens, state.length, token, count),
      length=length,
      prompt_length=state.prompt_length,
      done=state.done | stopped | (room(length, state.prompt_length) <= 0),
      cache=_kept(cache, parents, verdict, state.length)._replace(length=length - 1),
      draft=drafter.observe(scores.hidden, verdict, draft_state),
    )
    return state, info

  return base.SamplingAlgorithm(init, step)


class Scores(NamedTuple):
  """What the target makes of the text and of each draft."""

  hidden: jax.Array  # [B, K + 1, D]
  logits: jax.Array  # [B, K + 1, V]
  laws: jax.Array  # [B, K + 1, V], the transform's


def _checked_widths(widths, parents):
  """The widths in order, K the last."""
  num_drafts = len(parents)
  if widths and trees.spare(parents):
    raise ValueError("widths are of chains: a tree is verified whole.")
  if any(not 0 <= width <= num_drafts for width in widths):
    raise ValueError(f"widths={tuple(widths)}: a call verifies 0 to {num_drafts} drafts.")
  return sorted({*widths, num_drafts})


def _score(model, params, transform, parents, drafts, context, cache, *, width):
  """Scores of the first `width` drafts, zeros for the others, and the cache that has read them."""
  num_drafts = len(parents)
  last = jnp.take_along_axis(context.tokens, context.length[:, None] - 1, axis=1)
  read = jnp.concatenate([last, drafts.tokens[:, :width]], axis=1)
  where = _places(parents, context) if trees.spare(parents) else {}
  hidden, cache = models.apply(model, params, read, cache, **where)
  logits = model.readout(params, hidden)
  contexts = trees.contexts(context, parents, drafts.tokens, range(width + 1))
  law = lambda logits, context: transform.apply(logits, context, ())
  laws = jax.vmap(law, in_axes=1, out_axes=1)(logits, contexts)
  missing = ((0, 0), (0, num_drafts - width), (0, 0))
  return Scores(*(jnp.pad(leaf, missing) for leaf in (hidden, logits, laws))), cache


def _places(parents, context):
  """Positions and mask of the last token of the text, and of the drafts after it."""
  line = np.tril(np.ones((len(parents) + 1,) * 2, bool))
  line[1:, 1:] = trees.lineage(parents)
  start = context.length - 1
  depth = np.append(0, trees.depths(parents))
  return {
    "positions": start[:, None] + depth[None, :],
    "mask": trees.visible(start, line, context.tokens.shape[1]),
  }


def _narrowest(score, widths, drafted, cache):
  """score(cache, width) of the least width that holds every row's drafts."""
  if len(widths) == 1:
    return score(cache, width=widths[0])
  needed = jnp.max(jnp.where(drafted, jnp.arange(1, drafted.shape[1] + 1)[None, :], 0))
  index = jnp.searchsorted(jnp.array(widths), needed)
  branches = [functools.partial(score, width=width) for width in widths]
  return jax.lax.switch(index, branches, cache)


def _written(drafts, verdict, stop, room):
  """The tokens that a step writes, [B, D + 1], then zeros, and how many: up to a stop token."""
  places = jnp.arange(verdict.path.shape[1] + 1, dtype=jnp.int32)[None, :]
  accepted = verdict.num_accepted[:, None]
  token = jnp.take_along_axis(drafts, jnp.maximum(verdict.path, 0), axis=1)
  token = jnp.where(places == accepted, verdict.token[:, None], jnp.pad(token, ((0, 0), (0, 1))))
  count = jnp.minimum(accepted[:, 0] + 1, room)
  is_stop = jnp.any(token[:, :, None] == stop[None, None, :], axis=2)
  first = jnp.min(jnp.where(is_stop, places, places.size), axis=1)
  count = jnp.minimum(count, first + 1)
  return jnp.where(places < count[:, None], token, 0), count


def _num_possible(drafts):
  """[B]: of n siblings of a law of fewer tokens, the rest are none."""
  logits = jnp.take_along_axis(drafts.logits, drafts.tokens[:, :, None], axis=2)[:, :, 0]
  return jnp.sum(logits > -jnp.inf, axis=1, dtype=jnp.int32)


def _append(tokens, length, new, count):
  places = jnp.arange(new.shape[1])[None, :]
  slots = jnp.where(places < count[:, None], length[:, None] + places, tokens.shape[1])
  return tokens.at[jnp.arange(count.size)[:, None], slots].set(new, mode="drop")


def _kept(cache, parents, verdict, length):
  """The cache with the accepted path in the slots after the text."""
  if not trees.spare(parents):
    return cache  # a chain is there already
  places = length[:, None] + jnp.arange(verdict.path.shape[1])[None, :]
  return cache.moved(length[:, None] + jnp.maximum(verdict.path, 0), places)


def _log_prob(logits, token, path):
  """Of each token [B, D + 1] under the logits of the node before it."""
  before = jnp.pad(path + 1, ((0, 0), (1, 0)))
  logits = jnp.take_along_axis(logits, before[:, :, None], axis=1)
  chosen = jnp.take_along_axis(logits, token[:, :, None], axis=2)[:, :, 0]
  return chosen - jax.nn.logsumexp(logits, axis=2)


def _optimum(drafter, drafts, drafted, laws, verdict):
  """The best acceptance at each position that was judged, summed, [B]."""
  nodes = jnp.arange(len(drafter.parents) + 1)[None, :]
  stands = (nodes == 0) | jnp.any(verdict.path[:, :, None] + 1 == nodes[:, None, :], axis=1)
  log_q, log_p = coupling.log_law(drafts.logits), coupling.log_law(laws)
  total = jnp.zeros(drafts.tokens.shape[0], log_p.dtype)
  for some, children in trees.families(drafter.parents):
    first = children[:, 0]
    best = drafter.optimum(log_q[:, first], log_p[:, some], children.shape[1])
    total += jnp.sum(jnp.where(stands[:, some] & drafted[:, first], best, 0), axis=1)
  return total


def _info(drafter, drafts, drafted, scores, verdict, token, count):
  """What a step did, zeros where nothing was written, and in frozen rows."""
  written = jnp.arange(token.shape[1])[None, :] < count[:, None]
  zero = lambda log_prob: jnp.where(written, log_prob, 0)
  info = SpeculativeInfo(
    token=token,
    count=count,
    log_prob=zero(_log_prob(scores.laws, token, verdict.path)),
    model_log_prob=zero(_log_prob(scores.logits, token, verdict.path)),
    num_drafted=_num_possible(drafts),
    num_accepted=verdict.num_accepted,
    accept_prob=jnp.where(drafted, verdict.accept_prob, 0),
    optimum=_optimum(drafter, drafts, drafted, scores.laws, verdict),
  )
  return base.select_rows(count > 0, info, jax.tree.map(jnp.zeros_like, info))


def generate(
  model: models.LanguageModel,
  params: models.Params,
  drafter: drafting.Drafter,
  keys: base.Keys,
  prompts: decode.Prompts,
  *,
  max_new_tokens: int,
  bucket: int = 256,
  **settings,
) -> Samples:
  """Continues each prompt as `decode.generate` does, of the same law; see `speculative`."""
  room = prompts.tokens.shape[1] + max_new_tokens
  most = int(trees.depths(drafter.parents).max()) + 1
  sizes = decode.buckets(max(bucket, prompts.tokens.shape[1] + most), room)

  def algorithm(capacity):
    return base.recorded(
      speculative(
        model,
        params,
        drafter,
        max_length=room,
        max_new_tokens=max_new_tokens,
        capacity=capacity,
        **settings,
      ),
      observe=lambda state, info: info,
      capacity=max_new_tokens,
    )

  def is_done(recorded):
    state = recorded.state
    slots = state.tokens.shape[1] - trees.spare(drafter.parents)
    cramped = jnp.any(~state.done & (state.length + most > slots))  # then all rows wait
    return state.done | ((slots < room) & cramped)

  state, record = decode.grown(keys, algorithm, prompts, sizes, is_done, max_new_tokens)
  before = jnp.cumsum(record.count, axis=1) - record.count  # [B, N] tokens before each step
  places = jnp.arange(most)[None, None, :]
  slots = jnp.where(places < record.count[:, :, None], before[:, :, None] + places, max_new_tokens)
  rows = jnp.arange(slots.shape[0])[:, None, None]

  def in_order(leaf):
    empty = jnp.zeros((slots.shape[0], max_new_tokens), leaf.dtype)
    return empty.at[rows, slots].set(leaf, mode="drop")

  return Samples(
    state.tokens[:, :room],
    state.length,
    state.prompt_length,
    in_order(record.log_prob),
    in_order(record.model_log_prob),
    state.step,
    *(jnp.sum(leaf, axis=1) for leaf in (record.num_drafted, record.num_accepted, record.optimum)),
  )
