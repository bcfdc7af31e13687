"""What a child process does: compile with its places watched, and note what is paid for."""

import hashlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.durability.moments import Moment
from benchmarks.durability.passages import Passages
from benchmarks.durability.small_run import Subject
from dspy_fst.engine.in_process import InProcessEngine
from dspy_fst.engine.vllm.server import VLLMServer
from dspy_fst.rollout.rollouter import Rollouter, Task
from dspy_fst.slow.trainer import Trainer


class Paid:
    """Writes down every rollout and reflection as it is begun, in a file that outlives the process."""

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(self, kind: str, key: Any) -> None:
        digest = hashlib.sha256(json.dumps(key, default=str).encode()).hexdigest()[:16]
        os.write(self._file, f"{kind} {digest}\n".encode())


def watch(passages: Passages, paid: Paid, proposer: Callable[..., dict[str, str]]) -> Callable[..., dict[str, str]]:
    """Let the run's phases pass; returns the proposer to use."""
    play, play_one = Rollouter.rollout, Rollouter._rollout_one
    phase = ""

    def watched_play(self: Rollouter, tasks: Sequence[Task], draw: str, *rest: Any, **options: Any) -> Any:
        nonlocal phase
        phase = draw.partition("-")[0]
        paid.note("act", [draw, *((t.problem.index, t.candidate.digest, t.sample) for t in tasks)])
        return play(self, tasks, draw, *rest, **options)

    def watched_play_one(self: Rollouter, *arguments: Any) -> Any:
        paid.note("rollout", arguments[2].seed)
        with passages.at(f"{phase} rollout"):
            return play_one(self, *arguments)

    def propose(
        candidate: dict[str, str], reflective_dataset: Mapping[str, Any], components_to_update: list[str]
    ) -> dict[str, str]:
        key = [candidate, reflective_dataset, components_to_update]
        paid.note("act", key)
        paid.note("reflection", key)
        with passages.at("reflection"):
            return proposer(candidate, reflective_dataset, components_to_update)

    Rollouter.rollout = watched_play  # type: ignore[method-assign]
    Rollouter._rollout_one = watched_play_one  # type: ignore[method-assign, assignment]
    Trainer.step = _passing(passages, "update", Trainer.step)  # type: ignore[method-assign]
    InProcessEngine.load = _passing(passages, "load", InProcessEngine.load)  # type: ignore[method-assign]
    VLLMServer.load = _passing(passages, "load", VLLMServer.load)  # type: ignore[method-assign]
    return propose


def _passing(passages: Passages, place: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        with passages.at(place):
            return method(*arguments, **named)

    return call


def attempt(
    run_dir: Path, notes: Path, engine: str, settings: Mapping[str, Any], moment: Moment | None, subject: Subject
) -> None:
    """Compile in this (child) process, to the end or to the moment. Tells by files in ``notes``."""
    sys.stdout.flush()
    output = os.open(notes / "output", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(output, 1), os.dup2(output, 2)
    passages = Passages(run_dir, moment)
    passages.watch_files()
    propose = watch(passages, Paid(notes / "paid"), subject.proposer)
    (notes / "begun").touch()
    started = time.monotonic()
    try:
        subject.make(run_dir, engine=engine, propose=propose, **settings)
    except BaseException:
        traceback.print_exc()
        raise
    seconds = time.monotonic() - started
    (notes / "told").write_text(json.dumps({"counts": passages.counts, "seconds": seconds}))
