"""A run's numbers in trackers: the same names everywhere, nothing twice, and no tracker stops a run.

In a run, and with the libraries themselves: `tests/report/test_real_trackers.py`.
"""

import json
import re
import shutil
import threading
from dataclasses import fields

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from typer.testing import CliRunner

from dspy_fst import ConfigurationError, FSTOptimizer
from dspy_fst.cli import app
from dspy_fst.cli.train import _with_trackers
from dspy_fst.monitoring import tracking
from dspy_fst.monitoring.tracking import Tracking, hyperparameters, trackers_of
from dspy_fst.project.project_file import load_project
from dspy_fst.report.metric_names import entry_of
from dspy_fst.types import UpdateReport
from tests.report.happenings import cycle, plan, step, whole_run
from tests.test_cli import project_file


class FakeTracker(GeneralTracker):
    """Keeps what it is given; fails when it is told to."""

    name = "fake"
    requires_logging_directory = False
    tracker = None

    def __init__(self, fail_start=False, fail_steps=(), fail_finish=False):
        super().__init__()
        self.fail_start, self.fail_steps, self.fail_finish = fail_start, fail_steps, fail_finish
        self.settings, self.logged, self.finished = [], [], 0

    def start(self):
        if self.fail_start:
            raise ConnectionError("no route to host")

    def store_init_configuration(self, values):
        self.settings.append(values)

    def log(self, values, step=None, **kwargs):
        if step in self.fail_steps and "train/reward" in values:
            raise ConnectionError("no route to host")
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1
        if self.fail_finish:
            raise SystemExit("bye")

    def steps(self, name):
        return [step for step, values in self.logged if name in values]


def follow(tracker, run_dir, events, before=()):
    """What is told while the events happen."""
    told = []
    listener = Tracking([tracker])
    with listener.following(run_dir, list(before), told.append):
        for event in events:
            listener(event)
    return told


# ---- what is logged ----------------------------------------------------------------------------


NOTHING_TO_TELL = ("skipped", "kl_under_seed", "halved_to", "adapters", "later_log_ratio")
"""Of an update of one optimizer step, without LoRA adapters and a seed KL."""


def test_the_names_are_those_of_the_events():
    values = entry_of(step(2, 0.5, lost={"masked: timeout": 3, "failed: no (such) tool": 1})).values
    for known in fields(UpdateReport):
        unmeasured = known.name in NOTHING_TO_TELL
        assert (f"train/{known.name}" in values) != unmeasured
    assert values["train/reward"] == 0.5
    assert values["train/kl_to_start"] == 0.0
    assert values["train/flat_groups"] == 1
    assert values["train/sampled_tokens"] == 160
    assert (values["train/prompt_tokens"], values["train/prompt_tokens_read"]) == (640, 200)
    assert values["train/seconds/publish"] == 0.5
    assert values["train/masked/timeout"] == 3
    assert values["train/failed/no_such_tool"] == 1
    assert "train/step" not in values
    searched = entry_of(cycle(1, {"a": 0.25, "b": 0.75}, {}, ["b", "a"], counts={"reflections_failed": 2})).values
    assert searched["search/best_score"] == 0.75
    assert searched["search/rollouts"] == 20
    assert searched["search/reflections_failed"] == 2


def test_what_was_not_measured_has_no_number():
    masked = entry_of(step(0, None, kl_to_start=None)).values
    assert "train/reward" not in masked
    assert "train/kl_to_start" not in masked
    empty = entry_of(step(0, 0.5, tokens=0, rows=0, entropy=0.0)).values
    assert "train/entropy" not in empty, "an update of nothing has no entropy, and its 0 is no measurement"
    assert empty["train/tokens"] == 0


def test_searches_and_validation_stand_at_the_update_that_comes_next(tmp_path):
    tracker = FakeTracker()
    assert follow(tracker, tmp_path, whole_run()) == []
    assert tracker.steps("search/best_score") == [0, 2]
    assert tracker.steps("train/seconds/update") == [0, 1, 2, 3]
    assert tracker.steps("validation/best_score") == [4]
    assert [step for step, _ in tracker.logged] == sorted(step for step, _ in tracker.logged)
    assert tracker.finished == 1


def test_the_hyperparameters_are_the_recipe_in_plain_values():
    values = hyperparameters([plan(learning_rate=1e-5) | {"model": "a/model"}])
    assert values["learning_rate"] == 1e-5
    assert values["model"] == "a/model"
    assert values["max_grad_norm"] == "None"
    assert all(isinstance(value, bool | int | float | str) for value in values.values())


# ---- going on ----------------------------------------------------------------------------------


def test_a_continued_run_logs_no_step_twice_although_it_makes_it_again(tmp_path):
    events = whole_run()
    first, second = FakeTracker(), FakeTracker()
    follow(first, tmp_path, events[:7])
    follow(second, tmp_path, events[3:], before=events[:3])  # the first step was not committed
    assert first.steps("train/tokens") == [0, 1]
    assert second.steps("train/tokens") == [2, 3]
    assert second.steps("search/best_score") == [2]
    assert len(first.settings) == 1
    assert second.settings == [], "the recipe is there already"


def test_a_tracker_that_joins_a_continued_run_gets_its_past_too(tmp_path):
    events = whole_run()
    tracker = FakeTracker()
    follow(tracker, tmp_path, events[7:], before=events[:7])
    assert tracker.steps("train/tokens") == [0, 1, 2, 3]
    assert tracker.steps("search/best_score") == [0, 2]


def test_services_are_asked_to_go_on_in_the_run_that_they_made(tmp_path, monkeypatch):
    made = []

    class Service(FakeTracker):
        name = "wandb"

        def __init__(self, project, **options):
            super().__init__()
            made.append((project, options))
            self.tracker = type("Run", (), {"id": "abc123"})

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Service)
    run_dir = tmp_path / "mine"
    run_dir.mkdir()
    follow("wandb", run_dir, whole_run()[:7])
    follow("wandb", run_dir, whole_run()[7:])
    assert made == [
        ("dspy_fst", {"name": "mine"}),
        ("dspy_fst", {"id": "abc123", "resume": "allow"}),
    ]


# ---- trouble -----------------------------------------------------------------------------------


def test_a_tracker_that_fails_in_the_middle_is_told_of_once_and_counted(tmp_path):
    tracker = FakeTracker(fail_steps=(1, 3), fail_finish=True)
    told = follow(tracker, tmp_path, whole_run())
    assert tracker.steps("train/tokens") == [0, 2]
    failed, ended, counted = told
    assert failed == "warning: tracker 'fake' failed (ConnectionError: no route to host); the run goes on"
    assert "did not finish well (SystemExit: bye)" in ended
    assert counted == "warning: tracker 'fake' lost 2 of the run's entries"
    assert json.loads((tmp_path / "tracking" / "fake.json").read_text())["lost"] == 2


def test_a_tracker_that_does_not_start_gets_everything_when_the_run_is_continued(tmp_path):
    events = whole_run()
    told = follow(FakeTracker(fail_start=True), tmp_path, events[:7])
    assert "could not be started (ConnectionError: no route to host)" in told[0]
    assert told[1] == "warning: tracker 'fake' lost 3 of the run's entries"
    tracker = FakeTracker()
    assert follow(tracker, tmp_path, events[7:], before=events[:7]) == []
    assert tracker.steps("train/tokens") == [0, 1, 2, 3]


def test_a_tracker_that_hangs_delays_neither_the_run_nor_for_long_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "FINISH_S", 0.2)
    hanging, hung = FakeTracker(), threading.Event()
    hanging.log = lambda values, step=None: hung.wait(30)
    events = whole_run()
    (told,) = follow(hanging, tmp_path, events)
    assert told.startswith(
        "warning: the run waited 0.2 s for tracker 'fake' to take its last entries, and ends without it"
    )
    lost = int(re.search(r"(\d+) entries and files", told)[1])
    assert 2 < lost <= len(events) + 1
    hung.set()


REFUSED = [
    ("no_such", "track='no_such': there is no such tracker; use one of aim, comet_ml, mlflow, tensorboard, wandb"),
    ("comet_ml", "track='comet_ml': it is not installed here; pip install comet-ml"),
    (["tensorboard", 5], "track=5: there is no such tracker"),
    (5, "track=5: name a tracker, or a list of them"),
]


@pytest.mark.parametrize(("track", "message"), REFUSED)
def test_a_tracker_that_is_unknown_or_missing_is_refused_before_any_work(track, message, monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(ConfigurationError) as error:
        FSTOptimizer(metric=lambda gold, pred, trace=None: 1.0, track=track)
    assert message in str(error.value)


def test_a_tracker_that_is_named_twice_is_one():
    assert trackers_of(["tensorboard", "tensorboard"]) == (["tensorboard"], [])


# ---- named ----------------------------------------------------------------------------------------


def test_the_project_file_and_the_flag_name_trackers(tmp_path, monkeypatch):
    path = project_file(tmp_path)
    flagged = _with_trackers(load_project(path), ["mlflow"])
    (tmp_path / "run").mkdir()
    assert load_project(flagged.keep()).track == ["mlflow"], "so that dspy-fst resume goes on with it"
    shutil.rmtree(tmp_path / "run")

    path = project_file(tmp_path, track="tensorboard")
    assert load_project(path).open().optimizer.trackers == ["tensorboard"]
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: ["tensorboard"])
    refused = CliRunner().invoke(app, ["run", str(path), "--track", "wandb", "--track", "mlflow"])
    assert refused.exit_code == 2
    assert "track='wandb': it is not installed here; pip install wandb" in refused.stderr
    assert "pip install mlflow" in refused.stderr
    assert not (tmp_path / "run").exists()
