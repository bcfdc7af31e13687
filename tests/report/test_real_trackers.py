"""One run that is killed and continued, in a real MLflow server, trackio, wandb offline and tensorboard at once.

The server is a process of its own with an SQLite store. MLflow traces every call of the run meanwhile. What they hold
is read back through the libraries' own interfaces. wandb has none for runs that were not uploaded: its file is read.
mlflow, trackio and wandb are imported inside: they take seconds, and trackio reads where its files lie when imported.
"""

import json
import os
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dspy_fst.monitoring import tracking
from dspy_fst.policy_lm import policy_of
from dspy_fst.run.directory import read_events
from tests.conftest import restore_dspy, settings_of_dspy
from tests.report.test_tracking import FakeTracker
from tests.test_compile import compile_relay

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SMALL = {"cycles": 1, "problems_per_step": 2, "anchors": 2, "search_rollouts": 4, "checkpoint_every": 2}
ALL = ["mlflow", "trackio", "wandb", "tensorboard"]
WAIT_S = 300
JOINER = FakeTracker(fail_steps=(1,))
"""Begins when the run goes on, and fails at its last step."""


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """The address of a server that is starting; `answers` waits for it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/runs.db", "--artifacts-destination", str(folder / "kept")]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, env={**os.environ, **quiet}, stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(60)


def answers(url: str) -> None:
    for _ in range(WAIT_S):
        try:
            assert httpx.get(f"{url}/health", timeout=10).text == "OK"
            return
        except httpx.TransportError:
            time.sleep(1)
    raise AssertionError(f"nothing answers at {url}")


@contextmanager
def traced() -> Iterator[None]:
    """MLflow's traces of DSPy, of all calls inside compile() too; taken off again, from the classes as well."""
    import mlflow
    from mlflow.utils.autologging_utils.safety import revert_patches

    before = dict(settings_of_dspy())
    mlflow.dspy.autolog(log_traces_from_compile=True, silent=True)
    try:
        yield
    finally:
        mlflow.flush_trace_async_logging()
        mlflow.dspy.autolog(disable=True)
        revert_patches("dspy")
        restore_dspy(before)


def kill(event):
    if event["event"] == "step" and event["report"]["step"] == 1:
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """The run's directory, MLflow's client, its run after the kill, and the notes of the continued run."""
    home = tmp_path_factory.mktemp("trackers")
    patch = pytest.MonkeyPatch()
    with mlflow_server(home) as url:
        for name in ("TRACKIO_DIR", "WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR"):
            (home / name).mkdir()
            patch.setenv(name, str(home / name))
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setattr(tracking, "FINISH_S", WAIT_S)
        import mlflow

        answers(url)
        mlflow.set_tracking_uri(url)
        client, notes = mlflow.MlflowClient(url), []
        with traced():
            with pytest.raises(KeyboardInterrupt):
                compile_relay(home / "mine", track=ALL, listeners=[kill], **SMALL)
            killed = client.get_run(identity_of(home / "mine", "mlflow"))
            compiled = compile_relay(home / "mine", track=[*ALL, JOINER], listeners=[notes.append], **SMALL)
        policy_of(compiled).release()
        yield home, client, killed, [event["text"] for event in notes if event["event"] in ("note", "warning")]
        mlflow.set_tracking_uri(None)
        patch.undo()


def identity_of(run_dir: Path, tracker: str) -> str:
    return json.loads((run_dir / "tracking" / f"{tracker}.json").read_text())["identity"]


def rewards(run_dir: Path) -> list[float]:
    return [event["report"]["reward"] for event in read_events(run_dir) if event["event"] == "step"]


def of_wandb(home: Path) -> tuple[list[str], dict[str, list[tuple[int, float]]]]:
    """Ids of the offline runs, in order, and name -> (step, value) of all of them."""
    ids, points = [], {}
    for file in sorted((home / "WANDB_DIR").glob("wandb/offline-run-*/run-*.wandb")):
        ids.append(file.stem.removeprefix("run-"))
        for record in records(file.read_bytes()):
            values = {(item.key or "/".join(item.nested_key)): item.value_json for item in record.history.item}
            for name, value in values.items():
                if not name.startswith("_"):
                    points.setdefault(name, []).append((int(values["_step"]), json.loads(value)))
    return ids, points


def records(data: bytes) -> Iterator[Any]:
    """A file of wandb: seven bytes of head, then LevelDB's log: blocks of 32 KiB, with records in pieces."""
    from wandb.proto.wandb_internal_pb2 import Record

    at, whole = 7, b""
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        length, kind = struct.unpack("<4xHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield Record.FromString(whole)
            whole = b""


def test_mlflow_holds_one_run_that_was_killed_and_continued(tracked):
    home, client, killed, notes = tracked
    assert not [note for note in notes if re.match("warning: tracker '(?!fake)", note)]
    (run,) = client.search_runs([client.get_experiment_by_name("dspy_fst").experiment_id])
    assert run.info.run_id == killed.info.run_id == identity_of(home / "mine", "mlflow")
    assert (killed.info.status, run.info.status) == ("KILLED", "FINISHED")
    assert run.info.run_name == "mine"
    assert (run.data.params["program"], run.data.params["checkpoint_every"]) == ("Relay", "2")
    points = client.get_metric_history(run.info.run_id, "train/reward")
    assert [point.step for point in points] == [0, 1], "step 1 was made twice"
    assert [point.value for point in points] == pytest.approx(rewards(home / "mine"))


def test_mlflow_keeps_the_report_and_the_model_card(tracked, tmp_path):
    home, client, _, _ = tracked
    run = identity_of(home / "mine", "mlflow")
    assert {kept.path for kept in client.list_artifacts(run)} == {"report.html", "model_card.md"}
    page, card = (
        Path(client.download_artifacts(run, name, str(tmp_path))).read_text()
        for name in ("report.html", "model_card.md")
    )
    assert "<html" in page
    assert "mine" in page
    assert "`Relay` and its model" in card
    assert "dspy-fst export RUN_DIR FOLDER" in card
    assert "Be brief." in card, "the instructions"


def test_mlflow_s_traces_of_every_call_change_nothing(tracked, tmp_path):
    home, client, _, _ = tracked
    traces = client.search_traces([client.get_experiment_by_name("Default").experiment_id], max_results=10)
    assert any(span.name.startswith("Predict") for span in traces[0].data.spans)
    assert traces[0].info.trace_metadata.get("mlflow.sourceRun") is None, "they belong to no run of ours"
    compiled = compile_relay(tmp_path / "plain", **SMALL)
    policy_of(compiled).release()
    assert rewards(tmp_path / "plain") == rewards(home / "mine")


def of_trackio() -> tuple[Any, list[dict[str, Any]]]:
    """Its only run, and the run's points."""
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = trackio.Api().runs("dspy_fst")
    return run, SQLiteStorage.get_logs("dspy_fst", run.name, run_id=run.id)


def test_trackio_goes_on_in_its_run_and_keeps_the_files(tracked):
    from trackio.sqlite_storage import SQLiteStorage

    home, _, _, _ = tracked
    run, points = of_trackio()
    assert run.name == "mine"
    assert run.config["program"] == "Relay"
    logs = [row for row in points if "train/reward" in row]
    assert [row["step"] for row in logs] == [0, 1]
    assert [row["train/reward"] for row in logs] == pytest.approx(rewards(home / "mine"))
    kept = {artifact["name"] for artifact in SQLiteStorage.get_artifacts("dspy_fst")}
    assert kept == {"mine-report.html", "mine-model_card.md"}


def test_wandb_offline_goes_on_under_the_same_id_and_repeats_no_step(tracked):
    home, _, _, _ = tracked
    ids, points = of_wandb(home)
    assert ids == [identity_of(home / "mine", "wandb")] * 2, "two parts, which wandb sync joins by their id"
    assert points["train/reward"] == [
        (step, pytest.approx(reward)) for step, reward in enumerate(rewards(home / "mine"))
    ]
    kept = {path.name for path in (home / "WANDB_DIR").glob("wandb/offline-run-*/files/*")}
    assert {"report.html", "model_card.md"} <= kept


def test_every_tracker_has_the_same_names(tracked):
    home, client, _, _ = tracked
    run = client.get_run(identity_of(home / "mine", "mlflow"))
    names = set(run.data.metrics)
    assert {"train/reward", "train/kl_to_start", "search/best_score", "validation/best_score"} <= names
    assert set(of_wandb(home)[1]) == names
    assert {name for row in of_trackio()[1] for name in row} - {"step", "timestamp"} == names
    board = EventAccumulator(str(home / "mine" / "tracking" / "tensorboard")).Reload()
    assert set(board.Tags()["scalars"]) == names


def test_tensorboard_holds_every_step_of_a_continued_run_once(tracked):
    home, _, _, _ = tracked
    board = EventAccumulator(str(home / "mine" / "tracking" / "tensorboard")).Reload()
    points = board.Scalars("train/reward")
    assert [point.step for point in points] == [0, 1]
    assert [point.value for point in points] == pytest.approx(rewards(home / "mine"))
    assert [point.step for point in board.Scalars("search/best_score")] == [0]
    assert [point.step for point in board.Scalars("validation/best_score")] == [0, 2]  # the start and the end
    assert len([*(home / "mine" / "tracking" / "tensorboard").glob("*/hparams.yml")]) == 1


def test_another_tracker_may_join_and_fail_and_the_run_ends_well(tracked):
    home, _, _, notes = tracked
    assert read_events(home / "mine")[-1]["event"] == "done"
    assert JOINER.steps("train/tokens") == [0]
    assert JOINER.settings[0]["checkpoint_every"] == 2
    assert JOINER.settings[0]["program"] == "Relay"
    assert notes.count("warning: tracker 'fake' failed (ConnectionError: no route to host); the run goes on") == 1
    assert "warning: tracker 'fake' lost 1 of the run's entries" in notes
