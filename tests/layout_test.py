"""The house keeps its shape: imports, names, sizes, and the strictness of this test suite."""

import ast
import importlib
import pathlib
import warnings

import jax
import jax.numpy as jnp
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Each folder, and the folders it may import from beside itself.
MAY_IMPORT = {
  "tasks": set(),
  "models": set(),
  "sampling": {"tasks", "models"},
  "evaluation": {"tasks", "models", "sampling"},
  "training": {"tasks", "models", "sampling", "evaluation"},
  "launch": {"tasks", "models", "sampling", "evaluation", "training"},
}
ABSOLUTE = ("benchmarks", "configs", "tests")  # outside the package: `from ancestral.models import`
HAS_NO = {
  "tasks": {"jax", "flax", "optax"},
  "sampling": {"flax", "optax"},
  "evaluation": {"flax"},
  "training": {"flax"},
}
FORBIDDEN = {"utils", "util", "helpers", "helper", "common", "misc", "core"}


def files(*folders):
  return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imported(path, root=ROOT):
  """(level, dotted module parts) of everything that a file imports, functions' bodies included."""
  found = []
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found += [(0, tuple(alias.name.split("."))) for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      module = tuple(node.module.split(".")) if node.module else ()
      found += [(node.level, (*module, alias.name)) for alias in node.names]
  return found


def violations(path, root=ROOT):
  """What a file of the package imports and may not."""
  folder, *inside = path.relative_to(root).parts
  wrong = []
  for level, parts in imported(path):
    if level == 0 and (
      parts[0] in HAS_NO.get(folder, ()) or parts[0] in MAY_IMPORT or parts[0] == "ancestral"
    ):
      wrong.append(".".join(parts))
    elif level == len(inside) + 1 and parts[0] in MAY_IMPORT:  # `..models` from a folder's file
      if parts[0] != folder and parts[0] not in MAY_IMPORT[folder]:
        wrong.append("." * level + ".".join(parts))
    elif level > len(inside) + 1:
      wrong.append("." * level + ".".join(parts))
  return wrong


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folders_import_only_from_their_left(folder):
  found = {str(path.relative_to(ROOT)): violations(path) for path in files(folder)}
  assert found, f"{folder}/ has no files"
  assert not {path: names for path, names in found.items() if names}


@pytest.mark.parametrize(
  "folder, line",
  [
    ("models", "from ..sampling import base"),
    ("tasks", "from ..models import toy"),
    ("tasks", "import jax.numpy as jnp"),
    ("sampling", "from flax import linen as nn"),
    ("sampling", "def f():\n  from ..training import step"),
    ("sampling", "from .. import evaluation"),
    ("evaluation", "from ancestral.models import base"),
    ("launch", "import models.base"),
    ("training", "from ...sampling import base"),
  ],
)
def test_the_import_rule_sees_a_violation(tmp_path, folder, line):
  (tmp_path / folder).mkdir()
  path = tmp_path / folder / "some.py"
  path.write_text(line + "\n")
  assert violations(path, tmp_path)
  path.write_text("import os\nimport numpy as np\nfrom . import base\n")
  assert not violations(path, tmp_path)


def test_sampling_may_import_models(tmp_path):
  (tmp_path / "sampling").mkdir()
  path = tmp_path / "sampling" / "some.py"
  path.write_text("from ..models import base as models\nfrom .. import models\nimport jax\n")
  assert not violations(path, tmp_path)


def test_outside_the_package_imports_are_absolute():
  wrong = [
    (path.name, parts)
    for path in files(*ABSOLUTE)
    for level, parts in imported(path)
    if level > 0 or parts[0] in MAY_IMPORT
  ]
  assert not wrong


def test_files_are_short_and_named_for_what_they_hold():
  every = files(*MAY_IMPORT, *ABSOLUTE)
  assert len(every) > 20
  long = {
    str(path.relative_to(ROOT)): lines
    for path in every
    if (lines := len(path.read_text().splitlines())) > 400
  }
  assert not long
  vague = [path for path in every if {*path.relative_to(ROOT).with_suffix("").parts} & FORBIDDEN]
  assert not vague


def test_binaries_define_each_flag_once():
  for path in files("launch"):  # in one process, where absl refuses a name that is taken
    importlib.import_module(f"ancestral.launch.{path.stem}")


def test_rank_promotion_raises():
  with pytest.raises(ValueError, match="rank_promotion"):
    jnp.ones((2, 3)) + jnp.ones(3)


def test_reusing_a_key_raises():
  key = jax.random.key(0)
  jax.random.normal(key)
  with pytest.raises(jax.errors.KeyReuseError):
    jax.random.normal(key)


def test_a_warning_raises():
  with pytest.raises(UserWarning):
    warnings.warn("heard", UserWarning, stacklevel=1)


def test_tests_run_on_the_cpu():
  assert jax.default_backend() == "cpu"
