"""What the tests play on a cluster: the laboratory, with metrics and programs that know where they run."""

import os
import signal
import threading
import time
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
    """The node of this process; empty outside of a cluster."""
    return ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""


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


class Stopping(Placed):
    """Stops its whole process, as a hung one is, and tells its number in a file."""

    def __init__(self, lm: PolicyLM, told: Path):
        super().__init__(lm)
        self.told = told

    def forward(self, **inputs):
        self.told.write_text(str(os.getpid()))
        time.sleep(0.5)  # what the worker says at its start goes out
        os.kill(os.getpid(), signal.SIGSTOP)


class Unread(Placed):
    """Cannot be read in a worker."""

    def __setstate__(self, state):
        super().__setstate__(state)
        if node():
            raise ModuleNotFoundError("No module named 'of_the_first_node'")


class Held:
    """The laboratory's metric. The first call on a node, once it is armed, does not end."""

    def __init__(self, node: str, folder: Path):
        self.node, self.armed, self.held = node, folder / "armed", folder / "held"

    def __call__(self, gold, pred, trace=None, pred_name=None, pred_trace=None):
        if node() == self.node and self.armed.exists() and not self.held.exists():
            self.held.touch()
            time.sleep(HELD_S)
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
        until = time.monotonic() + 60
        while not self.metric.held.exists() and time.monotonic() < until:
            time.sleep(0.05)
        self.cluster.remove_node(self.node, allow_graceful=False)
