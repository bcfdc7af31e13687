"""`dspy-fst eval`."""

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dspy_fst.cli.code_source import Inputs, Metric, Program, ProjectFile, Trainset, Valset
from dspy_fst.cli.common import Debug, Json, TrustCode, errors_as_text
from dspy_fst.cli.eval_target import EvalTarget, config_of, examples_of, name_of, project_and_past, subject_of, unlike
from dspy_fst.errors import ConfigurationError, DiskError
from dspy_fst.run.interrupts import signals_raise

if TYPE_CHECKING:
    import dspy

    from dspy_fst.evaluation.measure import Estimate, TwoByTwo
    from dspy_fst.types import Candidate


def eval(  # the command's name
    path: Annotated[Path, typer.Argument(metavar="RUN_DIR_OR_COMPILED", help="A run, or a program that was saved.")],
    project: ProjectFile = None,
    program: Program = None,
    metric: Metric = None,
    trainset: Trainset = None,
    valset: Valset = None,
    inputs: Inputs = None,
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
        from dspy_fst.monitoring.progress import without_loading_bars

        if two_by_two and candidate != "best":
            raise ConfigurationError(["--candidate: --two-by-two compares the seed and the best; leave one out"])
        path = path.resolve()
        flags = {"program": program, "metric": metric, "trainset": trainset, "valset": valset, "inputs": inputs}
        named, recorded, past = project_and_past(path, project, flags, split)
        with signals_raise():
            with redirect_stdout(sys.stderr), without_loading_bars(), named.importable():
                opened, examples = examples_of(named, split, limit)
                config, warnings = config_of(named, seed), unlike(recorded, opened, path)
                subject = subject_of(path, past, opened, cycle, weights, config, trust_code, warnings)
                try:
                    results = _crossed(subject, examples, k) if two_by_two else _scored(subject, candidate, examples, k)
                finally:
                    subject.policy.release()
            about = {"time": time.time(), "split": name_of(split), "seed": seed, "limit": limit}
            results = [{**result, **about} for result in results]
            kept = None
            try:
                kept = _keep(subject, results)
            finally:  # what was paid for is shown, whatever the disk says
                _show(results, kept, as_json, subject.warnings)


# ---- measuring -----------------------------------------------------------------------------------


def _scored(subject: EvalTarget, candidate: str, examples: "list[dspy.Example]", k: int) -> list[dict[str, Any]]:
    """One result for each candidate."""
    from dspy_fst.evaluation.measure import INTERVAL, estimate, play

    chosen = _chosen(subject, candidate)
    results = []
    with _progress(len(chosen) * len(examples) * k, subject.weights) as tick:
        for one in chosen:
            rollouts = play(subject.rollouter, subject.policy, subject.policy.checkpoint, one, examples, k, tick)
            made = estimate(rollouts, k, subject.rollouter.settings.seed)
            results.append(
                {"kind": "eval", **_about(subject), "candidate": one.digest, **_figures(made, len(examples))}
            )
    return [{**result, "interval": INTERVAL} for result in results]


def _chosen(subject: EvalTarget, name: str) -> "list[Candidate]":
    from dspy_fst.saving.format import refuse_code

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


def _crossed(subject: EvalTarget, examples: "list[dspy.Example]", k: int) -> list[dict[str, Any]]:
    """The table of {base, trained} x {seed, evolved}, one result."""
    from dspy_fst.evaluation.measure import INTERVAL, table
    from dspy_fst.types import version_of

    if subject.past is None:
        raise ConfigurationError(
            ["--two-by-two: name the run's directory, which holds the weights that it started from"]
        )
    base = subject.past.checkpoint(version_of(0))
    evolved = subject.population.best
    with _progress(4 * len(examples) * k, f"{base.version} and {subject.weights}") as tick:
        made = table(subject.rollouter, subject.policy, base, subject.seed, evolved, examples, k=k, on_rollout=tick)
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


def _about(subject: EvalTarget) -> dict[str, Any]:
    return {"cycle": subject.cycle, "weights": subject.weights, "metric": subject.rollouter.reward.identity}


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


def _keep(subject: EvalTarget, results: Sequence[Mapping[str, Any]]) -> Path | None:
    """Add the results to the run's evaluations; those of a saved program outside of a run, or of another program than
    the run's, have no place there."""
    from dspy_fst.evaluation.measure import EVALUATIONS, keep
    from dspy_fst.run.secrets import Redactor

    if subject.past is None or subject.warnings:
        return None
    try:
        keep(subject.past.run_dir, Redactor.of(subject.rollouter.program).clean(results))
    except DiskError as error:
        error.add_note("The evaluation was shown, but is not kept: reports will not have it")
        raise
    return subject.past.run_dir / EVALUATIONS


def _show(results: Sequence[Mapping[str, Any]], kept: Path | None, as_json: bool, warnings: Sequence[str] = ()) -> None:
    from dspy_fst.cli.printer import Printer
    from dspy_fst.report.run_record import SEEN

    if why := SEEN.get(results[0]["split"]):
        typer.echo(f"{results[0]['split']}: {why}; for an honest test name others: --split FILE.jsonl", err=True)
    for warning in warnings:
        typer.echo(f"warning: {warning}", err=True)
    if as_json:
        kept_in = None if kept is None else str(kept)
        typer.echo(json.dumps({"results": results, "kept_in": kept_in, "warnings": list(warnings)}))
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
    from dspy_fst.formatting.numbers import interval, number
    from dspy_fst.outcomes.counts import OutcomeCounts

    return [
        name,
        number(of["mean"]),
        interval(of["low"], of["high"]),
        number(of["best"]),
        interval(of["best_low"], of["best_high"]),
        f"{of['problems']}/{of['problems_of_split']}",
        str(of["masked"]),
        str(OutcomeCounts.of(of["lost"]).failed.total()),
    ]


def _losses(figures: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What was masked or failed, by reason."""
    from dspy_fst.outcomes.counts import OutcomeCounts

    lost = sum((Counter(figure["lost"]) for figure in figures), Counter[str]())
    for outcome, count in OutcomeCounts.of(lost).items():
        rule = "measured nothing and are left out" if outcome.kind == "masked" else "are scored as failures"
        yield f"{count} rollouts {rule} ({outcome.label})"
