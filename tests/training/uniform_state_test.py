"""Uniform-state diffusion's bounds against sums over paths, and the formulas of two papers."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.models import mask_schedules, toy_discrete
from ancestral.sampling import noises
from ancestral.training import uniform_state, weightings

V, L = 3, 2
RNG = np.random.default_rng(0)
LINEAR, COSINE = mask_schedules.linear(), mask_schedules.cosine()
EVERY = toy_discrete.sequences(V, L)
LAW = RNG.dirichlet(np.ones(V**L)).reshape(V, V)
SLOPES = jnp.asarray(RNG.normal(size=(2, V**L, L, V)), jnp.float32)
CODES = jnp.asarray(V ** np.arange(L)[::-1], jnp.int32)
HEADS = {"posterior": uniform_state.posterior, "leave_one_out": uniform_state.leave_one_out}


def free_model(params, tokens, t, key):
  """Logits that are parameters, linear in time: a network of no one law."""
  del key
  which = jnp.sum(tokens * CODES[None], axis=1)
  return params[0][which] + t[:, None, None] * params[1][which]


def _kernel(kept):
  """[V, V], from row to column."""
  return kept * np.eye(V) + (1 - kept) / V


def _log_prior(head, params, t, alpha):
  """log pi [V^L, L, V] at every x_t, float32."""
  times, alphas = jnp.full(V**L, t), jnp.full(V**L, alpha)
  logits = free_model(params, jnp.asarray(EVERY), times, None)
  return jax.nn.log_softmax(head(logits, jnp.asarray(EVERY), alphas), axis=-1)


def _posterior_probs(head_name, params, t, alpha):
  """p(x_0 at i | x_t) at every x_t in float64, from the network's logits by Bayes, [V^L, L, V]."""
  logits = np.asarray(free_model(params, jnp.asarray(EVERY), jnp.full(V**L, t), None), np.float64)
  p = np.exp(logits)
  if head_name == "leave_one_out":
    p *= np.swapaxes(_kernel(alpha)[:, EVERY], 0, 2).swapaxes(0, 1)  # q(x_t at i | v)
  return p / p.sum(axis=-1, keepdims=True)


def _reverse(p, alpha_t, alpha_s):
  """p(x_s | x_t) [V^L, V^L] of positions that move apart: sum_v p(v) q(x_s | x_t, v)."""
  moves = np.zeros((V**L, L, V))
  between = _kernel(alpha_t / alpha_s)
  for n, x in enumerate(EVERY):
    for i in range(L):
      for v in range(V):
        joint = _kernel(alpha_s)[v] * between[:, x[i]]
        moves[n, i] += p[n, i, v] * joint / joint.sum()
  rows = [[math.prod(moves[n, i, y[i]] for i in range(L)) for y in EVERY] for n in range(V**L)]
  return np.array(rows)


def _path_bound(head_name, params, schedule, times, x):
  """E_q log q(x_1 .. x_T | x_0) / p(x_0 .. x_T), over all paths, forward kernels and all."""
  alphas = np.asarray(schedule.alpha(jnp.asarray(times)), np.float64)
  reverse = [
    _reverse(_posterior_probs(head_name, params, t, alpha), alpha, below)
    for (t, alpha), below in zip(zip(times, alphas, strict=True), alphas[1:], strict=False)
  ]
  start = next(n for n, y in enumerate(EVERY) if np.array_equal(x, y))
  forward = []  # from the end: x_0 to x_{T-1}, ... in the order of falling times
  for above, below in itertools.pairwise(alphas):
    one = _kernel(above / below)
    rows = [[math.prod(one[a[i], b[i]] for i in range(L)) for b in EVERY] for a in EVERY]
    forward.append(np.array(rows))
  total = 0.0
  for path in itertools.product(range(V**L), repeat=len(times) - 1):  # at times[0] .. times[-2]
    states = (*path, start)
    q = math.prod(forward[k][states[k + 1], states[k]] for k in range(len(path)))
    p = V**-L * math.prod(reverse[k][states[k], states[k + 1]] for k in range(len(path)))
    total += q * math.log(q / p) if q else 0
  return total


def _expected(objective, schedule, head, params, x, nodes, weights):
  """The loss's mean over all x_t and the given quantiles, as its own parts make it, [] float32."""
  tokens, clean = jnp.asarray(EVERY), jnp.broadcast_to(jnp.asarray(x)[None], (V**L, L))

  def at(place):
    node, weight = place
    t, s = objective.times(jnp.full(V**L, node))
    alpha = schedule.alpha(t)
    chance = math.prod(alpha * (EVERY[:, i] == x[i]) + (1 - alpha) / V for i in range(L))
    log_prior = jax.nn.log_softmax(head(free_model(params, tokens, t, None), tokens, alpha))
    return weight * jnp.sum(chance * objective.loss(log_prior, clean, tokens, t, s).sum(axis=1))

  return jnp.sum(jax.lax.map(at, tuple(jnp.asarray(a, jnp.float32) for a in (nodes, weights))))


def _nodes(num=60, power=3):
  u, w = np.polynomial.legendre.leggauss(num)
  u = (u + 1) / 2
  return u**power, w / 2 * power * u ** (power - 1)


def test_the_two_laws_follow_from_each_other_and_from_the_joint():
  alpha = 0.6
  noisy = np.asarray(toy_discrete.uniform_noised(jnp.asarray(LAW, jnp.float32), alpha))
  tokens, alphas = jnp.asarray(EVERY), jnp.full(V**L, alpha)
  t = LINEAR.time(jnp.float32(alpha))
  exact = toy_discrete.uniform_predictor(jnp.asarray(LAW, jnp.float32), LINEAR)(tokens, t)
  others = uniform_state.posterior(exact, tokens, alphas)
  prior = np.asarray(jax.nn.softmax(others, axis=-1))
  for n, (x, y) in enumerate(EVERY):
    first = LAW @ _kernel(alpha)[:, y]  # p(x_0 at 0, the other noisy one)
    second = LAW.T @ _kernel(alpha)[:, x]
    np.testing.assert_allclose(prior[n, 0], first / first.sum(), atol=1e-5)
    np.testing.assert_allclose(prior[n, 1], second / second.sum(), atol=1e-5)
  back = jax.nn.log_softmax(uniform_state.with_own(others, tokens, alphas), axis=-1)
  np.testing.assert_allclose(back, exact, atol=1e-5)
  # and the ratios are those of the noised law
  log_prior = jax.nn.log_softmax(others, axis=-1)
  scores = np.exp(uniform_state.log_scores(log_prior, tokens, alphas))
  for n, (x, y) in enumerate(EVERY):
    np.testing.assert_allclose(scores[n, 0], noisy[:, y] / noisy[x, y], rtol=2e-5)
    np.testing.assert_allclose(scores[n, 1], noisy[x] / noisy[x, y], rtol=2e-5)


@pytest.mark.parametrize("alpha", [1e-6, 0.3, 0.9])
def test_scores_and_steps_are_the_samplers(alpha):
  noise, tokens = noises.uniform(LINEAR, V), jnp.asarray(EVERY)
  t, s = jnp.full(V**L, 1 - alpha), jnp.full(V**L, 1 - (alpha + 1) / 2)
  p = jnp.asarray(RNG.dirichlet(np.ones(V), size=(V**L, L)), jnp.float32)
  log_prior = jax.nn.log_softmax(uniform_state.posterior(jnp.log(p), tokens, LINEAR.alpha(t)))
  own = np.asarray(jax.nn.one_hot(tokens, V))
  scores = np.exp(uniform_state.log_scores(log_prior, tokens, LINEAR.alpha(t)))
  np.testing.assert_allclose(scores * (1 - own), noise.scores(p, tokens, t), rtol=1e-4)
  np.testing.assert_allclose((scores * own).sum(axis=-1), 1, rtol=1e-6)
  law = np.exp(uniform_state.log_reverse(log_prior, tokens, LINEAR.alpha(t), LINEAR.alpha(s)))
  np.testing.assert_allclose(law, noise.posterior(p, tokens, t, s), rtol=1e-4, atol=1e-7)


def test_score_entropy_is_its_definition_and_least_at_the_ratios():
  log_s, log_r = (jnp.asarray(RNG.normal(size=(5, V)), jnp.float32) for _ in range(2))
  s, r = (np.exp(np.asarray(x, np.float64)) for x in (log_s, log_r))
  expected = np.sum(s - r * np.log(s) + r * (np.log(r) - 1), axis=-1)
  np.testing.assert_allclose(uniform_state.score_entropy(log_s, log_r), expected, rtol=1e-5)
  np.testing.assert_array_equal(uniform_state.score_entropy(log_r, log_r), 0)
  total = lambda log_s: uniform_state.score_entropy(log_s, log_r).sum()
  np.testing.assert_allclose(jax.grad(total)(log_s), s - r, rtol=1e-4, atol=1e-6)
  near = uniform_state.score_entropy(log_r + 1e-3, log_r)  # r d^2 / 2
  np.testing.assert_allclose(near, r.sum(axis=-1) * 5e-7, rtol=2e-3)


@pytest.mark.parametrize("t", [0.03, 0.5, 0.97])
def test_it_is_the_objective_of_udlm(t):
  """Theirs, in their symbols: x_bar = V alpha x + (1 - alpha), of the data and of the network."""
  tokens, times = jnp.asarray(EVERY), jnp.full(V**L, t)
  log_prior = _log_prior(uniform_state.leave_one_out, SLOPES, t, 1 - t)
  pi, alpha, slope = np.exp(np.asarray(log_prior, np.float64)), 1 - t, -1.0
  for x in EVERY:
    clean = jnp.broadcast_to(jnp.asarray(x)[None], EVERY.shape)
    found = uniform_state.continuous(LINEAR).loss(log_prior, clean, tokens, times, times)
    for n, z in enumerate(EVERY):
      for i in range(L):
        bar = V * alpha * np.eye(V)[x[i]] + 1 - alpha
        net = V * alpha * pi[n, i] + 1 - alpha
        ratio = bar / bar[z[i]]
        gap = np.sum(ratio * np.log(net[z[i]] * bar / (net * bar[z[i]])))
        expected = slope / (V * alpha) * (V / bar[z[i]] - V / net[z[i]] - gap)
        np.testing.assert_allclose(found[n, i], expected, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_discrete_steps_give_the_sum_over_paths(head, schedule):
  times, x = np.linspace(1, 0, 4), EVERY[5]
  objective = uniform_state.discrete(schedule, times)
  nodes = (np.arange(3) + 0.5) / 3
  found = _expected(objective, schedule, HEADS[head], SLOPES, x, nodes, np.full(3, 1 / 3))
  expected = _path_bound(head, SLOPES, schedule, times, x)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_short_steps_lead_to_continuous_time():
  """Value and gradient of the discrete bound go to those of the integral, at first order."""
  x, head = EVERY[5], uniform_state.leave_one_out

  def value(objective, nodes, weights):
    of = lambda params: _expected(objective, LINEAR, head, params, x, nodes, weights)
    found, slope = jax.jit(jax.value_and_grad(of))(SLOPES)
    return float(found), np.asarray(slope)

  limit, limit_slope = value(uniform_state.continuous(LINEAR), *_nodes())
  gaps = []
  for num in (16, 64):
    objective = uniform_state.discrete(LINEAR, jnp.linspace(1, 0, num + 1))
    found, slope = value(objective, (np.arange(num) + 0.5) / num, np.full(num, 1 / num))
    gaps.append((found - limit, np.abs(slope - limit_slope).max()))
  first, second = np.array(gaps)
  np.testing.assert_allclose(second[0] / first[0], 1 / 4, rtol=0.15)
  assert second[1] < 0.4 * first[1] and second[1] < 0.05 * np.abs(limit_slope).max()


def test_a_posterior_that_stays_unsure_costs_without_bound():
  """Its integrand grows as 1 / t, so the integral is infinite; the other's as log(1 / t)."""
  objective, x = uniform_state.continuous(LINEAR), EVERY[5]
  value = lambda head, t: float(_expected(objective, LINEAR, head, SLOPES, x, [t], [1.0]))
  early, earlier = (value(uniform_state.posterior, t) for t in (1e-3, 1e-4))
  np.testing.assert_allclose(earlier / early, 10, rtol=0.05)
  early, earlier = (value(uniform_state.leave_one_out, t) for t in (1e-3, 1e-4))
  assert early < earlier < 1.5 * early


def test_the_exact_network_reaches_the_entropy():
  """The reverse process is then the forward one's, so the mean bound is the entropy of the law."""
  exact = toy_discrete.uniform_predictor(jnp.asarray(LAW, jnp.float32), COSINE)
  objective = uniform_state.continuous(COSINE)
  nodes, weights = _nodes()

  @jax.jit
  def at(node):  # the mean over x_0 and x_t
    t = jnp.full(V**L, node)
    alpha = COSINE.alpha(t)
    tokens = jnp.asarray(EVERY)
    others = uniform_state.posterior(exact(tokens, t), tokens, alpha)
    log_prior = jax.nn.log_softmax(others, axis=-1)
    total = 0.0
    for x in EVERY:
      clean = jnp.broadcast_to(jnp.asarray(x)[None], EVERY.shape)
      chance = math.prod(alpha * (EVERY[:, i] == x[i]) + (1 - alpha) / V for i in range(L))
      losses = objective.loss(log_prior, clean, tokens, t, t).sum(axis=1)
      total += LAW[tuple(x)] * jnp.sum(chance * losses)
    return total

  found = sum(w * float(at(jnp.float32(node))) for node, w in zip(nodes, weights, strict=True))
  entropy = -np.sum(LAW * np.log(LAW))
  np.testing.assert_allclose(found, entropy, rtol=2e-4)


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_the_loss_has_that_expectation_and_gradient(kind):
  num, x, prompt = 20_000, EVERY[5], np.array([1.0, 1.0])
  objective = {
    "continuous": lambda: uniform_state.continuous(COSINE),
    "discrete": lambda: uniform_state.discrete(COSINE, jnp.linspace(1, 0, 4)),
  }[kind]()
  loss_fn = uniform_state.uniform_diffusion(
    free_model, COSINE, objective, vocab_size=V, quantiles=weightings.independent
  )
  batch = {
    "tokens": jnp.broadcast_to(jnp.asarray(x)[None], (num, L)),
    "mask": jnp.broadcast_to(jnp.asarray(prompt)[None], (num, L)),
  }
  direction = jnp.asarray(RNG.normal(size=SLOPES.shape), jnp.float32)
  losses = lambda params: loss_fn(jax.random.key(0), params, batch)[0]
  (found, weight), (slopes, _) = jax.jit(lambda p: jax.jvp(losses, (p,), (direction,)))(SLOPES)
  np.testing.assert_array_equal(weight, L)
  nodes = _nodes() if kind == "continuous" else ((np.arange(3) + 0.5) / 3, np.full(3, 1 / 3))
  of = lambda params: _expected(objective, COSINE, HEADS["leave_one_out"], params, x, *nodes)
  expected = jax.jit(lambda params: jax.jvp(of, (params,), (direction,)))(SLOPES)
  for samples, mean in zip((found, slopes), expected, strict=True):
    samples = np.asarray(samples, np.float64)
    assert abs(samples.mean() - float(mean)) <= 4 * samples.std() / math.sqrt(num)


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_a_prompt_is_kept_and_ends_are_finite(kind):
  objective = {
    "continuous": lambda: uniform_state.continuous(mask_schedules.geometric()),
    "discrete": lambda: uniform_state.discrete(LINEAR, jnp.linspace(1, 0, 4)),
  }[kind]()
  schedule = {"continuous": mask_schedules.geometric(), "discrete": LINEAR}[kind]
  ends = lambda key, num: jnp.where(jnp.arange(num) % 2 == 0, 2.0**-24, 1 - 2.0**-24)
  loss_fn = uniform_state.uniform_diffusion(
    free_model, schedule, objective, vocab_size=V, quantiles=ends
  )
  batch = {
    "tokens": jnp.tile(jnp.array([[2, 1]]), (64, 1)),
    "mask": jnp.tile(jnp.array([[0, 1]]), (64, 1)),
  }
  batch["mask"] = batch["mask"].at[:2].set(0)

  def total(params):
    (losses, weight), metrics = loss_fn(None, params, batch)
    return jnp.sum(losses), (losses, weight, metrics["accuracy"])

  (_, (losses, weight, right)), slope = jax.jit(jax.value_and_grad(total, has_aux=True))(SLOPES)
  np.testing.assert_array_equal(losses[:2], 0)
  np.testing.assert_array_equal(weight[:3], [0, 0, 1])
  assert np.all(np.isfinite(losses)) and np.all(right[:2] == 0) and np.all(right <= 1)
  assert np.all(np.isfinite(slope)) and np.abs(slope).max() > 0
  others = EVERY[:, 0] != 2
  assert np.abs(slope[:, others]).max() == 0  # the prompt was never noised
  assert np.abs(slope[:, :, 0]).max() == 0  # and has no loss


def test_packed_rows_are_refused():
  loss_fn = uniform_state.uniform_diffusion(
    free_model, LINEAR, uniform_state.continuous(LINEAR), vocab_size=V
  )
  batch = {name: jnp.ones((2, 2), jnp.int32) for name in ("tokens", "mask", "segments")}
  with pytest.raises(ValueError, match="without documents"):
    loss_fn(None, SLOPES, batch)
