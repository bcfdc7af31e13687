"""Measures what a model's chat template does with a conversation, and fits requests to it.

The contract of this file: every request is fitted before it is rendered, in the same way for every engine and for code
that renders a prompt again. A template without a system role then neither drops a text nor refuses a program.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from dspy import lm15

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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


def _rendered(
    tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, str]], *, prompted: bool = True
) -> str | None:
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
