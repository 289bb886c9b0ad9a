"""Guidance of diffusion models: denoisers made of denoisers, which any solver takes.

    pair = guidance.limited(conditional, unconditional, schedule, low=0.3, high=5.0)
    denoise = guidance.guided(pair, guidance.classifier_free(3.0))
    images = solvers.sample(keys, denoise, table, x)

Everything is said of D = E[x_0 | x_t], whatever the network puts out (`precondition` has the
change), and of noise levels sigma / alpha, whatever the solver's grid. Scales may be traced.

A gradient of log p(y | x_t) moves D by sigma^2 / alpha times it, because D = (x_t + sigma^2 grad
log p(x_t)) / alpha (Tweedie), and p(x_t | y) is p(x_t) p(y | x_t) up to a constant. Where no signal
is left, alpha = 0, x_t says nothing of y, the gradient is 0 and its quotient by alpha unknown: such
a row keeps D. Sample from a little below the schedule's last time.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ..models import base as models
from ..models import precondition, schedules

Scale = float | jax.Array  # [] or [B]

# x_t [B, ...], t [B] or [] -> (positive, negative), each E[x_0 | x_t] [B, ...]: what to go towards
# and what away from. One call of a network on a doubled batch can give both.
Pair = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]

# (positive [B, ...], negative [B, ...]) -> guided [B, ...]; positive, where the two are equal
Combine = Callable[[jax.Array, jax.Array], jax.Array]


def both(positive: models.Denoiser, negative: models.Denoiser) -> Pair:
  """The outputs of two denoisers, at two calls of a network an evaluation.

  Classifier-free guidance has the conditional and the unconditional (or that of another prompt).
  Autoguidance has a network and a worse one under the same condition: smaller, or trained less.

  Reference: Ho and Salimans 2022, arXiv 2207.12598; Karras et al. 2024, arXiv 2406.02507.
  """
  return lambda x, t: (positive(x, t), negative(x, t))


def limited(
  positive: models.Denoiser,
  negative: models.Denoiser,
  schedule: schedules.Schedule,
  low: Scale,
  high: Scale,
) -> Pair:
  """`both` where low < sigma / alpha <= high; elsewhere the negative is the positive: no guidance.

  The negative is not run at all while no row is inside. A noise level is the same at any number of
  steps and on any schedule, which a share of the steps is not. 0 and inf are no bounds.

  Reference: Kynkäänniemi et al. 2024, arXiv 2404.07724, whose sigma is sigma / alpha.
  """

  def pair(x, t):
    alpha, sigma = precondition.coefficients(schedule, x, t)
    level = sigma / alpha
    inside = (level > _of_rows(low, x)) & (level <= _of_rows(high, x))
    towards = positive(x, t)
    away = jax.lax.cond(
      jnp.any(inside),
      lambda: jnp.where(inside, negative(x, t).astype(towards.dtype), towards),
      lambda: towards,
    )
    return towards, away

  return pair


def guided(pair: Pair, combine: Combine) -> models.Denoiser:
  """The combined outputs of the pair, as a denoiser."""
  return lambda x, t: combine(*pair(x, t))


def guided_as(
  pair: Pair, combine: Combine, schedule: schedules.Schedule, head: precondition.Head
) -> models.Denoiser:
  """As `guided`, but what is combined is not the denoised but the output of a network of this head.

  For `classifier_free` it is the same. Papers that apply one of the others to a network's output
  are followed to the letter with that network's head. At t = 0 it is NaN, see `precondition`.
  """

  def denoise(x, t):
    at = precondition.coefficients(schedule, x, t)
    output = combine(*(head.from_denoised(x, d, *at) for d in pair(x, t)))
    return head.to_denoised(x, output, *at)

  return denoise


def plus_plus(
  pair: Pair, combine: Combine
) -> Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
  """CFG++: (x_t, t) -> (guided, negative), for tables of two outputs.

  Such a table takes the clean sample from the first and the noise from the second: x_s = alpha_s D
  + sigma_s (x_t - alpha_t D_negative) / sigma_t. The paper's lambda, in [0, 1], is the scale of
  `classifier_free`.

  Reference: Chung et al. 2024, arXiv 2406.08070.
  """

  def outputs(x, t):
    towards, away = pair(x, t)
    return combine(towards, away), away

  return outputs


def classifier_free(scale: Scale) -> Combine:
  """negative + w (positive - negative): 0 gives the negative, 1 the positive, above 1 goes beyond.

  With exact denoisers it is that of density p(x_t) p(c | x_t)^w. Unless w is 0 or 1, these are not
  noised versions of one law of x_0, and samples do not follow p(x_0) p(c | x_0)^w.

  Args:
    scale: w. That of the paper is w - 1.

  Reference: Ho and Salimans 2022, arXiv 2207.12598, eq. 6.
  """
  return lambda positive, negative: negative + _of_rows(scale, positive) * (positive - negative)


def rescaled(combine: Combine, share: Scale) -> Combine:
  """Shrinks what is combined towards the spread of the positive, against over-exposure.

  D (1 + share (std(positive) / std(D) - 1)), std over a row.

  Args:
    combine: gives D.
    share: the paper's phi, in [0, 1]. The paper rescales the network's output: see `guided_as`.

  Reference: Lin et al. 2023, arXiv 2305.08891, eq. 15 and 16.
  """

  def combined(positive, negative):
    denoised = combine(positive, negative)
    spread = lambda x: _root(jnp.var(x, axis=tuple(range(1, x.ndim)), keepdims=True))
    ratio = _ratio(spread(positive), spread(denoised), 1)
    return denoised * (1 + _of_rows(share, denoised) * (ratio - 1))

  return combined


def adaptive_projected(scale: Scale, parallel: Scale = 0.0, radius: Scale = jnp.inf) -> Combine:
  """APG: classifier-free guidance without the part of the difference that saturates.

  The difference d = positive - negative is cut to length `radius`, its part along the positive is
  multiplied by `parallel`, and D = positive + (w - 1) (d_orthogonal + parallel d_along). Parallel 1
  and no radius is `classifier_free`. The paper's momentum needs the differences of earlier steps,
  which a denoiser does not have: it is left out.

  Args:
    scale: w.
    parallel: the paper's eta.
    radius: the paper's r, in the norm over a whole row: it goes with the square root of its size.

  Reference: Sadat et al. 2024, arXiv 2410.02416.
  """

  def combined(positive, negative):
    difference = positive - negative
    square = _inner(difference, difference)
    bound = _of_rows(radius, positive)
    long = square > jnp.square(bound)
    length = jnp.sqrt(jnp.where(long, square, 1))
    difference = difference * jnp.where(long, bound / length, 1)
    along = _ratio(_inner(difference, positive), _inner(positive, positive), 0) * positive
    rest = _of_rows(parallel, positive) - 1
    return positive + (_of_rows(scale, positive) - 1) * (difference + rest * along)

  return combined


def zero_star(scale: Scale) -> Combine:
  """CFG-Zero*: classifier-free guidance from s negative, s = <positive, negative> / |negative|^2.

  s negative is the multiple of the negative that is nearest to the positive. The paper says it of a
  flow's velocities: `guided_as(pair, zero_star(w), schedule, precondition.FLOW)`. Its other half,
  no movement in the first steps, is a matter of the solver's grid.

  Reference: Fan et al. 2025, arXiv 2503.18886.
  """

  def combined(positive, negative):
    nearest = _ratio(_inner(positive, negative), _inner(negative, negative), 0) * negative
    return classifier_free(scale)(positive, nearest)

  return combined


def clipped(denoise: models.Denoiser, low: float, high: float) -> models.Denoiser:
  """D, clipped to the range of the data: static thresholding."""
  return lambda x, t: jnp.clip(denoise(x, t), low, high)


def dynamic_threshold(
  denoise: models.Denoiser, ratio: float = 0.995, limit: float = 1.0
) -> models.Denoiser:
  """Clips each row to s = max(limit, quantile(|D|, ratio)), and scales that to the limit.

  Args:
    denoise: gives D.
    ratio: which quantile of a row's entries, interpolated linearly.
    limit: data are in [-limit, limit].

  Reference: Saharia et al. 2022 (Imagen), arXiv 2205.11487, section 2.3.
  """

  def threshold(x, t):
    denoised = denoise(x, t)
    sizes = jnp.abs(denoised).reshape(denoised.shape[0], -1)
    s = jnp.maximum(jnp.quantile(sizes, ratio, axis=-1), limit)
    s = models.per_row(s, denoised).astype(denoised.dtype)
    return jnp.clip(denoised, -s, s) * (limit / s)

  return threshold


def classifier(
  denoise: models.Denoiser,
  log_prob: Callable[[jax.Array, jax.Array], jax.Array],
  schedule: schedules.Schedule,
  scale: Scale = 1.0,
) -> models.Denoiser:
  """D + w sigma^2 / alpha grad log p(y | x_t): exact at w = 1 if both models are.

  Args:
    denoise: gives D.
    log_prob: (x_t [B, ...], t) -> log p(y | x_t) [B], of noisy data, row by row.
    schedule: of x_t.
    scale: w.

  Reference: Dhariwal and Nichol 2021, arXiv 2105.05233, section 4.2.
  """

  def guide(x, t):
    gradient = jax.grad(lambda x: jnp.sum(log_prob(x, t)))(x)
    return _moved(denoise(x, t), gradient, schedule, x, t, scale)

  return guide


def reward(
  denoise: models.Denoiser,
  reward_fn: Callable[[jax.Array], jax.Array],
  schedule: schedules.Schedule,
  scale: Scale = 1.0,
) -> models.Denoiser:
  """D + w sigma^2 / alpha grad_x r(D(x_t)), through the denoiser: towards p(x_0) exp(w r(x_0)).

  That r(D(x_t)) stands for log E[exp(w r(x_0)) | x_t] / w is an approximation, good at little noise
  alone. With r(D) = -|y - A(D)|^2 / (2 s^2) it is `dps` before its steps are normalised.

  Args:
    denoise: gives D; it is differentiated.
    reward_fn: D [B, ...] -> r [B], row by row.
    schedule: of x_t.
    scale: w.
  """

  def guide(x, t):
    denoised, pullback = jax.vjp(lambda x: denoise(x, t), x)
    (gradient,) = pullback(jax.grad(lambda d: jnp.sum(reward_fn(d)))(denoised))
    return _moved(denoised, gradient, schedule, x, t, scale)

  return guide


def dps(
  denoise: models.Denoiser,
  operator: Callable[[jax.Array], jax.Array],
  y: jax.Array,
  schedule: schedules.Schedule,
  step: Scale = 1.0,
) -> models.Denoiser:
  """Diffusion posterior sampling: D - sigma^2 / alpha zeta / |y - A(D)| grad_x |y - A(D)|^2.

  The step zeta / |y - A(D)| is the paper's, which takes it after each ancestral step, on x_t. As a
  change of D it counts for as much as D does in the solver's step: zeta is not the paper's number.

  Args:
    denoise: gives D; it is differentiated.
    operator: A, x_0 [B, ...] -> [B, ...], row by row; it need not be linear.
    y: the measurements, in a shape that A(D) can be subtracted from.
    schedule: of x_t.
    step: zeta.

  Reference: Chung et al. 2022, arXiv 2209.14687, algorithm 1.
  """

  def closeness(denoised):
    residual = y - operator(denoised)
    return -2 * _root(jnp.sum(jnp.square(residual), axis=tuple(range(1, residual.ndim))))

  return reward(denoise, closeness, schedule, step)


def pigdm(
  denoise: models.Denoiser,
  operator: jax.Array,
  y: jax.Array,
  noise_std: float,
  schedule: schedules.Schedule,
  *,
  data_std: Scale = 1.0,
) -> models.Denoiser:
  """PiGDM: D + sigma^2 / alpha J^T A^T (r^2 A A^T + s^2 I)^-1 (y - A D), J = dD / dx_t.

  For y = A x_0 + s n it takes p(x_0 | x_t) for N(D, r^2 I), r^2 = d^2 sigma^2 / (sigma^2 + alpha^2
  d^2), which is so if x_0 ~ N(mean, d^2 I); then the result is E[x_0 | x_t, y]. For d = 1, r^2 is
  the paper's rho^2 / (1 + rho^2).

  Args:
    denoise: gives D; it is differentiated.
    operator: A [M, N], on a row's N numbers in order. Directions that it does not see are left.
    y: [B, M], or [1, M] for every row.
    noise_std: s, may be 0.
    schedule: of x_t.
    data_std: d.

  Reference: Song et al. 2023, Pseudoinverse-guided diffusion models for inverse problems, ICLR
    (openreview 9_gsMA8MRKQ), section 3.
  """
  times = lambda a, b: jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
  gram, vectors = jnp.linalg.eigh(times(operator, operator.T))
  rounding = jnp.finfo(gram.dtype).eps * gram.shape[0] * jnp.max(gram)
  gram = jnp.where(gram > rounding, gram, 0)

  def guide(x, t):
    denoised, pullback = jax.vjp(lambda x: denoise(x, t), x)
    flat = denoised.reshape(denoised.shape[0], -1)
    alpha, sigma = precondition.coefficients(schedule, flat, t)
    d = _of_rows(data_std, flat)
    r = jnp.square(d * sigma) / (jnp.square(sigma) + jnp.square(alpha * d))  # r^2 [B or 1, 1]
    residual = times(y - times(flat, operator.T), vectors)
    solved = times(residual * _ratio(1.0, r * gram[None] + noise_std**2, 0), vectors.T)
    correction = times(solved, operator)
    (gradient,) = pullback(correction.reshape(denoised.shape).astype(denoised.dtype))
    return _moved(denoised, gradient, schedule, x, t, 1.0)

  return guide


def infilled(denoise: models.Denoiser, mask: jax.Array, known: jax.Array) -> models.Denoiser:
  """D with what is known of x_0 in its place.

  A sampler then ends with the known values. The rest is E[x_0 | x_t], not E[x_0 | x_t, known].

  Args:
    denoise: gives D.
    mask: bool, in a shape that broadcasts to [B, ...], true where x_0 is known.
    known: x_0 there, likewise.

  Reference: Song et al. 2021, arXiv 2011.13456, appendix I.2, replaces x_t instead.
  """

  def guide(x, t):
    denoised = denoise(x, t)
    spread = lambda array: jnp.broadcast_to(array, denoised.shape)
    return jnp.where(spread(mask), spread(known).astype(denoised.dtype), denoised)

  return guide


def _moved(denoised, gradient, schedule, x, t, scale):
  """D + w sigma^2 / alpha gradient, where there is signal."""
  alpha, sigma = precondition.coefficients(schedule, x, t)
  signal = alpha > 0
  step = _of_rows(scale, x) * jnp.square(sigma) / jnp.where(signal, alpha, 1)
  return denoised + jnp.where(signal, step * gradient, 0)


def _of_rows(value, x):
  """A number [] or one per row [B], in a shape that multiplies x [B, ...]."""
  return models.per_row(jnp.asarray(value, x.dtype), x)


def _inner(x, y):
  """Inner products of rows, [B, 1, ...]."""
  return jnp.sum(x * y, axis=tuple(range(1, x.ndim)), keepdims=True)


def _root(x):
  """The square root, of gradient 0 at 0."""
  return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)


def _ratio(numerator, denominator, otherwise):
  """The quotient; what is said where the denominator is 0, its gradients too."""
  some = denominator > 0
  return jnp.where(some, numerator / jnp.where(some, denominator, 1), otherwise)
