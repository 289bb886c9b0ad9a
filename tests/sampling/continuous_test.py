"""Continuous speculative decoding keeps the target's law: couplings, chains, and diffusion paths.

Kolmogorov and Smirnov: n honest draws exceed 1.95 / sqrt(n) once in a thousand times.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import targets
from ancestral.models import gaussian, heads, transformer
from ancestral.sampling import base, continuous

NUM = 20_000


def law(*components):
  """A one-dimensional mixture of (weight, mean, scale)."""
  weights, means, scales = jnp.asarray(components, jnp.float32).T
  return gaussian.mixture(jnp.log(weights), means[:, None], scales[:, None])


def exact(function, components, x):
  """The density or the distribution function of the same, float64."""
  return sum(w * function(x, m, s) for w, m, s in components)


NORMAL = [(1, 0, 1)]
TWO = [(0.3, -2, 0.5), (0.7, 1, 0.8)]
PAIRS = {  # target, draft
  "equal": (TWO, TWO),
  "shifted": (NORMAL, [(1, 1, 1)]),
  "nearly disjoint": (NORMAL, [(1, 6, 0.5)]),
  "nearly equal": (NORMAL, [(1, 0.1, 1)]),
  "mixture from Gaussian": (TWO, [(1, 0, 1.5)]),
  "Gaussian from mixture": (NORMAL, TWO),
  "wide from narrow": ([(1, 0, 3)], NORMAL),
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def coupled(target, draft, keys):
  p, q = law(*target), law(*draft)

  def one(key):
    draft_key, key = jax.random.split(key)
    drafted = q.sample(draft_key)
    return drafted, continuous.couple(key, p, q, drafted)

  return jax.vmap(one)(keys)


@pytest.mark.parametrize("pair", PAIRS)
def test_a_coupling_has_the_targets_law_at_the_least_cost(pair):
  target, draft = (tuple(components) for components in PAIRS[pair])
  drafted, out = jax.device_get(coupled(target, draft, targets.keys_of(np.arange(NUM))))
  cdf = functools.partial(exact, stats.norm.cdf, target)
  assert stats.kstest(out.draw[:, 0], cdf).statistic < 1.95 / NUM**0.5
  x = np.linspace(-30, 30, 600_001)
  p, q = (exact(stats.norm.pdf, components, x) for components in (target, draft))
  overlap = np.trapezoid(np.minimum(p, q), x)
  rate = out.accepted.mean()
  assert abs(rate - overlap) <= 4 * np.sqrt(max(overlap * (1 - overlap), 0) / NUM) + 1e-6
  assert abs(out.accept_prob.mean() - overlap) <= 4 * out.accept_prob.std() / NUM**0.5 + 1e-6
  np.testing.assert_array_equal(out.draw[out.accepted], drafted[out.accepted])
  assert np.all(out.num_proposals[out.accepted] == 0)
  if pair == "equal":
    assert rate == 1
    return
  proposals = out.num_proposals[~out.accepted]
  error = 4 * proposals.std() / len(proposals) ** 0.5
  assert abs(proposals.mean() - 1 / (1 - overlap)) <= error + 1e-6
  assert out.num_proposals.mean() <= 1 + 4 * out.num_proposals.std() / NUM**0.5
  if pair == "nearly disjoint":
    assert rate < 1e-3


def test_the_residual_of_nothing_is_the_targets_law_and_no_loop_is_endless():
  p = law(*TWO)
  nothing = lambda draw: -jnp.inf
  keys = jax.random.split(jax.random.key(1), NUM)
  out = jax.jit(jax.vmap(lambda key: continuous.residual(key, p, nothing)))(keys)
  assert np.all(out.num_proposals == 1)
  cdf = functools.partial(exact, stats.norm.cdf, TWO)
  assert stats.kstest(np.asarray(out.draw[:, 0]), cdf).statistic < 1.95 / NUM**0.5
  count = lambda log_q, **more: int(
    continuous.residual(jax.random.key(2), p, log_q, **more).num_proposals
  )
  assert count(p.log_prob, max_proposals=50) == 50
  assert count(lambda draw: jnp.nan) == 1
  assert count(nothing, wanted=False) == 0


def by_the_authors_rule(key, p, q, draft):
  """Accepts by (p / q)^(1 / 42^2); of Gaussians of one covariance, their inner temperature."""
  coin_key, residual_key = jax.random.split(key)
  accept_prob = jnp.exp(jnp.minimum((p.log_prob(draft) - q.log_prob(draft)) / 42**2, 0))
  accepted = jax.random.bernoulli(coin_key, accept_prob)
  other = continuous.residual(residual_key, p, q.log_prob, ~accepted)
  return jnp.where(accepted, draft, other.draw)


@pytest.mark.parametrize("rule", ["ours", "the authors'"])
def test_a_shift_of_sixteen_means_survives_as_it_does_not_by_the_authors_rule(rule):
  at = lambda mean: gaussian.mixture(jnp.zeros(1), jnp.full((1, 16), mean), jnp.ones((1, 16)))
  p, q = at(0.1), at(0.0)
  couple = {
    "ours": lambda *args: continuous.couple(*args).draw,
    "the authors'": by_the_authors_rule,
  }[rule]

  def one(key):
    draft_key, key = jax.random.split(key)
    return couple(key, p, q, q.sample(draft_key))

  draws = np.asarray(jax.jit(jax.vmap(one))(targets.keys_of(np.arange(NUM))), np.float64)
  error = 1 / NUM**0.5
  overall, apart = draws.mean(), np.abs(draws.mean(axis=0) - 0.1)
  if rule == "ours":
    assert abs(overall - 0.1) <= 4 * error / 4 and apart.max() <= 4 * error
    assert np.abs(np.cov(draws.T) - np.eye(16)).max() <= 4 * np.sqrt(2) * error
  else:
    assert abs(overall) <= 4 * error / 4 and apart.min() > 10 * error


def sampler(make, num_tokens):
  """(num, params, seed) -> [num, N, D], of an algorithm that is built from params inside jit."""
  sample = jax.jit(lambda params, keys: continuous.generate(keys, make(*params), num_tokens))

  def draw(num, *params, seed=0):
    return np.asarray(sample(params, targets.keys_of(np.arange(num), seed)), np.float64)

  return draw


def sequences(algorithm, num_tokens, num, seed=0):
  """[num, N, D] of (algorithm of params, params)."""
  make, *params = algorithm
  return sampler(make, num_tokens)(num, *params, seed=seed)


def speculating(target, draft, num_tokens, num_drafts):
  """(algorithm of params, target's params, draft's params)."""
  (model, params), (draft_model, draft_params) = target, draft

  def make(params, draft_params):
    return continuous.speculative(
      model,
      params,
      draft_model,
      draft_params,
      num_tokens=num_tokens,
      num_drafts=num_drafts,
    )

  return make, params, draft_params


def plain(target, num_tokens):
  model, params = target
  make = lambda params: continuous.autoregressive(model, params, num_tokens=num_tokens)
  return make, params


def array(*rows):
  return jnp.asarray(rows, jnp.float32)


def chain_target():
  """Two components about a linear map, so that the moments are known and the law is no Gaussian."""
  params = gaussian.Chain(
    log_weights=jnp.log(jnp.array([0.3, 0.7])),
    transition=array([0.8, -0.3], [0.2, 0.5]),
    offsets=array([1.5, 0.0], [-0.5, 0.4]),
    scales=array([0.6, 1.0], [0.8, 0.5]),
  )
  return gaussian.chain(2, 2), params


def chain_draft():
  params = gaussian.Chain(
    log_weights=jnp.zeros(1),
    transition=array([0.6, -0.1], [0.2, 0.5]),
    offsets=array([0.2, 0.2]),
    scales=array([1.2, 0.8]),
  )
  return gaussian.chain(2), params


def check_moments(samples, mean, covariance):
  """Each entry within four standard errors; samples [n, N, D]."""
  n, num_tokens, size = samples.shape
  flat = samples.reshape(n, -1)
  variance = covariance.reshape(num_tokens * size, -1)
  off = np.abs(flat.mean(axis=0) - mean.reshape(-1)) / np.sqrt(np.diag(variance) / n)
  assert off.max() <= 4, f"mean off by {off.max():.1f} standard errors"
  centred = flat - mean.reshape(-1)
  products = centred[:, :, None] * centred[:, None, :]
  off = np.abs(products.mean(axis=0) - variance) / (products.std(axis=0) / n**0.5)
  assert off.max() <= 4, f"covariance off by {off.max():.1f} standard errors"


@pytest.mark.parametrize("num_drafts", [0, 1, 3])
def test_the_moments_of_whole_sequences_are_the_chains(num_drafts):
  target = chain_target()
  algorithm = plain(target, 4)
  if num_drafts:
    algorithm = speculating(target, chain_draft(), 4, num_drafts)
  samples = sequences(algorithm, 4, NUM)
  check_moments(samples, *gaussian.chain_moments(target[1], 4))


def test_the_moments_tell_target_and_draft_apart():
  samples = sequences(plain(chain_draft(), 4), 4, NUM)
  with pytest.raises(AssertionError, match="standard errors"):
    check_moments(samples, *gaussian.chain_moments(chain_target()[1], 4))


BETAS = (0.05, 0.2, 0.5)


def linear_diffusion(seed):
  """A diffusion of one number whose predicted noise is c x_t + d h + e, h the token before.

  Its params are [T, 3], rows (c, d, e).
  """
  rng = np.random.default_rng(seed)
  params = jnp.asarray(rng.normal(size=(3, 3)) * [0.2, 0.4, 0.3] + [0.6, 0, 0], jnp.float32)

  def law(params, hidden):
    noise = lambda x, t: params[t, 0] * x + params[t, 1] * hidden + params[t, 2]
    return gaussian.denoising_path(BETAS, 1, noise)

  return gaussian.chain(1)._replace(law=law, value=lambda draw: draw[-1]), params


def linear_diffusion_token(params):
  """x_0 ~ N(slope h + offset, variance): (slope, offset, variance), a transition at a time."""
  slope, offset, variance = 0.0, 0.0, 1.0
  alphas = 1 - np.array(BETAS)
  for t in (2, 1, 0):
    c, d, e = np.asarray(params[t], np.float64)
    share = BETAS[t] / np.sqrt(1 - np.prod(alphas[: t + 1]))
    keep = (1 - share * c) / np.sqrt(alphas[t])
    slope = keep * slope - share * d / np.sqrt(alphas[t])
    offset = keep * offset - share * e / np.sqrt(alphas[t])
    variance = keep**2 * variance + BETAS[t]
  return slope, offset, variance


@pytest.mark.slow
@pytest.mark.parametrize("num_drafts", [0, 2])
def test_the_end_of_a_diffusion_path_has_its_closed_form(num_drafts):
  target, draft = linear_diffusion(0), linear_diffusion(1)
  slope, offset, variance = linear_diffusion_token(target[1])
  algorithm = plain(target, 3)
  if num_drafts:
    algorithm = speculating(target, draft, 3, num_drafts)
  samples = sequences(algorithm, 3, NUM)
  chain = gaussian.Chain(
    np.zeros(1), np.array([[slope]]), np.array([[offset]]), np.array([[variance**0.5]])
  )
  mean, covariance = gaussian.chain_moments(chain, 3)
  check_moments(samples, mean, covariance)
  for t in range(3):
    normal = stats.norm(mean[t, 0], covariance[t, 0, t, 0] ** 0.5)
    assert stats.kstest(samples[:, t, 0], normal.cdf).statistic < 1.95 / NUM**0.5
  other = linear_diffusion_token(draft[1])
  assert abs(other[1] - offset) > 0.1  # so the draft's own law would not do


def tiny(head, seed, width=16):
  """A transformer over patches of two numbers, and params that make it differ from others."""
  config = transformer.TransformerConfig(
    vocab_size=1, max_length=8, num_layers=1, width=width, num_heads=2, mlp_width=16
  )
  model = heads.transformer(config, 2, head)
  params = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 2, 2)))
  bigger = jax.tree.map(lambda leaf: 1.5 * leaf, params["head"])
  return model, {**params, "head": bigger, "trunk": transformer.unstack(params["trunk"])}


@functools.cache
def tiny_mixture(seed):
  return tiny(heads.mixture(2, 2, width=8, min_scale=0.5), seed)


@functools.cache
def tiny_diffusion(seed):
  return tiny(heads.diffusion(2, BETAS, width=16, num_blocks=1)[0], seed)


@pytest.mark.slow
def test_a_diffusion_heads_tokens_have_one_law_with_and_without_speculation():
  num = 6000
  make, params = plain(tiny_diffusion(0), 3)
  draw = sampler(make, 3)
  one, draft = draw(num, params), draw(num, tiny_diffusion(1)[1], seed=2)
  other = sequences(speculating(tiny_diffusion(0), tiny_diffusion(1), 3, 2), 3, num, seed=1)
  distance = lambda a, b: max(
    stats.ks_2samp(a[:, t, d], b[:, t, d]).statistic for t in range(3) for d in range(2)
  )
  bound = 1.95 * (2 / num) ** 0.5
  assert distance(one, other) < bound < distance(one, draft)


def stepping(target, draft, *, num_tokens, num_drafts, num_steps):
  """requests -> (state, infos), the latter [num_steps, B, ...]."""
  make, *params = speculating(target, draft, num_tokens, num_drafts)

  @jax.jit
  def steps(params, keys):
    algorithm = make(*params)
    state = base.start(keys, algorithm, None)
    return base.run(keys, algorithm, state, num_steps, lambda state, info: info)

  return lambda requests: jax.device_get(steps(params, targets.keys_of(np.asarray(requests))))


@functools.cache
def tiny_stepping():
  return stepping(tiny_mixture(0), tiny_mixture(1), num_tokens=7, num_drafts=3, num_steps=7)


def log_probs(target, tokens):
  """log p(x_t | x_<t) [B, N] of tokens [B, N, D], in one pass without a cache."""
  model, params = target
  read = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0), (0, 0)))
  hidden, _ = jax.jit(model.trunk)(params, read)
  of_one = lambda hidden, token: model.law(params, hidden).log_prob(token)
  return np.asarray(jax.jit(jax.vmap(jax.vmap(of_one)))(hidden, tokens))


@pytest.mark.slow
def test_accepted_drafts_were_judged_by_the_laws_of_a_full_pass():
  target, draft = tiny_mixture(0), tiny_mixture(1)
  state, infos = tiny_stepping()(np.arange(64))
  assert np.all(state.length == 8) and np.all(infos.count.sum(axis=0) == 7)
  ratio = log_probs(target, state.tokens[:, 1:]) - log_probs(draft, state.tokens[:, 1:])
  expected = np.exp(np.minimum(ratio, 0))
  judged = 0
  for b in range(64):
    at = 0
    for count, accepted, prob, tokens in zip(
      infos.count[:, b],
      infos.num_accepted[:, b],
      infos.accept_prob[:, b],
      infos.token[:, b],
      strict=True,
    ):
      np.testing.assert_allclose(prob[:accepted], expected[b, at : at + accepted], rtol=1e-3)
      np.testing.assert_array_equal(tokens[:count], state.tokens[b, 1 + at : 1 + at + count])
      assert np.all(tokens[count:] == 0) and count == min(accepted + 1, 7 - at)
      at, judged = at + count, judged + accepted
  assert judged > 100 and len(set(state.step)) > 1  # the rows advance at their own pace
  done = infos.count == 0
  assert done.any() and not infos.num_proposals[done].any() and not infos.accept_prob[done].any()


@pytest.mark.parametrize("num_drafts, num_tokens", [(1, 7), (3, 7), (3, 8), (4, 1)])
def test_a_model_accepts_all_its_own_drafts(num_drafts, num_tokens):
  sizes = {"num_tokens": num_tokens, "num_drafts": num_drafts}
  state, infos = stepping(chain_target(), chain_target(), **sizes, num_steps=4)(np.arange(5))
  assert np.all(state.step == -(-num_tokens // (num_drafts + 1)))
  assert np.all(infos.count[0] == min(num_drafts + 1, num_tokens))
  full = infos.num_accepted == num_drafts
  room = num_tokens - (np.cumsum(infos.count, axis=0) - infos.count)
  np.testing.assert_array_equal(infos.num_proposals, full & (room > num_drafts))


def test_rows_do_not_know_each_other():
  state, _ = tiny_stepping()(np.arange(64))
  order = np.random.default_rng(0).integers(0, 64, 64)
  again, _ = tiny_stepping()(order)
  np.testing.assert_array_equal(again.tokens, state.tokens[order])
  np.testing.assert_array_equal(again.step, state.step[order])
  alone, _ = tiny_stepping()([4])
  np.testing.assert_allclose(alone.tokens[0], state.tokens[4], atol=1e-5)
  assert len(np.unique(state.tokens[:, 1, 0])) == 64


def test_bad_settings_are_refused():
  model, params = chain_target()
  other = gaussian.chain(3)
  with pytest.raises(ValueError, match="num_drafts=0"):
    continuous.speculative(model, params, model, params, num_tokens=2, num_drafts=0)
  with pytest.raises(ValueError, match="Tokens of 3 numbers"):
    continuous.speculative(model, params, other, params, num_tokens=2, num_drafts=1)
  with pytest.raises(ValueError, match="num_tokens=0"):
    sequences(plain((model, params), 0), 0, 2)
  short = tiny(heads.diffusion(2, BETAS[:2], width=16)[0], 0)
  with pytest.raises(ValueError, match="same number of steps"):
    sequences(speculating(tiny_diffusion(0), short, 3, 2), 3, 2)
