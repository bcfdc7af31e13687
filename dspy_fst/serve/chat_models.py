"""The names at the chat endpoint, and what answers to each.

A program that speaks with one set of weights has one name, the setting ``model_name``. Where predictors speak through
LoRA adapters of their own, each adapter is a model under its name, as at a vLLM server. The base is none of them:
nobody trained it, and its replies would pass for the program's.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import dspy

from dspy_fst.errors import ConfigurationError
from dspy_fst.policy_lm import PolicyLM, policy_of
from dspy_fst.serve.chat_completions import Chat
from dspy_fst.serve.chat_reply import ModelCard
from dspy_fst.serve.error_replies import ApiError, quoted
from dspy_fst.serve.serving_settings import ServeSettings


@dataclass(frozen=True)
class Served:
    """What answers to one name."""

    policy: PolicyLM
    """Its sampling is a request's, where the request says nothing."""
    adapter: str | None
    """The LoRA adapter that is named in calls; None: the engine's only weights."""


def served_models(program: dspy.Module, model_name: str) -> dict[str, Served]:
    """Name -> what answers to it.

    Raises:
        ConfigurationError: a name is set, where the LoRA adapters have their own.
    """
    policy = policy_of(program)
    adapters = [adapter.name for adapter in policy.checkpoint.adapters]
    if len(adapters) < 2:
        return {model_name: Served(policy, None)}
    if model_name != ServeSettings.model_name:
        raise ConfigurationError(
            [
                f"model_name={model_name!r}: the program speaks through {len(adapters)} LoRA adapters, and the models "
                f"have their names ({', '.join(adapters)}); leave it out"
            ]
        )
    lms = [predictor.lm for _, predictor in program.named_predictors() if isinstance(predictor.lm, PolicyLM)]
    return {name: Served(_first(lms, name) or policy, name) for name in adapters}


def _first(lms: Iterable[PolicyLM], adapter: str) -> PolicyLM | None:
    return next((lm for lm in lms if lm.lora_adapter == adapter), None)


class ChatModels:
    """The endpoints of all names."""

    def __init__(self, chats: Mapping[str, Chat]):
        self._chats = chats

    def of(self, name: str) -> Chat:
        """What answers to a name.

        Raises:
            ApiError: nothing does.
        """
        if name not in self._chats:
            known = ", ".join(map(repr, self._chats))
            message = f"There is no model {quoted(name)} here, only {known}."
            raise ApiError(404, "model_not_found", message, param="model")
        return self._chats[name]

    def cards(self) -> list[ModelCard]:
        return [ModelCard(id=name) for name in self._chats]
