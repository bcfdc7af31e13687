"""What the tests play on a cluster: the laboratory, with metrics and programs that know where they run."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import dspy
import ray

from dspy_fst import PolicyLM
from dspy_fst.engine.making import EngineKind
from programs.lab import BASE, build

LAB = build("reverse", train=24, val=6, test=4)
HELD_S = 300.0
"""A process that is held so long has been ended before."""


def node() -> str:
    """The node of this worker; empty in a run's own process."""
    there = ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE
    return ray.get_runtime_context().get_node_id() if there else ""


def wait_for(come: Callable[[], bool]) -> None:
    until = time.monotonic() + HELD_S
    while not come():
        assert time.monotonic() < until
        time.sleep(0.05)


def graded(gold, pred, trace=None, pred_name=None, pred_trace=None) -> float:
    """A metric under which hardly any group is flat, so that a step has several micro-batches."""
    return sum(map(ord, str(pred.answer))) % 7 / 6


def policy(engine: EngineKind = "in_process", **options: object) -> PolicyLM:
    return PolicyLM(BASE, engine=engine, max_tokens=16, engine_options=options)


class Placed(dspy.Module):
    """The laboratory's program, whose prediction names its node."""

    def __init__(self, lm: PolicyLM):
        super().__init__()
        self.lab = LAB.program.deepcopy()
        self.lab.set_lm(lm)

    def forward(self, **inputs):
        return dspy.Prediction(**self.lab(**inputs).toDict(), node=node())


class Meeting(Placed):
    """Begins in a worker when both nodes play: one may have played everything before the other begins."""

    def __init__(self, lm: PolicyLM, folder: Path):
        super().__init__(lm)
        self.folder = folder

    def forward(self, **inputs):
        if here := node():
            (self.folder / f"{here}.here").touch()
            wait_for(lambda: len([*self.folder.glob("*.here")]) == 2)
        return super().forward(**inputs)


class Stopping(Placed):
    """Calls the policy, then stops its whole process, as a hung one is, and tells its number in a file."""

    def __init__(self, lm: PolicyLM, told: Path):
        super().__init__(lm)
        self.told = told

    def forward(self, **inputs):
        super().forward(**inputs)  # the run's process has heard of the worker
        self.told.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)


class Ending(Placed):
    """Ends its worker."""

    def forward(self, **inputs):
        os._exit(1)


class Interrupting(Placed):
    """Raises what ends a run."""

    def forward(self, **inputs):
        raise KeyboardInterrupt


class Unread(Placed):
    """Cannot be read in a worker."""

    def __setstate__(self, state):
        super().__setstate__(state)
        if node():
            raise ModuleNotFoundError("No module named 'of_the_first_node'")


class Held:
    """The laboratory's metric. Once it is armed, its first call on a node does not end, and other nodes wait for it."""

    def __init__(self, node: str, folder: Path):
        self.node, self.armed, self.held = node, folder / "armed", folder / "held"

    def __call__(self, gold, pred, trace=None, pred_name=None, pred_trace=None):
        if node() and self.armed.exists() and not self.held.exists():
            if node() == self.node:
                self.held.touch()
                time.sleep(HELD_S)
            wait_for(self.held.exists)
        return LAB.metric(gold, pred, trace)


class Killer:
    """Arms the metric, and removes the node on which it is then held."""

    def __init__(self, cluster, node, metric: Held):
        self.cluster, self.node, self.metric = cluster, node, metric
        self.thread = threading.Thread(target=self._kill_when_held, daemon=True)

    def arm(self) -> None:
        self.metric.armed.touch()
        self.thread.start()

    def _kill_when_held(self) -> None:
        wait_for(self.metric.held.exists)
        self.cluster.remove_node(self.node, allow_graceful=False)
