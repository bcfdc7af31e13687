"""`dspy-fst report`: one HTML page about runs, and their charts as files."""

import json
from pathlib import Path
from typing import Annotated

import typer

from dspy_fst.cli.common import Debug, Json, errors_as_text
from dspy_fst.errors import ConfigurationError


def report(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Runs; several are compared.")],
    out: Annotated[Path, typer.Option(help="Where the page goes.")] = Path("report.html"),
    plots: Annotated[Path | None, typer.Option(help="A folder for the charts as SVG and PNG files.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write one HTML page about runs.

    The page is self-contained. The runs may be under way or killed.
    """
    with errors_as_text(debug):
        if plots is not None and plots.exists() and not plots.is_dir():
            raise ConfigurationError([f"--plots: {plots} is a file; name a folder that can be written"])
        try:
            from dspy_fst.report.charts import save_plots
            from dspy_fst.report.page import build_report
        except ImportError as error:
            raise ConfigurationError([str(error)]) from error

        page = build_report(run_dirs, out)
        if plots is not None:
            try:
                save_plots(run_dirs, plots)
            except OSError as error:
                fault = f"--plots: {plots} cannot be written: {error}; name a folder that can be written"
                raise ConfigurationError([fault]) from error
        if as_json:
            typer.echo(json.dumps({"report": str(page), "plots": None if plots is None else str(plots)}))
            return
        typer.echo(f"the report is {page}")
        if plots is not None:
            typer.echo(f"the charts are in {plots}")
