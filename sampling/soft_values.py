"""What a half-made sample is worth: estimates of v(x_t) = alpha log E[exp(r(x_0) / alpha) | x_t].

Sampling towards p(x_0) exp(r(x_0) / alpha) / Z needs to know how good a state will turn out. The
exact v is known for toys alone (`models.tilted`); these estimate it with a network's view of x_0,
and every one of them is r itself once nothing is left to be drawn, which is what `particles.smc`
needs to be right and `particles.svdd` to be near it.

    posterior_mean   r(E[x_0 | x_t])                                   one call
    seen_mean        r(E[x_0 | x_(t + 1)]), of the call already made   none
    mode             r(the likeliest token at each masked position)    one call
    completions      alpha log mean_j exp(r(x_j) / alpha), x_j drawn   one call
                     as if positions were independent
    at_end           r at the end, 0 before                            none

The call that a value makes at a state is the one that the next step makes there: `held` makes it
once, so that particles with values cost what they cost without.

A reward may be any function, not differentiable, of a batch of samples, row by row. One that
forbids (-inf) makes an estimate forbid what may still come out right, and `particles.smc` does not
get it back, so that its Z is too low: `raised` keeps such a state alive until it is done.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..models import base as models
from . import base, masked, tables
from . import logits as logits_lib

# samples [B, ...] -> r [B], row by row, below inf; -inf or NaN for what must not come out
Reward = Callable[[jax.Array], jax.Array]

# (keys [B], state, info of the step that led to it, or None before the first) ->
# (v [B], network calls that it took [B] int32), row by row
Value = Callable[[base.Keys, Any, Any], tuple[jax.Array, jax.Array]]

# (state, info) -> (E[x_0 | x_t] [B, ...], network calls that it took [B] int32)
Denoised = Callable[[Any, Any], tuple[jax.Array, jax.Array]]

# (state, info) -> (tokens [B, L], logits [B, L, V] of what is masked, calls [B] int32)
Predicted = Callable[[Any, Any], tuple[jax.Array, jax.Array, jax.Array]]


class Held(NamedTuple):
  """A sampler's state, and what the network makes of it."""

  step: jax.Array  # [B] int32
  state: Any
  output: jax.Array  # [B, ...]


def held(
  make: Callable[[Callable], base.SamplingAlgorithm],
  network: Callable,
  point: Callable[[Any], tuple],
) -> base.SamplingAlgorithm:
  """The sampler make(network), which calls the network ahead: at the state that a step leads to.

  For samplers whose step calls the network once, at point(state). The values of `held_predicted`
  and `held_denoised` read the output, and it is they that count a call for every state reached;
  `one_at_first` counts that of `init`, for the argument `calls` of `particles`.

  Args:
    make: network -> sampler.
    network: as the sampler takes it.
    point: state -> the network's arguments.
  """

  def init(keys, inputs):
    state = make(network).init(keys, inputs)
    return Held(state.step, state, network(*point(state)))

  def step(keys, old):
    state, info = make(lambda *at: old.output).step(keys, old.state)
    return Held(state.step, state, network(*point(state))), info

  return base.SamplingAlgorithm(init, step)


def one_at_first(state: Held) -> jax.Array:
  """The calls of a `held` sampler that values do not count. [B] int32."""
  return jnp.ones_like(state.step)


def several(keys: base.Keys, num: int) -> jax.Array:
  """`num` keys for each of [B], [num, B]."""
  return jax.vmap(lambda n: base.row_keys_at(keys, jnp.full(keys.shape, n)))(jnp.arange(num))


def of_state(value: Callable[[Any], jax.Array]) -> Value:
  """A value that is known of a state without any network: state -> v [B]."""

  def evaluate(keys, state, info):
    del keys, info
    return value(state), jnp.zeros_like(state.step)

  return evaluate


def at_end(reward: Callable[[Any], jax.Array], is_done: Callable[[Any], jax.Array]) -> Value:
  """r where a row is done and 0 before: nothing is known of a state but that it is one's own.

  Args:
    reward: state -> r [B], read where done alone.
    is_done: state -> [B] bool.
  """
  return of_state(lambda state: jnp.where(is_done(state), reward(state), 0))


def raised(value: Value, least: float | jax.Array, is_done: Callable[[Any], jax.Array]) -> Value:
  """max(v, least) before the end, where -inf and NaN are least; v itself where a row is done.

  Args:
    value: v.
    least: as low as what is worth little, on the scale of rewards; scalar or [B].
    is_done: state -> [B] bool.
  """

  def evaluate(keys, state, info):
    values, calls = value(keys, state, info)
    higher = jnp.where(values >= least, values, least)
    return jnp.where(is_done(state), values, higher), calls

  return evaluate


def posterior_mean(reward: Reward, denoised: Denoised) -> Value:
  """r(E[x_0 | x_t]): the reward of what a denoiser sees in the state, one call.

  Below v by Jensen's inequality where exp(r / alpha) is convex, and blurred at much noise.

  Reference: Li et al. 2024 (SVDD-PM), arXiv 2408.08252; Chung et al. 2022, arXiv
    2209.14687.
  """

  def evaluate(keys, state, info):
    del keys
    x, calls = denoised(state, info)
    return reward(x), calls

  return evaluate


def table_denoised(denoise: models.Denoiser, table: tables.SolverTable) -> Denoised:
  """E[x_0 | x_t] of a state of `solvers.tabulated`; the sample itself at the end of the table."""
  point = table_point(table)

  def denoised(state, info):
    del info
    x, time = point(state)
    unfinished = state.step < table.num_rows
    return base.select_rows(unfinished, denoise(x, time).astype(x.dtype), x), _count(unfinished)

  return denoised


def table_point(table: tables.SolverTable) -> Callable[[Any], tuple[jax.Array, jax.Array]]:
  """State of `solvers.tabulated` -> (x, time), where its next step calls the denoiser."""
  times = jnp.asarray(table.times, jnp.float32)
  return lambda state: (state.slots[:, 0], times[jnp.minimum(state.step, table.num_rows - 1)])


def held_denoised(table: tables.SolverTable) -> Denoised:
  """`table_denoised` of a `held` sampler, whose call it is."""

  def denoised(held, info):
    unfinished = held.step < table.num_rows
    x = held.state.slots[:, 0]
    seen = base.select_rows(unfinished, held.output.astype(x.dtype), x)
    return seen, _count(unfinished & (info is not None))

  return denoised


def seen_mean(reward: Reward, table: tables.SolverTable) -> Value:
  """r of the denoised that `solvers.tabulated` went by in its last step, at no call of its own.

  One step behind `posterior_mean`. It is the same for all that comes of one state, so it serves to
  choose among particles, not among candidates. 0 before the first step.

  Reference: Singhal et al. 2025 (FK steering), arXiv 2501.06848.
  """

  def evaluate(keys, state, info):
    del keys
    none = jnp.zeros_like(state.step)
    x = state.slots[:, 0]
    if info is None:
      return none.astype(x.dtype), none
    done = state.step == table.num_rows
    return reward(base.select_rows(done, x, info.denoised.astype(x.dtype))), none

  return evaluate


def predicted(predict: models.Predictor, mask: int) -> Predicted:
  """What is masked in a state with tokens, by a call; the time is the share of masked positions."""

  def ask(state, info):
    del info
    return state.tokens, predict(*tokens_point(mask)(state)), _count(_hidden(state, mask))

  return ask


def tokens_point(mask: int) -> Callable[[Any], tuple[jax.Array, jax.Array]]:
  """State -> (tokens, share of masked positions), for samplers that do not look at the time."""
  return lambda state: (state.tokens, jnp.mean(state.tokens == mask, axis=1))


def held_predicted(mask: int) -> Predicted:
  """`predicted` of a `held` sampler, whose call it is."""

  def read(held, info):
    called = _hidden(held.state, mask) & (info is not None)
    return held.state.tokens, held.output, _count(called)

  return read


def mode(reward: Reward, predicted: Predicted, *, mask: int) -> Value:
  """r of the tokens with every masked position at its likeliest token.

  Args:
    reward: tokens [B, L] -> r [B].
    predicted: asks or reads the network.
    mask: V.

  Reference: Li et al. 2024 (SVDD-PM), arXiv 2408.08252; its code gives r the probabilities.
  """

  def evaluate(keys, state, info):
    del keys
    tokens, logits, calls = predicted(state, info)
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return reward(jnp.where(tokens == mask, likeliest, tokens)), calls

  return evaluate


def completions(
  reward: Reward,
  predicted: Predicted,
  *,
  mask: int,
  num_draws: int,
  temperature: float | jax.Array,
) -> Value:
  """alpha log((1 / n) sum_j exp(r(x_j) / alpha)), x_j ~ prod_i p(x_i | what is not masked).

  One call gives the law that all n draws are made from; only r is computed n times. It is v as n
  grows if positions are independent given the rest, and always with one position left.

  Args:
    reward: tokens [B, L] -> r [B].
    predicted: asks or reads the network.
    mask: V.
    num_draws: n.
    temperature: alpha, above 0 and below inf, scalar or [B].
  """
  rule = "above 0 and below inf"
  logits_lib.require("temperature", temperature, lambda a: 0 < a < float("inf"), rule)

  def evaluate(keys, state, info):
    tokens, logits, calls = predicted(state, info)
    hidden = tokens == mask
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    draws = jax.vmap(lambda keys: masked.draw_each(keys, log_p))(several(keys, num_draws))
    rewards = jax.vmap(lambda drawn: reward(jnp.where(hidden, drawn, tokens)))(draws)
    rewards = jnp.where(rewards < jnp.inf, rewards, -jnp.inf)  # not NaN, which the mean would be
    alpha = jnp.asarray(temperature, jnp.float32).reshape(1, -1)
    mean = jax.nn.logsumexp(rewards / alpha, axis=0) - jnp.log(num_draws)
    return alpha[0] * mean, calls

  return evaluate


def _hidden(state, mask):
  """Rows that something is masked in: the others need no network. [B] bool."""
  return jnp.any(state.tokens == mask, axis=1)


def _count(rows):
  return rows.astype(jnp.int32)
