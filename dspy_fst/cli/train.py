"""`dspy-fst run` and `dspy-fst resume`."""

import json
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypedDict

import typer

from dspy_fst.cli.code_source import (
    Fast,
    Inputs,
    Metric,
    Program,
    ProjectFile,
    Propose,
    ReflectionLM,
    Trainset,
    Valset,
    project_for,
)
from dspy_fst.cli.common import Debug, Json, TrustCode, errors_as_text, told_how_to_go_on
from dspy_fst.errors import ConfigurationError, RunDirectoryError
from dspy_fst.formatting.numbers import counted, number
from dspy_fst.run.ending import StopReason
from dspy_fst.run.interrupts import signals_raise
from dspy_fst.slow.ranks.joining import obey_unless_first

if TYPE_CHECKING:
    from dspy_fst.project.project_file import Project
    from dspy_fst.report.verdict import ValidationFigures
    from dspy_fst.run.directory import Event

Track = Annotated[
    list[str] | None,
    typer.Option("--track", metavar="NAME", help="Log to this tracker, e.g. tensorboard; repeat it for several."),
]

Ranks = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Train with N processes: this one, and the others on the Ray cluster."),
]

Samples = Annotated[bool, typer.Option("--samples", help="Show one sampled reply after each step.")]


OF_LORA_ADAPTERS = ("adapter", "adapters", "quantized_base")
"""Settings that mean nothing where all weights are trained; ``--adapter none`` replaces them all."""


class Member(TypedDict):
    """A candidate of the final population."""

    score: float | None
    texts: dict[str, str]


class TrainOutcome(TypedDict):
    """The result of a finished run; with ``--json`` these are the keys."""

    run_dir: str
    steps: int
    updates: int
    """Steps that moved the weights."""
    ending: str
    nothing_learned: bool
    ended: dict[str, object] | None
    """The fields of `dspy_fst.run.ending.StopReason`; None for a run of an older release."""
    population: list[Member]
    """Best first."""
    validation: dict[str, float | None]
    """Digest -> score of the final population."""
    start_and_end: str
    validations: "list[ValidationFigures]"
    returned: int | None
    """Index of the validated state that compile() returned."""
    weights: str
    compiled: str


def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The project: a YAML file, or the folder of one.")],
    continue_from: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="A finished run, or a saved program, to go on from in a new --run-dir."),
    ] = None,
    new_run_dir: Annotated[
        Path | None, typer.Option("--run-dir", metavar="DIR", help="Instead of the project's.")
    ] = None,
    cycles: Annotated[int | None, typer.Option(min=1, help="Instead of the recipe's.")] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            metavar="LORA",
            help="Train a LoRA adapter: 'lora', or its settings as JSON, e.g. '{\"rank\": 16}'; 'none': all weights, "
            "without the file's adapters and quantized_base.",
        ),
    ] = None,
    loss: Annotated[
        str | None, typer.Option(metavar="NAME", help="Loss of the weight updates, e.g. grpo, instead of the recipe's.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Run programs and metrics on this Ray cluster: HOST:PORT of its head, auto or local.",
        ),
    ] = None,
    ranks: Ranks = None,
    track: Track = None,
    samples: Samples = False,
    trust_code: TrustCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train what a project file names.

    The same command again continues a run that stopped. More cycles after a finished run are a new run:
    --continue-from RUN --run-dir NEW.
    """
    with errors_as_text(debug):
        obey_unless_first()
        from dspy_fst.project.project_file import kept_in, load_project
        from dspy_fst.run.directory import PROJECT

        project = _with_samples(_with_trackers(load_project(file), track), samples)
        changes = {"cycles": cycles, "adapter": _adapter(adapter), "loss": loss, "ray": ray, "ranks": ranks}
        project = _changed(project, continue_from, new_run_dir, changes)
        run_dir = project.run_path
        if (
            (run_dir / PROJECT).is_file()
            and _same(kept_in(run_dir), project)
            and _shown_when_finished(run_dir, as_json)
        ):
            return
        _train(project, as_json, trust_code=trust_code)


def resume(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The run's directory.")],
    project: ProjectFile = None,
    program: Program = None,
    metric: Metric = None,
    trainset: Trainset = None,
    valset: Valset = None,
    inputs: Inputs = None,
    reflection_lm: ReflectionLM = None,
    propose: Propose = None,
    fast: Fast = None,
    track: Track = None,
    samples: Samples = False,
    trust_code: TrustCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Continue a run from its directory alone.

    A run that was started in Python needs the flags that say where its code and examples are. A run that ended early
    goes on with --project FILE, in whose recipe the setting that ended it is raised.
    """
    with errors_as_text(debug):
        obey_unless_first()
        from dspy_fst.project.recorded import Recorded
        from dspy_fst.run.directory import PROJECT

        run_dir = run_dir.resolve()
        if not (run_dir / PROJECT).is_file():
            _refuse_unstarted(run_dir)
        if project is None and _shown_when_finished(run_dir, as_json):
            return
        flags = {"program": program, "metric": metric, "trainset": trainset, "valset": valset, "inputs": inputs}
        flags |= {"reflection_lm": reflection_lm, "propose": propose, "fast": fast}
        recorded = Recorded(run_dir, run_dir)
        chosen = project_for(recorded, project, flags, recorded.wanted_to_train, to_train=True)
        # The directory may have been moved since the run began, so the path given now counts.
        chosen = chosen.model_copy(update={"run_dir": str(run_dir)})
        if project is not None and _changes_nothing(run_dir, chosen) and _shown_when_finished(run_dir, as_json):
            return
        _train(
            _with_samples(_with_trackers(chosen, track), samples), as_json, going_on_in=run_dir, trust_code=trust_code
        )


def _same(kept: "Project", given: "Project") -> bool:
    """Whether both projects are the same run. Settings that only watch a run may differ."""
    ignored = {"track", "run_dir", "show_samples"}
    return kept.model_dump(exclude=ignored) == given.model_dump(exclude=ignored)


def _changes_nothing(run_dir: Path, given: "Project") -> bool:
    """Whether the project is the one in the run's directory.

    False where the directory holds none, or one that may not be used: training then decides.
    """
    from dspy_fst.project.project_file import kept_in
    from dspy_fst.run.directory import PROJECT

    try:
        return (run_dir / PROJECT).is_file() and _same(kept_in(run_dir), given)
    except ConfigurationError:
        return False


def _shown_when_finished(run_dir: Path, as_json: bool) -> bool:
    """Show the outcome of a finished run. Returns False when the run is not finished."""
    from dspy_fst.run.directory import read_events
    from dspy_fst.run.ending import stop_reason_in

    outcome = _outcome(run_dir)
    if outcome is None or not Path(outcome["compiled"]).is_dir():
        return False
    typer.echo(_finished(run_dir, stop_reason_in(read_events(run_dir))), err=True)
    _show(outcome, as_json)
    return True


def _finished(run_dir: Path, ended: StopReason | None) -> str:
    """That there is nothing to do, and how a run that ended early can go on."""
    from dspy_fst.run.ending import by_command_line

    if ended is None or ended.setting is None:
        return f"{run_dir} is finished; to train anew name another run_dir"
    how = by_command_line(ended.setting, run_dir)
    return f"{run_dir} is finished: it ended early, after step {ended.step}. {ended.text}.\n{how}"


def _with_trackers(project: "Project", track: list[str] | None) -> "Project":
    """The project with these trackers in place of its own; unchanged where none is given."""
    return project.model_copy(update={"track": track}) if track else project


def _adapter(given: str | None) -> object:
    """The setting ``adapter`` of the command line; None where it is not given."""
    if given is None or given in ("lora", "none"):
        return given
    try:
        read = json.loads(given)
        return "none" if read is None else read
    except ValueError:
        raise ConfigurationError([f"--adapter {given}: use lora, none, or JSON, e.g. '{{\"rank\": 16}}'"]) from None


def _changed(
    project: "Project", continue_from: Path | None, run_dir: Path | None, recipe: Mapping[str, object]
) -> "Project":
    """The project with the settings of the command line. Paths are relative to the working directory.

    Args:
        recipe: Setting of the recipe -> value; None leaves the project's.
    """
    from pydantic import ValidationError

    from dspy_fst.config import make_config
    from dspy_fst.project.project_file import Recipe
    from dspy_fst.recipe.declared import sentences

    paths = {"continue_from": continue_from, "run_dir": run_dir}
    changes: dict[str, object] = {name: str(path.resolve()) for name, path in paths.items() if path is not None}
    if given := {name: value for name, value in recipe.items() if value is not None}:
        replaced = {"auto"} if "cycles" in given else set()
        kept = project.recipe.model_dump(exclude_unset=True, exclude=replaced) if project.recipe else {}
        if given.get("adapter") == "none":
            given["adapter"] = None
            kept = {name: value for name, value in kept.items() if name not in OF_LORA_ADAPTERS}
        if faults := make_config(given)[1]:
            raise ConfigurationError([f"--{fault}" for fault in faults])
        try:
            changes["recipe"] = Recipe.model_validate({**kept, **given})
        except ValidationError as error:  # the two are right alone, and not together
            flags = ", ".join(f"--{name}" for name in given)
            raise ConfigurationError([f"{flags} beside the file: {fault}" for fault in sentences(error)]) from None
    return project.model_copy(update=changes)


def _with_samples(project: "Project", samples: bool) -> "Project":
    """The project that shows samples, if they are wanted; else unchanged."""
    return project.model_copy(update={"show_samples": True}) if samples else project


def _refuse_unstarted(run_dir: Path) -> None:
    from dspy_fst.run.directory import is_run

    if not is_run(run_dir):
        raise RunDirectoryError(
            f"{run_dir} is not the directory of a run that has started; start one with dspy-fst run FILE"
        )
    if not any((run_dir / "states").glob("[0-9]*")):
        raise RunDirectoryError(
            f"{run_dir}: nothing was saved there yet; start it again with dspy-fst run FILE, or compile() in Python"
        )


def _train(project: "Project", as_json: bool, *, going_on_in: Path | None = None, trust_code: bool = False) -> None:
    """Compile what the project names and show the outcome.

    Args:
        going_on_in: The directory of the run to continue. It may come from somebody else.
        trust_code: Execute program sources from that directory, or from the program that the run continues from.
    """
    run_dir = project.run_path
    typer.echo("reading the project", err=True)

    def keep(event: "Event") -> None:
        if event["event"] == "plan":  # every check has passed and nothing is spent: a refused run leaves nothing behind
            project.keep()

    # The project stays importable to the end: its functions may import more modules when they are called.
    with told_how_to_go_on(run_dir), signals_raise(), redirect_stdout(sys.stderr), project.importable():
        from dspy_fst.policy_lm import policy_of
        from dspy_fst.rollout.components import flexes
        from dspy_fst.run.directory import COMPILED

        opened = project.open(listeners=[keep], trust_code=trust_code)
        if going_on_in is not None and not trust_code and flexes(opened.program):
            raise RunDirectoryError(
                f"{going_on_in}: the program has a dspy.Flex, and going on runs the sources that the directory holds. "
                "Read them there (in states/, populations/ and search.jsonl); if you trust them: --trust-code. "
                "`dspy-fst run` of your own project file goes on without asking"
            )
        compiled = opened.optimizer.compile(
            opened.program, trainset=opened.trainset, valset=opened.valset, teacher=opened.teacher
        )
        policy_of(compiled).release()
    if not (run_dir / COMPILED).is_dir():
        raise RunDirectoryError(
            f"{run_dir}: the run is done, but its program could not be saved there: the last warning above says why. "
            "Mend that and give the same command again; nothing is trained anew"
        )
    outcome = _outcome(run_dir)
    assert outcome is not None, "a compiled run ends with its outcome"
    _show(outcome, as_json)


def _outcome(run_dir: Path) -> TrainOutcome | None:
    """The outcome according to the run's events; None while the run is not finished."""
    from dspy_fst.report.from_events import record_of
    from dspy_fst.report.verdict import validation_figures, verdict
    from dspy_fst.run.directory import COMPILED, read_events

    events = read_events(run_dir)
    # A run that goes on after its end removes this event.
    done = next(
        (event for event in reversed(events) if event["event"] == "done"), None
    )  # a run that goes on removes it
    if done is None:
        return None
    record = record_of(events, name=run_dir.name)
    ending = record.ending
    members = zip(done["population"]["members"], done["population"]["scores"], strict=True)
    return {
        "run_dir": str(run_dir),
        "steps": ending.steps,
        "updates": ending.moved,
        "ending": ending.words,
        "nothing_learned": ending.nothing_learned,
        "ended": None if record.ended is None else asdict(record.ended),
        "population": [{"score": score, "texts": texts} for texts, score in members],
        "validation": done["validation"],
        "start_and_end": verdict(record),
        "validations": [validation_figures(record, state) for state in record.validations],
        "returned": done.get("returned"),
        "weights": str(run_dir / "weights" / done["weights"]),
        "compiled": str(run_dir / COMPILED),
    }


def _show(outcome: TrainOutcome, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(outcome))
        return
    best = outcome["population"][0]
    score = "" if best["score"] is None else f", score {number(best['score'])}"
    updates, steps = counted(outcome["updates"], "weight update"), counted(outcome["steps"], "step")
    typer.echo(f"{updates} in {steps}; weights in {outcome['weights']}")
    typer.echo(f"validation: {outcome['start_and_end']}")
    typer.echo(f"best candidate{score}:")
    for name, text in best["texts"].items():
        typer.echo(f"  {name}: {text}")
    typer.echo(f"the compiled program is in {outcome['compiled']}; dspy_fst.load reads it")
    if outcome["ended"] and outcome["ended"]["kind"] != "complete":
        typer.echo(f"ended early, after step {outcome['ended']['step']}: {outcome['ended']['text']}")
    if outcome["nothing_learned"]:
        typer.echo(outcome["ending"])
