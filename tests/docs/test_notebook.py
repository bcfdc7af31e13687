"""The notebook runs from its first cell to its last, and is kept without what it prints."""

import nbclient
import nbformat
import pytest

from tests.docs.pages import DOCS

PATH = DOCS / "notebooks" / "tour.ipynb"


def _read():
    return nbformat.read(PATH, as_version=4)


def _code():
    return [cell for cell in _read().cells if cell.cell_type == "code"]


def test_the_notebook_is_valid_and_holds_no_outputs():
    nbformat.validate(_read())
    assert _code()
    assert all(cell.outputs == [] and cell.execution_count is None for cell in _code())


@pytest.mark.slow
def test_the_notebook_runs_and_says_what_each_half_brought():
    notebook = _read()
    client = nbclient.NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(PATH.parent)}})
    client.execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "trained weights, evolved instructions" in printed
    assert "report.html" in printed
