"""Rollouts as Ray tasks: programs, tools, retrieval and metrics run in workers on the cluster's CPUs.

A task plays a chunk of the rollouts by `Rollouter.rollout`, as a process alone plays all. Seeds depend on a rollout's
names alone, so a chunk that was lost with its node is played again with the same draws. A chunk's rollouts are taken
together, once, when its task has ended.
"""

import itertools
import logging
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import NamedTuple

import dspy
import ray
from ray import ObjectRef
from ray.actor import ActorProxy
from ray.exceptions import RayError, RayTaskError

from dspy_fst.cluster.policy_calls import Line, PolicyCalls, Progress, sent_before
from dspy_fst.cluster.relay import Relay
from dspy_fst.cluster.shipping import HandleNumber, packed, shipped_settings, unpacked, why_not
from dspy_fst.engine.vllm.on_ray.nodes import node_faults, nodes_alive
from dspy_fst.errors import ClusterError, ConfigurationError, briefly
from dspy_fst.outcomes.outcome import Outcome
from dspy_fst.policy_lm import EngineHandle
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
    dspy_settings: bytes
    """Packed once for all chunks."""


@dataclass(frozen=True)
class Bundle:
    """A stage on its way, and what reads it."""

    relay: ActorProxy[Relay]
    path: tuple[str, ...]
    """Where the run's process finds modules."""
    stage: bytes


class Returned(NamedTuple):
    """A rollout on its way back, in two parts: what a program has made may be of any class."""

    bare: bytes
    """The rollout without `OF_PROGRAM`."""
    held: bytes
    """These; empty for a rollout that was masked on its way."""


OF_PROGRAM = ("prediction", "trace", "asked")
"""Fields of a rollout that hold values of the program's."""


@lru_cache(maxsize=1)
def _stage(bundle: "ObjectRef[Bundle]") -> tuple[Line, Stage]:
    sent = ray.get(bundle)
    sys.path[:] = dict.fromkeys([*sent.path, *sys.path])  # first, as a module of the project may be installed here, too
    line = Line(sent.relay)
    stage = unpacked(sent.stage, line.handle, classes_too=True)
    assert isinstance(stage, Stage)
    return line, stage


def greet(bundles: "list[ObjectRef[Bundle]]") -> list[str]:
    """Read the program. What is wrong with the node is an error of that."""
    _stage(bundles[0])
    return []


def play(bundles: "list[ObjectRef[Bundle]]", name: str, data: bytes) -> list[Returned]:
    """Make a chunk's rollouts. The bundle comes in a list, as Ray would fetch it for each call otherwise.

    Raises:
        RuntimeError: the program or the metric raised what ends a run. Ray would take it for a cancelled task.
    """
    line, stage = _stage(bundles[0])
    line.chunk = name
    chunk = unpacked(data, line.handle)
    assert isinstance(chunk, Chunk)
    rollouter = Rollouter(stage.program, stage.reward, stage.settings, line.say, seed=stage.seed)
    settings = unpacked(chunk.dspy_settings, line.handle)
    assert isinstance(settings, dict)
    try:
        with dspy.context(**settings):
            rollouts = rollouter.rollout(chunk.tasks, chunk.draw, anew=chunk.anew)
    except (KeyboardInterrupt, SystemExit) as error:
        raise RuntimeError(f"the program or the metric raised {type(error).__name__}") from error
    return [_sent(rollout) for rollout in rollouts]


def _sent(rollout: Rollout) -> Returned:
    """The rollout; masked if something in it cannot be pickled."""
    whole = {field.name: getattr(rollout, field.name) for field in fields(rollout)}
    held = {name: whole[name] for name in OF_PROGRAM}
    try:
        bare = replace(rollout, prediction=None, trace=(), asked=())
        return Returned(packed(bare, sent_before), packed(held, sent_before))
    except Exception:  # a program may return anything
        faults = ((name, why) for name, value in whole.items() if (why := why_not(value, name)) is not None)
        name, why = next(faults, ("something", ""))
        return Returned(
            packed(_masked(rollout, f"{name} cannot be pickled", why), sent_before), packed({}, sent_before)
        )


def _masked(rollout: Rollout, reason: str, detail: str) -> Rollout:
    return Rollout(rollout.problem, rollout.candidate, rollout.calls, None, Outcome("masked", f"ray: {reason}", detail))


def arrived(sent: Returned, handle: Callable[[HandleNumber], EngineHandle]) -> Rollout:
    """The rollout that a worker has sent; masked if what its program made cannot be read in this process."""
    bare = unpacked(sent.bare, handle)
    assert isinstance(bare, Rollout)
    try:
        held = unpacked(sent.held, handle)
    except Exception as error:  # classes may be read by any code, and may be of a module that is not here
        return _masked(bare, "prediction or trace cannot be read again", f"{type(error).__name__}: {briefly(error)}")
    assert isinstance(held, dict)
    return replace(bare, **held) if held else bare


# ---- in the run's process ------------------------------------------------------------------------


class RayRollouter(Rollouter):
    """Makes the rollouts on a cluster. See `Rollouter` for the other arguments.

    Args:
        cluster: The connection (`dspy_fst.cluster.connecting.connected`).
        held: CPUs of the cluster that the run's own servers hold.

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
        held: int = 0,
    ):
        super().__init__(program, reward, settings, in_flight, seed=seed)
        self._calls = PolicyCalls(cluster, in_flight)
        stage = packed(Stage(program, reward, settings, seed), self._calls.numbered)
        path = tuple(os.path.abspath(place) for place in sys.path)
        self._bundle = ray.put(Bundle(self._calls.relay, path, stage))
        self._held = held
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
        everything = Chunk(tasks, draw, anew, packed(shipped_settings(), self._calls.numbered))
        cpus = int(ray.cluster_resources().get("CPU", 0)) - self._held
        playing = _Playing(self._calls, self._bundle, everything, cpus, self.settings)
        made: dict[int, Rollout] = {}
        try:
            while len(made) < len(tasks):
                playing.fill()
                for place, rollout in playing.ended():
                    # The candidate as it is here, whose digest is known.
                    made[place] = replace(rollout, candidate=tasks[place].candidate)
                    on_rollout(made[place])
        finally:
            playing.cancel()
            self._lost += playing.lost
        return [made[place] for place in range(len(tasks))]

    def _greet(self) -> None:
        """Have each node import the program, before anything is spent."""
        if faults := node_faults(nodes_alive(), "read the program", greet, [self._bundle], limit_s=GREET_S):
            raise ConfigurationError([f"ray: {fault}" for fault in faults])


class _Playing:
    """The rollouts of one call of `RayRollouter.rollout`: those that wait, and the chunks that the cluster has.

    Args:
        everything: All of them, as one chunk.
        cpus: So many workers may play at once.
    """

    _numbers = itertools.count()

    def __init__(
        self,
        calls: PolicyCalls,
        bundle: "ObjectRef[Bundle]",
        everything: Chunk,
        cpus: int,
        settings: RolloutSettings,
    ):
        self._calls, self._bundle, self._everything, self._settings = calls, bundle, everything, settings
        self._task = ray.remote(num_cpus=1, max_retries=0)(play)  # a chunk that is lost is counted, so Ray plays none
        self._at_once = min(settings.num_threads, len(everything.tasks))
        self._workers = min(max(1, cpus), self._at_once)
        self._begun = 0
        """How many rollouts were in a chunk."""
        self._again: deque[range] = deque()
        """Chunks that were lost, as the places of their rollouts."""
        self._given: dict[ObjectRef[list[Returned]], tuple[range, str]] = {}
        """Task -> its chunk, and the name of this try of it."""
        self._tries: Counter[range] = Counter()
        self._moved_at = time.monotonic()
        """When the cluster last had a worker at work."""
        self.lost: Counter[str] = Counter()
        """Rollouts that were lost and played again, by reason."""

    def fill(self) -> None:
        """Hand chunks to the cluster until all workers have one."""
        while places := self._next():
            name = f"chunk-{next(self._numbers)}"
            self._calls.begin(name)
            chunk = replace(self._everything, tasks=self._everything.tasks[places.start : places.stop])
            data = packed(chunk, self._calls.numbered)
            self._given[self._task.remote([self._bundle], name, data)] = places, name

    def _next(self) -> range | None:
        """The chunk of a free worker; None if no worker is free or nothing waits.

        A worker gets its share of the rollouts that may still begin: of 8 at once on 3 workers 3, 3 and 2.
        """
        if not (free := self._workers - len(self._given)):
            return None
        if self._again:
            return self._again.popleft()
        room = self._at_once - sum(len(places) for places, _ in self._given.values())
        places = range(self._begun, min(self._begun + -(-room // free), len(self._everything.tasks)))
        self._begun = places.stop
        return places

    def ended(self) -> list[tuple[int, Rollout]]:
        """(place, rollout) of the chunks that have ended; waits for the first for `POLL_S`.

        Raises:
            ClusterError: see `RayRollouter.rollout`.
        """
        ready, _ = ray.wait([*self._given], num_returns=len(self._given), timeout=0)
        ready = ready or ray.wait([*self._given], num_returns=1, timeout=POLL_S)[0]
        found: list[tuple[int, Rollout]] = []
        for task in ready:
            places, name = self._given.pop(task)
            self._calls.end(name)
            self._moved_at = time.monotonic()
            try:
                rollouts = [arrived(sent, self._calls.handle) for sent in ray.get(task)]
            except RayTaskError as error:
                raise ClusterError(f"ray: a worker could not make rollouts: {briefly(error.cause)}") from error
            except RayError as error:
                self._play_again(places, type(error).__name__, briefly(error))
            else:
                found += zip(places, rollouts, strict=True)
        self._look_after_the_rest()
        return found

    def cancel(self) -> None:
        """Take back what the cluster still has."""
        for task, (_, name) in self._given.items():
            ray.cancel(task, force=True)
            self._calls.end(name)
        self._given.clear()

    def _play_again(self, places: range, kind: str, why: str) -> None:
        self._tries[places] += 1
        count = len(places)
        if self._tries[places] >= MOST_LOSSES:
            raise ClusterError(
                f"ray: {count} rollouts were lost {MOST_LOSSES} times, the last time to {kind}: {why}. Where their "
                "program ends its process or needs more memory than a node has, mend that; compile again to go on"
            )
        logger.warning("%d rollouts were lost and are played again: %s", count, why)
        self.lost[f"lost to {kind}"] += count
        self._again.append(places)

    def _look_after_the_rest(self) -> None:
        if self._calls.lost is not None:
            raise ClusterError(f"ray: the relay of the policy's calls ended: {briefly(self._calls.lost)}")
        now = time.monotonic()
        at_work = {task: self._calls.chunks[name] for task, (_, name) in self._given.items()}
        for task in [task for task, progress in at_work.items() if self._is_silent(progress, now)]:
            places, name = self._given.pop(task)
            ray.cancel(task, force=True)  # not waited for: a process that is stopped hears nothing of it
            self._calls.end(name)
            self._play_again(places, "silence", f"their worker did nothing for {now - at_work[task].heard_at:.0f} s")
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
        limit = self._settings.rollout_timeout_s + SILENT_S
        return progress.began and not progress.open_calls and now - progress.heard_at > limit
