"""Masked diffusion's predictor, of a bidirectional language model over the vocabulary and a mask.

Of V tokens, the mask is number V: models embed V + 1 and nothing else needs to be told.
"""

import jax

from . import base


def predictor(
  model: base.LanguageModel, params: base.Params, *, key: jax.Array | None = None
) -> base.Predictor:
  """(tokens [B, L], t) -> logits [B, L, V] of p(x_0 at each position | tokens), whatever t.

  What is not masked does not say how long it took, so the best predictor does not depend on time
  (Ou et al. 2024, arXiv 2406.03736, theorem 1; Zheng et al. 2024, arXiv 2409.02908).

  Args:
    model: of V + 1 tokens, the last of them the mask, which is never predicted; bidirectional.
    params: its parameters.
    key: turns on what is random in training.
  """

  def predict(tokens, t):
    del t
    hidden, _ = base.apply(model, params, tokens, key=key)
    return model.readout(params, hidden)[..., :-1]

  return predict
