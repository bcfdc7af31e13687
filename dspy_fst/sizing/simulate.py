"""A discrete-event simulation (simpy) of a run's acts on a machine: who waits for whom, and what takes the time.

Needs the extra ``sizing``. Nothing is drawn here: the acts hold all lengths, so equal acts and rates give equal times.
"""

import heapq
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from dspy_fst.errors import ConfigurationError
from dspy_fst.sizing.rates import EngineRates, MachineRates
from dspy_fst.sizing.workload import Act, Learn, Play, Reflect

if TYPE_CHECKING:
    import simpy

MISSING = "the simulation needs simpy, which is not installed: pip install 'dspy-fst[sizing]'"
REFLECTIONS, UPDATE, PUBLISH, VERIFICATION, STATE, REST = (
    "reflections",
    "update",
    "publish",
    "verification",
    "waiting for the state",
    "the rest of a step",
)
SAMPLED = ("search", "rollouts", "validation")
"""Activities in which the engines sample."""
BUSY, FULL = 0.8, 0.8
"""Shares from which on the program's Python is called busy, and an engine's rows full (ours)."""
Steps = Generator["simpy.Event", Any, None]


@dataclass(frozen=True)
class Timeline:
    """What the acts took."""

    seconds: Mapping[str, float]
    """Activity -> seconds; together ``total``."""
    rollouts: int
    tokens: float
    """Sampled."""
    rows: float
    """Rows of an engine, on average over the time in which it samples."""
    engine_share: float
    """Share of the sampled activities' time in which an engine samples, on average over engines."""
    program_share: float
    """Share of that time in which the program's Python works."""

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def sampling_s(self) -> float:
        """Seconds in which rollouts were made."""
        return sum(self.seconds.get(activity, 0.0) for activity in SAMPLED)

    @property
    def rollouts_per_s(self) -> float:
        """While rollouts are made."""
        return self.rollouts / self.sampling_s if self.sampling_s else 0.0

    def bottleneck(self, engine: EngineRates) -> str:
        """What saturates first: the longest activity, and for rollouts what holds them up."""
        groups: Counter[str] = Counter()
        for activity, seconds in self.seconds.items():
            groups["sampling" if activity in SAMPLED else activity] += seconds  # type: ignore[assignment]
        longest = max(groups, key=groups.__getitem__)
        return self._held_up(engine) if longest == "sampling" else longest

    def _held_up(self, engine: EngineRates) -> str:
        if self.program_share >= BUSY:
            return "the program's Python: one process plays all rollouts"
        if self.rows >= FULL * engine.rows:
            return "keys and values: the engines' rows are full"
        if self.rows < engine.half_full:
            return "the length of replies: the engines have too few rollouts in flight"
        return "decoding: the engines are saturated"


def simulate(acts: Iterable[Act], rates: MachineRates, in_flight: int) -> Timeline:
    """Play the acts one after the other, as a run does.

    Args:
        in_flight: Rollouts at once (``num_threads``).

    Raises:
        ConfigurationError: simpy is not installed.
    """
    require_simpy()
    import simpy

    run = _Run(simpy.Environment(), rates, in_flight)
    run.env.run(until=run.env.process(run.all_of(acts)))
    return run.timeline()


def require_simpy() -> None:
    """
    Raises:
        ConfigurationError: simpy is not installed.
    """
    if find_spec("simpy") is None:
        raise ConfigurationError([MISSING])


class _Run:
    """The loop: one act after the other."""

    def __init__(self, env: "simpy.Environment", rates: MachineRates, in_flight: int):
        self.env, self.rates, self.in_flight = env, rates, in_flight
        self.seconds: Counter[str] = Counter()
        self.loads = [0] * rates.engines
        """Calls that each engine samples, or that wait there."""
        self.engines = [_Engine(env, rates.engine, self._callers) for _ in range(rates.engines)]
        self.program_free, self.program_busy = 0.0, 0.0
        self.left = 0
        """Rollouts of the current play that have not ended."""
        self.rollouts, self.tokens = 0, 0.0
        self.state: simpy.Event | None = None
        """The state that is being written."""

    def all_of(self, acts: Iterable[Act]) -> Steps:
        for act in acts:
            match act:
                case Play():
                    yield from self._timed(act.phase, self._play(act))
                case Reflect():
                    yield from self._for(REFLECTIONS, self.rates.reflection_s)
                case Learn():
                    yield from self._learn(act)

    def _timed(self, activity: str, steps: Steps) -> Steps:
        began = self.env.now
        yield from steps
        self.seconds[activity] += self.env.now - began  # type: ignore[assignment]

    def _for(self, activity: str, seconds: float) -> Steps:
        self.seconds[activity] += seconds  # type: ignore[assignment]
        yield self.env.timeout(seconds)

    def _learn(self, act: Learn) -> Steps:
        rates = self.rates
        if self.state is not None:
            yield from self._timed(STATE, _waits_for(self.state))
        yield from self._for(UPDATE, rates.update_s + act.tokens * rates.update_token_s)
        yield from self._for(PUBLISH, rates.publish_s)
        yield from self._for(VERIFICATION, rates.verify_s)
        yield from self._for(REST, rates.rest_s)
        self.state = self.env.timeout(rates.state_s) if act.state else None

    # ---- rollouts --------------------------------------------------------------------------------

    def _play(self, play: Play) -> Steps:
        self.left = len(play.rollouts)
        self.rollouts += self.left
        yield self.env.timeout(self.rates.play_s)
        todo = deque(play.rollouts)
        threads = [self.env.process(self._thread(todo, play.prompt)) for _ in range(min(self.left, self.in_flight))]
        yield self.env.all_of(threads)

    def _thread(self, todo: deque[tuple[float, ...]], prompt: float) -> Steps:
        while todo:
            for tokens in todo.popleft():
                self.tokens += tokens
                yield self.env.timeout(self._python() - self.env.now)
                place = self.loads.index(min(self.loads))
                self.loads[place] += 1
                yield self.engines[place].reply(prompt, tokens)
                self.loads[place] -= 1
            self.left -= 1
            if not self.rates.engine.joins:
                for engine in self.engines:
                    engine.look()  # one that waits for all callers waits for fewer now

    def _python(self) -> float:
        """The time at which the program's Python of this call has had its turn."""
        self.program_free = max(self.program_free, self.env.now) + self.rates.program_s
        self.program_busy += self.rates.program_s
        return self.program_free

    def _callers(self) -> int:
        return min(self.left, self.in_flight)

    def timeline(self) -> Timeline:
        sampled = sum(self.seconds[activity] for activity in SAMPLED)
        busy = sum(engine.busy for engine in self.engines)
        return Timeline(
            {activity: seconds for activity, seconds in self.seconds.items() if seconds},
            self.rollouts,
            self.tokens,
            rows=sum(engine.row_seconds for engine in self.engines) / busy if busy else 0.0,
            engine_share=busy / len(self.engines) / sampled if sampled else 0.0,
            program_share=self.program_busy / sampled if sampled else 0.0,
        )


class _Engine:
    """One engine. All its rows get a token in each step, so they advance together along one clock of tokens."""

    def __init__(self, env: "simpy.Environment", rates: EngineRates, callers: Callable[[], int]):
        self._env, self._rates, self._callers = env, rates, callers
        self._clock = 0.0
        """Tokens that a row has got which is there from the beginning."""
        self._rows: list[tuple[float, int, simpy.Event]] = []
        """(the clock at its end, order of arrival, its reply), a heap."""
        self._waiting: deque[tuple[float, float, simpy.Event]] = deque()
        """(prompt, tokens, reply)."""
        self._arrivals = 0
        self._stirred = env.event()
        self.busy = self.row_seconds = 0.0
        env.process(self._serve())

    def reply(self, prompt: float, tokens: float) -> "simpy.Event":
        """Ask for a reply; the event is its end."""
        ended = self._env.event()
        self._waiting.append((prompt, tokens, ended))
        self.look()
        return ended

    def look(self) -> None:
        """Something changed: a call came, or fewer callers are left."""
        if not self._stirred.triggered and (self._rates.joins or self._may_begin()):
            self._stirred.succeed()

    def _may_begin(self) -> bool:
        return bool(self._waiting) and (self._rates.joins or len(self._waiting) >= self._callers())

    def _serve(self) -> Steps:
        while True:
            if (self._rates.joins or not self._rows) and self._may_begin():
                yield from self._admit()
            if not self._rows:
                self._stirred = self._env.event()
                yield self._stirred
                continue
            yield from self._decode()

    def _admit(self) -> Steps:
        """Take waiting calls as rows, as many as there is room for, and read their prompts."""
        prompts = 0.0
        while self._waiting and len(self._rows) < self._rates.rows:
            prompt, tokens, ended = self._waiting.popleft()
            prompts += prompt
            self._arrivals += 1
            heapq.heappush(self._rows, (self._clock + tokens, self._arrivals, ended))
        if seconds := prompts * self._rates.prompt_s:
            self._count(seconds)
            yield self._env.timeout(seconds)

    def _decode(self) -> Steps:
        """Until the next row ends, or a call comes that may join."""
        pace = self._rates.step_s + len(self._rows) * self._rates.row_s
        began, next_end = self._env.now, self._rows[0][0]
        ended = self._env.timeout((next_end - self._clock) * pace)
        if self._rates.joins and len(self._rows) < self._rates.rows:
            self._stirred = self._env.event()
            yield ended | self._stirred
        else:
            yield ended
        self._count(self._env.now - began)
        self._clock = next_end if ended.processed else self._clock + (self._env.now - began) / pace
        while self._rows and self._rows[0][0] <= self._clock:
            heapq.heappop(self._rows)[2].succeed()

    def _count(self, seconds: float) -> None:
        self.busy += seconds
        self.row_seconds += seconds * len(self._rows)


def _waits_for(event: "simpy.Event") -> Steps:
    """A process that waits for one event."""
    yield event
