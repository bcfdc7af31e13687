"""A server process never outlives its owner, and loading never overlaps sampling."""

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from dspy_fst.engine.machine import free_port, port_taken
from dspy_fst.engine.vllm.diagnosis import telling_lines
from dspy_fst.engine.vllm.process import ServerProcess
from dspy_fst.engine.weights_lock import WeightsLock
from dspy_fst.errors import EngineError
from tests.serve.makers import wait_until

# A server that ignores SIGTERM and has a child that does so too: the worst case.
STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.fork()
print("ready", flush=True)
time.sleep(600)
"""
OWNER = """
import os, sys, time
from pathlib import Path
from dspy_fst.engine.vllm.process import ServerProcess
process = ServerProcess([sys.executable, "-c", sys.argv[1]], os.environ, log_path=Path(sys.argv[2]), grace_s=1)
print(process.group, flush=True)
time.sleep(600)
"""


def members(group: int) -> list[int]:
    """Process ids of a group, those not counted that have ended and that nobody reaped."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and not ended(process):
                found.append(process.pid)
    return found


def ended(process: psutil.Process) -> bool:
    """Whether its last thread has ended; the first one may be dead while others still hold the memory."""
    if not process.is_running():
        return True
    with contextlib.suppress(OSError):  # it went meanwhile, or this system has no /proc
        stats = [(task / "stat").read_text() for task in Path(f"/proc/{process.pid}/task").iterdir()]
        return all(stat.rpartition(")")[2].split()[0] in "ZX" for stat in stats)
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE
    return True


def below(owner: int, name: str) -> psutil.Process | None:
    """A process under this one whose command line contains the name; others come and go meanwhile."""
    for process in psutil.Process(owner).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if name in "".join(process.cmdline()):
                return process
    return None


def wait_until_gone(group: int, seconds: float) -> list[int]:
    """What is left of a group after at most so long."""
    deadline = time.monotonic() + seconds
    while (left := members(group)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def start(code: str, log: Path | None, grace_s: float = 1.0) -> ServerProcess:
    return ServerProcess([sys.executable, "-c", code], os.environ, log_path=log, grace_s=grace_s)


def wait_until_ready(log: Path) -> None:
    """Both processes have said so; their lines may be mixed."""
    wait_until(lambda: log.exists() and log.read_text().count("ready") == 2, "two processes are ready", limit_s=20)


def test_stop_ends_the_whole_group_even_when_it_ignores_sigterm(tmp_path: Path) -> None:
    process = start(STUBBORN, tmp_path / "log")
    wait_until_ready(tmp_path / "log")
    assert len(members(process.group)) == 3
    process.stop()
    process.stop()
    assert members(process.group) == []


# To end a process the kernel takes back its memory, page by page, when the last of its threads has ended.
LARGE = STUBBORN.replace(
    "os.fork()",
    """
import threading
held = bytearray(2**28)
os.fork()
held[::4096] = bytes(2**16)
for _ in range(30):
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
""",
)


def test_what_had_to_be_killed_is_gone_when_stop_returns(tmp_path: Path) -> None:
    process = start(LARGE, tmp_path / "log", grace_s=0.1)
    wait_until_ready(tmp_path / "log")
    process.stop()
    assert members(process.group) == []


def test_a_group_is_killed_also_when_nobody_can_look_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    process = start(STUBBORN, tmp_path / "log", grace_s=0.1)
    wait_until_ready(tmp_path / "log")

    def none_left() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr("dspy_fst.engine.vllm.process._KILLED_S", 0.1)
        patch.setattr(psutil, "process_iter", none_left)
        process.stop()
    assert "was killed and is not gone after 0.1 s" in caplog.text
    assert wait_until_gone(process.group, seconds=20) == []


def test_who_stops_it_a_second_time_waits_for_the_first(tmp_path: Path) -> None:
    process = start(STUBBORN, tmp_path / "log", grace_s=1)
    wait_until_ready(tmp_path / "log")
    first = threading.Thread(target=process.stop)
    first.start()
    wait_until(process._stopping.locked, "the first stops it", limit_s=20)
    process.stop()
    assert members(process.group) == []
    first.join()


def test_kill_ends_a_group_that_is_stopped_with_its_supervisor(tmp_path: Path) -> None:
    process = start(STUBBORN, tmp_path / "log", grace_s=60)
    wait_until_ready(tmp_path / "log")
    os.killpg(process.group, signal.SIGSTOP)
    process.kill()
    assert process.exits_within(10)
    assert process.exit_status == 128 + signal.SIGKILL
    assert wait_until_gone(process.group, seconds=10) == []
    process.stop()


def test_sigkill_of_the_owner_leaves_no_orphan(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-c", OWNER, STUBBORN, str(log)]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert owner.stdout
    group = int(owner.stdout.readline())
    wait_until_ready(log)
    owner.kill()
    owner.wait()
    owner.stdout.close()
    assert wait_until_gone(group, seconds=15) == []


def test_the_end_of_the_thread_that_started_it_does_not_end_the_server(tmp_path: Path) -> None:
    held: list[ServerProcess] = []
    thread = threading.Thread(target=lambda: held.append(start("import time; time.sleep(600)", tmp_path / "log")))
    thread.start()
    thread.join()
    try:
        assert not held[0].exits_within(1.5)
    finally:
        held[0].stop()


def test_a_process_that_nobody_holds_is_ended(tmp_path: Path) -> None:
    process = start("import time; time.sleep(600)", tmp_path / "log")
    group = process.group
    del process
    assert members(group) == []


def test_exit_status_and_last_words_are_known_at_once(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("words of an earlier server\n")
    process = start("print('my last words'); raise SystemExit(7)", tmp_path / "log")
    assert process.exits_within(10)
    assert process.exit_status == 7
    assert process.output() == ["my last words"]


def test_a_killed_command_reports_the_signal(tmp_path: Path) -> None:
    process = start("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", tmp_path / "log")
    assert process.exits_within(10)
    assert process.exit_status == 128 + signal.SIGKILL
    process.stop()


def test_a_temporary_log_goes_with_a_clean_stop_and_stays_on_request() -> None:
    process, failed = start("", None), start("", None)
    process.stop()
    failed.stop(keep_log=True)
    assert not process.log_path.exists()
    assert failed.log_path.exists()
    failed.log_path.unlink()


def test_the_cause_is_quoted_as_well_as_the_end() -> None:
    output = ["INFO start", "ValueError: the cause", *["noise"] * 40, "RuntimeError: see above"]
    assert telling_lines(output, last=2) == ["ValueError: the cause", "noise", "RuntimeError: see above"]
    aftermath = [" - leaked function", "nanobind: leaks", "resource_tracker: 2 leaked semaphores"]
    assert telling_lines([*output, *aftermath], last=1) == ["ValueError: the cause", "RuntimeError: see above"]


def test_ports_are_found_and_seen_taken() -> None:
    port = free_port("127.0.0.1")
    assert not port_taken("127.0.0.1", port)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port))
        listener.listen()
        assert port_taken("127.0.0.1", port)


def test_a_load_waits_for_samplers_and_goes_before_later_ones() -> None:
    lock, order = WeightsLock(), []

    def load() -> None:
        with lock.loading(5):
            order.append("load")

    def sample_later() -> None:
        with lock.sampling(5):
            order.append("later")

    threads = [threading.Thread(target=load), threading.Thread(target=sample_later)]
    with lock.sampling(5):
        threads[0].start()
        wait_until(lambda: lock._loaders_waiting == 1, "the load waits", limit_s=20)
        threads[1].start()
        time.sleep(0.1)  # were it let in, it would be by now
        order.append("first")
    for thread in threads:
        thread.join()
    assert order == ["first", "load", "later"]


def test_waits_at_the_gate_end_with_who_waited_for_what() -> None:
    lock = WeightsLock()
    with lock.sampling(1), pytest.raises(EngineError, match=r"load waited \d+ s for 1 requests in flight"):
        lock.loading(0.05).__enter__()
    with lock.loading(1), pytest.raises(EngineError, match=r"request waited 0\.05 s for a load"):
        lock.sampling(0.05).__enter__()
    with lock.sampling(0.05), lock.sampling(0.05):
        pass
