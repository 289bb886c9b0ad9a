"""Lossy rules: what they put out, by simulation of their coins and in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import targets
from ancestral.sampling import coupling, lossy


def pair(seed, size=6):
  rng = np.random.default_rng(seed)
  return [rng.dirichlet(np.full(size, 0.7)) for _ in range(2)]


def logs(*laws):
  return [jnp.log(jnp.asarray(law, jnp.float32)) for law in laws]


RULES = {
  "ensemble": lossy.ensemble(0.6),
  "typical": lossy.typical(0.3, 0.2),
  "maximal": coupling.maximal_one,
}


@pytest.mark.parametrize("rule", RULES)
def test_the_law_is_that_of_what_is_drawn(rule):
  q, p = pair(1)
  log_q, log_p = logs(q, p)
  num = 40_000
  law = np.array(jax.jit(lossy.output_law, static_argnums=0)(RULES[rule], log_q, log_p))
  rng = np.random.default_rng(0)
  drafts = jnp.asarray(rng.choice(q.size, size=(num, 1), p=q))
  wide = [jnp.broadcast_to(one, (num, q.size)) for one in (log_q, log_p)]
  drawn = jax.jit(coupling.select(RULES[rule]))(targets.keys_of(np.arange(num)), drafts, *wide)
  np.testing.assert_allclose(law.sum(), 1, atol=1e-5)
  law = law.astype(np.float64)
  targets.check_law(np.asarray(drawn.token)[:, None], law / law.sum())


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_an_ensemble_departs_by_its_share_of_the_distance(weight):
  for seed in range(5):
    q, p = pair(seed)
    found = lossy.departure(lossy.ensemble(weight), *logs(q, p))
    np.testing.assert_allclose(found, (1 - weight) * 0.5 * np.abs(p - q).sum(), atol=1e-6)


def test_typical_takes_what_passes_its_threshold():
  q, p = pair(3)
  bar = min(0.3, 0.2 * np.exp(-targets.entropy(p)))
  judged = lossy.typical(0.3, 0.2)(
    jnp.arange(6)[:, None], *(jnp.broadcast_to(one, (6, 6)) for one in logs(q, p))
  )
  np.testing.assert_array_equal(judged.accept[:, 0], p > bar)
  taken = p > bar
  law = q * taken + (q * ~taken).sum() * p
  found = lossy.departure(lossy.typical(0.3, 0.2), *logs(q, p))
  np.testing.assert_allclose(found, 0.5 * np.abs(law - p).sum(), atol=1e-6)


def test_a_lossless_rule_departs_by_nothing():
  for seed in range(5):
    assert lossy.departure(coupling.maximal_one, *logs(*pair(seed))) < 1e-6


def test_without_a_draft_the_target_is_drawn():
  _, p = pair(2)
  (log_p,) = logs(p)
  for rule in (lossy.ensemble(0.5), lossy.typical()):
    judged = rule(jnp.zeros(1, int), jnp.full(6, -jnp.inf), log_p)
    assert judged.accept[0] == 0
    np.testing.assert_allclose(judged.residual, log_p, atol=1e-6)


def test_a_weight_outside_is_refused():
  with pytest.raises(ValueError, match="from 0 to 1"):
    lossy.ensemble(1.2)
