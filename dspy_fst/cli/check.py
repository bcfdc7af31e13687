"""`dspy-fst check`: is a project in order, and what will it cost? Nothing is trained, and nothing is left behind."""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dspy_fst.cli.common import Debug, Json, errors_as_text
from dspy_fst.cli.parse_remedies import measured_warnings, remedies
from dspy_fst.cli.printer import Printer
from dspy_fst.cli.proposer_checks import nobody_proposes, proposer_warnings, unreached
from dspy_fst.cli.room import UNTRIED, Card, Cards, described_room, requirements, show_micro_batch, show_needs
from dspy_fst.errors import ConfigurationError
from dspy_fst.formatting.numbers import duration
from dspy_fst.run.interrupts import signals_raise

if TYPE_CHECKING:
    import dspy

    from dspy_fst.config import FSTConfig
    from dspy_fst.memory import Available
    from dspy_fst.policy_lm import PolicyLM
    from dspy_fst.project.project_file import Opened, Project
    from dspy_fst.rollout.rollouter import Rollouter
    from dspy_fst.training.request import Request
    from dspy_fst.types import Rollout

SAMPLED = 8
"""Rollouts in flight while the time is measured; few, as a check must not cost what it is there to tell."""
TIME_DEPENDS_ON = (
    "not measured, and neither the program nor the metric was called: it depends on how fast this machine "
    "samples and updates, how long the replies are, and on the reflection LM; "
    f"--measure starts the engine, samples up to {SAMPLED + 2} rollouts, scores them, and tells a range "
    "and whether the metric goes beyond perfect_score"
)


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

    Everything that a run would refuse is told at once, with what the run would spend and take. Without --measure
    neither the program nor the metric is called, and nothing is spent. With --gpu it tells the room on such a machine,
    from the model's config alone.
    """
    if gpu is not None and measure:
        raise typer.BadParameter("--measure runs on this machine, and --gpu imagines another; use one of them")
    room = described_room(gpu, cards)
    with errors_as_text(debug):
        try:
            with redirect_stdout(sys.stderr):
                told = _told(file, measure, room)
        except ConfigurationError as error:
            if as_json:
                faults = {"faults": error.faults, "advice": getattr(error, "__notes__", [])}
                typer.echo(json.dumps({"ok": False, **faults}))
            raise
        if as_json:
            typer.echo(json.dumps({"ok": True, **told}))
        else:
            _show(told)


def _told(file: Path, measure: bool, room: "Available | None") -> dict[str, Any]:
    """All that can be said of a project.

    Raises:
        ConfigurationError: with every fault, as a run would tell them.
    """
    from dspy_fst.memory import plan_memory
    from dspy_fst.monitoring.progress import without_loading_bars
    from dspy_fst.preflight.score_scale import of_labels, scale_warnings
    from dspy_fst.project.project_file import load_project

    typer.echo("reading the project", err=True)
    project = load_project(file)
    with signals_raise(), without_loading_bars(), project.importable():
        opened = project.open()
        request = _checked(file, project, opened, room)
        config, run_dir, policy, warnings = request.config, request.run_dir, request.policy, [*request.warnings]
        plan = _plan(config, opened, policy)
        time = _measured(opened, config, plan) if measure else None
        memory_plan = plan_memory(policy, config, run_dir, room)
        if time is not None:
            scores = [*of_labels(opened.optimizer.metric, opened.trainset), *time["scores"]]
            warnings += scale_warnings(scores, config.perfect_score)
        return {
            "project": _project(project, opened, policy, run_dir),
            "settings": _settings(config, project),
            "plan": plan,
            "needs": requirements(memory_plan),
            "micro_batch_tokens": {"tokens": config.micro_batch_tokens, "chosen": _chooses_micro_batch(project)},
            "imagined": room is not None,
            "written": None if memory_plan is None else memory_plan.writes.words,
            "warnings": [*warnings, *proposer_warnings(project, opened), *measured_warnings(time)],
            "unreached": list(unreached(opened)),
            "time": time,
        }


def _checked(file: Path, project: "Project", opened: "Opened", room: "Available | None") -> "Request":
    """
    Raises:
        ConfigurationError: with every fault, as a run would report them.
    """
    from dspy_fst.training.request import check as checked

    try:
        return checked(opened.optimizer.arguments(opened.program, opened.trainset, opened.valset), room)
    except ConfigurationError as error:
        if nobody_proposes(project):
            error.add_note(
                f"In {file}: name a strong LM, reflection_lm: openai/gpt-5, and set its key in the environment "
                "(OPENAI_API_KEY); or a function of yours, propose: my_program:propose; or recipe: {method: rl}"
            )
        raise


# ---- what is said ------------------------------------------------------------------------------


def _project(project: "Project", opened: "Opened", policy: "PolicyLM", run_dir: Path) -> dict[str, Any]:
    from dspy_fst.preflight.template_checks import template_kind
    from dspy_fst.rollout.adapters import adapter_in_force, describe, kept_by

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


def _settings(config: "FSTConfig", project: "Project") -> list[dict[str, Any]]:
    """Every setting with its value, who set it, and where its default comes from."""
    from dspy_fst.config import FSTConfig, source_of

    given = project.recipe.model_fields_set if project.recipe else set()
    auto = project.recipe.auto if project.recipe else None
    rows = []
    for name, field in FSTConfig.model_fields.items():
        by = "file" if name in given else f"auto: {auto}" if name == "cycles" and auto else "default"
        rows.append(
            {
                "name": name,
                "value": getattr(config, name),
                "set_by": by,
                "default": field.default,
                "default_source": source_of(name),
                "what": " ".join((field.description or "").split()),
            }
        )
    return rows


def _chooses_micro_batch(project: "Project") -> bool:
    return project.recipe is None or project.recipe.micro_batch_tokens == "auto"


def _plan(config: "FSTConfig", opened: "Opened", policy: "PolicyLM") -> dict[str, Any]:
    """What each phase may spend at most; tokens are those of rollouts that call each trained predictor once."""
    from dspy_fst.training.plan import Plan

    plan = Plan(config, len(opened.trainset))
    budget = plan.budget(len(opened.valset or ()))
    longest = _longest_rollout(opened.program, policy)
    fast = budget.search_rollouts + budget.overshoot_rollouts + budget.scoring_rollouts
    phases = {
        "fast": {"searches": budget.searches, "updates": 0, "rollouts": fast},
        "slow": {"searches": 0, "updates": budget.updates, "rollouts": budget.training_rollouts},
        "validation": {"searches": 0, "updates": 0, "rollouts": budget.validation_rollouts},
    }
    for phase in phases.values():
        phase["tokens"] = phase["rollouts"] * longest if longest is not None else None  # type: ignore[assignment]
    return {
        "phases": phases,
        "cycles": [asdict(cycle) | {"steps": len(cycle.steps)} for cycle in plan.cycles],
        "anchors": len(plan.anchors(0)),
        "tokens_per_rollout": longest,
        "budget": asdict(budget),
    }


def _longest_rollout(program: "dspy.Module", policy: "PolicyLM") -> int | None:
    """Sampled tokens of a rollout that calls each trained predictor once, at most; None without a limit."""
    from dspy_fst.preflight.program_checks import policies_of

    own = {name: predictor.config for name, predictor in program.named_predictors()}
    limits = [own[name].get("max_tokens", lm.reply_limit) for name, lm in policies_of(program).items()]
    return sum(limits) if all(limits) else None


# ---- measured ----------------------------------------------------------------------------------


def _measured(opened: "Opened", config: "FSTConfig", plan: dict[str, Any]) -> dict[str, Any]:
    """Time a few rollouts on an engine of our own: one alone, then some together.

    Raises:
        ConfigurationError: the program or its metric cannot be measured.
        EngineError: the engine does not start.
    """
    from dspy_fst.preflight.model_checks import context_faults
    from dspy_fst.preflight.program_checks import policies_of
    from dspy_fst.training.opening import open_player, trainable_copy

    typer.echo("starting the engine", err=True)
    policy = next(iter(policies_of(opened.program).values())).fork()
    try:
        began = monotonic()
        policy.handle.ready()
        program = trainable_copy(opened.program, policy)
        rollouter = open_player(program, opened.optimizer.metric, config, policy.handle.engine.expect, opened.trainset)
        _timed(rollouter, opened, 1)  # the first call of an engine is slower than any other
        start_s = monotonic() - began
        alone_s, _ = _timed(rollouter, opened, 1)
        together_s, rollouts = _timed(rollouter, opened, SAMPLED)
        helps = remedies(rollouts, rollouter, opened.trainset, policy, config)
    finally:
        policy.release()
    if faults := [*context_faults(policy, rollouts), *_unmeasured(rollouts)]:
        raise ConfigurationError(faults)
    rewards = [rollout.reward for rollout in rollouts if rollout.reward is not None]
    total = sum(phase["rollouts"] for phase in plan["phases"].values())
    return {
        "rollouts": len(rollouts),
        "engine_start_s": start_s,
        "alone_s": alone_s,
        "together_s": together_s,
        "scores": rewards,
        "mean_score": sum(rewards) / len(rewards),
        "lost": Counter(rollout.outcome.reason for rollout in rollouts if rollout.outcome.reason),
        "calls_per_rollout": sum(len(rollout.calls) for rollout in rollouts) / len(rollouts),
        "tokens_per_rollout": sum(rollout.tokens for rollout in rollouts) / len(rollouts),
        "planned_rollouts": total,
        "remedies": helps,
        "sampling_s": sorted([total * together_s / len(rollouts), total * alone_s]),
    }


def _timed(rollouter: "Rollouter", opened: "Opened", count: int) -> "tuple[float, list[Rollout]]":
    """Seconds that rollouts of the first examples take together."""
    from dspy_fst.rollout.components import read_texts
    from dspy_fst.rollout.rollouter import Task
    from dspy_fst.types import Problem

    seed = read_texts(opened.program)
    examples = opened.trainset[:count]
    tasks = [Task(Problem(index, example), seed) for index, example in enumerate(examples)]
    began = monotonic()
    rollouts = rollouter.rollout(tasks, f"check {count}")
    return monotonic() - began, rollouts


def _unmeasured(rollouts: "Sequence[Rollout]") -> Iterator[str]:
    from dspy_fst.outcomes.counts import OutcomeCounts

    masks = OutcomeCounts.over(rollout.outcome for rollout in rollouts).masked
    if masks.total() == len(rollouts) or any(reason.startswith("metric") for reason in masks):
        detail = next(rollout.feedback for rollout in rollouts if rollout.mask)
        yield (
            f"{masks.total()} of {len(rollouts)} rollouts cannot be measured ({', '.join(sorted(masks))})"
            f"{f': {detail}' if detail else ''}; run the program and its metric on one example by hand"
        )


# ---- shown -------------------------------------------------------------------------------------


def _show(told: dict[str, Any]) -> None:
    out = Printer()
    out.heading("Project")
    out.table(("", ""), [(name, str(value)) for name, value in told["project"].items()], words=2)
    out.heading("Recipe")
    out.table(
        ("setting", "value", "from", "default", "source of the default"),
        [
            (row["name"], str(row["value"]), row["set_by"], str(row["default"]), row["default_source"])
            for row in told["settings"]
        ],
        words=5,
    )
    _show_plan(out, told["plan"])
    out.heading("Room")
    if told["needs"] is None:
        out.line("not known before the model is on this machine")
    else:
        show_needs(out, told["needs"])
        show_micro_batch(out, told["micro_batch_tokens"])
        out.line(told["written"])
        if told["imagined"]:
            out.line(UNTRIED)
    out.heading("Time")
    _show_time(out, told["time"])
    for heading, lines in (("Warnings", told["warnings"]), ("Cannot be reached from here", told["unreached"])):
        if lines:
            out.heading(heading)
        for line in lines:
            out.line(f"- {line}")


def _show_plan(out: Printer, plan: dict[str, Any]) -> None:
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
    out.line(
        "Tokens: each trained predictor called once a rollout, each reply as long as max_tokens allows; a program that "
        "calls one more often samples more. A run first plays a few rollouts to see that all works."
    )


def _show_time(out: Printer, time: dict[str, Any] | None) -> None:
    if time is None:
        out.line(TIME_DEPENDS_ON)
        return
    low, high = time["sampling_s"]
    count = time["rollouts"]
    out.line(
        f"sampling and scoring {time['planned_rollouts']:,} rollouts may take {duration(low)} to {duration(high)}, "
        f"by the rates of one alone and of {count} together; with more in flight it may be faster. Weight updates, "
        "publishing and reflections come on top and were not measured."
    )
    lost = ", ".join(f"{reason}: {lost}" for reason, lost in time["lost"].items()) or "none"
    out.line(
        f"measured: engine ready after {duration(time['engine_start_s'])}, one rollout {time['alone_s']:.2f} s, "
        f"{count} together {time['together_s']:.2f} s; {time['calls_per_rollout']:.1f} calls and "
        f"{time['tokens_per_rollout']:.0f} tokens a rollout; mean score {time['mean_score']:.3f}; failed: {lost}"
    )
