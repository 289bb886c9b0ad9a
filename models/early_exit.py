"""A transformer that leaves after its first layers: a model of its own, without any params more."""

import dataclasses

import jax

from . import base, transformer


def early_exit(config: transformer.TransformerConfig, num_layers: int) -> base.LanguageModel:
  """The transformer of `config` that reads out after its first `num_layers` layers.

  p_n(x_t | x_<t) = readout(norm(h_n)) by the whole model's final norm and readout, where the whole
  model has h_N. It takes the whole model's params, stacked or unstacked, and `init` makes them; its
  cache holds n layers. After all layers, it is the whole model. What it drafts is likely under the
  whole model only if early exits were trained: see `training.drafters.early_exit`.

  Args:
    config: of the whole model.
    num_layers: n, from 1 to all.

  Raises:
    ValueError: there is no such layer.

  Reference: Elhoushi et al. 2024 (LayerSkip), arXiv 2404.16710. There, verification also takes over
  the first layers' cache from drafting; here it reads the drafts through all layers.
  """
  if not 1 <= num_layers <= config.num_layers:
    raise ValueError(
      f"An exit after {num_layers} layers of {config.num_layers}: it has to be after 1 to all."
    )
  model = transformer.transformer(config)
  first = transformer.transformer(dataclasses.replace(config, num_layers=num_layers))

  def trunk(params, x, cache=None, **kwargs):
    layers = params["layers"]
    stacked = isinstance(layers, dict)
    kept = jax.tree.map(lambda leaf: leaf[:num_layers], layers) if stacked else layers[:num_layers]
    return first.trunk({**params, "layers": kept}, x, cache, **kwargs)

  return model._replace(init_cache=first.init_cache, trunk=trunk)
