"""LoRA as a section of a configuration: what is trained, and the whole parameters from it.

The state of such a run, its checkpoints and averages, hold adapters alone. The matrices that they
change stay those of `config.start`, which has to be there whenever the run is used.
"""

from collections.abc import Callable
from typing import Any

import jax
from ml_collections import config_dict

from ..models import base as models
from ..training import checkpoint, lora
from . import fields

Merge = Callable[[models.Params], models.Params]


def section() -> dict[str, Any]:
  """The section `lora` of a configuration; without a rank, all parameters are trained."""
  return {
    "rank": config_dict.placeholder(int),
    "alpha": 16.0,
    "rank_stabilised": False,  # scaled by alpha / sqrt(rank), not by alpha / rank
    "start_digest": "",  # of the parameters that they change; filled in when training begins
    "targets": (r"attention/(query|key|value|output)/kernel$", r"mlp/(gate|up|down)/kernel$"),
  }


def used(config: fields.Config) -> bool:
  """Whether adapters are trained."""
  return bool(config.get("lora")) and config.lora.rank is not None


def scale(config: fields.Config) -> float:
  """What A B is multiplied by."""
  c = config.lora
  return (lora.rank_stabilised_scale if c.rank_stabilised else lora.usual_scale)(c.alpha, c.rank)


def init_params(
  config: fields.Config, init: Callable[[jax.Array], models.Params]
) -> Callable[[jax.Array], Any]:
  """(key) -> what is trained, where `init` makes the model's parameters.

  Raises:
    ValueError: a rank or targets that the model has not; there is nothing to start from.
  """
  if not used(config):
    return init
  fields.require(bool(config.get("start")), "lora is a change of a start; give config.start")
  c = config.lora
  make = lambda key: lora.init(key, jax.eval_shape(init, key), tuple(c.targets), c.rank)
  try:
    jax.eval_shape(make, jax.random.key(0))
  except ValueError as error:
    raise ValueError(f"config.lora: {error}") from None
  return make


def compared(config: dict[str, Any]) -> dict[str, Any]:
  """The configuration as JSON, without the section where it says nothing."""
  unused = config.get("lora") and config["lora"]["rank"] is None
  return {name: value for name, value in config.items() if name != "lora" or not unused}


def identified(config: fields.Config, frozen: models.Params | None) -> fields.Config:
  """The configuration with the digest of what the adapters change.

  Raises:
    ValueError: it has another: the start is not the one that they were trained on.
  """
  if not used(config):
    return config
  found, known = checkpoint.digest(frozen), config.lora.get("start_digest")
  if known and known != found:
    raise ValueError(
      f"config.start has other parameters ({found}) than the adapters were trained on ({known})."
    )
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.lora.start_digest = found
  return config.lock()


def merging(config: fields.Config, frozen: models.Params | None) -> Merge:
  """(trained) -> the model's parameters, jitted.

  Args:
    config: of the run.
    frozen: those of its start; not read where all are trained.
  """
  if not used(config):
    return lambda params: params
  merge = jax.jit(lambda frozen, adapters: lora.merge(frozen, adapters, scale(config)))
  return lambda adapters: merge(frozen, adapters)
