"""What a model's chat template does with a conversation, measured on the template; and requests fitted to it.

The contract of this file: a request is fitted before it is rendered, in one way for every engine and for whoever
renders a prompt again, so that a template without a system role never drops a text or refuses a program.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from dspy import lm15

SEPARATOR = "\n\n"
"""Between the system text and the user's, and between turns that are joined."""
_SYSTEM, _ASKED, _SAID, _THOUGHT, _AGAIN = "qsystem", "qasked", "qsaid", "qthought", "qagain"
"""Texts of the probes: in lower case and without spaces at their ends, so that no template alters them."""
_ROLE_LINES = ("system", "user", "assistant", "model", "[INST]", "### Instruction:", "User:", "Human:")
"""How templates head a turn where no special token does it; no words of the template's own."""


@dataclass(frozen=True)
class TemplateTraits:
    """How one chat template treats a conversation.

    >>> TemplateTraits(system="refused", alternating=True).has_system
    False
    """

    system: Literal["kept", "refused", "dropped"] = "kept"
    """What becomes of a system message: ``"refused"`` raises, ``"dropped"`` renders the same text without it."""
    alternating: bool = False
    """Whether two turns of one role in succession are refused."""
    keeps_replies: bool = True
    """Whether the prompt of the next turn begins with this turn's prompt and reply, letter by letter."""
    keeps_thoughts: bool = True
    """The same for a reply with thoughts; many templates leave the thoughts of earlier turns out."""
    own_system: str = ""
    """What it writes before the first turn of a conversation without a system message; empty where it writes nothing
    beside special tokens."""

    @property
    def has_system(self) -> bool:
        return self.system == "kept"

    def without_thoughts(self) -> "TemplateTraits":
        """The same for a model that does not think: no reply of its has thoughts that could be left out."""
        return replace(self, keeps_thoughts=self.keeps_replies)

    @classmethod
    def of(cls, tokenizer: Any) -> "TemplateTraits":
        """The traits of a tokenizer's template; the defaults where it has none, or fails on a plain question."""
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
"""Of a template that shows every conversation as it is."""


def fitted(request: lm15.Request, traits: TemplateTraits) -> lm15.Request:
    """The request as this template can show it whole.

    A system text that the template would refuse or drop goes into the first user turn, before the user's own text.
    Where turns must alternate, neighbours of one role (texts only) are joined.
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
    """One message that says the first's text, then the second's; the second's other parts follow."""
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


def _rendered(tokenizer: Any, messages: list[dict[str, str]], *, prompted: bool = True) -> str | None:
    """The conversation as text; None when the template refuses it."""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompted))
    except Exception:  # a template may raise anything
        return None


def _goes_on(tokenizer: Any, begun: list[dict[str, str]], reply: dict[str, str], written: str) -> bool:
    """Whether the prompt after one more turn begins with the prompt before it, and with what the reply wrote."""
    before = _rendered(tokenizer, begun)
    after = _rendered(tokenizer, [*begun, reply, _turn("user", _AGAIN)])
    if before is None or after is None or not after.startswith(before):
        return False
    return written in after[len(before) :]


def _written_before(tokenizer: Any, alone: str) -> str:
    """Words of the template's own in front of a lone question."""
    lead = alone.partition(_ASKED)[0]
    for token in getattr(tokenizer, "all_special_tokens", ()):
        lead = lead.replace(token, "\n")
    lines = [line.strip() for line in lead.splitlines()]
    return " ".join(line for line in lines if line and line not in _ROLE_LINES)
