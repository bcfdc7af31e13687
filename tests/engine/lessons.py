"""What the tiny model of `taught` knows by heart: to greet, to call a tool, to read its result, to answer DSPy."""

import dspy
from dspy import lm15

from tests.engine.taught import Lesson, Script

ADD = lm15.FunctionTool("add", "Add.", {"type": "object", "properties": {"a": {"type": "integer"}}})
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
ANSWER = "[[ ## answer ## ]]\n{}\n\n[[ ## completed ## ]]"


def ask(*messages: lm15.Message, tools: tuple[lm15.FunctionTool, ...] = (), **config) -> lm15.Request:
    config = {"max_tokens": 60, "temperature": 0.3, **config}
    return lm15.Request("m", messages, tools=tools, config=lm15.Config(**config))


GREET, COUNT = ask(lm15.Message.user("Greet me.")), ask(lm15.Message.user("Add one."), tools=(ADD,))
CALLED = lm15.Message(role="assistant", parts=(lm15.ToolCallPart("c1", "add", {"a": 1}),))
RESULT = lm15.Message(role="tool", parts=(lm15.ToolResultPart("c1", (lm15.TextPart("two"),), name="add"),))
COUNTED = ask(*COUNT.messages, CALLED, RESULT, tools=(ADD,))


def asked_by(program, **inputs) -> lm15.Request:
    """What DSPy asks of an LM that thinks."""
    script = Script(lm15.TextPart(ANSWER.format("x")))
    program.set_lm(dspy.LM("m", engine=script, cache=False))
    program(**inputs)
    return script.asked[0]


PLAIN, NATIVE = dspy.Predict("question -> answer"), dspy.Predict("question -> why: dspy.Reasoning, answer")
LESSONS = (
    Lesson(GREET, "<think>\nBe kind.\n</think>\n\nHello there."),
    Lesson(COUNT, f"<think>\nUse the tool.\n</think>\n\n{CALL}"),
    Lesson(COUNTED, "<think>\nDone.\n</think>\n\nIt is two."),
    Lesson(
        asked_by(PLAIN, question="Who?"), f"<think>\n{ANSWER.format('wrong')}\n</think>\n\n{ANSWER.format('right')}"
    ),
    Lesson(asked_by(NATIVE, question="Who?"), f"<think>\nI know.\n</think>\n\n{ANSWER.format('me')}"),
)
