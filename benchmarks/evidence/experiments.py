"""Which runs answer which questions. An experiment is a list of stages; a stage needs what the ones before it left."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.evidence.arms import (
    ARMS,
    DEMOS,
    FAST,
    LORA,
    LOSSES,
    MAIN,
    OPTIONS,
    RECIPE,
    SENSITIVITY,
    VARIANTS,
    WARMUPS,
    tuned_as,
)
from benchmarks.evidence.places import (
    BY_LENGTH,
    CEILING,
    HARD,
    NEAR_ZERO,
    PAIRS,
    SEQUENCE,
    TOLD,
    WEAKER,
    WORLD,
)
from benchmarks.evidence.raw import RESULTS
from benchmarks.evidence.run import INTERVAL, Run
from dspy_fst.run.files import read_json
from programs.lab import BASE

RATES = RESULTS / "tuned.json"
"""Tuned arm -> its learning rate."""
HARD_WORLDS = (NEAR_ZERO, CEILING, BY_LENGTH, HARD)
COMPARED = (*MAIN, "anchored")
"""Arms of the main comparison, on the main world."""
ELSEWHERE = ("fst", "rl", "gepa_long", "gepa_then_rl", "gepa_then_rl_faster", "front_loaded")
"""What is compared on other worlds and from another base. Searching first is there at FST's rate too: the two schedules
differ less than the two rates do. The last did best of the variants on the main world."""
UPDATES = RECIPE["cycles"] * RECIPE["steps_per_cycle"]
CARRIED = ("fst", "fst_slower", "front_loaded", "rl", "rl_slower", "gepa_then_rl", "anchored", "anchored_slower")
"""Arms whose weights go on to other tasks."""
BESIDE_LORA = ("fst", "rl", *LORA)
"""LoRA adapters, and what they are held against."""
Stages = list[list[Run]]


@dataclass(frozen=True)
class Place:
    """Where runs lie: run -> its folder, and back as the base of a run that goes on from it."""

    folder: Path

    def of(self, run: Run) -> Path:
        world = run.world.rpartition(":")[2].rpartition(".")[2].lower()
        start = "" if run.base == str(BASE) else f"-{'with' if run.carry else 'from'}-{Path(run.base).name}"
        return self.folder / f"{run.arm.replace(' ', '_')}-{world}-{run.seed}{start}"

    @property
    def weaker_base(self) -> Path:
        return self.folder / WEAKER


def planned(arm: str, world: str, seed: int, base: Path = BASE) -> Run:
    """A run at its arm's learning rate, chosen on other seeds (`benchmarks.evidence.tune`).

    The seed instruction is asked at every checkpoint where drift is reported, and elsewhere at the ends.

    Raises:
        ValueError: an arm is to be tuned and was not yet.
    """
    found: Mapping[str, Any] = read_json(RATES) or {}
    if tuned_as(arm) not in found:
        raise ValueError(f"{tuned_as(arm)} has no learning rate in {RATES}: python -m benchmarks.evidence.tune")
    changes = {} if ARMS[arm].get("method") == "gepa" else {"learning_rate": found[tuned_as(arm)]["learning_rate"]}
    drift = world == WORLD and arm in (*COMPARED, *LORA)
    return Run(arm, world, seed, str(base), changes=changes, seed_interval=INTERVAL if drift else UPDATES)


def going_on(before: Path, arm: str, world: str, seed: int, *, carry: bool = False) -> Run:
    """A run from what another left, measured at its ends."""
    return replace(planned(arm, world, seed, before), carry=carry, interval=UPDATES, seed_interval=UPDATES)


def compared(arms: Iterable[str], seeds: Iterable[int]) -> list[Run]:
    """Arms on the main world."""
    return _each(arms, (WORLD,), seeds)


def _each(arms: Iterable[str], worlds: Iterable[str], seeds: Iterable[int], base: Path = BASE) -> list[Run]:
    return [planned(arm, world, seed, base) for seed in seeds for world in worlds for arm in arms]


def main(place: Place, seeds: range) -> Stages:
    """Every arm of the main comparison on the main world."""
    return [compared(COMPARED, seeds)]


def worlds(place: Place, seeds: range) -> Stages:
    """Worlds where text, or weights, can do less."""
    return [_each(ELSEWHERE, HARD_WORLDS, seeds)]


def variants(place: Place, seeds: range) -> Stages:
    """The method's open questions, on the main world."""
    return [compared(("fst", "gepa_then_rl", *VARIANTS), seeds)]


def variants_elsewhere(place: Place, seeds: range) -> Stages:
    """The same where problems need different advice."""
    return [_each(("fst", "gepa_then_rl", *VARIANTS), (BY_LENGTH,), seeds)]


def options(place: Place, seeds: range) -> Stages:
    """Options of a step, one at a time, on the main world."""
    return [_each(("fst", *OPTIONS), (WORLD,), seeds)]


def seats(place: Place, seeds: range) -> Stages:
    """Another optimizer in GEPA's place, or another loss in CISPO's, on the main world."""
    return [compared(("fst", *FAST, *LOSSES), seeds)]


def demos(place: Place, seeds: range) -> Stages:
    """Candidates with demos beside those of an instruction alone, on the main world."""
    return [compared(("fst", *DEMOS), seeds)]


def plasticity(place: Place, seeds: range) -> Stages:
    """RL on a second task from each arm's weights, and from the base."""
    first = _each(CARRIED, {world: None for pair in PAIRS for world in pair}, seeds)
    return [first, _second_tasks(CARRIED, PAIRS, place, seeds)]


def _second_tasks(arms: Iterable[str], pairs: Iterable[tuple[str, str]], place: Place, seeds: range) -> list[Run]:
    """RL of all weights on the second task of each pair, from what the arms left on the first."""
    of = [(arm, one, two, seed) for one, two in pairs for seed in seeds for arm in arms]
    return [going_on(place.of(planned(arm, one, seed)), "rl", two, seed) for arm, one, two, seed in of]


def lora(place: Place, seeds: range) -> Stages:
    """A LoRA adapter beside all weights, on the main world; and RL on a second task from each, and from the base."""
    first = [*compared(BESIDE_LORA, seeds), *_each(("rl",), (HARD,), seeds)]
    return [first, _second_tasks(BESIDE_LORA, PAIRS[:1], place, seeds)]


def continual(place: Place, seeds: range) -> Stages:
    """Three worlds in a row, and each of them from the base."""
    stages = [_each(CARRIED, SEQUENCE, seeds)]
    before = {(arm, seed): planned(arm, SEQUENCE[0], seed) for arm in CARRIED for seed in seeds}
    for world in SEQUENCE[1:]:
        before = {
            (arm, seed): going_on(place.of(run), arm, world, seed, carry=True) for (arm, seed), run in before.items()
        }
        stages.append(list(before.values()))
    return stages


def warmup(place: Place, seeds: range) -> Stages:
    """A warm-up that is short beside a run, on the main world."""
    return [compared(("fst", "fst_slower", "rl", *WARMUPS), seeds)]


def bound(place: Place, seeds: range) -> Stages:
    """RL that is told the rule from the start, beside RL and FST that are not."""
    return [[*_each(("fst", "rl"), TOLD, seeds), *_each(("rl",), TOLD.values(), seeds)]]


def sensitivity(place: Place, seeds: range) -> Stages:
    """T, K, G, anchors and budget, one at a time."""
    return [_each(("fst", *SENSITIVITY), (WORLD,), seeds)]


def bases(place: Place, seeds: range) -> Stages:
    """The main comparison on a base that was pretrained less, from another seed."""
    return [_each(ELSEWHERE, (WORLD,), seeds, place.weaker_base)]


EXPERIMENTS: dict[str, Callable[[Place, range], Stages]] = {
    made.__name__: made
    for made in (
        main,
        worlds,
        variants,
        variants_elsewhere,
        options,
        seats,
        demos,
        plasticity,
        continual,
        warmup,
        sensitivity,
        bases,
        bound,
        lora,
    )
}
FORMS: dict[str, dict[str, int]] = {"short": {"main": 3}, "long": {**dict.fromkeys(EXPERIMENTS, 3), "main": 5}}
"""Experiments of each form, and over how many seeds each goes."""
