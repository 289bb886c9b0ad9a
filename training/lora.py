"""LoRA: training a low-rank change of some matrices of a model that stays as it is.

    W' = W + scale A B,    A [in, r] drawn at random, B [r, out] zero at first

The train state's params are the adapters alone, so that checkpoints, averages and the optimiser's
moments are of their size. The frozen params are an argument of the jitted step, and the loss over
adapters is made inside it:

    @functools.partial(jax.jit, donate_argnums=1)
    def update(key, state, batch, frozen):
      loss_fn = lora.adapted(next_token_loss, frozen, scale)
      return step.train_step(key, state, batch, loss_fn=loss_fn, optimizer=..., averaging=...)

The model and its loss are unchanged: they see the params W'. That costs 2 in out r operations a
matrix forward and 4 backward, once a microbatch and not per token, which is nothing where a batch
has far more than r tokens. But the gradient of W', of the matrix's size, is made on the way to
those of A and B: a step takes the time of one that trains all, and while it runs memory for W' and
its gradient. What is saved is what is kept between steps. Dropout of an adapter's input, which the
paper's code has, is not a change of W, and there is none here.

Reference: Hu et al. 2021, arXiv 2106.09685, section 4.1.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from . import step


class Adapter(NamedTuple):
  """The change of one matrix [..., in, out], or of each in a stack, before it is scaled."""

  a: jax.Array  # [..., in, r] float32
  b: jax.Array  # [..., r, out] float32


# By the path of the matrix in the params, such as "layers/attention/query/kernel".
Adapters = Mapping[str, Adapter]


def usual_scale(alpha: float, rank: int) -> float:
  """alpha / r, the paper's: what a change of r does to the learning rate is not made up for."""
  return alpha / rank


def rank_stabilised_scale(alpha: float, rank: int) -> float:
  """alpha / sqrt(r), with which the size of the first updates does not depend on r.

  Reference: Kalajdzievski 2023, arXiv 2312.03732, definition 3.1 and theorem 3.2.
  """
  return alpha / rank**0.5


def init(key: jax.Array, params: Any, patterns: Sequence[str], rank: int) -> dict[str, Adapter]:
  """Adapters of the matrices whose path has one of the patterns; they change nothing yet.

  A is uniform on +-1/sqrt(in), as in the paper's code and PEFT (the paper says normal), and B is 0.
  Leading dimensions are those of a stack, of layers or of a convolution's taps.

  Args:
    key: of A.
    params: of any model, or their shapes; nothing but shapes is read.
    patterns: regular expressions, searched for in paths such as "layers/attention/query/kernel", or
      "layers/0/attention/query/kernel" where the layers are apart.
    rank: r.

  Raises:
    ValueError: a pattern that no matrix has; a rank below 1.
  """
  if rank < 1:
    raise ValueError(f"rank={rank} is not at least 1.")
  shapes = {path: jnp.shape(leaf) for path, leaf in _leaves(params) if _is_matrix(path, leaf)}
  for pattern in patterns:
    if not any(re.search(pattern, path) for path in shapes):
      some = ", ".join(sorted(shapes)[:3])
      raise ValueError(f"No matrix's path has the pattern {pattern!r}; there are {some}, ....")
  paths = [path for path in shapes if any(re.search(pattern, path) for pattern in patterns)]

  def adapter(key, path):
    *stack, num_in, num_out = shapes[path]
    bound = num_in**-0.5
    a = jax.random.uniform(key, (*stack, num_in, rank), minval=-bound, maxval=bound)
    return Adapter(a, jnp.zeros((*stack, rank, num_out)))

  keys = jax.random.split(key, max(len(paths), 1))
  return {path: adapter(key, path) for key, path in zip(keys, paths, strict=False)}


def _leaves(params) -> list[tuple[str, Any]]:
  return [(path_name(path), leaf) for path, leaf in jax.tree.leaves_with_path(params)]


def path_name(path: Any) -> str:
  """A key path as one string, "layers/attention/query/kernel"."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_matrix(path: str, leaf) -> bool:
  """Not a stack of vectors: those of stacked layers have two dimensions as well."""
  return len(jnp.shape(leaf)) >= 2 and path.rpartition("/")[2] not in ("scale", "bias")


def merge(params: Any, adapters: Adapters, scale: float | jax.Array) -> Any:
  """The params with W + scale A B in place of each W that has an adapter, in W's dtype.

  The sum is made in float32. Differentiable: with G the gradient of W', those of A and B are
  scale G B^T and scale A^T G.

  Raises:
    ValueError: an adapter of a matrix that is not there, or is of another shape.
  """
  shapes = {path: jnp.shape(leaf) for path, leaf in _leaves(params)}
  for path, (a, b) in adapters.items():
    changed = (*a.shape[:-1], b.shape[-1])
    if shapes.get(path) != changed:
      raise ValueError(f"{path}: the adapter is of a matrix {changed}, found {shapes.get(path)}.")

  def leaf(path, w):
    if path_name(path) not in adapters:
      return w
    a, b = adapters[path_name(path)]
    return (w.astype(jnp.float32) + scale * jnp.matmul(a, b)).astype(w.dtype)

  return jax.tree_util.tree_map_with_path(leaf, params)


def adapted(loss_fn: step.LossFn, frozen: Any, scale: float | jax.Array) -> step.LossFn:
  """The loss as a function of adapters. For use inside jit, where `frozen` is an argument."""
  return lambda key, adapters, batch: loss_fn(key, merge(frozen, adapters, scale), batch)
