"""Truncations: transforms that keep some of the likeliest tokens, by one rule or another.

A rule gives a set of tokens; the others become -inf, and those kept are unchanged. A row with a
finite logit keeps one; a row of -inf stays as it is. What came in as -inf counts for nothing:
0 log 0 = 0.

Ties. `top_k` and `typical` keep all that tie with their last token, as transformers does. The
other rules that keep a prefix of the descending order (`exact_top_k`, `top_p`, `top_h`,
`top_h_partial`) keep, of equals, as many as it takes, and those of lowest index. Rules with a
threshold of probability treat equals alike.

Rounding. Sums over the vocabulary are float32, with errors of about 1e-7: a prefix that meets its
bound to that accuracy may end a token earlier or later. The settings that turn a rule off return
the logits bit by bit. Nothing is sorted; see `_search`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from . import logits as logits_lib

Enough = Callable[..., jax.Array]  # (kept [B, N] bool, *values [B, N]) -> [B, 1] bool

_WIDTH, _BLOCKS = 64, 256  # the blocks of tokens in which `_search` looks first
_NOTHING = 0x007FFFFF  # -inf, by _ordered


def _keeping(keep: Callable[[jax.Array], jax.Array]) -> logits_lib.LogitsTransform:
  """Filters all but keep(logits [B, V] float32), [B, V] bool."""

  def apply(logits):
    return jnp.where(keep(jax.lax.stop_gradient(logits.astype(jnp.float32))), logits, -jnp.inf)

  return logits_lib.stateless(apply)


def top_k(k: int | jax.Array) -> logits_lib.LogitsTransform:
  """Keeps the tokens at least as likely as the k-th most likely one.

  Ties with the k-th are all kept (as transformers and vLLM do), so more than k may be left;
  `exact_top_k` keeps k. A k of V or more keeps everything.

  Args:
    k: at least 1, scalar or [B].

  Reference: Fan et al. 2018, arXiv 1805.04833.
  """
  enough = _count("top_k", k)
  return _keeping(lambda logits: _at_least(logits, enough))


def exact_top_k(k: int | jax.Array) -> logits_lib.LogitsTransform:
  """Keeps the k most likely tokens; of equals, those of lowest index.

  What llama.cpp and the samplers built on `lax.top_k` do. A k of V or more keeps everything.

  Args:
    k: at least 1, scalar or [B].
  """
  enough = _count("exact_top_k", k)
  return _keeping(lambda logits: jnp.logical_or(*_prefix(logits, enough)))


def _count(name: str, k: int | jax.Array) -> Enough:
  logits_lib.require(name, k, lambda k: k >= 1, "at least 1; to keep everything, leave it out")
  least = jnp.maximum(logits_lib.per_row(k), 1)
  return lambda kept: jnp.sum(kept, axis=-1, keepdims=True) >= least


def _mass(least: jax.Array) -> Enough:
  return lambda kept, probability: _total(kept, probability) >= least


def _total(kept, values):
  return jnp.sum(jnp.where(kept, values, 0), axis=-1, keepdims=True)


def top_p(p: float | jax.Array) -> logits_lib.LogitsTransform:
  """Nucleus sampling: keeps the fewest most likely tokens whose probability reaches p.

  The token that crosses p is kept, so at least one always is. A p of 1 keeps everything.

  Args:
    p: in (0, 1], scalar or [B].

  Reference: Holtzman et al. 2019, arXiv 1904.09751, equations 2 and 3.
  """
  logits_lib.require("top_p", p, lambda p: 0 < p <= 1, "in (0, 1]")
  p = jnp.maximum(_float(p), jnp.finfo(jnp.float32).tiny)

  def keep(logits):
    before, last = _prefix(logits, _mass(p), jax.nn.softmax(logits, axis=-1))
    return before | last | (p >= 1)

  return _keeping(keep)


def min_p(p: float | jax.Array) -> logits_lib.LogitsTransform:
  """Keeps the tokens at least p times as likely as the most likely one.

  Args:
    p: in [0, 1], scalar or [B]; 0 keeps everything, 1 what ties with the most likely.

  Reference: Nguyen et al. 2024, arXiv 2407.01082.
  """
  logits_lib.require("min_p", p, lambda p: 0 <= p <= 1, "in [0, 1]")
  least = jnp.log(_float(p))
  return _keeping(lambda logits: logits - jnp.max(logits, axis=-1, keepdims=True) >= least)


def typical(mass: float | jax.Array) -> logits_lib.LogitsTransform:
  """Keeps the fewest tokens of most typical surprise that have this mass.

  In the order of |-log p(v) - H(p)|, smallest first, the tokens up to the one whose mass reaches
  `mass`, and all that tie with it: of a uniform law, everything, as no token is more typical.
  transformers keeps the ties too; llama.cpp keeps some of them.

  Args:
    mass: in (0, 1], scalar or [B]; 1 keeps everything.

  Reference: Meister et al. 2022, arXiv 2202.00666.
  """
  logits_lib.require("typical", mass, lambda mass: 0 < mass <= 1, "in (0, 1]")
  mass = jnp.maximum(_float(mass), jnp.finfo(jnp.float32).tiny)

  def keep(logits):
    log_p = jax.nn.log_softmax(logits, axis=-1)
    closeness = -jnp.abs(-log_p - logits_lib.entropy(logits))
    return _at_least(closeness, _mass(mass), jnp.exp(log_p)) | (mass >= 1)

  return _keeping(keep)


def epsilon(cutoff: float | jax.Array) -> logits_lib.LogitsTransform:
  """Keeps the tokens of at least this probability, and the most likely one.

  Args:
    cutoff: in [0, 1), scalar or [B]; 0 keeps everything.

  Reference: Hewitt et al. 2022, arXiv 2210.15191.
  """
  logits_lib.require("epsilon", cutoff, lambda cutoff: 0 <= cutoff < 1, "in [0, 1)")
  return _keeping(lambda logits: _likely(logits, _float(cutoff)))


def eta(cutoff: float | jax.Array) -> logits_lib.LogitsTransform:
  """Keeps the tokens of p(v) >= min(c, sqrt(c) exp(-H(p))), and the most likely one.

  Args:
    cutoff: c in [0, 1), scalar or [B]; 0 keeps everything.

  Reference: Hewitt et al. 2022, arXiv 2210.15191.
  """
  logits_lib.require("eta", cutoff, lambda cutoff: 0 <= cutoff < 1, "in [0, 1)")
  c = _float(cutoff)

  def keep(logits):
    return _likely(logits, jnp.minimum(c, jnp.sqrt(c) * jnp.exp(-logits_lib.entropy(logits))))

  return _keeping(keep)


def _likely(logits, least):
  most = jnp.max(logits, axis=-1, keepdims=True)
  return (jax.nn.softmax(logits, axis=-1) >= least) | (logits == most)


def top_h(alpha: float | jax.Array) -> logits_lib.LogitsTransform:
  """Keeps the most tokens, the likeliest first, whose own law has H(q) <= alpha H(p).

  q is p restricted to the tokens kept and renormalised. A further token of share e <= 1 / (k + 1)
  takes the entropy H_k <= log k of a prefix to h(e) + (1 - e) H_k, h the binary entropy, and
  h(e) >= e log(k + 1) >= e H_k: along the order entropy does not fall, so bisection finds the
  longest prefix. (The bound is met to 1 part in 10^6, lest a uniform law, of H_k = log k, hang on
  the last bit.) It need not be the set of most mass under the bound, which is NP-hard to find.

  The authors' code and transformers' TopHLogitsWarper apply another rule: `top_h_partial`.

  Args:
    alpha: in (0, 1], scalar or [B]; 1 keeps everything.

  Reference: Potraghloo et al. 2025, arXiv 2509.02510.
  """
  logits_lib.require("top_h", alpha, lambda alpha: 0 < alpha <= 1, "in (0, 1]")
  alpha = _float(alpha)

  def keep(logits):
    bound = alpha * logits_lib.entropy(logits) * (1 + 1e-6)
    below = jnp.maximum(logits - jnp.max(logits, axis=-1, keepdims=True), -200)  # exp(-200) is 0
    weight = jnp.exp(below)

    def exceeds(kept, weight, weighted):
      total = jnp.maximum(_total(kept, weight), 1e-30)
      return jnp.log(total) - _total(kept, weighted) / total > bound

    return _within(logits, exceeds, weight, weight * below) | (alpha >= 1)

  return _keeping(keep)


def top_h_partial(alpha: float | jax.Array, top_n: int | jax.Array = 100):
  """Top-H as its authors' code has it: keeps tokens while their share of the entropy allows.

  Of the top_n most likely tokens, with their law p renormalised, the longest prefix S with
  -sum_S p log p <= alpha H(p): a partial sum, not the entropy of what is kept. Of a uniform law
  over 100 and alpha = 0.4 it keeps 40 tokens, of entropy 0.80 H(p); `top_h` keeps 6.

  Args:
    alpha: in (0, 1], scalar or [B]; 1 keeps the top_n.
    top_n: at least 1, scalar or [B]; V or more considers everything.

  Reference: github.com/ErfanBaghaei/Top-H-Decoding; transformers' TopHLogitsWarper.
  """
  logits_lib.require("top_h_partial", alpha, lambda alpha: 0 < alpha <= 1, "in (0, 1]")
  alpha = _float(alpha)

  def keep(logits):
    bound = alpha * logits_lib.entropy(logits)
    log_p = jnp.maximum(jax.nn.log_softmax(logits, axis=-1), -200)
    p = jnp.exp(log_p)
    share = -p * log_p
    exceeds = lambda kept, p, share: _total(kept, share) > bound
    return _within(logits, exceeds, p, share) | (alpha >= 1)

  return logits_lib.chain(exact_top_k(top_n), _keeping(keep))


def _within(logits, exceeds, weight, value):
  """The longest prefix of weight that does not exceed; the first token in any case."""
  before, last = _prefix(logits, exceeds, weight, value)
  return jnp.where(jnp.any(before, axis=-1, keepdims=True), before & (weight > 0), last)


def top_n_sigma(n: float | jax.Array) -> logits_lib.LogitsTransform:
  """Keeps the logits within n standard deviations of the largest one.

  z(v) >= max z - n std(z), of the finite logits, divided by their number. The set does not depend
  on a temperature before it.

  Args:
    n: at least 0, scalar or [B]; 0 keeps what ties with the largest (in llama.cpp everything),
      infinity everything.

  Reference: Tang et al. 2024, arXiv 2411.07641.
  """
  logits_lib.require("top_n_sigma", n, lambda n: n >= 0, "at least 0")
  n = _float(n)

  def keep(logits):
    finite = logits > -jnp.inf
    count = jnp.sum(finite, axis=-1, keepdims=True)
    most = jnp.max(logits, axis=-1, keepdims=True)
    below = jnp.where(finite, logits - most, 0)
    mean = jnp.sum(below, axis=-1, keepdims=True) / count
    variance = _total(finite, jnp.square(below - mean)) / count
    return (logits - most >= -n * jnp.sqrt(variance)) | (n == jnp.inf)

  return _keeping(keep)


def xtc(
  probability: float | jax.Array,
  threshold: float | jax.Array = 0.1,
  then: logits_lib.LogitsTransform | None = None,
) -> logits_lib.LogitsTransform:
  """Exclude top choices, as the law it draws from: (1 - p_x) p + p_x q.

  q is p without the tokens of at least `threshold` but the least likely of them (of equals, the
  one of highest index), renormalised. llama.cpp tosses a coin of probability p_x at each token and
  draws from q or p; here the coin is summed out, so no key is needed and log-probabilities are
  those of the draw.

  Args:
    probability: p_x in [0, 1], scalar or [B]; 0 changes nothing.
    threshold: at least 0, scalar or [B]; above 0.5 nothing is excluded.
    then: what the caller runs after the coin, applied to p and q apart: a mixture does not commute
      with a temperature or a truncation, and llama.cpp runs its temperature last.

  Reference: p-e-w 2024, github.com/oobabooga/text-generation-webui/pull/6335; llama.cpp.
  """
  logits_lib.require("xtc", probability, lambda p: 0 <= p <= 1, "in [0, 1]")
  logits_lib.require("xtc", threshold, lambda t: t >= 0, "at least 0")
  then = logits_lib.chain() if then is None else then
  p_x, threshold = _float(probability), _float(threshold)

  def apply(logits, context, state):
    excluded = _top_choices(logits, threshold)
    p = then.apply(logits, context, state)
    q = then.apply(jnp.where(excluded, -jnp.inf, logits), context, state)
    mixture = jnp.logaddexp(
      jnp.log1p(-p_x) + jax.nn.log_softmax(p, axis=-1),
      jnp.log(p_x) + jax.nn.log_softmax(q, axis=-1),
    )
    return jnp.where((p_x > 0) & jnp.any(excluded, axis=-1, keepdims=True), mixture, p)

  return logits_lib.LogitsTransform(then.init, apply, then.update)


def _top_choices(logits, threshold):
  """The tokens of at least this probability but the least likely of them."""
  p = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
  above = (p >= threshold) & (logits > -jnp.inf)
  least = jnp.min(jnp.where(above, logits, jnp.inf), axis=-1, keepdims=True)
  index = jnp.arange(logits.shape[-1])[None, :]
  last = jnp.max(jnp.where(above & (logits == least), index, -1), axis=-1, keepdims=True)
  return above & (index != last)


def _float(value):
  return logits_lib.per_row(value).astype(jnp.float32)


def _at_least(scores: jax.Array, enough: Enough, *values: jax.Array) -> jax.Array:
  """{v : scores[v] >= c} for the largest c whose set is `enough`; everything if none is."""
  (c,) = _search(lambda *near: (_threshold(enough, *near),), scores, values)
  return _ordered(scores) >= c


def _prefix(scores: jax.Array, enough: Enough, *values: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The shortest prefix that is `enough`, in descending order, of equals lowest index first.

  Two masks [B, V]: the tokens before its last, and the last; if no prefix is enough, everything
  and nothing.
  """
  size = scores.shape[-1]
  c, last = _search(lambda *near: _position(enough, size, *near), scores, values)
  ordered, index = _ordered(scores), jnp.arange(size)[None, :]
  tied = ordered == c
  return (ordered > c) | (tied & (index < last)), tied & (index == last)


def _search(locate: Callable, scores: jax.Array, values: tuple[jax.Array, ...]) -> tuple:
  """locate(scores, index, *values), all [B, V], from few of the tokens where they suffice.

  They are the _BLOCKS blocks with the largest scores. If the threshold c that `locate` returns
  first lies above all that is left out, they hold every token of the prefix; if it does not, the
  row is searched in full. A row's answer does not depend on the others.
  """
  size = scores.shape[-1]
  index = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
  if size <= 2 * _WIDTH * _BLOCKS:
    return locate(scores, index, *values)
  padding = ((0, 0), (0, -size % _WIDTH))
  blocks = jnp.pad(scores, padding, constant_values=-jnp.inf).reshape(len(scores), -1, _WIDTH)
  best, block = jax.lax.top_k(jnp.max(blocks, axis=-1), _BLOCKS + 1)
  near = (block[:, :-1, None] * _WIDTH + jnp.arange(_WIDTH)[None, None, :]).reshape(len(scores), -1)
  take = lambda x, fill: jnp.take_along_axis(x, near, axis=1, mode="fill", fill_value=fill)
  found = locate(take(scores, -jnp.inf), near, *(take(value, 0) for value in values))
  rest = _ordered(best[:, -1:])
  settled = (found[0] > rest) | (rest <= _NOTHING)

  def search_all():
    full = locate(scores, index, *values)
    return tuple(jnp.where(settled, a, b) for a, b in zip(found, full, strict=True))

  return jax.lax.cond(jnp.all(settled), lambda: found, search_all)


def _ordered(scores):
  """uint32 in the order of the floats, with -0.0 equal to 0.0."""
  bits = jax.lax.bitcast_convert_type(jnp.where(scores == 0, 0, scores), jnp.uint32)
  sign = jnp.uint32(1 << 31)
  return jnp.where(bits >= sign, ~bits, bits | sign)


def _threshold(enough, scores, index, *values):
  """The largest c, [B, 1] uint32, with enough(_ordered(scores) >= c), or 0: 32 reads of them."""
  del index
  ordered = _ordered(scores)

  def set_bit(i, c):
    candidate = c | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
    return jnp.where(enough(ordered >= candidate, *values), candidate, c)

  return jax.lax.fori_loop(0, 32, set_bit, jnp.zeros((len(scores), 1), jnp.uint32))


def _position(enough, size, scores, index, *values):
  """(c, i), [B, 1]: the last token of the shortest prefix that is enough has score c and index i.

  Where several tokens have score c, a second bisection, over the index, says how many it takes.
  """
  bits = (size - 1).bit_length()
  c = _threshold(enough, scores, index, *values)
  ordered = _ordered(scores)
  above, tied = ordered > c, ordered == c

  def first_of_equals():
    def set_bit(b, i):
      candidate = i | (jnp.int32(1 << bits >> 1) >> b)
      return jnp.where(enough(above | (tied & (index < candidate)), *values), i, candidate)

    return jax.lax.fori_loop(0, bits, set_bit, jnp.zeros_like(c, jnp.int32))

  crowded = (jnp.sum(tied, axis=-1, keepdims=True) > 1) & (c > _NOTHING)
  only = jnp.max(jnp.where(tied, index, 0), axis=-1, keepdims=True)
  return c, jax.lax.cond(jnp.any(crowded), first_of_equals, lambda: only)
