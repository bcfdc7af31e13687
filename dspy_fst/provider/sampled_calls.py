"""What a PolicyLM has sampled under its current weights, to be found again by the text that DSPy hands over.

DSPy's GRPO (3.4.1) hands over text: the prompt as the adapter formats it without demonstrations, and the reply as the
adapter writes what it parsed. Tokenized again, neither need be what was sampled. So every reply is kept here with its
ids, and each row is trained on the ids of the reply that it tells of. A row for which there is none is left out.
"""

import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import dspy
from dspy import lm15

from dspy_fst.engine.base import Completion
from dspy_fst.rollout.call_recorder import call_of
from dspy_fst.rollout.chat_adapters import adapter_in_force
from dspy_fst.rollout.written_replies import reply_text
from dspy_fst.types import Call

NO_PROMPT = "prompt never sampled"
"""The adapter that sampled is not the one that DSPy formats with; or the program's inputs, not the predictor's, stand
in a row for a reply that did not parse."""
NO_REPLY = "reply not sampled under these weights"
TAKEN = "reply told twice"
Conversation = tuple[tuple[str, str], ...]
"""Role and text of each message, e.g. ``(("system", "Sort."), ("user", "2 1"))``."""


@dataclass
class _Sampled:
    call: Call
    asked: Conversation
    taken: bool = False


@dataclass
class _UnderTheseWeights:
    """What was sampled since the weights moved last."""

    by_row: dict[tuple[Conversation, str], list[_Sampled]] = field(default_factory=lambda: defaultdict(list))
    asked: set[Conversation] = field(default_factory=set)
    count: int = 0


class SampledCalls:
    """Thread-safe. `hear` is told of every reply."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept = _UnderTheseWeights()
        self.without_demos = 0
        """Rows whose demonstrations DSPy left out, and which are trained with them."""

    def hear(self, request: lm15.Request, completion: Completion) -> None:
        """Keep a reply. Called in the context of the predictor that asked."""
        asked, text = _asked(request), (completion.response.text or "").strip()
        if asked is None:
            return
        sampled = _Sampled(call_of("", request, completion, "first"), asked)
        replies = {text, *((written,) if (written := _written(text)) is not None else ())}
        with self._lock:
            self._kept.count += 1
            for prompt in {asked, _ends(asked)}:
                self._kept.asked.add(prompt)
                for reply in replies:
                    self._kept.by_row[prompt, reply].append(sampled)

    def forget(self) -> None:
        """The weights have moved: what was sampled before is off-policy."""
        with self._lock:
            self._kept = _UnderTheseWeights()

    @property
    def count(self) -> int:
        """Replies kept."""
        with self._lock:
            return self._kept.count

    def take(self, row: Mapping[str, Any]) -> Call | str:
        """The call that a row tells of, each once; or why there is none."""
        asked, reply = _told(row["messages"]), str(row["completion"]["content"]).strip()
        with self._lock:
            whole = self._kept.by_row.get((asked, reply), [])
            found = whole or self._kept.by_row.get((_ends(asked), reply), [])
            if not found:
                return NO_REPLY if _ends(asked) in self._kept.asked else NO_PROMPT
            free = next((sampled for sampled in found if not sampled.taken), None)
            if free is None:
                return TAKEN
            free.taken = True
            self.without_demos += free.asked != asked
            return free.call


def _ends(conversation: Conversation) -> Conversation:
    """Its system message and its question alone: demonstrations stand between them."""
    system = conversation[:1] if conversation and conversation[0][0] == "system" else ()
    return (*system, *conversation[-1:])


def _told(messages: Sequence[Mapping[str, Any]]) -> Conversation:
    return tuple((str(message["role"]), str(message["content"]).strip()) for message in messages)


def _asked(request: lm15.Request) -> Conversation | None:
    """A request's messages; None if they are not texts alone."""
    if request.tools or not isinstance(request.system, str | None):
        return None
    texts = [[part.text for part in message.parts if isinstance(part, lm15.TextPart)] for message in request.messages]
    if any(len(parts) != len(message.parts) for parts, message in zip(texts, request.messages, strict=True)):
        return None
    system = (("system", request.system.strip()),) if request.system else ()
    turns = zip(request.messages, texts, strict=True)
    return (*system, *((message.role, "\n".join(parts).strip()) for message, parts in turns))


def _written(text: str) -> str | None:
    """A reply as DSPy writes what the adapter in force parses of it; None if it does not parse."""
    callers = dspy.settings.caller_modules or []
    predictor = next((module for module in reversed(callers) if isinstance(module, dspy.Predict)), None)
    if predictor is None:
        return None
    try:
        outputs = adapter_in_force().parse(predictor.signature, text)
    except Exception:  # an adapter may be any code; the reply as it is stays its key
        return None
    written = reply_text(predictor.signature, outputs)
    return None if written is None else written.strip()
