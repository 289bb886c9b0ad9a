"""How often a rule of `coupling` takes a draft, and how often any rule could.

Probabilities that the token put out at one position is one of its n drafts, over the draws of the
drafts: of each rule in closed form, and of the best rule there is, to report one as a fraction of
the other. Laws are log_q, log_p [..., V], the result is [...]; they are computed in the laws'
precision, float32 or more. At V = 150,000, float32 errs by 3e-7 (the bound without replacement,
by 1e-6); under `jax.enable_x64` the bounds equal the linear program's to 1e-9. The bounds sort the
vocabulary: they are reports, not part of a rule.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from . import coupling


def maximal_acceptance(log_q: jax.Array, log_p: jax.Array) -> jax.Array:
  """sum_v min(p, q) = 1 - TV(p, q), of `maximal_one`, which is the optimum of one draft."""
  return jnp.sum(jnp.exp(jnp.minimum(log_q, log_p)), axis=-1)


def k_sequential_acceptance(log_q: jax.Array, log_p: jax.Array, n: int) -> jax.Array:
  """1 - (1 - b)^n = rho b = sum_v min(p, rho q), of `k_sequential` with n drafts."""
  log_rho = jnp.log(coupling.k_sequential_ratio(log_q, log_p, n))
  return maximal_acceptance(log_q + log_rho[..., None], log_p)


def recursive_rejection_acceptance(log_q: jax.Array, log_p: jax.Array, n: int) -> jax.Array:
  """1 - prod_i sum_v max(p_i - q, 0), of `recursive_rejection` with n drafts."""
  refused = jnp.ones_like(log_p[..., 0])
  for _ in range(n):
    log_left = coupling.log_minus(log_p, log_q)
    refused *= jnp.sum(jnp.exp(log_left), axis=-1)
    log_p = coupling.log_law(log_left)
  return 1 - refused


def sample_and_match_acceptance(log_q: jax.Array, log_p: jax.Array, n: int) -> jax.Array:
  """sum_v p (1 - (1 - q)^n), of `sample_and_match` with n independent drafts."""
  # log(1 - q) is -inf where q is 1, and -n inf is -inf as well.
  return -jnp.sum(jnp.exp(log_p) * jnp.expm1(n * jnp.log1p(-jnp.exp(log_q))), axis=-1)


def acceptance_given(judgement: coupling.Judgement) -> jax.Array:
  """The probability that a draft is taken, given the drafts: 1 - prod_i (1 - accept_i), [...].

  Its mean over draws of the drafts is the acceptance of a rule that has no closed form.
  """
  return 1 - jnp.prod(1 - judgement.accept, axis=-1)


def optimal_acceptance(log_q: jax.Array, log_p: jax.Array, n: int) -> jax.Array:
  """The acceptance of the best rule for n independent drafts of q.

  alpha* = 1 + min_H P(H) - Q(H)^n over sets H of tokens. By duality it is a minimum over all sets,
  and the sets that hold the tokens of largest q / p, as many as one likes, are enough. n = 1 is
  `maximal_acceptance`; otherwise, one sort and two sums.

  Reference: Hu et al. 2025, arXiv 2502.18779.
  """
  if n == 1:
    return maximal_acceptance(log_q, log_p)
  p, q = _by_ratio(log_q, log_p)
  outside = _total_after(q)
  # P(H) + Pr(some draft is outside of H): all terms are positive.
  value = jnp.cumsum(p, axis=-1) - jnp.expm1(n * jnp.log1p(-jnp.minimum(outside, 1)))
  return jnp.minimum(jnp.min(value, axis=-1), 1)


def optimal_acceptance_without_replacement(
  log_q: jax.Array, log_p: jax.Array, n: int, *, num_nodes: int = 64
) -> jax.Array:
  """The acceptance of the best rule for n drafts of q drawn without replacement, in order.

  alpha* = 1 + min_H P(H) - Pr(all drafts are in H), over the same sets as `optimal_acceptance`.
  For two drafts, Pr(one is outside of H) = Qc + sum_{x in H} q_x Qc / (1 - q_x), Qc = Q(not H). For
  more, let token x arrive at the time of an exponential clock of rate q_x: the first n arrivals
  are the drafts. One is outside of H if fewer than n of H come before the first of the others,

    Pr = int_0^inf Qc e^{-Qc t} Pr(N_H(t) < n) dt,

  where N_H(t) counts the arrivals in H, a sum of independent coins of 1 - e^{-q_x t}. The integral
  is the trapezoid rule in log t, between times before which nothing comes and after which n have
  come, and errs by about e^{-pi^2 num_nodes / range}. In float32 the range is about 20, and grows
  as -log of the n-th largest q; float64 asks for more digits, so take 256 nodes there. If q has no
  more than n tokens, all of them are drafts and alpha* = P(q > 0).

  Cost: a sort and 2 num_nodes n V products: at V = 150,000, 0.05 s for n = 2, 0.3 s for 4 and 8, on
  two CPU cores.

  Reference: Hu et al. 2025, arXiv 2502.18779, for the sets; the integral is checked against sums
  over all drafts.
  """
  if n == 1:
    return maximal_acceptance(log_q, log_p)
  p, q = _by_ratio(log_q, log_p)
  all_drafted = jnp.sum(jnp.where(q > 0, p, 0), axis=-1)
  if n >= q.shape[-1]:
    return all_drafted
  outside = _total_after(q)
  if n == 2:
    others = outside + _total_after(q[..., ::-1])[..., ::-1]  # 1 - q, where q is near 1
    odds = jnp.where(others > 0, q / jnp.where(others > 0, others, 1), 0)
    one_outside = outside * (1 + jnp.cumsum(odds, axis=-1))
  else:
    one_outside = _race(q, outside, n, num_nodes)
  best = jnp.minimum(jnp.min(jnp.cumsum(p, axis=-1) + one_outside, axis=-1), 1)
  return jnp.where(jnp.sum(q > 0, axis=-1) <= n, all_drafted, best)


def _by_ratio(log_q, log_p):
  """p and q [..., V], float32 or more, in the order of falling q / p."""
  ratio = jnp.where(log_p > -jnp.inf, log_q - jnp.where(log_p > -jnp.inf, log_p, 0), jnp.inf)
  ratio = jnp.where(log_q > -jnp.inf, ratio, -jnp.inf)
  operands = (-ratio, jnp.exp(log_p), jnp.exp(log_q))
  return jax.lax.sort(operands, dimension=-1, num_keys=1)[1:]


def _total_after(q):
  """The sum of what comes after each token, [..., V]."""
  after = jnp.cumsum(q[..., ::-1], axis=-1)[..., ::-1]
  return jnp.concatenate([after[..., 1:], jnp.zeros_like(after[..., :1])], axis=-1)


def _race(q, outside, n, num_nodes):
  """Pr(one of n drafts is not among the first tokens), for every prefix, [..., V]."""
  one = functools.partial(_race_row, n=n, num_nodes=num_nodes)
  rows = [x.reshape(-1, x.shape[-1]) for x in (q, outside)]
  return jax.lax.map(lambda row: one(*row), tuple(rows)).reshape(q.shape)


def _race_row(q, outside, n, num_nodes):
  width = 1 << (q.size - 1).bit_length() // 2 + 1
  blocked = lambda x: jnp.pad(x, (0, -x.size % width)).reshape(-1, width).T
  times, weights = _nodes(q, n, num_nodes)

  def arrive(carry, q):
    """Adds a token of each block: counts [T, blocks, n] = e^-shift Pr(N = j), j < n."""
    counts, shift = carry
    x = times[:, None] * q[None]
    # Many a token has x < 1e-7, and 1 - x would lose it: e^-x (1, e^x - 1) keeps it.
    light = x < 1
    stays = jnp.where(light, 1, jnp.exp(-x))[..., None]
    comes = jnp.where(light, jnp.expm1(jnp.where(light, x, 0)), -jnp.expm1(-x))[..., None]
    counts = stays * counts + comes * jnp.pad(counts[..., :-1], ((0, 0), (0, 0), (1, 0)))
    return counts, shift + jnp.where(light, x, 0)

  def tally(carry, token):
    q, outside = token
    counts, shift = arrive(carry, q)
    fewer = jnp.sum(counts, axis=-1) * jnp.exp(-shift)
    waiting = outside[None] * jnp.exp(-outside[None] * times[:, None])
    return (counts, shift), jnp.sum(weights[:, None] * waiting * fewer, axis=0)

  def join(counts, block):
    """The count before a block [T, n], and with it: products of polynomials, to degree n - 1."""
    parts = [counts[:, j, None] * jnp.pad(block[:, : n - j], ((0, 0), (j, 0))) for j in range(n)]
    return sum(parts), counts

  columns = blocked(q)
  none = jnp.zeros((num_nodes, n), q.dtype).at[:, 0].set(1)
  empty = jnp.broadcast_to(none[:, None], (num_nodes, columns.shape[1], n))
  shift = jnp.zeros(empty.shape[:2], q.dtype)
  (counts, shift_within), _ = jax.lax.scan(
    lambda carry, q: (arrive(carry, q), None), (empty, shift), columns
  )
  totals = counts * jnp.exp(-shift_within)[..., None]
  _, before = jax.lax.scan(join, none, totals.swapaxes(0, 1))
  tallied = jax.lax.scan(tally, (before.swapaxes(0, 1), shift), (columns, blocked(outside)))[1]
  return tallied.T.reshape(-1)[: q.size]


def _nodes(q, n, num_nodes):
  """Times [T] and weights [T] of the trapezoid rule in log t."""
  eps = jnp.finfo(q.dtype).eps
  least = jnp.maximum(jax.lax.top_k(q, n)[0][-1], 1e-30)
  start, end = np.log(0.1 * eps**0.5), np.log(-1.2 * np.log(eps)) - jnp.log(least)
  step = (end - start) / (num_nodes - 1)
  times = jnp.exp(start + step * jnp.arange(num_nodes, dtype=q.dtype))
  # Before the first node the integrand is Qc t: the rest of the sum is a geometric series.
  weights = (step * times).at[0].divide(-jnp.expm1(-step))
  return times, weights


def optimal_transport(drafts: jax.Array, log_q: jax.Array, log_p: jax.Array) -> coupling.Judgement:
  """The rule that takes one of n independent drafts as often as any can; for small vocabularies.

  A linear program of n V^n unknowns, solved by scipy on the host for each pair of laws it meets.

  Reference: Sun et al. 2023 (SpecTr), arXiv 2310.15141.
  """
  return _transported(drafts, log_q, log_p, replacement=True)


def optimal_transport_without_replacement(
  drafts: jax.Array, log_q: jax.Array, log_p: jax.Array
) -> coupling.Judgement:
  """`optimal_transport` of drafts drawn one after the other, without replacement."""
  return _transported(drafts, log_q, log_p, replacement=False)


def _transported(drafts, log_q, log_p, *, replacement):
  def conditional(drafts, log_q, log_p):
    laws = [np.exp(law.astype(np.float64)).reshape(-1, law.shape[-1]) for law in (log_q, log_p)]
    rows = []
    for row, q, p in zip(drafts.reshape(-1, drafts.shape[-1]), *laws, strict=True):
      plan = _cached_plan(q.tobytes(), p.tobytes(), row.size, replacement) if q.any() else p
      rows.append(plan[tuple(row[: plan.ndim - 1])])
    return np.stack(rows).reshape(log_p.shape).astype(log_p.dtype)

  law = jax.pure_callback(
    lambda *arrays: conditional(*map(np.asarray, arrays)),
    jax.ShapeDtypeStruct(log_p.shape, log_p.dtype),
    *(drafts, log_q, log_p),
    vmap_method="broadcast_all",
  )
  return coupling.matching(drafts, log_q, log_p, jnp.log(law))


@functools.lru_cache(maxsize=256)
def _cached_plan(q, p, n, replacement):
  return transport_plan(np.frombuffer(q), np.frombuffer(p), n, replacement=replacement)[0]


def draft_law(q: np.ndarray, n: int, *, replacement: bool = True) -> np.ndarray:
  """The law [V] * n of n drafts of q [V], float64 on the host, in the order they are drawn.

  Without replacement there are no more drafts than q has tokens: then the law has fewer axes.
  """
  q = np.asarray(q, np.float64)
  law = np.ones(())
  for i in range(n if replacement else min(n, np.count_nonzero(q))):
    left = np.broadcast_to(q, (q.size,) * i + q.shape).copy()
    if not replacement:
      drawn = np.argwhere(np.ones(left.shape[:i]))
      np.put_along_axis(left.reshape(-1, q.size), drawn, 0, axis=1)
    total = left.sum(axis=-1, keepdims=True)
    law = law[..., None] * left / np.where(total > 0, total, 1)
  return law


def transport_plan(
  q: np.ndarray, p: np.ndarray, n: int, *, replacement: bool = True
) -> tuple[np.ndarray, float]:
  """The coupling of the drafts' law with p that maximises Pr(the token is a draft).

  Args:
    q: [V], of the drafts; p: [V], both float64 on the host.
    n: the number of drafts.
    replacement: whether the drafts are independent.

  Returns:
    The law of the token given the drafts, [V] * n + [V] (see `draft_law`), and the maximum.
  """
  from scipy import optimize, sparse  # of the tests' requirements, not of the package's

  law = draft_law(q, n, replacement=replacement)
  drafts, given = np.argwhere(law > 0), law[law > 0]
  rows, tokens = np.unique([(r, v) for r, row in enumerate(drafts) for v in row], axis=0).T
  row_sums, token_sums = (
    sparse.coo_matrix((np.ones(rows.size), (index, np.arange(rows.size))), (size, rows.size))
    for index, size in ((rows, len(drafts)), (tokens, len(p)))
  )
  solved = optimize.linprog(
    -np.ones(rows.size),
    A_ub=sparse.vstack([row_sums, token_sums]).tocsr(),
    b_ub=np.concatenate([given, p]),
    options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
  )
  plan = np.zeros((len(drafts), len(p)))
  plan[rows, tokens] = np.maximum(solved.x, 0)
  # What is left of either side is coupled independently: no draft can be met any more.
  missing = np.maximum(given - plan.sum(axis=1), 0)
  wanted = np.maximum(p - plan.sum(axis=0), 0)
  plan += missing[:, None] * wanted / max(wanted.sum(), np.finfo(float).tiny)
  conditional = np.broadcast_to(p, (*law.shape, len(p))).copy()
  conditional[law > 0] = plan / plan.sum(axis=1, keepdims=True)
  return conditional, float(-solved.fun)
