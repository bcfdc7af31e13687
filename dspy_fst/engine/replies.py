"""From sampled tokens to a reply: where it ends, its thoughts, content and tool calls, and its log-probabilities.

The same for every engine; a server only samples. transformers' response templates describe how a model writes thoughts
and tool calls. A server's own parsers are not used: vLLM's bring grammars that change the distribution, and two engines
could read the same reply differently.

A model's files may disagree about the tokens that end a reply. A chat fine-tune often names its end of turn only in the
tokenizer, or only in generation_config.json. An engine that reads just one of them samples on to ``max_tokens`` where
another engine stops, so the union of what they name is used.
"""

import hashlib
import json
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict, cast, get_args

from dspy import lm15
from pydantic import JsonValue

from dspy_fst.engine.base import Completion
from dspy_fst.engine.chat import PLAIN, TemplateTraits, decoded
from dspy_fst.model_files.reading import read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# ---- its parts -----------------------------------------------------------------------------------


class ResponseTemplate(TypedDict, total=False):
    """transformers' description of how a model writes its replies (release 5.19)."""

    start_anchor_pattern: str
    fields: Mapping[str, Mapping[str, object]]


class WrittenFunction(TypedDict):
    """A tool call, if the model wrote a good one: nothing of it is checked before lm15 does."""

    name: str
    arguments: dict[str, JsonValue]


class ParsedReply(TypedDict, total=False):
    """A reply's parts, as transformers parses them; thoughts have one of three names."""

    reasoning_content: str
    reasoning: str
    thinking: str
    content: str
    tool_calls: list[Mapping[str, object]]


THINK, THOUGHT, TOOL_CALL = "<think>", "</think>", "<tool_call>"
HERMES: ResponseTemplate = {
    "start_anchor_pattern": r"\A",
    "fields": {
        "reasoning_content": {"open_pattern": r"\A\s*<think>", "close_pattern": r"</think>\s*", "content": "text"},
        "tool_calls": {"open": TOOL_CALL, "close_pattern": r"</tool_call>\s*", "repeats": True, "content": "json"},
        "content": {"content": "text", "repeats": True, "join": "\n"},
    },
}
"""The format of Hermes, Qwen3 and many others; used for tokenizers without a response template of their own."""
_Thoughts = Literal["reasoning_content", "reasoning", "thinking"]
_THOUGHTS: tuple[_Thoughts, ...] = get_args(_Thoughts)
"""Names that response templates give to thoughts."""
_TAIL = 16
"""How many tokens at the end of a prompt are searched for an opening tag of thoughts."""


@dataclass(frozen=True)
class ReplyReader:
    """Divides the replies of one model.

    >>> reader = ReplyReader.load(checkpoint.path)       # doctest: +SKIP
    >>> reader.read(completion, request)               # doctest: +SKIP
    """

    tokenizer: "PreTrainedTokenizerBase | None"
    """None where nothing is divided."""
    template: ResponseTemplate
    thinks: bool
    """Whether the model may think before it answers."""
    takes_tools: bool
    """Whether the chat template shows tools to the model."""
    traits: TemplateTraits = PLAIN
    """How the chat template treats a conversation; requests are fitted to it (`dspy_fst.engine.chat`)."""
    stop_ids: frozenset[int] = frozenset()
    """Ids of the tokens that end a reply, by all of the model's files."""

    @classmethod
    def load(cls, path: Path) -> "ReplyReader":
        """The reader for a Hugging Face folder; without a tokenizer, one that divides nothing."""
        if not (path / "tokenizer_config.json").is_file():
            return UNREAD
        return cls.of(read_tokenizer(path), path)

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase", folder: Path | None = None) -> "ReplyReader":
        """The reader for a tokenizer with its chat template, loaded from the model's folder."""
        own: ResponseTemplate | None = getattr(tokenizer, "response_template", None)
        chat = tokenizer.get_chat_template(tools=[{}]) if tokenizer.chat_template else ""
        thinks = THOUGHT in chat if own is None else any(name in own["fields"] for name in _THOUGHTS)
        stops = frozenset() if folder is None else stop_ids(folder, tokenizer)
        return cls(tokenizer, own or HERMES, thinks, "tools" in chat, TemplateTraits.of(tokenizer), stops)

    def check(self, request: lm15.Request) -> None:
        """Raises UnsupportedFeatureError if the request has tools that the chat template does not show to the model."""
        if request.tools and not self.takes_tools:
            raise lm15.UnsupportedFeatureError(
                "the model's chat template does not show tools; leave use_native_function_calling off, so that DSPy "
                "writes them into the prompt"
            )

    def read(self, completion: Completion, request: lm15.Request) -> Completion:
        """The completion with its text divided; unchanged if there is nothing to divide.

        Parts that a server has already divided are kept. A tool call that is not JSON remains text, which the adapter
        then refuses.
        """
        choice = request.config.tool_choice
        tools = bool(request.tools) and (choice is None or choice.mode != "none")
        if not (self.thinks or tools):
            return completion
        response = completion.response
        text = "".join(part.text for part in response.message.parts if isinstance(part, lm15.TextPart))
        others = [part for part in response.message.parts if not isinstance(part, lm15.TextPart)]
        parsed = self._parsed(text, self._begun(completion, others), tools)
        calls = _calls(parsed.get("tool_calls") or [], completion)
        thoughts = [thought for name in _THOUGHTS if (thought := parsed.get(name))]
        if thoughts or calls:
            content = [lm15.TextPart(parsed["content"])] if parsed.get("content") else []
            parts = (*(lm15.ThinkingPart(thought) for thought in thoughts), *others, *content, *calls)
            response = replace(response, message=replace(response.message, parts=parts))
        thought = "".join(part.text for part in response.message.parts if isinstance(part, lm15.ThinkingPart))
        tokens = self._reasoning_tokens(thought, completion.completion_ids)
        if calls and completion.finish_reason == "stop":
            response = replace(response, finish_reason="tool_call")
            completion = replace(completion, finish_reason="tool_calls")
        usage = replace(response.usage, reasoning_tokens=tokens or None)
        return replace(completion, response=replace(response, usage=usage), reasoning_tokens=tokens)

    def _begun(self, completion: Completion, others: Sequence[object]) -> str:
        """The beginning of the reply that the prompt contains already: an opening tag of thoughts, or nothing."""
        if not self.thinks or any(isinstance(part, lm15.ThinkingPart) for part in others):
            return ""
        if self.template is not HERMES:
            return self._text(completion.prompt_ids)
        tail = self._text(completion.prompt_ids[-_TAIL:])
        return THINK if tail.rstrip().endswith(THINK) else ""

    def _parsed(self, text: str, begun: str, tools: bool) -> ParsedReply:
        from transformers.utils.chat_parsing.response_parser import parse_response

        fields = {name: field for name, field in self.template["fields"].items() if tools or name != "tool_calls"}
        try:
            parsed = cast(ParsedReply, parse_response(text, {**self.template, "fields": fields}, prefix=begun))
            for call in parsed.get("tool_calls") or []:
                _call("unused", call)  # raises if the call is malformed
        except (ValueError, TypeError, KeyError, AttributeError):
            return self._parsed(text, begun, tools=False) if tools else {}
        return parsed

    def _text(self, ids: tuple[int, ...], **options: bool) -> str:
        assert self.tokenizer is not None, "a reader that divides replies has a tokenizer"
        return decoded(self.tokenizer, ids, **options)

    def _reasoning_tokens(self, thought: str, ids: tuple[int, ...]) -> int:
        """Number of sampled tokens up to the end of the thoughts, an opening tag included."""
        whole = self._text(ids, skip_special_tokens=True)
        end = whole.find(thought) + len(thought)
        if not thought or end < len(thought):
            return 0

        def length(tokens: int) -> int:
            return len(self._text(ids[:tokens], skip_special_tokens=True))

        return bisect_left(range(len(ids)), end, key=length)


UNREAD = ReplyReader(tokenizer=None, template=HERMES, thinks=False, takes_tools=False)
"""A reader that divides nothing, for a folder without a tokenizer."""


def _calls(calls: list[Mapping[str, object]], completion: Completion) -> list[lm15.ToolCallPart]:
    """Tool calls with ids that depend on the tokens only, and are short and plain enough for every chat template."""
    tokens = repr((completion.prompt_ids, completion.completion_ids))
    digests = (hashlib.sha256(f"{tokens} {number}".encode()).hexdigest() for number in range(len(calls)))
    return [_call(digest[:9], call) for digest, call in zip(digests, calls, strict=True)]


def _call(call_id: str, call: Mapping[str, object]) -> lm15.ToolCallPart:
    """
    Raises:
        TypeError, KeyError, ValueError, AttributeError: the model wrote no name or arguments, or of another type.
    """
    function = cast(WrittenFunction, call.get("function", call))
    return lm15.ToolCallPart(id=call_id, name=function["name"], input=function["arguments"])


# ---- where it ends -------------------------------------------------------------------------------


def stop_ids(folder: Path, tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """Ids of the tokens that end a reply, from generation_config.json, config.json and the tokenizer."""
    ids = [*_ids(getattr(tokenizer, "eos_token_id", None))]
    for name in ("generation_config.json", "config.json"):
        try:
            settings = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # the file may be missing; the loader reports one that cannot be read
        for holder in (settings, settings.get("text_config")):
            if isinstance(holder, dict):
                ids += _ids(holder.get("eos_token_id"))
    return frozenset(ids)


def with_stop_tokens(request: lm15.Request, ids: frozenset[int]) -> lm15.Request:
    """The request with these ids added to its stop tokens, so that a server ends the reply there."""
    if not ids:
        return request
    extensions = dict(request.config.extensions or {})
    asked = extensions.get("stop_token_ids")
    extensions["stop_token_ids"] = sorted({*ids, *(asked if isinstance(asked, list | tuple) else ())})
    return replace(request, config=replace(request.config, extensions=extensions))


def _ids(value: object) -> Iterator[int]:
    """The ids in an ``eos_token_id``, which may be missing, one id or a list."""
    values: Iterable[object] = value if isinstance(value, list) else [value]
    for item in values:
        if isinstance(item, int) and not isinstance(item, bool) and item >= 0:
            yield item


# ---- its log-probabilities -----------------------------------------------------------------------


def with_logprobs(
    completion: Completion, tokens: Sequence[str], likeliest: Sequence[Mapping[str, float] | None] = ()
) -> Completion:
    """The completion, with a log-probability entry in its response for every sampled token, the last one included.

    Args:
        completion: The completion.
        tokens: Text of each sampled token.
        likeliest: For each sampled token, the likeliest alternatives at its position and their log-probabilities in
            nats; empty if the caller did not ask for them.
    """
    entries = tuple(
        lm15.TokenLogprob(token=text, logprob=logprob, bytes=_bytes(text), token_id=number, top=_ranked(others))
        for text, logprob, number, others in zip(
            tokens,
            completion.logprobs,
            completion.completion_ids,
            likeliest or [None] * len(tokens),
            strict=True,
        )
    )
    return replace(completion, response=replace(completion.response, logprobs=entries))


def _ranked(others: Mapping[str, float] | None) -> tuple[lm15.TopLogprob, ...]:
    ranked = sorted((others or {}).items(), key=lambda entry: -entry[1])
    return tuple(lm15.TopLogprob(token=text, logprob=logprob, bytes=_bytes(text)) for text, logprob in ranked)


def _bytes(text: str) -> tuple[int, ...]:
    return tuple(text.encode("utf-8", "replace"))
