"""Shapes of token trees: which draft continues which.

A tree of K drafts is the tuple of their parents: draft i continues draft parents[i] < i, or the
text itself where that is -1. A chain is the tree (-1, 0, 1, ...). Shapes are static, so all of this
is numpy on the host.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from . import logits as logits_lib

Parents = tuple[int, ...]


def checked(parents: Sequence[int]) -> Parents:
  """The parents as a tuple.

  Raises:
    ValueError: a parent does not come before its child.
  """
  parents = tuple(int(parent) for parent in parents)
  wrong = [i for i, parent in enumerate(parents) if not -1 <= parent < i]
  if wrong:
    raise ValueError(f"tree: draft {wrong[0]} continues {parents[wrong[0]]}; parents come first.")
  return parents


def chain(length: int) -> Parents:
  """One draft after the other.

  Raises:
    ValueError: there is none.
  """
  if length < 1:
    raise ValueError(f"A chain of {length} drafts: it has at least 1.")
  return tuple(range(-1, length - 1))


def chains(count: int, length: int) -> Parents:
  """`count` chains that part at the first token: SpecTr's drafts."""
  return branching([count] + [1] * (length - 1))


def branching(widths: Sequence[int]) -> Parents:
  """Each draft at depth d has widths[d] children; widths[0] continue the text."""
  if not widths or min(widths) < 1:
    raise ValueError(f"branching({tuple(widths)}): every level has at least 1 child a node.")
  parents, level = [], [-1]
  for width in widths:
    children = [parent for parent in level for _ in range(width)]
    level = list(range(len(parents), len(parents) + len(children)))
    parents += children
  return tuple(parents)


def lineage(parents: Parents) -> np.ndarray:
  """[K, K] bool: the ancestors of each draft, and itself."""
  line = np.eye(len(parents), dtype=bool)
  for i, parent in enumerate(parents):
    if parent >= 0:
      line[i] |= line[parent]
  return line


def depths(parents: Parents) -> np.ndarray:
  """[K]: 1 for a draft that continues the text."""
  return lineage(parents).sum(axis=1)


def paths(parents: Parents) -> np.ndarray:
  """[K, depth]: the ancestors of each draft from the text on, and itself, then -1."""
  found = np.full((len(parents), int(depths(parents).max())), -1)
  for i, line in enumerate(lineage(parents)):
    ancestors = np.flatnonzero(line)
    found[i, : ancestors.size] = ancestors
  return found


def families(parents: Parents) -> list[tuple[np.ndarray, np.ndarray]]:
  """(nodes [G], children [G, n]) of the nodes with n children, for each n.

  Nodes count from the text, which is 0; draft i is node i + 1.
  """
  children = {}
  for i, parent in enumerate(parents):
    children.setdefault(parent + 1, []).append(i)
  sizes = sorted({len(some) for some in children.values()})
  nodes = {n: [at for at, some in children.items() if len(some) == n] for n in sizes}
  return [(np.array(nodes[n]), np.array([children[at] for at in nodes[n]])) for n in sizes]


def spare(parents: Parents) -> int:
  """Slots beyond the longest sequence: a tree's nodes share positions, so it needs more of them."""
  return 0 if parents == chain(len(parents)) else len(parents)


def contexts(
  context: logits_lib.Context, parents: Parents, tokens: jax.Array, nodes: Sequence[int]
) -> logits_lib.Context:
  """The text and the path to each of the nodes: [B, G, S], [B, G], [B, G].

  Args:
    context: the text, [B, S].
    parents: of the drafts.
    tokens: [B, K], the drafts.
    nodes: G of them; 0 is the text, i + 1 is draft i.
  """
  path = np.concatenate([np.full_like(paths(parents)[:1], -1), paths(parents)])[np.asarray(nodes)]
  batch_size, num_slots = context.tokens.shape
  places = context.length[:, None, None] + jnp.arange(path.shape[1])[None, None, :]
  slots = jnp.where(path[None] >= 0, places, num_slots)  # out: dropped
  rows = jnp.arange(batch_size)[:, None, None]
  columns = jnp.arange(len(path))[None, :, None]
  repeat = lambda leaf: jnp.repeat(leaf[:, None], len(path), axis=1)
  return logits_lib.Context(
    repeat(context.tokens).at[rows, columns, slots].set(tokens[:, path], mode="drop"),
    context.length[:, None] + (path >= 0).sum(axis=1)[None, :],
    repeat(context.prompt_length),
  )


def visible(length: jax.Array, allowed: np.ndarray, num_slots: int) -> jax.Array:
  """What nodes of a tree may attend to: the text before it, and `allowed` of its own nodes.

  Args:
    length: [B], slots of the text; the tree's nodes are in those that follow.
    allowed: [L, M] bool, of the nodes, the first M slots of the tree.
    num_slots: S.

  Returns:
    [B, L, S] bool, a mask for `LanguageModel.trunk`.
  """
  node = jnp.arange(num_slots)[None, :] - length[:, None]  # [B, S]
  padded = jnp.pad(jnp.asarray(allowed), ((0, 0), (0, 1)))  # a last column of no node
  inside = (node >= 0) & (node < allowed.shape[1])
  own = jnp.moveaxis(padded[:, jnp.where(inside, node, allowed.shape[1])], 0, 1)
  return own | (node < 0)[:, None, :]
