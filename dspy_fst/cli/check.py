"""`dspy-fst check`: is a project in order, and what will it cost? Nothing is trained, and nothing is left behind."""

import json
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypedDict

import typer

from dspy_fst.cli.check_rates import SAMPLED, Rates, measure_rates, rate_lines, rate_warnings
from dspy_fst.cli.common import Debug, Json, errors_as_text
from dspy_fst.cli.memory_tables import (
    COMPUTED,
    Card,
    Cards,
    MicroBatchSize,
    PlaceNeeds,
    described_room,
    requirements,
    show_gradient_checkpointing,
    show_micro_batch,
    show_needs,
)
from dspy_fst.cli.printer import Printer
from dspy_fst.cli.proposer_checks import nobody_proposes, proposer_warnings, unreached
from dspy_fst.errors import ConfigurationError
from dspy_fst.run.interrupts import signals_raise

if TYPE_CHECKING:
    import dspy

    from dspy_fst.config import FSTConfig
    from dspy_fst.memory import Available
    from dspy_fst.policy_lm import PolicyLM
    from dspy_fst.project.project_file import Opened, Project
    from dspy_fst.training.request import Request

TIME_DEPENDS_ON = (
    "not measured, and neither the program nor the metric was called: it depends on how fast this machine "
    "samples and updates, how long the replies are, and on the reflection LM; "
    f"--measure starts the engine, samples up to {SAMPLED + 2} rollouts, scores them, and tells a range "
    "and whether the metric goes beyond perfect_score"
)


class SettingRow(TypedDict):
    """One setting of the recipe."""

    name: str
    value: object
    set_by: str
    """``"file"``, ``"auto: light"`` or ``"default"``."""
    default: object
    default_source: str
    """Where the default comes from, e.g. ``"paper, App. D"``."""
    what: str


class Phase(TypedDict):
    """What a phase may spend at most."""

    searches: int
    updates: int
    rollouts: int
    tokens: int | None
    """Sampled tokens; None when a reply has no limit."""


class PlanFigures(TypedDict):
    """What the whole plan may spend at most."""

    phases: dict[str, Phase]
    """``"fast"``, ``"slow"`` and ``"validation"``."""
    cycles: list[dict[str, object]]
    anchors: int
    """Problems that a search scores candidates on."""
    tokens_per_rollout: int | None
    budget: dict[str, int]
    """The fields of `dspy_fst.training.plan.Budget`."""
    optimizer_steps: int
    """Of each update, at most (``updates_per_batch``)."""


class CheckOutcome(TypedDict):
    """Everything that ``check`` reports; with ``--json`` these are the keys."""

    project: dict[str, object]
    settings: list[SettingRow]
    plan: PlanFigures
    warm_start: str | None
    """What the run learns before its first search; None: nothing."""
    needs: list[PlaceNeeds] | None
    """None before anything is known of the model."""
    micro_batch_tokens: MicroBatchSize
    gradient_checkpointing: bool
    trained: str | None
    """What is trained, and whether it fits; None before anything is known of the model."""
    imagined: bool
    """Whether the memory is that of a described machine instead of this one."""
    written: str | None
    warnings: list[str]
    unreached: list[str]
    time: Rates | None


def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The project: a YAML file.")],
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Start the engine and sample and score a few rollouts, to tell how long it may take and whether the "
            "metric's scale fits perfect_score. A metric that asks a paid LM spends.",
        ),
    ] = False,
    gpu: Card = None,
    cards: Cards = 1,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Validate a project; show recipe and plan.

    Reports every fault for which a run would be refused, what the run may spend, and the memory and disk it needs.
    A Ray cluster is asked by the run alone. Without --measure neither the program nor the metric is called, and
    nothing is spent. With --gpu the memory is computed for such a machine, from the model's config alone.
    """
    if gpu is not None and measure:
        raise typer.BadParameter("--measure runs on this machine, and --gpu imagines another; use one of them")
    room = described_room(gpu, cards)
    with errors_as_text(debug):
        try:
            with redirect_stdout(sys.stderr):
                outcome = _outcome(file, measure, room)
        except ConfigurationError as error:
            if as_json:
                faults = {"faults": error.faults, "advice": getattr(error, "__notes__", [])}
                typer.echo(json.dumps({"ok": False, **faults}))
            raise
        if as_json:
            typer.echo(json.dumps({"ok": True, **outcome}))
        else:
            _show(outcome)


def _outcome(file: Path, measure: bool, room: "Available | None") -> CheckOutcome:
    """
    Raises:
        ConfigurationError: with every fault, as a run would report them.
    """
    from dspy_fst.memory import plan_memory
    from dspy_fst.monitoring.progress import without_loading_bars
    from dspy_fst.preflight.score_scale import scale_warnings, scores_of_labels
    from dspy_fst.project.project_file import load_project
    from dspy_fst.training.request import adapter_count

    typer.echo("reading the project", err=True)
    project = load_project(file)
    with signals_raise(), without_loading_bars(), project.importable():
        opened = project.open()
        request = _checked(file, project, opened, room)
        config, run_dir, policy = request.config, request.run_dir, request.policy
        warnings = [*request.warnings, *cluster_warnings(config)]
        plan = _plan(config, opened, policy)
        planned = sum(phase["rollouts"] for phase in plan["phases"].values())
        rates = measure_rates(opened, config, planned) if measure else None
        memory_plan = plan_memory(policy, config, run_dir, room, adapters=adapter_count(config, request.student))
        if rates is not None:
            scores = [*scores_of_labels(opened.optimizer.metric, opened.trainset), *rates["scores"]]
            warnings += scale_warnings(scores, config.perfect_score)
        return {
            "project": _project(project, opened, policy, run_dir),
            "settings": _settings(config, project),
            "plan": plan,
            "warm_start": request.warm_start,
            "needs": requirements(memory_plan),
            "micro_batch_tokens": {"tokens": config.micro_batch_tokens, "chosen": _chooses_micro_batch(project)},
            "gradient_checkpointing": config.gradient_checkpointing is True,
            "trained": None if memory_plan is None else memory_plan.choice,
            "imagined": room is not None,
            "written": None if memory_plan is None else memory_plan.writes.words,
            "warnings": [*warnings, *proposer_warnings(project, opened), *rate_warnings(rates)],
            "unreached": list(unreached(opened)),
            "time": rates,
        }


def cluster_warnings(config: "FSTConfig") -> Iterator[str]:
    """What `check` leaves to the run."""
    if config.ray is not None:
        yield (
            f"ray={config.ray!r}: check did not connect to the cluster. The run asks it before any work: room for "
            "rollouts, servers and ranks, and what each node sees"
        )


def _checked(file: Path, project: "Project", opened: "Opened", room: "Available | None") -> "Request":
    """
    Raises:
        ConfigurationError: with every fault, as a run would report them.
    """
    from dspy_fst.training.request import check as checked

    try:
        return checked(opened.optimizer.arguments(opened.program, opened.trainset, opened.valset, opened.teacher), room)
    except ConfigurationError as error:
        if nobody_proposes(project):
            error.add_note(
                f"In {file}: name a strong LM, reflection_lm: openai/gpt-5, and set its key in the environment "
                "(OPENAI_API_KEY); or a function of yours, propose: my_program:propose; or recipe: {method: rl}"
            )
        raise


# ---- what is reported --------------------------------------------------------------------------


def _project(project: "Project", opened: "Opened", policy: "PolicyLM", run_dir: Path) -> dict[str, object]:
    from dspy_fst.preflight.template_checks import template_kind
    from dspy_fst.rollout.chat_adapters import adapter_in_force, describe, kept_by

    reflection = project.reflection_lm.model if project.reflection_lm else None
    return {
        "program": project.program,
        "metric": project.metric,
        "trainset": f"{len(opened.trainset)} examples",
        "valset": f"{len(opened.valset or ())} examples",
        "model": policy.model,
        "chat_template": template_kind(policy.checkpoint.path) or "not known before the model is on this machine",
        "engine": policy.handle.resolved_kind,
        "adapter": describe(kept_by(opened.program) or adapter_in_force()).name,
        "temperature": policy.sampling_temperature,
        "max_tokens": policy.reply_limit,
        "proposes": project.propose or reflection or "nobody",
        "run_dir": str(run_dir),
    }


def _settings(config: "FSTConfig", project: "Project") -> list[SettingRow]:
    from dspy_fst.config import FSTConfig, described, source_of

    given = project.recipe.model_fields_set if project.recipe else set()
    auto = project.recipe.auto if project.recipe else None
    rows: list[SettingRow] = []
    for name, field in FSTConfig.model_fields.items():
        by = "file" if name in given else f"auto: {auto}" if name == "cycles" and auto else "default"
        rows.append(
            {
                "name": name,
                "value": getattr(config, name),
                "set_by": by,
                "default": field.default,
                "default_source": source_of(name),
                "what": described(name),
            }
        )
    return rows


def _chooses_micro_batch(project: "Project") -> bool:
    return project.recipe is None or project.recipe.micro_batch_tokens == "auto"


def _plan(config: "FSTConfig", opened: "Opened", policy: "PolicyLM") -> PlanFigures:
    """What each phase may spend at most. Tokens assume that a rollout calls each trained predictor once."""
    from dspy_fst.training.plan import Plan

    plan = Plan(config, len(opened.trainset))
    budget = plan.budget(len(opened.valset or ()))
    longest = _longest_rollout(opened.program)

    def phase(rollouts: int, *, searches: int = 0, updates: int = 0) -> Phase:
        tokens = None if longest is None else rollouts * longest
        return {"searches": searches, "updates": updates, "rollouts": rollouts, "tokens": tokens}

    fast = budget.search_rollouts + budget.overshoot_rollouts + budget.scoring_rollouts
    return {
        "phases": {
            "fast": phase(fast, searches=budget.searches),
            "slow": phase(budget.training_rollouts, updates=budget.updates),
            "validation": phase(budget.validation_rollouts),
        },
        "cycles": [asdict(cycle) | {"steps": len(cycle.steps)} for cycle in plan.cycles],
        "anchors": len(plan.anchors(0)),
        "tokens_per_rollout": longest,
        "budget": asdict(budget),
        "optimizer_steps": config.updates_per_batch,
    }


def _longest_rollout(program: "dspy.Module") -> int | None:
    """At most so many sampled tokens in a rollout that calls each trained predictor once; None without a limit."""
    from dspy_fst.preflight.reply_limits import reply_limits

    limits = reply_limits(program).values()
    return sum(limit or 0 for limit in limits) if all(limits) else None


# ---- shown -------------------------------------------------------------------------------------


def _show(outcome: CheckOutcome) -> None:
    out = Printer()
    out.heading("Project")
    out.table(("", ""), [(name, str(value)) for name, value in outcome["project"].items()], words=2)
    out.heading("Recipe")
    out.table(
        ("setting", "value", "from", "default", "source of the default"),
        [
            (row["name"], str(row["value"]), row["set_by"], str(row["default"]), row["default_source"])
            for row in outcome["settings"]
        ],
        words=5,
    )
    _show_plan(out, outcome["plan"])
    if outcome["warm_start"]:
        out.line(outcome["warm_start"])
    out.heading("Room")
    if outcome["needs"] is None or outcome["written"] is None:
        out.line("not known before the model is on this machine")
    else:
        show_needs(out, outcome["needs"])
        show_micro_batch(out, outcome["micro_batch_tokens"])
        show_gradient_checkpointing(out, outcome["gradient_checkpointing"])
        out.line(outcome["trained"] or "")
        out.line(outcome["written"])
        if outcome["imagined"]:
            out.line(COMPUTED)
    out.heading("Time")
    for line in [TIME_DEPENDS_ON] if outcome["time"] is None else rate_lines(outcome["time"]):
        out.line(line)
    for heading, lines in (("Warnings", outcome["warnings"]), ("Cannot be reached from here", outcome["unreached"])):
        if lines:
            out.heading(heading)
        for line in lines:
            out.line(f"- {line}")


def _show_plan(out: Printer, plan: PlanFigures) -> None:
    out.heading("Plan, at most")
    out.table(
        ("phase", "searches", "updates", "rollouts", "sampled tokens"),
        [
            (
                name,
                str(p["searches"]),
                str(p["updates"]),
                f"{p['rollouts']:,}",
                "no limit" if p["tokens"] is None else f"{p['tokens']:,}",
            )
            for name, p in plan["phases"].items()
        ],
    )
    if reused := plan["budget"]["reused_rollouts"]:
        out.line(
            f"Of the rollouts of updates up to {reused:,} are those of the searches (reuse_rollouts): not paid again."
        )
    if (taken := plan["optimizer_steps"]) > 1:
        out.line(f"An update takes up to {taken} optimizer steps, each on its own share of the problems.")
    out.line(
        "Tokens: each trained predictor called once a rollout, each reply as long as max_tokens allows; a program that "
        "calls one more often samples more. A run first plays a few rollouts to see that all works."
    )
