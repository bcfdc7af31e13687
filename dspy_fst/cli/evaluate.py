"""`dspy-fst eval`: mean@k and best@k of a run or a saved program, with intervals."""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypedDict, cast

import typer

from dspy_fst.cli.code_source import Inputs, Metric, Program, ProjectFile, Trainset, Valset
from dspy_fst.cli.common import Debug, Json, TrustCode, errors_as_text
from dspy_fst.cli.eval_target import EvalTarget, config_of, examples_of, name_of, project_and_past, subject_of, unlike
from dspy_fst.errors import ConfigurationError, DiskError
from dspy_fst.run.interrupts import signals_raise

if TYPE_CHECKING:
    import dspy

    from dspy_fst.evaluation.two_by_two_table import Estimate
    from dspy_fst.types import Candidate, Rollout


Result: TypeAlias = dict[str, Any]
"""An evaluation or a two-by-two, as ``--json`` prints it and a line of ``evaluations.jsonl`` holds it."""


class Figures(TypedDict):
    """The scores of one candidate under one set of weights; with ``--json`` these are keys of a result."""

    k: int
    mean: float
    low: float | None
    """Lower end of the interval of the mean; None with a single problem."""
    high: float | None
    standard_error: float
    best: float
    """Mean over problems of the best of k rollouts."""
    best_low: float | None
    best_high: float | None
    problems: int
    """Problems that were measured."""
    problems_of_split: int
    masked: int
    """Rollouts that were not measured."""
    lost: dict[str, int]
    """Label, e.g. ``"failed: parse"`` -> rollouts."""


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

    For the population and weights of any cycle, on any split.
    """
    with errors_as_text(debug):
        from dspy_fst.monitoring.progress import without_loading_bars

        if two_by_two and candidate != "best":
            raise ConfigurationError(["--candidate: --two-by-two compares the seed and the best; leave one out"])
        path = path.resolve()
        flags = {"program": program, "metric": metric, "trainset": trainset, "valset": valset, "inputs": inputs}
        chosen, recorded, past = project_and_past(path, project, flags, split)
        with signals_raise():
            with redirect_stdout(sys.stderr), without_loading_bars(), chosen.importable():
                opened, examples = examples_of(chosen, split, limit)
                config, warnings = config_of(chosen, seed), unlike(recorded, opened, path)
                target = subject_of(path, past, opened, cycle, weights, config, trust_code, warnings)
                try:
                    results = _crossed(target, examples, k) if two_by_two else _scored(target, candidate, examples, k)
                finally:
                    target.policy.release()
            about = {"time": time.time(), "split": name_of(split), "seed": seed, "limit": limit}
            results = [{**result, **about} for result in results]
            kept = None
            try:
                kept = _keep(target, results)
            finally:  # the results were paid for, so they are shown even if the disk is full
                _show(results, kept, as_json, target.warnings)


# ---- measuring -----------------------------------------------------------------------------------


def _scored(target: EvalTarget, candidate: str, examples: "list[dspy.Example]", k: int) -> list[Result]:
    """One result for each candidate."""
    from dspy_fst.evaluation.two_by_two_table import INTERVAL, estimate, play

    chosen = _chosen(target, candidate)
    results = []
    with _progress(len(chosen) * len(examples) * k, target.weights) as tick:
        for member in chosen:
            rollouts = play(target.rollouter, target.policy, target.policy.checkpoint, member, examples, k, tick)
            scores = estimate(rollouts, k, target.rollouter.seed)
            results.append(
                {"kind": "eval", **_about(target), "candidate": member.digest, **_figures(scores, len(examples))}
            )
    return [{**result, "interval": INTERVAL} for result in results]


def _chosen(target: EvalTarget, name: str) -> "list[Candidate]":
    from dspy_fst.saving.format import refuse_code

    population = target.population
    named = {"best": [population.best], "all": list(population.unique()), "seed": [target.seed]}
    if name in named:
        return named[name]
    matching = [member for member in population.unique() if member.digest.startswith(name)]
    if len(matching) == 1:
        return matching
    if target.past is None:
        known = ", ".join(member.digest for member in population.unique())
        raise ConfigurationError([f"--candidate {name}: use best, all, seed or one of {known}"])
    tried = target.past.candidate(name)
    if target.trusted is not None:
        refuse_code(target.past.run_dir, target.trusted, [tried.texts])
    return [tried]


def _figures(scores: "Estimate", wanted: int) -> Figures:
    low, high = scores.mean_interval or (None, None)
    best_low, best_high = scores.best_interval or (None, None)
    return {
        "k": scores.k,
        "mean": scores.mean_at_k,
        "low": low,
        "high": high,
        "standard_error": scores.standard_error,
        "best": scores.best_at_k,
        "best_low": best_low,
        "best_high": best_high,
        "problems": scores.problems,
        "problems_of_split": wanted,
        "masked": scores.masked,
        "lost": dict(scores.lost),
    }


def _crossed(target: EvalTarget, examples: "list[dspy.Example]", k: int) -> list[Result]:
    """The table of {base, trained} weights x {seed, evolved} texts, as one result."""
    from dspy_fst.evaluation.two_by_two_table import INTERVAL, table
    from dspy_fst.types import version_of

    if target.past is None:
        raise ConfigurationError(
            ["--two-by-two: name the run's directory, which holds the weights that it started from"]
        )
    base = target.past.checkpoint(version_of(0))
    evolved = target.population.best
    with _progress(4 * len(examples) * k, f"{base.version} and {target.weights}") as tick:
        crossed = table(target.rollouter, target.policy, base, target.seed, evolved, examples, k=k, on_rollout=tick)
    cells = crossed.written
    return [
        {
            "kind": "two_by_two",
            **_about(target),
            "candidate": evolved.digest,
            "k": k,
            "problems_of_split": len(examples),
            "cells": {cell: [scores.mean_at_k, scores.standard_error] for cell, scores in cells.items()},
            "figures": {cell: _figures(scores, len(examples)) for cell, scores in cells.items()},
            "drift": {name: asdict(moved) for name, moved in crossed.drift.items()},
            "interval": INTERVAL,
        }
    ]


def _about(target: EvalTarget) -> dict[str, object]:
    return {"cycle": target.cycle, "weights": target.weights, "metric": target.rollouter.reward.identity}


@contextmanager
def _progress(rollouts: int, weights: str) -> "Iterator[Callable[[Rollout], None]]":
    """Rollouts that are done, on stderr: a bar in a terminal, else one line."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True, highlight=False)
    console.print(f"playing {rollouts:,} rollouts with the weights {weights}", soft_wrap=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("rollouts", total=rollouts)
        yield lambda rollout: bar.advance(task)


# ---- telling -------------------------------------------------------------------------------------


def _keep(target: EvalTarget, results: Sequence[Result]) -> Path | None:
    """Add the results to the run's evaluations.

    Not kept are results of a saved program outside of a run, and of a program that differs from the run's.
    """
    from dspy_fst.evaluation.two_by_two_table import EVALUATIONS, keep
    from dspy_fst.run.secrets import Redactor

    if target.past is None or target.warnings:
        return None
    try:
        keep(target.past.run_dir, Redactor.of(target.rollouter.program).clean(results))
    except DiskError as error:
        error.add_note("The evaluation was shown, but is not kept: reports will not have it")
        raise
    return target.past.run_dir / EVALUATIONS


def _show(results: Sequence[Result], kept: Path | None, as_json: bool, warnings: Sequence[str] = ()) -> None:
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
            named = {
                name.replace("/", " instructions, ") + " weights": cell for name, cell in result["figures"].items()
            }
            out.table(_columns("cell", first["k"]), [_row(name, cell) for name, cell in named.items()])
            for name, moved in result["drift"].items():
                per = f"{moved['per_token']:.4f} a token, {moved['per_rollout']:.3f} a rollout"
                out.line(f"KL(trained || base) under {name}, in nats: {per}")
    if scored := [result for result in results if result["kind"] == "eval"]:
        out.table(
            _columns("candidate", first["k"]), [_row(result["candidate"], cast(Figures, result)) for result in scored]
        )
    out.line(f"Intervals: {first['interval']}.")
    figures = [cell for result in results for cell in result.get("figures", {"": result}).values()]
    for sentence in _losses(figures):
        out.line(sentence)
    out.line(f"kept in {kept}" if kept else "not kept with a run, so no report will have it")


def _columns(first: str, k: int) -> tuple[str, ...]:
    return (first, f"mean@{k}", "interval", f"best@{k}", "interval", "problems", "masked", "failed")


def _row(name: str, figures: Figures) -> list[str]:
    from dspy_fst.formatting.numbers import interval, number
    from dspy_fst.outcomes.outcome import OutcomeCounts

    return [
        name,
        number(figures["mean"]),
        interval(figures["low"], figures["high"]),
        number(figures["best"]),
        interval(figures["best_low"], figures["best_high"]),
        f"{figures['problems']}/{figures['problems_of_split']}",
        str(figures["masked"]),
        str(OutcomeCounts.of(figures["lost"]).failed.total()),
    ]


def _losses(figures: Sequence[Figures]) -> Iterator[str]:
    """What was masked or failed, by reason."""
    from dspy_fst.outcomes.outcome import OutcomeCounts

    lost = sum((Counter(figure["lost"]) for figure in figures), Counter[str]())
    for outcome, count in OutcomeCounts.of(lost).items():
        rule = "measured nothing and are left out" if outcome.kind == "masked" else "are scored as failures"
        yield f"{count} rollouts {rule} ({outcome.label})"
