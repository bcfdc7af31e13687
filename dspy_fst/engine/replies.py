"""What a sampled text says: thoughts, content, tool calls. Read here for every engine; a server only samples.

How a model writes them is told by transformers' response templates. A server's own parsers are not used: vLLM's come
with grammars that change the distribution, and two engines would read one reply in two ways.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dspy import lm15

from dspy_fst.engine.base import Completion
from dspy_fst.engine.stop_tokens import stop_ids
from dspy_fst.engine.template_traits import PLAIN, TemplateTraits

THINK, THOUGHT, TOOL_CALL = "<think>", "</think>", "<tool_call>"
HERMES: Mapping[str, Any] = {
    "start_anchor_pattern": r"\A",
    "fields": {
        "reasoning_content": {"open_pattern": r"\A\s*<think>", "close_pattern": r"</think>\s*", "content": "text"},
        "tool_calls": {"open": TOOL_CALL, "close_pattern": r"</tool_call>\s*", "repeats": True, "content": "json"},
        "content": {"content": "text", "repeats": True, "join": "\n"},
    },
}
"""How Hermes, Qwen3 and many others write; for tokenizers that bring no response template of their own."""
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Names that response templates have for them."""
_TAIL = 16
"""Tokens at the end of a prompt among which a template may have opened the thoughts."""


@dataclass(frozen=True)
class ReplyReader:
    """Reads the replies of one model.

    >>> reader = ReplyReader.load(checkpoint.path)       # doctest: +SKIP
    >>> reader.read(completion, request)               # doctest: +SKIP
    """

    tokenizer: Any
    template: Mapping[str, Any]
    thinks: bool
    """Whether the model may think before it answers."""
    takes_tools: bool
    """Whether the chat template shows tools to the model."""
    traits: TemplateTraits = PLAIN
    """How the chat template treats a conversation; requests are fitted to it (`dspy_fst.engine.template_traits`)."""
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end a reply, by all that the model's files say."""

    @classmethod
    def load(cls, path: Path) -> "ReplyReader":
        """The reader for a Hugging Face folder; one that divides nothing where there is no tokenizer."""
        if not (path / "tokenizer_config.json").is_file():
            return UNREAD
        from transformers import AutoTokenizer

        return cls.of(AutoTokenizer.from_pretrained(path, trust_remote_code=False), path)

    @classmethod
    def of(cls, tokenizer: Any, folder: Path | None = None) -> "ReplyReader":
        """The reader for a tokenizer with its chat template, and for the model's folder that it came from."""
        own: Mapping[str, Any] | None = getattr(tokenizer, "response_template", None)
        chat = tokenizer.get_chat_template(tools=[{}]) if tokenizer.chat_template else ""
        thinks = THOUGHT in chat if own is None else any(name in own["fields"] for name in _THOUGHTS)
        stops = frozenset() if folder is None else stop_ids(folder, tokenizer)
        return cls(tokenizer, own or HERMES, thinks, "tools" in chat, TemplateTraits.of(tokenizer), stops)

    def check(self, request: lm15.Request) -> None:
        """Raises UnsupportedFeatureError when the request has tools that the model would never see."""
        if request.tools and not self.takes_tools:
            raise lm15.UnsupportedFeatureError(
                "the model's chat template does not show tools; leave use_native_function_calling off, so that DSPy "
                "writes them into the prompt"
            )

    def read(self, completion: Completion, request: lm15.Request) -> Completion:
        """The completion with its text divided; as it was where there is nothing to divide.

        What a server has divided already stays so. A tool call that is no JSON stays text, for the adapter to refuse.
        """
        choice = request.config.tool_choice
        tools = bool(request.tools) and (choice is None or choice.mode != "none")
        if not (self.thinks or tools):
            return completion
        response = completion.response
        text = "".join(part.text for part in response.message.parts if isinstance(part, lm15.TextPart))
        others = [part for part in response.message.parts if not isinstance(part, lm15.TextPart)]
        found = self._parsed(text, self._begun(completion, others), tools)
        calls = _calls(found.get("tool_calls") or [], completion)
        thoughts = [found[name] for name in _THOUGHTS if found.get(name)]
        if thoughts or calls:
            content = [lm15.TextPart(found["content"])] if found.get("content") else []
            parts = (*(lm15.ThinkingPart(thought) for thought in thoughts), *others, *content, *calls)
            response = replace(response, message=replace(response.message, parts=parts))
        thought = "".join(part.text for part in response.message.parts if isinstance(part, lm15.ThinkingPart))
        tokens = self._tokens_to_the_end_of(thought, completion.completion_ids)
        if calls and completion.finish_reason == "stop":
            response = replace(response, finish_reason="tool_call")
            completion = replace(completion, finish_reason="tool_calls")
        usage = replace(response.usage, reasoning_tokens=tokens or None)
        return replace(completion, response=replace(response, usage=usage), reasoning_tokens=tokens)

    def _begun(self, completion: Completion, others: list[Any]) -> str:
        """What the prompt wrote of the reply: an opening tag, or nothing."""
        if not self.thinks or any(isinstance(part, lm15.ThinkingPart) for part in others):
            return ""
        if self.template is not HERMES:
            return str(self.tokenizer.decode(completion.prompt_ids))
        tail = self.tokenizer.decode(completion.prompt_ids[-_TAIL:])
        return THINK if tail.rstrip().endswith(THINK) else ""

    def _parsed(self, text: str, begun: str, tools: bool) -> dict[str, Any]:
        from transformers.utils.chat_parsing.response_parser import parse_response

        fields = {name: field for name, field in self.template["fields"].items() if tools or name != "tool_calls"}
        try:
            found: dict[str, Any] = parse_response(text, {**self.template, "fields": fields}, prefix=begun)
            for call in found.get("tool_calls") or []:
                _call("unused", call)
        except (ValueError, TypeError, KeyError, AttributeError):
            return self._parsed(text, begun, tools=False) if tools else {}
        return found

    def _tokens_to_the_end_of(self, thought: str, ids: tuple[int, ...]) -> int:
        """How many of the sampled tokens it takes to write the thoughts, an opening tag included."""
        whole = self.tokenizer.decode(ids, skip_special_tokens=True)
        end = whole.find(thought) + len(thought)
        if not thought or end < len(thought):
            return 0

        def length(tokens: int) -> int:
            return len(self.tokenizer.decode(ids[:tokens], skip_special_tokens=True))

        return bisect_left(range(len(ids)), end, key=length)


UNREAD = ReplyReader(None, HERMES, thinks=False, takes_tools=False)
"""Divides nothing: for a folder without a tokenizer."""


def _calls(found: list[Any], completion: Completion) -> list[lm15.ToolCallPart]:
    """Tool calls with ids that the same tokens always get, short and plain enough for every chat template."""
    tokens = repr((completion.prompt_ids, completion.completion_ids))
    digests = (hashlib.sha256(f"{tokens} {number}".encode()).hexdigest() for number in range(len(found)))
    return [_call(digest[:9], call) for digest, call in zip(digests, found, strict=True)]


def _call(name: str, found: Any) -> lm15.ToolCallPart:
    function = found.get("function", found)
    return lm15.ToolCallPart(id=name, name=function["name"], input=function["arguments"])
