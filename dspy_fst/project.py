"""A project: one YAML file that names everything compile() needs, and the way from its names to the objects.

    program: my_program:build          # module:attribute -> a dspy.Module, or a function that returns one
    metric: my_program:metric
    trainset: my_data:train            # a list of dspy.Example, a function that returns one, or a .jsonl file
    model: Qwen/Qwen3-0.6B             # for the predictors that hold no LM yet
    reflection_lm: openai/gpt-5        # or  propose: my_program:propose
    run_dir: runs/mine
    track: tensorboard                 # or a list; may be left out
    recipe: {auto: medium}             # fields of FSTConfig, or auto

Modules and relative paths are looked for in the file's folder. Nothing heavy is imported before `Project.open`.
"""

import importlib
import json
import os
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml  # type: ignore[import-untyped]
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator

from dspy_fst.config import FSTConfig
from dspy_fst.errors import ConfigurationError, meant
from dspy_fst.run.interrupts import Terminated

if TYPE_CHECKING:
    import dspy

    from dspy_fst.optimizer import FSTOptimizer
    from dspy_fst.policy import PolicyLM

_SECRET = re.compile(
    r"((api|access|private|secret|subscription)_?key|secret|passw(or)?d|passphrase|credential|cookie)s?$"
    r"|authorization$|(?<![a-z])auth$|(?<!max_)(?<!per_)token$",  # max_token is a slip, cost_per_token a price
    re.IGNORECASE,
)
"""Names of settings whose values are secrets: arguments that litellm's providers and vLLM take, and headers."""
_YOUR_OWN = (
    "it may be somebody else's, so none of its code is run. If it is yours, name your own project file: "
    "dspy-fst run FILE continues the run, eval and serve take --project FILE"
)


def _reference(text: str) -> str:
    if not re.fullmatch(r"\w+(\.\w+)*:\w+", text):
        raise ValueError("write module:attribute, e.g. my_program:build")
    return text


def _examples_reference(text: str) -> str:
    if not _is_file(text) and not re.fullmatch(r"\w+(\.\w+)*:\w+", text):
        raise ValueError("write module:attribute, e.g. my_data:train, or name a .jsonl file")
    return text


def _is_file(text: str) -> bool:
    return text.endswith(".jsonl")


def _variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise ValueError("write the name of an environment variable, not the key itself")
    return name


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PolicySettings(_Part):
    """How the trained model is sampled; PolicyLM's default stands where nothing is given."""

    engine: Literal["auto", "vllm", "in_process"] | None = None
    engine_options: dict[str, Any] | None = None
    """``api_key_env`` names the environment variable of an attached server's key."""
    temperature: float | None = None
    max_tokens: int | None = None


class ReflectionSettings(BaseModel):
    """Arguments of ``dspy.LM``; in the file also the model's name alone."""

    model_config = ConfigDict(frozen=True, extra="allow")

    model: str
    api_key_env: Annotated[str, AfterValidator(_variable)] | None = None
    """Environment variable that holds the key; without it the provider's usual one is used."""


class Recipe(FSTConfig):
    """Fields of FSTConfig, and DSPy's budgets instead of ``cycles``."""

    auto: Literal["light", "medium", "heavy"] | None = None


Reference = Annotated[str, AfterValidator(_reference)]
ExamplesReference = Annotated[str, AfterValidator(_examples_reference)]


def _model_alone(value: Any) -> Any:
    return {"model": value} if isinstance(value, str) else value


class Project(_Part):
    """The settings of one project file. `load_project` reads it, `open` makes the objects that it names."""

    folder: Path
    """Where modules and relative paths are looked for: the file's own folder, or what it says, relative to that."""
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
    reflection_lm: Annotated[ReflectionSettings, BeforeValidator(_model_alone)] | None = None
    propose: Reference | None = None
    """A proposer that needs no LM, see FSTOptimizer."""
    code_proposer: Reference | None = None
    """A proposer of sources for dspy.Flex modules, see FSTOptimizer."""
    run_dir: str
    track: list[str] | str | None = None
    """Experiment trackers, see FSTOptimizer. They are no part of the recipe: a continued run may name others."""
    recipe: Recipe | None = None

    @model_validator(mode="after")
    def _inputs_belong_to_files(self) -> "Project":
        files = [name for name in (self.trainset, self.valset) if name and _is_file(name)]
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
        """A block in which the project's own modules can be imported."""
        return importable(self.folder)

    def open(self, listeners: Sequence[Callable[[Mapping[str, Any]], None]] = ()) -> "Opened":
        """Import and make everything that the file names; no model is loaded yet.

        Args:
            listeners: Functions that are told every event of the run.

        Raises:
            ConfigurationError: with everything that does not import, is not there or raises.
        """
        from dspy_fst.optimizer import FSTOptimizer

        faults = _Faults(self.folder)
        with self.importable():
            objects = _imported(self._references(), faults)
            program = self._program(objects, faults)
            trainset = self._examples("trainset", objects, faults)
            valset = self._examples("valset", objects, faults)
            reflection_lm = self._reflection_lm(faults)
        faults.raise_any()
        optimizer = FSTOptimizer(
            metric=objects["metric"],
            reflection_lm=reflection_lm,
            propose=objects.get("propose"),
            code_proposer=objects.get("code_proposer"),
            run_dir=self.run_path,
            listeners=listeners,
            track=self.track or (),
            **(self.recipe.model_dump(exclude_unset=True) if self.recipe else {}),
        )
        return Opened(program, optimizer, trainset, valset)

    def keep(self) -> Path:
        """Write the settings into the run directory, so that it can be resumed knowing nothing else.

        Raises:
            RunDirectoryError: the disk refused.
        """
        from dspy_fst.run.directory import PROJECT
        from dspy_fst.run.files import flush, writing

        path = self.run_path / PROJECT
        partial = path.with_name(path.name + ".new")
        with writing(self.run_path):
            text = yaml.safe_dump(self.model_dump(mode="json", exclude_unset=True), sort_keys=False)
            partial.write_text(text, encoding="utf-8")
            flush(partial)
            partial.replace(path)
        return path

    # ---- from names to objects -----------------------------------------------------------------

    def _references(self) -> dict[str, str]:
        """Setting -> the ``module:attribute`` that it holds."""
        named = ("program", "metric", "propose", "code_proposer", "trainset", "valset")
        texts = {setting: getattr(self, setting) for setting in named}
        return {setting: text for setting, text in texts.items() if text is not None and not _is_file(text)}

    def _program(self, objects: Mapping[str, Any], faults: "_Faults") -> "dspy.Module | None":
        """A copy of the program whose predictors all have an LM; the user's own stays as it is."""
        from dspy_fst.rollout.copying import copied

        program = _made_program(self.program, objects, faults)
        if program is None:
            return None
        policy = self._policy(program, faults)
        program = copied(program)
        for _, predictor in program.named_predictors():
            if predictor.lm is None:
                predictor.lm = policy
        return program

    def _policy(self, program: "dspy.Module", faults: "_Faults") -> "PolicyLM | None":
        """The PolicyLM that the program holds, else one of these settings."""
        from dspy_fst.policy import PolicyLM
        from dspy_fst.validation import policies_of

        held = next(iter(policies_of(program).values()), None)
        made = None
        if self.model is not None:
            model = self.path(self.model) if self.path(self.model).is_dir() else self.model
            with faults.of("policy"):
                made = PolicyLM(model, **self._policy_settings(faults))
        if held is None:
            if self.model is None:
                faults.add("model: it is missing, and no predictor of the program holds a PolicyLM; name a model")
            return made
        if made is not None and made.checkpoint.path != held.checkpoint.path:
            faults.add(f"model: the program holds a PolicyLM of {held.checkpoint.path}; remove model, or that PolicyLM")
        if self.policy is not None:
            faults.add("policy: the program holds a PolicyLM with settings of its own; remove policy, or that PolicyLM")
        return held

    def _policy_settings(self, faults: "_Faults") -> dict[str, Any]:
        settings = self.policy.model_dump(exclude_none=True) if self.policy else {}
        if "engine_options" in settings:
            options = _with_key("policy.engine_options", settings["engine_options"], faults)
            if "log_path" in options:
                options["log_path"] = self.path(options["log_path"])
            settings["engine_options"] = options
        return settings

    def _examples(self, setting: str, objects: Mapping[str, Any], faults: "_Faults") -> Any:
        text = getattr(self, setting)
        if text is None:
            return None
        if not _is_file(text):
            return _made(setting, text, objects, list, faults)
        with faults.of(f"{setting}: {text}"):
            return _read_examples(self.path(text), self.inputs or [])
        return None

    def _reflection_lm(self, faults: "_Faults") -> "dspy.LM | None":
        import dspy

        if self.reflection_lm is None:
            return None
        settings = _with_key("reflection_lm", self.reflection_lm.model_dump(exclude_unset=True), faults)
        with faults.of("reflection_lm"):
            return dspy.LM(**settings)
        return None


@dataclass(frozen=True)
class Opened:
    """What a project file names: ``optimizer.compile(program, trainset=trainset, valset=valset)`` runs it."""

    program: "dspy.Module"
    optimizer: "FSTOptimizer"
    trainset: "list[dspy.Example]"
    valset: "list[dspy.Example] | None"


def load_project(path: str | Path) -> Project:
    """Read a project file; what it names is neither imported nor looked for yet.

    Raises:
        ConfigurationError: with every fault of the file.
    """
    path = Path(path).resolve()
    data = _read_yaml(path)
    clean = _cleaner()
    faults = [
        f"{where}: a secret does not belong in this file; set the provider's environment variable (OPENAI_API_KEY and "
        "the like), or name another one with api_key_env"
        for where in _secrets(data, clean)
    ]
    folder = path.parent / str(data.get("folder") or ".")
    if not folder.is_dir():
        faults.append(f"folder: there is no folder {folder}; say where the project's modules and data lie now")
    try:
        project = Project.model_validate({**data, "folder": folder.resolve()})
    except ValidationError as error:
        faults += [_sentence(fault, clean) for fault in error.errors()]
    if faults:
        raise ConfigurationError(faults)
    return project


def kept_in(run_dir: Path) -> Project:
    """The project that `Project.keep` wrote into a run directory.

    The directory may be somebody else's, and what a project names is imported: nothing of it may lead back there.

    Raises:
        ConfigurationError: with every fault of the file, or because its code would be taken from the directory itself,
            or from wherever a path leads that `Project.keep` would not have written.
    """
    from dspy_fst.run.directory import PROJECT

    path = run_dir / PROJECT
    project = load_project(path)
    written = _read_yaml(path).get("folder")
    if Path(str(written)) != project.folder:  # ../code goes where the directory goes, /proc/self/cwd where the user is
        raise ConfigurationError(
            [f"{path}: folder={written!r} is not the absolute path without links that a run writes there; {_YOUR_OWN}"]
        )
    if project.folder.is_relative_to(run_dir.resolve()):
        raise ConfigurationError(
            [f"{path}: {project.program} would be looked for in {project.folder}, part of the run itself; {_YOUR_OWN}"]
        )
    return project


def make_program(reference: str, folder: Path) -> "dspy.Module":
    """The program alone, for who needs neither metric nor examples. Call it in a block of `importable`.

    Args:
        reference: ``module:attribute``, see `Project.program`.
        folder: Where its code lies; faults name the place in it.

    Raises:
        ConfigurationError: it does not import, is not there, raises, or is no program.
    """
    try:
        _reference(reference)
    except ValueError as error:
        raise ConfigurationError([f"program={reference!r}: {error}"]) from error
    faults = _Faults(folder)
    program = _made_program(reference, _imported({"program": reference}, faults), faults)
    faults.raise_any()
    assert program is not None, "without a fault there is a program"
    return program


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """A block in which the modules of a folder can be imported."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with suppress(ValueError):  # the folder's code took it away itself
            sys.path.remove(str(folder))


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice; PyYAML takes the last one without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        for key, count in Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)).items():
            if count > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigurationError([f"{path}{line}: {error.problem}"]) from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigurationError([f"{path} cannot be read: {' '.join(str(error).split())}"]) from error
    if not isinstance(data, dict):
        raise ConfigurationError([f"{path}: it must hold settings, such as  program: my_program:build"])
    return data


def _cleaner() -> Callable[[Any], Any]:
    """What replaces texts that only secrets look like, such as the password of an address."""
    from dspy_fst.run.secrets import Redactor

    return Redactor().clean


def _secrets(data: Any, clean: Callable[[Any], Any], where: str = "") -> Iterator[str]:
    """Names of the settings that are named like a secret or look like one, at any depth."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            name = f"{where}.{key}" if where else str(key)
            if _SECRET.search(str(key).replace("-", "_")):
                yield name
            else:
                yield from _secrets(value, clean, name)
    elif isinstance(data, list):
        for item in data:
            yield from _secrets(item, clean, where)
    elif isinstance(data, str) and clean(data) != data:
        yield where


def _sentence(fault: Any, clean: Callable[[Any], Any]) -> str:
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        *_, name = fault["loc"]
        parts: dict[str, type[BaseModel]] = {"recipe": Recipe, "policy": PolicySettings}
        known = parts.get(str(fault["loc"][0]), Project).model_fields
        return f"{where}: there is no such setting{meant(str(name), list(known))}"
    if fault["type"] == "missing":
        return f"{where}: it is missing"
    message = fault["msg"].removeprefix("Value error, ")
    # Only plain values are shown, and none of what may be a key that was written in the wrong place.
    shown = isinstance(fault["input"], str | int | float) and not where.endswith("api_key_env")
    return ": ".join(part for part in (f"{where}={clean(fault['input'])!r}" if shown else where, message) if part)


@dataclass
class _Faults:
    """Collects what is wrong, so that all of it is told together."""

    folder: Path
    told: list[str] = field(default_factory=list)
    cause: BaseException | None = None
    """The first exception among them, for whoever asks for its traceback."""

    def add(self, sentence: str) -> None:
        self.told.append(sentence)

    @contextmanager
    def of(self, what: str) -> Iterator[None]:
        """A block of the user's: what it raises is a fault. A script that exits while it is imported counts too."""
        try:
            yield
        except Terminated:  # SIGTERM came; that it is a SystemExit too does not make it the script's
            raise
        except ConfigurationError as error:
            self._add(what, "; ".join(error.faults), error)
        except (Exception, SystemExit) as error:
            self._add(what, f"{type(error).__name__}: {' '.join(str(error).split())}", error)

    def _add(self, what: str, words: str, error: BaseException) -> None:
        self.add(f"{what}: {words}{self._place(error)}")
        self.cause = self.cause or error

    def raise_any(self) -> None:
        if self.told:
            raise ConfigurationError(self.told) from self.cause

    def _place(self, error: BaseException) -> str:
        """Where in the project's own code an exception came from."""
        if isinstance(error, SyntaxError):
            return ""  # its message says so
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            path = Path(frame.filename)
            if path.is_relative_to(self.folder) and "site-packages" not in path.parts and path != Path(__file__):
                return f" ({path.relative_to(self.folder)}, line {frame.lineno})"
        return f" (looked for in {self.folder} first)" if isinstance(error, ModuleNotFoundError) else ""


def _lacks(module: ModuleType, attribute: str) -> str:
    known = [name for name in vars(module) if not name.startswith("_")]
    return f"{module.__file__ or module.__name__} has no {attribute!r}{meant(attribute, known)}"


def _imported(references: Mapping[str, str], faults: _Faults) -> dict[str, Any]:
    """Setting -> the object that it names. A module that fails is told once for all who name it."""
    named: dict[str, list[tuple[str, str]]] = {}
    for setting, text in references.items():
        home, _, attribute = text.partition(":")
        named.setdefault(home, []).append((setting, attribute))
    objects: dict[str, Any] = {}
    for name, wanted in named.items():
        settings = ", ".join(setting for setting, _ in wanted)
        with faults.of(f"{settings}: module {name!r} does not import"):
            module = importlib.import_module(name)
            objects |= {
                setting: getattr(module, attribute) for setting, attribute in wanted if hasattr(module, attribute)
            }
            for setting, attribute in wanted:
                if setting not in objects:
                    faults.add(f"{setting}: {_lacks(module, attribute)}")
    return objects


def _made_program(text: str, objects: Mapping[str, Any], faults: _Faults) -> "dspy.Module | None":
    """The program that was imported, or what its function returns; None after a fault."""
    import dspy

    told = len(faults.told)
    program = _made("program", text, objects, dspy.Module, faults)
    if isinstance(program, dspy.Module):
        return program
    if "program" in objects and len(faults.told) == told:
        faults.add(f"program: {text} gives {type(program).__name__}, not a dspy.Module")
    return None


def _made(setting: str, text: str, objects: Mapping[str, Any], kind: type, faults: _Faults) -> Any:
    """The object that a setting names, or what it returns when it is a function; None after a fault."""
    value = objects.get(setting)
    if isinstance(value, kind) or not callable(value):
        return value
    with faults.of(f"{setting}: {text}() raised"):
        return value()
    return None


def _with_key(where: str, settings: Mapping[str, Any], faults: _Faults) -> dict[str, Any]:
    """``api_key_env: NAME`` replaced by the ``api_key`` that this environment variable holds."""
    settings = dict(settings)
    name = settings.pop("api_key_env", None)
    if name is not None:
        settings["api_key"] = os.environ.get(name)
        if not settings["api_key"]:
            faults.add(f"{where}.api_key_env: the environment variable {name} is not set")
    return settings


def _read_examples(path: Path, inputs: Sequence[str]) -> "list[dspy.Example]":
    """One example a line.

    Raises:
        ValueError: naming the first line that is no JSON object or lacks an input.
    """
    import dspy

    examples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} is no JSON: {error}") from error
        if not isinstance(fields, dict):
            raise ValueError(f"line {number} is no JSON object")
        if lacking := [name for name in inputs if name not in fields]:
            raise ValueError(f"line {number} has no {lacking[0]!r}{meant(lacking[0], list(fields))}")
        examples.append(dspy.Example(fields).with_inputs(*inputs))
    return examples
