"""What copies of a program cost: peak memory of 64 rollouts, or requests, at once over a program that holds much data.

    python -m benchmarks.copies
    python -m benchmarks.copies --before OTHER_CHECKOUT    # the same figures of an older version of the package

Each figure is of a process of its own. It makes a program round an array, notes its memory, plays as many rollouts
(serves as many requests) as there are threads, all at the same time, and notes the peak. The engine says a fixed reply,
so that nothing but the program's copies takes memory.
"""

import argparse
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dspy
import numpy as np
import psutil

from dspy_fst.rollout.call_recorder import Recording, tag_predictors
from dspy_fst.rollout.components import read_texts, with_texts
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.rollout_settings import RolloutSettings
from dspy_fst.rollout.rollouter import Rollouter, Task
from dspy_fst.run.files import write_json
from dspy_fst.types import Problem

RESULT = Path(__file__).parent / "results" / "copies.json"
CASES = (("rollouts", 1_000_000_000, 64), ("serving", 1_000_000_000, 64), ("rollouts", 100_000_000, 32))
"""(what runs, bytes of the array, threads at once). The last is an index of 250,000 rows of 100 numbers."""
BEFORE = (("rollouts", 100_000_000, 32), ("serving", 100_000_000, 32))
"""Of an older version: 64 copies of a gigabyte would not fit into the memory of most machines."""


class Holding(dspy.Module):
    """A predictor beside an index, and a lock as a client holds one."""

    def __init__(self, size: int, together: threading.Barrier):
        super().__init__()
        self.answer = dspy.Predict("question: str -> answer: str")
        self.index = np.ones(size // 4, dtype="float32")
        self.wait = together.wait

    def forward(self, question: str) -> Any:
        self.wait()  # all copies are there at the same time
        return self.answer(question=question)


def measure(kind: str, size: int, threads: int) -> dict[str, Any]:
    """One figure, of this process."""
    from tests.fakes import fields, scripted_policy

    policy, _ = scripted_policy(lambda messages, seed: fields(answer="x"))
    program = Holding(size, threading.Barrier(threads, timeout=60))
    program.set_lm(policy)
    peak = _Peak()
    own = peak.now()
    began = time.monotonic()
    with peak:
        answered = _play(program, threads) if kind == "rollouts" else _serve(program, threads)
    return {
        "kind": kind,
        "array_bytes": size,
        "threads": threads,
        "answered": answered,
        "own_bytes": own,
        "peak_bytes": peak.highest,
        "ratio": peak.highest / own,
        "seconds": time.monotonic() - began,
    }


def _play(program: dspy.Module, threads: int) -> int:
    rollouter = Rollouter(program, Reward(lambda gold, pred, trace=None: 1.0), RolloutSettings(num_threads=threads))
    example = dspy.Example(question="q").with_inputs("question")
    seed = read_texts(program)
    rollouts = rollouter.rollout([Task(Problem(index, example), seed) for index in range(threads)], "benchmark")
    return sum(rollout.reward == 1.0 for rollout in rollouts)


def _serve(program: dspy.Module, threads: int) -> int:
    """As the service does: one program for each candidate, and a copy of it for each request."""
    from dspy_fst.serve.schema import schema_of
    from dspy_fst.serve.worker import run_program

    spoken: Any = with_texts(program, read_texts(program))
    tag_predictors(spoken)
    outputs = schema_of(program, None).outputs
    try:
        from dspy_fst.rollout.copying import Copier
    except ImportError:
        pass  # an older version takes the program itself
    else:
        spoken = Copier(spoken)
    with ThreadPoolExecutor(threads) as pool:
        jobs = [
            pool.submit(run_program, spoken, {"question": "q"}, outputs, Recording(index), {})
            for index in range(threads)
        ]
        return sum(job.result().answer == "x" for job in jobs)  # type: ignore[attr-defined]


class _Peak:
    """The highest resident memory while a block runs, looked at every 5 ms."""

    def __init__(self) -> None:
        self.highest = 0
        self._process = psutil.Process()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def now(self) -> int:
        resident: int = self._process.memory_info().rss
        return resident

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.highest = max(self.highest, self.now())

    def __enter__(self) -> None:
        self.highest = self.now()
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        self.highest = max(self.highest, self.now())


def in_a_process(case: tuple[str, int, int], source: Path) -> dict[str, Any]:
    """The figure of a case, by the package in ``source``."""
    from benchmarks.in_checkout import measured

    figure, log = measured(__file__, case, source)
    return {**figure, "log_lines": len(log.splitlines())}


def main() -> None:
    if case := os.environ.get("BENCHMARK_CASE"):
        print(json.dumps(measure(*json.loads(case))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout of an older version")
    arguments = parser.parse_args()
    here = Path(__file__).resolve().parent.parent
    result: dict[str, Any] = {"now": [in_a_process(case, here) for case in CASES]}
    if arguments.before:
        result["before"] = [in_a_process(case, arguments.before.resolve()) for case in BEFORE]
    elif RESULT.exists():
        result["before"] = json.loads(RESULT.read_text(encoding="utf-8")).get("before", [])
    write_json(RESULT, result)
    for when, figures in result.items():
        for figure in figures:
            own, peak, array = (figure[f"{name}_bytes"] / 1e6 for name in ("own", "peak", "array"))
            print(
                f"{when}: {figure['kind']}, array of {array:,.0f} MB, {figure['threads']} threads: "
                f"{own:,.0f} MB grow to {peak:,.0f} MB ({figure['ratio']:.2f} times)"
            )


if __name__ == "__main__":
    main()
