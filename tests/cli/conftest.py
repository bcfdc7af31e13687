"""One compiled run of the laboratory's relay, shared by the tests of the commands that look at runs."""

import shutil
import sys

import pytest
import yaml
from typer.testing import CliRunner

from dspy_fst.cli import app
from programs.lab import BASE

SOURCE = """
from programs.lab import build
from tests.relay import Relay, any_answer as metric

LAB = build(train=32, val=4, test=4)
train, val, held_out = LAB.trainset, LAB.valset, LAB.testset


def propose(candidate, reflective_dataset, components_to_update):
    return {name: candidate[name] + " Be brief." for name in components_to_update}


def unmeasured(gold, pred):
    if len(gold.numbers.split()) % 2:
        raise OSError("the judge is down")
    return metric(gold, pred)
"""
MODULE = "relayed"
SETTINGS = {
    "program": f"{MODULE}:Relay",
    "metric": f"{MODULE}:metric",
    "propose": f"{MODULE}:propose",
    "trainset": f"{MODULE}:train",
    "valset": f"{MODULE}:val",
    "model": str(BASE),
    "policy": {"engine": "in_process", "max_tokens": 12, "temperature": 1.5},
    "run_dir": "run",
    "recipe": {
        "cycles": 2,
        "steps_per_cycle": 3,
        "problems_per_step": 6,
        "population_size": 2,
        "group_size": 4,
        "anchors": 4,
        "search_rollouts": 9,
        "learning_rate": 5e-4,
    },
}


def invoke(*arguments, code=0):
    """The command's result, once its exit code is checked."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The directory of a finished run; nobody writes into it."""
    folder = tmp_path_factory.mktemp("finished")
    sys.modules.pop(MODULE, None)
    (folder / f"{MODULE}.py").write_text(SOURCE)
    (folder / "project.yaml").write_text(yaml.safe_dump(SETTINGS))
    invoke("run", folder / "project.yaml")
    return folder / "run"


@pytest.fixture
def run_dir(finished, tmp_path):
    """A copy of one's own; its project still names the modules of the original's folder."""
    return shutil.copytree(finished, tmp_path / "run")
