"""The predictor of a bidirectional transformer: what it sees, and what it does not predict."""

import jax
import jax.numpy as jnp
import numpy as np

import targets
from ancestral.models import masked

V, L = 5, 6
MODEL, PARAMS = targets.tiny_target(vocab_size=V + 1, causal=False, dropout=0.2)
predict = jax.jit(lambda tokens, t, key=None: masked.predictor(MODEL, PARAMS, key=key)(tokens, t))
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, V + 1, (3, L)), jnp.int32)


def test_the_mask_is_not_predicted_and_time_does_not_matter():
  logits = predict(TOKENS, jnp.float32(0.3))
  assert logits.shape == (3, L, V)
  np.testing.assert_array_equal(predict(TOKENS, jnp.array([0.1, 0.5, 0.9])), logits)
  hidden, _ = targets.apply(MODEL, PARAMS, TOKENS)
  np.testing.assert_allclose(logits, MODEL.readout(PARAMS, hidden)[..., :V], rtol=1e-4, atol=1e-5)


def test_every_position_sees_every_other():
  logits = predict(TOKENS, jnp.float32(0))
  for i in range(L):
    changed = predict(TOKENS.at[:, i].set((TOKENS[:, i] + 1) % (V + 1)), jnp.float32(0))
    assert np.all(np.abs(changed - logits).max(axis=(0, 2)) > 1e-4)


def test_a_key_turns_dropout_on():
  t = jnp.float32(0)
  plain = predict(TOKENS, t)
  draws = [predict(TOKENS, t, jax.random.key(i)) for i in (0, 1)]
  assert np.abs(draws[0] - draws[1]).max() > 1e-3 and np.abs(draws[0] - plain).max() > 1e-3
