"""Where a command on a run takes its code from: the run's project file, a project file of the user, or flags.

Code is only imported from places that the user named: a project file of the user, a run's project file that passes
`kept_in`, or the working directory when a flag names a module there. One message lists everything that is missing, each
with its flag.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dspy_fst.errors import ConfigurationError

if TYPE_CHECKING:
    from dspy_fst.project.project_file import Project
    from dspy_fst.project.recorded import Recorded

REFERENCE, EXAMPLES = "MODULE:ATTRIBUTE", "MODULE:ATTRIBUTE|FILE.jsonl"
Program = Annotated[
    str | None,
    typer.Option(
        metavar=REFERENCE,
        help="The program's class, or a function that makes it. Modules are looked for in the working directory.",
    ),
]
Metric = Annotated[str | None, typer.Option(metavar=REFERENCE, help="The metric, where no project file names it.")]
Trainset = Annotated[str | None, typer.Option(metavar=EXAMPLES, help="The trainset, where no project file names it.")]
Valset = Annotated[str | None, typer.Option(metavar=EXAMPLES, help="The valset, where no project file names it.")]
Inputs = Annotated[
    list[str] | None, typer.Option("--input", metavar="FIELD", help="An input of a .jsonl file's examples; repeat it.")
]
ReflectionLM = Annotated[
    str | None, typer.Option("--reflection-lm", metavar="NAME", help="Who proposes, where no project file names it.")
]
Propose = Annotated[str | None, typer.Option(metavar=REFERENCE, help="A proposer that needs no LM.")]
Fast = Annotated[str | None, typer.Option(metavar=REFERENCE, help="The optimizer that searches in GEPA's place.")]
ProjectFile = Annotated[
    Path | None, typer.Option("--project", metavar="FILE", help="The project file; a run may have its own.")
]
FLAGS = {"inputs": "--input", "reflection_lm": "--reflection-lm"}
"""Setting -> its flag, where the flag has another name."""
WHAT = {
    "program": f"--program {REFERENCE}, the program's class or a function that makes it",
    "metric": f"--metric {REFERENCE}",
    "trainset": f"--trainset {EXAMPLES}",
    "valset": f"--valset {EXAMPLES}",
    "inputs": "--input FIELD, what the program is given of a .jsonl file's examples",
    "propose": f"--reflection-lm NAME or --propose {REFERENCE}, who proposes texts",
    "fast": f"--fast {REFERENCE}, the optimizer that searches in GEPA's place",
}
"""Setting -> its flag and what the flag means, for the message about missing settings."""


def project_for(
    recorded: "Recorded",
    file: Path | None,
    flags: Mapping[str, object],
    wanted: list[str],
    *,
    examples: str | None = None,
    to_train: bool = False,
) -> "Project":
    """The project that a command works with.

    Args:
        file: A project file that the user named.
        flags: Setting -> the value of its flag, None where it is not given. With any flag given, the run's own project
            file is not read.
        wanted: Settings that this command needs.
        examples: Used as the trainset where none is needed and none is given. A program that copies or compares answers
            finds answers of the right form there.
        to_train: See `Recorded.project`.

    Raises:
        ConfigurationError: settings are missing (all of them are named), or code would be taken from the run itself.
    """
    from dspy_fst.project.project_file import kept_in, load_project
    from dspy_fst.run.directory import PROJECT

    given: dict[str, object] = {setting: value for setting, value in flags.items() if value}
    if file is not None and given:
        names = ", ".join(FLAGS.get(name, f"--{name}") for name in given)
        raise ConfigurationError([f"--project and {names} exclude each other; give one or the other"])
    if file is not None:
        return load_project(file)
    keeps = recorded.run_dir is not None and (recorded.run_dir / PROJECT).is_file()
    if recorded.run_dir is not None and keeps and not given:
        return kept_in(recorded.run_dir)
    given.setdefault("trainset", given.get("valset") or examples)
    if any(str(given.get(name)).endswith(".jsonl") for name in ("trainset", "valset")):
        wanted = [*wanted, "inputs"]
    lacking = [name for name in wanted if not given.get(name) and not (name == "propose" and "reflection_lm" in given)]
    if lacking:
        raise ConfigurationError([asked_for(recorded, lacking, keeps)])
    here = working_folder(
        recorded.run_dir or recorded.path, ", ".join(value for value in given.values() if isinstance(value, str))
    )
    settings = {name: _absolute(value, here) for name, value in given.items()}
    return recorded.project(settings, here, to_train=to_train)


def _absolute(value: object, here: Path) -> object:
    """The value, with the path of a .jsonl file made absolute: it is relative to the working directory."""
    return str((here / value).resolve()) if isinstance(value, str) and value.endswith(".jsonl") else value


def asked_for(recorded: "Recorded", lacking: list[str], keeps: bool) -> str:
    """The message that names everything that is missing, each with its flag.

    Args:
        keeps: Whether the run has a project file that was not read.
    """
    path = recorded.run_dir or recorded.path
    kept = "with a flag given, its project.yaml is not read" if keeps else "it keeps no project.yaml, Python made it"
    why = kept if recorded.run_dir else "a saved program names none"
    known = {"program": recorded.program, "metric": recorded.metric}
    asked = [WHAT[name] + (f" (the run says {known[name]})" if known.get(name) else "") for name in lacking]
    return f"{path} does not say whose code to run ({why}). Give --project FILE, or {'; '.join(asked)}"


def working_folder(out: Path, named: str) -> Path:
    """The working directory, as the place to import modules from.

    Raises:
        ConfigurationError: it is part of what the command reads, which may come from somebody else.
    """
    here = Path.cwd()
    if here.resolve().is_relative_to(out.resolve()):
        fault = (
            f"{named} would be looked for in {here}, which is part of {out}; if the code there is yours, say so with "
            "--project FILE"
        )
        raise ConfigurationError([fault])
    return here
