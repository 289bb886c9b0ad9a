"""Beam search and its diverse form; `stochastic_beam` samples by it.

A row keeps K running beams and a pool of K finished hypotheses. A step extends each beam by every
token, and ranks the K V candidates. Of the first K in rank, those that end (by a stop token, or for
want of room) are offered to the pool; the first K that do not end run on. At most K of them end by
any one stop token, so K (1 + number of stop tokens) candidates never starve the beam. Of equal
candidates the one of the earlier beam comes first, then the lower token.

Every leaf of the state leads with [B], and those of the beams with [B, K], the model's cache too:
rows are admitted and frozen as everywhere. Call the factories inside jit, as `decode` says.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..models import base as models
from . import base, decode
from . import logits as logits_lib


class Beams(NamedTuple):
  """Hypotheses. Where a row has fewer than K, the others have score and log_prob -inf."""

  tokens: jax.Array  # [B, K, S] int32: the prompt, the hypothesis, then zeros
  length: jax.Array  # [B, K] int32, of both; a stop token included
  log_prob: jax.Array  # [B, K], of the hypothesis after the prompt, by the transformed law
  score: jax.Array  # [B, K], what they are sorted by


class BeamState(NamedTuple):
  """Where a search stands. The cache holds every token of a running beam but the last."""

  step: jax.Array  # [B] int32, tokens of a running beam after the prompt
  prompt_length: jax.Array  # [B] int32
  tokens: jax.Array  # [B, K, S] int32, of the running beams
  log_prob: jax.Array  # [B, K]; -inf where there is no such beam
  priority: jax.Array  # [B, K], what running beams compete by
  finished: Beams  # each group's, best first
  done: jax.Array  # [B] bool; such a row is frozen
  cache: models.Cache  # leaves [B, K, ...]
  transform: logits_lib.State  # leaves [B, K, ...]


class BeamInfo(NamedTuple):
  """How the running beams moved. A frozen row's entries are 0."""

  parent: jax.Array  # [B, K] int32, the beam that was extended
  token: jax.Array  # [B, K] int32
  log_prob: jax.Array  # [B, K], of the token, by the transformed law; -inf where there is no beam


class Ranking(NamedTuple):
  """What beams compete by; each group of k among themselves.

  Attributes:
    root: (keys [B]) -> priority [B] of the prompt.
    expand: (keys [B], priority [B, k], log_prob [B, k], log_p [B, k, V] of the next token, taken
      [B, V]) -> (order, priority), [B, k, V]. Candidates are taken by order; what runs on competes
      by priority. `taken` counts the beams of earlier groups that were extended by a token at this
      step. Priorities never rise; with a length penalty they are never above 0. The search's
      bound relies on both.
    num_groups: G.
  """

  root: Callable[[base.Keys], jax.Array]
  expand: Callable[..., tuple[jax.Array, jax.Array]]
  num_groups: int = 1


def at_zero(keys: base.Keys) -> jax.Array:
  """A root of log-probability 0."""
  return jnp.zeros(keys.shape)


def likeliest(keys, priority, log_prob, log_p, taken):
  """Beams compete by what their tokens add up to."""
  del keys, log_prob, taken
  total = priority[:, :, None] + log_p
  return total, total


LIKELIEST = Ranking(at_zero, likeliest)


def beam_search(
  model: models.LanguageModel,
  params: models.Params,
  *,
  num_beams: int,
  max_length: int,
  max_new_tokens: int | jax.Array,
  stop: Sequence[int] = (),
  length_penalty: float | jax.Array = 1.0,
  transform: logits_lib.LogitsTransform | None = None,
  ranking: Ranking = LIKELIEST,
) -> base.SamplingAlgorithm:
  """Searches for the continuations y of highest log p(y | prompt) / |y|^a, a = length_penalty.

  |y| counts the new tokens, a stop token included and the prompt not, as in transformers.

  A row is done when it has no room, or no running beam can beat the worst of K finished ones. A
  beam of log-probability L <= 0 and n tokens ends with L' <= L and n < m <= N tokens, N being all
  there is room for, so its score L' / m^a <= L / m^a is at most L / N^a for a >= 0, and
  L / (n + 1)^a for a < 0; equals do not displace. So stopping costs nothing. It is transformers'
  early_stopping="never"; its default takes n for N, and so drops hypotheses that would win.

  With enough beams it is exhaustive. With one it is greedy decoding if there is no stop token or
  a <= 0; with a > 0 it goes on past greedy's stop, for a longer hypothesis that scores higher.

  Args:
    model: the model.
    params: its parameters.
    num_beams: K, static.
    max_length: S, static.
    max_new_tokens: scalar or [B]. A row without room has one hypothesis, of no tokens and score 0.
    stop: tokens that end a hypothesis, kept as its last.
    length_penalty: a, scalar or [B]; 0 is no normalisation, and the more the longer.
    transform: of the logits; p is the transformed law, normalised (transformers adds up processed
      log-probabilities as they are). A beam that is left no token is dropped.
    ranking: what beams compete by, in place of log p.

  Raises:
    ValueError: beams that do not make groups of one size.
  """
  if min(num_beams, ranking.num_groups) < 1 or num_beams % ranking.num_groups:
    raise ValueError(
      f"num_beams={num_beams} is not a multiple of num_groups={ranking.num_groups}: make it one."
    )
  search = _Search(
    model,
    params,
    ranking,
    num_beams,
    max_length,
    lambda prompt_length: jnp.minimum(max_new_tokens, max_length - prompt_length),
    jnp.array(sorted(set(stop)), jnp.int32),
    logits_lib.per_row(length_penalty).astype(jnp.float32),
    logits_lib.chain() if transform is None else transform,
  )
  return base.SamplingAlgorithm(functools.partial(_init, search), functools.partial(_step, search))


def diverse_beam_search(
  model: models.LanguageModel,
  params: models.Params,
  *,
  num_groups: int,
  diversity: float | jax.Array,
  **settings: Any,
) -> base.SamplingAlgorithm:
  """Beam search in groups that pay for tokens which groups before them take at the same step.

  A step goes through the groups of K / G beams in order. Group g ranks y by |y|^-a times

    sum_t [ log p(y_t | y_<t) - diversity #{beams of groups before g that took y_t at step t} ],

  Hamming diversity. As in the authors' code the penalties add up over steps and count in the
  score; log_prob is without them. Beams that run on are counted, as in transformers before v5 (it
  is a hub repository since); the authors count those that just ended too. The first group is a
  beam search of K / G beams, and no group depends on later ones.

  Args:
    model: the model.
    params: its parameters.
    num_groups: G, static; divides num_beams.
    diversity: at least 0, scalar or [B]; the authors take 0.2 to 0.8.
    **settings: those of `beam_search`.

  Reference: Vijayakumar et al. 2016, arXiv 1610.02424, algorithm 1.
  """
  logits_lib.require("diversity", diversity, lambda weight: weight >= 0, "at least 0")

  def expand(keys, priority, log_prob, log_p, taken):
    penalty = logits_lib.per_row(diversity).astype(jnp.float32) * taken
    return likeliest(keys, priority, log_prob, log_p - penalty[:, None, :], taken)

  return beam_search(model, params, ranking=Ranking(at_zero, expand, num_groups), **settings)


def search(keys: base.Keys, algorithm: base.SamplingAlgorithm, prompts: decode.Prompts) -> Beams:
  """Runs a search of this module to its end: each row's hypotheses, best first."""
  state = base.start(keys, algorithm, prompts)
  state = base.run_until(
    keys, algorithm, state, lambda state: state.done, max_steps=state.tokens.shape[-1]
  )
  return _best(state.finished, state.finished.score.shape[1])


class _Search(NamedTuple):
  """A search's constants."""

  model: models.LanguageModel
  params: models.Params
  ranking: Ranking
  num_beams: int
  max_length: int
  room: Callable[[jax.Array], jax.Array]  # prompt_length [B] -> tokens that may follow [B]
  stop: jax.Array
  length_penalty: jax.Array  # [1, 1] or [B, 1]
  transform: logits_lib.LogitsTransform

  def score(self, priority, length):
    """[B, n], of hypotheses of `length` [B, 1] new tokens."""
    return priority / jnp.maximum(length, 1).astype(jnp.float32) ** self.length_penalty


class _Candidates(NamedTuple):
  """Extended beams, [B, n] each."""

  parent: jax.Array
  token: jax.Array
  step_log_prob: jax.Array
  priority: jax.Array  # -inf where there is none
  stops: jax.Array


def _init(search, keys, prompts):
  batch_size = prompts.length.size
  num_beams, max_length = search.num_beams, search.max_length
  each = lambda leaf: jnp.repeat(leaf[:, None], num_beams, axis=1)
  cache = decode.prefill(search.model, search.params, prompts, max_length)
  tokens = decode.buffer(prompts, max_length)
  beam = jnp.arange(num_beams)[None, :]
  # One beam of a group is the prompt; the others would be copies of it.
  first = beam % (num_beams // search.ranking.num_groups) == 0
  full = search.room(prompts.length) <= 0
  score = jnp.where(full[:, None] & (beam == 0), 0.0, -jnp.inf)
  return BeamState(
    step=jnp.zeros(batch_size, jnp.int32),
    prompt_length=prompts.length,
    tokens=each(tokens),
    log_prob=jnp.where(first, jnp.zeros((batch_size, 1)), -jnp.inf),
    priority=jnp.where(first, search.ranking.root(keys)[:, None], -jnp.inf),
    finished=Beams(each(tokens), each(prompts.length), score, score),
    done=full,
    cache=jax.tree.map(each, cache),
    transform=jax.tree.map(each, search.transform.init(batch_size)),
  )


def _step(search, keys, state):
  model_logits, log_p, cache = _read(search, state)
  running, leading = _compete(search, keys, state, log_p)
  active, steps = ~state.done, state.step + 1
  limit = search.room(state.prompt_length)
  finished = _offer(search, state, leading, steps >= limit)

  alive = running.priority > -jnp.inf
  log_prob = _take(state.log_prob, running.parent) + running.step_log_prob
  fed_back = jax.vmap(search.transform.update, in_axes=1, out_axes=1)(
    _take(model_logits, running.parent), running.token, _take(state.transform, running.parent)
  )
  new = BeamState(
    step=steps,
    prompt_length=state.prompt_length,
    tokens=_extended(state, running),
    log_prob=jnp.where(alive, log_prob, -jnp.inf),
    priority=running.priority,
    finished=finished,
    done=(steps >= limit) | _settled(search, running.priority, finished.score, steps, limit),
    cache=None,
    transform=fed_back,
  )
  state = base.select_rows(active, new, state._replace(cache=None))
  # A frozen row's cache keeps its beams, and what was written beyond its length does not count.
  own = jnp.arange(search.num_beams)[None, :]
  if search.num_beams > search.ranking.num_groups:  # in groups of one no beam moves
    cache = _take(cache, jnp.where(active[:, None], running.parent, own))
  held = jnp.broadcast_to((state.prompt_length + state.step - 1)[:, None], running.parent.shape)
  info = BeamInfo(running.parent, running.token, jnp.where(alive, running.step_log_prob, -jnp.inf))
  info = jax.tree.map(lambda leaf: jnp.where(active[:, None], leaf, 0), info)
  return state._replace(cache=cache._replace(length=held)), info


def _read(search, state):
  """The model's logits and log p of the next token [B, K, V], and the cache that read the last."""
  batch_size, num_beams, _ = state.tokens.shape
  together = lambda leaf: leaf.reshape(batch_size * num_beams, *leaf.shape[2:])
  apart = lambda leaf: leaf.reshape(batch_size, num_beams, *leaf.shape[1:])
  length = state.prompt_length + state.step
  last = jnp.take_along_axis(state.tokens, length[:, None, None] - 1, axis=2)
  hidden, cache = models.apply(
    search.model, search.params, together(last), jax.tree.map(together, state.cache)
  )
  model_logits = apart(search.model.readout(search.params, hidden[:, 0]))
  # Beam by beam, so that a transform sees B rows, and its parameters may be [B].
  context = logits_lib.Context(state.tokens, length, state.prompt_length)
  apply = jax.vmap(
    search.transform.apply, in_axes=(1, logits_lib.Context(1, None, None), 1), out_axes=1
  )
  logits = apply(model_logits, context, state.transform)
  log_p = jnp.where(logits > -jnp.inf, jax.nn.log_softmax(logits, axis=-1), -jnp.inf)
  return model_logits, log_p, jax.tree.map(apart, cache)


def _compete(search, keys, state, log_p):
  """The candidates that run on, and the first in rank, [B, K] of each, group after group."""
  size = search.num_beams // search.ranking.num_groups
  taken = jnp.zeros((log_p.shape[0], log_p.shape[2]))
  rows = jnp.arange(taken.shape[0])[:, None]
  chosen = []
  for start in range(0, search.num_beams, size):
    group = slice(start, start + size)
    order, priority = search.ranking.expand(
      keys, state.priority[:, group], state.log_prob[:, group], log_p[:, group], taken
    )
    ranked = _ranked(order, priority, log_p[:, group], search.stop, size)
    ranked = ranked._replace(parent=ranked.parent + start)
    eligible = jnp.where(ranked.stops, -jnp.inf, ranked.priority)
    _, first = jax.lax.top_k(eligible, size)
    running = _take(ranked._replace(priority=eligible), first)
    taken = taken.at[rows, running.token].add(running.priority > -jnp.inf)
    chosen.append((running, jax.tree.map(lambda leaf: leaf[:, :size], ranked)))
  return jax.tree.map(lambda *groups: jnp.concatenate(groups, axis=1), *chosen)


def _ranked(order, priority, log_p, stop, size):
  """The first candidates by `order` [B, k, V], of which `size` at least do not stop."""
  flat = lambda leaf: leaf.reshape(leaf.shape[0], -1)
  # Two for a beam where there is no stop token: only beam_sample can tell, and needs them.
  count = min(size * max(2, 1 + stop.size), size * order.shape[2])
  _, index = jax.lax.top_k(flat(order), count)
  token = index % order.shape[2]
  stops = jnp.any(token[:, :, None] == stop[None, None, :], axis=-1)
  log_p, priority = _take((flat(log_p), flat(priority)), index)
  return _Candidates(index // order.shape[2], token, log_p, priority, stops)


def _offer(search, state, leading, is_last):
  """The pools after the leading candidates that end were offered to them."""
  ends = (leading.stops | is_last[:, None]) & (leading.priority > -jnp.inf)
  log_prob = _take(state.log_prob, leading.parent) + leading.step_log_prob
  score = search.score(leading.priority, state.step[:, None] + 1)
  length = jnp.broadcast_to((state.prompt_length + state.step + 1)[:, None], ends.shape)
  log_prob, score = (jnp.where(ends, leaf, -jnp.inf) for leaf in (log_prob, score))
  offered = Beams(_extended(state, leading), length, log_prob, score)
  size = search.num_beams // search.ranking.num_groups
  by_group = lambda leaf: leaf.reshape(-1, size, *leaf.shape[2:])
  pools = jax.tree.map(
    lambda *leaves: jnp.concatenate([by_group(leaf) for leaf in leaves], axis=1),
    state.finished,
    offered,
  )
  return jax.tree.map(lambda leaf, old: leaf.reshape(old.shape), _best(pools, size), offered)


def _settled(search, priority, score, steps, limit):
  """[B] bool: no group has a running beam that can beat the worst of its pool; see beam_search."""
  by_group = lambda leaf: leaf.reshape(leaf.shape[0], search.ranking.num_groups, -1)
  kindest = jnp.where(search.length_penalty >= 0, limit[:, None], steps[:, None] + 1)
  best = search.score(by_group(priority).max(axis=-1), kindest)
  return jnp.all(best <= by_group(score).min(axis=-1), axis=1)


def _extended(state, candidates):
  """[B, n, S]: the candidates' tokens."""
  batch_size, count = candidates.token.shape
  rows, columns = jnp.arange(batch_size)[:, None], jnp.arange(count)[None, :]
  place = (state.prompt_length + state.step)[:, None]  # out of bounds in a full, frozen row
  parents = _take(state.tokens, candidates.parent)
  return parents.at[rows, columns, place].set(candidates.token, mode="drop")


def _take(tree, index):
  """leaf[b, index[b, i]] of leaves [B, n, ...], for index [B, m]."""
  take = lambda leaf, index: leaf.at[index].get(mode="promise_in_bounds")
  return jax.tree.map(lambda leaf: jax.vmap(take)(leaf, index), tree)


def _best(beams, count):
  """The `count` of highest score, in order; of equals, the earlier first."""
  return _take(beams, jax.lax.top_k(beams.score, count)[1])
