"""What llama.cpp's own tests expect of its samplers: the vectors of its tests/test-sampling.cpp.

Laws are given sorted by probability there, and by token here. They run without llama.cpp.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ancestral.sampling import history, truncation
from ancestral.sampling import logits as logits_lib

TENTHS = [0.1, 0.2, 0.3, 0.4]
FIFTHS = [0.2] * 5
QUARTERS = [0.25] * 4


def law(transform, probabilities, tokens=()):
  context = logits_lib.Context(
    jnp.asarray([[*tokens, 0]], jnp.int32), jnp.array([len(tokens)]), jnp.array([0])
  )
  logits = jnp.log(jnp.asarray([probabilities], jnp.float32))
  apply = jax.jit(lambda logits: transform.apply(logits, context, transform.init(1)))
  return np.asarray(jax.nn.softmax(apply(logits)))[0]


@pytest.mark.parametrize(
  "transform, probabilities, expected",
  [
    (logits_lib.temperature(1.0), TENTHS, TENTHS),
    (logits_lib.temperature(0.0), TENTHS, [0, 0, 0, 1]),
    (logits_lib.dynamic_temperature(1.0, 0.0, 1.0), TENTHS, TENTHS),
    (logits_lib.dynamic_temperature(0.0, 0.0, 1.0), TENTHS, [0, 0, 0, 1]),
    (truncation.exact_top_k(1), TENTHS, [0, 0, 0, 1]),
    (truncation.exact_top_k(3), TENTHS, [0, 0.22222, 0.33333, 0.44444]),
    (truncation.exact_top_k(4), TENTHS, TENTHS),
    (truncation.top_p(1e-9), TENTHS, [0, 0, 0, 1]),
    (truncation.top_p(0.7), TENTHS, [0, 0, 0.428571, 0.571429]),
    (truncation.top_p(0.8), TENTHS, [0, 0.22222, 0.33333, 0.44444]),
    (truncation.top_p(1.0), TENTHS, TENTHS),
    (truncation.min_p(0.0), TENTHS, TENTHS),
    (truncation.min_p(0.24), TENTHS, TENTHS),
    (truncation.min_p(0.26), TENTHS, [0, 2 / 9, 3 / 9, 4 / 9]),
    (truncation.min_p(0.49), TENTHS, [0, 2 / 9, 3 / 9, 4 / 9]),
    (truncation.min_p(0.51), TENTHS, [0, 0, 3 / 7, 4 / 7]),
    (truncation.min_p(0.74), TENTHS, [0, 0, 3 / 7, 4 / 7]),
    (truncation.min_p(0.76), TENTHS, [0, 0, 0, 1]),
    (truncation.min_p(1.0), TENTHS, [0, 0, 0, 1]),
    (truncation.xtc(1.0, 0.09), TENTHS[::-1], [0, 0, 0, 1]),
    (truncation.xtc(1.0, 0.19), TENTHS[::-1], [0, 0, 2 / 3, 1 / 3]),
    (truncation.xtc(1.0, 0.29), TENTHS[::-1], [0, 3 / 6, 2 / 6, 1 / 6]),
    (truncation.xtc(1.0, 0.39), TENTHS[::-1], TENTHS[::-1]),
    (truncation.typical(0.5), [0.97, 0.01, 0.01, 0.01], [1, 0, 0, 0]),
    (truncation.typical(0.5), [0.4, 0.2, 0.2, 0.2], [0, 1 / 3, 1 / 3, 1 / 3]),
    (truncation.top_n_sigma(1.0), TENTHS, [0, 0, 0.428571, 0.571429]),
    (truncation.top_n_sigma(3.0), TENTHS, TENTHS),
  ],
)
def test_transforms_of_the_law(transform, probabilities, expected):
  np.testing.assert_allclose(law(transform, probabilities), expected, atol=1e-5)


@pytest.mark.parametrize(
  "repetition, penalty, tokens, expected",
  [
    (50.0, 0.0, [0], [0, 0.25, 0.25, 0.25, 0.25]),
    (50.0, 0.0, [0, 1, 2], [0, 0, 0, 0.5, 0.5]),
    (50.0, 0.0, [0, 1, 2, 0, 0], [0, 0, 0, 0.5, 0.5]),
    (1.0, 5.0, [0], [0.000011, 0.249997, 0.249997, 0.249997, 0.249997]),
    (1.0, 5.0, [0, 1, 2], [0.000023, 0.000023, 0.000023, 0.499966, 0.499966]),
    (1.0, 5.0, [0, 1, 2, 0, 0], [0, 0.000023, 0.000023, 0.499977, 0.499977]),
  ],
)
def test_penalties(repetition, penalty, tokens, expected):
  transform = logits_lib.chain(
    history.repetition_penalty(repetition),
    history.frequency_penalty(penalty, history.whole),
    history.presence_penalty(penalty, history.whole),
  )
  np.testing.assert_allclose(law(transform, FIFTHS, tokens), expected, atol=1e-5)


@pytest.mark.parametrize(
  "multiplier, allowed, breakers, probabilities, tokens, expected",
  [
    (1.0, 2, [], QUARTERS, [0, 1], QUARTERS),
    (1.0, 2, [], QUARTERS, [0, 1, 2, 0, 1], [0.296923, 0.296923, 0.109232, 0.296923]),
    (1.0, 2, [[3]], FIFTHS, [0, 1, 3, 4, 0, 1], FIFTHS),
    (2.0, 2, [], FIFTHS, [0, 1, 2, 0, 1], [0.241818, 0.241818, 0.032727, 0.241818, 0.241818]),
    (1.0, 4, [], FIFTHS, [0, 1, 2, 3, 4, 0, 1], FIFTHS),
  ],
)
def test_dry(multiplier, allowed, breakers, probabilities, tokens, expected):
  transform = history.dry(multiplier, 1.1, allowed, breakers=breakers)
  np.testing.assert_allclose(law(transform, probabilities, tokens), expected, atol=1e-5)
