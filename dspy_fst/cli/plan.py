"""`dspy-fst plan`: cards, time and bottleneck of a recipe on a machine that need not be there. Nothing is started."""

import json
import sys
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypedDict

import typer

from dspy_fst.cli.common import Debug, Json, errors_as_text
from dspy_fst.cli.printer import Printer
from dspy_fst.errors import ConfigurationError
from dspy_fst.formatting.numbers import counted, duration, format_bytes
from dspy_fst.model_files.hub import unknown_fault

if TYPE_CHECKING:
    from dspy_fst.config import FSTConfig
    from dspy_fst.sizing import Asked, CardSheet, Forecast, MeasuredRun, Texts

PROMPT, REPLY = 512, 256
"""Tokens of a call where neither an option nor a run tells (assumed; `dspy_fst.memory` assumes replies as long)."""
ARITHMETIC = (
    "arithmetic, not a promise: peaks of the card's data sheet times shares of them, of which only the update's was "
    "measured (docs/sizing.md); prompts, replies and shares of groups are {texts}"
)
MEASURED = "simulated with the rates of {run}, on the machine that it ran on; nothing says that another is as fast"


class PlanOutcome(TypedDict):
    """Everything that ``plan`` reports; with ``--json`` these are the keys."""

    model: str
    card: str | None
    cards: int
    cards_used: int | None
    """None where the machine is that of a measured run."""
    layout: dict[str, object] | None
    settings: dict[str, dict[str, object]] | None
    """Sections of the project file that put a run on the layout."""
    command: str | None
    """Starts it."""
    cycle_s: dict[str, float]
    """Activity -> seconds of one cycle."""
    run_s: float
    bottleneck: str
    rollouts_per_s: float
    """While rollouts are made."""
    rows_per_engine: float
    published: int | None
    """Bytes of a publish."""
    rates: dict[str, object]
    texts: dict[str, object]
    source: str


def plan(
    file: Annotated[Path | None, typer.Argument(metavar="FILE", help="The project: a YAML file.")] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Without a project: a folder with a config.json, or a hub's model."),
    ] = None,
    card: Annotated[
        str | None, typer.Option("--card", metavar="NAME", help="Which card, e.g. h100; another name lists the known.")
    ] = None,
    cards: Annotated[int, typer.Option(min=1, metavar="N", help="How many such cards there are.")] = 1,
    like: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN_DIR",
            help="Take the replies' lengths and shares of this run; without --card also its machine's rates.",
        ),
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, metavar="N", help=f"Tokens of a prompt, on average; {PROMPT} if nothing tells.")
    ] = None,
    reply_tokens: Annotated[
        int | None, typer.Option(min=1, metavar="N", help=f"Tokens of a reply, on average; {REPLY} if nothing tells.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the lengths that are drawn.")] = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Cards, time and bottleneck of a recipe.

    Simulates one cycle of each kind. The recipe is the project's, else that of the run in --like, else the default one.
    Needs the extra sizing.
    """
    if card is None and like is None:
        raise typer.BadParameter("name a machine: --card h100 --cards 8, or a run of its own: --like RUN_DIR")
    if card is None and cards > 1:
        raise typer.BadParameter(
            "--like alone tells of the run's own machine; name the card, too: --card h100 --cards 8"
        )
    with errors_as_text(debug):
        outcome = _outcome(file, model, card, cards, like, (prompt_tokens, reply_tokens), seed)
        typer.echo(json.dumps(outcome)) if as_json else _show(outcome)


def _outcome(
    file: Path | None,
    model: str | None,
    card: str | None,
    cards: int,
    like: Path | None,
    told: tuple[int | None, int | None],
    seed: int,
) -> PlanOutcome:
    from dspy_fst.sizing import Asked, card_named, command_for, measured_run, sections_for
    from dspy_fst.sizing.simulate import require_simpy

    require_simpy()
    sheet = None if card is None else card_named(card)
    run = None if like is None else measured_run(like)
    given = _given(file, model, run)
    asked = Asked(given.config, _texts(run, *told), given.trainset, given.valset, seed)
    made = _forecast(asked, given, sheet, cards, run)
    layout = made.layout if sheet else None
    texts = f"those of {like}" if run else "assumed"
    return {
        "model": given.model,
        "card": sheet.name if sheet else None,
        "cards": cards,
        "cards_used": layout.cards if layout else None,
        "layout": asdict(layout) if layout else None,
        "settings": sections_for(layout, sheet) if layout and sheet else None,
        "command": command_for(layout, str(file or "project.yaml")) if layout else None,
        "cycle_s": dict(made.cycle.seconds),
        "run_s": made.run_s,
        "bottleneck": made.bottleneck,
        "rollouts_per_s": made.cycle.rollouts_per_s,
        "rows_per_engine": made.cycle.rows,
        "published": made.published,
        "rates": asdict(made.rates),
        "texts": asdict(asked.texts),
        "source": ARITHMETIC.format(texts=texts) if sheet else MEASURED.format(run=like),
    }


@dataclass(frozen=True)
class RunToCome:
    """What the project, the run or the options say of the run to come."""

    model: str
    config: "FSTConfig"
    trainset: int | None = None
    valset: int = 0
    adapters: int = 1


def _given(file: Path | None, model: str | None, run: "MeasuredRun | None") -> RunToCome:
    """The project's recipe, else the measured run's, else the defaults.

    Raises:
        ConfigurationError: the project has faults; or nothing names a model.
    """
    from dspy_fst.config import FSTConfig

    if file is not None:
        return _of_project(file)
    if run is not None:
        return RunToCome(model or run.model, run.config, None, run.valset)
    if model is None:
        raise ConfigurationError(["name a project FILE, --model MODEL or --like RUN_DIR: what is trained is not known"])
    if fault := unknown_fault(model):
        raise ConfigurationError([fault])
    return RunToCome(model, FSTConfig())


def _of_project(file: Path) -> RunToCome:
    from dspy_fst.preflight.program_checks import policies_of
    from dspy_fst.project.project_file import load_project
    from dspy_fst.training.request import adapter_count, recipe_of

    with redirect_stdout(sys.stderr):
        opened = load_project(file).open()
    config, faults = recipe_of(opened.optimizer.recipe)
    if config is None:
        raise ConfigurationError(faults)
    (policy, *_) = policies_of(opened.program).values()
    sizes = len(opened.trainset), len(opened.valset or ())
    return RunToCome(str(policy.checkpoint.folder), config, *sizes, adapter_count(config, opened.program))


def _texts(run: "MeasuredRun | None", prompt: int | None, reply: int | None) -> "Texts":
    """The run's texts, or assumed ones; the options come first."""
    from dspy_fst.sizing import Lengths, Texts

    texts = run.texts if run else Texts(Lengths.around(REPLY), PROMPT)
    texts = replace(texts, prompt=float(prompt)) if prompt else texts
    return replace(texts, replies=Lengths.around(reply)) if reply else texts


def _forecast(
    asked: "Asked", given: RunToCome, card: "CardSheet | None", cards: int, run: "MeasuredRun | None"
) -> "Forecast":
    from dspy_fst.memory import Workload, find_size
    from dspy_fst.sizing import best_forecast, forecast

    if card is None:
        assert run is not None, "plan() refuses a call without both"
        return forecast(asked, run.rates)
    workload = Workload(given.model, find_size(given.model), "vllm", adapters=given.adapters)
    return best_forecast(asked, workload, card, cards)


def _show(outcome: PlanOutcome) -> None:
    out = Printer()
    machine = f"{outcome['cards']} x {outcome['card']}" if outcome["card"] else "the run's own machine"
    out.heading(f"{outcome['model']} on {machine}")
    _show_layout(out, outcome)
    total = sum(outcome["cycle_s"].values())
    out.heading("One cycle")
    rows = [(what, duration(s, 1), f"{s / total:.0%}") for what, s in outcome["cycle_s"].items()]
    out.table(("activity", "time", "share"), [*rows, ("together", duration(total, 1), "")])
    out.line(
        f"{outcome['rollouts_per_s']:.3g} rollouts a second while they are made, {outcome['rows_per_engine']:.3g} in "
        "flight on an engine on average"
    )
    out.heading(f"The whole run: {duration(outcome['run_s'])}")
    out.line(f"bottleneck: {outcome['bottleneck']}")
    _show_how_to_run(out, outcome)
    out.line(outcome["source"])


def _show_layout(out: Printer, outcome: PlanOutcome) -> None:
    layout = outcome["layout"]
    if layout is None:
        return
    trainer, cache, served = layout["trainer"], layout["cache"], layout["served"]
    assert isinstance(trainer, dict)
    assert isinstance(cache, int)
    assert isinstance(served, int)
    whose = "the same card" if layout["shared"] else f"{layout['engines']} of {layout['group']}"
    out.table(
        ("part", "cards", "held on each", "more at its peak"),
        [
            ("trainer", str(layout["trainers"]), format_bytes(trainer["held"]), format_bytes(trainer["peak"])),
            ("engines", whose, format_bytes(served), f"{format_bytes(cache)} of keys and values"),
        ],
    )
    if idle := outcome["cards"] - (outcome["cards_used"] or 0):
        out.line(f"left over: {counted(idle, 'card')}; no layout with more cards was quicker")
    if outcome["published"] is not None:
        out.line(f"each publish writes {format_bytes(outcome['published'])}, and every machine with engines reads it")


def _show_how_to_run(out: Printer, outcome: PlanOutcome) -> None:
    if outcome["command"] is None or outcome["settings"] is None:
        return
    out.heading("To run it so, in the project file")
    for name, values in outcome["settings"].items():
        out.line(f"{name}: {json.dumps(values)}")
    if "ray" in outcome["settings"].get("recipe", {}):
        out.line("start Ray on each machine, and on this one without its first card (docs/ray.md)")
    out.line(f"and: {outcome['command']}")
