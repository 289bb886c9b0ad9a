"""Weights of a language model in 8 bits, for decoding: a step reads a quarter of the bytes.

A step of decoding is bound by memory where its rows are few: every weight is read to be multiplied
once per row. What is stored is a quotient per weight and a scale per output channel,

  W[i, o] ~ scale[o] values[o, i],        x W ~ (x values^T) * scale,

and the scale is applied to the product, so that only quotients, which bfloat16 holds exactly, are
ever multiplied by x, and no rounded W is written anywhere. Computation stays in the model's dtype:
this is the weight-only half of Dettmers et al. 2022, arXiv 2208.07339, section 2.1, and with
float8_e4m3fn of Micikevicius et al. 2022, arXiv 2209.05433, table 1.

    params = quantised.quantise(transformer.unstack(params), "int8")
    model = quantised.quantised(model)                # any LanguageModel of linen layers

qwix's `PtqProvider` does the same product for one linen module, and quantises it anew where params
come as arrays. A LanguageModel applies a module per layer inside pure functions, with an embedding
and a readout that no module holds, so its interception would have to go into `transformer`; this
goes around it.
"""

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from . import base, partition

# The largest magnitude of a quotient, by dtype.
DTYPES = {"int8": 127.0, "float8_e4m3fn": 448.0}

# Rows up to which a CPU is given a sum of products instead of a matrix product; see `_sums`.
_FEW_ROWS = 64


class Quantised(NamedTuple):
  """A matrix, or a stack of them, by rows: one per output channel, or per token of an embedding."""

  values: jax.Array  # [..., O, I] int8 or float8_e4m3fn
  scale: jax.Array  # [..., O] float32, above 0


def quantise(params: base.Params, dtype: str = "int8") -> base.Params:
  """The params with kernels, embedding and readout as `Quantised`; the rest as it was.

  scale = max |W| / max |value| over a channel, or 1 where that is 0, and values = W / scale,
  rounded to the nearest. So |W - scale values| is at most scale / 2 in int8, and in float8 at most
  the larger of |W| / 16 and scale / 1024, up to float32's rounding. Kernels that are already of the
  form come back exactly where the quotients' range is used.

  Leaves are computed where they are: columns that are split over devices stay split. Stacked layers
  stay stacked; decoding is for `transformer.unstack`ed ones, before or after.

  Args:
    params: of a language model: `kernel` leaves [..., I, O], an `embedding` [V, D], a `readout`
      [D, V].
    dtype: one of `DTYPES`.

  Raises:
    ValueError: an unknown dtype; nothing in params to quantise.
  """
  if dtype not in DTYPES:
    raise ValueError(f"dtype={dtype!r} is not one of {tuple(DTYPES)}.")
  found = []

  def leaf(path, x):
    name = _name(path)
    if name not in ("embedding", "kernel", "readout") or jnp.ndim(x) < 2:
      return x
    found.append(name)
    return _quantise(x if name == "embedding" else jnp.swapaxes(x, -1, -2), dtype)

  made = jax.tree_util.tree_map_with_path(leaf, params)
  if not found:
    raise ValueError("The params have no kernel, embedding or readout, so nothing to quantise.")
  return made


def _name(path) -> str:
  return jax.tree_util.keystr(path[-1:], simple=True)


@functools.partial(jax.jit, static_argnames="dtype")
def _quantise(rows: jax.Array, dtype: str) -> Quantised:
  rows = rows.astype(jnp.float32)
  scale = jnp.max(jnp.abs(rows), axis=-1) / DTYPES[dtype]
  scale = jnp.where(scale > 0, scale, 1)
  quotients = rows / scale[..., None]
  if dtype == "int8":
    quotients = jnp.round(quotients)
  return Quantised(quotients.astype(dtype), scale)


def dequantise(params: base.Params) -> base.Params:
  """The params that `quantise`d ones stand for, float32, in the layout they came in."""
  is_leaf = lambda x: isinstance(x, Quantised)

  def leaf(path, x):
    if not is_leaf(x):
      return x
    rows = x.values.astype(jnp.float32) * x.scale[..., None]
    return rows if _name(path) == "embedding" else jnp.swapaxes(rows, -1, -2)

  return jax.tree_util.tree_map_with_path(leaf, params, is_leaf=is_leaf)


def product(x: jax.Array, matrix: Quantised) -> jax.Array:
  """x [..., I] times the matrix [I, O] that is stored: [..., O] float32.

  The barrier ties the values to x. Without it XLA sees that their conversion is the same in every
  step and moves it out of the loop of decoding, which then reads wide weights of all layers.
  """
  values, rows = jax.lax.optimization_barrier((matrix.values, x.reshape(-1, x.shape[-1])))
  few = rows.shape[0] <= _FEW_ROWS and values.dtype == jnp.int8
  made = jax.lax.platform_dependent(rows, values, cpu=_sums if few else _dot, default=_dot)
  return (made * matrix.scale[None]).reshape(*x.shape[:-1], -1)


def _dot(rows, values):
  """rows [B, I] times values^T, converted to their dtype: GPUs and TPUs convert in the product."""
  return jax.lax.dot_general(
    rows, values.astype(rows.dtype), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
  )


def _sums(rows, values):
  """The same as sums of products, which XLA fuses on CPU with the conversion of int8.

  There it writes the operands of a matrix product to memory first: wide weights, at every step.
  """
  rows, values = rows.astype(jnp.float32), values.astype(jnp.float32)
  if rows.shape[0] == 1:
    return jnp.sum(rows * values, axis=-1)[None]
  return jnp.sum(rows[:, None] * values[None], axis=-1)


def quantised(model: base.LanguageModel) -> base.LanguageModel:
  """The model over params of `quantise`, or over any others as it is.

  Linen's dense layers are intercepted where they find a `Quantised` kernel. Decoding, serving and
  speculation work as over any model. Values have no gradient.
  """

  def embed(params, tokens):
    table = params["embedding"]
    if not isinstance(table, Quantised):
      return model.embed(params, tokens)
    # The model's own embedding, of a table of just these rows. Beyond the vocabulary they are NaN.
    rows = table.values.at[tokens].get(mode="fill", fill_value=0).astype(jnp.float32)
    rows *= table.scale.at[tokens].get(mode="fill", fill_value=jnp.nan)[..., None]
    places = jnp.arange(tokens.size).reshape(tokens.shape)
    return model.embed({**params, "embedding": rows.reshape(tokens.size, -1)}, places)

  def trunk(params, *args, **kwargs):
    with nn.intercept_methods(_intercept):
      return model.trunk(params, *args, **kwargs)

  def readout(params, hidden):
    name = "readout" if "readout" in params else "embedding"
    matrix = params[name]
    if not isinstance(matrix, Quantised):
      return model.readout(params, hidden)
    # What the model does to a product (a soft cap), one logit at a time: its readout of one channel
    # by the matrix [[1]].
    logits = product(hidden, matrix)[..., None]
    return model.readout({**params, name: jnp.ones((1, 1), jnp.float32)}, logits)[..., 0]

  return model._replace(embed=embed, trunk=trunk, readout=readout)


def _intercept(call, args, kwargs, context):
  """Computes a dense layer whose kernel is quantised, and leaves every other method alone."""
  module = context.module
  if not isinstance(module, nn.Dense) or context.method_name != "__call__":
    return call(*args, **kwargs)
  kernel = module.get_variable("params", "kernel")
  if not isinstance(kernel, Quantised):
    return call(*args, **kwargs)
  (x,) = args
  made = product(x, kernel).astype(module.dtype or x.dtype)
  if not module.use_bias:
    return made
  bias = module.get_variable("params", "bias").astype(made.dtype)
  return made + bias.reshape((1,) * (made.ndim - 1) + (-1,))


def rules(rules_: Sequence[partition.Rule]) -> tuple[partition.Rule, ...]:
  """How quantised params are split over a mesh, where `rules_` say it of those they stand for.

  Scales go with their kernel's columns, or with their embedding's tokens. Params that were split
  before they were quantised need none of this.
  """
  made = []
  for rule in rules_:
    made.append(rule)
    kind = re.search(r"(kernel|embedding|readout)\$$", rule.pattern)
    if kind:
      first, second = rule.spec if kind[1] == "embedding" else reversed(rule.spec)
      stem = rule.pattern[:-1]
      values = jax.sharding.PartitionSpec(first, second)
      scale = jax.sharding.PartitionSpec(first)
      made.append(partition.Rule(f"{stem}/values$", values, rule.unit))
      made.append(partition.Rule(f"{stem}/scale$", scale, rule.unit))
  return tuple(made)
