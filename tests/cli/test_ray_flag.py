"""`dspy-fst run FILE --ray ADDRESS`: the address reaches the run's checks, and without it Ray is not imported."""

import subprocess
import sys

import yaml

from tests.cli.conftest import MODULE, SETTINGS, SOURCE, invoke


def test_an_address_that_cannot_be_joined_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / f"{MODULE}.py").write_text(SOURCE)
    (tmp_path / "project.yaml").write_text(yaml.safe_dump({**SETTINGS, "run_dir": "run"}))
    said = invoke("run", tmp_path, "--ray", "ray://head:10001", code=2)
    assert "ray='ray://head:10001': use 'local'" in " ".join(said.output.split())
    assert not (tmp_path / "run").exists()
    sys.modules.pop(MODULE, None)


def test_a_run_without_it_never_imports_ray():
    code = "import sys, dspy_fst.training.open_run, dspy_fst.optimizer; print('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
