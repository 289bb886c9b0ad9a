"""What tests of masked diffusion share: a predictor of no one law, and its bound by enumeration."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from ancestral.models import base, mask_schedules
from ancestral.models import masked as masked_models

V, L = 3, 4
SCHEDULES = {
  "linear": mask_schedules.linear(),
  "square": mask_schedules.polynomial(2.0),
  "root": mask_schedules.polynomial(0.5),
  "cosine": mask_schedules.cosine(),
  "geometric": mask_schedules.geometric(),
}
PLACES = jnp.asarray((V + 1) ** np.arange(L), jnp.int32)
TABLE = jnp.asarray(np.random.default_rng(0).normal(size=((V + 1) ** L, L, V + 1)), jnp.float32)
ROW = jnp.array([2, 0, 1, 1])
ALL = np.ones(L, bool)
PART = np.array([False, True, True, True])  # the first token is a prompt


def lookup():
  """A model whose logits are a parameter for each pattern of tokens and masks: of no one law."""

  def trunk(params, x, cache=None, *, positions=None, mask=None, key=None):
    which = jnp.sum(jnp.argmax(x, axis=-1) * PLACES[None], axis=1)
    return params[which], cache

  return base.LanguageModel(
    init=lambda key, tokens: TABLE,
    init_cache=lambda *sizes: None,
    embed=lambda params, tokens: jax.nn.one_hot(tokens, V + 1),
    trunk=trunk,
    readout=lambda params, hidden: hidden,
  )


MODEL = lookup()
PREDICT = masked_models.predictor(MODEL, TABLE)


def subsets(learned):
  """All sets of masks [n, L] but the empty one."""
  places = np.flatnonzero(learned)
  sets = [
    np.isin(np.arange(L), s)
    for k in range(1, len(places) + 1)
    for s in itertools.combinations(places, k)
  ]
  return np.array(sets)


@jax.jit
def costs(params, sets, t=None):
  """The summed cross-entropy of what is masked, for every set of masks of ROW, [n]."""
  predict = masked_models.predictor(MODEL, params) if t is None else told(params)
  logits = predict(jnp.where(sets, V, ROW[None]), jnp.zeros(len(sets)) if t is None else t)
  log_p = jax.nn.log_softmax(logits, axis=-1)
  own = jnp.take_along_axis(log_p, jnp.broadcast_to(ROW, sets.shape)[..., None], axis=-1)[..., 0]
  return -jnp.sum(jnp.where(sets, own, 0), axis=1)


def told(params):
  """A predictor that looks at the time."""
  predict = masked_models.predictor(MODEL, params)
  return lambda tokens, t: predict(tokens, t) * (0.5 + base.per_row(t, jnp.zeros((1, 1, 1))))


def enumerated(params, learned):
  """The bound, sum over sets of m masks of (m - 1)! (N - m)! / N! times their cross-entropy."""
  sets = subsets(learned)
  size, most = sets.sum(axis=1), int(np.sum(learned))
  weights = [1 / (m * math.comb(most, m)) for m in size]
  return jnp.sum(jnp.asarray(weights, jnp.float32) * costs(params, sets))


def quadrature(num=120, power=6):
  """Nodes and weights on (0, 1), dense near 0 where rates are large."""
  nodes, weights = np.polynomial.legendre.leggauss(num)
  u = (nodes + 1) / 2
  return u**power, weights / 2 * power * u ** (power - 1)


def batch(num, learned=ALL):
  return {
    "tokens": jnp.broadcast_to(ROW[None], (num, L)),
    "mask": jnp.broadcast_to(jnp.asarray(learned, jnp.float32)[None], (num, L)),
  }


def near(samples, expected):
  """The mean of independent samples is within 4 standard errors."""
  samples = np.asarray(samples, np.float64)
  error = samples.std(axis=0) / math.sqrt(len(samples))
  assert np.all(np.abs(samples.mean(axis=0) - expected) <= 4 * error + 1e-6)
