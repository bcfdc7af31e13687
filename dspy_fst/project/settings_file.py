"""A file of settings: YAML without duplicate keys and without secrets."""

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path

import yaml  # type: ignore[import-untyped]

from dspy_fst.errors import ConfigurationError

_SECRET = re.compile(
    r"((api|access|private|secret|subscription)_?key|secret|passw(or)?d|passphrase|credential|cookie)s?$"
    r"|authorization$|(?<![a-z])auth$|(?<!max_)(?<!per_)token$",  # max_token is a slip, cost_per_token a price
    re.IGNORECASE,
)
"""Names of settings with secret values: arguments of litellm's providers and of vLLM, and headers."""


class _Loader(yaml.SafeLoader):
    """YAML that refuses duplicate keys; PyYAML silently takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        for key, count in Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)).items():
            if count > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_settings(path: Path) -> dict[str, object]:
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigurationError([f"{path}{line}: {error.problem}"]) from error
    except OSError as error:  # in full it names the path once more
        raise ConfigurationError([f"{path} cannot be read: {error.strerror or error}"]) from error
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigurationError([f"{path} cannot be read: {' '.join(str(error).split())}"]) from error
    if not isinstance(data, dict):
        raise ConfigurationError([f"{path}: it must hold settings, such as  program: my_program:build"])
    return data


def cleaner() -> Callable[[object], object]:
    """A function that replaces texts with the shape of a secret, such as the password in an address."""
    from dspy_fst.run.secrets import Redactor

    return Redactor().clean


def secrets_in(data: object, clean: Callable[[object], object], where: str = "") -> Iterator[str]:
    """Names of settings, at any depth, whose name or value is that of a secret."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            name = f"{where}.{key}" if where else str(key)
            if _SECRET.search(str(key).replace("-", "_")):
                yield name
            else:
                yield from secrets_in(value, clean, name)
    elif isinstance(data, list):
        for item in data:
            yield from secrets_in(item, clean, where)
    elif isinstance(data, str) and clean(data) != data:
        yield where
