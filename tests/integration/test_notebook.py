"""The notebook of the guide, executed by a kernel of Jupyter, in which every job draws a progress bar."""

import ast
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_notebook_of_the_guide_runs(
    repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fewer epochs. Its jobs draw a bar, and a kernel that has MLflow and Ray installed needs no other setting."""
    monkeypatch.delenv("MPLBACKEND")  # the kernel shows figures below their cell
    notebook = nbformat.read(repo_root / "docs" / "notebook.ipynb", as_version=4)
    assert all(cell.get("outputs", []) == [] for cell in notebook.cells), "outputs are not committed"
    for cell in notebook.cells:
        cell.source = cell.source.replace('epochs": 4', 'epochs": 1')
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs: list[Any] = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type in ("error", "stream")]
    shown = [kind for output in outputs for kind in output.get("data", {})]
    assert shown.count("application/vnd.jupyter.widget-view+json") == 2, "a bar for each job"
    assert {"image/svg+xml", "image/png"} <= set(shown)
    lines = "".join(output.data["text/plain"] for output in outputs if "data" in output)
    assert "epoch 1: loss" in lines
    name, probability = ast.literal_eval(outputs[-1].data["text/plain"])
    assert name in "0123456789"
    assert 0.1 <= probability <= 1
    assert sorted(path.name.split("-")[1] for path in (tmp_path / "runs").iterdir()) == ["retrain", "search"]
