"""Run a small Python program in a process of its own that can do little harm.

The limits stop accidents: endless loops, memory, output, files, sockets. They are no jail for hostile code.
"""

import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import IO, Literal

_CHILD = """
import resource, sys
source = sys.stdin.read()
seconds, memory, output = map(int, sys.argv[1:])
for limit, most in (
    (resource.RLIMIT_CPU, seconds),
    (resource.RLIMIT_AS, memory),
    (resource.RLIMIT_FSIZE, output),
    (resource.RLIMIT_NOFILE, 3),
    (resource.RLIMIT_NPROC, 0),
    (resource.RLIMIT_CORE, 0),
):
    resource.setrlimit(limit, (most, most))
exec(compile(source, "<program>", "exec"), {"__name__": "__main__"})
"""


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    seconds: int = 5
    """Of the clock and of the processor."""
    memory_mb: int = 256
    """Address space."""
    output_kb: int = 1024
    """Of what it prints, and of any file."""


@dataclass(frozen=True)
class Ran:
    """How a program ended."""

    ended: Literal["done", "failed", "timeout"]
    output: str
    """What it printed."""
    error: str
    """Last line of its traceback, e.g. "MemoryError"."""


def run(source: str, limits: Limits | None = None) -> Ran:
    """Run a program that needs no import and no file: beyond what Python has loaded, it can open neither.

    It runs isolated (`-I`), without site packages and environment, in an empty folder that is removed afterwards,
    with no file descriptor but its own three.
    """
    limits = limits or Limits()
    numbers = (limits.seconds, limits.memory_mb << 20, limits.output_kb << 10)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _CHILD, *map(str, numbers)],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=err,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        try:
            process.communicate(source.encode(), timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=10)
        return _told(process.returncode, _text(out), _text(err))


def _told(returncode: int, output: str, errors: str) -> Ran:
    if returncode in (-signal.SIGKILL, -signal.SIGXCPU):
        return Ran("timeout", output, "")
    lines = errors.strip().splitlines()
    return Ran("done" if returncode == 0 else "failed", output, lines[-1] if lines else "")


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")
