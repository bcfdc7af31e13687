"""From a request to the exact token ids of its prompt, and from text to a response.

The contract of this file: every request is fitted to the model's chat template before it is rendered, in the same way
for every engine and for code that renders a prompt again. A template without a system role then neither drops a text
nor refuses a program.

The prompt of a later turn holds the text of earlier replies. Tokenizing that text again can give other ids than were
sampled, and the prompt would then hold a turn that was never sampled. `PromptRenderer.continued` keeps the sampled ids.
"""

import threading
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NotRequired, TypedDict, cast

from dspy import lm15
from jinja2 import TemplateError

from dspy_fst.engine.base import refuse_reshaped_sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# ---- what a template does with a conversation ----------------------------------------------------


SEPARATOR = "\n\n"
"""Separates the system text from the user's, and joined turns from each other."""
_SYSTEM, _ASKED, _SAID, _THOUGHT, _AGAIN = "qsystem", "qasked", "qsaid", "qthought", "qagain"
"""Probe texts, in lower case and without spaces at their ends, so that no template alters them."""
_ROLE_LINES = ("system", "user", "assistant", "model", "[INST]", "### Instruction:", "User:", "Human:")
"""Lines with which templates without special tokens begin a turn; they are not a system text."""


@dataclass(frozen=True)
class TemplateTraits:
    """How one chat template treats a conversation.

    >>> TemplateTraits(system="refused", alternating=True).has_system
    False
    """

    system: Literal["kept", "refused", "dropped"] = "kept"
    """Effect on a system message: ``"refused"`` raises an error, ``"dropped"`` renders the prompt without it."""
    alternating: bool = False
    """Whether two successive turns of one role are refused."""
    keeps_replies: bool = True
    """Whether the next turn's prompt begins with exactly this turn's prompt and reply."""
    keeps_thoughts: bool = True
    """`keeps_replies` for a reply with thoughts; many templates omit the thoughts of earlier turns."""
    own_system: str = ""
    """Text that the template itself puts before the first turn if there is no system message, special tokens left
    out."""

    @property
    def has_system(self) -> bool:
        return self.system == "kept"

    def without_thoughts(self) -> "TemplateTraits":
        """These traits for a model that does not think, so that its replies have no thoughts to omit."""
        return replace(self, keeps_thoughts=self.keeps_replies)

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase") -> "TemplateTraits":
        """The traits of a tokenizer's template; the defaults if it has none, or fails on a single question."""
        if not getattr(tokenizer, "chat_template", None):
            return cls()
        user, reply = _turn("user", _ASKED), _turn("assistant", _SAID)
        alone = _rendered(tokenizer, [user])
        if alone is None:
            return cls()
        with_system = _rendered(tokenizer, [_turn("system", _SYSTEM), user])
        system = "refused" if with_system is None else "kept" if _SYSTEM in with_system else "dropped"
        begun = [_turn("system", _SYSTEM), user] if system == "kept" else [user]
        thinking = {**reply, "reasoning_content": _THOUGHT}
        return cls(
            system=system,  # type: ignore[arg-type]
            alternating=_rendered(tokenizer, [user, user]) is None,
            keeps_replies=_goes_on(tokenizer, begun, reply, _SAID),
            keeps_thoughts=_goes_on(tokenizer, begun, thinking, _THOUGHT),
            own_system=_written_before(tokenizer, alone),
        )


PLAIN = TemplateTraits()
"""The traits of a template that renders every conversation unchanged."""


def fitted(request: lm15.Request, traits: TemplateTraits) -> lm15.Request:
    """The request in a form that this template renders completely.

    A system text that the template would refuse or drop is put into the first user turn, before the user's text. If
    turns must alternate, successive text turns of one role are joined.
    """
    messages = list(request.messages)
    system = request.system
    if system and not traits.has_system:
        text = system if isinstance(system, str) else "\n".join(getattr(part, "text", "") for part in system)
        if messages and messages[0].role == "user":
            messages[0] = _after(lm15.Message.user(text), messages[0])
        else:
            messages.insert(0, lm15.Message.user(text))
        system = None
    if traits.alternating:
        messages = _joined(messages)
    return replace(request, system=system, messages=tuple(messages))


def _joined(messages: Sequence[lm15.Message]) -> list[lm15.Message]:
    joined: list[lm15.Message] = []
    for message in messages:
        if joined and joined[-1].role == message.role and _is_text(joined[-1]) and _is_text(message):
            joined[-1] = _after(joined[-1], message)
        else:
            joined.append(message)
    return joined


def _after(first: lm15.Message, second: lm15.Message) -> lm15.Message:
    """The second message, preceded by the text of the first."""
    lead = first.text or ""
    head, *rest = second.parts
    if isinstance(head, lm15.TextPart):
        return replace(second, parts=(lm15.TextPart(f"{lead}{SEPARATOR}{head.text}"), *rest))
    return replace(second, parts=(lm15.TextPart(lead), *second.parts))


def _is_text(message: lm15.Message) -> bool:
    return all(isinstance(part, lm15.TextPart) for part in message.parts)


# ---- measuring a template ------------------------------------------------------------------------


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _rendered(tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, str]]) -> str | None:
    """The rendered conversation; None if the template refuses it."""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception:  # a template may raise any exception
        return None


def _goes_on(
    tokenizer: "PreTrainedTokenizerBase", begun: list[dict[str, str]], reply: dict[str, str], written: str
) -> bool:
    """Whether the prompt of the next turn begins with the prompt before it and then contains the reply."""
    before = _rendered(tokenizer, begun)
    after = _rendered(tokenizer, [*begun, reply, _turn("user", _AGAIN)])
    if before is None or after is None or not after.startswith(before):
        return False
    return written in after[len(before) :]


def _written_before(tokenizer: "PreTrainedTokenizerBase", alone: str) -> str:
    """The template's own words before a single question."""
    lead = alone.partition(_ASKED)[0]
    for token in getattr(tokenizer, "all_special_tokens", ()):
        lead = lead.replace(token, "\n")
    lines = [line.strip() for line in lead.splitlines()]
    return " ".join(line for line in lines if line and line not in _ROLE_LINES)


# ---- a request as messages of a template ---------------------------------------------------------


class _Said(TypedDict):
    content: str
    name: NotRequired[str | None]
    """Of the tool whose result it is."""
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[dict[str, object]]]


class ChatMessage(_Said):
    """One turn as chat templates read it, e.g. ``{"role": "user", "content": "What is a lynx?"}``."""

    role: str


_ROLES = {"developer": "system"}
"""OpenAI's newer name of a role -> the name that chat templates know."""


def chat_messages(request: lm15.Request) -> list[ChatMessage]:
    """The request as messages for ``tokenizer.apply_chat_template``: roles, texts, tool calls and their results.

    Raises:
        dspy.lm15.UnsupportedFeatureError: the request has media, stop strings or sampling that this engine cannot do.
    """
    refuse_reshaped_sampling(request)
    if request.config.stop:
        raise lm15.UnsupportedFeatureError("the in-process engine has no stop strings; use engine='vllm'")
    messages: list[ChatMessage] = []
    if request.system:
        system = request.system
        messages.append({"role": "system", "content": system if isinstance(system, str) else _text(system)})
    for message in request.messages:
        results = [part for part in message.parts if isinstance(part, lm15.ToolResultPart)]
        if results:
            messages += [{"role": "tool", "name": part.name, "content": _text(part.content)} for part in results]
        else:
            messages.append({"role": _ROLES.get(message.role, message.role), **_contents(message)})
    return messages


def _contents(message: lm15.Message) -> _Said:
    """A message's text, thoughts and tool calls, under the names that chat templates read."""
    calls = [part for part in message.parts if isinstance(part, lm15.ToolCallPart)]
    thoughts = [part.text for part in message.parts if isinstance(part, lm15.ThinkingPart)]
    rest = [part for part in message.parts if not isinstance(part, lm15.ToolCallPart | lm15.ThinkingPart)]
    functions = [{"name": call.name, "arguments": dict(call.input)} for call in calls]
    said: _Said = {"content": _text(rest)}
    if thoughts:
        said["reasoning_content"] = "\n".join(thoughts)
    if functions:
        said["tool_calls"] = [{"type": "function", "function": function} for function in functions]
    return said


def _text(parts: Sequence[object]) -> str:
    texts = [part.text for part in parts if isinstance(part, lm15.TextPart)]
    if len(texts) != len(parts):
        raise lm15.UnsupportedFeatureError("the in-process engine reads text messages only")
    return "\n".join(texts)


def chat_options(request: lm15.Request) -> dict[str, object]:
    """Further arguments of a chat template: the tools, and how much a reasoning model shall think."""
    tools = [
        {"type": "function", "function": {"name": t.name, "description": t.description, "parameters": t.parameters}}
        for t in request.tools
        if isinstance(t, lm15.FunctionTool)
    ]
    reasoning = request.config.reasoning
    thinking: dict[str, object] = {}
    if reasoning is not None:  # under vLLM's names
        effort = "none" if reasoning.is_off else reasoning.effort
        thinking = {"enable_thinking": not reasoning.is_off, "reasoning_effort": effort}
    return {**({"tools": tools} if tools else {}), **thinking}


def text_response(
    model: str, text: str, finish_reason: str, prompt_tokens: int, completion_tokens: int
) -> lm15.Response:
    """A canonical response with one text part."""
    return lm15.Response(
        id=None,
        model=model,
        message=lm15.Message.assistant(text),
        finish_reason=cast(lm15.FinishReason, finish_reason),
        usage=lm15.Usage(
            input_tokens=prompt_tokens,
            output_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
        ),
    )


# ---- messages as token ids -----------------------------------------------------------------------


Ids = tuple[int, ...]
KEPT = 1024
"""How many rendered prompts a renderer keeps (ours): more than the different prompts of one step."""


def plain_texts(request: lm15.Request) -> tuple[object, ...] | None:
    """All that the prompt of a request depends on, if it is texts alone; None if there is more, such as tools."""
    config, system = request.config, request.system
    if request.tools or config.reasoning is not None or config.stop or config.extensions:
        return None
    texts = tuple((m.role, *[p.text for p in m.parts if isinstance(p, lm15.TextPart)]) for m in request.messages)
    whole = all(len(shown) == 1 + len(m.parts) for shown, m in zip(texts, request.messages, strict=True))
    return (system, *texts) if whole and isinstance(system, str | None) else None


class PromptRenderer:
    """Renders requests with one tokenizer's chat template. Thread-safe."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", traits: TemplateTraits):
        self._tokenizer, self._traits = tokenizer, traits
        self._lock = threading.Lock()  # fast tokenizers refuse concurrent use
        self._known: dict[object, Ids] = {}
        """The last `KEPT` prompts of plain texts; a group's rollouts all ask for the same one."""

    def ids(self, request: lm15.Request) -> Ids:
        """The prompt's ids, as the template renders them.

        Raises:
            dspy.lm15.UnsupportedFeatureError: the tokenizer has no template, or the template refuses the messages.
        """
        if not self._tokenizer.chat_template:
            raise lm15.UnsupportedFeatureError(
                "the model's tokenizer has no chat template, as is usual for a base model, so it cannot read chat "
                "messages; choose the instruct model, or set tokenizer.chat_template and save it into the model's "
                "folder"
            )
        refuse_reshaped_sampling(request)
        dated = "strftime_now" in str(self._tokenizer.chat_template)  # its prompts change with the day
        key = None if dated else plain_texts(request)
        if key is not None and (known := self._known.get(key)) is not None:
            return known
        request = fitted(request, self._traits)
        messages, options = chat_messages(request), chat_options(request)
        try:
            with self._lock:
                if key is not None and (known := self._known.get(key)) is not None:  # another thread was first
                    return known
                ids = tuple(rendered_ids(self._tokenizer, messages, add_generation_prompt=True, **options))
                if key is not None:
                    self._keep(key, ids)
                return ids
        except TemplateError as error:  # e.g. user and assistant must alternate
            raise lm15.UnsupportedFeatureError(f"the chat template refuses the messages: {error}") from error

    def continued(self, request: lm15.Request, earlier: Sequence[Ids]) -> Ids | None:
        """The prompt's ids, beginning with one of ``earlier``.

        Args:
            request: The request.
            earlier: Ids of earlier prompts, each followed by its sampled reply.

        Returns:
            None if the prompt's text begins with none of their texts (the template or the adapter rewrote the reply),
            or if the request asks for something that is not rendered here.
        """
        if request.config.extensions or request.config.stop:
            return None
        try:
            rendered = self.ids(request)
        except lm15.LM15Error:
            return None  # the engine raises the same error when it renders the request
        with self._lock:
            return continued(rendered, earlier, self._text)

    def _keep(self, key: object, ids: Ids) -> None:
        while len(self._known) >= KEPT:
            del self._known[next(iter(self._known))]
        self._known[key] = ids

    def _text(self, ids: Sequence[int]) -> str:
        return decoded(self._tokenizer, ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def continued(rendered: Ids, earlier: Sequence[Ids], text_of: Callable[[Sequence[int]], str]) -> Ids | None:
    """``rendered`` with its beginning replaced by the sampled ids of the same text; None if no beginning matches.

    >>> text_of = lambda ids: "".join({1: "a", 2: "b", 3: "ab", 9: "."}[i] for i in ids)
    >>> continued((3, 9, 1), [(1, 2)], text_of)         # "ab" was sampled as "a", "b"
    (1, 2, 9, 1)
    """
    text = text_of(rendered)
    for ids in sorted(earlier, key=lambda ids: (-len(ids), ids)):
        if rendered[: len(ids)] == ids:
            return rendered
        beginning = text_of(ids)
        if not text.startswith(beginning):
            continue
        # The most tokens with a text of that length: part of a multi-token character may already decode to a character.
        lengths = range(len(rendered) + 1)
        cut = bisect_right(lengths, len(beginning), key=lambda tokens: len(text_of(rendered[:tokens]))) - 1
        if text_of(rendered[:cut]) == beginning and text_of(ids + rendered[cut:]) == text:
            return ids + rendered[cut:]
    return None


# ---- a tokenizer's answers, one type each; transformers' own methods return one of several -------


def decoded(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], **options: bool) -> str:
    """The text of one sequence of ids.

    Args:
        options: Further arguments of ``decode``, e.g. ``skip_special_tokens``.
    """
    decode: Callable[..., object] = tokenizer.decode
    return str(decode(ids, **options))


def rendered_ids(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Mapping[str, object]], **options: object
) -> list[int]:
    """The ids of a conversation, as the tokenizer's chat template writes it.

    Args:
        options: Further arguments of ``apply_chat_template``, e.g. ``tools``.

    Raises:
        Exception: whatever the template raises on messages that it refuses.
    """
    render: Callable[..., object] = tokenizer.apply_chat_template
    rendered = render(messages, return_dict=True, **options)
    assert isinstance(rendered, Mapping), "return_dict asks for a BatchEncoding"
    return list(rendered["input_ids"])
