"""`dspy-fst run FOLDER`, and more cycles: `dspy-fst run FILE --continue-from RUN --run-dir NEW`."""

import sys

import pytest
import yaml

from dspy_fst.run.directory import read_events
from dspy_fst.types import Candidate
from tests.cli.conftest import MODULE, SETTINGS, SOURCE, invoke
from tests.test_one_world import adam

FEW = {"steps_per_cycle": 1, "search_rollouts": 4, "anchors": 2, "reflection_minibatch": 2}


@pytest.fixture
def folder(tmp_path):
    """A project's folder, whose recipe is a short one."""
    sys.modules.pop(MODULE, None)
    (tmp_path / f"{MODULE}.py").write_text(SOURCE)
    recipe = {**SETTINGS["recipe"], **FEW}
    (tmp_path / "project.yaml").write_text(yaml.safe_dump({**SETTINGS, "recipe": recipe}))
    yield tmp_path
    sys.modules.pop(MODULE, None)


def events(run_dir, kind):
    return [event for event in read_events(run_dir) if event["event"] == kind]


def test_more_cycles_go_on_from_a_finished_run_and_are_a_run_like_any_other(folder, finished):
    recipe = folder / "project.yaml"
    recipe.write_text(recipe.read_text().replace("recipe:", "recipe:\n  continue_optimizer: true"))
    new = folder / "more"
    command = ("run", folder, "--continue-from", finished, "--run-dir", new, "--cycles", "1")
    told = invoke(*command)
    assert "1 weight update in 1 step;" in told.stdout
    (done,), (of_the_first,) = events(new, "done"), events(finished, "done")
    carried = {Candidate(texts).digest for texts in of_the_first["population"]["members"]}
    assert carried <= {candidate["digest"] for candidate in events(new, "cycle")[0]["candidates"]}
    assert done["weights"] == "step-000001"
    (note,) = (event["text"] for event in events(new, "note") if event["text"].startswith("going on from"))
    assert f"the weights step-000006 of {finished / 'compiled' / 'weights'}" in note
    assert "with AdamW's moments and its count of updates, 6" in note
    assert adam(new)["step"] == 7
    kept = yaml.safe_load((new / "project.yaml").read_text())
    assert (kept["continue_from"], kept["run_dir"], kept["recipe"]["cycles"]) == (str(finished), str(new), 1)
    assert "is finished" in invoke(*command).stderr
    (new / "compiled").rename(folder / "elsewhere")
    invoke("resume", new)
    assert (new / "compiled" / "policy.json").is_file(), "its directory alone brings the same program back"


def test_a_continuation_needs_a_run_that_came_to_its_end_and_a_directory_of_its_own(folder, finished, run_dir):
    same = invoke("run", folder, "--continue-from", finished, "--run-dir", finished, code=2).stderr
    assert "run_dir: it is the run that continue_from names; name a new directory (--run-dir NEW)" in same
    (run_dir / "compiled").rename(folder / "elsewhere")
    unfinished = invoke("run", folder, "--continue-from", run_dir, "--run-dir", folder / "more", code=2).stderr
    assert f"continue_from: {run_dir} holds no compiled/: the run has not ended" in unfinished
    assert "is no folder of dspy_fst.save" in invoke("run", folder, "--continue-from", folder, code=2).stderr
    assert not (folder / "more").exists()


def test_a_folder_stands_for_the_project_file_in_it(folder, finished):
    assert "recipe.cycles='two'" in invoke("run", in_a_folder(folder / "wrong", {"cycles": "two"}), code=2).stderr
    assert "recipe.cycles='two'" in invoke("check", folder / "wrong", code=2).stderr
    (folder / "empty").mkdir()
    told = invoke("run", folder / "empty", code=2).stderr
    assert f"{folder / 'empty'} is a folder without a project.yaml; name the project's file" in told
    (folder / "empty" / "mine.yaml").touch()
    assert "there are mine.yaml" in invoke("run", folder / "empty", code=2).stderr
    refused = invoke("run", finished, code=2).stderr
    assert f"{finished} is a run's directory, no project's; dspy-fst resume goes on with it" in refused


def in_a_folder(path, recipe):
    path.mkdir()
    (path / "project.yaml").write_text(yaml.safe_dump({**SETTINGS, "recipe": recipe}))
    return path
