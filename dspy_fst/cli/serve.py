"""`dspy-fst serve`: a compiled program over HTTP, until SIGTERM or Ctrl-C.

Either signal ends it in good order: nobody new is let in, who was let in gets an answer, the engine is released and
the exit code is 0. A second signal ends it at once, with the exit code that it gives every command.
"""

import importlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from dspy_fst.cli.common import Debug, errors_as_text
from dspy_fst.errors import ConfigurationError, RunDirectoryError
from dspy_fst.run.interrupts import Terminated, signals_raise
from dspy_fst.serve.settings import ChoiceName, ServeSettings

if TYPE_CHECKING:
    import dspy


def serve(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A compiled program's folder, or a run's directory.")],
    program: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:ATTRIBUTE",
            help="The program's class, or a function that makes it. Modules are looked for in the working directory.",
        ),
    ] = None,
    project: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The project file that names it; a run's directory has its own.")
    ] = None,
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
    max_in_flight: Annotated[int, typer.Option(help="Requests at work at once.")] = ServeSettings.max_in_flight,
    max_queue: Annotated[
        int, typer.Option(help="Requests that may wait; more are refused with 429.")
    ] = ServeSettings.max_queue,
    timeout: Annotated[float, typer.Option(help="Seconds from a request to its reply.")] = ServeSettings.timeout_s,
    drain: Annotated[
        float, typer.Option(help="Seconds in which requests may finish after SIGTERM.")
    ] = ServeSettings.drain_s,
    model_name: Annotated[
        str, typer.Option(help="The trained model's name at /v1/chat/completions.")
    ] = ServeSettings.model_name,
    debug: Debug = False,
) -> None:
    """Serve a compiled program: typed endpoint, event stream, chat endpoint of the trained model, metrics."""
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
        compiled, source = _found(out.resolve(), program, project)
        try:
            from dspy_fst.serve.app import create_app
            from dspy_fst.serve.run import serve as listen
        except ModuleNotFoundError as error:
            raise ConfigurationError([f"{error}; serving is an extra: pip install 'dspy-fst[serve]'"]) from error
        from dspy_fst.saved import load

        policy: dict[str, Any] = {} if engine is None else {"engine": engine}
        with _importable(source.folder):  # to the end: the program may import more when it is called
            listen(create_app(load(compiled, _made(source), **policy), settings), settings)


class _Source(NamedTuple):
    """Where a program's class comes from: the user's own code."""

    reference: str
    """``module:attribute``."""
    folder: Path
    """Where the module is looked for first."""


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    if not (key := os.environ.get(variable)):
        raise ConfigurationError([f"--api-key-env: the environment variable {variable} is not set"])
    return key


def _found(out: Path, program: str | None, project: Path | None) -> tuple[Path, _Source]:
    """The compiled folder, and what makes a fresh program of its class.

    Raises:
        ConfigurationError: nothing names the class, or it would be taken from OUT itself.
        RunDirectoryError: there is no compiled program.
    """
    from dspy_fst.run.directory import PROJECT

    run = next((folder for folder in (out, out.parent) if (folder / "recipe.json").is_file()), None)
    compiled = out / "compiled" if run == out else out
    if not compiled.is_dir():
        unfinished = f"{out} is a run that is not finished, or whose program was not saved; see dspy-fst resume"
        raise RunDirectoryError(unfinished if run == out else f"{out} is no folder; name what dspy_fst.save wrote")
    if program is not None and project is not None:
        raise ConfigurationError(["--program and --project both name the program; give one of them"])
    if project is not None:
        return compiled, _named_by(project)
    if program is not None:
        source = _Source(program, Path.cwd())
    elif run is not None and (run / PROJECT).is_file():
        source = _named_by(run / PROJECT)
    else:
        fault = f"{out} does not say which class its program is of: give --program module:attribute or --project FILE"
        raise ConfigurationError([fault])
    if source.folder.resolve().is_relative_to(run or out):
        fault = (  # OUT may be somebody else's, and what lies there would be run
            f"{source.reference} would be looked for in {source.folder}, which is part of OUT; if the code there is "
            "yours, say so with --project FILE"
        )
        raise ConfigurationError([fault])
    return compiled, source


def _named_by(file: Path) -> _Source:
    from dspy_fst.project import load_project

    project = load_project(file)
    return _Source(project.program, project.folder)


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:  # the program's code may have taken it away itself
            sys.path.remove(str(folder))


def _made(source: _Source) -> "dspy.Module":
    """A fresh program, with whatever frozen LMs its code gives it."""
    import dspy

    if not re.fullmatch(r"\w+(\.\w+)*:\w+", source.reference):
        raise ConfigurationError([f"program={source.reference!r}: write module:attribute, e.g. my_program:MyProgram"])
    module, _, attribute = source.reference.partition(":")
    try:
        value = getattr(importlib.import_module(module), attribute)
        program = value() if callable(value) and not isinstance(value, dspy.Module) else value
    except Terminated:  # SIGTERM came; that it is a SystemExit too does not make it the program's
        raise
    except (Exception, SystemExit) as error:
        words = f"{type(error).__name__}: {error}"
        raise ConfigurationError([f"program {source.reference}, looked for in {source.folder}: {words}"]) from error
    if not isinstance(program, dspy.Module):
        raise ConfigurationError([f"program {source.reference} gives {type(program).__name__}, not a dspy.Module"])
    return program
