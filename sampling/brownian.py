"""Noise that is one Brownian path, however many steps it is cut into.

A solver of a stochastic equation that is given other noise for 20 steps than for 10 makes another
sample. Here a row has one path W, and step i of any grid gets z_i = (W(c_{i+1}) - W(c_i)) /
sqrt(|c_{i+1} - c_i|), c a clock: N(0, 1), independent from step to step, and the steps of a finer
grid add up to those of a coarser. The sample then converges as steps are added.

W is white noise integrated, W(c) = int_0^c dB, and dB is expanded in Haar functions h on every
octave [2^k, 2^(k + 1)): one that is even over the octave, and for each of its halves, quarters, ..
one that changes sign in the middle, each of norm 1 with its own normal number xi_h. Then

  W(c_{i+1}) - W(c_i) = sum_h xi_h int_{c_i}^{c_{i+1}} h,

where the integral vanishes unless h holds one of the two ends or is even over an octave between.
The integrals are computed on the host, in float64; a step draws about two numbers for every bit
to which the clock is resolved, and keeps nothing. Clocks are rounded to so many bits after the
first, so what is computed is exact for the rounded clock: z is standard normal to the last bit.

Reference: Levy's construction; Li et al. 2020, arXiv 2001.01328, section 4 (virtual Brownian tree).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..models import base as models
from ..models import schedules
from . import base

# A clock that starts at 0 goes through infinitely many octaves. Those so far below a step's last
# are less than 2^-24 of its number, and left out.
_DEPTH = 48
_LOWEST, _HIGHEST = -127, 126  # octaves that have a name
_NO_PATH = 2**24 - 1  # the name of the number of steps that are no increment; the least of all


class Increments(NamedTuple):
  """Step i's number is sum_m weights[i, m] xi(nodes[i, m]) over m < counts[i]."""

  nodes: np.ndarray  # [n, M] uint32, names of Haar functions
  weights: np.ndarray  # [n, M], of squares that sum to 1
  counts: np.ndarray  # [n] int32


def clock(schedule: schedules.Schedule, times: np.ndarray, eta: float = 1.0) -> np.ndarray:
  """exp(2 eta lambda(t)), [n + 1]; inf at time 0.

  With the denoised sample held still over a step from s to t, the noise of the reverse equation is

    sigma_t exp(-eta lambda_t) (W(exp(2 eta lambda_t)) - W(exp(2 eta lambda_s))),

  of variance sigma_t^2 (1 - exp(-2 eta (lambda_t - lambda_s))), and a step scales noise before it
  by sigma_t / sigma_s exp(-eta (lambda_t - lambda_s)). So the noise of two steps is that of one.

  Args:
    schedule: of the model.
    times: [n + 1].
    eta: share of the noise, above 0; 1 for DDPM, ancestral sampling and the SDE of DPM-Solver++.

  Raises:
    ValueError: eta is not above 0.

  Reference: Lu et al. 2022 (DPM-Solver++), arXiv 2211.01095, appendix; eta as in Song et al. 2020,
    arXiv 2010.02502.
  """
  if not eta > 0:
    raise ValueError(f"eta={eta}: without noise there is no clock; it has to be above 0.")
  return np.exp(2 * eta * schedules.half_log_snr(schedule, np.asarray(times, np.float64)))


def brownian(
  keys: base.Keys, clock: np.ndarray, *, bits: int = 20
) -> Callable[[base.Keys, jax.Array, jax.Array], jax.Array]:
  """Noise for a solver's steps, from one path per row: (step keys, step [B], x) -> z, as x.

  The keys of the steps are not used. A step of length 0 or to infinity, whose noise a solver
  multiplies by 0, gets a normal number too. A step costs as many normal draws of x's shape as
  its count in `increments` says: 30 to 45 for 20 bits.

  Args:
    keys: [B], of the rows' paths. They may be those of the sampler: what is folded into them here
      is neither a number of a step nor what `base.start` folds in.
    clock: [n + 1], from 0 to inf, rising throughout or falling throughout; from `clock`, or any
      other function of time.
    bits: to how many bits after the first the clock is rounded.

  Raises:
    ValueError: see `increments`.
  """
  nodes, weights, counts = increments(clock, bits)
  nodes, counts = jnp.asarray(nodes), jnp.asarray(counts)
  weights = jnp.asarray(weights, jnp.float32)

  def noise(step_keys, step, x):
    del step_keys

    def add(m, z):
      named = jax.vmap(jax.random.fold_in)(keys, nodes[step, m])
      xi = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], jnp.float32))(named)
      return z + models.per_row(weights[step, m], xi) * xi

    z = jax.lax.fori_loop(0, jnp.max(counts[step]), add, jnp.zeros(x.shape, jnp.float32))
    return z.astype(x.dtype)

  return noise


def increments(clock: np.ndarray, bits: int = 20) -> Increments:
  """What the steps of a clock [n + 1] are made of.

  Raises:
    ValueError: the bits are not within 1 and 24; the clock has a number that is not within 0 and
      2^127 or inf, neither rises nor falls throughout, or takes a step too short for the bits.
  """
  clock = np.asarray(clock, np.float64)
  if not 1 <= bits <= 24:
    raise ValueError(f"bits={bits}: from 1 to 24.")
  fits = (clock >= 0) & ((clock < 2.0 ** (_HIGHEST + 1)) | np.isinf(clock))
  if clock.ndim != 1 or len(clock) < 2 or not np.all(fits):
    raise ValueError("A clock is [n + 1] numbers from 0 to 2^127, or inf, for n >= 1 steps.")
  rises, falls = clock[1:] > clock[:-1], clock[1:] < clock[:-1]
  if np.any(rises) and np.any(falls):
    raise ValueError("A clock has to rise throughout or to fall throughout.")
  places, steps = _places(clock, bits), []
  for i in range(len(clock) - 1):
    low, high = sorted(places[i : i + 2])
    if np.isinf(clock[i : i + 2]).any() or not (rises[i] or falls[i]):
      steps.append({_NO_PATH: 1.0})
    elif low == high:
      raise ValueError(f"Step {i}, {clock[i]} to {clock[i + 1]}, is too short for {bits} bits.")
    else:
      steps.append(_haar(low, high, bits, 1.0 if rises[i] else -1.0))
  nodes = np.zeros((len(steps), max(map(len, steps))), np.uint32)
  weights = np.zeros(nodes.shape)
  for i, parts in enumerate(steps):
    nodes[i, : len(parts)] = list(parts)
    weights[i, : len(parts)] = list(parts.values())
  return Increments(nodes, weights, np.array([len(parts) for parts in steps], np.int32))


def _places(clock, bits):
  """The clock rounded to 2^k (1 + q / 2^bits), as the integers k 2^bits + q."""
  mantissa, exponent = np.frexp(np.where(np.isinf(clock), 1.0, clock))  # c = m 2^e, 1/2 <= m < 1
  places = (exponent - 1) * 2**bits + np.rint((2 * mantissa - 1) * 2**bits).astype(np.int64)
  return np.where(clock < 2.0**_LOWEST, _LOWEST * 2**bits, places).tolist()


def _haar(low, high, bits, sign):
  """The Haar functions' integrals from one place to a higher one, by name, of unit norm."""
  size = 2**bits
  last = (high - 1) // size
  parts = {}
  for octave in range(max(low // size, last - _DEPTH), last + 1):
    unit = 2.0 ** (octave - last)  # of length, times a factor that the norm takes out
    a, b = max(low - octave * size, 0), min(high - octave * size, size)
    name = (octave - _LOWEST + 1) * 2**24
    parts[name] = (b - a) * np.sqrt(unit / size)
    for level in range(bits):
      width = size >> level
      for cell in {end // width for end in (a, b) if end % width}:
        left, middle, right = (cell * width + part * width // 2 for part in range(3))
        rise = max(min(b, middle) - max(a, left), 0) - max(min(b, right) - max(a, middle), 0)
        parts[name + 2**level + cell] = rise * np.sqrt(unit / width)
  norm = sign * np.sqrt(sum(weight**2 for weight in parts.values()))
  return {name: weight / norm for name, weight in parts.items() if weight}
