"""The notebook of docs/ runs from its first cell to its last."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parent.parent / "docs" / "tutorial.ipynb"
ON_FAKE_DEVICE = """
import torch
from hirelc_deploy.jobs import workplace
from hirelc_deploy.testing.fake_backend import FakeBackend
torch.set_num_threads(1)
workplace.open_target = lambda target: FakeBackend()
"""
"""Goes before the first cell: no test waits for a clock."""


def read() -> Any:
    return pytest.importorskip("nbformat", reason="nbformat is not installed").read(NOTEBOOK, as_version=4)


def test_the_notebook_is_kept_without_outputs() -> None:
    for cell in read().cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = pytest.importorskip("nbclient", reason="nbclient, which runs notebooks, is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel, in which notebooks run, is not installed")
    monkeypatch.setenv("HIRELC_DEPLOY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = read()
    notebook.cells.insert(0, importlib.import_module("nbformat.v4").new_code_cell(ON_FAKE_DEVICE))
    runner = client.NotebookClient(
        notebook, timeout=200, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    cells = runner.execute().cells
    printed = "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))
    assert "units that can be cut" in printed
    assert "worst_recall on the test split" in printed
    assert "times faster" in printed
    assert "weights became" in printed
    errors = [output for cell in cells for output in cell.get("outputs", []) if output.get("name") == "stderr"]
    assert errors == []
    pages = [o.data["text/html"] for c in cells for o in c.get("outputs", []) if "text/html" in o.get("data", {})]
    assert [page.startswith("<iframe srcdoc=") for page in pages] == [True]
    assert (tmp_path / "tutorial-run/bundle/model.onnx").is_file()
