"""A discrete-event simulation (simpy) of a run's acts on a machine: who waits for whom, and what takes the time.

Needs the extra ``sizing``. Nothing is drawn here: the acts hold all lengths, so equal acts and rates give equal times.
"""

import heapq
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
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
REMEMBERED = 10_000
"""Sets of rollouts whose times are remembered: some for each number of engines, and for each kind of them (ours)."""
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
    run = _Run(rates, in_flight)
    for act in acts:
        run.do(act)
    return run.timeline()


def require_simpy() -> None:
    """
    Raises:
        ConfigurationError: simpy is not installed.
    """
    if find_spec("simpy") is None:
        raise ConfigurationError([MISSING])


@dataclass(frozen=True)
class _Played:
    """What one set of rollouts took; seconds, summed over engines where there are several."""

    seconds: float
    """From its first call to its last reply."""
    tokens: float
    busy: float
    """In which an engine samples."""
    row_seconds: float
    """The same for each row."""
    program_busy: float


@lru_cache(maxsize=REMEMBERED)
def _played(play: Play, engine: EngineRates, engines: int, program_s: float, in_flight: int) -> _Played:
    """Nothing else of a machine counts, so layouts that differ in their trainer alone share it."""
    import simpy

    rollouts = _Rollouts(simpy.Environment(), play, engine, engines, program_s, in_flight)
    return rollouts.played()


class _Run:
    """The loop: one act after the other."""

    def __init__(self, rates: MachineRates, in_flight: int):
        self.rates, self.in_flight = rates, in_flight
        self.seconds: Counter[str] = Counter()
        self.plays: list[_Played] = []
        self.rollouts = 0
        self.unwritten_s = 0.0
        """Seconds until the state is written that an update has left."""

    def do(self, act: Act) -> None:
        match act:
            case Play():
                self._play(act)
            case Reflect():
                self._take(REFLECTIONS, self.rates.reflection_s)
            case Learn():
                self._learn(act)

    def _take(self, activity: str, seconds: float) -> None:
        self.seconds[activity] += seconds  # type: ignore[assignment]
        self.unwritten_s = max(0.0, self.unwritten_s - seconds)

    def _play(self, play: Play) -> None:
        rates = self.rates
        self.rollouts += len(play.rollouts)
        self.plays.append(_played(play, rates.engine, rates.engines, rates.program_s, self.in_flight))
        self._take(play.phase, rates.play_s + self.plays[-1].seconds)

    def _learn(self, act: Learn) -> None:
        rates = self.rates
        self._take(STATE, self.unwritten_s)
        self._take(UPDATE, rates.update_s + act.tokens * rates.update_token_s)
        self._take(PUBLISH, rates.publish_s)
        self._take(VERIFICATION, rates.verify_s)
        self._take(REST, rates.rest_s)
        self.unwritten_s = rates.state_s if act.state else 0.0

    def timeline(self) -> Timeline:
        sampled = sum(self.seconds[activity] for activity in SAMPLED)
        busy = sum(play.busy for play in self.plays)
        return Timeline(
            {activity: seconds for activity, seconds in self.seconds.items() if seconds},
            self.rollouts,
            sum(play.tokens for play in self.plays),
            rows=sum(play.row_seconds for play in self.plays) / busy if busy else 0.0,
            engine_share=busy / self.rates.engines / sampled if sampled else 0.0,
            program_share=sum(play.program_busy for play in self.plays) / sampled if sampled else 0.0,
        )


class _Rollouts:
    """One set of rollouts: threads that call the engines, each for one rollout after the other."""

    def __init__(
        self,
        env: "simpy.Environment",
        play: Play,
        engine: EngineRates,
        engines: int,
        program_s: float,
        in_flight: int,
    ):
        self.env, self.play, self.joins, self.program_s, self.in_flight = env, play, engine.joins, program_s, in_flight
        self.loads = [0] * engines
        """Calls that each engine samples, or that wait there."""
        self.engines = [_Engine(env, engine, self._callers) for _ in range(engines)]
        self.program_free, self.program_busy = 0.0, 0.0
        self.left = len(play.rollouts)
        """Rollouts that have not ended."""
        self.tokens = 0.0

    def played(self) -> _Played:
        todo = deque(self.play.rollouts)
        threads = [self.env.process(self._thread(todo)) for _ in range(self._callers())]
        self.env.run(until=self.env.all_of(threads))
        return _Played(
            self.env.now,
            self.tokens,
            sum(engine.busy for engine in self.engines),
            sum(engine.row_seconds for engine in self.engines),
            self.program_busy,
        )

    def _thread(self, todo: deque[tuple[float, ...]]) -> Steps:
        while todo:
            for tokens in todo.popleft():
                self.tokens += tokens
                yield self.env.timeout(self._python() - self.env.now)
                place = self.loads.index(min(self.loads))
                self.loads[place] += 1
                yield self.engines[place].reply(self.play.prompt, tokens)
                self.loads[place] -= 1
            self.left -= 1
            if not self.joins:
                for engine in self.engines:
                    engine.look()  # one that waits for all callers waits for fewer now

    def _python(self) -> float:
        """The time at which the program's Python of this call has had its turn."""
        self.program_free = max(self.program_free, self.env.now) + self.program_s
        self.program_busy += self.program_s
        return self.program_free

    def _callers(self) -> int:
        return min(self.left, self.in_flight)


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
