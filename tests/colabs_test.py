"""Every notebook runs from top to bottom, is thin, and is committed without outputs."""

import os
import pathlib

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "colabs").glob("*.ipynb"))


def load(path):
  return nbformat.read(path, as_version=4)


def code_cells(path):
  return [cell for cell in load(path).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_is_committed_without_outputs(path):
  assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_has_no_logic_of_its_own(path):
  for cell in code_cells(path):
    assert len(cell.source.splitlines()) <= 15, cell.source


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_runs(path, tmp_path, monkeypatch):
  monkeypatch.setenv("ANCESTRAL_COLAB_STEPS", "6")  # the notebook's training is this short then
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  monkeypatch.setenv("TMPDIR", os.fspath(tmp_path))  # where the notebook keeps its run
  monkeypatch.setenv("IPYTHONDIR", os.fspath(tmp_path / "ipython"))
  notebook = load(path)
  nbclient.NotebookClient(
    notebook,
    timeout=300,
    kernel_name="python3",
    resources={"metadata": {"path": os.fspath(tmp_path)}},
  ).execute()
  ran = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
  assert ran and all(cell.execution_count for cell in ran)
  assert all(output.output_type != "error" for cell in ran for output in cell.outputs)
  assert any(
    output.output_type in ("display_data", "execute_result")
    for cell in ran
    for output in cell.outputs
  )
