"""What DSPy 3.5 changes, in one place: its default adapter, its agents, the form of its prompts, and LiteLLM.

The package runs on DSPy 3.4 (``pyproject.toml``), which pins the release of gepa whose state a search is seeded
through. Code that would hang on a change of 3.5 asks here, so that the next release is taken up in this file. It is
tested under 3.4 with what 3.5 has: an XMLAdapter with native function calling, one agent, prompts of objects, and no
LiteLLM.
"""

from collections.abc import Iterable, Mapping
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, TypeAlias

import dspy
from packaging.version import Version

XML_IS_THE_DEFAULT = Version("3.5.dev0")
"""First release of DSPy whose default adapter is an XMLAdapter with native function calling."""
if TYPE_CHECKING:
    Agent: TypeAlias = dspy.ReAct | dspy.ReActV2


def default_adapter() -> dspy.Adapter:
    """A new adapter of the kind that DSPy uses where its settings hold none."""
    if Version(dspy.__version__) >= XML_IS_THE_DEFAULT:
        return dspy.XMLAdapter(use_native_function_calling=True)
    return dspy.ChatAdapter()


DEFAULT_ADAPTER = default_adapter()
"""That of the installed release. Who changes an adapter makes a new one."""


def agents() -> tuple[type[dspy.Module], ...]:
    """DSPy's agents: ReAct and ReActV2 in 3.4, one of them in 3.5."""
    found = (getattr(dspy, name, None) for name in ("ReAct", "ReActV2"))
    return tuple(dict.fromkeys(kind for kind in found if kind is not None))


AGENTS = agents()
"""Those of the installed release."""


def tells_its_tools(agent: object) -> bool:
    """Whether this agent copies its tools' descriptions into its instruction, as ReAct of 3.4 does when it is made.

    The other kind hands its tools to the adapter at every call.
    """
    newer = getattr(dspy, "ReActV2", None)
    return newer is not None and dspy.ReAct is not newer and isinstance(agent, dspy.ReAct)


def in_words(messages: Iterable[object]) -> str:
    """A formatted prompt as text: messages are dicts in 3.4, objects in 3.5."""
    return "\n".join(f"{_of(message, 'role')}: {_content(message)}" for message in messages)


def _of(message: object, name: str) -> object:
    return message[name] if isinstance(message, Mapping) else getattr(message, name)


def _content(message: object) -> object:
    """A message's text. lm15's messages have parts instead of a content."""
    parts = getattr(message, "parts", None)
    if parts is None:
        return _of(message, "content")
    return "".join(getattr(part, "text", "") or "" for part in parts)


def litellm_if_installed() -> ModuleType | None:
    """LiteLLM, which DSPy 3.5 does without where its own engine speaks to the provider; None: not installed."""
    try:
        return import_module("litellm")
    except ImportError:
        return None
