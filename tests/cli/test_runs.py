"""`dspy-fst runs`: every run below a folder in a line, whoever made it and whatever became of it."""

import json
import os
import shutil
from pathlib import Path

from filelock import FileLock

from dspy_fst.errors import MeasurementError
from dspy_fst.run.directory import RunDirectory, read_events
from dspy_fst.run.halted import tell_halted
from dspy_fst.run.interrupts import Terminated
from tests.cli.conftest import invoke
from tests.report.happenings import SEED, cycle, plan, step

FIRST_RELEASE = Path(__file__).parent.parent / "fixtures" / "first_release" / "run"
RECIPE = {"method": "fst", "cycles": 2, "steps_per_cycle": 2, "problems_per_step": 4, "group_size": 8}
RECIPE |= {"population_size": 2, "learning_rate": 5e-4, "model": "/models/tiny"}


def listed(folder):
    """Name below the folder -> its line, as --json has it."""
    found = json.loads(invoke("runs", folder, "--json").stdout)
    return {Path(run["path"]).relative_to(folder).as_posix(): run for run in found["runs"]}


def began(path, steps=2):
    """A run that committed a state and so many steps; it is let go."""
    run = RunDirectory(path, RECIPE)
    search = cycle(0, {SEED: 0.25}, {}, [SEED], rollouts=8) | {"dollars": 0.5}
    for event in [plan(), search, *(step(number, 0.25 * (number + 1)) for number in range(steps))]:
        run.emit(event["event"], **{name: value for name, value in event.items() if name not in ("event", "time")})
    run.commit(lambda folder: folder.mkdir(), cycle=0, searched=0, step=steps)
    return run


def test_runs_of_every_kind_and_release_are_listed_with_state_recipe_scores_and_cost(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "one" / "finished")
    shutil.copytree(FIRST_RELEASE, tmp_path / "old")
    for name, error in (("signal", Terminated(15)), ("outage", MeasurementError("step 2: the judge\nis down"))):
        run = began(tmp_path / name)
        tell_halted(run, error)
        run.abandon()
    began(tmp_path / "killed").abandon()
    RunDirectory(tmp_path / "empty", RECIPE)._lock.release()
    found = listed(tmp_path)
    assert set(found) == {"one/finished", "old", "signal", "outage", "killed", "empty"}
    states = {name: (run["state"], run["why"], run["resumable"]) for name, run in found.items()}
    assert states == {
        "one/finished": ("finished", None, False),
        "old": ("stopped", None, True),
        "signal": ("stopped", "SIGTERM", True),
        "outage": ("stopped", "MeasurementError: step 2: the judge is down", True),
        "killed": ("stopped", None, True),
        "empty": ("stopped", None, False),
    }
    run, done = found["one/finished"], read_events(finished)[-1]
    assert (run["steps"], run["planned"], run["measured"]) == (6, 6, "validation")
    assert run["end"] == max(done["validation"].values())
    assert run["recipe"] == "fst 2x3 steps of 6x4, K=2, lr 0.0005, Relay on base"
    assert run["rollouts"] > 6 * 6 * 4
    assert 0 < run["hours"] < 1
    assert (found["killed"]["measured"], found["killed"]["start"], found["killed"]["end"]) == ("reward", 0.25, 0.5)
    assert (found["killed"]["dollars"], run["dollars"]) == (0.5, None)
    assert (found["old"]["steps"], found["old"]["planned"]) == (1, 2)
    text = invoke("runs", tmp_path).stdout
    assert "stopped at 2 of 4 (SIGTERM), can be resumed" in text
    assert "stopped at 2 of 4 (killed, or of an earlier release), can be resumed" in text
    assert "0.250 r" in text
    assert "finished, 6 of 6" in text


def test_a_run_that_goes_on_is_known_by_its_lock(tmp_path):
    began(tmp_path / "run").abandon()
    with FileLock(tmp_path / "run" / ".lock"):
        assert listed(tmp_path)["run"]["state"] == "running"
        assert "running, 2 of 4" in invoke("runs", tmp_path).stdout
    assert listed(tmp_path)["run"]["state"] == "stopped"


def test_what_stopped_a_run_is_cut_when_it_goes_on(tmp_path):
    run = began(tmp_path / "run")
    tell_halted(run, KeyboardInterrupt())
    run.abandon()
    assert read_events(tmp_path / "run")[-1]["why"] == "Ctrl-C"
    again = RunDirectory(tmp_path / "run", RECIPE)
    assert "halted" not in {event["event"] for event in again.events()}
    again.abandon()


def test_foreign_and_half_written_folders_spoil_nothing(tmp_path):
    began(tmp_path / "good").abandon()
    for name, files in FOREIGN.items():
        for file, content in files.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    for name in ("torn", "strange", "odd"):
        for folder in ("states", "weights"):
            (tmp_path / name / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / "loop").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "good" / "pipe")
    found = listed(tmp_path)
    assert {name: run["state"] for name, run in found.items()} == {
        "good": "stopped",
        "torn": "unreadable",
        "strange": "unreadable",
        "odd": "stopped",
    }
    assert "cannot be read" in invoke("runs", tmp_path).stdout
    assert found["torn"]["why"] == "recipe.json holds no recipe"


FOREIGN = {
    "torn": {"recipe.json": b'{"method": '},
    "strange": {"recipe.json": b"{}", "events.jsonl": b'{"event": "step", "report": 7}\n'},
    "odd": {"recipe.json": b'{"learning_rate": "fast"}', "events.jsonl": b"\xff\xfe[]\nnull\n7\n"},
    "model": {"recipe.json": b"{}", "model.safetensors": b""},
    "data": {"events.jsonl": b'{"event": "done"}\n'},
    ".hidden/run": {"recipe.json": b"{}", "states/x": b"", "weights/x": b""},
}


def test_a_folder_without_runs_and_what_is_no_folder_are_told(tmp_path):
    assert f"there are no runs below {tmp_path}" in invoke("runs", tmp_path).stdout
    assert "is no folder" in invoke("runs", tmp_path / "none", code=2).stderr


def test_a_folder_that_may_not_be_looked_into_is_told(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    scan = os.scandir

    def refused(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refused)
    assert f"not looked into: {tmp_path / 'closed'}: Permission denied" in invoke("runs", tmp_path).stdout
