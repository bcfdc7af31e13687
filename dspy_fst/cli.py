"""The command line: `dspy-fst run`, `resume` and `report`.

Results go to stdout; progress, errors and whatever the project's own code prints go to stderr.
Heavy modules are imported inside the commands, so that help and usage errors come at once.
"""

import json
import shlex
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dspy_fst.errors import ConfigurationError, DiskError, FSTError, RunDirectoryError
from dspy_fst.run.interrupts import Terminated, interruption_named, signals_raise

if TYPE_CHECKING:
    from dspy_fst.project import Project

USAGE, FAILED, INTERRUPTED = 2, 1, 130
"""Exit codes: nothing was started; the run stopped and can be continued; Ctrl-C. SIGTERM gives 143."""

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
Json = Annotated[bool, typer.Option("--json", help="Print the outcome as one JSON object.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def main() -> None:
    """The entry point."""
    app(prog_name="dspy-fst")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dspy-fst {version('dspy-fst')}")
        raise typer.Exit


@app.callback()
def _options(
    shown: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fast-Slow Training for DSPy: a program's instructions and its local model's weights, together."""


@app.command()
def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The project: a YAML file.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train what a project file names. Running it again continues where it stopped."""
    with _errors_as_text(debug):
        from dspy_fst.project import load_project

        _train(load_project(file), as_json)


@app.command()
def resume(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The run's directory.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Continue a run from its directory alone."""
    with _errors_as_text(debug):
        from dspy_fst.project import load_project
        from dspy_fst.run.directory import PROJECT

        run_dir = run_dir.resolve()
        if not (run_dir / PROJECT).is_file():
            raise RunDirectoryError(_why_not_resumed(run_dir))
        outcome = _outcome(run_dir)
        if outcome is not None and Path(outcome["compiled"]).is_dir():
            typer.echo(f"{run_dir} is finished", err=True)
            _show(outcome, as_json)
            return
        # The directory may have been moved since: it is the one that was named now.
        _train(load_project(run_dir / PROJECT).model_copy(update={"run_dir": str(run_dir)}), as_json)


@app.command()
def report(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Runs; several are compared.")],
    out: Annotated[Path, typer.Option(help="Where the page goes.")] = Path("report.html"),
    plots: Annotated[Path | None, typer.Option(help="A folder for the charts as SVG and PNG files.")] = None,
    debug: Debug = False,
) -> None:
    """Write one self-contained HTML page about runs that are finished, under way or were killed."""
    with _errors_as_text(debug):
        try:
            from dspy_fst.report.charts import save_plots
            from dspy_fst.report.page import build_report
        except ImportError as error:
            raise ConfigurationError([str(error)]) from error

        typer.echo(f"the report is {build_report(run_dirs, out)}")
        if plots is not None:
            save_plots(run_dirs, plots)
            typer.echo(f"the charts are in {plots}")


def _why_not_resumed(run_dir: Path) -> str:
    if not (run_dir / "recipe.json").is_file():
        return f"{run_dir} is not the directory of a run that has started; start one with dspy-fst run FILE"
    if not any((run_dir / "states").glob("[0-9]*")):
        return f"{run_dir}: nothing was saved there yet; start it again with dspy-fst run FILE"
    return (
        f"{run_dir} holds no project.yaml, so it was not started by dspy-fst run. Go on from Python: "
        f"FSTOptimizer(run_dir={str(run_dir)!r}, ...).compile(...) with the same recipe, program and examples"
    )


def _train(project: "Project", as_json: bool) -> None:
    """Compile what the project names, save the compiled program beside the run and show the outcome."""
    run_dir = project.run_path
    typer.echo("reading the project", err=True)

    def keep(event: Mapping[str, Any]) -> None:
        if event["event"] == "plan":  # all is checked, nothing is spent: a refused run leaves nothing behind
            project.keep()

    # The project stays importable to the end: its functions may import more when they are called.
    with _told_how_to_go_on(run_dir), signals_raise(), redirect_stdout(sys.stderr), project.importable():
        from dspy_fst.saved import policy_of, save

        opened = project.open(listeners=[keep])
        compiled = opened.optimizer.compile(opened.program, trainset=opened.trainset, valset=opened.valset)
        try:
            if not (run_dir / "compiled").exists():
                save(compiled, run_dir / "compiled")
        finally:
            policy_of(compiled).release()
    outcome = _outcome(run_dir)
    assert outcome is not None, "a compiled run ends with its outcome"
    _show(outcome, as_json)


def _outcome(run_dir: Path) -> dict[str, Any] | None:
    """What a finished run came to, as its events tell; None while it is not finished."""
    from dspy_fst.run.directory import read_events

    events = read_events(run_dir)
    if not events or events[-1]["event"] != "done":
        return None
    done = events[-1]
    members = zip(done["population"]["members"], done["population"]["scores"], strict=True)
    return {
        "run_dir": str(run_dir),
        "steps": sum(event["event"] == "step" for event in events),
        "population": [{"score": score, "texts": texts} for texts, score in members],
        "validation": done["validation"],
        "weights": str(run_dir / "weights" / done["weights"]),
        "compiled": str(run_dir / "compiled"),
    }


def _show(outcome: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(outcome))
        return
    best = outcome["population"][0]
    score = "" if best["score"] is None else f", score {best['score']:.3f}"
    typer.echo(f"{outcome['steps']} weight updates; weights in {outcome['weights']}")
    typer.echo(f"best candidate{score}:")
    for name, text in best["texts"].items():
        typer.echo(f"  {name}: {text}")
    typer.echo(f"the compiled program is in {outcome['compiled']}; dspy_fst.load reads it")


@contextmanager
def _told_how_to_go_on(run_dir: Path) -> Iterator[None]:
    """What stops a run that was under way says how to continue it."""
    try:
        yield
    except BaseException as error:
        if _exit_code(error) == USAGE:
            raise
        if (run_dir / "project.yaml").is_file():
            error.add_note(f"The run can be continued: dspy-fst resume {shlex.quote(str(run_dir))}")
        elif interruption_named(error):
            error.add_note("Nothing was saved yet; the same command starts it again")
        raise


@contextmanager
def _errors_as_text(debug: bool) -> Iterator[None]:
    """Errors that a user can meet become text and an exit code. Anything else is a bug and keeps its traceback."""
    try:
        yield
    except (FSTError, KeyboardInterrupt, Terminated) as error:
        if debug:
            traceback.print_exc()
        interruption = interruption_named(error)
        text = f"stopped by {interruption}" if interruption else str(error)
        typer.echo("\n".join([text, *getattr(error, "__notes__", ())]), err=True)
        if isinstance(error, Terminated):
            raise
        raise typer.Exit(_exit_code(error)) from None


def _exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, DiskError):
        return FAILED
    return USAGE if isinstance(error, ConfigurationError | RunDirectoryError) else FAILED


if __name__ == "__main__":
    main()
