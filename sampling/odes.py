"""The probability flow, solved to a tolerance; its inverse; and the exact likelihood.

With y = x / sqrt(alpha^2 + sigma^2) and lambda = log(alpha / sigma), every schedule has the same
flow, that of the variance-preserving a^2 = 1 / (1 + exp(-2 lambda)):

  dy / dlambda = a (D - a y),    D = E[x_0 | x_t].

From d(x / alpha) / d(sigma / alpha) = (x - alpha D) / sigma: with u = x / alpha that is
du / dlambda = D - u, and y = a u, da / dlambda = a (1 - a^2). Nothing is divided by a small number,
and y is of the size of noise or of data, so that an absolute tolerance means something throughout.

Every row has its own steps. An error shared by the batch, as adaptive solvers elsewhere have it,
makes a sample depend on its neighbours. (On the size of the batch it may still depend, within the
tolerance, as far as programs for other sizes round otherwise.)
"""

from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from ..models import base as models
from ..models import schedules
from . import base

# (lambda [], y [B, ...]) -> dy / dlambda [B, ...]
Field = Callable[[jax.Array, jax.Array], jax.Array]

# In lambda. Where a is small nothing happens, steps grow, and the error of one that leaps over the
# sample's decision between modes goes unseen; steps of at most 1 prevent it.
_FIRST_STEP, _LONGEST_STEP = 0.01, 1.0


def probability_flow(denoise: models.Denoiser, schedule: schedules.Schedule) -> Field:
  """dy / dlambda = a (D - a y), D = denoise(sqrt(alpha^2 + sigma^2) y, t).

  Reference: Song et al. 2021, arXiv 2011.13456, eq. 13, in the coordinates above.
  """

  def field(half_log_snr, y):
    t = schedule.time(half_log_snr)
    denoised = denoise(_scale(schedule, t) * y, t)
    a = jnp.exp(0.5 * jax.nn.log_sigmoid(2 * half_log_snr))
    return a * (denoised - a * y)

  return field


def solve(
  denoise: Callable[..., jax.Array],
  schedule: schedules.Schedule,
  x: jax.Array,
  start: float,
  end: float,
  *,
  rtol: float = 1e-5,
  atol: float = 1e-5,
  solver: diffrax.AbstractAdaptiveSolver | None = None,
  max_steps: int = 4096,
  condition: Any = None,
) -> tuple[jax.Array, jax.Array]:
  """The flow from time `start` to time `end`: sampling, or encoding if the end is the later.

  Args:
    denoise: (x_t [1, ...], t []) -> E[x_0 | x_t], of one row; with a condition, it is the third
      argument.
    schedule: of the model.
    x: [B, ...], at time `start`.
    start: with some signal and some noise.
    end: likewise; D at the end is the sample without noise.
    rtol: relative tolerance of a step's error, of a row's root mean square.
    atol: absolute tolerance likewise, of x / sqrt(alpha^2 + sigma^2).
    solver: explicit Runge-Kutta, by default of order 5.
    max_steps: taken or refused.
    condition: what else a row's model is given: a pytree, leaves [B, ...], cut to [1, ...].

  Returns:
    x [B, ...] at the end, NaN in rows that were not there after `max_steps`, and the evaluations
    [B] that each row took.

  Raises:
    ValueError: a time that is not within 0 and the schedule's last, or has no signal or noise.
  """
  ends = _half_log_snrs(schedule, start, end)
  integrate = _integrator(ends, solver, rtol, atol, max_steps)
  first, last = (float(_scale(schedule, np.float64(t))) for t in (start, end))

  def row(x, condition):
    field = probability_flow(_given(denoise, condition), schedule)
    y, count = integrate(field, x[None] / first)
    return y[0] * last, count

  return jax.vmap(row)(x, jax.tree.map(lambda leaf: leaf[:, None], condition))


def log_likelihood(
  denoise: Callable[..., jax.Array],
  schedule: schedules.Schedule,
  x: jax.Array,
  *,
  start: float | None = None,
  end: float,
  probes: jax.Array | None = None,
  prior_log_prob: Callable[[jax.Array], jax.Array] | None = None,
  rtol: float = 1e-5,
  atol: float = 1e-5,
  solver: diffrax.AbstractAdaptiveSolver | None = None,
  max_steps: int = 4096,
  condition: Any = None,
) -> tuple[jax.Array, jax.Array]:
  """log p(x) in nats, p being the law at time `end` of what the flow makes of noise.

    log p(y_end) = log p(y_start) - int div f dlambda, from start to end, f = dy / dlambda,

  and log p(x) = log p(y) - d log sqrt(alpha^2 + sigma^2), of d numbers. It is of x_end, which still
  has noise sigma(end): of data, take a small `end`.

  Args:
    denoise, schedule, rtol, atol, solver, max_steps, condition: see `solve`; the error is that of y
      and of the logarithm.
    x: [B, ...], at time `end`.
    start: where noise is drawn, by default the schedule's last time; with some signal.
    end: below `start`, with some noise.
    probes: [B, P, ...], for an estimate of the divergence, mean_p v . J v: unbiased for v of
      covariance I, `rademacher` for one. It costs P products with the Jacobian an evaluation. By
      default the divergence is exact, by d of them.
    prior_log_prob: x [...] -> [], the logarithm of the law at `start`; by default
      N(0, sigma(start)^2 I), what samplers start from. Noised data have another law, which is
      KL = alpha^2 |E x_0|^2 / (2 sigma^2) nats away, up to the fourth power of alpha / sigma.

  Returns:
    [B], NaN as in `solve`, and the evaluations [B] that each row took.

  Raises:
    ValueError: as `solve`.

  Reference: Song et al. 2021, arXiv 2011.13456, eq. 39 and 40; Grathwohl et al. 2018, arXiv
    1810.01367.
  """
  start = schedule.max_time if start is None else start
  integrate = _integrator(_half_log_snrs(schedule, end, start), solver, rtol, atol, max_steps)
  first, last = (float(_scale(schedule, np.float64(t))) for t in (end, start))
  if prior_log_prob is None:
    prior_log_prob = _normal_log_prob(float(schedule.sigma(np.float64(start))))

  def row(x, probes, condition):
    field = probability_flow(_given(denoise, condition), schedule)
    if probes is None:
      directions = jnp.eye(x.size, dtype=x.dtype).reshape(x.size, 1, *x.shape)
    else:
      directions = probes[:, None] / np.sqrt(len(probes))

    def augmented(half_log_snr, state):
      value, product = jax.linearize(lambda y: field(half_log_snr, y), state[0])
      return value, jnp.sum(directions * jax.vmap(product)(directions))

    begin = x[None] / first, jnp.zeros((), x.dtype)
    (y, gained), count = integrate(augmented, begin)
    return prior_log_prob(y[0] * last) + gained + x.size * np.log(last / first), count

  return jax.vmap(row)(x, probes, jax.tree.map(lambda leaf: leaf[:, None], condition))


def rademacher(
  keys: base.Keys, num_probes: int, shape: tuple[int, ...], dtype: Any = jnp.float32
) -> jax.Array:
  """Signs [B, num_probes, *shape]: Hutchinson's probes, one set a row, kept along its flow."""
  draw = lambda key: jax.random.rademacher(key, (num_probes, *shape), dtype)
  return jax.vmap(draw)(keys)


def _integrator(ends, solver, rtol, atol, max_steps):
  """(field, state) -> the state at the end, NaN if it is not reached, and the evaluations."""
  solver = diffrax.Tsit5() if solver is None else solver
  stages = solver.tableau.num_stages
  first_step = float(np.copysign(_FIRST_STEP, ends[1] - ends[0]))

  def integrate(field, state):
    solution = diffrax.diffeqsolve(
      diffrax.ODETerm(lambda half_log_snr, state, args: field(half_log_snr, state)),
      solver,
      *ends,
      first_step,
      state,
      stepsize_controller=diffrax.PIDController(rtol, atol, dtmax=_LONGEST_STEP),
      max_steps=max_steps,
      throw=False,
    )
    arrived = solution.result == diffrax.RESULTS.successful
    state = jax.tree.map(lambda leaf: jnp.where(arrived, leaf[0], jnp.nan), solution.ys)
    steps = solution.stats["num_steps"]
    # The last stage of a step is the first of the next, in solvers that have it so.
    return state, steps * (stages - 1) + 1 if solver.tableau.fsal else steps * stages

  return integrate


def _given(denoise, condition):
  return denoise if condition is None else lambda x, t: denoise(x, t, condition)


def _scale(schedule, t):
  return (schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2) ** 0.5


def _normal_log_prob(std):
  def log_prob(x):
    return -0.5 * jnp.sum((x / std) ** 2) - x.size * np.log(std * np.sqrt(2 * np.pi))

  return log_prob


def _half_log_snrs(schedule, *times):
  """lambda at both ends, in float64."""
  times = np.array(times, np.float64)
  if np.all((times > 0) & (times <= schedule.max_time * (1 + 1e-12))) and times[0] != times[1]:
    values = schedules.half_log_snr(schedule, times)
    if np.all(np.isfinite(values)):
      return values.tolist()
  raise ValueError(
    f"The flow goes between two times in (0, {schedule.max_time}] that have some signal left, not "
    f"from {times[0]} to {times[1]}."
  )
