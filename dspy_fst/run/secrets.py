"""Keeps secrets out of events, reports and saved programs.

Two nets catch them: values that an LM's setting or an environment variable names as secret, and shapes that only keys
have. Everything that is written or shown goes through `Redactor.clean`.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import dspy

HIDDEN = "***"
SHORTEST = 8
"""Characters of the shortest value that is hidden because of its name: shorter values are often parts of words."""

_NAME = re.compile(
    r"(?:key|token|secret|password|passwd|passphrase|credential)s?(?![a-z])|(?<![a-z])(?:pass|authorization|cookie)(?![a-z])",
    re.IGNORECASE,
)
"""Names of settings, headers and environment variables that hold secrets, e.g. ``api_key``, ``X-Auth-Token``."""
_ORDINARY = re.compile(r"[A-Za-z]?[a-z]{0,14}|[0-9]{1,15}")
"""A word or a number, e.g. ``password``, ``notneeded``, ``16000000``: hiding it spoils texts and protects nothing."""

_RANDOM = r"(?=[\w.~+/=-]*?(?=[A-Za-z]{0,15}[0-9])[A-Za-z0-9]{16})"
"""Sixteen letters and digits in a row with a digit among them: no word of a text looks like that."""
_SHAPES = (
    rf"(?<![\w-])(?:sk|xai|nvapi|xox[abprs])-{_RANDOM}[\w-]{{20,}}",  # OpenAI and those who took its shape; Slack
    r"(?<![\w-])(?:hf|gsk|gh[opsru])_[A-Za-z0-9]{30,}",  # Hugging Face, Groq, GitHub
    r"(?<![\w-])github_pat_\w{40,}",
    r"(?<![\w-])AIza[\w-]{35}",  # Google
    r"(?<![\w-])eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]*",  # JSON web tokens
    rf"(?<![\w-])(?i:bearer)\s+{_RANDOM}[\w.~+/=-]{{16,}}",
    r"(?<=://)[^\s/:@]+:[^\s/@]+(?=@)",  # user:password of an address
)


class Redactor:
    """Replaces secrets by ``***`` in plain JSON values.

    >>> Redactor(["a-very-secret-value"]).clean({"error": ["bad key a-very-secret-value"]})
    {'error': ['bad key ***']}

    Args:
        secrets: Values that are secret; those shorter than `SHORTEST`, ordinary words, numbers and paths of existing
            files are not hidden.
    """

    def __init__(self, secrets: Iterable[str] = ()):
        known = {value for value in secrets if _is_worth_hiding(value)}
        # The longest first: of two secrets that begin alike, the longer would otherwise be hidden only in part.
        values = [re.escape(value) for value in sorted(known, key=lambda value: (-len(value), value))]
        self._pattern = re.compile("|".join((*values, *_SHAPES)))

    @classmethod
    def of(cls, program: "dspy.Module", *lms: object) -> "Redactor":
        """A redactor that knows the secrets of the program's LMs, of these and of the environment."""
        import dspy

        environment = _named_secrets(dict(os.environ))
        others = (setting for lm in (*lms, dspy.settings.lm) for setting in _settings_of_lm(lm))
        settings = [*_settings_of_program(program), *others]
        return cls([*environment, *(secret for setting in settings for secret in _named_secrets(setting))])

    def clean(self, value: object) -> Any:
        """The value with every secret replaced, in keys and strings at any depth; lists and tuples become lists."""
        if isinstance(value, str):
            return self._pattern.sub(HIDDEN, value)
        if isinstance(value, Mapping):
            return {self.clean(key): self.clean(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.clean(item) for item in value]
        return value

    def places(self, value: object) -> list[str]:
        """Where in a plain value secrets stand, e.g. ``["first.demos[0].answer"]``."""
        return list(self._places(value, ""))

    def _places(self, value: object, where: str) -> Iterator[str]:
        if isinstance(value, Mapping):
            for key, item in value.items():
                yield from self._places(item, f"{where}.{key}" if where else str(key))
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                yield from self._places(item, f"{where}[{index}]")
        elif isinstance(value, str) and self.clean(value) != value:
            yield where


def secret_faults(redactor: Redactor, documents: Mapping[str, object]) -> list[str]:
    """A sentence for each place in these documents (name -> plain value) that holds a secret."""
    return [
        f"{name} would hold a secret at {place}: an API key, or the value of an environment variable that is named "
        "like one; remove it from the program, then save it again"
        for name, document in sorted(documents.items())
        for place in redactor.places(document)
    ]


def is_secret(name: str, value: str) -> bool:
    """Whether a setting of this name and value must not be recorded.

    The name decides regardless of the value: the attribute is left out as a whole, so no other text is spoilt. The
    value decides if it is one of the environment's secrets or looks like a key.
    """
    if _NAME.search(name):
        return True
    return _knowing(tuple(_named_secrets(dict(os.environ)))).clean(value) != value


@lru_cache(maxsize=8)
def _knowing(secrets: tuple[str, ...]) -> Redactor:
    return Redactor(secrets)


def _is_worth_hiding(value: str) -> bool:
    if len(value) < SHORTEST or _ORDINARY.fullmatch(value):
        return False
    try:
        return not os.path.exists(value)  # GOOGLE_APPLICATION_CREDENTIALS names a file
    except ValueError:
        return True


def _named_secrets(value: object, named: bool = False) -> Iterator[str]:
    """Strings under a name that marks them as secret; ``Bearer x`` counts as a whole and as ``x``."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _named_secrets(item, bool(_NAME.search(str(name))))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _named_secrets(item, named)
    elif isinstance(value, str) and named:
        yield value
        if len(words := value.split()) == 2:
            yield words[1]


def _settings_of_program(program: "dspy.Module") -> Iterator[Mapping[str, object]]:
    """Settings of every LM that a module of the program holds, and of every predictor's calls."""
    import dspy

    for _, module in program.named_sub_modules():
        yield getattr(module, "config", None) or {}
        for attribute in vars(module).values():
            if isinstance(attribute, dspy.BaseLM):
                yield from _settings_of_lm(attribute)


def _settings_of_lm(lm: object) -> Iterator[Mapping[str, object]]:
    """Attributes of an LM and of its engine object. A PolicyLM's engine has the engine options, others have keys."""
    for part in (lm, getattr(lm, "_engine_spec", None)):  # dspy 3.4 keeps a custom engine there
        yield {name: value for name, value in getattr(part, "__dict__", {}).items() if name != "history"}
