"""The repository root is the package `ancestral`; everything a wheel ships is named here."""

import pathlib

import setuptools
from setuptools.command import build_py

FOLDERS = ("configs", "evaluation", "launch", "models", "sampling", "tasks", "training")


class BuildPy(build_py.build_py):
  """Leaves this file out of the wheel: it sits in the package's own folder."""

  def find_package_modules(self, package, package_dir):
    modules = super().find_package_modules(package, package_dir)
    return [m for m in modules if pathlib.Path(m[2]).resolve() != pathlib.Path(__file__).resolve()]


setuptools.setup(
  packages=["ancestral", *(f"ancestral.{folder}" for folder in FOLDERS)],
  package_dir={"ancestral": "."},
  package_data={"ancestral.launch": ["*.sh", "*.sbatch"]},
  cmdclass={"build_py": BuildPy},
)
