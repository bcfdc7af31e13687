"""Runs the parts one after the other, each in a process of its own, within the time of the whole check."""

import json
import os
import platform
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu_check.child import ROWS, WAITS
from benchmarks.gpu_check.parts import PARTS, REHEARSAL, Part
from benchmarks.gpu_check.tables import show

TAIL = 600
"""Characters of a failed part's output that are kept."""
PYTEST_LINE = re.compile(r"^(\S+::.+?) (PASSED|FAILED|SKIPPED|ERROR)", re.MULTILINE)
LIBRARIES = ("torch", "transformers", "peft", "trl", "dspy", "gepa", "triton")


@dataclass
class Outcome:
    """What became of a part."""

    name: str
    status: str
    """``"done"``, ``"failed"``, ``"out of time"`` or ``"skipped"``."""
    reason: str = ""
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)


class Running:
    """A part's process. It may be started before its turn: it then loads, and waits."""

    def __init__(self, part: Part, folder: Path):
        self.part = part
        stem = folder / re.sub(r"\W+", "-", part.name)
        self._rows, self._log = stem.with_suffix(".jsonl"), stem.with_suffix(".log")
        environment = os.environ | {ROWS: str(self._rows), WAITS: "1", "PYTHONUNBUFFERED": "1"}
        environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        with self._log.open("w") as log:
            self._process: subprocess.Popen[str] = subprocess.Popen(
                part.command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
                start_new_session=True,
            )

    def finish(self, limit_s: float) -> Outcome:
        """Give the part its turn and wait for its end, for at most ``limit_s``."""
        started, late = time.monotonic(), False
        with suppress(BrokenPipeError, ValueError):
            self._stdin.write(f"{limit_s}\n")
            self._stdin.flush()
        try:
            self._process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            late = True
        self.stop()
        seconds, code = time.monotonic() - started, self._process.returncode
        status = "out of time" if late else ("done" if code == 0 else "failed")
        reason = "" if status == "done" else self._reason(f"{limit_s:.0f} s were over" if late else f"status {code}")
        return Outcome(self.part.name, status, reason, seconds, list(self._read()))

    def stop(self) -> None:
        """End the process and those it started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(timeout=60)

    @property
    def _stdin(self) -> IO[str]:
        assert self._process.stdin is not None
        return self._process.stdin

    def _reason(self, what: str) -> str:
        return f"{what}; the end of its output: {self._log.read_text(errors='replace')[-TAIL:].strip()}"

    def _read(self) -> Iterator[dict[str, Any]]:
        if self.part.kind == "pytest":
            for test, outcome in PYTEST_LINE.findall(self._log.read_text(errors="replace")):
                yield {"test": test.split("::", 1)[1], "outcome": outcome.lower()}
        elif self._rows.exists():
            yield from (json.loads(line) for line in self._rows.read_text().splitlines())


def run_parts(parts: Sequence[Part], seconds: float) -> Iterator[Outcome]:
    """The outcome of each part. While one works, the next one loads."""
    ends = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        waiting: Running | None = None
        for index, part in enumerate(parts):
            running, waiting = waiting or Running(part, Path(folder)), None
            left = ends - time.monotonic()
            try:
                if left < part.least_s:
                    running.stop()
                    yield Outcome(part.name, "skipped", f"{max(left, 0):.0f} s were left, it needs {part.least_s:.0f}")
                    continue
                if index + 1 < len(parts):
                    waiting = Running(parts[index + 1], Path(folder))
                limit = left if index + 1 == len(parts) else min(left, part.limit_s)
                yield running.finish(limit)
            except BaseException:
                for process in filter(None, (running, waiting)):
                    process.stop()
                raise


def machine() -> dict[str, Any]:
    """The card, its driver, and the versions that were measured."""
    versions = {}
    for name in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {"card": _card(), "python": platform.python_version(), "cores": os.cpu_count(), "versions": versions}


def _card() -> str:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "none"
    return told.strip().splitlines()[0]


def check(seconds: float, *, rehearse: bool, only: Sequence[str] | None, out: Path | None) -> int:
    """Run everything, print the tables, write the JSON file; the status is 1 when a part failed."""
    found = machine()
    if found["card"] == "none" and not rehearse:
        print("no NVIDIA card was found (nvidia-smi): --rehearse runs every part on the CPU with tiny models")
        return 1
    parts = [part for part in (REHEARSAL if rehearse else PARTS) if not only or part.name.startswith(tuple(only))]
    result: dict[str, Any] = {"machine": found, "rehearsal": rehearse, "parts": []}
    started = time.monotonic()
    for outcome in run_parts(parts, seconds):
        result["parts"].append(asdict(outcome))
        result["seconds"] = time.monotonic() - started
        print(f"{outcome.name}: {outcome.status} after {outcome.seconds:.0f} s {outcome.reason}", flush=True)
        if out is not None:  # after each part: what was measured stays when the machine goes away
            out.write_text(json.dumps(result, indent=1) + "\n")
    print(show(result), flush=True)
    return int(any(_bad(part) for part in result["parts"]))


def _bad(part: dict[str, Any]) -> bool:
    failed = any(row.get("outcome") in ("failed", "error") for row in part["rows"])
    return part["status"] in ("failed", "out of time") or failed
