"""Fakes for the edges: an engine that says what it is told, so that everything between is the real code."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from dspy import lm15

from dspy_fst.engine.base import Checkpoint, Completion, Holding
from dspy_fst.engine.chat import ChatMessage, chat_messages, text_response
from dspy_fst.engine.replies import ReplyReader
from dspy_fst.policy_lm import PolicyLM

Speak = Callable[[list[ChatMessage], int], str]
"""(chat messages, seed) -> the reply's text."""


class ScriptedEngine:
    """An engine whose tokens are characters: ids are code points, every log-probability is -1."""

    def __init__(self, speak: Speak):
        self.speak = speak
        self.version: str | None = None
        self.loaded: list[Checkpoint] = []
        self.expected: list[int] = []
        self.closed = 0

    @property
    def weights(self) -> str | None:
        return self.version

    def load(self, checkpoint: Checkpoint) -> None:
        self.loaded.append(checkpoint)
        self.version = checkpoint.version

    def complete(
        self, request: lm15.Request, seed: int, prompt_ids: tuple[int, ...] | None = None, adapter: str | None = None
    ) -> Completion:
        messages = chat_messages(request)
        text = self.speak(messages, seed)
        prompt = tuple(ord(c) for message in messages for c in message["content"])
        ids = tuple(ord(c) for c in text)
        response = text_response(request.model, text, "stop", len(prompt), len(ids))
        return Completion(response, prompt, ids, (-1.0,) * len(ids), "stop", str(self.version))

    def score(self, sequences: Sequence[Sequence[int]], adapter: str | None = None) -> list[list[float]]:
        return [[-1.0] * (len(sequence) - 1) for sequence in sequences]

    def held(self, checkpoint: Checkpoint) -> Holding | None:
        return None

    def expect(self, callers: int) -> None:
        self.expected.append(callers)

    def on_recovery(self, tell: object, verify: object) -> None:
        pass

    def take_counts(self) -> Counter[str]:
        return Counter()

    def close(self) -> None:
        self.closed += 1


def scripted_policy(speak: Speak, version: str = "base") -> tuple[PolicyLM, ScriptedEngine]:
    """A PolicyLM over a ScriptedEngine."""
    policy = PolicyLM("no-model", engine="in_process", max_tokens=64, version=version)
    engine = ScriptedEngine(speak)
    engine.version = version
    policy.handle._make = lambda: engine
    policy.handle._reader = ReplyReader.load(Path("nowhere"))
    return policy, engine


def fields(**values: object) -> str:
    """A reply as dspy.ChatAdapter reads it."""
    shown = "\n\n".join(f"[[ ## {name} ## ]]\n{value}" for name, value in values.items())
    return f"{shown}\n\n[[ ## completed ## ]]"
