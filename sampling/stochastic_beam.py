"""Beams that sample: exactly without replacement, and as transformers does.

algorithm = stochastic_beam.stochastic_beam_search(model, params, num_beams=8, ...)
beams = beam.search(keys, algorithm, prompts)
"""

from typing import Any

import jax
import jax.numpy as jnp

from ..models import base as models
from . import base, beam


def stochastic_beam_search(
  model: models.LanguageModel, params: models.Params, **settings: Any
) -> base.SamplingAlgorithm:
  """Draws K sequences without replacement: the first from p, each next from p without those before.

  Let every sequence y have G_y = log p(y) + a Gumbel number. The K largest, in order, are that
  draw. The largest G of the sequences that begin with a prefix is Gumbel too, about the prefix's
  log-probability, so it can be drawn from the root down: children draw theirs given that the
  largest is their parent's. No more than K - 1 prefixes can be above a prefix of one of the K
  largest, so beam search by G finds them all, and the law is exact.

  The score is G_y, so `beam.search` returns the draw in its order. One beam draws by the law of
  `decode.generate`. If fewer than K sequences have positive probability, all are returned.
  `log_weights` is for expectations.

  Args:
    model: the model.
    params: its parameters.
    **settings: those of `beam.beam_search` but length_penalty.

  Reference: Kool et al. 2019, arXiv 1903.06059, algorithm 1.
  """

  def expand(keys, priority, log_prob, log_p, taken):
    del taken
    total = log_prob[:, :, None] + log_p
    given = _given_maximum(total + _gumbel(keys, total.shape[1:]), priority[:, :, None])
    return given, given

  ranking = beam.Ranking(lambda keys: _gumbel(keys, ()), expand)
  return beam.beam_search(model, params, ranking=ranking, length_penalty=0.0, **settings)


def beam_sample(
  model: models.LanguageModel, params: models.Params, **settings: Any
) -> base.SamplingAlgorithm:
  """Beam search over candidates drawn anew at each step: transformers' do_sample with beams.

  At least 2 K candidates are drawn without replacement by their probability as prefixes; the first
  K drawn may finish, and the K likeliest that do not end run on. For parity: its sequences follow
  no stated law, where those of `stochastic_beam_search` do.

  Args:
    model: the model.
    params: its parameters.
    **settings: those of `beam.beam_search`.
  """

  def expand(keys, priority, log_prob, log_p, taken):
    total, _ = beam.likeliest(keys, priority, log_prob, log_p, taken)
    return total + _gumbel(keys, total.shape[1:]), total

  return beam.beam_search(model, params, ranking=beam.Ranking(beam.at_zero, expand), **settings)


def log_weights(beams: beam.Beams) -> jax.Array:
  """Log-weights [B, K - 1] of all draws of `stochastic_beam_search` but the last.

    E sum_k exp(log_weights[k]) f(y_k) = sum_y p(y) f(y)   for every f:

  given the last score c, y is among the others with probability q = 1 - exp(-exp(log p(y) - c)),
  and weighs p(y) / q. Dividing by the sum of weights trades their variance for a little bias.

  Reference: Kool et al. 2019, arXiv 1903.06059, section 4.
  """
  log_prob, threshold = beams.log_prob[:, :-1], beams.score[:, -1:]
  drawn, last = log_prob > -jnp.inf, threshold > -jnp.inf
  # Without a last sequence there is no threshold, and all are certain to be among the others.
  log_rate = jnp.where(drawn & last, log_prob - jnp.where(last, threshold, 0.0), jnp.inf)
  return jnp.where(drawn, log_prob - _log1mexp(-jnp.exp(log_rate)), -jnp.inf)


def _gumbel(keys, shape):
  return jax.vmap(lambda key: jax.random.gumbel(key, shape, mode="high"))(keys)


def _log1mexp(x):
  """log(1 - exp(x)) for x <= 0."""
  near = x > -0.6931472
  large = jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x)))
  return jnp.where(near, jnp.log(-jnp.expm1(jnp.where(near, x, -1.0))), large)


def _given_maximum(values, maximum):
  """Gumbel variables [..., V] moved to where the largest is `maximum` [..., 1].

  -log(exp(-maximum) - exp(-largest) + exp(-values)) keeps their order, and their law given that;
  in a form that does not overflow.
  """
  alive = values > -jnp.inf
  largest = jnp.max(values, axis=-1, keepdims=True)
  values, largest = (jnp.where(x > -jnp.inf, x, 0.0) for x in (values, largest))
  v = maximum - values + _log1mexp(jnp.minimum(values - largest, 0.0))
  moved = maximum - jnp.maximum(v, 0.0) - jnp.log1p(jnp.exp(-jnp.abs(v)))
  return jnp.where(alive, moved, -jnp.inf)
