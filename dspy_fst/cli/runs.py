"""`dspy-fst runs`: the runs below a folder, one line each."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dspy_fst.cli.common import Debug, Json, errors_as_text
from dspy_fst.errors import RunDirectoryError

if TYPE_CHECKING:
    from dspy_fst.report.listing import Listed

COLUMNS = ("run", "state", "recipe", "start", "end", "rollouts", "tokens", "hours", "$")


def runs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to look; the working directory.")] = Path(),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the runs below a folder.

    Each with its state, its recipe in short, its start and end score, and its costs. Runs of Python and of the command
    line are listed alike. A damaged run, which could not be continued, is listed with the reason.
    """
    with errors_as_text(debug):
        from dspy_fst.cli.printer import Printer
        from dspy_fst.report.listing import list_runs

        if not folder.is_dir():
            raise RunDirectoryError(f"{folder} is no folder")
        listing = list_runs(folder)
        if as_json:
            runs_below = [{**asdict(run), "path": str(run.path.resolve())} for run in listing.runs]
            typer.echo(json.dumps({"runs": runs_below, "not_read": listing.closed}))
            return
        out = Printer()
        if listing.runs:
            out.table(COLUMNS, [_row(folder, run) for run in listing.runs], words=3)
            out.line("start, end: validation scores, or with r the mean rewards of the first and the last step")
            for run in listing.runs:
                if run.state == "damaged":
                    out.line(f"damaged: {run.why}")
            if any(run.resumable and run.setting is None for run in listing.runs):
                out.line("to go on with one that can be resumed: dspy-fst resume RUN, or the same compile() in Python")
            if any(run.setting for run in listing.runs):
                out.line(
                    "to go on with one that ended early: raise the setting that it names in the recipe of its project "
                    "file, then dspy-fst run FILE, or dspy-fst resume RUN --project FILE; in Python the same compile() "
                    "with that setting raised"
                )
        else:
            out.line(f"there are no runs below {folder.resolve()}")
        for reason in listing.closed:
            out.line(f"not looked into: {reason}")


def _row(folder: Path, run: "Listed") -> list[str]:
    from dspy_fst.formatting.numbers import DASH, number

    mark = " r" if run.measured == "reward" else ""
    scores = [DASH if score is None else f"{number(score)}{mark}" for score in (run.start, run.end)]
    name = "." if run.path == folder else str(run.path.relative_to(folder))
    if run.state == "unreadable":
        return [name, _state(run), *[DASH] * (len(COLUMNS) - 2)]
    spent = [f"{run.rollouts:,}", f"{run.tokens:,}", number(run.hours, 2)]
    return [
        name,
        _state(run),
        run.recipe,
        *scores,
        *spent,
        ("at least " if run.dollars is not None and run.unpriced else "") + number(run.dollars, 2),
    ]


def _state(run: "Listed") -> str:
    """E.g. ``stopped at 3 of 8 (Ctrl-C), can be resumed``."""
    done = f"{run.steps} of {run.planned}" if run.planned is not None else f"{run.steps} steps"
    why = f" ({run.why})" if run.why else ""
    if run.state == "unreadable":
        return f"cannot be read{why}"
    if run.state == "damaged":
        return "damaged, see below"
    if run.state == "finished":
        came_to = f": {run.unmoved}" if run.unmoved else ""
        early = f"finished early at {done}{why}, raise {run.setting} to go on"
        return early if run.setting else f"finished, {done}{came_to}"
    if run.state == "running":
        return f"running, {done}"
    if run.setting:
        return f"stopped at {done}{why}, raise {run.setting} to go on"
    why = why or " (killed, or of an earlier release)"
    return f"stopped at {done}{why}, {'can be resumed' if run.resumable else 'nothing was saved'}"
