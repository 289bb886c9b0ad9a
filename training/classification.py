"""Maximum likelihood of classes."""

import jax.numpy as jnp

from ..models import classifier as models
from . import likelihood, step


def classification(classifier: models.Classifier) -> step.LossFn:
  """-log p(label | x) of each image in nats, [B]; the metric is `accuracy`.

  The batch has `x` [B, H, W, C] and `label` [B].
  """

  def loss(key, params, batch):
    _, logits = classifier.apply(params, batch["x"], key=key)
    losses = likelihood.cross_entropy(logits, batch["label"])
    right = jnp.argmax(logits, axis=-1) == batch["label"]
    return (losses, jnp.ones_like(losses)), {"accuracy": right.astype(jnp.float32)}

  return loss
