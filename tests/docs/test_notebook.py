"""The notebooks run from the first cell to the last, and are kept without what they print."""

import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import nbclient
import nbformat
import pytest

from programs import smollm2
from tests.docs.pages import DOCS

TOUR = DOCS / "notebooks" / "tour.ipynb"
FROM_PIP = DOCS / "notebooks" / "from_pip.ipynb"


def _read(path):
    return nbformat.read(path, as_version=4)


def _printed(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in outputs)


@pytest.mark.parametrize("path", sorted(DOCS.rglob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_is_valid_and_holds_no_outputs(path):
    notebook = _read(path)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)


@pytest.mark.slow
def test_the_tour_runs_and_says_what_each_half_brought():
    notebook = _read(TOUR)
    nbclient.NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(TOUR.parent)}}).execute()
    printed = _printed(notebook)
    assert "trained weights, evolved instructions" in printed
    assert "report.html" in printed


@pytest.fixture
def on_disk():
    """For gigabytes: where other tests write may be in memory."""
    with tempfile.TemporaryDirectory(prefix="dspy-fst-notebook-") as folder:
        yield Path(folder)


@pytest.fixture
def bare(on_disk, monkeypatch):
    """A kernel in an environment where every library is, and dspy_fst is not."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(on_disk / "venv")], check=True, timeout=120)
    (site,) = (on_disk / "venv" / "lib").glob("python*/site-packages")
    ours = Path(find_spec("dspy").origin).parent.parent
    for found in ours.iterdir():
        if not found.name.endswith(".pth") and "dspy_fst" not in found.name:
            (site / found.name).symlink_to(found)
    python = on_disk / "venv" / "bin" / "python"
    spec = on_disk / "share" / "kernels" / "bare" / "kernel.json"
    spec.parent.mkdir(parents=True)
    arguments = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec.write_text(json.dumps({"argv": arguments, "display_name": "bare", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(on_disk / "share"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return python


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_notebook_from_pip_installs_trains_and_serves(bare, on_disk, monkeypatch):
    """pip installs a wheel of this tree. Its dependencies are there already, so that no index is asked."""
    build = [sys.executable, "-c", f"import hatchling.build as b; print(b.build_wheel({str(on_disk)!r}))"]
    wheel = subprocess.run(build, cwd=DOCS.parent, capture_output=True, text=True, check=True, timeout=300).stdout
    monkeypatch.setenv("DSPY_FST", str(on_disk / wheel.split()[-1]))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("MODEL", str(smollm2.folder()))
    absent = subprocess.run([bare, "-c", "import dspy_fst"], cwd=on_disk, capture_output=True, timeout=60)
    assert absent.returncode != 0

    notebook = _read(FROM_PIP)
    place = {"metadata": {"path": str(on_disk)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="bare", resources=place).execute()
    installed = [bare, "-c", "import dspy_fst; print(dspy_fst.__file__)"]
    found = subprocess.run(installed, cwd=on_disk, capture_output=True, text=True, check=True, timeout=60).stdout
    assert Path(found.strip()).is_relative_to(on_disk / "venv")
    printed = _printed(notebook)
    assert "step 0: mean reward" in printed
    assert "'outputs': {'mood': " in printed
    assert (on_disk / "moods_report.html").is_file()
    assert (on_disk / "moods_compiled").is_dir()
