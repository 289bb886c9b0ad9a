"""Transforms that are told which token was drawn, and steer by how surprising it was.

Surprise is -log2 p(token), in bits; its mean over a text is the text's cross-entropy under the
model, and 2 to that power its perplexity. Mirostat truncates harder after a surprising token and
less after a dull one:

    mu <- mu - eta (S - tau),    mu_0 = 2 tau.

Summed over n tokens, that says what is held and how well, whatever the model does:

    (S_1 + .. + S_n) / n = tau + (mu_0 - mu_n) / (eta n),

so the mean is tau to within mu's range over eta n, as long as mu has a range. It has one where tau
lies between the mean surprise of the likeliest token and that of the law that comes in, untruncated
(its cross-entropy under the model). Outside, everything or all but one token is kept, the mean
stays at that end, and mu runs away by eta |S - tau| a token; it takes as long to come back.

mu is a state [B], so speculation knows that a draw depends on those before. tau = inf turns a row
off exactly.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from . import logits as logits_lib
from . import truncation

_LN2 = 0.6931471805599453


def mirostat(
  tau: float | jax.Array, eta: float | jax.Array = 1.0, m: int = 100
) -> logits_lib.LogitsTransform:
  """Mirostat 1: top-k with the k whose rank has surprise mu if the law is Zipf's; see above.

  The exponent is estimated anew at every token from the m likeliest tokens (`zipf_exponent`), and
  k = `zipf_rank(mu, exponent, N)` with N the number of tokens that are not filtered out already.
  S is the surprise under the model's own law, whatever stands before and after in the chain, as in
  the paper; the law that is estimated and truncated is the one that comes in. The authors' code
  rounds k and adds one; this rounds down to at least 1, as llama.cpp does, so tau near the surprise
  of the likeliest token can be held. A token impossible under the model leaves mu as it is.

  Args:
    tau: the mean surprise aimed at, in bits, at least 0, scalar or [B].
    eta: the gain, at least 0 (0: a fixed truncation), scalar or [B]; 1 in the authors' code.
      Windows of 200 tokens stayed within 0.15 bits of tau at 1, and within 0.28 at 0.1
      (benchmarks/surprise.py, tau from 2 to 6).
    m: tokens that the exponent is estimated from, at least 2, static; 100 in the paper.

  Reference: Basu et al. 2020, arXiv 2007.14966. llama.cpp feeds back another surprise:
  `mirostat_truncated`.
  """
  _require("mirostat", tau, eta, m)
  return _controlled(tau, eta, _zipf_top_k(m), lambda logits, token, mu: _surprise(logits, token))


def mirostat_v2(tau: float | jax.Array, eta: float | jax.Array = 1.0) -> logits_lib.LogitsTransform:
  """Mirostat 2: keeps the tokens with -log2 p <= mu, and always the likeliest; see above.

  p is the law that comes in, and S the surprise under the model's own, as for `mirostat`.

  Args:
    tau: the mean surprise aimed at, in bits, at least 0, scalar or [B].
    eta: the gain, at least 0 (0: a fixed truncation), scalar or [B].

  Reference: Basu et al. 2020, arXiv 2007.14966. llama.cpp feeds back another surprise:
  `mirostat_v2_truncated`.
  """
  _require("mirostat_v2", tau, eta)
  return _controlled(
    tau, eta, _keep_unsurprising, lambda logits, token, mu: _surprise(logits, token)
  )


def mirostat_truncated(
  tau: float | jax.Array,
  eta: float | jax.Array = 0.1,
  temperature: float | jax.Array = 1.0,
  m: int = 100,
  before: logits_lib.LogitsTransform | None = None,
) -> logits_lib.LogitsTransform:
  """Mirostat 1 as llama.cpp has it: S is scored by the tempered and truncated law drawn from.

  That law is renormalised, so its tokens look likelier than the model says, and the text is more
  surprising than tau: tau = 2, 3, 4, 5, 6 gave 3.13, 3.91, 4.70, 5.51, 6.34 bits under the model
  (and `mirostat` tau itself, to 0.02) on the source of benchmarks/surprise.py.

  `before`, then the temperature, then the truncation: this is the whole chain, as in llama.cpp,
  which ignores its other settings. What else stands in a chain with it is not in its S; a token
  that it would not have drawn itself leaves mu as it is. llama.cpp casts k to a 32-bit int, so a
  k beyond 2^31 (a flat law, or mu run away) is undefined there, greedy on x86; here it keeps
  everything.

  Args:
    tau: the mean surprise aimed at, under the truncated law, in bits, at least 0, scalar or [B].
    eta: the gain, at least 0, scalar or [B]; 0.1 in llama.cpp.
    temperature: at least 0, scalar or [B].
    m: tokens that the exponent is estimated from, at least 2, static.
    before: a transform of the logits alone (llama.cpp has its bias there), or None.

  Raises:
    ValueError: a number out of range, or `before` feeds back.

  Reference: llama.cpp, llama_sampler_init_temp then llama_sampler_init_mirostat.
  """
  _require("mirostat_truncated", tau, eta, m)
  return _self_scored(tau, eta, temperature, _zipf_top_k(m), before)


def mirostat_v2_truncated(
  tau: float | jax.Array,
  eta: float | jax.Array = 0.1,
  temperature: float | jax.Array = 1.0,
  before: logits_lib.LogitsTransform | None = None,
) -> logits_lib.LogitsTransform:
  """Mirostat 2 as llama.cpp has it; what `mirostat_truncated` says of S holds here.

  Args:
    tau: the mean surprise aimed at, under the truncated law, in bits, at least 0, scalar or [B].
    eta: the gain, at least 0, scalar or [B]; 0.1 in llama.cpp.
    temperature: at least 0, scalar or [B].
    before: a transform of the logits alone (llama.cpp has its bias there), or None.

  Raises:
    ValueError: a number out of range, or `before` feeds back.

  Reference: llama.cpp, llama_sampler_init_temp then llama_sampler_init_mirostat_v2.
  """
  _require("mirostat_v2_truncated", tau, eta)
  return _self_scored(tau, eta, temperature, _keep_unsurprising, before)


def zipf_exponent(logits: jax.Array, m: int = 100) -> jax.Array:
  """The exponent s of p(i) ~ i^-s, i the rank, from the m likeliest tokens of [B, V], [B, 1].

    s = sum_i t_i b_i / sum_i t_i^2,  b_i = log p(i) / p(i + 1),  t_i = log (i + 1) / i,  i < m,

  which is least squares of b_i = s t_i. Pairs with a filtered token are left out; with no pair
  left, s is 0.

  Reference: Basu et al. 2020, arXiv 2007.14966.
  """
  top = jax.lax.top_k(logits.astype(jnp.float32), min(m, logits.shape[-1]))[0]
  t = jnp.log1p(1 / jnp.arange(1, top.shape[-1], dtype=jnp.float32))[None, :]
  known = top[:, 1:] > -jnp.inf
  b = jnp.where(known, top[:, :-1] - jnp.where(known, top[:, 1:], 0), 0)
  norm = jnp.sum(jnp.where(known, jnp.square(t), 0), axis=-1, keepdims=True)
  return jnp.sum(t * b, axis=-1, keepdims=True) / jnp.where(norm > 0, norm, 1)


def zipf_rank(surprise: jax.Array, exponent: jax.Array, size: jax.Array) -> jax.Array:
  """The last rank k in 1..N whose surprise is at most mu, if the law is Zipf's; at least 1, int32.

    k = ((s - 1) 2^mu / (1 - N^(1 - s)))^(1/s), rounded down,

  from p(k) = k^-s / Z with Z the integral of x^-s over [1, N]. At s = 1, Z = log N, the limit.

  Args:
    surprise: mu, bits.
    exponent: s >= 0. At s = 0 every rank has the same surprise: k is N or 1.
    size: N >= 1; arguments are of one shape.
  """
  s = jnp.clip(exponent, 1e-30, 1e30)
  log_size = jnp.log(size.astype(jnp.float32))
  x = (s - 1) * log_size
  # Z = log N (1 - e^-x) / x: no difference of nearly equal numbers, whatever s.
  ratio = jnp.where(x == 0, 1, -jnp.expm1(-x) / jnp.where(x == 0, 1, x))
  log_rank = (surprise * _LN2 - jnp.log(log_size) - jnp.log(ratio)) / s
  return jnp.clip(jnp.floor(jnp.exp(log_rank)), 1, size).astype(jnp.int32)


Truncate = Callable[[jax.Array, jax.Array], jax.Array]  # logits [B, V], mu [B, 1] -> [B, V]


def _zipf_top_k(m: int) -> Truncate:
  def truncate(logits, mu):
    size = jnp.sum(logits > -jnp.inf, axis=-1, keepdims=True)
    k = zipf_rank(mu, zipf_exponent(logits, m), size)
    return truncation.exact_top_k(k).apply(logits, None, ())

  return truncate


def _keep_unsurprising(logits, mu):
  surprise = -jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1) / _LN2
  likeliest = jnp.argmax(logits, axis=-1, keepdims=True)
  kept = (surprise <= mu) | (jnp.arange(logits.shape[-1])[None, :] == likeliest)
  return jnp.where(kept, logits, -jnp.inf)


def _surprise(logits, token):
  return -logits_lib.log_prob(logits.astype(jnp.float32), token) / _LN2


def _controlled(tau, eta, truncate: Truncate, surprise) -> logits_lib.LogitsTransform:
  """Truncates at mu, and moves mu by surprise(model_logits, token, mu [B]) [B]."""
  tau, eta = jnp.asarray(tau, jnp.float32), jnp.asarray(eta, jnp.float32)

  def update(model_logits, token, mu):
    moved = mu - eta * (surprise(model_logits, token, mu) - tau)
    return jnp.where(jnp.isfinite(moved), moved, mu)

  return logits_lib.LogitsTransform(
    init=lambda batch_size: jnp.broadcast_to(2 * tau, (batch_size,)),
    apply=lambda logits, context, mu: truncate(logits, mu[:, None]),
    update=update,
  )


def _self_scored(tau, eta, temperature, truncate: Truncate, before) -> logits_lib.LogitsTransform:
  """`before`, tempered and truncated, and scored by the outcome."""
  before = logits_lib.chain() if before is None else before
  if jax.tree.leaves(before.init(1)):
    raise ValueError("`before` feeds back: it has to be a transform of the logits alone.")
  temper = logits_lib.chain(before, logits_lib.temperature(temperature))

  def law(logits, mu):
    return truncate(temper.apply(logits, None, ()), mu)

  return _controlled(
    tau, eta, law, lambda logits, token, mu: _surprise(law(logits, mu[:, None]), token)
  )


def _require(name, tau, eta, m=2):
  logits_lib.require(name, tau, lambda tau: tau >= 0, "a target surprise of at least 0 bits")
  logits_lib.require(f"{name}'s eta ", eta, lambda eta: eta >= 0, "at least 0")
  logits_lib.require(f"{name}'s m ", m, lambda m: m >= 2, "at least 2")
