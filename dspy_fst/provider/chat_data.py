"""DSPy's training data, chat messages as text, as the requests and replies of the policy."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dspy import lm15
from dspy.clients.utils_finetune import TrainDataFormat

from dspy_fst.slow.supervised import Pair

if TYPE_CHECKING:
    from dspy_fst.rollout.written_replies import ReplyWriter

SHOWN = 3
"""Rows with a fault that an error names."""
UNRENDERED, LONG = "prompt not rendered", "longer than the context"
REMEDIES = {
    UNRENDERED: "the model's chat template refuses these turns; use a chat adapter that writes others, or a model "
    "whose template takes them",
    LONG: "shorten prompts and replies, or use a model with a longer context",
}
"""Why a row is left out -> what to do."""
Messages = Sequence[Mapping[str, Any]]


def format_fault(given: object, wanted: TrainDataFormat) -> str | None:
    """Why data of this format cannot be taken."""
    if given == wanted:
        return None
    if wanted == TrainDataFormat.GRPO_CHAT:
        return (
            f"train_data_format={given!r}: lm.reinforce() takes {wanted.value!r}, groups of scored replies; use "
            "that, or lm.finetune() for 'chat'"
        )
    if given == TrainDataFormat.GRPO_CHAT:
        return "train_data_format='grpo_chat': scored groups are for lm.reinforce(); lm.finetune() takes 'chat'"
    return (
        f"train_data_format={given!r}: a PolicyLM learns chat messages only, 'chat'; use a chat adapter whose replies "
        "DSPy writes so, dspy.ChatAdapter or dspy.XMLAdapter"
    )


def chat_faults(rows: object) -> list[str]:
    """What is wrong with rows of ``{"messages": [...]}`` whose last message is the reply to learn."""
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        return [f"train_data: a list of {{'messages': [...]}} is needed, not {type(rows).__name__}"]
    if not rows:
        return [
            "train_data: there is nothing to learn from; no trace was left, or none whose score was above 0: give a "
            "teacher that scores, or start with FSTOptimizer(warm_start='labels')"
        ]
    found = [f"train_data[{index}]{fault}" for index, row in enumerate(rows) if (fault := _row_fault(row))]
    more = [f"train_data: {len(found) - SHOWN} more rows have faults"] if len(found) > SHOWN else []
    return found[:SHOWN] + more


def _row_fault(row: object) -> str | None:
    messages = row.get("messages") if isinstance(row, Mapping) else None
    if not isinstance(messages, Sequence) or len(messages) < 2:
        return ": 'messages' with a prompt and a reply are needed"
    for place, message in enumerate(messages):
        if fault := _message_fault(message, first=place == 0):
            return f"['messages'][{place}]: {fault}"
    if messages[-1]["role"] != "assistant":
        return f"['messages'][{len(messages) - 1}]: the last message must be the assistant's, the reply that is learnt"
    return None


def _message_fault(message: object, *, first: bool) -> str | None:
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
        return "its content is no text; a program with images or native tool calls is trained by FSTOptimizer"
    if message.get("role") not in ("system", "user", "assistant"):
        return f"role={message.get('role')!r}: use 'system', 'user' or 'assistant'"
    if message["role"] == "system" and not first:
        return "a system message must be the first"
    return "the assistant cannot begin" if first and message["role"] == "assistant" else None


def request_of(messages: Messages) -> lm15.Request:
    """The request that these messages are.

    >>> request_of([{"role": "system", "content": "Sort."}, {"role": "user", "content": "2 1"}]).system
    'Sort.'
    """
    system = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
    turns = [message for message in messages if message["role"] != "system"]
    makers = {"user": lm15.Message.user, "assistant": lm15.Message.assistant}
    told = tuple(makers[message["role"]](message["content"]) for message in turns)
    return lm15.Request(model="policy", system=system, messages=told)


def pairs_of(
    rows: Sequence[Mapping[str, Any]], writer: "ReplyWriter", context: int | None
) -> tuple[list[Pair], Counter[str]]:
    """What is learnt of these rows, in ids; and how many were left out, by reason.

    Args:
        context: Tokens of the longest prompt and reply that an engine would serve; None: no limit.
    """
    left_out: Counter[str] = Counter()
    return [*_pairs(rows, writer, context, left_out)], left_out


def _pairs(
    rows: Sequence[Mapping[str, Any]], writer: "ReplyWriter", context: int | None, left_out: Counter[str]
) -> Iterator[Pair]:
    for row in rows:
        *asked, said = row["messages"]
        prompt, reply = writer.asked(request_of(asked)), writer.said(said["content"])
        if prompt is None:
            left_out[UNRENDERED] += 1
        elif context is not None and len(prompt) + len(reply) > context:
            left_out[LONG] += 1
        else:
            yield Pair("", prompt, reply)
