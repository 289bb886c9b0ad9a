"""Penalties other than reverse KL in DPO: what a log-ratio is worth as a reward.

The policy that maximises E[reward] - beta D_f(pi, pi_ref), D_f = E_ref[f(pi / pi_ref)], has

  reward(x, y) = beta f'(pi / pi_ref) + a constant of x,

so a pair's loss takes f' of log-ratios in place of the log-ratios, and the constant cancels:

  preference.dpo(divergences.forward_kl(c), divergences.forward_kl(r), beta=0.1)

Links are functions [...] -> [...] of x = log(pi / pi_ref), shifted to 0 at 0. The identity is the
link of reverse KL. Reference: Wang et al. 2023 (f-DPO), arXiv 2309.16240.
"""

import jax
import jax.numpy as jnp

# Where e^x goes on as its tangent: e^30 times 1e3 still has a square in float32, as `ipo` needs.
_STEEP = 30.0


def alpha(log_ratio: jax.Array, *, order: jax.Array | float = 0.5) -> jax.Array:
  """(1 - e^(-order x)) / order, [...]: of the alpha-divergence, order in (0, 1).

  Reverse KL is the limit 0 and forward KL is 1. This is the paper's and TRL 0.24's convention; TRL
  1.16's coefficient a is order = 1 - a. An exponent beyond 30 is continued by its tangent, so that
  value and gradient stay finite and the gradient, unlike that of a clip, never 0.

  Args:
    log_ratio: x [...].
    order: not 0.
  """
  exponent = -order * log_ratio.astype(jnp.float32)
  steep = jnp.maximum(exponent - _STEEP, 0)
  return -(jnp.expm1(exponent - steep) + steep * jnp.exp(_STEEP)) / order


def forward_kl(log_ratio: jax.Array) -> jax.Array:
  """1 - e^-x, [...]: f(u) = -log u, with the tangent of `alpha` below x = -30.

  It costs without bound to leave out what the reference says. TRL 1.16 computes inf - inf = NaN for
  pairs whose ratios are both below -88.
  """
  return alpha(log_ratio, order=1.0)


def jensen_shannon(log_ratio: jax.Array) -> jax.Array:
  """log 2 + log sigmoid(x), [...]: bounded above, so no response's reward grows past log 2."""
  return jnp.log(2.0) + jax.nn.log_sigmoid(log_ratio.astype(jnp.float32))
