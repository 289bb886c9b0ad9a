"""Training of light Schroedinger bridges; see `models.bridges`."""

import jax
import jax.numpy as jnp

from ..models import bridges
from . import step


def unpaired(log_normaliser: jax.Array, log_potential: jax.Array) -> jax.Array:
  """log c(x_0) - log v(x_1), whose mean is the relative entropy from the true plan, and a constant.

  With log pi(x_1 | x_0) = x_0' x_1 / eps + log v(x_1) - log c(x_0) and pi* the bridge's plan,

    KL(pi* || pi) = E log pi*(x_1 | x_0) - E x_0' x_1 / eps + E log c(x_0) - E log v(x_1),

  all under pi*. Only the last two terms depend on v, and each on one marginal: so x_0 ~ p0 and
  x_1 ~ p1 need not be pairs of pi*, nor pairs at all. The mean can be negative.

  Args:
    log_normaliser: log c(x_0), [...].
    log_potential: log v(x_1), [...].

  Reference: Korotin et al. 2023, arXiv 2310.01174, proposition 3.1; Mokrov et al. 2023, arXiv
    2304.06094.
  """
  return log_normaliser - log_potential


def light_bridge_loss(eps: float) -> step.LossFn:
  """`unpaired` of a `bridges.LightBridge`, the params.

  The batch has `start` and `end`, [B, D], independent draws of p0 and p1. Every row weighs 1; no
  metrics.

  Args:
    eps: of the bridge, above 0.

  Raises:
    ValueError: eps is not above 0.
  """
  if not eps > 0:
    raise ValueError(f"eps={eps}: it has to be above 0.")

  def loss(key, params, batch):
    del key
    losses = unpaired(
      bridges.log_normaliser(params, batch["start"], eps),
      bridges.log_potential(params, batch["end"], eps),
    )
    return (losses, jnp.ones_like(losses)), {}

  return loss
