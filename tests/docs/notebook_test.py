"""The notebook runs from its first cell to its last."""

import os
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_notebook_runs(tmp_path, monkeypatch):
  nbformat = pytest.importorskip("nbformat", reason="needs the extra [docs]")
  nbclient = pytest.importorskip("nbclient", reason="needs the extra [docs]")
  here = str(pathlib.Path(sys.executable).parent)  # Of `argenseg`.
  monkeypatch.setenv("PATH", here + os.pathsep + os.environ["PATH"])
  monkeypatch.setenv("ARGENSEG_NOTEBOOK_MINUTES", "0.1")
  monkeypatch.setenv("ARGENSEG_NOTEBOOK_WORKDIR", str(tmp_path / "run"))
  notebook = nbformat.read(ROOT / "docs" / "quickstart.ipynb", as_version=4)
  nbclient.NotebookClient(
    notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}
  ).execute()
  outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
  images = [o for o in outputs if "image/png" in o.get("data", {})]
  assert len(images) == 4  # The report and one a request.
