"""Functions of published libraries, taken out of their source; the libraries are not imported.

`make .venv/installed-peers` unpacks their wheels, without what they depend on, beside the
environment's own packages.
"""

import ast
import importlib.metadata
import pathlib
import sys
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

SOURCES = pathlib.Path(sys.prefix) / "published"  # the Makefile's


def functions(
  package: str, version: str, path: str, names: Sequence[str], given: Mapping[str, Any]
) -> SimpleNamespace:
  """The named functions and classes (or "Class.method") of a file, over the names they are given.

  Decorators and annotations are dropped, so that `given` needs only what bodies and defaults use.

  Args:
    package: such as "trl".
    version: that the test is written against.
    path: of the file within the wheel.
    names: of functions, of classes, or of methods, which become functions of self.
    given: what they see as globals, such as torch.
  """
  found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions(path=[SOURCES])}
  assert found.get(package) == version, f"{SOURCES} has {found}, this test is for {version}"
  tree = ast.parse((SOURCES / path).read_text())
  bodies = {None: tree} | {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
  chosen = []
  for name in names:
    holder, _, last = name.rpartition(".")
    nodes = (n for n in bodies[holder or None].body if getattr(n, "name", None) == last)
    chosen.append(_bare(next(nodes)))
  scope = dict(given)
  exec(compile(ast.Module(chosen, type_ignores=[]), path, "exec"), scope)
  return SimpleNamespace(
    **{name.rpartition(".")[2]: scope[name.rpartition(".")[2]] for name in names}
  )


def _bare(node: ast.AST) -> ast.AST:
  for inner in ast.walk(node):
    if isinstance(inner, ast.FunctionDef):
      inner.decorator_list, inner.returns = [], None
      arguments = inner.args
      for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        a.annotation = None
    elif isinstance(inner, ast.AnnAssign):
      inner.annotation = ast.Constant("")
  return node
