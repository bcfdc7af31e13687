"""`dspy-fst run FILE --ray ADDRESS`: the address reaches the run's checks, and without it Ray is not imported."""

import subprocess
import sys

import pytest
import yaml

from tests.cli.conftest import MODULE, SETTINGS, SOURCE, invoke

DISTILL = {"method": "distill", "seed_kl_coefficient": 1.0, "seed_kl_teacher": "population"}


def test_an_address_that_cannot_be_joined_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / f"{MODULE}.py").write_text(SOURCE)
    (tmp_path / "project.yaml").write_text(yaml.safe_dump({**SETTINGS, "run_dir": "run"}))
    said = invoke("run", tmp_path, "--ray", "ray://head:10001", code=2)
    assert "ray='ray://head:10001': use 'local'" in " ".join(said.output.split())
    assert not (tmp_path / "run").exists()
    sys.modules.pop(MODULE, None)


@pytest.mark.parametrize(
    ("flags", "recipe", "words"),
    [
        (["--ray", ""], {}, "--ray='': String should have at least 1 character"),
        (["--loss", "grpo"], DISTILL, "--loss beside the file: "),
    ],
)
def test_a_flag_that_is_wrong_alone_or_beside_the_file_is_a_sentence(tmp_path, flags, recipe, words):
    (tmp_path / f"{MODULE}.py").write_text(SOURCE)
    project = {**SETTINGS, "recipe": {**SETTINGS["recipe"], **recipe}}
    (tmp_path / "project.yaml").write_text(yaml.safe_dump(project))
    assert words in " ".join(invoke("run", tmp_path, *flags, code=2).output.split())
    sys.modules.pop(MODULE, None)


def test_check_says_that_it_leaves_the_cluster_to_the_run(tmp_path):
    (tmp_path / f"{MODULE}.py").write_text(SOURCE)
    project = {**SETTINGS, "recipe": {**SETTINGS["recipe"], "ray": "local", "ranks": 99}}
    (tmp_path / "project.yaml").write_text(yaml.safe_dump(project))
    said = " ".join(invoke("check", tmp_path / "project.yaml").output.split())
    assert said.count("ray='local': check did not connect") == 1
    sys.modules.pop(MODULE, None)


@pytest.mark.slow
def test_a_run_without_it_never_imports_ray():
    code = "import sys, dspy_fst.training.open_run, dspy_fst.optimizer; print('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
