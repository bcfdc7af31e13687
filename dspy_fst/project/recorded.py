"""The settings that a run recorded, as a project: for commands on runs without a project file.

A run made by Python records its recipe, its model and the sampling settings. Its program, metric and examples are code,
which the user names in a folder of their own. The names that the run recorded are only shown and never imported: the
directory may be somebody else's.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import PrivateAttr, ValidationError

from dspy_fst.config import FSTConfig
from dspy_fst.engine.options import PortableOptions
from dspy_fst.errors import RunDirectoryError
from dspy_fst.project.names import Faults, Objects
from dspy_fst.project.project_file import Project, project_of
from dspy_fst.recipe.declared import sentences
from dspy_fst.run.directory import COMPILED, read_events
from dspy_fst.run.files import read_json
from dspy_fst.saving.format import POLICY, weights_in
from dspy_fst.types import version_of

if TYPE_CHECKING:
    import dspy

    from dspy_fst.policy_lm import PolicyLM


class RecordedProject(Project):
    """A project whose code the user names and whose other settings the run recorded.

    A program that holds a PolicyLM keeps it.
    """

    _frozen: Mapping[str, str] = PrivateAttr(default_factory=dict)
    _adapter: object = PrivateAttr(default=None)
    """The recipe's description of the adapter; None means the one in force."""
    _holds_policy: bool = PrivateAttr(default=False)
    _keeps_adapter: bool = PrivateAttr(default=False)

    def keep(self) -> Path:
        """Write nothing if the run uses another adapter than DSPy's default: a project file cannot name one."""
        return self.run_path if self._keeps_adapter else super().keep()

    def kept_settings(self) -> dict[str, object]:
        """Settings of an ordinary project, without a model that would contradict the program's own."""
        settings = super().kept_settings()
        return {
            name: value
            for name, value in settings.items()
            if not (self._holds_policy and name in ("model", "policy")) and not (name == "model" and self.continue_from)
        }

    def _program(self, objects: Objects, faults: Faults, trust_code: bool) -> "dspy.Module | None":
        from dspy_fst.rollout.chat_adapters import adapter_in_force, describe, keep, kept_by, make_adapter, recorded

        program = super()._program(objects, faults, trust_code)
        if program is None or self._adapter is None or kept_by(program) is not None:
            return program
        with faults.of("adapter"):
            adapter = make_adapter(saved, None) if (saved := recorded(self._adapter)) else adapter_in_force()
            if describe(adapter) != describe(adapter_in_force()):
                keep(program, adapter)
                self._keeps_adapter = True
        return program

    def _policy(self, program: "dspy.Module", faults: Faults) -> "PolicyLM | None":
        from dspy_fst.preflight.program_checks import policies_of

        if policy_lm := next(iter(policies_of(program).values()), None):
            self._holds_policy = True
            return policy_lm
        for name, predictor in program.named_predictors():
            if name in self._frozen and predictor.lm is None:
                faults.add(
                    f"--program: predictor {name!r} spoke with the frozen LM {self._frozen[name]!r}, which is not "
                    "saved; name a function that makes the program and sets that predictor's lm"
                )
        return super()._policy(program, faults)


class Recorded:
    """A run's directory, or a saved program outside of one.

    Args:
        path: The run's directory, or the saved program if ``run_dir`` is None.
    """

    def __init__(self, path: Path, run_dir: Path | None):
        self.path, self.run_dir = path, run_dir
        self.recipe: Mapping[str, object] = _mapping(read_json(run_dir / "recipe.json")) if run_dir else {}
        events = read_events(run_dir) if run_dir else []
        self.plan: Mapping[str, object] = next((event for event in events if event.get("event") == "plan"), {})

    def project(self, named: Mapping[str, object], folder: Path, *, to_train: bool) -> RecordedProject:
        """The project of the user's settings and the recorded ones.

        Args:
            named: The user's settings of the project, with absolute paths.
            folder: The folder of the user's modules.
            to_train: Whether the run shall continue. Otherwise the run's first weights replace the model that it began
                with, which may no longer exist.

        Raises:
            ConfigurationError: the settings have faults; with all of them.
            RunDirectoryError: the recorded settings are not those of a run.
        """
        settings = {"run_dir": str(self.run_dir or self.path), **self._model(to_train), **named}
        if config := self._config():
            settings["recipe"] = config
        project = project_of(RecordedProject, settings, folder)
        project._frozen = _texts(self.plan.get("frozen"))
        project._adapter = self.recipe.get("adapter") if to_train else None
        return project

    def _config(self) -> dict[str, object]:
        recipe = {**self.recipe, "adapter": self.recipe.get("lora")}  # there "adapter" is the chat adapter
        settings = {**recipe, **_mapping(self.plan.get("config"))}
        return {name: settings[name] for name in FSTConfig.model_fields if name in settings}

    def _model(self, to_train: bool) -> dict[str, object]:
        if self.run_dir is None:
            return {"model": str(weights_in(self.path))}  # loading sets the policy's other settings
        start = self.run_dir / "weights" / version_of(0)
        known = {name: self.recipe[name] for name in ("engine", "temperature", "max_tokens") if name in self.recipe}
        options = {"engine_options": options} if (options := self._options()) else {}
        if before := self._before(to_train):
            only_engine = {"engine": known["engine"]} if "engine" in known else {}
            return {"continue_from": str(before), "policy": {**only_engine, **options}}  # each predictor has its own
        model = self.recipe.get("model") if to_train or not start.is_dir() else str(start)
        return {"model": model, "policy": {**known, **options}}

    def _options(self) -> dict[str, object]:
        try:
            options = PortableOptions.model_validate(self.plan.get("engine_options") or {})
        except ValidationError as error:
            faults = "; ".join(sentences(error))
            raise RunDirectoryError(
                f"{self.run_dir}: the plan in events.jsonl sets engine options: {faults}"
            ) from error
        return options.model_dump(exclude_unset=True)

    def _before(self, to_train: bool) -> Path | None:
        """The earlier run whose compiled program this one started from, if it is still there."""
        if self.recipe.get("population") is None:
            return None
        run_dir = Path(str(self.recipe.get("model"))).parent.parent
        policy = _mapping(_mapping(read_json(run_dir / COMPILED / POLICY)).get("policy"))
        if policy.get("version") == self.recipe.get("weights"):
            return run_dir
        if to_train:
            raise RunDirectoryError(
                f"{self.run_dir} started from a compiled program with the weights {self.recipe.get('weights')}, and "
                f"{run_dir / COMPILED} does not hold that program; continue in Python, with that program as the student"
            )
        return None

    # ---- names of the run's code, only to be shown ----------------------------------------------

    @property
    def program(self) -> str | None:
        """``module:attribute`` of the program's class; None where another process could not import it."""
        return _importable(self.plan.get("class"))

    @property
    def metric(self) -> str | None:
        """``module:attribute`` of the metric; None where another process could not import it."""
        name = str(self.plan.get("metric", "")).partition(" ")[0]
        return _importable(":".join(name.rpartition(".")[::2]))

    @property
    def wanted_to_train(self) -> list[str]:
        """Settings that the user must name so that the run can continue."""
        valset = ["valset"] if _mapping(self.plan.get("examples")).get("valset") else []
        searcher = "fast" if self.recipe.get("fast") else "propose"
        propose = [] if self.recipe.get("method") == "rl" else [searcher]
        return ["program", "metric", "trainset", *valset, *propose]


def _importable(reference: object) -> str | None:
    if not isinstance(reference, str) or not re.fullmatch(r"\w+(\.\w+)*:\w+", reference):
        return None
    return None if reference.startswith("__main__") else reference


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _texts(value: object) -> dict[str, str]:
    return {str(name): str(model) for name, model in _mapping(value).items()}
