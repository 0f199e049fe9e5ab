"""The notebook docs/tour.py runs from beginning to end, and shows what it says."""

import ast
import os
import re
from pathlib import Path
from typing import Any

import jupytext
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from tests.conftest import ROOT, environment

TOUR = ROOT / "docs/tour.py"


def execute(notebook: Any, folder: Path, **more: str) -> str:
    """Run all cells in `folder`. Returns what they print."""
    env = environment(**more)
    env.pop("PYTEST_CURRENT_TEST", None)  # where it is set, the kernel does not show what programs print
    client = NotebookClient(
        notebook,
        timeout=240,
        kernel_name="python3",
        resources={"metadata": {"path": folder}},
    )
    client.execute(env=env)
    return "".join(output.get("text", "") for output in outputs(notebook))


def outputs(notebook: Any) -> list[Any]:
    """Those of all cells."""
    found = []
    for cell in notebook.cells:
        found += cell.get("outputs", [])
    return found


@pytest.mark.slow
def test_the_tour_trains_repairs_and_maps_energy(tmp_path: Path) -> None:
    notebook = jupytext.read(TOUR)
    for cell in notebook.cells:
        cell.source = cell.source.replace("IMAGES = 30_000", "IMAGES = 6_000")
    said = execute(notebook, tmp_path)
    assert "IMAGES = 6_000" in str(notebook.cells)
    assert "naign with 0.17 M parameters" in said
    pictures = [output for output in outputs(notebook) if "image/png" in output.get("data", {})]
    assert len(pictures) == 5
    repairs = re.findall(r"^(blur|noise) +error (\S+) damaged, (\S+) repaired", said, re.M)
    assert len(repairs) == 2
    for _, before, after in repairs:
        assert float(after) < float(before)
    ((before, after),) = re.findall(r"^hole +error (\S+) mean of known pixels, (\S+) filled", said, re.M)
    assert float(after) < float(before)
    clean, damaged, swapped = (float(value) for value in re.findall(r"energy (\d\S+)", said))
    assert clean < damaged < swapped


def test_a_kernel_without_the_package_and_a_clone_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "naign").mkdir()
    hidden = "raise ModuleNotFoundError(\"No module named 'naign'\")"  # comes before the one that is installed
    (tmp_path / "naign/__init__.py").write_text(hidden)
    notebook = jupytext.read(TOUR)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    notebook.cells = code[:2]
    with pytest.raises(CellExecutionError, match=r"no NAIGN \(No module named .*\): open docs/tour.ipynb in"):
        execute(notebook, tmp_path, PYTHONPATH=str(tmp_path))
    kinds = [output.output_type for output in outputs(notebook)]
    assert kinds.count("error") == 1
    assert os.listdir(tmp_path) == ["naign"]


def test_the_notebook_file_is_that_of_the_source_without_outputs() -> None:
    file = jupytext.read(TOUR.with_suffix(".ipynb"))
    source = jupytext.read(TOUR)
    assert len(file.cells) == len(source.cells)
    for cell, original in zip(file.cells, source.cells, strict=True):
        assert cell.cell_type == original.cell_type
        assert cell.source == original.source, "make docs/tour.ipynb"
        assert not cell.get("outputs")
        assert not cell.get("execution_count")
        if cell.cell_type == "code":
            ast.parse(cell.source)
