"""Few-step samplers of discrete diffusion, learned from a many-step one: LSD and LSD+.

    steps = fit_coefficients(key, predict, noise, jumps.euler_law(noise), times, setting)
    sampler = jumps.euler(predict, noise, steps.times, coefficients=steps.coefficients)

A student of K steps scales the scores s by Phi_k at step k. Teacher and student start from the same
x_1 and draw apart from one another; what is matched is the teacher's score s* at the student's
times, || s* - Phi_k s ||^2. The draws of tokens have no gradient and none is made up for them: the
states are constants of the loss, which reaches Phi_k through the product alone, and a coefficient
acts on the later ones only by where the next paths go. The network is not trained.

So Phi_k is a slope of regression, of the score at the teacher's state on that at the student's.
`best_steps` is the yardstick: the steps whose law is nearest to the true one, on tiny problems.

Reference: Fu, Guo and Liu 2025 (LSD), arXiv 2509.19962.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize

from ..evaluation import exact_laws
from ..models import base as models
from ..sampling import base, jumps, noises


class Setting(NamedTuple):
  """Sizes of a fit."""

  length: int  # L
  batch_size: int = 256  # pairs of paths a step
  num_updates: int = 200
  teacher_steps: int = 16  # for each of the student's
  perturbed: int = 0  # positions of the student's x_1 that differ from the teacher's
  learning_rate: float = 0.03


def score_loss(coefficients: jax.Array, student: jax.Array, teacher: jax.Array) -> jax.Array:
  """sum_k E || s*_k - Phi_k s_k ||^2 / E || s*_k ||^2, eq. 6 with the squared distance.

  The division does not move the minimum of any Phi_k and makes one learning rate fit all: near
  t = 0 scores are V / t times those near 1. That minimum is E s*.s / E s.s.

  Args:
    coefficients: [K].
    student: scores [K, B, L, M].
    teacher: the same at the teacher's states.
  """
  return jnp.sum(_mismatch(coefficients, student, teacher))


def width_loss(widths: jax.Array, student: jax.Array, teacher: jax.Array) -> jax.Array:
  """sum_k E || kappa_k s_k - s*_k sum(kappa) / K ||^2 / E || s*_k ||^2 (sum(kappa) / K)^2; eq. 8.

  What the student does in its step should be what the teacher does meanwhile. The paper has the
  teacher's own step (T - epsilon) / N in place of the mean of the student's K steps, N / K times as
  much: as printed, every kappa_k is drawn to the teacher's step and the student would end at
  t = 1 - K / N. The widths here add up to what they do, and only their ratios are learned.

  Args:
    widths: [K], above 0.
    student: scores [K, B, L, M] at the student's times.
    teacher: the same at the teacher's states at K evenly spaced times.
  """
  return jnp.sum(_mismatch(widths / jnp.mean(widths), student, teacher))


def fit_coefficients(
  key: jax.Array,
  predict: models.Predictor,
  noise: noises.Noise,
  law: jumps.Law,
  times: jax.Array,
  setting: Setting,
) -> jumps.Steps:
  """LSD: coefficients for given times, by Adam on `score_loss`, new paths at every update.

  Args:
    key: of all paths.
    predict: (tokens [B, L], t [B]) -> logits [B, L, V]; the teacher's and the student's.
    noise: the kind of noise.
    law: of both. The paper's are Euler's and Tweedie's, `jumps.posterior_law`.
    times: [K + 1] of the student.
    setting: sizes.

  Reference: Fu, Guo and Liu 2025, arXiv 2509.19962, algorithm 2 and eq. 10.
  """
  fine = refined(times, setting.teacher_steps)

  def loss(coefficients, paths_key):
    student, teacher = _paths(paths_key, noise, setting)
    scores = _scores(*student, predict, noise, law, times, jax.lax.stop_gradient(coefficients))
    aim = _scores(*teacher, predict, noise, law, fine)[:: setting.teacher_steps]
    return score_loss(coefficients, scores, aim)

  start = jnp.ones(times.shape[0] - 1)
  return jumps.Steps(times, _descended(key, loss, start, setting))


def fit_times(
  key: jax.Array,
  predict: models.Predictor,
  noise: noises.Noise,
  law: jumps.Law,
  times: jax.Array,
  setting: Setting,
) -> jax.Array:
  """LSD+: times [K + 1] between the first and the last of those given, by `width_loss`.

  The teacher is cached at the given times, as in the paper. `fit_coefficients` on what comes out is
  LSD+ as a whole.
  """
  fine = refined(times, setting.teacher_steps)

  def loss(logits, paths_key):
    student, teacher = _paths(paths_key, noise, setting)
    at = jax.lax.stop_gradient(times_of(logits, times))
    scores = _scores(*student, predict, noise, law, at)
    aim = _scores(*teacher, predict, noise, law, fine)[:: setting.teacher_steps]
    return width_loss(jax.nn.softmax(logits), scores, aim)

  return times_of(_descended(key, loss, jnp.log(-jnp.diff(times)), setting), times)


def fit_moves(
  key: jax.Array,
  predict: models.Predictor,
  noise: noises.Noise,
  law: jumps.Law,
  times: jax.Array,
  setting: Setting,
) -> jumps.Steps:
  """Coefficients under which the teacher's moves are likeliest; what LSD leaves out.

  Of a teacher's path at the student's times, the loss is -E sum_k log law_k(x*_(k+1) | x*_k), with
  a gradient in every coefficient and none through a draw. Up to a constant it is the KL of the
  teacher's path to the student's, an upper bound of that of their samples. Both sides begin every
  step in one state, so nothing shrinks.

  Reference: the bound, for times: Park et al. 2025 (Jump your steps), arXiv 2410.07761.
  """
  fine = refined(times, setting.teacher_steps)
  num_steps = times.shape[0] - 1
  ones = jnp.ones(setting.batch_size)

  def loss(logs, paths_key):
    path = _path(*_paths(paths_key, noise, setting)[1], predict, noise, law, fine)
    path = path[:: setting.teacher_steps]

    def surprise(k, here, there):
      p = jax.nn.softmax(predict(here, times[k] * ones), axis=-1)
      step = times[k] * ones, times[k + 1] * ones, jnp.exp(logs[k]) * ones
      made = jumps.moved(noise, law, p, here, step, (k == num_steps - 1) * ones > 0)
      chance = jnp.take_along_axis(made, there[:, :, None], axis=-1)
      return -jnp.mean(jnp.sum(jnp.log(jnp.maximum(chance, 1e-9)), axis=(1, 2)))

    return jnp.sum(jax.vmap(surprise)(jnp.arange(num_steps), path[:-1], path[1:]))

  return jumps.Steps(times, jnp.exp(_descended(key, loss, jnp.zeros(num_steps), setting)))


def best_steps(
  predict: models.Predictor,
  noise: noises.Noise,
  law: jumps.Law,
  steps: jumps.Steps,
  target: jax.Array,
  *,
  learn_coefficients: bool = True,
  learn_times: bool = True,
  max_iterations: int = 60,
) -> jumps.Steps:
  """The steps whose exact law has the least KL(law || target) nearby, by L-BFGS from `steps`.

  What no distillation can be better than, with these degrees of freedom, up to local minima.

  Args:
    predict: the predictor.
    noise: the kind of noise.
    law: how a position moves.
    steps: where to begin; the first and the last time stay.
    target: the true law, [V] * L.
    learn_coefficients: whether these move.
    learn_times: whether these do.
    max_iterations: of L-BFGS.
  """
  given, num = jnp.asarray(steps.times, jnp.float32), steps.coefficients.shape[0]

  def at(free):
    scales = jnp.exp(free[:num]) * steps.coefficients
    times = times_of(jnp.log(-jnp.diff(given)) + free[num:], given)
    return jumps.Steps(
      times if learn_times else given, scales if learn_coefficients else steps.coefficients
    )

  def loss(free):
    law_of = exact_laws.sampler_law(predict, noise, law, at(free), target.ndim)
    return exact_laws.kl(law_of, target)

  value_and_grad = jax.jit(jax.value_and_grad(loss))

  def objective(free):
    value, grad = value_and_grad(jnp.asarray(free, jnp.float32))
    return float(value), np.asarray(grad, np.float64)

  found = scipy.optimize.minimize(
    objective,
    np.zeros(2 * num),
    jac=True,
    method="L-BFGS-B",
    bounds=[(-3, 3)] * (2 * num),
    options={"maxiter": max_iterations},
  )
  return jax.tree.map(np.asarray, at(jnp.asarray(found.x, jnp.float32)))


def times_of(logits: jax.Array, times: jax.Array) -> jax.Array:
  """Times [K + 1] from times[0] to times[-1], in steps as wide as softmax(logits [K]) says."""
  share = jnp.concatenate([jnp.zeros(1), jnp.cumsum(jax.nn.softmax(logits))[:-1], jnp.ones(1)])
  return times[0] + (times[-1] - times[0]) * share


def refined(times: jax.Array, num: int) -> jax.Array:
  """Every step cut into `num` equal ones, [K num + 1]."""
  share = jnp.arange(num) / num
  inner = times[:-1, None] + jnp.diff(times)[:, None] * share[None]
  return jnp.append(inner.reshape(-1), times[-1])


def _mismatch(scales, student, teacher):
  """[K]."""
  axes = (1, 2, 3)
  off = teacher - scales[:, None, None, None] * student
  size = jnp.mean(teacher**2, axis=axes)
  return jnp.mean(off**2, axis=axes) / jnp.where(size > 0, size, 1)


def _paths(key, noise, setting):
  """(keys, tokens) of the student and of the teacher: one x_1 but for what is perturbed."""
  prior_key, student_key, teacher_key, where_key, token_key = jax.random.split(key, 5)
  requests = jnp.arange(setting.batch_size)
  empty = jnp.full((setting.batch_size, setting.length), noise.vocab_size, jnp.int32)
  tokens = noise.prior(base.row_keys(prior_key, requests), empty)
  order = jax.vmap(lambda key: jax.random.permutation(key, setting.length))(
    base.row_keys(where_key, requests)
  )
  shift = jax.random.randint(token_key, tokens.shape, 1, noise.num_states, jnp.int32)
  other = (tokens + shift) % noise.num_states
  perturbed = jnp.where(order < setting.perturbed, other, tokens)
  return (
    (base.row_keys(student_key, requests), perturbed),
    (base.row_keys(teacher_key, requests), tokens),
  )


def _scores(keys, tokens, predict, noise, law, times, coefficients=None):
  """The scores along paths from tokens, [K, B, L, M], as constants."""
  sampler = jumps.factorised(predict, noise, law, times, coefficients=coefficients)
  return _observed(keys, tokens, sampler, times, lambda state, info: info.scores)


def _path(keys, tokens, predict, noise, law, times):
  """The states of a path from tokens, [K + 1, B, L], as constants."""
  sampler = jumps.factorised(predict, noise, law, times)
  seen = _observed(keys, tokens, sampler, times, lambda state, info: state.tokens)
  return jnp.concatenate([tokens[None], seen])


def _observed(keys, tokens, sampler, times, observe):
  """What `observe` sees of each step from tokens [B, L], none of them given; constants."""
  none = jnp.zeros(tokens.shape[:1], jnp.int32)
  state = jumps.State(none, tokens, none, jnp.ones(tokens.shape, bool))
  seen = base.run(keys, sampler, state, times.shape[0] - 1, observe)[1]
  return jax.lax.stop_gradient(seen)


def _descended(key: jax.Array, loss: Callable, start: jax.Array, setting: Setting) -> jax.Array:
  """Adam, its rate falling to 0 by a cosine, from `start`; in one program."""
  rate = optax.cosine_decay_schedule(setting.learning_rate, setting.num_updates)
  optimizer = optax.adam(rate)

  def update(carry, update_key):
    values, state = carry
    updates, state = optimizer.update(jax.grad(loss)(values, update_key), state)
    return (optax.apply_updates(values, updates), state), None

  def descend(key):
    keys = jax.random.split(key, setting.num_updates)
    return jax.lax.scan(update, (start, optimizer.init(start)), keys)[0][0]

  return jax.jit(descend)(key)
