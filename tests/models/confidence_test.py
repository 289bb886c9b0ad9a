"""The acceptance head: its features in closed form, its network by hand."""

import jax
import jax.numpy as jnp
import numpy as np

import targets
from ancestral.models import confidence

RNG = np.random.default_rng(0)
LOGITS = jnp.asarray(2 * RNG.normal(size=(2, 3, 7)), jnp.float32).at[0, 0, 4].set(-jnp.inf)
TOKEN = jnp.asarray(RNG.integers(0, 4, (2, 3)))
HIDDEN = jnp.asarray(RNG.normal(size=(2, 3, 5)), jnp.float32)
TABLE = jnp.asarray(RNG.normal(size=(7, 5)), jnp.float32)


def of():
  return confidence.features(HIDDEN, TOKEN, LOGITS, lambda tokens: TABLE[tokens])


def test_features_are_of_the_law_that_the_draft_is_drawn_from():
  made = of()
  p = targets.softmax(LOGITS)
  expected = np.log(np.take_along_axis(p, np.asarray(TOKEN)[..., None], axis=-1))[..., 0]
  np.testing.assert_allclose(made.log_prob, expected, rtol=1e-5)
  expected = [[targets.entropy(law) for law in row] for row in p]
  np.testing.assert_allclose(made.entropy, expected, rtol=1e-5)
  np.testing.assert_array_equal(made.embedding, np.asarray(TABLE)[np.asarray(TOKEN)])
  sure = confidence.features(
    HIDDEN[0, 0], jnp.int32(4), jnp.full(7, -jnp.inf).at[4].set(9.0), TABLE.__getitem__
  )
  assert sure.log_prob == 0 and sure.entropy == 0


def test_the_head_is_residual_blocks_on_the_features():
  head = confidence.acceptance_head(width=6, num_blocks=2)
  params = jax.jit(head.init, static_argnums=1)(jax.random.key(0), 5)
  params = jax.tree.map(lambda leaf: leaf + 0.1, params)  # no zero bias, no unit scale
  exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

  def norm(x, scale):
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + 1e-6) * scale

  def linear(name, x):
    return x @ exact[name]["kernel"] + exact[name]["bias"]

  made = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), of())
  x = np.concatenate(
    [
      norm(made.hidden, exact["hidden"]["scale"]),
      norm(made.embedding, exact["embedding"]["scale"]),
      made.log_prob[..., None],
      made.entropy[..., None],
    ],
    axis=-1,
  )
  x = linear("input", x)
  for name in ("block_0", "block_1"):
    y = linear(name, x)
    x = x + y / (1 + np.exp(-y))
  logit = jax.jit(head.logit)(params, of())
  assert logit.shape == (2, 3)
  np.testing.assert_allclose(logit, linear("output", x)[..., 0], rtol=1e-4, atol=1e-5)
