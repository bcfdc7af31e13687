"""From a recipe, its texts and a machine to a forecast: the layout that takes the least time, and what takes it."""

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property

from dspy_fst.config import FSTConfig
from dspy_fst.errors import ConfigurationError
from dspy_fst.memory import Workload
from dspy_fst.sizing.from_card import published_bytes, rates_of_card
from dspy_fst.sizing.layout import Layout, layouts
from dspy_fst.sizing.machine import CardSheet
from dspy_fst.sizing.rates import MachineRates
from dspy_fst.sizing.simulate import Timeline, simulate
from dspy_fst.sizing.workload import Act, Acts, Learn, Play, Reflect, Texts
from dspy_fst.training.plan import Cycle

CROWDED = (
    "{model}: a text of {length:,.0f} tokens (prompt and reply) has no room for its keys and values on any layout of "
    "{cards} x {card}; give more --cards, a larger --card, or lower --prompt-tokens and --reply-tokens"
)


@dataclass(frozen=True)
class Asked:
    """What a run is to do."""

    config: FSTConfig
    texts: Texts
    trainset: int | None = None
    """Problems; None: as many as a cycle asks for."""
    valset: int = 0
    seed: int = 0
    """Of the lengths that are drawn."""

    @cached_property
    def script(self) -> "Script":
        """The acts, drawn once, so that every machine is asked for the same."""
        acts = Acts(self.config, self.texts, self.trainset, self.valset, self.seed)
        counts = Counter(_kind(cycle) for cycle in acts.plan.cycles)
        first = {_kind(cycle): cycle for cycle in reversed(acts.plan.cycles)}
        kinds = [(tuple(acts.cycle(first[kind])), count) for kind, count in counts.items()]
        shown = max(range(len(kinds)), key=lambda i: (_is_whole(kinds[i][0]), kinds[i][1]))
        return Script((*acts.start(), *acts.end()), tuple(kinds), shown, acts.update_tokens)


def _kind(cycle: Cycle) -> tuple[int, bool, int]:
    """Equal for cycles that ask for the same, but for the lengths that are drawn."""
    return cycle.search_budget, cycle.index > 0, len(cycle.steps)


def _is_whole(acts: tuple[Act, ...]) -> bool:
    return any(isinstance(act, Reflect) for act in acts) and any(isinstance(act, Learn) for act in acts)


@dataclass(frozen=True)
class Script:
    """All acts of a run; of cycles of one kind, the first stands for all."""

    outside: tuple[Act, ...]
    """Validations before the first cycle and after the last."""
    kinds: tuple[tuple[tuple[Act, ...], int], ...]
    """(acts of a cycle, how many cycles)."""
    shown: int
    """The kind that a forecast tells of: a search with updates, where there is one."""
    update_tokens: float

    def seconds_at_least(self, rates: MachineRates, in_flight: int) -> float:
        """A lower bound of what a simulation tells."""
        of_kinds = sum(count * sum(_at_least(act, rates, in_flight) for act in acts) for acts, count in self.kinds)
        return of_kinds + sum(_at_least(act, rates, in_flight) for act in self.outside)


@dataclass(frozen=True)
class Forecast:
    """A run on a machine, simulated."""

    cycle: Timeline
    """One cycle of the kind that `Script.shown` names."""
    run_s: float
    """Seconds of the whole run, from its plan on: the start of processes comes before."""
    rates: MachineRates
    layout: Layout | None = None
    """None for the machine of a run that was measured."""
    published: int | None = None
    """Bytes of a publish."""

    @property
    def bottleneck(self) -> str:
        return self.cycle.bottleneck(self.rates.engine)


def forecast(asked: Asked, rates: MachineRates) -> Forecast:
    """Simulate each kind of cycle once.

    Raises:
        ConfigurationError: simpy is not installed.
    """
    script, in_flight = asked.script, asked.config.num_threads
    lines = [simulate(acts, rates, in_flight) for acts, _ in script.kinds]
    cycles_s = sum(line.total * count for line, (_, count) in zip(lines, script.kinds, strict=True))
    return Forecast(lines[script.shown], cycles_s + simulate(script.outside, rates, in_flight).total, rates)


def best_forecast(asked: Asked, workload: Workload, card: CardSheet, cards: int) -> Forecast:
    """The layout on at most so many cards whose run takes the least time.

    More cards are never slower: the layouts of fewer cards are among those of more. Layouts are simulated in the order
    of a lower bound of their time, until no other can be quicker.

    Raises:
        ConfigurationError: none has room, or for no text's keys and values; or simpy is not installed.
    """
    config, tokens, bounds = asked.config, asked.script.update_tokens, []
    for layout in layouts(workload, config, card, cards):
        rates = rates_of_card(card, layout, workload, config, asked.texts, tokens)
        if rates.engine.rows:
            bounds.append((asked.script.seconds_at_least(rates, config.num_threads), layout.cards, layout, rates))
    if not bounds:
        length = asked.texts.prompt + asked.texts.replies.mean
        raise ConfigurationError([CROWDED.format(model=workload.model, cards=cards, card=card.name, length=length)])
    best: Forecast | None = None
    for bound, _, layout, rates in sorted(bounds, key=lambda entry: entry[:2]):
        if best is not None and bound >= best.run_s:
            break
        found = replace(forecast(asked, rates), layout=layout)
        if best is None or found.run_s < best.run_s:
            best = found
    assert best is not None, "there are bounds"
    return replace(best, published=published_bytes(workload, config))


def _at_least(act: Act, rates: MachineRates, in_flight: int) -> float:
    """Seconds of an act, by a bound that no simulation falls below: throughput is concave in the rows, so no share of
    the rollouts among the engines samples faster than even ones."""
    match act:
        case Reflect():
            return rates.reflection_s
        case Learn():
            once = rates.update_s + rates.publish_s + rates.verify_s + rates.rest_s
            return once + act.tokens * rates.update_token_s
        case Play():
            engine, calls = rates.engine, sum(map(len, act.rollouts))
            longest = max(act.totals, default=0.0) * (engine.step_s + engine.row_s)
            rows = min(engine.rows, min(in_flight, len(act.rollouts)) / rates.engines)
            decoding = sum(act.totals) / engine.tokens_per_s(rows) if act.rollouts else 0.0
            even = (decoding + calls * act.prompt * engine.prompt_s) / rates.engines
            return rates.play_s + max(longest, even, calls * rates.program_s)
