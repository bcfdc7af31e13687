"""Whether the simulation of `dspy-fst plan` foretells the time of runs here, and the table of its guide.

    python -m benchmarks.sizing --repeats 3 && make pages     # a quiet machine, some minutes; the laboratory in process
    python -m benchmarks.sizing --guide && make pages         # two minutes of arithmetic

One run of the laboratory is measured and gives the rates, as `dspy-fst plan --like RUN_DIR` reads them. Three runs of
other shapes are foretold with these rates, before they are made: nothing is fitted to a run that is foretold. The time
is that from a run's plan to its end. The rates' run and the three come in turns, so that a slower minute of the machine
is in both; each repeat is foretold by the rates of its own turn.

What a foretold run takes from the run of the rates, beside its rates: lengths of replies, shares of proposals that are
accepted and of groups with different rewards. They change with a run's shape and with what it learns, and are part of
the gap.

With ``--clock processor`` every clock that a run reads is this process's processor time, so what else runs here counts
little. With one thread that is near the wall's time on a machine of its own, without waits for the disk.
"""

import argparse
import ast
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.readme import table
from dspy_fst import FSTOptimizer, PolicyLM
from dspy_fst.config import FSTConfig
from dspy_fst.errors import ConfigurationError
from dspy_fst.formatting.numbers import duration, format_bytes
from dspy_fst.memory import Workload, find_size
from dspy_fst.policy_lm import policy_of
from dspy_fst.run.files import read_json, write_json
from dspy_fst.sizing import (
    CARDS,
    Asked,
    Forecast,
    Lengths,
    Texts,
    best_forecast,
    card_named,
    forecast,
    machine,
    measured_run,
)
from programs.lab import BASE, FeedbackProposer, build

RESULT, GUIDE_RESULT = (Path(__file__).parent / "results" / f"{name}.json" for name in ("sizing", "sizing_guide"))
TOLERANCE = 0.2
VALSET = 20
COMMON: dict[str, Any] = {"learning_rate": 5e-4, "validate_every": "cycle", "parse_trial": 0}
RATES: dict[str, Any] = {"cycles": 2, "steps_per_cycle": 4, "anchors": 32, "search_rollouts": 160}
"""The run that is measured: the recipe's K, G and problems of a step."""
FORETOLD: dict[str, dict[str, Any]] = {
    "twice the batch, a smaller search": {
        "cycles": 2,
        "steps_per_cycle": 3,
        "problems_per_step": 64,
        "anchors": 16,
        "search_rollouts": 64,
    },
    "K=2, G=4, 16 in flight": {
        "cycles": 2,
        "steps_per_cycle": 6,
        "population_size": 2,
        "group_size": 4,
        "anchors": 32,
        "search_rollouts": 160,
        "num_threads": 16,
    },
    "mostly search, minibatches of 8": {
        "cycles": 2,
        "steps_per_cycle": 1,
        "problems_per_step": 48,
        "anchors": 48,
        "search_rollouts": 480,
        "reflection_minibatch": 8,
        "group_size": 16,
    },
}
"""Runs of other shapes."""


def run(recipe: Mapping[str, Any], seed: int, run_dir: Path) -> None:
    """One run of the laboratory, in process."""
    lab = build("reverse_drop", seed=seed)
    lab.program.set_lm(PolicyLM(BASE, engine="in_process", max_tokens=16))
    settings = {**COMMON, **recipe, "seed": seed}
    optimizer = FSTOptimizer(metric=lab.metric, propose=FeedbackProposer(seed=seed), run_dir=run_dir, **settings)
    policy_of(optimizer.compile(lab.program, trainset=lab.trainset, valset=lab.valset[:VALSET])).release()


@contextmanager
def clock(name: str) -> Iterator[None]:
    """A block whose runs read this clock, ``"wall"`` or ``"processor"``, in their events and for their activities."""
    if name == "wall":
        yield
        return
    with mock.patch("time.time", time.process_time), mock.patch("time.monotonic", time.process_time):
        yield


def turn(seed: int, folder: Path) -> dict[str, Any]:
    """The run of the rates, then the three others, each foretold before it is made."""
    run(RATES, seed, folder / "rates")
    like = measured_run(folder / "rates")
    own = forecast(Asked(like.config, like.texts, None, VALSET), like.rates)
    turn: dict[str, Any] = {"rates": {"foretold": own.run_s, "measured": like.seconds, "activities": activities(own)}}
    for place, (name, recipe) in enumerate(FORETOLD.items()):
        told = forecast(Asked(FSTConfig(**{**COMMON, **recipe}), like.texts, None, VALSET), like.rates)
        run(recipe, seed, folder / str(place))
        made = measured_run(folder / str(place))
        turn[name] = {
            "foretold": told.run_s,
            "measured": made.seconds,
            "activities": activities(told),
            "measured activities": measured_activities(made),
        }
        print(f"{name}: foretold {told.run_s:.1f} s, measured {made.seconds:.1f} s", flush=True)
    return {
        "runs": turn,
        "texts": vars(like.texts) | {"replies": like.texts.replies.deciles},
        "rates": rates_told(like),
    }


def activities(told: Forecast) -> dict[str, float]:
    """Seconds of one simulated cycle."""
    return {name: round(seconds, 3) for name, seconds in told.cycle.seconds.items()}


def measured_activities(made: Any) -> dict[str, float]:
    """Seconds of the whole run by what its events tell."""
    steps = [report for report, _ in made.steps]
    seconds = {
        name: sum(report["seconds"].get(name, 0.0) for report in steps) for name in ("sampling", "update", "publish")
    }
    searches = sum(report["seconds"] for report, _ in made.searches)
    return {**seconds, "search": searches, "validation": sum(report["seconds"] for report, _ in made.validations)}


def rates_told(like: Any) -> dict[str, float]:
    """Milliseconds."""
    rates = like.rates
    return {
        "a decoding step": 1e3 * rates.engine.step_s,
        "each row of it": 1e3 * rates.engine.row_s,
        "a reflection": 1e3 * rates.reflection_s,
        "an update": 1e3 * rates.update_s,
        "each token of it": 1e3 * rates.update_token_s,
        "a publish": 1e3 * rates.publish_s,
        "the rest of a step": 1e3 * rates.rest_s,
    }


def foretold() -> str:
    """Markdown: each foretold run, its ratios of foretold over measured time, and their spread."""
    rows = []
    for clock_of, turns in read_json(RESULT).items():
        rows += [[clock_of, *row] for row in _foretold(turns)]
    return table(["clock", "run", "foretold", "measured", "foretold / measured", "spread"], rows)


def _foretold(turns: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    rows = []
    for name in turns[0]["runs"]:
        pairs = [(turn["runs"][name]["foretold"], turn["runs"][name]["measured"]) for turn in turns]
        ratios = [foretold / measured for foretold, measured in pairs]
        shown = (f"{statistics.median(column):.1f} s" for column in zip(*pairs, strict=True))
        label = "the run of the rates itself" if name == "rates" else name
        rows.append([label, *shown, f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}"])
    return rows


# ---- the guide's table -----------------------------------------------------------------------------


def cards() -> str:
    """Markdown: what is known of each card."""
    head = ["card", "memory", "bandwidth", "dense bfloat16", "link, one way", "source"]
    rows = [
        [
            card.name,
            format_bytes(card.memory),
            f"{card.bandwidth / 1e9:,.0f} GB/s",
            f"{card.flops / 1e12:,.0f} TFLOP/s",
            f"{card.link / 1e9:,.0f} GB/s",
            card.source,
        ]
        for card in CARDS.values()
    ]
    return table(head, rows)


def shares() -> str:
    """Markdown: the constants of `dspy_fst.sizing.machine` with what their comments say."""
    tree = ast.parse(Path(machine.__file__).read_text(encoding="utf-8"))
    rows = []
    for place, node in enumerate(tree.body):
        names = [*_names(node)]
        said = tree.body[place + 1] if place + 1 < len(tree.body) else None
        if names and names[0] != "CARDS" and isinstance(said, ast.Expr) and isinstance(said.value, ast.Constant):
            words = " ".join(str(said.value.value).replace("``", "`").split())
            rows.append([", ".join(names), " and ".join(f"{getattr(machine, name):g}" for name in names), words])
    return table(["name", "value", "what, and where from"], rows)


def _names(node: ast.stmt) -> Iterator[str]:
    """Constants that a statement of a module sets."""
    for target in node.targets if isinstance(node, ast.Assign) else ():
        yield from (name.id for name in ast.walk(target) if isinstance(name, ast.Name))


MACHINES = (
    ("rtx4090", 1),
    ("rtx4090", 2),
    ("h100", 1),
    ("h100", 2),
    ("h100", 8),
    ("h100", 32),
    ("h100", 128),
    ("h100", 512),
)
"""From one card of 24 GiB to 64 machines of eight."""
GUIDE = {
    "Qwen/Qwen3-0.6B": {},
    "Qwen/Qwen3-8B": {},
    "Qwen/Qwen3-8B, wide": {"problems_per_step": 128, "num_threads": 1024, "proposals_at_once": 8},
}
"""Model -> settings beside the recipe's defaults. Wide: 1,024 rollouts of a step, all in flight."""
GUIDE_TEXTS = Texts(Lengths.around(512), 512)


def guide() -> str:
    """Markdown: machines against models and recipes, as `--guide` computed them last."""
    head = ["model", "machine", "used", "trainer + engines", "trainer card", "engine card", "publish"]
    head += ["rollouts/s", "search", "a step's rollouts", "update", "publish and check", "a cycle", "saturates first"]
    return table(head, [row for rows in read_json(GUIDE_RESULT).values() for row in rows])


def guide_row(name: str, card: str, cards: int) -> list[str]:
    """A row of the guide: the model and recipe of this name on so many cards."""
    model = name.partition(",")[0]
    asked = Asked(FSTConfig.model_validate(GUIDE[name]), GUIDE_TEXTS)
    cells = _cells(asked, Workload(model, find_size(model), "vllm"), card, cards)
    return [name.partition("/")[2], f"{cards} x {card}", *cells]


def _cells(asked: Asked, workload: Workload, card: str, cards: int) -> list[str]:
    try:
        found = best_forecast(asked, workload, card_named(card), cards)
    except ConfigurationError:
        return ["does not fit", *[""] * 11]
    layout, seconds, steps = found.layout, found.cycle.seconds, asked.config.steps_per_cycle
    assert layout is not None
    assert found.published is not None
    engines = "shared" if layout.shared else f"{layout.trainers} + {layout.engines} x {layout.group}"
    sync = seconds.get("publish", 0.0) + seconds.get("verification", 0.0) + seconds.get("waiting for the state", 0.0)
    return [
        str(layout.cards),
        engines,
        format_bytes(layout.trainer.held + layout.trainer.peak),
        format_bytes(layout.served),
        format_bytes(found.published),
        f"{found.cycle.rollouts_per_s:.1f}",
        duration(seconds.get("search", 0.0) + seconds.get("reflections", 0.0)),
        duration(seconds.get("rollouts", 0.0) / steps),
        duration(seconds.get("update", 0.0) / steps, 1),
        duration(sync / steps, 1),
        duration(found.cycle.total),
        found.bottleneck.partition(":")[0],
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="turns, each with a seed of its own")
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall")
    parser.add_argument("--guide", action="store_true", help="compute the guide's table alone")
    options = parser.parse_args(arguments)
    if options.guide:
        rows = {name: [guide_row(name, *place) for place in MACHINES] for name in GUIDE}
        write_json(GUIDE_RESULT, rows)
        print(guide())
        return
    results = read_json(RESULT) if RESULT.is_file() else {}
    results[options.clock] = []
    for seed in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder, clock(options.clock):
            made = turn(seed, Path(folder))
        results[options.clock].append(made)
        write_json(RESULT, results)
    print(foretold())


if __name__ == "__main__":
    main()
