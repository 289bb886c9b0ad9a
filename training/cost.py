"""What a function costs: the FLOPs of its matrix products and convolutions."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

Kernels = Mapping[str, Callable[[Any], int]]


def flops(fn: Callable[..., Any], *args: Any, kernels: Kernels | None = None, **kwargs: Any) -> int:
  """FLOPs of `fn`'s matrix products and convolutions, two per multiply-add, on all devices.

  They are read off the jaxpr: a product [.., M, K] [.., K, N] is 2 M N K for each of its batch. Of
  a convolution only taps on elements count, not those on padding or between dilated elements, so
  that its two gradients cost what it costs. A scan counts `length` times, a cond as its dearest
  branch, the body of a shard_map once for every device that it is on. What rematerialisation
  computes again counts again: of a step with it, this is what the hardware does, and the FLOPs of
  the same step without it are what model FLOPs utilisation is defined by. Elementwise operations,
  sorts and decompositions do not count; nor is dead code found.

  Args:
    fn: traced, not run.
    *args: arrays, or `jax.ShapeDtypeStruct`s.
    kernels: FLOPs of an equation by the name of its primitive, for those that cannot be read.
    **kwargs: the same by name.

  Raises:
    ValueError: products in a while loop, whose trips are not known; a kernel that cannot be read.

  Reference: Chowdhery et al. 2022 (PaLM), arXiv 2204.02311, appendix B.
  """
  return _of(jax.make_jaxpr(fn)(*args, **kwargs).jaxpr, kernels or {})


def _of(jaxpr: Any, kernels: Kernels) -> int:
  return sum(_equation(equation, kernels) for equation in jaxpr.eqns)


def _equation(equation: Any, kernels: Kernels) -> int:
  name = equation.primitive.name
  if name in kernels:
    return kernels[name](equation)
  if name in _COUNTED:
    return _COUNTED[name](equation)
  if name.startswith(_OPAQUE):
    raise ValueError(
      f"The FLOPs of {name} cannot be read: give kernels={{{name!r}: equation -> n}}."
    )
  inner = [_of(jaxpr, kernels) for jaxpr in jaxprs(equation.params.values())]
  if name == "while" and any(inner):
    raise ValueError("A while loop has products, and its trips are not known: make it a scan.")
  if name == "cond":
    return max(inner)
  return sum(inner) * _repeats(name, equation.params)


def _repeats(name: str, params: Mapping[str, Any]) -> int:
  if name == "scan":
    return params["length"]
  if name == "shard_map":  # its shapes are one device's; releases of jax name the axes differently
    axes = params["newly_manual_axes" if "newly_manual_axes" in params else "manual_axes"]
    return math.prod(params["mesh"].shape[axis] for axis in axes)
  return 1


def jaxprs(values: Any) -> Iterator[Any]:
  """The jaxprs among an equation's parameters."""
  for value in values:
    if isinstance(value, (tuple, list)):
      yield from jaxprs(value)
    elif hasattr(value, "eqns"):
      yield getattr(value, "jaxpr", value)  # a closed one has its own inside


def _dot(equation: Any) -> int:
  left, _ = (variable.aval.shape for variable in equation.invars)
  (contracted, _), _ = equation.params["dimension_numbers"]
  depth = math.prod(left[axis] for axis in contracted)
  return 2 * depth * math.prod(equation.outvars[0].aval.shape)


def _convolution(equation: Any) -> int:
  params, numbers = equation.params, equation.params["dimension_numbers"]
  left, kernel = (variable.aval.shape for variable in equation.invars)
  out = equation.outvars[0].aval.shape
  at = lambda shape, spec: [shape[axis] for axis in spec]
  (_, _, *sides), (_, depth, *window) = at(left, numbers.lhs_spec), at(kernel, numbers.rhs_spec)
  batch, features, *places = at(out, numbers.out_spec)
  taps = map(
    _taps,
    sides,
    window,
    places,
    params["window_strides"],
    params["padding"],
    params["lhs_dilation"],
    params["rhs_dilation"],
  )
  return 2 * batch * features * depth * math.prod(taps)


def _taps(side, window, places, stride, padding, dilation, window_dilation) -> int:
  """Pairs along one axis of a place in the output and a tap that falls on an element."""
  first = np.arange(places)[:, None] * stride - padding[0]
  at = first + np.arange(window)[None] * window_dilation
  on = (at >= 0) & (at <= (side - 1) * dilation) & (at % dilation == 0)
  return int(on.sum())


_COUNTED = {"dot_general": _dot, "conv_general_dilated": _convolution}
_OPAQUE = ("ragged_dot", "dot_product_attention", "scaled_matmul", "pallas_call", "ffi_call")
