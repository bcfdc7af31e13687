"""`dspy-fst init`: a small project to start from, copied from dspy_fst/templates."""

import json
import shlex
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Annotated, Literal

import typer

import dspy_fst
from dspy_fst.cli.common import Debug, Json, errors_as_text
from dspy_fst.errors import ConfigurationError

Example = Literal["own", "lab"]
PROPOSERS = {"own": "my_program:propose", "lab": "lab_program:propose"}
"""Example -> its proposer, a function that needs no LM."""
USUAL_MODEL = "Qwen/Qwen3-0.6B"
LAB = Path("programs") / "lab"


def init(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the files go; it is made if need be.")],
    example: Annotated[
        Example, typer.Option(help="own: to become your task. lab: the clone's laboratory, trained within a minute.")
    ] = "own",
    model: Annotated[
        str | None, typer.Option(metavar="PATH_OR_NAME", help="The local model to train: a folder or a hub name.")
    ] = None,
    reflection_lm: Annotated[
        str | None, typer.Option(metavar="NAME", help="The strong LM that proposes instructions, e.g. openai/gpt-5.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a small, commented project.

    Nothing is ever overwritten.
    """
    with errors_as_text(debug):
        folder = folder.expanduser().resolve()
        _refuse_a_run(folder)
        written = _write(folder, example, _settings(example, model, reflection_lm))
        project = folder / "project.yaml"
        if as_json:
            typer.echo(json.dumps({"folder": str(folder), "project": str(project), "files": written}))
            return
        typer.echo(f"wrote {', '.join(written)} into {folder}")
        typer.echo(f"next: dspy-fst check {shlex.quote(str(project))}")


def _refuse_a_run(folder: Path) -> None:
    """
    Raises:
        ConfigurationError: the folder is a run's directory, or lies in one.
    """
    from dspy_fst.run.directory import is_run, run_around

    if run := folder if is_run(folder) else run_around(folder):
        raise ConfigurationError([f"{folder}: it lies in the run {run}, which is no place for a project; name another"])


def _settings(example: Example, model: str | None, reflection_lm: str | None) -> dict[str, str]:
    """The values that fill the templates. They are JSON texts: no character of a name can break the YAML.

    Raises:
        ConfigurationError: the laboratory was asked for outside of a clone.
    """
    clone = _clone() if example == "lab" else None
    if model is None:
        model = str(clone / LAB / "base") if clone else USUAL_MODEL
    elif Path(model).expanduser().is_dir():  # the path is relative to here, and the project lies elsewhere
        model = str(Path(model).expanduser().resolve())
    return {
        "clone": json.dumps(str(clone))[1:-1],  # within quotes, in Python
        "model": json.dumps(model, ensure_ascii=False),
        "reflection_lm": json.dumps(reflection_lm, ensure_ascii=False),
        "propose": json.dumps(None if reflection_lm else PROPOSERS[example]),
    }


def _clone() -> Path:
    """The clone with the laboratory: the one that this package runs from, or the working directory."""
    for folder in (Path(dspy_fst.__file__).parent.parent, Path.cwd()):
        if (folder / LAB / "base" / "config.json").is_file():
            return folder.resolve()
    raise ConfigurationError(
        ["--example lab: the laboratory is part of a clone of dspy_fst; run this there, or use --example own"]
    )


def _write(folder: Path, example: Example, settings: dict[str, str]) -> list[str]:
    """Write the example's files and return their names.

    Raises:
        ConfigurationError: a file exists already, or the folder cannot be written.
    """
    template = files("dspy_fst") / "templates" / example
    texts = {entry.name: entry.read_text("utf-8") for entry in template.iterdir() if entry.is_file()}
    if there := sorted(name for name in texts if (folder / name).exists() or (folder / name).is_symlink()):
        raise ConfigurationError(
            [f"{folder}: {', '.join(there)} would be overwritten; name another folder, or move what is there"]
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            filled = text if name.endswith(".jsonl") else Template(text).substitute(settings)
            with (folder / name).open("x", encoding="utf-8") as file:
                file.write(filled)
    except OSError as error:
        raise ConfigurationError([f"{folder}: nothing can be written there ({error}); name another folder"]) from error
    return sorted(texts)
