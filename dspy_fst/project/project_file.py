"""A project: one YAML file that names everything that compile() needs, and how its names become objects.

    program: my_program:build          # module:attribute -> a dspy.Module, or a function that returns one
    metric: my_program:metric
    trainset: my_data:train            # a list of dspy.Example, a function that returns one, or a .jsonl file
    model: Qwen/Qwen3-0.6B             # for the predictors that hold no LM yet
    reflection_lm: openai/gpt-5        # or  propose: my_program:propose
    run_dir: runs/mine
    teacher: my_program:teacher        # a program that a warm start learns from; may be left out
    continue_from: runs/before         # a run whose program and weights this one goes on from; may be left out
    track: tensorboard                 # or a list; may be left out
    recipe: {auto: medium}             # fields of FSTConfig, or auto

Modules and relative paths are relative to the file's folder. Nothing heavy is imported before `Project.open`.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import yaml  # type: ignore[import-untyped]
from pydantic import BaseModel, BeforeValidator, ValidationError, model_validator

from dspy_fst.errors import ConfigurationError
from dspy_fst.project.names import (
    Faults,
    Objects,
    importable,
    imported,
    is_file,
    made,
    made_program,
    read_examples,
    with_key,
)
from dspy_fst.project.sections import (
    ExamplesReference,
    Part,
    PolicySettings,
    Recipe,
    Reference,
    ReflectionSettings,
    model_alone,
)
from dspy_fst.project.settings_file import cleaner, read_settings, secrets_in
from dspy_fst.recipe.declared import no_such_setting, sentences
from dspy_fst.recipe.other_names import INSTEAD

if TYPE_CHECKING:
    import dspy

    from dspy_fst.optimizer import FSTOptimizer
    from dspy_fst.policy_lm import PolicyLM
    from dspy_fst.run.directory import Event

_YOUR_OWN = (
    "it may be somebody else's, so none of its code is run. If it is yours, name your own project file: "
    "dspy-fst run FILE continues the run, eval and serve take --project FILE"
)


class Project(Part):
    """The settings of a project file. `load_project` reads it, and `open` makes the objects that it names."""

    folder: Path
    """The base of modules and relative paths: the file's folder, or the setting ``folder`` relative to that."""
    program: Reference
    """A ``dspy.Module``, or a function without arguments that returns one."""
    metric: Reference
    trainset: ExamplesReference
    """A list of ``dspy.Example``, a function without arguments that returns one, or a file of JSON lines."""
    valset: ExamplesReference | None = None
    inputs: list[str] | None = None
    """Input fields of the examples in .jsonl files; the other fields are labels."""
    model: str | None = None
    """Hugging Face folder or hub name; may be left out when the program holds a PolicyLM."""
    policy: PolicySettings | None = None
    reflection_lm: Annotated[ReflectionSettings, BeforeValidator(model_alone)] | None = None
    propose: Reference | None = None
    """A proposer that needs no LM, see FSTOptimizer."""
    code_proposer: Reference | None = None
    """A proposer of sources for dspy.Flex modules, see FSTOptimizer."""
    fast: Reference | None = None
    """A DSPy optimizer, its class or a `TeleprompterSearch` that searches in GEPA's place, see FSTOptimizer."""
    teacher: Reference | None = None
    """A program whose good traces are learnt before the first search, as ``compile(teacher=...)`` has it."""
    run_dir: str
    continue_from: str | None = None
    """The directory of a finished run, or a saved program. This run starts from its texts, population and weights, not
    from the program's own texts and ``model``."""
    track: list[str] | str | None = None
    """Experiment trackers, see FSTOptimizer. They are not part of the recipe: a continued run may use others."""
    show_samples: bool = False
    """Whether one sampled reply is shown after each step."""
    recipe: Recipe | None = None

    @model_validator(mode="after")
    def _inputs_belong_to_files(self) -> "Project":
        files = [name for name in (self.trainset, self.valset) if name and is_file(name)]
        if files and not self.inputs:
            raise ValueError(f"inputs: name the input fields of {' and '.join(files)}, e.g. inputs: [question]")
        if self.inputs and not files:
            raise ValueError("inputs: it belongs to .jsonl files; examples made in Python say with_inputs themselves")
        return self

    @property
    def run_path(self) -> Path:
        """The run directory, absolute."""
        return self.path(self.run_dir)

    def path(self, text: str) -> Path:
        """A path of the file, absolute."""
        return (self.folder / Path(text).expanduser()).resolve()

    def importable(self) -> AbstractContextManager[None]:
        """In this block the project's own modules can be imported."""
        return importable(self.folder)

    def open(self, listeners: Sequence["Callable[[Event], None]"] = (), *, trust_code: bool = False) -> "Opened":
        """Import and make everything that the file names; no model is loaded yet.

        Args:
            listeners: Functions that receive every event of the run.
            trust_code: Accept the sources of dspy.Flex modules in ``continue_from``.

        Raises:
            ConfigurationError: names cannot be imported, do not exist or raise; with all of these faults.
        """
        from dspy_fst.optimizer import FSTOptimizer

        faults = Faults(self.folder)
        with self.importable():
            objects = imported(self._references(), faults)
            program = self._program(objects, faults, trust_code)
            teacher = self._teacher(program, objects, faults)
            trainset = self._examples("trainset", objects, faults)
            valset = self._examples("valset", objects, faults)
            reflection_lm = self._reflection_lm(faults)
        faults.raise_any()
        assert program is not None, "without a fault there is a program"
        optimizer = FSTOptimizer(
            metric=objects["metric"],
            reflection_lm=reflection_lm,
            propose=objects.get("propose"),
            code_proposer=objects.get("code_proposer"),
            fast=objects.get("fast"),
            run_dir=self.run_path,
            listeners=listeners,
            track=self.track or (),
            show_samples=self.show_samples,
            **(self.recipe.model_dump(exclude_unset=True) if self.recipe else {}),
        )
        return Opened(program, optimizer, trainset, valset, teacher)

    def kept_settings(self) -> dict[str, object]:
        """The settings that `keep` writes."""
        return self.model_dump(mode="json", exclude_unset=True)

    def keep(self) -> Path:
        """Write the settings into the run directory, so that the run can be resumed from it alone.

        Raises:
            RunDirectoryError: the disk refused to write.
        """
        from dspy_fst.run.directory import PROJECT
        from dspy_fst.run.files import flush, writing

        path = self.run_path / PROJECT
        partial = path.with_name(path.name + ".new")
        with writing(self.run_path):
            text = yaml.safe_dump(self.kept_settings(), sort_keys=False)
            partial.write_text(text, encoding="utf-8")
            flush(partial)
            partial.replace(path)
        return path

    # ---- from names to objects -----------------------------------------------------------------

    def _references(self) -> dict[str, str]:
        """Setting -> the ``module:attribute`` that it holds."""
        named = ("program", "metric", "teacher", "propose", "code_proposer", "fast", "trainset", "valset")
        texts = {setting: getattr(self, setting) for setting in named}
        return {setting: text for setting, text in texts.items() if text is not None and not is_file(text)}

    def _program(self, objects: Objects, faults: "Faults", trust_code: bool) -> "dspy.Module | None":
        """A copy of the program in which every predictor has an LM; the user's program is unchanged."""
        from dspy_fst.rollout.copying import copied

        program = made_program(self.program, objects, faults)
        if program is None:
            return None
        if self.continue_from is not None:
            return self._continued(self.path(self.continue_from), program, faults, trust_code)
        policy = self._policy(program, faults)
        program = copied(program)
        for _, predictor in program.named_predictors():
            if predictor.lm is None:
                predictor.lm = policy
        return program

    def _teacher(self, program: "dspy.Module | None", objects: Objects, faults: "Faults") -> "dspy.Module | None":
        """A copy of the teacher; its predictors without an LM speak with the program's model."""
        from dspy_fst.preflight.program_checks import policies_of
        from dspy_fst.rollout.copying import copied

        made = made_program(self.teacher, objects, faults, "teacher") if self.teacher else None
        if made is None or program is None:
            return None
        teacher, policy = copied(made), next(iter(policies_of(program).values()), None)
        for _, predictor in teacher.named_predictors():
            predictor.lm = predictor.lm or policy
        return teacher

    def _continued(
        self, before: Path, program: "dspy.Module", faults: "Faults", trust_code: bool
    ) -> "dspy.Module | None":
        """The program that another run ended with, with its weights on this project's engine."""
        from dspy_fst.preflight.program_checks import policies_of
        from dspy_fst.saving.format import saved_in
        from dspy_fst.saving.save_load import load

        if before == self.run_path:
            faults.add("run_dir: it is the run that continue_from names; name a new directory (--run-dir NEW)")
        policy_lm = next(iter(policies_of(program).values()), None)
        handle = policy_lm.handle if policy_lm else None
        engine_settings = {"engine": handle.kind, "engine_options": handle.options} if handle else {}
        with faults.of("continue_from"):
            settings = {**engine_settings, **self._policy_settings(faults)}
            return load(saved_in(before), program, trust_code=trust_code, **settings)
        return None

    def _policy(self, program: "dspy.Module", faults: "Faults") -> "PolicyLM | None":
        """The PolicyLM that the program holds, else one made from these settings."""
        from dspy_fst.policy_lm import PolicyLM
        from dspy_fst.preflight.program_checks import policies_of

        policy_lm = next(iter(policies_of(program).values()), None)
        policy = None
        if self.model is not None:
            model = self.path(self.model) if self.path(self.model).is_dir() else self.model
            with faults.of("policy"):
                policy = PolicyLM(model, **self._policy_settings(faults))
        if policy_lm is None:
            if self.model is None:
                faults.add("model: it is missing, and no predictor of the program holds a PolicyLM; name a model")
            return policy
        if policy is not None and policy.checkpoint.folder != policy_lm.checkpoint.folder:
            model_path = policy_lm.checkpoint.folder
            faults.add(f"model: the program holds a PolicyLM of {model_path}; remove model, or that PolicyLM")
        if self.policy is not None:
            faults.add("policy: the program holds a PolicyLM with settings of its own; remove policy, or that PolicyLM")
        return policy_lm

    def _policy_settings(self, faults: "Faults") -> dict[str, Any]:
        settings = self.policy.model_dump(exclude_none=True) if self.policy else {}
        if self.policy and "max_tokens" in self.policy.model_fields_set:
            settings["max_tokens"] = self.policy.max_tokens  # null means: up to the model's context
        if "engine_options" in settings:
            options = with_key("policy.engine_options", settings["engine_options"], faults)
            if "log_path" in options:
                options["log_path"] = self.path(options["log_path"])
            settings["engine_options"] = options
        return settings

    def _examples(self, setting: str, objects: Objects, faults: "Faults") -> Any:
        text = getattr(self, setting)
        if text is None:
            return None
        if not is_file(text):
            return made(setting, text, objects, list, faults)
        with faults.of(f"{setting}: {text}"):
            return read_examples(self.path(text), self.inputs or [])
        return None

    def _reflection_lm(self, faults: "Faults") -> "dspy.LM | None":
        import dspy

        if self.reflection_lm is None:
            return None
        settings = with_key("reflection_lm", self.reflection_lm.model_dump(exclude_unset=True), faults)
        with faults.of("reflection_lm"):
            return dspy.LM(**settings)
        return None


@dataclass(frozen=True)
class Opened:
    """The objects of a project file: ``optimizer.compile(program, trainset=trainset, valset=valset)`` runs it."""

    program: "dspy.Module"
    optimizer: "FSTOptimizer"
    trainset: "list[dspy.Example]"
    valset: "list[dspy.Example] | None"
    teacher: "dspy.Module | None" = None


Kind = TypeVar("Kind", bound=Project)


def load_project(path: str | Path) -> Project:
    """Read a project file. Nothing that it names is imported or searched yet.

    Args:
        path: The file, or a folder that contains it as project.yaml.

    Raises:
        ConfigurationError: the file has faults; with all of them.
    """
    path = _file_at(Path(path).resolve())
    data = read_settings(path)
    clean = cleaner()
    faults = [
        f"{where}: a secret does not belong in this file; set the provider's environment variable (OPENAI_API_KEY and "
        "the like), or name another one with api_key_env"
        for where in secrets_in(data, clean)
    ]
    folder = path.parent / str(data.get("folder") or ".")
    if not folder.is_dir():
        faults.append(f"folder: there is no folder {folder}; say where the project's modules and data lie now")
    try:
        project = project_of(Project, data, folder.resolve())
    except ConfigurationError as error:
        faults += error.faults
    if faults:
        raise ConfigurationError(faults)
    return project


def project_of(kind: type[Kind], settings: Mapping[str, object], folder: Path) -> Kind:
    """Validate settings as a project.

    Raises:
        ConfigurationError: the settings have faults; with all of them.
    """
    try:
        return kind.model_validate({**settings, "folder": folder})
    except ValidationError as error:
        clean = cleaner()

        def show(place: str, value: object) -> str | None:
            """Only simple values are shown, and none that may be a key written in the wrong place."""
            return (
                repr(clean(value))
                if isinstance(value, str | int | float) and not place.endswith("api_key_env")
                else None
            )

        raise ConfigurationError(sentences(error, show=show, unknown=_unknown)) from None


def _file_at(path: Path) -> Path:
    """The project file that a path names: in a folder project.yaml, unless the folder is a run's directory, whose
    project may be somebody else's."""
    from dspy_fst.run.directory import is_run

    if not path.is_dir():
        return path
    if is_run(path):
        raise ConfigurationError(
            [f"{path} is a run's directory, no project's; dspy-fst resume goes on with it, or name your project file"]
        )
    if not (path / "project.yaml").is_file():
        others = ", ".join(sorted(file.name for file in path.glob("*.y*ml"))[:5])
        hint = f"; there are {others}" if others else ""
        raise ConfigurationError([f"{path} is a folder without a project.yaml; name the project's file{hint}"])
    return path / "project.yaml"


def kept_in(run_dir: Path) -> Project:
    """The project that `Project.keep` wrote into a run directory.

    The directory may be somebody else's, and a project's code is imported: none of it may come from that directory.

    Raises:
        ConfigurationError: the file has faults; or its code would come from the directory itself, or from a path that
            `Project.keep` would not have written.
    """
    from dspy_fst.run.directory import PROJECT

    path = run_dir / PROJECT
    project = load_project(path)
    written = read_settings(path).get("folder")
    if Path(str(written)) != project.folder:  # ../code goes where the directory goes, /proc/self/cwd where the user is
        raise ConfigurationError(
            [f"{path}: folder={written!r} is not the absolute path without links that a run writes there; {_YOUR_OWN}"]
        )
    if project.folder.is_relative_to(run_dir.resolve()):
        raise ConfigurationError(
            [f"{path}: {project.program} would be looked for in {project.folder}, inside the run itself; {_YOUR_OWN}"]
        )
    return project


def _unknown(place: tuple[int | str, ...]) -> str:
    parts: dict[str, type[BaseModel]] = {"recipe": Recipe, "policy": PolicySettings}
    instead = INSTEAD if place[0] == "recipe" else {}
    return no_such_setting(".".join(map(str, place)), parts.get(str(place[0]), Project).model_fields, instead=instead)
