"""What decoding costs on this machine, part by part, and what speculation should gain by that.

Everything is timed in a compiled loop, the best of some repetitions. Throughput is that of steady
work: a fixed number of steps in which no row ends, as under `serve`. A batch that waits for its
last row is slower.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..models import base as models
from ..sampling import base, decode, drafting, speculative, trees
from ..sampling import logits as logits_lib


class Costs(NamedTuple):
  """Of speculation against plain decoding, all for one batch of B rows."""

  plain_step: float  # seconds, of plain decoding
  round: float  # seconds, of a speculative step
  target_one: float  # seconds, the target reads 1 token of each row
  target_all: float  # seconds, the target reads all drafts and 1 more, the mean over rounds
  drafting: float  # seconds, the drafter drafts
  tokens: float  # of a round and row, the mean
  accepted: float  # share of the drafts
  optimum: float  # accepted over what the best rule would at the same positions

  @property
  def realised(self) -> float:
    """The speed-up: tokens per second over those of plain decoding."""
    return self.tokens * self.plain_step / self.round

  @property
  def verify(self) -> float:
    """v, the cost of verifying drafts relative to reading one token."""
    return self.target_all / self.target_one

  @property
  def draft(self) -> float:
    """gamma c, the cost of drafting relative to a call of the target."""
    return self.drafting / self.target_one

  @property
  def predicted(self) -> float:
    """E / (v + gamma c), Leviathan et al. 2022, arXiv 2211.17192, theorem 3.8, with v not 1."""
    return self.tokens / (self.verify + self.draft)


def seconds(run: Callable[[], Any], repeats: int) -> float:
  """The best wall clock of `run`, after a call that compiles."""
  jax.block_until_ready(run())
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(run())
    times.append(time.perf_counter() - start)
  return min(times)


def room(prompts: decode.Prompts, drafter: drafting.Drafter, num_steps: int) -> int:
  """Slots in which no row ends within `num_steps`."""
  depth = int(trees.depths(drafter.parents).max())
  return prompts.tokens.shape[1] + (num_steps + 1) * (depth + 1)


def compare(
  model: models.LanguageModel,
  params: Any,
  drafter_of: Callable[[Any], drafting.Drafter],
  keys: base.Keys,
  prompts: decode.Prompts,
  *,
  num_steps: int,
  repeats: int = 3,
  target_of: Callable[[Any], models.Params] = lambda params: params["target"],
  transform: logits_lib.LogitsTransform | None = None,
  **settings,
) -> Costs:
  """Times `num_steps` of plain and of speculative decoding from the same prompts, and their parts.

  Args:
    model: the target.
    params: of the target and of the drafter, any tree.
    drafter_of: params -> Drafter.
    keys: [B].
    prompts: B of them.
    num_steps: of either way of decoding.
    repeats: of each measurement.
    target_of: params -> the target's, unstacked.
    transform: of the target's logits.
    settings: of `speculative`.
  """
  num_drafts = len(drafter_of(params).parents)
  slots = room(prompts, drafter_of(params), num_steps)
  shared = {"max_length": slots, "max_new_tokens": slots, "transform": transform}

  def plain(params):
    return decode.autoregressive(model, target_of(params), **shared)

  def speculating(params):
    return speculative.speculative(
      model, target_of(params), drafter_of(params), **shared, **settings
    )

  def runner(algorithm_of, observe):
    def run(params, keys, state):
      return base.run(keys, algorithm_of(params), state, num_steps, observe)

    begin = jax.jit(lambda params, keys: base.start(keys, algorithm_of(params), prompts))
    state, run = begin(params, keys), jax.jit(run)
    return lambda: run(params, keys, state)

  drawn = lambda state, info: (info.token, info.log_prob)  # what is not observed is not computed
  plain_step = seconds(runner(plain, drawn), repeats) / num_steps
  round_ = seconds(runner(speculating, drawn), repeats) / num_steps
  state, info = runner(speculating, lambda state, info: info)()
  drafted = jnp.sum(info.num_drafted)
  widths = np.array(sorted({*settings.get("widths", ()), num_drafts}))
  needed = np.searchsorted(widths, jax.device_get(jnp.max(info.num_drafted, axis=1)))
  shares = np.bincount(needed if len(widths) > 1 else 0 * needed, minlength=len(widths)) / num_steps
  taken = [(int(w), share) for w, share in zip(widths, shares, strict=True) if share]
  return Costs(
    plain_step,
    round_,
    _target(model, target_of, params, state, 1, repeats),
    sum(share * _target(model, target_of, params, state, w + 1, repeats) for w, share in taken),
    _drafting(drafter_of, params, keys, state, repeats),
    float(jnp.mean(info.count)),
    float(jnp.sum(info.num_accepted) / jnp.maximum(drafted, 1)),
    float(jnp.sum(info.num_accepted) / jnp.maximum(jnp.sum(info.optimum), 1e-30)),
  )


def _per_iteration(body, arguments, carry, repeats, iterations=10):
  loop = jax.jit(
    lambda arguments, carry: jax.lax.fori_loop(
      0, iterations, lambda i, carry: body(arguments, i, carry), carry
    )
  )
  return seconds(lambda: loop(arguments, carry), repeats) / iterations


def _target(model, target_of, params, state, width, repeats):
  """Seconds for the target to read `width` tokens of each row, and to read out their logits."""

  def body(params, i, carry):
    tokens, cache = carry
    hidden, written = models.apply(model, target_of(params), tokens, cache)
    logits = model.readout(target_of(params), hidden)
    # Never true, but a loop that used no logits would not compute them.
    tokens += jnp.any(logits > 1e30, axis=-1)
    return tokens, written._replace(length=cache.length)

  length = jnp.maximum(state.cache.length - width, 0)
  tokens = jnp.zeros((length.size, width), jnp.int32)
  return _per_iteration(body, params, (tokens, state.cache._replace(length=length)), repeats)


def _drafting(drafter_of, params, keys, state, repeats):
  """Seconds for the drafter to draft once for each row, of a text that it has read before."""
  length = jnp.maximum(state.length - len(drafter_of(params).parents), 1)
  context = logits_lib.Context(state.tokens, length, state.prompt_length)

  def body(arguments, i, carry):
    (params, keys, context), (length, draft_state) = arguments, carry
    keys, context = base.row_keys_at(keys, jnp.full(keys.shape, i)), context._replace(length=length)
    drafts, draft_state = drafter_of(params).draft(keys, context, draft_state)
    # Never true, but a loop that used no drafts would not make them.
    used = (drafts.tokens < 0) | jnp.any(drafts.logits > 1e30, axis=-1)
    return length + jnp.any(used, axis=1), draft_state

  return _per_iteration(body, (params, keys, context), (length, state.draft), repeats)
