"""A loop with native tool calls through compile(): every token exact, and each loop one sequence for the trainer."""

import dspy
import pytest
from dspy import lm15
from dspy.adapters.types.tool import ToolCallResults

from dspy_fst.slow.batching import Scored, chains, micro_batches
from dspy_fst.types import Call
from tests.engine.taught import TEMPLATE, THINKS, Lesson, Script, teach
from tests.pipelines.watched import assert_tokens_are_exact, lab_policy, run_watched

TASKS = ("1 2 3", "2 2 4")
GROUP = 4


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


class Adder(dspy.Module):
    """Adds a list of numbers, two at a time, until it answers without a tool."""

    def __init__(self):
        super().__init__()
        fields = {
            "task": (str, dspy.InputField()),
            "history": (dspy.History, dspy.InputField()),
            "tools": (list[dspy.Tool], dspy.InputField()),
            "answer": (str, dspy.OutputField()),
            "calls": (dspy.ToolCalls, dspy.OutputField()),
        }
        self.act = dspy.Predict(dspy.Signature(fields, "Add the numbers."))

    def forward(self, numbers):
        history, tool, task = dspy.History(messages=[]), dspy.Tool(add), numbers
        for _ in range(3):
            said = self.act(task=task, history=history, tools=[tool])
            if not said.calls:
                break
            values = [tool(**call.args) for call in said.calls.tool_calls]
            results = ToolCallResults.from_tool_calls_and_values(said.calls, values)
            done = said.calls.model_copy(update={"tool_call_results": results})
            history.messages.append({"task": task, "calls": done})
            task = "Go on."
        return dspy.Prediction(answer=said.answer)


def answered(answer: int) -> str:
    return f"[[ ## answer ## ]]\n{answer}\n\n[[ ## completed ## ]]"


def called(**numbers: int) -> lm15.ToolCallPart:
    return lm15.ToolCallPart("c" + "".join(map(str, numbers.values())), "add", numbers)


def lessons_on(task: str) -> list[Lesson]:
    """Two additions, then the sum, or one more than it."""
    first, second, third = map(int, task.split())
    numbers = [{"a": first, "b": second}, {"a": first + second, "b": third}]
    total = first + second + third
    script = Script(*(called(**pair) for pair in numbers), lm15.TextPart(answered(total)))
    program = Adder()
    program.set_lm(dspy.LM("m", engine=script, cache=False))
    program(numbers=task)
    calls = [
        f'<tool_call>\n{{"name": "add", "arguments": {{"a": {n["a"]}, "b": {n["b"]}}}}}\n</tool_call>' for n in numbers
    ]
    replies = [*calls, answered(total), answered(total + 1)]
    return [Lesson(request, reply) for request, reply in zip([*script.asked, script.asked[-1]], replies, strict=True)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One step on each task's group, the tools in the chat template."""
    folder = tmp_path_factory.mktemp("loop")
    with dspy.context(adapter=dspy.ChatAdapter(use_native_function_calling=True)):
        lessons = [lesson for task in TASKS for lesson in lessons_on(task)]
        model = teach(folder / "model", lessons, template=TEMPLATE.replace(THINKS, ""))
        program = Adder()
        program.set_lm(lab_policy(model, temperature=1.0).copy(max_tokens=60))
        trainset = [dspy.Example(numbers=task).with_inputs("numbers") for task in TASKS]
        recipe = {"problems_per_step": 2, "population_size": 1, "group_size": GROUP, "steps_per_cycle": 2}
        return run_watched(
            program, folder / "run", metric=is_the_sum, trainset=trainset, method="rl", cycles=1, **recipe
        )


def is_the_sum(gold, pred, trace=None) -> float:
    return float(pred.answer == str(sum(map(int, gold.numbers.split()))))


def sequences(calls: list[Call]) -> list[Scored]:
    return [Scored((*call.prompt_ids, *call.completion_ids), len(call.prompt_ids)) for call in calls]


def test_the_model_calls_its_tools_and_every_token_is_exact(run):
    assert_tokens_are_exact(run)
    (played, again) = run.played("step-0"), run.played("step-1")
    whole = [rollout for rollout in (*played, *again) if len(rollout.calls) == 3]
    assert len(whole) >= GROUP
    for rollout in whole:
        assert [call.finish_reason for call in rollout.calls[:2]] == ["tool_calls"] * 2
        assert {call.predictor for call in rollout.calls} == {"act"}
    assert run.rows
    assert not any(rollout.mask for rollout in played)


def test_each_loop_is_one_sequence_for_the_trainer(run):
    for rollout in run.played("step-0"):
        assert chains(sequences(list(rollout.calls))) == [list(range(len(rollout.calls)))]
    learnt = [report["update"] for report in run.reports("step") if report["update"]["rows"]]
    for batch, update in zip((batch for batch in run.batches if batch.rows), learnt, strict=True):
        texts = {(*row.prompt_ids, *row.completion_ids)[:-1] for row in batch.rows}
        # The last calls of the loops: no other text goes on from theirs. Loops that said the same are one.
        loops = sum(sum(other[: len(text)] == text for other in texts) == 1 for text in texts)
        assert (update["rows"], update["sequences"]) == (len(batch.rows), loops)
        assert loops < len(batch.rows)


def test_a_loop_costs_what_its_last_call_costs(run):
    rollout = max(run.played("step-0"), key=lambda rollout: len(rollout.calls))
    turns = sequences(list(rollout.calls))
    (micro,) = micro_batches(turns, budget=10_000, share=False)
    one_by_one = sum(len(turn.ids) - 1 for turn in turns)
    assert micro.tokens_read == len(turns[-1].ids) - 1
    assert micro.tokens_read < 0.5 * one_by_one
