"""A server process that is always ended: by close, at exit, with its owner, or when nobody holds it."""

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
_KILLED_S = 10.0  # large processes take a while to give their memory back, which the next server needs
_LOG_BYTES_READ = 4_194_304


class ServerProcess:
    """Runs a command in its own process group with its output in a file; dies with this Python process.

    Args:
        command: Program and arguments.
        environment: The whole environment of the command.
        log_path: Output is appended here; None makes a temporary file.
        grace_s: Seconds between SIGTERM and SIGKILL when it is stopped.
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
        # A finalizer also runs at interpreter exit and when the engine is garbage.
        self._finalizer = weakref.finalize(self, _end, self._supervisor, grace_s, os.getpid())

    @property
    def group(self) -> int:
        """Process group id, shared by everything the command starts."""
        return self._supervisor.pid

    @property
    def exit_status(self) -> int | None:
        """None while it runs; 128 + N when signal N ended it."""
        status = self._supervisor.poll()
        return status if status is None or status >= 0 else 128 - status

    def exits_within(self, seconds: float) -> bool:
        """Whether it has ended, after waiting for that at most so long."""
        try:
            self._supervisor.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def output(self) -> list[str]:
        """The last lines it wrote since it was started here."""
        try:
            with self.log_path.open("rb") as log:
                log.seek(max(self._log_start, self.log_path.stat().st_size - _LOG_BYTES_READ))
                return log.read().decode(errors="replace").splitlines()
        except FileNotFoundError:  # a temporary log goes when another thread stops the process
            return []

    def kill(self) -> None:
        """SIGKILL to the whole group, the only signal that ends a stopped process; ``stop`` still has to follow."""
        _signal_group(self.group, signal.SIGKILL)

    def stop(self, *, keep_log: bool = False) -> None:
        """SIGTERM to the group, then SIGKILL after the grace period. May be called twice.

        Args:
            keep_log: Leave a temporary log behind, for an error message that points to it.
        """
        with self._stopping:  # who comes second waits, too
            self._finalizer()
        if self._log_is_temporary and not keep_log:
            self.log_path.unlink(missing_ok=True)


def _temporary_log() -> Path:
    handle, name = tempfile.mkstemp(prefix="dspy-fst-vllm-", suffix=".log")
    os.close(handle)
    return Path(name)


def _end(supervisor: subprocess.Popen[bytes], grace_s: float, owner: int) -> None:
    if os.getpid() != owner:
        return  # a forked child ran the finalizer; the server is not its own
    for number, seconds in ((signal.SIGTERM, grace_s), (signal.SIGKILL, _KILLED_S)):
        _signal_group(supervisor.pid, number)  # SIGKILL also when nobody is seen: a look is no snapshot
        deadline = time.monotonic() + seconds
        while (lives := _group_lives(supervisor.pid)) and time.monotonic() < deadline:
            time.sleep(0.05)
    if lives:
        logger.warning("process group %d was killed and is not gone after %g s", supervisor.pid, _KILLED_S)
    supervisor.poll()  # reaped last: until then the group's id is nobody else's


def _group_lives(group: int) -> bool:
    try:
        return any(_lives_in(group, process) for process in psutil.process_iter())
    except OSError:  # no file descriptor is left to look with
        return True


def _lives_in(group: int, process: psutil.Process) -> bool:
    """Whether the process belongs to the group and holds memory.

    A zombie does not, and in a container nobody may ever reap it; but one of many threads does until the last ends.
    """
    try:
        if os.getpgid(process.pid) != group:
            return False
        return process.status() != psutil.STATUS_ZOMBIE or process.num_threads() > 1
    except (psutil.Error, ProcessLookupError):  # it went meanwhile
        return False


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # the latter on macOS for a group of zombies
        os.killpg(group, number)
