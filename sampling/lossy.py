"""Rules that accept more drafts than the target's law allows, and how far from it they end.

They are `coupling.Rule`s of one draft, for `coupling.chain`. What they give up is known exactly:
`departure` is the total variation between the law of what a rule puts out and the target's, at one
position; a text of L tokens may depart by up to the sum over its positions. Report it with any
result that a lossy rule had a part in.
"""

import jax
import jax.numpy as jnp

from . import coupling, logits


def ensemble(weight: float | jax.Array) -> coupling.Rule:
  """The maximal coupling with w p + (1 - w) q in place of p, which departs by (1 - w) TV(p, q).

  Args:
    weight: w in [0, 1]; 1 is `coupling.maximal_one`, 0 takes every draft.

  Raises:
    ValueError: a weight outside of [0, 1].

  Reference: transformers' `assistant_ensemble_weight`; arXiv 2604.07622 learns the weight.
  """
  logits.require("ensemble", weight, lambda w: 0 <= w <= 1, "from 0 to 1")

  def rule(drafts, log_q, log_p):
    w = jnp.asarray(weight, log_p.dtype)
    mixture = jnp.logaddexp(jnp.log(w) + log_p, jnp.log1p(-w) + log_q)
    # Where there is no draft, q is no law and p itself is drawn.
    some = jnp.any(log_q > -jnp.inf, axis=-1, keepdims=True)
    return coupling.maximal_one(drafts, log_q, jnp.where(some, mixture, log_p))

  return rule


def typical(epsilon: float = 0.3, delta: float = 0.09) -> coupling.Rule:
  """Takes a draft x if p(x) > min(epsilon, delta e^-H(p)); otherwise p itself is drawn.

  Args:
    epsilon: the most that is asked of p(x).
    delta: less is asked where the target is unsure; the authors' choice is epsilon^2.

  Reference: Cai et al. 2024 (Medusa), arXiv 2401.10774, section 3.3.2.
  """
  logits.require("typical epsilon", epsilon, lambda e: e >= 0, "at least 0")
  logits.require("typical delta", delta, lambda d: d >= 0, "at least 0")

  def rule(drafts, log_q, log_p):
    possible = log_p > -jnp.inf
    spread = jnp.where(possible, jnp.exp(log_p) * jnp.where(possible, log_p, 0), 0)
    entropy = -jnp.sum(spread, axis=-1, keepdims=True)
    asked = jnp.minimum(epsilon, delta * jnp.exp(-entropy))
    taken = jnp.exp(jnp.take_along_axis(log_p, drafts, axis=-1)) > asked
    drawn = jnp.take_along_axis(log_q, drafts, axis=-1) > -jnp.inf
    return coupling.Judgement((taken & drawn).astype(log_p.dtype), log_p)

  return rule


def output_law(rule: coupling.Rule, log_q: jax.Array, log_p: jax.Array) -> jax.Array:
  """The law [V] of the token that a rule of one draft puts out: sum_x q(x) Pr(token | x).

  Of one position, by going through every draft.
  """

  def given(x):
    judged = rule(x[None], log_q, log_p)
    q, accept = jnp.exp(log_q[x]), judged.accept[0]
    return q * accept, q * (1 - accept) * jnp.exp(coupling.log_law(judged.residual))

  def add(total, x):
    taken, other = given(x)
    return total.at[x].add(taken) + other, None

  return jax.lax.scan(add, jnp.zeros_like(log_p), jnp.arange(log_p.size))[0]


def departure(rule: coupling.Rule, log_q: jax.Array, log_p: jax.Array) -> jax.Array:
  """TV(what the rule puts out, p) at one position, []; 0 of a lossless rule.

  Args:
    rule: of one draft.
    log_q: [V].
    log_p: [V].
  """
  return 0.5 * jnp.sum(jnp.abs(output_law(rule, log_q, log_p) - jnp.exp(log_p)))
