"""A run's copy in storage: whole or not taken, going on from it elsewhere, failures of the storage."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from dspy_fst.config import FSTConfig
from dspy_fst.errors import ConfigurationError, DiskError, RunDirectoryError
from dspy_fst.run import storage as storage_module
from dspy_fst.run.directory import RunDirectory, read_events
from dspy_fst.run.state import newest_state
from dspy_fst.run.storage import Storage, url_fault
from dspy_fst.training.stored import storage_faults
from tests.test_compile import compile_relay, same_weights, told

STEPS = {"method": "rl", "cycles": 1, "steps_per_cycle": 2}


class Faulty(MemoryFileSystem):
    """Memory that fails as it is told."""

    protocol = "faulty"
    store = {}  # noqa: RUF012  # of fsspec's form
    pseudo_dirs = [""]  # noqa: RUF012
    fail = staticmethod(lambda path: None)
    """Called before each write."""

    def pipe_file(self, path, value, **given):
        self.fail(path)
        return super().pipe_file(path, value, **given)

    def put_file(self, lpath, rpath, **given):
        self.fail(rpath)
        return super().put_file(lpath, rpath, **given)


@pytest.fixture
def faulty(monkeypatch):
    fsspec.register_implementation("faulty", Faulty, clobber=True)
    monkeypatch.setattr(storage_module, "PAUSE_S", 0.0)
    Faulty.store.clear()
    Faulty.pseudo_dirs[:] = [""]
    monkeypatch.setattr(Faulty, "fail", staticmethod(lambda path: None))
    return Faulty


def saved(text):
    def save(folder):
        folder.mkdir()
        (folder / "state").write_text(text)

    return save


def opened(path, url="faulty://run", recipe=None):
    return RunDirectory(path, recipe or {"seed": 0}, storage=Storage(url))


def stepped(path, *steps):
    run = opened(path)
    for step in steps:
        run.emit("step", number=step)
        (run.weights_path(f"step-{step:06d}")).mkdir(exist_ok=True)
        (run.weights_path(f"step-{step:06d}") / "model").write_text(f"weights {step}")
        run.commit(saved(f"trainer {step}"), step=step, moved_at=step)
    return run


def breaking_off(faulty, folder, left):
    """Writes below that folder leave so much, and fail."""

    def fail(path):
        if folder in path:
            MemoryFileSystem.pipe_file(faulty(), path, left)
            raise ConnectionResetError("broken off")

    return staticmethod(fail)


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


# ---- what is copied, and taken ---------------------------------------------------------------------


def test_what_was_committed_is_what_an_empty_directory_gets(faulty, tmp_path):
    stepped(tmp_path / "here", 1, 2).close()
    assert Storage("faulty://run").pull(tmp_path / "there")
    there = contents(tmp_path / "there")
    copied = {name: content for name, content in contents(tmp_path / "here").items() if "states/000000" not in name}
    assert there == copied
    assert newest_state(tmp_path / "there" / "states").fields["step"] == 2
    assert not Storage("faulty://run").pull(tmp_path / "there"), "a directory that is as far is left alone"


def test_a_copy_whose_manifest_is_missing_or_half_written_is_not_taken(faulty, tmp_path):
    run = stepped(tmp_path / "here", 1)
    faulty.fail = breaking_off(faulty, "manifests", b'{"format": 1, "fil')
    run.emit("step", number=2)
    with pytest.raises(DiskError, match=r"storage='faulty://run' failed \(4 tries\): writing .*broken off"):
        run.commit(saved("trainer 2"), step=2, moved_at=1)
    run.close()
    faulty.fail = staticmethod(lambda path: None)
    assert Storage("faulty://run").pull(tmp_path / "there")
    assert newest_state(tmp_path / "there" / "states").fields["step"] == 1
    opened(tmp_path / "here").close()  # its copy is made up for when it is opened again
    assert Storage("faulty://run").pull(tmp_path / "there")
    assert newest_state(tmp_path / "there" / "states").fields["step"] == 2


def test_a_manifest_that_does_not_match_its_checksum_is_not_taken(faulty, tmp_path):
    stepped(tmp_path / "here", 1, 2).close()
    newest = max(path for path in faulty.store if "/manifests/" in path)
    changed = {**json.loads(faulty.store[newest].getvalue()), "events_bytes": 0}
    MemoryFileSystem.pipe_file(faulty(), newest, json.dumps(changed).encode())
    assert Storage("faulty://run").pull(tmp_path / "there")
    assert newest_state(tmp_path / "there" / "states").fields["step"] == 1


def test_a_part_of_a_file_that_was_left_is_written_again(faulty, tmp_path):
    run = stepped(tmp_path / "here", 1)
    faulty.fail = breaking_off(faulty, "objects", b"tr")
    with pytest.raises(DiskError):
        run.commit(saved("trainer 2"), step=2, moved_at=1)
    run.close()
    faulty.fail = staticmethod(lambda path: None)
    opened(tmp_path / "here").close()
    Storage("faulty://run").pull(tmp_path / "there")
    assert (tmp_path / "there/states/000001/trainer/state").read_text() == "trainer 2"


def test_content_that_changed_in_the_storage_is_refused_and_nothing_is_put_in_place(faulty, tmp_path):
    stepped(tmp_path / "here", 1).close()
    path = next(path for path, file in faulty.store.items() if file.getvalue() == b"weights 1")
    MemoryFileSystem.pipe_file(faulty(), path, b"weights 7")
    with pytest.raises(RunDirectoryError, match=r"is damaged: .* does not match its name"):
        Storage("faulty://run").pull(tmp_path / "there")
    assert contents(tmp_path / "there") == {}


def test_as_many_copies_stay_as_states_and_nothing_that_is_not_ours_goes(faulty, tmp_path):
    MemoryFileSystem.pipe_file(faulty(), f"{Storage('faulty://run')._root}/objects/mine.txt", b"mine")
    stepped(tmp_path / "here", 1, 2, 3, 4).close()
    copies = sorted(path for path in faulty.store if "/manifests/" in path)
    assert [path.rpartition("/")[2] for path in copies] == ["000002.json", "000003.json"]
    named = {
        facts["sha256"] for path in copies for facts in json.loads(faulty.store[path].getvalue())["files"].values()
    }
    assert {path.rpartition("/")[2] for path in faulty.store if "/objects/" in path} == {*named, "mine.txt"}


def test_a_copy_reads_the_manifests_and_lists_the_objects_once(faulty, tmp_path, monkeypatch):
    run = stepped(tmp_path / "here", 1, 2, 3)
    asked = []

    def noting(method):
        return lambda self, path, **given: [asked.append(path.partition("/run/")[2]), method(self, path, **given)][1]

    for name in ("find", "cat_file"):
        monkeypatch.setattr(Faulty, name, noting(getattr(Faulty, name)))
    run.commit(saved("trainer 4"), step=4, moved_at=3)
    run.close()
    assert sorted(asked) == ["manifests", "manifests/000001.json", "manifests/000002.json", "objects"]


# ---- failures --------------------------------------------------------------------------------------


def test_a_call_that_fails_once_is_made_again_and_the_run_says_so(faulty, tmp_path):
    failures = [ConnectionResetError("gone for a moment")]

    def once(path):
        if failures:
            raise failures.pop()

    run = stepped(tmp_path / "here", 1)
    faulty.fail = staticmethod(once)
    run.commit(saved("trainer 2"), step=2, moved_at=1)
    run.commit(None, step=3, moved_at=1)
    run.close()
    warnings = [event["text"] for event in read_events(tmp_path / "here") if event["event"] == "warning"]
    assert len(warnings) == 1
    assert "storage: 1 calls failed and were made again" in warnings[0]
    assert "gone for a moment" in warnings[0]


def test_a_storage_that_does_not_answer_is_not_waited_for_without_end(faulty):
    storage = Storage("faulty://run", tries=1, call_s=0.1)
    faulty.fail = staticmethod(lambda path: time.sleep(2))
    with pytest.raises(DiskError, match="no answer after 0 s"):
        storage.probe()


def test_two_processes_do_not_copy_to_one_place(faulty, tmp_path):
    one = stepped(tmp_path / "one", 1)
    Storage("faulty://run").pull(tmp_path / "two")
    two = opened(tmp_path / "two")
    one.emit("step", number=2)
    one.commit(saved("of one"), step=2, moved_at=1)
    with pytest.raises(DiskError, match="was written by another process meanwhile"):
        two.commit(saved("of two"), step=2, moved_at=1)
    one.close()
    two.close()
    two = Storage("faulty://run")
    assert "went different ways" in (two.diverged(tmp_path / "two", two.newest()) or "")


# ---- before any work -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("/mnt/share", "is no URL"),
        ("nonsense://bucket", "Protocol not known: nonsense"),
        ("https://me:secret@host/run", "holds a user or a password"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused(url, says):
    assert says in (url_fault(url) or "")
    assert "secret" not in (url_fault(url) or "")


def test_a_protocol_without_its_package_is_refused_by_the_package_s_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)
    assert "s3fs" in (url_fault("s3://bucket/run") or "")


def test_a_place_that_cannot_be_written_and_one_of_another_run_are_refused(faulty, tmp_path):
    stepped(tmp_path / "here", 1).close()
    config = FSTConfig(storage="faulty://run")
    assert storage_faults(config, {"seed": 0}, tmp_path / "here") == []
    (fault,) = storage_faults(config, {"seed": 1}, tmp_path / "new")
    assert "holds a run of another configuration: seed (there 0, now 1)" in fault

    def refuse(path):
        raise PermissionError("not allowed")

    faulty.fail = staticmethod(refuse)
    (fault,) = storage_faults(config, {"seed": 0}, tmp_path / "here")
    assert "failed (1 tries): writing" in fault
    with pytest.raises(ConfigurationError, match="not allowed"):
        compile_relay(tmp_path / "run", storage="faulty://run", **STEPS)
    assert not (tmp_path / "run" / "recipe.json").exists()


# ---- in a run --------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from tests.test_compile import compile_relay
def kill(event):
    if event["event"] == "step" and event["report"]["step"] == 1:
        os.kill(os.getpid(), signal.SIGKILL)
compile_relay(sys.argv[1], storage=sys.argv[2], listeners=[kill], method="rl", cycles=1, steps_per_cycle=2)
"""


@pytest.mark.slow
def test_a_killed_run_whose_directory_is_lost_goes_on_from_storage_and_ends_the_same(tmp_path):
    url, lost = f"file://{tmp_path}/share", tmp_path / "lost"
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", KILLED, str(lost), url]
    killed = subprocess.run(command, cwd=root, timeout=300, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    shutil.rmtree(lost)
    listened = []
    resumed = compile_relay(tmp_path / "elsewhere", storage=url, listeners=[listened.append], **STEPS)
    assert any("1 of 2 updates are done" in str(event.get("text")) for event in listened)
    assert sum(event["event"] == "step" for event in listened) == 1, "its first steps were not made again"
    whole = compile_relay(tmp_path / "whole", **STEPS)
    assert same_weights(resumed, whole)
    kept = [[told(event) for event in read_events(tmp_path / name)] for name in ("whole", "elsewhere")]
    assert [{**event, "config": None} for event in kept[0]] == [{**event, "config": None} for event in kept[1]]
