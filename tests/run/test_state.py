"""Resumable states: whole or absent, checked when they are read, shared when nothing moved, and few."""

import json
import os
from contextlib import contextmanager

import pytest

from dspy_fst.errors import RunDirectoryError
from dspy_fst.run import state
from dspy_fst.run.directory import RunDirectory
from dspy_fst.run.state import commit_state, newest_state


def save(content):
    """A trainer that saves this content."""

    def save_trainer(path):
        path.mkdir()
        (path / "weights").write_bytes(content)
        (path / "moments").write_bytes(b"m" + content)

    return save_trainer


def commits(folder, *contents, keep=2):
    """States of these contents, one after the other; the newest is returned."""
    folder.mkdir(exist_ok=True)
    last = newest_state(folder)
    for content in contents:
        step = last.fields["step"] + 1 if last else 0
        last = commit_state(folder, {"step": step}, save(content) if content else None, last, keep=keep)
    return last


def tree(folder):
    """Every file and its content, every folder, every link."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else path.is_symlink()
        for path in folder.rglob("*")
    }


class DiedError(BaseException):
    """The process ended here."""


def die(*_, **__):
    raise DiedError


@contextmanager
def dying_at(monkeypatch, owner, name):
    """A block that ends at the first call of this function, as a kill would end it."""
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, die)
        with pytest.raises(DiedError):
            yield


def test_the_newest_state_is_what_was_committed_last(tmp_path):
    commits(tmp_path / "states", b"one", b"two")
    newest = newest_state(tmp_path / "states")
    assert newest.fields == {"step": 1}
    assert (newest.path / "trainer" / "weights").read_bytes() == b"two"
    assert newest_state(tmp_path / "nothing") is None


@pytest.mark.parametrize("moment", ["rename", "replace", "fsync", "mkdir"])
def test_a_commit_that_is_cut_short_leaves_the_state_before_it(tmp_path, monkeypatch, moment):
    folder = tmp_path / "states"
    last = commits(folder, b"one")
    with dying_at(monkeypatch, os, moment):
        commit_state(folder, {"step": 1}, save(b"two"), last, keep=2)
    assert newest_state(folder).fields == {"step": 0}
    assert commits(folder, b"two").fields == {"step": 1}
    assert [path.name for path in sorted(folder.iterdir())] == ["000000", "000001"]


def test_a_trainer_that_did_not_move_is_not_written_again(tmp_path):
    folder = tmp_path / "states"
    commits(folder, b"one", None)
    files = [folder / number / "trainer" / "weights" for number in ("000000", "000001")]
    assert files[0].samefile(files[1])
    commits(folder, None, None)  # the first state goes, its files stay for those that share them
    newest = newest_state(folder)
    assert newest.fields == {"step": 3}
    assert (newest.path / "trainer" / "weights").read_bytes() == b"one"


def test_where_the_file_system_has_no_links_the_files_are_copied(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", no_links)
    commits(tmp_path / "states", b"one", None)
    newest = newest_state(tmp_path / "states")
    assert (newest.path / "trainer" / "weights").read_bytes() == b"one"
    assert (newest.path / "trainer" / "weights").stat().st_nlink == 1


@pytest.mark.parametrize("keep", [1, 3])
def test_only_the_newest_states_are_kept(tmp_path, keep):
    commits(tmp_path / "states", *[b"x"] * 5, keep=keep)
    assert sorted(path.name for path in (tmp_path / "states").iterdir()) == ["000002", "000003", "000004"][-keep:]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def forge(path):
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "fields": {"step": 7}}))


DAMAGES = {
    "a flipped bit in the weights": ("trainer/weights", flip),
    "weights cut short": ("trainer/weights", lambda path: os.truncate(path, 1)),
    "missing weights": ("trainer/weights", os.unlink),
    "a foreign file": ("trainer", lambda path: (path / "other").touch()),
    "other fields": ("state.json", forge),
    "a document cut short": ("state.json", lambda path: os.truncate(path, 20)),
    "an empty document": ("state.json", lambda path: os.truncate(path, 0)),
    "no document": ("state.json", os.unlink),
}


@pytest.mark.parametrize(("file", "damage"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_state_is_refused_and_the_message_s_advice_works(tmp_path, file, damage):
    folder = tmp_path / "states"
    commits(folder, b"one", b"two")
    (folder / ".000002.new").mkdir()  # what a kill left; a refusal removes nothing
    damage(folder / "000001" / file)
    before = tree(folder)
    with pytest.raises(RunDirectoryError, match=r"000001 is damaged: .* remove that folder to go on from .*000000"):
        newest_state(folder)
    assert tree(folder) == before
    (folder / "000001").rename(tmp_path / "removed")
    assert newest_state(folder).fields == {"step": 0}


def test_of_a_single_damaged_state_a_copy_is_asked_for(tmp_path):
    folder = tmp_path / "states"
    flip(commits(folder, b"one").path / "state.json")
    with pytest.raises(RunDirectoryError, match="restore it from a copy, or name a new run_dir"):
        newest_state(folder)


def test_a_file_in_a_state_s_place_is_refused(tmp_path):
    folder = tmp_path / "states"
    commits(folder, b"one")
    (folder / "000001").write_text("no folder")
    with pytest.raises(RunDirectoryError, match=r"000001 is damaged: .* remove that .* go on from .*000000"):
        newest_state(folder)


def test_a_state_of_another_release_is_refused(tmp_path):
    path = commits(tmp_path / "states", b"one").path / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(RunDirectoryError, match=r"000000 has format 99, this release reads 2; go on with the release"):
        newest_state(tmp_path / "states")


def test_what_a_kill_left_half_written_is_removed(tmp_path):
    folder = tmp_path / "states"
    commits(folder, b"one")
    (folder / ".000000.old").mkdir()
    (folder / ".000001.new" / "trainer").mkdir(parents=True)
    newest_state(folder)
    assert [path.name for path in folder.iterdir()] == ["000000"]


# ---- the log that belongs to the state --------------------------------------------------------------


def run_of(tmp_path, **options):
    return RunDirectory(tmp_path / "run", {"seed": 1}, **options)


def committed(tmp_path, states=1):
    """A run directory with a step and a commit for each state, closed."""
    run = run_of(tmp_path)
    for step in range(states):
        run.emit("step", step=step)
        run.commit(save(b"one"), step=step + 1)
    run.close()
    return tmp_path / "run"


def test_a_kill_between_a_commit_and_its_pruning_leaves_no_state_for_good(tmp_path, monkeypatch):
    committed(tmp_path, states=2)
    run = run_of(tmp_path)
    with dying_at(monkeypatch, state, "prune_states"):
        run.commit(save(b"two"), step=3)
    run.close()
    run = run_of(tmp_path)
    assert run.state["step"] == 3
    assert [path.name for path in sorted((run.path / "states").iterdir())] == ["000001", "000002"]


@pytest.mark.parametrize("change", [flip, lambda path: os.truncate(path, 9), os.unlink], ids=["flip", "cut", "remove"])
def test_events_that_are_not_those_committed_are_refused(tmp_path, change):
    log = committed(tmp_path) / "events.jsonl"
    change(log)
    before = tree(tmp_path / "run")
    with pytest.raises(RunDirectoryError, match=r"events.jsonl is not what was committed .* restore it from a copy"):
        run_of(tmp_path)
    assert tree(tmp_path / "run") == before


def test_a_run_whose_states_are_gone_is_not_begun_again(tmp_path):
    run = committed(tmp_path)
    (run / "states").rename(tmp_path / "states")
    with pytest.raises(RunDirectoryError, match=r"0 searches and 1 updates, but states/ holds nothing to go on from"):
        run_of(tmp_path)
    (tmp_path / "states").rename(run / "states")
    assert run_of(tmp_path).state["step"] == 1


def test_a_start_killed_in_its_first_moment_claims_nothing(tmp_path, monkeypatch):
    with dying_at(monkeypatch, os, "replace"):
        run_of(tmp_path)
    assert [path.name for path in (tmp_path / "run").iterdir()] != []
    RunDirectory(tmp_path / "run", {"seed": 2}).close()


def test_an_abandoned_run_killed_while_it_tidies_up_can_be_begun_again(tmp_path, monkeypatch):
    run = run_of(tmp_path)
    with dying_at(monkeypatch, os, "rmdir"):
        run.abandon()
    run.close()
    run_of(tmp_path).close()


def test_the_journal_of_another_run_is_not_taken_up(tmp_path):
    here, there = committed(tmp_path / "here"), committed(tmp_path / "there")
    run = run_of(tmp_path / "there")
    run.open_search(1).record("rollouts", "a", {"tokens": 3})
    assert run.open_search(1).replayed == 1
    (there / "search.jsonl").rename(here / "search.jsonl")
    run_here = run_of(tmp_path / "here")
    assert run_here.open_search(1).replayed == 0
    run_here.close()
    assert not (here / "search.jsonl").exists()


def test_foreign_files_among_the_weights_are_left_alone(tmp_path):
    run = run_of(tmp_path)
    weights = run.path / "weights"
    (weights / ".DS_Store").write_text("Finder")
    (weights / "zoo").mkdir()
    for step in range(4):
        (weights / f"step-{step:06d}").mkdir()
    (weights / "step-000009").write_text("a file in a version's place")
    run.drop_weights_from("step-000003")
    run.prune_weights(1)
    assert {path.name for path in weights.iterdir()} == {".DS_Store", "zoo", "step-000000", "step-000002"}
