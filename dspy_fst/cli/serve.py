"""`dspy-fst serve`: a compiled program over HTTP, until SIGTERM or Ctrl-C.

The first signal ends it in good order: new requests are refused, accepted requests are answered, the engine is released
and the exit code is 0. A second signal ends it at once, with the exit code that it gives every command.
"""

import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from dspy_fst.cli.code_source import Program, ProjectFile, asked_for, working_folder
from dspy_fst.cli.common import Debug, TrustCode, errors_as_text
from dspy_fst.errors import ConfigurationError, RunDirectoryError
from dspy_fst.run.interrupts import signals_raise
from dspy_fst.serve.serving_settings import ChoiceName, ServeSettings

if TYPE_CHECKING:
    from dspy_fst.project.project_file import Project


def serve(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A compiled program's folder, or a run's directory.")],
    program: Program = None,
    project: ProjectFile = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = ServeSettings.host,
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = ServeSettings.port,
    api_key_env: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Environment variable that holds the callers' key; without it a random one is printed to stderr.",
        ),
    ] = None,
    no_key: Annotated[
        bool, typer.Option("--no-key", help="Let everybody on this machine in; for loopback addresses only.")
    ] = False,
    signature: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Inputs and outputs, where they cannot be read from the program."),
    ] = None,
    choice: Annotated[
        ChoiceName, typer.Option(help="Who answers: the best on validation, one at random, or all by majority.")
    ] = ServeSettings.choice,
    vote_on: Annotated[
        str | None, typer.Option(metavar="FIELD", help="The output that a majority must agree on.")
    ] = None,
    engine: Annotated[
        Literal["auto", "vllm", "in_process"] | None, typer.Option(help="Instead of the one it was compiled with.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Of sampling, instead of the training's; 0 is greedy.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest reply in tokens, instead of the training's.")] = None,
    json_fallback: Annotated[
        bool,
        typer.Option("--json-fallback", help="Ask again in JSON where a reply does not parse; training never does."),
    ] = False,
    max_in_flight: Annotated[int, typer.Option(help="Requests at work at once.")] = ServeSettings.max_in_flight,
    max_queue: Annotated[
        int, typer.Option(help="Requests that may wait; more are refused with 429.")
    ] = ServeSettings.max_queue,
    timeout: Annotated[float, typer.Option(help="Seconds from a request to its reply.")] = ServeSettings.timeout_s,
    drain: Annotated[
        float, typer.Option(help="Seconds in which requests may finish after SIGTERM.")
    ] = ServeSettings.drain_s,
    model_name: Annotated[
        str, typer.Option(help="The trained model's name at /v1/chat/completions, where there is one.")
    ] = ServeSettings.model_name,
    trust_code: TrustCode = False,
    debug: Debug = False,
) -> None:
    """Serve a compiled program over HTTP.

    A typed endpoint with an event stream, the trained model's chat endpoint, health and metrics. Ctrl-C and SIGTERM let
    requests finish first.
    """
    with errors_as_text(debug), signals_raise(), redirect_stdout(sys.stderr):
        settings = ServeSettings(
            host=host,
            port=port,
            api_key=_key(api_key_env),
            no_key=no_key,
            signature=signature,
            choice=choice,
            vote_on=vote_on,
            max_in_flight=max_in_flight,
            max_queue=max_queue,
            timeout_s=timeout,
            drain_s=drain,
            model_name=model_name,
        )
        compiled, source = _locate(out.resolve(), program, project)
        typer.echo("reading the program", err=True)
        try:
            from dspy_fst.serve.app import create_app
            from dspy_fst.serve.listening import serve as listen
        except ModuleNotFoundError as error:
            raise ConfigurationError([f"{error}; serving is an extra: pip install 'dspy-fst[serve]'"]) from error
        from dspy_fst.monitoring.progress import without_loading_bars
        from dspy_fst.project.names import importable, make_program
        from dspy_fst.saving.reconfigure import how_it_asks
        from dspy_fst.saving.save_load import load

        flags = {"engine": engine, "temperature": temperature, "max_tokens": max_tokens}
        policy: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
        if json_fallback:
            policy["use_json_adapter_fallback"] = True
        with (
            without_loading_bars(),
            importable(source.folder),
        ):  # until the end: the program may import more modules when it is called
            loaded = load(compiled, make_program(*source), trust_code=trust_code, **policy)
            typer.echo(f"asking the model {how_it_asks(loaded)}", err=True)
            listen(create_app(loaded, settings), settings)


class _Source(NamedTuple):
    """Where the class of a program is imported from: code of the user."""

    reference: str
    """``module:attribute``."""
    folder: Path
    """Folder that is searched for the module first."""


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    if not (key := os.environ.get(variable)):
        raise ConfigurationError([f"--api-key-env: the environment variable {variable} is not set"])
    return key


def _locate(out: Path, program: str | None, project: Path | None) -> tuple[Path, _Source]:
    """The compiled folder, and where the class of its program is imported from.

    Raises:
        ConfigurationError: nothing names the class, or it would be imported from OUT itself.
        RunDirectoryError: there is no compiled program.
    """
    from dspy_fst.project.project_file import kept_in, load_project
    from dspy_fst.project.recorded import Recorded
    from dspy_fst.run.directory import COMPILED, PROJECT, is_run
    from dspy_fst.run.ending import why_no_program

    run = next((folder for folder in (out, out.parent) if is_run(folder)), None)
    compiled = out / COMPILED if run == out else out
    if not compiled.is_dir():
        nothing = f"{out} is no folder; name what dspy_fst.save wrote"
        raise RunDirectoryError(why_no_program(out) if run == out else nothing)
    if program is not None and project is not None:
        raise ConfigurationError(["--program and --project both name the program; give one of them"])
    if project is not None:
        return compiled, _source(load_project(project))
    if program is not None:
        return compiled, _Source(program, working_folder(run or out, program))
    if run is not None and (run / PROJECT).is_file():
        return compiled, _source(kept_in(run))
    raise ConfigurationError([asked_for(Recorded(out, run), ["program"], keeps=False)])


def _source(project: "Project") -> _Source:
    return _Source(project.program, project.folder)
