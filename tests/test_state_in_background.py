"""A state is written while the next step is sampled: what waits for it, what a failure and a kill cost."""

import errno
import threading
import time

import pytest

from dspy_fst.errors import DiskError, TrainingError
from dspy_fst.run import state, state_writer
from dspy_fst.run.directory import RunDirectory, read_events
from dspy_fst.run.state import newest_state
from dspy_fst.training import session
from tests.test_compile import compile_relay, same_weights, told

STEPS = {"method": "rl", "cycles": 1, "steps_per_cycle": 4, "problems_per_step": 2}


class KilledError(BaseException):
    """Ends a run from a listener."""


def killer(phase):
    def listen(event):
        if event.get("phase") == phase:
            raise KilledError

    return listen


def writes(monkeypatch, act):
    """``act(number of steps, write)`` in place of each state's writing."""

    def write(folder, fields, *given, **named):
        return act(fields["step"], lambda: state.commit_state(folder, fields, *given, **named))

    monkeypatch.setattr(state_writer, "commit_state", write)


def saved(text):
    def save(folder):
        folder.mkdir()
        (folder / "state").write_text(text)

    return save


# ---- one state after the other --------------------------------------------------------------------


def test_a_commit_comes_back_before_the_state_is_written_and_whoever_asks_for_it_waits(tmp_path, monkeypatch):
    ends, order = threading.Event(), []

    def held(step, write):
        order.append(f"begin {step}")
        assert ends.wait(30)
        order.append(f"end {step}")
        return write()

    run = RunDirectory(tmp_path / "run", {})
    run.commit(saved("zero"), step=0)
    writes(monkeypatch, held)
    written = run.commit(saved("one"), step=1, wait=False)
    assert not written.is_set()
    assert newest_state(run.path / "states", tidy=False).fields["step"] == 0
    threading.Timer(0.2, ends.set).start()
    run.commit(saved("two"), step=2, wait=False)  # one is in flight at most
    assert order[:2] == ["begin 1", "end 1"]
    assert run.state["step"] == 2
    assert (run.trainer_state / "state").read_text() == "two"
    run.close()


@pytest.mark.parametrize("begun", [False, True], ids=["before", "after"])
def test_a_signal_while_the_writing_thread_starts_leaves_nobody_waiting(tmp_path, monkeypatch, begun):
    """The old state stands if the thread had not begun, else the new one; either way the answer comes at once."""
    run = RunDirectory(tmp_path / "run", {})
    run.commit(saved("zero"), step=0)
    start = threading.Thread.start

    def interrupted(thread):
        if begun:
            start(thread)
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KilledError):
            run.commit(saved("one"), step=1, wait=False)
    monkeypatch.setattr(state_writer, "STATE_S", 10)
    assert run.state["step"] == (1 if begun else 0)
    run.commit(saved("two"), step=2)
    assert run.state["step"] == 2
    run.close()


def test_what_is_committed_is_what_was_there_when_it_was_asked_for(tmp_path, monkeypatch):
    goes_on = threading.Event()
    writes(monkeypatch, lambda step, write: goes_on.wait(30) and write())
    run = RunDirectory(tmp_path / "run", {})
    run.emit("step", number=1)
    run.commit(saved("one"), step=1, wait=False)
    run.emit("step", number=2)
    goes_on.set()
    run.close()
    assert [event["number"] for event in read_events(run.path)] == [1, 2]
    again = RunDirectory(tmp_path / "run", {})
    assert [event["number"] for event in again.events()] == [1], "events after the state are made again"
    again.close()


def test_a_write_that_fails_is_told_once_as_the_disk_s_and_the_state_before_stays(tmp_path, monkeypatch):
    def full(step, write):
        raise OSError(errno.ENOSPC, "No space left on device")

    run = RunDirectory(tmp_path / "run", {})
    run.commit(saved("zero"), step=0)
    writes(monkeypatch, full)
    run.commit(saved("one"), step=1, wait=False)
    with pytest.raises(DiskError, match=r"cannot be written.*the disk is full; free space"):
        _ = run.state
    assert run.state["step"] == 0
    run.close()


def test_a_write_that_does_not_end_is_not_waited_for_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(state_writer, "STATE_S", 0.1)
    goes_on = threading.Event()
    writes(monkeypatch, lambda step, write: goes_on.wait(30) and write())
    run = RunDirectory(tmp_path / "run", {})
    run.commit(saved("one"), step=1, wait=False)
    with pytest.raises(DiskError, match=r"the state is not written after 0.1 s; look at the disk"):
        _ = run.state
    goes_on.set()
    monkeypatch.setattr(state_writer, "STATE_S", 30.0)
    run.close()


# ---- in a run -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return compile_relay(folder, **STEPS), folder


def test_the_next_step_is_sampled_meanwhile_and_the_next_update_waits(undisturbed, tmp_path, monkeypatch):
    due, order, phases = threading.Event(), [], []

    def held_until_the_next_update_is_due(step, write):
        if step != 2:
            return write()
        order.append("sampled" if due.wait(30) else "held up")
        time.sleep(0.3)  # in which an update that does not wait begins
        written = write()
        order.append("written")
        return written

    def listen(event):
        phases.append(event.get("phase"))
        if phases.count("weight update") == 3:
            due.set()

    steps = session.Session._optimizer_step
    monkeypatch.setattr(
        session.Session, "_optimizer_step", lambda self, *given: (order.append(given[1]), steps(self, *given))[1]
    )
    writes(monkeypatch, held_until_the_next_update_is_due)
    compiled = compile_relay(tmp_path / "run", listeners=[listen], **STEPS)
    assert order == [0, 1, "sampled", "written", 2, 3]
    assert same_weights(compiled, undisturbed[0])


def test_killed_while_a_state_is_written_a_run_goes_on_from_the_one_before_and_ends_the_same(
    undisturbed, tmp_path, monkeypatch
):
    def half_written(step, write):
        if step < 2:
            return write()
        (tmp_path / "run" / "states" / ".000009.new" / "trainer").mkdir(parents=True)
        raise KilledError

    with monkeypatch.context() as patched:
        writes(patched, half_written)
        with pytest.raises(KilledError):
            compile_relay(tmp_path / "run", listeners=[killer("step 2: rollouts")], **STEPS)
    assert newest_state(tmp_path / "run" / "states", tidy=False).fields["step"] == 1
    resumed = compile_relay(tmp_path / "run", **STEPS)
    assert same_weights(resumed, undisturbed[0])
    assert [told(e) for e in read_events(tmp_path / "run")] == [told(e) for e in read_events(undisturbed[1])]
    kept, wanted = (sorted(p.name for p in (run / "weights").iterdir()) for run in (tmp_path / "run", undisturbed[1]))
    assert kept == wanted


def test_a_state_that_cannot_be_written_stops_the_run_at_its_next_step(undisturbed, tmp_path, monkeypatch):
    def full(step, write):
        if step == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write()

    with monkeypatch.context() as patched:
        writes(patched, full)
        with pytest.raises(DiskError, match="the disk is full"):
            compile_relay(tmp_path / "run", **STEPS)
    steps = [event["report"]["step"] for event in read_events(tmp_path / "run") if event["event"] == "step"]
    assert steps in ([0, 1], [0, 1, 2])
    assert same_weights(compile_relay(tmp_path / "run", **STEPS), undisturbed[0])


def test_a_run_that_stops_for_another_reason_tells_of_a_lost_state_too(tmp_path, monkeypatch):
    def full(step, write):
        if step == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write()

    writes(monkeypatch, full)
    with pytest.raises(KilledError) as caught:
        compile_relay(tmp_path / "run", listeners=[killer("step 2: rollouts")], **STEPS)
    assert any("The newest state was not written either" in note for note in caught.value.__notes__)


def test_the_weights_stay_until_the_state_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "STATE_S", 0.1)
    goes_on = threading.Event()
    writes(monkeypatch, lambda step, write: (step < 1 or goes_on.wait(5)) and write())
    with pytest.raises(TrainingError, match=r"step 1: the state before it is not on the disk after 0.1 s"):
        compile_relay(tmp_path / "run", **STEPS)
    goes_on.set()
