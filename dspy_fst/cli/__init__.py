"""The command line: `dspy-fst COMMAND`, one module for each group of commands.

Results go to stdout; progress, errors and whatever the project's own code prints go to stderr.
Heavy modules are imported inside the commands, so that help and usage errors appear at once.
"""

import os
from importlib.metadata import version
from typing import Annotated

import typer

from dspy_fst.cli.check import check
from dspy_fst.cli.doctor import doctor
from dspy_fst.cli.evaluate import eval
from dspy_fst.cli.export_folder import export
from dspy_fst.cli.init import init
from dspy_fst.cli.plan import plan
from dspy_fst.cli.report import report
from dspy_fst.cli.runs import runs
from dspy_fst.cli.serve import serve
from dspy_fst.cli.show import show
from dspy_fst.cli.sizes import sizes
from dspy_fst.cli.train import resume, run
from dspy_fst.engine.machine import Launch

OF_ALL_RANKS = ("run", "resume")
"""Commands that all processes of a launcher take part in; every other one is rank 0's alone."""
app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


def main() -> None:
    """The entry point."""
    # Idle threads of torch that spin take the cores of the program's threads and of vLLM; read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app(prog_name="dspy-fst")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dspy-fst {version('dspy-fst')}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    shown: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fast-Slow Training for DSPy: a program's instructions and its local model's weights, together."""
    if Launch.of().rank and context.invoked_subcommand not in OF_ALL_RANKS:
        raise typer.Exit


for command in (init, check, sizes, plan, doctor, run, resume, runs, show, eval, export, report, serve):
    app.command()(command)
