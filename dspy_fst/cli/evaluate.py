"""`dspy-fst eval`."""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dspy_fst.cli.common import Debug, Json, TrustCode, errors_as_text
from dspy_fst.errors import ConfigurationError, DiskError
from dspy_fst.run.interrupts import signals_raise

if TYPE_CHECKING:
    import dspy

    from dspy_fst.config import FSTConfig
    from dspy_fst.evaluation import Estimate, TwoByTwo
    from dspy_fst.past import Past
    from dspy_fst.policy import PolicyLM
    from dspy_fst.project import Opened, Project
    from dspy_fst.rollout.player import Player
    from dspy_fst.types import Candidate, Population


def eval(  # the command's name
    path: Annotated[Path, typer.Argument(metavar="RUN_DIR_OR_COMPILED", help="A run, or a program that was saved.")],
    project: Annotated[Path | None, typer.Option(help="The project file, where the run's directory has none.")] = None,
    split: Annotated[str, typer.Option(help="val, train, a .jsonl file or module:attribute.")] = "val",
    k: Annotated[int, typer.Option("--k", min=1, help="Rollouts for each problem.")] = 4,
    cycle: Annotated[int | None, typer.Option(min=0, help="Population and weights of this cycle's end.")] = None,
    weights: Annotated[str | None, typer.Option(help="Weights by name, e.g. step-000012.")] = None,
    candidate: Annotated[str, typer.Option(help="best, all, seed or the beginning of a digest.")] = "best",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first problems of the split.")] = None,
    seed: Annotated[int, typer.Option(help="Of the rollouts' and the bootstrap's draws.")] = 0,
    two_by_two: Annotated[
        bool, typer.Option("--two-by-two", help="{base, trained} weights x {seed, evolved} instructions, and drift.")
    ] = False,
    trust_code: TrustCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure mean@k and best@k, with intervals.

    Of any cycle's population and weights, on any split.
    """
    with errors_as_text(debug):
        from dspy_fst.report.progress import without_loading_bars

        if two_by_two and candidate != "best":
            raise ConfigurationError(["--candidate: --two-by-two compares the seed and the best; leave one out"])
        named, past = _project(path.resolve(), project)
        with signals_raise():
            with redirect_stdout(sys.stderr), without_loading_bars(), named.importable():
                opened, examples = _examples(named, split, limit)
                config = _config(named, seed)
                subject = _subject(path.resolve(), past, opened, cycle, weights, config, trust_code)
                try:
                    results = _crossed(subject, examples, k) if two_by_two else _scored(subject, candidate, examples, k)
                finally:
                    subject.policy.release()
            about = {"time": time.time(), "split": _name(split), "seed": seed, "limit": limit}
            results = [{**result, **about} for result in results]
            kept = None
            try:
                kept = _keep(subject, results)
            finally:  # what was paid for is shown, whatever the disk says
                _show(results, kept, as_json)


# ---- what is evaluated ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A population and weights, ready to play."""

    player: "Player"
    policy: "PolicyLM"
    seed: "Candidate"
    """The program's own texts."""
    population: "Population"
    cycle: int | None
    past: "Past | None"
    """The run that they are of; None for a saved program that lies outside of one."""
    own: "dspy.Module | None"
    """The program as its class makes it, whose sources alone are run; None when others are trusted."""

    @property
    def weights(self) -> str:
        return self.policy.checkpoint.version


def _is_saved(path: Path) -> bool:
    return (path / "policy.json").is_file()


def _project(path: Path, file: Path | None) -> "tuple[Project, Past | None]":
    """The project, and the run when there is one."""
    from dspy_fst.past import Past
    from dspy_fst.project import kept_in, load_project
    from dspy_fst.run.directory import PROJECT

    run_dir = path.parent if _is_saved(path) else path
    past = Past.of(run_dir) if not _is_saved(path) or (run_dir / "events.jsonl").is_file() else None
    if file is None and not (run_dir / PROJECT).is_file():
        raise ConfigurationError(
            [f"--project: {run_dir} holds no {PROJECT}, so name the file that says which program, metric and examples"]
        )
    return load_project(file) if file else kept_in(run_dir), past


def _config(project: "Project", seed: int) -> "FSTConfig":
    """The recipe's scores of failures, threads and time limits, with this seed."""
    from dspy_fst.config import make_config

    recipe = project.recipe.model_dump(exclude_unset=True, exclude={"auto"}) if project.recipe else {}
    config, faults = make_config({**recipe, "seed": seed})
    if config is None:
        raise ConfigurationError(faults)
    return config


def _name(split: str) -> str:
    """The split as it is stored: a report that is passed on says nothing of this machine's folders."""
    return Path(split).name if split.endswith(".jsonl") else split


def _examples(project: "Project", split: str, limit: int | None) -> "tuple[Opened, list[dspy.Example]]":
    """What the project names, and the split's examples."""
    project = project.model_copy(update={"reflection_lm": None})  # nothing reflects: its key may be missing
    if split in ("val", "train"):
        opened = project.open()
        examples = opened.valset if split == "val" else opened.trainset
    else:
        if split.endswith(".jsonl"):
            project = project.model_copy(update={"valset": str(Path(split).resolve())})
        else:
            project = type(project).model_validate({**project.model_dump(exclude_unset=True), "valset": split})
        opened = project.open()
        examples = opened.valset
        if split.endswith(".jsonl") and not project.inputs:
            examples = _with_inputs(examples or [], opened.trainset, split)
    if not examples:
        raise ConfigurationError(
            [f"--split {split}: there are no examples; use train, a .jsonl file or module:attribute"]
        )
    return opened, examples[:limit]


def _with_inputs(examples: "list[dspy.Example]", trainset: "list[dspy.Example]", split: str) -> "list[dspy.Example]":
    """A file's examples with the inputs of the project's own, which Python code made and no setting describes."""
    if not trainset:
        raise ConfigurationError(
            [f"--split {split}: the trainset is empty, so nothing says which fields are inputs; use module:attribute"]
        )
    inputs = sorted(trainset[0].inputs().keys())
    for place, example in enumerate(examples, start=1):
        if lacking := [name for name in inputs if name not in example]:
            raise ConfigurationError(
                [f"--split {split}: example {place} has no {lacking[0]!r}, an input of the trainset"]
            )
    return [example.with_inputs(*inputs) for example in examples]


def _subject(
    path: Path,
    past: "Past | None",
    opened: "Opened",
    cycle: int | None,
    weights: str | None,
    config: "FSTConfig",
    trust_code: bool,
) -> Subject:
    from dspy_fst.documents import refuse_code
    from dspy_fst.opening import open_player, starting_population, trainable_copy
    from dspy_fst.rollout.adapters import keep, made
    from dspy_fst.rollout.texts import read_texts, texts_like
    from dspy_fst.saved import load, policy_of

    if _is_saved(path):
        if cycle is not None or weights is not None:
            raise ConfigurationError([f"--cycle, --weights: {path} holds one population; name the run's directory"])
        program = load(path, opened.program, trust_code=trust_code)
        policy, population = policy_of(program), program.population
    else:
        assert past is not None, "what is no saved program is a run"
        if cycle is not None:
            past.require_cycle(cycle)
        checkpoint = past.checkpoint(weights or past.version(cycle))
        policy = policy_of(opened.program).fork(checkpoint)
        program = trainable_copy(opened.program, policy)
        if (adapter := past.adapter) is not None:
            keep(program, made(adapter, None))
        seed = read_texts(opened.program, tools=config.tool_descriptions == "evolved")
        population = past.population(cycle) or starting_population(program, seed, config.population_size, {})
        if not trust_code:
            refuse_code(path, opened.program, [member.texts for member in population.members])
        if cycle is None and weights is None:  # weights that were named may be of any cycle, or of none
            cycle = past.last_cycle
    seed = texts_like(population.best, opened.program)
    if differing := sorted(population.best.texts.keys() ^ seed.texts.keys()):
        raise ConfigurationError([f"program: {path} is of another program; predictors that differ: {differing}"])
    player = open_player(program, opened.optimizer.metric, config, policy.handle.engine.expect, opened.trainset)
    return Subject(player, policy, seed, population, cycle, past, None if trust_code else opened.program)


# ---- measuring -----------------------------------------------------------------------------------


def _scored(subject: Subject, candidate: str, examples: "list[dspy.Example]", k: int) -> list[dict[str, Any]]:
    """One result for each candidate."""
    from dspy_fst.evaluation import INTERVAL, estimate, play

    chosen = _chosen(subject, candidate)
    results = []
    with _progress(len(chosen) * len(examples) * k, subject.weights) as tick:
        for one in chosen:
            rollouts = play(subject.player, subject.policy, subject.policy.checkpoint, one, examples, k, tick)
            made = estimate(rollouts, k, subject.player.settings.seed)
            results.append(
                {"kind": "eval", **_about(subject), "candidate": one.digest, **_figures(made, len(examples))}
            )
    return [{**result, "interval": INTERVAL} for result in results]


def _chosen(subject: Subject, name: str) -> "list[Candidate]":
    from dspy_fst.documents import refuse_code

    population = subject.population
    named = {"best": [population.best], "all": list(population.unique()), "seed": [subject.seed]}
    if name in named:
        return named[name]
    found = [member for member in population.unique() if member.digest.startswith(name)]
    if len(found) == 1:
        return found
    if subject.past is None:
        known = ", ".join(member.digest for member in population.unique())
        raise ConfigurationError([f"--candidate {name}: use best, all, seed or one of {known}"])
    tried = subject.past.candidate(name)
    if subject.own is not None:
        refuse_code(subject.past.run_dir, subject.own, [tried.texts])
    return [tried]


def _figures(made: "Estimate", wanted: int) -> dict[str, Any]:
    low, high = made.mean_interval or (None, None)
    best_low, best_high = made.best_interval or (None, None)
    return {
        "k": made.k,
        "mean": made.mean_at_k,
        "low": low,
        "high": high,
        "standard_error": made.standard_error,
        "best": made.best_at_k,
        "best_low": best_low,
        "best_high": best_high,
        "problems": made.problems,
        "problems_of_split": wanted,
        "masked": made.masked,
        "lost": dict(made.lost),
    }


def _crossed(subject: Subject, examples: "list[dspy.Example]", k: int) -> list[dict[str, Any]]:
    """The table of {base, trained} x {seed, evolved}, one result."""
    from dspy_fst.evaluation import INTERVAL, table
    from dspy_fst.types import version_of

    if subject.past is None:
        raise ConfigurationError(
            ["--two-by-two: name the run's directory, which holds the weights that it started from"]
        )
    base = subject.past.checkpoint(version_of(0))
    evolved = subject.population.best
    with _progress(4 * len(examples) * k, f"{base.version} and {subject.weights}") as tick:
        made = table(subject.player, subject.policy, base, subject.seed, evolved, examples, k=k, on_rollout=tick)
    return [
        {
            "kind": "two_by_two",
            **_about(subject),
            "candidate": evolved.digest,
            "k": k,
            "problems_of_split": len(examples),
            "cells": {cell: [of.mean_at_k, of.standard_error] for cell, of in _cells(made).items()},
            "figures": {cell: _figures(of, len(examples)) for cell, of in _cells(made).items()},
            "drift": {name: asdict(moved) for name, moved in made.drift.items()},
            "interval": INTERVAL,
        }
    ]


def _cells(table: "TwoByTwo") -> "dict[str, Estimate]":
    """The cells under the names that reports read, instructions first: ``"seed/base"``."""
    pairs = [(instructions, weights) for instructions in ("seed", "evolved") for weights in ("base", "trained")]
    return {f"{texts}/{weights}": table.cells[f"{weights} weights, {texts} instructions"] for texts, weights in pairs}


def _about(subject: Subject) -> dict[str, Any]:
    return {"cycle": subject.cycle, "weights": subject.weights, "metric": subject.player.reward.identity}


@contextmanager
def _progress(rollouts: int, weights: str) -> Iterator[Any]:
    """Rollouts that are done, on stderr: a bar in a terminal, else one line."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True, highlight=False)
    console.print(f"playing {rollouts:,} rollouts with the weights {weights}", soft_wrap=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("rollouts", total=rollouts)
        yield lambda rollout: bar.advance(task)


# ---- telling -------------------------------------------------------------------------------------


def _keep(subject: Subject, results: Sequence[Mapping[str, Any]]) -> Path | None:
    """Add the results to the run's evaluations; a saved program outside of a run has no place for them."""
    from dspy_fst.evaluation import EVALUATIONS, keep
    from dspy_fst.run.secrets import Redactor

    if subject.past is None:
        return None
    try:
        keep(subject.past.run_dir, Redactor.of(subject.player.program).clean(results))
    except DiskError as error:
        error.add_note("The evaluation was shown, but is not kept: reports will not have it")
        raise
    return subject.past.run_dir / EVALUATIONS


def _show(results: Sequence[Mapping[str, Any]], kept: Path | None, as_json: bool) -> None:
    from dspy_fst.cli.tables import Printer
    from dspy_fst.report.record import SEEN

    if why := SEEN.get(results[0]["split"]):
        typer.echo(f"{results[0]['split']}: {why}; for an honest test name others: --split FILE.jsonl", err=True)
    if as_json:
        typer.echo(json.dumps({"results": results, "kept_in": None if kept is None else str(kept)}))
        return
    out = Printer()
    first = results[0]
    at = f"weights {first['weights']}" + ("" if first["cycle"] is None else f", cycle {first['cycle']}")
    limited = "" if first["limit"] is None else f", only the first {first['problems_of_split']} problems"
    out.line(f"{first['split']}{limited}, {at}, seed {first['seed']}")
    for result in results:
        if result["kind"] == "two_by_two":
            rows = [(name.replace("/", " instructions, ") + " weights", of) for name, of in result["figures"].items()]
            out.table(_columns("cell", first["k"]), [_row(name, of) for name, of in rows])
            for name, moved in result["drift"].items():
                per = f"{moved['per_token']:.4f} a token, {moved['per_rollout']:.3f} a rollout"
                out.line(f"KL(trained || base) under {name}, in nats: {per}")
    if scored := [result for result in results if result["kind"] == "eval"]:
        out.table(_columns("candidate", first["k"]), [_row(result["candidate"], result) for result in scored])
    out.line(f"Intervals: {first['interval']}.")
    figures = [of for result in results for of in result.get("figures", {"": result}).values()]
    for sentence in _losses(figures):
        out.line(sentence)
    out.line(f"kept in {kept}" if kept else "not kept with a run, so no report will have it")


def _columns(first: str, k: int) -> tuple[str, ...]:
    return (first, f"mean@{k}", "interval", f"best@{k}", "interval", "problems", "masked", "failed")


def _row(name: str, of: Mapping[str, Any]) -> list[str]:
    from dspy_fst.report.words import interval, number

    return [
        name,
        number(of["mean"]),
        interval(of["low"], of["high"]),
        number(of["best"]),
        interval(of["best_low"], of["best_high"]),
        f"{of['problems']}/{of['problems_of_split']}",
        str(of["masked"]),
        str(sum(count for reason, count in of["lost"].items() if reason.startswith("failed"))),
    ]


def _losses(figures: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What was masked or failed, by reason."""
    reasons = dict.fromkeys(reason for of in figures for reason in of["lost"])
    for reason in reasons:
        rule = "measured nothing and are left out" if reason.startswith("masked") else "are scored as failures"
        yield f"{sum(of['lost'].get(reason, 0) for of in figures)} rollouts {rule} ({reason})"
