"""`dspy-fst show`: the tables of a run in the terminal, made of its record alone."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dspy_fst.cli.common import Debug, Json, errors_as_text
from dspy_fst.cli.show_samples import SAMPLES, show_samples

if TYPE_CHECKING:
    from dspy_fst.cli.printer import Printer
    from dspy_fst.report.lineage import Node
    from dspy_fst.report.run_record import RunRecord
    from dspy_fst.run.phase_reports import StepReport

SHOWN_STEPS = 20


def show(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run's directory.")],
    steps: Annotated[
        int | None, typer.Option(min=0, help=f"How many of the last steps; {SHOWN_STEPS}, or all with --json.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Show this many recorded rollouts instead, the newest last.")
    ] = None,
    failed: Annotated[bool, typer.Option("--failed", help="Show only samples that failed or were masked.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show a run's tables in the terminal, or sampled replies (--samples).

    Cycles, steps, predictors, population, costs and evaluations. The run may be under way or killed.
    """
    with errors_as_text(debug):
        from dspy_fst.report.from_directory import read_records

        (record,) = read_records([run_dir])
        if samples is not None or failed:
            show_samples(run_dir, record, samples or SAMPLES, failed=failed, as_json=as_json)
        elif as_json:
            typer.echo(json.dumps(summary(run_dir, record, record.steps if steps is None else _last(record, steps))))
        else:
            _print(run_dir, record, _last(record, SHOWN_STEPS if steps is None else steps))


def summary(run_dir: Path, record: "RunRecord", steps: Sequence["StepReport"]) -> dict[str, object]:
    """The same as JSON."""
    from dspy_fst.report.verdict import validation_figures

    return {
        "run_dir": str(run_dir.resolve()),
        "state": record.state,
        "steps_done": len(record.steps),
        "steps_planned": record.budget.get("updates"),
        "cycles": [{**asdict(cycle), "reward": _cycle_reward(record, cycle.cycle)} for cycle in record.cycles],
        "steps": [asdict(step) for step in steps],
        "predictors": [asdict(totals) for totals in record.predictors],
        "population": [
            {
                "digest": node.digest,
                "copies": copies,
                "score": node.last_score,
                "validation": node.validation,
                "born": node.born,
                "texts": dict(node.texts),
            }
            for node, copies in _members(record)
        ],
        "ending": record.ending.words,
        "ended": None if record.ended is None else asdict(record.ended),
        "validations": [validation_figures(record, state) for state in record.validations],
        "returned": None if record.returned is None else record.returned.index,
        "costs": {**asdict(record.costs), "rollouts": record.costs.rollouts, "tokens": record.costs.tokens},
        "warnings": [asdict(warning) for warning in record.warnings],
        "lost": dict(record.lost),
        "evaluations": [asdict(evaluation) for evaluation in record.evaluations],
        "two_by_two": _two_by_two(record),
    }


def _two_by_two(record: "RunRecord") -> dict[str, object] | None:
    """The newest two-by-two as JSON: its cells are keyed ``"seed/base"``, instructions first."""
    table = record.two_by_two
    return None if table is None else asdict(table) | {"cells": table.written}


def _last(record: "RunRecord", count: int) -> Sequence["StepReport"]:
    return record.steps[-count:] if count else ()


def _members(record: "RunRecord") -> list[tuple["Node", int]]:
    """Each candidate of the population once, best first, with its number of copies."""
    known = [digest for digest in dict.fromkeys(record.population) if digest in record.by_digest]
    return [(record.by_digest[digest], record.population.count(digest)) for digest in known]


def _cycle_reward(record: "RunRecord", cycle: int) -> float | None:
    """Mean reward of the cycle's steps."""
    rewards = [step.reward for step in record.steps if step.cycle == cycle and step.reward is not None]
    return sum(rewards) / len(rewards) if rewards else None


def _print(run_dir: Path, record: "RunRecord", steps: Sequence["StepReport"]) -> None:
    from dspy_fst.cli.printer import Printer
    from dspy_fst.report.step_options import option_lines

    out = Printer()
    out.line(f"{record.name}: {_state(run_dir, record)}")
    _print_validations(out, record)
    if record.cycles:
        out.heading("Cycles")
        out.table(*_cycles(record))
    if steps:
        out.heading("Steps" if len(steps) == len(record.steps) else f"Steps, the last {len(steps)} of {_all(record)}")
        out.table(*_steps(steps))
        for line in option_lines(steps):
            out.line(line)
        if record.config.get("kl_coefficient") == 0:
            out.line("KL is not measured under kl_coefficient=0, which leaves the reference model out.")
    if record.predictors:
        out.heading("Predictors, over all steps")
        out.table(*_predictors(record))
    if record.adapters:
        out.heading("LoRA adapters, over all steps")
        out.table(*_adapters(record))
    _print_population(out, record)
    out.heading("Costs")
    out.table(("what", "spent"), _costs(record))
    _print_trouble(out, record)
    _print_evaluations(out, record)
    _print_advice(out, run_dir, record)
    if record.ending.nothing_learned:
        out.heading("In short")
        out.line(record.ending.words)


def _print_advice(out: "Printer", run_dir: Path, record: "RunRecord") -> None:
    """How a run that ended early can go on."""
    from dspy_fst.run.ending import by_command_line

    if record.ended is None or record.ended.setting is None:
        return
    out.heading("To go on")
    for line in (record.ended.advice or "").splitlines():
        out.line(line)
    out.line(by_command_line(record.ended.setting, run_dir))


def _print_validations(out: "Printer", record: "RunRecord") -> None:
    from dspy_fst.report.verdict import validations_table, verdict

    out.line(f"validation: {verdict(record)}")
    if record.validations:
        table = validations_table(record)
        out.heading(table.title)
        out.table(table.columns, table.rows, words=table.words)


def _all(record: "RunRecord") -> str:
    return f"{len(record.steps)} (--steps {len(record.steps)} shows all)"


def _quoted(run_dir: Path) -> str:
    return shlex.quote(str(run_dir))


def _state(run_dir: Path, record: "RunRecord") -> str:
    planned = record.budget.get("updates")
    done = f"{len(record.steps)}" + (f" of {planned}" if planned is not None else "") + " steps are done"
    if record.state == "finished":
        nothing = f"; {record.ending.words}" if record.ending.nothing_learned else ""
        if record.ended is not None and record.ended.early:
            return f"finished early; {done}, weights {record.weights}; {record.ended.text}"
        return f"finished; {done}, weights {record.weights}{nothing}"
    if record.state == "running":
        return f"running; {done}"
    at = f"stopped at step {len(record.steps)}" if record.started is not None else "stopped before it wrote anything"
    if record.ended is not None and record.ended.kind == "nothing_learned":
        return f"{at}; {done}. {record.ended.text}"
    return f"{at}; {done}. To go on: dspy-fst resume {_quoted(run_dir)}"


def _cycles(record: "RunRecord") -> tuple[Sequence[str], list[list[str]]]:
    from dspy_fst.formatting.numbers import number

    columns = ("cycle", "rollouts", "repeats", "reflections", "accepted", "carried", "found", "population", "reward")
    rows = [
        [
            str(cycle.cycle),
            f"{cycle.rollouts:,}",
            f"{cycle.repeats:,}",
            str(cycle.reflections),
            str(cycle.proposals_accepted),
            number(carried),
            number(found),
            " ".join(map(number, cycle.scores)),
            number(_cycle_reward(record, cycle.cycle)),
        ]
        for cycle, carried, found in zip(record.cycles, record.carried, record.found, strict=True)
    ]
    return columns, rows


def _steps(steps: Sequence["StepReport"]) -> tuple[Sequence[str], list[list[str]]]:
    columns = ("step", "cycle", "reward", "KL", "KL seed", "entropy", "grad", "flat", "masked", "failed", "capped")
    return (*columns, "ESS", "tokens", "seconds"), [_step(step) for step in steps]


def _step(step: "StepReport") -> list[str]:
    from dspy_fst.formatting.numbers import DASH, number
    from dspy_fst.outcomes.outcome import OutcomeCounts

    update, lost = step.update, OutcomeCounts.of(step.counts)
    # An update of an empty batch measured nothing, whatever numbers it holds.
    measured = (update.kl_to_start, update.kl_under_seed, update.entropy, update.grad_norm)
    measures = measured if update.tokens else (None,) * len(measured)
    shares = (update.capped_share, update.effective_sample_share) if update.tokens else (None, None)
    return [
        str(step.step),
        str(step.cycle),
        number(step.reward),
        *map(number, measures),
        f"{step.counts.get('flat_groups', 0)}/{step.counts.get('groups', 0)}",
        str(lost.masked.total()),
        str(lost.failed.total()),
        *map(number, shares),
        "skipped" if update.skipped else f"{update.tokens:,}" if update.tokens else DASH,
        number(sum(seconds or 0.0 for seconds in step.seconds.values()), 1),
    ]


def _predictors(record: "RunRecord") -> tuple[Sequence[str], list[list[str]]]:
    from dspy_fst.formatting.numbers import DASH, number, plain, share, signed

    columns = ("predictor", "calls", "tokens", "cut off", "unparsed", "learnt", "positive", "advantage", "flat")
    rows = [
        [
            each.predictor,
            *map(plain, (each.calls, each.tokens, each.truncated, each.unparsed, each.rows, each.positive_rows)),
            signed(each.advantage),
            plain(each.flat_groups),
            " ".join(map(number, (each.scores[0], each.scores[-1]))) if each.scores else DASH,
            share(each.changed_alone, each.changed),
            signed(each.gain),
        ]
        for each in record.predictors
    ]
    return (*columns, "own score", "changed", "gain"), rows


def _adapters(record: "RunRecord") -> tuple[Sequence[str], list[list[str]]]:
    """What each learnt from, its mean gradient norm and its last distance from the start."""
    from dspy_fst.formatting.numbers import number

    rows = []
    for name in record.adapters:
        reports = [step.update.adapters[name] for step in record.steps if name in step.update.adapters]
        learnt, tokens = sum(report.rows for report in reports), sum(report.tokens for report in reports)
        grad = sum(report.grad_norm for report in reports) / len(reports)
        rows.append([name, f"{learnt:,}", f"{tokens:,}", number(grad), number(reports[-1].distance)])
    return ("adapter", "learnt", "tokens", "mean grad", "last KL"), rows


def _print_population(out: "Printer", record: "RunRecord") -> None:
    from dspy_fst.formatting.demo_texts import readable
    from dspy_fst.formatting.numbers import number

    members = _members(record)
    out.heading("Population")
    if not members:
        out.line("No search is over yet.")
    for node, copies in members:
        born = "from the start" if node.born is None else f"made in cycle {node.born}"
        score = f"score {number(node.last_score)}, validation {number(node.validation)}"
        out.line(f"{node.digest} x{copies}: {score}, {born}")
        for name, text in node.texts.items():
            out.line(f"  {name}: " + readable(name, text).replace("\n", "\n    "))


def _costs(record: "RunRecord") -> list[tuple[str, str]]:
    from dspy_fst.formatting.numbers import duration
    from dspy_fst.report.costs import PARTS, REFLECTION_LM, labels_of

    costs = record.costs
    rows = [(f"{'  ' * (name in PARTS)}{label}", f"{costs.count(name):,}") for name, label in labels_of(costs).items()]
    if costs.reflection_lm.calls:
        rows.append((REFLECTION_LM, costs.reflection_lm.words))
    return rows + [(f"time: {activity}", duration(seconds, 1)) for activity, seconds in costs.seconds.items()]


def _print_trouble(out: "Printer", record: "RunRecord") -> None:
    """Masked and failed rollouts by reason, and the warnings."""
    out.heading("Masked and failed rollouts")
    if not record.lost:
        out.line("None.")
    else:
        rollouts = record.costs.rollouts or 1
        rows = [(reason, f"{count:,}", f"{count / rollouts:.1%}") for reason, count in record.lost.items()]
        out.table(("reason", "rollouts", "share"), rows)
    out.heading("Warnings")
    for warning in record.warnings:
        out.line(("" if warning.step is None else f"after step {warning.step}: ") + warning.text)
    if not record.warnings:
        out.line("None.")


def _print_evaluations(out: "Printer", record: "RunRecord") -> None:
    from dspy_fst.formatting.numbers import interval, number, plain, share, with_error

    if not record.evaluations and record.two_by_two is None:
        return
    out.heading("Evaluations")
    for sentence in record.seen:
        out.line(sentence)
    if record.evaluations:
        columns = ("split", "candidate", "weights", "problems", "limit", "cycle", "seed", "k", "mean@k", "interval")
        rows = [
            [
                *map(plain, (each.split, each.candidate, each.weights)),
                share(each.problems, each.problems_of_split),
                *map(plain, (each.limit, each.cycle, each.seed, each.k)),
                number(each.mean),
                interval(each.low, each.high),
            ]
            for each in record.evaluations
        ]
        out.table(columns, rows, words=3)
    if table := record.two_by_two:
        out.line(f"instructions by weights, mean ± standard error: {table.words}")
        rows = [
            [row, *(with_error(*(table.at(row, column) or (None, None))) for column in table.columns)]
            for row in table.rows
        ]
        out.table(("instructions", *(f"{column} weights" for column in table.columns)), rows)
