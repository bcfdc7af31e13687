"""Rollouts as Ray tasks: programs, tools, retrieval and metrics run in workers on the cluster's CPUs.

A task plays a chunk of the rollouts by `Rollouter.rollout`, as a process alone plays all. Seeds depend on a rollout's
names alone, so a chunk that was lost with its node is played again with the same draws. A chunk's rollouts are taken
together, once, when its task has ended.
"""

import itertools
import logging
import platform
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache

import dspy
import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dspy_fst.cluster.policy_calls import Line, PolicyCalls, Progress, sent_before
from dspy_fst.cluster.shipping import packed, shipped_settings, unpacked
from dspy_fst.errors import ClusterError, ConfigurationError, briefly
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.rollout_settings import RolloutSettings
from dspy_fst.rollout.rollouter import Rollouter, Task
from dspy_fst.types import Rollout

logger = logging.getLogger(__name__)
POLL_S = 0.5
"""Seconds between two looks at what the cluster does, where no chunk ends (ours)."""
GREET_S = 180.0
"""Seconds that a node may take to import the program at first (ours)."""
BEGIN_S = 300.0
"""Seconds without a worker at work, after which the cluster counts as stalled (ours; a new node may take minutes)."""
SILENT_S = 60.0
"""Seconds beyond ``rollout_timeout_s`` after which a worker that neither calls nor ends a rollout is ended (ours)."""
MOST_LOSSES = 3
"""Times that a chunk may be lost (ours). A program that ends its worker does so each time."""


# ---- in a worker ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """What is the same for all chunks of a run."""

    program: dspy.Module
    reward: Reward
    settings: RolloutSettings
    seed: int


@dataclass(frozen=True)
class Chunk:
    """Rollouts that are made together, with the arguments of `Rollouter.rollout`."""

    tasks: Sequence[Task]
    draw: str
    anew: bool
    dspy_settings: dict[str, object]


@dataclass(frozen=True)
class Bundle:
    """A stage on its way, and what reads it."""

    relay: ActorHandle
    path: tuple[str, ...]
    """Where the run's process finds modules."""
    stage: bytes


@lru_cache(maxsize=1)
def _stage(bundle: "ObjectRef[Bundle]") -> tuple[Line, Stage]:
    sent = ray.get(bundle)
    sys.path += [place for place in sent.path if place not in sys.path]
    line = Line(sent.relay)
    stage = unpacked(sent.stage, line.handle)
    assert isinstance(stage, Stage)
    return line, stage


def greet(bundles: "list[ObjectRef[Bundle]]") -> str:
    """The worker's release of Python, once it has read the program."""
    _stage(bundles[0])
    return platform.python_version()


def play(bundles: "list[ObjectRef[Bundle]]", name: str, data: bytes) -> bytes:
    """Make a chunk's rollouts. The bundle comes in a list, as Ray would fetch it for each call otherwise."""
    line, stage = _stage(bundles[0])
    line.chunk = name
    chunk = unpacked(data, line.handle)
    assert isinstance(chunk, Chunk)
    rollouter = Rollouter(stage.program, stage.reward, stage.settings, line.say, seed=stage.seed)
    with dspy.context(**chunk.dspy_settings):
        return packed(rollouter.rollout(chunk.tasks, chunk.draw, anew=chunk.anew), sent_before)


# ---- in the run's process ------------------------------------------------------------------------


class RayRollouter(Rollouter):
    """Makes the rollouts on a cluster. See `Rollouter` for the other arguments.

    Args:
        cluster: The connection (`dspy_fst.cluster.connecting.connected`).

    Raises:
        ConfigurationError: a node cannot read the program.
    """

    def __init__(
        self,
        program: dspy.Module,
        reward: Reward,
        settings: RolloutSettings,
        in_flight: Callable[[int], None],
        *,
        seed: int,
        cluster: ExitStack,
    ):
        super().__init__(program, reward, settings, in_flight, seed=seed)
        self._calls = PolicyCalls(cluster, in_flight)
        stage = packed(Stage(program, reward, settings, seed), self._calls.numbered)
        self._bundle = ray.put(Bundle(self._calls.relay, tuple(sys.path), stage))
        self._lost: Counter[str] = Counter()
        self._greet()

    def take_counts(self) -> Counter[str]:
        counts, self._lost = self._lost, Counter()
        return counts

    def rollout(
        self,
        tasks: Sequence[Task],
        draw: str,
        on_rollout: Callable[[Rollout], None] = lambda rollout: None,
        *,
        anew: bool = False,
    ) -> list[Rollout]:
        """As `Rollouter.rollout`; ``on_rollout`` is called when a rollout's chunk has ended.

        Raises:
            ClusterError: no worker plays, a chunk was lost again and again, or a worker cannot read what is sent.
        """
        at_once = min(self.settings.num_threads, len(tasks))
        size = -(-at_once // max(1, int(ray.cluster_resources().get("CPU", 0))))
        settings = shipped_settings()
        chunks = [Chunk(tasks[i : i + size], draw, anew, settings) for i in range(0, len(tasks), size)]
        playing = _Playing(self._calls, self._bundle, chunks, self.settings.rollout_timeout_s)
        made: dict[int, list[Rollout]] = {}
        try:
            while len(made) < len(chunks):
                playing.fill(at_once // size)
                for index, rollouts in playing.ended():
                    # The candidate as it is here, whose digest is known.
                    own = zip(rollouts, chunks[index].tasks, strict=True)
                    made[index] = [replace(rollout, candidate=task.candidate) for rollout, task in own]
                    for rollout in made[index]:
                        on_rollout(rollout)
        finally:
            playing.cancel()
            self._lost += playing.lost
        return [rollout for index in range(len(chunks)) for rollout in made[index]]

    def _greet(self) -> None:
        """Have each node import the program, before anything is spent."""
        task = ray.remote(num_cpus=0, max_retries=0)(greet)
        nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
        on = {name: NodeAffinitySchedulingStrategy(name, soft=False) for name in nodes}
        asked = {name: task.options(scheduling_strategy=on[name]).remote([self._bundle]) for name in nodes}
        faults, until = [], time.monotonic() + GREET_S
        for name, answer in asked.items():
            try:
                ray.get(answer, timeout=max(0.0, until - time.monotonic()))
            except GetTimeoutError:
                faults.append(f"ray: node {nodes[name]} did not read the program within {GREET_S:g} s")
            except RayTaskError as error:
                faults.append(
                    f"ray: node {nodes[name]} cannot read the program: {briefly(error.cause)}. Install the same "
                    "packages and have the program's code at the same place on every node"
                )
            except RayError as error:  # one that is lost just now is no fault of the run
                logger.warning("node %s was lost at the start: %s", nodes[name], briefly(error))
        if faults:
            raise ConfigurationError(faults)


class _Playing:
    """The chunks of one call of `RayRollouter.rollout` that wait, and those that the cluster has.

    Args:
        rollout_s: The time limit of a rollout.
    """

    _numbers = itertools.count()

    def __init__(self, calls: PolicyCalls, bundle: "ObjectRef[Bundle]", chunks: Sequence[Chunk], rollout_s: float):
        self._calls, self._bundle, self._chunks, self._rollout_s = calls, bundle, chunks, rollout_s
        self._task = ray.remote(num_cpus=1, max_retries=0)(play)  # a chunk that is lost is counted, so Ray plays none
        self._waiting = deque(range(len(chunks)))
        self._given: dict[ObjectRef[bytes], tuple[int, str]] = {}
        """Task -> its chunk, and the name of this try of it."""
        self._tries: Counter[int] = Counter()
        self._moved_at = time.monotonic()
        """When the cluster last had a worker at work."""
        self.lost: Counter[str] = Counter()
        """Chunks that were lost and played again, by reason."""

    def fill(self, most: int) -> None:
        """Hand chunks to the cluster until it has so many."""
        while self._waiting and len(self._given) < max(1, most):
            index = self._waiting.popleft()
            chunk, name = self._chunks[index], f"chunk-{next(self._numbers)}"
            self._calls.begin(name)
            data = packed(chunk, self._calls.numbered)
            self._given[self._task.remote([self._bundle], name, data)] = index, name

    def ended(self) -> list[tuple[int, list[Rollout]]]:
        """(chunk, its rollouts) of those that have ended; waits for the first for `POLL_S`.

        Raises:
            ClusterError: see `RayRollouter.rollout`.
        """
        ready, _ = ray.wait([*self._given], num_returns=len(self._given), timeout=0)
        ready = ready or ray.wait([*self._given], num_returns=1, timeout=POLL_S)[0]
        found = []
        for task in ready:
            index, name = self._given.pop(task)
            self._calls.end(name)
            self._moved_at = time.monotonic()
            try:
                rollouts = unpacked(ray.get(task), self._calls.handle)
            except RayTaskError as error:
                raise ClusterError(f"ray: a worker could not make rollouts: {briefly(error.cause)}") from error
            except RayError as error:
                self._play_again(index, type(error).__name__, briefly(error))
            else:
                assert isinstance(rollouts, list)
                found.append((index, rollouts))
        self._look_after_the_rest()
        return found

    def cancel(self) -> None:
        """Take back what the cluster still has."""
        for task, (_, name) in self._given.items():
            ray.cancel(task, force=True)
            self._calls.end(name)
        self._given.clear()

    def _play_again(self, index: int, kind: str, why: str) -> None:
        self._tries[index] += 1
        count = len(self._chunks[index].tasks)
        if self._tries[index] >= MOST_LOSSES:
            raise ClusterError(
                f"ray: {count} rollouts were lost {MOST_LOSSES} times, the last time to {kind}: {why}. Where their "
                "program ends its process or needs more memory than a node has, mend that; compile again to go on"
            )
        logger.warning("%d rollouts were lost and are played again: %s", count, why)
        self.lost[f"lost to {kind}"] += count
        self._waiting.appendleft(index)

    def _look_after_the_rest(self) -> None:
        if self._calls.lost is not None:
            raise ClusterError(f"ray: the relay of the policy's calls ended: {briefly(self._calls.lost)}")
        now = time.monotonic()
        at_work = {task: self._calls.chunks[name] for task, (_, name) in self._given.items()}
        for task in [task for task, progress in at_work.items() if self._is_silent(progress, now)]:
            index, name = self._given.pop(task)
            ray.cancel(task, force=True)  # not waited for: a process that is stopped hears nothing of it
            self._calls.end(name)
            self._play_again(index, "silence", f"their worker did nothing for {now - at_work[task].heard_at:.0f} s")
        if not at_work or any(progress.began for progress in at_work.values()):
            self._moved_at = now
        elif now - self._moved_at > BEGIN_S:
            cpus, nodes = ray.cluster_resources().get("CPU", 0), sum(node["Alive"] for node in ray.nodes())
            raise ClusterError(
                f"ray: no worker began to play within {BEGIN_S:g} s; the cluster has {nodes} nodes with {cpus:g} CPUs, "
                "which other jobs may hold (`ray status` tells). Add nodes, or compile again later to go on"
            )

    def _is_silent(self, progress: Progress, now: float) -> bool:
        """Whether a worker hangs: it has no call of the policy open, and ended no rollout within their time limit."""
        limit = self._rollout_s + SILENT_S
        return progress.began and not progress.open_calls and now - progress.heard_at > limit
