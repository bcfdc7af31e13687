"""Whose code a command on a run works with: that of the run's own project file, of one that is named, or of flags.

Code is only taken from where the user says: from a project file of his, from a kept one that passes `kept_in`, or from
the working directory when a flag names it. Everything that is missing is told in one message, with its flag.
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
ProjectFile = Annotated[
    Path | None, typer.Option("--project", metavar="FILE", help="The project file; a run may have its own.")
]
FLAGS = {"inputs": "--input", "reflection_lm": "--reflection-lm"}
"""Setting -> its flag, where that is not the setting's own name."""
WHAT = {
    "program": f"--program {REFERENCE}, the program's class or a function that makes it",
    "metric": f"--metric {REFERENCE}",
    "trainset": f"--trainset {EXAMPLES}",
    "valset": f"--valset {EXAMPLES}",
    "inputs": "--input FIELD, what the program is given of a .jsonl file's examples",
    "propose": f"--reflection-lm NAME or --propose {REFERENCE}, who proposes texts",
}
"""Setting -> how it is asked for."""


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
        file: A project file that the user names.
        flags: Setting -> what a flag says of it, None where it is not given. With one given, no kept file is read.
        wanted: Settings that this command cannot do without.
        examples: What stands for the trainset where none is wanted and none is given: its problems are other answers of
            the right form.
        to_train: See `Recorded.project`.

    Raises:
        ConfigurationError: with everything that is missing, or because code would be taken from the run itself.
    """
    from dspy_fst.project.project_file import kept_in, load_project
    from dspy_fst.run.directory import PROJECT

    given = {setting: value for setting, value in flags.items() if value}
    if file is not None and given:
        names = ", ".join(FLAGS.get(name, f"--{name}") for name in given)
        raise ConfigurationError([f"--project and {names} both say what is meant; give one of them"])
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
    """A .jsonl file's path is the working directory's."""
    return str((here / value).resolve()) if isinstance(value, str) and value.endswith(".jsonl") else value


def asked_for(recorded: "Recorded", lacking: list[str], keeps: bool) -> str:
    """One sentence that names all that is missing, each with its flag.

    Args:
        keeps: Whether the run has a project file, which was passed over.
    """
    path = recorded.run_dir or recorded.path
    kept = "with a flag given, its project.yaml is not read" if keeps else "it keeps no project.yaml, Python made it"
    why = kept if recorded.run_dir else "a saved program names none"
    told = {"program": recorded.program, "metric": recorded.metric}
    asked = [WHAT[name] + (f" (the run says {told[name]})" if told.get(name) else "") for name in lacking]
    return f"{path} does not say whose code to run ({why}). Give --project FILE, or {'; '.join(asked)}"


def working_folder(out: Path, named: str) -> Path:
    """The working directory, unless that is part of what a command reads: it may be somebody else's.

    Raises:
        ConfigurationError: it is.
    """
    here = Path.cwd()
    if here.resolve().is_relative_to(out.resolve()):
        fault = (
            f"{named} would be looked for in {here}, which is part of {out}; if the code there is yours, say so with "
            "--project FILE"
        )
        raise ConfigurationError([fault])
    return here
