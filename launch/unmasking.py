"""Masked samplers by name, and the flags that choose one.

--sampler=first_hitting                     one token a call, in random order, exactly
--sampler=ancestral --steps=64              the reverse process in 64 steps
--sampler=remasking --steps=64 --remask=.1  which takes tokens back with probability .1 at most
--sampler=ordered --order=margin            one token a call, in the order of a score
--sampler=ordered --entropy_bound=.5        as many as are nearly independent
--sampler=ordered --order=max_probability --threshold=.9    all that are likely enough
--block=8                                   first_hitting, ordered: blocks of 8 from left to right
--guidance=2                                all: away from the law without the prompt
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from absl import flags
from ml_collections import config_dict

from ..models import base as models
from ..models import mask_schedules
from ..models import masked as masked_models
from ..sampling import base, blocks, masked, masked_guidance, remasking, unmasking
from . import draws, fields

SCHEDULES = {
  "linear": mask_schedules.linear,
  "quadratic": functools.partial(mask_schedules.polynomial, 2.0),
  "cosine": mask_schedules.cosine,
  "geometric": mask_schedules.geometric,
}

ORDERS = {
  "random": unmasking.random_order,
  "left_to_right": unmasking.left_to_right,
  "max_probability": unmasking.max_probability,
  "margin": unmasking.margin,
  "entropy": unmasking.negative_entropy,
  "sampled_probability": unmasking.sampled_probability,  # biased
}

# The fields that a sampler reads.
SAMPLERS = {
  "first_hitting": ("block",),
  "ancestral": ("steps",),
  "remasking": ("steps", "remask"),
  "ordered": ("order", "per_step", "threshold", "entropy_bound", "block"),
}
GRIDDED = ("ancestral", "remasking")  # which take a number of steps
_FROM_0_TO_1 = ("max_probability", "margin", "sampled_probability")  # scores of these orders are

_FLAGS = {
  "sampler": flags.DEFINE_enum("sampler", None, list(SAMPLERS), "How masks are filled in."),
  "order": flags.DEFINE_enum("order", None, list(ORDERS), "Of --sampler=ordered."),
  "per_step": flags.DEFINE_integer(
    "per_step", None, "Tokens written in a call, of --sampler=ordered.", lower_bound=1
  ),
  "threshold": flags.DEFINE_float(
    "threshold", None, "Least score of tokens written in a call, of --sampler=ordered."
  ),
  "entropy_bound": flags.DEFINE_float(
    "entropy_bound", None, "In nats, of tokens written in a call, of --sampler=ordered."
  ),
  "steps": flags.DEFINE_integer(
    "steps", None, "Of --sampler=ancestral and remasking.", lower_bound=1
  ),
  "remask": flags.DEFINE_float("remask", None, "Most probability of taking a token back, a step."),
  "block": flags.DEFINE_integer("block", None, "Length of blocks.", lower_bound=1),
  "guidance": draws.GUIDANCE,
}
FLAGS = tuple(_FLAGS.values())

DEFAULTS = {
  "sampler": "first_hitting",
  "order": "random",
  "per_step": 1,
  "threshold": None,
  "entropy_bound": None,
  "steps": 64,
  "remask": 0.1,
  "block": None,
  "guidance": 1.0,
}


def section() -> dict[str, Any]:
  """The section `evaluation.unmasking` of a configuration: fields named like the flags."""
  kinds = {"threshold": float, "entropy_bound": float, "block": int}
  placeholder = config_dict.placeholder
  return {
    name: placeholder(kinds[name]) if value is None else value for name, value in DEFAULTS.items()
  }


def chosen(config: fields.Config) -> fields.Config:
  """`config.evaluation.unmasking` with what the flags say instead, checked.

  What the configuration says for another sampler than the flags' is left out.

  Raises:
    ValueError: a flag means nothing to the sampler, or beside another.
  """
  made = config.evaluation.unmasking.copy_and_resolve_references()
  given = {name: flag.value for name, flag in _FLAGS.items() if flag.value is not None}
  with made.unlocked():
    made.update(given)
    unread = [name for name in DEFAULTS if name not in _read_by(made)]
    for name in unread:
      if name in given:
        raise ValueError(f"--{name} means nothing {_why(made, name)}.")
      made[name] = DEFAULTS[name]
  check(made, config)
  return made


def _read_by(c: fields.Config) -> tuple[str, ...]:
  """The fields of the section that its sampler reads."""
  reads = ("sampler", "guidance", *SAMPLERS.get(c.sampler, ()))
  if c.sampler != "ordered":
    return reads
  instead = ()
  if c.threshold is not None:
    instead = ("per_step",)
  elif c.entropy_bound is not None:
    instead = ("per_step", "order")
  return tuple(name for name in reads if name not in instead)


def _why(c: fields.Config, name: str) -> str:
  """What `name` means nothing to, or beside, and what would be right."""
  if name in SAMPLERS.get(c.sampler, ()):
    other = "entropy_bound" if c.threshold is None else "threshold"
    return f"beside {other}: leave one of them out"
  readers = " or ".join(sampler for sampler, reads in SAMPLERS.items() if name in reads)
  return f"to the sampler {c.sampler}: sampler={readers} reads it"


def check(c: fields.Config, config: fields.Config) -> None:
  """Raises ValueError where a section does not say how this model fills masks in.

  Args:
    c: the section, `config.evaluation.unmasking` or what flags make of it.
    config: of the model.
  """
  where = "evaluation.unmasking"
  fields.choose(f"{where}.sampler", c.sampler, SAMPLERS)
  fields.choose(f"{where}.order", c.order, ORDERS)
  _check_numbers(c, where)
  trained = config.loss.block_length
  if trained is not None:
    fields.require(
      c.sampler not in GRIDDED and c.block == trained,
      f"loss.block_length is {trained}: {where}.block has to be that too, and the sampler "
      "first_hitting or ordered",
    )
    unguided = f"loss.block_length is {trained}: {where}.guidance is not for models of blocks"
    fields.require(c.guidance == 1, unguided)
  for name, default in DEFAULTS.items():
    if name not in _read_by(c) and c[name] != default:
      raise ValueError(f"config.{where}.{name} means nothing {_why(c, name)}.")
  knows = "task" not in config or config.loss.unconditional > 0
  fields.require(
    knows or c.guidance == 1,
    f"{where}.guidance is {c.guidance}, and the model has never seen a masked prompt: train it "
    "with loss.unconditional=0.1",
  )


def _check_numbers(c: fields.Config, where: str) -> None:
  if c.threshold is not None:
    on_scale = c.order in _FROM_0_TO_1 and 0 <= c.threshold <= 1
    orders = ", ".join(_FROM_0_TO_1)
    fields.require(
      on_scale, f"{where}.threshold is of scores from 0 to 1; order has to be one of {orders}"
    )
  both = None not in (c.threshold, c.entropy_bound)
  fields.require(not both, f"{where} has a threshold and an entropy_bound; give one")
  bound = c.entropy_bound
  fields.require(bound is None or bound >= 0, f"{where}.entropy_bound is {bound}; it is at least 0")
  for name in ("per_step", "steps", "block"):
    least = c[name] is None or c[name] >= 1
    fields.require(least, f"{where}.{name} is {c[name]}; it is at least 1")
  fields.require(c.guidance >= 0, f"{where}.guidance is {c.guidance}; it is at least 0")
  fields.require(0 <= c.remask <= 1, f"{where}.remask is {c.remask}; it is from 0 to 1")


def _rule(c: fields.Config) -> masked.Rule:
  if c.sampler == "first_hitting":
    return unmasking.top(unmasking.random_order)
  score = ORDERS[c.order]
  if c.threshold is not None:
    return unmasking.threshold(score, c.threshold)
  if c.entropy_bound is not None:
    return unmasking.entropy_bound(c.entropy_bound)
  return unmasking.top(score, c.per_step)


def filler(
  c: fields.Config,
  model: models.LanguageModel,
  schedule: mask_schedules.MaskSchedule,
  *,
  mask: int,
  blockwise: bool,
) -> Callable[..., Any]:
  """(params, transform, keys [B], tokens [B, L]) -> the last state, as the configuration has it.

  Args:
    c: `config.evaluation.unmasking`, checked.
    model: of V + 1 tokens.
    schedule: of the reverse process.
    mask: V.
    blockwise: whether the model was trained in blocks: then these are cached.

  With guidance the law is led away from that of the same sequence with all that is given masked.
  """

  def algorithm(params, transform, given):
    how = {"mask": mask, "transform": transform}
    if blockwise:
      return blocks.unmask(model, params, _rule(c), c.block, **how)
    predict = masked_models.predictor(model, params)
    if c.guidance != 1:
      without = masked_guidance.without_prompt(predict, given, mask=mask)
      predict = masked_guidance.classifier_free(predict, without, c.guidance)
    times = jnp.linspace(1, 0, c.steps + 1)
    if c.sampler == "ancestral":
      return masked.ancestral(predict, schedule, times, **how)
    if c.sampler == "remasking":
      return remasking.remasking(predict, schedule, times, remasking.cap(c.remask), **how)
    if c.block:
      return masked.unmask(predict, unmasking.semi_autoregressive(_rule(c), c.block), **how)
    if c.sampler == "first_hitting":
      return masked.first_hitting(predict, schedule, **how)
    return masked.unmask(predict, _rule(c), **how)

  def fill(params, transform, keys, tokens):
    made = algorithm(params, transform, tokens != mask)
    if c.sampler in GRIDDED:
      state = base.run(keys, made, base.start(keys, made, tokens), c.steps)[0]
    else:
      state = masked.finished(keys, made, tokens, mask=mask)
    return state if c.guidance == 1 else state._replace(calls=2 * state.calls)

  return fill
