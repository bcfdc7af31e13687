"""Signals and a disk that refuses: the run ends in order, says what is saved, and goes on to the same end."""

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest

from benchmarks.durability.outcome import outcome
from benchmarks.durability.small_run import compile_small
from benchmarks.durability.trials import PRELOADED
from dspy_fst.errors import DiskError, FSTError
from dspy_fst.policy_lm import PolicyLM, policy_of
from dspy_fst.project.names import Faults
from dspy_fst.run import state
from dspy_fst.run.directory import read_events
from dspy_fst.run.interrupts import ENDING, InterruptedScript, Terminated, ctrl_c_as_sentence, signals_raise
from dspy_fst.run.search_journal import Journal
from tests.engine.test_server_process import members

SCRIPT = """
import sys
from pathlib import Path
from benchmarks.durability.small_run import compile_small
compile_small(Path(sys.argv[1]), steps_per_cycle=2, progress=True)
"""
SHORT = {"steps_per_cycle": 2}
STATUS = {signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGINT: 130}
WAIT_S = 240


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("undisturbed") / "run")


def compiled(run_dir, **settings):
    """The outcome of a run, begun or continued in this process."""
    policy_of(compile_small(run_dir, **{**SHORT, **settings})).release()
    return outcome(run_dir)


# ---- real signals to a real process -----------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """Scripts that get a signal after their second step: signal -> (run directory, process)."""
    folder = tmp_path_factory.mktemp("scripts")
    scripts = {number: started(folder / number.name) for number in STATUS}
    waiting, deadline = dict(scripts), time.monotonic() + WAIT_S
    while waiting and time.monotonic() < deadline:
        for number, (run_dir, script) in list(waiting.items()):
            if sum(event["event"] == "step" for event in read_events(run_dir)) >= 2:
                script.send_signal(number)
                del waiting[number]
        time.sleep(0.02)
    yield scripts
    for _, script in scripts.values():
        script.kill()
    assert not waiting, f"waited {WAIT_S} s for the second step of {waiting}"


def started(run_dir):
    command = [sys.executable, "-c", SCRIPT, str(run_dir)]
    return run_dir, subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", STATUS, ids=lambda number: number.name)
def test_a_signal_ends_the_process_in_order_and_the_run_goes_on_to_the_same_end(interrupted, undisturbed, number):
    run_dir, script = interrupted[number]
    output, _ = script.communicate(timeout=WAIT_S)
    status = script.returncode
    # A shell shows 128 + the signal's number also for a process that a signal ended, as Python is by SIGINT.
    assert (128 - status if status < 0 else status) == STATUS[number]
    name = "Ctrl-C" if number == signal.SIGINT else number.name
    assert f"{name}: stopping; saved: " in output
    assert f"Compile again with run_dir={str(run_dir)!r} to go on" in output
    assert "Traceback" not in output
    assert members(script.pid) == []
    assert compiled(run_dir) == undisturbed


# ---- how Ctrl-C is shown ----------------------------------------------------------------------------

ENDED = """
import sys
from dspy_fst.run.interrupts import ctrl_c_as_sentence
with ctrl_c_as_sentence(shown={told}):
    raise KeyboardInterrupt({said})
"""
SAVED = "Ctrl-C: stopping; saved: 2 updates"


def ended(told, said, *options):
    """What a script says that Ctrl-C ended, and its exit status."""
    command = [sys.executable, *options, "-c", ENDED.format(told=told, said=said)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, stdin=subprocess.DEVNULL)
    return done.stderr, done.returncode


def test_a_script_that_ctrl_c_ends_says_what_is_saved_once_and_shows_no_traceback():
    assert ended(False, repr(SAVED)) == (f"{SAVED}\n", 130)
    assert ended(True, repr(SAVED)) == ("", 130)


@pytest.mark.parametrize("told", [True, False])
def test_ctrl_c_before_the_run_is_under_way_is_told_too(told):
    assert ended(told, "") == ("Ctrl-C: stopped before the run was under way; nothing was trained\n", 130)


def test_python_that_is_to_go_on_at_a_prompt_is_not_ended():
    shown, status = ended(True, repr(SAVED), "-i")
    assert f"KeyboardInterrupt: {SAVED}" in shown.replace("dspy_fst.run.interrupts.Interrupted", "KeyboardInterrupt")
    assert status == 0, "the end of its input is what ended it"


def test_whoever_catches_ctrl_c_or_an_exit_still_does():
    for kind in (KeyboardInterrupt, SystemExit):
        with pytest.raises(kind) as caught, ctrl_c_as_sentence(shown=True):
            raise KeyboardInterrupt(SAVED)
        assert (str(caught.value), caught.value.code) == (SAVED, 130)


def test_a_second_ctrl_c_while_the_first_is_told_keeps_no_engine(tmp_path, monkeypatch):
    released = []
    release = PolicyLM.release
    monkeypatch.setattr(PolicyLM, "release", lambda self: (released.append(self), release(self)))

    def twice(event):
        if event["event"] == "plan" or event.get("text", "").startswith("Ctrl-C"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_small(tmp_path / "run", **SHORT, listeners=[twice])
    student, policy = released
    assert policy is not student
    assert policy.handle._engine is None


def test_ctrl_c_in_a_user_s_module_is_no_fault_of_the_module(tmp_path):
    for error in (InterruptedScript(SAVED), KeyboardInterrupt(SAVED), Terminated(15)):
        with pytest.raises(type(error)), Faults(tmp_path).of("program"):
            raise error
    faults = Faults(tmp_path)
    with faults.of("program"):
        raise SystemExit(2)
    assert faults.sentences == ["program: SystemExit: 2"]


def test_other_errors_and_excepthook_are_left_alone():
    hook = sys.excepthook
    with pytest.raises(ValueError, match="mine"), ctrl_c_as_sentence(shown=True):
        raise ValueError("mine")
    assert sys.excepthook is hook


def test_a_notebook_shows_the_sentence_and_no_traceback(capsys, monkeypatch):
    from IPython.core.interactiveshell import InteractiveShell

    monkeypatch.setattr(sys, "ps1", "In : ", raising=False)
    shell = InteractiveShell()
    shell.run_cell(ENDED.format(told=True, said=repr(SAVED)), store_history=False)
    shown = capsys.readouterr()
    assert (shown.out + shown.err).strip() == SAVED


@pytest.mark.slow
def test_compile_without_a_view_says_where_ctrl_c_left_the_run(tmp_path, capsys):
    def listen(event):
        if event["event"] == "step":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        compile_small(tmp_path / "run", listeners=[listen], **SHORT)
    assert str(caught.value).startswith("Ctrl-C: stopping; saved: ")
    assert f"Compile again with run_dir={str(tmp_path / 'run')!r} to go on" in str(caught.value)
    assert capsys.readouterr().err.endswith(f"{caught.value}\n")
    assert caught.value.code == 130


# ---- signals inside a write, and handlers of others -------------------------------------------------


def signalled(call, number, nth):
    """The call; in its nth time the process first gets a signal."""
    times = iter(range(1_000_000))

    def call_after_signal(*arguments, **options):
        if next(times) == nth:
            os.kill(os.getpid(), number)
        return call(*arguments, **options)

    return call_after_signal


WRITES = {"a state": (state, "write_json", 4), "the journal": (Journal, "record", 3)}


@pytest.mark.slow
@pytest.mark.parametrize(("owner", "name", "nth"), WRITES.values(), ids=WRITES)
def test_a_signal_in_the_middle_of_a_write_does_no_harm(tmp_path, monkeypatch, undisturbed, owner, name, nth):
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, signalled(getattr(owner, name), signal.SIGTERM, nth))
        with pytest.raises(Terminated):
            compile_small(tmp_path / "run", **SHORT)
    assert compiled(tmp_path / "run") == undisturbed


@pytest.mark.parametrize("number", ENDING, ids=lambda number: number.name)
def test_in_the_block_a_signal_raises_and_afterwards_it_is_the_system_s_again(number):
    with pytest.raises(Terminated) as caught, signals_raise():
        os.kill(os.getpid(), number)
    assert (caught.value.code, caught.value.name) == (STATUS[number], number.name)
    assert signal.getsignal(number) is signal.SIG_DFL


@pytest.fixture
def mine():
    """A handler of the user's for SIGTERM; it counts."""
    counted = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: counted.append(number))
    yield counted
    signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
def test_a_handler_that_the_user_had_set_is_left_alone(tmp_path, mine):
    handler = signal.getsignal(signal.SIGTERM)
    once = iter([signal.SIGTERM])

    def listen(event):
        if event["event"] == "step":
            for number in once:
                os.kill(os.getpid(), number)

    compiled(tmp_path / "run", cycles=1, listeners=[listen])
    assert mine == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.slow
def test_outside_the_main_thread_a_program_is_compiled_too(tmp_path):
    left = []
    thread = threading.Thread(target=lambda: left.append(compiled(tmp_path / "run", cycles=1)))
    thread.start()
    thread.join(WAIT_S)
    kinds = [event["event"] for event in left[0]["events"]]
    assert [kinds.count(kind) for kind in ("cycle", "step", "done")] == [1, 2, 1]


# ---- a disk that refuses ----------------------------------------------------------------------------


def in_child(run_dir, refuse):
    """Run `refused` in a process of its own, which may lose rights; its error's type and text come back."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    here, there = context.Pipe()
    child = context.Process(target=refused, args=(there, run_dir, refuse))
    child.start()
    assert here.poll(WAIT_S), f"waited {WAIT_S} s for the run to meet the limit"
    child.join(WAIT_S)
    return here.recv()


def refused(there, run_dir, refuse):
    """Compile while the disk refuses from some moment on."""
    try:
        compile_small(run_dir, listeners=[refuse(run_dir)], **SHORT)
    except FSTError as error:
        there.send((type(error), str(error)))
    except BaseException as error:
        there.send((type(error), repr(error)))
    else:
        there.send((None, "the run ended"))
    os.seteuid(os.getuid())  # for what Python tidies up at its end


def limit_file_size(size):
    """What a full disk looks like from inside, and no other process meets it."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def no_room_at_all(run_dir):
    limit_file_size(100_000)
    return lambda event: None


def no_room_for_the_journal(run_dir):
    record = Journal.record

    def limited(self, *act):
        limit_file_size((run_dir / "search.jsonl").stat().st_size + 10)
        record(self, *act)

    def listen(event):
        if event["event"] == "candidate":
            Journal.record = limited

    return listen


def no_room_for_the_weights(run_dir):
    return lambda event: limit_file_size(1_000_000) if event.get("phase") == "weight update" else None


def no_room_for_the_state(run_dir):
    return lambda event: limit_file_size(1_000_000) if event["event"] == "step" else None


def no_rights(run_dir):
    """Writing is not permitted any more; root, to whom everything is, becomes somebody else."""

    def listen(event):
        if event["event"] == "step" and os.geteuid() == 0:
            os.seteuid(65_534)
        elif event["event"] == "step":
            for folder in [run_dir, *(path for path in run_dir.rglob("*") if path.is_dir())]:
                folder.chmod(0o555)

    return listen


REFUSALS = {
    "the journal does not fit": (no_room_for_the_journal, "raise the limit"),
    "the weights do not fit": (no_room_for_the_weights, "raise the limit"),
    "the state does not fit": (no_room_for_the_state, "raise the limit"),
    "writing is not permitted": (no_rights, "change the permissions"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("refuse", "advice"), REFUSALS.values(), ids=REFUSALS)
def test_a_disk_that_refuses_stops_the_run_which_goes_on_to_the_same_end(tmp_path, undisturbed, refuse, advice):
    run_dir = tmp_path / "run"
    kind, message = in_child(run_dir, refuse)
    for folder in tmp_path.rglob("*"):
        folder.chmod(0o755)
    assert kind is DiskError, message
    assert "cannot be written" in message
    assert f"{advice}, then go on with the same run_dir. What was committed is whole" in message
    assert compiled(run_dir) == undisturbed


@pytest.mark.slow
def test_a_disk_that_refuses_the_first_weights_leaves_the_directory_free(tmp_path):
    kind, _ = in_child(tmp_path / "run", no_room_at_all)
    assert kind is DiskError
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
