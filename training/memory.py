"""How much memory a program takes, read off its jaxpr: nothing is allocated or compiled."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from . import cost

Size = Callable[[tuple[int, ...], Any], int]


def nbytes(shape: Sequence[int], dtype: Any) -> int:
  """Bytes of an array; keys count as what they hold."""
  itemsize = getattr(dtype, "itemsize", 4)
  return math.prod(shape) * itemsize


def peak(fn: Callable[..., Any], *args: Any, size: Size = nbytes) -> int:
  """The most bytes that `fn` holds at once, arguments included, all of them donated.

  The equations run in their order. An array lives from the equation that makes it to its last use;
  one that dies in an elementwise equation, an update in place or a loop gives its memory to the
  result. What only renames, repeats or casts takes none, nor does an elementwise result that only
  one elementwise equation or sum uses. A loop takes what one turn of it takes, beside what it
  carries and stacks. XLA's own figures for steps of training on CPU, in docs/scale.md, are near; in
  bfloat16 it keeps float32 copies there, which this does not know.

  Args:
    fn: traced, not run.
    *args: arrays, or `jax.ShapeDtypeStruct`s.
    size: bytes of an array by shape and dtype, for those that are split over devices.
  """
  jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
  return _peak(jaxpr, size, own_inputs=True)


class _Buffer:
  """Memory that one or more variables hold."""

  def __init__(self, size: int):
    self.size, self.holders = size, 0


class _Memory:
  """What is live, as equations come and go."""

  def __init__(self, size: Size):
    self.live, self.most = 0, 0
    self._size, self._held = size, {}

  def sizes(self, variables) -> int:
    return sum(self._size(v.aval.shape, v.aval.dtype) for v in variables if _is_array(v))

  def hold(self, variable, buffers) -> None:
    self._held[variable] = buffers
    for buffer in buffers:
      self.live += 0 if buffer.holders else buffer.size
      buffer.holders += 1
    self.most = max(self.most, self.live)

  def make(self, variable) -> None:
    self.hold(variable, [_Buffer(self.sizes([variable]))])

  def drop(self, variable) -> None:
    for buffer in self._held.pop(variable, ()):
      buffer.holders -= 1
      self.live -= 0 if buffer.holders else buffer.size

  def of(self, variables) -> list[_Buffer]:
    return [buffer for v in variables for buffer in self._held.get(v, ())]

  def freed_with(self, variables) -> int:
    """Bytes that nobody else holds."""
    return sum(buffer.size for buffer in set(self.of(variables)) if buffer.holders == 1)

  def pass_through(self, more: int) -> None:
    self.most = max(self.most, self.live + more)


def _is_array(variable) -> bool:
  return hasattr(variable.aval, "shape") and hasattr(variable.aval, "dtype")


def _peak(jaxpr: Any, size: Size, *, own_inputs: bool) -> int:
  """The most bytes at once; without its own inputs, which the caller holds."""
  memory, dying, users = _Memory(size), _last_uses(jaxpr), _users(jaxpr)
  for variable in (*jaxpr.invars, *jaxpr.constvars):
    if own_inputs:
      memory.make(variable)
  for number, equation in enumerate(jaxpr.eqns):
    dead = dying.get(number, set())
    name = equation.primitive.name
    inputs = [v for v in equation.invars if not _is_literal(v)]
    if name == "optimization_barrier":
      for variable, source in zip(equation.outvars, equation.invars, strict=True):
        memory.hold(variable, [] if _is_literal(source) else memory.of([source]))
      made = ()
    elif name in _FREE or (name in _FUSED and _is_fused(equation.outvars[0], users)):
      memory.hold(equation.outvars[0], memory.of(inputs))
      made = ()
    else:
      made = [v for v in equation.outvars if v in dying["used"]]
      needed = memory.sizes(equation.outvars)
      if name in _IN_PLACE:
        needed = max(needed - memory.freed_with(dead), 0)
      memory.pass_through(needed + _inner(equation, size))
    for variable in dead:
      memory.drop(variable)
    for variable in made:
      memory.make(variable)
  return memory.most


def _inner(equation: Any, size: Size) -> int:
  """What an equation's own jaxprs take beside its results."""
  inner = [_peak(jaxpr, size, own_inputs=False) for jaxpr in cost.jaxprs(equation.params.values())]
  if not inner or equation.primitive.name in ("scan", "while"):
    return max(inner, default=0)  # a turn's results come beside what is carried
  results = sum(size(v.aval.shape, v.aval.dtype) for v in equation.outvars if _is_array(v))
  return max(max(inner) - results, 0)


def _last_uses(jaxpr: Any) -> dict[Any, set]:
  """By the equation's number, the variables used last there; under "used", all that are used."""
  last = {v: i for i, e in enumerate(jaxpr.eqns) for v in e.invars if not _is_literal(v)}
  last |= {v: len(jaxpr.eqns) for v in jaxpr.outvars if not _is_literal(v)}
  dying: dict[Any, set] = {"used": set(last)}
  for variable, number in last.items():
    dying.setdefault(number, set()).add(variable)
  return dying


def _users(jaxpr: Any) -> dict[Any, list[str]]:
  """The names of the equations that use each variable; "return" of the results."""
  users: dict[Any, list[str]] = {}
  for equation in jaxpr.eqns:
    for variable in equation.invars:
      if not _is_literal(variable):
        users.setdefault(variable, []).append(equation.primitive.name)
  for variable in jaxpr.outvars:
    if not _is_literal(variable):
      users.setdefault(variable, []).append("return")
  return users


def _is_fused(variable, users) -> bool:
  """Whether XLA makes it inside the one equation that uses it."""
  match users.get(variable, []):
    case [user]:
      return user in _FUSED | _FREE or user.startswith("reduce_")
    case several:
      return not several


def _is_literal(variable: Any) -> bool:
  return hasattr(variable, "val")


_FREE = frozenset(
  "reshape broadcast_in_dim squeeze expand_dims convert_element_type stop_gradient copy iota "
  "sharding_constraint name transpose slice rev".split()
)
_FUSED = frozenset(
  "add sub mul div max min exp log tanh neg sign rsqrt sqrt integer_pow pow select_n eq ne lt gt "
  "le ge and or not logistic cos sin square add_any expm1 log1p abs is_finite erf floor round "
  "clamp exp2".split()
)
_IN_PLACE = _FUSED | frozenset("cumsum dynamic_update_slice scatter scatter-add scan while".split())
