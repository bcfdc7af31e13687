"""Requests to the chat endpoint: the part of OpenAI's chat completions that is offered here.

Contract: a message that this server or OpenAI's client returned may be sent back (`AssistantMessage`), and a setting
whose value changes nothing never refuses a request. Text only: no address that a caller names is fetched.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic.config import JsonDict, JsonValue

from dspy_fst.engine.base import LEAST_TEMPERATURE, temperature_fault
from dspy_fst.serve.body import MOST_DEEP, check_count, check_values, parsed
from dspy_fst.serve.error_replies import ApiError
from dspy_fst.serve.schema import Sent

MOST_MESSAGES = 2048
"""As many as OpenAI takes."""
MOST_ARGUMENTS = 10_000
"""Values in the arguments of one tool call."""


def _is_object(text: str) -> str:
    """Check that the arguments of a tool call are a JSON object, which every chat template can read."""
    if not text:
        return text
    try:
        check_count(text.encode(), MOST_ARGUMENTS)
        value = parsed(text)
        check_values(value)
    except ApiError as error:
        raise ValueError(f"arguments must be a JSON object of at most {MOST_DEEP} levels ({error.code})") from None
    if not isinstance(value, dict):
        raise ValueError("arguments must be a JSON object, as text")
    return text


def _is_sampled(temperature: float) -> float:
    if fault := temperature_fault(temperature):
        raise ValueError(fault)
    return temperature


def _is_false(value: bool) -> bool:
    if value:
        raise ValueError("only false is offered here")
    return value


Off = Annotated[bool, AfterValidator(_is_false), Field(json_schema_extra={"enum": [False]})]
"""A switch that stays off."""
Nothing = Annotated[dict[str, object], Field(max_length=0)]
Temperature = Annotated[
    float,
    AfterValidator(_is_sampled),
    WithJsonSchema({"type": "number", "anyOf": [{"const": 0}, {"minimum": LEAST_TEMPERATURE, "maximum": 2}]}),
]


# ---- messages ------------------------------------------------------------------------------------


class TextPart(Sent):
    type: Literal["text"]
    text: str


Content = str | list[TextPart]


class SystemMessage(Sent):
    role: Literal["system", "developer"]
    """``"developer"`` is OpenAI's newer name for the same; chat templates know the older one."""
    content: Content
    name: str | None = None


class UserMessage(Sent):
    role: Literal["user"]
    content: Content
    name: str | None = None


class Function(Sent):
    name: str
    arguments: Annotated[str, AfterValidator(_is_object)]


class ToolCall(Sent):
    id: str
    type: Literal["function"] = "function"
    function: Function


class AssistantMessage(Sent):
    """A reply as this server, OpenAI's client or LiteLLM returns it, empty fields included."""

    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    annotations: list[dict[str, object]] | None = None
    audio: None = None
    function_call: None = None
    provider_specific_fields: dict[str, object] | None = None


class ToolMessage(Sent):
    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


def _has_a_turn(messages: list[Message]) -> list[Message]:
    if all(isinstance(message, SystemMessage) for message in messages):
        raise ValueError("a message from user, assistant or tool is needed")
    return messages


_TURN = {"contains": {"properties": {"role": {"enum": ["user", "assistant", "tool"]}}, "required": ["role"]}}
Messages = Annotated[
    list[Message],
    Field(min_length=1, max_length=MOST_MESSAGES, json_schema_extra=_TURN),
    AfterValidator(_has_a_turn),
]
"""The engine in process needs a turn, and templates differ in what they do with system messages alone."""


def as_template_reads(message: Message) -> dict[str, object]:
    """A message as both engines take it, without fields that no chat template shows.

    A speaker's ``name`` is left out too: a template that shows it would get another prompt than the engine in process
    makes. A tool's name stays: templates of models that call tools print it.
    """
    document = message.model_dump(exclude_none=True, exclude={"refusal", "annotations", "provider_specific_fields"})
    if not isinstance(message, ToolMessage):
        document.pop("name", None)
    if isinstance(message, SystemMessage):
        document["role"] = "system"
    if isinstance(message, AssistantMessage):
        if message.refusal is not None and message.content is None:
            document["content"] = message.refusal
        if (thought := document.pop("reasoning", None)) is not None:
            document.setdefault("reasoning_content", thought)
        if not message.tool_calls:
            document.pop("tool_calls", None)
            document.setdefault("content", "")
    return document


# ---- settings ------------------------------------------------------------------------------------


class FunctionTold(Sent):
    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, object] | None = None
    strict: bool | None = None


class Tool(Sent):
    type: Literal["function"]
    function: FunctionTold


class FunctionName(Sent):
    name: str


class ToolNamed(Sent):
    type: Literal["function"]
    function: FunctionName


class TextFormat(Sent):
    type: Literal["text", "json_object"]


class JsonSchema(Sent):
    name: str
    description: str | None = None
    schema_: dict[str, object] = Field(alias="schema")
    strict: bool | None = None


class SchemaFormat(Sent):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class StreamOptions(Sent):
    include_usage: bool | None = None
    include_obfuscation: Off | None = None


def _where(name: str, values: JsonDict, needs: str, need: JsonDict) -> JsonDict:
    """A rule of JSON Schema: when setting ``name`` has one of these values, setting ``needs`` must be given."""
    condition: JsonDict = {"properties": {name: values}, "required": [name]}
    return {"if": condition, "then": {"properties": {needs: need}, "required": [needs]}}


_TOGETHER: list[JsonValue] = [
    _where("top_logprobs", {"type": "integer", "minimum": 1}, "logprobs", {"const": True}),
    _where("tool_choice", {"not": {"enum": [None, "none", "auto"]}}, "tools", {"type": "array", "minItems": 1}),
]
"""What `ChatRequest._fits_together` checks."""


class ChatRequest(Sent):
    """OpenAI's chat completions, as far as the engines support them. Both engines know the first settings."""

    model_config = ConfigDict(json_schema_extra={"allOf": _TOGETHER})
    model: str
    messages: Messages
    temperature: Temperature | None = Field(None, description="The trained policy's own when it is not given.")
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=0, lt=2**31)
    n: int | None = Field(None, ge=1, le=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Sent by some clients, without effect on the reply.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None
    # Accepted only with values that change nothing.
    store: Off | None = None
    logit_bias: Nothing | None = None
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: None = None
    verbosity: None = None
    functions: None = None
    function_call: None = None
    audio: None = None
    prediction: None = None
    web_search_options: None = None
    moderation: None = None
    prompt_cache_retention: None = None
    prompt_cache_options: None = None
    service_tier: Literal["auto", "default"] | None = None
    # Settings of a vLLM server.
    top_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    stop: str | list[str] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolNamed | None = None
    parallel_tool_calls: bool | None = None
    response_format: TextFormat | SchemaFormat | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if not self.tools and self.tool_choice not in (None, "none", "auto"):
            raise ValueError("tool_choice names a tool, and there are no tools")
        return self

    @property
    def most(self) -> tuple[str, int] | None:
        """(setting, tokens) of the longest reply that the caller asks for; None where it does not."""
        for name in ("max_completion_tokens", "max_tokens"):
            if (value := getattr(self, name)) is not None:
                return name, value
        return None

    def for_server(self) -> dict[str, object]:
        """The caller's settings for a vLLM server, without those that change nothing."""
        given = self.model_dump(exclude_none=True, by_alias=True, include=_EVERYWHERE | _SERVER)
        return {name: value for name, value in given.items() if not self._changes_nothing(name)}

    def unknown_in_process(self) -> list[str]:
        """Names of settings that the engine in process does not support."""
        neutral: Mapping[str, object] = {"top_p": 1, "presence_penalty": 0, "frequency_penalty": 0}
        given = self.for_server()
        return [name for name in given if name not in _EVERYWHERE and given[name] != neutral.get(name)]

    def _changes_nothing(self, name: str) -> bool:
        value = getattr(self, name)
        if name in ("tool_choice", "parallel_tool_calls"):
            return not self.tools
        if name == "top_logprobs":
            return not self.logprobs
        if name == "response_format":
            return bool(value.type == "text")
        return name in ("stop", "tools", "logprobs") and value in ([], False)


_EVERYWHERE = {"temperature", "seed"}
"""Settings that both engines take as they are."""
_SERVER = {
    *("top_p", "presence_penalty", "frequency_penalty", "stop", "logprobs", "top_logprobs"),
    *("tools", "tool_choice", "parallel_tool_calls", "response_format"),
}
"""Settings that only a vLLM server takes."""
