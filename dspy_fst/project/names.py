"""From names to objects: imports ``module:attribute``, calls functions, reads examples, and collects all faults.

The names lead to a user's own code: whatever it raises becomes a fault with its place, never a traceback.
"""

import importlib
import json
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

from dspy_fst.errors import ConfigurationError, FSTError, meant
from dspy_fst.run.interrupts import Terminated

if TYPE_CHECKING:
    import dspy

Objects: TypeAlias = Mapping[str, Any]
"""Setting -> the object of the user's code that it names. Whatever it is: the checks of a run say what it must be."""
PACKAGE = Path(__file__).parent.parent


def reference_in(text: str) -> str:
    """Check a ``module:attribute`` and return it unchanged.

    Raises:
        ValueError: the text has another form.
    """
    if not re.fullmatch(r"\w+(\.\w+)*:\w+", text):
        raise ValueError("write module:attribute, e.g. my_program:build")
    return text


def examples_in(text: str) -> str:
    """Check a ``module:attribute`` or the name of a .jsonl file and return it unchanged.

    Raises:
        ValueError: the text is neither.
    """
    if not is_file(text) and not re.fullmatch(r"\w+(\.\w+)*:\w+", text):
        raise ValueError("write module:attribute, e.g. my_data:train, or name a .jsonl file")
    return text


def is_file(text: str) -> bool:
    """Whether the text names a file of examples, not a ``module:attribute``."""
    return text.endswith(".jsonl")


def make_program(reference: str, folder: Path) -> "dspy.Module":
    """Make the program alone, without metric and examples. Call it in a block of `importable`.

    Args:
        reference: ``module:attribute``, see `Project.program`.
        folder: The folder of its code; faults name the place in it.

    Raises:
        ConfigurationError: the name cannot be imported, does not exist, raises, or is no program.
    """
    try:
        reference_in(reference)
    except ValueError as error:
        raise ConfigurationError([f"program={reference!r}: {error}"]) from error
    faults = Faults(folder)
    program = made_program(reference, imported({"program": reference}, faults), faults)
    faults.raise_any()
    assert program is not None, "without a fault there is a program"
    return program


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """In this block the modules of a folder can be imported."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with suppress(ValueError):  # the folder's code has removed it already
            sys.path.remove(str(folder))


@dataclass
class Faults:
    """Collects faults, so that all of them are reported together."""

    folder: Path
    sentences: list[str] = field(default_factory=list)
    cause: BaseException | None = None
    """The first exception among them, for ``--debug``."""

    def add(self, sentence: str) -> None:
        self.sentences.append(sentence)

    @contextmanager
    def of(self, what: str) -> Iterator[None]:
        """A block that runs the user's code: whatever it raises becomes a fault, also a SystemExit at import."""
        try:
            yield
        except (Terminated, KeyboardInterrupt):  # a signal, although `Terminated` is a SystemExit
            raise
        except ConfigurationError as error:
            self._add(what, "; ".join(error.faults), error)
        except FSTError as error:
            self._add(what, str(error), error)
        except (Exception, SystemExit) as error:
            self._add(what, f"{type(error).__name__}: {' '.join(str(error).split())}", error)

    def _add(self, what: str, words: str, error: BaseException) -> None:
        self.add(f"{what}: {words}{self._place(error)}")
        self.cause = self.cause or error

    def raise_any(self) -> None:
        if self.sentences:
            raise ConfigurationError(self.sentences) from self.cause

    def _place(self, error: BaseException) -> str:
        """The place in the project's own code where an exception was raised."""
        if isinstance(error, SyntaxError):
            return ""  # its message says so
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            path = Path(frame.filename)
            if (
                path.is_relative_to(self.folder)
                and not path.is_relative_to(PACKAGE)
                and "site-packages" not in path.parts
            ):
                return f" ({path.relative_to(self.folder)}, line {frame.lineno})"
        return f" (looked for in {self.folder} first)" if isinstance(error, ModuleNotFoundError) else ""


def _lacks(module: ModuleType, attribute: str) -> str:
    known = [name for name in vars(module) if not name.startswith("_")]
    return f"{module.__file__ or module.__name__} has no {attribute!r}{meant(attribute, known)}"


def imported(references: Mapping[str, str], faults: Faults) -> Objects:
    """Setting -> the object that it names. A module that fails gives one fault for all settings that name it."""
    named: dict[str, list[tuple[str, str]]] = {}
    for setting, text in references.items():
        home, _, attribute = text.partition(":")
        named.setdefault(home, []).append((setting, attribute))
    objects: dict[str, object] = {}
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


def made_program(text: str, objects: Objects, faults: Faults, setting: str = "program") -> "dspy.Module | None":
    """The imported program, or the result of the imported function; None after a fault.

    Args:
        setting: That names it.
    """
    import dspy

    before = len(faults.sentences)
    program = made(setting, text, objects, dspy.Module, faults)
    if isinstance(program, dspy.Module):
        return program
    if setting in objects and len(faults.sentences) == before:
        faults.add(f"{setting}: {text} gives {type(program).__name__}, not a dspy.Module")
    return None


def made(setting: str, text: str, objects: Objects, kind: type, faults: Faults) -> Any:
    """The object that a setting names, or its result when it is a function; None after a fault."""
    value = objects.get(setting)
    if isinstance(value, kind) or not callable(value):
        return value
    with faults.of(f"{setting}: {text}() raised"):
        return value()
    return None


def with_key(where: str, given: Mapping[str, object], faults: Faults) -> dict[str, Any]:
    """``api_key_env: NAME`` replaced by the ``api_key`` that this environment variable holds."""
    settings: dict[str, Any] = dict(given)
    name = settings.pop("api_key_env", None)
    if name is not None:
        settings["api_key"] = os.environ.get(name)
        if not settings["api_key"]:
            faults.add(f"{where}.api_key_env: the environment variable {name} is not set")
    return settings


def read_examples(path: Path, inputs: Sequence[str]) -> "list[dspy.Example]":
    """Read examples, one JSON object a line.

    Raises:
        ValueError: a line is no JSON object or lacks an input; the message names the first one.
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
