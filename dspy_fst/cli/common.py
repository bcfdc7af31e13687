"""Shared by the commands: options, exit codes, and errors as text."""

import shlex
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from dspy_fst.errors import ConfigurationError, DiskError, FSTError, NothingLearnedError, RunDirectoryError
from dspy_fst.run.interrupts import Terminated, interruption_named

USAGE, FAILED, INTERRUPTED = 2, 1, 130
"""Exit codes: nothing was started; the run stopped and can be continued; Ctrl-C. SIGTERM gives 143."""

Json = Annotated[bool, typer.Option("--json", help="Print the outcome as one JSON object.")]
TrustCode = Annotated[
    bool, typer.Option("--trust-code", help="Run dspy.Flex sources that are not the program's own: evolution's.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@contextmanager
def told_how_to_go_on(run_dir: Path) -> Iterator[None]:
    """A block that adds to every error of a running run how to continue it."""
    try:
        yield
    except BaseException as error:
        if _exit_code(error) == USAGE:
            raise
        if isinstance(error, NothingLearnedError):
            from dspy_fst.run.ending import by_command_line

            error.add_note(by_command_line("max_unmoved_steps", run_dir))
        elif (run_dir / "project.yaml").is_file():
            error.add_note(f"The run can be continued: dspy-fst resume {shlex.quote(str(run_dir))}")
        elif interruption_named(error):
            error.add_note("Nothing was saved yet; the same command starts it again")
        raise


@contextmanager
def errors_as_text(debug: bool) -> Iterator[None]:
    """A block in which expected errors become text and an exit code. Anything else is a bug and keeps its traceback."""
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
