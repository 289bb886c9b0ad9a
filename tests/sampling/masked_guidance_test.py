"""Guidance: exact conditionals where theory has them."""

import jax
import jax.numpy as jnp
import numpy as np

import targets
from ancestral.models import mask_schedules, toy
from ancestral.sampling import masked, masked_guidance

V, L, DRAWS = 3, 3, 20_000
RNG = np.random.default_rng(0)
JOINT = RNG.dirichlet(np.full(V**L, 0.5)).reshape((V,) * L)
CLASS = RNG.uniform(0.05, 0.95, size=JOINT.shape)  # p(y | x)
PREDICT = toy.joint_predictor(jnp.asarray(JOINT, jnp.float32))
TILTED = JOINT * CLASS / np.sum(JOINT * CLASS)


def log_class(tokens, t):
  """log p(y | the tokens that are not masked), by enumeration."""
  del t
  law, joint = jnp.asarray(JOINT, jnp.float32), jnp.asarray(JOINT * CLASS, jnp.float32)
  outcomes = jnp.stack(jnp.meshgrid(*[jnp.arange(V)] * L, indexing="ij"), -1).reshape(-1, L)
  agrees = jnp.all((tokens[:, None] == V) | (tokens[:, None] == outcomes[None]), axis=-1)
  mass = lambda p: jnp.sum(jnp.where(agrees, p.reshape(1, -1), 0), axis=-1)
  return jnp.log(mass(joint)) - jnp.log(mass(law))


def draws_of(predict):
  @jax.jit
  def run(keys):
    tokens = jnp.full((DRAWS, L), V, jnp.int32)
    made = masked.first_hitting(predict, mask_schedules.linear(), mask=V)
    return masked.sample(keys, made, tokens, mask=V)

  return np.asarray(run(targets.keys_of(np.arange(DRAWS))))


def test_a_classifier_at_weight_one_is_bayes_rule():
  targets.check_law(draws_of(masked_guidance.classifier(PREDICT, log_class)), TILTED)


def test_of_two_exact_predictors_weight_one_is_the_conditional():
  conditional = toy.joint_predictor(jnp.asarray(TILTED, jnp.float32))
  for weight, law in ((0.0, JOINT), (1.0, TILTED)):
    predict = masked_guidance.classifier_free(conditional, PREDICT, weight)
    targets.check_law(draws_of(predict), law)


def test_both_guidances_are_one_at_every_weight():
  """log p_u + w (log p_c - log p_u) = log p(x_i) + w log p(y | x_i) up to Z."""
  conditional = toy.joint_predictor(jnp.asarray(TILTED, jnp.float32))
  tokens = jnp.array([[V, 1, V], [V, V, V], [2, V, 0]])
  weight = jnp.array([0.5, 2.0, 3.0])
  free = masked_guidance.classifier_free(conditional, PREDICT, weight)(tokens, 0.5)
  bayes = masked_guidance.classifier(PREDICT, log_class, weight)(tokens, jnp.float32(0.5))
  for b, i in ((0, 0), (0, 2), (1, 0), (1, 1), (1, 2), (2, 1)):
    one, other = jax.nn.softmax(free[b, i]), jax.nn.softmax(bayes[b, i])
    np.testing.assert_allclose(one, other, atol=2e-5)


def test_the_gradient_is_exact_for_log_linear_classifiers():
  scores = jnp.asarray(RNG.normal(size=(L, V + 1)), jnp.float32)
  soft = lambda x, t: jnp.einsum("nlv,lv->n", x, scores)
  hard = lambda tokens, t: soft(jax.nn.one_hot(tokens, V + 1), t)
  tokens = jnp.array([[V, 1, V], [V, V, V]])
  by_gradient = masked_guidance.classifier_by_gradient(PREDICT, soft, 1.7)(tokens, jnp.float32(0.5))
  exact = masked_guidance.classifier(PREDICT, hard, 1.7)(tokens, jnp.float32(0.5))
  normal = lambda x: np.asarray(jax.nn.log_softmax(x))
  np.testing.assert_allclose(normal(by_gradient), normal(exact), atol=1e-5)


def test_without_prompt_masks_the_prompt_alone():
  seen = []
  predict = lambda tokens, t: seen.append(tokens) or PREDICT(tokens, t)
  prompt = jnp.array([[True, False, False]])
  masked_guidance.without_prompt(predict, prompt, mask=V)(jnp.array([[1, 2, V]]), 0.5)
  np.testing.assert_array_equal(seen[0], [[V, 2, V]])


def test_weight_zero_is_no_guidance_whatever_the_classifier_says():
  nothing = lambda tokens, t: jnp.full(tokens.shape[0], -jnp.inf)
  tokens = jnp.array([[V, 1, V], [V, V, V]])
  out = masked_guidance.classifier(PREDICT, nothing, jnp.array([0.0, 0.0]))(
    tokens, jnp.float32(0.5)
  )
  np.testing.assert_allclose(out[1], jax.nn.log_softmax(PREDICT(tokens, 0.5))[1], atol=1e-6)


def test_evidence_that_rules_everything_out_changes_nothing():
  never = lambda tokens, t: jnp.full(tokens.shape[:1], -jnp.inf)
  tokens = jnp.array([[V, 1, V]])
  guided = masked_guidance.classifier(PREDICT, never, 1.5)(tokens, jnp.float32(0.5))
  np.testing.assert_allclose(guided, jax.nn.log_softmax(PREDICT(tokens, 0.5)), rtol=1e-6)


def test_what_is_impossible_stays_so():
  never = lambda tokens, t: jnp.broadcast_to(jnp.array([-jnp.inf, 0.0, 0.0]), (1, L, V))
  anything = lambda tokens, t: jnp.zeros(tokens.shape[0])
  out = masked_guidance.classifier(never, anything)(jnp.full((1, L), V), jnp.float32(0.5))
  assert np.all(np.isneginf(out[..., 0])) and np.all(np.isfinite(out[..., 1:]))
