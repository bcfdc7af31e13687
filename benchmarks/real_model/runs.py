"""A small run on a real model, killed once and continued, on each engine and in each precision."""

import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import dspy

from benchmarks.durability.moments import Moment
from benchmarks.durability.outcome import newest, outcome
from benchmarks.durability.small_run import Subject
from benchmarks.durability.trials import Comparison, Killer
from dspy_fst import FSTOptimizer, PolicyLM
from dspy_fst.outcomes.outcome import OutcomeCounts
from dspy_fst.run.directory import read_events
from programs import smollm2
from programs.smollm2 import moods

Precision = Literal["float32", "bfloat16"]
Engine = Literal["in_process", "vllm"]
MAX_TOKENS = 24
"""A reply of the right form takes about 11."""
RECIPE: dict[str, Any] = {
    "cycles": 1,
    "steps_per_cycle": 2,
    "problems_per_step": 2,
    "population_size": 2,
    "group_size": 4,
    "anchors": 2,
    "search_rollouts": 4,
    "reflection_minibatch": 2,
    "learning_rate": 5e-6,
    "warmup_steps": 1,
    "kl_coefficient": 0.0,
    "micro_batch_tokens": 1024,
    "num_threads": 8,
    "parse_trial": 0,
    "keep_states": 1,
    "keep_weights": 1,
    "progress": False,
}
"""As little as still has a search, two updates and groups of several candidates. The reference of a KL would take half
a gigabyte more and a third more time; an update takes about 2.3 GiB at this ``micro_batch_tokens``."""
OPTIONS: dict[str, dict[str, Any]] = {
    "in_process": {"max_batch_tokens": 8192, "linger_s": 60.0},  # cut by a clock, batches would round otherwise
    "vllm": {"max_model_len": 1024, "cpu_kv_cache_gib": 1},
}
PLACES = ("search rollout", "reflection", "step rollout", "update", "load")
"""Where a run may be killed, as `benchmarks.durability` names them."""


def compile_moods(
    run_dir: Path,
    *,
    engine: Engine = "in_process",
    precision: Precision = "float32",
    options: dict[str, Any] | None = None,
    propose: Callable[..., dict[str, str]] = moods.hint,
    **settings: Any,
) -> dspy.Module:
    """The run: JSONAdapter, two demos, trainer and engine in one precision.

    Args:
        options: More of the engine's options.
        settings: More of the recipe's.
    """
    task = moods.build(demos=2)
    engine_options = {**OPTIONS[engine], "dtype": precision, **(options or {})}
    policy = PolicyLM(smollm2.folder(), engine=engine, max_tokens=MAX_TOKENS, engine_options=engine_options)
    task.program.set_lm(policy)
    recipe = {**RECIPE, "precision": precision, **settings}
    optimizer = FSTOptimizer(metric=task.metric, propose=propose, run_dir=run_dir, **recipe)
    with dspy.context(adapter=dspy.JSONAdapter()):
        return optimizer.compile(task.program, trainset=task.trainset, valset=task.valset[:2])


MOODS_RUN = Subject(compile_moods, moods.hint)


@dataclass(frozen=True)
class Survived:
    """One run that was killed and continued."""

    engine: str
    precision: str
    died: str
    """E.g. ``"before update 2"``."""
    resumed_from: str
    rewards: list[float]
    """Mean of each step."""
    parsed: list[float]
    """Share of each step's rollouts that ended in a reply which parses."""
    mean_log_ratio: list[float]
    """Of each update: trainer's minus sampler's log-probability of a sampled token, in nats."""
    effective_share: list[float]
    """Of each update: the effective sample share, 1 where both sides sample alike."""
    gaps: list[str]
    """What its events lack or tell twice."""
    unequal: list[str] | None
    """Parts that differ from an undisturbed run's; None where none was made."""


def draw_moment(counts: Mapping[str, int], rng: random.Random) -> Moment:
    """A seeded passage of one of PLACES, before or after it."""
    place = rng.choice([place for place in PLACES if counts.get(place)])
    return Moment(place, rng.randint(1, counts[place]), rng.choice(("before", "after")))


def gaps(run_dir: Path, recipe: Mapping[str, Any] = RECIPE) -> list[str]:
    """What a finished run's events lack or tell twice, and whether its newest state is the last one."""
    events = read_events(run_dir)
    plans = sum(event["event"] == "plan" for event in events)
    steps = [event["report"]["step"] for event in events if event["event"] == "step"]
    cycles = [event["report"]["cycle"] for event in events if event["event"] == "cycle"]
    wanted = recipe["cycles"] * recipe["steps_per_cycle"]
    found = [] if plans == 1 else [f"{plans} plans"]
    found += [] if steps == list(range(wanted)) else [f"steps {steps}"]
    found += [] if cycles == list(range(recipe["cycles"])) else [f"cycles {cycles}"]
    state = newest(run_dir)["fields"]["step"]
    return found if state == wanted else [*found, f"the newest state is of step {state}"]


def survived(killer: Killer, precision: Precision, moment: Moment, whole: Comparison | None = None) -> Survived:
    """Kill a run at the moment, continue it, say what is left of it, and remove it.

    Args:
        whole: What it should equal bit by bit.
    """
    killed = killer.killed(f"{killer.engine}-{precision}", moment)
    reports = step_reports(killed.run_dir)
    rollouts = RECIPE["problems_per_step"] * RECIPE["group_size"]
    result = Survived(
        engine=killer.engine,
        precision=precision,
        died=killed.deaths[0],
        resumed_from=killed.resumed_from[0],
        rewards=[report["reward"] for report in reports],
        parsed=[1 - OutcomeCounts.of(report["counts"]).failed["parse"] / rollouts for report in reports],
        mean_log_ratio=[report["update"]["mean_log_ratio"] for report in reports],
        effective_share=[report["update"]["effective_sample_share"] for report in reports],
        gaps=gaps(killed.run_dir),
        unequal=None if whole is None else whole.differing(outcome(killed.run_dir)),
    )
    shutil.rmtree(killed.run_dir)
    return result


def step_reports(run_dir: Path) -> list[dict[str, Any]]:
    """The report of each step, as the events hold it."""
    return [event["report"] for event in read_events(run_dir) if event["event"] == "step"]
