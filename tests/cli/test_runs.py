"""`dspy-fst runs`: every run below a folder in a line, whoever made it and whatever became of it."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from dspy_fst.errors import MeasurementError, RunDirectoryError
from dspy_fst.run.directory import RunDirectory, directory_fault, read_events
from dspy_fst.run.ending import complete, emit_halted
from dspy_fst.run.interrupts import Terminated
from tests.cli.conftest import MODULE, SETTINGS, SOURCE, invoke
from tests.report.happenings import SEED, cycle, plan, step

FIRST_RELEASE = Path(__file__).parent.parent / "fixtures" / "first_release" / "run"
RECIPE = {"method": "fst", "cycles": 2, "steps_per_cycle": 2, "problems_per_step": 4, "group_size": 8}
RECIPE |= {"population_size": 2, "learning_rate": 5e-4, "model": "/models/tiny"}


def listed(folder):
    """Name below the folder -> its line, as --json has it."""
    found = json.loads(invoke("runs", folder, "--json").stdout)
    return {Path(run["path"]).relative_to(folder).as_posix(): run for run in found["runs"]}


def began(path, steps=2, save=Path.mkdir):
    """A run that committed a state and so many steps."""
    run = RunDirectory(path, RECIPE)
    search = cycle(0, {SEED: 0.25}, {}, [SEED], rollouts=8) | {"dollars": 0.5}
    for event in [plan(), search, *(step(number, 0.25 * (number + 1)) for number in range(steps))]:
        run.emit(event["event"], **{name: value for name, value in event.items() if name not in ("event", "time")})
    run.commit(save, cycle=0, searched=0, step=steps)
    return run


@pytest.mark.slow
def test_runs_of_every_kind_and_release_are_listed_with_state_recipe_scores_and_cost(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "one" / "finished")
    shutil.copytree(FIRST_RELEASE, tmp_path / "old")
    for name, error in (("signal", Terminated(15)), ("outage", MeasurementError("step 2: the judge\nis down"))):
        run = began(tmp_path / name)
        emit_halted(run, error)
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
    emit_halted(run, KeyboardInterrupt())
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


STATE = Path("states", "000000")


def changed(path, before, after):
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))


DAMAGE = {
    "events-changed": (
        lambda run: changed(run / "events.jsonl", "0.25", "0.75"),
        "events.jsonl is not what was committed",
    ),
    "events-missing": (lambda run: (run / "events.jsonl").unlink(), "events.jsonl is not what was committed"),
    "state-changed": (
        lambda run: (run / STATE / "state.json").write_text("{}"),
        "000000 is damaged: state.json",
    ),
    "state-torn": (lambda run: (run / STATE / "state.json").write_text('{"for'), "is damaged: state.json"),
    "trainer-cut": (
        lambda run: (run / STATE / "trainer" / "weights").write_text("w"),
        "trainer/weights does not match its checksum",
    ),
    "trainer-missing": (
        lambda run: shutil.rmtree(run / STATE / "trainer"),
        "missing or foreign files: trainer/weights",
    ),
    "no-states": (lambda run: shutil.rmtree(run / "states"), "states/ holds nothing to go on from; restore states/"),
    "no-recipe": (lambda run: (run / "recipe.json").unlink(), "recipe.json is missing; restore it from a copy"),
    "a-link": (lambda run: (run / "weights").rename(run / "w").with_name("weights").symlink_to("w"), "leads elsewhere"),
}
"""How a run's directory is damaged, and what is said of it."""


def saved_weights(folder):
    folder.mkdir()
    (folder / "weights").write_text("gigabytes")


@pytest.mark.parametrize("name", DAMAGE)
def test_what_going_on_would_refuse_is_listed_as_damaged_with_the_reason(tmp_path, name):
    hurt, reason = DAMAGE[name]
    began(tmp_path / "run", save=saved_weights).abandon()
    assert listed(tmp_path)["run"]["state"] == "stopped"
    hurt(tmp_path / "run")
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    run = listed(tmp_path)["run"]
    assert (run["state"], run["resumable"], run["setting"]) == ("damaged", False, None)
    assert reason in run["why"]
    shown = " ".join(invoke("runs", tmp_path).stdout.split())
    assert "damaged, see below" in shown
    assert f"damaged: {' '.join(run['why'].split())}" in shown
    assert "can be resumed" not in shown
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
    with pytest.raises(RunDirectoryError) as error:
        RunDirectory(tmp_path / "run", RECIPE)
    assert name == "no-recipe" or str(error.value) == run["why"]


def test_a_state_of_another_release_is_no_damage_and_cannot_be_read(tmp_path):
    began(tmp_path / "run").abandon()
    (tmp_path / "run" / "states" / "000000" / "state.json").write_text('{"format": 99}')
    run = listed(tmp_path)["run"]
    assert (run["state"], run["resumable"]) == ("unreadable", False)
    assert "has format 99, this release reads 2" in run["why"]


def test_a_run_that_goes_on_is_not_looked_at_for_damage(tmp_path):
    """It may be writing at this moment."""
    began(tmp_path / "run").abandon()
    (tmp_path / "run" / "events.jsonl").write_bytes(b"")
    with FileLock(tmp_path / "run" / ".lock"):
        assert listed(tmp_path)["run"]["state"] == "running"


def test_a_run_that_moved_no_weights_is_told_by_its_last_line(tmp_path):
    run = RunDirectory(tmp_path / "run", RECIPE)
    flat = {"groups": 4, "live_groups": 0, "flat_groups": 4, "unmeasured_groups": 0, "rollouts": 32}
    steps = [step(number, 0.0, rows=0, tokens=0) for number in range(4)]
    for event in [plan(), *steps]:
        report = {"report": {**event["report"], "counts": flat}} if "report" in event else {}
        fields = {name: value for name, value in (event | report).items() if name not in ("event", "time")}
        run.emit(event["event"], **fields)
    run.commit(lambda folder: folder.mkdir(), cycle=1, searched=-1, step=4)
    run.emit("ended", reason=complete(4).as_event)
    population = {"members": [{"solve": SEED}], "scores": [0.0]}
    run.emit("done", population=population, validation={}, weights="step-000000", returned=None)
    run.close()
    seen = "flat at the floor: mean reward 0, and the rollouts of each problem scored alike"
    said = f"no update changed the weights: {seen}"
    assert listed(tmp_path)["run"]["unmoved"] == said
    assert f"finished, 4 of 4: {said}" in " ".join(invoke("runs", tmp_path).stdout.split())


def test_a_run_in_the_directory_of_another_is_refused_with_a_place_for_it(tmp_path):
    began(tmp_path / "run").abandon()
    inside = tmp_path / "run" / "deeper" / "other"
    fault = directory_fault(inside, RECIPE)
    assert f"lies in the directory of another run, {tmp_path / 'run'}," in fault
    assert f"e.g. {str(tmp_path / 'other')!r}" in fault
    assert directory_fault(tmp_path / "other", RECIPE) is None
    assert directory_fault(tmp_path / "run", RECIPE) is None
    (inside / "states").mkdir(parents=True)
    (inside / "recipe.json").write_text(json.dumps(RECIPE))  # begun by an earlier release, so it goes on
    assert directory_fault(inside, RECIPE) is None


def test_every_front_end_refuses_a_place_in_a_run_before_any_work(tmp_path, monkeypatch):
    began(tmp_path / "run").abandon()
    (tmp_path / f"{MODULE}.py").write_text(SOURCE)
    (tmp_path / "project.yaml").write_text(yaml.safe_dump(SETTINGS))
    monkeypatch.setattr("dspy_fst.training.open_run._assemble", lambda *_: pytest.fail("work has begun"))
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    inside, before = tmp_path / "run" / "inside", sorted((tmp_path / "run").rglob("*"))
    changed = yaml.safe_dump({**SETTINGS, "run_dir": str(inside)})
    (tmp_path / "inside.yaml").write_text(changed)
    for command in (("run", tmp_path / "project.yaml", "--run-dir", inside), ("check", tmp_path / "inside.yaml")):
        said = " ".join(invoke(*command, code=2).output.split())
        assert f"lies in the directory of another run, {tmp_path / 'run'}," in said, command
    for folder in (inside, tmp_path / "run"):
        assert f"{folder}: it lies in the run {tmp_path / 'run'}" in invoke("init", folder, code=2).stderr
    assert sorted((tmp_path / "run").rglob("*")) == before


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
