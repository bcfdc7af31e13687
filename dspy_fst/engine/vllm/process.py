"""A server process that always ends: when it is stopped, at exit, with its owner, or when its object is collected."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

logger = logging.getLogger(__name__)

_SUPERVISE = Path(__file__).with_name("served") / "supervise.py"
_KILLED_S = 10.0  # a large process takes a while to release its memory, which the next server needs
_LOG_BYTES_READ = 4_194_304


class ServerProcess:
    """Runs a command in its own process group, with its output in a file, and ends it with this Python process.

    Args:
        command: Program and arguments.
        environment: The complete environment of the command.
        log_path: File to which the output is appended; None makes a temporary file.
        grace_s: Seconds between SIGTERM and SIGKILL when the command is stopped.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], *, log_path: Path | None, grace_s: float
    ):
        self._log_is_temporary = log_path is None
        self.log_path = log_path or _temporary_log()
        self._log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
        with self.log_path.open("ab") as log:
            self._supervisor = subprocess.Popen(
                [sys.executable, "-I", str(_SUPERVISE), str(os.getpid()), *command],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._stopping = threading.Lock()
        # A finalizer also runs when the interpreter exits and when this object is collected.
        self._finalizer = weakref.finalize(self, _end, self._supervisor, grace_s, os.getpid())

    @property
    def group(self) -> int:
        """Id of the process group, which everything that the command starts belongs to."""
        return self._supervisor.pid

    @property
    def exit_status(self) -> int | None:
        """None while the command runs; 128 + N if signal N ended it."""
        status = self._supervisor.poll()
        return status if status is None or status >= 0 else 128 - status

    def exits_within(self, seconds: float) -> bool:
        """Whether the command ends within this time; waits until then at most."""
        try:
            self._supervisor.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def output(self) -> list[str]:
        """The last lines of its output since it was started here."""
        try:
            with self.log_path.open("rb") as log:
                log.seek(max(self._log_start, self.log_path.stat().st_size - _LOG_BYTES_READ))
                return log.read().decode(errors="replace").splitlines()
        except FileNotFoundError:  # another thread stopped the process, which removes a temporary log
            return []

    def folder(self, here: Path) -> Path:
        """The folder itself; see `launched.Process`."""
        return here

    def kill(self) -> None:
        """Send SIGKILL, the only signal that ends a suspended process, to the group. Call ``stop`` afterwards."""
        _signal_group(self.group, signal.SIGKILL)

    def stop(self, *, keep_log: bool = False) -> None:
        """Send SIGTERM to the group, then SIGKILL after the grace period. May be called twice.

        Args:
            keep_log: Keep a temporary log, for an error message that names it.
        """
        with self._stopping:  # a second caller waits until the first is done
            self._finalizer()
        if self._log_is_temporary and not keep_log:
            self.log_path.unlink(missing_ok=True)


def _temporary_log() -> Path:
    handle, name = tempfile.mkstemp(prefix="dspy-fst-vllm-", suffix=".log")
    os.close(handle)
    return Path(name)


def _end(supervisor: subprocess.Popen[bytes], grace_s: float, owner: int) -> None:
    if os.getpid() != owner:
        return  # the finalizer runs in a forked child, which does not own the server
    for number, seconds in ((signal.SIGTERM, grace_s), (signal.SIGKILL, _KILLED_S)):
        _signal_group(supervisor.pid, number)  # SIGKILL even if no process was seen: one may have just been forked
        deadline = time.monotonic() + seconds
        while (lives := _group_lives(supervisor.pid)) and time.monotonic() < deadline:
            time.sleep(0.05)
    if lives:
        logger.warning("process group %d was killed and is not gone after %g s", supervisor.pid, _KILLED_S)
    supervisor.poll()  # reaped last: until then the system gives the group's id to no other process


def _group_lives(group: int) -> bool:
    try:
        return any(_lives_in(group, process) for process in psutil.process_iter())
    except OSError:  # no file descriptor is left for the search
        return True


def _lives_in(group: int, process: psutil.Process) -> bool:
    """Whether the process belongs to the group and still holds memory.

    A zombie holds none, and in a container it may never be reaped. A zombie main thread whose other threads still run
    does hold memory.
    """
    try:
        if os.getpgid(process.pid) != group:
            return False
        return process.status() != psutil.STATUS_ZOMBIE or process.num_threads() > 1
    except (psutil.Error, ProcessLookupError):  # it ended meanwhile
        return False


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # the latter on macOS for a group of zombies
        os.killpg(group, number)
